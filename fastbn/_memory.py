"""_memory.py -- how much memory of results that nobody holds any more is kept for the next ones, and why.

The limit is process-wide. It is, in this order:

1. ``FASTBN_RECYCLE_BYTES``: bytes, or with K, M or G behind them; 0 switches recycling off. Anything else is an error
   at import. Empty counts as unset.
2. A sixteenth of the memory that the process may use: that of the machine, or less where its cgroup or one above it
   (v1 and v2) has less; at most 1 GiB.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from fastbn import _native, _state
from fastbn._threads import cgroups, natural, read

__all__ = ["get_recycle_limit", "release_memory", "set_recycle_limit"]

MOST, MOST_EVER = 1 << 30, (1 << 62) - 1  # unasked, and asked
SHARE = 16
STALE_SECONDS = 10
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


class Choice(NamedTuple):
    """A number of bytes, and a line that says where it comes from."""

    limit: int
    reason: str


def choose(root: Path = Path("/"), environ: Mapping[str, str] = os.environ, physical: int | None = None) -> Choice:
    """Find the limit to start with, on the system whose files are under `root`."""
    own = environ.get("FASTBN_RECYCLE_BYTES", "").strip()
    if own:
        unit = _UNITS.get(own[-1].upper(), 1)
        digits = own if unit == 1 else own[:-1]
        number = natural(digits, 18)
        limit = MOST_EVER + 1 if number is None else number * unit
        if limit > MOST_EVER:
            raise ValueError(f"FASTBN_RECYCLE_BYTES must be a number of bytes, such as 0, 500000 or 64M; got {own!r}")
        return Choice(limit, f"FASTBN_RECYCLE_BYTES={own}")
    physical = _physical() if physical is None else physical
    memory = min([physical, *map(_allowed, cgroups(root, "memory"))])
    if memory // SHARE >= MOST:
        return Choice(MOST, "the most that is kept unasked")
    return Choice(memory // SHARE, f"a sixteenth of {memory} bytes of memory")


def _physical() -> int:
    """Bytes of memory that this machine has; where it does not tell, enough not to matter."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return MOST * SHARE


def _allowed(folder: Path) -> int:
    """Read the bytes that a cgroup may use; enough not to matter where nothing, or nothing sensible, is said."""
    text = read(folder / "memory.max") or read(folder / "memory.limit_in_bytes")
    number = natural(text, 19)
    return MOST * SHARE if number is None else number


CHOICE = choose()
_native.set_recycling(CHOICE.limit, STALE_SECONDS)


def why() -> str:
    """Say where the present limit comes from."""
    return CHOICE.reason if get_recycle_limit() == CHOICE.limit else "set_recycle_limit"


def set_recycle_limit(nbytes: int) -> None:
    """Set how many bytes of results that nobody holds any more are kept for the next ones, for the whole process.

    Memory for a large result is expensive: the system maps it anew for every call, page by page, which takes longer
    than the call itself. So results of 256 KiB and more, made by calls without ``out=``, get memory of earlier ones
    that are gone. Such an array is like any other: it owns its memory, which serves nothing else while anybody holds
    the array or a view of it.

    Parameters
    ----------
    nbytes : int
        0 switches recycling off, and gives idle memory back at once.

    Raises
    ------
    TypeError
        If `nbytes` is not an integer.
    ValueError
        If `nbytes` is negative, or 2**62 and more.

    See Also
    --------
    release_memory : Give idle memory back, and go on.

    Notes
    -----
    Until it is called the limit is that of the environment variable ``FASTBN_RECYCLE_BYTES`` (bytes, or as in 64M),
    else a sixteenth of the memory that the machine and its cgroups allow, at most 1 GiB; `show_config` says which.
    Sizes are rounded up by an eighth at most. There are at most 64 idle blocks, the oldest gives way to a new one, and
    what has been idle for more than 10 seconds goes back when such memory is next taken or left.

    Where the program has set a NumPy memory handler of its own, results come from that.

    Examples
    --------
    >>> import fastbn
    >>> before = fastbn.get_recycle_limit()
    >>> fastbn.set_recycle_limit(64 << 20)
    >>> fastbn.get_recycle_limit()
    67108864
    >>> fastbn.set_recycle_limit(before)
    """
    _native.set_recycling(_state.as_integer("nbytes", nbytes, 0, MOST_EVER), STALE_SECONDS)


def get_recycle_limit() -> int:
    """Return how many bytes of idle memory are kept at most.

    Returns
    -------
    int

    Examples
    --------
    >>> import fastbn
    >>> fastbn.get_recycle_limit() >= 0
    True
    """
    return _native.recycled()["limit"]


def release_memory() -> int:
    """Give all idle memory back to the system.

    Returns
    -------
    int
        How many bytes that were.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> fastbn.release_memory() >= 0
    True
    >>> fastbn.release_memory()
    0
    """
    return _native.clear_recycled()
