"""_fold.py -- batch norm folded into the convolution or linear layer before it, and what that does to its weights."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastbn import _native, _state

__all__ = ["FoldReport", "Norm", "fold_conv", "fold_linear", "fold_report"]

_Array = NDArray[Any]
_Float64 = NDArray[np.float64]


class Norm(Protocol):
    """What can be folded: a `fastbn.BatchNorm`, a `fastbn.FrozenBatchNorm`, PyTorch's, or what looks like one."""

    running_mean: Any
    running_var: Any
    weight: Any
    bias: Any
    eps: Any


_Foldable = Norm | tuple[Any, Any, Any, Any, float]


def fold_conv(
    weight: ArrayLike, bias: ArrayLike | None, bn: _Foldable, *, transposed: bool = False, groups: int = 1
) -> tuple[_Array, _Array]:
    """Fold a batch norm in eval mode into the convolution before it.

    Parameters
    ----------
    weight : array_like, shape (O, I / groups, ...)
        Of a convolution over any number of spatial dimensions, float16, bfloat16, float32 or float64. A transposed one
        has shape (I, O / groups, ...).
    bias : array_like, shape (O,), or None
        None is zeros.
    bn : BatchNorm, FrozenBatchNorm, or (mean, var, weight, bias, eps)
        Of O channels. Anything with the attributes `running_mean`, `running_var`, `weight`, `bias` and `eps` will do,
        PyTorch's layers on the CPU among them. Its `weight` and `bias` may be None.
    transposed : bool, default False
    groups : int, default 1
        Of a transposed convolution; the shape of another one tells them, and then they are only checked.

    Returns
    -------
    weight, bias : numpy.ndarray
        New arrays in the dtypes of the given ones (the bias in that of `weight` where there was none). Nothing given is
        changed, so a weight that several layers share stays right for the others.

    Raises
    ------
    TypeError
        If an array is not floating, or another argument of the wrong type.
    ValueError
        If shapes do not fit, `bn` has no running statistics or an activation (a convolution has none: fold the five
        arrays, and apply the activation after), or a folded value is too large for its dtype.

    Notes
    -----
    ``scale = bn.weight / sqrt(running_var + eps)``; the weight of every output channel is multiplied by its scale, and
    the bias becomes ``(bias - running_mean) * scale + bn.bias``: in float64, rounded once.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> weight = np.ones((2, 3, 5, 5), dtype=np.float32)
    >>> bn = np.array([1.0, 0.0]), np.array([4.0, 1.0]), None, None, 0.0
    >>> w, b = fastbn.fold_conv(weight, None, bn)
    >>> w[:, 0, 0, 0], b
    (array([0.5, 1. ], dtype=float32), array([-0.5,  0. ], dtype=float32))
    """
    weight = _floating("weight", weight, 2)
    groups = _state.as_integer("groups", groups, 1)
    transposed = _native.flag("transposed", transposed)
    if weight.shape[0] % groups:
        kind = "input" if transposed else "output"
        raise ValueError(f"groups must divide the {weight.shape[0]} {kind} channels of weight, got {groups}")
    if transposed:
        # Group g makes the outputs g * O / groups and on from the inputs g * I / groups and on.
        grouped = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])
        folded, new_bias = _fold(grouped, (0, 2), bias, bn)
    else:
        folded, new_bias = _fold(weight, (0,), bias, bn)
    return folded.reshape(weight.shape), new_bias


def fold_linear(
    weight: ArrayLike, bias: ArrayLike | None, bn: _Foldable, *, transposed: bool = False
) -> tuple[_Array, _Array]:
    """Fold a batch norm in eval mode into the linear layer before it.

    Parameters
    ----------
    weight : array_like, shape (O, I)
        Of ``x @ weight.T + bias``, as in PyTorch.
    bias : array_like, shape (O,), or None
        None is zeros.
    bn : BatchNorm, FrozenBatchNorm, or (mean, var, weight, bias, eps)
        As in `fold_conv`.
    transposed : bool, default False
        Whether `weight` has shape (I, O), of ``x @ weight + bias``, as in Keras.

    Returns
    -------
    weight, bias : numpy.ndarray
        As of `fold_conv`.

    Raises
    ------
    TypeError, ValueError
        As of `fold_conv`.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> bn = np.array([1.0, 0.0]), np.array([4.0, 1.0]), None, None, 0.0
    >>> w, b = fastbn.fold_linear(np.eye(2), np.array([0.0, 3.0]), bn)
    >>> w.tolist(), b.tolist()
    ([[0.5, 0.0], [0.0, 1.0]], [-0.5, 3.0])
    """
    array = _floating("weight", weight, 2)
    if array.ndim != 2:
        raise ValueError(f"weight must have 2 dimensions, got {array.ndim}")
    return _fold(array, (1,) if _native.flag("transposed", transposed) else (0,), bias, bn)


@dataclasses.dataclass(frozen=True, eq=False)
class FoldReport:
    """What folding does to the weights of a layer; see `fold_report`.

    Attributes
    ----------
    change : numpy.ndarray, float64, shape (O,)
        ``max |folded - weight| / max |weight|`` in every output channel.
    rounding : numpy.ndarray, float64, shape (O,)
        ``max |folded - exact| / max |exact|`` in every output channel: what rounding to the dtype costs.
    range_before, range_after : numpy.ndarray, float64, shape (O,)
        ``max |weight|`` in every output channel.
    int8_error_before, int8_error_after : numpy.ndarray, float64, shape (O,)
        Root mean square of what symmetric int8 with one scale for the tensor adds to the weights of a channel, relative
        to that of the weights.
    int8_channel_error_after : numpy.ndarray, float64, shape (O,)
        The same with one scale for every channel.
    tolerance : float
        The largest such error that counts as fitting.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> report = fastbn.fold_report(np.ones((2, 3)), None, (np.zeros(2), np.array([1.0, 0.25]), None, None, 0.0))
    >>> report.range_after
    array([1., 2.])
    """

    change: _Float64
    rounding: _Float64
    range_before: _Float64
    range_after: _Float64
    int8_error_before: _Float64
    int8_error_after: _Float64
    int8_channel_error_after: _Float64
    tolerance: float

    @property
    def spread_before(self) -> float:
        """The largest range of a channel over the smallest, before folding."""
        return _spread(self.range_before)

    @property
    def spread_after(self) -> float:
        """The largest range of a channel over the smallest, after folding."""
        return _spread(self.range_after)

    @property
    def fits_int8_per_tensor(self) -> bool:
        """Whether every channel survives int8 with one scale for the tensor."""
        return bool((self.int8_error_after <= self.tolerance).all())

    @property
    def fits_int8_per_channel(self) -> bool:
        """Whether every channel survives int8 with a scale of its own."""
        return bool((self.int8_channel_error_after <= self.tolerance).all())

    def __str__(self) -> str:
        def worst(values: _Float64) -> str:
            return f"{values.max():.3g} in channel {values.argmax()}" if values.size else "no channels"

        return "\n".join(
            (
                f"largest relative change   {worst(self.change)}",
                f"largest rounding error    {worst(self.rounding)}",
                f"spread of channel ranges  {self.spread_before:.3g} before, {self.spread_after:.3g} after",
                f"int8 error, per tensor    {worst(self.int8_error_before)} before, "
                f"{worst(self.int8_error_after)} after: {_fits(self.fits_int8_per_tensor)}",
                f"int8 error, per channel   {worst(self.int8_channel_error_after)} after: "
                f"{_fits(self.fits_int8_per_channel)}",
            )
        )


def fold_report(
    weight: ArrayLike,
    bias: ArrayLike | None,
    bn: _Foldable,
    *,
    transposed: bool = False,
    groups: int = 1,
    tolerance: float = 0.1,
) -> FoldReport:
    """Say what `fold_conv` or `fold_linear` does to the weights, and whether they still fit int8.

    Folding multiplies every output channel by a scale of its own. Where these differ much, one int8 scale for the whole
    tensor leaves the small channels a handful of steps: the quantization pitfall of folded networks such as RepVGG.

    Parameters
    ----------
    weight, bias, bn, transposed, groups
        As in `fold_conv`. The weight of a linear layer is that of a convolution without spatial dimensions.
    tolerance : float, default 0.1
        The largest error, relative and root mean square, with which a channel counts as fitting int8: 0.1 is a signal
        20 dB above the noise, some three bits.

    Returns
    -------
    FoldReport

    Raises
    ------
    TypeError, ValueError
        As of `fold_conv`.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> weight = np.linspace(-1, 1, 54, dtype=np.float32).reshape(2, 3, 3, 3)
    >>> report = fastbn.fold_report(weight, None, (np.zeros(2), np.array([1.0, 1e-6]), None, None, 0.0))
    >>> report.change.round()
    array([  0., 999.])
    >>> report.fits_int8_per_tensor, report.fits_int8_per_channel
    (False, True)
    """
    before = _floating("weight", weight, 2)
    tolerance = _native.number("tolerance", tolerance, 0.0)
    folded, _ = fold_conv(before, bias, bn, transposed=transposed, groups=groups)
    exact, _ = fold_conv(before.astype(np.float64), bias, bn, transposed=transposed, groups=groups)

    def by_channel(array: _Array) -> _Float64:
        first, second, *spatial = array.shape
        rows, outputs = array.astype(np.float64), first
        if transposed:
            rows, outputs = rows.reshape(groups, first // groups, second, *spatial).swapaxes(1, 2), groups * second
        return rows.reshape(outputs, rows.size // max(outputs, 1))

    old, new, true = by_channel(before), by_channel(folded), by_channel(exact)
    with np.errstate(all="ignore"):
        return FoldReport(
            change=_difference(new, old),
            rounding=_difference(new, true),
            range_before=_range(old),
            range_after=_range(new),
            int8_error_before=_int8_error(old, _range(old).max(initial=0.0)),
            int8_error_after=_int8_error(new, _range(new).max(initial=0.0)),
            int8_channel_error_after=_int8_error(new, _range(new)),
            tolerance=tolerance,
        )


def _fold(weight: _Array, outputs: tuple[int, ...], bias: ArrayLike | None, bn: _Foldable) -> tuple[_Array, _Array]:
    """Scale `weight` along the axes `outputs`, which make up the output channels in this order."""
    with np.errstate(all="ignore"):
        mean, scale, shift = _affine(bn)
    shape = tuple(weight.shape[axis] for axis in outputs)
    channels = int(np.prod(shape))
    if scale.size != channels:
        raise ValueError(f"bn must have the {channels} output channels of weight, got {scale.size}")
    old = np.zeros(channels, weight.dtype) if bias is None else _floating("bias", bias, 1)
    if old.shape != (channels,):
        raise ValueError(f"bias must have shape ({channels},), got {old.shape}")
    broadcast = [weight.shape[axis] if axis in outputs else 1 for axis in range(weight.ndim)]
    with np.errstate(all="ignore"):
        new = weight.astype(np.float64) * scale.reshape(broadcast)
        return (
            _rounded("weight", new, weight),
            _rounded("bias", (old.astype(np.float64) - mean) * scale + shift, old),
        )


def _affine(bn: _Foldable) -> tuple[_Float64, _Float64, _Float64]:
    if getattr(bn, "activation", None) is not None:
        raise ValueError(f"bn has the activation {bn.activation!r}, which cannot be folded")  # type: ignore[union-attr]
    prefix = "bn's running_"
    if isinstance(bn, tuple):
        if len(bn) != 5:
            raise ValueError(f"bn must be (mean, var, weight, bias, eps), got {len(bn)} values")
        prefix = "bn's "
        mean, var, weight, bias, eps = bn
    else:
        try:
            mean, var, weight, bias, eps = bn.running_mean, bn.running_var, bn.weight, bn.bias, bn.eps
        except AttributeError as error:
            raise TypeError(
                f"bn must be a batch norm or (mean, var, weight, bias, eps), got {type(bn).__name__}: {error}"
            ) from None
    if mean is None or var is None:
        raise ValueError("bn must have running statistics, got None")
    eps = _native.number("bn's eps", eps, 0.0)
    names = f"{prefix}mean", f"{prefix}var", "bn's weight", "bn's bias"
    mean, var, gain, shift = _state.as_affine(mean, var, weight, bias, names)
    if eps == 0 and (var == 0).any():
        raise ValueError(f"{names[1]} must be positive where bn's eps is 0, got 0.0 in channel {(var == 0).argmax()}")
    scale = (1.0 if gain is None else gain) / np.sqrt(var + eps)
    return mean, scale, np.zeros(mean.shape) if shift is None else shift


def _floating(name: str, value: ArrayLike, ndim: int) -> _Array:
    try:
        array = _state.plain(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} must be a floating array, got {type(value).__name__}: {error}") from error
    if array.dtype.kind != "f" and array.dtype.name != "bfloat16":
        raise TypeError(f"{name} must be a floating array, got {array.dtype}")
    if array.ndim < ndim:
        raise ValueError(f"{name} must have at least {ndim} dimensions, got {array.ndim}")
    return array


def _rounded(name: str, exact: _Float64, like: _Array) -> _Array:
    rounded: _Array = (_to_odd(exact) if like.dtype.name == "bfloat16" else exact).astype(like.dtype)
    lost = np.count_nonzero(~np.isfinite(rounded)) - np.count_nonzero(~np.isfinite(like))
    if lost > 0:
        raise ValueError(f"the folded {name} has {lost} values that are not finite in {like.dtype}")
    return rounded


def _to_odd(exact: _Float64) -> NDArray[np.float32]:
    """Round to float32 such that rounding that to bfloat16, as casts do, is the same as rounding once.

    What float32 cannot hold becomes, of its two neighbours, the one with an odd last bit: never a tie of bfloat16
    (Boldo & Melquiond, "Emulation of a FMA and correctly rounded sums", 2008).
    """
    narrow = exact.astype(np.float32)
    bits = narrow.view(np.uint32)
    bits -= np.abs(narrow) > np.abs(exact)  # towards zero
    bits |= narrow != exact
    return narrow


def _range(rows: _Float64) -> _Float64:
    largest: _Float64 = np.abs(rows).max(axis=1, initial=0.0)
    return largest


def _ratio(a: _Float64, b: _Float64) -> _Float64:
    """Return a / b, and 0 where both are 0."""
    with np.errstate(all="ignore"):
        ratio: _Float64 = np.where((a == 0) & (b == 0), 0.0, a / b)
    return ratio


def _scaled(values: Any, ranges: _Float64) -> Any:
    """Multiply by the power of two that brings a range next to 1: no square overflows then, or vanishes and counts."""
    return np.ldexp(values, -np.frexp(ranges)[1])


def _difference(new: _Float64, old: _Float64) -> _Float64:
    ranges = _range(old)
    new, old = _scaled(new, ranges[:, None]), _scaled(old, ranges[:, None])
    return _ratio(_range(new - old), _range(old))


def _int8_error(rows: _Float64, largest: Any) -> _Float64:
    ranges = _range(rows)
    rows, step = _scaled(rows, ranges[:, None]), _scaled(largest, ranges)[:, None] / 127
    limits = np.finfo(np.float64)
    step = np.clip(step, limits.tiny, limits.max)  # a row of zeros; a row that is nothing beside the largest
    error = np.rint(rows / step) * step - rows
    return _ratio(np.sqrt((error**2).sum(axis=1)), np.sqrt((rows**2).sum(axis=1)))


def _spread(ranges: _Float64) -> float:
    return float(_ratio(ranges.max(initial=0.0), ranges.min(initial=np.inf)))


def _fits(fits: bool) -> str:
    return "fits" if fits else "does not fit"
