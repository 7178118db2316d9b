"""study -- what every study is made of: its settings, its claims, its table, its figure and its numbers."""

import json
import os
import re
import tempfile
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
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
COLOURS = (PLAIN, NORM, THIRD, FOURTH, FIFTH, SIXTH, GREY)
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


def without(name: str) -> tuple[str, ...]:
    """The options that a study has no use for, such as "data": its line `WITHOUT = ...`, read without an import."""
    text = Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8")
    line = re.search(r"^WITHOUT = (.*)$", text, re.MULTILINE)
    return tuple(re.findall(r'"(\w+)"', line[1])) if line else ()


@dataclass(frozen=True)
class Settings:
    """What the command line chose. `steps` is None for the study's own default."""

    path: str | None = None
    steps: int | None = None
    seeds: tuple[int, ...] = (0, 1, 2)
    paper: bool = False
    short: bool = False

    def images(self, train: int = 2, test: int = 1, varying: int = 1, split: int | None = None) -> Dataset:
        """What to learn, with at least as many images to train on and to test on, and pixels that vary, as said.

        With `split` that many are to train on, and all others to test on.
        """
        images = load(self.path)
        if split is not None:
            images, train = images.split(split), max(split, train)
        images.require(train, test, varying)
        return images

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
        chosen = paper if paper is not None and self.paper else short if self.short else None
        return next(steps for steps in (self.steps, chosen, default) if steps is not None)


@dataclass(frozen=True)
class Claim:
    """A sentence that holds if a measured quantity is finite and beyond its bound for every seed."""

    text: str
    quantity: str
    values: list[float]
    bound: float
    above: bool = True
    timing: bool = False

    @property
    def holds(self) -> bool:
        return all(
            np.isfinite(value) and (value > self.bound if self.above else value < self.bound) for value in self.values
        )

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


def reserve(out: Path, names: Iterable[str]) -> None:
    """Raise ValueError unless files of these names can be written into the folder `out`; leaves nothing behind."""
    made, path = [folder for folder in (out, *out.parents) if not folder.exists()], out
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=out):
            pass
        for name in names:
            path = out / name
            if path.exists():
                path.open("r+b").close()
    except OSError as error:
        raise ValueError(f"cannot write to {path}: {error.strerror or error}") from error
    finally:
        for folder in made:
            with suppress(OSError):
                folder.rmdir()


def heading(title: str, claims: Sequence[Claim]) -> str:
    """The title says what all claims together say; where one does not hold it is but a question."""
    failed = sum(not claim.holds for claim in claims)
    return f"{title}?\nIn this run {failed} of {len(claims)} claims did not hold" if failed else title


def perform(study: ModuleType, settings: Settings, out: Path, form: str = "png") -> list[Claim]:
    """Run one study, leave its figure and numbers in `out`, and print its table and claims."""
    name = study.__name__.rpartition(".")[2]
    # Matrices of 60 rows gain nothing from a second thread of the BLAS, and lose much where the machine is busy.
    with threadpool_limits(1, "blas"):
        numbers = study.run(settings)
    claims = study.claims(numbers)
    title = heading(study.TITLE, claims)
    out.mkdir(parents=True, exist_ok=True)
    record = {"study": name, **numbers, "claims": [asdict(claim) | {"holds": claim.holds} for claim in claims]}
    (out / f"{name}.json").write_text(json.dumps(_plain(record), indent=1) + "\n")
    foot = f"Data: {numbers['data']}. {numbers['note']}"
    if refuted := [claim.text for claim in claims if not claim.holds]:
        foot += f" Did not hold: {' '.join(refuted)}"
    save(study.draw, numbers, title, foot, out / f"{name}.{form}")
    # Last of all, for there may be nobody to read it any more.
    print(f"\n{title}\nData: {numbers['data']}; seeds {', '.join(map(str, numbers['seeds']))}\n")
    print(format_table(*study.table(numbers)))
    print()
    for claim in claims:
        print(f"  {claim}")
    if hasattr(study, "epilogue"):
        print(f"\n{study.epilogue(numbers)}")
    print(f"\n  {out / name}.json, .{form}", flush=True)
    return claims


def save(draw: Any, numbers: dict[str, Any], title: str, foot: str, path: Path) -> None:
    """Draw one figure in the house style; its foot names the data and the seeds."""
    with mpl.rc_context(STYLE):
        figure = Figure(layout="constrained")
        draw(figure, numbers)
        figure.suptitle(title, x=0.01, ha="left", fontsize=12, weight="bold")
        # As many letters as the width has room for.
        foot = "\n".join(textwrap.wrap(foot, int(figure.get_figwidth() * 17)))
        figure.supxlabel(foot, x=0.01, ha="left", fontsize=8, color=GREY)
        # No date in the file: the same numbers give the same bytes.
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    if path.suffix == ".png":
        # A palette is a third of the size, and looks the same.
        with Image.open(path) as image:
            small = reduced(image.convert("RGB"))
        small.save(path, optimize=True)


def reduced(image: Image.Image) -> Image.Image:
    """The same with a palette: the house's colours and the commonest as they are, what is between them nearly so."""
    pixels = np.asarray(image).reshape(-1, 3)
    codes, places, counts = np.unique(pixels @ np.array([65536, 256, 1]), return_inverse=True, return_counts=True)
    kept = np.isin(codes, [int(colour[1:], 16) for colour in COLOURS])
    kept[np.argsort(-counts, kind="stable")[:64]] = True
    # The kept come first in the palette, then such that all others are near one of them, however few pixels have them.
    indices = (np.cumsum(kept) - 1).astype(np.uint8)[places]
    palette = [part for code in codes[kept] for part in int(code).to_bytes(3, "big")]
    others = ~kept[places]
    if others.any():
        cut = Image.fromarray(pixels[None, others]).quantize(256 - int(kept.sum()), Image.Quantize.MAXCOVERAGE)
        indices[others] = np.asarray(cut)[0] + kept.sum()
        palette += cut.getpalette()
    small = Image.fromarray(indices.reshape(image.height, image.width))
    small.putpalette(palette)
    return small


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


def ratios(above: Any, below: Any) -> list[float]:
    """One by the other for each seed; where that has no meaning it is not a number, which supports no claim."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.divide(np.asarray(above, float), np.asarray(below, float)).tolist()


def times_fewer(slow: Sequence[float], fast: Sequence[float], last: float) -> list[float]:
    """At least how many times fewer steps, for each seed; 0 where the fast never arrives.

    Where the slow does not it would have taken more than all steps, `last`. A mark that is met before the first step
    says nothing of training, and counts for as little as none.
    """
    return [min(a, last) / b if 0 < b < float("inf") else 0.0 for a, b in zip(slow, fast, strict=True)]


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
