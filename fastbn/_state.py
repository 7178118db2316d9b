"""_state.py -- what may become a layer's parameters and statistics: one checker, and files that cannot surprise."""

from __future__ import annotations

import contextlib
import io
import operator
import os
import re
import secrets
import shutil
import stat
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from fastbn import _native

__all__ = [
    "CHANNELS_MAX",
    "COUNTER_MAX",
    "MAX_BYTES",
    "IncompatibleKeys",
    "StateDict",
    "ailments",
    "as_affine",
    "as_axis",
    "as_dtype",
    "as_integer",
    "as_parameter",
    "check_keys",
    "check_prefix",
    "check_state",
    "label",
    "load",
    "plain",
    "read",
    "save",
    "template",
]

_Array = NDArray[Any]
_File = str | os.PathLike[str] | IO[bytes]

_COUNTER = "num_batches_tracked"
# Half of what its int64 holds: nobody can count the rest of the way.
COUNTER_MAX = 1 << 62
# Of float64, in an array.
CHANNELS_MAX = sys.maxsize // 8
# Of the dimensions that an array may have; FBN_MAX_DIMS, and NumPy's.
_MOST_AXES = 64
_FILE_VERSION = 1
# The comment of an archive: its version and how many arrays it has, so that none can get lost unnoticed.
_COMMENT = "fastbn state %d of %d arrays"
# zipfile reads the directory of an archive whole and makes an object of every entry.
_DIRECTORY_BYTES = 1 << 20
MAX_BYTES = 1 << 26
_UNREADABLE = (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, UnicodeError)


class StateDict(dict[str, _Array]):
    """A state dict: plain arrays under PyTorch's keys, and PyTorch's note of the version of that set of keys."""

    def __init__(self, arrays: Mapping[str, _Array], prefix: str = "") -> None:
        super().__init__(arrays)
        self._metadata = {prefix.removesuffix("."): {"version": 2}}


class IncompatibleKeys(NamedTuple):
    """What ``load_state_dict(strict=False)`` passed over."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def as_parameter(
    name: str,
    value: ArrayLike,
    dtype: DTypeLike,
    shape: tuple[int, ...] | None = None,
    *,
    finite: bool = False,
    positive: bool = False,
) -> _Array:
    """Return a new contiguous array of `dtype` with the values of `value`, one real number per channel."""
    array = _real_array(name, value)
    if array.ndim != 1 or (shape is not None and array.shape != shape):
        expected = "be a one-dimensional array" if shape is None else f"have shape {shape}"
        raise ValueError(f"{name} must {expected}, got shape {array.shape}")
    with np.errstate(over="ignore"):
        result = np.array(array, dtype=dtype, order="C")
    _check_values(name, result, finite, positive)
    return result


def as_affine(
    mean: ArrayLike,
    var: ArrayLike,
    weight: ArrayLike | None,
    bias: ArrayLike | None,
    names: tuple[str, str, str, str] = ("mean", "var", "weight", "bias"),
) -> tuple[_Array, _Array, _Array | None, _Array | None]:
    """Return new float64 arrays of what may serve for constants: finite numbers, and no negative variance."""
    first = as_parameter(names[0], mean, np.float64, finite=True)
    second = as_parameter(names[1], var, np.float64, first.shape, finite=True, positive=True)
    third, fourth = (
        None if value is None else as_parameter(name, value, np.float64, first.shape, finite=True)
        for name, value in zip(names[2:], (weight, bias), strict=True)
    )
    return first, second, third, fourth


def as_axis(name: str, value: Any) -> int:
    """Return `value`, which must be an axis that some array may have."""
    return as_integer(name, value, -_MOST_AXES, _MOST_AXES - 1)


def as_dtype(name: str, value: DTypeLike | None, default: DTypeLike = np.float32) -> np.dtype[Any]:
    """Return the dtype of data that `value` names; None is the default, and not float64, as it is to NumPy."""
    try:
        dtype: np.dtype[Any] | None = np.dtype(default if value is None else value).newbyteorder("=")
    except (TypeError, ValueError, RuntimeError):
        dtype = None
    if dtype is None or dtype.name not in _native.DTYPES:
        *most, last = _native.DTYPES
        raise TypeError(f"{name} must be {', '.join(most)} or {last}, got {dtype or _native.said(value)}")
    return dtype


def as_integer(name: str, value: Any, low: int, high: int = sys.maxsize) -> int:
    """Return `value`, which must be an integer within these bounds."""
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None:
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    if not low <= number <= high:
        raise ValueError(f"{name} must be from {_power(low)} to {_power(high)}, got {_native.said(number)}")
    return number


def plain(value: Any) -> _Array:
    """`numpy.asarray`; but a masked array is refused, and a tensor with a gradient to come gives its numbers alone."""
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError("a masked array would lose its mask; give its .filled(value), or its .data")
    return np.asarray(value.detach() if getattr(value, "requires_grad", False) is True else value)


def ailments(state: Mapping[str, _Array], eps: float) -> list[tuple[str, str]]:
    """Return what of a layer's arrays eval mode cannot work with: what is wrong in brief, and with channels and advice.

    Parameters come first: of those that are not finite statistics may follow.
    """
    found = []

    def look(name: str, wrong: str, bad: _Array, advice: str) -> None:
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


def template(channels: int, dtype: DTypeLike, affine: bool, track_running_stats: bool) -> dict[str, _Array]:
    """Return zeros of the shape and dtype of every entry that a layer has. They take no memory."""
    names = ("weight", "bias") * affine + ("running_mean", "running_var") * track_running_stats
    arrays: dict[str, _Array] = {name: _zeros((channels,), dtype) for name in names}
    if track_running_stats:
        arrays[_COUNTER] = _zeros((), np.int64)
    return arrays


def check_keys(what: str, value: Any, names: Collection[str]) -> None:
    """Refuse what is no mapping with these keys and no others."""
    if not isinstance(value, Mapping):
        raise TypeError(f"{what} must be a mapping, got {type(value).__name__}")
    problems = _wrong_keys([n for n in names if n not in value], [key for key in value if key not in names])
    if problems:
        raise ValueError(f"{what} must have the keys {', '.join(names)}: {'; '.join(problems)}")


def check_prefix(prefix: Any) -> None:
    """Refuse a prefix that is not a str."""
    if not isinstance(prefix, str):
        raise TypeError(f"prefix must be a str, got {type(prefix).__name__}")


def check_state(
    state: Mapping[str, Any],
    expected: Mapping[str, _Array],
    owner: str,
    *,
    prefix: str = "",
    strict: bool = True,
    optional: Iterable[str] = (),
    finite: bool = True,
) -> tuple[dict[str, _Array], IncompatibleKeys]:
    """Return new arrays with the values of `state`, in the shapes and dtypes of `expected`, or raise one ValueError.

    Everything that is wrong is named in that one error. Keys that do not begin with `prefix` belong to other layers.
    With ``strict=False`` missing and unknown keys are passed over and returned.
    """
    if not isinstance(state, Mapping):
        raise TypeError(f"state must be a mapping of names to arrays, got {type(state).__name__}")
    check_prefix(prefix)
    metadata = getattr(state, "_metadata", None)
    about = metadata.get(prefix.removesuffix(".")) if isinstance(metadata, Mapping) else None
    # The first version of PyTorch's keys, which is also what a plain dict is taken for, had no counter.
    if ((about.get("version") if isinstance(about, Mapping) else None) or 1) < 2:
        optional = {*optional, _COUNTER}
    missing = [prefix + name for name in expected if prefix + name not in state and name not in optional]
    unknown: list[Any] = [
        key
        for key in state
        if not isinstance(key, str) or (key.startswith(prefix) and key.removeprefix(prefix) not in expected)
    ]
    problems = _wrong_keys(missing, unknown) if _native.flag("strict", strict) else []
    arrays = {}
    for name, like in expected.items():
        if (key := prefix + name) in state:
            try:
                arrays[name] = _converted(label(key), state[key], like, finite, name == "running_var")
            except (TypeError, ValueError) as error:
                problems.append(str(error))
    if problems:
        raise ValueError(f"this state does not fit {owner}: {'; '.join(problems)}")
    return arrays, IncompatibleKeys(missing, [key if isinstance(key, str) else _native.said(key) for key in unknown])


def save(file: _File, state: Mapping[str, ArrayLike], *, max_bytes: int = MAX_BYTES) -> None:
    """Write arrays to an npz file, such as the state of a network.

    Nothing is written that `load` would refuse.

    Parameters
    ----------
    file : str, os.PathLike or binary file
        A path is written under another name first and renamed, so that it never holds half a file. A file that was
        there leaves its permissions; a link is followed.
    state : mapping of str to array_like
        Finite real numbers: what `load` will accept.
    max_bytes : int, default 64 MiB
        As of `load`, which must be told of more, too.

    Raises
    ------
    TypeError
        If `state` is not a mapping, a name is not a str, or an array does not hold real numbers of a NumPy type.
    ValueError
        If a value is not finite, a name cannot be one in an archive, the arrays take more than `max_bytes`, or there
        are so many that their names take more than `load` reads; or if `file` is the path of a device or a pipe. Then
        nothing is written.
    OSError
        If the file cannot be written.

    Notes
    -----
    The file holds no pickles, is the same bytes for the same arrays, and opens with `numpy.load` too.

    Examples
    --------
    >>> import fastbn, io
    >>> bn = fastbn.BatchNorm(3)
    >>> file = io.BytesIO()
    >>> fastbn.save(file, bn.state_dict(prefix="bn1."))
    >>> sorted(fastbn.load(file))[:2]
    ['bn1.bias', 'bn1.num_batches_tracked']
    """
    if not isinstance(state, Mapping):
        raise TypeError(f"state must be a mapping of names to arrays, got {type(state).__name__}")
    arrays = {}
    for name, value in state.items():
        if not isinstance(name, str):
            raise TypeError(f"a name in a state must be a str, got {type(name).__name__}")
        told = label(name)
        if zipfile.ZipInfo(name).filename != name:
            raise ValueError(f"a name in a state must be one that an archive can hold, got {_native.said(name)}")
        arrays[name] = _real_array(told, value)
        if arrays[name].dtype.kind not in "fiu":
            raise TypeError(f"{told} must be of a dtype of NumPy's own, got {arrays[name].dtype}")
        _check_finite(told, arrays[name])
    max_bytes = as_integer("max_bytes", max_bytes, 0)
    # What is read again here, by the reader that strangers' files meet, can be read again anywhere.
    draft = io.BytesIO()
    try:
        with zipfile.ZipFile(draft, "w") as archive:
            archive.comment = (_COMMENT % (_FILE_VERSION, len(arrays))).encode()
            for name, array in arrays.items():
                with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, array, allow_pickle=False)
        with zipfile.ZipFile(_Bounded(draft)) as archive:
            _read(archive, max_bytes, None)
    except (*_UNREADABLE, ValueError, struct.error) as error:  # struct.error: a name of more than 65535 bytes
        raise ValueError(f"state must be such that it can be loaded again: {_cut(str(error))}") from error
    with _written(file) as target:
        rest = draft.getbuffer()
        while len(rest):
            count = target.write(rest)
            if count is None and not isinstance(target, io.RawIOBase):
                break  # not a file of Python's, which tells how much it took
            if not count:
                raise OSError(f"file must take all that is written, got one that left {len(rest)} bytes")
            rest = rest[count:]


def load(file: _File, *, max_bytes: int = MAX_BYTES) -> dict[str, _Array]:
    """Read the arrays of an npz file that may come from anybody.

    Parameters
    ----------
    file : str, os.PathLike or binary file
        A file of `save` or of `numpy.savez`.
    max_bytes : int, default 64 MiB
        The most that the arrays may take, together, when inflated.

    Returns
    -------
    dict of str to numpy.ndarray

    Raises
    ------
    OSError
        If the file cannot be opened.
    ValueError
        If it is not a regular file, nor an npz file, is truncated or damaged, was written by a newer fastbn, takes more
        than `max_bytes`, or holds anything but finite real numbers. Nothing in it is ever executed.

    Examples
    --------
    >>> import fastbn, io, numpy as np
    >>> file = io.BytesIO()
    >>> np.savez_compressed(file, weight=np.zeros(100_000))
    >>> len(file.getvalue()) < 2_000
    True
    >>> fastbn.load(file, max_bytes=10_000)
    Traceback (most recent call last):
    ...
    ValueError: not a state file that can be loaded: its arrays take 800128 bytes, and max_bytes allows 10000
    """
    return read(file, max_bytes)


def read(
    file: _File, max_bytes: int = MAX_BYTES, check: Callable[[dict[str, _Array]], object] | None = None
) -> dict[str, _Array]:
    """`load`, with a `check` that may raise before anything is inflated.

    It is called with arrays of zeros that have the names, shapes and dtypes in the file and take no memory.
    """
    max_bytes = as_integer("max_bytes", max_bytes, 0)
    with _opened(file) as source:
        try:
            with zipfile.ZipFile(_Bounded(source)) as archive:
                return _read(archive, max_bytes, check)
        except _UNREADABLE as error:
            text = _cut(str(error)) or type(error).__name__
            raise ValueError(f"not a state file that can be loaded: {text}") from error


class _BadFileError(RuntimeError):
    """Something is wrong with a file; `load` tells it as a ValueError."""


class _Bounded:
    """A file for zipfile, which believes what it reads: that refuses to be read in one piece, or before its start."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.seekable = file.seekable
        self.tell = file.tell

    def seek(self, offset: int, whence: int = 0) -> int:
        if whence == 0 and offset < 0:
            raise _BadFileError("an offset in it is negative")
        return self._file.seek(offset, whence)

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size if 0 <= size <= _DIRECTORY_BYTES else _DIRECTORY_BYTES + 1)
        if not isinstance(data, bytes):
            raise _BadFileError(f"its read gives {type(data).__name__}, and not bytes")
        if len(data) > _DIRECTORY_BYTES:
            raise _BadFileError("its directory is too long")
        return data


def _read(
    archive: zipfile.ZipFile, max_bytes: int, check: Callable[[dict[str, _Array]], object] | None
) -> dict[str, _Array]:
    entries = archive.infolist()
    if archive.comment:
        numbers = re.fullmatch(_COMMENT.replace("%d", r"(\d{1,9})").encode(), archive.comment)
        if numbers is None:
            raise _BadFileError("its comment is not that of a state")
        version, count = map(int, numbers.groups())
        if version > _FILE_VERSION:
            raise _BadFileError(f"its version is {version}, and this fastbn reads up to {_FILE_VERSION}")
        if count != len(entries):
            raise _BadFileError(f"{count} arrays were written, and {len(entries)} are in it")
    total = sum(entry.file_size for entry in entries)
    if total > max_bytes:
        raise _BadFileError(f"its arrays take {total} bytes, and max_bytes allows {max_bytes}")
    outline: dict[str, _Array] = {}
    for entry in entries:
        name = entry.filename.removesuffix(".npy")
        if name in outline or name == entry.filename:
            wrong = "twice in it" if name in outline else "not an array"
            raise _BadFileError(f"{_native.said(entry.filename)} is {wrong}")
        # The other methods take memory of their own before they give a byte.
        if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise _BadFileError(f"{_native.said(name)} is compressed by method {entry.compress_type}")
        outline[name] = _outline(archive, entry, name)
    if check is not None:
        check(outline)
    arrays = {}
    for entry, name in zip(entries, outline, strict=True):
        try:
            with archive.open(entry) as member:
                arrays[name] = np.lib.format.read_array(member, allow_pickle=False)
        except ValueError as error:
            raise _BadFileError(f"{_native.said(name)} cannot be read: {error}") from error
        _check_finite(label(name), arrays[name])
    return arrays


def _outline(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, name: str) -> _Array:
    """Zeros like the array that an entry says it holds, after a look at its header alone."""
    said = _native.said(name)
    with archive.open(entry) as member:
        try:
            if np.lib.format.read_magic(member) != (1, 0):
                raise ValueError
            shape, _, dtype = np.lib.format.read_array_header_1_0(member)
            array = _zeros(shape, dtype)
        except Exception:  # ValueError as a rule, but NumPy's parser lets others out too
            raise _BadFileError(f"the header of {said} cannot be read") from None
        if dtype.kind not in "fiu":
            raise _BadFileError(f"{said} must hold real numbers, got {_cut(str(dtype))}")
        told = member.tell() + array.nbytes
        if told != entry.file_size:
            raise _BadFileError(f"{said} has {entry.file_size} bytes, and its header tells of {told}")
    return array


def _array(name: str, value: Any) -> _Array:
    try:
        return plain(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} must be an array of real numbers, got {type(value).__name__}: {error}") from error


def _real_array(name: str, value: Any) -> _Array:
    array = _array(name, value)
    if array.dtype.kind not in "fiu" and array.dtype.name != "bfloat16":
        raise TypeError(f"{name} must be an array of real numbers, got {_kind(value, array)}")
    return array


def _converted(name: str, value: Any, like: _Array, finite: bool, positive: bool) -> _Array:
    if like.dtype.kind == "i":
        array = _array(name, value)
        if array.shape:
            raise ValueError(f"{name} must have shape (), got {array.shape}")
        return np.array(as_integer(name, array[()], 0, COUNTER_MAX), like.dtype)
    array = _real_array(name, value)
    if array.dtype.kind in "iu":
        raise ValueError(f"{name} must be of floating dtype, got {_kind(value, array)}")
    if array.shape != like.shape:
        raise ValueError(f"{name} must have shape {like.shape}, got {array.shape}")
    with np.errstate(over="ignore"):
        result = np.array(array, dtype=like.dtype, order="C")
    _check_values(name, result, finite, positive)
    return result


def _check_values(name: str, array: _Array, finite: bool, positive: bool) -> None:
    if finite and not (good := np.isfinite(array)).all():
        raise ValueError(f"{name} must be finite in {array.dtype}, got {np.count_nonzero(~good)} values that are not")
    if positive and (negative := np.flatnonzero(array < 0)).size:
        raise ValueError(f"{name} must not be negative, got {array[negative[0]]} in channel {negative[0]}")


def _check_finite(name: str, array: _Array) -> None:
    if not np.isfinite(array).all():
        raise ValueError(f"{name} must be finite, got {np.count_nonzero(~np.isfinite(array))} values that are not")


def _zeros(shape: tuple[int, ...], dtype: DTypeLike) -> _Array:
    return np.broadcast_to(np.zeros((), dtype), shape)


def _kind(value: object, array: _Array) -> str:
    """Say what came where it is not the kind of array that was asked for."""
    if hasattr(value, "dtype"):
        return _cut(str(array.dtype))
    return type(value).__name__ + (f" of {_cut(str(array.dtype))}" if array.ndim else "")


def _power(number: int) -> str:
    """Write a bound; the large ones are powers of two, or one less."""
    exponent = number.bit_length()
    if exponent < 32:
        return str(number)
    return f"2**{exponent} - 1" if number == (1 << exponent) - 1 else f"2**{exponent - 1}"


def _wrong_keys(missing: list[str], unknown: list[Any]) -> list[str]:
    return [f"{what} {_listed(keys)}" for what, keys in (("missing", missing), ("unknown", unknown)) if keys]


def _listed(names: list[Any], limit: int = 8) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(map(label, names[:limit])) + more


def label(name: Any) -> str:
    """A name that may be anybody's, for a message: as it is if it is text that prints in a line, else as a literal."""
    return name if isinstance(name, str) and name.isprintable() and len(name) <= 80 else _native.said(name)


def _cut(text: str) -> str:
    """Text in which there may be anybody's, and whatever that is as a literal."""
    return text if len(text) <= 200 else f"{text[:180]}... ({len(text)} characters)"


def _opened(file: _File) -> contextlib.AbstractContextManager[IO[bytes]]:
    if isinstance(file, (str, os.PathLike)):
        return open(file, "rb", opener=_open_regular)
    return contextlib.nullcontext(_binary(file, "read", "seek", "tell", "seekable"))


def _open_regular(path: str, flags: int) -> int:
    """Open a file as `open` asks for it, but wait for nobody who would write to a pipe."""
    descriptor = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
    try:
        _check_regular(os.fstat(descriptor).st_mode)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _check_regular(mode: int) -> None:
    if stat.S_ISREG(mode) or stat.S_ISDIR(mode):  # of a folder the system says that it is one
        return
    kinds = (
        (stat.S_ISFIFO, "a pipe"),
        (stat.S_ISSOCK, "a socket"),
        (stat.S_ISCHR, "a device"),
        (stat.S_ISBLK, "a device"),
    )
    kind = next((kind for is_kind, kind in kinds if is_kind(mode)), "something else")
    raise ValueError(f"file must be the path of a regular file, got that of {kind}")


def _binary(file: Any, *methods: str) -> IO[bytes]:
    if isinstance(file, io.TextIOBase) or not all(hasattr(file, name) for name in methods):
        raise TypeError(f"file must be a path or a binary file with {', '.join(methods)}, got {type(file).__name__}")
    binary: IO[bytes] = file
    return binary


@contextlib.contextmanager
def _written(file: _File) -> Any:
    if not isinstance(file, (str, os.PathLike)):
        yield _binary(file, "write")
        return
    path = os.fsdecode(file)
    if os.path.islink(path):
        path = os.path.realpath(path)
    # A short name, which fits where the file's own does.
    part = os.path.join(os.path.dirname(path), f"{secrets.token_hex(8)}.part")
    try:
        with contextlib.suppress(FileNotFoundError):
            _check_regular(os.stat(path).st_mode)
        with open(part, "xb") as target:
            with contextlib.suppress(FileNotFoundError):
                shutil.copymode(path, part)
            yield target
            target.flush()
            os.fsync(target.fileno())
        os.replace(part, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(part)
        if isinstance(error, OSError) and error.filename is not None:  # not of a file that the caller does not know
            raise type(error)(error.errno, error.strerror, os.fsdecode(file)) from None
        raise
