"""test_threads.py -- rows 3, 4 and 5 of docs/reliability.md: bounded threads, and as many as the machine allows."""

import ctypes
import itertools
import os
import platform
from pathlib import Path

import numpy as np
import pytest
from fresh import ASAN, needs_proc, run

import fastbn
from fastbn import _native, _threads

# ---- row 5: how many ----

TOP2 = "30 24 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup rw,nsdelegate"
TOP1 = "31 25 0:27 / /sys/fs/cgroup/cpu rw,nosuid - cgroup cgroup rw,cpu"
IN_DOCKER2 = TOP2.replace(" / ", " /docker/abc ")
IN_DOCKER1 = TOP1.replace(" / ", " /docker/abc ")
V1 = "sys/fs/cgroup/cpu"
V2 = "sys/fs/cgroup"


def v1(quota, period=100000, below=""):
    return {f"{V1}{below}/cpu.cfs_quota_us": f"{quota}\n", f"{V1}{below}/cpu.cfs_period_us": f"{period}\n"}


def v2(text, below=""):
    return {f"{V2}{below}/cpu.max": f"{text}\n"}


def cores(*siblings):
    """Files that say which CPUs share a core: cores("0,4", "1,5") has two cores of two."""
    return {
        f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list": f"{group}\n"
        for group in siblings
        for cpu in group.split(",")
    }


# name: (/proc/self/cgroup, the lines of /proc/self/mountinfo, other files, CPUs in the affinity mask, threads)
TREES = {
    "nothing is told": (None, [], {}, 8, 8),
    "v2 max": ("0::/a", [TOP2], v2("max 100000", "/a"), 8, 8),
    "v2 two": ("0::/a", [TOP2], v2("200000 100000", "/a"), 8, 2),
    "v2 is rounded down": ("0::/a", [TOP2], v2("199999 100000", "/a"), 8, 1),
    "v2 less than one": ("0::/a", [TOP2], v2("50000 100000", "/a"), 8, 1),
    "v2 other period": ("0::/a", [TOP2], v2("250000 50000", "/a"), 8, 5),
    "v2 above the affinity": ("0::/a", [TOP2], v2("900000 100000", "/a"), 3, 3),
    "v2 parent limits": ("0::/a/b/c", [TOP2], v2("max 100000", "/a/b/c") | v2("300000 100000", "/a"), 8, 3),
    "v2 leaf limits": ("0::/a/b", [TOP2], v2("200000 100000", "/a/b") | v2("300000 100000", "/a"), 8, 2),
    "v2 parent limits more": ("0::/a/b", [TOP2], v2("400000 100000", "/a/b") | v2("200000 100000", "/a"), 8, 2),
    "v2 in a namespace": ("0::/", [TOP2], v2("300000 100000"), 8, 3),
    "v2 partly mounted": ("0::/docker/abc", [IN_DOCKER2], v2("300000 100000"), 8, 3),
    "v2 partly mounted, nested": ("0::/docker/abc/d", [IN_DOCKER2], v2("300000 100000", "/d"), 8, 3),
    "v2 outside the namespace": ("0::/../other", [TOP2], v2("300000 100000"), 8, 3),
    "v2 words": ("0::/a", [TOP2], v2("plenty of time", "/a"), 8, 8),
    "v2 max alone": ("0::/a", [TOP2], v2("max", "/a"), 8, 8),
    "v2 empty": ("0::/a", [TOP2], v2("", "/a"), 8, 8),
    "v2 no period": ("0::/a", [TOP2], v2("100000 0", "/a"), 8, 8),
    "v2 negative": ("0::/a", [TOP2], v2("-100000 100000", "/a"), 8, 8),
    "v2 not a number": ("0::/a", [TOP2], v2("nan inf", "/a"), 8, 8),
    "v2 too many digits": ("0::/a", [TOP2], v2("9" * 5000 + " 1", "/a"), 8, 8),
    "v1 unlimited": ("4:cpu:/a", [TOP1], v1(-1, below="/a"), 8, 8),
    "v1 two": ("4:cpu:/a", [TOP1], v1(200000, below="/a"), 8, 2),
    "v1 with cpuacct": ("4:cpu,cpuacct:/a", [TOP1 + ",cpuacct"], v1(299999, below="/a"), 8, 2),
    "v1 parent limits": ("4:cpu:/a/b", [TOP1], v1(-1, below="/a/b") | v1(200000, below="/a"), 8, 2),
    "v1 partly mounted": ("4:cpu:/docker/abc", [IN_DOCKER1], v1(300000), 8, 3),
    "v1 other controller": ("4:memory:/a", [TOP1.replace("rw,cpu", "rw,memory")], v1(200000, below="/a"), 8, 8),
    "v1 no period": ("4:cpu:/a", [TOP1], {f"{V1}/a/cpu.cfs_quota_us": "200000"}, 8, 8),
    "v1 and v2, v1 limits": ("4:cpu:/a\n0::/b", [TOP2, TOP1], v1(200000, below="/a"), 8, 2),
    "v1 and v2, both limit": (
        "4:cpu:/a\n0::/b",
        [TOP2, TOP1],
        v1(300000, below="/a") | v2("200000 100000", "/b"),
        8,
        2,
    ),
    "v1 and v2, as systemd mounts both": (
        "9:name=systemd:/\n4:memory:/a\n3:cpuset:/\n2:cpuacct:/\n1:cpu:/a/b\n0::/",
        [
            "31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755",
            TOP1,
            "33 31 0:30 / /sys/fs/cgroup/cpuacct rw,relatime - cgroup cgroup rw,cpuacct",
            "40 31 0:37 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,name=systemd",
            TOP2.replace("/sys/fs/cgroup", "/sys/fs/cgroup/unified"),
        ],
        v1(-1) | v1(350000, below="/a") | v1(-1, below="/a/b"),
        8,
        3,
    ),
    "v1 in one mount of two controllers, a quota of the machine": (
        "3:cpu,cpuacct:/\n0::/",
        [TOP1.replace("/cgroup/cpu ", "/cgroup/cpu,cpuacct ") + ",cpuacct"],
        {f"{V1},cpuacct/cpu.cfs_quota_us": "250000", f"{V1},cpuacct/cpu.cfs_period_us": "100000"},
        8,
        2,
    ),
    "garbage around": (
        "\n:::\nx\n\x00\xff\n0::/a\n0",
        ["", "-", " - ", "1 2 3 \x00 \x00 - cgroup2 x y", TOP2, "\xff" * 99],
        v2("200000 100000", "/a"),
        8,
        2,
    ),
    "a space in the mount point": (
        "0::/a",
        [TOP2.replace("/sys/fs/cgroup", "/my\\040groups")],
        {"my groups/a/cpu.max": "200000 100000"},
        8,
        2,
    ),
    "two threads a core": (None, [], cores("0,4", "1,5", "2,6", "3,7"), 8, 4),
    "both threads of one core": (None, [], cores("0,1", "2,3"), 2, 1),
    "the quota below the cores": ("0::/a", [TOP2], v2("300000 100000", "/a") | cores("0,4", "1,5", "2,6", "3,7"), 8, 3),
}


@pytest.mark.parametrize("name", TREES)
def test_quota_affinity_cores(name, tmp_path):
    """Row 5. Red with the quota rounded up, with the walk up the groups left out, or without the mount's own top."""
    cgroup, mounts, files, affinity, expected = TREES[name]
    if cgroup is not None:
        files = files | {"proc/self/cgroup": cgroup, "proc/self/mountinfo": "\n".join(mounts)}
    for path, text in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text, encoding="latin-1")
    choice = _threads.choose(tmp_path, {}, range(affinity))
    assert choice.number == expected, choice.reason


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"FASTBN_NUM_THREADS": "7", "OMP_NUM_THREADS": "3"}, 7),
        ({"FASTBN_NUM_THREADS": " 5 "}, 5),
        ({"FASTBN_NUM_THREADS": "", "OMP_NUM_THREADS": "3"}, 3),
        ({"OMP_NUM_THREADS": "4,2,1"}, 4),
        ({"OMP_NUM_THREADS": "100000"}, 1024),
        ({"OMP_NUM_THREADS": "many"}, 2),
        ({"OMP_NUM_THREADS": "0"}, 2),
        ({"OMP_NUM_THREADS": ""}, 2),
        ({"OMP_NUM_THREADS": "4", "OMP_THREAD_LIMIT": "3"}, 3),
        ({"OMP_NUM_THREADS": "4", "OMP_THREAD_LIMIT": "5"}, 4),
        ({"OMP_NUM_THREADS": "4", "OMP_THREAD_LIMIT": "0"}, 4),
        ({"OMP_THREAD_LIMIT": "1"}, 1),
        ({"FASTBN_NUM_THREADS": "4", "OMP_THREAD_LIMIT": "1"}, 4),
        ({}, 2),
    ],
)
def test_environment_comes_first(environment, expected, tmp_path):
    """Row 5. Red with OMP_NUM_THREADS looked at before FASTBN_NUM_THREADS, or not cut at the comma; or with
    OMP_THREAD_LIMIT not looked at.
    """
    choice = _threads.choose(tmp_path, environment, range(2))
    assert choice.number == expected
    assert all(text.strip() in choice.reason for text in list(environment.values())[:1])


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "two", "1025", "9" * 400, "1_0", "٣"])
def test_a_wrong_number_of_ours_stops_the_start(value, tmp_path):
    """Row 5. Red with a fall back to the machine's number."""
    with pytest.raises(ValueError, match="FASTBN_NUM_THREADS must be an integer from 1 to 1024, got "):
        _threads.choose(tmp_path, {"FASTBN_NUM_THREADS": value}, range(2))


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs affinity masks")
def test_affinity_of_the_real_process():
    """Row 5. Red with os.cpu_count() in place of the affinity mask, where there are two CPUs."""
    got = run("""
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
import fastbn
report(number=fastbn.get_num_threads(), why=fastbn._threads.why())
""")
    assert got["number"] == 1
    assert got["why"].startswith("1 CPUs allowed")


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs affinity masks")
def test_none_looks_again():
    """Row 5: a worker that is pinned after the fork. Red with the number of the import."""
    got = run("""
import fastbn
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
fastbn.set_num_threads(7)
fastbn.set_num_threads(None)
report(number=fastbn.get_num_threads(), why=fastbn._threads.why())
""")
    assert got["number"] == 1
    assert got["why"].startswith("1 CPUs allowed")


@pytest.mark.skipif(not Path("/proc/self/cgroup").exists(), reason="needs cgroups")
def test_a_quota_of_the_real_system(request):
    """Row 5: a group above ours has the quota. Red where only the innermost group is read, or its files are looked for
    under other names than the system's. Skips where the user may not make groups.
    """
    for top, limit in [(V1, "cpu.cfs_quota_us"), (V2, "cpu.max")]:
        outer = Path("/", top, f"fastbn-test-{os.getpid()}")
        inner = outer / "inner"
        try:
            outer.mkdir()
            request.addfinalizer(outer.rmdir)
            inner.mkdir()
            request.addfinalizer(inner.rmdir)
            (outer / limit).write_text("150000" if top == V1 else "150000 100000")
            break
        except OSError:
            continue
    else:
        pytest.skip("may not make a group with a quota")
    got = run(
        f"""
with open({str(inner / "cgroup.procs")!r}, "w") as file:
    file.write(str(os.getpid()))
from fastbn import _threads
report(why=_threads.choose(cpus=range(8)).reason, number=_threads.choose(cpus=range(8)).number)
"""
    )
    assert got["why"].endswith(", a CPU quota of 1.5")
    assert got["number"] == 1


def test_why():
    """Red with a reason that is fixed at import."""
    got = run("import fastbn; report(why=fastbn._threads.why())", FASTBN_NUM_THREADS="3")
    assert got["why"] == "FASTBN_NUM_THREADS=3"
    with fastbn.num_threads(_threads.CHOICE.number + 1):
        assert _threads.why() == "set_num_threads"
    with fastbn.num_threads(_threads.CHOICE.number):
        assert _threads.why() == _threads.CHOICE.reason


# ---- setting it ----


@pytest.mark.parametrize("n", [0, -1, 1025, 2**31, 2**80])
def test_set_num_threads_out_of_range(n):
    """Red without the check, or with another limit in C: the number is then another one afterwards."""
    before = fastbn.get_num_threads()
    with pytest.raises(ValueError, match=f"from 1 to 1024, got {n}"):
        fastbn.set_num_threads(n)
    with pytest.raises(ValueError, match=f"from 1 to 1024, got {n}"):
        fastbn.num_threads(n)  # and not only when it is entered
    assert fastbn.get_num_threads() == before


@pytest.mark.parametrize("n", [2.0, "2", [2], True])
def test_set_num_threads_wrong_type(n):
    """Red with int() in place of operator.index(), or with a bool taken for a number."""
    for call in (fastbn.set_num_threads, fastbn.num_threads):
        with pytest.raises(TypeError, match=f"n must be an integer, got {type(n).__name__}"):
            call(n)


def test_num_threads_restores():
    """Red with a block that sets nothing back when it ends with an exception."""
    seen = [fastbn.get_num_threads()]

    @fastbn.num_threads(1024)
    def fail():
        seen.append(fastbn.get_num_threads())
        with fastbn.num_threads(1):
            seen.append(fastbn.get_num_threads())
        seen.append(fastbn.get_num_threads())
        raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert seen[1:] == [1024, 1, 1024]
    assert fastbn.get_num_threads() == seen[0]


def test_num_threads_serves_any_number_of_blocks():
    """Red with one number to return to for all blocks of an object, or with a generator, which serves one."""
    before = fastbn.get_num_threads()
    limit = fastbn.num_threads(1)
    for _ in range(2):
        with limit:
            assert fastbn.get_num_threads() == 1
            with fastbn.num_threads(1024):
                with limit:
                    assert fastbn.get_num_threads() == 1
                assert fastbn.get_num_threads() == 1024
            assert fastbn.get_num_threads() == 1
        assert fastbn.get_num_threads() == before

    @limit
    def countdown(n):
        assert fastbn.get_num_threads() == 1
        return n and countdown(n - 1)

    assert countdown(3) == 0
    assert fastbn.get_num_threads() == before


def test_team_or_no_team():
    """Red with a plan that shares small work, or a C core that ignores the number."""
    frozen = fastbn.FrozenBatchNorm.from_arrays(np.zeros(8), np.ones(8))
    for elements, threads, expected in [(1 << 20, 3, 1), (1 << 20, 1, 0), (64, 3, 0)]:
        x = np.ones((elements // 8, 8), np.float32)
        before = _native.parallel_counters()
        with fastbn.num_threads(threads):
            frozen(x)
        after = _native.parallel_counters()
        assert after["parallel"] - before["parallel"] == (expected if _native.parallel_runtime() != "serial" else 0)
        assert after["contended"] == before["contended"]


def test_a_team_is_whole_or_none():
    """Of T threads or of one, whatever the work: another size would make the system start and end threads. Red with a
    plan that gives less work to fewer threads.
    """
    teams = {
        _native.plan(op, dtype, family, outer, channels, 1 if family == "cols" else 49, 6)["team"]
        for op in ("moments", "forward", "normalize", "reduce", "backward", "apply")
        for dtype in ("float16", "float32", "float64")
        for family in ("rows", "cols")
        for outer, channels in itertools.product([1, 2, 8, 64, 1000], [1, 3, 64, 512])
    }
    assert teams == {1, 6}


# ---- rows 3 and 4: bounded ----

SETUP = """
import numpy as np
import fastbn
from fastbn import _native

rng = np.random.default_rng(0)
large = rng.standard_normal((4, 64, 28, 28), dtype=np.float32)
small = rng.standard_normal((2, 64), dtype=np.float32)
frozen = fastbn.FrozenBatchNorm.from_arrays(rng.standard_normal(64), rng.random(64) + 0.5, activation="relu")
"""


@needs_proc
def test_forty_callers():
    """Row 3, 8 000 calls. Red with workers that do nothing, with a pool for every caller (built with FBN_OPENMP_TEAM),
    with a token that is never taken, or with the job written before the token is held.
    """
    got = run(
        SETUP
        + """
CALLERS, CALLS = 40, 200
expected = frozen(large).view(np.uint32)
outs = [np.zeros_like(large) for _ in range(CALLERS)]
start, end = threading.Barrier(CALLERS + 1), threading.Barrier(CALLERS + 1)
wrong, most = [], 0

def caller(out):
    global most
    start.wait()
    for _ in range(CALLS):
        out.fill(0)
        frozen(large, out=out)
        if not np.array_equal(out.view(np.uint32), expected):
            wrong.append(out)
    most = max(most, len(comms()))
    end.wait()

before, memory = len(comms()) - comms().count("fastbn"), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
threads = [threading.Thread(target=caller, args=(out,)) for out in outs]
for thread in threads:
    thread.start()
start.wait()
end.wait()
for thread in threads:
    thread.join()
grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) / 1024
report(wrong=len(wrong), extra=most - before, grown=grown, ours=comms().count("fastbn"), **_native.parallel_counters())
""",
        timeout=100,
        FASTBN_NUM_THREADS="4",
    )
    assert got["wrong"] == 0
    assert got["extra"] <= 40 + (4 - 1) + 2
    assert got["grown"] <= 64 or ASAN
    assert got["parallel"] > 1
    assert got["parallel"] + got["contended"] == 8001
    if _native.parallel_runtime() == "pthreads":
        assert got["ours"] == 3
        assert got["helped"] > 0


@needs_proc
def test_no_thread_is_created_after_the_first():
    """Row 4, 2 000 calls. Red with workers that end after their share, or that do nothing."""
    got = run(
        SETUP
        + """
frozen(large)
tasks = os.listdir("/proc/self/task")
changed = 0
for i in range(1000):
    frozen(small)
    changed += os.listdir("/proc/self/task") != tasks
    with fastbn.num_threads(4 - i % 4):
        frozen(large)
    changed += os.listdir("/proc/self/task") != tasks
report(changed=changed, ours=comms().count("fastbn"), **_native.parallel_counters())
""",
        FASTBN_NUM_THREADS="4",
    )
    assert got["changed"] == 0
    assert got["parallel"] == 751
    if _native.parallel_runtime() == "pthreads":
        assert got["ours"] == 3
        assert got["helped"] > 0


@needs_proc
@pytest.mark.skipif(ASAN, reason="AddressSanitizer needs the address space")
def test_without_more_threads_it_computes_alone():
    """Red with workers counted and named that could not be started."""
    got = run(
        SETUP
        + """
with fastbn.num_threads(1):
    expected = frozen(large).tobytes()
out = np.zeros_like(large)
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize() + (64 << 20)
resource.setrlimit(resource.RLIMIT_AS, (size, size))
for _ in range(3):
    frozen(large, out=out)
    assert out.tobytes() == expected
report(threads=len(comms()), **_native.parallel_counters())
""",
        FASTBN_NUM_THREADS="200",
    )
    assert got["threads"] < 100


@needs_proc
def test_signals_are_not_for_workers():
    """Red without pthread_sigmask around the start of workers."""
    got = run(
        SETUP
        + """
import signal
frozen(large)

def blocked(number):
    answers = []
    for tid in os.listdir("/proc/self/task"):
        with open(f"/proc/self/task/{tid}/status") as file:
            status = dict(line.split(":", 1) for line in file)
        if status["Name"].strip() == "fastbn":
            answers.append(bool(int(status["SigBlk"], 16) >> (number - 1) & 1))
    return answers

# A thread that has not run yet still has everything blocked.
for _ in range(1000):
    if not any(blocked(signal.SIGSEGV)):
        break
    time.sleep(0.01)
report(runtime=_native.parallel_runtime(), interrupt=blocked(signal.SIGINT), fault=blocked(signal.SIGSEGV))
""",
        FASTBN_NUM_THREADS="3",
    )
    if got["runtime"] != "pthreads":
        pytest.skip("the workers are the OpenMP runtime's")
    assert got["interrupt"] == [True, True]
    assert got["fault"] == [False, False]


@pytest.mark.skipif(
    platform.machine() != "x86_64" or platform.libc_ver()[0] != "glibc",
    reason="sets the flags of the x86-64 control register through glibc",
)
def test_workers_flush_subnormals_if_the_caller_does():
    """Red without fesetenv in the worker: under flush-to-zero the caller's share of the result is flushed alone."""
    libm = ctypes.CDLL("libm.so.6")
    saved, flushing = ctypes.create_string_buffer(32), ctypes.create_string_buffer(32)
    libm.fegetenv(saved)
    flushing[:] = saved[:]
    flushing[28:30] = (int.from_bytes(saved[28:30], "little") | 0x8040).to_bytes(2, "little")  # FTZ, DAZ

    x = np.random.default_rng(0).standard_normal((64, 64, 32, 32), dtype=np.float32)
    frozen = fastbn.FrozenBatchNorm.from_arrays(np.zeros(64), np.ones(64), np.full(64, 1e-39))

    def compute(environment, threads):
        libm.fesetenv(environment)
        try:
            with fastbn.num_threads(threads):
                return frozen(x).tobytes()
        finally:
            libm.fesetenv(saved)

    for environment in (flushing, saved):
        expected = compute(environment, 1)
        for _ in range(10):
            assert compute(environment, 4) == expected


@needs_proc
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity") or len(os.sched_getaffinity(0)) < 2, reason="needs 2 CPUs")
def test_a_pinned_caller_does_not_pin_the_workers():
    """Row 5. Red with workers that inherit the affinity of the thread that called first."""
    got = run(
        """
import numpy as np
import fastbn
everywhere = os.sched_getaffinity(0)
x = np.ones((8, 64, 28, 28), np.float32)
def call():
    os.sched_setaffinity(threading.get_native_id(), {min(everywhere)})
    fastbn.moments(x)
first = threading.Thread(target=call)
first.start()
first.join()
def name(t):
    try:
        return open(f"/proc/self/task/{t}/comm").read()
    except OSError:  # it has just ended
        return ""
def workers():
    return [int(t) for t in os.listdir("/proc/self/task") if name(t) == "fastbn\\n"]
def free():
    return all(os.sched_getaffinity(t) == everywhere for t in workers())
for _ in range(1000):  # a new thread names and frees itself, once it gets a processor
    if workers() and free():
        break
    time.sleep(0.01)
report(workers=len(workers()), free=free())
""",
        FASTBN_NUM_THREADS="2",
    )
    assert got["free"]
    if _native.parallel_runtime() == "pthreads":
        assert got["workers"] == 1
