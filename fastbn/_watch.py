"""_watch.py -- the batch norm layers that any callable holds, and what they are given while it runs."""

from __future__ import annotations

import contextlib
import copyreg
import functools
import importlib
import os
import sys
import threading
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastbn import _native
from fastbn._layer import BatchNorm, _layers

__all__ = [
    "Layers",
    "Watch",
    "ailments",
    "aside",
    "by_batch",
    "feed",
    "find_layers",
    "named_layers",
    "on_terminal",
    "watched",
]

Layers = BatchNorm | Iterable[BatchNorm] | Mapping[str, BatchNorm]
# What a layer does instead of its forward.
Watch = Callable[[Any, Any, Any], Any]

_Path = tuple[str, ...]


def find_layers(network: Any) -> dict[str, BatchNorm]:
    """Return the layers that `network` holds under the paths to them, in the order of a walk through it.

    The walk takes attributes, slots, lists, tuples, sets and dicts, and of functions what they close over, bind and,
    in the network's own module, name.
    """
    home = getattr(network, "__module__", None)
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


def by_batch(layer: BatchNorm, x: Any, residual: Any, out: Any) -> Any:
    """What `layer` makes of a batch in training mode, and nothing else of a call: it neither moves nor remembers."""
    y, _ = _native.forward(
        x, layer._weight, layer._bias, layer.eps, layer.channel_axis, layer.activation, layer.negative_slope, residual,
        out,
    )  # fmt: skip
    return y if out is None else out


def aside(layer: BatchNorm, x: Any, residual: Any, out: Any) -> Any:
    """What `layer` makes of a batch in the mode that it is in, and nothing else of a call."""
    layer._check_channels(x)
    if layer.training or not layer.track_running_stats:
        if layer.track_running_stats and layer.on_nonfinite == "raise":
            layer._refuse_nonfinite(x)
        return by_batch(layer, x, residual, out)
    return _native.normalize(
        x, layer._running_mean, layer._running_var, layer._weight, layer._bias, layer.eps, layer.channel_axis,
        layer.activation, layer.negative_slope, residual, out,
    )  # fmt: skip


def ailments(state: Mapping[str, NDArray[Any]], eps: float) -> list[tuple[str, str]]:
    """Return what of a layer's arrays eval mode cannot work with: what is wrong in brief, and with channels and advice.

    Parameters come first: of those that are not finite statistics may follow.
    """
    found = []

    def look(name: str, wrong: str, bad: NDArray[Any], advice: str) -> None:
        if bad.any():
            channels = np.flatnonzero(bad)
            listed = ", ".join(map(str, channels[:5])) + (
                f", ... ({len(channels)} in all)" if len(channels) > 5 else ""
            )
            found.append((f"{name} is {wrong}", f"{name} is {wrong} in channels {listed}: {advice}"))

    for name in ("weight", "bias"):
        if name in state:
            look(name, "not finite", ~np.isfinite(state[name]), "go back to parameters from before that")
    for name in ("running_mean", "running_var"):
        if name in state:
            advice = "a batch that was not finite went into it. Calibrate, and see on_nonfinite of BatchNorm"
            look(name, "not finite", ~np.isfinite(state[name]), advice)
    if (var := state.get("running_var")) is not None:
        look("running_var", "negative", var < 0, "no data make it so. Calibrate, or load the statistics again")
        if eps == 0:
            advice = "and eps is 0, so eval mode divides by zero. Set eps, or calibrate if the data are not constant"
            look("running_var", "zero", var == 0, advice)
    return found


class _Watched(BatchNorm):
    """The class of a layer that is watched: below its own, so that what a subclass does around a call still happens."""

    _watch: Watch
    _own: type[BatchNorm]
    _thread: int

    def __call__(self, x: Any, residual: Any = None, out: Any = None) -> Any:
        return self._watch(x, residual, out)

    forward = __call__

    def __reduce_ex__(self, protocol: Any) -> Any:
        """As a copy or a pickle, it is of its own class, which nobody watches."""
        reduced: Any = super().__reduce_ex__(protocol)
        make, args, *rest = reduced
        # Of this one pickle wants that the class be the object's.
        if make is copyreg.__newobj__:  # type: ignore[attr-defined]
            make = object.__new__
        return make, tuple(self._own if arg is type(self) else arg for arg in args), *rest


def _release_in_child() -> None:
    """What another thread watched at the moment of a fork nobody would give back in the child."""
    for layer in list(_layers.values()):
        if isinstance(layer, _Watched) and layer._thread != threading.get_ident():
            layer.__class__ = layer._own  # type: ignore[assignment]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_release_in_child)


@contextlib.contextmanager
def watched(found: dict[str, BatchNorm], watches: Iterable[tuple[BatchNorm, Watch]]) -> Iterator[None]:
    """Let layers do something else instead of their forward, and let those that were found besides stand `aside`.

    So a call changes nothing of any layer. Each is watched by one at a time.
    """
    chosen = {id(layer): (layer, watch) for layer, watch in watches}
    others = {id(layer): (layer, functools.partial(aside, layer)) for layer in found.values()}
    with contextlib.ExitStack() as undo:
        for layer, watch in (others | chosen).values():
            with layer._lock:
                own = type(layer)
                if issubclass(own, _Watched):
                    raise RuntimeError(
                        "a layer can be calibrated or compared by one call at a time, and another is at it"
                    )
                bases = (_Watched,) if own is BatchNorm else (own, _Watched)
                undo.callback(setattr, layer, "__class__", own)
                # All that is changed is the class: one step there, and one back.
                members = {"__module__": own.__module__, "_watch": staticmethod(watch), "_own": own}
                members["_thread"] = threading.get_ident()
                layer.__class__ = type(own.__name__, bases, members)
        try:
            yield
        except ValueError as error:
            # What comes out of a layer that is ill is blamed on the data of those after it.
            for name, layer in found.items():
                state = BatchNorm.state_dict(layer)
                if layer.training or id(layer) in chosen:
                    state.pop("running_mean", None), state.pop("running_var", None)
                for _, words in ailments(state, layer.eps):
                    error.add_note(f"{name}: {words}")
            raise


def feed(batches: Iterable[Any], run: Callable[[Any], Any], description: str, progress: bool | None) -> int:
    """Run every batch (of a tuple or list, its first element) and return how many there were, at least one."""
    if not isinstance(batches, Iterable) or hasattr(batches, "__array__") or hasattr(batches, "__dlpack__"):
        kind = type(batches).__name__
        raise TypeError(f"batches must be an iterable of batches, got {kind}: put a single batch in a list")
    count = 0
    with _bar(batches, description, progress) as bar:
        for batch in bar:
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


def on_terminal() -> bool:
    """Whether somebody sees a bar: not in a log, and not without a stderr, as under pythonw."""
    return sys.stderr is not None and sys.stderr.isatty()


def _bar(batches: Iterable[Any], description: str, progress: bool | None) -> contextlib.AbstractContextManager[Any]:
    wanted = on_terminal() if progress is None else _native.flag("progress", progress)
    if not wanted or sys.stderr is None:
        return contextlib.nullcontext(batches)
    try:
        tqdm = importlib.import_module("tqdm").tqdm
    except ImportError:
        if progress:
            raise ImportError("progress=True needs tqdm, which is not installed") from None
        return contextlib.nullcontext(batches)
    bar: contextlib.AbstractContextManager[Any] = tqdm(batches, desc=description, unit="batch", leave=False)
    return bar


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
            yield from ((name, thing.__globals__[name]) for name in _names(thing.__code__) if name in thing.__globals__)
    for cls in type(thing).__mro__:
        for name in _slots(cls):
            with contextlib.suppress(AttributeError):  # not assigned yet
                yield name, cls.__dict__[name].__get__(thing)
    with contextlib.suppress(TypeError):  # no attributes
        yield from list(vars(thing).items())


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _slots(cls: type) -> list[str]:
    """Those that Python code declared: what functions and other built-in types have of the kind leads everywhere."""
    members = vars(cls).items() if "__slots__" in vars(cls) else ()
    return [name for name, value in members if isinstance(value, types.MemberDescriptorType)]
