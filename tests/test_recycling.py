"""test_recycling.py -- large results get memory of results that are gone, and nothing else may show of it.

Counters and page faults, never times.
"""

import copy
import ctypes
import os
import pickle
import resource
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from fresh import ASAN, no_asan, run

import fastbn
from fastbn import _memory, _native

MB = 1 << 20


@pytest.fixture(autouse=True)
def limit():
    """64 MB, and an empty store."""
    before = fastbn.get_recycle_limit()
    fastbn.set_recycle_limit(0)
    fastbn.set_recycle_limit(64 * MB)
    yield 64 * MB
    fastbn.set_recycle_limit(before)


def make(megabytes, dtype=np.float32):
    channels = 64
    x = np.ones((megabytes * 16, channels, 4096 // channels * 4 // np.dtype(dtype).itemsize * 4), dtype)
    assert x.nbytes == megabytes * MB
    return x


OP = fastbn.FrozenBatchNorm.from_arrays(np.zeros(64), np.ones(64), eps=0.0)


def handler(array):
    return np._core.multiarray.get_handler_name(array)


def counted(name):
    return _native.recycled()[name]


class TestSteadyState:
    def calls(self):
        x = make(2)
        bn = fastbn.BatchNorm(64, activation="relu")

        def frozen():
            return OP(x)

        def step():
            y = bn(x, residual=x)
            return y, bn.backward(x), bn.grad_residual

        def functions():
            y, saved = fastbn.batch_norm_forward(x)
            m = fastbn.moments(x)
            sums = fastbn.backward_reduce(y, x, m.mean)
            return (
                *fastbn.batch_norm_backward(y, x, saved)[:1],
                fastbn.normalize(x, m.mean, m.var()),
                fastbn.backward_apply(y, x, m.mean, m.var(), None, *sums, m.count),
            )

        return frozen, step, functions

    @pytest.mark.parametrize("which", [0, 1, 2], ids=["frozen", "step", "functions"])
    def test_no_memory_is_made(self, which):
        call = self.calls()[which]
        kept = None
        for _ in range(3):
            kept = call()
        made, reused = counted("made"), counted("reused")
        for _ in range(5):
            kept = call()
        assert counted("made") == made
        assert counted("reused") >= reused + 5
        assert kept is not None

    def test_no_page_faults(self):
        """Red with a store that is never asked. 48 MB is beyond what malloc keeps by itself."""
        x = make(48)

        def faults():
            for _ in range(3):
                y = OP(x)
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            for _ in range(5):
                y = OP(x)
            assert y.shape == x.shape
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

        fastbn.set_recycle_limit(128 * MB)
        assert faults() <= 16

    def test_other_sizes_of_the_same_class_and_other_dtypes_are_served(self):
        OP(make(4))
        made = counted("made")
        x = make(4, np.float64)[:-1]
        assert handler(fastbn.batch_norm(x, np.zeros(64), np.ones(64))) == "fastbn"
        assert counted("made") == made


class TestArrays:
    def test_they_look_like_any_other(self):
        y = OP(make(1))
        assert handler(y) == "fastbn"
        assert all(y.flags[name] for name in ("OWNDATA", "WRITEABLE", "C_CONTIGUOUS", "ALIGNED"))
        assert y.base is None
        assert y.ctypes.data % 64 == 0
        for other in (pickle.loads(pickle.dumps(y)), copy.deepcopy(y), y.copy()):
            assert handler(other) != "fastbn"
            assert np.array_equal(other, y)

    def test_small_ones_are_numpys(self):
        assert handler(OP(np.ones((4, 64), np.float32))) == "default_allocator"

    def test_resize(self):
        y = OP(make(1))
        size = y.size
        y.resize(3 * size, refcheck=False)
        assert (y[:size] == 1).all()
        assert (y[size:] == 0).all()
        y.resize(7, refcheck=False)
        assert (y == 1).all()

    def test_memory_order_and_strides_are_those_of_x(self):
        x = np.moveaxis(np.ones((16, 64, 64, 64), np.float32), -1, 1)
        y = OP(x)
        assert handler(y) == "fastbn"
        assert y.strides == x.strides

    def test_a_view_keeps_its_memory(self):
        """Red with an array that does not own its memory."""
        part = OP(make(1))[3:5]
        for value in range(2, 6):
            assert (OP(np.full((16, 64, 256), value, np.float32)) == value).all()
        assert (part == 1).all()

    def test_what_is_held_is_nobody_elses(self):
        x = make(1)
        held = []
        for value in range(12):
            x[...] = value
            held.append(OP(x))
            if value % 3 == 2:
                del held[value // 3]
        assert len({y.ctypes.data for y in held}) == len(held)
        assert sorted(float(y[0, 0, 0]) for y in held) == [float(y.mean()) for y in sorted(held, key=lambda y: y.max())]

    def test_a_handler_of_the_program_is_respected(self):
        """Red where ours is set without a look at what there is."""
        libc = ctypes.CDLL(None)
        for name, result, arguments in (
            ("malloc", ctypes.c_void_p, [ctypes.c_size_t]),
            ("calloc", ctypes.c_void_p, [ctypes.c_size_t, ctypes.c_size_t]),
            ("realloc", ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_size_t]),
            ("free", None, [ctypes.c_void_p]),
        ):
            getattr(libc, name).restype, getattr(libc, name).argtypes = result, arguments
        pointer, size = ctypes.c_void_p, ctypes.c_size_t
        types = [
            ctypes.CFUNCTYPE(pointer, pointer, size),
            ctypes.CFUNCTYPE(pointer, pointer, size, size),
            ctypes.CFUNCTYPE(pointer, pointer, pointer, size),
            ctypes.CFUNCTYPE(None, pointer, pointer, size),
        ]

        class Handler(ctypes.Structure):
            _fields_ = [("name", ctypes.c_char * 127), ("version", ctypes.c_uint8), ("ctx", pointer)] + [
                (f"f{i}", t) for i, t in enumerate(types)
            ]

        own = Handler(
            b"own", 1, None,
            types[0](lambda _, n: libc.malloc(n)),
            types[1](lambda _, n, m: libc.calloc(n, m)),
            types[2](lambda _, p, n: libc.realloc(p, n)),
            types[3](lambda _, p, n: libc.free(p)),
        )  # fmt: skip
        api = ctypes.pythonapi
        api.PyCapsule_New.restype, api.PyCapsule_New.argtypes = ctypes.py_object, [pointer, ctypes.c_char_p, pointer]
        api.PyCapsule_GetPointer.restype = pointer
        api.PyCapsule_GetPointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
        name = ctypes.c_char_p(b"mem_handler")
        capsule = api.PyCapsule_New(ctypes.addressof(own), name, None)
        table = api.PyCapsule_GetPointer(np._core._multiarray_umath._ARRAY_API, None)
        set_handler = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.py_object)(
            ctypes.cast(table, ctypes.POINTER(pointer))[304]
        )
        x = make(1)
        before = set_handler(capsule)
        try:
            y = OP(x)
            assert handler(y) == "own"
            del y
        finally:
            set_handler(before)
        assert handler(OP(x)) == "fastbn"

    @pytest.mark.skipif(not ASAN, reason="needs AddressSanitizer")
    def test_idle_memory_is_poisoned(self):
        """Under AddressSanitizer, what lies idle is as good as freed."""
        code = """
import ctypes, numpy as np, fastbn
op = fastbn.FrozenBatchNorm.from_arrays(np.zeros(64), np.ones(64))
y = op(np.ones((4096, 64), np.float32))
p = y.ctypes.data
del y
ctypes.string_at(p, 64)
report()
"""
        with pytest.raises(AssertionError, match="use-after-poison"):
            run(code, LD_PRELOAD=os.environ["LD_PRELOAD"], ASAN_OPTIONS=os.environ.get("ASAN_OPTIONS", ""))


class TestBound:
    def test_the_limit_holds(self, limit):
        """Red with a store that only grows."""
        held = [OP(make(3)) for _ in range(30)]
        del held
        assert 0 < counted("idle") <= limit
        assert counted("released") >= 30 - limit // (3 * MB)

    def test_so_does_the_number_of_blocks(self):
        x = np.ones((16, 64, 64), np.float32)  # 256 KB
        held = [OP(x) for _ in range(80)]
        assert all(handler(y) == "fastbn" for y in held)
        del held
        assert counted("blocks") == 64

    def test_what_is_larger_than_the_limit_is_not_kept(self):
        fastbn.set_recycle_limit(MB)
        del_me = OP(make(3))
        del del_me
        assert counted("idle") == 0

    def test_the_oldest_gives_way(self):
        fastbn.set_recycle_limit(8 * MB)
        a, b = OP(make(3)), OP(make(4))
        del a
        del b
        last = OP(make(2))
        del last  # 9 MB
        made = counted("made")
        held = OP(make(4)), OP(make(2))
        assert counted("made") == made
        held += (OP(make(3)),)
        assert counted("made") == made + 1

    def test_what_is_old_goes(self):
        OP(make(3))
        idle = counted("idle")
        _native.set_recycling(64 * MB, 0)
        time.sleep(1.1)
        OP(make(2))
        assert 0 < counted("idle") < idle

    def test_a_lower_limit_and_release(self):
        held = OP(make(3)), OP(make(4))
        del held
        fastbn.set_recycle_limit(4 * MB + MB // 2)
        assert 3 * MB <= counted("idle") <= 4 * MB + MB // 2
        assert fastbn.release_memory() > 0
        assert counted("idle") == counted("blocks") == 0
        assert handler(OP(make(1))) == "fastbn"

    def test_off(self):
        before = OP(make(1))
        idle = OP(make(1))
        del idle
        fastbn.set_recycle_limit(0)
        assert counted("idle") == 0
        assert handler(OP(make(1))) == "default_allocator"
        del before  # made while recycling was on
        assert counted("idle") == 0

    def test_arguments(self):
        for wrong, error in (
            (-1, ValueError),
            (1 << 62, ValueError),
            (1.5, TypeError),
            ("1", TypeError),
            (True, TypeError),
        ):
            with pytest.raises(error):
                fastbn.set_recycle_limit(wrong)
        assert fastbn.get_recycle_limit() == 64 * MB


class TestThreadsAndForks:
    def test_threads(self, limit):
        """No two threads get the same memory. Red with a store that anybody may enter."""
        wrong = []

        def work(value):
            x = np.full((16, 64, 256), value, np.float32)
            for _ in range(60):
                y = OP(x)
                held = OP(x)
                if not ((y == value).all() and (held == value).all()) or counted("idle") > limit:
                    wrong.append(value)

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(work, range(8)))
        assert not wrong
        assert counted("blocks") <= 3 * 8  # the old two, until the new one takes a place

    @no_asan
    @pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
    @pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
    def test_fork(self):
        """A child forked at any moment has a store, and what its parent holds stays as it is. Red with a child that
        does not leave the store that its parent's fork had entered.
        """
        stop = threading.Event()
        x = make(1)

        def busy():
            while not stop.is_set():
                OP(x)

        threads = [threading.Thread(target=busy) for _ in range(2)]
        for thread in threads:
            thread.start()
        held = OP(make(1))
        try:
            for value in range(10):
                pid = os.fork()
                if pid == 0:
                    with fastbn.num_threads(1):
                        x[...] = value
                        well = all((OP(x) == value).all() for _ in range(3)) and (held == 1).all()
                        fastbn.release_memory()
                        reused = counted("reused")
                        well = well and handler(OP(x)) == handler(OP(x)) == "fastbn" and counted("reused") > reused
                    os._exit(0 if well else 1)
                assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        finally:
            stop.set()
            for thread in threads:
                thread.join()


V2 = "30 20 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw"
V1 = "36 31 0:30 / /sys/fs/cgroup/memory rw shared:18 - cgroup cgroup rw,memory"
GROUP = "sys/fs/cgroup"


class TestPolicy:
    @pytest.mark.parametrize(
        ("physical", "cgroup", "mount", "files", "expected"),
        [
            (16 << 20, "", "", {}, MB),
            (1 << 40, "", "", {}, 1 << 30),
            (1 << 33, "0::/a", V2, {f"{GROUP}/a/memory.max": "max"}, 1 << 29),
            (1 << 33, "0::/a", V2, {f"{GROUP}/a/memory.max": "1048576"}, 1 << 16),
            (1 << 33, "0::/a/b", V2, {f"{GROUP}/a/memory.max": "1048576", f"{GROUP}/a/b/memory.max": "max"}, 1 << 16),
            (1 << 33, "9:memory:/a", V1, {f"{GROUP}/memory/a/memory.limit_in_bytes": "33554432"}, 2 * MB),
            (1 << 33, "9:memory:/a", V1, {f"{GROUP}/memory/memory.limit_in_bytes": "9223372036854771712"}, 1 << 29),
            (1 << 33, "0::/a", V2, {f"{GROUP}/a/memory.max": "lots"}, 1 << 29),
        ],
    )  # fmt: skip
    def test_a_sixteenth_of_what_there_is(self, tmp_path, physical, cgroup, mount, files, expected):
        """Red where only the innermost group is read, or the machine's memory alone."""
        for name, text in ({"proc/self/cgroup": cgroup, "proc/self/mountinfo": mount} | files).items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text + "\n")
        assert _memory.choose(tmp_path, {}, physical).limit == expected

    @pytest.mark.parametrize(
        ("text", "expected"), [("0", 0), ("123", 123), ("4K", 4096), ("64m", 64 * MB), (" 2G ", 2 << 30)]
    )
    def test_the_environment(self, tmp_path, text, expected):
        choice = _memory.choose(tmp_path, {"FASTBN_RECYCLE_BYTES": text}, 1 << 40)
        assert choice == (expected, f"FASTBN_RECYCLE_BYTES={text.strip()}")

    @pytest.mark.parametrize("text", ["-1", "1.5", "lots", "M", "1T", "²", "9" * 18 + "G"])
    def test_what_makes_no_sense_is_an_error(self, tmp_path, text):
        with pytest.raises(
            ValueError, match="FASTBN_RECYCLE_BYTES must be a number of bytes, such as 0, 500000 or 64M"
        ):
            _memory.choose(tmp_path, {"FASTBN_RECYCLE_BYTES": text}, 1 << 40)

    def test_show_config_tells(self):
        told = run(
            """
import numpy as np
import fastbn
before = fastbn.show_config("dicts")["recycling"]
fastbn.set_recycle_limit(1 << 20)
report(before=before, after=fastbn.show_config("dicts")["recycling"])
""",
            FASTBN_RECYCLE_BYTES="64M",
        )
        assert told["before"] == {"limit": 64 * MB, "why": "FASTBN_RECYCLE_BYTES=64M", "idle": 0}
        assert told["after"] == {"limit": MB, "why": "set_recycle_limit", "idle": 0}
