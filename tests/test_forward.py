"""test_forward -- y and its statistics against the twin, over sizes, dtypes, layouts and fused operations.

Seeded bug that turns it red: the last lanes of a run that is no multiple of 16 are left out of the sums.
"""

import arrays
import numpy as np
import pytest
import twin
from arrays import ACTIVATIONS, normal, parameters
from tolerance import assert_close, epsilon

import fastbn

# (outer, channels, inner): powers of two and their neighbours, one lane and one block more or less.
SIZES = [
    (2, 1, 1),
    (3, 2, 1),
    (60, 100, 1),
    (17, 3, 1),
    (1, 3, 2),
    (1, 1, 15),
    (2, 2, 16),
    (2, 3, 17),
    (5, 7, 31),
    (4, 15, 33),
    (3, 16, 49),
    (2, 17, 49),
    (2, 31, 63),
    (9, 33, 64),
    (2, 64, 65),
    (8, 65, 196),
    (5, 128, 7),
    (3, 257, 4),
    (2, 1025, 3),
    (1, 2, 4095),
    (1, 1, 4096),
    (2, 2, 4097),
    (3, 3, 3 * 4096 + 1),
    (5, 3, 4097),
    (7, 2, 2 * 4096 + 9),
    (4097, 2, 1),
    (2 * 4096 + 5, 17, 1),
    (700, 5, 13),
]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes(isa, dtype, layout, size, rng):
    """Red where planes are counted that are not there, or one run is summed as if it were four."""
    shape, axis = layout(*size)
    x = normal(rng, shape, dtype, mean=2)
    weight, bias = parameters(rng, size[1], dtype)
    before = x.copy()
    y, saved = fastbn.batch_norm_forward(x, weight, bias, channel_axis=axis)
    expected, statistics = twin.batch_norm_forward(x, weight, bias, channel_axis=axis)
    assert y.dtype == dtype
    scale = twin.value_scale(statistics, weight, bias)
    assert_close(y, expected, scale)
    assert_statistics(saved, statistics, dtype)
    assert arrays.same_bytes(x, before)

    mean, var = statistics.mean.astype(weight.dtype), statistics.var.astype(weight.dtype)
    assert_close(
        fastbn.normalize(x, mean, var, weight, bias, channel_axis=axis),
        twin.normalize(x, mean, var, weight, bias, channel_axis=axis),
        scale,
    )


@pytest.mark.parametrize("inner", [255 * 4096 + 49, 1_015_921], ids=str)
def test_a_long_plane_whose_last_piece_is_short(isa, inner, rng):
    """Red when what is short is asked of a piece and not of the plane."""
    x = normal(rng, (1, 2, inner), arrays.FLOAT32, mean=2)
    y, saved = fastbn.batch_norm_forward(x, activation="relu")
    expected, statistics = twin.batch_norm_forward(x, activation="relu")
    assert_statistics(saved, statistics, x.dtype)
    assert_close(y, expected, twin.value_scale(statistics, None, None))
    sums = fastbn.backward_reduce(x, x, saved.mean)
    wide = x.astype(np.float64) - statistics.mean[:, None]
    np.testing.assert_allclose(sums[0], x.sum((0, 2), np.float64), rtol=1e-6)
    np.testing.assert_allclose(sums[1], (x * wide).sum((0, 2)), rtol=1e-6)


def assert_statistics(saved, expected, dtype):
    """The variance to the precision of the parameters, the mean to that of the deviations it is subtracted for."""
    unit = epsilon(arrays.parameter_dtype(dtype))
    assert saved.count == expected.count
    assert saved.mean.dtype == saved.var.dtype == np.float64
    assert np.all(np.abs(saved.var - expected.var) <= 3 * unit * expected.var)
    rounding = np.abs(expected.mean) * epsilon(arrays.FLOAT64)
    assert np.all(np.abs(saved.mean - expected.mean) <= 3 * unit * np.sqrt(expected.var) + rounding)


@pytest.mark.parametrize("mode", ["training", "inference"])
@pytest.mark.parametrize("affine", ["plain", "weight", "bias", "both"])
@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_fused(isa, dtype, layout, activation, residual, affine, mode, rng):
    shape, axis = layout(3, 19, 37)
    x = normal(rng, shape, dtype, mean=-1, std=3)
    weight, bias = parameters(rng, 19, dtype)
    weight = weight * 3 if affine in ("weight", "both") else None  # far enough to reach 6
    bias = bias if affine in ("bias", "both") else None
    options = {"channel_axis": axis, "activation": activation, "negative_slope": 0.2}
    options["residual"] = normal(rng, shape, dtype) if residual else None
    if mode == "training":
        y, _ = fastbn.batch_norm_forward(x, weight, bias, **options)
        expected, saved = twin.batch_norm_forward(x, weight, bias, **options)
    else:
        mean = rng.uniform(-2, 0, 19).astype(arrays.parameter_dtype(dtype))
        var = rng.uniform(6, 12, 19).astype(arrays.parameter_dtype(dtype))
        y = fastbn.normalize(x, mean, var, weight, bias, **options)
        expected, saved = twin.forward_eval(x, mean, var, weight, bias, **options)
    assert_close(y, expected, twin.value_scale(saved, weight, bias, options["residual"]))
    if activation == "relu6" and weight is not None:
        assert np.any(y == 6)


@pytest.mark.parametrize("size", [(8, 24, 40 * 40), (4, 5, 5 * 4096 + 3), (3000, 70, 1)], ids=str)
def test_large(isa, threads, dtype, layout, size, rng):
    """Large enough for a team."""
    shape, axis = layout(*size)
    x = normal(rng, shape, dtype, mean=1)
    weight, bias = parameters(rng, size[1], dtype)
    y, saved = fastbn.batch_norm_forward(x, weight, bias, channel_axis=axis, activation="relu")
    expected, statistics = twin.batch_norm_forward(x, weight, bias, channel_axis=axis, activation="relu")
    assert_close(y, expected, twin.value_scale(statistics, weight, bias))
    assert_statistics(saved, statistics, dtype)


def test_saved_is_what_was_asked_for(dtype, rng):
    x = normal(rng, (4, 3, 5), dtype)
    _, saved = fastbn.batch_norm_forward(
        x, eps=1e-3, channel_axis=-1, activation="leaky_relu", negative_slope=0.3, residual=x
    )
    assert (saved.count, saved.eps, saved.activation, saved.negative_slope) == (12, 1e-3, "leaky_relu", 0.3)
    assert saved.channel_axis % 3 == 2
    assert saved.has_residual
    with pytest.raises((AttributeError, TypeError)):
        saved.count = 3
    with pytest.raises(ValueError, match="read-only"):
        saved.mean[0] = 0


@pytest.mark.parametrize("eps", [0.0, 1e-12, 1e-5, 1e-3, 1.0])
def test_eps(isa, dtype, layout, eps, rng):
    shape, axis = layout(6, 4, 50)
    x = normal(rng, shape, dtype, std=4)
    assert_close(
        fastbn.batch_norm_forward(x, eps=eps, channel_axis=axis)[0],
        twin.batch_norm_forward(x, eps=eps, channel_axis=axis)[0],
    )


@pytest.mark.parametrize("negative_slope", [0.0, 0.01, 1.0, 2.0, -0.5])
def test_negative_slope(isa, dtype, layout, negative_slope, rng):
    shape, axis = layout(4, 3, 21)
    x = normal(rng, shape, dtype)
    options = {"channel_axis": axis, "activation": "leaky_relu", "negative_slope": negative_slope}
    assert_close(fastbn.batch_norm_forward(x, **options)[0], twin.batch_norm_forward(x, **options)[0])
