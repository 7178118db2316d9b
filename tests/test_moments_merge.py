"""test_moments_merge.py -- Moments: parts merge into the whole, to twice the precision of float64."""

import copy
import functools
import operator
import pickle
from fractions import Fraction

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import fastbn


def exact(x):
    """Mean and m2 of every column as fractions."""
    columns = [[Fraction(float(value)) for value in column] for column in x.T]
    means = [sum(column) / len(column) for column in columns]
    return means, [sum((v - mean) ** 2 for v in column) for column, mean in zip(columns, means, strict=True)]


def split(x, cuts):
    return [fastbn.moments(part) for part in np.split(x, cuts)]


@pytest.mark.parametrize("offset", [0.0, 1e4, 1e8, 1e12])
@pytest.mark.parametrize("order", ["left", "right", "pairs"])
def test_merged_moments_are_those_of_the_whole(offset, order):
    """Means are right to a part of the deviation, however large they are.

    Seeded bugs: dropping mean_lo; `d * d * n_b / n` for m2; E[x**2] - E[x]**2.
    """
    rng = np.random.default_rng(5)
    x = rng.normal(size=(500, 3)) + offset * np.array([1.0, -1.0, 1 / 3])
    parts = split(x, np.sort(rng.integers(0, 500, size=40)))
    if order == "right":
        parts = parts[::-1]
    while order == "pairs" and len(parts) > 1:
        parts = [sum(parts[i : i + 2]) for i in range(0, len(parts), 2)]
    merged = functools.reduce(operator.add, parts)
    assert merged.count == 500
    for i, (mean, m2) in enumerate(zip(*exact(x), strict=True)):
        assert abs(float(Fraction(merged.mean[i]) + Fraction(merged.mean_lo[i]) - mean)) < 1e-14
        assert merged.mean[i] == float(mean) or not offset
        assert abs(merged.m2[i] - float(m2)) < 1e-13 * float(m2)


def test_parts_of_different_means():
    """Seeded bug: forgetting what lies between the parts."""
    x = np.random.default_rng(0).normal(size=(100, 2)) + np.repeat([[0.0, 1e6], [50.0, -1e6]], 50, axis=0)
    merged = sum(split(x, [50]))
    means, m2s = ([float(value) for value in values] for values in exact(x))
    assert (abs(merged.mean - means) < 1e-15 * x.std(0)).all()
    assert_allclose(merged.var(), np.divide(m2s, 100), rtol=1e-14)
    assert_allclose(merged.var(ddof=1), np.divide(m2s, 99), rtol=1e-14)


def test_an_empty_part_changes_nothing():
    """As a rank with an empty batch has. Seeded bug: dividing by a count of 0."""
    m, empty = fastbn.moments(np.arange(6.0).reshape(3, 2)), fastbn.moments(np.empty((0, 2)))
    assert m + empty is m
    assert empty + m is m
    both = empty + empty
    assert both.count == 0
    assert_array_equal(both.mean, [0.0, 0.0])


def test_weights_may_be_fractions():
    a, b = fastbn.Moments(1.5, [0.0], [0.0]), fastbn.Moments(0.5, [4.0], [0.0])
    assert (a + b).count == 2.0
    assert (a + b).mean[0] == 1.0
    assert (a + b).var()[0] == 3.0


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_what_is_not_finite_stays_in_its_channel(value):
    """Seeded bug: a NaN mean_lo beside a finite mean, or a warning."""
    x = np.random.default_rng(0).normal(size=(10, 3))
    y = x.copy()
    y[3, 1] = value
    merged, clean = sum(split(y, [5])), sum(split(x, [5]))
    assert not np.isfinite(merged.mean[1])
    assert not np.isfinite(merged.m2[1])
    for channel in (0, 2):
        assert merged.mean[channel] == clean.mean[channel]
        assert merged.m2[channel] == clean.m2[channel]
    assert np.isfinite(merged.mean_lo).all()


def test_moments_are_constant_copies():
    """Seeded bug: keeping the caller's arrays."""
    mean = np.array([1.0, 2.0])
    m = fastbn.Moments(3, mean, [0, 1])
    mean[0] = 9
    assert m.mean.tolist() == [1.0, 2.0]
    assert (m.m2.dtype, m.mean_lo.tolist()) == (np.float64, [0.0, 0.0])
    for change in (lambda: setattr(m, "count", 4), lambda: delattr(m, "count"), lambda: setattr(m, "more", 4)):
        with pytest.raises(AttributeError):
            change()
    for name in ("mean", "m2", "mean_lo"):
        with pytest.raises(ValueError, match="read-only"):
            getattr(m, name)[0] = 1
    assert repr(m) == "Moments(count=3, mean=array([1., 2.]), m2=array([0., 1.]))"


def test_what_is_computed_is_sealed():
    """Seeded bug: arrays that are left writeable as they come from the kernels, or from a sum."""
    x = np.random.default_rng(0).normal(size=(7, 3))
    for m in (fastbn.moments(x), fastbn.moments(x[:0]), fastbn.moments(x[:3]) + fastbn.moments(x[3:])):
        assert not any(getattr(m, name).flags.writeable for name in ("mean", "m2", "mean_lo"))


@pytest.mark.parametrize("duplicate", [lambda m: pickle.loads(pickle.dumps(m)), copy.copy, copy.deepcopy])
def test_moments_travel(duplicate):
    """Seeded bug: a pickle without mean_lo."""
    m = sum(split(np.random.default_rng(0).normal(size=(7, 3)) + 1e9, [3]))
    twin = duplicate(m)
    assert m.mean_lo.any()
    assert twin.count == m.count
    for name in ("mean", "m2", "mean_lo"):
        assert_array_equal(getattr(twin, name), getattr(m, name))
        assert not getattr(twin, name).flags.writeable


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((-1, [0.0], [0.0]), ValueError, "count must be finite and not negative, got -1"),
        ((float("nan"), [0.0], [0.0]), ValueError, "count must be finite"),
        (("3", [0.0], [0.0]), TypeError, "count must be a real number, got str"),
        ((3, 0.0, [0.0]), ValueError, r"mean must be a one-dimensional array, got shape \(\)"),
        ((3, [0.0], [0.0, 1.0]), ValueError, r"m2 must have shape \(1,\), got shape \(2,\)"),
        ((3, [0.0], [0.0], [0.0, 1.0]), ValueError, r"mean_lo must have shape \(1,\)"),
        ((3, ["a"], [0.0]), TypeError, "mean must be an array of real numbers, got list"),
        ((3, np.zeros(1, complex), [0.0]), TypeError, "mean must be an array of real numbers, got complex128"),
    ],
)
def test_arguments_are_checked(arguments, error, message):
    with pytest.raises(error, match=message):
        fastbn.Moments(*arguments)


def test_what_cannot_be_merged_or_divided():
    m = fastbn.Moments(1, [0.0], [0.0])
    with pytest.raises(ValueError, match="cannot merge moments of 1 channels with those of 2"):
        m + fastbn.Moments(1, [0.0, 0.0], [0.0, 0.0])
    for other in (1, None, [0.0]):
        with pytest.raises(TypeError):
            m + other
        with pytest.raises(TypeError):
            other + m
    with pytest.raises(ValueError, match=r"var\(ddof=1\) needs a count above 1, got 1"):
        m.var(ddof=1)
    with pytest.raises(ValueError, match="needs a count above 0, got 0"):
        fastbn.Moments(0, [0.0], [0.0]).var()
