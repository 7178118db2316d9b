/* forward.c -- training forward: statistics, then normalization, slab by slab where a slab stays in cache. */
#include "parallel.h"
#include "pass.h"

#include <string.h>

typedef struct {
    fbn_work work;
    fbn_affine affine;
    fbn_moments *out;
    double *var;
} fbn_forward_call;

/* From combined partials to coefficients. */
static void fbn_forward_settle(void *context, fbn_coefs *coefs, int64_t first, int64_t last)
{
    fbn_forward_call *f = context;
    const fbn_partials *p = &f->work.partials;
    const size_t bytes = (size_t)(last - first) * sizeof(double);
    const double count = (double)f->out->count;
    const double *m2 = p->c;
    double *var = f->var;
    memcpy(f->out->mean + first, p->a + first, bytes);
    memcpy(f->out->mean_lo + first, p->b + first, bytes);
    memcpy(f->out->m2 + first, m2 + first, bytes);
    for (int64_t c = first; c < last; c++) {
        var[c] = m2[c] / count;
    }
    fbn_coefs_fill(coefs, &f->affine, true, NULL, first, last);
}

static void fbn_forward_slabs(int tid, int team, void *context)
{
    static const fbn_slab_steps steps = {NULL, fbn_forward_settle};
    fbn_forward_call *f = context;
    fbn_each_slab(&f->work, NULL, &steps, f, tid, team);
}

static void fbn_forward_reduce(int tid, int team, void *context)
{
    fbn_forward_call *f = context;
    fbn_reduce(&f->work.pass, &f->work.partials, NULL, NULL, &f->work.rooms[tid], 0, f->work.pass.g.channels, tid,
               team);
}

static void fbn_forward_apply(int tid, int team, void *context)
{
    fbn_forward_call *f = context;
    fbn_apply_pass(&f->work.pass, &f->work.coefs, &f->work.rooms[tid], tid, team);
}

fbn_status fbn_forward(const fbn_geometry *g, fbn_tensor x, const fbn_tensor *residual, fbn_tensor y, uint8_t *gate,
                       const fbn_affine *affine, fbn_act act, int threads, fbn_moments *out, double *var)
{
    fbn_forward_call f = {.work = {.pass = {.x = x, .y = y, .gate = (uint16_t *)(void *)gate}}};
    if (residual != NULL) {
        f.work.pass.other = *residual;
    }
    if (x.data == NULL || y.data == NULL || affine == NULL || out == NULL || out->mean == NULL ||
        out->mean_lo == NULL || out->m2 == NULL || var == NULL ||
        !fbn_pass_ready(&f.work.pass, g, act, FBN_PLAN_FORWARD, threads)) {
        return FBN_BAD_ARGUMENT;
    }
    fbn_status status = fbn_work_begin(&f.work, FBN_NEEDS_SUMS | FBN_NEEDS_COEFS);
    if (status != FBN_OK) {
        return status;
    }
    out->count = g->outer * g->inner;
    f.out = out;
    f.affine = *affine;
    f.affine.mean = out->mean;
    f.affine.mean_lo = out->mean_lo;
    f.affine.var = f.var = var;
    int team = f.work.pass.plan.team;
    if (f.work.pass.plan.slab > 0) {
        fbn_parallel(team, fbn_forward_slabs, &f);
    } else {
        fbn_parallel(team, fbn_forward_reduce, &f);
        fbn_combine(&f.work.pass, &f.work.partials, 0, g->channels);
        fbn_forward_settle(&f, &f.work.coefs, 0, g->channels);
        fbn_parallel(team, fbn_forward_apply, &f);
    }
    fbn_work_end(&f.work);
    return FBN_OK;
}
