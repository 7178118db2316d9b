"""model -- how long a call should take, from a few measurements of the machine and the arithmetic of docs/scaling.md.

``python benchmarks/model.py`` measures the constants, predicts every case, measures it and prints both. With --cores it
also says what to expect of a bigger machine, which is predicted and not measured.
"""

import argparse
import dataclasses
import math
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby, product
from statistics import geometric_mean, median

import numpy as np

import fastbn
from fastbn import _native
from fastbn._bench import engine, report
from fastbn._bench.cases import SHAPES, Case, format_shape, parse_shape
from fastbn._bench.cli import duration
from fastbn._bench.data import Tensors, aligned
from fastbn._bench.peers import Copy, Entry, Fastbn

FLOAT32 = np.dtype(np.float32)
SIZE = 4
STEPS = {"forward": ("moments", "normalize"), "backward": ("reduce", "apply"), "inference": (None, "normalize")}
READS = {"moments": 1, "normalize": 1, "reduce": 2, "apply": 2}
PLANS = {"forward": "forward", "backward": "backward", "inference": "normalize"}
# Lengths of a run whose kernels are measured: of a plane where it is a channel's, else of a row.
RUNS = {"rows": (49, 196, 784, 3136, 12544), "cols": (64, 256, 1024)}
FOOTPRINTS = [2**i for i in range(18, 29)]


@dataclass
class Machine:
    """The constants: seconds; bytes are of the tensors of a call together, ``threads`` those of its team."""

    l2: int
    l3: int
    follows: bool
    known: tuple[int, ...]  # the thread counts that were measured
    kernels: dict[tuple[str, str], list[float]] = field(default_factory=dict)  # an element in cache, for each of RUNS
    calls: dict[str, tuple[float, float]] = field(default_factory=dict)  # a call, and more for each channel
    worker: float = 0.0  # to start and await one more thread
    reads: dict[int, list[float]] = field(default_factory=dict)  # a byte, for each of FOOTPRINTS
    writes: dict[int, float] = field(default_factory=dict)  # a byte that is streamed
    bandwidth: float = math.inf  # bytes a second of all memory together, where it was not measured

    def element(self, kernel: str, family: str, run: int) -> float:
        return float(np.interp(math.log(run), np.log(RUNS[family]), self.kernels[kernel, family]))

    def read(self, footprint: float, threads: int) -> float:
        """What a byte costs a team that goes round and round in so much memory, beyond what it does in cache."""
        if threads in self.known:
            return _beyond(footprint, self.reads[threads])
        # Cores share the last level: half of it may be counted on.
        alone = footprint / threads if footprint <= self.l3 // 2 else FOOTPRINTS[-1]
        return _beyond(alone, self.reads[1]) / threads

    def write(self, threads: int) -> float:
        return self.writes[threads] if threads in self.known else self.writes[1] / threads

    def floor(self, footprint: float, fetched: float, streamed: float) -> float:
        """What so many bytes take at the least in a memory whose bandwidth is a guess."""
        return (fetched * (footprint > self.l3 // 2) + streamed) / self.bandwidth

    def again(self, footprint: float, threads: int) -> float:
        """What a byte costs in a second sweep that starts where the first ended."""
        known = self.reads[threads if threads in self.known else 1]
        memory, cache = known[-1], min(r for r, f in zip(known, FOOTPRINTS, strict=True) if f > self.l2)
        kept = max(f for r, f in zip(known, FOOTPRINTS, strict=True) if r <= (cache + memory) / 2)
        if threads not in self.known:
            kept = min(kept * threads, self.l3 // 2)
        share = min(1.0, kept / footprint)
        return share * self.read(min(kept, footprint), threads) + (1 - share) * self.read(footprint, threads)


def _beyond(footprint: float, costs: list[float]) -> float:
    cost = float(np.interp(math.log(footprint), np.log(FOOTPRINTS), costs))
    return math.sqrt(cost**2 - min(costs) ** 2)


def predict(m: Machine, op: str, layout: str, shape: tuple[int, ...], threads: int) -> float:
    """Seconds of a call with out=, in the steady state of repeated calls."""
    family = "cols" if layout == "NHWC" else "rows"
    n, c, inner = shape[0], shape[1], math.prod(shape[2:])
    outer, inner = (n * inner, 1) if family == "cols" else (n, inner)
    machine = {"l2": m.l2, "l3": m.l3, "follows": m.follows}
    plan = _native.plan(PLANS[op], "float32", family, outer, c, inner, threads, machine=machine)
    team, elements = plan["team"], math.prod(shape)
    x = elements * SIZE
    reduce, apply = STEPS[op]
    inputs = READS[apply] * x
    footprint = inputs + x * (not plan["stream"])
    # A store into the cache fetches its line first, from where the footprint lies.
    store = 0 if plan["stream"] or footprint <= m.l2 * team else m.read(footprint, team) * x
    streamed = m.write(team) * x if plan["stream"] else 0
    fetch, again = m.read(footprint, team) * inputs, m.again(footprint, team) * inputs

    # Whole slabs are dealt to threads: the longest share is what all wait for.
    slabs = plan["slabs"]
    share = -(-slabs // team) / slabs if slabs else 1 / team
    run = c if family == "cols" else inner

    def work(kernel: str) -> float:
        dealt = share
        if kernel == reduce and family == "cols":  # in strips of rows (kernels/channel.h) and tiles of columns
            tasks = min(max(outer // 768, 1), 128) * -(-c // plan["tile"])
            dealt = max(share, -(-tasks // team) / tasks)
        return m.element(kernel, family, run) * elements * dealt

    # Arithmetic and traffic overlap in part: more than if one waited for the other, less than the longer alone.
    reads, all_moved = m.floor(footprint, inputs, 0), m.floor(footprint, inputs, x * plan["stream"])
    if reduce is None:
        steps = max(math.hypot(work(apply), fetch + store, streamed), all_moved)
    elif not slabs:
        steps = max(math.hypot(work(reduce), fetch), reads)
        steps += max(math.hypot(work(apply), again + store, streamed), all_moved)
    elif plan["turn"]:
        steps = max(math.hypot(work(reduce) + work(apply), fetch, streamed), all_moved)
    elif plan["ahead"]:
        steps = work(reduce) + max(math.hypot(work(apply), fetch, streamed), all_moved)
    else:
        steps = math.hypot(work(reduce), fetch) + math.hypot(work(apply), store, streamed)
    call, channel = m.calls[op]
    regions = 1 if slabs or reduce is None else 2
    return call + channel * c * (share if slabs else 1) + regions * m.worker * (team - 1) + steps


def predict_copy(m: Machine, shape: tuple[int, ...], threads: int) -> float:
    x = math.prod(shape) * SIZE
    moved = max(math.hypot(m.read(x, threads), m.write(threads)) * x, m.floor(x, x, x))
    return m.worker * (threads - 1) + moved


def seconds(calls: dict, budget: float) -> dict:
    """Measure calls by (anything, threads) against each other."""
    prepare = [partial(fastbn.set_num_threads, threads) for _, threads in calls]
    with fastbn.num_threads(fastbn.get_num_threads()):
        return dict(zip(calls, map(median, engine.measure(list(calls.values()), budget, prepare)), strict=True))


def filled(shape: tuple[int, ...]) -> np.ndarray:
    made = aligned(shape, FLOAT32)
    made[...] = np.random.default_rng(0).standard_normal(shape[1:], np.float32)
    return made


def measure_machine(budget: float) -> Machine:
    """Measure the constants: what is small and in cache first, then memory."""
    every = fastbn.get_num_threads()
    m = Machine(**_native.machine(), known=tuple(sorted({1, every})))
    for family, runs in RUNS.items():
        for run in runs:
            for kernel, cost in _kernels(family, run, m.l2 // 2 // SIZE, 2 * budget).items():
                m.kernels.setdefault((kernel, family), []).append(cost)
    _calls(m, budget)
    line, source = (aligned((16,), FLOAT32) for _ in range(2)), filled((2**13, 16))
    a, b = line
    copies = {("line", t): partial(_native.copy, a, b, t) for t in m.known}
    target = aligned(source.shape, FLOAT32)
    copies |= {("copy", t): partial(_native.copy, source, target, t) for t in m.known}
    found = seconds(copies, budget)
    m.worker = max(0.0, found["line", every] - found["line", 1]) / max(1, every - 1)
    m.writes = {t: found["copy", t] / source.nbytes for t in m.known}
    m.reads = {t: [] for t in m.known}
    for footprint in FOOTPRINTS:
        x, dy = (filled((footprint // 2 // SIZE // 2**14, 4, 2**12)) for _ in range(2))
        reduce = partial(fastbn.backward_reduce, dy, x, np.zeros(4))
        found = seconds({("read", t): reduce for t in m.known}, budget)
        for t in m.known:
            m.reads[t].append(found["read", t] / footprint)
    return m


def _kernels(family: str, run: int, size: int, budget: float) -> dict[str, float]:
    """Seconds an element in cache: what four times the elements take longer, so that what a call costs drops out."""
    rows = size // run if family == "cols" else min(16, size // run)
    channels = run if family == "cols" else max(1, size // (run * rows))
    shapes = [(k * rows, channels) + (run,) * (family == "rows") for k in (1, 4)]
    calls = {}
    for shape in shapes:
        x, dy, y = filled(shape), filled(shape), filled(shape)
        frozen = fastbn.BatchNorm(channels).freeze()
        mean, var, weight = np.zeros(channels), np.ones(channels), np.ones(channels, np.float32)
        sums = fastbn.backward_reduce(dy, x, mean)
        apply = partial(fastbn.backward_apply, dy, x, mean, var, weight, *sums, x.size // channels, out=y)
        calls[("moments", shape), 1] = partial(fastbn.moments, x)
        calls[("normalize", shape), 1] = partial(frozen, x, out=y)
        calls[("reduce", shape), 1] = partial(fastbn.backward_reduce, dy, x, mean)
        calls[("apply", shape), 1] = apply
    found = seconds(calls, budget)
    small, large = shapes
    more = math.prod(large) - math.prod(small)
    return {k: max(0.0, found[(k, large), 1] - found[(k, small), 1]) / more for k in READS}


def _calls(m: Machine, budget: float) -> None:
    """What a call costs that has next to nothing to do, and what each channel adds."""
    calls = {}
    for channels, op in product((16, 1024), STEPS):
        case = Case(op, (2, channels), threads=1)
        calls[(op, channels), 1] = Entry(case, Fastbn(), "NC").make(Tensors(*case.data)).run
    found = seconds(calls, budget)
    for op in STEPS:
        few, many = (found[(op, channels), 1] for channels in (16, 1024))
        channel = (many - few) / (1024 - 16)
        m.calls[op] = few - 16 * channel, channel


def compare(m: Machine, shapes: list[tuple[int, ...]], budget: float) -> list[tuple[tuple, float, float]]:
    """Predict and measure, in multiples of the copy that was predicted, or measured, beside it."""
    found = []
    for shape in report.progress(shapes):
        tensors = Tensors(shape, "float32")
        copies = {("copy", t): Entry(Case("copy", shape, threads=t), Copy()).make(tensors).run for t in m.known}
        calls = {
            ((op, layout), t): Entry(Case(op, shape, threads=t), Fastbn(), layout).make(tensors).run
            for op, layout, t in product(STEPS, Fastbn.layouts, m.known)
        }
        times = seconds(copies | calls, budget)
        for (op, layout), t in calls:
            predicted = predict(m, op, layout, shape, t) / predict_copy(m, shape, t)
            found.append(((op, layout, t, shape), predicted, times[(op, layout), t] / times["copy", t]))
    return sorted(found, key=lambda row: row[0][:3])


def table(found: list[tuple[tuple, float, float]]) -> str:
    """All cases, then what they are in geometric mean."""
    rows = [["", "", "threads", "shape", "predicted", "measured", "ratio"]]
    means = [["", "", "threads", "predicted", "measured", "mean error", "within 20 %"]]
    for (op, layout, t, shape), predicted, measured in found:
        words = [op, layout, str(t), format_shape(shape)]
        rows.append([*words, f"{predicted:.2f}", f"{measured:.2f}", f"{predicted / measured:.2f}"])
    groups = [(key, list(rest)) for key, rest in groupby(found, key=lambda row: row[0][:3])]
    for key, group in [*groups, (("all", "", ""), found)]:
        predicted, measured = (geometric_mean(row[i] for row in group) for i in (1, 2))
        ratios = [row[1] / row[2] for row in group]
        mean = geometric_mean(max(r, 1 / r) for r in ratios) - 1
        within = sum(1 / 1.2 <= r <= 1.2 for r in ratios)
        words = list(map(str, key))
        means.append([*words, f"{predicted:.2f}", f"{measured:.2f}", f"{mean:.0%}", f"{within} of {len(group)}"])
    return "\n".join([*report.aligned(rows), "", *report.aligned(means)])


def bigger(m: Machine, sockets: int, bandwidth: float, l3: float) -> Machine:
    """A machine of such cores with other memory: GB/s and MB are of a socket. Nothing of it is measured."""
    shared = {"l3": int(l3 * 2**20 * sockets), "bandwidth": bandwidth * 1e9 * sockets}
    return dataclasses.replace(m, known=(1,), reads={1: m.reads[1]}, writes={1: m.writes[1]}, **shared)


def expect(m: Machine, cores: int, shapes: list[tuple[int, ...]]) -> list[list[str]]:
    """What the model says of so many cores: microseconds, multiples of the copy, and how much faster than one core."""
    rows = [["shape", "", "", "us", "x copy", "x one core"]]
    for op, layout, shape in product(STEPS, Fastbn.layouts, shapes):
        one, every = (predict(m, op, layout, shape, t) for t in (1, cores))
        copy = predict_copy(m, shape, cores)
        words = [format_shape(shape), op, layout]
        rows.append([*words, f"{every * 1e6:.0f}", f"{every / copy:.2f}", f"{one / every:.1f}"])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", default=["resnet50"], help="as in python -m fastbn bench")
    parser.add_argument("--seconds", type=duration, default=0.2, help="for each group of measurements")
    parser.add_argument("--cores", type=int, help="predict so many of this machine's cores, too")
    parser.add_argument("--sockets", type=int, default=1, help="that they are on")
    parser.add_argument("--bandwidth", type=float, default=300, help="GB/s of a socket (default: %(default)s)")
    parser.add_argument("--l3", type=float, default=256, help="MB of a socket (default: %(default)s)")
    args = parser.parse_args()
    for name in ("cores", "sockets", "bandwidth", "l3"):
        if (value := getattr(args, name)) is not None and not 0 < value < math.inf:
            parser.error(f"--{name} must be positive and finite, got {value}")
    try:
        shapes = [shape for name in args.shapes for shape in SHAPES.get(name) or (parse_shape(name),)]
    except ValueError as error:
        parser.error(f"--shapes: {error}")
    print(report.describe(report.machine([Fastbn()])))
    others = report.Others()
    m = measure_machine(args.seconds)
    print("\n".join([*constants(m), "", "multiples of the copy", table(compare(m, shapes, args.seconds))]))
    if args.cores:
        guess = bigger(m, args.sockets, args.bandwidth, args.l3)
        print(f"\npredicted, not measured: {args.cores} cores, {args.sockets} sockets, {args.bandwidth:g} GB/s each")
        print("\n".join(report.aligned(expect(guess, args.cores, shapes))))
    print(report.verdict([], others.share()))


def constants(m: Machine) -> list[str]:
    """What was measured of the machine."""
    rows = [["picoseconds an element, run of", *map(str, RUNS["rows"]), *(f"C={c}" for c in RUNS["cols"])]]
    for kernel in READS:
        costs = m.kernels[kernel, "rows"] + m.kernels[kernel, "cols"]
        rows.append([kernel, *(f"{cost * 1e12:.0f}" for cost in costs)])
    memory = [["picoseconds a byte read, MB of", *(f"{f / 2**20:g}" for f in FOOTPRINTS)]]
    memory += [[f"{t} threads", *(f"{cost * 1e12:.1f}" for cost in m.reads[t])] for t in m.known]
    streams = ", ".join(f"{cost * 1e12:.0f} on {t} threads" for t, cost in m.writes.items())
    calls = ", ".join(f"{op} {a * 1e6:.2g} us + {b * 1e9:.2g} ns a channel" for op, (a, b) in m.calls.items())
    said = [f"a byte streamed: {streams} ps", f"a call: {calls}", f"a worker: {m.worker * 1e6:.2g} us"]
    return [*report.aligned(rows), "", *report.aligned(memory), "", *said]


if __name__ == "__main__":
    main()
