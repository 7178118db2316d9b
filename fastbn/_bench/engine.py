"""engine -- measure contenders against each other in one process.

Contenders take turns, in a new order each round, so that a disturbance of the machine hits all of them alike. A turn is
some calls that nobody times, which bring caches and threads into the state of repeated calls, and then a timed batch of
calls. What is reported is medians: of times, and of the ratios between what was measured in one round.
"""

from __future__ import annotations

import functools
import random
import statistics
import time
import timeit
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import fastbn
from fastbn._bench.cases import Case
from fastbn._bench.data import Check, Tensors
from fastbn._bench.peers import Contender, Copy, Entry

MIN_ROUNDS = 7
# Where rounds are so long that this many seconds would not do, there are fewer.
PATIENCE = 10
FEWEST_ROUNDS = 3
BATCH_SECONDS = 2e-4
# A thread that sleeps on a virtual machine takes some 0.1 ms to come, and then a while to meet its caches again; and
# memory that the copy has streamed is not in the last-level cache before some calls have written it.
WARM_SECONDS = 3e-3
# A call that takes this long does not care what was before.
LONG_SECONDS = 0.02


@dataclass(frozen=True)
class Result:
    """What is known of one contender: seconds a call, multiples of the copy, ulp. The copy itself has no error.

    ``ratio`` is the time over that of the contender ``over``, where there is one to compare with.
    """

    contender: str
    peer: str
    median: float
    fastest: float
    slowest: float
    rounds: int
    multiple: float
    error: float | None
    correct: bool | None
    over: str = ""
    ratio: float | None = None


@dataclass(frozen=True)
class Contest:
    """Who is measured against each other, the copy first, and over whom each is a ratio; the case is the first's."""

    entries: tuple[Entry, ...]
    over: dict[str, str] = field(hash=False)

    @property
    def case(self) -> Case:
        return self.entries[0].case

    def __str__(self) -> str:
        return str(self.case)


@dataclass(frozen=True)
class Group:
    """A contest, measured; the copy comes first."""

    case: Case
    results: tuple[Result, ...]

    def of(self, label: str) -> Result | None:
        """The result of one contender, if it took part."""
        return next((r for r in self.results if r.contender == label), None)


def run(contest: Contest, tensors: Callable[[Case], Tensors], seconds: float) -> Group:
    """Check every contender, then measure them for about ``seconds``."""
    entries = contest.entries
    peers = list(dict.fromkeys(entry.peer for entry in entries))

    def set_threads(threads: int) -> None:
        for peer in peers:
            peer.set_threads(threads)

    before = fastbn.get_num_threads()
    try:
        made = []
        for entry in entries:
            set_threads(entry.case.threads)
            made.append(entry.make(tensors(entry.case)))
        prepare = [functools.partial(set_threads, entry.case.threads) for entry in entries]
        judged = check(entries, made, tensors, set_threads)
        samples = measure([c.run for c in made], seconds, prepare)
    finally:
        fastbn.set_num_threads(before)
    at = {contender.label: i for i, contender in enumerate(made)}
    roofs = {
        (entry.case.dtype, entry.case.threads): times
        for entry, times in reversed(list(zip(entries, samples, strict=True)))
        if isinstance(entry.peer, Copy)
    }
    results = []
    for entry, times, (error, correct) in zip(entries, samples, judged, strict=True):
        roof, over = roofs[entry.case.dtype, entry.case.threads], contest.over.get(str(entry), "")
        results.append(
            Result(
                str(entry),
                entry.peer.name,
                statistics.median(times),
                min(times),
                max(times),
                len(times),
                median_ratio(times, roof),
                error,
                correct,
                over,
                median_ratio(times, samples[at[over]]) if over else None,
            )
        )
    return Group(contest.case, tuple(results))


def median_ratio(times: Sequence[float], others: Sequence[float]) -> float:
    """Of two contenders, round by round: a machine that is slower for a while is so for both."""
    return statistics.median(a / b for a, b in zip(times, others, strict=True))


def check(
    entries: Sequence[Entry],
    made: Sequence[Contender],
    tensors: Callable[[Case], Tensors],
    set_threads: Callable[[int], object] = lambda _: None,
) -> list[tuple[float | None, bool | None]]:
    """Each contender's error, and whether it is tolerated; the copy is only run."""
    checks: dict[Case, Check] = {}
    judged: list[tuple[float | None, bool | None]] = []
    for entry, contender in zip(entries, made, strict=True):
        tensors(entry.case).spoil()  # first, for the input may be what the last contender wrote
        if entry.case not in checks:
            checks[entry.case] = Check(entry.case, tensors(entry.case))
        expected = checks[entry.case]
        set_threads(entry.case.threads)
        error = max(expected.errors(contender.results(contender.run())).values(), default=None)
        judged.append((error, None if error is None else error <= expected.tolerance))
    return judged


def measure(
    calls: Sequence[Callable[[], object]], seconds: float, prepare: Sequence[Callable[[], None]] = ()
) -> list[list[float]]:
    """Seconds a call, a list of samples for each; what prepares a call is not timed."""
    timers = [timeit.Timer(call) for call in calls]
    prepare = prepare or [lambda: None] * len(calls)
    warm, batches = [], []
    for timer, ready in zip(timers, prepare, strict=True):
        ready()
        warm.append(_calls(timer, min(WARM_SECONDS, seconds / 100)))
        batches.append(_calls(timer, BATCH_SECONDS))
    samples: list[list[float]] = [[] for _ in calls]
    order = list(range(len(calls)))
    shuffle = random.Random(0).shuffle
    start = time.perf_counter()
    while (
        len(samples[0]) < FEWEST_ROUNDS
        or (len(samples[0]) < MIN_ROUNDS and time.perf_counter() < start + PATIENCE)
        or time.perf_counter() < start + seconds
    ):
        shuffle(order)
        for i in order:
            prepare[i]()
            wait_until_idle()
            if not samples[i] or samples[i][0] < LONG_SECONDS:
                timers[i].timeit(warm[i])
            samples[i].append(timers[i].timeit(batches[i]) / batches[i])
    return samples


def wait_until_idle() -> None:
    """Wait while threads of the last contender still spin: they would take a core from the next."""
    for _ in range(50):
        before = time.process_time()
        time.sleep(1e-3)
        if time.process_time() - before < 3e-4:
            return


def _calls(timer: timeit.Timer, seconds: float) -> int:
    """How many calls together take so long, or up to twice that."""
    first = timer.timeit(1)
    calls = 1
    if first >= LONG_SECONDS:
        return calls
    while seconds and timer.timeit(calls) < seconds:
        calls *= 2
    return calls
