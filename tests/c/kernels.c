/* kernels.c -- every kernel of the registry, in every tier, against the scalar tier: the same bytes, none elsewhere.
 *
 * A case is one call drawn at random: shape, strides, placement, options, numbers. Each of its buffers lies between two
 * unreadable pages; inputs are read-only while a kernel runs; the surroundings of outputs must stay as they were. The
 * reference is what the scalar tier makes of the same call in parts, as small as they may be: what a kernel does to
 * many rows, planes or channels at a time is compared with what it does to each. (That the scalar tier computes batch
 * normalization is for the tests in Python to say.)
 *
 * Usage: kernels [seed [thoroughness]]
 */
#include "check.h"
#include "dispatch.h"
#include "lanes.h"
#include "simd/half.h"
#include "turns.h"

#ifdef FBN_HAVE_AVX512_BF16
#include <immintrin.h>
#endif
#include <float.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- numbers ---- */

enum { BITS = FBN_DTYPE_COUNT }; /* gates: beside the dtypes, the fifth type that memory may hold */

static size_t size_of(int type) { return type == FBN_F64 ? 8 : type == FBN_F32 ? 4 : 2; }

/* What a buffer is filled with. PAYLOADS has NaNs of every kind: which of two different NaNs an operation returns is
 * the compiler's choice, so there NaNs are only compared as such. Everywhere else the only NaN is the one that the CPU
 * makes itself, and bytes are compared. */
typedef enum { PLAIN, FAR, CONSTANT, HUGE_NUMBERS, TINY, SPECIAL, RAW, PAYLOADS, NUMBERS } numbers;

static const char *const number_names[] = {"plain", "far from zero", "constant", "huge",
                                           "tiny",  "special",       "raw bits", "raw bits with NaN payloads"};

static double cpu_nan(void)
{
    volatile double infinity = INFINITY;
    return infinity - infinity;
}

static void put(int type, void *p, double v)
{
    float f = (float)v;
    uint16_t h = type == FBN_F16 ? half_to_f16(f) : half_to_bf16(f);
    memcpy(p, type == FBN_F64 ? (void *)&v : type == FBN_F32 ? (void *)&f : (void *)&h, size_of(type));
}

static bool is_nan(int type, const void *p)
{
    double v = 0.0;
    float f = 0.0f;
    uint16_t h = 0;
    memcpy(type == FBN_F64 ? (void *)&v : type == FBN_F32 ? (void *)&f : (void *)&h, p, size_of(type));
    return isnan(v) || isnan(f) || (type == FBN_F16 && (h & 0x7fff) > 0x7c00) ||
           (type == FBN_BF16 && (h & 0x7fff) > 0x7f80);
}

static double largest(int type) { return type == FBN_F64 ? DBL_MAX : type == FBN_F16 ? 65504.0 : 3.38e38; }
static double smallest(int type) { return type == FBN_F64 ? DBL_MIN : type == FBN_F16 ? 0x1p-14 : (double)FLT_MIN; }

static void draw(int type, void *p, numbers kind, rng *r)
{
    double v = rng_unit(r) * 3.0;
    uint64_t raw = rng_next(r);
    switch (kind) {
    case FAR: v += 1e4; break;
    case CONSTANT: v = 3.25; break;
    case HUGE_NUMBERS: v = rng_unit(r) * largest(type); break;
    case TINY: v = rng_unit(r) * smallest(type); break;
    case SPECIAL:
        switch (rng_below(r, 40)) {
        case 0: v = cpu_nan(); break;
        case 1: v = INFINITY; break;
        case 2: v = -INFINITY; break;
        case 3: v = largest(type); break;
        case 4: v = smallest(type) / 4.0; break;
        case 5: v = -0.0; break;
        case 6: v = 0.0; break;
        case 7: v = 6.0; break;
        }
        break;
    case RAW:
    case PAYLOADS:
        memcpy(p, &raw, size_of(type));
        if (kind == RAW && type != BITS && is_nan(type, p)) {
            put(type, p, cpu_nan());
        }
        return;
    default: break;
    }
    if (type == BITS) {
        memcpy(p, &raw, sizeof(uint16_t));
    } else {
        put(type, p, v);
    }
}

/* ---- buffers ---- */

/* Rows of numbers somewhere in an arena. */
typedef struct {
    const arena *home;
    int type;
    int64_t rows, width, stride;
    char *low, *high; /* the bytes from the first row to the last, whichever way the stride goes */
    char *data;       /* row 0 */
} matrix;

static matrix matrix_make(const arena *home, int type, int64_t rows, int64_t width, int64_t stride, place where, rng *r)
{
    matrix m = {.home = home, .type = type, .rows = rows, .width = width, .stride = stride};
    int64_t reach = rows > 1 && width > 0 ? (rows - 1) * llabs(stride) : 0;
    size_t bytes = rows > 0 ? (size_t)(reach + width) * size_of(type) : 0;
    m.low = arena_place(home, bytes, size_of(type), where, r);
    m.high = m.low + bytes;
    m.data = stride < 0 ? m.low + (size_t)reach * size_of(type) : m.low;
    return m;
}

static char *matrix_row(const matrix *m, int64_t row) { return m->data + row * m->stride * (int64_t)size_of(m->type); }

static void matrix_fill(const matrix *m, numbers kind, rng *r)
{
    for (char *p = m->low; p < m->high; p += size_of(m->type)) {
        draw(m->type, p, kind, r);
    }
}

/* A matrix that kernels write, with its surroundings. */
typedef struct {
    matrix m;
    char *begin, *end;               /* what is watched */
    char *before, *reference, *work; /* copies of it */
} output;

enum { MARGIN = 512, CANARY = 0xa5, OUTPUTS = 5, ARENA_BYTES = 4 << 20 };

static void output_watch(output *o, matrix m, bool has_content)
{
    o->m = m;
    o->begin = m.low - m.home->begin < MARGIN ? m.home->begin : m.low - MARGIN;
    o->end = m.home->end - m.high < MARGIN ? m.home->end : m.high + MARGIN;
    if (has_content) {
        memset(o->begin, CANARY, (size_t)(m.low - o->begin));
        memset(m.high, CANARY, (size_t)(o->end - m.high));
    } else {
        memset(o->begin, CANARY, (size_t)(o->end - o->begin));
    }
    memcpy(o->before, o->begin, (size_t)(o->end - o->begin));
}

static void output_reset(const output *o) { memcpy(o->begin, o->before, (size_t)(o->end - o->begin)); }

/* Whether all bytes that belong to no row are as they were. */
static bool output_surroundings_kept(const output *o)
{
    size_t bytes = (size_t)(o->end - o->begin);
    memcpy(o->work, o->begin, bytes);
    for (int64_t row = 0; row < o->m.rows; row++) {
        ptrdiff_t at = matrix_row(&o->m, row) - o->begin;
        memcpy(o->work + at, o->before + at, (size_t)o->m.width * size_of(o->m.type));
    }
    return memcmp(o->work, o->before, bytes) == 0;
}

static void make_nans_alike(const output *o, char *copy)
{
    for (char *p = copy + (o->m.low - o->begin); o->m.type != BITS && p < copy + (o->m.high - o->begin);
         p += size_of(o->m.type)) {
        if (is_nan(o->m.type, p)) {
            put(o->m.type, p, NAN);
        }
    }
}

/* The element that differs from the reference; -1 where none does. */
static int64_t output_difference(const output *o, bool nans_alike)
{
    size_t bytes = (size_t)(o->end - o->begin);
    memcpy(o->work, o->begin, bytes);
    if (nans_alike) {
        make_nans_alike(o, o->work);
    }
    if (memcmp(o->work, o->reference, bytes) == 0) {
        return -1;
    }
    size_t at = 0;
    while (o->work[at] == o->reference[at]) {
        at++;
    }
    return (int64_t)at / (int64_t)size_of(o->m.type);
}

/* ---- calls ---- */

typedef enum { MOMENTS, SUMS, APPLIES, COEFS, COPIES, NOTHING } shape;

typedef struct operation operation;

/* Everything that a kernel may want. */
typedef struct {
    const operation *op;
    fbn_dtype dtype;
    numbers kind;
    place where;
    fbn_span span;
    fbn_coef coef;
    fbn_gate_rule rule;
    int64_t first, last; /* of the rows family's blocks */
    bool turns;          /* a slab is applied meanwhile */
    bool touching;       /* applied to: rows with nothing between them, in every tensor */
    fbn_blocks blocks;
    int64_t channels;
    const double *mean;
    double *stats[3];
    fbn_affine affine;
    fbn_backward_sums sums;
    int in_place;
    matrix x, other, gate, coefs[7], means, tile;
    output outputs[OUTPUTS];
    int output_count;
} call;

struct operation {
    const char *name;
    void (*run)(const fbn_kernels *k, const call *c);
    bool rows; /* the family */
    shape shape;
    bool backward;
};

/* One line an operation: how it is called, and what it is. An operation that has none here does not compile. */
#define RUN(op, ...)                                                                                                   \
    static void run_##op(const fbn_kernels *k, const call *c)                                                          \
    {                                                                                                                  \
        (void)c;                                                                                                       \
        k->op(__VA_ARGS__);                                                                                            \
    }
RUN(moments_rows, &c->span, &c->blocks, c->first, c->last, c->channels, c->tile.data, c->stats[0], c->stats[1],
    c->stats[2])
RUN(moments_cols, &c->span, c->tile.data, c->stats[0], c->stats[1], c->stats[2])
RUN(normalize_rows, &c->span, &c->coef, c->rule)
RUN(normalize_cols, &c->span, &c->coef, c->rule)
/* In pieces of all sizes; what is not streamed, and so the reference, at once. */
static void run_apply_some(const fbn_kernels *k, const call *c)
{
    fbn_turn turn = {.span = c->span, .k = c->coef, .rule = c->rule, .backward = c->op->backward};
    if (!c->span.stream) {
        (c->op->backward ? k->backward_apply_rows : k->normalize_rows)(&c->span, &c->coef, c->rule);
    }
    for (int64_t i = 1; c->span.stream && turn.place.image < turn.span.images; i = i * 5 % 37) {
        turn.owed = 16 * i;
        k->apply_some(&turn);
    }
}
RUN(backward_reduce_rows, &c->span, &c->coef, c->rule, &c->blocks, c->first, c->last, c->channels, c->mean,
    c->tile.data, c->stats[0], c->stats[1])
RUN(backward_reduce_cols, &c->span, &c->coef, c->rule, c->mean, c->tile.data, c->stats[0], c->stats[1])
RUN(backward_apply_rows, &c->span, &c->coef, c->rule)
RUN(backward_apply_cols, &c->span, &c->coef, c->rule)
static void run_coefs(const fbn_kernels *k, const call *c)
{
    int uniform = 2;
    const fbn_backward_sums *sums = c->sums.sum_dy == NULL ? NULL : &c->sums;
    k->coefs(&c->affine, c->in_place, sums, c->first, c->last, c->span.y, c->span.y_stride, &uniform);
    *c->stats[0] = uniform;
}
RUN(copy, c->span.x, c->span.y, c->span.width *(int64_t)size_of((int)c->dtype))
RUN(fence)

#define IS_moments_rows true, MOMENTS, false
#define IS_moments_cols false, MOMENTS, false
#define IS_normalize_rows true, APPLIES, false
#define IS_apply_some true, APPLIES, false
#define IS_normalize_cols false, APPLIES, false
#define IS_backward_reduce_rows true, SUMS, true
#define IS_backward_reduce_cols false, SUMS, true
#define IS_backward_apply_rows true, APPLIES, true
#define IS_backward_apply_cols false, APPLIES, true
#define IS_coefs false, COEFS, false
#define IS_copy true, COPIES, false
#define IS_fence true, NOTHING, false

#define OPERATION(op, args) {#op, run_##op, IS_##op},
static const operation operations[] = {
    FBN_OPS(OPERATION){"apply_some of a backward", run_apply_some, true, APPLIES, true}};
enum { OPERATION_COUNT = sizeof operations / sizeof *operations };

#define DTYPE_NAME(name, index) [index] = #name,
static const char *const dtype_names[] = {FBN_DTYPES_EACH(DTYPE_NAME)};
static const char *const activation_names[] = {"identity", "relu", "relu6", "leaky_relu"};

/* Arenas: each buffer of a call has one of its own. */
typedef struct {
    arena x, other, gate, coefs[7], means, tile, y, extra, stats[3], slab, beside;
} memory;

static memory the_memory;

static void output_add(call *c, matrix m, bool has_content)
{
    output_watch(&c->outputs[c->output_count++], m, has_content);
}

static int64_t draw_stride(const call *c, int64_t width, bool may_repeat, rng *r)
{
    if (c->touching) {
        return width;
    }
    int64_t stride = width + (rng_one_in(r, 2) ? 0 : rng_below(r, 20));
    return may_repeat && rng_one_in(r, 10) ? 0 : rng_one_in(r, 6) ? -stride : stride;
}

/* How many rows, or planes: few; now and then enough for several blocks. */
static int64_t draw_rows(const call *c, int64_t width, rng *r)
{
    const operation *op = c->op;
    if (op->rows && op->shape == APPLIES) {
        return rng_between(r, 1, width > 1000 ? 2 : c->touching ? 12 : 5);
    }
    if (!rng_one_in(r, 12) || width > 200) {
        return rng_between(r, op->rows ? 1 : 0, width > 20000 || (width > 1000 && !rng_one_in(r, 4)) ? 3 : 12);
    }
    return rng_between(r, 1, op->rows ? 2 + 2 * FBN_BLOCK / (width + 1) : 2 * FBN_BLOCK_ROWS + 9);
}

static int coef_type(const call *c) { return c->dtype == FBN_F64 ? FBN_F64 : FBN_F32; }

static const void **coef_at(fbn_coef *k, int i)
{
    const void **all[] = {&k->unit, &k->neg_mean, &k->scale, &k->shift, &k->slope, &k->gain, &k->offset};
    return all[i];
}

static void draw_coefs(call *c, rng *r)
{
    int type = coef_type(c);
    int64_t width = c->op->rows ? c->channels : c->span.width + FBN_COEF_PAD;
    numbers kind = c->kind == SPECIAL || c->kind == HUGE_NUMBERS || c->kind == TINY ? c->kind : PLAIN;
    for (int i = 0; i < 7; i++) {
        matrix *m = &c->coefs[i];
        *m = matrix_make(&the_memory.coefs[i], type, 1, width, width, c->where, r);
        if (i == 0) {
            for (int64_t k = 0; k < width; k++) {
                put(type, m->low + (size_t)k * size_of(type), rng_one_in(r, 2) ? 1.0 : 0x1p-100);
            }
        } else {
            matrix_fill(m, rng_one_in(r, 2) ? PLAIN : kind, r);
        }
        *coef_at(&c->coef, i) = m->data;
    }
    if (rng_one_in(r, 2)) {
        c->coef.unit = NULL;
    }
}

/* A backward by turns has neither a gate nor an extra result. */
static bool is_simple(const operation *op) { return op->run == run_apply_some && op->backward; }

static void draw_gate(call *c, int64_t rows, rng *r)
{
    c->span.gate_next = fbn_ceil_div(c->span.width, 16);
    int64_t words = c->span.gate_next * (c->op->rows ? c->channels : 1);
    c->gate = matrix_make(&the_memory.gate, BITS, rows, words, words + rng_below(r, 3), c->where, r);
    c->span.gate = (uint16_t *)(void *)c->gate.data;
    c->span.gate_stride = c->gate.stride;
    if (c->op->backward) {
        matrix_fill(&c->gate, RAW, r);
    } else {
        output_add(c, c->gate, false);
    }
}

static void draw_apply_outputs(call *c, int64_t rows, rng *r)
{
    bool whole = rows <= 1 || c->x.stride != 0;
    c->in_place = rng_one_in(r, 2) ? 0 : (int)rng_below(r, 4);
    bool over_x = c->in_place % 2 == 1 && whole;
    bool over_other = c->in_place / 2 == 1 && c->span.other != NULL && (rows <= 1 || c->other.stride != 0);
    matrix y = c->x;
    if (over_x) {
        output_add(c, c->x, true);
    } else if (over_other && !c->op->backward) {
        y = c->other;
        output_add(c, c->other, true);
    } else {
        y = matrix_make(&the_memory.y, (int)c->dtype, rows, c->span.width, draw_stride(c, c->span.width, false, r),
                        c->where, r);
        output_add(c, y, false);
    }
    c->span.y = y.data;
    c->span.y_stride = y.stride;
    if (!c->op->backward || is_simple(c->op) || rng_one_in(r, 2)) {
        c->in_place = over_x ? 1 : over_other && !c->op->backward ? 2 : 0;
        return;
    }
    matrix extra = c->other;
    if (over_other) {
        output_add(c, c->other, true);
    } else {
        extra = matrix_make(&the_memory.extra, (int)c->dtype, rows, c->span.width,
                            draw_stride(c, c->span.width, false, r), c->where, r);
        output_add(c, extra, false);
    }
    c->in_place = over_x + 2 * over_other;
    c->span.extra = extra.data;
    c->span.extra_stride = extra.stride;
}

static void draw_copy(call *c, int64_t width, rng *r)
{
    enum { LINE = 64 };
    int64_t lines = width; /* the width counts lines here: bytes are a multiple of 64 */
    place where = c->where == INSIDE ? AT_BEGIN : c->where;
    c->span.width = lines * LINE / (int64_t)size_of((int)c->dtype);
    c->x = matrix_make(&the_memory.x, (int)c->dtype, 1, c->span.width, c->span.width, where, r);
    c->kind = RAW; /* bytes, whatever numbers they are: */
    matrix_fill(&c->x, PAYLOADS, r);
    matrix y = matrix_make(&the_memory.y, (int)c->dtype, 1, c->span.width, c->span.width, where, r);
    c->span.x = c->x.data;
    c->span.y = y.data;
    output_add(c, y, false);
}

/* From some channel on, the first four arrays or all seven. */
static void draw_coefs_call(call *c, int64_t channels, rng *r)
{
    const double *given[7];
    for (int i = 0; i < 7; i++) {
        c->coefs[i] = matrix_make(&the_memory.coefs[i], FBN_F64, 1, channels, 0, c->where, r);
        matrix_fill(&c->coefs[i], rng_one_in(r, 2) ? PLAIN : c->kind, r);
        given[i] = i > 1 && i < 5 && rng_one_in(r, 4) ? NULL : (const double *)(const void *)c->coefs[i].data;
    }
    for (char *p = c->coefs[1].low; p < c->coefs[1].high; p += sizeof(double)) {
        p[7] &= 0x7f; /* a variance is not negative */
    }
    c->affine = (fbn_affine){given[0], given[2], given[1], given[3], given[4], rng_one_in(r, 4) ? 0.0 : 1e-5};
    c->sums = (fbn_backward_sums){given[5], given[6], rng_one_in(r, 4) ? 0.0 : (double)rng_between(r, 1, 1000), NULL};
    if (rng_one_in(r, 2)) {
        c->sums.sum_dy = NULL;
    } else if (!rng_one_in(r, 4)) {
        matrix gradient = matrix_make(&the_memory.stats[1], FBN_F64, 1, channels, 0, c->where, r);
        const bool over = rng_one_in(r, 2);
        if (over) {
            matrix_fill(&gradient, c->kind, r);
            c->sums.sum_dy_xmu = (const double *)(const void *)gradient.data;
        }
        c->sums.grad_weight = (double *)(void *)gradient.data;
        output_add(c, gradient, over);
    }
    c->last = channels;
    c->first = channels == 0 || rng_one_in(r, 2) ? 0 : rng_below(r, channels);
    c->in_place = (int)rng_below(r, 2); /* the statistics' place: the tensor itself, or not */
    int type = coef_type(c);
    matrix out = matrix_make(&the_memory.y, type, c->sums.sum_dy == NULL ? 4 : 7, channels, channels + rng_below(r, 50),
                             c->where, r);
    c->span = (fbn_span){.y = out.data, .y_stride = out.stride, .width = channels};
    output_add(c, out, false);
    matrix uniform = matrix_make(&the_memory.stats[0], FBN_F64, 1, 1, 0, c->where, r);
    c->stats[0] = (double *)(void *)uniform.data;
    output_add(c, uniform, false);
}

enum { TIERS = 5 };
static const tier *tiers[TIERS]; /* the scalar one first */
static int tier_count;

static void *moved(const void *p, int64_t elements, int type)
{
    return p == NULL ? NULL : (char *)(uintptr_t)p + elements * (int64_t)size_of(type);
}

/* The slab that is applied while a call makes sums. */
enum {
    SLAB_ROWS = 4,
    SLAB_WIDTH = 300,
    SLAB_GAP = 64,
    SLAB_SIZE = SLAB_ROWS * SLAB_ROWS * (SLAB_WIDTH + SLAB_GAP) * 8
};
static struct {
    _Alignas(64) char y[SLAB_SIZE], expected[SLAB_SIZE];
    uint16_t gate[SLAB_ROWS * SLAB_ROWS * (SLAB_WIDTH / 16 + 1)],
        expected_gate[SLAB_ROWS * SLAB_ROWS * (SLAB_WIDTH / 16 + 1)];
    _Alignas(64) double coefs[7][SLAB_ROWS];
    fbn_turn turn;
    bool late; /* less was applied beside a call than it summed */
} slab;

static void slab_reset(void)
{
    memset(slab.y, 0xa5, sizeof slab.y);
    memset(slab.gate, 0xa5, sizeof slab.gate);
}

/* Its result by whole rows of the scalar tier, which other tests have looked at. */
static void draw_slab(const call *c, rng *r)
{
    fbn_turn *t = &slab.turn;
    const int64_t size = (int64_t)size_of((int)c->dtype);
    /* Half of them as simple as what is beside a sum: four rows that touch are whole vectors, or each is. */
    const bool simple = rng_one_in(r, 2);
    const int64_t width = simple             ? 4 * rng_between(r, 16, SLAB_WIDTH / 4)
                          : rng_one_in(r, 2) ? rng_between(r, 1, SLAB_WIDTH)
                                             : 16 * rng_between(r, 4, SLAB_WIDTH / 16);
    const int64_t rows = simple ? 4 : rng_between(r, 1, SLAB_ROWS);
    const int64_t line = FBN_LINE / size;
    const int64_t x_stride = width + (!simple && rng_one_in(r, 4) ? rng_between(r, 1, 20) : 0);
    const int64_t y_stride = width + (!simple && rng_one_in(r, 4) ? line - width % line : 0);
    const int64_t y_image = y_stride * rows;
    *t = (fbn_turn){
        .span = {.y = slab.y + (rng_one_in(r, 2) ? rng_below(r, 16) * size : 0),
                 .x_stride = x_stride,
                 .y_stride = y_stride,
                 .rows = rows,
                 .width = width,
                 .images = rng_between(r, 1, SLAB_ROWS),
                 .x_image = x_stride * rows + (rng_one_in(r, 2) ? 16 : 0),
                 .y_image = simple || rng_one_in(r, 2) ? (y_image + line - 1) / line * line : y_image,
                 .ahead = rng_between(r, -100000, 100000),
                 .stream = 1},
        .rule = {(int)rng_below(r, FBN_ACTIVATION_COUNT), 6.0, 0.25},
        .each = 16 * rng_between(r, 1, 20),
        .backward = c->op->backward ? !rng_one_in(r, 4) : rng_one_in(r, 4),
        .beside = simple || rng_one_in(r, 2),
    };
    const int64_t reach = (t->span.images - 1) * t->span.x_image + (rows - 1) * x_stride + width;
    char *x = arena_place(&the_memory.slab, (size_t)(reach * size), (size_t)size, c->where, r);
    for (int64_t i = 0; i < reach; i++) {
        put((int)c->dtype, x + i * size, (double)(i * 37 % 101 - 50) / 16.0);
    }
    t->span.x = x;
    if (t->backward && !rng_one_in(r, 4)) {
        t->rule.kind = c->rule.kind; /* what may be beside a backward's sums */
    }
    if (t->backward || rng_one_in(r, 2)) {
        const int64_t gap = rng_one_in(r, 2) ? 0 : rng_between(r, 1, 20);
        const int64_t stride = width + (simple ? 0 : gap);
        const int64_t image = stride * rows + gap;
        const int64_t long_way = (t->span.images - 1) * image + (rows - 1) * stride + width;
        char *other = arena_place(&the_memory.beside, (size_t)(long_way * size), (size_t)size, c->where, r);
        for (int64_t i = 0; i < long_way; i++) {
            put((int)c->dtype, other + i * size, (double)(i * 53 % 97 - 40) / 16.0);
        }
        t->span.other = other;
        t->span.other_stride = stride;
        t->span.other_image = image;
        t->span.other_ahead = rng_between(r, -100000, 100000);
    }
    if (!t->backward && t->span.other != NULL && t->rule.kind != FBN_IDENTITY && rng_one_in(r, 2)) {
        t->span.gate = slab.gate;
        t->span.gate_stride = fbn_ceil_div(width, 16);
        t->span.gate_image = rows * t->span.gate_stride;
    }
    for (int k = 1; k < 7; k++) {
        *coef_at(&t->k, k) = slab.coefs[k];
        for (int64_t i = 0; i < SLAB_ROWS; i++) {
            char *coef = (char *)slab.coefs[k] + (size_t)i * size_of(coef_type(c));
            put(coef_type(c), coef, (double)(i * 5 + k * 7 - 15) / 16.0);
        }
    }
    slab_reset();
    for (int64_t image = 0; image < t->span.images; image++) {
        fbn_span s = t->span;
        s.x = moved(s.x, image * s.x_image, (int)c->dtype);
        s.y = moved(s.y, image * s.y_image, (int)c->dtype);
        s.other = moved(s.other, image * s.other_image, (int)c->dtype);
        s.gate = moved(s.gate, image * s.gate_image, BITS);
        s.images = 1;
        s.stream = 0;
        const fbn_kernels *scalar = &tiers[0]->kernels->of[c->dtype];
        (t->backward ? scalar->backward_apply_rows : scalar->normalize_rows)(&s, &t->k, t->rule);
    }
    memcpy(slab.expected, slab.y, sizeof slab.y);
    memcpy(slab.expected_gate, slab.gate, sizeof slab.gate);
}

/* So many rows and images on, in every tensor. */
static void move_rows(fbn_span *s, int type, int64_t rows, int64_t images)
{
    s->x = moved(s->x, rows * s->x_stride + images * s->x_image, type);
    s->other = moved(s->other, rows * s->other_stride + images * s->other_image, type);
    s->y = moved(s->y, rows * s->y_stride + images * s->y_image, type);
    s->extra = moved(s->extra, rows * s->extra_stride + images * s->extra_image, type);
    s->gate = moved(s->gate, rows * s->gate_stride + images * s->gate_image, BITS);
}

static void draw_call(call *c, const operation *op, fbn_dtype dtype, int64_t width, place where, rng *r)
{
    int type = (int)dtype;
    c->op = op;
    c->dtype = dtype;
    c->where = where;
    c->kind = (numbers)rng_below(r, NUMBERS);
    c->output_count = 0;
    c->in_place = 0;
    c->span = (fbn_span){0};
    c->blocks = (fbn_blocks){0};
    c->first = c->last = 0;
    c->turns = false;
    c->rule = (fbn_gate_rule){(int)rng_below(r, FBN_ACTIVATION_COUNT), 6.0, rng_one_in(r, 4) ? rng_unit(r) : 0.01};
    if (op->shape == NOTHING) {
        return;
    }
    if (op->shape == COEFS) {
        draw_coefs_call(c, width, r);
        return;
    }
    if (op->shape == COPIES) {
        draw_copy(c, width, r);
        return;
    }
    bool blocks = op->rows && op->shape != APPLIES;
    width = blocks && width == 0 ? 1 : width; /* an empty channel has no blocks */
    c->channels = !op->rows ? width : blocks ? rng_between(r, 1, 6) : 1;
    int64_t inner = width;
    int64_t x_next = inner + (blocks && rng_one_in(r, 4) ? rng_between(r, 1, 20) : 0);
    int64_t other_next = inner + (blocks && rng_one_in(r, 4) ? rng_between(r, 1, 20) : 0);
    int64_t other_width = blocks ? (c->channels - 1) * other_next + inner : width;
    width = blocks ? (c->channels - 1) * x_next + inner : width;
    c->touching = op->shape == APPLIES && rng_one_in(r, 2);
    int64_t rows = draw_rows(c, width, r);
    const int64_t images = op->rows && op->shape == APPLIES ? rng_between(r, 1, 3) : 1;
    c->channels = op->rows && op->shape == APPLIES ? rows : c->channels;
    rows *= images; /* one under the other */
    c->x = matrix_make(&the_memory.x, type, rows, width, draw_stride(c, width, true, r), where, r);
    matrix_fill(&c->x, c->kind, r);
    c->span = (fbn_span){
        .x = c->x.data,
        .x_stride = c->x.stride,
        .rows = rows / images,
        .width = inner,
        .images = images,
        .x_next = x_next,
        .other_next = other_next,
        .ahead = rng_one_in(r, 2) ? 0 : rng_between(r, -100000, 100000),
        .other_ahead = rng_one_in(r, 2) ? 0 : rng_between(r, -100000, 100000),
        .stream = op->shape == APPLIES && rng_one_in(r, 2),
    };
    if (blocks) {
        c->blocks = fbn_blocks_rows(rows, inner);
        c->first = rng_one_in(r, 2) ? 0 : rng_below(r, c->blocks.count);
        c->last = rng_one_in(r, 2) ? c->blocks.count : rng_between(r, c->first, c->blocks.count);
        c->turns = rng_one_in(r, 2);
    }
    if (c->turns) {
        draw_slab(c, r);
    }
    if (op->backward || (op->shape == APPLIES && rng_one_in(r, 2))) {
        c->other =
            matrix_make(&the_memory.other, type, rows, other_width, draw_stride(c, other_width, true, r), where, r);
        matrix_fill(&c->other, rng_one_in(r, 2) ? PLAIN : c->kind, r);
        c->span.other = c->other.data;
        c->span.other_stride = c->other.stride;
    }
    if (op->shape != MOMENTS) {
        draw_coefs(c, r);
        if (rng_one_in(r, 2) && !is_simple(op)) {
            draw_gate(c, rows, r);
        }
    }
    if (op->shape == APPLIES) {
        draw_apply_outputs(c, rows, r);
        const int64_t step = rng_one_in(r, 2) ? -1 : 1; /* from the last image to the first */
        const int64_t before = step < 0 ? rows - c->span.rows : 0;
        fbn_span *s = &c->span;
        move_rows(s, type, before, 0);
        s->x_image = step * s->rows * s->x_stride;
        s->other_image = step * s->rows * s->other_stride;
        s->y_image = step * s->rows * s->y_stride;
        s->extra_image = step * s->rows * s->extra_stride;
        s->gate_image = step * s->rows * s->gate_stride;
        return;
    }
    if (op->shape == SUMS) {
        c->means = matrix_make(&the_memory.means, FBN_F64, 1, c->channels, 0, where, r);
        matrix_fill(&c->means, rng_one_in(r, 4) ? SPECIAL : PLAIN, r);
        c->mean = (const double *)(const void *)c->means.data;
    }
    int64_t tile = op->rows ? fbn_lines_bytes(c->channels, inner, dtype == FBN_F64) : fbn_columns_bytes(c->channels);
    c->tile = matrix_make(&the_memory.tile, FBN_F64, 1, tile / (int64_t)sizeof(double), 0, where, r);
    for (int i = 0; i < (op->shape == MOMENTS ? 3 : 2); i++) {
        matrix m = matrix_make(&the_memory.stats[i], FBN_F64, 1, c->channels, 0, where, r);
        c->stats[i] = (double *)(void *)m.data;
        output_add(c, m, false);
    }
}

static void describe(const call *c, char *text, size_t size)
{
    static const char *const places[] = {"begin", "end", "inside"};
    static const char *const aliases[] = {"", ", over x", ", over other", ", over both"};
    const fbn_span *s = &c->span;
    snprintf(text, size,
             "%s %s, %lld x %lld x %lld, %lld channels, strides %lld %lld %lld %lld, at %s, %s, %s%s%s%s%s%s, blocks "
             "%lld to "
             "%lld of %lld",
             c->op->name, dtype_names[c->dtype], (long long)s->images, (long long)s->rows, (long long)s->width,
             (long long)c->channels, (long long)s->x_stride, (long long)s->other_stride, (long long)s->y_stride,
             (long long)s->extra_stride, places[c->where], number_names[c->kind], activation_names[c->rule.kind],
             s->gate == NULL ? "" : ", gate", s->other == NULL ? "" : ", other", s->extra == NULL ? "" : ", extra",
             s->stream ? ", streaming" : "", aliases[c->in_place], (long long)c->first, (long long)c->last,
             (long long)c->blocks.count);
}

/* ---- the comparison ---- */

static void seal_inputs(const call *c, bool sealed)
{
    const arena *inputs[] = {&the_memory.x, &the_memory.other, &the_memory.gate, &the_memory.means};
    for (size_t i = 0; i < sizeof inputs / sizeof *inputs; i++) {
        bool written = false;
        for (int o = 0; o < c->output_count; o++) {
            written = written || c->outputs[o].m.home == inputs[i];
        }
        if (!written) {
            arena_seal(inputs[i], sealed);
        }
    }
    for (int i = 0; i < 7; i++) {
        arena_seal(&the_memory.coefs[i], sealed);
    }
}

/* Blocks of whole channels: as much as is summed, but for a step, and for short planes that fill no whole step. */
static bool is_late(const call *c)
{
    const fbn_span *s = &c->span;
    const fbn_turn *t = &slab.turn;
    const bool all = c->first == 0 && c->last == c->blocks.count;
    const int64_t done = turn_done(t);
    const int64_t left = t->span.images * t->span.rows * t->span.width - done;
    const bool unpaid = t->owed >= fbn_max(t->each, 64) || done + t->owed < s->rows * s->width * c->channels;
    return all && !fbn_short(s->width) && left > 128 && unpaid;
}

static void finish_slab(const call *c, const fbn_kernels *k)
{
    slab.late = is_late(c);
    slab.turn.owed = INT64_MAX;
    k->apply_some(&slab.turn);
}

/* Of what is applied a row, and not past the cache; of what is summed a channel, or of columns a word of the gate. */
static call part_of(const call *c, int64_t i)
{
    call part = *c;
    fbn_span *s = &part.span;
    const bool applies = c->op->shape == APPLIES;
    const bool rows = c->op->rows;
    const int type = (int)c->dtype;
    const int64_t channel = rows ? (applies ? i % s->rows : i) : applies ? 0 : 16 * i;
    if (applies) {
        move_rows(s, type, i % s->rows, i / s->rows);
    } else {
        s->x = moved(s->x, i * (rows ? s->x_next : 16), type);
        s->other = moved(s->other, i * (rows ? s->other_next : 16), type);
        s->gate = moved(s->gate, i * (rows ? s->gate_next : 1), BITS);
    }
    for (int k = 0; k < 7; k++) {
        *coef_at(&part.coef, k) = moved(*coef_at(&part.coef, k), channel, coef_type(c));
    }
    if (applies) {
        s->rows = s->images = 1;
        s->stream = 0;
        return part;
    }
    part.channels = rows ? 1 : fbn_min(16, c->channels - channel);
    s->width = rows ? s->width : part.channels;
    part.mean = moved(part.mean, channel, FBN_F64);
    for (int k = 0; k < 3; k++) {
        part.stats[k] = moved(part.stats[k], channel, FBN_F64);
    }
    return part;
}

static void run_parts(const fbn_kernels *k, const call *c)
{
    const operation *op = c->op;
    if (op->shape > APPLIES) {
        op->run(k, c);
        return;
    }
    const int64_t parts = op->shape == APPLIES ? c->span.images * c->span.rows
                          : op->rows           ? c->channels
                                               : fbn_ceil_div(c->channels, 16);
    for (int64_t i = 0; i < parts; i++) {
        const call part = part_of(c, i);
        op->run(k, &part);
    }
}

static bool run(call *c, const tier *t, void (*how)(const fbn_kernels *, const call *), bool turns)
{
    fbn_kernels kernels = t->kernels->of[c->dtype];
    c->span.turn = turns ? &slab.turn : NULL;
    slab.turn.place = (fbn_place){0};
    slab.turn.owed = 0;
    if (turns) {
        slab_reset();
    }
    for (int i = 0; i < c->output_count; i++) {
        output_reset(&c->outputs[i]);
    }
    const bool ran = CHECK_RUNS(how(&kernels, c)) && (!turns || CHECK_RUNS(finish_slab(c, &kernels)));
    c->span.turn = NULL;
    return ran;
}

static void compare_tiers(call *c)
{
    char text[512];
    /* Products of two NaNs are the compiler's choice, too. */
    const bool nans_alike = c->kind == PAYLOADS || c->op->shape == COEFS;
    describe(c, text, sizeof text);
    if (!check(run(c, tiers[0], run_parts, false), "%s: in parts, scalar touches memory out of bounds", text)) {
        return;
    }
    for (int i = 0; i < c->output_count; i++) {
        output *o = &c->outputs[i];
        check(output_surroundings_kept(o), "%s: in parts, scalar writes outside output %d", text, i);
        memcpy(o->reference, o->begin, (size_t)(o->end - o->begin));
        if (nans_alike) {
            make_nans_alike(o, o->reference);
        }
    }
    if (c->op->shape == COPIES) {
        check(memcmp(c->span.x, c->span.y, (size_t)c->span.width * size_of((int)c->dtype)) == 0,
              "%s: scalar copies wrongly", text);
    }
    for (int t = 0; t < tier_count; t++) {
        const char *name = tiers[t]->kernels->name;
        if (!fbn_has_kernels(tiers[t]->kernels, c->dtype)) {
            continue;
        }
        if (!check(run(c, tiers[t], c->op->run, c->turns), "%s: %s touches memory out of bounds", text, name)) {
            continue;
        }
        check(!c->turns || !slab.late, "%s: %s applies less than it sums", text, name);
        check(!c->turns || memcmp(slab.y, slab.expected, sizeof slab.y) == 0, "%s: %s applies wrongly meanwhile", text,
              name);
        check(!c->turns || memcmp(slab.gate, slab.expected_gate, sizeof slab.gate) == 0,
              "%s: %s writes another gate meanwhile", text, name);
        for (int i = 0; i < c->output_count; i++) {
            const output *o = &c->outputs[i];
            int64_t at = output_difference(o, nans_alike);
            check(at < 0, "%s: %s differs in output %d, element %lld of those watched, which begin %lld before row 0",
                  text, name, i, (long long)at, (long long)((o->m.data - o->begin) / (ptrdiff_t)size_of(o->m.type)));
        }
    }
}

static void check_call(call *c)
{
    seal_inputs(c, true);
    compare_tiers(c);
    seal_inputs(c, false);
}

static int64_t draw_width(rng *r)
{
    if (rng_one_in(r, 2)) {
        return rng_between(r, 0, 600);
    }
    int64_t power = (int64_t)1 << rng_between(r, 4, 13);
    return rng_between(r, 1, 3) * power + rng_between(r, -1, 1);
}

static void check_kernels(uint64_t seed, int thoroughness)
{
    enum { TAILS = 130 };
    static call c;
    rng r = {seed};
    for (int i = 0; i < OUTPUTS; i++) {
        c.outputs[i].before = malloc(ARENA_BYTES);
        c.outputs[i].reference = malloc(ARENA_BYTES);
        c.outputs[i].work = malloc(ARENA_BYTES);
    }
    for (int op = 0; op < OPERATION_COUNT; op++) {
        for (int dtype = 0; dtype < FBN_DTYPE_COUNT; dtype++) {
            for (int64_t width = 0; width < TAILS; width++) {
                for (int where = 0; where < PLACES; where++) {
                    for (int draws = 0; draws < thoroughness; draws++) {
                        draw_call(&c, &operations[op], (fbn_dtype)dtype, width, (place)where, &r);
                        check_call(&c);
                    }
                }
            }
            for (int i = 0; i < thoroughness * TAILS; i++) {
                draw_call(&c, &operations[op], (fbn_dtype)dtype, draw_width(&r), (place)rng_below(&r, PLACES), &r);
                check_call(&c);
            }
        }
    }
}

static void make_memory(void)
{
    memory *m = &the_memory;
    arena *all[] = {&m->x,     &m->other,    &m->gate,     &m->means,    &m->tile, &m->y,
                    &m->extra, &m->stats[0], &m->stats[1], &m->stats[2], &m->slab, &m->beside};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
        *all[i] = arena_make(ARENA_BYTES);
    }
    for (int i = 0; i < 7; i++) {
        m->coefs[i] = arena_make(ARENA_BYTES / 4);
    }
}

static bool is_runnable(const char *name)
{
    const fbn_tier *t;
    for (int i = 0; (t = fbn_tier_at(i)) != NULL; i++) {
        if (strcmp(t->name, name) == 0) {
            return t->runnable;
        }
    }
    return false;
}

static void add_tier(const tier *t, bool emulated)
{
    const char *name = t->kernels->name;
    if (emulated || is_runnable(name)) {
        printf("tier %s%s\n", name, emulated ? " (emulated)" : "");
        tiers[tier_count++] = t;
    } else {
        printf("SKIPPED: tier %s, which this CPU cannot run\n", name);
    }
}

/* A tier of one dtype leaves the others to the next, and its own, too, where a caller takes subnormals for zeros. */
static void check_serving(void)
{
#if defined(FBN_HAVE_AVX512_BF16) && defined(FBN_HAVE_AVX512)
    const fbn_isa *tier = &fbn_isa_avx512_bf16;
    const fbn_isa *next = &fbn_isa_avx512;
    if (is_runnable(tier->name)) {
        const unsigned mode = _mm_getcsr();
        check(fbn_kernels_for(FBN_BF16) == &tier->of[FBN_BF16], "bf16 is not by %s", tier->name);
        check(fbn_kernels_for(FBN_F32) == &next->of[FBN_F32], "f32 is not by %s", next->name);
        _mm_setcsr(mode | 0x40);
        const fbn_kernels *flushing = fbn_kernels_for(FBN_BF16);
        _mm_setcsr(mode);
        check(flushing == &next->of[FBN_BF16], "bf16 is not by %s where subnormals are zeros", next->name);
    }
#endif
}

#ifdef EMULATED
enum { IS_EMULATED = true };
#else
enum { IS_EMULATED = false };
#endif

int main(int argc, char **argv)
{
    uint64_t seed = check_seed(argc, argv);
    int thoroughness = argc > 2 ? atoi(argv[2]) : 4;
    fbn_dispatch(NULL);
    add_tier(&tier_scalar, false);
#ifdef FBN_HAVE_AVX2
    add_tier(&tier_avx2, false);
#endif
#ifdef FBN_HAVE_AVX512
    add_tier(&tier_avx512, IS_EMULATED);
#endif
#ifdef FBN_HAVE_AVX512_BF16
    add_tier(&tier_avx512_bf16, false);
#endif
#ifdef FBN_HAVE_NEON
    add_tier(&tier_neon, false);
#endif
    check(tier_count > 1, "there is no tier to compare with the scalar one");
    make_memory();
    check_catch_faults();
    check_serving();
    check_halves(tiers, tier_count, seed, thoroughness);
    check_kernels(seed, thoroughness);
    check_turns();
    return check_report();
}
