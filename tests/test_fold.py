"""test_fold.py -- folding: the folded layer computes what the layer and its batch norm computed."""

import itertools

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import fastbn


def conv(x, weight, bias, groups=1):
    """A convolution over any number of spatial dimensions, in the plainest way."""
    kernel, out_channels = weight.shape[2:], weight.shape[0]
    size = [n - k + 1 for n, k in zip(x.shape[2:], kernel, strict=True)]
    y = np.zeros((len(x), out_channels, *size))
    inputs, outputs = x.shape[1] // groups, out_channels // groups
    for g, at in itertools.product(range(groups), np.ndindex(*kernel)):
        window = (slice(None), slice(g * inputs, (g + 1) * inputs), *(slice(a, a + n) for a, n in zip(at, size)))  # noqa: B905
        rows = slice(g * outputs, (g + 1) * outputs)
        y[:, rows] += np.einsum("ni...,oi->no...", x[window], weight[(rows, slice(None), *at)])
    return y + bias.reshape(-1, *[1] * len(kernel))


def conv_transposed(x, weight, bias, groups=1):
    kernel, inputs, outputs = weight.shape[2:], x.shape[1] // groups, weight.shape[1]
    y = np.zeros((len(x), groups * outputs, *(n + k - 1 for n, k in zip(x.shape[2:], kernel, strict=True))))
    for g, at in itertools.product(range(groups), np.ndindex(*kernel)):
        rows = slice(g * inputs, (g + 1) * inputs)
        goal = (slice(None), slice(g * outputs, (g + 1) * outputs), *(slice(a, a + n) for a, n in zip(at, x.shape[2:])))  # noqa: B905
        y[goal] += np.einsum("ni...,io->no...", x[:, rows], weight[(rows, slice(None), *at)])
    return y + bias.reshape(-1, *[1] * len(kernel))


def norm(channels, seed=0, **settings):
    rng = np.random.default_rng(seed)
    bn = fastbn.BatchNorm(channels, 1e-3, dtype="float64", **settings)
    if bn.affine:
        bn.weight, bn.bias = rng.normal(size=(2, channels))
    bn.running_mean, bn.running_var = rng.normal(size=channels), rng.uniform(0.1, 4, size=channels)
    return bn.eval()


def with_(name, value):
    """A layer of four channels with one number in it changed."""
    bn = norm(4)
    getattr(bn, name)[2] = value
    return bn


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("rank", [0, 1, 2, 3])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_the_folded_convolution_computes_the_same(rank, groups, transposed, with_bias, affine):
    """Seeded bugs: the input axis scaled; groups of a transposed weight in the wrong order; the bias not scaled."""
    rng = np.random.default_rng(rank)
    shape = (8, 12 // groups) if transposed else (12, 8 // groups)
    weight = rng.normal(size=(*shape, *(2, 3, 2)[:rank]))
    bias = rng.normal(size=12) if with_bias else None
    x, bn = rng.normal(size=(2, 8, *(4, 5, 3)[:rank])), norm(12, affine=affine)
    run = conv_transposed if transposed else conv
    expected = bn(run(x, weight, np.zeros(12) if bias is None else bias, groups))
    before = weight.copy()
    for form in (bn, bn.freeze(), (bn.running_mean, bn.running_var, bn.weight, bn.bias, bn.eps)):
        new_weight, new_bias = fastbn.fold_conv(weight, bias, form, transposed=transposed, groups=groups)
        assert new_weight.shape == weight.shape
        assert_allclose(run(x, new_weight, new_bias, groups), expected, rtol=0, atol=1e-12)
    assert_array_equal(weight, before)


@pytest.mark.parametrize("transposed", [False, True])
def test_the_folded_linear_layer_computes_the_same(transposed):
    rng = np.random.default_rng(0)
    weight, bias, x, bn = rng.normal(size=(6, 4)), rng.normal(size=6), rng.normal(size=(9, 4)), norm(6)
    expected = bn(x @ weight.T + bias)
    new_weight, new_bias = fastbn.fold_linear(weight.T if transposed else weight, bias, bn, transposed=transposed)
    assert_allclose(x @ (new_weight if transposed else new_weight.T) + new_bias, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_folding_rounds_once(dtype):
    """Seeded bug: a scale rounded to the weight's dtype."""
    pytest.importorskip("ml_dtypes")
    bn, rng = norm(5), np.random.default_rng(0)
    weight, bias = rng.normal(size=(5, 7, 3)).astype(dtype), rng.normal(size=5).astype(dtype)
    new_weight, new_bias = fastbn.fold_conv(weight, bias, bn)
    scale = bn.weight / np.sqrt(bn.running_var + bn.eps)
    assert_array_equal(new_weight, (weight.astype("f8") * scale[:, None, None]).astype(dtype))
    assert_array_equal(new_bias, ((bias.astype("f8") - bn.running_mean) * scale + bn.bias).astype(dtype))
    assert (new_weight.dtype, new_bias.dtype) == (weight.dtype, weight.dtype)
    assert fastbn.fold_conv(weight, None, bn)[1].dtype == weight.dtype
    assert fastbn.fold_conv(weight, bias.astype("f4"), bn)[1].dtype == np.float32


def test_folding_to_bfloat16_rounds_once():
    """Seeded bug: the cast of ml_dtypes alone, which by way of float32 meets ties of its own making."""
    bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
    rng = np.random.default_rng(0)
    exact = np.concatenate([
        # A hair beside every tie between 1 and 2, of float32's last normal and first subnormal numbers, and others.
        *(side * np.ldexp(1 + (2 * np.arange(128) + 1) / 256 + hair, exponent)
          for side in (1, -1) for hair in (2.0**-40, -(2.0**-40), 0.0) for exponent in (0, 126, -126)),
        np.ldexp(1.0, -134) * (np.arange(1, 256) + 2.0**-30),
        [0.0, -0.0, 2.0**-134, 2.0**-200, np.ldexp(2 - 2.0**-8, 127) * (1 - 2.0**-40)],
        np.ldexp(rng.uniform(1, 2, 4000), rng.integers(-140, 127, 4000)),
    ])  # fmt: skip
    one, shift = np.ones((exact.size, 1), bfloat16), np.zeros(exact.size, bfloat16)
    weight, bias = fastbn.fold_conv(one, shift, (np.zeros(exact.size), np.ones(exact.size), exact, exact, 0.0))
    # Among bfloat16's numbers the nearest, and of two that are as near the even one.
    numbers = np.arange(0x7F80, dtype=np.uint16)
    values = numbers.view(bfloat16).astype(np.float64)
    ties = (values[:-1] + values[1:]) / 2
    found = np.searchsorted(ties, abs(exact), side="left")
    tied = np.append(ties, np.inf)[found] == abs(exact)
    expected = (numbers[found + (tied & (found % 2 == 1))]).view(bfloat16).astype(np.float64)
    assert tied.sum() > 300
    assert_array_equal(abs(weight[:, 0].astype(np.float64)), expected)
    assert_array_equal(bias.astype(np.float64), np.copysign(expected, exact))


def test_a_shared_weight_stays_as_it_is():
    """Seeded bug: folding in place, after which the second layer is folded twice."""
    weight, bias = np.random.default_rng(0).normal(size=(4, 3, 2, 2)), np.ones(4)
    before = weight.copy()
    identity = np.zeros(4), np.ones(4), None, None, 0.0
    same = fastbn.fold_conv(weight, bias, identity)
    assert_array_equal(same[0], weight)
    assert not np.shares_memory(same[0], weight)
    assert not np.shares_memory(same[1], bias)
    first, second = (fastbn.fold_conv(weight, bias, norm(4, seed))[0] for seed in (0, 1))
    assert_array_equal(weight, before)
    assert_array_equal(first, fastbn.fold_conv(before, bias, norm(4, 0))[0])
    assert not np.array_equal(first, second)


WEIGHT = np.ones((4, 3, 2, 2), np.float32)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"weight": np.ones((4, 3), int)}, TypeError, "weight must be a floating array, got int64"),
        ({"weight": np.ones(4)}, ValueError, "weight must have at least 2 dimensions, got 1"),
        ({"weight": None}, TypeError, "weight must be a floating array, got object"),
        ({"bias": np.ones(3)}, ValueError, r"bias must have shape \(4,\), got \(3,\)"),
        ({"bias": [1, 2, 3, 4]}, TypeError, "bias must be a floating array, got int64"),
        ({"bn": norm(3)}, ValueError, "bn must have the 4 output channels of weight, got 3"),
        ({"bn": norm(4), "transposed": True}, ValueError, "bn must have the 3 output channels of weight, got 4"),
        ({"bn": norm(6), "transposed": True, "groups": 3}, ValueError, "divide the 4 input channels of weight, got 3"),
        ({"bn": norm(4), "transposed": True, "groups": 0}, ValueError, r"groups must be from 1 to 2\*\*63 - 1, got 0"),
        ({"bn": norm(4), "groups": 3}, ValueError, "groups must divide the 4 output channels of weight, got 3"),
        ({"groups": 2.0}, TypeError, "groups must be an integer, got float"),
        ({"groups": True}, TypeError, "groups must be an integer, got bool"),
        ({"transposed": 1}, TypeError, "transposed must be a bool, got int"),
        ({"bn": (np.ones(4), np.ones(4), None, None, "1e-5")}, TypeError, "bn's eps must be a real number, got str"),
        ({"bn": (np.ones(4), np.ones(4), None, None, None)}, TypeError, "bn's eps must be a real number, got NoneType"),
        ({"bn": (np.ones(4), np.ones(4), None, None, -1.0)}, ValueError, "must be finite and not negative, got -1.0"),
        ({"bn": (np.ones(4), np.ones(4), None, None, np.nan)}, ValueError, "bn's eps must be finite and not"),
        ({"bn": (np.ones(4), np.ones(4), None, None, True)}, TypeError, "bn's eps must be a real number, got bool"),
        ({"bn": (np.ones(4), "variance", None, None, 0.0)}, TypeError, "bn's var must be an array of real numbers"),
        ({"bn": fastbn.BatchNorm(4, activation="relu")}, ValueError, "activation 'relu', which cannot be folded"),
        ({"bn": fastbn.BatchNorm(4, activation="relu").freeze()}, ValueError, "activation 'relu'"),
        ({"bn": fastbn.BatchNorm(4, track_running_stats=False)}, ValueError, "must have running statistics, got None"),
        ({"bn": (np.ones(4), np.ones(4))}, ValueError, r"bn must be \(mean, var, weight, bias, eps\), got 2 values"),
        ({"bn": (np.ones(4), np.ones(3), None, None, 0.0)}, ValueError, r"bn's var must have shape \(4,\)"),
        ({"bn": None}, TypeError, r"bn must be a batch norm or \(mean, var, weight, bias, eps\), got NoneType: "),
        ({"bn": (np.ones(4), np.array([1.0, 1.0, 0.0, 0.0]), None, None, 0.0)}, ValueError,
         "bn's var must be positive where bn's eps is 0, got 0.0 in channel 2"),
        ({"bn": (np.ones(4), -np.ones(4), None, None, 2.0)}, ValueError, "bn's var must not be negative, got -1.0"),
        ({"bn": with_("running_var", -1e-3)}, ValueError, "bn's running_var must not be negative, got -0.001"),
        ({"bn": with_("running_var", np.nan)}, ValueError, "bn's running_var must be finite in float64, got 1 values"),
        ({"bn": with_("running_mean", np.inf)}, ValueError, "bn's running_mean must be finite"),
        ({"bn": with_("weight", np.nan)}, ValueError, "bn's weight must be finite"),
        ({"bn": with_("bias", -np.inf)}, ValueError, "bn's bias must be finite"),
        ({"bn": (np.ones(4), np.full(4, 1e-20), np.full(4, 1e300), None, 0.0)}, ValueError,
         "folded weight has 48 values that are not finite in float32"),
        ({"weight": WEIGHT.astype("f2"), "bn": (np.ones(4), np.array([1, 1e-12, 1, 1]), None, None, 0.0)},
         ValueError, "folded weight has 12 values that are not finite in float16"),
    ],
)  # fmt: skip
def test_what_cannot_be_folded_is_an_error(arguments, error, message):
    """Seeded bugs: an activation that is dropped; an infinity in float16; a statistic that is not looked at, so that
    the folded weight is blamed.
    """
    with pytest.raises(error, match=message):
        fastbn.fold_conv(**{"weight": WEIGHT, "bias": None, "bn": norm(4), **arguments})


def test_what_the_others_cannot_take_is_an_error():
    with pytest.raises(ValueError, match="weight must have 2 dimensions, got 4"):
        fastbn.fold_linear(WEIGHT, None, norm(4))
    with pytest.raises(TypeError, match="transposed must be a bool, got str"):
        fastbn.fold_linear(WEIGHT[:, :, 0, 0], None, norm(4), transposed="no")
    for tolerance, error in [("0.1", TypeError), (None, TypeError), (-0.1, ValueError), (np.nan, ValueError)]:
        with pytest.raises(error, match="tolerance must be "):
            fastbn.fold_report(WEIGHT, None, norm(4), tolerance=tolerance)
    for name, value in [("groups", 0), ("groups", None), ("transposed", None)]:
        with pytest.raises((TypeError, ValueError), match=f"{name} must "):
            fastbn.fold_report(WEIGHT, None, norm(4), **{name: value})
    for strict in (None, 0, "no"):
        with pytest.raises(TypeError, match="strict must be a bool, got "):
            norm(4).load_state_dict(norm(4).state_dict(), strict)


@pytest.mark.parametrize(("transposed", "groups"), [(False, 1), (False, 2), (True, 1), (True, 2)])
def test_the_report_tells_the_scale_of_every_channel(transposed, groups):
    """Seeded bug: channels of a transposed or grouped weight mixed up."""
    rng = np.random.default_rng(0)
    channels, inputs = 6, 4
    weight = rng.normal(size=(inputs, channels // groups, 3) if transposed else (channels, inputs // groups, 3))
    scale = np.array([1.0, 2.0, -0.5, 0.1, 10.0, 0.0])
    bn = np.zeros(channels), np.ones(channels), scale, None, 0.0
    report = fastbn.fold_report(weight, None, bn, transposed=transposed, groups=groups)
    assert_allclose(report.change, abs(scale - 1), rtol=1e-13)
    assert_allclose(report.range_after, report.range_before * abs(scale), rtol=1e-13)
    assert (report.rounding == 0).all()
    assert report.spread_after == np.inf
    for g, i in itertools.product(range(groups), range(channels // groups)):
        mine = weight[g * inputs // groups : (g + 1) * inputs // groups, i] if transposed else weight[g * 3 + i]
        if transposed or groups == 2:
            assert report.range_before[g * (channels // groups) + i] == abs(mine).max()


@pytest.mark.parametrize("size", [2.0**-1000, 2.0**-600, 2.0**600, 2.0**1020])
def test_the_report_does_not_depend_on_the_size_of_the_weights(size):
    """Seeded bug: squares that vanish or overflow, so that a layer of NaN or 0 errors fits, or none does."""
    weight = np.random.default_rng(0).uniform(0.2, 1, size=(4, 30)) * [[1], [-2], [1], [4]]
    bn = np.zeros(4), np.array([1.0, 1.0, 4.0, 256.0]), None, None, 0.0
    with np.errstate(all="raise"):
        plain, scaled = (fastbn.fold_report(w, None, bn) for w in (weight, weight * size))
    for name in ("change", "int8_error_before", "int8_error_after", "int8_channel_error_after"):
        assert_array_equal(getattr(scaled, name), getattr(plain, name))
    assert (scaled.int8_error_before > 1e-4).all()


def test_the_report_tells_of_channels_that_are_nothing_beside_the_others():
    """Seeded bug: every channel scaled by the range of the tensor."""
    weight = np.random.default_rng(0).normal(size=(3, 30)) * [[1e-300], [0], [1e300]]
    report = fastbn.fold_report(weight, None, (np.zeros(3), np.ones(3), None, None, 0.0))
    assert report.int8_error_after[:2].tolist() == [1, 0]
    assert 0 < report.int8_error_after[2] < 0.01
    assert report.fits_int8_per_channel
    assert report.int8_channel_error_after[1] == 0 < report.int8_channel_error_after[0]


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (0, 2, 3), (4, 6, 0)])
@pytest.mark.parametrize(("transposed", "groups"), [(False, 1), (True, 1), (True, 2)])
def test_the_report_of_no_weights(shape, transposed, groups):
    """Seeded bug: `reshape(n, -1)`, which no weights do not fit."""
    channels = groups * shape[1] if transposed else shape[0]
    bn = np.zeros(channels), np.ones(channels), None, None, 0.0
    report = fastbn.fold_report(np.ones(shape), None, bn, transposed=transposed, groups=groups)
    assert report.change.shape == (channels,)
    assert not report.int8_channel_error_after.any()
    assert report.fits_int8_per_tensor
    assert ("no channels" in str(report)) == (channels == 0)


def test_the_report_tells_rounding():
    rng = np.random.default_rng(0)
    weight, bn = rng.normal(size=(3, 50)).astype(np.float16), norm(3)
    report = fastbn.fold_report(weight, None, bn)
    assert (report.rounding > 1e-5).all()
    assert (report.rounding < 2.0**-11).all()


def test_the_report_tells_whether_int8_still_fits():
    """Seeded bug: every channel quantized by its own range where the tensor's is asked for."""
    weight = np.random.default_rng(0).normal(size=(4, 16, 3, 3)).astype(np.float32)
    even, uneven = (
        fastbn.fold_report(weight, None, (np.zeros(4), np.array(var), None, None, 0.0))
        for var in ([1.0, 2.0, 1.0, 0.5], [1.0, 1e4, 1.0, 1e-4])
    )
    assert even.fits_int8_per_tensor
    assert even.fits_int8_per_channel
    assert not uneven.fits_int8_per_tensor
    assert uneven.fits_int8_per_channel
    assert uneven.spread_before < 2 < 1e3 < uneven.spread_after
    step = uneven.range_after.max() / 127
    folded = fastbn.fold_conv(weight, None, (np.zeros(4), np.array([1.0, 1e4, 1.0, 1e-4]), None, None, 0.0))[0]
    error = np.round(folded / step) * step - folded
    expected = np.linalg.norm(error.reshape(4, -1), axis=1) / np.linalg.norm(folded.reshape(4, -1), axis=1)
    assert_allclose(uneven.int8_error_after, expected, rtol=1e-6)
    assert "does not fit" in str(uneven)
    assert "does not fit" not in str(even)
    assert str(uneven).count("\n") == 4
    assert fastbn.fold_report(weight, None, norm(4), tolerance=0.0).fits_int8_per_channel is False
