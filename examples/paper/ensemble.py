"""ensemble -- study 3: the mean of six batch-normalized networks' probabilities beats the best of them."""

from itertools import combinations
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from paper.perceptron import perceptron
from paper.study import FIFTH, GREY, NORM, PLAIN, THIRD, Claim, Settings, band, progress
from paper.training import cross_entropy, predict, train

TITLE = "Six batch-normalized networks together beat the best of them"
STEPS, PAPER_STEPS = 500, 50_000
# Few images, so that there are errors left to correct, and many to count them on.
TRAINING = 100
RATE, BATCH = 0.1, 60
# As in the paper, members differ in the scale of their first weights and in dropout, beside their random numbers.
SCALES, DROPOUTS = {"o": 0.07, "^": 0.1}, {PLAIN: 0.0, FIFTH: 0.05, THIRD: 0.1}
MEMBERS = [(scale, dropout) for scale in SCALES.values() for dropout in DROPOUTS.values()]


def probabilities(logits: np.ndarray) -> np.ndarray:
    e = np.exp(logits - logits.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def scores(members: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Error rate and cross-entropy of the mean of the members' probabilities."""
    mean = members.mean(0)
    loss, _ = cross_entropy(np.log(np.maximum(mean, np.finfo(np.float32).tiny)), labels)
    return float(np.mean(mean.argmax(1) != labels)), loss


def run(settings: Settings) -> dict[str, Any]:
    steps = settings.count(STEPS, PAPER_STEPS)
    images = settings.images(train=BATCH, split=None if settings.paper else TRAINING).flat()
    numbers: dict[str, Any] = settings.header(images, steps) | {"members": MEMBERS, "error": [], "loss": []}
    with progress(len(MEMBERS) * len(settings.seeds) * steps, "ensemble") as tick:
        for seed in settings.seeds:
            found = []
            for place, (scale, dropout) in enumerate(MEMBERS):
                rng = np.random.default_rng((seed, place))
                inputs = images.x_train.shape[1]
                network = perceptron(inputs, rng, norm=True, scale=scale, dropout=dropout, nonlinearity="relu")
                train(network, images, rng, steps=steps, rate=RATE, batch=BATCH, tick=tick)
                found.append(probabilities(predict(network, images.x_test)))
            # Every ensemble of one member, of two, ... of all: of one are the members, of all is the paper's ensemble.
            of_size = [
                [scores(np.stack(chosen), images.y_test) for chosen in combinations(found, size)]
                for size in range(1, len(found) + 1)
            ]
            for key, column in (("error", 0), ("loss", 1)):
                numbers[key].append([[pair[column] for pair in pairs] for pairs in of_size])
    return numbers | {"note": f"Left: points by seed. Right: mean over all ensembles of a size; {settings.spread}."}


def claims(numbers: dict[str, Any]) -> list[Claim]:
    return [
        Claim(
            f"The ensemble {what} than its best member, chosen in hindsight.",
            quantity,
            [factor * (min(of_size[0]) - of_size[-1][0]) for of_size in numbers[key]],
            0,
        )
        for key, what, factor, quantity in (
            ("error", "errs less", 100, "percentage points"),
            ("loss", "has a lower cross-entropy", 1, "nats"),
        )
    ]


def table(numbers: dict[str, Any]) -> tuple[list[str], list[list[Any]]]:
    errors, losses = ([of_size[0] for of_size in numbers[key]] for key in ("error", "loss"))
    rows: list[list[Any]] = [
        [f"member, weights of {scale}, dropout {dropout:.0%}", *np.median([errors, losses], 1)[:, place].tolist()]
        for place, (scale, dropout) in enumerate(numbers["members"])
    ]
    best = [float(np.median([min(of_size[0]) for of_size in numbers[key]])) for key in ("error", "loss")]
    rows.append(["best member of each seed", *best])
    rows.append(["ensemble", *(float(np.median([of[-1][0] for of in numbers[key]])) for key in ("error", "loss"))])
    return ["median over seeds", "test error", "cross-entropy"], rows


def draw(figure: Figure, numbers: dict[str, Any]) -> None:
    figure.set_size_inches(10.5, 4.4)
    *points, size = figure.subplots(1, 3)
    seeds = len(numbers["seeds"])
    for axes, key, factor, title, unit in (
        (points[0], "error", 100, "Test error", "error (% of test images)"),
        (points[1], "loss", 1, "Test loss", "cross-entropy (nats)"),
    ):
        for place, of_size in enumerate(numbers[key]):
            for member, value in enumerate(of_size[0]):
                marker, color = list(SCALES)[member // len(DROPOUTS)], list(DROPOUTS)[member % len(DROPOUTS)]
                spread = (member - (len(of_size[0]) - 1) / 2) * 0.1
                axes.plot(place + spread, factor * value, marker, color=color, markersize=min(6, 36 / seeds), alpha=0.9)
            axes.hlines(factor * of_size[-1][0], place - 0.38, place + 0.38, color=NORM, linewidth=3)
        axes.set(title=title, xlabel="seed", ylabel=unit)
        apart = -(-seeds // 8)  # what a panel has room for
        axes.set_xticks(range(0, seeds, apart), list(map(str, numbers["seeds"][::apart])))
        axes.set_ylim(0, 1.12 * axes.get_ylim()[1])
        axes.grid(axis="x", visible=False)
    handles = [points[0].plot([], [], color=NORM, linewidth=3, label="ensemble of all six")[0]]
    for marker, scale in SCALES.items():
        handles += points[0].plot([], [], marker, color=GREY, label=f"member, weights of {scale}")
    for color, dropout in DROPOUTS.items():
        handles += points[0].plot([], [], "s", color=color, label=f"member, dropout {dropout:.0%}")
    points[1].legend(handles=handles, loc="lower left", fontsize=8)
    means = [[100 * np.mean(ensembles) for ensembles in of_size] for of_size in numbers["error"]]
    band(size, range(1, len(means[0]) + 1), means, NORM, marker="o", markersize=4)
    size.set(title="Test error by size", xlabel="networks in the ensemble", ylabel="error (% of test images)")
    size.set_ylim(0, 1.12 * size.get_ylim()[1])
