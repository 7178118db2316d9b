"""test_properties -- hypothesis: any shape, any strides, any dtype, any numbers.

Seeded bug that turns it red: an axis of length 1 that breaks the collapsing of its neighbours.
"""

import arrays
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import twin
from arrays import ACTIVATIONS, FLOAT64, normal, parameters
from hypothesis import HealthCheck, assume, given, settings
from tolerance import assert_close, assert_gradients

import fastbn

DTYPES = [d for d in arrays.DTYPES.values() if d is not None]
many = settings(
    max_examples=1000, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
some = settings(many, max_examples=500)


@st.composite
def arrangements(draw, ndim):
    """A composition of arrangements: an order of the axes, steps and flips, a window, alignment."""
    axes = draw(st.sets(st.integers(0, ndim - 1), max_size=2))
    steps = [arrays.stepped(axis, draw(st.sampled_from([-2, -1, 2, 3]))) for axis in axes]
    found = [arrays.permuted(tuple(draw(st.permutations(range(ndim))))), *steps]
    return draw(
        st.sampled_from([*found, arrays.window, arrays.misaligned, arrays.unaligned_to_vectors, arrays.big_endian])
    )


@st.composite
def problems(draw, min_count=2):
    shape = draw(hnp.array_shapes(min_dims=2, max_dims=6, min_side=1, max_side=9))
    if draw(st.booleans()):  # now and then one long axis
        place = draw(st.integers(0, len(shape) - 1))
        shape = (*shape[:place], draw(st.sampled_from([15, 16, 17, 31, 64, 257])), *shape[place + 1 :])
    axis = draw(st.integers(-len(shape), len(shape) - 1))
    size = int(np.prod(shape))
    assume(size <= 20_000 and size // shape[axis] >= min_count)
    dtype, seed = draw(st.sampled_from(DTYPES)), draw(st.integers(0, 1 << 30))
    rng = np.random.default_rng(seed)
    found = [draw(arrangements(len(shape)))(normal(rng, shape, dtype, mean=mean)) for mean in (1, 0, 0)]
    return *found, axis, rng


@many
@given(problems(), st.sampled_from(ACTIVATIONS), st.booleans(), st.booleans())
def test_forward_and_backward(problem, activation, affine, added):
    x, grad_output, residual, axis, rng = problem
    dtype = x.dtype.newbyteorder("=")
    weight, bias = parameters(rng, x.shape[axis], dtype) if affine else (None, None)
    options = {"channel_axis": axis, "activation": activation, "residual": residual if added else None}
    y, saved = fastbn.batch_norm_forward(x, weight, bias, **options)
    expected, reference = twin.batch_norm_forward(x, weight, bias, **options)
    assert y.dtype == dtype
    assert y.strides == np.empty_like(x).strides
    assert_close(y, expected, twin.value_scale(reference, weight, bias, options["residual"]))
    grad_output = twin.off_kinks(grad_output, reference)
    found = fastbn.batch_norm_backward(grad_output, x, saved, weight, bias)
    assert_gradients(found, grad_output, reference, weight)


@many
@given(problems(min_count=1), st.sampled_from(ACTIVATIONS), st.booleans())
def test_normalize(problem, activation, added):
    x, _, residual, axis, rng = problem
    channels = x.shape[axis]
    weight, bias = parameters(rng, channels, x.dtype.newbyteorder("="))
    mean, var = rng.uniform(-1, 1, channels), rng.uniform(0.5, 2, channels)
    options = {"channel_axis": axis, "activation": activation, "residual": residual if added else None}
    y = fastbn.normalize(x, mean, var, weight, bias, **options)
    expected, reference = twin.forward_eval(x, mean, var, weight, bias, **options)
    assert_close(y, expected, twin.value_scale(reference, weight, bias, options["residual"]))


@many
@given(problems(min_count=1))
def test_blocks(problem):
    x, grad_output, _, axis, rng = problem
    m, exact = fastbn.moments(x, channel_axis=axis), twin.moments(x, channel_axis=axis)
    assert m.count == exact.count
    np.testing.assert_allclose(m.mean, exact.mean.astype(float), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(m.m2, exact.m2.astype(float), rtol=1e-6, atol=1e-12)
    sums = fastbn.backward_reduce(grad_output, x, m.mean, channel_axis=axis)
    exact_sums = twin.backward_reduce(grad_output, x, m.mean, channel_axis=axis)
    scale = np.abs(widest(grad_output)).sum() * (1 + np.abs(widest(x)).max())
    for total, wanted in zip(sums, exact_sums, strict=True):
        assert np.abs(total - wanted).max() <= 1e-6 * scale
    weight, _ = parameters(rng, x.shape[axis], x.dtype.newbyteorder("="))
    given = grad_output, x, m.mean, m.var(), weight, *sums, m.count, 1e-2
    dx, expected = fastbn.backward_apply(*given, channel_axis=axis), twin.backward_apply(*given, channel_axis=axis)
    _, saved = twin.forward_eval(x, m.mean, m.var(), None, None, 1e-2, channel_axis=axis)
    saved.count = m.count
    assert_close(dx, expected, twin.gradient_scales(grad_output, saved, weight)[0])


def widest(x):
    return x.astype(np.float64)


@many
@given(st.data())
def test_any_numbers(data):
    """NaN, infinities, subnormals, the largest: every channel is computed as if it were alone."""
    dtype = data.draw(st.sampled_from([d for d in DTYPES if d.kind == "f"]))
    shape = data.draw(hnp.array_shapes(min_dims=2, max_dims=4, min_side=1, max_side=6))
    axis = data.draw(st.integers(0, len(shape) - 1))
    assume(np.prod(shape) // shape[axis] > 1)
    x = data.draw(hnp.arrays(dtype, shape, elements=hnp.from_dtype(dtype)))
    y, saved = fastbn.batch_norm_forward(x, channel_axis=axis)
    dx, _, _ = fastbn.batch_norm_backward(np.ones_like(x), x, saved)
    rows, results = np.moveaxis(x, axis, 0), np.moveaxis(y, axis, 0)
    for channel, result, gradient in zip(rows, results, np.moveaxis(dx, axis, 0), strict=True):
        if not np.isfinite(channel).all():
            assert np.isnan(result).all()
        elif (channel == channel.flat[0]).all():
            assert not result.any()
            assert not gradient.any()
        elif dtype != FLOAT64 or np.abs(channel).max() < 1e150:
            assert np.isfinite(result).all()
            assert np.isfinite(gradient).all()
            # Cauchy-Schwarz: no element is further out than this.
            assert np.abs(result.astype(float)).max() <= np.sqrt(channel.size) * (1 + 2e-3)


@some
@given(problems(), st.integers(1, 6), st.integers(0, 200))
def test_in_place_and_overlapping(problem, parts, shift):
    """An out over x, wherever it begins, holds what a separate out holds."""
    x, _, _, axis, _ = problem
    x = np.ascontiguousarray(x, x.dtype.newbyteorder("="))
    expected, _ = fastbn.batch_norm_forward(x, channel_axis=axis)
    raw = np.zeros(x.size + shift, x.dtype)
    first, second = raw[: x.size].reshape(x.shape), raw[shift:].reshape(x.shape)
    if parts % 2:
        first, second = second, first
    first[...] = x
    y, _ = fastbn.batch_norm_forward(first, channel_axis=axis, out=second)
    assert arrays.same_bytes(y, expected)


@some
@given(problems(), st.data())
def test_moments_of_parts(problem, data):
    """Merged in any split, along any axis but the channels', the moments are those of the whole."""
    x, _, _, axis, _ = problem
    along = data.draw(st.sampled_from(twin.others(x, axis)))
    cuts = data.draw(st.lists(st.integers(0, x.shape[along]), max_size=4).map(sorted))
    parts = [fastbn.moments(p, channel_axis=axis) for p in np.split(x, cuts, axis=along)]
    whole, merged = twin.moments(x, channel_axis=axis), parts[0]
    for part in parts[1:]:
        merged = merged + part
    assert merged.count == whole.count
    np.testing.assert_allclose(merged.mean, whole.mean.astype(float), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(merged.m2, whole.m2.astype(float), rtol=1e-5, atol=1e-9)
