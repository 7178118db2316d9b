"""regularization -- study 10: batch norm does some of what dropout does, on the same network."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from paper.data import Dataset
from paper.perceptron import Network, perceptron
from paper.study import (
    FOURTH,
    NORM,
    PLAIN,
    THIRD,
    Claim,
    Settings,
    band,
    bars,
    number,
    progress,
    steps_to,
    times_fewer,
)
from paper.training import cross_entropy, evaluation_steps, predict, train

TITLE = "Batch norm regularizes: less is left for dropout to do"
STEPS, PAPER_STEPS, SHORT_STEPS = 1000, 50_000, 1000
# So few images that a perceptron of this size learns them by heart.
TRAINING = 300
RATE, BATCH, DROPOUT = 0.1, 60, 0.2
KINDS: dict[str, tuple[bool, float, str, str, str]] = {
    "none": (False, 0.0, PLAIN, "--", "neither"),
    "dropout": (False, DROPOUT, FOURTH, ":", "dropout"),
    "norm": (True, 0.0, NORM, "-", "batch norm"),
    "both": (True, DROPOUT, THIRD, "-.", "both"),
}


def scores(network: Network, images: Dataset) -> tuple[float, float, float, float]:
    """Cross-entropy and error rate in inference, on what was trained on and on what was not."""
    found = []
    for x, labels in ((images.x_train, images.y_train), (images.x_test, images.y_test)):
        logits = predict(network, x)
        found += [cross_entropy(logits, labels)[0], float(np.mean(logits.argmax(1) != labels))]
    return tuple(found)


def run(settings: Settings) -> dict[str, Any]:
    steps = settings.count(STEPS, PAPER_STEPS, SHORT_STEPS)
    images = settings.images(train=BATCH, split=None if settings.paper else TRAINING).flat()
    at = evaluation_steps(steps, 25)
    numbers: dict[str, Any] = settings.header(images, steps) | {"at": at}
    numbers["note"] = f"All in inference mode; dropout drops {DROPOUT:.0%}. Bars and curves: {settings.spread}."
    with progress(len(KINDS) * len(settings.seeds) * steps, "regularization") as tick:
        for kind, (norm, dropout, _, _, _) in KINDS.items():
            found = numbers[kind] = {"train_loss": [], "train_error": [], "test_loss": [], "test_error": []}
            for seed in settings.seeds:
                rng = np.random.default_rng(seed)
                network = perceptron(images.x_train.shape[1], rng, norm=norm, dropout=dropout, nonlinearity="relu")

                def look(_: int, network: Network = network) -> tuple[float, float, float, float]:
                    return scores(network, images)

                looks = train(
                    network, images, rng, steps=steps, rate=RATE, batch=BATCH, look=look, look_at=at, tick=tick
                )
                for key, curve in zip(found, zip(*looks, strict=True), strict=True):
                    found[key].append(curve)
    return numbers


def _last(numbers: dict[str, Any], kind: str, key: str) -> np.ndarray:
    return np.asarray(numbers[kind][key], float)[:, -1]


def gap(numbers: dict[str, Any], kind: str) -> np.ndarray:
    """How much more the network loses on images it has not seen, for each seed."""
    return _last(numbers, kind, "test_loss") - _last(numbers, kind, "train_loss")


def arrival(numbers: dict[str, Any], kind: str) -> list[float]:
    """The step at which the test loss is as low as that with neither at the end, for each seed."""
    goals, curves = _last(numbers, "none", "test_loss"), np.asarray(numbers[kind]["test_loss"], float)
    return [steps_to(numbers["at"], -curve, -goal) for curve, goal in zip(curves, goals, strict=True)]


def claims(numbers: dict[str, Any]) -> list[Claim]:
    error = {kind: _last(numbers, kind, "test_error") for kind in KINDS}
    return [
        Claim(
            "With batch norm the gap between test and training loss is smaller.",
            "reduction of the gap",
            (gap(numbers, "none") - gap(numbers, "norm")).tolist(),
            0,
        ),
        Claim(
            "Batch norm alone errs less on images not seen.",
            "percentage points",
            (100 * (error["none"] - error["norm"])).tolist(),
            0,
        ),
        Claim(
            "And it gets to the test loss that the network ends at with neither sooner than dropout does.",
            "times fewer steps, at least",
            times_fewer(arrival(numbers, "dropout"), arrival(numbers, "norm"), numbers["at"][-1]),
            1,
        ),
        Claim(
            "Beside batch norm there is less left for dropout to reduce.",
            "reduction of the gap without batch norm less that with it",
            (gap(numbers, "none") - gap(numbers, "dropout") - gap(numbers, "norm") + gap(numbers, "both")).tolist(),
            0,
        ),
    ]


def table(numbers: dict[str, Any]) -> tuple[list[str], list[list[Any]]]:
    keys = ("train_error", "test_error", "train_loss", "test_loss")
    rows = [
        [label, *(float(np.median(_last(numbers, kind, key))) for key in keys), float(np.median(gap(numbers, kind)))]
        for kind, (_, _, _, _, label) in KINDS.items()
    ]
    return ["", "training error", "test error", "training loss", "test loss", "gap of the losses"], rows


def epilogue(numbers: dict[str, Any]) -> str:
    gained = 100 * np.median(_last(numbers, "norm", "test_error") - _last(numbers, "both", "test_error"))
    verdict = "still helps" if gained > 0 else "no longer helps"
    no_worse = int(np.sum(gap(numbers, "norm") <= gap(numbers, "dropout")))
    return (
        f"  Dropout on top of batch norm {verdict} here: {number(float(gained))} percentage points of test error.\n"
        f"  Batch norm alone has a gap no larger than dropout alone for {no_worse} of {len(numbers['seeds'])} seeds."
    )


def draw(figure: Figure, numbers: dict[str, Any]) -> None:
    figure.set_size_inches(10.5, 4)
    curves, errors, gaps = figure.subplots(1, 3, width_ratios=(1.3, 1, 1))
    for kind, (_, _, color, style, label) in KINDS.items():
        # The first look is before training, where all are equally wrong.
        band(curves, numbers["at"][1:], np.asarray(numbers[kind]["test_loss"])[:, 1:], color, label, linestyle=style)
    curves.set(title="Test loss", xlabel="training step", ylabel="cross-entropy (nats)", yscale="log")
    curves.legend()
    labels = [label for _, _, _, _, label in KINDS.values()]
    colors = [color for _, _, color, _, _ in KINDS.values()]
    bars(errors, labels, [100 * _last(numbers, kind, "test_error") for kind in KINDS], colors)
    errors.set(title="Test error, trained", ylabel="error (% of test images)")
    bars(gaps, labels, [gap(numbers, kind) for kind in KINDS], colors)
    gaps.set(title="Test − training loss, trained", ylabel="cross-entropy (nats)")
    for axes in (errors, gaps):
        axes.tick_params(axis="x", labelsize=8)
        axes.margins(y=0.12)
