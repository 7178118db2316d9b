"""__main__ -- ``python -m fastbn``: what the package offers on the command line."""

from __future__ import annotations

import argparse
import errno
import os
import shlex
import sys
from collections.abc import Sequence

import fastbn
from fastbn import _selftest
from fastbn._bench import cli


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m fastbn", description="Batch normalization on CPUs.")
    commands = parser.add_subparsers(metavar="command", required=True)

    bench = commands.add_parser("bench", help="measure fastbn against the speed of memory", description=cli.__doc__)
    cli.add_arguments(bench)
    cli.add_outputs(bench)
    bench.set_defaults(run=cli.bench, command_line=f"python -m fastbn {shlex.join(argv)}")

    selftest = commands.add_parser(
        "selftest", help="check the promised exactness on this CPU", description=_selftest.__doc__
    )
    selftest.set_defaults(run=lambda _: _selftest.selftest())

    config = commands.add_parser("config", help="show which kernels run here, on how many threads, and why")
    config.set_defaults(run=lambda _: fastbn.show_config())

    args = parser.parse_args(argv)
    return args.run(args) or 0


def unread(error: OSError) -> bool:
    """Whether nobody reads any more what is printed: a broken pipe, or what Windows says instead."""
    windows = sys.platform == "win32" and error.errno == errno.EINVAL and error.filename is None
    return isinstance(error, BrokenPipeError) or windows


def run() -> int:
    """`main`, whose reader may be gone."""
    try:
        code = main()
        sys.stdout.flush()
    except OSError as error:
        if not unread(error):
            raise
        # Python may try once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return code


if __name__ == "__main__":
    sys.exit(run())
