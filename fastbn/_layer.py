"""_layer.py -- BatchNorm: the parameters, the running statistics and the modes around the kernels."""

from __future__ import annotations

import inspect
import os
import threading
import types
import weakref
from collections.abc import Callable, Mapping
from typing import IO, Any, Self

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from fastbn import _native, _state
from fastbn._frozen import FrozenBatchNorm

__all__ = ["BatchNorm"]

_Array = NDArray[Any]
_File = str | os.PathLike[str] | IO[bytes]

_GUARDS = ("propagate", "skip", "raise")
_PICKLE_VERSION = 1

# A lock that another thread holds at the moment of a fork would stay locked in the child for ever.
# By identity: a subclass may say what it likes of equality.
_layers: weakref.WeakValueDictionary[int, BatchNorm] = weakref.WeakValueDictionary()


def _renew_locks() -> None:
    _native.renew_lock()
    for layer in list(_layers.values()):
        layer._lock = threading.RLock()
        if layer._watch is not None and layer._watch.thread != threading.get_ident():
            layer._watch = None  # who was at it is not in the child


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_locks)


def _parameter(name: str, doc: str) -> property:
    """Return an attribute that gives the array itself, and that checks and copies in what is assigned to it."""

    def get(layer: BatchNorm) -> Any:
        return getattr(layer, "_" + name)

    def assign(layer: BatchNorm, value: ArrayLike) -> None:
        array = get(layer)
        if array is None:
            raise ValueError(f"{name} cannot be assigned: this layer was made without it")
        new = _state.as_parameter(name, value, array.dtype, array.shape)
        with layer._lock:
            _native.commit(layer, [(array, new)], None)

    return property(get, assign, doc=doc)


def _setting(name: str, doc: str, checked: Callable[[Any], Any] | None = None) -> property:
    """Return an attribute that checks what is assigned to it; without a check, one that stays as it is."""

    def get(layer: BatchNorm) -> Any:
        return getattr(layer, "_" + name)

    def assign(layer: BatchNorm, value: Any) -> None:
        if checked is None:
            raise AttributeError(f"{name} cannot be assigned: a layer keeps what it was made with")
        setattr(layer, "_" + name, checked(value))

    return property(get, assign, doc=doc)


class BatchNorm:
    """Batch normalization with parameters and running statistics, as PyTorch's ``BatchNorm1d`` to ``BatchNorm3d``.

    Parameters
    ----------
    num_features : int
        Channels, C: from 0 to what an array of float64 can have, 2**60 - 1 where addresses have 64 bits.
    eps : float, default 1e-5
        Added to the variance.
    momentum : float or None, default 0.1
        Share of a batch in the running statistics, between 0 and 1; None makes them the plain average over all batches.
    affine : bool, default True
        Whether there are a `weight` (ones at first) and a `bias` (zeros at first).
    track_running_stats : bool, default True
        Whether there are running statistics. Without them every call normalizes with its own batch, in eval mode too.
    channel_axis : int, default 1
        The axis of the channels: 1 for NCHW and NC, -1 for NHWC.
    activation : {None, "relu", "relu6", "leaky_relu"}, optional
        Applied last, in the same sweep.
    negative_slope : float, default 0.01
        Of ``"leaky_relu"``.
    dtype : dtype, default float32
        Of the data: float16, bfloat16, float32 or float64; None is the default. Parameters and statistics are float64
        for float64 data, and float32 otherwise.
    on_nonfinite : {"propagate", "skip", "raise"}, default "propagate"
        What a training batch does whose mean or unbiased variance is not finite in the dtype of the running ones,
        whatever these are and whatever `momentum` is. It poisons them for good; or it leaves them alone and is counted
        in `num_batches_skipped`; or it is a ValueError, before anything is written (which takes one more reading of the
        batch).

    Attributes
    ----------
    weight, bias : numpy.ndarray, shape (C,), or None
        Change them in place, or assign an array: it is checked and copied in.
    running_mean, running_var : numpy.ndarray, shape (C,), or None
        The same.
    num_batches_tracked : int or None
        Batches that went into the running statistics: from 0 to 2**62.
    num_batches_skipped : int
        Batches that `on_nonfinite` kept out of them.
    training : bool
        The mode; True at first.
    grad_weight, grad_bias : numpy.ndarray, shape (C,), or None
        Of the last `backward`.
    grad_residual : numpy.ndarray, shape of x, or None
        Of the last `backward`, where its forward had a residual.

    Raises
    ------
    TypeError, ValueError
        If an argument is not of the kind or in the range above.
    MemoryError
        If there is no memory for so many channels.

    Notes
    -----
    Training normalizes with the batch's mean and biased variance, ``y = (x - mean) / sqrt(var + eps) * weight + bias``
    (Ioffe & Szegedy 2015, algorithm 1), and moves the running statistics by ``running = (1 - momentum) * running +
    momentum * batch``, the variance being the unbiased one. Eval mode normalizes with the running statistics.

    A call remembers its `x`, by reference, for the `backward` of the same thread, until the next call of that thread.
    So do not change `x` in between, nor weight and bias. A server wants `freeze`, or ``eval(backward=False)``, which
    remember nothing.

    The arguments are attributes, too. What is assigned to them is checked; `num_features`, `affine`,
    `track_running_stats` and `dtype` stay as they are.

    Several threads may use one layer. Training calls wait for one another; calls in eval mode do not. The running
    statistics and the counter change together or, on any error, not at all.

    A copy or a pickle carries the parameters, the statistics, the settings and the mode, and is independent of the
    layer; not the gradients nor what a call remembered. It carries what attributes the layer was given besides, too,
    such as those of a subclass, and ``copy.copy`` shares these, as it does for any object.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> bn = fastbn.BatchNorm(2)
    >>> x = np.array([[1, 10], [3, 30]], dtype=np.float32)
    >>> bn(x).round(3)
    array([[-1., -1.],
           [ 1.,  1.]], dtype=float32)
    >>> bn.running_mean, bn.num_batches_tracked
    (array([0.2, 2. ], dtype=float32), 1)
    >>> bn.backward(np.ones_like(x)).round(3)
    array([[0., 0.],
           [0., 0.]], dtype=float32)
    >>> bn.grad_bias
    array([2., 2.], dtype=float32)
    """

    # What a call reads; the properties below check what is assigned.
    _eps: float
    _momentum: float | None
    _channel_axis: int
    _activation: str | None
    _negative_slope: float
    _on_nonfinite: str
    _training: bool

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        channel_axis: int = 1,
        activation: str | None = None,
        negative_slope: float = 0.01,
        dtype: DTypeLike | None = np.float32,
        on_nonfinite: str = "propagate",
    ) -> None:
        self._configure(
            num_features=num_features,
            eps=eps,
            momentum=momentum,
            affine=affine,
            track_running_stats=track_running_stats,
            channel_axis=channel_axis,
            activation=activation,
            negative_slope=negative_slope,
            dtype=dtype,
            on_nonfinite=on_nonfinite,
        )
        try:
            fresh = {name: np.zeros_like(zeros, subok=False) for name, zeros in self._template().items()}
        except MemoryError as error:
            raise MemoryError(f"no memory for the arrays of num_features={self.num_features}") from error
        for name in ("weight", "running_var"):
            if name in fresh:
                fresh[name] += 1
        self._fill(fresh)

    def _configure(
        self,
        *,
        num_features: int,
        eps: float,
        momentum: float | None,
        affine: bool,
        track_running_stats: bool,
        channel_axis: int,
        activation: str | None,
        negative_slope: float,
        dtype: DTypeLike | None,
        on_nonfinite: str,
    ) -> None:
        self._num_features = _state.as_integer("num_features", num_features, 0, _state.CHANNELS_MAX)
        self.eps = eps
        self.momentum = momentum
        self._affine = _native.flag("affine", affine)
        self._track_running_stats = _native.flag("track_running_stats", track_running_stats)
        self.channel_axis = channel_axis
        self.activation = activation
        self.negative_slope = negative_slope
        self._dtype = _state.as_dtype("dtype", dtype)
        self.on_nonfinite = on_nonfinite
        self.training = True
        # Reentrant: a signal handler that saves the layer may run inside a call of it.
        self._lock = threading.RLock()
        self.num_batches_skipped = 0
        self.grad_weight: _Array | None = None
        self.grad_bias: _Array | None = None
        self.grad_residual: _Array | None = None
        self._backward_follows = True
        self._last = threading.local()
        # Who calibrates or compares it (_watch.py), and may have it do something else instead of its forward.
        self._watch: Any = None
        _layers[id(self)] = self

    def _template(self) -> dict[str, _Array]:
        dtype = np.float64 if self.dtype.name == "float64" else np.float32
        return _state.template(self.num_features, dtype, self.affine, self.track_running_stats)

    def _fill(self, arrays: Mapping[str, _Array]) -> None:
        # None where the layer was made without: Any, lest every use had to say that it knows.
        self._weight: Any = arrays.get("weight")
        self._bias: Any = arrays.get("bias")
        self._running_mean: Any = arrays.get("running_mean")
        self._running_var: Any = arrays.get("running_var")
        self._tracked: Any = int(arrays["num_batches_tracked"]) if self.track_running_stats else None

    num_features = _setting("num_features", "Channels, C.")
    affine = _setting("affine", "Whether there are `weight` and `bias`.")
    track_running_stats = _setting("track_running_stats", "Whether there are running statistics.")
    dtype = _setting("dtype", "Of the data.")
    eps = _setting("eps", "Added to the variance.", lambda v: _native.number("eps", v, 0.0))
    momentum = _setting(
        "momentum",
        "Share of a batch in the running statistics; None for the plain average over all batches.",
        lambda v: None if v is None else _native.number("momentum", v, 0.0, 1.0),
    )
    channel_axis = _setting("channel_axis", "The axis of the channels.", lambda v: _state.as_axis("channel_axis", v))
    activation = _setting("activation", "Applied last.", lambda v: _native.choice("activation", v, _native.ACTIVATIONS))
    negative_slope = _setting("negative_slope", 'Of ``"leaky_relu"``.', lambda v: _native.number("negative_slope", v))
    on_nonfinite = _setting(
        "on_nonfinite",
        'What a training batch does whose statistics are not finite: "propagate", "skip" or "raise".',
        lambda v: _native.choice("on_nonfinite", v, _GUARDS),
    )
    training = _setting("training", "The mode.", lambda v: _native.flag("training", v))
    weight = _parameter("weight", "Scale of every channel, shape (C,); None with ``affine=False``.")
    bias = _parameter("bias", "Shift of every channel, shape (C,); None with ``affine=False``.")
    running_mean = _parameter("running_mean", "Running mean, shape (C,); None with ``track_running_stats=False``.")
    running_var = _parameter("running_var", "Running variance, shape (C,); None with ``track_running_stats=False``.")

    @property
    def num_batches_tracked(self) -> Any:
        """Batches that went into the running statistics; None with ``track_running_stats=False``."""
        return self._tracked

    @num_batches_tracked.setter
    def num_batches_tracked(self, value: int) -> None:
        if self._tracked is None:
            raise ValueError("num_batches_tracked cannot be assigned: this layer was made without it")
        number = _state.as_integer("num_batches_tracked", value, 0, _state.COUNTER_MAX)
        with self._lock:
            self._tracked = number

    @property
    def num_batches_skipped(self) -> int:
        """Batches that `on_nonfinite` kept out of the running statistics."""
        return self._skipped

    @num_batches_skipped.setter
    def num_batches_skipped(self, value: int) -> None:
        number = _state.as_integer("num_batches_skipped", value, 0, _state.COUNTER_MAX)
        with self._lock:
            self._skipped = number

    def __call__(self, x: Any, residual: Any = None, out: _Array | None = None) -> _Array:
        """Normalize `x`.

        Parameters
        ----------
        x : numpy.ndarray, or CPU tensor with ``__dlpack__``
            Float16, bfloat16, float32 or float64, of at least two dimensions, with C channels. In training mode its
            statistics are taken, and go into the running ones.
        residual : like x, of its shape and dtype, optional
            Added before the activation.
        out : numpy.ndarray, shape and dtype of x, optional
            Where to put the result. It may be `x`, and then there is no `backward`.

        Returns
        -------
        numpy.ndarray
            `out`, or a new array of the dtype and memory order of `x`.

        Raises
        ------
        TypeError, ValueError
            If an argument does not fit; or in training, if there is one value per channel. Then nothing is changed.

        Examples
        --------
        >>> import numpy as np, fastbn
        >>> bn = fastbn.BatchNorm(3, activation="relu").eval()
        >>> x = np.full((2, 3, 4, 4), 2.0, dtype=np.float32)
        >>> float(bn(x, residual=-x).max()) == 0.0
        True
        """
        if (watch := self._watch) is not None and (instead := watch.instead_of(self)) is not None:
            return instead(x, residual, out)  # type: ignore[no-any-return]
        running = not self._training and self._track_running_stats
        try:
            if running and not self._backward_follows:
                return _native.normalize(
                    x, self._running_mean, self._running_var, self._weight, self._bias, self._eps, self._channel_axis,
                    self._activation, self._negative_slope, residual, out,
                )  # fmt: skip
            spoils = out is not None and _overlap(x, out)
            if running:
                y, saved = _native.forward_eval(
                    x, self._running_mean, self._running_var, self._weight, self._bias, self._eps, self._channel_axis,
                    self._activation, self._negative_slope, residual, out,
                )  # fmt: skip
            elif self._track_running_stats:
                with self._lock:
                    momentum = self._momentum
                    if momentum is None:
                        momentum = 1.0 / (self._tracked + 1)
                    if self._on_nonfinite == "raise":
                        self._refuse_nonfinite(x)
                    # It counts, too, in `_tracked` or `num_batches_skipped`: here a signal handler, which may save the
                    # layer, could come between the change of the running statistics and that of the counter.
                    y, saved = _native.forward_train(
                        x, self._running_mean, self._running_var, self._weight, self._bias, momentum, self._eps,
                        self._channel_axis, self._activation, self._negative_slope, residual, out,
                        self._on_nonfinite != "propagate", self,
                    )  # fmt: skip
            else:
                if not self._affine:
                    self._check_channels(x)
                y, saved = _native.forward(
                    x, self._weight, self._bias, self._eps, self._channel_axis, self._activation, self._negative_slope,
                    residual, out,
                )  # fmt: skip
        except ValueError:
            self._check_channels(x)  # what is wrong then is x, and not what it was compared with
            raise
        self._last.call = (None if spoils else x), saved
        return y if out is None else out

    forward = __call__

    def _check_channels(self, x: Any) -> None:
        shape, axis = getattr(x, "shape", ()), self._channel_axis
        if isinstance(shape, tuple) and -len(shape) <= axis < len(shape) and shape[axis] != self._num_features:
            raise ValueError(
                f"x must have {self._num_features} channels along axis {axis}, got shape {tuple(shape)}"
            ) from None

    def _refuse_nonfinite(self, x: Any) -> None:
        """Raise if the statistics of `x` are not finite in the dtype of the running ones."""
        dtype = self._running_mean.dtype
        count, mean, _, m2 = _native.moments(x, self.channel_axis)
        with np.errstate(over="ignore"):
            bad = ~np.isfinite([mean.astype(dtype), (m2 / max(count - 1, 1)).astype(dtype)]).all(0)
        if bad.any():
            raise ValueError(
                f"on_nonfinite='raise': x must have statistics that are finite in {dtype}, and those of channels "
                f"{np.flatnonzero(bad).tolist()} are not"
            )

    def backward(self, grad_output: Any, out: _Array | None = None) -> _Array:
        """Differentiate this thread's last call, and set `grad_weight`, `grad_bias` and `grad_residual`.

        Parameters
        ----------
        grad_output : like that call's x, of its shape and dtype
            The gradient with respect to the call's result.
        out : numpy.ndarray, shape and dtype of x, optional
            Where to put the result. It may be `grad_output` or x.

        Returns
        -------
        numpy.ndarray
            The gradient with respect to x: `out`, or a new array.

        Raises
        ------
        TypeError, ValueError
            If an argument does not fit, or there is no call to differentiate: none yet, one that wrote over its x, or
            one after ``eval(backward=False)``.

        Notes
        -----
        With ``dz`` the gradient behind the activation, ``n`` values per channel, ``scale = weight / sqrt(var + eps)``
        and ``xhat = (x - mean) / sqrt(var + eps)``, after a training call (Ioffe & Szegedy 2015, section 3, gathered)::

            grad_bias = sum(dz)
            grad_weight = sum(dz * xhat)
            dx = scale * (dz - grad_bias / n - xhat * grad_weight / n)

        After a call in eval mode the statistics are constants: ``dx = scale * dz``.

        Examples
        --------
        >>> import numpy as np, fastbn
        >>> bn = fastbn.BatchNorm(1, eps=0.0)
        >>> y = bn(np.array([[0.0], [2.0], [4.0]], dtype=np.float32))
        >>> bn.backward(np.array([[1.0], [0.0], [0.0]], dtype=np.float32)).round(4)
        array([[ 0.1021],
               [-0.2041],
               [ 0.1021]], dtype=float32)
        """
        try:
            x, saved = self._last.call
        except AttributeError:
            raise ValueError("backward must follow a call of the same thread, got none that was remembered") from None
        if x is None:
            raise ValueError("backward must have the x of the last call, and that call wrote its result (out) over it")
        dx, grad_weight, grad_bias, self.grad_residual = _native.backward(
            grad_output, x, saved, self._weight, self._bias, out
        )
        if self._affine:
            self.grad_weight, self.grad_bias = grad_weight, grad_bias
        if out is not None and _overlap(x, out):
            self._last.call = None, saved
        return dx

    def train(self, mode: bool = True) -> Self:
        """Set training mode, or eval mode with ``mode=False``, and return the layer.

        Parameters
        ----------
        mode : bool, default True

        Examples
        --------
        >>> import fastbn
        >>> fastbn.BatchNorm(3).train(False).training
        False
        """
        self._training = _native.flag("mode", mode)
        self._backward_follows = True
        return self

    def eval(self, *, backward: bool = True) -> Self:
        """Set eval mode, which normalizes with the running statistics, and return the layer.

        Parameters
        ----------
        backward : bool, default True
            False says that no `backward` will follow. Then what calls remembered is dropped and calls remember nothing,
            until `train` or `eval` is called again.

        Examples
        --------
        >>> import fastbn
        >>> fastbn.BatchNorm(3).eval(backward=False).training
        False
        """
        self._backward_follows = _native.flag("backward", backward)
        self._training = False
        if not backward:
            self._last = threading.local()
        return self

    def freeze(self, dtype: DTypeLike | None = None) -> FrozenBatchNorm:
        """Return what eval mode computes as an immutable operation that any number of threads may call.

        Parameters
        ----------
        dtype : dtype, optional
            Of the data, if not the layer's.

        Returns
        -------
        FrozenBatchNorm

        Raises
        ------
        ValueError
            With ``track_running_stats=False``, or if a parameter or running statistic is not finite.

        Examples
        --------
        >>> import numpy as np, fastbn
        >>> op = fastbn.BatchNorm(2, eps=0.0).freeze()
        >>> op(np.array([[1, 2]], dtype=np.float32))
        array([[1., 2.]], dtype=float32)
        """
        return FrozenBatchNorm.from_batch_norm(self, dtype)

    def state_dict(self, prefix: str = "") -> _state.StateDict:
        """Return copies of the parameters and statistics under PyTorch's keys.

        Parameters
        ----------
        prefix : str, default ""
            Put before every key, such as ``"layer1.bn."``.

        Returns
        -------
        dict of str to numpy.ndarray
            ``weight``, ``bias``, ``running_mean``, ``running_var`` and ``num_batches_tracked``, as far as the layer has
            them.

        Examples
        --------
        >>> import fastbn
        >>> list(fastbn.BatchNorm(3, affine=False).state_dict())
        ['running_mean', 'running_var', 'num_batches_tracked']
        """
        _state.check_prefix(prefix)
        with self._lock:
            return _state.StateDict({prefix + name: array.copy() for name, array in self._arrays().items()}, prefix)

    def _arrays(self) -> dict[str, _Array]:
        tracked = self._tracked
        arrays = {
            "weight": self._weight,
            "bias": self._bias,
            "running_mean": self._running_mean,
            "running_var": self._running_var,
            "num_batches_tracked": None if tracked is None else np.array(tracked, dtype=np.int64),
        }
        return {name: array for name, array in arrays.items() if array is not None}

    def load_state_dict(
        self, state: Mapping[str, Any], strict: bool = True, *, prefix: str = ""
    ) -> _state.IncompatibleKeys:
        """Copy parameters and statistics in.

        Parameters
        ----------
        state : mapping of str to array_like
            What `state_dict` returns, here or in PyTorch. As in PyTorch, a plain mapping may lack
            ``num_batches_tracked``, which old files do not have; the layer keeps its own.
        strict : bool, default True
            False passes over missing and unknown keys.
        prefix : str, default ""
            Only keys that begin with it are looked at; it is taken off.

        Returns
        -------
        (missing_keys, unexpected_keys)
            Lists, empty if `strict`.

        Raises
        ------
        TypeError
            If `state` is not a mapping.
        ValueError
            One that names everything that is wrong: missing and unknown keys, and arrays of another shape, of the wrong
            kind of dtype, not finite, or negative where that makes no sense. Nothing is changed then.

        Examples
        --------
        >>> import fastbn
        >>> bn = fastbn.BatchNorm(3)
        >>> bn.load_state_dict(fastbn.BatchNorm(4).state_dict() | {"scale": 1})
        Traceback (most recent call last):
        ...
        ValueError: this state does not fit BatchNorm(3): unknown scale; weight must have shape (3,), got (4,); ...
        """
        arrays, keys = _state.check_state(state, self._template(), self._name(), prefix=prefix, strict=strict)
        self._commit(arrays)
        return keys

    def save(self, file: _File) -> None:
        """Write the state to an npz file, as `fastbn.save` does.

        Parameters
        ----------
        file : str, os.PathLike or binary file

        Raises
        ------
        ValueError, OSError
            As of `fastbn.save`; and if the layer holds what `load` refuses: a value that is not finite, or a negative
            variance. Then nothing is written.

        Examples
        --------
        >>> import fastbn, io
        >>> file = io.BytesIO()
        >>> fastbn.BatchNorm(3).save(file)
        """
        state = self.state_dict()
        _state.check_state(state, self._template(), self._name())
        _state.save(file, state, max_bytes=self._max_bytes())

    def load(self, file: _File, strict: bool = True, *, prefix: str = "") -> _state.IncompatibleKeys:
        """Read the state from an npz file that may come from anybody.

        Parameters
        ----------
        file : str, os.PathLike or binary file
            A file of `save` or of `numpy.savez`.
        strict : bool, default True
        prefix : str, default ""
            As of `load_state_dict`.

        Returns
        -------
        (missing_keys, unexpected_keys)
            Lists, empty if `strict`.

        Raises
        ------
        OSError
            If the file cannot be opened.
        ValueError
            As of `fastbn.load` and `load_state_dict`. Names, shapes and dtypes are checked before anything is inflated.
            A file of more than 64 MiB, where the layer is smaller, takes `fastbn.load`, which can be allowed more.

        Examples
        --------
        >>> import fastbn, io
        >>> file = io.BytesIO()
        >>> fastbn.BatchNorm(3).save(file)
        >>> fastbn.BatchNorm(3).load(file)
        IncompatibleKeys(missing_keys=[], unexpected_keys=[])
        """

        def fits(outline: Mapping[str, _Array]) -> None:
            _state.check_state(outline, self._template(), self._name(), prefix=prefix, strict=strict)

        return self.load_state_dict(_state.read(file, self._max_bytes(), fits), strict, prefix=prefix)

    def _max_bytes(self) -> int:
        """Return how much a file may take: as much as any, and more only where the layer itself is larger."""
        return max(_state.MAX_BYTES, 4 * sum(array.nbytes for array in self._template().values()))

    def _commit(self, arrays: Mapping[str, _Array]) -> None:
        with self._lock:
            new = self._arrays() | dict(arrays)
            tracked = int(new["num_batches_tracked"]) if self.track_running_stats else None
            own = {"weight": self._weight, "bias": self._bias, "running_mean": self._running_mean}
            own["running_var"] = self._running_var
            pairs = [(array, np.ascontiguousarray(new[name])) for name, array in own.items() if array is not None]
            _native.commit(self, pairs, tracked)

    def _settings(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _SETTINGS}

    def __getstate__(self) -> dict[str, Any]:
        pickled = {
            "version": _PICKLE_VERSION,
            "settings": self._settings(),
            "training": self.training,
            "num_batches_skipped": self.num_batches_skipped,
            "state": dict(BatchNorm.state_dict(self)),  # whatever a subclass says of its own
        }
        held: Any = object.__getstate__(self)  # of a class with slots, these beside the attributes
        attributes, slots = held if isinstance(held, tuple) else (held, {})
        more = {name: value for name, value in (attributes | slots).items() if name not in _OWN}
        return pickled | {"attributes": more} if more else pickled

    def __setstate__(self, pickled: Mapping[str, Any]) -> None:
        # Into a layer of no memory first: what is pickled may be anything, also a wrong number of channels.
        new = object.__new__(type(self))
        try:
            version = pickled.get("version") if isinstance(pickled, Mapping) else _PICKLE_VERSION
            if version != _PICKLE_VERSION:
                raise ValueError(f"version must be {_PICKLE_VERSION}, got {_native.said(version)}")
            if isinstance(pickled, Mapping):
                pickled = {"attributes": {}, **pickled}
            _state.check_keys("what was pickled", pickled, _PICKLED)
            more = pickled["attributes"]
            if not isinstance(more, Mapping):
                raise TypeError(f"attributes must be a mapping, got {type(more).__name__}")
            for name in more:  # which write over nothing that is checked below
                if not isinstance(name, str) or name in _OWN:
                    raise ValueError(f"attributes must have names that BatchNorm has not, got {_native.said(name)}")
            _state.check_keys("settings", pickled["settings"], _SETTINGS)
            new._configure(**pickled["settings"])
            new.training = pickled["training"]
            new.num_batches_skipped = pickled["num_batches_skipped"]
            state = pickled["state"]
            if isinstance(state, Mapping):
                state = _state.StateDict(state)  # of the version that has a counter
            arrays, _ = _state.check_state(state, new._template(), new._name(), finite=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"not the pickled state of a BatchNorm: {error}") from error
        new._fill(arrays)
        self.__dict__.update(new.__dict__)
        for name, value in more.items():
            # Past what a class makes of an assignment, as pickles do: a property may allow none.
            slot = inspect.getattr_static(type(self), name, None)
            if isinstance(slot, types.MemberDescriptorType):
                slot.__set__(self, value)
            else:
                self.__dict__[name] = value
        _layers[id(self)] = self

    def __repr__(self) -> str:
        defaults = inspect.signature(BatchNorm).parameters
        told = [
            f"{name}={value!r}"
            for name, value in self._settings().items()
            if name != "num_features" and value != defaults[name].default
        ]
        return f"BatchNorm({', '.join([str(self.num_features), *told])})"

    def _name(self) -> str:
        return f"BatchNorm({self.num_features})"


_SETTINGS = tuple(inspect.signature(BatchNorm).parameters)
_PICKLED = ("version", "settings", "training", "num_batches_skipped", "state", "attributes")
_OWN = frozenset(vars(BatchNorm(0)))


def _overlap(x: Any, out: _Array) -> bool:
    """Whether writing `out` may have changed `x`. Two arrays that own their memory are told apart at no cost."""
    if out is x:
        return True
    if not issubclass(type(out), np.ndarray):  # isinstance would believe an object's __class__
        return False  # which the binding refuses
    if not issubclass(type(x), np.ndarray):
        x = _native.view(x, "x")
    return (type(x) is not np.ndarray or x.base is not None or out.base is not None) and np.may_share_memory(x, out)
