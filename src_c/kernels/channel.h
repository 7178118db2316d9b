/* channel.h -- the mathematics of one channel, in float64: where blocks begin and end, how their moments merge, and
 * the coefficients of the apply steps.
 */
#ifndef FASTBN_CHANNEL_H
#define FASTBN_CHANNEL_H

#include <float.h>
#include <math.h>
#include <stdbool.h>
#include <stdint.h>

#if defined(__FAST_MATH__) || (defined(FLT_EVAL_METHOD) && FLT_EVAL_METHOD != 0 && FLT_EVAL_METHOD != -1)
#error "fastbn needs arithmetic that rounds as written: no -ffast-math, no extended precision"
#endif

/* Exact: *hi + *lo = a + b (Knuth's two-sum). */
static inline void fbn_two_sum(double a, double b, double *hi, double *lo)
{
    double sum = a + b;
    double t = sum - a;
    *lo = (a - (sum - t)) + (b - t);
    *hi = sum;
}

/* The mean is the unevaluated sum mean + lo: with |mean| >> sigma one double is not enough for float64 data.
 *
 * Moments of `count` numbers from s = sum (x - pivot) and q = sum (x - pivot)^2. The pivot is near their mean,
 * which bounds the cancellation, and equal to them where all are equal, which makes a constant block exact. */
static inline void fbn_moment_of_block(double count, double pivot, double s, double q, double *mean, double *lo,
                                       double *m2)
{
    double shift = s / count;
    double rest = q - s * shift;
    *m2 = rest < 0.0 ? 0.0 : rest;
    fbn_two_sum(pivot, shift, mean, lo);
    *lo += fma(shift, -count, s) / count; /* what the division rounded away */
}

/* Chan, Golub & LeVeque (1979): moments of the union of two disjoint sets, the second being `share` of the union and
 * `weight` = na * nb / (na + nb). */
static inline void fbn_merge_into(double *mean, double *lo, double *m2, double share, double weight, double mean_b,
                                  double lo_b, double m2_b)
{
    double delta = (mean_b - *mean) + (lo_b - *lo);
    *m2 += m2_b + delta * delta * weight;
    fbn_two_sum(*mean, *lo + delta * share, mean, lo);
}

/* What an arithmetic of limited range needs to know about itself. */
typedef struct {
    double huge;              /* x - mean cannot overflow while |mean| is below */
    double smallest, largest; /* normal numbers */
    double unit; /* scales numbers beyond `huge` back into range, and its inverse those that are too small */
} fbn_range;

/* Coefficients of z = (x * unit + neg_mean) * scale + shift and of dx = (dz + d * slope) * gain + offset; and what they
 * were made with. */
typedef struct {
    double unit, neg_mean, scale, shift, slope, gain, offset;
    double deviation;
} fbn_channel_coef;

/* What float64 loses in weight / sqrt(var + eps), given that quotient's two factors: for data that are float64, too. */
static inline double fbn_gain_lost(double var, double eps, double inverse, double weight, double gain)
{
    double v;
    double v_lost;
    fbn_two_sum(var, eps, &v, &v_lost);
    double square = v * inverse;
    double rest = (fma(-square, inverse, 1.0) - fma(v, inverse, -square) * inverse) - v_lost * inverse * inverse;
    double lost = fma(weight, inverse, -gain) + weight * (0.5 * inverse * rest);
    return fabs(lost) < fabs(gain) * 0x1p-40 ? lost : 0.0; /* not where something is infinite, NaN or subnormal */
}

/* Ioffe & Szegedy (2015), Alg. 1: (x - mean) / sqrt(var + eps) * weight + bias, with the mean split into what the
 * arithmetic can subtract exactly (`hi`, the mean rounded to it) and a rest that goes into the shift: a folded
 * x * scale + shift would lose |mean| / sigma ulps. d = x - hi is scaled by a power of two where it could overflow, or
 * where the scale would be subnormal (slow on many CPUs, and short of digits; a subnormal rest is no loss at all) or
 * infinite.
 * For batch statistics an inverse of 0 stands for 1 / sqrt(0), so that a constant channel is its bias for any eps. */
static inline fbn_channel_coef fbn_affine_of(double mean, double lo, double hi, double var, double weight, double bias,
                                             double eps, bool batch, bool wide, const fbn_range *range)
{
    double deviation = sqrt(var + eps);
    double inverse = batch && deviation == 0.0 ? 0.0 : 1.0 / deviation;
    double gain = weight * inverse;
    gain += wide ? fbn_gain_lost(var, eps, inverse, weight, gain) : 0.0;
    double rest = (mean - hi) + lo;
    bool far = fabs(mean) > range->huge || (gain != 0.0 && fabs(gain) < range->smallest);
    bool near = fabs(gain) > range->largest;
    double unit = far ? range->unit : near ? 1.0 / range->unit : 1.0;
    double scale = gain * (far ? 1.0 / range->unit : near ? range->unit : 1.0);
    fbn_channel_coef c = {.unit = unit, .neg_mean = -(hi * unit), .gain = gain, .deviation = deviation};
    c.scale = fabs(scale) < range->smallest ? 0.0 : scale;
    c.shift = bias - (rest == 0.0 ? 0.0 : rest * gain);
    return c;
}

/* The backward's: dx = gain * (dz - sum_dy / n - (x - mean) * sum_dy_xmu / (n * (var + eps))). */
static inline void fbn_backward_of(fbn_channel_coef *c, double mean, double lo, double hi, double var, double eps,
                                   double sum_dy, double sum_dy_xmu, double count)
{
    /* Constant statistics have no such terms; and where nothing passes, nothing comes back. */
    bool none = count == 0.0 || c->gain == 0.0;
    double n = none ? 1.0 : count;
    double spread = none ? 1.0 : var + eps;
    double slope = sum_dy_xmu / n / spread;
    double offset = c->gain * (((mean - hi) + lo) * slope - sum_dy / n);
    c->slope = none ? 0.0 : -slope / c->unit;
    c->offset = none ? 0.0 : offset;
}

/* The gradient of the weight, sum dz * xhat: for batch statistics xhat is 0 in a constant channel, for any eps. */
static inline double fbn_weight_gradient(double sum_dy_xmu, double deviation, bool batch)
{
    return batch && deviation == 0.0 ? 0.0 : sum_dy_xmu / deviation;
}

/* A pivot must not turn finite neighbours into NaN. */
static inline double fbn_pivot(double x) { return isfinite(x) ? x : 0.0; }

/* The blocks of a channel in the rows family: the same piece of a few planes; where planes are not long, the piece is
 * the plane. At most FBN_BLOCK elements, of one plane FBN_PIECE_MOST. They follow from the channel's geometry alone:
 * never from threads, caches, the ISA or the number of its neighbours. */
enum { FBN_BLOCK = 16384, FBN_PIECE_MOST = 4096, FBN_BLOCK_ROWS = 1024, FBN_STRIP_ROWS = 768, FBN_STRIPS = 128 };

/* So many planes of a channel are summed abreast, a vector of each at a time: memory gives more to several runs than
 * to one. */
enum { FBN_ABREAST = 4 };

/* Planes that are summed place by place, down the images before across: long enough for a channel to fill a vector, and
 * so short that the ends of planes would cost more. */
enum { FBN_SHORT_LEAST = 16, FBN_SHORT_MOST = 128 };
static inline bool fbn_short(int64_t inner) { return inner >= FBN_SHORT_LEAST && inner <= FBN_SHORT_MOST; }

/* Whether rows of `width` elements of `size` bytes that touch may be one run: a vector lies in two rows at most, and
 * what is before the first cache line in one. */
enum { FBN_LINE = 64 };
static inline bool fbn_joins(int64_t width, int64_t size) { return width >= 16 && width * size >= FBN_LINE; }

typedef struct {
    int64_t planes;    /* of a block: a multiple of FBN_ABREAST, if there are so many */
    int64_t pieces;    /* of a plane */
    int64_t piece_len; /* elements of a piece: a multiple of 16, but for the last */
    int64_t count;     /* blocks in a channel */
    int64_t strips;    /* runs of blocks that may go to different threads */
} fbn_blocks;

static inline int64_t fbn_ceil_div(int64_t a, int64_t b) { return a / b + (a % b != 0); }

static inline int64_t fbn_min(int64_t a, int64_t b) { return a < b ? a : b; }

static inline int64_t fbn_max(int64_t a, int64_t b) { return a > b ? a : b; }

static inline int64_t fbn_clamp(int64_t x, int64_t low, int64_t high) { return x < low ? low : x > high ? high : x; }

static inline fbn_blocks fbn_blocks_rows(int64_t outer, int64_t inner)
{
    fbn_blocks b;
    b.pieces = fbn_ceil_div(inner, FBN_PIECE_MOST);
    b.piece_len = fbn_ceil_div(fbn_ceil_div(inner, b.pieces), 16) * 16;
    b.pieces = fbn_ceil_div(inner, b.piece_len);
    b.planes = fbn_clamp(FBN_BLOCK / FBN_ABREAST / b.piece_len * FBN_ABREAST, 1, outer);
    b.count = fbn_ceil_div(outer, b.planes) * b.pieces;
    b.strips = fbn_clamp(outer * inner / FBN_BLOCK, 1, fbn_min(b.count, FBN_STRIPS));
    return b;
}

/* The cols family: strips of rows; within a strip, blocks of FBN_BLOCK_ROWS rows. */
static inline int64_t fbn_strips_cols(int64_t rows) { return fbn_clamp(rows / FBN_STRIP_ROWS, 1, FBN_STRIPS); }

/* The i-th of n even parts of `total` begins here; the same rule cuts strips and the shares of threads. */
static inline int64_t fbn_part(int64_t total, int64_t i, int64_t n)
{
    return total / n * i + (total % n < i ? total % n : i);
}

#endif
