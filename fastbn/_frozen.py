"""_frozen.py -- FrozenBatchNorm: inference as one immutable operation that any number of threads may call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from fastbn import _native, _state

if TYPE_CHECKING:
    from fastbn._layer import BatchNorm

__all__ = ["FrozenBatchNorm"]

_Float64 = NDArray[np.float64]


class FrozenBatchNorm(_native.Prepared):
    """Batch normalization with constants for statistics: what a server holds.

    Made by `BatchNorm.freeze`, `from_batch_norm`, `from_arrays` (whose arguments the class takes too) or
    `from_state_dict`, in a time that does not depend on any data. It cannot be changed, is safe to call from any number
    of threads, to share with a forked child, to pickle and to copy (a copy is the object itself), and remembers nothing
    of a call.

    ``op(x, residual=None, out=None)`` returns ``activation((x - running_mean) / sqrt(running_var + eps) * weight + bias
    + residual)``, as eval mode of the layer does: `x` has at least two dimensions, C channels along `channel_axis`, and
    dtype `dtype`; `residual` has its shape and dtype; `out`, which may be `x`, receives the result. TypeError and
    ValueError say what does not fit, before anything is written.

    Attributes
    ----------
    running_mean, running_var : numpy.ndarray, float64, shape (C,)
        Read-only.
    weight, bias : numpy.ndarray, float64, shape (C,), or None
        Read-only. None is ones, and zeros.
    eps : float
    channel_axis : int
    activation : str or None
    negative_slope : float
    dtype : numpy.dtype
        Of the data.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> op = fastbn.FrozenBatchNorm.from_arrays(np.array([1.0, 2.0]), np.array([4.0, 9.0]), eps=0.0)
    >>> x = np.array([[3, 5], [1, 2]], dtype=np.float32)
    >>> op(x)
    array([[1., 1.],
           [0., 0.]], dtype=float32)
    >>> op(x, out=x) is x
    True
    """

    __slots__ = (
        "__weakref__", "activation", "bias", "channel_axis", "dtype", "eps", "negative_slope", "running_mean",
        "running_var", "weight",
    )  # fmt: skip

    running_mean: _Float64
    running_var: _Float64
    weight: _Float64 | None
    bias: _Float64 | None
    eps: float
    channel_axis: int
    activation: str | None
    negative_slope: float
    dtype: np.dtype[Any]

    # There is no __call__ here: the one of _native.Prepared is reached without a Python frame.

    def __init__(
        self,
        mean: ArrayLike,
        var: ArrayLike,
        weight: ArrayLike | None = None,
        bias: ArrayLike | None = None,
        eps: float = 1e-5,
        *,
        channel_axis: int = 1,
        activation: str | None = None,
        negative_slope: float = 0.01,
        dtype: DTypeLike | None = np.float32,
    ) -> None:
        arrays = [None if array is None else _constant(array) for array in _state.as_affine(mean, var, weight, bias)]
        attributes: dict[str, Any] = {
            "dtype": _state.as_dtype("dtype", dtype),
            **dict(zip(("running_mean", "running_var", "weight", "bias"), arrays, strict=True)),
            "eps": _native.number("eps", eps, 0.0),
            "channel_axis": _state.as_axis("channel_axis", channel_axis),
            "activation": _native.choice("activation", activation, _native.ACTIVATIONS),
            "negative_slope": _native.number("negative_slope", negative_slope),
        }
        super().__init__(*attributes.values())
        for name, value in attributes.items():
            object.__setattr__(self, name, value)

    @classmethod
    def from_arrays(
        cls,
        mean: ArrayLike,
        var: ArrayLike,
        weight: ArrayLike | None = None,
        bias: ArrayLike | None = None,
        eps: float = 1e-5,
        *,
        channel_axis: int = 1,
        activation: str | None = None,
        negative_slope: float = 0.01,
        dtype: DTypeLike | None = np.float32,
    ) -> Self:
        """Freeze given statistics and parameters; the arguments are those of `fastbn.normalize`.

        Parameters
        ----------
        mean, var : array_like, shape (C,)
            Finite, and no variance negative.
        weight, bias : array_like, shape (C,), optional
            Finite. Ones and zeros if absent.
        eps : float, default 1e-5
        channel_axis : int, default 1
        activation : {None, "relu", "relu6", "leaky_relu"}, optional
        negative_slope : float, default 0.01
        dtype : dtype, default float32
            Of the data, whatever the arrays' is. None is the default.

        Returns
        -------
        FrozenBatchNorm

        Raises
        ------
        TypeError, ValueError
            If an array does not hold finite real numbers, is not one-dimensional or not as long as `mean`, if a
            variance is negative, or a setting is unknown or out of range.

        Examples
        --------
        >>> import numpy as np, fastbn
        >>> moments = fastbn.moments(np.arange(8.0).reshape(4, 2))
        >>> op = fastbn.FrozenBatchNorm.from_arrays(moments.mean, moments.var(), dtype=np.float64)
        >>> op(np.array([[3.0, 4.0]]))
        array([[0., 0.]])
        """
        return cls(
            mean, var, weight, bias, eps,
            channel_axis=channel_axis, activation=activation, negative_slope=negative_slope, dtype=dtype,
        )  # fmt: skip

    @classmethod
    def from_batch_norm(cls, bn: BatchNorm, dtype: DTypeLike | None = None) -> Self:
        """Freeze what a layer computes in eval mode.

        Parameters
        ----------
        bn : BatchNorm
        dtype : dtype, optional
            Of the data, if not the layer's.

        Returns
        -------
        FrozenBatchNorm

        Raises
        ------
        TypeError
            If `bn` is not a BatchNorm.
        ValueError
            If the layer has no running statistics, or one of them or a parameter is not finite.

        Examples
        --------
        >>> import fastbn
        >>> fastbn.FrozenBatchNorm.from_batch_norm(fastbn.BatchNorm(3, activation="relu"))
        FrozenBatchNorm(3, eps=1e-05, channel_axis=1, activation='relu', dtype=float32)
        """
        if not hasattr(bn, "_lock"):
            raise TypeError(f"bn must be a BatchNorm, got {type(bn).__name__}")
        with bn._lock:
            if bn.running_mean is None or bn.running_var is None:
                raise ValueError("bn must have running statistics, and was made with track_running_stats=False")
            names = "bn's running_mean", "bn's running_var", "bn's weight", "bn's bias"
            return cls(
                *_state.as_affine(bn.running_mean, bn.running_var, bn.weight, bn.bias, names), bn.eps,
                channel_axis=bn.channel_axis, activation=bn.activation, negative_slope=bn.negative_slope,
                dtype=bn.dtype if dtype is None else dtype,
            )  # fmt: skip

    @classmethod
    def from_state_dict(
        cls,
        state: Mapping[str, Any],
        prefix: str = "",
        *,
        eps: float = 1e-5,
        channel_axis: int = 1,
        activation: str | None = None,
        negative_slope: float = 0.01,
        dtype: DTypeLike | None = np.float32,
    ) -> Self:
        """Freeze a layer out of the state dict of a network.

        Parameters
        ----------
        state : mapping of str to array_like
            With PyTorch's keys.
        prefix : str, default ""
            Of the layer's keys, such as ``"layer1.0.bn1."``. Other keys are not looked at.
        eps, channel_axis, activation, negative_slope, dtype
            As in `from_arrays`; a state dict does not hold them.

        Returns
        -------
        FrozenBatchNorm

        Raises
        ------
        TypeError
            If `state` is not a mapping.
        ValueError
            If `running_mean` or `running_var` is missing (`weight` and `bias` may be), if anything else begins with the
            prefix, or if an array is not finite or has the wrong shape or kind of dtype.

        Examples
        --------
        >>> import fastbn
        >>> state = fastbn.BatchNorm(3).state_dict("features.norm0.") | {"features.conv0.weight": 1}
        >>> fastbn.FrozenBatchNorm.from_state_dict(state, "features.norm0.").running_var
        array([1., 1., 1.])
        """
        _state.check_prefix(prefix)
        mean = state.get(prefix + "running_mean") if isinstance(state, Mapping) else None
        try:
            shape = (0,) if mean is None else np.shape(mean)
        except ValueError:  # what is ragged has no shape; the checker says so
            shape = (0,)
        if len(shape) != 1:
            name = _state.label(prefix + "running_mean")
            raise ValueError(f"{name} must be a one-dimensional array, got shape {shape}")
        arrays, _ = _state.check_state(
            state,
            _state.template(shape[0], np.float64, affine=True, track_running_stats=True),
            f"a FrozenBatchNorm with prefix {_native.said(prefix)}",
            prefix=prefix,
            optional=("weight", "bias", "num_batches_tracked"),
        )
        return cls(
            arrays["running_mean"], arrays["running_var"], arrays.get("weight"), arrays.get("bias"), eps,
            channel_axis=channel_axis, activation=activation, negative_slope=negative_slope, dtype=dtype,
        )  # fmt: skip

    @property
    def num_features(self) -> int:
        """Channels, C."""
        return len(self.running_mean)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"FrozenBatchNorm is immutable: cannot set {name!r}")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"FrozenBatchNorm is immutable: cannot delete {name!r}")

    def __reduce__(self) -> tuple[Any, ...]:
        args = self.running_mean, self.running_var, self.weight, self.bias, self.eps
        names = "channel_axis", "activation", "negative_slope", "dtype"
        return _rebuild, (type(self), args, {name: getattr(self, name) for name in names})

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: object) -> Self:
        return self

    def __repr__(self) -> str:
        return (
            f"FrozenBatchNorm({self.num_features}, eps={self.eps}, channel_axis={self.channel_axis}, "
            f"activation={self.activation!r}, dtype={self.dtype})"
        )


def _rebuild(cls: type[FrozenBatchNorm], args: tuple[Any, ...], settings: dict[str, Any]) -> FrozenBatchNorm:
    return cls(*args, **settings)


def _constant(array: _Float64) -> _Float64:
    return np.frombuffer(array.tobytes())  # over bytes, which nobody can make writeable again
