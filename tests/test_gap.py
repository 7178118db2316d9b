"""test_gap -- train_eval_gap: the numbers are those of the twin, and each cause is told from the others.

Seeded bugs: a gap against the biased variance, a noise taken for staleness, initial statistics that are not undone.
"""

import dataclasses
import re
import weakref

import numpy as np
import pytest
import twin

import fastbn


def batches(rng, count, size, shift=0.0):
    scale, mean = np.array([1.0, 2.0, 3.0, 4.0]), np.array([3.0, -3.0, 6.0, 9.0])
    return [(rng.normal(size=(size, 4)) * scale + mean + shift * scale).astype(np.float32) for _ in range(count)]


def trained(given, **options):
    bn = fastbn.BatchNorm(4, **options)
    for x in given:
        bn(x)
    return bn


def bits(layer):
    return {name: array.tobytes() for name, array in layer.state_dict().items()}


def centered(given):
    return [x - np.array([3.0, -3.0, 6.0, 9.0], np.float32) for x in given]


def fresh(rng):
    """A layer that never trained, whose statistics are somebody's all the same."""
    bn = trained([])
    bn.running_mean[...], bn.running_var[...] = [3.0, -3.0, 6.0, 10.0], [1.0, 4.0, 9.0, 16.0]
    return bn


# What was trained, what it is compared on, the cause, and what the advice has to say.
CASES = {
    "none": (
        lambda rng: (trained(batches(rng, 200, 512)), batches(rng, 20, 512)), None, "nothing: the modes agree"
    ),
    "small batch": (
        lambda rng: (trained(batches(rng, 2000, 4), momentum=0.01), batches(rng, 300, 4)),
        "small batch",
        "a batch of 4 values per channel is too small .* Train on larger batches",
    ),
    "small batch, some momentum": (
        lambda rng: (trained(batches(rng, 50, 8), momentum=0.3), batches(rng, 100, 8)), "small batch", "of 8 values"
    ),
    "momentum": (
        lambda rng: (trained(batches(rng, 50, 8), momentum=0.95), batches(rng, 100, 8)),
        "momentum",
        "momentum 0.95 lets the last batches rule .* lower it, or calibrate",
    ),
    "too few batches": (
        lambda rng: (trained(batches(rng, 4, 512)), batches(rng, 20, 512)),
        "too few batches",
        "initial statistics still weigh 66% after 4 batches with momentum 0.1: .* train longer, or raise momentum",
    ),
    "too few batches, of another variance": (
        lambda rng: (trained(centered(batches(rng, 4, 512))), centered(batches(rng, 20, 512))),
        "too few batches",
        "66% after 4 batches",
    ),
    "too few batches, none": (
        lambda rng: (trained([], momentum=None), batches(rng, 20, 512)),
        "too few batches",
        "100% after 0 batches with momentum None: calibrate, train longer$",
    ),
    "too few batches, averaged": (
        lambda rng: (trained(batches(rng, 1, 32), momentum=None), batches(rng, 100, 32)),
        "too few batches",
        "an average of 1 is as noisy as a batch: calibrate, or train longer",
    ),
    "drift": (
        lambda rng: (trained(batches(rng, 200, 512)), batches(rng, 20, 512, shift=0.5)),
        "drift",
        r"means are up to 0\.[456]\d* standard deviations away\. Calibrate .* else look at the data",
    ),
    "drift, averaged": (
        lambda rng: (trained(batches(rng, 200, 64), momentum=None), batches(rng, 20, 512, shift=0.5)), "drift", "not of"
    ),
    "drift, untrained": (lambda rng: (fresh(rng), batches(rng, 20, 512)), "drift", "not of these data"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("seed", range(5))
def test_each_cause_is_named(case, seed):
    """Seeded bugs: the share of noise that momentum keeps, initial statistics undone in the mean or variance alone."""
    make, cause, advice = CASES[case]
    bn, given = make(np.random.default_rng(seed))
    (layer,) = fastbn.train_eval_gap(bn, given).layers
    assert layer.cause == cause
    assert re.search(advice, layer.advice)


# Channels, batches, their size, values that each sample has in a channel (all alike), and whether channels are alike.
FEW = [
    (1, 2, 64, 1, False), (6, 2, 64, 1, False), (6, 3, 8, 1, False), (256, 2, 64, 1, False), (256, 3, 16, 1, False),
    (256, 2, 2, 1, False), (32, 2, 64, 1, True), (32, 2, 16, 9, False), (32, 4, 16, 9, False), (1, 2, 16, 9, False),
    (1, 2, 4, 64, False), (3, 3, 4, 64, True), (2, 2, 64, 9, False),
]  # fmt: skip


@pytest.mark.parametrize("momentum", [0.1, 0.5])
@pytest.mark.parametrize(("channels", "count", "size", "each", "alike"), FEW)
def test_the_right_statistics_are_not_blamed_for_few_batches(rng, channels, count, size, each, alike, momentum):
    """Seeded bugs: no allowance for the batches' own error, for the largest of channels, for values that go together,
    for deviations of four values that are far too small; an allowance for momentum alone; values that go together asked
    of batches alone, or of four samples as of many.
    """
    bn = fastbn.BatchNorm(channels, momentum=momentum)

    def draw(samples):
        x = rng.normal(5, 2, (samples, 1 if alike else channels, 1))
        return np.ascontiguousarray(np.broadcast_to(x, (samples, channels, each)), np.float32)

    fastbn.calibrate(bn, [draw(3000)])
    causes = [fastbn.train_eval_gap(bn, [draw(size) for _ in range(count)]).layers[0].cause for _ in range(200)]
    assert sum(cause not in ("small batch", None) for cause in causes) <= 2  # at most 1 %
    (layer,) = fastbn.train_eval_gap(bn, [draw(size) for _ in range(count)], tolerance=0.0).layers
    assert layer.cause == "small batch"
    few = rf"{count} batches of {size * each} values per channel are too few .* Compare on more"
    assert re.match(few if layer.stale > layer.noise else "a batch of .* is too small to tell", layer.advice)


DEVIATION = r"a running standard deviation is {}\d* times theirs\. Calibrate"
DRIFTS = {
    "mean": (1.0, 1.0, "not of these data: channel means are up to .* standard deviations away. Calibrate"),
    "narrower": (0.0, 0.33, f"not of these data: {DEVIATION.format('[234][.]?')}"),
    "wider": (0.0, 3.0, f"not of these data: {DEVIATION.format('0[.][234]')}"),
    "twice": (0.0, 2.0, "not of these data: a running standard deviation is 0[.][3456]"),
    "both": (9.0, 3.0, f"not of these data: channel means are .* away and {DEVIATION.format('0[.][234]')}"),
}


@pytest.mark.parametrize("channels", [1, 6, 256])
@pytest.mark.parametrize("case", DRIFTS)
def test_drift_is_named_from_two_batches(rng, case, channels):
    """And what of it drifted. Seeded bugs: an allowance that is too large; advice about means alone."""
    shift, factor, advice = DRIFTS[case]
    bn = fastbn.BatchNorm(channels)
    fastbn.calibrate(bn, [rng.normal(size=(5000, channels)).astype(np.float32)])
    for _ in range(20):
        given = [(rng.normal(size=(64, channels)) * factor + shift).astype(np.float32) for _ in range(2)]
        (layer,) = fastbn.train_eval_gap(bn, given).layers
        assert layer.cause == "drift"
        assert re.search(advice, layer.advice)


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_drift_is_named_from_two_batches_of_images(rng, axis):
    """Whose pixels go together, but not all. Seeded bugs: Student's distribution with the batches' degrees of freedom;
    pieces along the wrong axis.
    """
    bn = fastbn.BatchNorm(2, channel_axis=axis)
    bn.num_batches_tracked = 10000
    for _ in range(20):
        given = rng.normal(1, 0.7, (2, 64, 2, 1, 1)) + rng.normal(0, 0.7, (2, 64, 2, 4, 4))
        given = [np.ascontiguousarray(np.moveaxis(x, 1, axis), np.float32) for x in given]
        (layer,) = fastbn.train_eval_gap(bn, given).layers
        assert layer.cause == "drift"


def test_drift_of_one_channel_of_many_is_named(rng):
    """Seeded bug: a test of the average over channels."""
    bn = fastbn.BatchNorm(256)
    fastbn.calibrate(bn, [rng.normal(size=(5000, 256)).astype(np.float32)])
    bn.running_mean[17] += 5
    (layer,) = fastbn.train_eval_gap(bn, list(rng.normal(size=(2, 64, 256)).astype(np.float32))).layers
    assert (layer.cause, layer.worst_channel) == ("drift", 17)


def test_the_tolerance_is_the_callers(rng):
    bn, given = trained(batches(rng, 200, 512)), batches(rng, 20, 512, shift=0.5)
    (layer,) = fastbn.train_eval_gap(bn, given).layers
    for factor, cause in ((0.99, "drift"), (1.01, None)):
        (again,) = fastbn.train_eval_gap(bn, given, tolerance=factor * layer.gap).layers
        assert (again.cause, again.gap) == (cause, layer.gap)


@pytest.mark.parametrize("options", [{}, {"affine": False}, {"eps": 2.0}])
def test_the_numbers_are_those_of_the_twin(rng, options):
    """The difference of the two modes in float64, with weights, on batches of different sizes."""
    bn = trained(batches(rng, 5, 64), **options)
    if bn.affine:
        bn.weight[...], bn.bias[...] = [1.0, -2.0, 0.5, 3.0], [0.0, 1.0, 3.0, -1.0]
    given = [x for size in (10, 33, 0, 2, 64) for x in batches(rng, 1, size)]
    whole = twin.moments(np.concatenate(given))

    def differences(mean, var):
        pairs = [
            (
                twin.batch_norm_forward(x, bn.weight, bn.bias, bn.eps)[0],
                twin.normalize(x, mean, var, bn.weight, bn.bias, bn.eps),
            )
            for x in given
            if len(x)
        ]
        return np.concatenate([a - b for a, b in pairs]), np.concatenate([a for a, _ in pairs])

    difference, output = differences(bn.running_mean, bn.running_var)
    left, _ = differences(whole.mean, whole.var(ddof=1))
    stale = left - difference  # of the two eval modes
    var = whole.var(ddof=1) + bn.eps
    off = np.abs(bn.running_mean - whole.mean) / np.sqrt(var)
    size = np.sqrt(np.mean(output**2))
    (layer,) = fastbn.train_eval_gap(bn, given).layers
    by_channel = np.sqrt(np.mean(difference**2, axis=0)) / size
    expected = {
        "gap": np.sqrt(np.mean(difference**2)) / size,
        "noise": np.sqrt(np.mean(left**2)) / size,
        "worst_channel": by_channel.argmax(),
        "worst_gap": by_channel.max(),
        "stale": np.sqrt(np.mean(stale**2)) / size,
        "mean_off": np.sqrt(np.mean(off**2)),
        "worst_mean_off": off.max(),
        "deviation_ratio": np.prod(np.sqrt((bn.running_var + bn.eps) / var)) ** (1 / 4),
        "values": np.mean([len(x) for x in given if len(x)]),
    }
    for name, value in expected.items():
        assert getattr(layer, name) == pytest.approx(value, rel=1e-6), name


def test_a_network_runs_as_in_training_and_nothing_changes(rng):
    """The second layer is well although the first is not. Seeded bug: layers that are fed with eval mode."""
    first, second = fastbn.BatchNorm(4), fastbn.BatchNorm(4, activation="relu").eval()
    given = batches(rng, 20, 512)
    network = {"first": first, "second": second}

    def call(x):
        return network["second"](network["first"](x))

    fastbn.calibrate(call, given)
    first.running_mean[...] = 50
    before = [bits(layer) for layer in (first, second)]
    report = fastbn.train_eval_gap(call, given)
    assert [layer.name for layer in report.layers] == ["network.first", "network.second"]
    assert [layer.cause for layer in report.layers] == ["drift", None]
    assert [bits(layer) for layer in (first, second)] == before
    assert (first.training, second.training) == (True, False)
    lines = str(report).splitlines()
    assert len(lines) == 4
    assert lines[0].split() == "layer gap noise stale worst channel mean off, sd sd ratio cause".split()
    assert lines[3].startswith("network.first: the running statistics are not of these data")
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.batches = 3


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((3, []), {}, TypeError, "network must be a BatchNorm or a callable, got int"),
        ((fastbn.BatchNorm(4), []), {}, ValueError, "batches must have at least one batch, got none"),
        ((fastbn.BatchNorm(4), [np.ones((4, 4), np.float32)]), {}, ValueError, "at least 2 batches with data, got 1"),
        ((fastbn.BatchNorm(4), []), {"tolerance": "x"}, TypeError, "tolerance must be a real number, got str"),
        ((fastbn.BatchNorm(4), []), {"tolerance": -1}, ValueError, "tolerance must be finite and not negative, got -1"),
        ((fastbn.BatchNorm(4), [np.full((4, 4), np.nan)]), {}, ValueError, "finite"),
    ],
)
def test_arguments_are_checked(arguments, options, error, message):
    with pytest.raises(error, match=message):
        fastbn.train_eval_gap(*arguments, **options)


BROKEN = {
    "weight": (np.nan, {}, "weight is not finite", "channels 2: go back to parameters"),
    "bias": (-np.inf, {}, "bias is not finite", "channels 2: go back to parameters"),
    "running_mean": (np.inf, {}, "running_mean is not finite", "channels 2: a batch that was not finite .* Calibrate"),
    "running_var": (np.nan, {}, "running_var is not finite", "channels 2: a batch that was not finite .* Calibrate"),
    "running_var, infinite": (np.inf, {}, "running_var is not finite", "channels 2: a batch that was not finite"),
    "running_var, negative": (-5.0, {}, "running_var is negative", "channels 2: no data make it so. Calibrate"),
    "running_var, a little negative": (-1e-9, {"eps": 1.0}, "running_var is negative", "channels 2: no data make it"),
    "running_var, zero": (0.0, {"eps": 0.0}, "running_var is zero", "channels 2: and eps is 0"),
}


@pytest.mark.parametrize("tolerance", [0.1, 1e300])
@pytest.mark.parametrize("case", BROKEN)
@pytest.mark.filterwarnings("error")
def test_an_array_that_eval_mode_cannot_work_with_is_the_cause(rng, case, tolerance):
    """Whatever is asked of NumPy's errors. Seeded bugs: a gap of NaN, which is not above any tolerance."""
    value, options, cause, advice = BROKEN[case]
    given = batches(rng, 20, 64)
    bn = fastbn.BatchNorm(4, **options)
    fastbn.calibrate(bn, given)
    getattr(bn, "_" + case.partition(",")[0])[2] = value
    before = bits(bn)
    with np.errstate(all="raise"):
        report = fastbn.train_eval_gap(bn, given, tolerance=tolerance)
    (layer,) = report.layers
    assert layer.cause == cause
    assert re.match(f"{cause} in {advice}", layer.advice)
    assert str(report).splitlines()[-1] == f"network: {layer.advice}"
    assert bits(bn) == before
    assert layer.worst_channel == 2 or "little" in case
    # The number is that of the modes themselves.
    with np.errstate(all="ignore"):
        y = bn.eval()(given[0])
    assert np.isfinite(layer.gap) == np.isfinite(y).all()


class Renamed(fastbn.BatchNorm):
    def state_dict(self, prefix=""):
        return {"moving_" + name: array for name, array in super().state_dict(prefix).items()}


def test_a_subclass_may_name_its_arrays(rng):
    """Seeded bug: a report of what the subclass says of its state."""
    bn = Renamed(4)
    assert fastbn.train_eval_gap(bn, batches(rng, 20, 64)).layers[0].cause == "too few batches"
    with pytest.raises(ValueError, match="finite"):
        fastbn.train_eval_gap(bn, [np.full((4, 4), np.nan, np.float32)])


def test_all_that_is_broken_is_told(rng):
    bn = fastbn.BatchNorm(9)
    bn.weight[...], bn.running_mean[1], bn.running_var[[2, 3]] = np.nan, np.inf, [-1.0, np.nan]
    (layer,) = fastbn.train_eval_gap(bn, list(rng.normal(size=(3, 20, 9)).astype(np.float32))).layers
    assert layer.cause == "weight is not finite"
    for words in (
        "0, 1, 2, 3, 4, ... (9 in all): go",
        "; running_mean is not finite in channels 1: ",
        "; running_var is not finite in channels 3: ",
        "; running_var is negative in channels 2: ",
    ):
        assert words in layer.advice


@pytest.mark.parametrize("run", [fastbn.calibrate, fastbn.train_eval_gap])
def test_what_a_broken_layer_makes_is_not_blamed_on_the_data_alone(rng, run):
    """Seeded bug: an error of the second layer that does not name the first."""
    first, second = trained([]), trained([])
    given = batches(rng, 3, 16)
    first.weight[1], first.running_mean[2], second.running_mean[2] = np.nan, np.nan, np.nan
    with pytest.raises(ValueError, match="second must be given finite data") as error:
        run(lambda x: second(first(x)), given)
    assert any(note.startswith("first: weight is not finite in channels 1: ") for note in error.value.__notes__)
    assert not any("running_mean" in note for note in error.value.__notes__)  # which nobody used
    first, second = trained([]).eval(), trained([])
    first.running_var[3] = -1
    with pytest.raises(ValueError, match="must be given finite data") as error:
        run(lambda x: second(first(x)), given, layers=second)
    assert any(note.startswith("first: running_var is negative in channels 3: ") for note in error.value.__notes__)


@pytest.mark.parametrize("run", [fastbn.calibrate, fastbn.train_eval_gap])
def test_notes_know_what_they_are_about(rng, run):
    """Seeded bugs: notes of the layers that were found alone, of what a subclass says of its arrays, and of running
    statistics of a layer in eval mode that are collected, so that nobody used them.
    """
    layers = first, second = Renamed(4).eval(), fastbn.BatchNorm(4)
    first.weight[1], first.running_mean[2] = np.nan, np.nan
    hidden = weakref.ref(first), weakref.ref(second)  # which no walk looks into

    def network(x):
        return hidden[1]()(hidden[0]()(x))

    for given, name in ((layers, "layers.0"), ({"a": first, "b": second}, "a")):
        with pytest.raises(ValueError, match="must be given finite data") as error:
            run(network, batches(rng, 3, 16), layers=given)
        notes = [note for note in error.value.__notes__ if "finite" in note]
        assert [note.partition(" in channels")[0] for note in notes] == [f"{name}: weight is not finite"]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("factor", [1e-170, 1e-3, 1e160])
def test_the_unit_of_the_parameters_does_not_matter(rng, factor):
    """Seeded bug: squares of them that overflow, or vanish."""
    given = [x.astype(np.float64) for x in batches(rng, 20, 64)]
    reports = []
    for by in (1.0, factor):
        bn = trained(given[:3], dtype=np.float64)
        bn.weight[...], bn.bias[...] = by * np.array([1.0, -2.0, 0.5, 3.0]), by
        with np.errstate(all="raise"):
            reports += fastbn.train_eval_gap(bn, given).layers
    assert reports[1].gap == pytest.approx(reports[0].gap)
    assert (reports[1].cause, reports[0].cause) == ("too few batches",) * 2


@pytest.mark.filterwarnings("error")
def test_the_extremes_of_float64():
    """Channels that hardly vary, without an eps; statistics far away; and what no variance holds."""
    tiny = np.array([[0.0, 1.0], [2e-160, 1.0], [1e-160, 1.0]])
    bn = fastbn.BatchNorm(2, eps=0.0, dtype=np.float64)
    with np.errstate(all="raise"):
        (layer,) = fastbn.train_eval_gap(bn, [tiny, 2 * tiny]).layers
        assert np.isfinite([layer.gap, layer.noise, layer.stale]).all()
        bn.running_mean[0] = 1e200
        (layer,) = fastbn.train_eval_gap(bn, [tiny, 2 * tiny]).layers
        assert (layer.cause, layer.gap) == ("drift", np.inf)
        far = [np.full((3, 2), 1e200), np.full((3, 2), -1e200)]
        with pytest.raises(ValueError, match="network has a variance over all batches that is not finite in float64"):
            fastbn.train_eval_gap(bn, far)


def test_empty_and_small_batches(rng):
    given = batches(rng, 20, 64)
    bn = trained(given[:2])
    (layer,) = fastbn.train_eval_gap(bn, given).layers
    (again,) = fastbn.train_eval_gap(bn, [part for x in given for part in (x[:0], x)], layers=[bn, bn]).layers
    assert layer == again
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        fastbn.train_eval_gap(bn, [given[0], given[0][:1]])
    with pytest.raises(ValueError, match=r"layers\.0 must be given at least 2 batches with data, got 0"):
        fastbn.train_eval_gap(lambda x: x, given, layers=bn)
