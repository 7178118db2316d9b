/* coef.c -- fills the coefficient arrays. */
#include "coef.h"

#include <float.h>
#include <stdlib.h>
#include <string.h>

enum { FBN_UNIT, FBN_NEG_MEAN, FBN_SCALE, FBN_SHIFT, FBN_SLOPE, FBN_GAIN, FBN_OFFSET, FBN_COEF_COUNT };

static bool fbn_is_wide(fbn_dtype dtype) { return dtype == FBN_F64; }

static size_t fbn_coef_size(fbn_dtype dtype) { return fbn_is_wide(dtype) ? sizeof(double) : sizeof(float); }

static const fbn_range *fbn_range_of(fbn_dtype dtype)
{
    static const fbn_range narrow = {0x1p100, FLT_MIN, FLT_MAX, 0x1p-24};
    static const fbn_range wide = {0x1p960, DBL_MIN, DBL_MAX, 0x1p-60};
    return fbn_is_wide(dtype) ? &wide : &narrow;
}

double fbn_round_mean(fbn_dtype dtype, double mean) { return fbn_is_wide(dtype) ? mean : (double)(float)mean; }

static size_t fbn_coef_step(int64_t width) { return (size_t)(width + 15) / 16 * 16 + FBN_COEF_PAD; }

static char *fbn_coef_array(const fbn_coefs *c, int which)
{
    return (char *)fbn_to_line(c->memory) + (size_t)which * fbn_coef_step(c->width) * fbn_coef_size(c->dtype);
}

bool fbn_coefs_alloc(fbn_coefs *c, fbn_dtype dtype, int64_t width)
{
    size_t size = fbn_coef_size(dtype);
    *c = (fbn_coefs){.dtype = dtype, .width = width, .uniform = true};
    if (width < 0 || width > INT64_MAX / 128 || (uint64_t)width > SIZE_MAX / 128) {
        return false;
    }
    c->memory = calloc(fbn_coef_step(width) * FBN_COEF_COUNT * size + FBN_LINE, 1);
    return c->memory != NULL;
}

void fbn_coefs_free(fbn_coefs *c)
{
    free(c->memory);
    c->memory = NULL;
}

/* Channels are computed a chunk at a time in plain arrays: loops that a compiler turns into vectors. */
enum { FBN_CHUNK = 64 };

static void fbn_spread(double *to, const double *from, double otherwise, int64_t n)
{
    for (int64_t i = 0; i < n; i++) {
        to[i] = from == NULL ? otherwise : from[i];
    }
}

static void fbn_put(const fbn_coefs *c, int which, int64_t first, const double *values, int64_t n)
{
    if (fbn_is_wide(c->dtype)) {
        memcpy((double *)(void *)fbn_coef_array(c, which) + first, values, (size_t)n * sizeof *values);
        return;
    }
    float *to = (float *)(void *)fbn_coef_array(c, which) + first;
    for (int64_t i = 0; i < n; i++) {
        to[i] = (float)values[i];
    }
}

static bool fbn_all_one(const double *values, int64_t n)
{
    int one = 1;
    for (int64_t i = 0; i < n; i++) {
        one &= values[i] == 1.0;
    }
    return one != 0;
}

static void fbn_fill_chunk(fbn_coefs *c, const fbn_affine *affine, bool batch, const fbn_backward_sums *sums,
                           int64_t first, int64_t n)
{
    const fbn_range range = *fbn_range_of(c->dtype);
    const bool wide = fbn_is_wide(c->dtype);
    double lo[FBN_CHUNK], weight[FBN_CHUNK], bias[FBN_CHUNK], out[FBN_COEF_COUNT][FBN_CHUNK];
    const double *mean = affine->mean + first;
    const double *var = affine->var + first;
    fbn_spread(lo, affine->mean_lo == NULL ? NULL : affine->mean_lo + first, 0.0, n);
    fbn_spread(weight, affine->weight == NULL ? NULL : affine->weight + first, 1.0, n);
    fbn_spread(bias, affine->bias == NULL ? NULL : affine->bias + first, 0.0, n);
    for (int64_t i = 0; i < n; i++) {
        double hi = wide ? mean[i] : (double)(float)mean[i];
        fbn_channel_coef v =
            fbn_affine_of(mean[i], lo[i], hi, var[i], weight[i], bias[i], affine->eps, batch, wide, &range);
        out[FBN_UNIT][i] = v.unit;
        out[FBN_NEG_MEAN][i] = v.neg_mean;
        out[FBN_SCALE][i] = v.scale;
        out[FBN_SHIFT][i] = v.shift;
        out[FBN_GAIN][i] = v.gain;
    }
    for (int64_t i = 0; i < (sums == NULL ? 0 : n); i++) {
        double hi = wide ? mean[i] : (double)(float)mean[i];
        fbn_channel_coef v = {.unit = out[FBN_UNIT][i], .gain = out[FBN_GAIN][i]};
        fbn_backward_of(&v, mean[i], lo[i], hi, var[i], affine->eps, sums->sum_dy[first + i],
                        sums->sum_dy_xmu[first + i], sums->count);
        out[FBN_SLOPE][i] = v.slope;
        out[FBN_OFFSET][i] = v.offset;
    }
    int count = sums == NULL ? FBN_SLOPE : FBN_COEF_COUNT;
    for (int which = 0; which < count; which++) {
        fbn_put(c, which, first, out[which], n);
    }
    c->uniform = c->uniform && fbn_all_one(out[FBN_UNIT], n);
}

void fbn_coefs_fill(fbn_coefs *c, const fbn_affine *affine, bool batch, const fbn_backward_sums *sums, int64_t first,
                    int64_t last)
{
    for (int64_t i = first; i < last; i += FBN_CHUNK) {
        fbn_fill_chunk(c, affine, batch, sums, i, last - i < FBN_CHUNK ? last - i : FBN_CHUNK);
    }
}

fbn_coef fbn_coefs_at(const fbn_coefs *c, int64_t first)
{
    const char *base = fbn_coef_array(c, 0) + (size_t)first * fbn_coef_size(c->dtype);
    size_t step = fbn_coef_step(c->width) * fbn_coef_size(c->dtype);
    return (fbn_coef){
        .unit = c->uniform ? NULL : base + FBN_UNIT * step,
        .neg_mean = base + FBN_NEG_MEAN * step,
        .scale = base + FBN_SCALE * step,
        .shift = base + FBN_SHIFT * step,
        .slope = base + FBN_SLOPE * step,
        .gain = base + FBN_GAIN * step,
        .offset = base + FBN_OFFSET * step,
    };
}

/* Whole vectors, into the padding at the last: what is written too far is overwritten, or never read. */
static void fbn_fill_f32(float *to, float value, int64_t n)
{
    for (int64_t i = 0; i < n; i += 16) {
        for (int j = 0; j < 16; j++) {
            to[i + j] = value;
        }
    }
}

static void fbn_fill_f64(double *to, double value, int64_t n)
{
    for (int64_t i = 0; i < n; i += 16) {
        for (int j = 0; j < 16; j++) {
            to[i + j] = value;
        }
    }
}

/* A period of `repeat` copies of each, then periods until the width is full. */
void fbn_coefs_expand(fbn_coefs *to, const fbn_coefs *from, int64_t first, int64_t period, int64_t repeat,
                      int64_t width, bool backward)
{
    size_t size = fbn_coef_size(to->dtype);
    int count = backward ? FBN_COEF_COUNT : FBN_SLOPE;
    to->uniform = from->uniform;
    for (int which = from->uniform ? FBN_NEG_MEAN : FBN_UNIT; which < count; which++) {
        const char *source = fbn_coef_array(from, which) + (size_t)first * size;
        char *target = fbn_coef_array(to, which);
        int64_t done = 0;
        for (int64_t c = 0; c < period && repeat > 1; c++) {
            if (fbn_is_wide(to->dtype)) {
                fbn_fill_f64((double *)(void *)target + done, ((const double *)(const void *)source)[c], repeat);
            } else {
                fbn_fill_f32((float *)(void *)target + done, ((const float *)(const void *)source)[c], repeat);
            }
            done += repeat;
        }
        for (const char *again = repeat > 1 ? target : source; done < width;) {
            int64_t n = width - done < period * repeat ? width - done : period * repeat;
            memcpy(target + (size_t)done * size, again, (size_t)n * size);
            done += n;
        }
    }
}
