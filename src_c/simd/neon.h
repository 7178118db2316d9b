/* neon.h -- the v_ operations on the baseline of AArch64. */
#ifndef FASTBN_SIMD_NEON_H
#define FASTBN_SIMD_NEON_H

#include <arm_neon.h>
#include <stdint.h>
#include <string.h>

#define V_SPILLS 1

/* Named registers: an array of them would live in memory wherever the compiler does not see through it. */
typedef struct {
    float32x4_t a, b, c, d;
} v_f32;

typedef struct {
    float64x2_t a, b, c, d, e, f, g, h;
} v_f64;

/* each(r, i) for every register r, the i-th. */
#define V_EACH_F32(each) each(a, 0) each(b, 1) each(c, 2) each(d, 3)
#define V_EACH_F64(each) each(a, 0) each(b, 1) each(c, 2) each(d, 3) each(e, 4) each(f, 5) each(g, 6) each(h, 7)

/* A vector of V_EXPR for every register; and of a function of two. */
#define V_SET(r, i) .r = V_EXPR(r, i),
#define V_FILL_F32                                                                                                     \
    return (v_f32) { V_EACH_F32(V_SET) }
#define V_FILL_F64                                                                                                     \
    return (v_f64) { V_EACH_F64(V_SET) }
#define V_MAP_F32(op)                                                                                                  \
    return (v_f32) { op(x.a, y.a), op(x.b, y.b), op(x.c, y.c), op(x.d, y.d) }
#define V_MAP_F64(op)                                                                                                  \
    return (v_f64)                                                                                                     \
    {                                                                                                                  \
        op(x.a, y.a), op(x.b, y.b), op(x.c, y.c), op(x.d, y.d), op(x.e, y.e), op(x.f, y.f), op(x.g, y.g), op(x.h, y.h) \
    }

#define V_EXPR(r, i) value
static inline v_f32 v_set1_f32(float x)
{
    float32x4_t value = vdupq_n_f32(x);
    V_FILL_F32;
}

static inline v_f64 v_set1_f64(double x)
{
    float64x2_t value = vdupq_n_f64(x);
    V_FILL_F64;
}
#undef V_EXPR

static inline v_f32 v_add_f32(v_f32 x, v_f32 y) { V_MAP_F32(vaddq_f32); }
static inline v_f64 v_add_f64(v_f64 x, v_f64 y) { V_MAP_F64(vaddq_f64); }
static inline v_f32 v_sub_f32(v_f32 x, v_f32 y) { V_MAP_F32(vsubq_f32); }
static inline v_f64 v_sub_f64(v_f64 x, v_f64 y) { V_MAP_F64(vsubq_f64); }
static inline v_f32 v_mul_f32(v_f32 x, v_f32 y) { V_MAP_F32(vmulq_f32); }
static inline v_f64 v_mul_f64(v_f64 x, v_f64 y) { V_MAP_F64(vmulq_f64); }

#define V_EXPR(r, i) vfmaq_f32(z.r, x.r, y.r)
static inline v_f32 v_fma_f32(v_f32 x, v_f32 y, v_f32 z) { V_FILL_F32; }
#undef V_EXPR
#define V_EXPR(r, i) vfmaq_f64(z.r, x.r, y.r)
static inline v_f64 v_fma_f64(v_f64 x, v_f64 y, v_f64 z) { V_FILL_F64; }
#undef V_EXPR

static inline v_f64 v_widen(v_f32 x)
{
    return (v_f64){vcvt_f64_f32(vget_low_f32(x.a)), vcvt_high_f64_f32(x.a),          vcvt_f64_f32(vget_low_f32(x.b)),
                   vcvt_high_f64_f32(x.b),          vcvt_f64_f32(vget_low_f32(x.c)), vcvt_high_f64_f32(x.c),
                   vcvt_f64_f32(vget_low_f32(x.d)), vcvt_high_f64_f32(x.d)};
}

/* x <= y ? yes : no; false where x or y is NaN. */
#define V_EXPR(r, i) vbslq_f32(vcleq_f32(x.r, y.r), yes.r, no.r)
static inline v_f32 v_select_le_f32(v_f32 x, v_f32 y, v_f32 yes, v_f32 no) { V_FILL_F32; }
#undef V_EXPR
#define V_EXPR(r, i) vbslq_f64(vcleq_f64(x.r, y.r), yes.r, no.r)
static inline v_f64 v_select_le_f64(v_f64 x, v_f64 y, v_f64 yes, v_f64 no) { V_FILL_F64; }
#undef V_EXPR

/* x; 0 where x <= 0, and upper, which is above 0, where upper <= x: NaN stays. */
#define V_EXPR(r, i)                                                                                                   \
    vbslq_f32(vcleq_f32(upper.r, x.r), upper.r,                                                                        \
              vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(x.r), vclezq_f32(x.r))))
static inline v_f32 v_clip_f32(v_f32 x, v_f32 upper) { V_FILL_F32; }
#undef V_EXPR
#define V_EXPR(r, i)                                                                                                   \
    vbslq_f64(vcleq_f64(upper.r, x.r), upper.r,                                                                        \
              vreinterpretq_f64_u64(vbicq_u64(vreinterpretq_u64_f64(x.r), vclezq_f64(x.r))))
static inline v_f64 v_clip_f64(v_f64 x, v_f64 upper) { V_FILL_F64; }
#undef V_EXPR

/* x; 0 where z <= 0 or upper <= z. */
#define V_EXPR(r, i)                                                                                                   \
    vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(x.r), vorrq_u32(vclezq_f32(z.r), vcleq_f32(upper.r, z.r))))
static inline v_f32 v_inside_f32(v_f32 x, v_f32 z, v_f32 upper) { V_FILL_F32; }
#undef V_EXPR
#define V_EXPR(r, i)                                                                                                   \
    vreinterpretq_f64_u64(vbicq_u64(vreinterpretq_u64_f64(x.r), vorrq_u64(vclezq_f64(z.r), vcleq_f64(upper.r, z.r))))
static inline v_f64 v_inside_f64(v_f64 x, v_f64 z, v_f64 upper) { V_FILL_F64; }
#undef V_EXPR

/* The bit of each lane of the i-th register. */
static inline uint32x4_t v_lanes_f32(int i)
{
    static const uint32_t lane[4] = {1, 2, 4, 8};
    return vshlq_u32(vld1q_u32(lane), vdupq_n_s32(4 * i));
}

static inline uint64x2_t v_lanes_f64(int i)
{
    static const uint64_t lane[2] = {1, 2};
    return vshlq_u64(vld1q_u64(lane), vdupq_n_s64(2 * i));
}

static inline unsigned v_bits_le_f32(v_f32 x, v_f32 y)
{
    uint32x4_t bits = vdupq_n_u32(0);
#define V_BITS(r, i) bits |= vcleq_f32(x.r, y.r) & v_lanes_f32(i);
    V_EACH_F32(V_BITS)
#undef V_BITS
    return vaddvq_u32(bits);
}

static inline unsigned v_bits_le_f64(v_f64 x, v_f64 y)
{
    uint64x2_t bits = vdupq_n_u64(0);
#define V_BITS(r, i) bits |= vcleq_f64(x.r, y.r) & v_lanes_f64(i);
    V_EACH_F64(V_BITS)
#undef V_BITS
    return (unsigned)vaddvq_u64(bits);
}

#define V_EXPR(r, i) vbslq_f32(vtstq_u32(all, v_lanes_f32(i)), yes.r, no.r)
static inline v_f32 v_select_bits_f32(unsigned bits, v_f32 yes, v_f32 no)
{
    uint32x4_t all = vdupq_n_u32(bits);
    V_FILL_F32;
}
#undef V_EXPR

#define V_EXPR(r, i) vbslq_f64(vtstq_u64(all, v_lanes_f64(i)), yes.r, no.r)
static inline v_f64 v_select_bits_f64(unsigned bits, v_f64 yes, v_f64 no)
{
    uint64x2_t all = vdupq_n_u64(bits);
    V_FILL_F64;
}
#undef V_EXPR

#define V_EXPR(r, i) vld1q_f32(p + 4 * i)
static inline v_f32 v_load_f32(const float *p) { V_FILL_F32; }
#undef V_EXPR
#define V_EXPR(r, i) vld1q_f64(p + 2 * i)
static inline v_f64 v_load_f64(const double *p) { V_FILL_F64; }
#undef V_EXPR

static inline void v_store_f32(float *p, v_f32 x)
{
#define V_PUT(r, i) vst1q_f32(p + 4 * i, x.r);
    V_EACH_F32(V_PUT)
#undef V_PUT
}

static inline void v_store_f64(double *p, v_f64 x)
{
#define V_PUT(r, i) vst1q_f64(p + 2 * i, x.r);
    V_EACH_F64(V_PUT)
#undef V_PUT
}

/* AArch64 has no intrinsic for a store past the cache. */
static inline void v_stream_f32(float *p, v_f32 x) { v_store_f32(p, x); }
static inline void v_stream_f64(double *p, v_f64 x) { v_store_f64(p, x); }

/* Nor a masked load or store. */
static inline v_f32 v_load_part_f32(const float *p, int n)
{
    float buffer[16] = {0};
    memcpy(buffer, p, (size_t)(n & 15) * sizeof *p); /* n < 16, which a compiler cannot know */
    return v_load_f32(buffer);
}

/* Doubles without a buffer: inlined many times over, it would be kilobytes of stack. */
#define V_EXPR(r, i) 2 * i + 1 < n ? vld1q_f64(p + 2 * i) : 2 * i < n ? vld1q_lane_f64(p + 2 * i, zero, 0) : zero
static inline v_f64 v_load_part_f64(const double *p, int n)
{
    float64x2_t zero = vdupq_n_f64(0.0);
    V_FILL_F64;
}
#undef V_EXPR

static inline void v_store_part_f32(float *p, v_f32 x, int n)
{
    float buffer[16];
    v_store_f32(buffer, x);
    memcpy(p, buffer, (size_t)n * sizeof *p);
}

static inline void v_store_part_f64(double *p, v_f64 x, int n)
{
#define V_PUT(r, i)                                                                                                    \
    if (2 * i + 1 < n) {                                                                                               \
        vst1q_f64(p + 2 * i, x.r);                                                                                     \
    } else if (2 * i < n) {                                                                                            \
        vst1q_lane_f64(p + 2 * i, x.r, 0);                                                                             \
    }
    V_EACH_F64(V_PUT)
#undef V_PUT
}

#define V_EXPR(r, i) vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + 4 * i)))
static inline v_f32 v_load_f16(const uint16_t *p) { V_FILL_F32; }
#undef V_EXPR
#define V_EXPR(r, i) vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p + 4 * i), 16))
static inline v_f32 v_load_bf16(const uint16_t *p) { V_FILL_F32; }
#undef V_EXPR

static inline uint16x4_t v_round_bf16(float32x4_t x)
{
    uint32x4_t u = vreinterpretq_u32_f32(x);
    uint32x4_t odd = vandq_u32(vshrq_n_u32(u, 16), vdupq_n_u32(1));
    uint32x4_t near = vaddq_u32(u, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
    uint32x4_t quiet = vorrq_u32(u, vdupq_n_u32(0x400000));
    return vshrn_n_u32(vbslq_u32(vceqq_f32(x, x), near, quiet), 16);
}

static inline void v_store_f16(uint16_t *p, v_f32 x)
{
#define V_PUT(r, i) vst1_u16(p + 4 * i, vreinterpret_u16_f16(vcvt_f16_f32(x.r)));
    V_EACH_F32(V_PUT)
#undef V_PUT
}

static inline void v_store_bf16(uint16_t *p, v_f32 x)
{
#define V_PUT(r, i) vst1_u16(p + 4 * i, v_round_bf16(x.r));
    V_EACH_F32(V_PUT)
#undef V_PUT
}

static inline void v_stream_f16(uint16_t *p, v_f32 x) { v_store_f16(p, x); }
static inline void v_stream_bf16(uint16_t *p, v_f32 x) { v_store_bf16(p, x); }

static inline double v_sum_f64(v_f64 x)
{
    float64x2_t two = ((x.a + x.e) + (x.c + x.g)) + ((x.b + x.f) + (x.d + x.h));
    return vgetq_lane_f64(two, 0) + vgetq_lane_f64(two, 1);
}

/* A macro: GCC takes a function that only prefetches for one without effect, and drops the call. */
#define v_prefetch(p) __builtin_prefetch((p), 0, 2)
static inline void v_fence(void) {}

#undef V_MAP_F32
#undef V_MAP_F64
#undef V_FILL_F32
#undef V_FILL_F64
#undef V_SET
#undef V_EACH_F32
#undef V_EACH_F64

#endif
