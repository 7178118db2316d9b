"""contour -- study 6: two weights whose inputs differ in scale: SGD zig-zags, and goes straight once normalized."""

from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from paper.data import Dataset
from paper.perceptron import Linear, Network
from paper.study import GREY, NORM, PLAIN, Claim, Settings, band, progress, ratios, steps_to, times_fewer
from paper.training import squared_error, train

import fastbn

WITHOUT = ("data", "paper")
TITLE = "Inputs of unequal scale make SGD zig-zag; normalized, it goes straight"
STEPS, SHORT_STEPS = 1000, 300
ROWS, BATCH = 2048, 256
# The second input is so many times larger than the first; the figure shows the contours of SHOWN.
RATIOS, SHOWN = (1, 2, 3, 5, 8, 12, 16), 5
# They are correlated, which normalizing each by itself leaves as it is; that is the matter of the study `whitening`.
CORRELATION = 0.5
# Rates, as parts of the rate at which the steepest direction would be solved in one step; from 2 on it diverges.
PARTS = (0.25, 0.5, 1.0, 1.4, 1.8)
NEAR = 0.003
KINDS = {"plain": (False, PLAIN, "inputs as they are"), "norm": (True, NORM, "inputs batch-normalized")}


def rows(ratio: float, seed: int) -> Dataset:
    """y = 4 x1 / std(x1) + 6 x2 / std(x2) + noise, where std(x1) = 1 and std(x2) = ratio."""
    rng = np.random.default_rng(seed)
    unit = rng.standard_normal((ROWS, 2), np.float32)
    unit[:, 1] = CORRELATION * unit[:, 0] + np.sqrt(1 - CORRELATION**2) * unit[:, 1]
    y = unit @ np.array([[4], [6]], np.float32) + np.float32(0.3) * rng.standard_normal((ROWS, 1), np.float32)
    x = unit * np.array([1, ratio], np.float32)
    return Dataset("synthetic", x, y, x, y)


def bowl(x: np.ndarray, y: np.ndarray) -> dict[str, Any]:
    """The loss of the linear fit over all rows: its curvature, its lowest point, and its condition number."""
    curvature = x.T @ x / len(x)
    lowest = np.linalg.solve(curvature, x.T @ y / len(x))[:, 0]
    return {"curvature": curvature, "lowest": lowest, "condition": float(np.linalg.cond(curvature))}


def excess(bowl: dict[str, Any], weights: np.ndarray) -> np.ndarray:
    """How far above its lowest the loss is at the weights (..., 2); it is a parabola, so this is exact."""
    away = weights - bowl["lowest"]
    return np.einsum("...i,ij,...j", away, bowl["curvature"], away) / 2


def descend(data: Dataset, norm: bool, part: float, steps: int, seed: int, tick: Callable[[int], Any]) -> Any:
    """SGD from the origin; the bowl, the path, and the excess of the loss as parts of that at the origin."""
    valley = bowl(fastbn.BatchNorm(2, affine=False)(data.x_train) if norm else data.x_train, data.y_train)
    linear = Linear(2, 1, 0, np.random.default_rng(seed), bias=False)
    network = Network([fastbn.BatchNorm(2, affine=False), linear] if norm else [linear])
    path = np.stack(
        train(
            network,
            data,
            np.random.default_rng(seed),
            steps=steps,
            rate=part / float(np.linalg.eigvalsh(valley["curvature"])[-1]),
            batch=BATCH,
            loss=squared_error,
            look=lambda _: linear.weight[:, 0].copy(),
            look_at=list(range(steps + 1)),
        )
    ).astype(float)
    tick(steps)
    return valley, path, excess(valley, path) / excess(valley, path[0])


def run(settings: Settings) -> dict[str, Any]:
    steps = settings.count(STEPS, short=SHORT_STEPS)
    name = (
        f"synthetic, {ROWS} rows y = 4 x₁/σ₁ + 6 x₂/σ₂ + noise of 0.3, x normal with correlation {CORRELATION}, "
        f"mini-batches of {BATCH}"
    )
    ratios = (1, SHOWN) if settings.short else RATIOS
    numbers: dict[str, Any] = settings.header(name, steps) | {"ratios": ratios, "parts": PARTS}
    numbers["note"] = (
        f"Above: seed {settings.seeds[0]}, σ₂ = {SHOWN} σ₁, contours of the loss, κ its condition number. "
        f"Below: {settings.spread}. "
        "Every run has the best of the rates "
        f"{', '.join(map(str, PARTS))} / λ, λ being the largest curvature of its own loss."
    )
    at = list(range(steps + 1))
    with progress(len(KINDS) * len(ratios) * len(settings.seeds) * len(PARTS) * steps, "contour") as tick:
        for kind, (norm, _, _) in KINDS.items():
            found = numbers[kind] = {
                "steps": [],
                "condition": [],
                "detour": [],
                "rate": [],
                "excess": [],
                "shown": None,
            }
            for ratio in ratios:
                for seed in settings.seeds:
                    data = rows(ratio, seed)
                    fits = [descend(data, norm, part, steps, seed, tick) for part in PARTS]
                    reached = [steps_to(at, -fit[2], -NEAR) for fit in fits]
                    best = int(np.argmin(reached))
                    valley, path, above = fits[best]
                    found["steps"].append(reached[best])
                    found["condition"].append(valley["condition"])
                    found["rate"].append(PARTS[best])
                    if ratio == SHOWN:
                        found["detour"].append(detour(valley, path, reached[best]))
                        found["excess"].append(above[:61])
                        found["shown"] = found["shown"] or valley | {"path": path[:61]}
            for key in ("steps", "condition", "rate"):
                found[key] = np.reshape(found[key], (len(ratios), len(settings.seeds))).T
    return numbers


def detour(valley: dict[str, Any], path: np.ndarray, reached: float) -> float:
    """How long the path to where the loss is near its lowest was, as a multiple of the straight line.

    Lengths are those of the inputs' standard deviations, in which both bowls are as wide as they are long.
    """
    path = path[: int(min(reached, len(path) - 1)) + 1] * np.sqrt(np.diag(valley["curvature"]))
    return float(np.linalg.norm(np.diff(path, axis=0), axis=1).sum() / np.linalg.norm(path[-1] - path[0]))


def _shown(numbers: dict[str, Any], kind: str, key: str) -> np.ndarray:
    """A number for each seed at the ratio whose contours are drawn."""
    return np.asarray(numbers[kind][key])[:, list(numbers["ratios"]).index(SHOWN)]


def claims(numbers: dict[str, Any]) -> list[Claim]:
    plain, norm = numbers["plain"], numbers["norm"]
    # Who never arrives would have taken more than all steps.
    slowest = np.minimum(np.asarray(plain["steps"])[:, -1], numbers["steps"])
    slower = [ratios(slowest, np.asarray(plain["steps"])[:, 0]), ratios(*np.asarray(norm["steps"])[:, [-1, 0]].T)]
    return [
        Claim(
            "Normalizing makes the narrow valley of the loss round.",
            "times smaller condition number",
            ratios(*(_shown(numbers, kind, "condition") for kind in KINDS)),
            10,
        ),
        Claim(
            "SGD at its best rate gets there in fewer steps.",
            "times fewer steps, at least",
            times_fewer(*(_shown(numbers, kind, "steps").tolist() for kind in KINDS), numbers["steps"]),
            2,
        ),
        Claim(
            "It zig-zags less.",
            "times shorter detour",
            ratios(plain["detour"], norm["detour"]),
            1,
        ),
        Claim(
            "The more the scales differ the slower it is without, but not with normalization.",
            "times the slowdown, at least",
            ratios(*slower),
            2,
        ),
    ]


def table(numbers: dict[str, Any]) -> tuple[list[str], list[list[Any]]]:
    table = []
    for kind, (_, _, label) in KINDS.items():
        found = {key: np.median(numbers[kind][key], 0) for key in ("condition", "rate", "steps")}
        for place, ratio in enumerate(numbers["ratios"]):
            table.append([f"{label}, σ₂ = {ratio} σ₁", *(float(found[key][place]) for key in found)])
    return ["", "condition number", "best rate × λ", f"steps to {NEAR:.1%} of the excess loss"], table


def draw(figure: Figure, numbers: dict[str, Any]) -> None:
    figure.set_size_inches(10.5, 7.6)
    above, (left, right) = figure.subplots(2, 2)
    units = {"plain": ("weight of x₁", "weight of x₂"), "norm": ("weight of normalized x₁", "weight of normalized x₂")}
    for axes, (kind, (_, color, label)) in zip(above, KINDS.items(), strict=True):
        shown, steps = numbers[kind]["shown"], float(_shown(numbers, kind, "steps")[0])
        length = f"{steps:.0f} steps" if np.isfinite(steps) else f"not in {numbers['steps']} steps"
        title = f"{label[0].upper()}{label[1:]}: {length}, κ = {shown['condition']:.0f}"
        _contours(axes, shown, steps, color)
        axes.set(title=title, xlabel=units[kind][0], ylabel=units[kind][1])
    for kind, (_, color, label) in KINDS.items():
        curves, style = np.asarray(numbers[kind]["excess"]), "-" if kind == "norm" else "--"
        band(left, range(curves.shape[1]), curves, color, label, linestyle=style)
        # Who does not arrive is drawn where the run ends.
        taken = np.minimum(numbers[kind]["steps"], numbers["steps"])
        band(right, numbers["ratios"], taken, color, label, linestyle=style, marker="o", markersize=4)
    left.axhline(NEAR, color=GREY, linewidth=1, linestyle=":")
    left.set(
        title=f"Loss above its lowest, σ₂ = {SHOWN} σ₁", yscale="log", xlabel="SGD step", ylabel="part of the start's"
    )
    left.legend()
    right.set(
        title=f"Steps to {NEAR:.1%} of it, by how unequal the inputs are",
        xscale="log",
        yscale="log",
        xlabel="standard deviation of x₂ / that of x₁",
        ylabel="SGD steps",
        xticks=numbers["ratios"],
        xticklabels=map(str, numbers["ratios"]),
    )
    right.minorticks_off()


def _contours(axes: Axes, shown: dict[str, Any], steps: float, color: str) -> None:
    """Both axes to the same scale, since SGD goes at right angles to the contours only there."""
    lowest, path = np.asarray(shown["lowest"]), np.asarray(shown["path"])
    path = path[: int(min(steps, len(path) - 1)) + 1]
    reach = 1.3 * np.abs(path - lowest).max() * np.array([1.25, 1])
    grid = np.stack(np.meshgrid(*(np.linspace(-r, r, 201) for r in reach)), -1) + lowest
    level = excess(shown, grid) / excess(shown, path[0])
    levels = [NEAR, 0.02, 0.08, 0.2, 0.5, 1, 2, 4, 8, 16, 32]
    shades = [str(shade) for shade in np.linspace(1, 0.75, len(levels) + 1)]
    axes.contourf(*np.moveaxis(grid, -1, 0), level, levels=[0, *levels, 1e9], colors=shades)
    axes.contour(*np.moveaxis(grid, -1, 0), level, levels=levels, colors=GREY, linewidths=0.5)
    axes.plot(*path.T, color=color, marker="o", markersize=3.5, linewidth=1.4)
    axes.plot(*lowest, color="black", marker="+", markersize=10)
    axes.annotate("start", path[0], (-5, 0), textcoords="offset points", ha="right", va="center")
    axes.set_aspect("equal")
    axes.grid(visible=False)
