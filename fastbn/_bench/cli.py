"""cli -- ``python -m fastbn bench``: times in multiples of a streaming copy of the same tensor, each result checked."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import math
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import fastbn
from fastbn._bench import report
from fastbn._bench.cases import AXES, FULL, FUSIONS, ITEMSIZE, OPS, SHAPES, SHORT, Case, parse_shape, union, variants
from fastbn._bench.data import Tensors, is_known
from fastbn._bench.engine import Contest, Group, run
from fastbn._bench.onednn import OneDNN
from fastbn._bench.peers import Copy, Entry, Fastbn, NumPy, OnnxRuntime, Peer, Torch, entries
from fastbn._threads import MAX_THREADS

PEERS: dict[str, Callable[[], Peer]] = {"torch": Torch, "onednn": OneDNN, "onnxruntime": OnnxRuntime, "numpy": NumPy}
OUT = {"given": (False,), "fresh": (True,), "both": (False, True), "inplace": (False,)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what chooses the measurements, which the suite in benchmarks/ shares."""

    def several(name: str, choices: Sequence[str], text: str) -> None:
        listed = f"{text}: {', '.join(choices)}"
        parser.add_argument(f"--{name}", nargs="+", choices=choices, metavar="NAME", help=listed)

    parser.add_argument("--full", action="store_true", help="all there is instead of the short form; takes an hour")
    shapes = f"{', '.join(SHAPES)}, or as in 32x64x56x56"
    parser.add_argument("--shapes", nargs="+", type=_shape, metavar="SHAPE", help=shapes)
    several("ops", OPS, "operations")
    several("dtypes", list(ITEMSIZE), "data types")
    several("fuse", FUSIONS, "what is fused with the batch norm")
    several("layouts", Fastbn.layouts, "memory layouts")
    several("peers", [*PEERS, "all"], "measure these too")
    parser.add_argument("--threads", nargs="+", type=_threads, metavar="N", help="thread counts, or all")
    out = "where a call can do either, write into out=, or into fresh memory; or over x, which is NCHW then"
    parser.add_argument("--out", choices=OUT, help=out)
    ratio = "measure what differs in this alone against each other: ratios to the first, or to the fastest peer"
    parser.add_argument("--ratio", choices=[*AXES, "out", "peers"], help=ratio)
    text = "for each group (default: %(default)s); 0 for as few calls as check the results"
    parser.add_argument("--seconds", type=duration, default=0.4, metavar="S", help=text)


def add_outputs(parser: argparse.ArgumentParser) -> None:
    """Add where the results go."""
    parser.add_argument("--unit", choices=report.UNITS, help="of the tables; else whatever suits the size")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw bars against the roof (needs matplotlib)")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="renew the table between its marks in this page")


def cases(args: argparse.Namespace) -> list[Case]:
    """The cases that the options select."""
    names = ("shapes", "ops", "dtypes", "fuse", "threads")
    chosen = {name: tuple(value) for name in names if (value := getattr(args, name))}
    if args.ratio in AXES:
        chosen = {args.ratio: AXES[args.ratio][1]} | chosen
    selections = [dataclasses.replace(s, **chosen) for s in (FULL if args.full else SHORT)]
    found = union(selections, fastbn.get_num_threads())
    if not all(is_known(case.dtype) for case in found):
        print("without bfloat16: no module ml_dtypes", file=sys.stderr)
    return [case for case in found if is_known(case.dtype) and not (args.out == "inplace" and case.backward)]


def peers(args: argparse.Namespace) -> list[Peer]:
    """Make fastbn and the peers that the options select; all are those that are installed."""
    wanted = args.peers or ["all"] * (args.ratio == "peers")
    found: list[Peer] = [Fastbn()]
    for name in PEERS if "all" in wanted else wanted:
        try:
            found.append(PEERS[name]())
        except ImportError as error:
            if "all" not in wanted:
                raise SystemExit(f"{name} is not installed: {error}") from None
            print(f"without {name}: {error}", file=sys.stderr)
    return found


def contests(args: argparse.Namespace, found: Sequence[Peer]) -> list[Contest]:
    """Who is measured against whom."""
    return [_contest(alike, args, found) for alike in variants(cases(args), args.ratio)]


def _contest(alike: Sequence[Case], args: argparse.Namespace, found: Sequence[Peer]) -> Contest:
    axis = args.ratio
    fresh = OUT[args.out or ("both" if args.full or axis == "out" else "given")]
    layouts = ("NCHW", "NC") if args.out == "inplace" else args.layouts or Fastbn.layouts
    taking_part: dict[str, Entry] = {}
    for i, case in enumerate(alike):
        for entry in entries(case, found, layouts, fresh):
            # A copy fuses nothing: one for all will do.
            if i > 0 and not (isinstance(entry.peer, Copy) and axis == "fuse"):
                entry = dataclasses.replace(entry, mark=case.mark(axis))
            taking_part.setdefault(str(entry), entry)
    over = {}
    for label, entry in taking_part.items():
        base = dataclasses.replace(entry, mark="", fresh=entry.fresh and axis != "out")
        if str(base) != label and str(base) in taking_part:
            over[label] = str(base)
    return Contest(tuple(taking_part.values()), over)


class Data:
    """The tensors of a contest; what the next does not need goes before its own come."""

    def __init__(self, inplace: bool = False) -> None:
        self.inplace, self._made = inplace, dict[Any, Tensors]()

    def keep(self, contest: Contest) -> None:
        """Forget all but the data of this contest."""
        needed = {entry.case.data for entry in contest.entries}
        self._made = {key: tensors for key, tensors in self._made.items() if key in needed}

    @property
    def nbytes(self) -> int:
        """What there is already."""
        return sum(tensors.nbytes for tensors in self._made.values())

    def __call__(self, case: Case) -> Tensors:
        if case.data not in self._made:
            self._made[case.data] = Tensors(*case.data, inplace=self.inplace)
        return self._made[case.data]


def bench(args: argparse.Namespace) -> int:
    """Run the command; 1 if a result of fastbn's is wrong."""
    for path in filter(None, (args.json, args.picture)):
        if not path.parent.is_dir():
            raise SystemExit(f"{path} cannot be written: there is no folder {path.parent}")
    if args.picture and args.picture.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise SystemExit(f"{args.picture} cannot be drawn: a picture's name ends with .png, .svg or .pdf")
    if args.markdown:
        try:
            page = args.markdown.read_text()
        except (OSError, UnicodeError) as error:
            raise SystemExit(f"{args.markdown} cannot be read: {error}") from None
        if not report.MARKED.search(page):
            raise SystemExit(f"{args.markdown} has no table of python -m fastbn bench")
    if args.picture and not importlib.util.find_spec("matplotlib"):
        raise SystemExit("--picture needs matplotlib")
    found = peers(args)
    chosen = contests(args, found)
    if not chosen:
        raise SystemExit("nothing to measure: of one value per channel there is no training, nor a backward in place")
    if (args.picture or args.markdown) and all(contest.case.small for contest in chosen):
        raise SystemExit("--picture and --markdown are about traffic: no chosen shape is large enough")
    info = report.machine(found)
    print(report.describe(info), flush=True)
    groups: list[Group] = []
    data, others = Data(args.out == "inplace"), report.Others()
    try:
        for contest in report.progress(chosen):
            data.keep(contest)
            if not _fits(contest, data):
                print(f"without {contest.case}: not enough memory", file=sys.stderr)
                continue
            groups.append(run(contest, data, args.seconds))
    except KeyboardInterrupt:
        print("\ninterrupted: this is what was measured", file=sys.stderr)
    if not groups:
        return 1
    info["others"] = others.share()
    try:  # first, for who reads what is printed may be gone
        if args.json:
            report.write_json(args.json, groups, info)
        if args.picture:
            report.write_picture(args.picture, groups, info)
        if args.markdown:
            report.write_markdown(args.markdown, groups, info, args.command_line)
    finally:
        print(f"\n{report.ratios(groups, args.ratio) if args.ratio else report.tables(groups, args.unit)}")
        print(report.verdict(groups, info["others"]))
    return int(any(r.correct is False and r.peer == Fastbn.name for g in groups for r in g.results))


def _fits(contest: Contest, data: Data) -> bool:
    """Whether memory holds the inputs in every layout, the result, and two that are fresh; if it can be asked."""
    free = report.free_memory()
    need = 0
    for key in {entry.case.data for entry in contest.entries}:
        using = [entry for entry in contest.entries if entry.case.data == key]
        layouts = len({"NCHW", *(entry.layout for entry in using if entry.layout)})
        inputs = 1 + max(e.case.backward for e in using) + max(e.case.residual for e in using)
        outputs = 1 + max(e.case.reader for e in using)
        need += using[0].case.nbytes * (1 if data.inplace else inputs * layouts + outputs)
    # What is not needed any more is recycled, or about to be freed.
    need += max(2 * e.case.nbytes * (1 + e.case.residual) * e.fresh for e in contest.entries)
    return free is None or need < 0.9 * (free + data.nbytes)


def duration(text: str) -> float:
    """How long to measure."""
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not 0 <= found < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number of seconds, finite and not negative; got {text!r}")
    return found


def _shape(text: str) -> str:
    if text not in SHAPES:
        try:
            parse_shape(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
    return text


def _threads(text: str) -> int:
    """0 for all."""
    count = int(text) if re.fullmatch("[0-9]{1,9}", text) else 0
    if text != "all" and not 1 <= count <= MAX_THREADS:
        raise argparse.ArgumentTypeError(f"expected a number of threads from 1 to {MAX_THREADS}, or all; got {text!r}")
    return count
