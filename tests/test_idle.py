"""test_idle.py -- row 6 of docs/reliability.md: after a call has returned, its threads sleep.

Red with workers that spin on.
"""

from fresh import needs_proc, run

from fastbn import _native


@needs_proc
def test_idle():
    """Row 6, 20 gaps of 100 ms. Red with workers that never give up spinning or that do nothing at all, and, where
    there are processors for all, with FBN_OPENMP_TEAM.
    """
    got = run(
        """
import numpy as np
import fastbn
x = np.ones((8, 64, 28, 28), np.float32)
frozen = fastbn.FrozenBatchNorm.from_arrays(np.zeros(64), np.ones(64))
burnt = []
for _ in range(20):
    frozen(x, out=x)
    before = time.process_time()
    time.sleep(0.1)
    burnt.append(time.process_time() - before)
report(burnt=burnt, ours=comms().count("fastbn"), **fastbn._native.parallel_counters())
""",
        FASTBN_NUM_THREADS="4",
    )
    assert max(got["burnt"]) <= 0.005
    if _native.parallel_runtime() == "pthreads":
        assert (got["ours"], got["parallel"]) == (3, 20)
        assert got["helped"] > 0
