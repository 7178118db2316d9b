"""report -- results as tables, as JSON and as a picture; the machine they are from; a progress bar meanwhile."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import json
import math
import os
import platform
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import geometric_mean
from typing import Any, TypeVar

import fastbn
from fastbn import _native
from fastbn._bench.cases import Case, format_shape
from fastbn._bench.engine import Group, Result
from fastbn._bench.peers import Copy, Fastbn, Peer
from fastbn._progress import on_terminal

T = TypeVar("T")
Section = tuple[Case, list[Group]]

UNITS = {
    "copy": "multiples of the streaming copy",
    "time": "microseconds",
    "element": "picoseconds an element",
}
RIGHT = "All results are correct."

MARKED = re.compile(r"<!-- table: python -m fastbn bench.*?-->\n.*?<!-- end of table -->", re.DOTALL)


def progress(items: Sequence[T]) -> Iterator[T]:
    """Show how far a loop is, on a terminal: tqdm if it is installed, else a plain bar."""
    if not on_terminal():
        yield from items
        return
    try:
        tqdm: Any = importlib.import_module("tqdm").tqdm
    except ImportError:
        for i, item in enumerate(items):
            bar = "#" * (20 * i // len(items))
            print(f"\r[{bar:20}] {i}/{len(items)} {item!s:55}", end="", file=sys.stderr, flush=True)
            yield item
        print(f"\r{'':90}\r", end="", file=sys.stderr)
        return
    with tqdm(items, file=sys.stderr, leave=False) as shown:
        for item in shown:
            shown.set_description(str(item))
            yield item


def machine(peers: Sequence[Peer] = ()) -> dict[str, Any]:
    """Gather what a reader must know to judge the figures."""
    return {
        "cpu": _cpu(),
        "cpus": os.cpu_count(),
        "caches": _native.machine(),
        "isa": _native.isa(),
        "threads": fastbn.get_num_threads(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "system": platform.platform(),
        "versions": {"Python": platform.python_version()} | {p.name: _version(p) for p in peers},
    }


def _version(peer: Peer) -> str:
    return fastbn.__version__ if peer.package == "fastbn" else importlib.metadata.version(peer.package)


def describe(info: dict[str, Any]) -> str:
    """Put the machine in one line."""
    versions = ", ".join(f"{name} {version}" for name, version in info["versions"].items())
    return f"{info['cpu']}, {info['isa']}, {info['threads']} threads; {versions}"


def free_memory() -> int | None:
    """Bytes that a program may still have, where the system tells."""
    try:
        return int(re.findall(r"^MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)[0]) * 1024
    except (OSError, IndexError):
        return None


class Others:
    """How busy the machine is with other programs than this, where the system tells."""

    def __init__(self) -> None:
        self._start = self._now()

    def share(self) -> float | None:
        """Their share of all processors since the start, what a hypervisor took included."""
        now = self._now()
        if now is None or self._start is None or now[1] == self._start[1]:
            return None
        return max(0.0, (now[0] - self._start[0]) / (now[1] - self._start[1]))

    def _now(self) -> tuple[float, float] | None:
        """Seconds of others, and of all processors, idle or not."""
        try:
            words = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
        except OSError:
            return None
        user, nice, system, idle, wait, *rest = (int(word) / os.sysconf("SC_CLK_TCK") for word in words)
        busy = user + nice + system + sum(rest)
        return busy - sum(os.times()[:4]), busy + idle + wait


def _sections(groups: Sequence[Group]) -> list[Section]:
    found: dict[Any, list[Group]] = {}
    for group in groups:
        found.setdefault(group.case.section, []).append(group)
    return [(members[0].case, members) for members in found.values()]


def _columns(members: Sequence[Group]) -> dict[str, list[Result | None]]:
    """Each contender's results, shape by shape."""
    labels = dict.fromkeys(r.contender for g in members for r in g.results[1:])
    return {label: [g.of(label) for g in members] for label in labels}


def plain(label: str) -> str:
    """Name a contender without its form."""
    return label.removesuffix(" fresh")


def _mean(values: Sequence[float | None]) -> str:
    """A mean over some of the shapes could not be compared with one over all of them."""
    known = [v for v in values if v is not None]
    return f"{geometric_mean(known):.2f}" if len(known) == len(values) else ""


def _multiples(results: Sequence[Result | None]) -> list[float | None]:
    return [r.multiple if r else None for r in results]


def tables(groups: Sequence[Group], unit: str | None = None) -> str:
    """All sections in a unit, else multiples of the copy, microseconds where calls are small; then the means."""
    parts = []
    for case, members in _sections(groups):
        columns = _columns(members)
        chosen = unit or ("time" if case.small else "copy")
        scale, title = (1e6, "us") if case.small else (1e3, "ms")
        rows = [["", f"copy/{title}", *columns]]
        for i, group in enumerate(members):
            cells = [_cell(group.case, column[i], chosen) for column in columns.values()]
            rows.append([format_shape(group.case.shape), f"{group.results[0].median * scale:.3g}", *cells])
        if len(members) > 1 and chosen == "copy":
            rows.append(["geometric mean", "", *(_mean(_multiples(c)) for c in columns.values())])
        said = UNITS[chosen] + f", limit {case.limit:g}" * (chosen == "copy")
        parts.append("\n".join([f"{case.title}: {said}", *aligned(rows)]))
    if len(_sections(groups)) > 1 and (rows := means(groups)):
        parts.append("\n".join(["geometric means of the multiples", *aligned(rows)]))
    return "\n\n".join(parts)


def _cell(case: Case, result: Result | None, unit: str) -> str:
    if result is None:
        return "-"
    value = {
        "copy": result.multiple,
        "time": result.median * 1e6,
        "element": result.median * 1e12 / math.prod(case.shape),
    }[unit]
    return (f"{value:.2f}" if value < 1000 else f"{value:.0f}") + "!" * (result.correct is False)


def ratios(groups: Sequence[Group], axis: str) -> str:
    """All sections: times over those of the contender that is the same but for the axis, or over the fastest peer."""
    parts = []
    for case, members in _sections(groups):
        found = [_ratios(group, axis) for group in members]
        labels = dict.fromkeys(label for of_group in found for label in of_group)
        if not labels:
            continue
        columns = [[of_group.get(label) for of_group in found] for label in labels]
        values = [[pair[0] if pair else None for pair in column] for column in columns]
        worst = [max((v, i) for i, v in enumerate(column) if v is not None) for column in values]
        rows = [["", *labels]]
        for i, group in enumerate(members):
            rows.append([format_shape(group.case.shape), *("-" if v[i] is None else f"{v[i]:.2f}" for v in values)])
        rows += [
            ["geometric mean", *map(_mean, values)],
            ["largest", *(f"{value:.2f}" for value, _ in worst)],
            ["which is of", *(format_shape(members[i].case.shape) for _, i in worst)],
        ]
        if axis == "peers":
            over = "the fastest peer"
            names = [next((name for _, name in of_group.values()), "-") for of_group in found]
            rows = [[*row, name] for row, name in zip(rows, ["which is", *names, "", "", ""], strict=True)]
        else:
            over = {"out": "a given out=", "reader": "no reader"}.get(axis) or case.mark(axis)
        parts.append("\n".join([f"{case.title}: times over those of {over}", *aligned(rows)]))
    return "\n\n".join(parts) or f"There is nothing to compare: --ratio {axis} found one of everything."


def _ratios(group: Group, axis: str) -> dict[str, tuple[float, str]]:
    """The ratio of each contender, and over whom."""
    if axis != "peers":
        found = {r.contender: (r.ratio, r.over) for r in group.results if r.ratio is not None}
        # That a copy of half as much takes half as long is no news.
        return {k: v for k, v in found.items() if axis != "dtypes" or not k.startswith(Copy.name)}
    ours = [r for r in group.results[1:] if r.peer == Fastbn.name]
    peers = [r for r in group.results[1:] if r.peer != Fastbn.name]
    best = min(peers, key=lambda r: r.multiple, default=None)
    return {r.contender: (r.multiple / best.multiple, best.contender) for r in ours} if best else {}


def verdict(groups: Sequence[Group], others: float | None) -> str:
    """What to think of the figures."""
    wrong = sum(r.correct is False for g in groups for r in g.results)
    lines = [f"! beside a time: so far from float64 that rounding is no excuse ({wrong})" if wrong else RIGHT]
    if others is not None and others > 0.05:
        lines.append(f"Others had {others:.0%} of the processors meanwhile: measure again when they are gone.")
    return "\n".join(["", *lines])


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]).rstrip()
        for row in rows
    ]


def means(groups: Sequence[Group]) -> list[list[str]]:
    """Geometric means: a row for each contender, a column for each section about memory traffic."""
    sections = [(case, members) for case, members in _sections(groups) if not case.small]
    columns = [
        # A contender that has both forms is shown with out=.
        {plain(label): _mean(_multiples(results)) for label, results in reversed(_columns(members).items())}
        for _, members in sections
    ]
    errors: dict[str, float] = {}
    for result in (r for _, members in sections for g in members for r in g.results[1:]):
        label = plain(result.contender)
        errors[label] = max(errors.get(label, 0), result.error or 0)
    rows = [
        ["", *(case.title.replace(", float32", "") for case, _ in sections), "error, ulp"],
        ["limit", *(f"{case.limit:.2f}" for case, _ in sections), ""],
    ]
    rows += [[label, *(c.get(label, "") for c in columns), f"{error:.3g}"] for label, error in errors.items()]
    return rows if sections else []


def markdown(groups: Sequence[Group], info: dict[str, Any]) -> str:
    """Make the means a page's table."""
    title, *rows = means(groups)
    rows = [title, ["---", *["--:"] * (len(title) - 1)], *rows]
    shapes = len({g.case.shape for g in groups if not g.case.small})
    note = f"Geometric means over {shapes} shapes, and the largest error against float64. {describe(info)}."
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + f"\n\n{note}"


def write_markdown(path: Path, groups: Sequence[Group], info: dict[str, Any], command: str) -> None:
    """Put the table between its marks, and the command that it is from into the first."""
    table = f"<!-- table: {command} -->\n{markdown(groups, info)}\n<!-- end of table -->"
    path.write_text(MARKED.sub(lambda _: table, path.read_text()))


def write_json(path: Path, groups: Sequence[Group], info: dict[str, Any]) -> None:
    """Write every figure."""
    found = [
        dataclasses.asdict(g.case)
        | {"bytes": g.case.nbytes, "limit": g.case.limit, "results": [dataclasses.asdict(r) for r in g.results]}
        for g in groups
    ]
    path.write_text(json.dumps({"machine": info, "groups": found}, indent=1) + "\n")


def write_picture(path: Path, groups: Sequence[Group], info: dict[str, Any]) -> None:
    """Draw bars against the roof: a panel for each section about memory traffic, of the largest thread count."""
    most = max(g.case.threads for g in groups)
    panels = [(c, members) for c, members in _sections(groups) if not c.small and c.threads == most]
    figures: Any = importlib.import_module("matplotlib.figure")
    labels = dict.fromkeys(plain(label) for _, members in panels for label in _columns(members))
    widest = max(len(members) for _, members in panels) * (len(labels) + 1)
    figure = figures.Figure(figsize=(min(12, max(7, 0.17 * widest)), 1 + 2.2 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), squeeze=False)[:, 0]
    for ax, (case, members) in zip(axes, panels, strict=True):
        _panel(ax, case, members, {label: f"C{i}" for i, label in enumerate(labels)})
    handles = {h.get_label(): h for ax in axes for h in ax.containers}
    figure.legend(handles.values(), handles, loc="outside upper center", ncols=min(6, len(handles)), frameon=False)
    figure.supxlabel(f"Time in multiples of a streaming copy of the tensor. {describe(info)}", fontsize=7)
    figure.savefig(path, dpi=110)


def _panel(ax: Any, case: Case, members: Sequence[Group], colours: dict[str, str]) -> None:
    columns = _columns(members)
    width = 0.85 / len(columns)
    # Bars far above the limit are cut and carry their figure, or nobody could read the others.
    top = 2.5 * case.limit + 1
    for i, (label, results) in enumerate(columns.items()):
        at = [j + (i - (len(columns) - 1) / 2) * width for j in range(len(members))]
        heights = [r.multiple if r else 0.0 for r in results]
        ax.bar(at, [min(h, top) for h in heights], width, color=colours[plain(label)], label=plain(label))
        for x, h in zip(at, heights, strict=True):
            if h > top:
                ax.text(x, top, f"{h:.0f}", ha="center", va="bottom", fontsize=5)
    for y, style in ((1, "-"), (case.limit, ":")):
        ax.axhline(y, color="black", linewidth=0.8, linestyle=style)
    ax.set_ylim(0, top * 1.06)
    ax.margins(x=0.01)
    names = ["\n".join(format_shape(g.case.shape).split("x", 1)) for g in members]
    ax.set_xticks(range(len(members)), names, fontsize=7)
    ax.set_title(case.title, fontsize=9, loc="left")
    ax.spines[["top", "right"]].set_visible(False)


def _cpu() -> str:
    try:
        names = re.findall(r"^model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()
