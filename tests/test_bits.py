"""test_bits -- promise 3: the same bytes for every team, every tier, every repeat and every place of the result.

Seeded bug that turns it red: partial sums combined by thread instead of by block.
"""

import itertools
from functools import partial

import arrays
import numpy as np
import pytest
from arrays import normal, parameters

import fastbn
from fastbn import _native

TEAMS = tuple(range(1, 9))

# Around lanes, tiles and blocks; most of these are too little work for a team.
SMALL = [
    (outer, channels, inner)
    for channels in (1, 2, 15, 16, 17, 33, 257)
    for outer, inner in ((2, 1), (3, 7), (2, 49), (5, 64), (33, 17), (1, 4097), (513, 2))
    if outer * channels * inner < 1 << 17
]
# Enough for a team whatever the dtype: 128 KB and more.
LARGE = [
    (2, 64, 28 * 28),
    (1, 3, 150 * 150),
    (2, 1, 40_001),
    (1, 2, 50_001),
    (4, 512, 49),
    (6, 257, 65),
    (300, 40, 8),
    (1000, 100, 1),
    (5000, 17, 1),
    (100, 1025, 1),
    (30_003, 3, 1),
    (3, 8, 4097),
    (6, 3, 9001),
    (64, 16, 300),
    (3, 129, 513),
    (20_000, 9, 1),
]


def results(x, grad_output, residual, axis, weight, bias):
    """The bytes of every result of every function."""
    found = []
    for activation, added in ((None, None), ("relu6", None), ("leaky_relu", residual)):
        options = {"channel_axis": axis, "activation": activation, "residual": added}
        y, saved = fastbn.batch_norm_forward(x, weight, bias, **options)
        found += [y, saved.mean, saved.var, *fastbn.batch_norm_backward(grad_output, x, saved, weight, bias)]
    m = fastbn.moments(x, channel_axis=axis)
    found += [m.mean, m.m2, fastbn.normalize(x, m.mean, m.var(), weight, bias, channel_axis=axis)]
    sums = fastbn.backward_reduce(grad_output, x, m.mean, channel_axis=axis)
    apply = fastbn.backward_apply(grad_output, x, m.mean, m.var(), weight, *sums, m.count, channel_axis=axis)
    return [array.tobytes() for array in (*found, *sums, apply)]


def data(rng, layout, dtype, size):
    shape, axis = layout(*size)
    x, grad_output, residual = (normal(rng, shape, dtype, mean=mean) for mean in (3, 0, 0))
    return x, grad_output, residual, axis, *parameters(rng, size[1], dtype)


def all_ways(dtype):
    """Every tier with every team; for other dtypes than float32, which differ in kernels alone, with some."""
    for isa in _native.isas():
        _native.use_isa(isa)
        for team in TEAMS if dtype == np.float32 else (1, 3, 8):
            with fastbn.num_threads(team):
                yield isa, team


@pytest.fixture(autouse=True)
def restore():
    before = _native.isa()
    yield
    _native.use_isa(before)


@pytest.mark.parametrize("size", SMALL, ids=str)
def test_small(dtype, layout, size, rng):
    """Red with one tier's fused operation in two steps."""
    given = data(rng, layout, dtype, size)
    expected = results(*given)
    for isa, team in all_ways(dtype):
        assert results(*given) == expected, (isa, team)


@pytest.mark.parametrize("size", LARGE, ids=str)
def test_large(dtype, layout, size, rng):
    """Red with as many partial sums as threads."""
    given = data(rng, layout, dtype, size)
    _native.use_isa("scalar")
    with fastbn.num_threads(1):
        expected = results(*given)
    for isa, team in all_ways(dtype):
        before = _native.parallel_counters()["parallel"]
        assert results(*given) == expected, (isa, team)
        if _native.parallel_runtime() != "serial":
            assert (_native.parallel_counters()["parallel"] > before) == (team > 1), "no team ran"


def test_repeats(isa, dtype, layout, rng):
    """A race shows up now and then, so ask often."""
    given = data(rng, layout, dtype, (9, 20, 20 * 20))
    with fastbn.num_threads(8):
        expected = results(*given)
        for _ in range(6):
            assert results(*given) == expected


@pytest.mark.parametrize("size", [(4, 19, 77), (3, 40, 29 * 29)], ids=str)
def test_where_the_result_goes(isa, threads, dtype, layout, size, rng):
    """A new array, one that was given, one off its cache lines (which cannot be streamed to), or x itself."""
    x, grad_output, residual, axis, weight, bias = data(rng, layout, dtype, size)
    options = {"channel_axis": axis, "activation": "relu"}
    for added in (None, residual):
        expected, saved = fastbn.batch_norm_forward(x, weight, bias, residual=added, **options)
        backward = fastbn.batch_norm_backward(grad_output, x, saved, weight, bias)
        for out in (
            np.empty_like(x),
            arrays.unaligned_to_vectors(x),
            arrays.misaligned(x),
            x.copy(),
        ):  # the last one in place
            source = out if arrays.same_bytes(out, x) else x
            y, other = fastbn.batch_norm_forward(source, weight, bias, residual=added, out=out, **options)
            assert y is out
            assert arrays.same_bytes(y, expected)
            assert arrays.same_bytes(other.var, saved.var)
        for out in (np.empty_like(x), arrays.unaligned_to_vectors(x), grad_output.copy()):
            source = out if arrays.same_bytes(out, grad_output) else grad_output
            dx, *rest = fastbn.batch_norm_backward(source, x, saved, weight, bias, out=out)
            assert dx is out
            assert all(arrays.same_bytes(a, b) for a, b in zip((dx, *rest), backward, strict=True))


@pytest.mark.parametrize("view", ["window", "misaligned", "unaligned_to_vectors", "read_only"])
def test_where_the_data_lie(isa, dtype, layout, view, rng):
    """The same numbers in the same order: neither alignment nor strides may show in the result."""
    x, grad_output, residual, axis, weight, bias = data(rng, layout, dtype, (9, 18, 300))
    arrange = arrays.views(3)[view]
    expected = results(x, grad_output, residual, axis, weight, bias)
    assert results(arrange(x), arrange(grad_output), arrange(residual), axis, weight, bias) == expected


def test_channel_by_channel(isa, dtype, layout, rng):
    """A channel's result does not depend on its neighbours: computed among fewer it is the same. (One that is alone in
    memory is a single run, and not planes.) Red where a vector over two channels has the coefficients of the wrong one.
    """
    x, _, _, axis, weight, bias = data(rng, layout, dtype, (9, 40, 300))
    whole = np.moveaxis(fastbn.batch_norm_forward(x, weight, bias, channel_axis=axis)[0], axis, 0)
    for part in (slice(0, 17), slice(17, 40), slice(5, 7)):
        few = np.ascontiguousarray(np.moveaxis(np.moveaxis(x, axis, 0)[part], 0, axis))
        y, _ = fastbn.batch_norm_forward(few, weight[part], bias[part], channel_axis=axis)
        assert np.moveaxis(y, axis, 0).tobytes() == whole[part].tobytes()


def test_what_a_reduce_reads_at_a_time():
    """Red with tiles that cut a cache line in two, tiles of which a thread gets none, or a slab that is fetched where
    it only costs.
    """

    def plan(op, family, outer, channels, inner, threads=1, **call):
        machine = {"l2": 1 << 20, "l3": 32 << 20}
        return _native.plan(op, "float32", family, outer, channels, inner, threads, machine=machine, **call)

    for channels, inner in itertools.product([64, 512, 2048], [7, 49, 50, 196, 784, 3136]):
        tile = plan("forward", "rows", 32, channels, inner)["tile"]
        assert tile == 1 or tile * inner % 16 == 0
    assert plan("forward", "cols", 1568, 2048, 1)["tile"] == 1024
    for threads in (1, 2, 8, 64):
        tile = plan("forward", "cols", 1568, 2048, 1, threads)["tile"]
        strips = 2
        assert tile % 16 == 0
        assert strips * -(-2048 // tile) >= threads
    for op, inner in itertools.product(("moments", "forward", "backward", "reduce"), (49, 784)):
        assert plan(op, "rows", 32, 8192, inner)["fetch"] == 2048 * (op != "forward" or inner != 49)
    for channels, fetch in ((1747, False), (1748, True)):
        assert plan("backward", "rows", 32, channels, 50)["fetch"] == 2048 * fetch, "the last level has 32 MB"
    assert not plan("backward", "cols", 1568, 2048, 1)["fetch"]


def test_what_is_streamed():
    """A result of a call that reads and writes more than the caches keep. Red where a backward counts for two tensors,
    a residual for none, the share of a thread for that of the team, or a single sweep for two; or the last-level cache
    for endless.
    """
    l2, l3 = 1 << 20, 100 << 20

    def streams(op, bytes_, threads=1, l3=l3, residual=False, **machine):
        channels = 64
        images = bytes_ // (channels * 1024 * 4)
        machine = {"l2": l2, "l3": l3, **machine}
        plan = _native.plan(op, "float32", "rows", images, channels, 1024, threads, residual=residual, machine=machine)
        return plan["stream"]

    image = 64 * 1024 * 4
    for op, tensors, times in (("forward", 2, 8), ("normalize", 2, 16), ("backward", 3, 8), ("apply", 3, 8)):
        for threads in (1, 2, 4):
            most = times * l2 * threads // tensors // image * image
            assert not streams(op, most, threads)
            assert streams(op, most + image, threads)
            less = times * l2 * threads // (tensors + 1) // image * image
            assert not streams(op, less, threads, residual=True)
            assert streams(op, less + image, threads, residual=True)
            assert not streams(op, 4 * l2, threads, follows=True)
            assert streams(op, 4 * l2 + image, threads, follows=True), "for any number of threads"
            most = 6 * l2 // tensors // image * image
            assert not streams(op, most, threads, l3=6 * l2)
            assert streams(op, most + image, threads, l3=6 * l2), "what is too much for the last level"


def test_a_machine_that_follows_runs():
    """Red with prefetches that are in the way of the hardware's; with turns that do not go side by side, or none of a
    backward; with two slabs that are more than half of L2; or with a slab that cuts a line in two, though a whole one
    fits.
    """
    machine = {"l2": 1 << 20, "l3": 32 << 20, "follows": True}

    def plan(op, channels, inner, threads=2, **call):
        call = {"beside": True, **call}
        p = _native.plan(op, "float32", "rows", 32, channels, inner, threads, machine=machine, **call)
        assert (p["fetch"], p["soon"]) == (0, 2048 * (p["slab"] == 0))
        assert (p["turn"] > 0) == p["beside"]
        assert p["ahead"] == 0 or not p["turn"]
        return p

    for op, channels, inner in itertools.product(["forward", "backward"], [1024, 2048], [49, 196, 784]):
        p = plan(op, channels, inner)
        assert p["beside"] == (inner != 49), "short planes are summed in memory"
        assert p["backwards"] == (inner == 49)
        assert p["ahead"] == (p["slab"] if inner == 49 else 0)
        assert p["slab"] * inner % 16 == 0
        assert p["slab"] * 32 * inner * 4 * (1 if op == "forward" else 2) <= machine["l2"] / 4
        assert plan(op, channels, inner, adjacent=False)["beside"] == (inner == 784), "vectors of one plane"
        assert plan(op, channels, inner, gated=True)["beside"] == (inner == 784 and op == "forward")
        for no in ({"aligned": False}, {"beside": False}):
            assert not plan(op, channels, inner, **no)["turn"]
        assert plan(op, channels, inner, residual=True)["beside"] == (inner != 49 and op == "forward"), "two results"
    for op, inner in (("forward", 112 * 112), ("backward", 56 * 56)):
        p = plan(op, 64, inner)
        assert (p["slab"], p["turn"], p["ahead"]) == (1, 0, 0), "where L2 cannot hold several"
    for op, channels, inner in itertools.product(["moments", "reduce", "normalize", "apply"], [64, 2048], [49, 3136]):
        plan(op, channels, inner)


def test_what_takes_turns():
    """Red where slabs that take turns are too many for L2 at once, or for L3, or the wrong one is fetched; where there
    are turns though a thread has one slab alone; or small slabs for turns that are not taken.
    """
    machine = {"l2": 1 << 20, "l3": 32 << 20}

    def plan(op, channels, inner, threads=2, l3=machine["l3"], **call):
        call = {"beside": True, "machine": {**machine, "l3": l3}, **call}
        return _native.plan(op, "float32", "rows", 32, channels, inner, threads, **call)

    for channels, inner in ((64, 112 * 112), (512, 784), (1024, 196), (2048, 49)):
        p = plan("forward", channels, inner)
        assert p["turn"] == 4096
        for no in ({"aligned": False}, {"beside": False}):
            assert plan("forward", channels, inner, **no) == p | {"beside": False}, "then by turns"
        assert p["beside"] == (inner != 49), "short planes are summed in memory"
        assert p["stream"]
        assert not p["backwards"]
        assert p["ahead"] == 2 * p["slab"]
        assert p["slab"] == 1 or p["slab"] * inner * 32 * 4 * 3 <= machine["l2"]
        assert p["tile"] == p["slab"]
        assert p["side"] * inner % 16 == 0
        p = plan("forward", channels, inner, residual=True)
        assert (p["turn"], p["beside"]) == ((4096, True) if inner != 49 else (0, False)), "where they cost more"
        p = plan("backward", channels, inner)
        assert not p["turn"]
        assert not p["beside"]
        assert p["backwards"]
        assert p["ahead"] == p["slab"]
    assert not plan("forward", 64, 49)["turn"], "nothing is streamed"
    assert not plan("forward", 4096, 9)["turn"], "panels"
    assert not _native.plan("forward", "float64", "rows", 4, 1 << 17, 8, 1, machine=machine, beside=True)["beside"]
    assert not plan("forward", 2048, 49, gated=True)["turn"], "runs of 196 bytes cannot be streamed"
    assert plan("forward", 512, 784, gated=True)["turn"]
    channel = 32 * 49 * 4
    assert plan("forward", 2048, 49)["slab"] * channel <= machine["l2"] / 4
    assert plan("forward", 2048, 49, gated=True)["slab"] * channel > machine["l2"] / 4
    for threads in (1, 2, 3):
        inner = 224 * 224
        enough = 2 * 3 * threads * 32 * inner * 4  # for three slabs of every thread, of a channel each, in one half
        assert plan("forward", 2 * threads, inner, threads, l3=enough)["turn"]
        for p in (
            plan("forward", threads, inner, threads, l3=enough),
            plan("forward", 2 * threads, inner, threads, l3=enough - 1),
        ):
            assert (p["slab"], p["turn"], p["backwards"], p["ahead"]) == (1, 0, True, 1)
    assert plan("backward", 2048, 49, gated=True)["stream"], "a gate may be read from any place"


def test_slabs_are_even(dtype):
    """Red where a thread has more slabs than another, where the last slab is what was left over, or where slabs have
    lines in common that could have none.
    """
    machine = {"l2": 2 << 20, "l3": 256 << 20}
    sizes = itertools.product(["forward", "backward"], [64, 130, 512, 2048], [49, 196, 784], [1, 2, 3, 4])
    size = dtype.itemsize
    for op, channels, inner, threads in sizes:
        p = _native.plan(op, dtype.name, "rows", 32, channels, inner, threads, machine=machine)
        grains = -(-channels // p["grain"])
        assert p["slabs"] % threads == 0 or p["slabs"] == grains
        assert p["slab"] == min(-(-grains // p["slabs"]) * p["grain"], channels)
        assert p["slab"] * threads < channels + p["grain"] * threads
        assert p["slab"] < p["grain"] * 2 or p["slab"] * 32 * inner * size <= machine["l2"] / 2
        if p["slab"] >= 64 // size:
            assert p["grain"] * inner * size % 64 == 0


def test_what_an_apply_step_covers():
    """Red with a step that cuts a line or a word of the gate in two, panels that are not shared among the threads,
    images that are not, or one at a time, rows that are not, or whose coefficients L1 does not keep, or turns of
    another size.
    """
    machine = {"l2": 1 << 20, "l3": 1 << 30}
    sizes = itertools.product(["forward", "normalize"], [3, 500, 4096], [7, 49, 784, 3001, 65537])
    for op, channels, inner in sizes:
        p = _native.plan(op, "float32", "rows", 64, channels, inner, 2, machine=machine)
        assert p["turn"] in (0, 4096)
        if p["panel"]:
            alone = p["slab"] > 0 or p["team"] == 1
            assert p["side"] == p["panel"]
            assert not p["turn"]
            assert p["piece"] == (64 if alone else 8)
        else:
            assert p["piece"] % 16 == 0
            assert p["side"] * min(p["piece"], inner) <= 1 << 16
            assert p["side"] == 1 or p["piece"] >= inner
        assert 1 <= p["images"] <= 64
        if p["images"] > 1:
            assert not p["panel"]
            assert p["side"] == (p["slab"] or channels)
            assert p["images"] * p["side"] * inner <= 1 << 16
            assert p["slab"] or p["team"] == 1 or p["team"] * 4 * p["images"] <= 64
    for channels, inner, images in ((4096, 49, 64), (4096, 784, 64), (64, 12544, 5)):
        assert _native.plan("backward", "float32", "rows", 64, channels, inner, 1, machine=machine)["images"] == images
    wide = [10, 1000, 1040, 2047, 2048, 2050, 3000, 4096, 10_000, 100_000]
    sizes = itertools.product(["normalize", "apply", "forward", "backward"], [100, 10_000], wide, [1, 2, 64], [2, 4])
    for op, rows, channels, threads, size in sizes:
        dtype = {2: "float16", 4: "float32"}[size]
        p = _native.plan(op, dtype, "cols", rows, channels, 1, threads, machine=machine)
        run = channels * max(p["panel"], 1)
        least = rows * channels * size // (16 * p["team"])  # so that threads have about as much as one another
        most = 1 << 19 if p["team"] == 1 else min(max(least, 1 << 16), 1 << 19)
        assert p["side"] == 1 or p["side"] * run * size <= most
        assert (p["side"] + 1) * run * size > most or p["side"] == rows // max(p["panel"], 1)
        assert p["piece"] % 32 == 0, "a cache line of any dtype, and a word of the gate"
        if op in ("apply", "backward") and p["side"] >= 8 and run >= 2048 and run * size % 64 == 0:
            assert 1024 <= p["piece"] <= 1536, "L1 keeps the coefficients"
        else:
            assert p["piece"] >= min(run, 1 << 15), "rows are whole"


@pytest.mark.parametrize("planes", ["long", "words", "even", "short", "tiny"])
def test_past_the_cache(planes, dtype, layout, rng):
    """A tensor so large that results are streamed to memory, against its quarters, which are small enough not to be.

    Red where a slab is left before all of it is applied, or goes on in the wrong image beside a sum, what lies before a
    cache line is taken for one channel's, a slab takes the next one's flags, or what lies off alignment is streamed.
    """
    machine = _native.machine()
    follows = machine["follows"]
    most = machine["l2"] * 4 if machine["follows"] else min(machine["l2"] * 16, machine["l3"] // 2)
    elements = most // dtype.itemsize
    shape = {
        "long": (6, 16, elements // 96 + 5),
        "words": (32, elements // (32 * 784) + 3, 784),  # of a gate
        "even": (32, (elements // (32 * 196) // 16 + 1) * 16, 196),
        "short": (32, (elements // (32 * 49) // 16 + 1) * 16, 49),
        "tiny": (32, elements // (32 * 25) // 2 * 2 + 3, 25),  # no image ends with a cache line
    }[planes]
    if elements > 1 << 25:
        pytest.skip("this machine's cache is so large that the test would take minutes")
    x, grad_output, _, axis, weight, bias = data(rng, layout, dtype, shape)
    # Channels that need a unit of their own beside such that do not.
    if dtype not in (np.float16, np.float64) and planes != "even":
        np.moveaxis(x, axis, 0)[::5] *= np.asarray(1e37, dtype)
    outer, channels, inner = shape if axis == 1 else (shape[0] * shape[2], shape[1], 1)
    quarter = channels // 4
    for op in ("forward", "normalize", "backward"):
        plan = partial(_native.plan, op, dtype.name, "rows" if axis == 1 else "cols", outer)
        assert plan(channels, inner, 2)["stream"]
        panels = axis == 1 and inner * dtype.itemsize < 64
        p = plan(channels, inner, 2, beside=True)
        turns = axis == 1 and not panels and (op == "forward" or (op == "backward" and follows))
        beside = turns and planes in ("words", "even")
        assert (p["turn"] > 0) == (beside if follows else turns)
        assert p["beside"] == beside
        assert not plan(channels - 3 * quarter, inner, 2)["stream"]
    parts = [slice(0, quarter), slice(quarter, 2 * quarter), slice(2 * quarter, 3 * quarter), slice(3 * quarter, None)]
    few = [[np.ascontiguousarray(a[:, p] if axis == 1 else a[..., p]) for a in (x, grad_output)] for p in parts]
    options = {"channel_axis": axis, "activation": "relu"}
    pieces = []
    for (one, dy), p in zip(few, parts, strict=True):
        with fastbn.num_threads(2):
            y, saved = fastbn.batch_norm_forward(one, weight[p], bias[p], **options)
            z = fastbn.normalize(one, saved.mean, saved.var, weight[p], bias[p], channel_axis=axis)
            dx = fastbn.batch_norm_backward(dy, one, saved, weight[p], bias[p])[0]
            added, saved = fastbn.batch_norm_forward(one, weight[p], bias[p], residual=dy, **options)
            gated = fastbn.batch_norm_backward(dy, one, saved, weight[p], bias[p])
            pieces.append((y, z, dx, added, gated[0], gated[3]))
    expected = [np.concatenate(c, axis=axis) for c in zip(*pieces, strict=True)]
    for team in (1, 2, 3):
        with fastbn.num_threads(team):
            y, saved = fastbn.batch_norm_forward(x, weight, bias, **options)
            z = fastbn.normalize(x, saved.mean, saved.var, weight, bias, channel_axis=axis)
            dx = fastbn.batch_norm_backward(grad_output, x, saved, weight, bias)[0]
            added, saved = fastbn.batch_norm_forward(x, weight, bias, residual=grad_output, **options)
            gated = fastbn.batch_norm_backward(grad_output, x, saved, weight, bias)
        for found, wanted in zip((y, z, dx, added, gated[0], gated[3]), expected, strict=True):
            assert arrays.same_bytes(found, wanted)
    for off in (arrays.misaligned, arrays.unaligned_to_vectors):
        y, saved = fastbn.batch_norm_forward(off(x), weight, bias, out=off(x), **options)
        assert arrays.same_bytes(y, expected[0])
        dx = fastbn.batch_norm_backward(off(grad_output), x, saved, weight, bias, out=off(x))[0]
        assert arrays.same_bytes(dx, expected[2])
    over = x.copy()
    dx = fastbn.batch_norm_backward(grad_output, over, saved, weight, bias, out=over)[0]
    assert arrays.same_bytes(dx, expected[2])
    over = grad_output.copy()
    dx = fastbn.batch_norm_backward(over, x, saved, weight, bias, out=over)[0]
    assert arrays.same_bytes(dx, expected[2])


@pytest.mark.parametrize("inner", [9, 49, 196])
def test_what_comes_with_x_does_not_show_in_its_statistics(inner, rng):
    """Neither a gate nor an output that overlaps x. Red with planes that are summed alone because of a gate, and where
    x is copied without its gaps, not the output.
    """
    memory = normal(rng, (12, 40, inner), np.float32)
    x, residual = memory[:, 4:36], normal(rng, (12, 32, inner), np.float32)
    _, plain = fastbn.batch_norm_forward(x)
    expected = plain.mean.tobytes(), plain.var.tobytes()
    _, gated = fastbn.batch_norm_forward(x, activation="relu", residual=residual)
    assert (gated.mean.tobytes(), gated.var.tobytes()) == expected
    _, overlapping = fastbn.batch_norm_forward(x, out=memory[:, 5:37])
    assert (overlapping.mean.tobytes(), overlapping.var.tobytes()) == expected
