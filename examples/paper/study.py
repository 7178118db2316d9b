"""study -- what every study is made of: its settings, its claims, its table, its figure and its numbers."""

import json
import os
import re
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from paper.data import Dataset, load
from PIL import Image
from threadpoolctl import threadpool_limits
from tqdm import tqdm

# The colours of Okabe and Ito, which stay apart for colour-blind readers; the same meaning in every figure.
PLAIN, NORM, THIRD, FOURTH, FIFTH, SIXTH = "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
GREY = "#666666"
STYLE = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "figure.dpi": 110,
    "font.size": 9.5,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "lines.linewidth": 1.7,
    "svg.hashsalt": "fastbn",
}


def studies() -> dict[str, str]:
    """The studies by number, and what they are about: every module here that opens with `name -- study N: subject`.

    They are not imported, for some need what not everybody has.
    """
    found = []
    for path in Path(__file__).parent.glob("*.py"):
        opening = re.match(r'"""(\w+) -- study (\d+): (.*)"""', path.read_text(encoding="utf-8"))
        if opening:
            found.append((int(opening[2]), path.stem, f"{opening[2]:>2}. {opening[3]}"))
    return {name: subject for _, name, subject in sorted(found)}


@dataclass(frozen=True)
class Settings:
    """What the command line chose. `steps` is None for the study's own default."""

    path: str | None = None
    steps: int | None = None
    seeds: tuple[int, ...] = (0, 1, 2)
    paper: bool = False
    short: bool = False

    def images(self) -> Dataset:
        return load(self.path)

    @property
    def spread(self) -> str:
        """What a curve and its band are, for a figure's foot."""
        return f"median and range of {len(self.seeds)} seeds" if len(self.seeds) > 1 else f"seed {self.seeds[0]}"

    def header(self, data: Dataset | str, steps: int) -> dict[str, Any]:
        """What every study's numbers begin with; `data` is a data set, or what a synthetic one is."""
        name = data if isinstance(data, str) else data.name
        return {"data": name, "seeds": list(self.seeds), "steps": steps, "note": f"Curves: {self.spread}."}

    def count(self, default: int, paper: int | None = None, short: int | None = None) -> int:
        """How many steps to train: what was asked for, the paper's number, the short one, or the default."""
        chosen = paper if self.paper else short if self.short else None
        return next(steps for steps in (self.steps, chosen, default) if steps is not None)


@dataclass(frozen=True)
class Claim:
    """A sentence that holds if a measured quantity is beyond its bound for every seed."""

    text: str
    quantity: str
    values: list[float]
    bound: float
    above: bool = True
    timing: bool = False

    @property
    def holds(self) -> bool:
        return all(value > self.bound if self.above else value < self.bound for value in self.values)

    def __str__(self) -> str:
        values = ", ".join(number(value) for value in self.values)
        sign = ">" if self.above else "<"
        verdict = "holds" if self.holds else "DOES NOT HOLD"
        return f"{self.text}\n    {self.quantity}: {values} (wanted {sign} {number(self.bound)}): {verdict}"


@contextmanager
def progress(total: int, description: str) -> Iterator[Any]:
    """A progress bar; yields its tick."""
    with tqdm(total=total, desc=description, unit="step", leave=False, disable=None) as bar:
        yield bar.update


def perform(study: ModuleType, settings: Settings, out: Path, form: str = "png") -> list[Claim]:
    """Run one study, print its table and claims, and leave its figure and numbers in `out`."""
    name = study.__name__.rpartition(".")[2]
    # Matrices of 60 rows gain nothing from a second thread of the BLAS, and lose much where the machine is busy.
    with threadpool_limits(1, "blas"):
        numbers = study.run(settings)
    claims = study.claims(numbers)
    print(f"\n{study.TITLE}\nData: {numbers['data']}; seeds {', '.join(map(str, numbers['seeds']))}\n")
    print(format_table(*study.table(numbers)))
    print()
    for claim in claims:
        print(f"  {claim}")
    if hasattr(study, "epilogue"):
        print(f"\n{study.epilogue(numbers)}")
    out.mkdir(parents=True, exist_ok=True)
    record = {"study": name, **numbers, "claims": [asdict(claim) | {"holds": claim.holds} for claim in claims]}
    (out / f"{name}.json").write_text(json.dumps(_plain(record), indent=1) + "\n")
    save(study.draw, numbers, study.TITLE, out / f"{name}.{form}")
    print(f"\n  {out / name}.json, .{form}")
    return claims


def save(draw: Any, numbers: dict[str, Any], title: str, path: Path) -> None:
    """Draw one figure in the house style; its foot names the data and the seeds."""
    with mpl.rc_context(STYLE):
        figure = Figure(layout="constrained")
        draw(figure, numbers)
        figure.suptitle(title, x=0.01, ha="left", fontsize=12, weight="bold")
        figure.supxlabel(_foot(numbers, figure.get_figwidth()), x=0.01, ha="left", fontsize=8, color=GREY)
        # No date in the file: the same numbers give the same bytes.
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    if path.suffix == ".png":
        # A palette is a third of the size, and looks the same.
        with Image.open(path) as image:
            small = image.convert("RGB").quantize(256)
        small.save(path, optimize=True)


def _foot(numbers: dict[str, Any], width: float) -> str:
    return "\n".join(textwrap.wrap(f"Data: {numbers['data']}. {numbers['note']}", int(width * 17)))


def band(axes: Axes, x: Sequence[float], runs: Any, color: str, label: str | None = None, **line: Any) -> None:
    """One curve per seed in `runs`, drawn as their median and their range."""
    runs = np.asarray(runs, float)
    axes.plot(x, np.median(runs, 0), color=color, label=label, **line)
    axes.fill_between(x, runs.min(0), runs.max(0), color=color, alpha=0.2, linewidth=0)


def bars(axes: Axes, labels: Sequence[str], runs: Any, colors: Sequence[str]) -> None:
    """One bar per label at the median over seeds, a whisker over their range, and the number above."""
    runs = np.asarray(runs, float)
    middle = np.median(runs, 1)
    reach = np.stack([middle - runs.min(1), runs.max(1) - middle])
    axes.bar(labels, middle, color=colors, width=0.65)
    axes.errorbar(labels, middle, reach, fmt="none", ecolor="black", elinewidth=1, capsize=3)
    for place, (value, top) in enumerate(zip(middle, runs.max(1), strict=True)):
        axes.annotate(number(value), (place, top), (0, 4), textcoords="offset points", ha="center", fontsize=8)
    axes.grid(axis="x", visible=False)


def steps_to(steps: Sequence[int], curve: Sequence[float], level: float) -> float:
    """The first step at which the curve reaches the level; infinity if it never does."""
    return next((float(step) for step, value in zip(steps, curve, strict=True) if value >= level), float("inf"))


def number(value: float) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, int | np.integer) or (value and abs(value) < 1e6 and float(value).is_integer()):
        return f"{int(value)}"
    return f"{value:.3g}" if not 0.1 <= abs(value) < 1000 else f"{value:.4g}"


def format_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Columns lined up: the first to the left, the numbers to the right."""
    cells = [list(header), *([number(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  "
        + "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    ]
    lines.insert(1, "  " + "  ".join("-" * width for width in widths))
    return os.linesep.join(lines)


def _plain(value: Any) -> Any:
    """The same as JSON can say it: lists for arrays, null for what is not finite, and the objects' own words."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value if value is None or isinstance(value, str | int | float) else str(value)
