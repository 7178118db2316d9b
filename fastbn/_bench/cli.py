"""cli -- ``python -m fastbn bench``: times in multiples of a streaming copy of the same tensor, each result checked."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import fastbn
from fastbn._bench import report
from fastbn._bench.cases import FULL, FUSIONS, ITEMSIZE, OPS, SHAPES, SHORT, Case, parse_shape, union
from fastbn._bench.data import Tensors, is_known
from fastbn._bench.engine import Group, run
from fastbn._bench.onednn import OneDNN
from fastbn._bench.peers import Entry, Fastbn, NumPy, OnnxRuntime, Peer, Torch, entries

PEERS: dict[str, Callable[[], Peer]] = {"torch": Torch, "onednn": OneDNN, "onnxruntime": OnnxRuntime, "numpy": NumPy}
OUT = {"given": (False,), "fresh": (True,), "both": (False, True)}


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
    parser.add_argument("--out", choices=OUT, help="write into out=, or into fresh memory where a call can do either")
    parser.add_argument("--seconds", type=float, default=0.4, help="for each group (default: %(default)s)")


def add_outputs(parser: argparse.ArgumentParser) -> None:
    """Add where the results go."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw bars against the roof (needs matplotlib)")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="renew the table between its marks in this page")


def cases(args: argparse.Namespace) -> list[Case]:
    """The cases that the options select."""
    names = ("shapes", "ops", "dtypes", "fuse", "threads")
    chosen = {name: tuple(value) for name in names if (value := getattr(args, name))}
    selections = [dataclasses.replace(s, **chosen) for s in (FULL if args.full else SHORT)]
    found = union(selections, fastbn.get_num_threads())
    if not all(is_known(case.dtype) for case in found):
        print("without bfloat16: no module ml_dtypes", file=sys.stderr)
    return [case for case in found if is_known(case.dtype)]


def peers(args: argparse.Namespace) -> list[Peer]:
    """Make fastbn and the peers that the options select; all are those that are installed."""
    wanted = args.peers or []
    found: list[Peer] = [Fastbn()]
    for name in PEERS if "all" in wanted else wanted:
        try:
            found.append(PEERS[name]())
        except ImportError as error:
            if "all" not in wanted:
                raise SystemExit(f"{name} is not installed: {error}") from None
            print(f"without {name}: {error}", file=sys.stderr)
    return found


def field(case: Case, args: argparse.Namespace, found: Sequence[Peer]) -> list[Entry]:
    """Who takes part in a case."""
    fresh = OUT[args.out or ("both" if args.full else "given")]
    return list(entries(case, found, args.layouts or Fastbn.layouts, fresh))


def bench(args: argparse.Namespace) -> int:
    """Run the command; 1 if a result of fastbn's is wrong."""
    if args.markdown and not report.MARKED.search(args.markdown.read_text()):
        raise SystemExit(f"{args.markdown} has no table of python -m fastbn bench")
    if args.picture and not importlib.util.find_spec("matplotlib"):
        raise SystemExit("--picture needs matplotlib")
    chosen, found = cases(args), peers(args)
    if (args.picture or args.markdown) and all(case.small for case in chosen):
        raise SystemExit("--picture and --markdown are about traffic: no chosen shape is large enough")
    info = report.machine(found)
    print(report.describe(info), flush=True)
    groups: list[Group] = []
    tensors = None
    try:
        for case in report.progress(chosen):
            taking_part = field(case, args, found)
            if not _fits(case, taking_part):
                print(f"without {case}: not enough memory", file=sys.stderr)
                continue
            if tensors is None or tensors.key != (case.shape, case.dtype):
                tensors = None  # the old data goes before the new comes
                tensors = Tensors(case.shape, case.dtype)
            groups.append(run(case, tensors, [entry.make(case, tensors) for entry in taking_part], args.seconds))
    except KeyboardInterrupt:
        print("\ninterrupted: this is what was measured", file=sys.stderr)
    if not groups:
        return 1
    print(f"\n{report.tables(groups)}")
    if args.json:
        report.write_json(args.json, groups, info)
    if args.picture:
        report.write_picture(args.picture, groups, info)
    if args.markdown:
        report.write_markdown(args.markdown, groups, info, args.command_line)
    return int(any(r.correct is False and r.contender.startswith(Fastbn.name) for g in groups for r in g.results))


def _fits(case: Case, taking_part: Sequence[Entry]) -> bool:
    """Whether memory holds the inputs in every layout, the result and one that is fresh; if it can be asked."""
    if not hasattr(os, "sysconf"):
        return True
    layouts = len({"NCHW", *(entry.layout for entry in taking_part if entry.layout)})
    need = case.nbytes * ((1 + case.backward + case.residual) * layouts + 2)
    return need < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * 0.8


def _shape(text: str) -> str:
    if text not in SHAPES:
        try:
            parse_shape(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
    return text


def _threads(text: str) -> int:
    """0 for all."""
    if text != "all" and not (text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"expected a number of threads or all; got {text!r}")
    return 0 if text == "all" else int(text)
