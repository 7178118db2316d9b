"""test_semantics -- what the numbers mean: PyTorch's conventions, stated without PyTorch.

Seeded bug that turns it red: the running variance takes the biased variance.
"""

import re

import arrays
import numpy as np
import pytest
import twin
from arrays import normal, parameters
from numpy.lib.stride_tricks import as_strided
from tolerance import assert_close, assert_gradients

import fastbn


def running(dtype, channels=3):
    kind = arrays.parameter_dtype(dtype)
    return np.linspace(-1, 1, channels).astype(kind), np.linspace(0.5, 2, channels).astype(kind)


@pytest.mark.parametrize("momentum", [0.0, 0.1, 0.5, 1.0])
def test_momentum_is_the_share_of_the_batch(isa, dtype, layout, momentum, rng):
    """running = (1 - momentum) * running + momentum * batch; the batch's variance divides by n - 1."""
    shape, axis = layout(4, 3, 11)
    x = normal(rng, shape, dtype, mean=3, std=2)
    mean, var = running(dtype)
    y, new_mean, new_var = twin.batch_norm(x, mean, var, training=True, momentum=momentum, channel_axis=axis)
    found = fastbn.batch_norm(x, mean, var, training=True, momentum=momentum, channel_axis=axis)
    assert_close(found, y)
    assert_close(mean, new_mean)
    assert_close(var, new_var)


def test_normalizes_with_the_biased_variance():
    x = np.array([[1.0], [3.0]])
    var = np.ones(1)
    y = fastbn.batch_norm(x, np.zeros(1), var, training=True, momentum=1.0, eps=0.0)
    assert y.ravel().tolist() == [-1.0, 1.0]
    assert var[0] == 2.0


def test_inference_reads_the_running_statistics(dtype, layout, rng):
    shape, axis = layout(4, 3, 11)
    x, (mean, var) = normal(rng, shape, dtype), running(dtype)
    kept = mean.copy(), var.copy()
    weight, bias = parameters(rng, 3, dtype)
    y = fastbn.batch_norm(x, mean, var, weight, bias, channel_axis=axis)
    assert_close(y, twin.normalize(x, mean, var, weight, bias, channel_axis=axis))
    assert np.array_equal(mean, kept[0])
    assert np.array_equal(var, kept[1])
    assert arrays.same_bytes(y, fastbn.normalize(x, mean, var, weight, bias, channel_axis=axis))


def test_training_without_running_statistics(dtype, rng):
    x = normal(rng, (4, 3, 11), dtype)
    expected, _ = fastbn.batch_norm_forward(x)
    assert arrays.same_bytes(fastbn.batch_norm(x, None, None, training=True), expected)


def test_running_statistics_may_be_float64_for_narrow_data(rng):
    x, mean, var = normal(rng, (4, 3, 11), np.float16), np.zeros(3), np.ones(3)
    _, new_mean, new_var = twin.batch_norm(x, mean, var, training=True)
    fastbn.batch_norm(x, mean, var, training=True)
    np.testing.assert_allclose(mean, new_mean, rtol=1e-6)
    np.testing.assert_allclose(var, new_var, rtol=1e-6)


@pytest.mark.parametrize("shape", [(1, 3), (1, 3, 1), (1, 3, 1, 1), (1, 1, 1, 3)], ids=str)
def test_one_value_per_channel(dtype, shape, rng):
    """PyTorch's words, so that who searches for them finds the same advice. Red without the check."""
    axis = shape.index(3)
    x, (mean, var) = normal(rng, shape, dtype), running(dtype)
    out = np.full_like(x, 7)
    words = re.escape(f"Expected more than 1 value per channel when training, got input size {list(shape)}")
    for call in (
        lambda: fastbn.batch_norm(x, mean, var, training=True, channel_axis=axis, out=out),
        lambda: fastbn.batch_norm_forward(x, channel_axis=axis, out=out),
        lambda: fastbn.BatchNorm(3, channel_axis=axis, dtype=dtype)(x, out=out),
    ):
        with pytest.raises(ValueError, match=words.replace(r"\[", r"\D*\[").replace(r"\]", r"\]")):
            call()
    assert np.array_equal(mean, running(dtype)[0])
    assert np.array_equal(var, running(dtype)[1])
    assert (out == 7).all()
    assert_close(fastbn.batch_norm(x, mean, var, channel_axis=axis), twin.normalize(x, mean, var, channel_axis=axis))
    assert fastbn.moments(x, channel_axis=axis).count == 1


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 5), (4, 3, 0), (0, 3, 0, 2), (4, 0), (4, 0, 5), (0, 0)], ids=str)
@pytest.mark.parametrize("axis", [1, -1])
def test_nothing_in_nothing_out(dtype, shape, axis, rng):
    """Empty output, statistics untouched, zero gradients."""
    x, channels = np.empty(shape, dtype), shape[axis]
    mean, var = running(dtype, channels)
    kept = mean.copy(), var.copy()
    weight, bias = parameters(rng, channels, dtype)
    for training in (True, False):
        y = fastbn.batch_norm(x, mean, var, weight, bias, training, channel_axis=axis)
        assert y.shape == shape
        assert y.dtype == dtype
        # Strides of 0, as PyTorch gives an empty tensor.
        out = as_strided(y, shape, (0,) * y.ndim)
        fastbn.batch_norm(x, mean, var, weight, bias, training, channel_axis=axis, out=out)
    assert np.array_equal(mean, kept[0])
    assert np.array_equal(var, kept[1])
    y, saved = fastbn.batch_norm_forward(x, weight, bias, channel_axis=axis, activation="relu", residual=x)
    assert saved.mean.shape == saved.var.shape == (channels,)
    dx, dweight, dbias, dresidual = fastbn.batch_norm_backward(x, x, saved, weight, bias)
    assert dx.shape == dresidual.shape == shape
    assert dweight.tolist() == dbias.tolist() == [0] * channels
    m = fastbn.moments(x, channel_axis=axis)
    assert m.count == 0
    assert m.mean.shape == m.m2.shape == (channels,)
    assert not m.mean.any()
    assert not m.m2.any()
    sums = fastbn.backward_reduce(x, x, m.mean, channel_axis=axis)
    assert all(s.tolist() == [0] * channels for s in sums)
    assert fastbn.normalize(x, mean, var, channel_axis=axis).shape == shape
    assert fastbn.backward_apply(x, x, mean, var, weight, *sums, 0, channel_axis=axis).shape == shape
    bn = fastbn.BatchNorm(channels, channel_axis=axis, dtype=dtype)
    assert bn(x).shape == shape
    assert bn.num_batches_tracked == 0
    assert bn.backward(x).shape == shape
    assert not bn.grad_weight.any()
    assert not bn.grad_bias.any()


def test_eps_zero_and_variance_zero(dtype, layout):
    """Batch statistics: the inverse of 0 counts as 0, so y is the bias and no gradient is infinite."""
    shape, axis = layout(4, 3, 11)
    x = np.ones(shape, dtype)
    y, saved = fastbn.batch_norm_forward(x, None, None, 0.0, channel_axis=axis)
    assert not y.any()
    dx, dweight, dbias = fastbn.batch_norm_backward(x, x, saved)
    assert not dx.any()
    assert not dweight.any()
    assert dbias.tolist() == [44] * 3


@pytest.mark.filterwarnings("error")
def test_a_negative_variance_makes_its_channel_nan(isa, dtype, layout, rng):
    """As in PyTorch; where eps outweighs it, it counts. Seeded bugs: a deviation of 0 there, or of abs(var)."""
    shape, axis = layout(4, 4, 11)
    x, (mean, _) = normal(rng, shape, dtype), running(dtype, 4)
    weight, bias = parameters(rng, 4, dtype)
    var = np.array([-1.0, -1e-6, 1.0, -0.5], mean.dtype)
    weight[3] = 0
    expected = twin.normalize(x, mean, var, weight, bias, channel_axis=axis, activation="relu")
    bn = fastbn.BatchNorm(4, channel_axis=axis, activation="relu", dtype=dtype).eval()
    bn.weight, bn.bias, bn.running_mean, bn.running_var = weight, bias, mean, var

    def bad(y):
        return np.moveaxis(np.isnan(y), axis, 0).all(tuple(range(1, y.ndim))).tolist()

    for y in (
        fastbn.batch_norm(x, mean, var, weight, bias, channel_axis=axis, activation="relu"),
        fastbn.normalize(x, mean, var, weight, bias, channel_axis=axis, activation="relu"),
        bn(x),
    ):
        assert bad(y) == bad(expected) == [True, False, False, True]
        assert_close(y.take([1, 2], axis), expected.take([1, 2], axis))
    one, sums = np.ones_like(x), np.ones(4)
    assert bad(bn.backward(one))[:3] == [True, False, False]
    assert bad(fastbn.backward_apply(one, x, mean, var, weight, sums, sums, 44, channel_axis=axis))[:3] == [
        True, False, False,
    ]  # fmt: skip


def test_inference_gradient_takes_statistics_as_constants(dtype, layout, rng):
    """dx = dy * weight / sqrt(var + eps), and the parameters' gradients with the running statistics."""
    shape, axis = layout(4, 3, 11)
    x, grad_output = normal(rng, shape, dtype), normal(rng, shape, dtype)
    bn = fastbn.BatchNorm(3, channel_axis=axis, dtype=dtype).eval()
    bn.weight, bn.bias = parameters(rng, 3, dtype)
    bn.running_mean, bn.running_var = running(dtype)
    _, saved = twin.forward_eval(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, channel_axis=axis)
    expected = twin.normalize(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, channel_axis=axis)
    assert_close(bn(x), expected, twin.value_scale(saved, bn.weight, bn.bias))
    dx = bn.backward(grad_output)
    inverse = 1 / np.sqrt(bn.running_var.astype(np.float64) + 1e-5)
    assert_close(dx, twin.widen(grad_output) * twin.along(bn.weight * inverse, x, axis), 2)
    assert_gradients((dx, bn.grad_weight, bn.grad_bias), grad_output, saved, bn.weight)


class TestLayer:
    """The state around the kernels. The pickling and files of a layer are tested where they are made."""

    def batches(self, rng, dtype=np.float32):
        return [normal(rng, (4, 3, 11), dtype, mean=k) for k in range(4)]

    def test_defaults(self):
        bn = fastbn.BatchNorm(3)
        assert bn.training
        assert bn.weight.tolist() == [1] * 3
        assert bn.bias.tolist() == [0] * 3
        assert bn.running_mean.tolist() == [0] * 3
        assert bn.running_var.tolist() == [1] * 3
        assert bn.num_batches_tracked == 0
        assert bn.weight.dtype == bn.running_var.dtype == np.float32

    def test_parameters_have_the_dtype_of_the_arithmetic(self, dtype):
        bn = fastbn.BatchNorm(3, dtype=dtype)
        for array in (bn.weight, bn.bias, bn.running_mean, bn.running_var):
            assert array.dtype == arrays.parameter_dtype(dtype)

    def test_running_statistics(self, dtype, rng):
        bn = fastbn.BatchNorm(3, momentum=0.3, dtype=dtype)
        mean, var = bn.running_mean.copy(), bn.running_var.copy()
        for k, x in enumerate(self.batches(rng, dtype), start=1):
            bn(x)
            fastbn.batch_norm(x, mean, var, training=True, momentum=0.3)
            assert bn.num_batches_tracked == k
        assert np.array_equal(bn.running_mean, mean)
        assert np.array_equal(bn.running_var, var)

    def test_momentum_none_is_the_average(self, rng):
        """Over all batches so far: the counter first, then a share of 1 / count."""
        bn, batches = fastbn.BatchNorm(3, momentum=None), self.batches(rng)
        for x in batches:
            bn(x)
        np.testing.assert_allclose(bn.running_mean, np.mean([x.mean(axis=(0, 2)) for x in batches], axis=0), rtol=1e-5)
        np.testing.assert_allclose(
            bn.running_var, np.mean([x.var(axis=(0, 2), ddof=1) for x in batches], axis=0), rtol=1e-5
        )

    def test_eval_changes_nothing(self, rng):
        bn = fastbn.BatchNorm(3)
        bn(self.batches(rng)[1])
        state = {k: np.copy(v) for k, v in bn.state_dict().items()}
        bn.eval()
        assert not bn.training
        for x in self.batches(rng):
            y = bn(x)
            assert arrays.same_bytes(y, fastbn.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias))
        assert all(np.array_equal(v, state[k]) for k, v in bn.state_dict().items())

    def test_without_running_statistics_the_batch_decides(self, rng):
        bn = fastbn.BatchNorm(3, track_running_stats=False)
        assert bn.running_mean is None
        assert bn.running_var is None
        assert bn.num_batches_tracked is None
        for mode in (True, False):
            bn.train(mode)
            x = self.batches(rng)[2]
            assert arrays.same_bytes(bn(x), fastbn.batch_norm_forward(x, bn.weight, bn.bias)[0])
            grad_output = x[::-1].copy()
            _, saved = twin.batch_norm_forward(x)
            assert_close(bn.backward(grad_output), twin.batch_norm_backward(grad_output, x, saved)[0], 10)

    def test_without_parameters(self, rng):
        bn, x = fastbn.BatchNorm(3, affine=False), self.batches(rng)[0]
        assert bn.weight is None
        assert bn.bias is None
        assert arrays.same_bytes(bn(x), fastbn.batch_norm_forward(x)[0])
        assert bn.backward(x).shape == x.shape
        assert set(bn.state_dict()) == {"running_mean", "running_var", "num_batches_tracked"}

    def test_residual_and_activation(self, rng):
        bn, (x, residual, grad_output, _) = fastbn.BatchNorm(3, activation="relu"), self.batches(rng)
        y = bn(x, residual)
        expected, saved = fastbn.batch_norm_forward(x, activation="relu", residual=residual)
        assert arrays.same_bytes(y, expected)
        dx, dweight, dbias, dresidual = fastbn.batch_norm_backward(grad_output, x, saved, bn.weight, bn.bias)
        assert arrays.same_bytes(bn.backward(grad_output), dx)
        assert arrays.same_bytes(bn.grad_weight, dweight)
        assert arrays.same_bytes(bn.grad_bias, dbias)
        assert arrays.same_bytes(bn.grad_residual, dresidual)

    def test_an_error_changes_nothing(self, rng):
        bn, x = fastbn.BatchNorm(3), self.batches(rng)[0]
        bn(x)
        state = {k: np.copy(v) for k, v in bn.state_dict().items()}
        for bad in (x[:1, :, :1], x[:, :2], x.astype(int), None, x[0, 0]):
            with pytest.raises((TypeError, ValueError)):
                bn(bad)
        with pytest.raises(ValueError, match="residual"):
            bn(x, x[:1])
        with pytest.raises(ValueError, match="out"):
            bn(x, out=np.empty((1, 3, 11), np.float32))
        assert all(np.array_equal(v, state[k]) for k, v in bn.state_dict().items())

    def test_frozen_is_eval(self, dtype, rng):
        bn = fastbn.BatchNorm(3, activation="relu6", dtype=dtype)
        bn.weight, bn.bias = parameters(rng, 3, dtype)
        for x in self.batches(rng, dtype):
            bn(x)
        op = bn.freeze()
        bn.eval()
        for x in self.batches(rng, dtype):
            assert arrays.same_bytes(op(x), bn(x))
            assert arrays.same_bytes(op(x, residual=x), bn(x, residual=x))
            out = x.copy()
            assert op(out, out=out) is out
            assert arrays.same_bytes(out, bn(x))
