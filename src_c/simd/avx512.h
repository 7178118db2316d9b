/* avx512.h -- the v_ operations on AVX-512 F, BW, DQ and VL. */
#ifndef FASTBN_SIMD_AVX512_H
#define FASTBN_SIMD_AVX512_H

#include <immintrin.h>
#include <stdint.h>

#define V_SIDE 4
#define V_ROOMY

#if defined(__GNUC__)
#define V_RARELY(x) __builtin_expect((x) != 0, 0)
#else
#define V_RARELY(x) ((x) != 0)
#endif

typedef __m512 v_f32;

typedef struct {
    __m512d a, b;
} v_f64;

#define V_MAP_F64(op)                                                                                                  \
    return (v_f64) { op(x.a, y.a), op(x.b, y.b) }

static inline v_f32 v_set1_f32(float x) { return _mm512_set1_ps(x); }

static inline v_f64 v_set1_f64(double x)
{
    __m512d r = _mm512_set1_pd(x);
    return (v_f64){r, r};
}

static inline v_f32 v_add_f32(v_f32 x, v_f32 y) { return _mm512_add_ps(x, y); }
static inline v_f64 v_add_f64(v_f64 x, v_f64 y) { V_MAP_F64(_mm512_add_pd); }
static inline v_f32 v_sub_f32(v_f32 x, v_f32 y) { return _mm512_sub_ps(x, y); }
static inline v_f64 v_sub_f64(v_f64 x, v_f64 y) { V_MAP_F64(_mm512_sub_pd); }
static inline v_f32 v_mul_f32(v_f32 x, v_f32 y) { return _mm512_mul_ps(x, y); }
static inline v_f64 v_mul_f64(v_f64 x, v_f64 y) { V_MAP_F64(_mm512_mul_pd); }

static inline v_f32 v_fma_f32(v_f32 x, v_f32 y, v_f32 z) { return _mm512_fmadd_ps(x, y, z); }

static inline v_f64 v_fma_f64(v_f64 x, v_f64 y, v_f64 z)
{
    return (v_f64){_mm512_fmadd_pd(x.a, y.a, z.a), _mm512_fmadd_pd(x.b, y.b, z.b)};
}

static inline v_f64 v_widen(v_f32 x)
{
    return (v_f64){_mm512_cvtps_pd(_mm512_castps512_ps256(x)), _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1))};
}

/* x <= y ? yes : no; false where x or y is NaN. */
static inline v_f32 v_select_le_f32(v_f32 x, v_f32 y, v_f32 yes, v_f32 no)
{
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, y, _CMP_LE_OQ), no, yes);
}

static inline v_f64 v_select_le_f64(v_f64 x, v_f64 y, v_f64 yes, v_f64 no)
{
    return (v_f64){_mm512_mask_blend_pd(_mm512_cmp_pd_mask(x.a, y.a, _CMP_LE_OQ), no.a, yes.a),
                   _mm512_mask_blend_pd(_mm512_cmp_pd_mask(x.b, y.b, _CMP_LE_OQ), no.b, yes.b)};
}

/* x; 0 where x <= 0, and upper, which is above 0, where upper <= x: NaN stays. The table has answers for what is zero,
 * -inf, and below zero. */
static inline v_f32 v_clip_f32(v_f32 x, v_f32 upper)
{
    return _mm512_min_ps(upper, _mm512_fixupimm_ps(x, x, _mm512_set1_epi32(0x08080800), 0));
}

static inline v_f64 v_clip_f64(v_f64 x, v_f64 upper)
{
    const __m512i table = _mm512_set1_epi64(0x08080800);
    return (v_f64){_mm512_min_pd(upper.a, _mm512_fixupimm_pd(x.a, x.a, table, 0)),
                   _mm512_min_pd(upper.b, _mm512_fixupimm_pd(x.b, x.b, table, 0))};
}

/* x; 0 where z <= 0 or upper <= z. */
static inline v_f32 v_inside_f32(v_f32 x, v_f32 z, v_f32 upper)
{
    __mmask16 above = _mm512_cmp_ps_mask(z, _mm512_setzero_ps(), _CMP_NLE_UQ);
    return _mm512_maskz_mov_ps(_mm512_mask_cmp_ps_mask(above, upper, z, _CMP_NLE_UQ), x);
}

static inline __m512d v_inside_eight(__m512d x, __m512d z, __m512d upper)
{
    __mmask8 above = _mm512_cmp_pd_mask(z, _mm512_setzero_pd(), _CMP_NLE_UQ);
    return _mm512_maskz_mov_pd(_mm512_mask_cmp_pd_mask(above, upper, z, _CMP_NLE_UQ), x);
}

static inline v_f64 v_inside_f64(v_f64 x, v_f64 z, v_f64 upper)
{
    return (v_f64){v_inside_eight(x.a, z.a, upper.a), v_inside_eight(x.b, z.b, upper.b)};
}

static inline unsigned v_bits_le_f32(v_f32 x, v_f32 y) { return _mm512_cmp_ps_mask(x, y, _CMP_LE_OQ); }

static inline unsigned v_bits_le_f64(v_f64 x, v_f64 y)
{
    return (unsigned)_mm512_cmp_pd_mask(x.a, y.a, _CMP_LE_OQ) | (unsigned)_mm512_cmp_pd_mask(x.b, y.b, _CMP_LE_OQ) << 8;
}

static inline v_f32 v_select_bits_f32(unsigned bits, v_f32 yes, v_f32 no)
{
    return _mm512_mask_blend_ps((__mmask16)bits, no, yes);
}

static inline v_f64 v_select_bits_f64(unsigned bits, v_f64 yes, v_f64 no)
{
    return (v_f64){_mm512_mask_blend_pd((__mmask8)bits, no.a, yes.a),
                   _mm512_mask_blend_pd((__mmask8)(bits >> 8), no.b, yes.b)};
}

static inline v_f32 v_load_f32(const float *p) { return _mm512_loadu_ps(p); }
static inline v_f64 v_load_f64(const double *p) { return (v_f64){_mm512_loadu_pd(p), _mm512_loadu_pd(p + 8)}; }
static inline void v_store_f32(float *p, v_f32 x) { _mm512_storeu_ps(p, x); }

static inline void v_store_f64(double *p, v_f64 x)
{
    _mm512_storeu_pd(p, x.a);
    _mm512_storeu_pd(p + 8, x.b);
}

static inline void v_stream_f32(float *p, v_f32 x) { _mm512_stream_ps(p, x); }

static inline void v_stream_f64(double *p, v_f64 x)
{
    _mm512_stream_pd(p, x.a);
    _mm512_stream_pd(p + 8, x.b);
}

/* A mask of the first n lanes. */
static inline unsigned v_first(int n) { return (1u << n) - 1u; }

static inline v_f32 v_load_part_f32(const float *p, int n) { return _mm512_maskz_loadu_ps((__mmask16)v_first(n), p); }

static inline v_f64 v_load_part_f64(const double *p, int n)
{
    unsigned m = v_first(n);
    return (v_f64){_mm512_maskz_loadu_pd((__mmask8)m, p), _mm512_maskz_loadu_pd((__mmask8)(m >> 8), p + 8)};
}

static inline void v_store_part_f32(float *p, v_f32 x, int n) { _mm512_mask_storeu_ps(p, (__mmask16)v_first(n), x); }

static inline void v_store_part_f64(double *p, v_f64 x, int n)
{
    unsigned m = v_first(n);
    _mm512_mask_storeu_pd(p, (__mmask8)m, x.a);
    _mm512_mask_storeu_pd(p + 8, (__mmask8)(m >> 8), x.b);
}

/* bfloat16 of 32 x 1024 x 14 x 14, whose planes end with 4 elements: statistics 1.20 -> 0.83 of a copy, by way of a
 * buffer whose load waits for its stores. */
#define V_PARTS_OF_HALVES
static inline __m256i v_first_halves(const uint16_t *p, int n)
{
    return _mm256_maskz_loadu_epi16((__mmask16)v_first(n), p);
}

static inline v_f32 v_unpack_f16(__m256i h) { return _mm512_cvtph_ps(h); }
static inline v_f32 v_load_f16(const uint16_t *p) { return v_unpack_f16(_mm256_loadu_si256((const __m256i *)p)); }
static inline v_f32 v_load_part_f16(const uint16_t *p, int n) { return v_unpack_f16(v_first_halves(p, n)); }

static inline __m256i v_pack_f16(v_f32 x) { return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT); }

/* A permutation of words puts every one above a zero: widening and shifting in one. */
static inline v_f32 v_unpack_bf16(__m256i h)
{
    const __m512i low = _mm512_set_epi16(15, 15, 14, 14, 13, 13, 12, 12, 11, 11, 10, 10, 9, 9, 8, 8, 7, 7, 6, 6, 5, 5,
                                         4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
    return _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(0xaaaaaaaau, low, _mm512_castsi256_si512(h)));
}

static inline v_f32 v_load_bf16(const uint16_t *p) { return v_unpack_bf16(_mm256_loadu_si256((const __m256i *)p)); }
static inline v_f32 v_load_part_bf16(const uint16_t *p, int n) { return v_unpack_bf16(v_first_halves(p, n)); }

/* By integers. The upper words of the sum are the result. */
static inline __m256i v_round_bf16(v_f32 x)
{
    const __m512i high = _mm512_set_epi16(31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1, 31, 29, 27, 25, 23,
                                          21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
    __m512i u = _mm512_castps_si512(x);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    __m512i near = _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd);
    /* Of a NaN, whose number is 0 or 1 in the table, itself made quiet; else what is there. */
    __m512 all = _mm512_fixupimm_ps(_mm512_castsi512_ps(near), x, _mm512_set1_epi32(0x22), 0);
    return _mm512_castsi512_si256(_mm512_permutexvar_epi16(high, _mm512_castps_si512(all)));
}

#if defined(V_CONVERTS_BF16)
/* The instruction takes subnormals for zeros; those that one of the vectors has are rare. One thread, beyond the cache:
 * forward 0.97 -> 0.76 of a copy of as many float32, backward 1.31 -> 1.16, inference 0.65 -> 0.48. */
#define V_HAS_SUBNORMALS(x) (_mm512_fpclass_ps_mask(x, 0x20) != 0)
static inline __m256i v_pack_bf16(v_f32 x)
{
    return V_RARELY(V_HAS_SUBNORMALS(x)) ? v_round_bf16(x) : (__m256i)_mm512_cvtneps_pbh(x);
}

#define V_LINES_OF_BF16
static inline void v_stream_line_bf16(uint16_t *p, v_f32 x, v_f32 y)
{
    if (V_RARELY(V_HAS_SUBNORMALS(x) | V_HAS_SUBNORMALS(y))) {
        _mm256_stream_si256((__m256i *)p, v_round_bf16(x));
        _mm256_stream_si256((__m256i *)(p + 16), v_round_bf16(y));
    } else {
        _mm512_stream_si512((__m512i *)p, (__m512i)_mm512_cvtne2ps_pbh(y, x));
    }
}
#undef V_HAS_SUBNORMALS
#else
static inline __m256i v_pack_bf16(v_f32 x) { return v_round_bf16(x); }
#endif

static inline void v_store_f16(uint16_t *p, v_f32 x) { _mm256_storeu_si256((__m256i *)p, v_pack_f16(x)); }
static inline void v_store_bf16(uint16_t *p, v_f32 x) { _mm256_storeu_si256((__m256i *)p, v_pack_bf16(x)); }

static inline void v_store_part_f16(uint16_t *p, v_f32 x, int n)
{
    _mm256_mask_storeu_epi16(p, (__mmask16)v_first(n), v_pack_f16(x));
}

static inline void v_store_part_bf16(uint16_t *p, v_f32 x, int n)
{
    _mm256_mask_storeu_epi16(p, (__mmask16)v_first(n), v_pack_bf16(x));
}

static inline void v_stream_f16(uint16_t *p, v_f32 x) { _mm256_stream_si256((__m256i *)p, v_pack_f16(x)); }
static inline void v_stream_bf16(uint16_t *p, v_f32 x) { _mm256_stream_si256((__m256i *)p, v_pack_bf16(x)); }

static inline double v_sum_f64(v_f64 x)
{
    __m512d eight = _mm512_add_pd(x.a, x.b);
    __m256d four = _mm256_add_pd(_mm512_castpd512_pd256(eight), _mm512_extractf64x4_pd(eight, 1));
    __m128d two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
    return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
}

/* A macro: GCC takes a function that only prefetches for one without effect, and drops the call. */
#define v_prefetch(p) _mm_prefetch((const char *)(p), _MM_HINT_T1)
static inline void v_fence(void) { _mm_sfence(); }

#undef V_MAP_F64
#undef V_RARELY

#endif
