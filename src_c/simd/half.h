/* half.h -- float16 and bfloat16 as bits: conversion to and from float32, one number at a time.
 *
 * Round to nearest even, subnormals kept, NaN kept and quieted: bit for bit what F16C and the NEON converts do.
 */
#ifndef FASTBN_HALF_H
#define FASTBN_HALF_H

#include <stdint.h>
#include <string.h>

static inline uint32_t half_bits(float f)
{
    uint32_t u;
    memcpy(&u, &f, sizeof u);
    return u;
}

static inline float half_float(uint32_t u)
{
    float f;
    memcpy(&f, &u, sizeof f);
    return f;
}

static inline float half_from_bf16(uint16_t h) { return half_float((uint32_t)h << 16); }

static inline uint16_t half_to_bf16(float f)
{
    uint32_t u = half_bits(f);
    if ((u & 0x7fffffffu) > 0x7f800000u) {
        return (uint16_t)((u >> 16) | 0x40u);
    }
    return (uint16_t)((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

static inline float half_from_f16(uint16_t h)
{
    uint32_t sign = (uint32_t)(h & 0x8000u) << 16;
    uint32_t exponent = (h >> 10) & 0x1fu;
    uint32_t fraction = h & 0x3ffu;
    if (exponent == 0x1f) {
        uint32_t quiet = fraction != 0 ? 0x400000u : 0;
        return half_float(sign | 0x7f800000u | quiet | (fraction << 13));
    }
    if (exponent != 0) {
        return half_float(sign | ((exponent + 112) << 23) | (fraction << 13));
    }
    if (fraction == 0) {
        return half_float(sign);
    }
    exponent = 113;
    while ((fraction & 0x400u) == 0) {
        fraction <<= 1;
        exponent--;
    }
    return half_float(sign | (exponent << 23) | ((fraction & 0x3ffu) << 13));
}

static inline uint16_t half_to_f16(float f)
{
    uint32_t u = half_bits(f);
    uint16_t sign = (uint16_t)((u >> 16) & 0x8000u);
    uint32_t magnitude = u & 0x7fffffffu;
    if (magnitude > 0x7f800000u) {
        return (uint16_t)(sign | 0x7e00u | ((magnitude >> 13) & 0x3ffu));
    }
    if (magnitude >= 0x47800000u) { /* 65536 and beyond */
        return (uint16_t)(sign | 0x7c00u);
    }
    if (magnitude < 0x33000000u) { /* below half of the smallest subnormal */
        return sign;
    }
    uint32_t exponent = magnitude >> 23;
    /* Normal results drop 13 bits and rebias; subnormal ones shift the explicit fraction further down. A carry out of
     * the fraction lands in the exponent, as it should, up to infinity. */
    uint32_t shift = exponent > 112 ? 13 : 126 - exponent;
    uint32_t value = exponent > 112 ? magnitude - (112u << 23) : (magnitude & 0x7fffffu) | 0x800000u;
    uint32_t kept = value >> shift;
    uint32_t rest = value & ((1u << shift) - 1u);
    uint32_t half = 1u << (shift - 1u);
    kept += rest > half || (rest == half && (kept & 1u) != 0);
    return (uint16_t)(sign | kept);
}

#endif
