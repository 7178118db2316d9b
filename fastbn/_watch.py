"""_watch.py -- the batch norm layers that any callable holds, and what they are given while it runs."""

from __future__ import annotations

import contextlib
import functools
import importlib
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from fastbn import _native
from fastbn._layer import BatchNorm

__all__ = ["Layers", "Watch", "feed", "find_layers", "named_layers", "watched"]

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
            found[".".join(part for part in path if part != "_modules") or "network"] = thing
            continue
        # Depth first: what a holder holds comes before its neighbours.
        waiting.extendleft(reversed([((*path, name), held) for name, held in _held(thing, home)]))
    return found


def named_layers(network: Any, layers: Layers | None) -> dict[str, BatchNorm]:
    """Return the layers with running statistics that a caller means, and raise if there is none or one has not."""
    found = find_layers(network)
    if layers is None:
        if not found:
            raise ValueError(
                f"network must hold a BatchNorm, and none was found in {type(network).__name__}: pass layers="
            )
        tracking = {name: layer for name, layer in found.items() if layer.track_running_stats}
        if not tracking:
            raise ValueError("network must hold a BatchNorm with running statistics: track_running_stats=False in all")
        return tracking
    if isinstance(layers, BatchNorm):
        layers = [layers]
    if isinstance(layers, Mapping):
        given = {str(name): layer for name, layer in layers.items()}
    else:
        paths = {id(layer): name for name, layer in found.items()}
        if not isinstance(layers, Iterable) or hasattr(layers, "__array__"):
            raise TypeError(f"layers must be of BatchNorm, got {type(layers).__name__}")
        given = {paths.get(id(layer), f"layers.{i}"): layer for i, layer in enumerate(layers)}
    if not given:
        raise ValueError("layers must have at least one BatchNorm, got none")
    for name, layer in given.items():
        if not isinstance(layer, BatchNorm):
            raise TypeError(f"layers must be of BatchNorm, got {type(layer).__name__} ({name})")
        if not layer.track_running_stats:
            raise ValueError(f"layers must have running statistics: track_running_stats=False in {name}")
    # Once each, by identity: a subclass may say what it likes of equality.
    once = {id(layer): (name, layer) for name, layer in reversed(given.items())}
    return dict(reversed(once.values()))


class _Watched(BatchNorm):
    """The class of a layer that is watched: below its own, so that what a subclass does around a call still happens."""

    _watch: Watch

    def __call__(self, x: Any, residual: Any = None, out: Any = None) -> Any:
        return self._watch(x, residual, out)

    forward = __call__


@contextlib.contextmanager
def watched(watches: Iterable[tuple[BatchNorm, Watch]]) -> Iterator[None]:
    """Let layers do something else instead of their forward, and nothing else of them change."""
    with contextlib.ExitStack() as undo:
        for layer, watch in watches:
            own = type(layer)
            if isinstance(layer, _Watched):
                raise RuntimeError("a layer can be calibrated or compared by one call at a time, and another is at it")
            bases = (_Watched,) if own is BatchNorm else (own, _Watched)
            undo.callback(_unwatch, layer, own)
            layer._watch = watch  # type: ignore[attr-defined]
            layer.__class__ = type(own.__name__, bases, {"__module__": own.__module__})
        yield


def _unwatch(layer: BatchNorm, own: type[BatchNorm]) -> None:
    layer.__class__ = own
    layer.__dict__.pop("_watch", None)


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


def _bar(batches: Iterable[Any], description: str, progress: bool | None) -> contextlib.AbstractContextManager[Any]:
    if progress is not None and not _native.flag("progress", progress):
        return contextlib.nullcontext(batches)
    try:
        tqdm = importlib.import_module("tqdm").tqdm
    except ImportError:
        if progress:
            raise ImportError("progress=True needs tqdm, which is not installed") from None
        return contextlib.nullcontext(batches)
    # Of tqdm, disable=None shows it on a terminal alone.
    bar: contextlib.AbstractContextManager[Any] = tqdm(
        batches, desc=description, unit="batch", leave=False, disable=None if progress is None else False
    )
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
