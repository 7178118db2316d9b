/* scalar.c -- the kernels on scalar. */
#define FBN_ISA scalar
#include "simd/scalar.h"

#include "kernels/kernels.inc"
