/* dispatch.c -- what this machine can run, and the choice of one table of kernels. */
#include "dispatch.h"

#include <string.h>

#if defined(__x86_64__) || defined(_M_X64) || defined(__i386__) || defined(_M_IX86)
#define FBN_X86 1
#if defined(_MSC_VER)
#include <intrin.h>
#else
#include <cpuid.h>
#endif

typedef struct {
    unsigned a, b, c, d;
} fbn_cpuid_regs;

static fbn_cpuid_regs fbn_cpuid_part(unsigned leaf, unsigned part)
{
    fbn_cpuid_regs r = {0, 0, 0, 0};
#if defined(_MSC_VER)
    int v[4];
    __cpuidex(v, 0, 0);
    if ((unsigned)v[0] >= leaf) {
        __cpuidex(v, (int)leaf, (int)part);
        r = (fbn_cpuid_regs){(unsigned)v[0], (unsigned)v[1], (unsigned)v[2], (unsigned)v[3]};
    }
#else
    if ((unsigned)__get_cpuid_max(0, NULL) >= leaf) {
        __cpuid_count(leaf, part, r.a, r.b, r.c, r.d);
    }
#endif
    return r;
}

static fbn_cpuid_regs fbn_cpuid(unsigned leaf) { return fbn_cpuid_part(leaf, 0); }

/* The register files that the operating system saves: a CPU flag alone does not make a tier safe. */
static unsigned long long fbn_saved_state(void)
{
    unsigned osxsave = 1u << 27;
    if ((fbn_cpuid(1).c & osxsave) == 0) {
        return 0;
    }
#if defined(_MSC_VER)
    return _xgetbv(0);
#else
    unsigned low;
    unsigned high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (unsigned long long)high << 32 | low;
#endif
}

static bool fbn_has(unsigned value, unsigned mask) { return (value & mask) == mask; }

static bool fbn_can_avx2(void)
{
    unsigned fma_avx_f16c = 1u << 12 | 1u << 28 | 1u << 29;
    unsigned avx2 = 1u << 5;
    unsigned xmm_ymm = 0x6;
    return fbn_has((unsigned)fbn_saved_state(), xmm_ymm) && fbn_has(fbn_cpuid(1).c, fma_avx_f16c) &&
           fbn_has(fbn_cpuid(7).b, avx2);
}

static bool fbn_can_avx512(void)
{
    unsigned f_dq_bw_vl = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31;
    unsigned xmm_ymm_zmm = 0xe6;
    return fbn_can_avx2() && fbn_has((unsigned)fbn_saved_state(), xmm_ymm_zmm) && fbn_has(fbn_cpuid(7).b, f_dq_bw_vl);
}

static bool fbn_can_avx512_bf16(void)
{
    unsigned bf16 = 1u << 5;
    return fbn_can_avx512() && fbn_cpuid(7).a >= 1 && fbn_has(fbn_cpuid_part(7, 1).a, bf16);
}
#endif

#if defined(FBN_HAVE_AVX512_BF16)
#define FBN_AVX512_BF16 &fbn_isa_avx512_bf16
#else
#define FBN_AVX512_BF16 NULL
#endif

#if defined(FBN_HAVE_AVX512)
#define FBN_AVX512 &fbn_isa_avx512
#else
#define FBN_AVX512 NULL
#endif
#if defined(FBN_HAVE_AVX2)
#define FBN_AVX2 &fbn_isa_avx2
#else
#define FBN_AVX2 NULL
#endif
#if defined(FBN_HAVE_NEON)
#define FBN_NEON &fbn_isa_neon
#else
#define FBN_NEON NULL
#endif

enum { FBN_TIERS = 5 };

/* Best first. A tier that is not built has no table. */
static const fbn_isa *const fbn_tables[FBN_TIERS] = {FBN_AVX512_BF16, FBN_AVX512, FBN_AVX2, FBN_NEON, &fbn_isa_scalar};
static fbn_tier fbn_tiers[FBN_TIERS] = {{"avx512_bf16", false, false},
                                        {"avx512", false, false},
                                        {"avx2", false, false},
                                        {"neon", false, false},
                                        {"scalar", true, true}};

/* The tiers of this architecture, built and runnable or not. */
#if defined(FBN_X86)
static const bool fbn_native_tiers[FBN_TIERS] = {true, true, true, false, true};
#else
static const bool fbn_native_tiers[FBN_TIERS] = {false, false, false, true, true};
#endif

/* Which tier is in use. Where it has no kernels of a dtype, those of the next that runs here serve. */
static int fbn_current = FBN_TIERS - 1;

static void fbn_probe(void)
{
    bool can[FBN_TIERS] = {false, false, false, true, true}; /* NEON is part of every AArch64 */
#if defined(FBN_X86)
    can[0] = fbn_can_avx512_bf16();
    can[1] = fbn_can_avx512();
    can[2] = fbn_can_avx2();
#endif
    for (int i = 0; i < FBN_TIERS; i++) {
        fbn_tiers[i].built = fbn_tables[i] != NULL;
        fbn_tiers[i].runnable = fbn_tiers[i].built && can[i];
    }
}

bool fbn_dispatch(const char *cap)
{
    fbn_probe();
    int i = 0;
    while (cap != NULL && i < FBN_TIERS && strcmp(fbn_tiers[i].name, cap) != 0) {
        i++;
    }
    if (i == FBN_TIERS || (cap != NULL && !fbn_native_tiers[i])) {
        return false;
    }
    while (!fbn_tiers[i].runnable) {
        i++;
    }
    fbn_current = i;
    return true;
}

/* Taken for true of all that is Intel's, and measured on Emerald Rapids; Zen 3 and 4 gain by every prefetch.
 * docs/performance.md has the figures. */
bool fbn_follows_runs(void)
{
#if defined(FBN_X86)
    const unsigned genu = 0x756e6547;
    return fbn_cpuid(0).b == genu;
#else
    return false;
#endif
}

const fbn_tier *fbn_tier_at(int i) { return i >= 0 && i < FBN_TIERS ? &fbn_tiers[i] : NULL; }

const char *fbn_isa_name(void) { return fbn_tiers[fbn_current].name; }

/* Whether the calling thread takes subnormal numbers for zeros. */
static bool fbn_denormals_are_zeros(void)
{
    static const volatile float subnormal = 0x1p-130f;
    return subnormal == 0.0f;
}

const fbn_kernels *fbn_kernels_for(fbn_dtype dtype)
{
    int i = fbn_current;
    /* AVX512_BF16's kernels look for subnormals by an instruction that may see none where they are zeros. To ask the
     * caller will do, for the team works in the caller's environment. */
    while (!fbn_tiers[i].runnable || !fbn_has_kernels(fbn_tables[i], dtype) ||
           (fbn_tables[i] == FBN_AVX512_BF16 && fbn_denormals_are_zeros())) {
        i++;
    }
    return &fbn_tables[i]->of[dtype];
}
