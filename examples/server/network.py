"""network.py -- a densely connected stack of pre-activation blocks, in NumPy, where batch norm cannot be folded away.

Every block normalizes everything before it, rectifies, convolves, and appends a few channels (DenseNet). The batch norm
stands before the rectifier and behind a concatenation, so no convolution could take it in: the kind of layer that an
inference server has to compute.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

import fastbn

Array = NDArray[np.float32]
Norm = Callable[[Array], Array]

SIZE, CHANNELS, GROWTH, BLOCKS, POOL, CLASSES = 16, 32, 12, 8, 4, 10
WIDTHS = [CHANNELS + GROWTH * block for block in range(BLOCKS + 1)]
FEATURES = WIDTHS[-1] * POOL * POOL
EPS = 1e-5


def fastbn_norm(state: Mapping[str, Array], prefix: str) -> Norm:
    """Batch norm and rectifier of one layer, by fastbn."""
    return fastbn.FrozenBatchNorm.from_state_dict(state, prefix, eps=EPS, activation="relu")


def numpy_norm(state: Mapping[str, Array], prefix: str) -> Norm:
    """The same as the usual NumPy expression."""
    weight, bias, mean, var = (
        state[prefix + name][:, None, None] for name in ("weight", "bias", "running_mean", "running_var")
    )
    scale = (weight / np.sqrt(var + EPS)).astype(np.float32)

    return lambda x: np.maximum((x - mean) * scale + bias, 0)


NORMS = {"fastbn": fastbn_norm, "numpy": numpy_norm}


def enlarge(digits: NDArray[np.uint8]) -> Array:
    """Make (N, 1, 16, 16) images of about unit range out of (N, 8, 8) digits with 17 levels of grey."""
    scale = SIZE // digits.shape[-1]
    return np.repeat(np.repeat(digits, scale, axis=1), scale, axis=2)[:, None].astype(np.float32) / np.float32(8) - 1


def convolve(x: Array, weight: Array, out: Array) -> None:
    """Convolve with 3 x 3 filters of shape (9, K, C), zeros around: one matrix product, then nine shifted sums."""
    c, h, w = x.shape[1:]
    k = weight.shape[1]
    padded = np.empty((k, h + 2, w + 2), np.float32)
    for image, result in zip(x, out, strict=True):
        products = (weight.reshape(9 * k, c) @ image.reshape(c, h * w)).reshape(3, 3, k, h, w)
        padded[:] = 0
        for row in range(3):
            for column in range(3):
                padded[:, 2 - row : 2 - row + h, 2 - column : 2 - column + w] += products[row, column]
        result[:] = padded[:, 1:-1, 1:-1]


def run(images: Array, state: Mapping[str, Array], norms: Sequence[Norm]) -> Array:
    """Run the stack with the filters of `state`; a pooled feature map comes out, shape (N, FEATURES)."""
    features = np.empty((len(images), WIDTHS[-1], SIZE, SIZE), np.float32)
    convolve(images, state["stem.weight"], features[:, :CHANNELS])
    for block, (width, norm) in enumerate(zip(WIDTHS, norms, strict=True)):
        x = norm(features[:, :width])
        if block < BLOCKS:
            convolve(x, state[f"blocks.{block}.weight"], features[:, width : width + GROWTH])
    return x.reshape(len(x), WIDTHS[-1], POOL, SIZE // POOL, POOL, SIZE // POOL).mean((3, 5)).reshape(len(x), FEATURES)


class Network:
    """The network with its parameters. No call changes anything in it, so threads may share it."""

    def __init__(self, state: Mapping[str, Array], norm: str = "fastbn") -> None:
        self.state = dict(state)
        self.norms = [NORMS[norm](self.state, f"norms.{layer}.") for layer in range(BLOCKS + 1)]

    def __call__(self, digits: NDArray[np.uint8]) -> Array:
        """Logits, shape (N, 10), of digits of shape (N, 8, 8)."""
        pooled = run(enlarge(digits), self.state, self.norms)
        return pooled @ self.state["readout.weight"] + self.state["readout.bias"]
