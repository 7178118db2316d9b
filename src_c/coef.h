/* coef.h -- arrays of channel coefficients, rounded to the arithmetic that will use them. */
#ifndef FASTBN_COEF_H
#define FASTBN_COEF_H

#include "fastbn.h"
#include "kernels/kernels.h"

/* Seven arrays in one block of memory, each of width elements and the kernels' padding. */
typedef struct {
    fbn_dtype dtype;
    int64_t width;
    bool uniform; /* every unit is 1, as far as this copy of the struct has filled */
    char *memory; /* somebody else's; begins with a cache line */
} fbn_coefs;

/* Bytes for coefficients of `width` < FBN_WIDEST elements; and coefficients in so much memory. */
#define FBN_WIDEST (INT64_MAX / 128)
int64_t fbn_coefs_bytes(fbn_dtype dtype, int64_t width);
void fbn_coefs_place(fbn_coefs *c, fbn_dtype dtype, int64_t width, void *memory);

/* Computes channels [first, last). batch: the statistics are those of the tensor itself. sums may be NULL. */
void fbn_coefs_fill(fbn_coefs *c, const fbn_affine *affine, bool batch, const fbn_backward_sums *sums, int64_t first,
                    int64_t last);

/* The kernels' view from channel `first` on. */
fbn_coef fbn_coefs_at(const fbn_coefs *c, int64_t first);

/* to[i] = from[first + (i / repeat) % period] for i < width: parameters for a panel, an apply step over several
 * channels' planes (width = period * repeat) or over several rows (repeat 1) at once. */
void fbn_coefs_expand(fbn_coefs *to, const fbn_coefs *from, int64_t first, int64_t period, int64_t repeat,
                      int64_t width, bool backward);

/* Whether the arithmetic is float64; and the mean as the arithmetic holds it. */
static inline bool fbn_is_wide(fbn_dtype dtype) { return dtype == FBN_F64; }
static inline double fbn_round_mean(fbn_dtype dtype, double mean)
{
    return fbn_is_wide(dtype) ? mean : (double)(float)mean;
}

#endif
