/* avx2.c -- the kernels on avx2. */
#define FBN_ISA avx2
#include "simd/avx2.h"

#include "kernels/kernels.inc"
