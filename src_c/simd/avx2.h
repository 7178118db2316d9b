/* avx2.h -- the v_ operations on AVX2, FMA and F16C. */
#ifndef FASTBN_SIMD_AVX2_H
#define FASTBN_SIMD_AVX2_H

#include <immintrin.h>
#include <stdint.h>

typedef struct {
    __m256 a, b;
} v_f32;

typedef struct {
    __m256d a, b, c, d;
} v_f64;

#define V_MAP_F32(op)                                                                                                  \
    return (v_f32) { op(x.a, y.a), op(x.b, y.b) }
#define V_MAP_F64(op)                                                                                                  \
    return (v_f64) { op(x.a, y.a), op(x.b, y.b), op(x.c, y.c), op(x.d, y.d) }

static inline v_f32 v_set1_f32(float x)
{
    __m256 r = _mm256_set1_ps(x);
    return (v_f32){r, r};
}

static inline v_f64 v_set1_f64(double x)
{
    __m256d r = _mm256_set1_pd(x);
    return (v_f64){r, r, r, r};
}

static inline v_f32 v_add_f32(v_f32 x, v_f32 y) { V_MAP_F32(_mm256_add_ps); }
static inline v_f64 v_add_f64(v_f64 x, v_f64 y) { V_MAP_F64(_mm256_add_pd); }
static inline v_f32 v_sub_f32(v_f32 x, v_f32 y) { V_MAP_F32(_mm256_sub_ps); }
static inline v_f64 v_sub_f64(v_f64 x, v_f64 y) { V_MAP_F64(_mm256_sub_pd); }
static inline v_f32 v_mul_f32(v_f32 x, v_f32 y) { V_MAP_F32(_mm256_mul_ps); }
static inline v_f64 v_mul_f64(v_f64 x, v_f64 y) { V_MAP_F64(_mm256_mul_pd); }

static inline v_f32 v_fma_f32(v_f32 x, v_f32 y, v_f32 z)
{
    return (v_f32){_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}

static inline v_f64 v_fma_f64(v_f64 x, v_f64 y, v_f64 z)
{
    return (v_f64){_mm256_fmadd_pd(x.a, y.a, z.a), _mm256_fmadd_pd(x.b, y.b, z.b), _mm256_fmadd_pd(x.c, y.c, z.c),
                   _mm256_fmadd_pd(x.d, y.d, z.d)};
}

static inline v_f64 v_widen(v_f32 x)
{
    return (v_f64){_mm256_cvtps_pd(_mm256_castps256_ps128(x.a)), _mm256_cvtps_pd(_mm256_extractf128_ps(x.a, 1)),
                   _mm256_cvtps_pd(_mm256_castps256_ps128(x.b)), _mm256_cvtps_pd(_mm256_extractf128_ps(x.b, 1))};
}

/* x <= y ? yes : no; false where x or y is NaN. */
static inline v_f32 v_select_le_f32(v_f32 x, v_f32 y, v_f32 yes, v_f32 no)
{
    return (v_f32){_mm256_blendv_ps(no.a, yes.a, _mm256_cmp_ps(x.a, y.a, _CMP_LE_OQ)),
                   _mm256_blendv_ps(no.b, yes.b, _mm256_cmp_ps(x.b, y.b, _CMP_LE_OQ))};
}

static inline v_f64 v_select_le_f64(v_f64 x, v_f64 y, v_f64 yes, v_f64 no)
{
    return (v_f64){_mm256_blendv_pd(no.a, yes.a, _mm256_cmp_pd(x.a, y.a, _CMP_LE_OQ)),
                   _mm256_blendv_pd(no.b, yes.b, _mm256_cmp_pd(x.b, y.b, _CMP_LE_OQ)),
                   _mm256_blendv_pd(no.c, yes.c, _mm256_cmp_pd(x.c, y.c, _CMP_LE_OQ)),
                   _mm256_blendv_pd(no.d, yes.d, _mm256_cmp_pd(x.d, y.d, _CMP_LE_OQ))};
}

/* x; 0 where x <= 0, and upper, which is above 0, where upper <= x: NaN stays. */
static inline __m256 v_clip_eight(__m256 x, __m256 upper)
{
    return _mm256_min_ps(upper, _mm256_and_ps(_mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_NLE_UQ), x));
}

static inline __m256d v_clip_four(__m256d x, __m256d upper)
{
    return _mm256_min_pd(upper, _mm256_and_pd(_mm256_cmp_pd(x, _mm256_setzero_pd(), _CMP_NLE_UQ), x));
}

static inline v_f32 v_clip_f32(v_f32 x, v_f32 y) { V_MAP_F32(v_clip_eight); }
static inline v_f64 v_clip_f64(v_f64 x, v_f64 y) { V_MAP_F64(v_clip_four); }

/* x; 0 where z <= 0 or upper <= z. */
static inline __m256 v_inside_eight(__m256 x, __m256 z, __m256 upper)
{
    __m256 above = _mm256_cmp_ps(z, _mm256_setzero_ps(), _CMP_NLE_UQ);
    return _mm256_and_ps(x, _mm256_and_ps(above, _mm256_cmp_ps(upper, z, _CMP_NLE_UQ)));
}

static inline __m256d v_inside_four(__m256d x, __m256d z, __m256d upper)
{
    __m256d above = _mm256_cmp_pd(z, _mm256_setzero_pd(), _CMP_NLE_UQ);
    return _mm256_and_pd(x, _mm256_and_pd(above, _mm256_cmp_pd(upper, z, _CMP_NLE_UQ)));
}

static inline v_f32 v_inside_f32(v_f32 x, v_f32 z, v_f32 upper)
{
    return (v_f32){v_inside_eight(x.a, z.a, upper.a), v_inside_eight(x.b, z.b, upper.b)};
}

static inline v_f64 v_inside_f64(v_f64 x, v_f64 z, v_f64 upper)
{
    return (v_f64){v_inside_four(x.a, z.a, upper.a), v_inside_four(x.b, z.b, upper.b), v_inside_four(x.c, z.c, upper.c),
                   v_inside_four(x.d, z.d, upper.d)};
}

static inline unsigned v_bits_le_f32(v_f32 x, v_f32 y)
{
    return (unsigned)_mm256_movemask_ps(_mm256_cmp_ps(x.a, y.a, _CMP_LE_OQ)) |
           (unsigned)_mm256_movemask_ps(_mm256_cmp_ps(x.b, y.b, _CMP_LE_OQ)) << 8;
}

static inline unsigned v_bits_le_f64(v_f64 x, v_f64 y)
{
    return (unsigned)_mm256_movemask_pd(_mm256_cmp_pd(x.a, y.a, _CMP_LE_OQ)) |
           (unsigned)_mm256_movemask_pd(_mm256_cmp_pd(x.b, y.b, _CMP_LE_OQ)) << 4 |
           (unsigned)_mm256_movemask_pd(_mm256_cmp_pd(x.c, y.c, _CMP_LE_OQ)) << 8 |
           (unsigned)_mm256_movemask_pd(_mm256_cmp_pd(x.d, y.d, _CMP_LE_OQ)) << 12;
}

static inline v_f32 v_select_bits_f32(unsigned bits, v_f32 yes, v_f32 no)
{
    __m256i low = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    __m256i m = _mm256_set1_epi32((int)bits);
    __m256i high = _mm256_slli_epi32(low, 8);
    __m256i a = _mm256_cmpeq_epi32(_mm256_and_si256(m, low), low);
    __m256i b = _mm256_cmpeq_epi32(_mm256_and_si256(m, high), high);
    return (v_f32){_mm256_blendv_ps(no.a, yes.a, _mm256_castsi256_ps(a)),
                   _mm256_blendv_ps(no.b, yes.b, _mm256_castsi256_ps(b))};
}

static inline __m256d v_lanes_f64(unsigned bits)
{
    __m256i lane = _mm256_setr_epi64x(1, 2, 4, 8);
    return _mm256_castsi256_pd(_mm256_cmpeq_epi64(_mm256_and_si256(_mm256_set1_epi64x((long long)bits), lane), lane));
}

static inline v_f64 v_select_bits_f64(unsigned bits, v_f64 yes, v_f64 no)
{
    return (v_f64){
        _mm256_blendv_pd(no.a, yes.a, v_lanes_f64(bits)), _mm256_blendv_pd(no.b, yes.b, v_lanes_f64(bits >> 4)),
        _mm256_blendv_pd(no.c, yes.c, v_lanes_f64(bits >> 8)), _mm256_blendv_pd(no.d, yes.d, v_lanes_f64(bits >> 12))};
}

static inline v_f32 v_load_f32(const float *p) { return (v_f32){_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }

static inline v_f64 v_load_f64(const double *p)
{
    return (v_f64){_mm256_loadu_pd(p), _mm256_loadu_pd(p + 4), _mm256_loadu_pd(p + 8), _mm256_loadu_pd(p + 12)};
}

static inline void v_store_f32(float *p, v_f32 x)
{
    _mm256_storeu_ps(p, x.a);
    _mm256_storeu_ps(p + 8, x.b);
}

static inline void v_store_f64(double *p, v_f64 x)
{
    _mm256_storeu_pd(p, x.a);
    _mm256_storeu_pd(p + 4, x.b);
    _mm256_storeu_pd(p + 8, x.c);
    _mm256_storeu_pd(p + 12, x.d);
}

static inline void v_stream_f32(float *p, v_f32 x)
{
    _mm256_stream_ps(p, x.a);
    _mm256_stream_ps(p + 8, x.b);
}

static inline void v_stream_f64(double *p, v_f64 x)
{
    _mm256_stream_pd(p, x.a);
    _mm256_stream_pd(p + 4, x.b);
    _mm256_stream_pd(p + 8, x.c);
    _mm256_stream_pd(p + 12, x.d);
}

/* Lane masks of the first n lanes: a window into ones followed by zeros. */
static const int32_t v_window[32] = {-1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1};

static inline __m256i v_first_f32(int n, int from)
{
    return _mm256_loadu_si256((const __m256i *)(v_window + 16 - n + from));
}

static inline __m256i v_first_f64(int n, int from)
{
    return _mm256_cvtepi32_epi64(_mm_loadu_si128((const __m128i *)(v_window + 16 - n + from)));
}

static inline v_f32 v_load_part_f32(const float *p, int n)
{
    return (v_f32){_mm256_maskload_ps(p, v_first_f32(n, 0)), _mm256_maskload_ps(p + 8, v_first_f32(n, 8))};
}

static inline v_f64 v_load_part_f64(const double *p, int n)
{
    return (v_f64){_mm256_maskload_pd(p, v_first_f64(n, 0)), _mm256_maskload_pd(p + 4, v_first_f64(n, 4)),
                   _mm256_maskload_pd(p + 8, v_first_f64(n, 8)), _mm256_maskload_pd(p + 12, v_first_f64(n, 12))};
}

static inline void v_store_part_f32(float *p, v_f32 x, int n)
{
    _mm256_maskstore_ps(p, v_first_f32(n, 0), x.a);
    _mm256_maskstore_ps(p + 8, v_first_f32(n, 8), x.b);
}

static inline void v_store_part_f64(double *p, v_f64 x, int n)
{
    _mm256_maskstore_pd(p, v_first_f64(n, 0), x.a);
    _mm256_maskstore_pd(p + 4, v_first_f64(n, 4), x.b);
    _mm256_maskstore_pd(p + 8, v_first_f64(n, 8), x.c);
    _mm256_maskstore_pd(p + 12, v_first_f64(n, 12), x.d);
}

static inline v_f32 v_load_f16(const uint16_t *p)
{
    return (v_f32){_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)),
                   _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p + 8)))};
}

static inline __m256i v_pack_f16(v_f32 x)
{
    return _mm256_set_m128i(_mm256_cvtps_ph(x.b, _MM_FROUND_TO_NEAREST_INT),
                            _mm256_cvtps_ph(x.a, _MM_FROUND_TO_NEAREST_INT));
}

static inline __m256 v_unpack_bf16(__m128i h)
{
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}

static inline v_f32 v_load_bf16(const uint16_t *p)
{
    return (v_f32){v_unpack_bf16(_mm_loadu_si128((const __m128i *)p)),
                   v_unpack_bf16(_mm_loadu_si128((const __m128i *)(p + 8)))};
}

static inline __m256i v_round_bf16(__m256 x)
{
    __m256i u = _mm256_castps_si256(x);
    __m256i top = _mm256_srli_epi32(u, 16);
    __m256i odd = _mm256_and_si256(top, _mm256_set1_epi32(1));
    __m256i near = _mm256_srli_epi32(_mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
    __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    return _mm256_blendv_epi8(near, _mm256_or_si256(top, _mm256_set1_epi32(0x40)), nan);
}

static inline __m256i v_pack_bf16(v_f32 x)
{
    return _mm256_permute4x64_epi64(_mm256_packus_epi32(v_round_bf16(x.a), v_round_bf16(x.b)), 0xd8);
}

static inline void v_store_f16(uint16_t *p, v_f32 x) { _mm256_storeu_si256((__m256i *)p, v_pack_f16(x)); }
static inline void v_store_bf16(uint16_t *p, v_f32 x) { _mm256_storeu_si256((__m256i *)p, v_pack_bf16(x)); }
static inline void v_stream_f16(uint16_t *p, v_f32 x) { _mm256_stream_si256((__m256i *)p, v_pack_f16(x)); }
static inline void v_stream_bf16(uint16_t *p, v_f32 x) { _mm256_stream_si256((__m256i *)p, v_pack_bf16(x)); }

static inline double v_sum_f64(v_f64 x)
{
    __m256d four = _mm256_add_pd(_mm256_add_pd(x.a, x.c), _mm256_add_pd(x.b, x.d));
    __m128d two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
    return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
}

/* A macro: GCC takes a function that only prefetches for one without effect, and drops the call. */
#define v_prefetch(p) _mm_prefetch((const char *)(p), _MM_HINT_T1)
static inline void v_fence(void) { _mm_sfence(); }

#undef V_MAP_F32
#undef V_MAP_F64

#endif
