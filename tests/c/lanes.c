/* lanes.c -- see lanes.h. Compiled once per tier: FBN_ISA is its name, HEADER its header, as in src_c/isa. */
#include HEADER

#include "lanes.h"

#include <string.h>

#define LANES(type)                                                                                                    \
    static void from_##type(const uint16_t *h, uint32_t *bits)                                                         \
    {                                                                                                                  \
        float f[16];                                                                                                   \
        v_store_f32(f, v_load_##type(h));                                                                              \
        memcpy(bits, f, sizeof f);                                                                                     \
    }                                                                                                                  \
    static void to_##type(const uint32_t *bits, uint16_t *h)                                                           \
    {                                                                                                                  \
        float f[16];                                                                                                   \
        memcpy(f, bits, sizeof f);                                                                                     \
        v_store_##type(h, v_load_f32(f));                                                                              \
    }                                                                                                                  \
    static void stream_##type(const uint32_t *bits, uint16_t *h)                                                       \
    {                                                                                                                  \
        float f[16];                                                                                                   \
        memcpy(f, bits, sizeof f);                                                                                     \
        v_stream_##type(h, v_load_f32(f));                                                                             \
        v_fence();                                                                                                     \
    }

LANES(f16)
LANES(bf16)

#if defined(V_LINES_OF_BF16)
static void line_bf16(const uint32_t *bits, uint16_t *h)
{
    static float f[16]; /* not on AddressSanitizer's own stack, where gcc takes them for better aligned than they are */
    static float opposite[16];
    memcpy(f, bits, sizeof f);
    for (int i = 0; i < 16; i++) {
        uint32_t other = bits[i] ^ 0x80000000u;
        memcpy(opposite + i, &other, sizeof other);
    }
    v_stream_line_bf16(h, v_load_f32(f), v_load_f32(opposite));
    v_fence();
}
#else
#define line_bf16 NULL
#endif

#define TIER_(isa) tier_##isa
#define TIER(isa) TIER_(isa)
#define TABLE_(isa) fbn_isa_##isa
#define TABLE(isa) TABLE_(isa)

const tier TIER(FBN_ISA) = {
    .kernels = &TABLE(FBN_ISA),
    .f16 = {from_f16, to_f16, stream_f16, NULL},
    .bf16 = {from_bf16, to_bf16, stream_bf16, line_bf16},
};
