/* backward.c -- the fused backward: reduce dy, then apply, slab by slab where a slab stays in cache. */
#include "parallel.h"
#include "pass.h"

#include <string.h>

typedef struct {
    fbn_work work;
    fbn_affine affine;
    bool batch;
    fbn_backward_sums sums;
    double *sum_dy, *sum_dy_xmu; /* what a reduce writes */
} fbn_backward_call;

/* Combines the strips, and settles what the kernels left out: they subtract the mean rounded to the arithmetic. */
static void fbn_backward_settle(fbn_backward_call *b, int64_t first, int64_t last)
{
    const fbn_partials *p = &b->work.partials;
    fbn_combine(&b->work.pass, &b->work.partials, first, last);
    for (int64_t c = first; c < last; c++) {
        double hi = fbn_round_mean(b->work.pass.g.dtype, b->affine.mean[c]);
        double rest = (b->affine.mean[c] - hi) + (b->affine.mean_lo == NULL ? 0.0 : b->affine.mean_lo[c]);
        b->sum_dy[c] = p->a[c];
        b->sum_dy_xmu[c] = p->b[c] - (rest == 0.0 ? 0.0 : rest * p->a[c]);
    }
}

/* What a reduce needs of the forward's coefficients: all, or nothing. */
static bool fbn_recomputes_sign(const fbn_backward_call *b)
{
    return b->work.pass.rule.kind != FBN_IDENTITY && b->work.pass.gate == NULL;
}

static void fbn_backward_slab(void *context, int tid, int64_t first, int64_t last, int64_t ahead)
{
    fbn_backward_call *b = context;
    fbn_coefs coefs = b->work.coefs; /* the same arrays, but this slab's own flags */
    if (fbn_recomputes_sign(b)) {
        fbn_coefs_fill(&coefs, &b->affine, b->batch, NULL, first, last);
    }
    fbn_reduce(&b->work.pass, &b->work.partials, b->affine.mean, &coefs, &b->work.rooms[tid], first, last, 0, 1);
    fbn_backward_settle(b, first, last);
    fbn_coefs_fill(&coefs, &b->affine, b->batch, &b->sums, first, last);
    fbn_apply_pass(&b->work.pass, &coefs, &b->work.rooms[tid], first, last, ahead, 0, 1);
}

static void fbn_backward_slabs(int tid, int team, void *context)
{
    fbn_backward_call *b = context;
    fbn_each_slab(&b->work, tid, team, fbn_backward_slab, b);
}

static void fbn_backward_reduce_task(int tid, int team, void *context)
{
    fbn_backward_call *b = context;
    fbn_reduce(&b->work.pass, &b->work.partials, b->affine.mean, &b->work.coefs, &b->work.rooms[tid], 0,
               b->work.pass.g.channels, tid, team);
}

static void fbn_backward_apply_task(int tid, int team, void *context)
{
    fbn_backward_call *b = context;
    fbn_apply_pass(&b->work.pass, &b->work.coefs, &b->work.rooms[tid], 0, b->work.pass.g.channels, 0, tid, team);
}

static void fbn_backward_reduce_all(fbn_backward_call *b)
{
    if (fbn_recomputes_sign(b)) {
        fbn_coefs_fill(&b->work.coefs, &b->affine, b->batch, NULL, 0, b->work.pass.g.channels);
    }
    fbn_parallel(b->work.pass.plan.team, fbn_backward_reduce_task, b);
    fbn_backward_settle(b, 0, b->work.pass.g.channels);
}

static void fbn_backward_apply_all(fbn_backward_call *b)
{
    fbn_coefs_fill(&b->work.coefs, &b->affine, b->batch, &b->sums, 0, b->work.pass.g.channels);
    fbn_parallel(b->work.pass.plan.team, fbn_backward_apply_task, b);
}

static bool fbn_backward_ready(fbn_backward_call *b, const fbn_geometry *g, fbn_tensor x, fbn_tensor dy,
                               const fbn_affine *affine, const uint8_t *gate, fbn_act act, fbn_op op, int threads)
{
    if (x.data == NULL || dy.data == NULL || affine == NULL || affine->mean == NULL || affine->var == NULL) {
        return false;
    }
    b->work.pass.x = x;
    b->work.pass.other = dy;
    /* Read only: a backward's kernels write no gate. */
    memcpy(&b->work.pass.gate, &gate, sizeof gate);
    b->work.pass.backward = true;
    b->affine = *affine;
    return fbn_pass_ready(&b->work.pass, g, act, op, threads);
}

fbn_status fbn_backward_reduce(const fbn_geometry *g, fbn_tensor x, fbn_tensor dy, const uint8_t *gate,
                               const fbn_affine *affine, fbn_act act, int threads, double *sum_dy, double *sum_dy_xmu)
{
    fbn_backward_call b = {.batch = true, .sum_dy = sum_dy, .sum_dy_xmu = sum_dy_xmu};
    if (sum_dy == NULL || sum_dy_xmu == NULL ||
        !fbn_backward_ready(&b, g, x, dy, affine, gate, act, FBN_PLAN_REDUCE, threads)) {
        return FBN_BAD_ARGUMENT;
    }
    fbn_status status = fbn_work_begin(&b.work, FBN_NEEDS_SUMS | FBN_NEEDS_COEFS);
    if (status == FBN_OK) {
        fbn_backward_reduce_all(&b);
        fbn_work_end(&b.work);
    }
    return status;
}

fbn_status fbn_backward_apply(const fbn_geometry *g, fbn_tensor x, fbn_tensor dy, fbn_tensor dx,
                              const fbn_tensor *dresidual, const uint8_t *gate, const fbn_affine *affine, fbn_act act,
                              const double *sum_dy, const double *sum_dy_xmu, double count, int threads)
{
    fbn_backward_call b = {.batch = count != 0.0, .sums = {sum_dy, sum_dy_xmu, count}};
    b.work.pass.y = dx;
    if (dresidual != NULL) {
        b.work.pass.extra = *dresidual;
    }
    if (dx.data == NULL || sum_dy == NULL || sum_dy_xmu == NULL ||
        !fbn_backward_ready(&b, g, x, dy, affine, gate, act, FBN_PLAN_APPLY, threads)) {
        return FBN_BAD_ARGUMENT;
    }
    fbn_status status = fbn_work_begin(&b.work, FBN_NEEDS_COEFS);
    if (status == FBN_OK) {
        fbn_backward_apply_all(&b);
        fbn_work_end(&b.work);
    }
    return status;
}

fbn_status fbn_backward(const fbn_geometry *g, fbn_tensor x, fbn_tensor dy, fbn_tensor dx, const fbn_tensor *dresidual,
                        const uint8_t *gate, const fbn_affine *affine, fbn_act act, bool training, int threads,
                        double *sum_dy, double *sum_dy_xmu)
{
    fbn_backward_call b = {.batch = training, .sum_dy = sum_dy, .sum_dy_xmu = sum_dy_xmu};
    b.work.pass.y = dx;
    if (dresidual != NULL) {
        b.work.pass.extra = *dresidual;
    }
    if (dx.data == NULL || sum_dy == NULL || sum_dy_xmu == NULL ||
        !fbn_backward_ready(&b, g, x, dy, affine, gate, act, FBN_PLAN_BACKWARD, threads)) {
        return FBN_BAD_ARGUMENT;
    }
    b.sums = (fbn_backward_sums){sum_dy, sum_dy_xmu, training ? (double)(g->outer * g->inner) : 0.0};
    fbn_status status = fbn_work_begin(&b.work, FBN_NEEDS_SUMS | FBN_NEEDS_COEFS);
    if (status != FBN_OK) {
        return status;
    }
    if (b.work.pass.plan.slab > 0) {
        fbn_parallel(b.work.pass.plan.team, fbn_backward_slabs, &b);
    } else {
        fbn_backward_reduce_all(&b);
        fbn_backward_apply_all(&b);
    }
    fbn_work_end(&b.work);
    return FBN_OK;
}
