"""mnist -- study 1: the paper's perceptron with and without batch norm (section 4.1, figure 1)."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from paper.data import Dataset
from paper.perceptron import Network, perceptron
from paper.study import NORM, PLAIN, Claim, Settings, band, format_table, progress, ratios, steps_to, times_fewer
from paper.training import evaluation_steps, predict, train

import fastbn

TITLE = "Batch norm trains the sigmoid perceptron sooner, on steadier activations"
STEPS, PAPER_STEPS, SHORT_STEPS = 5000, 50_000, 300
RATE, BATCH = 0.5, 60
PERCENTILES = (15, 50, 85)
KINDS = {"plain": (False, PLAIN, "without batch norm"), "norm": (True, NORM, "with batch norm")}


def fit(
    images: Dataset, seed: int, norm: bool, steps: int, rate: float, tick: Callable[[], Any]
) -> tuple[Network, list[float], list[list[float]]]:
    """Train a network; at each look, its test accuracy and the percentiles of what enters one of its last sigmoids."""
    rng = np.random.default_rng(seed)
    network = perceptron(images.x_train.shape[1], rng, norm=norm)

    def look(_: int) -> tuple[float, list[float]]:
        logits = predict(network, images.x_test)
        network.train(False)
        entering = network.trace(images.x_test)[-3][:, 0]
        network.train()
        return float(np.mean(logits.argmax(1) == images.y_test)), np.percentile(entering, PERCENTILES).tolist()

    at = evaluation_steps(steps)
    looks = train(network, images, rng, steps=steps, rate=rate, batch=BATCH, look=look, look_at=at, tick=tick)
    accuracies, percentiles = zip(*looks, strict=True)
    return network, list(accuracies), list(percentiles)


def run(settings: Settings) -> dict[str, Any]:
    images, steps = settings.images(train=BATCH, test=BATCH).flat(), settings.count(STEPS, PAPER_STEPS, SHORT_STEPS)
    numbers: dict[str, Any] = settings.header(images, steps) | {"at": evaluation_steps(steps)}
    numbers["note"] = f"Left: {settings.spread}. Right: seed {settings.seeds[0]}."
    with progress(2 * len(settings.seeds) * steps, "mnist") as tick:
        for kind, (norm, _, _) in KINDS.items():
            fits = [fit(images, seed, norm, steps, RATE, tick) for seed in settings.seeds]
            numbers[kind] = {"accuracy": [f[1] for f in fits], "percentiles": [f[2] for f in fits]}
    return numbers | {"inference": serve(fits[0][0], images.x_test)}


def expression(bn: fastbn.BatchNorm) -> Callable[[np.ndarray], np.ndarray]:
    """Batch norm in inference as one writes it in NumPy."""
    mean, var, weight, bias, eps = bn.running_mean, bn.running_var, bn.weight, bn.bias, np.float32(bn.eps)
    return lambda x: (x - mean) / np.sqrt(var + eps) * weight + bias


def serve(network: Network, x: np.ndarray, rounds: int = 300) -> list[dict[str, float]]:
    """Freeze the network; microseconds per sample beside the NumPy expression, and how far the two differ."""
    networks = {
        "NumPy": network.with_norms(expression),
        "fastbn": network.with_norms(fastbn.BatchNorm.freeze),
    }
    found = []
    for batch in (1, BATCH):
        samples = np.ascontiguousarray(x[:batch])
        times: dict[str, list[float]] = {name: [] for name in networks}
        for _ in range(rounds):  # in turns, so that a disturbance hits both
            for name, one in networks.items():
                start = time.perf_counter()
                one(samples)
                times[name].append((time.perf_counter() - start) / batch * 1e6)
        results = {name: one(samples) for name, one in networks.items()}
        found.append(
            {"batch": batch}
            | {name: float(np.median(t)) for name, t in times.items()}
            | {"difference": float(np.abs(results["NumPy"] - results["fastbn"]).max())}
        )
    return found


def epilogue(numbers: dict[str, Any]) -> str:
    header = ["inference of the network, frozen", "µs per sample: NumPy", "fastbn", "logits differ by"]
    rows = [[f"batches of {r['batch']}", r["NumPy"], r["fastbn"], r["difference"]] for r in numbers["inference"]]
    return format_table(header, rows)


def wander(percentiles: Any) -> list[float]:
    """How far the median input strays over training, in final distances of the outer percentiles, for each seed."""
    low, middle, high = np.moveaxis(np.asarray(percentiles, float), -1, 0)
    return ratios(np.ptp(middle, 1), high[:, -1] - low[:, -1])


def claims(numbers: dict[str, Any]) -> list[Claim]:
    plain, norm = (numbers[kind]["accuracy"] for kind in KINDS)
    marks = [max(curve) for curve in plain]
    sooner = times_fewer(
        *([steps_to(numbers["at"], *pair) for pair in zip(curves, marks, strict=True)] for curves in (plain, norm)),
        numbers["at"][-1],
    )
    calmer = ratios(*(wander(numbers[kind]["percentiles"]) for kind in KINDS))
    return [
        Claim(
            "With batch norm the plain network's best accuracy is reached in fewer steps.",
            "times fewer steps",
            sooner,
            1,
        ),
        Claim(
            "Batch norm ends at the higher test accuracy.",
            "difference",
            [n[-1] - p[-1] for p, n in zip(plain, norm, strict=True)],
            0,
        ),
        Claim("The input of a sigmoid strays less with batch norm.", "times less", calmer, 1),
    ]


def table(numbers: dict[str, Any]) -> tuple[list[str], list[list[Any]]]:
    rows = []
    for kind, (_, _, label) in KINDS.items():
        curves = np.asarray(numbers[kind]["accuracy"])
        to90 = [steps_to(numbers["at"], curve, 0.9) for curve in curves]
        strays = wander(numbers[kind]["percentiles"])
        rows.append(
            [
                label,
                float(np.median(curves[:, -1])),
                float(curves.max()),
                float(np.median(to90)),
                float(np.median(strays)),
            ]
        )
    return ["network", "final test accuracy", "best", "steps to 0.9", "median strays by"], rows


def draw(figure: Figure, numbers: dict[str, Any]) -> None:
    figure.set_size_inches(10.5, 3.9)
    left, *right = figure.subplots(1, 3, width_ratios=(1.2, 1, 1))
    right[1].sharey(right[0])
    for kind, (_, color, label) in KINDS.items():
        band(left, numbers["at"], numbers[kind]["accuracy"], color, label, linestyle="-" if kind == "norm" else "--")
    left.set(title="Test accuracy", xlabel="training step", ylabel="fraction correct", ylim=(0, 1))
    left.legend(loc="lower right")
    for axes, (kind, (_, color, label)) in zip(right, KINDS.items(), strict=True):
        low, middle, high = np.moveaxis(np.asarray(numbers[kind]["percentiles"]), 2, 0)
        for runs, style in ((low, ":"), (middle, "-"), (high, ":")):
            axes.plot(numbers["at"], runs[0], color=color, linestyle=style)
        axes.set(title=f"Into a sigmoid, {label}", xlabel="training step", ylabel="15th, 50th, 85th percentile")
