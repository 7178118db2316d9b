"""_selftest -- ``python -m fastbn selftest``: checks on this CPU that results are exact and their bits always the same.

Means of up to a million standard deviations, in every layout and dtype, are normalized by the kernels of every
instruction set on several numbers of threads. What comes out is compared with plain NumPy in float64, for float64 data
in longdouble, and with each other. PyTorch's error on the same data stands beside it where PyTorch is installed.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import numpy as np

import fastbn
from fastbn import _native
from fastbn._bench import report
from fastbn._bench.cases import ITEMSIZE, OPS, Case, Shape, format_shape
from fastbn._bench.data import Array, Check, Tensors, is_known
from fastbn._bench.peers import Entry, Fastbn, Peer, Torch

# Mean and standard deviation.
OFFSETS = ((0, 1), (10, 1), (1e3, 1), (1e4, 1), (1e6, 1), (1e8, 64))
THREADS = (1, 2, 3, 8)
# Long planes, planes shorter than two vectors, channels that are no multiple of anything, and none but channels.
SHAPES: tuple[tuple[str, Shape], ...] = (
    ("NCHW", (8, 24, 28, 28)),
    ("NCHW", (24, 67, 7, 7)),
    ("NHWC", (8, 64, 14, 14)),
    ("NHWC", (8, 19, 28, 28)),
    ("NC", (1500, 100)),
)


@dataclass
class Cell:
    """One kind of data, and what was found: errors in ulp of y and dx, and sentences about what must not be."""

    dtype: str
    layout: str
    shape: Shape
    offset: float
    sigma: float
    error: float = 0
    torch: float | None = None
    breaches: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{self.dtype} {self.layout} {format_shape(self.shape)}, mean {self.offset:g}, deviation {self.sigma}"


def allowed(result: Array) -> int:
    """The promised ulps: float16 and bfloat16 are compared with the exact value rounded to them."""
    return 3 if result.itemsize >= 4 else 1


def examine(cell: Cell, torch: Peer | None) -> None:
    """Fill a cell, if its data can be represented."""
    tensors = Tensors(cell.shape, cell.dtype, cell.offset, cell.sigma)
    if not np.isfinite(tensors.get("x", "NCHW")).all():
        cell.error = np.nan
        return
    for op in OPS[:3]:
        case = Case(op, cell.shape, cell.dtype)
        check = Check(case, tensors)
        known: dict[tuple[bytes, ...], str] = {}
        for isa, threads in itertools.product(_native.isas(), THREADS):
            _native.use_isa(isa)
            with fastbn.num_threads(threads):
                results = _run(Fastbn(), case, tensors, cell.layout)
            bits = tuple(a.tobytes() for a in results.values())
            if bits in known:
                continue
            where = f"{op} ({isa}, threads={threads})"
            if known:
                cell.breaches.append(f"{where}: other bits than {next(iter(known.values()))}")
            known[bits] = where
            for name, error in check.errors(results).items():
                if results[name].ndim > 1:
                    cell.error = max(cell.error, error)
                if error > allowed(results[name]):
                    cell.breaches.append(f"{where}: {name} is off by {error:.3g} ulp, allowed {allowed(results[name])}")
        if torch:
            errors = check.errors(_run(torch, case, tensors, cell.layout))
            cell.torch = max(cell.torch or 0, errors.get("y", 0), errors.get("dx", 0))


def _run(peer: Peer, case: Case, tensors: Tensors, layout: str) -> dict[str, Array]:
    entry = Entry(case, peer, layout, fresh=not peer.can(case, layout, False))
    tensors.spoil()
    contender = entry.make(tensors)
    return contender.results(contender.run())


def table(cells: list[Cell]) -> str:
    """A row for each dtype and shape, a column for each offset: fastbn's error, PyTorch's beside it."""
    head = ["", *(f"{mean:g}" + f" ({sigma})" * (sigma != 1) for mean, sigma in OFFSETS)]
    rows = [head]
    for _, row in itertools.groupby(cells, lambda c: (c.dtype, c.layout, c.shape)):
        found = list(row)
        name = f"{found[0].dtype} {found[0].layout} {format_shape(found[0].shape)}"
        rows.append([name, *(_entry(cell) for cell in found)])
    return "\n".join(report.aligned(rows))


def _entry(cell: Cell) -> str:
    if np.isnan(cell.error):
        return "-"
    beside = "" if cell.torch is None else f" | {cell.torch:.3g}"
    return f"{cell.error:.2f}{'!' * bool(cell.breaches)}{beside}"


def selftest() -> int:
    """Examine the grid and print what was found; 1 if a promise is broken."""
    try:
        torch: Peer | None = Torch()
    except ImportError:
        torch = None
    print(report.describe(report.machine([Fastbn(), *filter(None, [torch])])), flush=True)
    cells = [
        Cell(dtype, layout, shape, offset, sigma)
        for dtype in filter(is_known, ITEMSIZE)
        for layout, shape in SHAPES
        for offset, sigma in OFFSETS
    ]
    isa = _native.isa()
    try:
        for cell in report.progress(cells):
            examine(cell, torch)
    finally:
        _native.use_isa(isa)
    beside = " | of PyTorch" if torch else ""
    print(f"\nLargest error in ulp of y and dx{beside}, by mean (and deviation, if not 1) of the data")
    print(table(cells))
    breaches = [f"{cell}: {breach}" for cell in cells for breach in cell.breaches]
    where = f"on {', '.join(_native.isas())} and {', '.join(map(str, THREADS))} threads"
    print("\n".join(["", *breaches]) if breaches else f"\nAll errors are as promised, and all bits the same {where}.")
    return int(bool(breaches))
