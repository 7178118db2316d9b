"""data -- the tensors of a benchmark in every memory layout, and what must come of them, by plain NumPy."""

from __future__ import annotations

import importlib
import importlib.util
import math
import re
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fastbn._bench.cases import Case, Shape

Array = npt.NDArray[Any]
EPS = 1e-5

# The reference is worked out on whole channels, evenly spread, of about this many elements.
CHECKED = 1 << 21
# What is drawn at random; the rest of a larger tensor repeats its first images.
DRAWN = 1 << 28


def is_known(name: str) -> bool:
    """Whether NumPy has this dtype here."""
    return name != "bfloat16" or importlib.util.find_spec("ml_dtypes") is not None


def dtype_of(name: str) -> np.dtype[Any]:
    return np.dtype(importlib.import_module("ml_dtypes").bfloat16 if name == "bfloat16" else name)


def param_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    return np.dtype(np.float64 if dtype.itemsize == 8 else np.float32)


def epsilon(dtype: np.dtype[Any]) -> float:
    """The distance from 1 to the next number."""
    return 2.0**-7 if dtype.name == "bfloat16" else float(np.finfo(dtype).eps)


def aligned(shape: Shape, dtype: np.dtype[Any]) -> Array:
    """Uninitialized memory that starts a cache line, which NumPy's own need not."""
    nbytes = math.prod(shape) * dtype.itemsize
    raw = np.empty(nbytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + nbytes].view(dtype).reshape(shape)


def _block(layout: str) -> int:
    """8 of NCHW8c."""
    match = re.fullmatch(r"NCHW(\d+)c", layout)
    return int(match[1]) if match else 0


def to_layout(a: Array, layout: str) -> Array:
    """(N, C, ...) with the axes in the order of memory: NCHW, NHWC, or blocked as in NCHW8c."""
    if layout == "NHWC":
        return np.moveaxis(a, 1, -1)
    if block := _block(layout):
        return np.moveaxis(a.reshape(len(a), -1, block, *a.shape[2:]), 2, -1)
    return a


def logical(a: Array, layout: str) -> Array:
    """The inverse of to_layout."""
    if layout == "NHWC":
        return np.moveaxis(a, -1, 1)
    if _block(layout):
        return np.moveaxis(a, -1, 2).reshape(len(a), -1, *a.shape[2:-1])
    return a


class Tensors:
    """The data of one shape and dtype; a layout's copy is made when it is first asked for.

    ``x`` is about ``offset``, with a deviation of about ``sigma``. With ``inplace`` it is also the output.
    """

    def __init__(self, shape: Shape, dtype: str, offset: float = 0, sigma: float = 1, *, inplace: bool = False) -> None:
        self.shape, self.dtype, self.channels, self.inplace = shape, dtype_of(dtype), shape[1], inplace
        self._made: dict[tuple[str, str], Array] = {}
        rng = np.random.default_rng(0)
        self._spread = {"x": (sigma, offset)}

        def parameter(centre: float, width: float) -> Array:
            return (centre + width * rng.uniform(-0.5, 0.5, self.channels)).astype(param_dtype(self.dtype))

        self.weight, self.bias = parameter(1, 1), parameter(0, 1)
        self.mean, self.var = parameter(offset, sigma), parameter(sigma**2, sigma**2)

    def get(self, name: str, layout: str) -> Array:
        """``x``, ``dy`` or ``residual``, contiguous in ``layout``."""
        layout = "NCHW" if layout == "NC" else layout
        if (name, layout) not in self._made:
            if layout == "NCHW":
                made = aligned(self.shape, self.dtype)
                self._fill(name, made)
            else:
                view = to_layout(self.get(name, "NCHW"), layout)
                made = aligned(view.shape, self.dtype)
                np.copyto(made, view)
            self._made[name, layout] = made
        return self._made[name, layout]

    def out(self, layout: str) -> Array:
        """Where results go: one piece of memory for every layout."""
        return self._out.reshape(to_layout(np.broadcast_to(np.uint8(0), self.shape), layout).shape)

    @property
    def nbytes(self) -> int:
        """All memory that has been made so far."""
        others = [self.__dict__[name] for name in ("_out", "spare") if name in self.__dict__ and not self.inplace]
        return sum(a.nbytes for a in (*self._made.values(), *others))

    def spoil(self) -> None:
        """Fill the output with NaN, so that a result nobody wrote is seen; in place, with the input again."""
        if self.inplace:
            self._fill("x", self.get("x", "NCHW"))
        else:
            self._out.view(np.uint8).fill(0xFF)

    @cached_property
    def _out(self) -> Array:
        return self.get("x", "NCHW").reshape(-1) if self.inplace else aligned((math.prod(self.shape),), self.dtype)

    @cached_property
    def spare(self) -> Array:
        """Where a reader of the output leaves its copy."""
        made = aligned(self.shape, self.dtype)
        made.view(np.uint8).fill(0)
        return made

    def _fill(self, name: str, made: Array) -> None:
        rng = np.random.default_rng(list(name.encode()))
        column = (1, self.channels) + (1,) * (len(self.shape) - 2)
        sigma, offset = self._spread.get(name, (1, 0))
        scale, shift = sigma * rng.uniform(0.5, 2, column), offset + sigma * rng.uniform(-1, 1, column)
        scale, shift = scale.astype(param_dtype(self.dtype)), shift.astype(param_dtype(self.dtype))
        step = max(1, CHECKED * len(made) // made.size)
        for n in range(0, len(made), step):
            part = made[n : n + step]
            if n * made[0].size >= DRAWN:
                part[...] = made[: len(part)]
                continue
            with np.errstate(over="ignore"):
                part[...] = rng.standard_normal(part.shape, np.float32) * scale + shift


class Expected(NamedTuple):
    """A result in float64 or longdouble, and the size of what was added up for it."""

    value: Array
    scale: Array


def reference(
    x: Array,
    weight: Array,
    bias: Array,
    statistics: tuple[Array, Array] | None = None,
    dy: Array | None = None,
    residual: Array | None = None,
    relu: bool = False,
) -> dict[str, Expected]:
    """Batch norm of (N, C, ...) as textbooks write it: y, and for a ``dy`` also dx, dw, db and dr.

    Without ``statistics`` they are the batch's. Sources: Ioffe & Szegedy, "Batch Normalization" (2015), algorithm 1
    and the gradients of section 3.
    """
    wide = np.longdouble if x.dtype.itemsize == 8 else np.float64

    def column(a: Array) -> Array:
        return a.astype(wide).reshape(-1, *(1,) * (x.ndim - 2))

    axes = (0, *range(2, x.ndim))
    centred, w = x.astype(wide), column(weight)
    if statistics is None:
        for _ in range(2):  # again, because the rounding of a large mean takes what longdouble has more than float64
            centred = centred - centred.mean(axes, keepdims=True)
        var = np.square(centred).mean(axes, keepdims=True)
    else:
        centred, var = centred - column(statistics[0]), column(statistics[1])
    inv = 1 / np.sqrt(var + EPS)
    x_hat = centred * inv
    z = x_hat * w + column(bias)
    size = np.abs(z)
    if residual is not None:
        z += residual.astype(wide)
        size += np.abs(residual.astype(wide))
    found = {"y": Expected(np.maximum(z, 0) if relu else z, np.maximum(1, size))}
    if dy is not None:
        dr = dy.astype(wide)
        size = np.abs(dr)
        if relu:
            dr = np.where(z > 0, dr, 0)
            # Within the rounding of z its sign may go either way, and with it the whole of a gradient.
            eps = epsilon(weight.dtype)
            near = np.abs(z) <= 300 * eps + 4 * epsilon(x.dtype)
            size = np.where(near, size / eps, np.abs(dr))
        n = x.size // x.shape[1]
        dw, db = (dr * x_hat).sum(axes, keepdims=True), dr.sum(axes, keepdims=True)
        dw_size, db_size = (size * np.abs(x_hat)).sum(axes, keepdims=True), size.sum(axes, keepdims=True)
        dx_size = np.abs(w) * inv * (size + (db_size + np.abs(x_hat) * dw_size) / n)
        found |= {
            "dx": Expected(w * inv * (dr - (db + x_hat * dw) / n), np.maximum(1, dx_size)),
            "dr": Expected(dr, np.maximum(1, size)),
            "dw": Expected(dw.ravel(), dw_size.ravel()),
            "db": Expected(db.ravel(), db_size.ravel()),
        }
    return found


def error(got: Array, expected: Expected) -> float:
    """The largest error in ulp at the expected scale, for narrow types from the rounded value; NaN is infinite."""
    value, dtype = expected.value, got.dtype
    if dtype.itemsize < 4:
        value = value.astype(dtype).astype(value.dtype)
    difference = np.abs(got.astype(value.dtype) - value)
    with np.errstate(invalid="ignore"):  # a sum of nothing but zeros has no scale
        largest = float(np.where(difference == 0, 0, difference / (expected.scale * epsilon(dtype))).max())
    return largest if largest == largest else math.inf


class Check:
    """What the results of a case must be on the checked channels."""

    def __init__(self, case: Case, tensors: Tensors) -> None:
        # A few roundings of the result, and the sums of a careful program in the precision of the parameters.
        self.tolerance = 4 + 256 * epsilon(param_dtype(tensors.dtype)) / epsilon(tensors.dtype)
        count = math.prod(tensors.shape) // tensors.channels
        checked = min(tensors.channels, max(1, CHECKED // count))
        self._channels = np.linspace(0, tensors.channels - 1, checked).astype(np.intp)

        def pick(name: str, wanted: bool = True) -> Array | None:
            return tensors.get(name, "NCHW")[:, self._channels] if wanted else None

        weight, bias, mean, var = (a[self._channels] for a in (tensors.weight, tensors.bias, tensors.mean, tensors.var))
        x, dy, residual = pick("x"), pick("dy", case.backward), pick("residual", case.residual)
        assert x is not None
        self._expected = reference(x, weight, bias, None if case.training else (mean, var), dy, residual, case.relu)

    def errors(self, results: dict[str, Array]) -> dict[str, float]:
        """The largest error of each result, in ulp."""
        return {
            name: error(a[self._channels] if a.ndim == 1 else a[:, self._channels], self._expected[name])
            for name, a in results.items()
        }
