/* lanes.h -- the conversions of one tier, reached without a kernel around them. */
#ifndef LANES_H
#define LANES_H

#include "kernels/kernels.h"

/* Sixteen numbers a call; float bits, so that no NaN passes through a register on the way. `line` makes a cache line of
 * them and their opposites; NULL where a tier has no such operation. */
typedef struct {
    void (*from)(const uint16_t *h, uint32_t *f), (*to)(const uint32_t *f, uint16_t *h),
        (*stream)(const uint32_t *f, uint16_t *h), (*line)(const uint32_t *f, uint16_t *h);
} lanes_of_type;

typedef struct {
    const fbn_isa *kernels;
    lanes_of_type f16, bf16;
} tier;

extern const tier tier_scalar, tier_avx2, tier_avx512, tier_avx512_bf16, tier_neon;

/* halves.c: conversions of both types in every tier. */
void check_halves(const tier *const *tiers, int count, uint64_t seed, int thoroughness);

#endif
