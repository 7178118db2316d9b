"""perceptron -- the layers of a multilayer perceptron in NumPy, with batch norm by fastbn."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

import fastbn


class Linear:
    """Rows times weights, plus a bias unless the batch norm after it has one."""

    def __init__(self, inputs: int, outputs: int, scale: float, rng: np.random.Generator, bias: bool = True):
        self.weight = rng.normal(0, scale, (inputs, outputs)).astype(np.float32)
        self.bias = np.zeros(outputs, np.float32) if bias else None

    def __call__(self, x: np.ndarray) -> np.ndarray:
        self.x = x
        y = x @ self.weight
        if self.bias is not None:
            y += self.bias
        return y

    def backward(self, dy: np.ndarray) -> np.ndarray:
        self.grad_weight = self.x.T @ dy
        if self.bias is not None:
            self.grad_bias = dy.sum(0)
        return dy @ self.weight.T


class Sigmoid:
    def __call__(self, x: np.ndarray) -> np.ndarray:
        # 1 / (1 + exp(-x)) without its overflow.
        self.y = np.tanh(x * np.float32(0.5))
        self.y += 1
        self.y *= np.float32(0.5)
        return self.y

    def backward(self, dy: np.ndarray) -> np.ndarray:
        return dy * (self.y - self.y * self.y)


class Relu:
    def __call__(self, x: np.ndarray) -> np.ndarray:
        self.y = np.maximum(x, 0)
        return self.y

    def backward(self, dy: np.ndarray) -> np.ndarray:
        return dy * (self.y > 0)


class Dropout:
    """Drops each activation with probability `rate` while training, and scales the others up."""

    def __init__(self, rate: float, rng: np.random.Generator):
        self.rate, self.rng, self.training = rate, rng, True

    def train(self, mode: bool = True) -> None:
        self.training = mode

    def __call__(self, x: np.ndarray) -> np.ndarray:
        self.keep = None
        if not self.training:
            return x
        self.keep = (self.rng.random(x.shape, np.float32) >= self.rate) * np.float32(1 / (1 - self.rate))
        return x * self.keep

    def backward(self, dy: np.ndarray) -> np.ndarray:
        return dy if self.keep is None else dy * self.keep


class Network:
    """Layers in a row, and what a trainer needs of a network: forward, backward, parameters and their gradients."""

    def __init__(self, layers: Sequence[Any]):
        self.layers = list(layers)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        for layer in self.layers:
            x = layer(x)
        return x

    def trace(self, x: np.ndarray) -> list[np.ndarray]:
        """The output of every layer."""
        return [x := layer(x) for layer in self.layers]

    def with_norms(self, change: Callable[[fastbn.BatchNorm], Any]) -> "Network":
        """The same layers, but for the batch norms, which `change` replaces."""
        return Network([change(layer) if isinstance(layer, fastbn.BatchNorm) else layer for layer in self.layers])

    def backward(self, dy: np.ndarray) -> np.ndarray:
        for layer in reversed(self.layers):
            dy = layer.backward(dy)
        return dy

    def train(self, mode: bool = True) -> None:
        for layer in self.layers:
            if hasattr(layer, "train"):
                layer.train(mode)

    def parameters(self) -> list[np.ndarray]:
        return self._each("")

    def gradients(self) -> list[np.ndarray]:
        """In the order of the parameters, after a backward."""
        return self._each("grad_")

    def _each(self, prefix: str) -> list[np.ndarray]:
        learning = [layer for layer in self.layers if hasattr(layer, "weight")]
        names = [(layer, name) for layer in learning for name in ("weight", "bias") if getattr(layer, name) is not None]
        return [getattr(layer, prefix + name) for layer, name in names]


NONLINEARITIES = {"sigmoid": Sigmoid, "relu": Relu}


def perceptron(
    inputs: int,
    rng: np.random.Generator,
    *,
    norm: bool,
    biases: bool = False,
    hidden: Sequence[int] = (100, 100, 100),
    outputs: int = 10,
    scale: float = 0.1,
    nonlinearity: str = "sigmoid",
    dropout: float = 0.0,
) -> Network:
    """The network of the paper's section 4.1: each hidden layer is linear, then batch norm if asked, then nonlinear.

    A batch norm takes away the bias before it, so there is none, unless `biases` asks for one.
    """
    layers: list[Any] = []
    sizes = [inputs, *hidden]
    for before, after in pairwise(sizes):
        layers.append(Linear(before, after, scale, rng, bias=biases or not norm))
        if norm:
            layers.append(fastbn.BatchNorm(after))
        layers.append(NONLINEARITIES[nonlinearity]())
        if dropout:
            layers.append(Dropout(dropout, rng))
    layers.append(Linear(sizes[-1], outputs, scale, rng))
    return Network(layers)
