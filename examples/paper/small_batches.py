"""small_batches -- study 9: small batches, and how far training and inference then differ (sections 3.1 and 5)."""

from collections.abc import Callable
from itertools import islice
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from paper.data import Dataset
from paper.perceptron import perceptron
from paper.study import FIFTH, GREY, NORM, PLAIN, THIRD, Claim, Settings, band, progress, ratios
from paper.training import accuracy, batches, train

import fastbn

WITHOUT = ("paper",)
TITLE = "The smaller the batch, the further inference is from training"
STEPS, SHORT_STEPS = 1000, 200
RATE = 0.1
SIZES = (2, 4, 8, 16, 32, 64, 128, 256)
LOOKED_AT = 512  # values per channel at least, in as many batches as that takes
PARTS = ("gap", "noise", "stale", "calibrated")


def fit(images: Dataset, seed: int, size: int, steps: int, tick: Callable[[], Any]) -> dict[str, float]:
    """Train on batches of a size; accuracies, and the gap of the layers before and after calibration."""
    rng = np.random.default_rng(seed)
    network = perceptron(images.x_train.shape[1], rng, norm=True)
    train(network, images, rng, steps=steps, rate=RATE, batch=size, tick=tick)
    # Calibrated on some batches, measured on others.
    supply, count = batches(images, size, rng), max(8, 2 * LOOKED_AT // size)
    given, others = list(islice(supply, count)), list(islice(supply, count))
    before = fastbn.train_eval_gap(network, others, progress=False)
    found = {"running": accuracy(network, images.x_test, images.y_test), "training": _as_trained(network, images, size)}
    fastbn.calibrate(network, given, progress=False)
    after = fastbn.train_eval_gap(network, others, progress=False)
    found["exact"] = accuracy(network, images.x_test, images.y_test)
    for part in PARTS[:-1]:
        found[part] = float(np.mean([getattr(layer, part) for layer in before.layers]))
    found["calibrated"] = float(np.mean([layer.stale for layer in after.layers]))
    return found


def _as_trained(network: Any, images: Dataset, size: int) -> float:
    """The test accuracy where each batch normalizes with its own statistics; the rest that fills no batch is left."""
    frozen = network.with_norms(lambda bn: lambda x: fastbn.batch_norm_forward(x, bn.weight, bn.bias, bn.eps)[0])
    count = len(images.x_test) // size * size
    right = [
        frozen(images.x_test[i : i + size]).argmax(1) == images.y_test[i : i + size] for i in range(0, count, size)
    ]
    return float(np.mean(right))


def run(settings: Settings) -> dict[str, Any]:
    images, steps = settings.images(train=SIZES[-1], test=SIZES[-1]).flat(), settings.count(STEPS, short=SHORT_STEPS)
    numbers: dict[str, Any] = settings.header(images, steps) | {"sizes": list(SIZES)}
    with progress(len(SIZES) * len(settings.seeds) * steps, "small_batches") as tick:
        fits = [[fit(images, seed, size, steps, tick) for size in SIZES] for seed in settings.seeds]
    return numbers | {key: [[found[key] for found in one] for one in fits] for key in fits[0][0]}


def claims(numbers: dict[str, Any]) -> list[Claim]:
    gap, exact = np.asarray(numbers["gap"]), np.asarray(numbers["exact"])
    training = np.asarray(numbers["training"])
    stale, calibrated = np.asarray(numbers["stale"]), np.asarray(numbers["calibrated"])
    return [
        Claim(
            f"Training and inference differ more at batches of {SIZES[0]} than of {SIZES[-1]}.",
            "times the gap",
            ratios(gap[:, 0], gap[:, -1]),
            1,
        ),
        Claim(
            f"Where batches of {SIZES[1]} normalize with their own statistics, fewer images are right than with "
            "those of the population.",
            "difference in accuracy",
            (exact[:, 1] - training[:, 1]).tolist(),
            0,
        ),
        Claim(
            f"At batches of {SIZES[1]} calibration takes most of what is stale away, on batches it has not seen.",
            "share that is left",
            ratios(calibrated[:, 1], stale[:, 1]),
            0.5,
            above=False,
        ),
    ]


def table(numbers: dict[str, Any]) -> tuple[list[str], list[list[Any]]]:
    keys = ("running", "exact", "training", *PARTS)
    columns = [np.median(numbers[key], 0).tolist() for key in keys]
    header = ["batch", "accuracy, running", "calibrated", "own batch", "gap", "noise", "stale", "calibrated"]
    return header, [[size, *row] for size, row in zip(numbers["sizes"], zip(*columns, strict=True), strict=True)]


def draw(figure: Figure, numbers: dict[str, Any]) -> None:
    figure.set_size_inches(10.5, 3.9)
    left, right = figure.subplots(1, 2)
    sizes = numbers["sizes"]
    for key, color, label, line in (
        ("running", NORM, "running statistics", "-"),
        ("exact", THIRD, "calibrated", "--"),
        ("training", PLAIN, "those of the test batch itself", "-."),
    ):
        band(left, sizes, numbers[key], color, label, linestyle=line, marker="o", markersize=3)
    left.set(title="Test accuracy, by the statistics used", xlabel="batch size", ylabel="fraction correct")
    for key, color, label, line in (
        ("gap", GREY, "gap", "-"),
        ("noise", PLAIN, "noise of batches", "-."),
        ("stale", NORM, "stale running statistics", "--"),
        ("calibrated", FIFTH, "stale after calibration", ":"),
    ):
        band(right, sizes, numbers[key], color, label, linestyle=line, marker="o", markersize=3)
    right.set(title="Training against inference", xlabel="batch size", ylabel="difference / output, RMS", yscale="log")
    right.set_ylim(1e-3, None)
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.legend()
