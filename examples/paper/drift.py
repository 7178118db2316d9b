"""drift -- study 8: a gradient that ignores that the mean depends on a bias lets the bias grow without bound."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from paper.perceptron import Linear, Network, perceptron
from paper.study import FIFTH, GREY, NORM, PLAIN, Claim, Settings, band, progress, ratios
from paper.training import accuracy, cross_entropy, evaluation_steps, train

import fastbn

TITLE = "With the mean taken for a constant in the gradient, biases grow for ever, and a network learns worse"
STEPS, PAPER_STEPS, SHORT_STEPS = 2000, 50_000, 150
RATE, BATCH = 0.5, 60


class Partial:
    """Batch norm whose backward may take the batch's mean, or its mean and variance, for constants."""

    def __init__(self, norm: fastbn.BatchNorm, mean: bool, var: bool):
        self.norm, self.weight, self.bias = norm, norm.weight, norm.bias
        self.mean, self.var = mean, var

    def train(self, mode: bool = True) -> None:
        self.norm.train(mode)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        self.x = x
        return self.norm(x)

    def backward(self, dy: np.ndarray) -> np.ndarray:
        found, eps = fastbn.moments(self.x), self.norm.eps
        sum_dy, sum_dy_xmu = fastbn.backward_reduce(dy, self.x, found.mean)
        self.grad_bias = sum_dy.astype(np.float32)
        self.grad_weight = (sum_dy_xmu / np.sqrt(found.var() + eps)).astype(np.float32)
        # These two sums are all that the batch's statistics contribute to the gradient.
        sums = sum_dy * self.mean, sum_dy_xmu * self.var
        return fastbn.backward_apply(dy, self.x, found.mean, found.var(), self.weight, *sums, found.count, eps)


class BiasesAlone(Network):
    """The same layers, of which only the biases before a batch norm learn."""

    def _each(self, prefix: str) -> list[np.ndarray]:
        return [getattr(layer, prefix + "bias") for layer in hidden(self)]


def hidden(network: Network) -> list[Linear]:
    return [layer for layer in network.layers if isinstance(layer, Linear)][:-1]


# The backward of each kind: whether it follows the mean, and the variance.
KINDS: dict[str, tuple[bool, bool, str, str, str]] = {
    "mean": (False, True, PLAIN, "--", "mean taken for a constant"),
    "both": (False, False, FIFTH, "-.", "mean and variance taken for constants"),
    "full": (True, True, NORM, "-", "full gradient"),
}
PARTS = {"alone": BiasesAlone, "all": Network}


def run(settings: Settings) -> dict[str, Any]:
    images, steps = settings.images(train=BATCH).flat(), settings.count(STEPS, PAPER_STEPS, SHORT_STEPS)
    at = evaluation_steps(steps)
    numbers: dict[str, Any] = settings.header(images, steps) | {"at": at}
    # The loss is looked at on one fixed batch, large enough to be steady.
    batch = images.x_train[:1000], images.y_train[:1000]
    with progress(len(PARTS) * len(KINDS) * len(settings.seeds) * steps, "drift") as tick:
        for part, form in PARTS.items():
            numbers[part] = {}
            for kind, (mean, var, _, _, _) in KINDS.items():
                found = numbers[part][kind] = {"bias": [], "loss": [], "accuracy": []}
                for seed in settings.seeds:
                    rng = np.random.default_rng(seed)
                    plain = perceptron(images.x_train.shape[1], rng, norm=True, biases=True)
                    norms = plain.with_norms(lambda norm, mean=mean, var=var: Partial(norm, mean, var))
                    network = form(norms.layers)

                    def look(_: int, network: Network = network) -> tuple[float, float, float]:
                        biases = np.concatenate([layer.bias for layer in hidden(network)])
                        inference = accuracy(network, images.x_test, images.y_test)
                        loss = cross_entropy(network(batch[0]), batch[1])[0]
                        return float(np.sqrt(np.mean(biases.astype(float) ** 2))), loss, inference

                    looks = train(
                        network, images, rng, steps=steps, rate=RATE, batch=BATCH, look=look, look_at=at, tick=tick
                    )
                    for key, curve in zip(found, zip(*looks, strict=True), strict=True):
                        found[key].append(curve)
    return numbers


def claims(numbers: dict[str, Any]) -> list[Claim]:
    bias = {(part, kind): np.asarray(numbers[part][kind]["bias"]) for part in PARTS for kind in KINDS}
    middle = int(np.searchsorted(numbers["at"], numbers["at"][-1] / 2))
    # The speed of the second half beside that of the first, from the steps that were really looked at.
    first, last = numbers["at"][middle], numbers["at"][-1] - numbers["at"][middle]
    constant = bias["alone", "mean"]
    # A single step has no second half, so that its speed is not a number.
    pace = ratios((constant[:, -1] - constant[:, middle]) * first, constant[:, middle] * last)
    loss = {part: {kind: np.asarray(numbers[part][kind]["loss"]) for kind in KINDS} for part in PARTS}
    start = loss["alone"]["mean"][:, 0]
    stray = ratios(np.abs(loss["alone"]["mean"] - start[:, None]).max(1), start)
    return [
        Claim(
            "With the mean taken for a constant, the bias grows and does not slow down.",
            "its speed in the second half, in speeds of the first",
            pace,
            0.9,
        ),
        Claim("All that growth leaves the loss where it was.", "its largest relative change", stray, 1e-4, False),
        Claim(
            "With the full gradient the bias stays where it was.",
            "its growth, in growths of the other",
            ratios(bias["alone", "full"][:, -1], constant[:, -1]),
            1e-3,
            False,
        ),
        Claim(
            "So it is where the whole network learns.",
            "growth of the bias, in growths of the other",
            ratios(bias["all", "full"][:, -1], bias["all", "mean"][:, -1]),
            1e-3,
            False,
        ),
        Claim(
            "And the network learns better with the full gradient.",
            "times lower training loss",
            ratios(loss["all"]["mean"][:, -1], loss["all"]["full"][:, -1]),
            1,
        ),
    ]


def table(numbers: dict[str, Any]) -> tuple[list[str], list[list[Any]]]:
    rows = []
    for part, what in (("alone", "biases learn alone"), ("all", "all learns")):
        for kind, (_, _, _, _, label) in KINDS.items():
            found = {key: np.median(np.asarray(runs)[:, -1]) for key, runs in numbers[part][kind].items()}
            start = float(np.median(np.asarray(numbers[part][kind]["loss"])[:, 0]))
            rows.append(
                [f"{what}, {label}", float(found["bias"]), start, float(found["loss"]), float(found["accuracy"])]
            )
    return ["", "bias, rms", "training loss before", "after", "test accuracy"], rows


def draw(figure: Figure, numbers: dict[str, Any]) -> None:
    figure.set_size_inches(10.5, 7)
    panels = figure.subplots(2, 2, sharex=True)
    for row, part in zip(panels, PARTS, strict=True):
        for axes, key in zip(row, ("bias", "loss"), strict=True):
            for kind, (_, _, color, style, label) in KINDS.items():
                band(axes, numbers["at"], numbers[part][kind][key], color, label, linestyle=style)
    for row, what in zip(panels, ("Only the biases learn", "All of the network learns"), strict=True):
        row[0].set(title=f"{what}: biases", ylabel="bias before batch norm, rms")
        row[1].set(title=f"{what}: training loss", ylabel="cross-entropy (nats)")
    (grows, stays), (wanders, learns) = panels
    stays.set_ylim(0, 1.3 * stays.get_ylim()[1])
    strays = max(np.ptp(numbers["alone"][kind]["loss"], axis=1).max() for kind in KINDS)
    stays.text(
        0.5, 0.1, f"no curve changes by more than {strays:.0e}", transform=stays.transAxes, color=GREY, ha="center"
    )
    learns.set_yscale("log")
    for axes in (wanders, learns):
        axes.set_xlabel("training step")
    grows.legend()
