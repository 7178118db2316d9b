"""cases -- what can be measured: operations, shapes, dtypes and fusions, and which of them are of interest."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

Shape = tuple[int, ...]

# inference is a frozen layer, functional is batch_norm(training=False), step is a layer's forward and backward.
OPS = ("forward", "backward", "inference", "functional", "step")
ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}
FUSIONS = ("none", "relu", "residual", "residual+relu")

# Up to this size a call is overhead, not traffic, and a multiple of the copy says nothing: reports show the time.
SMALL = 64 * 1024

SHAPES: dict[str, tuple[Shape, ...]] = {
    # Every input of a batch norm in ResNet-50.
    "resnet50": (
        (32, 64, 112, 112),
        (32, 64, 56, 56),
        (32, 256, 56, 56),
        (32, 128, 28, 28),
        (32, 512, 28, 28),
        (32, 256, 14, 14),
        (32, 1024, 14, 14),
        (32, 512, 7, 7),
        (32, 2048, 7, 7),
    ),
    # As in DenseNet and GoogLeNet: channels that are no power of two, some no multiple of 16.
    "densenet": (
        (32, 96, 112, 112),
        (32, 192, 56, 56),
        (32, 208, 28, 28),
        (32, 24, 28, 28),
        (32, 480, 14, 14),
        (32, 1000, 14, 14),
        (32, 832, 7, 7),
        (32, 2208, 7, 7),
    ),
    "dense": ((256, 256), (1024, 1024), (4096, 1000), (65536, 64), (1000000, 16)),
    "tiny": ((1, 64), (60, 100), (1, 64, 7, 7)),
    # A little more than 2 GiB of float32.
    "huge": ((168, 256, 112, 112),),
    # From 1 KB of float32 to 4 GB, by fours.
    "sweep": (*((1, 64, 2**i, 2**i) for i in range(1, 5)), *((4**i, 64, 16, 16) for i in range(1, 9))),
}

# What can be varied within a group, the field of a case that it is, and all of its values; thread count 0 is all.
AXES: dict[str, tuple[str, tuple[Any, ...]]] = {
    "fuse": ("fuse", FUSIONS),
    "dtypes": ("dtype", tuple(ITEMSIZE)),
    "threads": ("threads", (1, 0)),
    "reader": ("reader", (False, True)),
}


@dataclass(frozen=True)
class Case:
    """What is measured: with ``reader`` a call and, after it, somebody who copies what it wrote."""

    op: str
    shape: Shape
    dtype: str = "float32"
    fuse: str = "none"
    threads: int = 1
    reader: bool = False

    @property
    def relu(self) -> bool:
        return "relu" in self.fuse

    @property
    def residual(self) -> bool:
        return "residual" in self.fuse

    @property
    def backward(self) -> bool:
        return self.op in ("backward", "step")

    @property
    def training(self) -> bool:
        return self.op == "forward" or self.backward

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEMSIZE[self.dtype]

    @property
    def small(self) -> bool:
        return self.nbytes <= SMALL

    @property
    def limit(self) -> float:
        """The tensors that must be read or written at least once, over the two of a copy."""
        tensors, more = {"backward": (3, 1), "step": (5, 2)}.get(self.op, (2, 1))
        return (tensors + more * self.residual) / 2 + self.reader

    @property
    def data(self) -> tuple[Shape, str]:
        """Cases with the same work on the same tensors."""
        return self.shape, self.dtype

    @property
    def section(self) -> tuple[object, ...]:
        """Cases of one section are rows of one table."""
        return self.op, self.dtype, self.fuse, self.threads, self.small, len(self.shape) == 2

    @property
    def title(self) -> str:
        fuse = "" if self.fuse == "none" else f", {self.fuse}"
        return f"{self.op}{fuse}, {self.dtype}, {_threads(self.threads)}{', and a reader' * self.reader}"

    def __str__(self) -> str:
        return f"{format_shape(self.shape)}, {self.title}"

    def mark(self, axis: str) -> str:
        """What it is on an axis."""
        if axis == "threads":
            return _threads(self.threads)
        return "and a reader" if axis == "reader" else str(getattr(self, AXES[axis][0]))


@dataclass(frozen=True)
class Selection:
    """A product of choices. No ops means those that are of interest for each set of shapes, thread count 0 all."""

    shapes: tuple[str, ...]
    ops: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ("float32",)
    fuse: tuple[str, ...] = ("none",)
    threads: tuple[int, ...] = (0,)
    reader: tuple[bool, ...] = (False,)

    def cases(self, all_threads: int) -> Iterator[Case]:
        for name in self.shapes:
            ops = self.ops or (("inference", "functional", "step") if name == "tiny" else OPS[:3])
            for shape in SHAPES.get(name) or (parse_shape(name),):
                choices = itertools.product(self.dtypes, ops, self.fuse, self.threads, self.reader)
                for dtype, op, fuse, threads, reader in choices:
                    case = Case(op, shape, dtype, fuse, threads or all_threads, reader)
                    if not case.training or math.prod(shape) > shape[1]:
                        yield case


SHORT = (Selection(("resnet50", "tiny")),)
FULL = (
    Selection(("resnet50", "densenet", "dense", "tiny"), threads=(1, 0)),
    Selection(("resnet50",), fuse=FUSIONS[1:]),
    Selection(("resnet50",), dtypes=tuple(ITEMSIZE)[1:]),
    Selection(("huge",)),
)


def union(selections: Sequence[Selection], all_threads: int) -> list[Case]:
    """Every case once, those on the same data next to each other."""
    cases = list(dict.fromkeys(case for s in selections for case in s.cases(all_threads)))
    data = list(dict.fromkeys(case.data for case in cases))
    return sorted(cases, key=lambda case: data.index(case.data))


def variants(cases: Sequence[Case], axis: str) -> list[list[Case]]:
    """Put cases together that differ in nothing but an axis, if it is one."""
    found: dict[Any, list[Case]] = {}
    for case in cases:
        same = tuple((dataclasses.asdict(case) | {AXES[axis][0]: None}).values()) if axis in AXES else case
        found.setdefault(same, []).append(case)
    return list(found.values())


def _threads(count: int) -> str:
    return f"{count} thread{'s' * (count > 1)}"


def format_shape(shape: Shape) -> str:
    return "x".join(map(str, shape))


def parse_shape(text: str) -> Shape:
    """``"32x64x56x56"`` as a shape."""
    # As many dimensions, and of float64 as many bytes, as an array can have.
    shape = tuple(map(int, text.split("x"))) if re.fullmatch(r"[0-9]{1,19}(x[0-9]{1,19}){1,63}", text) else (0,)
    if not 0 < math.prod(shape) <= sys.maxsize // 8:
        raise ValueError(f"expected one of {', '.join(SHAPES)}, or a shape such as 32x64x56x56; got {text!r}")
    return shape
