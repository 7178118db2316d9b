/* halves.c -- float16 and bfloat16 conversions: every half, every half-way point, and a sample of all floats. */
#include "check.h"
#include "lanes.h"

#include <math.h>
#include <string.h>

/* The two types, by the numbers that define them. */
typedef struct {
    const char *name;
    int exponent_bits, fraction_bits;
    bool bf16;
} format;

static const format formats[] = {{"f16", 5, 10, false}, {"bf16", 8, 7, true}};

static const lanes_of_type *lanes_for(const tier *t, const format *type) { return type->bf16 ? &t->bf16 : &t->f16; }

static uint32_t bits_of(float f)
{
    uint32_t u;
    memcpy(&u, &f, sizeof u);
    return u;
}

static float float_of(uint32_t u)
{
    float f;
    memcpy(&f, &u, sizeof f);
    return f;
}

/* The value of a code, by the definition; past the largest finite code the numbers go on as if there were no infinity,
 * which is what the last half-way point needs. */
static double value_of(const format *type, unsigned magnitude)
{
    int bias = (1 << (type->exponent_bits - 1)) - 1;
    int exponent = (int)(magnitude >> type->fraction_bits);
    double fraction = magnitude & ((1u << type->fraction_bits) - 1u);
    return exponent == 0 ? ldexp(fraction, 1 - bias - type->fraction_bits)
                         : ldexp(fraction + ldexp(1.0, type->fraction_bits), exponent - bias - type->fraction_bits);
}

static unsigned infinity_of(const format *type) { return 0x7fffu >> type->fraction_bits << type->fraction_bits; }

/* The code nearest to a float, by arithmetic on doubles rather than on bits; ties to even are rint's. */
static unsigned nearest(const format *type, uint32_t bits)
{
    unsigned sign = bits >> 16 & 0x8000u;
    double a = fabs((double)float_of(bits));
    if (isnan(a)) { /* as much of the payload as fits, quieted */
        return sign | infinity_of(type) | 1u << (type->fraction_bits - 1) |
               ((bits & 0x7fffffu) >> (23 - type->fraction_bits));
    }
    if (a == 0.0 || isinf(a)) {
        return sign | (a == 0.0 ? 0 : infinity_of(type));
    }
    int smallest = 2 - (1 << (type->exponent_bits - 1));
    int exponent;
    frexp(a, &exponent);
    exponent = exponent - 1 < smallest ? smallest : exponent - 1;
    double steps = rint(ldexp(a, type->fraction_bits - exponent));
    unsigned code = (unsigned)steps + ((unsigned)(exponent - smallest) << type->fraction_bits);
    return sign | (code > infinity_of(type) ? infinity_of(type) : code);
}

static void check_from(const format *type, const tier *t)
{
    for (unsigned first = 0; first < 0x10000; first += 16) {
        uint16_t codes[16];
        uint32_t got[16];
        for (unsigned i = 0; i < 16; i++) {
            codes[i] = (uint16_t)(first + i);
        }
        lanes_for(t, type)->from(codes, got);
        for (unsigned i = 0; i < 16; i++) {
            unsigned magnitude = codes[i] & 0x7fffu;
            uint32_t sign = (codes[i] & 0x8000u) << 16;
            uint32_t fraction = (magnitude & ((1u << type->fraction_bits) - 1u)) << (23 - type->fraction_bits);
            /* f16 to f32 is an operation and quiets a NaN, bf16 to f32 is a move. */
            uint32_t want = magnitude > infinity_of(type)    ? 0x7f800000u | fraction | (type->bf16 ? 0 : 0x400000u)
                            : magnitude == infinity_of(type) ? 0x7f800000u
                                                             : bits_of((float)value_of(type, magnitude));
            check(got[i] == (sign | want), "%s of %s: code %04x gives %08x and not %08x", t->kernels->name, type->name,
                  codes[i], got[i], sign | want);
        }
    }
}

static void check_to(const format *type, const tier *const *tiers, int count, const uint32_t *floats,
                     bool independently)
{
    uint16_t want[16];
    lanes_for(tiers[0], type)->to(floats, want);
    for (int i = 0; independently && i < 16; i++) {
        unsigned code = nearest(type, floats[i]);
        check(want[i] == code, "%s to %s: float %08x gives %04x and not %04x", tiers[0]->kernels->name, type->name,
              floats[i], want[i], code);
    }
    for (int t = 1; t < count; t++) {
        _Alignas(64) uint16_t got[2][16];
        lanes_for(tiers[t], type)->to(floats, got[0]);
        lanes_for(tiers[t], type)->stream(floats, got[1]);
        bool same = memcmp(got[0], want, sizeof want) == 0 && memcmp(got[1], want, sizeof want) == 0;
        for (int i = 0; !same && i < 16; i++) {
            check(got[0][i] == want[i] && got[1][i] == want[i],
                  "%s to %s: float %08x gives %04x (streamed %04x) and not %04x", tiers[t]->kernels->name, type->name,
                  floats[i], got[0][i], got[1][i], want[i]);
        }
        check(same, "%s to %s", tiers[t]->kernels->name, type->name);
        if (lanes_for(tiers[t], type)->line != NULL) {
            static _Alignas(64) uint16_t line[32]; /* AddressSanitizer's own stack is aligned to less */
            lanes_for(tiers[t], type)->line(floats, line);
            for (int i = 0; i < 32; i++) {
                unsigned code = i < 16 ? want[i] : want[i - 16] ^ 0x8000u;
                check(line[i] == code, "%s to a line of %s: float %08x, or its opposite, gives %04x and not %04x",
                      tiers[t]->kernels->name, type->name, floats[i % 16], line[i], code);
            }
        }
    }
}

/* Each finite code and the point half-way to the next, each with its neighbours among the floats, of both signs. */
static void check_ties(const format *type, const tier *const *tiers, int count)
{
    for (unsigned code = 0; code < infinity_of(type); code++) {
        double here = value_of(type, code);
        uint32_t exact = bits_of((float)here);
        uint32_t tie = bits_of((float)((here + value_of(type, code + 1)) / 2.0));
        uint32_t floats[16] = {exact, exact + 1, tie - 1, tie, tie + 1, exact == 0 ? 0 : exact - 1};
        for (int i = 0; i < 8; i++) {
            floats[8 + i] = floats[i] | 0x80000000u;
        }
        check_to(type, tiers, count, floats, true);
    }
}

void check_halves(const tier *const *tiers, int count, uint64_t seed, int thoroughness)
{
    enum { SAMPLE = 1 << 22, OF_WHICH_INDEPENDENTLY = 16 };
    rng r = {seed};
    for (size_t f = 0; f < sizeof formats / sizeof *formats; f++) {
        for (int t = 0; t < count; t++) {
            check_from(&formats[f], tiers[t]);
        }
        check_ties(&formats[f], tiers, count);
        for (int i = 0; i < SAMPLE / 16 * thoroughness; i++) {
            uint32_t floats[16];
            for (int k = 0; k < 16; k += 2) {
                uint64_t two = rng_next(&r);
                memcpy(floats + k, &two, sizeof two);
            }
            check_to(&formats[f], tiers, count, floats, i % OF_WHICH_INDEPENDENTLY == 0);
        }
    }
}
