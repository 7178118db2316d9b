/* avx512.c -- the kernels on avx512. */
#define FBN_ISA avx512
#include "simd/avx512.h"

#include "kernels/kernels.inc"
