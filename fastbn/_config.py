"""_config.py -- show_config: which kernels run, on how many threads, and why."""

from __future__ import annotations

import os
import platform
from typing import Any, Literal, overload

import numpy as np

from fastbn import _memory, _native, _threads
from fastbn._version import __version__

__all__ = ["show_config"]


@overload
def show_config(mode: Literal["stdout"] = "stdout") -> None: ...
@overload
def show_config(mode: Literal["dicts"]) -> dict[str, dict[str, Any]]: ...
def show_config(mode: str = "stdout") -> dict[str, dict[str, Any]] | None:
    """Show which kernels run here, on how many threads, and why.

    Parameters
    ----------
    mode : {"stdout", "dicts"}, default "stdout"
        Whether to print, or to return dicts.

    Returns
    -------
    dict of str to dict, or None
        ``version``: of fastbn, Python and NumPy. ``isa``: the instruction set chosen, those that this machine can run
        (best first), those compiled in, and what ``FASTBN_ISA`` says. ``threads``: their number, where it comes from,
        what runs them ("pthreads", "openmp" or "serial"), and whether limits and parallel regions of OpenMP are seen.
        ``caches``: their bytes, as the plan takes them. ``recycling``: how many bytes of idle memory are kept for
        results at most, where that limit comes from, and how many there are.

    Raises
    ------
    TypeError, ValueError
        If `mode` is another.

    Examples
    --------
    >>> import fastbn
    >>> config = fastbn.show_config("dicts")
    >>> config["isa"]["chosen"] in config["isa"]["available"]
    True
    >>> config["threads"]["number"] == fastbn.get_num_threads()
    True
    """
    _native.choice("mode", mode, ("stdout", "dicts"))
    config: dict[str, dict[str, Any]] = {
        "version": {"fastbn": __version__, "python": platform.python_version(), "numpy": np.__version__},
        "isa": {
            "chosen": _native.isa(),
            "available": list(_native.isas()),
            "built": list(_native.built_isas()),
            "FASTBN_ISA": os.environ.get("FASTBN_ISA"),
        },
        "threads": {
            "number": _threads.get_num_threads(),
            "why": _threads.why(),
            "runtime": _native.parallel_runtime(),
            "sees_openmp": _native.parallel_sees_openmp(),
        },
        "caches": {name: _native.machine()[name] for name in ("l2", "l3")},
        "recycling": {
            "limit": _memory.get_recycle_limit(),
            "why": _memory.why(),
            "idle": _native.recycled()["idle"],
        },
    }
    if mode == "dicts":
        return config
    for section, entries in config.items():
        print(f"{section}:")
        for name, value in entries.items():
            print(f"  {name}: {', '.join(value) if isinstance(value, list) else value}")
    return None
