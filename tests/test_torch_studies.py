"""test_torch_studies -- the claims of the studies that need PyTorch can fail, and their networks are what they say.

That the claims hold is tests/test_studies.py's. Skipped without the extra `paper`.
"""

import sys
from pathlib import Path

import numpy as np
import pytest

for module in ("matplotlib", "sklearn", "tqdm", "torch"):
    pytest.importorskip(module)
sys.path.append(str(Path(__file__).resolve().parent.parent / "examples"))

from paper import cifar, convolution, gradients, inception  # noqa: E402
from paper.autograd import torch  # noqa: E402
from paper.study import Settings, perform  # noqa: E402


@pytest.fixture(autouse=True)
def one_thread():
    """As the studies run: convolutions of these sizes gain nothing from a second, and wait for it on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def verdicts(study, numbers):
    return [claim.holds for claim in study.claims(numbers)]


def test_claims_of_gradients_can_fail(rng):
    """Of heavy tails where the light ones should be."""
    heavy, light = (gradients.describe(g) for g in (3 * rng.standard_t(3, 9216), rng.standard_normal(9216)))
    assert verdicts(gradients, {"plain": [heavy, heavy], "norm": [light, light]}) == [True] * 3
    assert verdicts(gradients, {"plain": [light, heavy], "norm": [heavy, light]}) == [False] * 3


def test_what_is_counted_of_gradients(rng):
    normal = gradients.describe(rng.standard_normal(1_000_000) * 5 + 2)
    assert normal["deviation"] == pytest.approx(5, rel=0.01)
    assert normal["kurtosis"] == pytest.approx(3, rel=0.02)
    assert normal["quantile"] == pytest.approx(3.29, rel=0.02)
    assert normal["beyond"][20] == pytest.approx(0.0455, rel=0.05)
    assert sum(normal["counts"]) == 1_000_000


SUPPORT = {
    "plain": {"outputs": [[1, 9, 400]] * 2, "gradients": [[90, 70, 9]] * 2},
    "small": {"accuracy": [[0.9, 0.1, 0.1]] * 2},
    "norm": {"outputs": [[1, 2, 4]] * 2, "gradients": [[9, 1, 1]] * 2, "accuracy": [[0.9, 0.95, 0.1]] * 2},
}


@pytest.mark.parametrize(
    ("kind", "name", "values", "refuted"),
    [
        ("plain", "outputs", [[1, 9, 400], [10, 9, 400]], [0]),
        ("norm", "outputs", [[1, 2, 4], [1, 2, 50]], [0]),
        ("plain", "gradients", [[90, 70, 9], [900, 9, 9]], [1]),
        ("norm", "gradients", [[9, 1, 1], [9, 9, 1]], [1]),
        ("norm", "accuracy", [[0.9, 0.95, 0.1], [0.95, 0.1, 0.1]], [2]),
        ("small", "accuracy", [[0.9, 0.1, 0.1], [0.9, 0.1, 0.6]], [2]),
        ("small", "accuracy", [[0.9, 0.1, 0.1], [0.95, 0.1, 0.1]], [3]),
        # A network that trains at no rate of the grid may train below it.
        ("small", "accuracy", [[0.4, 0.1, 0.1], [0.4, 0.1, 0.1]], [2]),
        ("norm", "accuracy", [[0.4, 0.1, 0.1], [0.4, 0.1, 0.1]], [2, 3]),
    ],
)
def test_claims_of_cifar_can_fail(kind, name, values, refuted):
    """One seed of two is enough."""
    numbers = SUPPORT | {"rates": [0.01, 0.1, 1.0]}
    assert verdicts(cifar, numbers) == [True] * 4
    numbers[kind] = numbers[kind] | {name: values}
    assert [place for place, holds in enumerate(verdicts(cifar, numbers)) if not holds] == refuted


def test_what_is_measured_before_training():
    """One value of each block, one of each convolution; a network of other weights has other outputs."""
    images = Settings().images()
    outputs, found = cifar.measure(images, 0, True, 1.0, 8)
    assert (len(outputs), len(found)) == (55, 109)
    scaled, _ = cifar.measure(images, 0, True, 4.0, 8)
    assert scaled == pytest.approx(outputs, rel=0.02)
    (one, *_), (four, *_) = (cifar.measure(images, 0, False, gain, 8)[0] for gain in (1.0, 4.0))
    assert four == pytest.approx(4 * one, rel=1e-5)


@pytest.mark.parametrize(("study", "least"), [(cifar, 128), (gradients, 128), (inception, 32)])
def test_too_few_images_are_refused_before_training(study, least, monkeypatch):
    few = Settings().images().split(least - 1)
    monkeypatch.setattr("paper.study.load", lambda path: few)
    with pytest.raises(ValueError, match=f"at least {least} images to train on are needed, found {least - 1}"):
        study.run(Settings(seeds=(0,)))


def test_cifar_is_drawn_where_nothing_trains(tmp_path):
    perform(cifar, Settings(steps=1, seeds=(0,), short=True), tmp_path)
    assert (tmp_path / "cifar.png").exists()


def test_the_deep_network_is_as_deep_as_it_says(rng):
    network = convolution.resnet(110, (1, 8, 8), rng, norm=True)
    assert len(convolution.convolutions(network)) == 109
    assert network.module[-1].weight.shape == (10, 64)
    with pytest.raises(ValueError, match="6n"):
        convolution.resnet(55, (1, 8, 8), rng, norm=True)


@pytest.mark.parametrize("norm", [True, False])
def test_a_network_descends_its_gradient(norm, rng):
    """The loss falls by what the gradient of every parameter promises: the wrapper pairs and shares them rightly."""
    network = convolution.inception((3, 28, 28), rng, norm=norm, gain=1.4)
    x, labels = rng.random((8, 3, 28, 28), np.float32), rng.integers(0, 10, 8)
    from paper.training import cross_entropy

    before, gradient = cross_entropy(network(x), labels)
    network.backward(gradient)
    found = network.gradients()
    promised = sum(float(np.sum(g.astype(np.float64) ** 2)) for g in found)
    step = 1e-3 * before / promised
    for p, g in zip(network.parameters(), found, strict=True):
        p -= np.float32(step) * g
    after, _ = cross_entropy(network(x), labels)
    assert (before - after) / (step * promised) == pytest.approx(1, rel=0.1)


LEARNED = {
    "plain": [0.1, 0.3, 0.5, 0.7],
    "plain_x5": [0.1, 0.1, 0.1, 0.1],
    "norm": [0.1, 0.5, 0.8, 0.9],
    "norm_x5": [0.1, 0.7, 0.92, 0.95],
    "norm_x30": [0.1, 0.4, 0.8, 0.9],
    "norm_sigmoid": [0.1, 0.2, 0.4, 0.8],
    "plain_sigmoid": [0.1, 0.1, 0.1, 0.1],
}


@pytest.mark.parametrize(
    ("name", "curve", "refuted"),
    [
        ("plain", [0.1, 0.7, 0.7, 0.7], [0, 2]),
        ("plain", [0.1, 0.1, 0.1, 0.1], [0, 2]),
        ("plain", [0.1, 0.95, 0.95, 0.95], [0, 2, 3]),
        ("plain_x5", [0.1, 0.3, 0.5, 0.8], [4]),
        ("norm", [0.1, 0.3, 0.5, 0.7], [0]),
        ("norm", [0.1, 0.8, 0.95, 0.8], [1]),
        ("norm_x5", [0.1, 0.1, 0.1, 0.1], [1]),
        ("norm_x30", [0.1, 0.3, 0.5, 0.71], [2]),
        ("norm_x30", [0.1, 0.8, 0.8, 0.69], [3]),
        ("norm_sigmoid", [0.1, 0.1, 0.1, 0.1], [5]),
        ("plain_sigmoid", [0.1, 0.2, 0.4, 0.8], [6]),
    ],
)
def test_claims_of_inception_can_fail(name, curve, refuted):
    """One seed of two is enough, and a baseline that never learns is no mark."""
    numbers = {"at": [0, 10, 20, 30]} | {kind: [one, one] for kind, one in LEARNED.items()}
    assert verdicts(inception, numbers) == [True] * 7
    numbers[name] = [LEARNED[name], curve]
    assert [place for place, holds in enumerate(verdicts(inception, numbers)) if not holds] == refuted


def test_inception_is_drawn_where_nothing_trains(tmp_path):
    perform(inception, Settings(steps=1, seeds=(0,), short=True), tmp_path)
    assert (tmp_path / "inception.png").exists()
