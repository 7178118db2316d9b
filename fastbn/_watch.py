"""_watch.py -- the batch norm layers that any callable holds, and what they are given while it runs."""

from __future__ import annotations

import contextlib
import dis
import functools
import sys
import threading
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import numpy as np

from fastbn import _native
from fastbn._functional import moments
from fastbn._layer import BatchNorm
from fastbn._moments import Moments
from fastbn._progress import bar
from fastbn._state import ailments

__all__ = ["Layers", "Watcher", "find_layers", "watch"]

Layers = BatchNorm | Iterable[BatchNorm] | Mapping[str, BatchNorm]

_Path = tuple[str, ...]
_W = TypeVar("_W", bound="Watcher")
_T = TypeVar("_T")


class Watcher:
    """What is gathered of one layer while it is watched. Its network may call it from several threads."""

    def __init__(self, name: str, layer: BatchNorm) -> None:
        self.name, self.layer = name, layer

    def instead(self, x: Any, residual: Any, out: Any) -> Any:
        """What the layer does instead of its forward: normalize with the statistics of the batch, which it notes."""
        found, layer = self.look(x), self.layer
        y, _ = _native.forward(
            x, layer._weight, layer._bias, layer.eps, layer.channel_axis, layer.activation, layer.negative_slope,
            residual, out,
        )  # fmt: skip
        self._note(found)
        return y if out is None else out

    def collect(self, x: Any) -> None:
        """Note the statistics of a batch whose output is for nobody."""
        self._note(self.look(x))

    def look(self, x: Any) -> list[Moments]:
        """Return the moments of what the layer was given, and of parts of it for who asks for them.

        Raise if they are not finite or of other channels.
        """
        try:
            self.layer._check_channels(x)
            found = moments(x, channel_axis=self.layer.channel_axis)
        except Exception as error:
            error.add_note(f"in {self.name}")
            raise
        good = np.isfinite(found.mean) & np.isfinite(found.m2)
        if not good.all():
            raise ValueError(
                f"{self.name} must be given finite data, got statistics that are not finite in channels "
                f"{np.flatnonzero(~good).tolist()}"
            )
        return [found]

    def _note(self, found: list[Moments]) -> None:
        if found[0].count:
            self.add(*found)

    def add(self, found: Moments, *parts: Moments) -> None:
        raise NotImplementedError

    def refuse_single(self, found: Moments) -> None:
        if found.count < 2:
            raise ValueError(f"{self.name} needs more than 1 value per channel in every batch, got 1")


class _Session:
    """One call that watches layers. It is at them while `lock` is held: a mark of it that stays behind says nothing."""

    def __init__(self) -> None:
        self.lock, self.thread = threading.Lock(), threading.get_ident()
        self.instead: dict[int, Callable[[Any, Any, Any], Any]] = {}

    def instead_of(self, layer: BatchNorm) -> Callable[[Any, Any, Any], Any] | None:
        """What a layer with the mark of this session is to do instead of its forward, if not that."""
        return self.instead.get(id(layer)) if self.lock.locked() else None

    def claim(self, layers: Iterable[BatchNorm]) -> None:
        for layer in layers:
            with layer._lock:
                if layer._watch is not None and layer._watch.lock.locked():
                    raise RuntimeError(
                        "a layer can be calibrated or compared by one call at a time, and another is at it"
                    )
                layer._watch = self

    def release(self, layers: Iterable[BatchNorm]) -> None:
        for layer in layers:
            if layer._watch is self:  # nobody else's, where another was at it
                layer._watch = None


def watch(
    network: Callable[[Any], Any],
    batches: Iterable[Any],
    watcher: Callable[[str, BatchNorm], _W],
    conclude: Callable[[list[_W], int], _T],
    *,
    layers: Layers | None,
    description: str,
    progress: bool | None,
) -> _T:
    """Run batches through a network whose layers are watched, and return what `conclude` makes of watchers and count.

    A call changes nothing of any layer: those that are found besides stand `aside`. A layer is watched by one at a
    time, until after `conclude`.
    """
    if not callable(network):
        raise TypeError(f"network must be a BatchNorm or a callable, got {type(network).__name__}")
    found = find_layers(network)
    named = named_layers(network, found, layers)
    chosen = {id(layer): (name, layer) for name, layer in named}
    every = ({id(layer): (name, layer) for name, layer in found.items()} | chosen).values()
    # Then what it makes of a batch is for nobody, so that may be a single value; and others may call it.
    alone = len(named) == 1 and named[0][1] is network and type(network).__call__ is BatchNorm.__call__
    session = _Session()
    with session.lock:  # which, unlike code in Python, no signal can keep from giving back
        try:
            session.claim(layer for _, layer in every)
            watchers = [watcher(name, layer) for name, layer in named]
            if not alone:
                session.instead = {id(layer): functools.partial(aside, layer) for _, layer in every}
                session.instead |= {id(w.layer): w.instead for w in watchers}
            count = feed(batches, watchers[0].collect if alone else network, description, progress)
            return conclude(watchers, count)
        except ValueError as error:
            # What comes out of a layer that is ill is blamed on the data of those after it.
            for name, layer in every:
                state = BatchNorm.state_dict(layer)  # whatever a subclass says
                if layer.training or id(layer) in chosen:
                    state.pop("running_mean", None)
                    state.pop("running_var", None)
                for _, words in ailments(state, layer.eps):
                    error.add_note(f"{name}: {words}")
            raise
        finally:
            session.release(layer for _, layer in every)


def aside(layer: BatchNorm, x: Any, residual: Any, out: Any) -> Any:
    """What `layer` makes of a batch in the mode that it is in, and nothing else of a call: a twin is called."""
    twin = object.__new__(BatchNorm)
    with layer._lock:
        vars(twin).update(vars(layer), _last=threading.local())
        if layer.track_running_stats:
            twin._running_mean, twin._running_var = layer._running_mean.copy(), layer._running_var.copy()
    return twin(x, residual, out)


def find_layers(network: Any) -> dict[str, BatchNorm]:
    """Return the layers that `network` holds under the paths to them, in the order of a walk through it.

    The walk takes attributes, slots, lists, tuples, sets and dicts, what classes of objects have as attributes, and of
    functions what they close over, bind and, in the network's own module, name. Of the methods of an object these are
    `__call__` and what it leads to by name. Nothing is run for it, no property either.
    """
    function = network
    while isinstance(function, functools.partial):
        function = function.func
    home = getattr(function, "__module__", None)
    found: dict[str, BatchNorm] = {}
    seen: set[int] = set()
    waiting: deque[tuple[_Path, Any]] = deque([((), network)])
    while waiting:
        path, thing = waiting.popleft()
        if id(thing) in seen or _is_opaque(thing):
            continue
        seen.add(id(thing))
        if isinstance(thing, BatchNorm):
            # PyTorch's modules keep theirs in this attribute, which no key of theirs mentions.
            name = ".".join(part for part in path if part != "_modules") or "network"
            while name in found:  # keys may have dots, and not be text
                name += "'"
            found[name] = thing
            continue
        # Depth first: what a holder holds comes before its neighbours.
        waiting.extendleft(reversed([((*path, name), held) for name, held in _held(thing, home)]))
    return found


def named_layers(network: Any, found: dict[str, BatchNorm], layers: Layers | None) -> list[tuple[str, BatchNorm]]:
    """Return the layers with running statistics that a caller means, and raise if there is none or one has not.

    `found` is what `find_layers` found in `network`.
    """
    if layers is None:
        if not found:
            raise ValueError(
                f"network must hold a BatchNorm, and none was found in {type(network).__name__}: pass layers="
            )
        tracking = [(name, layer) for name, layer in found.items() if layer.track_running_stats]
        if not tracking:
            raise ValueError("network must hold a BatchNorm with running statistics: track_running_stats=False in all")
        return tracking
    if isinstance(layers, BatchNorm):
        layers = [layers]
    if isinstance(layers, Mapping):
        given = [(str(name), layer) for name, layer in layers.items()]
    else:
        paths = {id(layer): name for name, layer in found.items()}
        if not isinstance(layers, Iterable) or hasattr(layers, "__array__"):
            raise TypeError(f"layers must be of BatchNorm, got {type(layers).__name__}")
        given = [(paths.get(id(layer), f"layers.{i}"), layer) for i, layer in enumerate(layers)]
    if not given:
        raise ValueError("layers must have at least one BatchNorm, got none")
    for name, layer in given:
        if not isinstance(layer, BatchNorm):
            raise TypeError(f"layers must be of BatchNorm, got {type(layer).__name__} ({name})")
        if not layer.track_running_stats:
            raise ValueError(f"layers must have running statistics: track_running_stats=False in {name}")
    # Once each, by identity: a subclass may say what it likes of equality.
    once: dict[int, tuple[str, BatchNorm]] = {}
    for name, layer in given:
        once.setdefault(id(layer), (name, layer))
    return list(once.values())


def feed(batches: Iterable[Any], run: Callable[[Any], Any], description: str, progress: bool | None) -> int:
    """Run every batch (of a tuple or list, its first element) and return how many there were, at least one."""
    if not isinstance(batches, Iterable) or hasattr(batches, "__array__") or hasattr(batches, "__dlpack__"):
        kind = type(batches).__name__
        raise TypeError(f"batches must be an iterable of batches, got {kind}: put a single batch in a list")
    count = 0
    with bar(batches, description, progress) as shown:
        for batch in shown:
            if isinstance(batch, (tuple, list)):
                if not batch:
                    raise ValueError(f"batch {count} must begin with the data, got an empty {type(batch).__name__}")
                batch = batch[0]
            try:
                run(batch)
            except Exception as error:
                error.add_note(f"in batch {count}")
                raise
            count += 1
    if not count:
        raise ValueError("batches must have at least one batch, got none")
    return count


def _is_opaque(thing: Any) -> bool:
    """Whether it can hold no layer, or none of this network's: classes, modules, numbers, text, arrays and tensors."""
    return (
        thing is None
        or isinstance(thing, (type, types.ModuleType, int, float, complex, str, bytes, bytearray))
        or hasattr(type(thing), "__array_interface__")
        or hasattr(type(thing), "__dlpack__")
    )


def _held(thing: Any, home: str | None) -> Iterator[tuple[str, Any]]:
    if isinstance(thing, dict):
        yield from ((str(key), value) for key, value in list(thing.items()))
    elif isinstance(thing, (list, tuple, set, frozenset, deque)):
        yield from ((str(i), value) for i, value in enumerate(list(thing)))
    elif isinstance(thing, functools.partial):
        yield from (("func", thing.func), ("args", thing.args), ("keywords", thing.keywords))
    elif isinstance(thing, (types.MethodType, types.BuiltinMethodType)):
        yield from (("__self__", thing.__self__), ("__func__", getattr(thing, "__func__", None)))
    elif isinstance(thing, types.FunctionType):
        for name, cell in zip(thing.__code__.co_freevars, thing.__closure__ or (), strict=True):
            with contextlib.suppress(ValueError):  # not assigned yet
                yield name, cell.cell_contents
        yield from (("defaults", thing.__defaults__), ("defaults", thing.__kwdefaults__))
        if thing.__module__ == home:
            yield from (
                (name, thing.__globals__[name]) for name in _globals(thing.__code__) if name in thing.__globals__
            )
    for cls in type(thing).__mro__:
        for name in _slots(cls):
            with contextlib.suppress(AttributeError):  # not assigned yet
                yield name, cls.__dict__[name].__get__(thing)
    own: dict[str, Any] = {}
    with contextlib.suppress(TypeError):  # no attributes
        own = dict(vars(thing))
        yield from own.items()
    shared = _of_classes(type(thing))
    for name, value in shared.items():
        if name not in own and not name.startswith("__") and not hasattr(type(value), "__get__"):
            yield name, value
    # What is called by name, from `__call__` on: the list grows meanwhile.
    names = ["__call__"]
    for name in names:
        method = shared.pop(name, None)
        if isinstance(method, property):
            method = method.fget
        elif isinstance(method, (staticmethod, classmethod)):
            method = method.__func__
        if isinstance(method, types.FunctionType):
            yield name, method
            names += [each for code in _codes(method.__code__) for each in code.co_names]


def _globals(code: types.CodeType) -> Iterator[str]:
    """What it names, but no attributes, which may have the name of a global that is not meant."""
    for each in _codes(code):
        yield from (i.argval for i in dis.get_instructions(each) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME"))


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """It, and what is defined in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _of_classes(cls: type) -> dict[str, Any]:
    """What objects of it have of it and its bases, but for those of Python itself: they have what is everybody's."""
    found: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        if str(base.__module__).partition(".")[0] not in sys.stdlib_module_names:
            found |= vars(base)
    return found


def _slots(cls: type) -> list[str]:
    """Those that Python code declared: what functions and other built-in types have of the kind leads everywhere."""
    members = vars(cls).items() if "__slots__" in vars(cls) else ()
    return [name for name, value in members if isinstance(value, types.MemberDescriptorType)]
