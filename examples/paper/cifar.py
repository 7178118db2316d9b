"""cifar -- study 11: a deep convolutional network at initialization and at large rates (Bjorck et al., 2018)."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from paper.convolution import Residual, convolutions, resnet, torch
from paper.data import Dataset
from paper.study import GREY, NORM, PLAIN, THIRD, Claim, Settings, band, progress, ratios
from paper.training import accuracy, cross_entropy, train

TITLE = "Batch norm keeps a deep network in bounds, and lets it train at larger rates"
DEPTH, BATCH, SHORT_BATCH = 110, 128, 32
# With ReLU and without shortcuts, a variance of 2 / fan-in would keep the scale (He et al., 2015).
GAIN = float(np.sqrt(2))
KINDS = {
    "plain": (False, GAIN, PLAIN, "--", "without batch norm"),
    "small": (False, 1.0, THIRD, ":", "without, weights / √2"),
    "norm": (True, GAIN, NORM, "-", "with batch norm"),
}
# Trained from the smaller weights, on which the network without batch norm is better off.
TRAINED = {"small": False, "norm": True}
TRAINED_DEPTH, TRAINED_WIDTH, TRAINED_BATCH, MOMENTUM = 20, 8, 32, 0.9
STEPS, SHORT_STEPS, PAPER_STEPS = 150, 75, 64_500
RATES, SHORT_RATES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0), (0.01, 0.03, 0.3, 1.0)
LEVEL = 0.5


def measure(images: Dataset, seed: int, norm: bool, gain: float, batch: int) -> tuple[list[float], list[float]]:
    """Root mean squares on one batch before training: what the stem and each block put out, each weight's gradient."""
    rng = np.random.default_rng(seed)
    network = resnet(DEPTH, images.shape, rng, norm=norm, gain=gain)
    chosen = rng.permutation(len(images.x_train))[:batch]
    stem, *rest = network.module
    outputs: list[float] = []
    for layer in [stem, *(one for one in rest if isinstance(one, Residual))]:
        layer.register_forward_hook(lambda layer, inputs, y: outputs.append(_rms(y)))
    _, gradient = cross_entropy(network(images.x_train[chosen]), images.y_train[chosen])
    network.backward(gradient)
    return outputs, [_rms(layer.weight.grad) for layer in convolutions(network)]


def _rms(tensor: torch.Tensor) -> float:
    return float(tensor.detach().double().square().mean().sqrt())


def run(settings: Settings) -> dict[str, Any]:
    torch.set_num_threads(1)
    images, steps = settings.images(train=BATCH), settings.count(STEPS, PAPER_STEPS, SHORT_STEPS)
    rates = SHORT_RATES if settings.short else RATES
    depth, width, batch = TRAINED_DEPTH, TRAINED_WIDTH, TRAINED_BATCH
    if settings.paper:
        depth, width, batch, rates = DEPTH, 16, BATCH, (0.0001, 0.0003, 0.001, *rates)
    numbers: dict[str, Any] = settings.header(images, steps) | {"rates": list(rates), "depth": depth}
    for kind, (norm, gain, *_) in KINDS.items():
        found = [measure(images, seed, norm, gain, SHORT_BATCH if settings.short else BATCH) for seed in settings.seeds]
        numbers[kind] = {"outputs": [one for one, _ in found], "gradients": [one for _, one in found]}
    with progress(len(TRAINED) * len(settings.seeds) * len(rates) * steps, "cifar") as tick:
        for kind, norm in TRAINED.items():
            numbers[kind]["accuracy"] = []
            for seed in settings.seeds:
                reached = []
                for rate in rates:
                    rng = np.random.default_rng(seed)
                    network = resnet(depth, images.shape, rng, norm=norm, width=width)
                    train(network, images, rng, steps=steps, rate=rate, batch=batch, momentum=MOMENTUM, tick=tick)
                    # Where training diverged, the statistics and logits are not finite.
                    with np.errstate(over="ignore", invalid="ignore"):
                        reached.append(accuracy(network, images.x_test, images.y_test))
                numbers[kind]["accuracy"].append(reached)
    return numbers


def largest(rates: list[float], reached: list[float]) -> float:
    """The largest rate at which the network trains; not a number if there is none, which supports no claim."""
    return max((rate for rate, value in zip(rates, reached, strict=True) if value >= LEVEL), default=float("nan"))


def growth(outputs: list[list[float]]) -> list[float]:
    """From the first layer to the last, for each seed."""
    return ratios(*np.asarray(outputs, float)[:, [-1, 0]].T)


def claims(numbers: dict[str, Any]) -> list[Claim]:
    plain, small, norm = (numbers[kind] for kind in KINDS)

    return [
        Claim(
            "From the first layer to the last, activations grow ten times as much without batch norm.",
            "times the growth",
            ratios(*(growth(one["outputs"]) for one in (plain, norm))),
            10,
        ),
        Claim(
            "The gradients of the median layer are ten times as large without.",
            "times the root mean square",
            ratios(*(np.median(one["gradients"], 1) for one in (plain, norm))),
            10,
        ),
        Claim(
            "Batch norm permits a larger rate, even beside the smaller weights.",
            "times the largest rate that trains",
            ratios(*([largest(numbers["rates"], reached) for reached in one["accuracy"]] for one in (norm, small))),
            1,
        ),
        Claim(
            "After as many steps, each at the best rate, the network with batch norm is more accurate.",
            "gain in accuracy",
            [max(b) - max(a) for a, b in zip(small["accuracy"], norm["accuracy"], strict=True)],
            0,
        ),
    ]


def table(numbers: dict[str, Any]) -> tuple[list[str], list[list[Any]]]:
    rows = []
    for kind, (*_, label) in KINDS.items():
        one = numbers[kind]
        row = [label]
        row += [float(np.median(np.array(one["outputs"])[:, place])) for place in (0, -1)]
        row.append(float(np.median(one["gradients"])))
        if kind in TRAINED:
            row.append(float(np.median([largest(numbers["rates"], reached) for reached in one["accuracy"]])))
            row.append(float(np.median([max(reached) for reached in one["accuracy"]])))
        else:
            row += ["", ""]
        rows.append(row)
    heads = ["first activations", "last activations", "gradients", "largest rate that trains", "best accuracy"]
    return [f"{DEPTH} layers; {numbers['depth']} trained", *heads], rows


def draw(figure: Figure, numbers: dict[str, Any]) -> None:
    figure.set_size_inches(10.5, 3.9)
    left, middle, right = figure.subplots(1, 3)
    for kind, (*_, color, line, label) in KINDS.items():
        one = numbers[kind]
        # A block is two convolutions; the stem is one.
        band(left, 1 + 2 * np.arange(len(one["outputs"][0])), one["outputs"], color, linestyle=line)
        band(middle, 1 + np.arange(len(one["gradients"][0])), one["gradients"], color, label, linestyle=line)
        if kind in TRAINED:
            band(right, numbers["rates"], one["accuracy"], color, linestyle=line, marker="o", markersize=3.5)
    left.set(title="What layers put out", ylabel="root mean square before training")
    middle.set(title="Gradients of their weights", ylabel="root mean square before training")
    for axes in (left, middle):
        axes.set(xlabel=f"layer of {DEPTH}", yscale="log")
    middle.legend(loc="center right")
    right.axhline(LEVEL, color=GREY, linewidth=1, linestyle=":")
    right.text(numbers["rates"][0], LEVEL - 0.02, "above: it trains", color=GREY, fontsize=8, va="top")
    right.set(
        title=f"Trained for {numbers['steps']} steps, {numbers['depth']} layers",
        xlabel="learning rate",
        ylabel="test accuracy (fraction correct)",
        xscale="log",
        ylim=(0, 1.02),
    )
