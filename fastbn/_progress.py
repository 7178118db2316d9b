"""_progress.py -- how far a loop is, for who looks at a terminal."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterable
from typing import Any

from fastbn import _native

__all__ = ["bar", "on_terminal"]


def on_terminal() -> bool:
    """Whether somebody sees a bar: not in a log, nor without a stderr, as under pythonw, or with a closed one."""
    try:
        return sys.stderr.isatty()
    except (AttributeError, ValueError):  # also of what somebody put in its place
        return False


def bar(batches: Iterable[Any], description: str, progress: bool | None) -> contextlib.AbstractContextManager[Any]:
    """Return a context that gives the batches, behind a progress bar if that is wanted."""
    wanted = on_terminal() if progress is None else _native.flag("progress", progress)
    if not wanted or sys.stderr is None:
        return contextlib.nullcontext(batches)
    try:
        tqdm = importlib.import_module("tqdm").tqdm
    except ImportError:
        if progress:
            raise ImportError("progress=True needs tqdm, which is not installed") from None
        return contextlib.nullcontext(batches)
    shown: contextlib.AbstractContextManager[Any] = tqdm(batches, desc=description, unit="batch", leave=False)
    return shown
