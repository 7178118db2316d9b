"""gradients -- study 5: gradients in the middle of a deep network at initialization, with and without batch norm."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from paper.convolution import convolutions, resnet, torch
from paper.data import Dataset
from paper.study import GREY, NORM, PLAIN, Claim, Settings, band, progress, ratios
from paper.training import cross_entropy

WITHOUT = ("steps", "paper")
TITLE = "Batch norm keeps the gradients of a deep network together; without it they have heavy tails"
DEPTH, LAYER, BATCH, SHORT_BATCH = 110, 55, 128, 32
KINDS = {"plain": (False, PLAIN, "without batch norm"), "norm": (True, NORM, "with batch norm")}
REACH = np.linspace(0, 10, 101)
BINS = 80


def measure(images: Dataset, seed: int, norm: bool, batch: int) -> np.ndarray:
    """The gradient of the loss on one batch, by the weights of the layer in the middle, before any training."""
    rng = np.random.default_rng(seed)
    network = resnet(DEPTH, images.shape, rng, norm=norm)
    chosen = rng.permutation(len(images.x_train))[:batch]
    _, gradient = cross_entropy(network(images.x_train[chosen]), images.y_train[chosen])
    network.backward(gradient)
    return convolutions(network)[LAYER - 1].weight.grad.numpy().ravel().astype(np.float64)


def describe(gradients: np.ndarray) -> dict[str, Any]:
    """What the study keeps: moments, quantiles, the histogram, and how much lies beyond each number of deviations."""
    deviation = float(gradients.std())
    standard = np.abs(gradients - gradients.mean()) / deviation
    counts, edges = np.histogram(gradients, BINS)
    return {
        "deviation": deviation,
        "kurtosis": float(np.mean(standard**4)),
        "quantile": float(np.quantile(standard, 0.999)),
        "largest": float(np.abs(gradients).max()),
        "beyond": [float(np.mean(standard > reach)) for reach in REACH],
        "counts": counts.tolist(),
        "edges": edges.tolist(),
    }


def run(settings: Settings) -> dict[str, Any]:
    torch.set_num_threads(1)
    images = settings.images(train=BATCH)
    numbers: dict[str, Any] = settings.header(images, 0)
    numbers["note"] = f"Left, middle: seed {settings.seeds[0]}. Right: {settings.spread}."
    with progress(2 * len(settings.seeds), "gradients") as tick:
        for kind, (norm, _, _) in KINDS.items():
            numbers[kind] = []
            for seed in settings.seeds:
                gradients = measure(images, seed, norm, SHORT_BATCH if settings.short else BATCH)
                numbers[kind].append(describe(gradients))
                tick()
    return numbers


def claims(numbers: dict[str, Any]) -> list[Claim]:
    def times(name: str) -> list[float]:
        return ratios(*([one[name] for one in numbers[kind]] for kind in KINDS))

    return [
        Claim("Without batch norm the gradients have heavier tails.", "times the kurtosis", times("kurtosis"), 1),
        Claim(
            "Counted in deviations, the rarest thousandth lies further out without batch norm.",
            "times as far",
            times("quantile"),
            1,
        ),
        Claim("The gradients are larger without batch norm.", "times the deviation", times("deviation"), 1),
    ]


def table(numbers: dict[str, Any]) -> tuple[list[str], list[list[Any]]]:
    columns = ("deviation", "largest", "kurtosis", "quantile")
    rows = [
        [label, *(float(np.median([one[name] for one in numbers[kind]])) for name in columns)]
        for kind, (_, _, label) in KINDS.items()
    ]
    heads = ["standard deviation", "largest", "kurtosis (normal: 3)", "99.9 % within ... deviations (normal: 3.29)"]
    return [f"gradients of layer {LAYER}", *heads], rows


def draw(figure: Figure, numbers: dict[str, Any]) -> None:
    figure.set_size_inches(10.5, 3.9)
    *sides, right = figure.subplots(1, 3, width_ratios=(1, 1, 1.15))
    sides[1].sharey(sides[0])
    for axes, (kind, (_, color, label)) in zip(sides, KINDS.items(), strict=True):
        one = numbers[kind][0]
        axes.stairs(one["counts"], one["edges"], fill=True, color=color)
        reach = 1.05 * max(abs(one["edges"][0]), abs(one["edges"][-1]))
        axes.set(title=label.capitalize(), xlabel="gradient of a weight", xlim=(-reach, reach), yscale="log", ylim=0.7)
        axes.locator_params(axis="x", nbins=5)
        axes.text(0.97, 0.95, f"kurtosis {one['kurtosis']:.1f}", transform=axes.transAxes, ha="right", va="top")
    sides[0].set_ylabel(f"weights of layer {LAYER} of {DEPTH}")
    for kind, (_, color, label) in KINDS.items():
        runs = np.array([one["beyond"] for one in numbers[kind]])
        band(right, REACH, np.where(runs > 0, runs, np.nan), color, label, linestyle="-" if kind == "norm" else "--")
    # The normal distribution, from its own integral.
    grid = np.linspace(0, 14, 14001)
    tail = 2 * np.cumsum(np.exp(-(grid[::-1] ** 2) / 2))[::-1] / np.sqrt(2 * np.pi) * (grid[1] - grid[0])
    right.plot(grid, tail, color=GREY, linewidth=1, linestyle=":", label="a normal distribution")
    right.set(
        title="Share that lies further out",
        xlabel="distance from the mean, in standard deviations",
        ylabel="share of the weights",
        yscale="log",
        xlim=(0, REACH[-1]),
        ylim=(5e-5, 1.5),
    )
    right.legend(loc="upper right")
