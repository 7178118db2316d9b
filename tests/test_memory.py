"""test_memory.py -- row 17 of docs/reliability.md: data that change under a call."""

import os

import pytest
from fresh import run

ASAN = "asan" in os.environ.get("LD_PRELOAD", "")


@pytest.mark.slow
def test_data_that_change_under_a_call():
    """Row 17, 10 s under AddressSanitizer. What such a call returns is anybody's guess; but it returns, it touches
    nothing else, and it counts. Red with a layer that trusts the look at x before the call, and does not guard the
    statistics that come out of it.
    """
    got = run(
        f"""
import numpy as np
import fastbn

rng = np.random.default_rng(0)
start, stop = time.monotonic(), threading.Event()
normal = rng.standard_normal((4, 16, 64 * 64))
poisoned = normal.copy()
poisoned[2, 3, ::1000] = np.inf
contents = [normal, poisoned, np.full_like(normal, 3.0), normal + 1e3, poisoned * -np.inf]
layers = []
for dtype in (np.float32, np.float64, np.float16):
    for axis in (1, -1):
        kinds = [np.ascontiguousarray(np.moveaxis(c, 1, axis).astype(dtype)) for c in contents]
        bn = fastbn.BatchNorm(16, dtype=dtype, channel_axis=axis, activation="relu6", on_nonfinite="raise")
        layers.append((bn, kinds[0].copy(), kinds))

def write():
    while not stop.is_set():
        for i in range(len(contents)):
            for _, x, kinds in layers:
                np.copyto(x, kinds[i])

writer = threading.Thread(target=write)
writer.start()
calls = refused = 0
sound = True
while time.monotonic() < start + {10 if ASAN else 2}:
    for bn, x, _ in layers:
        calls += 1
        try:
            bn(x, residual=x)
            bn.backward(x)
        except ValueError:
            refused += 1
        sound = sound and np.isfinite([bn.running_mean, bn.running_var]).all()
stop.set()
writer.join()
same = []
for bn, x, kinds in layers:
    fresh = fastbn.BatchNorm(16, dtype=x.dtype, channel_axis=bn.channel_axis, activation="relu6")
    np.copyto(x, kinds[0])
    same.append(bn(x).tobytes() == fresh(x).tobytes())
counted = sum(bn.num_batches_tracked + bn.num_batches_skipped for bn, _, _ in layers) - len(layers)
report(calls=calls, refused=refused, counted=counted, sound=bool(sound), same=all(same))
""",
        FASTBN_NUM_THREADS="2",
    )
    assert got["sound"]
    assert got["same"]
    assert got["refused"] > 0
    assert got["counted"] == got["calls"] - got["refused"] > 0
