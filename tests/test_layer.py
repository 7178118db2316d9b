"""test_layer.py -- BatchNorm: modes, statistics, gradients, and what it keeps through errors, threads and signals."""

import contextlib
import copy
import gc
import os
import pickle
import re
import signal
import sys
import threading
import time
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor

import arrays
import numpy as np
import pytest
from fresh import no_asan
from numpy.testing import assert_allclose, assert_array_equal
from tolerance import assert_close

import fastbn

ARRAYS = ("weight", "bias", "running_mean", "running_var")


def data(shape=(6, 4, 3, 2), dtype=np.float32, seed=0):
    return (np.random.default_rng(seed).normal(size=shape) * 3 + 2).astype(dtype)


def axes(x, channel_axis=1):
    return tuple(i for i in range(x.ndim) if i != channel_axis % x.ndim)


def column(values, x, channel_axis=1):
    """`values`, one a channel, shaped to go with `x`."""
    shape = [1] * x.ndim
    shape[channel_axis] = -1
    return np.asarray(values, dtype=np.float64).reshape(shape)


def snapshot(bn):
    return {name: np.copy(array) for name, array in bn.state_dict().items()} | {"skipped": bn.num_batches_skipped}


def assert_unchanged(bn, before):
    after = snapshot(bn)
    assert after.keys() == before.keys()
    for name, value in before.items():
        assert_array_equal(after[name], value, err_msg=name)


@pytest.mark.parametrize(("dtype", "parameters"), [("f2", "f4"), ("f4", "f4"), ("f8", "f8")])
@pytest.mark.parametrize("channel_axis", [1, -1])
def test_training_normalizes_by_the_batch_and_moves_the_running_statistics(dtype, parameters, channel_axis):
    """Seeded bugs: the biased variance in running_var; momentum the other way round."""
    bn = fastbn.BatchNorm(4, eps=1e-3, momentum=0.3, channel_axis=channel_axis, dtype=dtype)
    assert all(getattr(bn, name).dtype == parameters for name in ARRAYS)
    bn.weight = [1.0, -2.0, 0.5, 3.0]
    bn.bias = np.arange(4.0)
    mean, var = np.zeros(4), np.ones(4)
    for seed in range(3):
        x = data((6, 4, 3, 4), dtype, seed)
        exact, over = x.astype(np.longdouble), axes(x, channel_axis)
        normal = exact - exact.mean(over, keepdims=True)
        normal /= np.sqrt(exact.var(over, keepdims=True) + 1e-3)
        scaled, shift = normal * column(bn.weight, x, channel_axis), column(bn.bias, x, channel_axis)
        y = bn(x)
        assert y.dtype == dtype
        assert_close(y, scaled + shift, abs(scaled) + abs(shift))
        mean = 0.7 * mean + 0.3 * exact.mean(over)
        var = 0.7 * var + 0.3 * exact.var(over, ddof=1)
    assert_allclose(bn.running_mean, mean, rtol=8 * np.finfo(parameters).eps)
    assert_allclose(bn.running_var, var, rtol=8 * np.finfo(parameters).eps)
    assert bn.num_batches_tracked == 3


def test_momentum_none_is_the_average_over_all_batches():
    """Seeded bug: dividing by the counter before it is increased."""
    bn = fastbn.BatchNorm(4, momentum=None, dtype="float64")
    batches = [data(dtype="float64", seed=seed) for seed in range(5)]
    for x in batches:
        bn(x)
    assert_allclose(bn.running_mean, np.mean([x.mean(axes(x)) for x in batches], axis=0), rtol=1e-13)
    assert_allclose(bn.running_var, np.mean([x.var(axes(x), ddof=1) for x in batches], axis=0), rtol=1e-13)


@pytest.mark.parametrize("backward", [True, False])
def test_eval_normalizes_by_the_running_statistics_and_leaves_them(backward):
    """Seeded bug: batch statistics in eval mode."""
    bn = fastbn.BatchNorm(4, dtype="float64")
    bn(data(dtype="float64"))
    bn.eval(backward=backward)
    before = snapshot(bn)
    x = data(dtype="float64", seed=1)
    expected = (x - column(bn.running_mean, x)) / np.sqrt(column(bn.running_var, x) + 1e-5)
    assert_allclose(bn(x), expected, rtol=0, atol=1e-14)
    assert_unchanged(bn, before)


def test_without_running_statistics_every_call_uses_its_batch():
    bn = fastbn.BatchNorm(4, track_running_stats=False)
    assert (bn.running_mean, bn.running_var, bn.num_batches_tracked) == (None, None, None)
    x = data()
    y = bn(x)
    assert_array_equal(bn.eval()(x), y)
    with pytest.raises(ValueError, match="track_running_stats=False"):
        bn.freeze()


def test_a_layer_without_any_array_still_counts_channels():
    """Seeded bug: no check where there is no parameter to compare with."""
    bn = fastbn.BatchNorm(4, affine=False, track_running_stats=False)
    assert bn(data()).shape == data().shape
    with pytest.raises(ValueError, match=re.escape("4 channels along axis 1, got shape (6, 5)")):
        bn(data((6, 5)))


def test_one_value_per_channel_is_an_error_that_changes_nothing():
    bn = fastbn.BatchNorm(4)
    bn(data())
    before, out = snapshot(bn), np.full((1, 4), 7.0, dtype=np.float32)
    with pytest.raises(ValueError, match=r"^Expected more than 1 value per channel when training, got input size"):
        bn(data((1, 4)), out=out)
    assert_unchanged(bn, before)
    assert_array_equal(out, np.full((1, 4), 7.0))
    assert bn.eval()(data((1, 4))).shape == (1, 4)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_an_empty_batch_is_not_a_batch(momentum):
    """Seeded bug: counting it, which with momentum=None gives the first values of the statistics a share for ever."""
    bn = fastbn.BatchNorm(4, momentum=momentum)
    before = snapshot(bn)
    x = data((0, 4, 3))
    assert bn(x).shape == (0, 4, 3)
    assert_unchanged(bn, before)
    assert bn.backward(x).shape == (0, 4, 3)
    assert_array_equal(bn.grad_weight, np.zeros(4))
    assert_array_equal(bn.grad_bias, np.zeros(4))


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("activation", [None, "relu", "relu6", "leaky_relu"])
@pytest.mark.parametrize("training", [True, False])
def test_backward_is_the_derivative(activation, residual, training):
    """Against central differences. Seeded bug: the statistics as constants in training mode, or not in eval mode."""
    rng = np.random.default_rng(3)
    bn = fastbn.BatchNorm(4, activation=activation, dtype="float64")
    bn.weight, bn.bias = rng.normal(size=4) + 2, rng.normal(size=4) + 1
    bn(rng.normal(size=(20, 4)))
    bn.train(training)
    inputs = {"x": rng.normal(size=(5, 4, 2)), "residual": rng.normal(size=(5, 4, 2)) if residual else None}
    grad = rng.normal(size=(5, 4, 2))

    def loss():
        return float((bn(**inputs) * grad).sum())

    loss()
    gradients = {"x": bn.backward(grad), "residual": bn.grad_residual, "weight": bn.grad_weight, "bias": bn.grad_bias}
    for name, array in {**inputs, "weight": bn.weight, "bias": bn.bias}.items():
        if array is None:
            assert gradients[name] is None
            continue
        numeric = np.empty_like(array)
        for index in np.ndindex(array.shape):
            value, step = array[index], 1e-6
            array[index] = value + step
            above = loss()
            array[index] = value - step
            numeric[index] = (above - loss()) / (2 * step)
            array[index] = value
        assert_allclose(gradients[name], numeric, rtol=0, atol=2e-7, err_msg=name)


def test_without_parameters_there_is_a_gradient_of_x_alone():
    bn = fastbn.BatchNorm(4, affine=False)
    bn(data())
    assert abs(bn.backward(data(seed=1)).sum(axes(data()))).max() < 1e-4
    assert bn.grad_weight is None
    assert bn.grad_bias is None


def test_backward_may_be_called_again_and_into_its_argument():
    bn = fastbn.BatchNorm(4)
    bn(data())
    grad = data(seed=1)
    first = bn.backward(grad)
    assert bn.backward(grad, out=grad) is grad
    assert_array_equal(grad, first)


def test_in_place_gives_the_same_and_takes_backward_away():
    """Seeded bug: remembering an x that the call wrote over."""
    x = data()
    expected = fastbn.BatchNorm(4)(x)
    for shift in (0, 3):
        whole = np.concatenate([x, x])
        bn, given, out = fastbn.BatchNorm(4), whole[:6], whole[shift : shift + 6]
        assert bn(given, out=out) is out
        assert_array_equal(out, expected)
        with pytest.raises(ValueError, match="wrote its result"):
            bn.backward(x)
    bn, mine = fastbn.BatchNorm(4), x.copy()
    bn(mine, out=mine)
    with pytest.raises(ValueError, match="wrote its result"):
        bn.backward(x)
    bn(x, out=mine)
    bn.backward(data(seed=1))
    bn.backward(data(seed=1), out=x)
    with pytest.raises(ValueError, match="wrote its result"):
        bn.backward(data(seed=1))


def test_backward_belongs_to_the_call_of_its_thread():
    """Seeded bug: one place for the last call of all threads."""
    bn = fastbn.BatchNorm(4).eval()
    with pytest.raises(ValueError, match="must follow a call of the same thread"):
        bn.backward(data())
    inputs = [data(seed=seed) for seed in range(8)]
    meet, results = threading.Barrier(8), [None] * 8
    grad = data(seed=9)

    def work(i):
        bn(inputs[i])
        meet.wait()
        bn.grad_weight = None
        bn.backward(grad)
        meet.wait()
        results[i] = bn._last.call[0]

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert all(a is b for a, b in zip(inputs, results, strict=True))


def test_what_a_call_remembers_lives_until_the_next_or_not_at_all():
    """Seeded bug: eval(backward=False) that goes on remembering."""

    class Array(np.ndarray):
        """That a weak reference can be made to."""

    def call(bn):
        x = data().view(Array)
        bn(x)
        return weakref.ref(x)

    bn = fastbn.BatchNorm(4)
    first = call(bn)
    gc.collect()
    assert first() is not None
    second = call(bn)
    gc.collect()
    assert first() is None
    bn.eval(backward=False)
    third = call(bn)
    gc.collect()
    assert second() is None
    assert third() is None
    with pytest.raises(ValueError, match=re.escape("eval(backward=False)") + "|none that was remembered"):
        bn.backward(data())
    bn.eval()
    fourth = call(bn)
    gc.collect()
    assert fourth() is not None


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_are_assigned_by_copy_and_checked(name):
    """Seeded bugs: keeping the caller's array; broadcasting a wrong shape."""
    bn = fastbn.BatchNorm(3)
    mine = getattr(bn, name)
    values = np.array([1.0, 2.0, 3.0])
    setattr(bn, name, values)
    values[0] = 9
    assert getattr(bn, name) is mine
    assert_array_equal(mine, [1, 2, 3])
    assert mine.dtype == np.float32
    before = snapshot(bn)
    for wrong, error in (([1.0], ValueError), (np.ones((3, 1)), ValueError), (2.0, ValueError), (None, TypeError),
                         (["a", "b", "c"], TypeError), (np.ones(3, dtype=complex), TypeError)):  # fmt: skip
        with pytest.raises(error, match=f"{name} must"):
            setattr(bn, name, wrong)
    assert_unchanged(bn, before)
    bare = fastbn.BatchNorm(3, affine=False, track_running_stats=False)
    with pytest.raises(ValueError, match=f"{name} cannot be assigned"):
        setattr(bare, name, [1.0, 2.0, 3.0])


def test_in_place_arithmetic_on_an_attribute():
    bn = fastbn.BatchNorm(3)
    bn.weight *= 2
    bn.running_mean[1] = 5
    assert_array_equal(bn.weight, [2, 2, 2])
    assert_array_equal(bn.running_mean, [0, 5, 0])


def test_an_array_of_the_layer_that_was_changed_by_hand():
    """Seeded bugs: numbers copied to where an array was; into one that must not be written."""
    bn, state = fastbn.BatchNorm(3), fastbn.BatchNorm(3).state_dict()
    bn.weight.flags.writeable = False
    for change in (lambda: bn.load_state_dict(state), lambda: setattr(bn, "weight", np.zeros(3))):
        with pytest.raises(ValueError, match="an array of the layer must be writeable and contiguous"):
            change()
    assert_array_equal(bn.weight, 1)
    bn.weight.flags.writeable = True
    bn.running_mean.resize(2, refcheck=False)
    with pytest.raises(ValueError, match=r"with, \(3,\) and float32, got \(2,\) and float32"):
        bn.load_state_dict({**state, "bias": np.ones(3)})
    assert_array_equal(bn.bias, 0)
    with pytest.raises(ValueError, match=r"running_mean must have .*, shape \(3,\), got \(2,\)"):
        bn(np.ones((2, 3), np.float32))


def test_what_a_layer_is_made_of_does_not_change():
    """Seeded bug: plain attributes, after which a layer cannot be saved."""
    bn = fastbn.BatchNorm(3)
    for name in ("num_features", "affine", "track_running_stats", "dtype"):
        with pytest.raises(AttributeError, match=f"{name} cannot be assigned"):
            setattr(bn, name, getattr(bn, name))


def test_what_is_assigned_to_the_counter_and_the_guard_is_checked():
    """Seeded bug: plain attributes, which a call or a save stumbles over."""
    bn = fastbn.BatchNorm(3)
    for value, error in ((-1, ValueError), ((1 << 62) + 1, ValueError), (1 << 70, ValueError), (1.0, TypeError),
                         ("1", TypeError), (None, TypeError), (True, TypeError)):  # fmt: skip
        with pytest.raises(error, match="num_batches_tracked"):
            bn.num_batches_tracked = value
    with pytest.raises(ValueError, match=r"on_nonfinite must be one of .*, got 'ignore'"):
        bn.on_nonfinite = "ignore"
    assert (bn.num_batches_tracked, bn.on_nonfinite) == (0, "propagate")
    bn.num_batches_tracked = np.int32(7)
    bn.on_nonfinite = "skip"
    bn(poison("nan")[:, :3])
    assert (bn.num_batches_tracked, bn.num_batches_skipped) == (7, 1)
    with pytest.raises(ValueError, match="made without it"):
        fastbn.BatchNorm(3, track_running_stats=False).num_batches_tracked = 1


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"x": None}, TypeError),
        ({"x": data((6, 5, 2))}, ValueError),
        ({"x": data((6,))}, ValueError),
        ({"x": data().astype(int)}, TypeError),
        ({"x": data(), "residual": data((6, 4))}, ValueError),
        ({"x": data(), "out": np.empty((6, 4), np.float32)}, ValueError),
        ({"x": data(), "out": np.empty(data().shape)}, TypeError),
    ],
)
def test_an_argument_that_does_not_fit_changes_nothing(arguments, error, training):
    bn = fastbn.BatchNorm(4)
    x = data()
    bn(x)
    bn.train(training)
    before = snapshot(bn)
    with pytest.raises(error, match=r"must|channel"):
        bn(**arguments)
    assert_unchanged(bn, before)
    assert bn.backward(data(seed=1)).shape == x.shape, "the call before is still remembered"
    for wrong in (data((6, 4)), data(dtype="float64"), None):
        grads = bn.grad_weight
        with pytest.raises((TypeError, ValueError), match="grad_output must"):
            bn.backward(wrong)
        assert bn.grad_weight is grads


def poison(kind):
    x = data((6, 4))
    x[0, 2] = {"inf": np.inf, "nan": np.nan, "overflow": 3e38}[kind]
    if kind == "overflow":
        x[1, 2] = -3e38
    return x


@pytest.mark.parametrize("kind", ["inf", "nan", "overflow"])
def test_a_batch_that_is_not_finite_may_be_kept_out(kind):
    """Seeded bugs: no guard; a guard of the mean alone (3e38 overflows the variance); counting a skipped batch."""
    x = poison(kind)
    bn = fastbn.BatchNorm(4)
    y = bn(x)
    assert not np.isfinite(bn.running_var[2])
    assert np.isfinite(bn.running_var[[0, 1, 3]]).all()
    assert bn.num_batches_tracked == 1

    bn = fastbn.BatchNorm(4, on_nonfinite="skip")
    bn(data((6, 4)))
    before = snapshot(bn)
    assert_array_equal(bn(x), y)
    assert_unchanged(bn, {**before, "skipped": 1})
    bn(data((6, 4)))
    assert (bn.num_batches_tracked, bn.num_batches_skipped) == (2, 1)
    assert bn.backward(x).shape == x.shape

    bn = fastbn.BatchNorm(4, on_nonfinite="raise")
    bn(data((6, 4)))
    before, out = snapshot(bn), np.zeros_like(x)
    with pytest.raises(ValueError, match=re.escape("those of channels [2] are not")):
        bn(x, out=out)
    assert_unchanged(bn, before)
    assert not out.any()


@pytest.mark.parametrize("guard", ["skip", "raise"])
@pytest.mark.parametrize("momentum", [0.0, 0.1])
def test_guards_look_at_the_batch_alone(guard, momentum):
    """Statistics that are not finite already keep no batch out; a variance that the next ones could still hold, scaled
    by the momentum, does. Seeded bug: a look at what the running statistics would become.
    """
    bn = fastbn.BatchNorm(1, momentum=momentum, on_nonfinite=guard)
    bn.running_mean[:] = np.inf
    bn(data((6, 1)))
    assert (bn.num_batches_tracked, bn.num_batches_skipped) == (1, 0)
    bn.running_mean[:] = 0
    before, large = snapshot(bn), np.array([[-2e19], [2e19]], np.float32)  # of variance 8e38
    if guard == "raise":
        with pytest.raises(ValueError, match=re.escape("those of channels [0] are not")):
            bn(large)
        assert_unchanged(bn, before)
    else:
        bn(large)
        assert_unchanged(bn, {**before, "skipped": 1})


@pytest.mark.parametrize("guard", ["skip", "raise"])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_guard_changes_nothing_for_finite_batches(guard, momentum):
    plain, guarded = fastbn.BatchNorm(4, momentum=momentum), fastbn.BatchNorm(4, momentum=momentum, on_nonfinite=guard)
    for seed in range(3):
        x = data(seed=seed)
        assert_array_equal(guarded(x), plain(x))
    guarded(data((0, 4)))
    assert_unchanged(guarded, snapshot(plain))


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda bn: pickle.loads(pickle.dumps(bn))])
def test_copies_and_pickles_are_equal_and_apart(duplicate):
    """Seeded bug: a copy that shares its arrays with the original."""
    settings = {"channel_axis": -1, "activation": "leaky_relu", "negative_slope": 0.2, "on_nonfinite": "skip"}
    bn = fastbn.BatchNorm(4, 1e-3, None, **settings)
    x = data((6, 2, 4))
    bn.weight = np.arange(4)
    bn(x)
    bn(np.full_like(x, np.nan))
    bn.eval()
    twin = duplicate(bn)
    assert repr(twin) == repr(bn)
    assert (twin.training, twin.num_batches_tracked, twin.num_batches_skipped) == (False, 1, 1)
    assert_array_equal(twin(x), bn(x))
    before = snapshot(bn)
    twin.train()(x + 1)
    twin.weight[...] = 7
    assert_unchanged(bn, before)
    with pytest.raises(ValueError, match="must follow a call"):
        duplicate(bn).backward(x)


class Tagged(fastbn.BatchNorm):
    """A subclass with attributes of every kind."""

    __slots__ = ("slot", "unset")

    def __init__(self, tag):
        super().__init__(4)
        self.tag, self.slot, self.me, self.__private = tag, "s", self, 5
        self.__dict__["fixed"] = 6

    @property
    def private(self):
        return self.__private

    @property
    def fixed(self):
        return self.__dict__["fixed"]

    def state_dict(self, prefix=""):
        return super().state_dict(prefix + "moving_")


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda bn: pickle.loads(pickle.dumps(bn))])
def test_attributes_of_a_subclass_come_along(duplicate):
    """Seeded bugs: a pickle of what BatchNorm knows of alone, or of what the subclass makes of its state; attributes
    that are assigned, which a property does not allow.
    """
    bn = Tagged(["a"])
    bn(data((6, 4)))
    twin = duplicate(bn)
    assert type(twin) is Tagged
    assert (twin.tag, twin.slot, twin.private, twin.fixed, hasattr(twin, "unset")) == (["a"], "s", 5, 6, False)
    assert (twin.tag is bn.tag) == (duplicate is copy.copy)
    assert twin.me is (bn if duplicate is copy.copy else twin)
    assert vars(twin).keys() == vars(bn).keys()
    assert_array_equal(twin.running_mean, bn.running_mean)
    assert twin._lock is not bn._lock
    bn = fastbn.BatchNorm(4)
    assert "attributes" not in bn.__getstate__()  # so 0.1.0 reads it
    bn.forward = "shadowed"
    assert duplicate(bn).forward == "shadowed"
    bn.lock = threading.Lock()
    with contextlib.nullcontext() if duplicate is copy.copy else pytest.raises(TypeError, match=r"pickle.*lock"):
        duplicate(bn)


def test_attributes_in_a_pickle_change_nothing_that_is_checked():
    """Seeded bug: attributes that are assigned, and so change arrays, settings and class."""
    bn = fastbn.BatchNorm(4)
    before = snapshot(bn)
    bn.__setstate__(bn.__getstate__() | {"attributes": {"weight": np.zeros(4), "eps": -1.0, "__class__": Tagged}})
    assert_unchanged(bn, before)
    assert (type(bn), bn.eps) == (fastbn.BatchNorm, 1e-5)


def test_a_diverged_layer_can_still_be_copied():
    bn = fastbn.BatchNorm(4)
    bn(poison("nan"))
    assert_array_equal(copy.deepcopy(bn).running_mean, bn.running_mean)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version must be 1, got 2"),
        ({"version": None}, "version must be 1, got None"),
        ({"more": 1}, "must have the keys version, settings, .*: unknown more"),
        ({"settings": {}}, "settings must have the keys num_features, eps, .*: missing num_features, eps, "),
        (
            {"settings": {"num_features": 4}},
            "settings must have the keys num_features, eps, .*: missing eps, momentum, ",
        ),
        ({"settings": None}, "settings must be a mapping, got NoneType"),
        ({"training": "yes"}, "training must be a bool, got str"),
        ({"num_batches_skipped": None}, "num_batches_skipped must be an integer, got NoneType"),
        ({"num_batches_skipped": -1}, r"num_batches_skipped must be from 0 to 2\*\*62, got -1"),
        ({"state": {}}, "missing weight, bias, running_mean, running_var, num_batches_tracked$"),
        ({"state": {"weight": np.ones(1 << 20)}}, r"weight must have shape \(4,\), got \(1048576,\)"),
        ({"state": None}, "state must be a mapping of names to arrays, got NoneType"),
        ({"attributes": None}, "attributes must be a mapping, got NoneType"),
        ({"attributes": {3: 4}}, "attributes must have names that BatchNorm has not, got 3"),
        ({"attributes": {"_eps": -1.0}}, "attributes must have names that BatchNorm has not, got '_eps'"),
    ],
)
def test_a_pickled_state_goes_through_the_checker(change, message):
    """Seeded bug: filling the layer before everything is checked."""
    bn = fastbn.BatchNorm(4)
    state, before = bn.__getstate__(), snapshot(bn)
    with pytest.raises(ValueError, match=f"^not the pickled state of a BatchNorm: .*{message}"):
        bn.__setstate__({**state, **change})
    assert_unchanged(bn, before)
    bn.eval()
    hostile = {**state, "settings": {**state["settings"], "num_features": 1 << 59}}
    with pytest.raises(ValueError, match="must have shape"):
        bn.__setstate__(hostile)
    for pickled, message in (({}, "version must be 1, got None"), (None, "must be a mapping, got NoneType"),
                             ({"version": 1}, "missing settings, training, num_batches_skipped, state")):  # fmt: skip
        with pytest.raises(ValueError, match=f"^not the pickled state of a BatchNorm: .*{message}"):
            bn.__setstate__(pickled)
    assert repr(bn) == "BatchNorm(4)"
    assert not bn.training


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("options", [{}, {"affine": False, "track_running_stats": False}])
def test_more_channels_than_there_can_be(dtype, options):
    """Seeded bugs: a message of NumPy's about arrays that nobody asked for, or a layer that nobody can use."""
    for number in (1 << 60, 1 << 62, (1 << 63) - 1, 10**5000):
        with pytest.raises(ValueError, match=r"^num_features must be from 0 to 2\*\*60 - 1, got "):
            fastbn.BatchNorm(number, dtype=dtype, **options)
    if not options:
        with pytest.raises(MemoryError, match=f"^no memory for the arrays of num_features={1 << 59}$"):
            fastbn.BatchNorm(1 << 59, dtype=dtype)


def test_modes_and_repr():
    bn = fastbn.BatchNorm(3)
    assert bn.training
    assert bn.eval() is bn
    assert not bn.training
    assert bn.train() is bn
    assert bn.training
    with pytest.raises(TypeError, match="mode must be a bool, got int"):
        bn.train(0)
    assert bn.forward(data((2, 3))).shape == (2, 3)
    assert repr(bn) == "BatchNorm(3)"
    assert repr(fastbn.BatchNorm(3, momentum=None, affine=False)) == "BatchNorm(3, momentum=None, affine=False)"


def test_training_from_many_threads_loses_no_batch():
    """Nor one that is kept out. Seeded bug: no lock around the counter and the statistics, which the cumulative average
    shows.
    """
    bn = fastbn.BatchNorm(2, momentum=None, dtype="float64", on_nonfinite="skip")
    start = threading.Barrier(8)

    def work(i):
        x = np.tile(np.array([[i, -1.0], [i + 2, 1.0]]), (2000, 1))  # long enough for another thread to come between
        start.wait()
        for _ in range(50):
            bn(x)
            bn(x * np.nan)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert (bn.num_batches_tracked, bn.num_batches_skipped) == (400, 400)
    assert_allclose(bn.running_mean, [np.mean(range(8)) + 1, 0.0], rtol=1e-12)


def test_eval_calls_do_not_wait_for_training():
    """Seeded bug: taking the lock in eval mode."""
    bn = fastbn.BatchNorm(4).eval()
    done = threading.Event()
    with bn._lock:
        thread = threading.Thread(target=lambda: (bn(data()), done.set()))
        thread.start()
        assert done.wait(30)
    thread.join()


@no_asan
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_child_forked_while_a_thread_trains_can_train():
    """Seeded bug: the lock as it was at the fork."""
    bn = fastbn.BatchNorm(4)
    held, release = threading.Event(), threading.Event()

    def hold():
        with bn._lock:
            held.set()
            release.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of every fork of a threaded process
        pid = os.fork()
    if not pid:
        signal.alarm(10)
        bn(data())
        os._exit(bn.num_batches_tracked)
    release.set()
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs setitimer")
@pytest.mark.skipif(sys.gettrace() is not None, reason="a tracer takes locks, in which a signal may leave it")
@pytest.mark.parametrize("what", ["train", "skip", "load"])
def test_a_signal_leaves_the_statistics_old_or_new(what):
    """200 signals whose handler raises. Seeded bug: a call between the stores of statistics and counter."""

    class InterruptError(Exception):
        pass

    def handler(number, frame):
        raise InterruptError

    bn = fastbn.BatchNorm(512, momentum=1.0, dtype="float64", on_nonfinite="skip" if what == "skip" else "propagate")
    base = data((16, 512), "float64")
    mean, var = base.mean(0), base.var(0, ddof=1)

    def step():
        count = bn.num_batches_tracked + 1
        if what != "load":
            return bn(base * count)
        statistics = {"running_mean": count * mean, "running_var": count**2 * var, "num_batches_tracked": count}
        return bn.load_state_dict({"weight": mean, "bias": mean, **statistics})

    start = time.perf_counter()
    for _ in range(20):
        step()
    usual = (time.perf_counter() - start) / 20
    rng = np.random.default_rng(0)
    signals = 0
    previous = signal.signal(signal.SIGALRM, handler)
    try:
        for _ in range(1000):
            if signals == 200:
                break
            try:
                signal.setitimer(signal.ITIMER_REAL, rng.uniform(0.2, 5) * usual)
                for _ in range(50):
                    step()
                signal.setitimer(signal.ITIMER_REAL, 0)
            except InterruptError:
                signals += 1
            with ThreadPoolExecutor(1) as other:  # the lock is reentrant: only another thread can tell
                assert other.submit(bn._lock.acquire, blocking=False).result()
            bn._lock = threading.RLock()
            count = bn.num_batches_tracked
            assert_allclose(bn.running_mean, count * mean, rtol=1e-9, atol=1e-9)
            assert_allclose(bn.running_var, count**2 * var, rtol=1e-9)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert signals == 200
    assert bn.num_batches_tracked > 21


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="POSIX signals")
def test_a_signal_handler_may_save_the_layer_that_it_interrupts():
    """As on SIGTERM. Red, by a hang, with a lock that is not reentrant."""
    bn, seen = fastbn.BatchNorm(64), []
    x = np.ones((32, 64, 14, 14), np.float32)
    before = signal.signal(signal.SIGALRM, lambda *_: seen.append(bn.state_dict()))
    try:
        signal.setitimer(signal.ITIMER_REAL, 1e-4, 1e-4)
        for step in range(1, 301):
            bn(x)
            assert bn.num_batches_tracked == step
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert seen


def test_loading_is_one_step_for_evaluating_threads():
    """Red with arrays that are assigned one by one: NumPy gives the GIL away between them."""
    states = [
        {name: np.full(5000, value, np.float32) for name in ("weight", "bias", "running_mean")} for value in (1, 2)
    ]
    for state, var in zip(states, (1, 4), strict=True):
        state |= {"running_var": np.full(5000, var, np.float32), "num_batches_tracked": np.array(1)}
    bn = fastbn.BatchNorm(5000, eps=0.0)
    bn.load_state_dict(states[0])
    bn.eval(backward=False)
    x = np.full((2, 5000), 3, np.float32)
    expected = {float(bn(x)[0, 0])}
    bn.load_state_dict(states[1])
    expected.add(float(bn(x)[0, 0]))
    done = threading.Event()

    def load():
        while not done.is_set():
            for state in states:
                bn.load_state_dict(state)

    loader = threading.Thread(target=load)
    loader.start()
    try:
        for _ in range(2000):
            assert set(np.unique(bn(x)).tolist()) <= expected
    finally:
        done.set()
        loader.join()


def test_mean_and_variance_of_a_reader_belong_together():
    """Seeded bug, where there is no GIL: `lock_numbers` of _native.pyx does nothing."""
    bn = fastbn.BatchNorm(4096, momentum=0.5, dtype="float64")
    bn.running_mean = np.ones(4096)
    # Batches whose variances are as their means.
    batches = [np.repeat([[m - np.sqrt(m / 2)], [m + np.sqrt(m / 2)]], 4096, axis=1) for m in (1.0, 4.0)]
    x = np.repeat([[0.0], [1.0]], 4096, axis=1)
    done = threading.Event()

    def train():
        for i in range(400):
            bn(batches[i % 2])
        done.set()

    def read():
        while not done.is_set():
            y = fastbn.normalize(x, bn.running_mean, bn.running_var, eps=0.0)
            deviation = 1 / (y[1] - y[0])
            assert_allclose(deviation**2, deviation[0] ** 2, rtol=1e-9)
            assert_allclose(-y[0] * deviation, deviation[0] ** 2, rtol=1e-9)

    with ThreadPoolExecutor(3) as pool:
        for future in [pool.submit(function) for function in (train, read, read)]:
            future.result()


@pytest.mark.parametrize("what", ["state_dict", "copy", "pickle", "freeze"])
def test_what_others_take_while_a_thread_trains_belongs_together(what):
    """States, copies, pickles and frozen operations are of one moment. Seeded bug: state_dict without the lock."""
    bn = fastbn.BatchNorm(512, momentum=1.0, dtype="float64")
    base = data((4, 512), "float64")
    mean, var = base.mean(0), base.var(0, ddof=1)
    bn(base)
    done = threading.Event()

    def train():
        while not done.is_set():
            bn(base * (bn.num_batches_tracked + 1))

    def taken():
        if what == "freeze":
            op = bn.freeze()
            return op.running_mean, op.running_var, op.running_mean[0] / mean[0]
        made = {
            "state_dict": lambda: bn,
            "copy": lambda: copy.copy(bn),
            "pickle": lambda: pickle.loads(pickle.dumps(bn)),
        }
        state = made[what]().state_dict()
        return state["running_mean"], state["running_var"], state["num_batches_tracked"]

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(1) as pool:
            trainer = pool.submit(train)
            try:
                for _ in range(8000 if what == "state_dict" else 100):  # many, for few of them meet a step
                    found_mean, found_var, count = taken()
                    assert np.abs(found_mean / count - mean).max() < 1e-9
                    assert np.abs(found_var / count**2 - var).max() < 1e-9
            finally:
                done.set()
            trainer.result()
    finally:
        sys.setswitchinterval(interval)


def test_layers_that_compare_equal_are_two_to_a_forked_child():
    class Equal(fastbn.BatchNorm):
        def __eq__(self, other):
            return True

        __hash__ = None

    one, two = Equal(3), Equal(3)
    assert {id(one), id(two)} <= set(fastbn._layer._layers)


def test_a_result_over_a_tensor_that_only_offers_dlpack(rng):
    """Red when only arrays are looked at for an overlap."""
    bn = fastbn.BatchNorm(3)
    x = rng.standard_normal((4, 3), np.float32)
    bn(arrays.Foreign(x), out=x)
    with pytest.raises(ValueError, match="wrote its result"):
        bn.backward(x)
    bn(arrays.Foreign(x), out=np.empty_like(x))
    bn.backward(x)
