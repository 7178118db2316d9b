"""arrays -- test data: random arrays of every dtype, and the same numbers in every arrangement of memory."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np

try:
    from ml_dtypes import bfloat16
except ImportError:
    bfloat16 = None

Array = np.ndarray[Any, Any]
View = Callable[[Array], Array]

ACTIVATIONS = (None, "relu", "relu6", "leaky_relu")
FLOAT32, FLOAT64, FLOAT16 = np.dtype(np.float32), np.dtype(np.float64), np.dtype(np.float16)
BF16_ALONE = ("avx512_bf16",)  # tiers whose kernels of other dtypes are the next tier's
DTYPES = {"f32": FLOAT32, "f64": FLOAT64, "f16": FLOAT16, "bf16": None if bfloat16 is None else np.dtype(bfloat16)}


def parameter_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """What weight, bias and running statistics are made of for data of this dtype."""
    return FLOAT64 if dtype.itemsize == 8 else FLOAT32


def normal(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any, mean: Any = 0.0, std: float = 1.0) -> Array:
    with np.errstate(all="ignore"):
        return (rng.standard_normal(shape) * std + mean).astype(dtype)


def parameters(rng: np.random.Generator, channels: int, dtype: np.dtype[Any]) -> tuple[Array, Array]:
    """A weight in 0.5..1.5 of either sign and a bias in -1..1, so that results stay near 1."""
    weight = rng.uniform(0.5, 1.5, channels) * rng.choice([-1, 1], channels)
    return weight.astype(parameter_dtype(dtype)), rng.uniform(-1, 1, channels).astype(parameter_dtype(dtype))


def same_bytes(a: Array, b: Array) -> bool:
    """Equal to the last bit, whatever the strides; NaN equals NaN of the same payload."""
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


# The two families, each as the shape of (outer, channels, inner) and the axis that holds the channels.
def nchw(outer: int, channels: int, inner: int) -> tuple[tuple[int, ...], int]:
    return (outer, channels, inner), 1


def nhwc(outer: int, channels: int, inner: int) -> tuple[tuple[int, ...], int]:
    return (outer, inner, channels), -1


LAYOUTS = {"nchw": nchw, "nhwc": nhwc}


# Arrangements of memory. Each takes an array and returns one of the same shape, dtype and values.


def permuted(order: tuple[int, ...]) -> View:
    """Axis order[0] varies slowest in memory, order[-1] fastest."""
    inverse = np.argsort(order)
    return lambda x: np.ascontiguousarray(x.transpose(order)).transpose(inverse)


def stepped(axis: int, step: int) -> View:
    """Every |step|-th place of a larger array along axis; what lies between is NaN."""

    def view(x: Array) -> Array:
        shape = list(x.shape)
        shape[axis] = shape[axis] * abs(step) + 1
        larger = np.full(shape, np.nan, x.dtype)
        index: list[slice] = [slice(None)] * x.ndim
        index[axis] = slice(0, x.shape[axis] * abs(step), abs(step))
        inside = larger[tuple(index)]
        if step < 0:
            inside = np.flip(inside, axis)
        inside[...] = x
        return inside

    return view


def window(x: Array) -> Array:
    """The middle of an array that is larger on every side; around it lies NaN."""
    larger = np.full([n + 3 for n in x.shape], np.nan, x.dtype)
    inside = larger[tuple(slice(1, n + 1) for n in x.shape)]
    inside[...] = x
    return inside


def misaligned(x: Array) -> Array:
    """One byte off any alignment."""
    raw = np.zeros(x.nbytes + 1, np.uint8)
    shifted = raw[1:].view(x.dtype).reshape(x.shape)
    shifted[...] = x
    return shifted


def unaligned_to_vectors(x: Array) -> Array:
    """Aligned to its own elements and to nothing larger."""
    raw = np.zeros(x.size + 64, x.dtype)
    start = next(i for i in range(64) if (raw.ctypes.data + i * x.itemsize) % 64 == x.itemsize)
    shifted = raw[start : start + x.size].reshape(x.shape)
    shifted[...] = x
    return shifted


def big_endian(x: Array) -> Array:
    return x.astype(x.dtype.newbyteorder(">"))


def read_only(x: Array) -> Array:
    x = x.copy()
    x.flags.writeable = False
    return x


def views(ndim: int) -> dict[str, View]:
    """Every arrangement for arrays of ndim axes, by name."""
    found: dict[str, View] = {
        "contiguous": np.ascontiguousarray,
        "fortran": np.asfortranarray,
        "window": window,
        "misaligned": misaligned,
        "unaligned_to_vectors": unaligned_to_vectors,
        "big_endian": big_endian,
        "read_only": read_only,
    }
    for axis in range(ndim):
        found[f"step2_axis{axis}"] = stepped(axis, 2)
        found[f"flipped_axis{axis}"] = stepped(axis, -1)
    found["flipped_everywhere"] = lambda x: np.flip(np.ascontiguousarray(np.flip(x)))
    orders = list(itertools.permutations(range(ndim)))
    for order in orders if ndim <= 4 else orders[1 :: len(orders) // 12]:
        found["order" + "".join(map(str, order))] = permuted(order)
    return found


class Foreign:
    """Somebody else's tensor: it speaks DLPack and nothing more."""

    def __init__(self, array: Array) -> None:
        self._array = array

    def __dlpack__(self, **keywords: Any) -> Any:
        return self._array.__dlpack__(**keywords)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._array.__dlpack_device__()
