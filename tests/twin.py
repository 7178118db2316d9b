"""twin -- the slow twin of fastbn: batch normalization as textbooks write it, in plain NumPy.

The functions have the names and signatures of the public ones, and none of their ideas: the mean first, then the
deviations from it, then the variance from those, each over the whole array, in float64 (longdouble for float64 data).
Results stay in that wide type: rounding them is the business of `tolerance`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, Any]


def widen(x: Array) -> Array:
    return x.astype(np.longdouble if x.dtype.itemsize == 8 else np.float64)


class Moments(NamedTuple):
    count: int
    mean: Array
    m2: Array

    def var(self, ddof: int = 0) -> Array:
        with np.errstate(all="ignore"):
            return self.m2 / (self.count - ddof)


@dataclass
class Saved:
    """The deviations themselves, not the mean: a large mean does not fit even longdouble well enough."""

    centred: Array
    mean: Array
    var: Array
    eps: float
    count: int
    channel_axis: int
    z: Array
    activation: str | None
    negative_slope: float
    has_residual: bool


def along(vector: Any, like: Array, channel_axis: int) -> Array:
    """A per-channel vector in the shape that broadcasts against `like`."""
    shape = [1] * like.ndim
    shape[channel_axis] = -1
    vector = np.asarray(vector)
    return vector.astype(np.promote_types(vector.dtype, like.dtype)).reshape(shape)


def others(x: Array, channel_axis: int) -> tuple[int, ...]:
    return tuple(a for a in range(x.ndim) if a != channel_axis % x.ndim)


def _centre(x: Array, channel_axis: int) -> tuple[int, Array, Array]:
    """count, mean and deviations. Centred twice, because a large mean has a rounding error worth removing."""
    wide, axes = widen(x), others(x, channel_axis)
    count = wide.size // max(1, wide.shape[channel_axis])
    if count == 0:
        return 0, np.zeros(wide.shape[channel_axis], wide.dtype), wide
    with np.errstate(all="ignore"):
        mean = wide.mean(axis=axes, keepdims=True)
        centred = wide - mean
        rest = centred.mean(axis=axes, keepdims=True)
        return count, (mean + rest).reshape(-1), centred - rest


def _activate(z: Array, activation: str | None, negative_slope: float) -> Array:
    with np.errstate(all="ignore"):
        if activation is None:
            return z
        if activation == "relu":
            return np.where(z <= 0, 0, z)
        if activation == "relu6":
            return np.where(z <= 0, 0, np.where(z >= 6, 6, z))
        if activation == "leaky_relu":
            return np.where(z <= 0, z * negative_slope, z)
    raise AssertionError(activation)


def _slope(z: Array, activation: str | None, negative_slope: float) -> Array:
    """The derivative of the activation; at a kink the value that PyTorch takes."""
    with np.errstate(all="ignore"):
        if activation is None:
            return np.ones_like(z)
        if activation == "relu":
            return np.where(z <= 0, 0, np.ones_like(z))
        if activation == "relu6":
            return np.where((z <= 0) | (z >= 6), 0, np.ones_like(z))
        return np.where(z <= 0, negative_slope, np.ones_like(z))


def off_kinks(grad_output: Array, saved: Saved) -> Array:
    """grad_output with zeros where z is so near a kink of the activation that either side of it is a right answer."""
    if saved.activation is None:
        return grad_output
    near = np.abs(saved.z) < 1e-5
    if saved.activation == "relu6":
        near |= np.abs(saved.z - 6) < 1e-5
    return np.where(near, 0, grad_output).astype(grad_output.dtype)


def _inverse_std(var: Array, eps: float) -> Array:
    with np.errstate(all="ignore"):
        return np.where(var + eps == 0, 0, 1 / np.sqrt(var + eps))


def _affine(centred: Array, var: Array, weight: Any, bias: Any, eps: float, channel_axis: int, residual: Any) -> Array:
    with np.errstate(all="ignore"):
        z = centred * along(_inverse_std(var, eps), centred, channel_axis)
        if weight is not None:
            z = z * along(weight, centred, channel_axis)
        if bias is not None:
            z = z + along(bias, centred, channel_axis)
        if residual is not None:
            z = z + residual.astype(z.dtype)
    return z


def moments(x: Array, *, channel_axis: int = 1) -> Moments:
    count, mean, centred = _centre(x, channel_axis)
    with np.errstate(all="ignore"):
        return Moments(count, mean, np.square(centred).sum(axis=others(x, channel_axis)))


def normalize(
    x: Array,
    mean: Any,
    var: Any,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    *,
    channel_axis: int = 1,
    activation: str | None = None,
    negative_slope: float = 0.01,
    residual: Any = None,
) -> Array:
    wide = widen(x)
    with np.errstate(all="ignore"):
        centred = wide - along(mean, wide, channel_axis)
    var = np.asarray(var).astype(wide.dtype)
    return _activate(_affine(centred, var, weight, bias, eps, channel_axis, residual), activation, negative_slope)


def batch_norm_forward(
    x: Array,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    *,
    channel_axis: int = 1,
    activation: str | None = None,
    negative_slope: float = 0.01,
    residual: Any = None,
) -> tuple[Array, Saved]:
    count, mean, centred = _centre(x, channel_axis)
    with np.errstate(all="ignore"):
        var = np.square(centred).sum(axis=others(x, channel_axis)) / max(count, 1)
    z = _affine(centred, var, weight, bias, eps, channel_axis, residual)
    saved = Saved(centred, mean, var, eps, count, channel_axis, z, activation, negative_slope, residual is not None)
    return _activate(z, activation, negative_slope), saved


def forward_eval(
    x: Array,
    mean: Any,
    var: Any,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    *,
    channel_axis: int = 1,
    activation: str | None = None,
    negative_slope: float = 0.01,
    residual: Any = None,
) -> tuple[Array, Saved]:
    """Inference that can be differentiated: the statistics are constants, marked by count 0."""
    wide = widen(x)
    centred = wide - along(mean, wide, channel_axis)
    mean, var = (np.asarray(s).astype(wide.dtype) for s in (mean, var))
    z = _affine(centred, var, weight, bias, eps, channel_axis, residual)
    saved = Saved(centred, mean, var, eps, 0, channel_axis, z, activation, negative_slope, residual is not None)
    return _activate(z, activation, negative_slope), saved


def batch_norm(
    x: Array,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    **options: Any,
) -> tuple[Array, Any, Any]:
    """y and the new running statistics: the one signature that differs, since the twin changes nothing in place."""
    if not training:
        return normalize(x, running_mean, running_var, weight, bias, eps, **options), running_mean, running_var
    y, saved = batch_norm_forward(x, weight, bias, eps, **options)
    if running_mean is None or saved.count == 0:
        return y, running_mean, running_var
    unbiased = saved.var * saved.count / (saved.count - 1)
    wide = saved.mean.dtype
    old_mean, old_var = running_mean.astype(wide), running_var.astype(wide)
    return y, (1 - momentum) * old_mean + momentum * saved.mean, (1 - momentum) * old_var + momentum * unbiased


def backward_reduce(grad_output: Array, x: Array, mean: Any, *, channel_axis: int = 1) -> tuple[Array, Array]:
    wide, dy, axes = widen(x), widen(grad_output), others(x, channel_axis)
    with np.errstate(all="ignore"):
        return dy.sum(axis=axes), (dy * (wide - along(mean, wide, channel_axis))).sum(axis=axes)


def backward_apply(
    grad_output: Array,
    x: Array,
    mean: Any,
    var: Any,
    weight: Any,
    sum_dy: Any,
    sum_dy_xmu: Any,
    count: float,
    eps: float = 1e-5,
    *,
    channel_axis: int = 1,
) -> Array:
    wide = widen(x)
    with np.errstate(all="ignore"):
        centred = wide - along(mean, wide, channel_axis)
    terms = _gradient_terms(
        widen(grad_output), centred, np.asarray(var), weight, sum_dy, sum_dy_xmu, count, eps, channel_axis
    )
    return sum(terms)


def _gradient_terms(
    dz: Array,
    centred: Array,
    var: Any,
    weight: Any,
    sum_dy: Any,
    sum_dy_xmu: Any,
    count: float,
    eps: float,
    channel_axis: int,
) -> tuple[Array, ...]:
    """The three terms whose sum is dx; the last two vanish where the statistics are constants."""

    def spread(vector: Any) -> Array:
        return along(vector, centred, channel_axis)

    with np.errstate(all="ignore"):
        inverse = _inverse_std(var.astype(centred.dtype), eps)
        scale = spread(inverse if weight is None else inverse * weight)
        if not count:
            return (scale * dz,)
        slope = centred * spread(sum_dy_xmu * np.square(inverse) / count)
        return scale * dz, -scale * spread(sum_dy / count), -scale * slope


def _backward(grad_output: Array, saved: Saved, weight: Any) -> tuple[Array, Array, Array, tuple[Array, ...]]:
    axes = others(grad_output, saved.channel_axis)
    with np.errstate(all="ignore"):
        dz = widen(grad_output) * _slope(saved.z, saved.activation, saved.negative_slope)
        sum_dy, sum_dy_xmu = dz.sum(axis=axes), (dz * saved.centred).sum(axis=axes)
    terms = _gradient_terms(
        dz, saved.centred, saved.var, weight, sum_dy, sum_dy_xmu, saved.count, saved.eps, saved.channel_axis
    )
    return dz, sum_dy, sum_dy_xmu, terms


def batch_norm_backward(
    grad_output: Array, x: Any, saved: Saved, weight: Any = None, bias: Any = None
) -> tuple[Array, ...]:
    dz, sum_dy, sum_dy_xmu, terms = _backward(grad_output, saved, weight)
    gradients = sum(terms), sum_dy_xmu * _inverse_std(saved.var, saved.eps), sum_dy
    return (*gradients, dz) if saved.has_residual else gradients


def value_scale(saved: Saved, weight: Any = None, bias: Any = None, residual: Any = None) -> Array:
    """The size of what was added up for y: a sum is no more exact than its terms are."""
    with np.errstate(all="ignore"):
        return _affine(
            np.abs(saved.centred),
            saved.var,
            None if weight is None else np.abs(weight),
            None if bias is None else np.abs(bias),
            saved.eps,
            saved.channel_axis,
            None if residual is None else np.abs(residual),
        )


def gradient_scales(grad_output: Array, saved: Saved, weight: Any = None) -> tuple[Array, ...]:
    """The same for every result of the backward; a sum over the batch is no more exact than its terms, either."""
    dz, _, _, _ = _backward(grad_output, saved, weight)
    axes = others(grad_output, saved.channel_axis)
    with np.errstate(all="ignore"):
        size, spread = np.abs(dz), np.abs(saved.centred)
        sum_dy, sum_dy_xmu = size.sum(axis=axes), (size * spread).sum(axis=axes)
    width = None if weight is None else np.abs(weight)
    terms = _gradient_terms(
        size, spread, saved.var, width, sum_dy, sum_dy_xmu, saved.count, saved.eps, saved.channel_axis
    )
    with np.errstate(all="ignore"):
        scales = sum(map(np.abs, terms)), sum_dy_xmu * _inverse_std(saved.var, saved.eps), sum_dy
    return (*scales, size) if saved.has_residual else scales
