"""tolerance -- the one rule by which every numeric test compares.

An error is counted in ulps of the result's dtype at the scale max(1, |expected|): the unit is that scale times the
distance from 1 to the next number. float32 and float64 may be 3 ulps
from the exact value; float16 and bfloat16 one ulp from the exact value correctly rounded. A result that is the
difference of larger terms is measured at their scale, which the caller then names.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import twin

Array = np.ndarray[Any, Any]


def ulps_allowed(dtype: np.dtype[Any]) -> int:
    return 3 if dtype.itemsize >= 4 else 1


def epsilon(dtype: np.dtype[Any]) -> float:
    """The distance from 1 to the next number."""
    one = np.ones(1, dtype.newbyteorder("="))
    bits = one.view(f"u{dtype.itemsize}") + np.ones(1, f"u{dtype.itemsize}")
    return float(bits.view(dtype.newbyteorder("="))[0] - one[0])


def error(actual: Array, expected: Array, scale: Any = 1.0) -> float:
    """The largest error in ulps; infinite where one side is NaN or infinite and the other differs."""
    assert actual.shape == expected.shape, f"shape {actual.shape}, expected {expected.shape}"
    if actual.size == 0:
        return 0.0
    wide = expected.dtype
    if actual.dtype.itemsize < 4:
        with np.errstate(all="ignore"):
            expected = expected.astype(np.float32).astype(actual.dtype).astype(wide)
    got = actual.astype(wide)
    finite = np.isfinite(expected)
    same = np.where(np.isnan(expected), np.isnan(got), got == expected)
    if not np.all(same | finite) or not np.all(np.isfinite(got[finite])):
        return np.inf
    if not finite.any():
        return 0.0
    size = np.broadcast_to(np.asarray(np.maximum(scale, 1.0)).astype(wide), expected.shape)
    unit = np.maximum(np.abs(expected), size)[finite] * epsilon(actual.dtype)
    return float((np.abs(got - expected)[finite] / unit).max())


def assert_close(actual: Array, expected: Array, scale: Any = 1.0) -> None:
    found, allowed = error(actual, expected, scale), ulps_allowed(actual.dtype)
    assert found <= allowed, f"{found:.3g} ulp of {actual.dtype}, allowed {allowed}"


def assert_gradients(found: tuple[Array, ...], grad_output: Array, saved: twin.Saved, weight: Any = None) -> None:
    """The results of a backward against the twin's, from what the twin saved of the same forward."""
    expected = twin.batch_norm_backward(grad_output, None, saved, weight)
    scales = twin.gradient_scales(grad_output, saved, weight)
    for gradient, reference, scale in zip(found, expected, scales, strict=True):
        assert_close(gradient, reference, scale)
