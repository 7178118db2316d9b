/* normalize.c -- inference: one read, one write; and the streaming copy that it is measured against. */
#include "dispatch.h"
#include "parallel.h"
#include "pass.h"

#include <stdlib.h>
#include <string.h>

struct fbn_prepared {
    fbn_coefs coefs;
};

fbn_status fbn_prepare(fbn_dtype dtype, int64_t channels, const fbn_affine *affine, fbn_prepared **out)
{
    if ((unsigned)dtype >= FBN_DTYPE_COUNT || channels < 0 || affine == NULL || affine->mean == NULL ||
        affine->var == NULL || out == NULL) {
        return FBN_BAD_ARGUMENT;
    }
    fbn_prepared *p =
        channels < FBN_WIDEST ? malloc(sizeof *p + FBN_LINE + (size_t)fbn_coefs_bytes(dtype, channels)) : NULL;
    if (p == NULL) {
        return FBN_NO_MEMORY;
    }
    fbn_coefs_place(&p->coefs, dtype, channels, fbn_to_line(p + 1));
    fbn_coefs_fill(&p->coefs, affine, false, NULL, 0, channels);
    *out = p;
    return FBN_OK;
}

void fbn_release(fbn_prepared *prepared) { free(prepared); }

typedef struct {
    fbn_work work;
    const fbn_coefs *coefs;
} fbn_normalize_call;

static void fbn_normalize_task(int tid, int team, void *context)
{
    fbn_normalize_call *n = context;
    fbn_apply_pass(&n->work.pass, n->coefs, &n->work.rooms[tid], tid, team);
}

fbn_status fbn_apply(const fbn_geometry *g, fbn_tensor x, const fbn_tensor *residual, fbn_tensor y, uint8_t *gate,
                     const fbn_prepared *prepared, fbn_act act, int threads)
{
    fbn_normalize_call n = {.work = {.pass = {.x = x, .y = y, .gate = (uint16_t *)(void *)gate}}};
    if (residual != NULL) {
        n.work.pass.other = *residual;
    }
    if (x.data == NULL || y.data == NULL || prepared == NULL ||
        !fbn_pass_ready(&n.work.pass, g, act, FBN_PLAN_NORMALIZE, threads) || prepared->coefs.dtype != g->dtype ||
        prepared->coefs.width != g->channels) {
        return FBN_BAD_ARGUMENT;
    }
    n.coefs = &prepared->coefs;
    fbn_status status = fbn_work_begin(&n.work, FBN_NEEDS_NOTHING);
    if (status == FBN_OK) {
        fbn_parallel(n.work.pass.plan.team, fbn_normalize_task, &n);
        fbn_work_end(&n.work);
    }
    return status;
}

fbn_status fbn_normalize(const fbn_geometry *g, fbn_tensor x, const fbn_tensor *residual, fbn_tensor y, uint8_t *gate,
                         const fbn_affine *affine, fbn_act act, int threads)
{
    fbn_prepared *prepared = NULL;
    if (g == NULL) {
        return FBN_BAD_ARGUMENT;
    }
    fbn_status status = fbn_prepare(g->dtype, g->channels, affine, &prepared);
    if (status == FBN_OK) {
        status = fbn_apply(g, x, residual, y, gate, prepared, act, threads);
    }
    fbn_release(prepared);
    return status;
}

typedef struct {
    const char *src;
    char *dst;
    int64_t bytes;
} fbn_copy_call;

static void fbn_copy_task(int tid, int team, void *context)
{
    enum { LINE = 64 };
    fbn_copy_call *c = context;
    const fbn_kernels *kernels = fbn_kernels_for(FBN_F32);
    int64_t lines = c->bytes / LINE;
    int64_t begin = fbn_part(lines, tid, team) * LINE;
    int64_t end = fbn_part(lines, tid + 1, team) * LINE;
    kernels->copy(c->src + begin, c->dst + begin, end - begin);
    kernels->fence();
    if (tid == team - 1) {
        memcpy(c->dst + lines * LINE, c->src + lines * LINE, (size_t)(c->bytes - lines * LINE));
    }
}

fbn_status fbn_copy(const void *src, void *dst, int64_t bytes, int threads)
{
    fbn_copy_call c = {src, dst, bytes};
    if (src == NULL || dst == NULL || bytes < 0 || threads < 1 || (uintptr_t)src % 64 != 0 ||
        (uintptr_t)dst % 64 != 0) {
        return FBN_BAD_ARGUMENT;
    }
    fbn_parallel(threads, fbn_copy_task, &c);
    return FBN_OK;
}
