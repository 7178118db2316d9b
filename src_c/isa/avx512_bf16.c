/* avx512_bf16.c -- the kernels of bfloat16 on AVX-512 with AVX512_BF16. */
#define FBN_ISA avx512_bf16
#include "simd/avx512_bf16.h"

#include "kernels/kernels.inc"
