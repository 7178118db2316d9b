/* avx512_bf16.h -- the v_ operations on AVX-512 with AVX512_BF16, which rounds to bfloat16 in one instruction. */
#ifndef FASTBN_SIMD_AVX512_BF16_H
#define FASTBN_SIMD_AVX512_BF16_H

#define V_BF16_ALONE
#define V_CONVERTS_BF16
#include "avx512.h"

#endif
