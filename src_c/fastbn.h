/* fastbn.h -- the C interface: what the binding may call.
 *
 * Sizes and strides are in elements. Every entry checks what it is given and returns a status; nothing is written
 * unless the status is FBN_OK. Parameters and statistics cross this interface as double, whatever the data's dtype.
 */
#ifndef FASTBN_H
#define FASTBN_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef enum { FBN_F32, FBN_F64, FBN_F16, FBN_BF16, FBN_DTYPE_COUNT } fbn_dtype;

/* rows: a channel is a set of contiguous runs (NCHW). cols: the channels are the contiguous axis (NHWC, NC). */
typedef enum { FBN_ROWS, FBN_COLS } fbn_family;

typedef enum { FBN_IDENTITY, FBN_RELU, FBN_RELU6, FBN_LEAKY_RELU, FBN_ACTIVATION_COUNT } fbn_activation;

typedef enum { FBN_OK, FBN_BAD_ARGUMENT, FBN_NO_MEMORY } fbn_status;

/* What all the tensors of one call have in common. In the cols family inner is 1. */
typedef struct {
    fbn_dtype dtype;
    fbn_family family;
    int64_t outer, channels, inner;
} fbn_geometry;

/* One tensor. Element (o, c, i) is at data + o * outer_stride + c * channel_stride + i; cols: channel_stride is 1. */
typedef struct {
    void *data;
    int64_t outer_stride, channel_stride;
} fbn_tensor;

/* Per-channel statistics: count elements each, the mean as the unevaluated sum mean + mean_lo, and the sum of squared
 * deviations m2, so that the biased variance is m2 / count. */
typedef struct {
    int64_t count;
    double *mean, *mean_lo, *m2;
} fbn_moments;

/* y = activation((x - mean) / sqrt(var + eps) * weight + bias + residual). NULL weight is ones, NULL bias and NULL
 * mean_lo are zeros. */
typedef struct {
    const double *mean, *mean_lo, *var, *weight, *bias;
    double eps;
} fbn_affine;

typedef struct {
    fbn_activation kind;
    double negative_slope; /* of leaky_relu */
} fbn_act;

/* An affine map made ready for the apply step, in the dtype of the arithmetic; see fbn_prepare. */
typedef struct fbn_prepared fbn_prepared;

/* Bytes of the gate that forward writes and backward reads: one bit an element, set where the activation passes the
 * gradient unscaled. Needed only where the sign cannot be recomputed, i.e. for an activation after a residual. */
int64_t fbn_gate_bytes(const fbn_geometry *g);

/* threads is the largest team a call may use; the plan decides how many of them the work is worth. */

fbn_status fbn_moments_of(const fbn_geometry *g, fbn_tensor x, int threads, fbn_moments *out);

/* Training forward: the moments of x and the biased variance, then y. residual and gate may be NULL. affine's mean and
 * var are ignored: they are what this call computes. */
fbn_status fbn_forward(const fbn_geometry *g, fbn_tensor x, const fbn_tensor *residual, fbn_tensor y, uint8_t *gate,
                       const fbn_affine *affine, fbn_act act, int threads, fbn_moments *out, double *var);

/* Inference: y from given statistics. */
fbn_status fbn_normalize(const fbn_geometry *g, fbn_tensor x, const fbn_tensor *residual, fbn_tensor y, uint8_t *gate,
                         const fbn_affine *affine, fbn_act act, int threads);

/* The same in two steps, for parameters that are used many times. */
fbn_status fbn_prepare(fbn_dtype dtype, int64_t channels, const fbn_affine *affine, fbn_prepared **out);
void fbn_release(fbn_prepared *prepared);
fbn_status fbn_apply(const fbn_geometry *g, fbn_tensor x, const fbn_tensor *residual, fbn_tensor y, uint8_t *gate,
                     const fbn_prepared *prepared, fbn_act act, int threads);

/* With dz = the gradient behind the activation: sum_dy = sum dz, sum_dy_xmu = sum dz * (x - mean), per channel.
 * gate may be NULL, then the sign is recomputed from x and affine. */
fbn_status fbn_backward_reduce(const fbn_geometry *g, fbn_tensor x, fbn_tensor dy, const uint8_t *gate,
                               const fbn_affine *affine, fbn_act act, int threads, double *sum_dy, double *sum_dy_xmu);

/* dx = weight / sqrt(var + eps) * (dz - sum_dy / count - (x - mean) * sum_dy_xmu / (count * (var + eps))); count 0
 * means that the statistics are constants (inference): the last two terms vanish. dresidual, if given, receives dz. */
fbn_status fbn_backward_apply(const fbn_geometry *g, fbn_tensor x, fbn_tensor dy, fbn_tensor dx,
                              const fbn_tensor *dresidual, const uint8_t *gate, const fbn_affine *affine, fbn_act act,
                              const double *sum_dy, const double *sum_dy_xmu, double count, int threads);

/* Both, slab by slab while the slab is in cache. training selects count = outer * inner, else 0. The gradients of bias
 * and weight are the sums, the second of them divided by sqrt(var + eps); 0 where that is 0 in training. */
fbn_status fbn_backward(const fbn_geometry *g, fbn_tensor x, fbn_tensor dy, fbn_tensor dx, const fbn_tensor *dresidual,
                        const uint8_t *gate, const fbn_affine *affine, fbn_act act, bool training, int threads,
                        double *grad_bias, double *grad_weight);

/* The streaming copy: the roof that every figure is a multiple of. */
fbn_status fbn_copy(const void *src, void *dst, int64_t bytes, int threads);

#endif
