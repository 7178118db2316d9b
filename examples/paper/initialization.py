"""initialization -- study 4: with batch norm a perceptron learns from initial weights of almost any scale."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from paper.data import Dataset
from paper.perceptron import Linear, Network, perceptron
from paper.study import GREY, NORM, PLAIN, Claim, Settings, band, progress
from paper.training import cross_entropy, predict, train

TITLE = "With batch norm, initial weights may have almost any scale"
STEPS, PAPER_STEPS, SHORT_STEPS = 500, 50_000, 300
# Standard deviations of the hidden weights, half a decade apart; the output layer keeps that of study 1.
SCALES = [float(f"{10 ** (k / 2):.2g}") for k in range(-8, 4)]
OUTPUT_SCALE = 0.1
TRAINS, BATCH = 0.9, 60
KINDS = {"plain": (False, PLAIN, "without batch norm", "--"), "norm": (True, NORM, "with batch norm", "-")}
RATES = {"sigmoid": 0.5, "relu": 0.1}
NAMES = {"sigmoid": "Sigmoid", "relu": "ReLU"}


def scaled(inputs: int, seed: int, norm: bool, nonlinearity: str, scale: float) -> Network:
    """The perceptron of study 1, all of whose hidden weights are multiplied to have the scale asked for."""
    rng = np.random.default_rng(seed)
    network = perceptron(inputs, rng, norm=norm, nonlinearity=nonlinearity, scale=OUTPUT_SCALE)
    for layer in network.layers[:-1]:
        if isinstance(layer, Linear):
            layer.weight *= np.float32(scale / OUTPUT_SCALE)
    return network


def arriving(network: Network, images: Dataset, count: int = 1000) -> float:
    """The rms of the loss's gradient where it arrives at the first hidden layer's activations."""
    _, dy = cross_entropy(network(images.x_train[:count]), images.y_train[:count])
    first = next(place for place, layer in enumerate(network.layers) if hasattr(layer, "y")) + 1
    dy = Network(network.layers[first:]).backward(dy)
    return float(np.sqrt(np.mean(np.square(dy, dtype=float)))) * len(dy)


def run(settings: Settings) -> dict[str, Any]:
    images, steps = settings.images(train=BATCH).flat(), settings.count(STEPS, PAPER_STEPS, SHORT_STEPS)
    scales = SCALES[::2] if settings.short else SCALES
    inputs = images.x_train.shape[1]
    numbers: dict[str, Any] = settings.header(images, steps) | {"scales": scales}
    with progress(len(RATES) * len(KINDS) * len(settings.seeds) * len(scales) * steps, "initialization") as tick:
        for nonlinearity, rate in RATES.items():
            numbers[nonlinearity] = {}
            for kind, (norm, _, _, _) in KINDS.items():
                found = numbers[nonlinearity][kind] = {"accuracy": [], "loss": [], "gradient": []}
                for seed in settings.seeds:
                    row: dict[str, list[float]] = {key: [] for key in found}
                    for scale in scales:
                        # Saturated and overflowing networks are what is looked for.
                        with np.errstate(over="ignore", invalid="ignore"):
                            gradient = arriving(scaled(inputs, seed, norm, nonlinearity, scale), images)
                            network = scaled(inputs, seed, norm, nonlinearity, scale)
                            order = np.random.default_rng(seed)
                            train(network, images, order, steps=steps, rate=rate, batch=BATCH, tick=tick)
                            logits = predict(network, images.x_test)
                            loss, _ = cross_entropy(logits, images.y_test)
                        row["accuracy"].append(float(np.mean(logits.argmax(1) == images.y_test)))
                        row["loss"].append(loss)
                        row["gradient"].append(gradient)
                    for key, values in row.items():
                        found[key].append(values)
    return numbers


def decades(scales: Any, accuracies: Any) -> float:
    """Over how many decades of scales next to each other the network learns."""
    best, start = 0.0, None
    for scale, accuracy in zip(scales, accuracies, strict=True):
        start = None if accuracy < TRAINS else start or scale
        best = max(best, float(np.log10(scale / start)) if start else 0.0)
    return best


def claims(numbers: dict[str, Any]) -> list[Claim]:
    found = []
    for nonlinearity in RATES:
        plain, norm = (
            [decades(numbers["scales"], runs) for runs in numbers[nonlinearity][kind]["accuracy"]] for kind in KINDS
        )
        found += [
            Claim(
                f"With batch norm the {nonlinearity} network learns from weights of almost any scale.",
                f"decades with {TRAINS:.0%} right",
                norm,
                3.5,
            ),
            Claim(
                f"Without, the {nonlinearity} network learns from few of them.",
                "decades fewer",
                [n - p for n, p in zip(norm, plain, strict=True)],
                2,
            ),
        ]
    return found


def table(numbers: dict[str, Any]) -> tuple[list[str], list[list[Any]]]:
    rows = []
    for nonlinearity in RATES:
        for kind, (_, _, label, _) in KINDS.items():
            found = np.asarray(numbers[nonlinearity][kind]["accuracy"])
            width = np.median([decades(numbers["scales"], runs) for runs in found])
            middle = np.median(found, 0)
            rows.append([f"{nonlinearity}, {label}", float(width), float(middle.min()), float(middle.max())])
    return ["network", f"decades with {TRAINS:.0%} right", "test accuracy, worst scale", "best scale"], rows


def draw(figure: Figure, numbers: dict[str, Any]) -> None:
    figure.set_size_inches(10.5, 7)
    panels = figure.subplots(2, 2, sharex=True, sharey="row")
    for column, nonlinearity in zip(panels.T, RATES, strict=True):
        for kind, (_, color, label, style) in KINDS.items():
            found = numbers[nonlinearity][kind]
            line = {"linestyle": style, "marker": "o", "markersize": 4}
            band(column[0], numbers["scales"], found["accuracy"], color, label, **line)
            gradient = np.array(found["gradient"], float)
            # What underflows or overflows has no place on a logarithmic axis.
            gradient[~(np.isfinite(gradient) & (gradient > 0))] = np.nan
            band(column[1], numbers["scales"], gradient, color, label, **line)
        column[0].axhline(0.1, color=GREY, linewidth=1, linestyle=":")
        column[0].set(title=f"{NAMES[nonlinearity]}: test accuracy after {numbers['steps']} steps", ylim=(0, 1.02))
        column[1].set(
            title=f"{NAMES[nonlinearity]}: gradient at the first hidden layer, before training",
            xscale="log",
            yscale="log",
            xlabel="standard deviation of the initial hidden weights",
        )
    panels[0, 0].set_ylabel("fraction correct")
    panels[0, 0].text(numbers["scales"][0], 0.12, "chance", color=GREY, fontsize=8)
    panels[1, 0].set_ylabel("rms over images and units")
    panels[1, 0].legend()
