"""team.py -- our own team of threads beside an OpenMP region in its place: the last table of docs/reliability.md.

    python benchmarks/team.py

asks the same of the checkout's fastbn and of a copy that is built with CFLAGS=-DFBN_OPENMP_TEAM. Needs Linux, and what
building needs.
"""

import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TEAM, CALLERS, GAPS, FORKS, PATIENCE = 2, 40, 20, 5, 3


def observe():
    """Ask the fastbn that is imported; a dict of what was seen."""
    import numpy as np

    import fastbn

    x = np.ones((8, 64, 28, 28), np.float32)
    frozen = fastbn.FrozenBatchNorm.from_arrays(np.zeros(64), np.ones(64))
    fastbn.set_num_threads(TEAM)

    burnt = []
    for _ in range(GAPS):
        frozen(x, out=x)
        before = time.process_time()
        time.sleep(0.1)
        burnt.append((time.process_time() - before) * 1e3)

    def threads():
        return len(os.listdir("/proc/self/task"))

    first, most, together = threads(), [], threading.Barrier(CALLERS)

    def call():
        out = np.empty_like(x)
        together.wait()
        for _ in range(20):
            frozen(x, out=out)
        most.append(threads())
        together.wait()

    callers = [threading.Thread(target=call) for _ in range(CALLERS)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()

    finished = 0
    for _ in range(FORKS):
        frozen(x, out=x)
        pid = os.fork()
        if pid == 0:
            signal.alarm(PATIENCE)
            frozen(x, out=x)
            os._exit(0)
        finished += os.waitpid(pid, 0)[1] == 0
    return {
        "runtime": fastbn.show_config("dicts")["threads"]["runtime"],
        "burnt": burnt,
        "first": first,
        "most": max(most),
        "finished": finished,
    }


def observed(folder):
    """`observe` in an interpreter that imports from `folder`."""
    environment = os.environ | {"PYTHONPATH": str(folder), "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "observe"]
    return json.loads(subprocess.run(command, cwd=folder, env=environment, check=True, stdout=subprocess.PIPE).stdout)


def build(folder):
    """Build a copy of the checkout in `folder`, with an OpenMP region for a team."""
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
    for name in filter(None, names.split("\0")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(command, cwd=folder, env=os.environ | {"CFLAGS": "-DFBN_OPENMP_TEAM"}, check=True)


def main():
    with tempfile.TemporaryDirectory() as folder:
        build(Path(folder))
        both = [observed(ROOT), observed(Path(folder))]
    assert [one["runtime"] for one in both] == ["pthreads", "openmp"], "there is no OpenMP to compare with"

    def row(name, cells):
        print("|", " | ".join([name, *cells]), "|")

    row("", ["own team", "OpenMP region"])
    row("---", ["---", "---"])
    row(
        f"CPU time burnt in the 100 ms after a call, median and largest of {GAPS}",
        [f"{statistics.median(one['burnt']):.1f} and {max(one['burnt']):.1f} ms" for one in both],
    )
    row(
        f"most threads while {CALLERS} callers compute, {both[0]['first']} before",
        [f"{one['most']}" for one in both],
    )
    row(f"forked children that finish a call, of {FORKS}", [f"{one['finished']}" for one in both])


if __name__ == "__main__":
    if sys.argv[1:] == ["observe"]:
        print(json.dumps(observe()))
    else:
        main()
