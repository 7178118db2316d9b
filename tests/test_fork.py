"""test_fork.py -- row 1 of docs/reliability.md: a child forked at any moment computes the same bytes, on a new team."""

import multiprocessing
import os
import signal
import sys
import threading

import numpy as np
import pytest
from fresh import comms, no_asan

import fastbn
from fastbn import _native

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
    # Python 3.12 and later warn of any fork with threads about.
    pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning"),
]

FORKS = 20
THREADS = 4


@pytest.fixture
def work():
    """A function that calls in parallel and says whether all is well."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((8, 64, 28, 28), dtype=np.float32)
    frozen = fastbn.FrozenBatchNorm.from_arrays(rng.standard_normal(64), rng.random(64) + 0.5)
    with fastbn.num_threads(1):
        expected = frozen(x).tobytes()
    runtime = _native.parallel_runtime()

    def compute(alone=True):
        before = _native.parallel_counters()["parallel"]
        out = np.zeros_like(x)
        same = frozen(x, out=out).tobytes() == expected
        return same and (runtime == "serial" or not alone or _native.parallel_counters()["parallel"] > before)

    with fastbn.num_threads(THREADS):
        yield compute


def child(work):
    """In the child: compute twice, in at most 3 s, and tell by the exit status."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(3)
    well = work() and work()
    if _native.parallel_runtime() == "pthreads" and sys.platform == "linux":
        well = well and comms().count("fastbn") == THREADS - 1
    os._exit(0 if well else 1)


def fork_and_wait(work):
    pid = os.fork()
    if pid == 0:
        child(work)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_fork_after_a_parallel_call(work):
    """Row 1, 20 forks. Red without the fork handler and the check of the process number below it: the child believes in
    workers that it does not have. With FBN_OPENMP_TEAM it hangs.
    """
    for _ in range(FORKS):
        assert work()
        assert fork_and_wait(work) == 0


@no_asan
def test_fork_in_another_thread(work):
    """Row 1, 20 forks. Red as above."""
    codes = []
    for _ in range(FORKS):
        assert work()
        thread = threading.Thread(target=lambda: codes.append(fork_and_wait(work)))
        thread.start()
        thread.join()
    assert codes == [0] * FORKS


def test_multiprocessing(work):
    """Row 1, 20 processes. Red as above."""
    context = multiprocessing.get_context("fork")
    assert work()
    for _ in range(FORKS):
        process = context.Process(target=child, args=(work,))
        process.start()
        process.join()
        assert process.exitcode == 0


@no_asan
def test_fork_while_another_thread_is_inside_a_call(work):
    """Row 1, 20 forks. Red with a handler that does not free the team: the child never has one again."""
    stop = threading.Event()
    failures = []

    def call():
        while not stop.is_set():
            # Each of the two finds the team taken by the other now and then.
            try:
                if not work(alone=False):
                    failures.append("other bytes")
            except Exception as error:
                failures.append(error)

    callers = [threading.Thread(target=call) for _ in range(2)]
    for caller in callers:
        caller.start()
    try:
        codes = [fork_and_wait(work) for _ in range(FORKS)]
    finally:
        stop.set()
        for caller in callers:
            caller.join()
    assert codes == [0] * FORKS
    assert not failures
    assert work()


@no_asan
def test_fork_while_threads_wait_for_a_layers_numbers():
    """Row 1, 60 forks. Seeded bug, where there is no GIL: a child that does not renew the lock of _native.pyx, which
    may have been handed to a thread that it does not have.
    """
    x = np.random.default_rng(0).standard_normal((2, 4096), dtype=np.float32)
    bn = fastbn.BatchNorm(4096)
    stop = threading.Event()

    def call(function):
        while not stop.is_set():
            function()

    def read():
        fastbn.normalize(x, bn.running_mean, bn.running_var)

    callers = [threading.Thread(target=call, args=(f,)) for f in [lambda: bn(x)] * 2 + [read] * 10]
    for caller in callers:
        caller.start()
    try:
        codes = []
        for _ in range(3 * FORKS):
            pid = os.fork()
            if pid == 0:
                signal.alarm(3)
                read()
                os._exit(0)
            codes.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    finally:
        stop.set()
        for caller in callers:
            caller.join()
    assert codes == [0] * 60


@no_asan
@pytest.mark.parametrize("here", [False, True])
def test_fork_while_a_layer_is_calibrated(here):
    """By another thread, which the child has not, so it has the layer back; or by the one that forks, and it goes on.

    Seeded bugs: a layer that stays watched in the child, or that no child watches.
    """
    bn = fastbn.BatchNorm(2)
    x = np.random.default_rng(0).standard_normal((8, 2), dtype=np.float32)
    held, release, pids = threading.Event(), threading.Event(), []

    def network(batch):
        held.set()
        if here:
            pids.append(os.fork())
        else:
            release.wait(30)
        bn(batch)

    thread = threading.Thread(target=fastbn.calibrate, args=(network, [x]), kwargs={"layers": bn})
    well = False
    try:
        if here:
            thread.run()
        else:
            thread.start()
            held.wait(30)
            pids.append(os.fork())
        if pids == [0]:
            signal.alarm(10)
            if not here:
                fastbn.calibrate(bn, [x])
            well = np.allclose(bn.running_mean, x.mean(0)) and bn.num_batches_tracked == 1
    finally:
        if pids == [0]:  # whatever came, it is no pytest
            os._exit(0 if well else 1)
        release.set()
    if not here:
        thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(pids[0], 0)[1]) == 0
    assert bn.num_batches_tracked == 1
