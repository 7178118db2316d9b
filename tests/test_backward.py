"""test_backward -- dx, dweight, dbias and the residual's gradient against the twin.

Seeded bug that turns it red: the gate of relu6 passes the gradient above 6.
"""

import copy
import pickle

import arrays
import numpy as np
import pytest
import twin
from arrays import ACTIVATIONS, normal, parameters
from test_forward import SIZES
from tolerance import assert_close, assert_gradients

import fastbn


def check(found, grad_output, x, saved, weight):
    assert_gradients(found, grad_output, saved, weight)
    assert all(tensor.dtype == x.dtype for tensor in (found[0], *found[3:]))
    assert found[1].dtype == found[2].dtype == arrays.parameter_dtype(x.dtype)


def forward_pair(x, weight, bias, mode, rng, **options):
    """What the core saved and what the twin saved, for the same forward."""
    if mode == "training":
        return (
            fastbn.batch_norm_forward(x, weight, bias, **options)[1],
            twin.batch_norm_forward(x, weight, bias, **options)[1],
        )
    channels = x.shape[options["channel_axis"]]
    mean = rng.uniform(-1, 1, channels).astype(arrays.parameter_dtype(x.dtype))
    var = rng.uniform(0.5, 2, channels).astype(arrays.parameter_dtype(x.dtype))
    activation, slope = options.get("activation"), options.get("negative_slope", 0.01)
    return (
        fastbn._native.forward_eval(
            x, mean, var, weight, bias, 1e-5, options["channel_axis"], activation, slope, options.get("residual"), None
        )[1],
        twin.forward_eval(x, mean, var, weight, bias, **options)[1],
    )


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes(isa, dtype, layout, size, rng):
    shape, axis = layout(*size)
    x, grad_output = normal(rng, shape, dtype, mean=2), normal(rng, shape, dtype)
    weight, bias = parameters(rng, size[1], dtype)
    kept = [a.copy() for a in (x, grad_output, weight, bias)]
    saved, reference = forward_pair(x, weight, bias, "training", rng, channel_axis=axis)
    found = fastbn.batch_norm_backward(grad_output, x, saved, weight, bias)
    check(found, grad_output, x, reference, weight)
    for now, before in zip((x, grad_output, weight, bias), kept, strict=True):
        assert arrays.same_bytes(now, before)


@pytest.mark.parametrize("mode", ["training", "inference"])
@pytest.mark.parametrize("affine", ["plain", "weight", "bias", "both"])
@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_fused(isa, dtype, layout, activation, residual, affine, mode, rng):
    shape, axis = layout(3, 19, 37)
    weight, bias = parameters(rng, 19, dtype)
    weight = weight * 3 if affine in ("weight", "both") else None  # far enough to reach 6
    bias = bias if affine in ("bias", "both") else None
    options = {"channel_axis": axis, "activation": activation, "negative_slope": 0.2}
    x, grad_output = normal(rng, shape, dtype), normal(rng, shape, dtype)
    options["residual"] = normal(rng, shape, dtype) if residual else None
    saved, reference = forward_pair(x, weight, bias, mode, rng, **options)
    grad_output = twin.off_kinks(grad_output, reference)
    if activation == "relu6" and weight is not None:
        assert np.any(reference.z > 6)
    found = fastbn.batch_norm_backward(grad_output, x, saved, weight, bias)
    check(found, grad_output, x, reference, weight)


@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("size", [(8, 24, 40 * 40), (3, 5, 5 * 4096 + 3), (3000, 70, 1)], ids=str)
def test_large(isa, threads, dtype, layout, size, residual, rng):
    """Large enough for a team; also with the gate in memory, whose bits neighbouring threads share bytes of."""
    shape, axis = layout(*size)
    x, grad_output = normal(rng, shape, dtype, mean=1), normal(rng, shape, dtype)
    weight, bias = parameters(rng, size[1], dtype)
    options = {"channel_axis": axis, "activation": "relu", "residual": normal(rng, shape, dtype) if residual else None}
    saved, reference = forward_pair(x, weight, bias, "training", rng, **options)
    grad_output = twin.off_kinks(grad_output, reference)
    found = fastbn.batch_norm_backward(grad_output, x, saved, weight, bias)
    check(found, grad_output, x, reference, weight)


@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("bias", [0.0, 6.0])
@pytest.mark.parametrize("activation", ["relu", "relu6", "leaky_relu"])
def test_at_the_kink(isa, dtype, layout, activation, bias, residual):
    """A constant channel sits exactly on its bias; there the derivative is PyTorch's: 0, or the negative slope."""
    shape, axis = layout(3, 5, 21)
    x = np.full(shape, 3, dtype)
    shift = np.full(5, bias, arrays.parameter_dtype(dtype))
    options = {"channel_axis": axis, "activation": activation, "residual": np.zeros_like(x) if residual else None}
    _, saved = fastbn.batch_norm_forward(x, None, shift, **options)
    _, _, dbias, *rest = fastbn.batch_norm_backward(np.ones_like(x), x, saved, None, shift)
    slope = 0.01 if activation == "leaky_relu" else 0.0
    passes = 1.0 if bias == 6 and activation != "relu6" else slope if bias == 0 else 0.0
    assert_close(dbias, np.full(5, 63 * passes))
    if residual:
        assert_close(rest[0], np.full(shape, passes))


def test_parameter_gradients_follow_the_weight(rng):
    """Their dtype is the weight's, and the parameters' default where there is none."""
    x = normal(rng, (4, 3, 5), np.float32)
    _, saved = fastbn.batch_norm_forward(x, np.ones(3), None)
    _, dweight, dbias = fastbn.batch_norm_backward(x, x, saved, np.ones(3), None)
    assert dweight.dtype == dbias.dtype == np.float64
    _, dweight, dbias = fastbn.batch_norm_backward(x, x, saved)
    assert dweight.dtype == dbias.dtype == np.float32


def test_backward_twice(dtype, layout, rng):
    """A saved state is read, not used up."""
    shape, axis = layout(4, 5, 33)
    x, grad_output = normal(rng, shape, dtype), normal(rng, shape, dtype)
    _, saved = fastbn.batch_norm_forward(x, channel_axis=axis, activation="relu", residual=grad_output)
    first = fastbn.batch_norm_backward(grad_output, x, saved)
    second = fastbn.batch_norm_backward(grad_output, x, saved)
    assert all(arrays.same_bytes(a, b) for a, b in zip(first, second, strict=True))


def test_what_a_forward_leaves_cannot_change_nor_leave(rng):
    """So a copy is itself. Seeded bug: the message of a pickle that names members of C."""
    x = normal(rng, (4, 3, 5), np.float32)
    _, saved = fastbn.batch_norm_forward(x)
    assert copy.copy(saved) is copy.deepcopy([saved])[0] is saved
    with pytest.raises(TypeError, match="Saved cannot be pickled: what a forward leaves"):
        pickle.dumps(saved)
    with pytest.raises(AttributeError):
        saved.count = 0
    with pytest.raises(ValueError, match="read-only"):
        saved.mean[:] = 0
