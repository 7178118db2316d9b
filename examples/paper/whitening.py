"""whitening -- study 7: standardizing and whitening a correlated input: what each does, costs and is worth."""

import time
from dataclasses import replace
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from paper.data import Dataset
from paper.perceptron import Linear, Network
from paper.study import FOURTH, GREY, NORM, PLAIN, THIRD, Claim, Settings, band, progress, ratios, steps_to, times_fewer
from paper.training import accuracy, cross_entropy, evaluation_steps, predict, train

import fastbn

WITHOUT = ("paper",)
TITLE = "Whitening trains fastest and costs most; standardizing gains much for little"
STEPS, SHORT_STEPS = 1000, 200
EPS, BATCH, LEVEL = 1e-5, 128, 0.25
# The paper's mini-batch, whose covariance is asked for its rank.
SMALL_BATCH = 60
WIDTHS, ROWS, ROUNDS = (16, 32, 64, 128, 256, 512), 1024, 15
SHORT_ROUNDS = 3
# What is done, its colour and line, and its name.
KINDS = {
    "raw": (PLAIN, "--", "raw"),
    "standard": (NORM, "-", "standardized"),
    "pca": (FOURTH, ":", "PCA-whitened"),
    "zca": (THIRD, "-.", "ZCA-whitened"),
}


def covariance(x: np.ndarray) -> np.ndarray:
    away = x - x.mean(0, dtype=float)
    return away.T @ away / len(x)


def transform(kind: str, images: Dataset) -> Dataset:
    """The same images after it, with the statistics of those to train on."""
    if kind == "raw":
        return images
    found = fastbn.moments(images.x_train)
    if kind == "standard":
        x_train, x_test = (
            fastbn.normalize(x, found.mean, found.var(), eps=EPS) for x in (images.x_train, images.x_test)
        )
    else:
        values, vectors = np.linalg.eigh(covariance(images.x_train))
        white = vectors[:, ::-1] / np.sqrt(np.maximum(values[::-1], 0) + EPS)
        if kind == "zca":  # turned back to where it came from
            white = white @ vectors[:, ::-1].T
        x_train, x_test = (((x - found.mean) @ white).astype(np.float32) for x in (images.x_train, images.x_test))
    return replace(images, x_train=x_train, x_test=x_test)


def spectrum(x: np.ndarray) -> np.ndarray:
    """The variances along the principal directions, but those in which nothing varies, falling."""
    values = np.linalg.eigvalsh(covariance(x))[::-1]
    return values[values > 1e-9 * values[0]]


def correlation(x: np.ndarray) -> float:
    """The rms correlation between two different features, of those that vary."""
    cov = covariance(x)
    vary = np.diag(cov) > 1e-9 * np.diag(cov).max()
    cov = cov[np.ix_(vary, vary)]
    scale = np.sqrt(np.diag(cov))
    between = (cov / np.outer(scale, scale))[~np.eye(len(cov), dtype=bool)]
    return float(np.sqrt(np.mean(between**2)))


def likeness(x: np.ndarray, before: np.ndarray) -> float:
    """The mean correlation of a feature with what it was, over those that vary."""
    a, b = (part - part.mean(0, dtype=float) for part in (x, before))
    scale = np.sqrt((a * a).sum(0) * (b * b).sum(0))
    vary = scale > 1e-9 * scale.max()
    return float(np.mean((a * b).sum(0)[vary] / scale[vary]))


def cost(widths: tuple[int, ...], rows: int, rounds: int) -> dict[str, list[float]]:
    """Of one batch, whitened by its own statistics as often as standardized: the ratios of times and of operations."""
    rng = np.random.default_rng(0)
    found: dict[str, list[float]] = {"time": [], "operations": []}
    for width in widths:
        x = rng.standard_normal((rows, width), np.float32)
        norm = fastbn.BatchNorm(width, affine=False)

        def whiten(x: np.ndarray = x) -> np.ndarray:
            away = x - x.mean(0)
            values, vectors = np.linalg.eigh(away.T @ away / np.float32(len(x)))
            return away @ (vectors / np.sqrt(np.maximum(values, 0) + np.float32(EPS)) @ vectors.T)

        times: dict[str, list[float]] = {"standard": [], "white": []}
        for _ in range(rounds):  # in turns; the fastest is the one that nothing disturbed
            for kind, one in (("standard", lambda x=x, norm=norm: norm(x)), ("white", whiten)):
                start = time.perf_counter()
                one()
                times[kind].append(time.perf_counter() - start)
        found["time"].append(min(times["white"]) / min(times["standard"]))
        # An element is summed, taken from the mean, squared, summed and scaled; of n features, whitening has a
        # covariance and a product of 2 n operations each, a decomposition of about 9 n³ as it is customarily
        # counted, and the square matrix made of it.
        whitening = 2 + 4 * width + (9 + 2) * width**2 / rows
        found["operations"].append(whitening / 5)
    return found


def part(images: Dataset, seed: int) -> tuple[Dataset, np.random.Generator]:
    """Three quarters of the images to train on, and the generator that chose them."""
    rng = np.random.default_rng(seed)
    chosen = rng.permutation(len(images.x_train))[: len(images.x_train) * 3 // 4]
    return replace(images, x_train=images.x_train[chosen], y_train=images.y_train[chosen]), rng


def run(settings: Settings) -> dict[str, Any]:
    # Each seed trains on three quarters ...
    pictures, steps = settings.images(train=-(-4 * BATCH // 3)), settings.count(STEPS, short=SHORT_STEPS)
    images = pictures.flat()
    for seed in settings.seeds:  # ... of which at least two pixels must vary to be correlated
        part(images, seed)[0].require(varying=2)
    at = evaluation_steps(steps)
    numbers: dict[str, Any] = settings.header(images, steps) | {"at": at, "widths": WIDTHS}
    numbers["note"] = (
        f"Above: seed {settings.seeds[0]}; a test image, and covariances of the training images, raw in units of the "
        f"largest. Below: {settings.spread}, each with another three quarters of the training images; "
        "softmax regression at a rate of 2 / (largest curvature of the input); PCA and ZCA lie on each other; cost for "
        f"batches of {ROWS} synthetic rows on one thread."
    )
    keys = ("spectrum", "condition", "correlation", "likeness", "loss", "accuracy", "covariance", "image")
    for kind in KINDS:
        numbers[kind] = {key: [] for key in keys}
    numbers["rank"], numbers["features"] = [], []
    apart = numbers["apart"] = -(-images.x_train.shape[1] // 64)  # what a panel can show
    with progress(len(KINDS) * len(settings.seeds) * steps, "whitening") as tick:
        for seed in settings.seeds:
            some, rng = part(images, seed)
            numbers["rank"].append(int(np.linalg.matrix_rank(covariance(some.x_train[:SMALL_BATCH]))))
            numbers["features"].append(int(np.sum(some.x_train.std(0) > 0)))
            for kind in KINDS:
                data, found = transform(kind, some), numbers[kind]
                values = spectrum(data.x_train)
                found["spectrum"].append(values)
                found["condition"].append(float(values[0] / values[-1]))
                found["correlation"].append(correlation(data.x_train))
                found["likeness"].append(likeness(data.x_train, some.x_train))
                curvature = np.linalg.eigvalsh(data.x_train.T @ data.x_train / np.float32(len(data.x_train)))[-1]
                network = Network([Linear(data.x_train.shape[1], 10, 0, rng)])

                def look(_: int, network: Network = network, data: Dataset = data) -> tuple[float, float]:
                    loss, _gradient = cross_entropy(predict(network, data.x_train), data.y_train)
                    return loss, accuracy(network, data.x_test, data.y_test)

                order = np.random.default_rng(seed)  # the same batches for all
                rate = 2 / float(curvature)
                looks = train(
                    network, data, order, steps=steps, rate=rate, batch=BATCH, look=look, look_at=at, tick=tick
                )
                losses, accuracies = zip(*looks, strict=True)
                found["loss"].append(losses)
                found["accuracy"].append(accuracies)
                if seed == settings.seeds[0]:
                    found["covariance"] = covariance(data.x_train)[::apart, ::apart]
                    found["image"] = data.x_test[0].reshape(pictures.shape).mean(0)
    with fastbn.num_threads(1):
        return numbers | {"cost": cost(WIDTHS, ROWS, SHORT_ROUNDS if settings.short else ROUNDS)}


def arrival(numbers: dict[str, Any], kind: str) -> list[float]:
    """The step at which the training loss is low, for each seed."""
    return [steps_to(numbers["at"], -np.asarray(curve), -LEVEL) for curve in numbers[kind]["loss"]]


def claims(numbers: dict[str, Any]) -> list[Claim]:
    def times(key: str, above: str, below: str) -> list[float]:
        return ratios(numbers[above][key], numbers[below][key])

    raw, standard, zca = (arrival(numbers, kind) for kind in ("raw", "standard", "zca"))
    return [
        Claim(
            "Standardizing leaves features as correlated as they were.",
            "rms correlation, in those of the raw input",
            times("correlation", "standard", "raw"),
            0.9,
        ),
        Claim("Whitening takes most of it away.", "times less", times("correlation", "standard", "zca"), 2),
        Claim("Standardizing lowers the condition number.", "times lower", times("condition", "raw", "standard"), 1),
        Claim("Whitening lowers it further.", "times lower", times("condition", "standard", "zca"), 1),
        Claim(
            "Softmax regression trains faster on standardized input.",
            f"times fewer steps to a loss of {LEVEL}, at least",
            times_fewer(raw, standard, numbers["at"][-1]),
            1,
        ),
        Claim(
            "On whitened input faster still.",
            f"times fewer steps to a loss of {LEVEL}, at least",
            times_fewer(standard, zca, numbers["at"][-1]),
            1,
        ),
        Claim(
            "Of the two whitenings ZCA stays nearer to the input.",
            "correlation with what a feature was, more",
            [z - p for z, p in zip(numbers["zca"]["likeness"], numbers["pca"]["likeness"], strict=True)],
            0,
        ),
        Claim(
            f"A mini-batch of {SMALL_BATCH} is too small to be whitened by its own covariance.",
            "rank of the covariance, of the features that vary",
            ratios(numbers["rank"], numbers["features"]),
            1,
            False,
        ),
        Claim(
            f"Whitening costs more, here for {WIDTHS[-1]} features.",
            "times the time of standardizing",
            [numbers["cost"]["time"][-1]],
            1,
            timing=True,
        ),
    ]


def table(numbers: dict[str, Any]) -> tuple[list[str], list[list[Any]]]:
    rows = []
    for kind, (_, _, label) in KINDS.items():
        found = numbers[kind]
        middle = [float(np.median(found[key])) for key in ("correlation", "condition", "likeness")]
        last = float(np.median(np.asarray(found["accuracy"])[:, -1]))
        rows.append([label, *middle, float(np.median(arrival(numbers, kind))), last])
    header = [
        "input",
        "rms correlation",
        "condition number",
        "likeness",
        f"steps to a loss of {LEVEL}",
        "test accuracy",
    ]
    return header, rows


def epilogue(numbers: dict[str, Any]) -> str:
    found = numbers["cost"]
    pairs = zip(numbers["widths"], found["time"], found["operations"], strict=True)
    lines = [f"{width} features: {t:.3g} times the time, {o:.3g} times the operations" for width, t, o in pairs]
    return "\n  ".join([f"  Whitening a batch of {ROWS} beside standardizing it:", *lines])


def draw(figure: Figure, numbers: dict[str, Any]) -> None:
    figure.set_size_inches(10.5, 8.6)
    # So few shades that the palette of the file has them all.
    grey, red_blue = colormaps["gray"].resampled(17), colormaps["RdBu_r"].resampled(21)
    panels = figure.subplot_mosaic(
        [
            [f"image {kind}" for kind in KINDS],
            [f"cov {kind}" for kind in KINDS],
            ["values", "cost", "loss", "accuracy"],
        ],
        height_ratios=(0.75, 1, 1.1),
    )
    feature = "feature" if numbers["apart"] == 1 else f"feature (1 in {numbers['apart']} shown)"
    for kind, (color, style, label) in KINDS.items():
        found = numbers[kind]
        image, cov = (np.array(found[key], float) for key in ("image", "covariance"))
        shown = panels[f"image {kind}"]
        shown.imshow(image, cmap=grey)
        shown.set_title(label[0].upper() + label[1:])
        reach = cov.max() if kind == "raw" else 1
        drawn = panels[f"cov {kind}"].imshow(cov / reach, cmap=red_blue, vmin=-1, vmax=1, interpolation="nearest")
        panels[f"cov {kind}"].set_xlabel(feature)
        for axes in (shown, panels[f"cov {kind}"]):
            axes.grid(visible=False)
            axes.set(xticks=[], yticks=[])
        lengths = min(map(len, found["spectrum"]))
        # Wide where another will lie on it.
        line = {"color": color, "label": label, "linestyle": style, "linewidth": 3.6 if kind == "pca" else 1.7}
        band(panels["values"], range(1, lengths + 1), [values[:lengths] for values in found["spectrum"]], **line)
        band(panels["loss"], numbers["at"], found["loss"], **line)
        band(panels["accuracy"], numbers["at"], found["accuracy"], **line)
    panels["image raw"].set_ylabel("a test image")
    panels["cov raw"].set_ylabel(feature)
    figure.colorbar(
        drawn, ax=[panels[f"cov {kind}"] for kind in KINDS], shrink=0.9, pad=0.01, label="covariance", ticks=[-1, 0, 1]
    )
    panels["values"].set(title="Variances", yscale="log", xlabel="principal direction", ylabel="variance along it")
    panels["values"].legend(fontsize=8)
    panels["cost"].plot(numbers["widths"], numbers["cost"]["time"], color=GREY, marker="o", markersize=4, label="time")
    operations = numbers["cost"]["operations"]
    panels["cost"].plot(numbers["widths"], operations, color=GREY, linestyle=":", label="operations")
    panels["cost"].set(title="Cost of whitening", xscale="log", yscale="log", xlabel="features")
    panels["cost"].set_ylabel("times that of standardizing")
    panels["cost"].set_xticks(numbers["widths"], list(map(str, numbers["widths"])), fontsize=8)
    panels["cost"].minorticks_off()
    panels["cost"].legend(fontsize=8)
    panels["loss"].set(title="Training loss", yscale="log", xlabel="SGD step", ylabel="cross-entropy (nats)")
    panels["accuracy"].set(title="Test accuracy", xlabel="SGD step", ylabel="fraction correct")
    # What matters is the end: the start, at chance, is left out.
    lowest = min(np.min(np.asarray(numbers[kind]["accuracy"])[:, -1]) for kind in KINDS)
    panels["accuracy"].set_ylim(max(0, np.floor(10 * lowest - 1) / 10), 1)
