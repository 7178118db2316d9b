"""test_calibrate -- population statistics: exact, in any order of the batches, or not at all.

The reference is the twin on the concatenated data, in float64 and wider, and fractions where that rounds.
"""

import contextlib
import copy
import functools
import gc
import io
import itertools
import pickle
import sys
import time
import types
import typing
import weakref
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np
import pytest
import twin
from numpy.testing import assert_array_equal
from tolerance import assert_close

import fastbn
from fastbn._calibrate import ExactSums
from fastbn._watch import Watcher, find_layers

SIZES = (1, 2, 700, 3, 1, 64, 17, 250, 5)


def pieces(x, sizes=SIZES):
    assert len(x) == sum(sizes)
    return np.split(x, np.cumsum(sizes)[:-1])


def bits(layer):
    return {name: array.tobytes() for name, array in layer.state_dict().items()}


def data(rng, dtype=np.float32, offset=0.0, channels=3, shape=(2, 2)):
    scale = 10.0 ** np.arange(channels).reshape(channels, *[1] * len(shape))
    return (rng.normal(size=(sum(SIZES), channels, *shape)) * scale + offset).astype(dtype)


@dataclass
class Network:
    """Two layers with something between them that is not linear; the head is in a dict in a list."""

    first: fastbn.BatchNorm = field(default_factory=lambda: fastbn.BatchNorm(3))
    rest: list = field(default_factory=lambda: [{"head": fastbn.BatchNorm(3, activation="relu")}])
    before: object = None

    def __call__(self, x):
        if self.before is not None:
            self.before(x)
        return self.rest[0]["head"](np.tanh(self.first(x)) + x)

    @property
    def layers(self):
        return [self.first, self.rest[0]["head"]]

    def change(self):
        """Statistics, modes and memories that are nobody's defaults."""
        for i, layer in enumerate(self.layers):
            layer.running_mean[...] = 5 + i
            layer.running_var[...] = 7 + i
            layer.weight[...] = [1.0, -2.0, 0.5]
            layer.bias[...] = [0.0, 1.0, 3.0]
            layer.num_batches_tracked = 11 * (i + 1)
        self.layers[1].eval()
        return self


@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_exact_is_the_whole_in_any_order(rng, dtype, offset):
    """Seeded bugs: sums in float64 (the bits differ between orders), the biased variance, a mean of means."""
    x = data(rng, dtype, offset)
    reference = twin.moments(x)
    batches, found = pieces(x), set()
    for _ in range(6):
        bn = fastbn.BatchNorm(3, dtype=dtype)
        fastbn.calibrate(bn, batches)
        found.add((bn.running_mean.tobytes(), bn.running_var.tobytes()))
        assert bn.num_batches_tracked == len(SIZES)
        rng.shuffle(batches)
    assert len(found) == 1
    # A mean near zero is the difference of larger terms.
    assert_close(bn.running_mean, reference.mean, scale=np.sqrt(reference.var()))
    assert_close(bn.running_var, reference.var(ddof=1), scale=reference.var(ddof=1))


@pytest.mark.parametrize("method", ["exact", "cumulative"])
def test_no_order_changes_a_bit_of_float64(rng, method):
    """Where every bit of the sums shows, with a mean of a million deviations. Seeded bug: sums in float64."""
    batches = [part for part in pieces(data(rng, np.float64, 1e6)) if len(part) > 1]
    found = set()
    for _ in range(20):
        bn = fastbn.BatchNorm(3, dtype=np.float64)
        fastbn.calibrate(bn, batches, method)
        found.add((bn.running_mean.tobytes(), bn.running_var.tobytes()))
        rng.shuffle(batches)
    assert len(found) == 1


def test_the_sums_are_exact(rng):
    """Against fractions, from the smallest numbers to the largest. Seeded bug: rounding a part to the unit at hand."""
    means = [[1.0, 5e-324, 1e300, -3.0], [0.1, 1e-310, -1e300, 1e16], [1e10, 2e-308, 1e299, 1.0]]
    lows = [[1e-20, 0.0, 1e280, 0.0], [0.0, 5e-324, 0.0, -1e-3], [-1e-9, 0.0, 0.0, 0.0]]
    m2s = [[0.0, 0.0, 0.0, 2.0], [3.0, 5e-324, 1e-300, 0.1], [1e-30, 0.0, 1e308, 0.0]]
    parts = [fastbn.Moments(n, *arrays) for n, *arrays in zip((1, 4, 1000), means, m2s, lows, strict=True)]
    n = sum(part.count for part in parts)
    for order in itertools.permutations(parts):
        sums = ExactSums(4)
        for part in order:
            sums.add(part)
        for channel in range(4):
            mean = [Fraction(part.mean[channel]) + Fraction(part.mean_lo[channel]) for part in parts]
            whole = sum(part.count * m for part, m in zip(parts, mean, strict=True)) / n
            spread = sum(
                Fraction(part.m2[channel]) + part.count * (m - whole) ** 2 for part, m in zip(parts, mean, strict=True)
            )
            assert sums.mean()[channel] == float(whole)
            expected = spread / (n - 1)
            assert sums.var()[channel] == (float(expected) if expected < Fraction(sys.float_info.max) else np.inf)


def test_a_constant_channel_has_no_variance_at_all():
    bn = fastbn.BatchNorm(2)
    fastbn.calibrate(bn, [np.full((n, 2), [0.1, 1e30], np.float32) for n in (3, 1, 8)])
    assert_array_equal(bn.running_mean, np.array([0.1, 1e30], np.float32))
    assert_array_equal(bn.running_var, [0.0, 0.0])


def test_cumulative_is_the_average_of_batches(rng):
    """The paper's E[mu] and m/(m-1) E[sigma^2]. Seeded bug: weights by size, or the biased variance."""
    batches = [part for part in pieces(data(rng)) if len(part) > 1]
    bn = fastbn.BatchNorm(3)
    bn.num_batches_tracked = 5
    fastbn.calibrate(bn, batches, "cumulative")
    found = [twin.moments(part) for part in batches]
    assert_close(bn.running_mean, np.mean([m.mean for m in found], axis=0))
    expected = np.mean([m.var(ddof=1) for m in found], axis=0)
    assert_close(bn.running_var, expected, scale=expected)
    assert bn.num_batches_tracked == len(batches)
    equal = np.split(data(rng)[:1000], 10)  # where all batches have m values, it is the formula of algorithm 2
    fastbn.calibrate(bn, equal, "cumulative")
    m = equal[0].size // 3
    expected = m / (m - 1) * np.mean([twin.moments(part).var() for part in equal], axis=0)
    assert_close(bn.running_var, expected, scale=expected)


def test_cumulative_keeps_both_parts_of_a_mean():
    """In float64, where the mean of a batch is no number of its own. Seeded bug: the rest of the mean left out."""
    ulp = np.finfo(np.float64).eps
    a, b = np.array([[1.0], [1.0 + ulp]]), np.array([[1.0 + ulp], [1.0 + 2 * ulp]])
    bn = fastbn.BatchNorm(1, dtype=np.float64)
    fastbn.calibrate(bn, [a, a, a, b], "cumulative")  # 1 + 3/4 ulp
    assert bn.running_mean[0] == 1.0 + ulp


@pytest.mark.parametrize("momentum", [0.1, 0.7, None])
def test_ema_is_what_training_does(rng, momentum):
    """Bit for bit, and from where the statistics are. Seeded bugs: starting afresh, a counter that stands still."""
    batches = [part for part in pieces(data(rng)) if len(part) > 1]
    trained, calibrated = (fastbn.BatchNorm(3, momentum=momentum) for _ in range(2))
    for batch in batches[:2]:
        trained(batch)
    calibrated.load_state_dict(trained.state_dict())
    for batch in batches:
        trained(batch)
    fastbn.calibrate(calibrated, batches, "ema")
    assert bits(calibrated) == bits(trained)


def test_a_layer_sees_the_batch_statistics_of_those_before(rng):
    """Seeded bug: layers that run in their own mode, of which the first here is training and the second is not."""
    batches = pieces(data(rng))
    network = Network().change()
    first, head = network.layers
    fastbn.calibrate(network, batches)
    inner = np.concatenate(
        [np.tanh(twin.batch_norm_forward(part, first.weight, first.bias)[0]) + part for part in batches]
    ).astype(np.float32)
    reference = twin.moments(inner)
    assert_close(head.running_mean, reference.mean, scale=np.sqrt(reference.var()))
    assert_close(head.running_var, reference.var(ddof=1), scale=reference.var(ddof=1))
    assert (first.num_batches_tracked, head.num_batches_tracked) == (len(SIZES), len(SIZES))


def test_layers_one_after_another_fit_eval_mode(rng):
    """The recipe of the docstring: then every layer has the statistics of what it is given in eval mode."""
    batches = pieces(data(rng))
    network = Network().change()
    first, head = network.layers
    first.eval()
    for layer in (first, head):
        fastbn.calibrate(network, batches, layers=layer)
    given = np.concatenate([np.tanh(first(part)) + part for part in batches])
    reference = twin.moments(given)
    assert_close(head.running_mean, reference.mean, scale=np.sqrt(reference.var()))
    assert_close(head.running_var, reference.var(ddof=1), scale=reference.var(ddof=1))


@pytest.mark.parametrize("method", ["exact", "ema", "cumulative"])
def test_nothing_but_statistics_changes(rng, method):
    """Neither modes, classes nor parameters, nor what a layer remembers. Seeded bug: calls that remember their x."""
    x, dy = data(rng)[:50], data(rng)[:50]
    network, twin_network = Network().change(), Network().change()
    for net in (network, twin_network):
        net.first(x)
    before = [set(vars(layer)) for layer in network.layers]
    fastbn.calibrate(network, [x[:20], x[20:]], method)
    assert [layer.training for layer in network.layers] == [True, False]
    assert [type(layer) for layer in network.layers] == [fastbn.BatchNorm] * 2
    assert [set(vars(layer)) for layer in network.layers] == before
    assert_array_equal(network.first.weight, twin_network.first.weight)
    assert_array_equal(network.first.backward(dy), twin_network.first.backward(dy))
    assert network.first.running_mean[0] != twin_network.first.running_mean[0]


class StopNowError(BaseException):
    """What no handler of exceptions catches."""


def nonfinite(x):
    bad = x.copy()
    bad[1, 2] = np.nan
    return [x, bad]


def breaking_off(x):
    yield x
    raise OSError("the disk is gone")


def interrupted(x):
    yield x
    raise StopNowError("stop now")


FAILURES = {
    "nan": (nonfinite, ValueError, r"first must be given finite data.* channels \[2\](?s:.)*in batch 1"),
    "shape": (lambda x: [x, x[:, :2]], ValueError, r"3 channels along axis 1(?s:.)*in first(?s:.)*in batch 1"),
    "dimensions": (lambda x: [x, x[0, 0, 0]], ValueError, "(?s:.)*in batch 1"),
    "type": (lambda x: [x, "x"], TypeError, "(?s:.)*in batch 1"),
    "none": (lambda x: [], ValueError, "batches must have at least one batch, got none"),
    "empty": (lambda x: [x[:0], x[:0]], ValueError, "first was given no data by any batch"),
    "tuple": (lambda x: [(x, 1), ()], ValueError, "batch 1 must begin with the data, got an empty tuple"),
    "one value": (lambda x: [x, x[:1, :, :1, :1]], ValueError, "more than 1 value per channel"),
    "iterator": (breaking_off, OSError, "the disk is gone"),
    "interrupt": (interrupted, StopNowError, "stop now"),
    "array": (lambda x: x, TypeError, "batches must be an iterable of batches, got ndarray: put a single batch"),
    "number": (lambda x: 3, TypeError, "batches must be an iterable of batches, got int"),
    "large": (lambda x: [x * np.float32(1e35), -x * np.float32(1e35)], ValueError, "variance over all batches that is"),
}


@pytest.mark.parametrize("method", ["exact", "ema", "cumulative"])
@pytest.mark.parametrize("failure", FAILURES)
def test_on_any_error_all_is_as_it_was(rng, failure, method):
    """Seeded bugs: statistics that are written as they come, layers that stay watched."""
    make, error, message = FAILURES[failure]
    network = Network().change()
    before = [bits(layer) for layer in network.layers]
    held = [set(vars(layer)) for layer in network.layers]
    with pytest.raises(error, match=message):
        fastbn.calibrate(network, make(data(rng)[:50]), method)
    assert [bits(layer) for layer in network.layers] == before
    assert [type(layer) for layer in network.layers] == [fastbn.BatchNorm] * 2
    assert [set(vars(layer)) for layer in network.layers] == held
    assert [layer.training for layer in network.layers] == [True, False]


def test_all_layers_change_or_none(rng):
    """The head alone overflows. Seeded bug: the first layer committed before the second is known to fit."""
    network = Network(rest=[{"head": fastbn.BatchNorm(3)}])
    before = bits(network.first)
    with pytest.raises(ValueError, match=r"rest\.0\.head has a variance over all batches that is not finite"):
        fastbn.calibrate(
            lambda x: network.rest[0]["head"](network.first(x) * np.float32(1e20)), [data(rng)[:9]], layers={
                "first": network.first, "rest.0.head": network.rest[0]["head"]
            }
        )  # fmt: skip
    assert bits(network.first) == before


def test_a_layer_alone_takes_single_values(rng):
    """Its output is not asked for, so a batch may have one value per channel. Seeded bug: a call of the layer."""
    x = rng.normal(size=(5, 2)).astype(np.float32)
    bn = fastbn.BatchNorm(2)
    fastbn.calibrate(bn, (row[None] for row in x))
    assert_close(bn.running_var, twin.moments(x).var(ddof=1))
    for method, message in (("exact", "more than 1 value per channel for a variance, got 1"), ("cumulative", "got 1")):
        with pytest.raises(ValueError, match=message):
            fastbn.calibrate(bn, [x[:1]], method)


def test_empty_batches_do_not_count(rng):
    x = data(rng)
    for method in ("exact", "ema", "cumulative"):
        bn, other = fastbn.BatchNorm(3), fastbn.BatchNorm(3)
        fastbn.calibrate(bn, [x[:0], x[:40], x[:0], x[40:]], method)
        fastbn.calibrate(other, [x[:40], x[40:]], method)
        assert bits(bn) == bits(other)
        assert bn.num_batches_tracked == 2


@pytest.mark.parametrize("method", ["exact", "ema", "cumulative"])
def test_a_network_of_one_layer_is_that_layer(rng, method):
    """With a residual, in place and on another axis, too."""
    x = data(rng)
    bn, other = (fastbn.BatchNorm(3, channel_axis=-1, activation="relu") for _ in range(2))
    nhwc = [np.ascontiguousarray(part.transpose(0, 2, 3, 1)) for part in (x[:40], x[40:])]
    fastbn.calibrate(bn, [part.copy() for part in nhwc], method)

    def network(batch):
        y = other(batch, residual=batch.copy(), out=batch)
        assert y is batch
        assert y.min() == 0

    fastbn.calibrate(network, [part.copy() for part in nhwc], method)
    assert bits(bn) == bits(other)


@pytest.mark.parametrize("run", ["exact", "ema", "cumulative", "gap"])
def test_the_network_goes_on_with_what_training_makes(rng, run):
    """Whatever the options and the mode of a layer. Seeded bugs: a residual, slope or eps that does not come along."""
    x, residual = data(rng)[:40], data(rng)[:40]
    bn = fastbn.BatchNorm(3, eps=0.5, activation="leaky_relu", negative_slope=0.3).eval()
    bn.weight[...], bn.bias[...] = [1.0, -2.0, 0.5], [0.0, 1.0, 3.0]
    made = []

    def network(batch):
        made.append(bn(batch, residual=residual))

    if run == "gap":
        fastbn.train_eval_gap(network, [x, x])
    else:
        fastbn.calibrate(network, [x, x], run)
    expected, _ = twin.batch_norm_forward(
        x, bn.weight, bn.bias, 0.5, activation="leaky_relu", negative_slope=0.3, residual=residual
    )
    for y in made:
        assert_close(y, expected)


class Watched:
    """A lock that notes what the statistics were when it was taken and given back."""

    def __init__(self, layer):
        self.layer, self.seen = layer, []

    def note(self, *_):
        self.seen.append((self.layer._running_mean.tobytes(), self.layer._running_var.tobytes()))

    def acquire(self):
        self.note()
        return True

    __enter__ = __exit__ = release = note


@pytest.mark.parametrize("method", ["exact", "ema", "cumulative"])
def test_statistics_change_under_the_lock(rng, method):
    """So that no call of another thread sees one of them old and one of them new."""
    network = Network()
    for layer in network.layers:
        layer._lock = Watched(layer)
        layer._lock.note()
    fastbn.calibrate(network, [data(rng)[:40]], method)
    for layer in network.layers:
        seen = layer._lock.seen
        layer._lock.note()
        first, *_, taken, given_back, now = seen
        assert first == taken != given_back == now


def test_a_layer_that_is_called_twice_sees_both(rng):
    x = data(rng)
    bn, other = fastbn.BatchNorm(3), fastbn.BatchNorm(3)
    fastbn.calibrate(lambda batch: (bn(batch), bn.forward(-batch)), [x])
    fastbn.calibrate(other, [x, -x])
    assert bits(bn) == bits(other)


def test_a_network_may_use_threads(rng, request):
    """Seeded bug: collecting from this thread alone."""
    before = sys.getswitchinterval()
    request.addfinalizer(lambda: sys.setswitchinterval(before))
    sys.setswitchinterval(1e-6)
    parts = pieces(data(rng))
    bn, other = fastbn.BatchNorm(3), fastbn.BatchNorm(3)
    with ThreadPoolExecutor(4) as pool:
        fastbn.calibrate(lambda batch: list(pool.map(bn, [batch[0:9], batch[9:20]] * 50)), [parts[2]], layers=bn)
    fastbn.calibrate(other, [parts[2][0:9], parts[2][9:20]] * 50)
    assert bits(bn) == bits(other)


class Halved(fastbn.BatchNorm):
    """A subclass that does something around the call, which calibration must go through."""

    def __call__(self, x, residual=None, out=None):
        return super().__call__(x * np.float32(0.5), residual, out)


class Direct(fastbn.BatchNorm):
    """The same, by name."""

    def __call__(self, x, residual=None, out=None):
        return fastbn.BatchNorm.__call__(self, x * np.float32(0.5), residual, out)


@pytest.mark.parametrize("cls", [Halved, Direct])
def test_a_subclass_keeps_its_call(rng, cls):
    """Seeded bug: what is watched is a method of the layer's class, which a call by name goes past."""
    x = data(rng)
    bn, other = cls(3), fastbn.BatchNorm(3)
    fastbn.calibrate(lambda batch: bn(batch), [x])
    fastbn.calibrate(other, [x * np.float32(0.5)])
    assert type(bn) is cls
    assert_array_equal(bn.running_mean, other.running_mean)


class Slotted:
    __slots__ = ("empty", "layer")

    def __init__(self, layer):
        self.layer = layer

    def run(self, x):
        return self.layer(x)


class Circle:
    def __init__(self, layer):
        self.me, self.layers = self, {"a": [layer, layer], "b": (self,)}

    def __call__(self, x):
        return self.layers["a"][0](x)


GLOBAL = fastbn.BatchNorm(3)


def through_a_name(x):
    return named(x)


def named(x):
    return [GLOBAL(part) for part in (x,)]


def held_by_a_default(x, layer=GLOBAL):
    return layer(x)


class Shared:
    """Its layer is the class's."""

    head = fastbn.BatchNorm(3)

    def __call__(self, x):
        return self.head(x)


class SharedList(Shared):
    head = None
    blocks: typing.ClassVar = [{"norm": fastbn.BatchNorm(3)}]


class Own(Shared):
    """The class's layer is hidden by its own."""

    def __init__(self):
        self.other, self.head = fastbn.BatchNorm(3), len


class Naming:
    """GLOBAL is named three calls away; `named` is a method here, and no global; and a property runs by nobody."""

    @staticmethod
    def last(x):
        return GLOBAL(x)

    def run(self, x):
        return self.last(x) + self.through_a_name

    def __call__(self, x):
        return self.run(x)

    @property
    def through_a_name(self):
        raise AssertionError("a property was run")

    def spare(self, x):
        return SPARE(x)


class Attribute:
    """The attribute has the name of a global, which is another."""

    def __init__(self, layer):
        self.GLOBAL = layer

    def __call__(self, x):
        return self.GLOBAL(x)


class Closing:
    pass


def closing(layer):
    class Local(Closing):
        def __call__(self, x):
            return layer(x)

    return Local()


SPARE = fastbn.BatchNorm(3)


def holders():
    layer = fastbn.BatchNorm(3)
    module = types.SimpleNamespace(_modules={"bn1": layer})
    yield "attribute", types.SimpleNamespace(bn=layer), "bn"
    yield "slots", Slotted(layer), "layer"
    yield "method", Slotted(layer).run, "__self__.layer"
    yield "forward", layer.forward, "__self__"
    yield "partial", functools.partial(Slotted.run, Slotted(layer)), "args.0.layer"
    yield "closure", lambda x: layer(x), "layer"
    yield "circle", Circle(layer), "layers.a.0"
    yield "dataclass", Network(layer, []), "first"
    yield "module", module, "bn1"
    yield "global", through_a_name, "named.GLOBAL"
    yield "global of a partial", functools.partial(functools.partial(through_a_name)), "func.named.GLOBAL"
    yield "class", Shared(), "head"
    yield "list of a base class", type("Sub", (SharedList,), {})(), "blocks.0.norm"
    yield "hidden", Own(), "other"
    yield "global of a method", Naming(), "last.GLOBAL"
    yield "attribute with a global's name", Attribute(layer), "GLOBAL"
    yield "closure of a class", closing(layer), "__call__.layer"
    yield "default", held_by_a_default, "defaults.0"
    yield "set", {layer}, "0"
    yield "itself", layer, "network"


@pytest.mark.parametrize(("holder", "name"), [pytest.param(h, name, id=case) for case, h, name in holders()])
def test_layers_are_found(holder, name):
    assert list(find_layers(holder)) == [name]


def test_what_classes_of_python_share_is_nobodys():
    """A finalizer knows, through its class, of all others. Seeded bug: a walk through every class."""
    mine, kept = fastbn.BatchNorm(3), [Circle(None), Circle(None)]
    finalizers = [weakref.finalize(each, held_by_a_default, fastbn.BatchNorm(3)) for each in kept]
    assert list(find_layers([finalizers[0], mine]).values()) == [mine]
    for finalizer in finalizers:
        finalizer.detach()


def test_layers_are_found_in_order_and_once():
    layers = [fastbn.BatchNorm(i + 1) for i in range(5)]
    network = [layers[0], {"left": [layers[1], layers[2]], "right": layers[3]}, layers[0], layers[4]]
    assert list(find_layers(network).values()) == layers
    deep = layers[0]
    for _ in range(10_000):  # deeper than Python's stack
        deep = [deep]
    assert list(find_layers(deep).values()) == layers[:1]


def test_layers_can_be_named(rng):
    """The others run as they are, so those that are not named keep their statistics in eval mode."""
    x = data(rng)[:50]
    network = Network().change()
    first, head = network.layers
    first.eval()
    for layers in (head, [head], [head, head], {"h": head}, iter([head])):
        network.change()
        before = bits(first)
        fastbn.calibrate(network, [x], layers=layers)
        assert bits(first) == before
        assert head.num_batches_tracked == 1


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((3, []), {}, TypeError, "network must be a BatchNorm or a callable, got int"),
        ((len, []), {}, ValueError, "network must hold a BatchNorm, and none was found in builtin_function_or_method"),
        ((Network(), [], "best"), {}, ValueError, r"method must be one of \('exact', .*\), got 'best'"),
        ((Network(), [], None), {}, TypeError, "method must be one of .* got NoneType"),
        ((Network(), []), {"layers": []}, ValueError, "layers must have at least one BatchNorm, got none"),
        ((Network(), []), {"layers": [3]}, TypeError, r"layers must be of BatchNorm, got int \(layers.0\)"),
        ((Network(), []), {"progress": 1}, TypeError, "progress"),
        (
            (fastbn.BatchNorm(3, track_running_stats=False), []),
            {},
            ValueError,
            "network must hold a BatchNorm with running statistics",
        ),
        (
            (Network(), []),
            {"layers": {"a": fastbn.BatchNorm(3, track_running_stats=False)}},
            ValueError,
            "track_running_stats=False in a",
        ),
        (
            (Network(), [np.ones((4, 3), np.float32)]),
            {"layers": {"spare": fastbn.BatchNorm(3)}},
            ValueError,
            "spare was given no data by any batch: name the layers",
        ),
    ],
)
def test_arguments_are_checked(arguments, options, error, message):
    with pytest.raises(error, match=message):
        fastbn.calibrate(*arguments, **options)


def test_one_at_a_time(rng):
    x = data(rng)[:20]
    network = Network()
    network.before = lambda _: fastbn.calibrate(network, [x])
    with pytest.raises(RuntimeError, match="by one call at a time"):
        fastbn.calibrate(network, [x])
    assert [type(layer) for layer in network.layers] == [fastbn.BatchNorm] * 2


class Bar:
    """tqdm, as far as it is used."""

    made: list = []  # noqa: RUF012

    def __init__(self, iterable, **options):
        self.iterable, self.seen = iterable, 0
        Bar.made.append((self, options))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.closed = True

    def __iter__(self):
        for item in self.iterable:
            self.seen += 1
            yield item


@pytest.mark.parametrize("run", [fastbn.calibrate, fastbn.train_eval_gap])
def test_progress(rng, monkeypatch, run):
    """None shows it on a terminal. Seeded bugs: a bar that True or False does not rule, one in a log."""
    x = data(rng)
    monkeypatch.setattr(Bar, "made", [])
    monkeypatch.setitem(sys.modules, "tqdm", types.SimpleNamespace(tqdm=Bar))
    terminal = types.SimpleNamespace(isatty=lambda: True)
    for stderr, shown in ((terminal, (True, None)), (sys.stderr, (True,))):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stderr", stderr)
            for progress in (True, False, None):
                run(fastbn.BatchNorm(3), [x, x], progress=progress)
                if progress in shown:
                    bar, _ = Bar.made.pop()
                    assert (bar.seen, bar.closed) == (2, True)
                assert Bar.made == []
    run(fastbn.BatchNorm(3), [x, x], progress=False)
    monkeypatch.setitem(sys.modules, "tqdm", None)  # as if it were not installed
    run(fastbn.BatchNorm(3), [x, x])
    with pytest.raises(ImportError, match="progress=True needs tqdm"):
        run(fastbn.BatchNorm(3), [x, x], progress=True)
    assert Bar.made == []
    monkeypatch.setattr(sys, "stderr", None)  # as under pythonw
    run(fastbn.BatchNorm(3), [x, x], progress=True)
    closed = io.StringIO()
    closed.close()
    for stderr in (None, types.SimpleNamespace(write=lambda text: None), closed):
        monkeypatch.setattr(sys, "stderr", stderr)
        run(fastbn.BatchNorm(3), [x, x])


@pytest.mark.parametrize("run", [fastbn.calibrate, fastbn.train_eval_gap])
def test_a_log_gets_no_bar(rng, capsys, run):
    pytest.importorskip("tqdm")
    run(fastbn.BatchNorm(3), [data(rng)] * 2)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("run", ["exact", "ema", "cumulative", "gap"])
@pytest.mark.parametrize("failure", [None, ZeroDivisionError, KeyboardInterrupt])
def test_layers_that_are_not_named_stand_aside(rng, run, failure):
    """Whatever their mode, with what they make of a batch, and also if it breaks off.

    Seeded bugs: layers that run as they are, which move and forget; ones that all normalize with the batch.
    """
    x, dy = data(rng)[:50], data(rng)[:50]
    others = [fastbn.BatchNorm(3), fastbn.BatchNorm(3).eval(), fastbn.BatchNorm(3, track_running_stats=False)]
    named, made = fastbn.BatchNorm(3), []
    for layer in others:
        layer(x)

    def network(batch):
        made.append([layer(batch) for layer in others])
        y = named(batch)
        if failure and len(made) == 2:
            raise failure
        return y

    before, state = [bits(layer) for layer in others], bits(named)
    with pytest.raises(failure) if failure else contextlib.nullcontext():
        if run == "gap":
            fastbn.train_eval_gap(network, [x[:20], x[20:]], layers=named)
        else:
            fastbn.calibrate(network, [x[:20], x[20:]], run, layers=named)
    assert [bits(layer) for layer in others] == before
    assert (bits(named) == state) == (bool(failure) or run == "gap")
    assert {type(layer) for layer in [named, *others]} == {fastbn.BatchNorm}
    for layer, y, z in zip(others, *made, strict=True):
        twin_layer = copy.copy(layer)
        twin_layer(x)
        assert_array_equal(layer.backward(dy), twin_layer.backward(dy))
        for batch, result in ((x[:20], y), (x[20:], z)):
            assert_array_equal(result, twin_layer(batch))


def test_a_layer_that_stands_aside_still_refuses(rng):
    """What would raise in the network does. Seeded bug: on_nonfinite left out, or shapes."""
    x = data(rng)[:50]
    guard, named = fastbn.BatchNorm(3, on_nonfinite="raise"), fastbn.BatchNorm(3)
    for bad, message in ((np.full_like(x, np.nan), "on_nonfinite='raise'"), (x[:, :2], "x must have 3 channels")):
        with pytest.raises(ValueError, match=message):
            fastbn.calibrate(lambda batch: (named(x), guard(batch)), [bad], layers=named)


def test_layers_whose_names_are_alike(rng):
    """Seeded bug: one of them lost, for it has the key of the other in a dict of names."""
    a, b = fastbn.BatchNorm(3), fastbn.BatchNorm(3)
    x = data(rng)[:50]
    for network, layers in (
        ({1: a, "1": b}, None),
        ({"p.q": a, "p": {"q": b}}, None),
        ([], {1: a, "1": b}),
        (types.SimpleNamespace(layers=[a]), [b, a]),
    ):
        a.num_batches_tracked = b.num_batches_tracked = 5

        def call(batch, network=network):
            return a(batch), b(batch)

        fastbn.calibrate(call, [x], layers=layers)
        assert (a.num_batches_tracked, b.num_batches_tracked) == (1, 1)
        if layers is None:
            assert set(map(id, find_layers(network).values())) == {id(a), id(b)}


@pytest.mark.parametrize("run", [fastbn.calibrate, fastbn.train_eval_gap])
def test_one_thread_at_a_time(rng, run):
    """A layer by itself, too. Seeded bug: a layer alone that nobody holds."""
    x = data(rng)[:20]
    bn, refused = fastbn.BatchNorm(3), []

    def batches():
        with ThreadPoolExecutor(1) as pool:
            for other in (fastbn.calibrate, fastbn.train_eval_gap):
                with pytest.raises(RuntimeError, match="by one call at a time") as error:
                    pool.submit(other, bn, [x, x]).result()
                refused.append(error)
        yield x
        yield x

    run(bn, batches())
    assert len(refused) == 2
    run(bn, [x, x])


def test_to_look_and_to_hold_is_one_step(rng):
    """Another thread comes just between, at a layer with the mark of a call that is over. Seeded bug: no lock."""
    x, bn, others = data(rng)[:20], fastbn.BatchNorm(3), []

    def batches():
        with pytest.raises(RuntimeError, match="by one call at a time"):
            others[0].result()
        yield x

    with ThreadPoolExecutor(1) as pool:

        def come_between():
            if not others:
                others.append(pool.submit(fastbn.calibrate, bn, [x]))
                wait(others, 0.05)  # in vain
            return False

        bn._watch = types.SimpleNamespace(lock=types.SimpleNamespace(locked=come_between))
        fastbn.calibrate(bn, batches())
    assert bn.num_batches_tracked == 1


def test_what_a_layer_has_is_read_once_it_is_held(rng):
    """Another call ends just before. Seeded bug: running statistics to go on from that are older than the hold."""
    bn = fastbn.BatchNorm(3)

    def end():
        bn.num_batches_tracked, bn.running_mean = 7, [100.0] * 3
        return False

    bn._watch = types.SimpleNamespace(lock=types.SimpleNamespace(locked=end))
    fastbn.calibrate(bn, [data(rng)[:20]], "ema")
    assert bn.num_batches_tracked == 8
    assert bn.running_mean.min() > 50


def test_a_layer_is_held_until_its_statistics_are_written(rng, monkeypatch):
    """Another thread comes just before. Seeded bug: a layer that is free by then."""
    x, bn, others, ready = data(rng)[:20], fastbn.BatchNorm(3), [], fastbn._calibrate._Ema.committed
    with ThreadPoolExecutor(1) as pool:

        def come_before(self):
            if not others:
                others.append(pool.submit(fastbn.calibrate, bn, [x], "ema"))
                wait(others)
            return ready(self)

        monkeypatch.setattr(fastbn._calibrate._Ema, "committed", come_before)
        fastbn.calibrate(bn, [x], "ema")
        with pytest.raises(RuntimeError, match="by one call at a time"):
            others[0].result()


class Leaving(fastbn.BatchNorm):
    """Who is at it is gone when one looks again, as with threads that run at the same time."""

    looks = ()
    _watch = property(lambda self: self.looks.pop(), lambda self, watch: None)


def test_a_call_looks_once_who_is_at_the_layer(rng):
    """Seeded bug: a second look, at nobody."""
    x, bn = data(rng)[:20], Leaving(3)
    bn.looks = [None, types.SimpleNamespace(instead_of=lambda layer: None)]
    assert_array_equal(bn(x), fastbn.BatchNorm(3)(x))


@pytest.mark.parametrize("run", [fastbn.calibrate, fastbn.train_eval_gap])
@pytest.mark.parametrize("training", [True, False])
def test_a_layer_alone_may_serve_meanwhile(rng, run, training):
    """Other threads' calls of it are no batches and do what they do, and so does `backward` after them.

    Seeded bugs: they are watched; they stand aside, so `backward` has what was before.
    """
    x, dy = data(rng)[:20], data(rng)[:20]
    bn, other = fastbn.BatchNorm(3).train(training), fastbn.BatchNorm(3).train(training)

    def serve(layer):
        return layer(x), layer.backward(dy), layer.num_batches_tracked

    def batches():
        with ThreadPoolExecutor(1) as pool:
            pool.submit(bn, dy).result()
            other(dy)
            for mine, others in zip(pool.submit(serve, bn).result(), serve(other), strict=True):
                assert_array_equal(mine, others)
        yield x
        yield 2 * x

    report = run(bn, batches())
    if run is fastbn.calibrate:
        assert bn.num_batches_tracked == 2
        assert_close(bn.running_mean, twin.moments(np.concatenate([x, 2 * x])).mean)
    else:
        assert bits(bn) == bits(other)
        assert (report.batches, bn.num_batches_tracked) == (2, 2 * training)


def interrupted_at(k, run):
    """Run it with an interrupt at the k-th point where Python hands signals over, and say whether there is one.

    Signals are handed over where a function begins and where a call of one in C ends, which is what a profiler is told.
    """
    left = k

    def count(frame, event, _):
        nonlocal left
        path = frame.f_code.co_filename
        if event in ("call", "c_return") and ("fastbn" in path or path == contextlib.__file__):
            left -= 1
            if left == 0:
                raise KeyboardInterrupt

    sys.setprofile(count)
    try:
        run()
    except KeyboardInterrupt:
        return True
    finally:
        sys.setprofile(None)
    return left <= 0


@pytest.mark.parametrize("alone", [True, False])
def test_an_interrupt_leaves_layers_free(rng, alone):
    """At any point. Seeded bugs: marks that stay and count, or locks that code in Python takes or gives back."""
    x, first, second = data(rng)[:4, :, 0, 0], fastbn.BatchNorm(3), fastbn.BatchNorm(3)
    network = first if alone else lambda x: second(first(x))
    layers = [first] if alone else [first, second]

    def use():
        """As another thread, which a lock keeps out."""
        for layer in layers:
            assert layer._lock.acquire(blocking=False)
            layer._lock.release()
            before = layer.num_batches_tracked
            layer(x)
            assert layer.num_batches_tracked == before + 1

    points = itertools.count(1)
    with ThreadPoolExecutor(1) as pool:
        while interrupted_at(next(points), lambda: fastbn.calibrate(network, [x], "ema")):
            pool.submit(use).result()
            fastbn.calibrate(network, [x], "ema")
    assert next(points) > 50


@pytest.mark.parametrize("method", ["exact", "cumulative", "ema"])
def test_threads_of_a_network_add_up_one_after_another(rng, monkeypatch, method):
    """Seeded bug: no lock."""
    owner, name = (fastbn._native, "forward_train") if method == "ema" else (ExactSums, "add")
    real, inside, most = getattr(owner, name), [], []

    def slow(*args):
        inside.append(1)
        time.sleep(1e-3)
        most.append(len(inside))
        made = real(*args)
        inside.pop()
        return made

    monkeypatch.setattr(owner, name, slow)
    x, bn = data(rng)[:20], fastbn.BatchNorm(3)
    with ThreadPoolExecutor(4) as pool:
        fastbn.calibrate(lambda batch: list(pool.map(bn, [batch] * 8)), [x], method, layers=bn)
    assert set(most) == {1}
    assert len(most) == (16 if method == "cumulative" else 8)


@pytest.mark.parametrize("run", [fastbn.calibrate, fastbn.train_eval_gap])
def test_what_was_gathered_is_gone_with_the_call(rng, monkeypatch, run):
    """At once. Seeded bug: a layer that keeps the mark of the call, and with it what holds the layer."""
    made, init = [], Watcher.__init__

    def noted(self, *args):
        made.append(weakref.ref(self))
        init(self, *args)

    monkeypatch.setattr(Watcher, "__init__", noted)
    bn = fastbn.BatchNorm(3)
    gc.collect()
    gc.disable()
    try:
        for network in (bn, lambda x: bn(x)):
            run(network, [data(rng)[:20]] * 2)
        assert [kept() for kept in made] == [None, None]
    finally:
        gc.enable()


def test_a_subclass_alone_keeps_its_call(rng):
    """Seeded bug: its batches taken for what the layer is given."""
    x = data(rng)
    bn, other = Halved(3), fastbn.BatchNorm(3)
    fastbn.calibrate(bn, [x])
    fastbn.calibrate(other, [x * np.float32(0.5)])
    assert bits(bn) == bits(other)


class Reduced(fastbn.BatchNorm):
    """Says itself how it is copied, which is anew."""

    def __reduce__(self):
        return type(self), (self.num_features,)


class Unusual(fastbn.BatchNorm):
    """Does not like to be subclassed, nor what Python alone assigns."""

    def __new__(cls, channels):
        return super().__new__(cls)

    def __getnewargs__(self):
        return (self.num_features,)

    def __init_subclass__(cls, *, kind):
        raise AssertionError(kind)

    def __setattr__(self, name, value):
        assert not name.startswith("__")
        super().__setattr__(name, value)


@pytest.mark.parametrize("cls", [fastbn.BatchNorm, Halved, Reduced, Unusual])
def test_a_copy_made_meanwhile_is_a_layer(rng, cls):
    """Which nobody watches. Seeded bugs: a class that is another while it is watched, a copy that is watched, too."""
    x, bn, made = data(rng)[:20], cls(3), []

    def network(batch):
        made.extend([copy.copy(bn), copy.deepcopy(bn), pickle.loads(pickle.dumps(bn))])
        for layer in made:
            assert type(layer) is cls
            layer(batch)
            fastbn.calibrate(layer, [batch, batch])
        return bn(batch)

    fastbn.calibrate(network, [x], layers=bn)
    assert [layer.num_batches_tracked for layer in made] == [2, 2, 2]
    assert bn.num_batches_tracked == 1
    assert_array_equal(made[0](x), made[2](x))


@pytest.mark.parametrize("method", ["exact", "ema", "cumulative"])
@pytest.mark.filterwarnings("error")
def test_errors_of_numpy_are_the_callers(method):
    """What underflows or overflows inside does not show, however strict NumPy is told to be."""
    x = np.array([[1e-22, 3e-30], [3e-22, -3e-30], [2e-22, 1e-30], [2e-22, 1e-30]], np.float32)
    bn = fastbn.BatchNorm(2, momentum=1.0)
    with np.errstate(all="raise"):
        fastbn.calibrate(bn, [x, x], method)
    assert_array_equal(bn.running_var[1], np.float32(0))
    assert 0 < bn.running_var[0] < 1e-40
    bn = fastbn.BatchNorm(2, momentum=1.0, dtype=np.float64)
    with np.errstate(all="raise"):
        fastbn.calibrate(bn, [1e-138 * x.astype(np.float64)] * 2, method)
    assert 0 < bn.running_var[0] < 1e-310


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
@pytest.mark.parametrize("method", ["exact", "ema", "cumulative"])
def test_narrow_data(rng, name, method):
    dtype = np.dtype(pytest.importorskip("ml_dtypes").bfloat16 if name == "bfloat16" else name)
    x = data(rng).astype(dtype)
    bn = fastbn.BatchNorm(3, momentum=None, dtype=dtype)
    fastbn.calibrate(lambda batch: bn(batch), [x], method)
    reference = twin.moments(x.astype(np.float64))
    assert bn.running_mean.dtype == np.float32
    assert_close(bn.running_mean, reference.mean, scale=np.sqrt(reference.var()))
    assert_close(bn.running_var, reference.var(ddof=1), scale=reference.var(ddof=1))
