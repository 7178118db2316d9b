"""_functional.py -- the functions: arguments, defaults and documentation over the compiled floor."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastbn import _native
from fastbn._moments import Moments, made

__all__ = [
    "backward_apply",
    "backward_reduce",
    "batch_norm",
    "batch_norm_backward",
    "batch_norm_forward",
    "moments",
    "normalize",
]

_Array = NDArray[Any]


def batch_norm(
    x: Any,
    running_mean: _Array | None,
    running_var: _Array | None,
    weight: _Array | None = None,
    bias: _Array | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    channel_axis: int = 1,
    activation: str | None = None,
    negative_slope: float = 0.01,
    residual: Any = None,
    out: _Array | None = None,
) -> _Array:
    """Batch normalization, with the argument order of ``torch.nn.functional.batch_norm``.

    Parameters
    ----------
    x : array_like, shape (N, C, ...)
        The data: an ndarray, or a CPU tensor with ``__dlpack__``, of float32, float64, float16 or bfloat16 and at least
        two dimensions. It is viewed, not copied, whatever its strides, where they collapse to (outer, channels, inner).
    running_mean, running_var : ndarray, shape (C,), or None
        Running statistics, float32 or float64. In training they are updated in place:
        ``running = (1 - momentum) * running + momentum * batch``, with the unbiased variance; each may be None, and
        they must not share memory. For inference both are needed, and only read.
    weight, bias : ndarray, shape (C,), or None
        Scale and shift, in any float dtype. None means ones, and zeros.
    training : bool
        Normalize with the statistics of `x` (biased variance) instead of the running ones.
    momentum : float
        The weight of this batch in the running statistics.
    eps : float
        Added to the variance.
    channel_axis : int
        The axis of the channels: 1 for NCHW, -1 for NHWC.
    activation : {None, "relu", "relu6", "leaky_relu"}
        Applied to the result; NaN passes through.
    negative_slope : float
        Of ``"leaky_relu"``.
    residual : array_like, shape of `x`, optional
        Added before the activation; same dtype as `x`.
    out : ndarray, shape of `x`, optional
        Where the result goes; same dtype as `x`. It may be `x` or `residual` itself, or overlap them in any way.

    Returns
    -------
    ndarray, shape of `x`
        `out`, or a new array of the dtype and memory order of `x`.

    Raises
    ------
    ValueError
        If a shape, length, axis or value does not fit, or training meets one value per channel.
    TypeError
        If an argument is of the wrong type or dtype.

    Notes
    -----
    ``y = activation((x - mean) / sqrt(var + eps) * weight + bias + residual)``: Algorithm 1 (training) and 2
    (inference) of Ioffe & Szegedy, "Batch Normalization" (2015), https://arxiv.org/abs/1502.03167. In inference a
    channel is NaN where ``running_var + eps`` is negative. On any error all arrays are as they were.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> x = np.array([[1.0, 10.0], [3.0, 30.0]], dtype=np.float32)
    >>> mean, var = np.zeros(2, np.float32), np.ones(2, np.float32)
    >>> fastbn.batch_norm(x, mean, var, training=True, eps=0.0)
    array([[-1., -1.],
           [ 1.,  1.]], dtype=float32)
    >>> mean
    array([0.2, 2. ], dtype=float32)
    """
    if training is not False and _native.flag("training", training):
        # Of two arrays that overlap, one at least is a view.
        if (
            running_mean is running_var
            or getattr(running_mean, "base", None) is not None
            or getattr(running_var, "base", None) is not None
        ):
            _check_apart(running_mean, running_var)
        y, _ = _native.forward_train(
            x,
            running_mean,
            running_var,
            weight,
            bias,
            momentum,
            eps,
            channel_axis,
            activation,
            negative_slope,
            residual,
            out,
        )
        return y if out is None else out
    _native.number("momentum", momentum)  # it plays no part here, and may be wrong all the same
    if running_mean is None or running_var is None:
        name = "running_mean" if running_mean is None else "running_var"
        raise TypeError(f"{name} must be a 1-D float array of one element per channel for inference, got None")
    return _native.normalize(
        x,
        running_mean,
        running_var,
        weight,
        bias,
        eps,
        channel_axis,
        activation,
        negative_slope,
        residual,
        out,
    )


def _check_apart(running_mean: Any, running_var: Any) -> None:
    """Refuse statistics of which one would be written over the other; what are no vectors is refused elsewhere."""
    vectors = all(isinstance(a, np.ndarray) and a.ndim == 1 for a in (running_mean, running_var))
    if vectors and np.shares_memory(running_mean, running_var):
        raise ValueError("running_mean and running_var must not share memory in training, which writes both")


def batch_norm_forward(
    x: Any,
    weight: _Array | None = None,
    bias: _Array | None = None,
    eps: float = 1e-5,
    *,
    channel_axis: int = 1,
    activation: str | None = None,
    negative_slope: float = 0.01,
    residual: Any = None,
    out: _Array | None = None,
) -> tuple[_Array, _native.Saved]:
    """Training forward that keeps what `batch_norm_backward` needs.

    Parameters
    ----------
    x, weight, bias, eps, channel_axis, activation, negative_slope, residual, out
        As in `batch_norm`.

    Returns
    -------
    y : ndarray, shape of `x`
    saved : Saved
        The statistics (``saved.mean``, ``saved.var``: float64, biased, read-only) and, for an activation after a
        residual, one bit an element. No tensor: `x` itself is passed to the backward again.

    Raises
    ------
    ValueError, TypeError
        As in `batch_norm`.

    Notes
    -----
    Algorithm 1 of Ioffe & Szegedy (2015).

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> x = np.array([[1.0], [3.0]])
    >>> y, saved = fastbn.batch_norm_forward(x, eps=0.0)
    >>> y.ravel(), saved.mean, saved.var
    (array([-1.,  1.]), array([2.]), array([1.]))
    """
    y, saved = _native.forward(x, weight, bias, eps, channel_axis, activation, negative_slope, residual, out)
    return (y if out is None else out), saved


def batch_norm_backward(
    grad_output: Any,
    x: Any,
    saved: _native.Saved,
    weight: _Array | None = None,
    bias: _Array | None = None,
    *,
    out: _Array | None = None,
) -> tuple[_Array, ...]:
    """Gradients of `batch_norm_forward`.

    Parameters
    ----------
    grad_output : array_like, shape of `x`
        Gradient of the loss with respect to ``y``; the dtype of `x`.
    x : array_like
        The forward's `x`, unchanged.
    saved : Saved
        What the forward returned.
    weight, bias : ndarray, shape (C,), or None
        The forward's.
    out : ndarray, shape of `x`, optional
        Where ``dx`` goes; it may be `grad_output` or `x` itself.

    Returns
    -------
    dx : ndarray, shape of `x`
    dweight, dbias : ndarray, shape (C,)
        In the dtype of the parameters; float32 (float64 for float64 data) where there are none.
    dresidual : ndarray, shape of `x`
        Only where the forward had a residual.

    Raises
    ------
    ValueError
        If a shape or length does not fit.
    TypeError
        If an argument is of the wrong type or dtype.

    Notes
    -----
    With ``dz`` the gradient behind the activation and ``n`` elements per channel, the chain rule of section 3 of Ioffe
    & Szegedy (2015) simplifies to ``dx = weight / sqrt(var + eps) * (dz - sum(dz) / n - xhat * sum(dz * xhat) / n)``,
    ``dweight = sum(dz * xhat)`` and ``dbias = sum(dz)``.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> x = np.array([[1.0], [2.0], [6.0]])
    >>> y, saved = fastbn.batch_norm_forward(x)
    >>> dx, dweight, dbias = fastbn.batch_norm_backward(np.array([[1.0], [0.0], [0.0]]), x, saved)
    >>> bool(abs(dx.sum()) < 1e-15), dbias
    (True, array([1.]))
    """
    if not isinstance(saved, _native.Saved):
        raise TypeError(f"saved must be what batch_norm_forward returned, got {type(saved).__name__}")
    dx, dweight, dbias, dresidual = _native.backward(grad_output, x, saved, weight, bias, out)
    return (dx, dweight, dbias) if dresidual is None else (dx, dweight, dbias, dresidual)


def moments(x: Any, *, channel_axis: int = 1) -> Moments:
    """Count, mean and sum of squared deviations of every channel, in one sweep.

    Parameters
    ----------
    x : array_like
        As in `batch_norm`.
    channel_axis : int
        The axis of the channels.

    Returns
    -------
    Moments
        In float64, whatever the dtype of `x`, with the accuracy of its arithmetic: of float32 and narrower data the
        variance to about 3e-7 of itself, the mean to about 1e-7 of the deviation. Of an empty `x` the count is 0.

    Raises
    ------
    ValueError, TypeError
        As in `batch_norm`.

    Notes
    -----
    Blocks of a few thousand elements are reduced about a number near their mean and merged by the formula of Chan,
    Golub & LeVeque (1979).

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> m = fastbn.moments(np.array([[1.0, 5.0], [3.0, 5.0]]))
    >>> m.count, m.mean, m.var()
    (2, array([2., 5.]), array([1., 0.]))
    """
    return made(*_native.moments(x, channel_axis))


def normalize(
    x: Any,
    mean: _Array,
    var: _Array,
    weight: _Array | None = None,
    bias: _Array | None = None,
    eps: float = 1e-5,
    *,
    channel_axis: int = 1,
    activation: str | None = None,
    negative_slope: float = 0.01,
    residual: Any = None,
    out: _Array | None = None,
) -> _Array:
    """Normalize with given statistics.

    Parameters
    ----------
    x, weight, bias, eps, channel_axis, activation, negative_slope, residual, out
        As in `batch_norm`.
    mean, var : ndarray, shape (C,)
        The statistics, in any float dtype; float64 keeps the accuracy of a mean that is large beside the deviation.

    Returns
    -------
    ndarray, shape of `x`

    Raises
    ------
    ValueError, TypeError
        As in `batch_norm`.

    Notes
    -----
    ``(x - mean) / sqrt(var + eps) * weight + bias``: Algorithm 2 of Ioffe & Szegedy (2015). The mean is subtracted
    before anything is multiplied, so a large mean costs no digits. As in `batch_norm` for inference, and in PyTorch,
    statistics are not looked into: a channel is NaN where ``var + eps`` is negative, and divided by zero where it is 0.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> x = np.array([[1.0, 5.0], [3.0, 5.0]])
    >>> m = fastbn.moments(x)
    >>> fastbn.normalize(x, m.mean, np.ones(2), eps=0.0, bias=np.full(2, 7.0))
    array([[6., 7.],
           [8., 7.]])
    """
    return _native.normalize(
        x, mean, var, weight, bias, eps, channel_axis, activation, negative_slope, residual, out, "mean", "var"
    )


def backward_reduce(grad_output: Any, x: Any, mean: _Array, *, channel_axis: int = 1) -> tuple[_Array, _Array]:
    """The two sums that a backward needs from the whole batch.

    Parameters
    ----------
    grad_output, x : array_like
        Same shape and dtype; as in `batch_norm`.
    mean : ndarray, shape (C,)
        The mean that was subtracted.
    channel_axis : int
        The axis of the channels.

    Returns
    -------
    sum_dy, sum_dy_xmu : ndarray, float64, shape (C,)
        ``sum(dy)`` and ``sum(dy * (x - mean))`` per channel. Sums of parts of a batch add up to those of the whole.

    Raises
    ------
    ValueError, TypeError
        As in `batch_norm`.

    Notes
    -----
    Section 3 of Ioffe & Szegedy (2015); see `batch_norm_backward`.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> x = np.array([[1.0], [3.0]])
    >>> fastbn.backward_reduce(np.array([[1.0], [2.0]]), x, np.array([2.0]))
    (array([3.]), array([1.]))
    """
    return _native.backward_reduce(grad_output, x, mean, channel_axis)


def backward_apply(
    grad_output: Any,
    x: Any,
    mean: _Array,
    var: _Array,
    weight: _Array | None,
    sum_dy: _Array,
    sum_dy_xmu: _Array,
    count: float,
    eps: float = 1e-5,
    *,
    channel_axis: int = 1,
    out: _Array | None = None,
) -> _Array:
    """The gradient of the data, from the sums of the whole batch.

    Parameters
    ----------
    grad_output, x : array_like
        Same shape and dtype; as in `batch_norm`.
    mean, var : ndarray, shape (C,)
        The statistics of the whole batch; `var` is biased. A channel is NaN where ``var + eps`` is negative.
    weight : ndarray, shape (C,), or None
        The scale.
    sum_dy, sum_dy_xmu : ndarray, shape (C,)
        From `backward_reduce`, summed over all parts of the batch.
    count : float
        Elements per channel of the whole batch. 0 means that the statistics were constants.
    eps : float
        Added to the variance.
    channel_axis : int
        The axis of the channels.
    out : ndarray, shape of `x`, optional
        Where the result goes; it may be `grad_output` or `x` itself.

    Returns
    -------
    ndarray, shape of `x`

    Raises
    ------
    ValueError, TypeError
        As in `batch_norm`.

    Notes
    -----
    ``weight / sqrt(var + eps) * (dy - sum_dy / count - (x - mean) * sum_dy_xmu / (count * (var + eps)))``, section 3 of
    Ioffe & Szegedy (2015).

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> x, dy = np.array([[1.0], [3.0]]), np.array([[1.0], [1.0]])
    >>> m = fastbn.moments(x)
    >>> sums = fastbn.backward_reduce(dy, x, m.mean)
    >>> fastbn.backward_apply(dy, x, m.mean, m.var(), None, *sums, m.count)
    array([[0.],
           [0.]])
    """
    return _native.backward_apply(grad_output, x, mean, var, weight, sum_dy, sum_dy_xmu, count, eps, channel_axis, out)
