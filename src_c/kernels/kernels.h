/* kernels.h -- the registry: every operation, every dtype, and the table that each ISA exports.
 *
 * To add an operation: a line in FBN_OPS and its body in a template of this folder. To add a dtype: a line in
 * FBN_DTYPES_EACH and a section in template.inc. To add an ISA: a header in simd/, a file in isa/, a line in
 * dispatch.c.
 */
#ifndef FASTBN_KERNELS_H
#define FASTBN_KERNELS_H

#include "channel.h"
#include "fastbn.h"

/* What an apply step multiplies by and adds, in the dtype of the arithmetic: arrays over channels in the cols family
 * (readable for FBN_COEF_PAD elements past the last channel), over rows in the rows family.
 *
 *   d  = x * unit - mean          unit NULL is 1; see fbn_affine_of for when it is not
 *   z  = d * scale + shift        before the activation
 *   dx = (dz + d * slope) * gain + offset
 */
enum { FBN_COEF_PAD = 32 };

typedef struct {
    const void *unit, *neg_mean, *scale, *shift, *slope, *gain, *offset;
} fbn_coef;

/* The order of the seven arrays where they lie in one block of memory. The first four are all that a forward needs. */
enum { FBN_UNIT, FBN_NEG_MEAN, FBN_SCALE, FBN_SHIFT, FBN_SLOPE, FBN_GAIN, FBN_OFFSET, FBN_COEF_COUNT };

/* The sums of a backward, where there are some; and where the gradient of the weight, which follows from them, goes: it
 * may be written over them, and may be NULL. */
typedef struct {
    const double *sum_dy, *sum_dy_xmu;
    double count;
    double *grad_weight;
} fbn_backward_sums;

/* An activation passes z in (0, upper), is constant above, and multiplies by `negative` below. */
typedef struct {
    int kind; /* fbn_activation */
    double upper, negative;
} fbn_gate_rule;

/* What a step reads and writes. Strides in elements; those of the gate in 16-bit words. */
typedef struct {
    const void *x, *other; /* other: the residual of normalize, dy of backward_apply */
    void *y, *extra;       /* extra: the dresidual of backward_apply */
    uint16_t *gate;        /* a bit an element: set where the gradient passes unscaled */
    int64_t x_stride, other_stride, y_stride, extra_stride, gate_stride;
    int64_t rows, width; /* rows of `width` elements: rows, applied to, planes of one channel each */
    /* rows, applied to: the same of so many images, with strides from one to the next */
    int64_t images, x_image, other_image, y_image, extra_image, gate_image;
    int64_t x_next, other_next, gate_next; /* rows, sums: from a channel to its neighbour */
    int64_t ahead;                         /* bytes to what is wanted in cache next; 0 for nothing */
    int64_t other_ahead;
    int stream;            /* write y past the cache */
    struct fbn_turn *turn; /* rows, sums: what is applied in between, or NULL */
} fbn_span;

/* How far a slab is applied: begins as zeros, and ends with image == images. `at` counts from where a run begins
 * (rows that touch are one). */
typedef struct {
    int64_t image, row, at;
} fbn_place;

/* A slab that is applied and streamed while the sums of another are made. */
typedef struct fbn_turn {
    fbn_span span;
    fbn_coef k;
    fbn_gate_rule rule;
    int64_t each; /* elements of a turn */
    int64_t owed; /* so many are to be applied by now */
    int backward; /* by a backward that has neither a gate nor an extra result */
    int beside;   /* not by turns but side by side, where a tier can and the slab is simple enough */
    fbn_place place;
} fbn_turn;

/* n <= 16 bits of a gate from bit `at` on; what comes after them may be anything. */
static inline unsigned fbn_gate_bits(const uint16_t *gate, int64_t at, int n)
{
    int past = (int)(at % 16);
    unsigned bits = (unsigned)gate[at / 16] >> past;
    return past + n > 16 ? bits | (unsigned)gate[at / 16 + 1] << (16 - past) : bits;
}

/* Arrays that vectors are loaded from begin with a cache line, and their memory has a line to spare for that. */
static inline void *fbn_to_line(void *p) { return (char *)p + (FBN_LINE - (uintptr_t)p % FBN_LINE) % FBN_LINE; }

/* So many bytes from p, in which nothing need lie: a prefetch of nowhere does nothing. */
static inline const void *fbn_ahead(const void *p, int64_t bytes)
{
    return (const void *)((uintptr_t)p + (uintptr_t)bytes);
}

/* `tile`: memory, aligned for any type, that a kernel of sums works in: fbn_columns_bytes(width) of it, or
 * fbn_lines_bytes(channels, elements of a plane, whether the arithmetic is float64) in the rows family. An odd step
 * keeps the arrays in it from lying a power of two apart, where loads wait for stores that they have nothing to do
 * with. */
static inline int64_t fbn_tile_step(int64_t columns) { return (columns + 15) / 16 * 16 + 16; }
static inline int64_t fbn_columns_bytes(int64_t columns)
{
    return fbn_tile_step(columns) * 7 * (int64_t)sizeof(double) + FBN_LINE;
}
#define FBN_PAIR_DOUBLES(wide) (((wide) ? 4 : 2) * 16) /* two sums in 16 lanes, and what float64 rounds away */
static inline int64_t fbn_lines_bytes(int64_t channels, int64_t inner, bool wide)
{
    int64_t places = fbn_short(inner) ? fbn_tile_step(channels * inner) * 7 : 0;
    int64_t size = (int64_t)(wide ? sizeof(double) : sizeof(float));
    return channels * (FBN_PAIR_DOUBLES(wide) + 3) * (int64_t)sizeof(double) + places * size + 2 * FBN_LINE;
}

#define FBN_OPS(OP)                                                                                                    \
    /* Moments of blocks [first, last) of `channels` neighbours: planes of `width` elements. */                        \
    OP(moments_rows, (const fbn_span *s, const fbn_blocks *blocks, int64_t first, int64_t last, int64_t channels,      \
                      void *tile, double *mean, double *lo, double *m2))                                               \
    /* Moments of `width` channels. */                                                                                 \
    OP(moments_cols, (const fbn_span *s, void *tile, double *mean, double *lo, double *m2))                            \
    /* y = act((x - mean) * scale + shift + residual) */                                                               \
    OP(normalize_rows, (const fbn_span *s, const fbn_coef *k, fbn_gate_rule rule))                                     \
    OP(normalize_cols, (const fbn_span *s, const fbn_coef *k, fbn_gate_rule rule))                                     \
    /* About what a turn owes, or all that is left. */                                                                 \
    OP(apply_some, (fbn_turn * turn))                                                                                  \
    /* sum dz and sum dz * (x - mean[c]) over the same blocks and rows as the moments */                               \
    OP(backward_reduce_rows,                                                                                           \
       (const fbn_span *s, const fbn_coef *k, fbn_gate_rule rule, const fbn_blocks *blocks, int64_t first,             \
        int64_t last, int64_t channels, const double *mean, void *tile, double *sum_dy, double *sum_dy_xmu))           \
    OP(backward_reduce_cols, (const fbn_span *s, const fbn_coef *k, fbn_gate_rule rule, const double *mean,            \
                              void *tile, double *sum_dy, double *sum_dy_xmu))                                         \
    /* dx = (dz + (x - mean) * slope) * gain + offset */                                                               \
    OP(backward_apply_rows, (const fbn_span *s, const fbn_coef *k, fbn_gate_rule rule))                                \
    OP(backward_apply_cols, (const fbn_span *s, const fbn_coef *k, fbn_gate_rule rule))                                \
    /* The coefficients of channels [first, last), as arrays `step` elements apart, those of a backward too if there   \
     * are sums. batch: the statistics are those of the tensor itself. uniform: whether every unit is 1. */            \
    OP(coefs, (const fbn_affine *affine, int batch, const fbn_backward_sums *sums, int64_t first, int64_t last,        \
               void *out, int64_t step, int *uniform))                                                                 \
    /* bytes past the cache; both aligned to 64, bytes a multiple of 64 */                                             \
    OP(copy, (const void *src, void *dst, int64_t bytes))                                                              \
    /* makes streamed stores visible to other threads */                                                               \
    OP(fence, (void))

#define FBN_DTYPES_EACH(DT) DT(f32, FBN_F32) DT(f64, FBN_F64) DT(f16, FBN_F16) DT(bf16, FBN_BF16)

#define FBN_FIELD(op, args) void(*op) args;
typedef struct {
    FBN_OPS(FBN_FIELD)
    /* Whether a slab can be applied side by side with moments, and with the sums of a backward; and if so, also where
     * the runs of its result do not begin with a cache line. */
    bool beside_moments, beside_gradients, beside_off_lines;
} fbn_kernels;
#undef FBN_FIELD

/* A tier may have no kernels of a dtype: all of them are NULL then, and the next best tier's serve. */
typedef struct {
    const char *name;
    fbn_kernels of[FBN_DTYPE_COUNT];
} fbn_isa;

static inline bool fbn_goes_beside(const fbn_kernels *k, bool backward)
{
    return backward ? k->beside_gradients : k->beside_moments;
}

static inline bool fbn_has_kernels(const fbn_isa *isa, fbn_dtype dtype) { return isa->of[dtype].copy != NULL; }

/* Names read op_family_dtype_isa. */
#define FBN_JOIN_(op, dtype, isa) op##_##dtype##_##isa
#define FBN_JOIN(op, dtype, isa) FBN_JOIN_(op, dtype, isa)

extern const fbn_isa fbn_isa_scalar, fbn_isa_avx2, fbn_isa_avx512, fbn_isa_avx512_bf16, fbn_isa_neon;

#endif
