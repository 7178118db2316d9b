"""test_company.py -- row 7 of docs/reliability.md: in one process with other OpenMP programs, in any order."""

import importlib.util
import itertools
import re
import shutil
import subprocess
import sys
import sysconfig

import pytest
from fresh import needs_proc, run

from fastbn import _native

sees_openmp = pytest.mark.skipif(not _native.parallel_sees_openmp(), reason="built without OpenMP")

SETUP = """
import numpy as np

def ours():
    import fastbn
    rng = np.random.default_rng(0)
    x = rng.standard_normal((8, 64, 28, 28), dtype=np.float32)
    mean, var = rng.standard_normal(64), rng.random(64) + 0.5
    frozen = fastbn.FrozenBatchNorm.from_arrays(mean, var)
    expected = (x - mean[:, None, None]) / np.sqrt(var[:, None, None] + 1e-5)
    np.testing.assert_allclose(frozen(x), expected, rtol=1e-5, atol=1e-6)

def runtimes():
    with open("/proc/self/maps") as file:
        names = {line.split()[-1] for line in file}
    return sorted(name for name in names if os.path.basename(name).startswith(("libgomp", "libomp", "libiomp")))
"""

# Programs with OpenMP regions of their own.
OTHERS = {
    "sklearn.cluster": """
def theirs_sklearn():
    from sklearn.cluster import KMeans
    KMeans(3, n_init=1, random_state=0).fit(np.random.default_rng(0).random((5000, 8)))
""",
    "torch": """
def theirs_torch():
    import torch
    torch.set_num_threads(2)
    torch.nn.functional.batch_norm(torch.ones(8, 64, 28, 28), torch.zeros(64), torch.ones(64))
""",
}
INSTALLED = [name for name in OTHERS if importlib.util.find_spec(name.partition(".")[0])]


@needs_proc
@pytest.mark.parametrize("order", list(itertools.permutations(["fastbn", *INSTALLED])), ids=" ".join)
def test_import_order(order):
    """Row 7. Red with a runtime of OpenMP of our own that runs regions beside theirs after a fork (FBN_OPENMP_TEAM: the
    child hangs), and with a module that fails to load after them.
    """
    got = run(
        "\n".join([SETUP, *(OTHERS[name] for name in INSTALLED), *(f"import {name}" for name in order)])
        + """
import signal
from fastbn import _native
all_of_us = [ours] + [f for name, f in list(globals().items()) if name.startswith("theirs_")]
for f in all_of_us + all_of_us[::-1]:
    f()
pid = os.fork()
if pid == 0:
    signal.alarm(10)
    ours()
    os._exit(0)
report(child=os.waitpid(pid, 0)[1], runtimes=runtimes(), **_native.parallel_counters())
""",
        warnings="ignore",
        FASTBN_NUM_THREADS="2",
    )
    assert got["child"] == 0
    assert got["parallel"] == (2 if _native.parallel_runtime() != "serial" else 0)
    assert len(got["runtimes"]) >= len(INSTALLED)


@needs_proc
@sees_openmp
def test_serial_inside_a_parallel_region():
    """Row 7. Red without omp_in_parallel."""
    got = run(
        SETUP
        + """
import ctypes
from fastbn import _native
(path,) = runtimes()
gomp = ctypes.CDLL(path)
counts = []

@ctypes.CFUNCTYPE(None, ctypes.c_void_p)
def body(_):
    ours()
    counts.append(_native.parallel_counters())

gomp.GOMP_parallel(body, None, 3, 0)
inside = _native.parallel_counters()
ours()
report(members=len(counts), inside=inside, after=_native.parallel_counters())
""",
        FASTBN_NUM_THREADS="2",
    )
    assert got["members"] == 3
    assert got["inside"] == {"parallel": 0, "contended": 0, "helped": 0}
    assert (got["after"]["parallel"], got["after"]["contended"]) == (1, 0)


@needs_proc
@sees_openmp
def test_two_openmp_runtimes():
    """Row 7, with a second copy of the runtime, as wheels bring it. Its regions cannot be seen from here; red with a
    token that is never taken: each of its members then has a team.
    """
    got = run(
        SETUP
        + """
import ctypes, shutil, tempfile
from fastbn import FrozenBatchNorm, _native
op, x = FrozenBatchNorm(np.zeros(64), np.ones(64)), np.random.default_rng(0).standard_normal((8, 64, 4000), np.float32)
expected = op(x).tobytes()
(path,) = runtimes()
with tempfile.TemporaryDirectory() as folder:
    second = ctypes.CDLL(shutil.copy(path, folder + "/libgomp-second.so"))
    several = len(runtimes())
done = []

@ctypes.CFUNCTYPE(None, ctypes.c_void_p)
def body(_):
    y = np.empty_like(x)
    for _ in range(50):
        op(x, out=y)
        done.append(y.tobytes() == expected)

second.GOMP_parallel(body, None, 3, 0)
op(x)
report(runtimes=several, done=sum(done), workers=comms().count("fastbn"), **_native.parallel_counters())
""",
        FASTBN_NUM_THREADS="2",
    )
    assert got["runtimes"] == 2
    assert got["done"] == 150
    assert got["parallel"] + got["contended"] == 152
    assert got["contended"] > 0
    if _native.parallel_runtime() == "pthreads":
        assert got["workers"] == 1


@needs_proc
@sees_openmp
@pytest.mark.parametrize(
    ("first", "second"), [("fastbn", "threadpoolctl"), ("threadpoolctl", "fastbn")], ids=["before", "after"]
)
def test_threadpoolctl(first, second):
    """Row 7. Red without omp_get_max_threads, or with its value kept from an earlier call."""
    pytest.importorskip("threadpoolctl")
    got = run(
        f"import {first}, {second}"
        + SETUP
        + """
from fastbn import _native
from threadpoolctl import threadpool_limits

def team():
    before = _native.parallel_counters()["parallel"]
    ours()
    return 1 if _native.parallel_counters()["parallel"] == before else comms().count("fastbn") + 1

teams = []
for limit in (1, 3, None, 1):
    with threadpool_limits(limits=limit):
        teams.append(team())
report(teams=teams, number=_native.get_num_threads())
""",
        FASTBN_NUM_THREADS="6",
        OMP_NUM_THREADS="8",
    )
    assert got == {"teams": [1, 3, 6, 1], "number": 6}


@needs_proc
def test_our_number_is_above_openmps():
    """Row 7. Red with every omp_get_max_threads below our number taken for a limit."""
    got = run(
        SETUP + "from fastbn import _native; ours(); report(**_native.parallel_counters())",
        FASTBN_NUM_THREADS="4",
        OMP_NUM_THREADS="1",
    )
    assert got["parallel"] == (1 if _native.parallel_runtime() != "serial" else 0)


@pytest.mark.skipif(sys.platform != "linux" or shutil.which("readelf") is None, reason="needs readelf")
def test_no_static_thread_local_storage():
    """Row 7: what needs it cannot be loaded late into some processes. Red with a variable in src_c that is
    `static _Thread_local` with `__attribute__((tls_model("initial-exec")))`.
    """
    listing = subprocess.run(["readelf", "-drW", _native.__file__], capture_output=True, text=True, check=True).stdout
    assert "GLOB_DAT" in listing
    assert re.findall("_TPOFF|_TPREL|STATIC_TLS", listing) == []


@pytest.mark.skipif(not sysconfig.get_config_var("Py_GIL_DISABLED"), reason="has a GIL")
def test_the_gil_stays_away():
    """Red without `freethreading_compatible` in setup.py, or with a setting of it that a module of ours takes back."""
    assert run("import fastbn; fastbn.BatchNorm(2); report(gil=sys._is_gil_enabled())") == {"gil": False}


@needs_proc
def test_subinterpreter():
    """A clean ImportError. Red with a module that lets itself be loaded twice, once NumPy does."""
    got = run("""
import fastbn
try:
    import _interpreters as interpreters
except ImportError:
    import _xxsubinterpreters as interpreters
lines = '''
try:
    import fastbn
except ImportError as error:
    answer = "ImportError"
else:
    answer = "loaded"
os.write(end, answer.encode())
'''
begin, end = os.pipe()
os.set_inheritable(end, True)
interpreters.run_string(interpreters.create(), f"import os; end = {end}" + lines)
report(answer=os.read(begin, 100).decode())
""")
    assert got["answer"] == "ImportError"
