/* coef.c -- fills the coefficient arrays. */
#include "coef.h"

#include "dispatch.h"

#include <string.h>

static size_t fbn_coef_size(fbn_dtype dtype) { return fbn_is_wide(dtype) ? sizeof(double) : sizeof(float); }

static size_t fbn_coef_step(int64_t width) { return (size_t)(width + 15) / 16 * 16 + FBN_COEF_PAD; }

static char *fbn_coef_array(const fbn_coefs *c, int which)
{
    return c->memory + (size_t)which * fbn_coef_step(c->width) * fbn_coef_size(c->dtype);
}

int64_t fbn_coefs_bytes(fbn_dtype dtype, int64_t width)
{
    return (int64_t)(fbn_coef_step(width) * FBN_COEF_COUNT * fbn_coef_size(dtype));
}

/* Vectors are loaded past the last element, and what they bring is thrown away: but it must be there. */
static void fbn_coefs_pad(const fbn_coefs *c, int first, int count, int64_t width)
{
    size_t size = fbn_coef_size(c->dtype);
    size_t step = fbn_coef_step(c->width) * size;
    char *end = fbn_coef_array(c, first) + (size_t)width * size;
    for (int which = first; which < count; which++, end += step) {
        memset(end, 0, FBN_COEF_PAD * size);
    }
}

void fbn_coefs_place(fbn_coefs *c, fbn_dtype dtype, int64_t width, void *memory)
{
    *c = (fbn_coefs){.dtype = dtype, .width = width, .uniform = true, .memory = memory};
    fbn_coefs_pad(c, 0, FBN_COEF_COUNT, width);
}

void fbn_coefs_fill(fbn_coefs *c, const fbn_affine *affine, bool batch, const fbn_backward_sums *sums, int64_t first,
                    int64_t last)
{
    int uniform = 1;
    fbn_kernels_for(c->dtype)->coefs(affine, batch, sums, first, last, fbn_coef_array(c, 0),
                                     (int64_t)fbn_coef_step(c->width), &uniform);
    c->uniform = c->uniform && uniform != 0;
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
    int least = from->uniform ? FBN_NEG_MEAN : FBN_UNIT;
    for (int which = least; which < count; which++) {
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
    fbn_coefs_pad(to, least, count, width);
}
