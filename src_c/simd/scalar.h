/* scalar.h -- the v_ operations in plain C: the reference that every other tier equals bit for bit.
 *
 * A vector is 16 lanes of float or of double on every ISA, so the order of every sum is the same everywhere.
 */
#ifndef FASTBN_SIMD_SCALAR_H
#define FASTBN_SIMD_SCALAR_H

#include "half.h"

#include <math.h>
#include <stdint.h>
#include <string.h>

#define V_IS_PLAIN_C 1
#define V_SPILLS 1

typedef struct {
    float l[16];
} v_f32;

typedef struct {
    double l[16];
} v_f64;

#define V_EACH for (int i = 0; i < 16; i++)
#define V_MAP(T, expr)                                                                                                 \
    T r;                                                                                                               \
    V_EACH { r.l[i] = (expr); }                                                                                        \
    return r

#define V_ARITHMETIC(S, T)                                                                                             \
    static inline v_##S v_set1_##S(T a) { V_MAP(v_##S, a); }                                                           \
    static inline v_##S v_add_##S(v_##S a, v_##S b) { V_MAP(v_##S, a.l[i] + b.l[i]); }                                 \
    static inline v_##S v_sub_##S(v_##S a, v_##S b) { V_MAP(v_##S, a.l[i] - b.l[i]); }                                 \
    static inline v_##S v_mul_##S(v_##S a, v_##S b) { V_MAP(v_##S, a.l[i] * b.l[i]); }                                 \
    static inline v_##S v_select_le_##S(v_##S a, v_##S b, v_##S yes, v_##S no)                                         \
    {                                                                                                                  \
        V_MAP(v_##S, a.l[i] <= b.l[i] ? yes.l[i] : no.l[i]);                                                           \
    }                                                                                                                  \
    static inline v_##S v_clip_##S(v_##S a, v_##S upper)                                                               \
    {                                                                                                                  \
        V_MAP(v_##S, a.l[i] <= 0 ? 0 : upper.l[i] <= a.l[i] ? upper.l[i] : a.l[i]);                                    \
    }                                                                                                                  \
    static inline v_##S v_inside_##S(v_##S a, v_##S z, v_##S upper)                                                    \
    {                                                                                                                  \
        V_MAP(v_##S, z.l[i] <= 0 || upper.l[i] <= z.l[i] ? 0 : a.l[i]);                                                \
    }                                                                                                                  \
    static inline unsigned v_bits_le_##S(v_##S a, v_##S b)                                                             \
    {                                                                                                                  \
        unsigned bits = 0;                                                                                             \
        V_EACH { bits |= (unsigned)(a.l[i] <= b.l[i]) << i; }                                                          \
        return bits;                                                                                                   \
    }                                                                                                                  \
    static inline v_##S v_select_bits_##S(unsigned bits, v_##S yes, v_##S no)                                          \
    {                                                                                                                  \
        V_MAP(v_##S, (bits >> i & 1u) != 0 ? yes.l[i] : no.l[i]);                                                      \
    }                                                                                                                  \
    static inline v_##S v_load_##S(const T *p)                                                                         \
    {                                                                                                                  \
        v_##S r;                                                                                                       \
        memcpy(r.l, p, sizeof r.l);                                                                                    \
        return r;                                                                                                      \
    }                                                                                                                  \
    static inline void v_store_##S(T *p, v_##S a) { memcpy(p, a.l, sizeof a.l); }                                      \
    static inline void v_stream_##S(T *p, v_##S a) { v_store_##S(p, a); }                                              \
    static inline v_##S v_load_part_##S(const T *p, int n)                                                             \
    {                                                                                                                  \
        v_##S r = {{0}};                                                                                               \
        memcpy(r.l, p, (size_t)n * sizeof *p);                                                                         \
        return r;                                                                                                      \
    }                                                                                                                  \
    static inline void v_store_part_##S(T *p, v_##S a, int n) { memcpy(p, a.l, (size_t)n * sizeof *p); }

V_ARITHMETIC(f32, float)
V_ARITHMETIC(f64, double)

static inline v_f32 v_fma_f32(v_f32 a, v_f32 b, v_f32 c) { V_MAP(v_f32, fmaf(a.l[i], b.l[i], c.l[i])); }
static inline v_f64 v_fma_f64(v_f64 a, v_f64 b, v_f64 c) { V_MAP(v_f64, fma(a.l[i], b.l[i], c.l[i])); }
static inline v_f64 v_widen(v_f32 a) { V_MAP(v_f64, (double)a.l[i]); }
#define V_HALF(S)                                                                                                      \
    static inline v_f32 v_load_##S(const uint16_t *p) { V_MAP(v_f32, half_from_##S(p[i])); }                           \
    static inline void v_store_##S(uint16_t *p, v_f32 a)                                                               \
    {                                                                                                                  \
        V_EACH { p[i] = half_to_##S(a.l[i]); }                                                                         \
    }                                                                                                                  \
    static inline void v_stream_##S(uint16_t *p, v_f32 a) { v_store_##S(p, a); }

V_HALF(f16)
V_HALF(bf16)

/* The order of this sum is part of the promise of equal bits: halves are folded onto each other. */
static inline double v_sum_f64(v_f64 a)
{
    for (int width = 8; width > 0; width /= 2) {
        for (int i = 0; i < width; i++) {
            a.l[i] += a.l[i + width];
        }
    }
    return a.l[0];
}

static inline void v_prefetch(const void *p) { (void)p; }
static inline void v_fence(void) {}

#undef V_HALF
#undef V_ARITHMETIC
#undef V_MAP
#undef V_EACH

#endif
