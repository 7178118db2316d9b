"""inception -- study 2: a small Inception at one, five and thirty times the learning rate, with ReLU and sigmoids."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from paper.convolution import inception, torch
from paper.data import Dataset
from paper.study import (
    FIFTH,
    FOURTH,
    GREY,
    NORM,
    PLAIN,
    SIXTH,
    THIRD,
    Claim,
    Settings,
    band,
    progress,
    steps_to,
    times_fewer,
)
from paper.training import accuracy, evaluation_steps, train

TITLE = "Batch norm takes an Inception to the baseline's accuracy in fewer steps, and at rates that ruin the baseline"
# Weights of variance 2 / fan-in, as suits ReLU.
GAIN, BATCH, MOMENTUM = float(np.sqrt(2)), 32, 0.9
# As in the paper, the Baseline's rate is about the largest that suits it.
RATE = 0.06
STEPS, SHORT_STEPS, PAPER_STEPS = 200, 120, 50_000
CHANCE, LEARNS = 0.25, 0.5


@dataclass(frozen=True)
class Recipe:
    """One way to train; `modified` are section 4.2.1's: no dropout, L2 / 5, decay six times as fast, new batches."""

    label: str
    color: str
    norm: bool
    factor: float = 1
    nonlinearity: str = "relu"
    modified: bool = False


RECIPES = {
    "plain": Recipe("Baseline", PLAIN, False),
    "plain_x5": Recipe("Baseline-x5", FIFTH, False, 5),
    "norm": Recipe("BN-Baseline", NORM, True),
    "norm_x5": Recipe("BN-x5", THIRD, True, 5, modified=True),
    "norm_x30": Recipe("BN-x30", SIXTH, True, 30, modified=True),
    "norm_sigmoid": Recipe("BN-x5-Sigmoid", FOURTH, True, 5, "sigmoid", modified=True),
    "plain_sigmoid": Recipe("x5-Sigmoid without BN", GREY, False, 5, "sigmoid", modified=True),
}


def learn(images: Dataset, seed: int, recipe: Recipe, steps: int, at: list[int], tick: Any) -> list[float]:
    """The test accuracy of one network before each of the steps `at`."""
    rng = np.random.default_rng(seed)
    # Dropout is PyTorch's, and so are its random numbers.
    torch.manual_seed(seed)
    dropout, l2, decays = (0.0, 2e-5, 6) if recipe.modified else (0.4, 1e-4, 1)
    network = inception(
        images.shape, rng, norm=recipe.norm, nonlinearity=recipe.nonlinearity, dropout=dropout, gain=GAIN
    )

    def look(step: int) -> float:
        # Where training diverged, the logits are not finite.
        with np.errstate(over="ignore", invalid="ignore"):
            return accuracy(network, images.x_test, images.y_test)

    return train(
        network,
        images,
        rng,
        steps=steps,
        rate=RATE * recipe.factor,
        batch=BATCH,
        momentum=MOMENTUM,
        l2=l2,
        decay=0.5,
        decay_every=max(1, steps // decays),
        reshuffle=recipe.modified,
        look=look,
        look_at=at,
        tick=tick,
    )


def run(settings: Settings) -> dict[str, Any]:
    torch.set_num_threads(1)
    images, steps = settings.images(train=BATCH), settings.count(STEPS, PAPER_STEPS, SHORT_STEPS)
    at = evaluation_steps(steps, 12 if settings.short else 20)
    numbers: dict[str, Any] = settings.header(images, steps) | {"rate": RATE, "at": at}
    with progress(len(RECIPES) * len(settings.seeds) * steps, "inception") as tick:
        for name, recipe in RECIPES.items():
            numbers[name] = [learn(images, seed, recipe, steps, at, tick) for seed in settings.seeds]
    return numbers


def reached(numbers: dict[str, Any], name: str, mark: str) -> list[float]:
    """The steps each seed takes to the best accuracy of the network `mark` of the same seed."""
    pairs = zip(numbers[name], numbers[mark], strict=True)
    return [steps_to(numbers["at"], curve, max(other)) for curve, other in pairs]


def fewer(numbers: dict[str, Any], name: str) -> list[float]:
    """How many times fewer steps than the Baseline it takes to the Baseline's best."""
    return times_fewer(reached(numbers, "plain", "plain"), reached(numbers, name, "plain"), numbers["at"][-1])


def claims(numbers: dict[str, Any]) -> list[Claim]:
    def last(name: str) -> list[float]:
        return [curve[-1] for curve in numbers[name]]

    steps, right = "times fewer steps", "test accuracy at the end"
    return [
        Claim(
            "BN-Baseline reaches the Baseline's best accuracy in fewer steps.",
            steps,
            fewer(numbers, "norm"),
            1,
        ),
        Claim(
            "BN-x5 goes beyond BN-Baseline's best.",
            "gain in best accuracy",
            [max(five) - max(one) for five, one in zip(numbers["norm_x5"], numbers["norm"], strict=True)],
            0,
        ),
        Claim(
            "BN-x30, too, reaches the Baseline's best accuracy in fewer steps.",
            steps,
            fewer(numbers, "norm_x30"),
            1,
        ),
        Claim(
            "And it ends beyond it.",
            "gain in accuracy",
            [end - max(curve) for end, curve in zip(last("norm_x30"), numbers["plain"], strict=True)],
            0,
        ),
        Claim("Five times the rate ruins the network without.", right, last("plain_x5"), CHANCE, above=False),
        Claim("Sigmoids learn with batch norm.", right, last("norm_sigmoid"), LEARNS),
        Claim("Without it they stay near chance.", right, last("plain_sigmoid"), CHANCE, above=False),
    ]


def table(numbers: dict[str, Any]) -> tuple[list[str], list[list[Any]]]:
    rows = []
    for name, recipe in RECIPES.items():
        row = [numbers["rate"] * recipe.factor]
        row += [float(np.median(reached(numbers, name, mark))) for mark in ("plain", "norm")]
        row += [float(np.median([of(curve) for curve in numbers[name]])) for of in (max, lambda curve: curve[-1])]
        rows.append([recipe.label, *row])
    heads = ["learning rate", "steps to the Baseline's best", "to BN-Baseline's", "best test accuracy", "last"]
    return ["median over seeds", *heads], rows


def draw(figure: Figure, numbers: dict[str, Any]) -> None:
    figure.set_size_inches(10.5, 4.1)
    panels = {
        "ReLU": [name for name, recipe in RECIPES.items() if recipe.nonlinearity == "relu"],
        "Sigmoids": [name for name, recipe in RECIPES.items() if recipe.nonlinearity == "sigmoid"],
    }
    for axes, (title, names) in zip(
        figure.subplots(1, 2, sharey=True, width_ratios=(1.7, 1)), panels.items(), strict=True
    ):
        for name in names:
            recipe = RECIPES[name]
            line = "-" if recipe.norm else "--"
            band(axes, numbers["at"], numbers[name], recipe.color, recipe.label, linestyle=line)
        best = float(np.median([max(curve) for curve in numbers["plain"]]))
        axes.axhline(best, color="black", linewidth=0.8, linestyle=(0, (1, 2)), label="the Baseline's best")
        axes.set(title=title, xlabel="training steps", ylim=(0, 1.02), xlim=(0, numbers["steps"]))
    figure.axes[0].set_ylabel("test accuracy (fraction correct)")
    found = {label: line for axes in figure.axes for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(found.values(), found.keys(), loc="outside right center")
