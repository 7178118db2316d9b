"""__main__ -- the common face of the studies: python examples/paper NAME, all, or list."""

import argparse
import contextlib
import errno
import io
import os
import sys
import time
import traceback
from importlib import import_module
from pathlib import Path

# Run as a folder, Python looks for modules inside it; the studies are a package beside it.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

PROGRAM = "python examples/paper"
EXTRA = 'the studies need what pip install ".[paper]" installs'
# What PyTorch can be seeded with.
LAST_SEED = 2**63 - 1


def main() -> int:
    try:
        from paper.study import Settings, format_table, perform, reserve, studies, without
    except ImportError as error:
        sys.exit(f"{PROGRAM}: {error}; {EXTRA}")
    known = studies()
    parser = argparse.ArgumentParser(prog=PROGRAM, description="The studies of the batch norm paper, on fastbn.")
    names = [*known, "all", "list"]
    parser.add_argument("name", choices=names, metavar="NAME", help=", ".join(names))
    parser.add_argument(
        "--data",
        metavar="PATH",
        help="MNIST or CIFAR-10: the folder, an npz file, or any one of the files (default: scikit-learn's digits)",
    )
    parser.add_argument("--steps", type=int, metavar="N", help="training steps of each network")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="the first seed (default 0)")
    parser.add_argument("--seeds", type=int, metavar="K", help="how many seeds (default 3; 1 with --short)")
    scale = parser.add_mutually_exclusive_group()
    scale.add_argument(
        "--paper", action="store_true", help="the paper's own settings where they differ, which take far longer"
    )
    scale.add_argument("--short", action="store_true", help="the least that shows the claims: seconds")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("figures"),
        metavar="DIR",
        help="where figures and numbers go (default figures)",
    )
    parser.add_argument("--format", choices=["png", "svg", "pdf"], default="png", help="of the figures (default png)")
    args = parser.parse_args()
    if args.name == "list":
        for name, subject in known.items():
            unused = ", ".join(f"--{option}" for option in without(name))
            print(f"{name:15} {subject}" + (f" (without {unused})" if unused else ""))
        return 0
    count = args.seeds if args.seeds is not None else 1 if args.short else 3
    if count < 1 or (args.steps is not None and args.steps < 1):
        parser.error("--seeds and --steps must be at least 1")
    if not 0 <= args.seed <= LAST_SEED + 1 - count:
        parser.error(f"--seed: seeds from 0 to {LAST_SEED} are possible, not {count} from {args.seed} on")
    if args.data == "":
        parser.error("--data: a path is wanted, found nothing")
    chosen = list(known)
    if args.name != "all":
        chosen = [args.name]
        # Of all, each study takes what it has a use for.
        for option in without(args.name):
            if getattr(args, option):
                parser.error(f"{args.name} has no use for --{option}")
    try:
        reserve(args.out, [f"{name}.{ending}" for name in chosen for ending in ("json", args.format)])
    except ValueError as error:
        parser.error(f"--out: {error}")
    settings = Settings(args.data, args.steps, tuple(range(args.seed, args.seed + count)), args.paper, args.short)
    rows, failed = [], {}
    for name in chosen:
        start = time.perf_counter()
        try:
            claims = perform(import_module(f"paper.{name}"), settings, args.out, args.format)
            held = f"{sum(claim.holds for claim in claims)} of {len(claims)}"
        except Exception as error:  # of all, the others still run, whatever is the matter with one
            if unread(error):
                raise
            held, failed[name] = "failed", str(error) or type(error).__name__
            if isinstance(error, ImportError):
                failed[name] += f"; {EXTRA}"
            elif not isinstance(error, OSError | ValueError):  # not the user's
                traceback.print_exc()
            print(f"{PROGRAM} {name}: {failed[name]}", file=sys.stderr)
        rows.append([name, held, f"{time.perf_counter() - start:.0f}"])
    if args.name == "all":
        print(f"\n{format_table(['study', 'claims that hold', 'seconds'], rows)}")
        for name, message in failed.items():
            print(f"\n  {name} failed: {message}", end="")
        print()
    return 1 if failed else 0


def unread(error: Exception) -> bool:
    """Whether nobody reads any more what is printed: a broken pipe, or what Windows says instead."""
    no_file = isinstance(error, OSError) and error.filename is None
    return isinstance(error, BrokenPipeError) or (no_file and sys.platform == "win32" and error.errno == errno.EINVAL)


if __name__ == "__main__":
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # where a terminal lacks a letter
    try:
        code = main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted", file=sys.stderr, flush=True)
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        # Python itself ends by the signal where it came in a string of code, such as imports run.
        os._exit(130)
    except OSError as error:
        if not unread(error):
            raise
        # Python may try once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    sys.exit(code)
