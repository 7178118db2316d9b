"""test_study_training -- the trainer of the studies: its batches, and its steps beside formulas written out."""

import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = str(Path(__file__).resolve().parent.parent / "examples")
if EXAMPLES not in sys.path:
    sys.path.append(EXAMPLES)

from paper.data import Dataset  # noqa: E402
from paper.perceptron import Dropout, perceptron  # noqa: E402
from paper.training import batches, cross_entropy, squared_error, train  # noqa: E402


@pytest.mark.parametrize("reshuffle", [True, False])
def test_epochs_are_reshuffled_if_asked(reshuffle, rng):
    """Each epoch is made of distinct images with their own labels; the second is the first again, or another."""
    images = np.arange(10, dtype=np.float32)[:, None]
    data = Dataset("ten", images, np.arange(10), images, np.arange(10))
    taken = list(islice(batches(data, 3, rng, reshuffle), 6))
    for x, labels in taken:
        assert np.array_equal(x[:, 0], labels)
    first, second = (np.concatenate([labels for _, labels in taken[i : i + 3]]) for i in (0, 3))
    assert len(set(first)) == len(set(second)) == 9
    assert np.array_equal(first, second) != reshuffle


class Quadratic:
    """Parameters whose gradients are themselves and twice themselves, as far as the trainer can see."""

    def __init__(self, fails_at=None):
        self.weight, self.bias = np.array([[4.0, -2.0]]), np.array([3.0])
        self.calls, self.fails_at = 0, fails_at

    def __call__(self, x):
        self.calls += 1
        return np.full((len(x), 1), np.nan if self.calls == self.fails_at else 1.0)

    def backward(self, dy):
        self.taken = [1.0 * self.weight, 2.0 * self.bias]

    def train(self, mode=True):
        pass

    def parameters(self):
        return [self.weight, self.bias]

    def gradients(self):
        return self.taken


ONE = Dataset("one", np.ones((4, 1)), np.ones((4, 1)), np.ones((4, 1)), np.ones((4, 1)))


def test_steps_are_those_of_the_formulas(rng):
    """Momentum, L2 on the matrix and not on the bias, a rate that halves every three steps. Red without any of them."""
    network, looks = Quadratic(), []
    answers = train(
        network, ONE, rng, steps=8, rate=0.1, batch=2, momentum=0.9, l2=0.5, decay=0.5, decay_every=3,
        loss=squared_error, look=lambda step: looks.append(network.weight.copy()) or step, look_at=[0, 2, 8],
    )  # fmt: skip
    weight, bias, v, u, seen = np.array([[4.0, -2.0]]), 3.0, np.zeros((1, 2)), 0.0, [np.array([[4.0, -2.0]])]
    for rate in (0.1, 0.1, 0.1, 0.05, 0.05, 0.05, 0.025, 0.025):
        v = 0.9 * v - rate * (1.0 + 0.5) * weight
        u = 0.9 * u - rate * 2.0 * bias
        weight, bias = weight + v, bias + u
        seen.append(weight)
    assert answers == [0, 2, 8]
    np.testing.assert_allclose(looks, [seen[0], seen[2], seen[8]], rtol=1e-13)
    np.testing.assert_allclose(network.bias, bias, rtol=1e-13)


def test_a_network_that_blew_up_is_looked_at_to_the_end(rng):
    """It takes the step that its loss no longer judges, and none after it."""
    network, ticks = Quadratic(fails_at=3), []
    answers = train(
        network, ONE, rng, steps=6, rate=0.1, batch=2, loss=squared_error, look=lambda step: network.calls,
        look_at=[0, 6], tick=lambda: ticks.append(1),
    )  # fmt: skip
    assert (answers, len(ticks)) == ([0, 3], 6)


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("nonlinearity", ["sigmoid", "relu"])
def test_a_perceptron_descends_its_gradient(norm, nonlinearity, rng):
    """The loss falls by what the gradient of every parameter promises, dropout included."""
    network = perceptron(12, rng, norm=norm, hidden=(9, 8), nonlinearity=nonlinearity, scale=0.5, dropout=0.3)
    x, labels = rng.random((40, 12), np.float32), rng.integers(0, 10, 40)
    drops = [layer for layer in network.layers if isinstance(layer, Dropout)]
    assert len(drops) == 2

    def loss():
        for layer in drops:
            layer.rng = np.random.default_rng(1)  # the same units each time
        return cross_entropy(network(x), labels)

    before, gradient = loss()
    network.backward(gradient)
    found = [g.astype(np.float64) for g in network.gradients()]
    promised = sum(float(np.sum(g * g)) for g in found)
    step = 2e-3 * before / promised
    for p, g in zip(network.parameters(), found, strict=True):
        p -= (step * g).astype(np.float32)
    after, _ = loss()
    assert (before - after) / (step * promised) == pytest.approx(1, rel=0.05)


def test_dropout_keeps_the_mean_and_rests_in_inference(rng):
    layer, x = Dropout(0.25, rng), np.ones((400, 100), np.float32)
    y = layer(x)
    assert set(np.unique(y)) == {0, np.float32(1 / 0.75)}
    assert np.mean(y == 0) == pytest.approx(0.25, abs=0.01)
    assert np.array_equal(layer.backward(x), y)
    layer.train(False)
    assert layer(x) is x
    assert layer.backward(x) is x
