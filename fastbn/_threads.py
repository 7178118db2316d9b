"""_threads.py -- how many threads a call may use, and why.

The number is process-wide. It is, in this order:

1. ``FASTBN_NUM_THREADS``. It is ours, so anything but an integer from 1 to 1024 is an error at import: a server that
   was configured wrongly should not start. Empty counts as unset.
2. ``OMP_NUM_THREADS``, its first element if it is a list. It is not ours: what cannot be understood is passed over, and
   the reason says so.
3. The smallest of: the CPUs in the affinity mask, the physical cores among them, and the CPU quota of the cgroup and of
   every cgroup above it (v1 and v2), rounded down; at least 1. What the system does not tell does not limit.

``OMP_THREAD_LIMIT`` lowers what 2 and 3 give, and not what 1 gives.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import ContextDecorator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from fastbn import _native, _state

__all__ = ["get_num_threads", "num_threads", "set_num_threads"]

MAX_THREADS = 1024  # FBN_MAX_THREADS


class Choice(NamedTuple):
    """A number of threads, and a line that says where it comes from."""

    number: int
    reason: str


def choose(
    root: Path = Path("/"), environ: Mapping[str, str] = os.environ, cpus: Collection[int] | None = None
) -> Choice:
    """Find the number of threads to start with, on the system whose files are under `root`."""
    own = environ.get("FASTBN_NUM_THREADS", "").strip()
    if own:
        number = natural(own) or 0
        if not 1 <= number <= MAX_THREADS:
            raise ValueError(f"FASTBN_NUM_THREADS must be an integer from 1 to {MAX_THREADS}, got {own!r}")
        return Choice(number, f"FASTBN_NUM_THREADS={own}")

    most = natural(environ.get("OMP_THREAD_LIMIT", "").strip()) or MAX_THREADS
    note = f"; OMP_THREAD_LIMIT={most}" if most < MAX_THREADS else ""
    most = min(most, MAX_THREADS)
    openmp = environ.get("OMP_NUM_THREADS", "").strip()
    if openmp:
        wish = natural(openmp.partition(",")[0].strip())
        if wish:
            return Choice(min(wish, most), f"OMP_NUM_THREADS={openmp}{note}")
        note += f"; OMP_NUM_THREADS={openmp!r} is not understood"

    cpus = _affinity() if cpus is None else cpus
    cores = len({_core(root, cpu) for cpu in cpus})
    quota = min(map(_quota, cgroups(root, "cpu")), default=math.inf)
    said = "no CPU quota" if quota == math.inf else f"a CPU quota of {quota:.4g}"
    number = int(max(1, min(len(cpus), cores, quota, most)))
    return Choice(number, f"{len(cpus)} CPUs allowed, {cores} physical cores, {said}{note}")


def natural(text: str, digits: int = 9) -> int | None:
    """Read a natural number of at most so many digits, and nothing else."""
    return int(text) if text.isascii() and text.isdigit() and len(text) <= digits else None


def _affinity() -> Collection[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return range(os.cpu_count() or 1)


def read(path: Path) -> str:
    """Read a small file of the system's; nothing where there is none."""
    try:
        return path.read_text(errors="replace").strip()
    except (OSError, ValueError):  # ValueError: a path with a null byte, out of a file that makes no sense
        return ""


def _core(root: Path, cpu: int) -> str:
    """Name the core of a CPU by the CPUs that share it; by the CPU alone where that is not told."""
    topology = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
    return read(topology / "core_cpus_list") or read(topology / "thread_siblings_list") or str(cpu)


def cgroups(root: Path, resource: str) -> Iterator[Path]:
    """List the folders of this process's cgroup and of all above it, in every hierarchy that can limit a resource."""
    groups: dict[str, str] = {}
    for line in read(root / "proc/self/cgroup").splitlines():
        number, *rest = line.split(":", 2)
        if number.isdigit() and len(rest) == 2:
            groups |= dict.fromkeys(rest[0].split(","), rest[1])
    for line in read(root / "proc/self/mountinfo").splitlines():
        mount, _, filesystem = line.partition(" - ")
        try:
            top, point = mount.split()[3:5]
            kind, _, options = filesystem.split()[:3]
        except ValueError:
            continue
        controller = {"cgroup2": "", "cgroup": resource}.get(kind)
        if controller not in groups or (controller == resource and resource not in options.split(",")):
            continue
        # A mount may show only a part of the hierarchy, as it does in containers. Where our own group is not in that
        # part, its top is all that can be seen.
        try:
            below = PurePosixPath(groups[controller]).relative_to(top)
        except ValueError:
            below = PurePosixPath()
        if ".." in below.parts:
            below = PurePosixPath()
        folder = root / point.replace("\\040", " ").lstrip("/")
        yield from (folder / step for step in (below, *below.parents))


def _quota(folder: Path) -> float:
    """Read the CPUs' worth of time that a cgroup may use; infinity where nothing, or nothing sensible, is said."""
    words = read(folder / "cpu.max") or " ".join(
        read(folder / name) for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us")
    )
    try:
        quota, period = map(natural, words.split())
    except ValueError:
        return math.inf
    return quota / period if quota and period else math.inf


CHOICE = choose()
_native.set_num_threads(CHOICE.number)


def why() -> str:
    """Say where the present number comes from."""
    return CHOICE.reason if get_num_threads() == CHOICE.number else "set_num_threads"


def set_num_threads(n: int | None) -> None:
    """Set the number of threads that a call may use, for the whole process.

    A call uses this many or one: one where the work is too small to share, where the caller is already inside an OpenMP
    parallel region, and while another thread's call has the others. Results do not depend on it.

    Parameters
    ----------
    n : int or None
        From 1 to 1024. None is the number that an import of fastbn would start with now: for a process whose CPUs or
        quota have changed, such as a server's worker that is pinned after the fork.

    Raises
    ------
    TypeError
        If `n` is not an integer.
    ValueError
        If `n` is out of range. Then nothing is set.

    See Also
    --------
    num_threads : The same for the length of a block.

    Notes
    -----
    Until it is called the number is that of the environment variable ``FASTBN_NUM_THREADS``. Without it, it is that of
    ``OMP_NUM_THREADS``, else what affinity, physical cores and CPU quota allow, and in both cases at most
    ``OMP_THREAD_LIMIT``. `show_config` says which.

    Examples
    --------
    >>> import fastbn
    >>> before = fastbn.get_num_threads()
    >>> fastbn.set_num_threads(1)
    >>> fastbn.get_num_threads()
    1
    >>> fastbn.set_num_threads(before)
    """
    global CHOICE
    if n is None:
        CHOICE = choose()
        n = CHOICE.number
    _native.set_num_threads(_state.as_integer("n", n, 1, MAX_THREADS))


def get_num_threads() -> int:
    """Return the number of threads that a call may use.

    Returns
    -------
    int

    Examples
    --------
    >>> import fastbn
    >>> fastbn.get_num_threads() >= 1
    True
    """
    return _native.get_num_threads()


class num_threads(ContextDecorator):  # noqa: N801 -- called like a function, beside set_num_threads
    """Use another number of threads for the length of a ``with`` block, or of a function that it decorates.

    The number is the whole process's: other threads see it too while the block lasts, and blocks that overlap in
    different threads end with whatever the last of them found. One object may serve any number of blocks, also one
    inside another.

    Parameters
    ----------
    n : int
        From 1 to 1024.

    Raises
    ------
    TypeError
        If `n` is not an integer.
    ValueError
        If `n` is out of range.

    See Also
    --------
    set_num_threads : What a call does with the number.

    Examples
    --------
    >>> import fastbn
    >>> with fastbn.num_threads(1):
    ...     fastbn.get_num_threads()
    1
    """

    def __init__(self, n: int) -> None:
        self._n = _state.as_integer("n", n, 1, MAX_THREADS)
        self._before: list[int] = []

    def __enter__(self) -> None:
        self._before.append(get_num_threads())
        set_num_threads(self._n)

    def __exit__(self, *_: object) -> None:
        set_num_threads(self._before.pop())
