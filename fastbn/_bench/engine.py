"""engine -- measure contenders against each other in one process.

Contenders take turns, in a new order each round, so that a disturbance of the machine hits all of them alike. A turn is
one call that nobody times, which brings caches and threads into the state of repeated calls, and then a timed batch of
calls. What is reported is medians, and their ratios to the streaming copy of the same bytes.
"""

from __future__ import annotations

import random
import statistics
import time
import timeit
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import fastbn
from fastbn._bench.cases import Case
from fastbn._bench.data import Check, Tensors
from fastbn._bench.peers import Contender

MIN_ROUNDS = 7
BATCH_SECONDS = 2e-4


@dataclass(frozen=True)
class Result:
    """What is known of one contender: seconds a call, multiples of the copy, ulp. The copy itself has no error."""

    contender: str
    median: float
    fastest: float
    slowest: float
    rounds: int
    multiple: float
    error: float | None
    correct: bool | None


@dataclass(frozen=True)
class Group:
    """One case, measured; the copy comes first."""

    case: Case
    results: tuple[Result, ...]

    def of(self, label: str) -> Result | None:
        """The result of one contender, if it took part."""
        return next((r for r in self.results if r.contender == label), None)


def run(case: Case, tensors: Tensors, field: Sequence[Contender], seconds: float) -> Group:
    """Check every contender of a case, the copy first, then measure them for about ``seconds``."""
    with fastbn.num_threads(case.threads):
        errors, tolerance = check(case, tensors, field)
        samples = measure([c.run for c in field], seconds)
    roof = statistics.median(samples[0])
    results = []
    for contender, times, error in zip(field, samples, errors, strict=True):
        median, correct = statistics.median(times), None if error is None else error <= tolerance
        multiple = median / roof
        results.append(Result(contender.label, median, min(times), max(times), len(times), multiple, error, correct))
    return Group(case, tuple(results))


def check(case: Case, tensors: Tensors, field: Sequence[Contender]) -> tuple[list[float | None], float]:
    """Each contender's error, and how much is tolerated; the copy is only run."""
    expected = Check(case, tensors)
    errors: list[float | None] = []
    for contender in field:
        tensors.spoil()
        errors.append(max(expected.errors(contender.results(contender.run())).values(), default=None))
    return errors, expected.tolerance


def measure(calls: Sequence[Callable[[], object]], seconds: float) -> list[list[float]]:
    """Seconds a call, a list of samples for each."""
    timers = [timeit.Timer(call) for call in calls]
    batches = [_batch(timer) for timer in timers]
    samples: list[list[float]] = [[] for _ in calls]
    order = list(range(len(calls)))
    shuffle = random.Random(0).shuffle
    end = time.perf_counter() + seconds
    while len(samples[0]) < MIN_ROUNDS or time.perf_counter() < end:
        shuffle(order)
        for i in order:
            wait_until_idle()
            timers[i].timeit(1)
            samples[i].append(timers[i].timeit(batches[i]) / batches[i])
    return samples


def wait_until_idle() -> None:
    """Wait while threads of the last contender still spin: they would take a core from the next."""
    for _ in range(50):
        before = time.process_time()
        time.sleep(1e-3)
        if time.process_time() - before < 3e-4:
            return


def _batch(timer: timeit.Timer) -> int:
    """Calls that together are long enough for the clock."""
    timer.timeit(1)
    calls = 1
    while timer.timeit(calls) < BATCH_SECONDS:
        calls *= 2
    return calls
