/* geometry.c -- collapse of strides. The order in which a channel's elements are summed may follow memory. */
#include "geometry.h"

#include "plan.h"

#include <string.h>

typedef struct {
    int64_t size;
    int64_t stride[FBN_MAX_ARRAYS]; /* elements */
} fbn_dim;

static bool fbn_dims_merge(const fbn_dim *outer, const fbn_dim *inner, int array)
{
    return outer->stride[array] == inner->stride[array] * inner->size;
}

/* Divisions by a number that the compiler does not know would be most of the time of a collapse. */
static bool fbn_aligned(int64_t bytes, int64_t size) { return (bytes & (size - 1)) == 0; }

static int64_t fbn_elements(int64_t bytes, int64_t size)
{
    return size == 8 ? bytes / 8 : size == 4 ? bytes / 4 : bytes / 2;
}

static int64_t fbn_magnitude(int64_t x) { return x < 0 ? -x : x; }

/* Where a dimension belongs, outermost first. A broadcast one is at home anywhere, and out of the way outside. */
static int64_t fbn_rank(const fbn_dim *d) { return d->stride[0] == 0 ? INT64_MAX : fbn_magnitude(d->stride[0]); }

bool fbn_collapse(fbn_dtype dtype, int ndim, int channel_axis, const intptr_t *shape, int count,
                  const fbn_array *arrays, fbn_geometry *g, fbn_tensor *tensors)
{
    int64_t size = fbn_dtype_size(dtype);
    fbn_dim dims[FBN_MAX_DIMS];
    fbn_dim channel = {.size = 1};
    int n = 0;
    if (ndim < 1 || ndim > FBN_MAX_DIMS || count < 1 || count > FBN_MAX_ARRAYS) {
        return false;
    }
    for (int a = 0; a < count; a++) {
        tensors[a].data = arrays[a].data;
        if (!fbn_aligned((intptr_t)arrays[a].data, size)) {
            return false;
        }
    }
    for (int d = 0; d < ndim; d++) {
        fbn_dim dim = {.size = shape[d]};
        for (int a = 0; a < count; a++) {
            if (dim.size > 1 && !fbn_aligned(arrays[a].strides[d], size)) {
                return false;
            }
            dim.stride[a] = fbn_elements(arrays[a].strides[d], size);
        }
        if (d == channel_axis) {
            channel = dim;
            continue;
        }
        if (dim.size == 1) {
            continue;
        }
        if (dim.stride[0] < 0) { /* sums do not mind the direction, as long as all arrays turn together */
            for (int a = 0; a < count; a++) {
                tensors[a].data = (char *)tensors[a].data + dim.stride[a] * (dim.size - 1) * size;
                dim.stride[a] = -dim.stride[a];
            }
        }
        int at = n++;
        for (; at > 0 && fbn_rank(&dims[at - 1]) < fbn_rank(&dim); at--) {
            dims[at] = dims[at - 1];
        }
        dims[at] = dim;
    }
    int merged = n > 0;
    for (int d = 1; d < n; d++) {
        bool merge = fbn_dims_merge(&dims[merged - 1], &dims[d], 0);
        for (int a = 1; merge && a < count; a++) {
            if (!fbn_dims_merge(&dims[merged - 1], &dims[d], a)) {
                return false;
            }
        }
        if (merge) {
            int64_t whole = dims[merged - 1].size * dims[d].size;
            dims[merged - 1] = dims[d];
            dims[merged - 1].size = whole;
        } else {
            dims[merged++] = dims[d];
        }
    }
    fbn_dim outer = {.size = 1};
    fbn_dim inner = {.size = 1};
    const fbn_dim *unit = NULL;
    if (merged > 0 && dims[merged - 1].stride[0] == 1) {
        g->family = FBN_ROWS;
        inner = dims[--merged];
        unit = &inner;
    } else if (channel.size == 1 || channel.stride[0] == 1) {
        g->family = FBN_COLS;
        unit = channel.size == 1 ? NULL : &channel;
    } else {
        g->family = FBN_ROWS;
    }
    for (int a = 1; unit != NULL && a < count; a++) {
        if (unit->stride[a] != 1) {
            return false;
        }
    }
    if (merged > 1) {
        return false;
    }
    if (merged == 1) {
        outer = dims[0];
    }
    g->dtype = dtype;
    g->outer = outer.size;
    g->channels = channel.size;
    g->inner = inner.size;
    for (int a = 0; a < count; a++) {
        tensors[a].outer_stride = outer.size > 1 ? outer.stride[a] : channel.size * inner.size;
        tensors[a].channel_stride = g->family == FBN_COLS ? 1 : channel.size > 1 ? channel.stride[a] : inner.size;
    }
    return true;
}

/* Of numbers that are not negative. */
static bool fbn_product(int64_t a, int64_t b, int64_t *out)
{
    if ((a | b) > INT32_MAX && a != 0 && b > INT64_MAX / a) { /* a division only where it may matter */
        return false;
    }
    *out = a * b;
    return true;
}

bool fbn_geometry_valid(const fbn_geometry *g)
{
    int64_t elements;
    int64_t bytes;
    return g != NULL && (unsigned)g->dtype < FBN_DTYPE_COUNT && (g->family == FBN_ROWS || g->family == FBN_COLS) &&
           g->outer > 0 && g->channels > 0 && g->inner > 0 && (g->family == FBN_ROWS || g->inner == 1) &&
           fbn_product(g->outer, g->channels, &elements) && fbn_product(elements, g->inner, &elements) &&
           fbn_product(elements, 16, &bytes);
}

/* Elements: far beyond any address space, and short of overflow also for what is prefetched some rows ahead. */
#define FBN_FARTHEST (INT64_MAX / 32 / 8192)

bool fbn_tensor_valid(const fbn_geometry *g, const fbn_tensor *t)
{
    int64_t size = fbn_dtype_size(g->dtype);
    int64_t reach;
    int64_t across;
    return t->data != NULL && fbn_aligned((intptr_t)t->data, size) && t->outer_stride > INT64_MIN / 2 &&
           t->channel_stride > INT64_MIN / 2 && (g->family == FBN_ROWS || t->channel_stride == 1) &&
           fbn_product(g->outer, fbn_magnitude(t->outer_stride), &reach) &&
           fbn_product(g->channels, fbn_magnitude(t->channel_stride), &across) && reach <= FBN_FARTHEST - across &&
           across <= FBN_FARTHEST;
}
