"""training -- one trainer for every study, whether its network is NumPy's or PyTorch's."""

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
from paper.data import Dataset


class Trainable(Protocol):
    """What the trainer asks of a network; gradients come in the order of the parameters."""

    def __call__(self, x: np.ndarray) -> np.ndarray: ...
    def backward(self, dy: np.ndarray) -> Any: ...
    def train(self, mode: bool = True) -> Any: ...
    def parameters(self) -> list[np.ndarray]: ...
    def gradients(self) -> list[np.ndarray]: ...


def cross_entropy(logits: np.ndarray, labels: np.ndarray) -> tuple[float, np.ndarray]:
    """The mean of -log softmax at the labels, and its gradient."""
    shifted = logits - logits.max(1, keepdims=True)
    probabilities = np.exp(shifted)
    total = probabilities.sum(1, keepdims=True)
    rows = np.arange(len(labels))
    loss = float(np.mean(np.log(total[:, 0]) - shifted[rows, labels]))
    probabilities /= total
    probabilities[rows, labels] -= 1
    probabilities /= len(labels)
    return loss, probabilities


def squared_error(outputs: np.ndarray, targets: np.ndarray) -> tuple[float, np.ndarray]:
    """Half the mean square of what the outputs are off by, and its gradient."""
    off = outputs - targets
    return float(np.mean(off * off) / 2), off / off.size


def batches(
    data: Dataset, size: int, rng: np.random.Generator, reshuffle: bool = True
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Training batches without end; every epoch is a new permutation, and drops the rest that fills no batch.

    Without `reshuffle` every epoch repeats the first, batch by batch.
    """
    size = min(size, len(data.x_train))
    order = rng.permutation(len(data.x_train))
    while True:
        for start in range(0, len(order) - size + 1, size):
            chosen = order[start : start + size]
            yield data.x_train[chosen], data.y_train[chosen]
        if reshuffle:
            order = rng.permutation(len(data.x_train))


def predict(network: Trainable, x: np.ndarray, size: int = 1000) -> np.ndarray:
    """The logits in inference mode."""
    network.train(False)
    logits = np.concatenate([network(x[start : start + size]) for start in range(0, len(x), size)])
    network.train(True)
    return logits


def accuracy(network: Trainable, x: np.ndarray, labels: np.ndarray) -> float:
    return float(np.mean(predict(network, x).argmax(1) == labels))


def evaluation_steps(steps: int, count: int = 50) -> list[int]:
    """Up to `count` steps at which to look at a network, the first and the last among them."""
    return sorted({int(step) for step in np.linspace(0, steps, count + 1)})


def train(
    network: Trainable,
    data: Dataset,
    rng: np.random.Generator,
    *,
    steps: int,
    rate: float,
    batch: int = 60,
    momentum: float = 0.0,
    l2: float = 0.0,
    decay: float = 1.0,
    decay_every: int = 0,
    reshuffle: bool = True,
    loss: Callable[[np.ndarray, np.ndarray], tuple[float, np.ndarray]] = cross_entropy,
    look: Callable[[int], Any] | None = None,
    look_at: list[int] | None = None,
    tick: Callable[[], Any] = lambda: None,
) -> list[Any]:
    """Train by SGD with momentum, L2 on the weight matrices and a rate multiplied by `decay` every `decay_every` steps.

    With `reshuffle` every epoch has other batches (the paper shuffles "more thoroughly"); without, the first return.

    `look(step)` is called before the steps of `look_at`; the list of its answers comes back. A network whose loss
    is no longer finite is beyond recovery: it is not trained on, only looked at.
    """
    parameters = network.parameters()
    velocities = [np.zeros_like(p) for p in parameters]
    answers = []
    supply = batches(data, batch, rng, reshuffle)
    alive = True
    # An unnormalized network may blow up, and that is the point of some studies.
    with np.errstate(over="ignore", invalid="ignore"):
        for step in range(steps + 1):
            if look is not None and step in (look_at or ()):
                answers.append(look(step))
            if step == steps:
                break
            tick()
            if not alive:
                continue
            x, labels = next(supply)
            value, gradient = loss(network(x), labels)
            alive = np.isfinite(value)
            network.backward(gradient)
            now = rate * (decay ** (step // decay_every) if decay_every else 1.0)
            for p, g, v in zip(parameters, network.gradients(), velocities, strict=True):
                if l2 and p.ndim > 1:
                    g = g + l2 * p
                v *= momentum
                v -= now * g
                p += v
    return answers
