"""_gap.py -- how far training mode and eval mode differ on given batches, layer by layer, and why."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastbn import _native
from fastbn._calibrate import ExactSums
from fastbn._functional import moments
from fastbn._layer import BatchNorm
from fastbn._moments import Moments
from fastbn._state import ailments
from fastbn._watch import Layers, Watcher, watch

__all__ = ["GapReport", "LayerGap", "train_eval_gap"]

_Array = NDArray[Any]
_Float64 = NDArray[np.float64]

# Averaging leaves noise of which this multiple is still taken for noise; and what undoing the initial statistics leaves
# of a distance, if these explain it, is below one over this.
_CLEARLY = 4.0

# How often statistics that are those of the data may be taken for others.
_FALSE_ALARMS = 0.01

# The variance of a variance over that of one of normal values, (kurtosis - 1) / 2, that is taken for granted: Laplace's
# distribution has a kurtosis of 6, a rectified normal one of 5.4.
_TAILS = 2.5

# Whether the values of a sample go together is asked of so many batches at the most, each in so many pieces.
_ASKED = 8
_PIECES = 16


@dataclasses.dataclass(frozen=True)
class LayerGap:
    """One layer of a `GapReport`. Root mean squares are over all values, before residual and activation.

    Attributes
    ----------
    name : str
        The path to the layer.
    gap : float
        Of the difference between what training and eval mode make of the same input, over that of training mode.
    noise : float
        What would be left of it with the statistics of all the batches for running ones: batches differ.
    stale : float
        What the running statistics add: between eval mode with them and with those of all the batches.
    worst_channel : int
        Where the difference is largest.
    worst_gap : float
        The difference there, over the same.
    mean_off, worst_mean_off : float
        From the running mean to that of all the batches, in their standard deviations: root mean square over channels,
        and the largest.
    deviation_ratio : float
        The running standard deviation over that of all the batches: geometric mean over channels.
    values : float
        Per channel in a batch, on average.
    cause : str or None
        Where `gap` is above the tolerance: "small batch", "momentum", "too few batches" or "drift". And always where an
        array of the layer is the cause: "running_mean is not finite", or `running_var`, `weight` or `bias`;
        "running_var is negative"; or "running_var is zero", and `eps` is, too. Numbers above may be NaN or infinite
        then.
    advice : str

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> x = np.random.default_rng(0).normal(size=(8, 64, 2)).astype(np.float32)
    >>> report = fastbn.train_eval_gap(fastbn.BatchNorm(2), list(x + 9))
    >>> report.layers[0].cause, round(report.layers[0].mean_off)
    ('too few batches', 9)
    """

    name: str
    gap: float
    noise: float
    stale: float
    worst_channel: int
    worst_gap: float
    mean_off: float
    worst_mean_off: float
    deviation_ratio: float
    values: float
    cause: str | None
    advice: str


@dataclasses.dataclass(frozen=True)
class GapReport:
    """What `train_eval_gap` found. It prints as a table, and advice.

    Attributes
    ----------
    layers : tuple of LayerGap
    batches : int
        How many there were.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> x = np.random.default_rng(0).normal(size=(8, 64, 2)).astype(np.float32)
    >>> print(fastbn.train_eval_gap(fastbn.BatchNorm(2), list(x + 9)))
    layer     gap  noise  stale  worst channel  mean off, sd  sd ratio  cause
    network ... too few batches
    network: the initial statistics still weigh 100% after 0 batches with momentum 0.1: calibrate, train longer, ...
    """

    layers: tuple[LayerGap, ...]
    batches: int

    def __str__(self) -> str:
        head = ("layer", "gap", "noise", "stale", "worst channel", "mean off, sd", "sd ratio", "cause")
        rows = [head] + [
            (
                layer.name, _short(layer.gap), _short(layer.noise), _short(layer.stale),
                f"{layer.worst_channel}: {_short(layer.worst_gap)}", _short(layer.mean_off),
                _short(layer.deviation_ratio), layer.cause or "-",
            )
            for layer in self.layers
        ]  # fmt: skip
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        last = len(head) - 1
        lines = [
            "  ".join(
                cell.ljust(width) if i in (0, last) else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        ]
        lines += [f"{layer.name}: {layer.advice}" for layer in self.layers if layer.cause]
        return "\n".join(line.rstrip() for line in lines)


def train_eval_gap(
    network: Callable[[Any], Any],
    batches: Iterable[Any],
    *,
    layers: Layers | None = None,
    tolerance: float = 0.1,
    progress: bool | None = None,
) -> GapReport:
    """Measure how far training and eval mode of batch norm layers differ on given batches, and say why.

    Parameters
    ----------
    network, batches, layers, progress
        As of `calibrate`. At least two batches, of the size that training has.
    tolerance : float, default 0.1
        The gap up to which nothing is wrong.

    Returns
    -------
    GapReport

    Raises
    ------
    TypeError, ValueError, RuntimeError, ImportError
        As of `calibrate`; ValueError also if there are fewer than two batches.

    Notes
    -----
    While it measures, every layer normalizes with the statistics of its batch, as in training, so that it answers for
    its own running statistics and not for those of the layers before it. Nothing of any layer changes that is found in
    the network or given in `layers`. Who else may call them meanwhile is as with `calibrate`.

    The gap has two parts, whose squares add up nearly. The one is *noise*: batches differ from one another, and
    more so the smaller they are: ``small batch``. The other is that the running statistics are *stale*, which
    `calibrate` mends. It is put down to ``momentum`` if averaging with so large a one leaves as much noise (where
    momentum is None and an average of so few does, to ``too few batches``); where it is the larger of the two, to
    ``too few batches`` if it vanishes once the share ``(1 - momentum) ** num_batches_tracked`` of the initial
    statistics, zeros and ones, is taken out; else to ``drift``: these batches are not of the data, or the weights
    before the layer no longer those, that the statistics are of.

    Few batches have statistics of their own by chance. So stale is only what they could hardly show if the running
    statistics were those of the data: a mean, or a variance by Paulson's (1942) normal approximation of its ratio, that
    is more standard errors off than ``sqrt(2 log(2 C / 0.01))``. That bounds the largest of ``2 C`` normal numbers, for
    C channels, in all but one case of a hundred (Bonferroni), however channels go together. Standard errors are those
    of values that know nothing of each other, of a kurtosis of up to 6, and of running statistics that average as many
    batches as momentum has them; if batches differ more than this, by Kish's (1965) design effect, that much larger.
    Where a sample has several values in a channel, as images have, these may go together, and the effect is that of
    pieces of batches, too: samples, or a few of them. Few pieces hardly know it, so it is larger by what Student's
    distribution is wider than the normal one (by Wallace, 1959), but no larger than if all values of a sample were the
    same. Samples are along the first axis that is not that of the channels. What is not stale by this is put down to
    ``small batch``.

    Two or three batches of a few channels do not tell how batches differ that samples within them do not, such as
    batches of one class each: give more.

    Before all that comes an array of the layer that eval mode cannot work with, such as one with a NaN in it: it is
    the cause, whatever the tolerance.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> x = np.random.default_rng(0).normal(size=(8, 64, 2)).astype(np.float32)
    >>> report = fastbn.train_eval_gap(fastbn.BatchNorm(2), list(x + 9))
    >>> report.batches, report.layers[0].cause
    (8, 'too few batches')
    """
    tolerance = _native.number("tolerance", tolerance, 0.0)

    def conclude(observers: list[_Observer], count: int) -> GapReport:
        # What comes of arrays that are not finite is told in words.
        with np.errstate(all="ignore"):
            return GapReport(tuple(o.report(tolerance) for o in observers), count)

    return watch(network, batches, _Observer, conclude, layers=layers, description="train_eval_gap", progress=progress)


class _Observer(Watcher):
    """The moments of all batches that a layer is given."""

    def __init__(self, name: str, layer: BatchNorm) -> None:
        super().__init__(name, layer)
        self.parts: list[Moments] = []
        self.pieces: list[Moments] = []
        self.together: list[int] = []  # values of a channel in a sample

    def look(self, x: Any) -> list[Moments]:
        """Return the moments of a batch; and where samples have several values in a channel, of pieces of it, too."""
        found = super().look(x)
        array, axis = _native.view(x, "x"), self.layer.channel_axis
        along = int(axis % array.ndim == 0)
        samples = array.shape[along]
        if found[0].count > samples and len(self.parts) < _ASKED:
            self.together.append(found[0].count // samples)
            count = min(samples, _PIECES)
            ends = [samples * i // count for i in range(count + 1)]
            for piece in itertools.starmap(slice, itertools.pairwise(ends)):
                found.append(moments(array[(slice(None),) * along + (piece,)], channel_axis=axis))
        return found

    def add(self, found: Moments, *pieces: Moments) -> None:
        self.refuse_single(found)
        self.parts.append(found)
        self.pieces.extend(pieces)

    def report(self, tolerance: float) -> LayerGap:
        layer, parts = self.layer, self.parts
        if len(parts) < 2:
            raise ValueError(f"{self.name} must be given at least 2 batches with data, got {len(parts)}")
        sums = ExactSums(layer.num_features)
        for part in parts:
            sums.add(part)
        whole = sums.mean(), sums.var()
        if not np.isfinite(whole[1]).all():
            raise ValueError(f"{self.name} has a variance over all batches that is not finite in float64")
        state = BatchNorm.state_dict(layer)  # whatever a subclass says
        weight, bias = _in_range(
            _wide(state.get("weight"), 1.0, layer.num_features), _wide(state.get("bias"), 0.0, layer.num_features)
        )
        running = state["running_mean"].astype(np.float64), state["running_var"].astype(np.float64)
        tracked = int(state["num_batches_tracked"])
        counts = np.array([part.count for part in parts])
        share = counts / counts.sum()
        spread = whole[1] * (1.0 - 1.0 / sums.count)
        means, variances = np.stack([p.mean for p in parts]), np.stack([p.var() for p in parts])
        scales = _scale(weight, variances, layer.eps)

        def squared(mean: _Float64, var: _Float64) -> _Float64:
            """The mean square, by channel, between a batch normalized with its own statistics and with these."""
            scale = _scale(weight, var, layer.eps)
            return _total(share @ ((np.sqrt(variances) * (scales - scale)) ** 2 + ((means - mean) * scale) ** 2))

        def apart(mean: _Float64, var: _Float64) -> float:
            """The mean square between all batches normalized with these statistics and with their own."""
            a, b = _scale(weight, var, layer.eps), _scale(weight, whole[1], layer.eps)
            return float(np.mean((np.sqrt(spread) * (a - b)) ** 2 + ((whole[0] - mean) * a) ** 2)) if mean.size else 0.0

        # Eval mode divides by zero there, and `_scale` does not. Of an infinite bias both modes have nothing but that.
        by_channel = np.where(running[1] + layer.eps == 0, np.inf, squared(*running))
        by_channel = np.where(np.isfinite(bias), by_channel, np.nan)
        size = float(np.mean(share @ (np.sqrt(variances) * scales) ** 2 + bias**2)) if weight.size else 0.0
        noise, stale = float(np.mean(squared(*whole))) if weight.size else 0.0, apart(*running)
        off = np.abs(running[0] - whole[0]) / np.sqrt(np.maximum(whole[1] + layer.eps, np.finfo(np.float64).tiny))
        ratio = np.sqrt((running[1] + layer.eps) / np.maximum(whole[1] + layer.eps, np.finfo(np.float64).tiny))
        gap = _relative(float(np.mean(by_channel)) if weight.size else 0.0, size)
        cause = advice = None
        if broken := ailments(state, layer.eps):
            cause, advice = broken[0][0], "; ".join(words for _, words in broken)
        elif not gap <= tolerance:
            beyond = self._beyond_chance(whole, means, variances, counts, off, ratio)
            cause, advice = self._cause(
                noise, stale, apart, beyond, running, tracked, len(parts), float(counts.mean()), off, ratio
            )
        worst = int(np.argmax(by_channel)) if weight.size else 0
        return LayerGap(
            name=self.name,
            gap=gap,
            noise=_relative(noise, size),
            stale=_relative(stale, size),
            worst_channel=worst,
            worst_gap=_relative(float(by_channel[worst]), size) if weight.size else 0.0,
            mean_off=float(np.sqrt(np.mean(off**2))) if weight.size else 0.0,
            worst_mean_off=float(off.max(initial=0.0)),
            deviation_ratio=float(np.exp(np.mean(np.log(np.maximum(ratio, 1e-300))))) if weight.size else 1.0,
            values=float(counts.mean()),
            cause=cause,
            advice=advice or "nothing: the modes agree",
        )

    def _beyond_chance(
        self,
        whole: tuple[_Float64, _Float64],
        means: _Float64,
        variances: _Float64,
        counts: _Array,
        off: _Float64,
        ratio: _Float64,
    ) -> Callable[[float], tuple[bool, bool]]:
        """Whether means, and deviations, are farther off than chance explains: see the notes of `train_eval_gap`.

        That is of the share of the noise of a batch that the running statistics keep.
        """
        bound = np.sqrt(2.0 * np.log(2.0 * max(off.size, 1) / _FALSE_ALARMS))
        rest, free, unit, varies = len(counts) - 1, counts - 1, whole[1] + self.layer.eps, whole[1] > 0
        # The variance of the cube root of a variance over its expectation, for one degree of freedom (Wilson & Hilferty
        # 1931, and Paulson of two of them).
        cubic = 2.0 / 9.0
        roots = np.cbrt((variances * (counts / free)[:, None] + self.layer.eps) / unit)
        of_means = counts @ (means - whole[0]) ** 2 / unit / rest
        of_roots = free @ (roots - free @ roots / free.sum()) ** 2 / cubic / rest
        # The same by pieces of batches, of which there are more. One may be a sample whose values are all alike, so its
        # variance is taken about the mean of all.
        finer_means, finer_vars, pieces = of_means, of_roots, rest
        if len(self.pieces) > len(counts):
            pieces = len(self.pieces) - 1
            sizes, centers = np.array([p.count for p in self.pieces]), np.stack([p.mean for p in self.pieces])
            vars_ = np.stack([p.var() for p in self.pieces]) + (centers - whole[0]) ** 2 + self.layer.eps
            finer_means = sizes @ (centers - sizes @ centers / sizes.sum()) ** 2 / unit / pieces
            finer_vars = sizes @ ((vars_ - sizes @ vars_ / sizes.sum()) / unit) ** 2 / 2.0 / pieces
        # By how much Student's distribution is wider there (Wallace 1959).
        wide = (bound * (8 * pieces + 3) / (8 * pieces + 1)) ** 2 / pieces
        allowance, most = pieces * np.expm1(wide) / bound**2, max(self.together, default=1)

        def known(found: _Float64, least: float) -> _Float64:
            return np.fmax(found, max(least, float(found[varies].mean()) if varies.any() else least))

        def effect(found: _Float64, finer: _Float64, least: float) -> _Float64:
            fine = known(finer, least)
            larger: _Float64 = np.maximum(fine, np.minimum(fine * allowance, least * most))
            return np.maximum(larger, known(found, least))

        def beyond(kept: float) -> tuple[bool, bool]:
            # A deviation from few values may be far too small by chance: in the larger of the two.
            z = off / np.maximum(ratio, 1.0)
            z = z / np.sqrt(effect(of_means, finer_means, 1.0) * (1.0 / counts.sum() + kept / counts.mean()))
            a, b = cubic / (counts.sum() - 1), cubic * kept / free.mean()
            r = ratio ** (-2.0 / 3.0)
            z_root = np.abs(r * (1.0 - b) - (1.0 - a)) / np.sqrt(effect(of_roots, finer_vars, _TAILS) * (a + r * r * b))
            return not (z <= bound).all(), not (z_root <= bound).all()

        return beyond

    def _cause(
        self,
        noise: float,
        stale: float,
        apart: Callable[[_Float64, _Float64], float],
        beyond: Callable[[float], tuple[bool, bool]],
        running: tuple[_Float64, _Float64],
        tracked: int,
        batches: int,
        values: float,
        off: _Float64,
        ratio: _Float64,
    ) -> tuple[str, str]:
        momentum = self.layer.momentum
        # The share of the noise of a batch that its average with those before it keeps.
        kept = 0.0 if not tracked else 1.0 / tracked if momentum is None else momentum / (2.0 - momentum)
        of_noise = noise / _CLEARLY < stale <= _CLEARLY * (kept + 1.0 / batches) * noise
        if of_noise and kept > 1.0 / _CLEARLY and any(beyond(0.0)):
            if momentum is None:
                return "too few batches", f"an average of {tracked} is as noisy as a batch: calibrate, or train longer"
            return "momentum", (
                f"momentum {momentum} lets the last batches rule the running statistics: lower it, or calibrate"
            )
        if noise >= stale:
            return "small batch", (
                f"a batch of {values:.4g} values per channel is too small to tell what the data are; the running "
                "statistics are no worse than that. Train on larger batches"
            )
        means_off, deviations_off = beyond(kept)
        if not (means_off or deviations_off):
            return "small batch", (
                f"{batches} batches of {values:.4g} values per channel are too few to tell the running statistics from "
                "those of the data. Compare on more batches, or train on larger ones"
            )
        initial = (1.0 - (momentum or 0.0)) ** tracked
        if initial < 1.0:
            undone = running[0] / (1.0 - initial), np.maximum(running[1] - initial, 0.0) / (1.0 - initial)
            explained = apart(*undone) < stale / _CLEARLY
        else:
            explained = bool((running[0] == 0).all() and (running[1] == 1).all())
        if explained:
            return "too few batches", (
                f"the initial statistics still weigh {initial:.0%} after {tracked} batches with momentum {momentum}: "
                f"calibrate, train longer{'' if momentum is None else ', or raise momentum'}"
            )
        found = [f"channel means are up to {off.max(initial=0.0):.3g} standard deviations away"] * means_off
        if deviations_off:
            farthest = ratio[np.argmax(np.abs(np.log(ratio)))]
            found.append(f"a running standard deviation is {farthest:.3g} times theirs")
        return "drift", (
            f"the running statistics are not of these data: {' and '.join(found)}. "
            "Calibrate on training data if the weights have moved; else look at the data"
        )


def _wide(parameter: _Array | None, default: float, channels: int) -> _Float64:
    return np.full(channels, default) if parameter is None else parameter.astype(np.float64)


def _in_range(weight: _Float64, bias: _Float64) -> tuple[_Float64, _Float64]:
    """The same in units of a power of two, so that no square of them overflows: all that is told is relative."""
    _, exponent = np.frexp(max(np.abs(weight).max(initial=0.0), np.abs(bias).max(initial=0.0)))
    return np.ldexp(weight, -exponent), np.ldexp(bias, -exponent)


def _scale(weight: _Float64, var: _Float64, eps: float) -> _Float64:
    """The slope of a normalization, NaN as in eval mode; of a constant channel, 0, as in training."""
    scale: _Float64 = np.where(var + eps == 0, 0.0, weight / np.sqrt(var + eps))
    return scale


def _total(values: Any) -> _Float64:
    array: _Float64 = np.asarray(values, np.float64)
    return array


def _relative(square: float, size: float) -> float:
    return float(np.sqrt(square / size)) if size else (0.0 if not square else float("inf"))


def _short(value: float) -> str:
    return f"{value:.3g}"
