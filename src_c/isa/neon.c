/* neon.c -- the kernels on neon. */
#define FBN_ISA neon
#include "simd/neon.h"

#include "kernels/kernels.inc"
