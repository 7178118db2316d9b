"""test_frozen.py -- FrozenBatchNorm: what eval mode computes, as one immutable operation."""

import copy
import gc
import pickle
import weakref

import numpy as np
import pytest
from numpy.testing import assert_array_equal

import fastbn


def trained(channels=5, **settings):
    rng = np.random.default_rng(1)
    bn = fastbn.BatchNorm(channels, 1e-3, **settings)
    if bn.affine:
        bn.weight, bn.bias = rng.normal(size=(2, channels))
    shape = (8, 3, channels) if bn.channel_axis == -1 else (8, channels, 3)
    for _ in range(3):
        bn((rng.normal(size=shape) * 3 + 1).astype(bn.dtype))
    return bn.eval(), (rng.normal(size=shape) * 3 + 1).astype(bn.dtype)


SETTINGS = [
    {},
    {"affine": False},
    {"channel_axis": -1},
    {"activation": "relu"},
    {"activation": "leaky_relu", "negative_slope": 0.3},
    {"dtype": "float64"},
    {"dtype": "float16"},
    {"dtype": "bfloat16"},
]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("residual", [False, True])
def test_frozen_is_eval_however_it_was_made(settings, residual):
    """Seeded bugs: a setting that does not get through; weight or bias that is forgotten."""
    if settings.get("dtype") == "bfloat16":
        pytest.importorskip("ml_dtypes")
    bn, x = trained(**settings)
    z = x[::-1].copy() if residual else None
    expected = bn(x, residual=z)
    told = {"channel_axis": bn.channel_axis, "activation": bn.activation, "negative_slope": bn.negative_slope}
    arrays = bn.running_mean, bn.running_var, bn.weight, bn.bias, bn.eps
    state = bn.state_dict("layer.0.")
    made = {
        "freeze": bn.freeze(),
        "from_batch_norm": fastbn.FrozenBatchNorm.from_batch_norm(bn),
        "from_arrays": fastbn.FrozenBatchNorm.from_arrays(*arrays, **told, dtype=bn.dtype),
        "from_state_dict": fastbn.FrozenBatchNorm.from_state_dict(
            state, "layer.0.", eps=bn.eps, **told, dtype=bn.dtype
        ),
        "pickle": pickle.loads(pickle.dumps(bn.freeze())),
        "copy": copy.copy(bn.freeze()),
        "deepcopy": copy.deepcopy(bn.freeze()),
    }
    for name, op in made.items():
        assert_array_equal(op(x, z), expected, err_msg=name)
        out = np.empty_like(x)
        assert op(x, residual=z, out=out) is out
        assert_array_equal(out, expected, err_msg=name)
        assert repr(op) == repr(bn.freeze())
        assert (op.num_features, op.dtype, op.eps, op.channel_axis) == (5, bn.dtype, bn.eps, bn.channel_axis)
        assert_array_equal(op.running_var, bn.running_var)
        assert op.weight is None if bn.weight is None else (op.weight == bn.weight).all()
    assert made["freeze"](x, z, out=x) is x
    assert_array_equal(x, expected)


def test_a_frozen_layer_does_not_follow_its_layer():
    """Seeded bug: keeping the layer's arrays."""
    bn, x = trained()
    op = bn.freeze()
    expected = op(x)
    bn.train()(x)
    bn.weight[...] = 0
    assert_array_equal(op(x), expected)
    assert not np.array_equal(pickle.loads(pickle.dumps(bn.freeze()))(x), expected)
    assert_array_equal(pickle.loads(pickle.dumps(op))(x), expected)


def test_another_dtype_of_the_data():
    bn, x = trained()
    half = x.astype(np.float16)
    assert_array_equal(bn.freeze(np.float16)(half), bn(half))
    with pytest.raises(TypeError, match="x must have dtype float32, got float16"):
        bn.freeze()(half)


def test_nothing_in_it_can_be_changed():
    """Seeded bugs: no __setattr__; arrays that can be written; a second __init__."""
    bn, x = trained()
    op = bn.freeze()
    expected = op(x)
    for name in ("eps", "weight", "running_mean", "more"):
        with pytest.raises(AttributeError, match="FrozenBatchNorm is immutable"):
            setattr(op, name, None)
        with pytest.raises(AttributeError, match="FrozenBatchNorm is immutable"):
            delattr(op, name)
    for name in ("weight", "bias", "running_mean", "running_var"):
        with pytest.raises(ValueError, match="read-only"):
            getattr(op, name)[0] = 7
    with pytest.raises(TypeError, match="immutable"):
        op.__init__(np.zeros(2), np.ones(2))
    assert op.num_features == 5
    assert not hasattr(op, "__dict__")
    assert_array_equal(op(x), expected)


def test_a_call_leaves_no_python_frame_and_remembers_nothing():
    """Seeded bug: a __call__ in Python."""
    assert "__call__" not in vars(fastbn.FrozenBatchNorm)
    op = trained()[0].freeze()

    class Array(np.ndarray):
        """That a weak reference can be made to."""

    x = trained()[1].view(Array)
    gone = weakref.ref(x)
    op(x)
    del x
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("mean", [0.0, 1e8])
def test_it_is_accurate_at_large_means_and_tiny_scales(mean):
    """Seeded bug: a folded scale and shift in float32."""
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(100, 3)) * 64 + mean).astype(np.float32)
    weight = np.array([1.0, 1e-30, 1e-42])
    stats = x.astype(np.float64).mean(0), x.astype(np.float64).var(0)
    op = fastbn.FrozenBatchNorm.from_arrays(*stats, weight=weight)
    expected = (x.astype(np.float64) - stats[0]) / np.sqrt(stats[1] + 1e-5) * weight
    assert (abs(op(x) - expected) <= 3 * np.finfo("f4").eps * np.maximum(weight, 1e-38)).all()


def test_a_state_dict_must_have_the_statistics_and_nothing_unknown():
    """Seeded bugs: a misspelt weight taken for affine=False; a missing statistic taken for zeros."""
    state = {**trained()[0].state_dict("a."), **trained()[0].state_dict("b."), "conv.weight": np.ones((2, 2))}
    frozen = fastbn.FrozenBatchNorm.from_state_dict
    assert frozen(state, "a.").num_features == 5
    for change, message in (
        ({"a.running_var": None}, r"with prefix 'a\.': missing a\.running_var$"),
        ({"a.running_mean": None}, r"missing a\.running_mean; "),
        ({"a.wieght": state["a.weight"]}, r"unknown a\.wieght$"),
        ({"a.weight": np.ones(4)}, r"a\.weight must have shape \(5,\), got \(4,\)$"),
        ({"a.running_mean": 0.0}, r"^a\.running_mean must be a one-dimensional array, got shape \(\)$"),
        ({"a.running_mean": np.ones((5, 1))}, r"^a\.running_mean must be a one-dimensional array, got shape \(5, 1\)$"),
        ({"a.bias": np.full(5, np.nan)}, r"a\.bias must be finite"),
        ({"a.running_var": np.full(5, -1.0)}, r"a\.running_var must not be negative"),
    ):
        with pytest.raises(ValueError, match=message):
            frozen({key: value for key, value in {**state, **change}.items() if value is not None}, "a.")
    with pytest.raises(TypeError, match="state must be a mapping"):
        frozen([], "a.")
    del state["a.weight"], state["a.bias"], state["a.num_batches_tracked"]
    assert frozen(state, "a.").weight is None


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"mean": None}, TypeError, "mean must be an array of real numbers, got NoneType"),
        ({"mean": 0.0}, ValueError, r"mean must be a one-dimensional array, got shape \(\)"),
        ({"var": np.ones(4)}, ValueError, r"var must have shape \(3,\), got shape \(4,\)"),
        ({"weight": np.ones((3, 1))}, ValueError, "weight must have shape"),
        ({"bias": ["a"] * 3}, TypeError, "bias must be an array of real numbers, got list"),
        ({"eps": -1.0}, ValueError, "eps must be"),
        ({"eps": "small"}, TypeError, "eps must be"),
        ({"eps": True}, TypeError, "eps must be a real number, got bool"),
        ({"negative_slope": True}, TypeError, "negative_slope must be a real number, got bool"),
        ({"negative_slope": np.inf}, ValueError, "negative_slope must be finite, got inf"),
        ({"channel_axis": 10**30}, ValueError, f"channel_axis must be from -64 to 63, got {10**30}"),
        ({"channel_axis": -65}, ValueError, "channel_axis must be from -64 to 63, got -65"),
        ({"channel_axis": True}, TypeError, "channel_axis must be an integer, got bool"),
        ({"activation": "gelu"}, ValueError, "activation must be"),
        ({"dtype": "int32"}, TypeError, "dtype must be float32, float64, float16 or bfloat16, got int32"),
        ({"dtype": "float31"}, TypeError, "dtype must be float32, float64, float16 or bfloat16, got 'float31'"),
    ],
)
def test_arguments_are_checked(arguments, error, message):
    with pytest.raises(error, match=message):
        fastbn.FrozenBatchNorm.from_arrays(**{"mean": np.zeros(3), "var": np.ones(3), **arguments})
    layer = {name: value for name, value in arguments.items() if name not in ("mean", "var", "weight", "bias")}
    if layer:  # what the layer takes too, it refuses in the same words
        with pytest.raises(error, match=message):
            fastbn.BatchNorm(3, **layer)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("running_mean", np.inf, "must be finite"),
        ("running_var", np.nan, "must be finite"),
        ("running_var", np.inf, "must be finite"),
        ("running_var", -1.0, "must not be negative, got -1.0"),
        ("weight", -np.inf, "must be finite"),
        ("bias", np.nan, "must be finite"),
    ],
)
def test_no_way_leads_past_the_checks(name, value, message):
    """Seeded bug: a way to make it that goes without `as_affine`, and serves NaN."""
    bn = fastbn.BatchNorm(3)
    getattr(bn, name)[1] = value
    arrays = bn.running_mean, bn.running_var, bn.weight, bn.bias
    good = fastbn.FrozenBatchNorm(np.zeros(3), np.ones(3))
    rebuild, (cls, args, settings) = good.__reduce__()
    made = {
        "the class": lambda: fastbn.FrozenBatchNorm(*arrays),
        "from_arrays": lambda: fastbn.FrozenBatchNorm.from_arrays(*arrays),
        "from_state_dict": lambda: fastbn.FrozenBatchNorm.from_state_dict(bn.state_dict("a."), "a."),
        "freeze": bn.freeze,
        "from_batch_norm": lambda: fastbn.FrozenBatchNorm.from_batch_norm(bn),
        "pickle": lambda: rebuild(cls, (*arrays, *args[4:]), settings),
    }
    for way, make in made.items():
        named = name if way in ("from_state_dict", "freeze", "from_batch_norm") else name.removeprefix("running_")
        with pytest.raises(ValueError, match=f"{named} {message}"):
            make()


def test_a_dtype_of_none_is_the_default():
    """Seeded bug: NumPy's None, which is float64."""
    zeros, ones, state = np.zeros(3), np.ones(3), fastbn.BatchNorm(3).state_dict()
    for made in (
        fastbn.BatchNorm(3, dtype=None),
        fastbn.FrozenBatchNorm(zeros, ones, dtype=None),
        fastbn.FrozenBatchNorm.from_arrays(zeros, ones, dtype=None),
        fastbn.FrozenBatchNorm.from_state_dict(state, dtype=None),
        fastbn.BatchNorm(3).freeze(None),
    ):
        assert made.dtype == np.float32
    assert fastbn.BatchNorm(3, dtype="float64").freeze(None).dtype == np.float64


def test_a_call_that_does_not_fit_writes_nothing():
    op, out = trained()[0].freeze(), np.full((2, 5), 7.0, np.float32)
    for wrong in ({"x": np.ones((2, 4), "f4")}, {"x": np.ones(5, "f4")}, {"x": np.ones((2, 5), int)}, {"x": None},
                  {"x": np.ones((2, 5), "f4"), "residual": np.ones((2, 4), "f4")}):  # fmt: skip
        with pytest.raises((TypeError, ValueError), match="must"):
            op(**wrong, out=out)
    assert (out == 7).all()
    with pytest.raises(TypeError):
        fastbn.FrozenBatchNorm.__new__(fastbn.FrozenBatchNorm)(out)
