/* geometry.h -- from strided arrays to (outer, channels, inner), and the checks that no caller is trusted with. */
#ifndef FASTBN_GEOMETRY_H
#define FASTBN_GEOMETRY_H

#include "fastbn.h"

enum { FBN_MAX_DIMS = 64, FBN_MAX_ARRAYS = 4 };

/* One array of a call, as NumPy describes it: strides in bytes. */
typedef struct {
    char *data;
    const intptr_t *strides;
} fbn_array;

/* Finds the geometry of the first of `count` arrays of the same shape, whose strides alone decide it: so it is the same
 * in every call, whatever comes with it. False where it has none, where another array's dimensions do not collapse to
 * it, or an element is not aligned to its size: then the caller must copy. The shape has no zero. */
bool fbn_collapse(fbn_dtype dtype, int ndim, int channel_axis, const intptr_t *shape, int count,
                  const fbn_array *arrays, fbn_geometry *g, fbn_tensor *tensors);

/* Sizes that make sense: not negative, inner 1 in the cols family, no overflow of any offset. */
bool fbn_geometry_valid(const fbn_geometry *g);
bool fbn_tensor_valid(const fbn_geometry *g, const fbn_tensor *t);

#endif
