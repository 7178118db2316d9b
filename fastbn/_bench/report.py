"""report -- results as tables, as JSON and as a picture; the machine they are from; a progress bar meanwhile."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import json
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
from fastbn._bench.peers import Peer

T = TypeVar("T")
Section = tuple[Case, list[Group]]

MARKED = re.compile(r"<!-- table: python -m fastbn bench.*?-->\n.*?<!-- end of table -->", re.DOTALL)


def progress(items: Sequence[T]) -> Iterator[T]:
    """Show how far a loop is: tqdm if it is installed, else a plain bar."""
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


def _mean(results: Sequence[Result | None]) -> str:
    """A mean over some of the shapes could not be compared with one over all of them."""
    multiples = [r.multiple for r in results if r]
    return f"{geometric_mean(multiples):.2f}" if len(multiples) == len(results) else ""


def tables(groups: Sequence[Group]) -> str:
    """All sections: multiples of the copy, microseconds where calls are small."""
    parts = []
    for case, members in _sections(groups):
        columns = _columns(members)
        rows = [["", f"copy/{'us' if case.small else 'ms'}", *columns]]
        for i, group in enumerate(members):
            copy = group.results[0].median * (1e6 if case.small else 1e3)
            cells = [_cell(case, column[i]) for column in columns.values()]
            rows.append([format_shape(group.case.shape), f"{copy:.3g}", *cells])
        if len(members) > 1 and not case.small:
            rows.append(["geometric mean", "", *map(_mean, columns.values())])
        unit = "microseconds" if case.small else f"multiples of the streaming copy, limit {case.limit:g}"
        parts.append("\n".join([f"{case.title}: {unit}", *aligned(rows)]))
    wrong = sum(r.correct is False for g in groups for r in g.results)
    verdict = f"! beside a time: so far from float64 that rounding is no excuse ({wrong})"
    parts.append(verdict if wrong else "All results are correct.")
    return "\n\n".join(parts)


def _cell(case: Case, result: Result | None) -> str:
    if result is None:
        return "-"
    return f"{result.median * 1e6 if case.small else result.multiple:.2f}" + "!" * (result.correct is False)


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]).rstrip()
        for row in rows
    ]


def markdown(groups: Sequence[Group], info: dict[str, Any]) -> str:
    """Make one table of geometric means: a row for each contender, a column for each section about memory traffic."""
    sections = [(case, members) for case, members in _sections(groups) if not case.small]
    columns = [
        # A contender that has both forms is shown with out=.
        {plain(label): _mean(results) for label, results in reversed(_columns(members).items())}
        for _, members in sections
    ]
    errors: dict[str, float] = {}
    for result in (r for _, members in sections for g in members for r in g.results[1:]):
        label = plain(result.contender)
        errors[label] = max(errors.get(label, 0), result.error or 0)
    titles = [case.title.replace(", float32", "") for case, _ in sections]
    rows = [
        ["", *titles, "error, ulp"],
        ["---", *["--:"] * (len(sections) + 1)],
        ["limit", *(f"{case.limit:.2f}" for case, _ in sections), ""],
    ]
    rows += [[label, *(c.get(label, "") for c in columns), f"{error:.3g}"] for label, error in errors.items()]
    shapes = len({g.case.shape for _, members in sections for g in members})
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
