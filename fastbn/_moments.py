"""_moments.py -- per-channel statistics that can be merged: what synchronized and streamed batch norm is made of."""

from __future__ import annotations

import numbers
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastbn import _native
from fastbn._state import as_parameter

__all__ = ["Moments"]

_Float64 = NDArray[np.float64]


class Moments:
    """Count, mean and sum of squared deviations of every channel.

    `fastbn.moments` computes them; ``a + b`` merges the moments of two disjoint parts of a data set into those of the
    whole, in any grouping, and ``sum(parts)`` merges many. Immutable and picklable.

    Parameters
    ----------
    count : int or float
        Elements per channel, at least 0. A sum of weights may be fractional.
    mean : array_like, shape (C,)
        Mean per channel. Kept as float64.
    m2 : array_like, shape (C,)
        Sum of squared deviations from the mean per channel. Kept as float64.
    mean_lo : array_like, shape (C,), optional
        What float64 could not hold of the mean: the mean is the unevaluated sum ``mean + mean_lo``. Merging carries it
        along, so that the mean of float64 data is not rounded once a merge. Zeros if absent.

    Attributes
    ----------
    count : int or float
    mean, m2, mean_lo : numpy.ndarray, float64, shape (C,)
        Read-only.

    Raises
    ------
    TypeError
        If `count` is not a number or an array is not of real numbers.
    ValueError
        If `count` is negative or not finite, or the arrays are not one-dimensional and equally long.

    Notes
    -----
    The merge is that of Chan, Golub & LeVeque (1979): with ``d = mean_b - mean_a`` and ``n = n_a + n_b``, the mean is
    ``mean_a + d * n_b / n`` and ``m2`` is ``m2_a + m2_b + d**2 * n_a * n_b / n``. It never subtracts two large squares.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> x = np.arange(12.0).reshape(6, 2)
    >>> parts = [fastbn.moments(x[:2]), fastbn.moments(x[2:])]
    >>> whole = sum(parts)
    >>> whole.count, whole.mean, whole.var()
    (6, array([5., 6.]), array([11.66666667, 11.66666667]))
    >>> whole.var(ddof=1)
    array([14., 14.])
    """

    __array_ufunc__ = None  # an array is no part of a sum
    __slots__ = ("count", "m2", "mean", "mean_lo")

    count: float
    mean: _Float64
    m2: _Float64
    mean_lo: _Float64

    def __init__(self, count: float, mean: ArrayLike, m2: ArrayLike, mean_lo: ArrayLike | None = None) -> None:
        first = as_parameter("mean", mean, np.float64)
        lo = np.zeros(first.shape) if mean_lo is None else as_parameter("mean_lo", mean_lo, np.float64, first.shape)
        _fill(self, _as_count(count), *_sealed(first, lo, as_parameter("m2", m2, np.float64, first.shape)))

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"Moments is immutable: cannot set {name!r}")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"Moments is immutable: cannot delete {name!r}")

    def __reduce__(self) -> tuple[Any, ...]:
        return Moments, (self.count, self.mean, self.m2, self.mean_lo)

    def __repr__(self) -> str:
        return f"Moments(count={self.count}, mean={self.mean!r}, m2={self.m2!r})"

    def var(self, ddof: float = 0) -> _Float64:
        """Return the variance of every channel.

        Parameters
        ----------
        ddof : float, default 0
            The divisor is ``count - ddof``: 0 gives the biased variance that batch norm divides by, 1 the unbiased one
            that its running variance takes.

        Returns
        -------
        numpy.ndarray, float64, shape (C,)

        Raises
        ------
        TypeError
            If `ddof` is not a number.
        ValueError
            If `count` is not larger than `ddof`.

        Examples
        --------
        >>> import fastbn
        >>> fastbn.Moments(4, [0.0], [8.0]).var()
        array([2.])
        """
        ddof = _native.number("ddof", ddof)
        if not self.count > ddof:
            raise ValueError(f"var(ddof={ddof:g}) needs a count above {ddof:g}, got {self.count}")
        return self.m2 / (self.count - ddof)

    def __add__(self, other: Moments) -> Moments:
        if not isinstance(other, Moments):
            return NotImplemented
        if self.mean.shape != other.mean.shape:
            raise ValueError(f"cannot merge moments of {self.mean.size} channels with those of {other.mean.size}")
        if not other.count:
            return self
        if not self.count:
            return other
        count = self.count + other.count
        share = other.count / count
        # A channel with an infinity or NaN in it ends as NaN or infinity by itself, and there is nothing to warn of.
        with np.errstate(invalid="ignore", over="ignore"):
            delta = (other.mean - self.mean) + (other.mean_lo - self.mean_lo)
            shift = delta * share
            # Knuth's exact sum: mean + error is self.mean + shift without rounding. Rounding delta itself is harmless,
            # because delta * share is of the order of the standard deviation, not of the mean.
            mean = self.mean + shift
            part = mean - self.mean
            lo = ((self.mean - (mean - part)) + (shift - part)) + self.mean_lo
            hi = mean + lo
            lo = np.where(np.isfinite(hi), lo - (hi - mean), 0.0)
            m2 = self.m2 + other.m2 + delta * shift * self.count
        return made(_as_count(count), *_sealed(hi, lo, m2))

    def __radd__(self, other: int) -> Moments:
        # sum() starts from 0.
        return self if isinstance(other, int) and other == 0 else NotImplemented


def _as_count(count: Any) -> float:
    number = _native.number("count", count, 0.0)
    return int(count) if isinstance(count, numbers.Integral) else number


def _sealed(*arrays: _Float64) -> tuple[_Float64, ...]:
    for array in arrays:
        array.setflags(write=False)
    return arrays


def _fill(moments: Moments, count: float, mean: _Float64, mean_lo: _Float64, m2: _Float64) -> None:
    object.__setattr__(moments, "count", count)
    object.__setattr__(moments, "mean", mean)
    object.__setattr__(moments, "mean_lo", mean_lo)
    object.__setattr__(moments, "m2", m2)


def made(count: float, mean: _Float64, mean_lo: _Float64, m2: _Float64) -> Moments:
    """Return the moments of what needs neither a check nor a copy: a count, and new arrays that are read-only."""
    moments = object.__new__(Moments)
    _fill(moments, count, mean, mean_lo, m2)
    return moments
