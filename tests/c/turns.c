/* turns.c -- see turns.h. The linker lets the core ask for its kernels here, so that a turn can be counted. */
#include "turns.h"

#include "check.h"
#include "dispatch.h"
#include "plan.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

const fbn_kernels *__real_fbn_kernels_for(fbn_dtype dtype);
const fbn_kernels *__wrap_fbn_kernels_for(fbn_dtype dtype);

enum { FINE = 256 };
static bool counting;
static int64_t afterwards;
static bool fine; /* of every slab but the last, no more was left than a few steps */
static fbn_kernels counted;

/* A kernel that reduces calls its own, so that what comes here is what was left. */
static void count_some(fbn_turn *turn)
{
    const int64_t before = turn_done(turn);
    __real_fbn_kernels_for(FBN_F32)->apply_some(turn);
    const int64_t left = turn_done(turn) - before;
    fine = fine && (before == 0 || left <= FINE);
    afterwards += left;
}

const fbn_kernels *__wrap_fbn_kernels_for(fbn_dtype dtype)
{
    const fbn_kernels *kernels = __real_fbn_kernels_for(dtype);
    if (!counting) {
        return kernels;
    }
    counted = *kernels;
    counted.apply_some = count_some;
    return &counted;
}

static float *made(int64_t elements)
{
    float *p = aligned_alloc(64, (size_t)elements * sizeof *p);
    for (int64_t i = 0; p != NULL && i < elements; i++) {
        p[i] = (float)(i % 7);
    }
    return p;
}

/* A forward with a gate has a residual. */
static void check_shape(fbn_op op, int64_t outer, int64_t channels, int64_t inner, int64_t gap, bool gated)
{
    const bool backward = op == FBN_PLAN_BACKWARD;
    const fbn_geometry g = {FBN_F32, FBN_ROWS, outer, channels, inner};
    const bool beside = fbn_goes_beside(__real_fbn_kernels_for(FBN_F32), backward);
    if (backward && !beside) {
        return;
    }
    const fbn_call call = {.op = op,
                           .threads = 1,
                           .gated = gated,
                           .adjacent = gap == 0,
                           .aligned = true,
                           .beside = beside,
                           .tensors = backward || gated ? 3 : 2};
    const fbn_plan plan = fbn_make_plan(&g, &call, fbn_this_machine());
    const int64_t next = inner + gap;
    const int64_t elements = outer * channels * inner;
    const fbn_tensor x = {made(outer * channels * next), channels * next, next};
    const fbn_tensor other = {made(elements), channels * inner, inner};
    const fbn_tensor y = {made(elements), channels * inner, inner};
    const fbn_tensor expected = {made(elements), channels * inner, inner};
    uint8_t *gate = malloc((size_t)fbn_gate_bytes(&g));
    for (int64_t i = 0; gate != NULL && i < fbn_gate_bytes(&g); i++) {
        gate[i] = (uint8_t)(i * 37);
    }
    gate = gated ? gate : (free(gate), NULL);
    double *numbers = malloc(5 * (size_t)channels * sizeof *numbers);
    double *sums[] = {numbers + 3 * channels, numbers + 4 * channels};
    fbn_moments moments = {0, numbers, numbers + channels, numbers + 2 * channels};
    const fbn_affine affine = {.mean = moments.mean, .mean_lo = moments.mean_lo, .var = moments.m2};
    const fbn_act act = {gated ? FBN_RELU : FBN_IDENTITY, 0.0};
    char name[100];
    snprintf(name, sizeof name, "%s of %d x %d x %d, gaps of %d%s", backward ? "backward" : "forward", (int)outer,
             (int)channels, (int)inner, (int)gap, gated ? ", gate" : "");
    for (int64_t c = 0; c < channels; c++) {
        moments.mean[c] = 2.5;
        moments.mean_lo[c] = 0.0;
        moments.m2[c] = 4.0;
    }
    afterwards = 0;
    fine = true;
    counting = true;
    const fbn_status status =
        backward ? fbn_backward(&g, x, other, y, NULL, gate, &affine, act, true, 1, sums[0], sums[1])
                 : fbn_forward(&g, x, gated ? &other : NULL, y, gate, &(fbn_affine){0}, act, 1, &moments, sums[0]);
    counting = false;
    check(status == FBN_OK && plan.turn > 0 && afterwards > 0, "%s: no turns", name); /* the last slab is left */
    check(fine || !plan.beside, "%s: by turns, not side by side", name);
    const int64_t by_turns = elements - afterwards;
    /* The same numbers from what was summed. */
    if (backward) {
        fbn_backward_reduce(&g, x, other, gate, &affine, act, 1, sums[0], sums[1]);
        fbn_backward_apply(&g, x, other, expected, NULL, gate, &affine, act, sums[0], sums[1], (double)(outer * inner),
                           1);
    } else {
        memcpy(moments.m2, sums[0], (size_t)channels * sizeof(double)); /* the variance */
        fbn_normalize(&g, x, gated ? &other : NULL, expected, gate, &affine, act, 1);
    }
    check(memcmp(y.data, expected.data, (size_t)elements * sizeof(float)) == 0, "%s: another result", name);
    /* The last slab has no other to be applied beside. */
    const int64_t most = elements - elements / plan.slabs;
    check((double)by_turns >= 0.85 * (double)most, "%s: %lld elements by turns, of %lld", name, (long long)by_turns,
          (long long)most);
    free(x.data);
    free(other.data);
    free(y.data);
    free(expected.data);
    free(gate);
    free(numbers);
}

void check_turns(void)
{
    const int64_t shapes[][3] = {{32, 64, 784}, {32, 128, 256}, {64, 256, 64},
                                 {8, 64, 4096}, {3, 48, 10000}, {6, 48, 10000}};
    /* Nobody has read the machine in this process: it is what the plan takes where nothing is known, of which hardware
     * that follows runs takes its turns with the same caches. */
    bool *follows = &((fbn_machine *)(uintptr_t)fbn_this_machine())->follows;
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
        const int64_t *s = shapes[i];
        *follows = false;
        check_shape(FBN_PLAN_FORWARD, s[0], s[1], s[2], 0, false);
        check_shape(FBN_PLAN_FORWARD, s[0], s[1], s[2], 16, false);
        if (!fbn_short(s[2])) {
            check_shape(FBN_PLAN_FORWARD, s[0], s[1], s[2], 0, true);
        }
        *follows = true;
        if (!fbn_short(s[2]) && s[0] * s[2] <= 32768) {
            check_shape(FBN_PLAN_BACKWARD, s[0], s[1], s[2], 0, false);
            check_shape(FBN_PLAN_BACKWARD, s[0], s[1], s[2], 16, false);
        }
    }
    *follows = false;
    check_shape(FBN_PLAN_FORWARD, 32, 256, 196, 0, false); /* rows that end within a vector */
    *follows = true;
    check_shape(FBN_PLAN_BACKWARD, 16, 512, 196, 0, false);
    *follows = false;
}
