"""fresh.py -- run a few lines in an interpreter of their own, whose threads, memory and imports are nobody else's."""

import contextlib
import inspect
import json
import os
import subprocess
import sys

import pytest

# The extension was built with AddressSanitizer, which has a malloc of its own, keeps what is freed, and takes all the
# address space there is.
ASAN = "asan" in os.environ.get("LD_PRELOAD", "")

# A child of a process in which another thread was just then in that malloc waits for it for ever.
no_asan = pytest.mark.skipif(ASAN, reason="AddressSanitizer's malloc is not ready to be forked beside busy threads")

needs_proc = pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="needs Linux's /proc/self/task")


def comms():
    """Name every live thread of this process; those of our pool are called fastbn."""
    names = []
    for tid in os.listdir("/proc/self/task"):
        # Unbuffered: CPython 3.13 without a GIL yields its processor twenty times whenever it closes a text file, which
        # takes seconds for these few where others want it.
        with contextlib.suppress(OSError), open(f"/proc/self/task/{tid}/comm", "rb", buffering=0) as file:
            names.append(file.read().decode().strip())
    return names


def report(**values):
    """Tell `run` the result."""
    print(json.dumps(values))


PRELUDE = f"""
import contextlib, json, os, resource, sys, threading, time

{inspect.getsource(comms)}
{inspect.getsource(report)}
"""


def run(code, *, warnings="error", timeout=300, **env):
    """Run `code`, which may use `comms` and must `report`, in an environment without settings of ours or OpenMP's."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("FASTBN_", "OMP_", "GOMP_", "KMP_"))}
    try:
        done = subprocess.run(
            [sys.executable, "-W", warnings, "-c", PRELUDE + code],
            env=clean | {"OPENBLAS_NUM_THREADS": "1"} | env,
            timeout=timeout,
            capture_output=True,
            text=True,
        )
    except subprocess.TimeoutExpired:
        raise AssertionError(f"it hangs: it should have ended within {timeout} s") from None
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}{done.stderr}"
    return json.loads(done.stdout.splitlines()[-1])
