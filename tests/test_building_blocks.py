"""test_building_blocks -- moments, normalize, backward_reduce and backward_apply, alone and put together.

Seeded bug that turns it red: the merge of two moments forgets the term of the difference of the means.
"""

import functools
import operator
import pickle

import arrays
import numpy as np
import pytest
import twin
from arrays import ACTIVATIONS, FLOAT64, normal, parameters
from test_forward import SIZES
from tolerance import assert_close, epsilon

import fastbn


def assert_moments(found, expected, dtype):
    unit, std = epsilon(arrays.parameter_dtype(dtype)), np.sqrt(expected.var())
    assert found.count == expected.count
    assert found.mean.dtype == found.m2.dtype == np.float64
    assert np.all(np.abs(found.m2 - expected.m2) <= 3 * unit * expected.m2)
    assert np.all(np.abs(found.mean - expected.mean) <= 3 * unit * std + np.abs(expected.mean) * epsilon(FLOAT64))


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes(isa, dtype, layout, size, rng):
    shape, axis = layout(*size)
    x, grad_output = normal(rng, shape, dtype, mean=3, std=2), normal(rng, shape, dtype)
    weight, _ = parameters(rng, size[1], dtype)
    found, expected = fastbn.moments(x, channel_axis=axis), twin.moments(x, channel_axis=axis)
    assert_moments(found, expected, dtype)

    mean, var = found.mean, found.var()
    sums = fastbn.backward_reduce(grad_output, x, mean, channel_axis=axis)
    references = twin.backward_reduce(grad_output, x, mean, channel_axis=axis)
    scales = twin.backward_reduce(
        np.abs(grad_output), np.abs(x - mean.reshape(twin.along(mean, x, axis).shape)), 0 * mean, channel_axis=axis
    )
    for total, reference, scale in zip(sums, references, scales, strict=True):
        assert total.dtype == np.float64
        assert np.all(np.abs(total - reference) <= 3 * epsilon(arrays.parameter_dtype(dtype)) * scale)

    count = found.count
    dx = fastbn.backward_apply(grad_output, x, mean, var, weight, *sums, count, channel_axis=axis)
    reference = twin.backward_apply(grad_output, x, mean, var, weight, *sums, count, channel_axis=axis)
    _, saved = twin.forward_eval(x, mean, var, channel_axis=axis)
    saved.count = count
    assert dx.dtype == dtype
    assert_close(dx, reference, twin.gradient_scales(grad_output, saved, weight)[0])


def rounded_mean(saved, weight):
    """What rounding a mean to float64 can move y by: nothing for narrower data."""
    if saved.mean.dtype == np.float64:
        return 0.0
    moved = np.abs(saved.mean / np.sqrt(saved.var + saved.eps) * weight)
    return moved.reshape(twin.along(moved, saved.centred, saved.channel_axis).shape)


@pytest.mark.parametrize("size", [(4, 5, 37), (6, 20, 33 * 33), (2, 3, 3 * 4096 + 5)], ids=str)
def test_composition_is_the_fused_call(isa, dtype, layout, size, rng):
    """In bits, up to the part of the mean that a float64 cannot hold: for float64 data, within the tolerance."""
    shape, axis = layout(*size)
    x, grad_output = normal(rng, shape, dtype, mean=1), normal(rng, shape, dtype)
    weight, bias = parameters(rng, size[1], dtype)
    y, saved = fastbn.batch_norm_forward(x, weight, bias, channel_axis=axis)
    dx, dweight, dbias = fastbn.batch_norm_backward(grad_output, x, saved, weight, bias)

    m = fastbn.moments(x, channel_axis=axis)
    assert np.array_equal(m.mean, saved.mean)
    assert np.array_equal(m.var(), saved.var)
    y2 = fastbn.normalize(x, m.mean, m.var(), weight, bias, channel_axis=axis)
    sum_dy, sum_dy_xmu = fastbn.backward_reduce(grad_output, x, m.mean, channel_axis=axis)
    dx2 = fastbn.backward_apply(grad_output, x, m.mean, m.var(), weight, sum_dy, sum_dy_xmu, m.count, channel_axis=axis)
    expected, reference = twin.batch_norm_forward(x, weight, bias, channel_axis=axis)
    scales = twin.gradient_scales(grad_output, reference, weight)
    gradients = twin.batch_norm_backward(grad_output, x, reference, weight, bias)
    assert_close(y2, expected, twin.value_scale(reference, weight, bias) + rounded_mean(reference, weight))
    assert_close(dx2, gradients[0], scales[0])
    assert_close((sum_dy_xmu / np.sqrt(m.var() + 1e-5)).astype(dweight.dtype), gradients[1], scales[1])
    assert_close(sum_dy.astype(dbias.dtype), gradients[2], scales[2])
    if dtype != FLOAT64:
        assert arrays.same_bytes(y, y2)
        assert_close(dx2, dx.astype(np.float64), scales[0])
        assert_close(sum_dy.astype(dbias.dtype), dbias.astype(np.float64), scales[2])


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_normalize_with_everything(isa, dtype, layout, activation, rng):
    shape, axis = layout(5, 6, 77)
    x, residual = normal(rng, shape, dtype), normal(rng, shape, dtype)
    weight, bias = parameters(rng, 6, dtype)
    mean, var = rng.standard_normal(6), rng.uniform(0.5, 2, 6)
    options = {"channel_axis": axis, "activation": activation, "negative_slope": 0.1, "residual": residual}
    y = fastbn.normalize(x, mean, var, weight, bias, 1e-3, **options)
    expected, saved = twin.forward_eval(x, mean, var, weight, bias, 1e-3, **options)
    assert_close(y, expected, twin.value_scale(saved, weight, bias, residual))


@pytest.mark.parametrize("parameter_dtype", [np.float32, np.float64], ids=["params32", "params64"])
def test_parameters_of_either_precision(dtype, layout, parameter_dtype, rng):
    """float64 parameters are used as they are, whatever the data's dtype."""
    shape, axis = layout(5, 6, 40)
    x = normal(rng, shape, dtype)
    mean, var, weight, bias = (rng.uniform(0.5, 1.5, 6).astype(parameter_dtype) for _ in range(4))
    y = fastbn.normalize(x, mean, var, weight, bias, channel_axis=axis)
    expected, saved = twin.forward_eval(x, mean, var, weight, bias, channel_axis=axis)
    assert_close(y, expected, twin.value_scale(saved, weight, bias))
    assert y.dtype == dtype


def test_count_may_be_larger_than_here(isa, dtype, layout, rng):
    """Synchronized: the sums and the count come from several machines."""
    shape, axis = layout(4, 5, 50)
    x, grad_output = normal(rng, shape, dtype), normal(rng, shape, dtype)
    mean, var, weight = rng.standard_normal(5) / 9, rng.uniform(0.5, 2, 5), rng.uniform(0.5, 1, 5)
    sums = rng.standard_normal(5) * 100, rng.standard_normal(5) * 100
    for count in (1, 200, 12345, 1 << 40):
        assert_close(
            fastbn.backward_apply(grad_output, x, mean, var, weight, *sums, count, 1e-4, channel_axis=axis),
            twin.backward_apply(grad_output, x, mean, var, weight, *sums, count, 1e-4, channel_axis=axis),
            400 if count == 1 else 4,
        )


def split(x, axis, parts):
    return [np.ascontiguousarray(p) for p in np.array_split(x, parts, axis=0 if axis != 0 else 1)]


@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("parts", [2, 3, 7])
def test_moments_merge(dtype, layout, parts, offset, rng):
    shape, axis = layout(21, 4, 63)
    x = normal(rng, shape, dtype, mean=offset)
    pieces = [fastbn.moments(p, channel_axis=axis) for p in split(x, axis, parts)]
    merged = functools.reduce(operator.add, pieces)
    expected = twin.moments(x, channel_axis=axis)
    # Each piece's mean is a float64: that rounding, squared, is all a merge may add.
    assert merged.count == expected.count
    unit = epsilon(arrays.parameter_dtype(dtype))
    rounding = parts * epsilon(FLOAT64) * (np.abs(expected.mean) + 1)
    std = np.sqrt(expected.var())
    assert np.all(np.abs(merged.mean - expected.mean) <= 3 * unit * std + rounding)
    assert np.all(
        np.abs(merged.m2 - expected.m2) <= 3 * unit * expected.m2 + merged.count * (rounding * std + rounding**2)
    )


def test_merge_of_unequal_and_distant_parts(rng):
    """One element against many, and means far apart: the term that a naive average of variances forgets."""
    x = np.concatenate([normal(rng, (1, 3, 1), FLOAT64), normal(rng, (999, 3, 1), FLOAT64, mean=50)])
    for cut in (1, 10, 990):
        a, b = fastbn.moments(x[:cut]), fastbn.moments(x[cut:])
        whole = twin.moments(x)
        for merged in (a + b, b + a):
            np.testing.assert_allclose(merged.m2, whole.m2.astype(float), rtol=1e-13)
            np.testing.assert_allclose(merged.mean, whole.mean.astype(float), rtol=1e-14)


def test_empty_moments_are_neutral(rng):
    x = normal(rng, (5, 3, 4), np.float32)
    some, none = fastbn.moments(x), fastbn.moments(x[:0])
    assert none.count == 0
    for merged in (some + none, none + some):
        assert merged.count == some.count
        assert np.array_equal(merged.mean, some.mean)
        assert np.array_equal(merged.m2, some.m2)


def test_var_and_ddof(rng):
    x = normal(rng, (5, 3, 4), FLOAT64)
    m = fastbn.moments(x)
    np.testing.assert_allclose(m.var(), x.var(axis=(0, 2)), rtol=1e-14)
    np.testing.assert_allclose(m.var(ddof=1), x.var(axis=(0, 2), ddof=1), rtol=1e-14)
    np.testing.assert_allclose(m.var(1), x.var(axis=(0, 2), ddof=1), rtol=1e-14)


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_moments_pickle(protocol, rng):
    m = fastbn.moments(normal(rng, (5, 3, 4), np.float32, mean=1e4))
    copy = pickle.loads(pickle.dumps(m, protocol))
    assert copy.count == m.count
    assert copy.mean.tobytes() == m.mean.tobytes()
    assert copy.m2.tobytes() == m.m2.tobytes()
    assert (copy + m).count == 2 * m.count


def test_merge_refuses_what_does_not_fit(rng):
    m = fastbn.moments(normal(rng, (5, 3, 4), np.float32))
    with pytest.raises(ValueError, match=r"3.*4|4.*3"):
        m + fastbn.moments(normal(rng, (5, 4, 4), np.float32))
    for other in (1, None, (1, 2, 3)):
        with pytest.raises(TypeError):
            m + other


def test_synchronized_batch_norm_from_the_blocks(dtype, rng):
    """Two machines, unequal shares and one of them empty: the same as one machine with everything."""
    x, grad_output = normal(rng, (11, 4, 29), dtype, mean=5), normal(rng, (11, 4, 29), dtype)
    weight, bias = parameters(rng, 4, dtype)
    shares = [slice(0, 3), slice(3, 3), slice(3, 11)]
    merged = functools.reduce(operator.add, (fastbn.moments(x[s]) for s in shares))
    expected, saved = twin.batch_norm_forward(x, weight, bias)
    y = np.concatenate([fastbn.normalize(x[s], merged.mean, merged.var(), weight, bias) for s in shares])
    assert_close(y, expected, twin.value_scale(saved, weight, bias) + rounded_mean(saved, weight))
    sums = np.sum([fastbn.backward_reduce(grad_output[s], x[s], merged.mean) for s in shares], axis=0)
    dx = np.concatenate([
        fastbn.backward_apply(grad_output[s], x[s], merged.mean, merged.var(), weight, *sums, merged.count)
        for s in shares
    ])  # fmt: skip
    assert_close(
        dx,
        twin.batch_norm_backward(grad_output, x, saved, weight, bias)[0],
        twin.gradient_scales(grad_output, saved, weight)[0],
    )
