"""_calibrate.py -- population statistics: the running statistics of layers, taken anew from batches of data."""

from __future__ import annotations

import functools
import threading
from collections import deque
from collections.abc import Callable, Iterable
from itertools import starmap
from operator import methodcaller
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastbn import _native
from fastbn._layer import BatchNorm
from fastbn._moments import Moments
from fastbn._watch import Layers, Watcher, watch

__all__ = ["ExactSums", "calibrate"]

_Array = NDArray[Any]
_Float64 = NDArray[np.float64]


def calibrate(
    network: Callable[[Any], Any],
    batches: Iterable[Any],
    method: str = "exact",
    *,
    layers: Layers | None = None,
    progress: bool | None = None,
) -> None:
    """Take the running statistics of batch norm layers anew, from batches of data.

    After training, the running statistics are those of the last few batches, under weights that have moved on since.
    Run this over some training data before the network serves, or after its weights were averaged, pruned or quantized.

    Parameters
    ----------
    network : BatchNorm, or callable
        A layer, whose inputs `batches` then are; or whatever calls layers when it is called with a batch. They are
        found in its attributes and those of its class, lists, dicts, dataclasses and closures; and by the names of
        globals in functions and, from `__call__` on, methods of the module that it is from itself. They are **not**
        found, unless `layers` names them, behind globals of other modules, in modules and classes themselves
        (``models.head``, ``Net.head``), in what a property or a function makes or looks up as it runs, and where only C
        code keeps them (weak references, iterators).
    batches : iterable
        Of what `network` takes. Of a tuple or list, such as (data, labels), the first element is taken.
    method : {"exact", "ema", "cumulative"}, default "exact"
        ``"exact"``: mean and unbiased variance of all values together, whatever the sizes of the batches. The bits of
        the result do not depend on the order of the batches.

        ``"cumulative"``: the average over batches of their means and of their unbiased variances, as the paper's
        algorithm 2 has it. It leaves out how the means of batches differ, and gives each batch the same weight. No
        order of the batches changes a bit of this, either.

        ``"ema"``: what training mode does to them, with the layer's `momentum`, from where they are.
    layers : BatchNorm, iterable of them, or mapping of names to them, optional
        The layers to calibrate, if not all that have running statistics. The others that are found in `network` do what
        they do in their mode, and stay as they are in training mode, too.
    progress : bool, optional
        Whether to show a progress bar, which takes tqdm. None: if it is installed and stderr is a terminal.

    Raises
    ------
    TypeError
        If an argument is of the wrong type.
    ValueError
        If there is no layer or no batch, a batch does not fit a layer or has statistics that are not finite, a layer is
        never called, or `method` is not one of these. Whatever is raised, here or by `network`, every layer is as it
        was. Notes name what is wrong with the arrays of layers of the network, where that may be why.
    RuntimeError
        If another call is calibrating or comparing one of the layers, or a network that holds one.
    ImportError
        If `progress` is True and there is no tqdm.

    Notes
    -----
    In this one pass every calibrated layer normalizes with the statistics of its batch, whatever its mode, while they
    are collected. So a deeper layer sees what it saw in training, not what it will see in eval mode, where the layers
    before it normalize with the statistics of all. The difference is of the order of one over the number of values that
    a channel has in a batch; it goes where each layer is calibrated after those before it::

        network.eval()
        for layer in layers_from_first_to_last:
            fastbn.calibrate(network, batches, layers=layer)

    All else of the network runs as it is: put it into eval mode first, lest dropout drops. Layers keep their mode,
    parameters, gradients and what they remember for `BatchNorm.backward`; only of a layer that is neither found nor
    given in `layers` nothing is known, and it does what it does. `num_batches_tracked` becomes the number of batches
    that the layer saw, and grows by it with "ema"; an empty batch does not count. No batch is kept. Meanwhile no other
    thread should call the layers of a network, nor can it calibrate others of them; a layer that is `network` itself
    may serve as ever.

    Population statistics are algorithm 2 of Ioffe & Szegedy (2015). The exact ones are the pairwise merge of Chan,
    Golub & LeVeque (1979) in integers of any length: of the moments of every batch (as `fastbn.moments` gives them)
    nothing is rounded until the last division.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> bn = fastbn.BatchNorm(1)
    >>> x = np.array([[1], [2], [3], [6]], dtype=np.float32)
    >>> fastbn.calibrate(bn, [x[:3], x[3:]])
    >>> bn.running_mean, bn.running_var.round(3), bn.num_batches_tracked
    (array([3.], dtype=float32), array([4.667], dtype=float32), 2)
    >>> bn.training
    True

    A network is anything that calls its layers:

    >>> head = fastbn.BatchNorm(1)
    >>> fastbn.calibrate(lambda x: head(np.maximum(bn(x), 0)), [x, -x])
    >>> head.num_batches_tracked
    2
    """
    _native.choice("method", method, tuple(_METHODS))
    watch(network, batches, _METHODS[method], _commit, layers=layers, description="calibrate", progress=progress)


def _commit(collectors: list[_Collector], _: int) -> None:
    """Let all layers change, or none: as in a training call, no signal comes in between."""
    ready = [c.committed() for c in collectors]
    locks = [c.layer._lock for c in sorted(collectors, key=lambda c: id(c.layer))]
    # To take a lock and to note it is one step, as to give all back is: a signal in between would leave a layer locked.
    held: list[Any] = []
    give_back: Callable[[], Any] = functools.partial(deque, map(methodcaller("release"), held), 0)
    try:
        held.extend(filter(methodcaller("acquire"), locks))
        deque(starmap(_native.commit, ready), maxlen=0)
    finally:
        give_back()


class _Collector(Watcher):
    """What becomes the statistics of one layer."""

    def __init__(self, name: str, layer: BatchNorm) -> None:
        super().__init__(name, layer)
        self.lock = threading.Lock()
        self.batches = 0

    def add(self, found: Moments, *parts: Moments) -> None:
        # Whatever the caller made of errors in NumPy: those of the network are his, and these are not.
        with self.lock, np.errstate(all="ignore"):
            self.gather(found)
            self.batches += 1

    def gather(self, found: Moments) -> None:
        raise NotImplementedError

    def statistics(self) -> tuple[_Float64, _Float64]:
        raise NotImplementedError

    def tracked(self) -> int:
        return self.batches

    def committed(self) -> tuple[BatchNorm, list[tuple[_Array, _Array]], int]:
        """What `_native.commit` takes."""
        if not self.batches:
            raise ValueError(f"{self.name} was given no data by any batch: name the layers to calibrate with layers=")
        pairs = []
        for kind, array, new in zip(
            ("mean", "variance"), (self.layer._running_mean, self.layer._running_var), self.statistics(), strict=True
        ):
            with np.errstate(all="ignore"):
                cast = np.ascontiguousarray(new, array.dtype)
            if not np.isfinite(cast).all():
                raise ValueError(f"{self.name} has a {kind} over all batches that is not finite in {array.dtype}")
            pairs.append((array, cast))
        return self.layer, pairs, self.tracked()


class _Exact(_Collector):
    def __init__(self, name: str, layer: BatchNorm) -> None:
        super().__init__(name, layer)
        self.sums = ExactSums(layer.num_features)

    def gather(self, found: Moments) -> None:
        self.sums.add(found)

    def statistics(self) -> tuple[_Float64, _Float64]:
        if self.sums.count < 2:
            raise ValueError(f"{self.name} needs more than 1 value per channel for a variance, got {self.sums.count}")
        return self.sums.mean(), self.sums.var()


class _Cumulative(_Collector):
    def __init__(self, name: str, layer: BatchNorm) -> None:
        super().__init__(name, layer)
        self.means, self.variances = ExactSums(layer.num_features), ExactSums(layer.num_features)

    def gather(self, found: Moments) -> None:
        self.refuse_single(found)
        nothing = np.zeros(self.layer.num_features)
        self.means.add(Moments(1, found.mean, nothing, found.mean_lo))
        self.variances.add(Moments(1, found.var(ddof=1), nothing))

    def statistics(self) -> tuple[_Float64, _Float64]:
        return self.means.mean(), self.variances.mean()


class _Ema(_Collector):
    """Training mode itself, on copies of the running statistics."""

    def __init__(self, name: str, layer: BatchNorm) -> None:
        super().__init__(name, layer)
        with layer._lock:
            self.mean, self.var, self.before = (
                layer._running_mean.copy(), layer._running_var.copy(), layer.num_batches_tracked,
            )  # fmt: skip

    def instead(self, x: Any, residual: Any, out: Any) -> Any:
        layer = self.layer
        self.look(x)
        with self.lock:
            momentum = 1.0 / (self.tracked() + 1) if layer.momentum is None else layer.momentum
            y, saved = _native.forward_train(
                x, self.mean, self.var, layer._weight, layer._bias, momentum, layer.eps, layer.channel_axis,
                layer.activation, layer.negative_slope, residual, out,
            )  # fmt: skip
            self.batches += saved.count > 0
        return y if out is None else out

    def collect(self, x: Any) -> None:
        # No activation with a residual comes here: the layer is called with its input alone.
        self.instead(x, None, None)

    def statistics(self) -> tuple[_Float64, _Float64]:
        return self.mean, self.var

    def tracked(self) -> int:
        return int(self.before) + self.batches


_METHODS = {"exact": _Exact, "ema": _Ema, "cumulative": _Cumulative}


class ExactSums:
    """The sums behind the mean and variance of every channel, as integers of any length: nothing is ever rounded.

    So the order of the parts does not matter, and neither does how large the mean is beside the deviation. Integers
    count in units of ``2**-unit``, which becomes finer when a part needs it.
    """

    def __init__(self, channels: int) -> None:
        self.count = 0
        self.unit = 0
        self.total = np.zeros(channels, object)
        self.squares = np.zeros(channels, object)  # of the values, in squared units

    def add(self, part: Moments) -> None:
        finer = max(_finest(part.mean), _finest(part.mean_lo), (_finest(part.m2) + 1) // 2, self.unit) - self.unit
        self.unit += finer
        self.total <<= finer
        self.squares <<= 2 * finer
        mean = _integers(part.mean, self.unit) + _integers(part.mean_lo, self.unit)
        weighted = mean * int(part.count)
        self.count += int(part.count)
        self.total += weighted
        self.squares += weighted * mean + _integers(part.m2, 2 * self.unit)

    def mean(self) -> _Float64:
        """Rounded once: the division of Python's integers is correct to the last bit."""
        return _divided(self.total, self.count << self.unit)

    def var(self) -> _Float64:
        """Of all values, unbiased."""
        spread = self.squares * self.count - self.total * self.total
        return _divided(spread, self.count * (self.count - 1) << 2 * self.unit)


def _finest(x: _Float64) -> int:
    """How many binary places suffice for all of `x`."""
    mantissa, exponent = np.frexp(x)
    return int((53 - exponent).max(initial=0, where=mantissa != 0))


def _integers(x: _Float64, unit: int) -> _Array:
    """Return ``x * 2**unit`` as Python's integers; what is not zero is a whole number of units."""
    mantissa, exponent = np.frexp(x)
    places = np.where(mantissa == 0, 0, exponent + (unit - 53))
    whole = np.ldexp(mantissa, 53).astype(np.int64).astype(object)
    scaled: _Array = whole << places.astype(object)
    return scaled


def _divided(numerators: _Array, denominator: int) -> _Float64:
    quotients = np.empty(numerators.shape)
    for i, numerator in enumerate(numerators):
        try:
            quotients[i] = numerator / denominator
        except OverflowError:
            quotients[i] = np.inf
    return quotients
