"""test_study_training -- the trainer of the studies takes its batches in the order that was asked for."""

import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent / "examples"))

from paper.data import Dataset
from paper.training import batches


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
