"""__main__ -- the common face of the studies: python examples/paper NAME, all, or list."""

import argparse
import sys
from importlib import import_module
from pathlib import Path

# Run as a folder, Python looks for modules inside it; the studies are a package beside it.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from paper.study import Settings, perform  # noqa: E402

STUDIES = ("mnist",)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python examples/paper", description="The studies of the batch norm paper, on fastbn."
    )
    parser.add_argument(
        "name", choices=[*STUDIES, "all", "list"], metavar="NAME", help=", ".join([*STUDIES, "all", "list"])
    )
    parser.add_argument(
        "--data", metavar="PATH", help="folder or npz of MNIST, or folder of CIFAR-10 (default: scikit-learn's digits)"
    )
    parser.add_argument("--steps", type=int, metavar="N", help="training steps of each network")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="the first seed (default 0)")
    parser.add_argument("--seeds", type=int, default=3, metavar="K", help="how many seeds (default 3)")
    parser.add_argument(
        "--paper", action="store_true", help="the paper's own settings where they differ, which take far longer"
    )
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
        for name in STUDIES:
            print(f"{name:15} {import_module(f'paper.{name}').TITLE}")
        return 0
    if args.seeds < 1 or (args.steps is not None and args.steps < 1):
        parser.error("--seeds and --steps must be at least 1")
    settings = Settings(args.data, args.steps, tuple(range(args.seed, args.seed + args.seeds)), args.paper)
    try:
        for name in STUDIES if args.name == "all" else [args.name]:
            perform(import_module(f"paper.{name}"), settings, args.out, args.format)
    except (ImportError, ValueError) as error:
        parser.exit(1, f"{parser.prog} {args.name}: {error}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
