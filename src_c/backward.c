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

/* What a reduce needs of the forward's coefficients: all, or nothing. */
static void fbn_backward_prepare(void *context, fbn_coefs *coefs, int64_t first, int64_t last)
{
    const fbn_backward_call *b = context;
    const bool recomputes_sign = b->work.pass.rule.kind != FBN_IDENTITY && b->work.pass.gate == NULL;
    if (recomputes_sign) {
        fbn_coefs_fill(coefs, &b->affine, b->batch, NULL, first, last);
    }
}

/* From combined partials to sums: what the kernels left out, as they subtract the mean rounded to the arithmetic. */
static void fbn_backward_sum(fbn_backward_call *b, int64_t first, int64_t last)
{
    const fbn_partials *p = &b->work.partials;
    for (int64_t c = first; c < last; c++) {
        double hi = fbn_round_mean(b->work.pass.g.dtype, b->affine.mean[c]);
        double rest = (b->affine.mean[c] - hi) + (b->affine.mean_lo == NULL ? 0.0 : b->affine.mean_lo[c]);
        b->sum_dy[c] = p->a[c];
        b->sum_dy_xmu[c] = p->b[c] - (rest == 0.0 ? 0.0 : rest * p->a[c]);
    }
}

static void fbn_backward_settle(void *context, fbn_coefs *coefs, int64_t first, int64_t last)
{
    fbn_backward_call *b = context;
    fbn_backward_sum(b, first, last);
    fbn_coefs_fill(coefs, &b->affine, b->batch, &b->sums, first, last);
}

static void fbn_backward_slabs(int tid, int team, void *context)
{
    static const fbn_slab_steps steps = {fbn_backward_prepare, fbn_backward_settle};
    fbn_backward_call *b = context;
    fbn_each_slab(&b->work, b->affine.mean, &steps, b, tid, team);
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
    fbn_apply_pass(&b->work.pass, &b->work.coefs, &b->work.rooms[tid], tid, team);
}

static void fbn_backward_reduce_all(fbn_backward_call *b)
{
    const int64_t channels = b->work.pass.g.channels;
    fbn_backward_prepare(b, &b->work.coefs, 0, channels);
    fbn_parallel(b->work.pass.plan.team, fbn_backward_reduce_task, b);
    fbn_combine(&b->work.pass, &b->work.partials, 0, channels);
    fbn_backward_sum(b, 0, channels);
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
    fbn_backward_call b = {.batch = count != 0.0, .sums = {sum_dy, sum_dy_xmu, count, NULL}};
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
                        double *grad_bias, double *grad_weight)
{
    fbn_backward_call b = {.batch = training, .sum_dy = grad_bias, .sum_dy_xmu = grad_weight};
    b.work.pass.y = dx;
    if (dresidual != NULL) {
        b.work.pass.extra = *dresidual;
    }
    if (dx.data == NULL || grad_bias == NULL || grad_weight == NULL ||
        !fbn_backward_ready(&b, g, x, dy, affine, gate, act, FBN_PLAN_BACKWARD, threads)) {
        return FBN_BAD_ARGUMENT;
    }
    b.sums = (fbn_backward_sums){.sum_dy = grad_bias,
                                 .sum_dy_xmu = grad_weight,
                                 .count = training ? (double)(g->outer * g->inner) : 0.0,
                                 .grad_weight = grad_weight};
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
