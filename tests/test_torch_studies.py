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

from paper import convolution, gradients  # noqa: E402


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
