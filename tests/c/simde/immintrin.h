/* immintrin.h -- stands in for the compiler's, so that AVX-512 code runs on any CPU: SIMDe where it has an operation,
 * a few lines here where it has none. SIMDe itself includes <immintrin.h>; that one is the compiler's.
 */
#ifdef EMULATION_IMMINTRIN_H
#include_next <immintrin.h>
#else
#define EMULATION_IMMINTRIN_H

#include <simde/x86/avx512.h>
#include <simde/x86/f16c.h>
#include <simde/x86/fma.h>

#include <stdint.h>
#include <string.h>

/* A streaming store to an unaligned address faults on a CPU, so it must here. */
#define EMULATE_STREAM(name, T, V)                                                                                     \
    static inline void emulate_##name(T *p, V v)                                                                       \
    {                                                                                                                  \
        if ((uintptr_t)p % sizeof v != 0) {                                                                            \
            __builtin_trap();                                                                                          \
        }                                                                                                              \
        memcpy(p, &v, sizeof v);                                                                                       \
    }
EMULATE_STREAM(stream_ps, float, __m512)
EMULATE_STREAM(stream_pd, double, __m512d)
#define _mm512_stream_ps emulate_stream_ps
#define _mm512_stream_pd emulate_stream_pd

/* Masked lanes are not touched in memory. */
#define EMULATE_MASKED(T, V, mask_type, suffix)                                                                        \
    static inline V emulate_maskz_loadu_##suffix(mask_type mask, const T *p)                                           \
    {                                                                                                                  \
        T lanes[sizeof(V) / sizeof(T)] = {0};                                                                          \
        V v;                                                                                                           \
        for (unsigned i = 0; i < sizeof(V) / sizeof(T); i++) {                                                         \
            if ((mask >> i & 1) != 0) {                                                                                \
                memcpy(&lanes[i], p + i, sizeof(T));                                                                   \
            }                                                                                                          \
        }                                                                                                              \
        memcpy(&v, lanes, sizeof v);                                                                                   \
        return v;                                                                                                      \
    }                                                                                                                  \
    static inline void emulate_mask_storeu_##suffix(T *p, mask_type mask, V v)                                         \
    {                                                                                                                  \
        T lanes[sizeof(V) / sizeof(T)];                                                                                \
        memcpy(lanes, &v, sizeof v);                                                                                   \
        for (unsigned i = 0; i < sizeof(V) / sizeof(T); i++) {                                                         \
            if ((mask >> i & 1) != 0) {                                                                                \
                memcpy(p + i, &lanes[i], sizeof(T));                                                                   \
            }                                                                                                          \
        }                                                                                                              \
    }
EMULATE_MASKED(float, __m512, __mmask16, ps)
EMULATE_MASKED(double, __m512d, __mmask8, pd)
EMULATE_MASKED(uint16_t, __m256i, __mmask16, epi16)
#define _mm512_maskz_loadu_ps emulate_maskz_loadu_ps
#define _mm512_maskz_loadu_pd emulate_maskz_loadu_pd
#define _mm512_mask_storeu_ps emulate_mask_storeu_ps
#define _mm512_mask_storeu_pd emulate_mask_storeu_pd
#define _mm256_maskz_loadu_epi16 emulate_maskz_loadu_epi16
#define _mm256_mask_storeu_epi16 emulate_mask_storeu_epi16

/* The wide conversions, as two or four of AVX2 and F16C. */
static inline __m256 emulate_extractf32x8_ps(__m512 v, int which)
{
    __m256 half[2];
    memcpy(half, &v, sizeof v);
    return half[which];
}

static inline __m512d emulate_cvtps_pd(__m256 v)
{
    __m256d half[2] = {_mm256_cvtps_pd(_mm256_castps256_ps128(v)), _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1))};
    __m512d r;
    memcpy(&r, half, sizeof r);
    return r;
}

static inline __m512 emulate_cvtph_ps(__m256i h)
{
    __m256 half[2] = {_mm256_cvtph_ps(_mm256_castsi256_si128(h)), _mm256_cvtph_ps(_mm256_extracti128_si256(h, 1))};
    __m512 r;
    memcpy(&r, half, sizeof r);
    return r;
}

/* `rounding` must be the nearest: a constant that the instruction takes in its encoding. */
static inline __m256i emulate_cvtps_ph(__m512 v, int rounding)
{
    __m256 half[2];
    memcpy(half, &v, sizeof v);
    if (rounding != _MM_FROUND_TO_NEAREST_INT) {
        __builtin_trap();
    }
    return _mm256_set_m128i(_mm256_cvtps_ph(half[1], _MM_FROUND_TO_NEAREST_INT),
                            _mm256_cvtps_ph(half[0], _MM_FROUND_TO_NEAREST_INT));
}

/* Of two tables: one that makes NaNs of `from` quiet and leaves all else as in `to`, and one that makes 0 of what is
 * not above 0. SIMDe makes every NaN the same, and takes subnormals for zeros. */
enum { QUIET_NANS = 0x22, ZERO_BELOW = 0x08080800 };

static inline __m512 emulate_fixupimm_ps(__m512 to, __m512 from, __m512i table, int flags)
{
    uint32_t r[16], x[16], what[16];
    memcpy(r, &to, sizeof r);
    memcpy(x, &from, sizeof x);
    memcpy(what, &table, sizeof what);
    for (int i = 0; i < 16; i++) {
        const int is_nan = (x[i] & 0x7fffffffu) > 0x7f800000u;
        if ((what[i] != QUIET_NANS && what[i] != ZERO_BELOW) || flags != 0) {
            __builtin_trap();
        }
        if (what[i] == QUIET_NANS) {
            r[i] = is_nan ? x[i] | 0x400000u : r[i];
        } else {
            r[i] = !is_nan && (x[i] >= 0x80000000u || x[i] == 0) ? 0 : r[i];
        }
    }
    memcpy(&to, r, sizeof to);
    return to;
}

static inline __m512d emulate_fixupimm_pd(__m512d to, __m512d from, __m512i table, int flags)
{
    uint64_t r[8], x[8], what[8];
    memcpy(r, &to, sizeof r);
    memcpy(x, &from, sizeof x);
    memcpy(what, &table, sizeof what);
    for (int i = 0; i < 8; i++) {
        const int is_nan = (x[i] & INT64_MAX) > 0x7ff0000000000000u;
        if (what[i] != ZERO_BELOW || flags != 0) {
            __builtin_trap();
        }
        r[i] = !is_nan && (x[i] > INT64_MAX || x[i] == 0) ? 0 : r[i];
    }
    memcpy(&to, r, sizeof to);
    return to;
}

/* Not in every SIMDe. */
#undef _mm512_mask_cmp_ps_mask
#undef _mm512_mask_cmp_pd_mask
#define _mm512_mask_cmp_ps_mask(k, a, b, how) ((__mmask16)((k) & _mm512_cmp_ps_mask(a, b, how)))
#define _mm512_mask_cmp_pd_mask(k, a, b, how) ((__mmask8)((k) & _mm512_cmp_pd_mask(a, b, how)))
#define _mm512_extractf32x8_ps emulate_extractf32x8_ps
#define _mm512_cvtps_pd emulate_cvtps_pd
#define _mm512_cvtph_ps emulate_cvtph_ps
#define _mm512_cvtps_ph emulate_cvtps_ph
#undef _mm512_fixupimm_ps
#define _mm512_fixupimm_ps emulate_fixupimm_ps
#undef _mm512_fixupimm_pd
#define _mm512_fixupimm_pd emulate_fixupimm_pd

#endif
