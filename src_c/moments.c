/* moments.c -- the statistics of a tensor, alone. */
#include "parallel.h"
#include "pass.h"

static void fbn_moments_task(int tid, int team, void *context)
{
    fbn_work *w = context;
    fbn_reduce(&w->pass, &w->partials, NULL, NULL, &w->rooms[tid], 0, w->pass.g.channels, tid, team);
}

fbn_status fbn_moments_of(const fbn_geometry *g, fbn_tensor x, int threads, fbn_moments *out)
{
    fbn_work w = {.pass = {.x = x}};
    if (x.data == NULL || out == NULL || out->mean == NULL || out->mean_lo == NULL || out->m2 == NULL ||
        !fbn_pass_ready(&w.pass, g, (fbn_act){FBN_IDENTITY, 0.0}, FBN_PLAN_MOMENTS, threads)) {
        return FBN_BAD_ARGUMENT;
    }
    fbn_status status = fbn_work_begin(&w, FBN_NEEDS_SUMS);
    if (status == FBN_OK) {
        fbn_parallel(w.pass.plan.team, fbn_moments_task, &w);
        fbn_combine(&w.pass, &w.partials, 0, g->channels);
        out->count = g->outer * g->inner;
        for (int64_t c = 0; c < g->channels; c++) {
            out->mean[c] = w.partials.a[c];
            out->mean_lo[c] = w.partials.b[c];
            out->m2[c] = w.partials.c[c];
        }
        fbn_work_end(&w);
    }
    return status;
}
