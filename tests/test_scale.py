"""test_scale -- tensors of more elements than 31 bits count, and of 10 GB: `pytest tests/test_scale.py --huge`.

A tensor is a block of random images over and over, each time with a sign of its own. So the exact statistics follow
from those of the block, and one block that is read or written in the place of another is seen: equal blocks must come
out as equal bytes, and the first of them is compared with float64. Seeded bug that turns it red: an offset of `fbn_at`
in pass.c that goes through an int.
"""

import os

import numpy as np
import pytest
import twin
from tolerance import assert_close

import fastbn

# Of 2 bytes each: for every day; a little more than 2**31 and 4 GB; 10 GB.
ELEMENTS = [
    pytest.param(1 << 20, id="small"),
    pytest.param((1 << 31) + (1 << 20), id="31bits", marks=pytest.mark.huge),
    pytest.param(5 << 30, id="10GB", marks=pytest.mark.huge),
]
BLOCK = 1 << 16
# An image's channels and elements, the shape of so many images, and the axis of the channels.
LAYOUTS = {
    "NCHW": (64, 196, lambda images: (images, 64, 14, 14), 1),
    "NHWC": (96, 1, lambda images: (images, 96), -1),
    "one-channel": (1, 1000, lambda images: (1, 1, images * 1000), 1),
}


class Repeated:
    """A tensor of bfloat16 that repeats a block with changing signs."""

    def __init__(self, rng, elements, channels, inner, mean):
        self.dtype = np.dtype(pytest.importorskip("ml_dtypes").bfloat16)
        self.images, images = BLOCK // (channels * inner), elements // (channels * inner) + 1
        shift = mean + rng.standard_normal((channels, 1))
        block = (rng.standard_normal((self.images, channels, inner)) + shift).astype(self.dtype)
        self.blocks = [block, -block]
        self.wide = block.astype(np.float64)
        self.signs = rng.integers(0, 2, -(-images // self.images))
        self.memory = np.empty((images, channels, inner), self.dtype)
        self.fill()

    def fill(self):
        for part, sign in zip(self.parts(), self.signs, strict=True):
            part[...] = self.blocks[sign][: len(part)]

    def parts(self):
        """All repetitions; the last is cut off."""
        return (self.memory[i : i + self.images] for i in range(0, len(self.memory), self.images))

    def sum(self, block, signs):
        """Over images and elements, of what is ``block`` in every repetition, with these signs."""
        *factors, last = 1.0 - 2 * signs
        rest = len(self.memory) - len(factors) * self.images
        return sum(factors) * block.sum((0, 2)) + last * block[:rest].sum((0, 2))


def _check(tensor, labels, expect):
    """Equal labels, equal bytes, and the first of each as expected."""
    first = {}
    for part, label in zip(tensor.parts(), labels, strict=True):
        if label not in first:
            first[label] = part
            assert_close(part, *expect(label))
        assert np.array_equal(part.view(np.uint16), first[label][: len(part)].view(np.uint16))


def _tensors(rng, elements, layout, *means):
    channels, inner, shape, axis = LAYOUTS[layout]
    if elements > BLOCK * 16 and hasattr(os, "sysconf"):
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if 2 * elements * len(means) > 0.95 * free:
            pytest.skip(f"needs {2e-9 * elements * len(means):.0f} GB, {free * 1e-9:.0f} are free")
    made = [Repeated(rng, elements, channels, inner, mean) for mean in means]
    return *made, *(t.memory.reshape(shape(len(t.memory))) for t in made), axis


def _statistics(t):
    count = t.memory.size // t.memory.shape[1]
    mean = t.sum(t.wide, t.signs) / count
    return count, mean, t.sum(np.square(t.wide), 0 * t.signs) / count - mean**2


@pytest.mark.parametrize("elements", ELEMENTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_forward(layout, elements, rng):
    """In place, so that one tensor is enough."""
    t, x, axis = _tensors(rng, elements, layout, 0.5)
    _, mean, var = _statistics(t)
    weight, bias = (rng.standard_normal(t.memory.shape[1]).astype(np.float32) for _ in range(2))

    def expect(sign):
        y = twin.normalize(t.blocks[sign], mean, var, weight, bias)
        scale = np.abs(y - bias[:, None]) + np.abs(bias[:, None])
        return y, scale

    assert fastbn.batch_norm_forward(x, weight, bias, channel_axis=axis, out=x)[0] is x
    _check(t, t.signs, expect)


@pytest.mark.parametrize("elements", ELEMENTS[:2])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_backward(layout, elements, rng):
    """The gradient in place of that of the output."""
    t, dt, x, dy, axis = _tensors(rng, elements, layout, 0.5, 0.1)
    count, mean, var = _statistics(t)
    weight = rng.standard_normal(t.memory.shape[1]).astype(np.float32)
    sum_dy = t.sum(dt.wide, dt.signs)
    sum_dy_xmu = t.sum(t.wide * dt.wide, t.signs ^ dt.signs) - mean * sum_dy

    def expect(label):
        sign, gradient_sign = label
        terms = dt.blocks[gradient_sign], t.blocks[sign], mean, var, weight, sum_dy, sum_dy_xmu, count
        inverse = 1 / np.sqrt(var + 1e-5)
        centred = np.abs(t.blocks[sign].astype(np.float64) - mean[:, None])
        slope = centred * (np.abs(sum_dy_xmu) * inverse**2 / count)[:, None]
        scale = np.abs(weight * inverse)[:, None] * (np.abs(dt.wide) + np.abs(sum_dy / count)[:, None] + slope)
        return twin.backward_apply(*terms), scale

    _, saved = fastbn.batch_norm_forward(x, weight, channel_axis=axis, out=dy)  # y is in nobody's way
    dt.fill()
    dx, *parameters = fastbn.batch_norm_backward(dy, x, saved, weight, out=dy)
    assert dx is dy
    for found, sums in zip(parameters, (sum_dy_xmu / np.sqrt(var + 1e-5), sum_dy), strict=True):
        np.testing.assert_allclose(found, sums, atol=1e-7 * count)
    _check(dt, zip(t.signs, dt.signs, strict=True), expect)
