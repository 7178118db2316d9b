"""test_study_claims -- the claims of the studies on NumPy can fail: from contrary numbers they are not read.

Red with a claim that compares the wrong way round, or something with itself. Skipped without the extra `demo`.
"""

import contextlib
import copy
import io
import sys
import warnings
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

for module in ("matplotlib", "sklearn", "tqdm"):
    pytest.importorskip(module)

EXAMPLES = str(Path(__file__).resolve().parent.parent / "examples")
if EXAMPLES not in sys.path:
    sys.path.append(EXAMPLES)

from matplotlib.figure import Figure  # noqa: E402
from paper.data import Dataset  # noqa: E402
from paper.study import Settings, perform  # noqa: E402

SCALES = [1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0]
CURVES = ("train_loss", "train_error", "test_loss", "test_error")


def learns(*places):
    return [[0.95 if place in places else 0.1 for place in range(len(SCALES))]] * 2


def ends_at(*values):
    return dict(zip(CURVES, [[[2.0, value, value]] for value in values], strict=True))


# Numbers, two seeds or one, from which all claims of a study follow ...
SUPPORT = {
    "mnist": {
        "at": [0, 10, 20],
        "plain": {"accuracy": [[0.1, 0.8, 0.9]] * 2, "percentiles": [[[-1, 0, 1], [-2, -1, 0], [-3, -2, -1]]] * 2},
        "norm": {"accuracy": [[0.1, 0.9, 0.95]] * 2, "percentiles": [[[-1, 0, 1], [-1, 0.1, 1], [-1, 0, 1]]] * 2},
    },
    "small_batches": {
        "gap": [[0.7, 0.4, 0.05]],
        "exact": [[0.5, 0.9, 0.97]],
        "training": [[0.3, 0.8, 0.97]],
        "stale": [[0.2, 0.1, 0.02]],
        "calibrated": [[0.04, 0.02, 0.02]],
    },
    "ensemble": {key: [[[0.04, 0.05], [0.03]]] * 2 for key in ("error", "loss")},
    "initialization": {"scales": SCALES}
    | {
        kind: {"plain": {"accuracy": learns(3)}, "norm": {"accuracy": learns(*range(6))}}
        for kind in ("sigmoid", "relu")
    },
    "contour": {
        "ratios": [1, 5],
        "steps": 100,
        "plain": {"steps": [[2, 40]], "condition": [[3, 34]], "detour": [9]},
        "norm": {"steps": [[2, 3]], "condition": [[3, 3]], "detour": [1]},
    },
    "drift": {
        "at": [0, 50, 100],
        "alone": {
            "mean": {"bias": [[0, 1, 2]], "loss": [[2.3, 2.3, 2.3]]},
            "both": {"bias": [[0, 1, 2]], "loss": [[2.3, 2.3, 2.3]]},
            "full": {"bias": [[0, 1e-8, 1e-8]], "loss": [[2.3, 2.3, 2.3]]},
        },
        "all": {
            "mean": {"bias": [[0, 1, 1.5]], "loss": [[2.3, 0.1, 0.1]]},
            "both": {"bias": [[0, 1, 1.5]], "loss": [[2.3, 0.1, 0.1]]},
            "full": {"bias": [[0, 1e-8, 1e-8]], "loss": [[2.3, 0.1, 0.01]]},
        },
    },
    "regularization": {
        "at": [0, 50, 100],
        "none": ends_at(0.01, 0, 0.2, 0.05),
        "dropout": ends_at(0.01, 0, 0.15, 0.04) | {"test_loss": [[2.0, 0.3, 0.15]]},
        "norm": ends_at(0.01, 0, 0.1, 0.03),
        "both": ends_at(0.01, 0, 0.09, 0.03),
    },
}
SUPPORT["whitening"] = {
    "at": [0, 10, 50, 100],
    "raw": {"correlation": [0.2], "condition": [1e6], "loss": [[2.3, 2.0, 1.0, 0.2]]},
    "standard": {"correlation": [0.2], "condition": [300], "loss": [[2.3, 1.0, 0.2, 0.1]]},
    "pca": {"likeness": [0.01]},
    "zca": {"correlation": [0.02], "condition": [24], "likeness": [0.8], "loss": [[2.3, 0.2, 0.1, 0.01]]},
    "rank": [53],
    "features": [61],
    "cost": {"time": [7, 400]},
}


def changed(numbers, **paths):
    """A copy with other values at paths such as alone__mean__bias."""
    numbers = copy.deepcopy(numbers)
    for path, value in paths.items():
        *way, last = path.split("__")
        place = numbers
        for key in way:
            place = place[key]
        place[last] = value
    return numbers


# ... and changes of them, each of which refutes the claims at the places named.
CONTRARY = [
    ("mnist", {"norm__accuracy": [[0.1, 0.9, 0.95], [0.1, 0.8, 0.95]]}, [0]),
    ("mnist", {"norm__accuracy": [[0.1, 0.9, 0.9]] * 2}, [1]),
    ("mnist", {"norm__percentiles": [[[-1, 0, 1], [1, 2, 3], [-1, 0, 1]]] * 2}, [2]),
    ("small_batches", {"gap": [[0.04, 0.4, 0.05]]}, [0]),
    ("small_batches", {"exact": [[0.5, 0.8, 0.97]]}, [1]),
    ("small_batches", {"calibrated": [[0.04, 0.06, 0.02]]}, [2]),
    ("ensemble", {"error": [[[0.04, 0.05], [0.04]]]}, [0]),
    ("ensemble", {"error": [[[0.04, 0.05], [0.03]], [[0.02, 0.05], [0.03]]]}, [0]),
    ("ensemble", {"loss": [[[0.04, 0.05], [0.045]]]}, [1]),
    ("initialization", {"sigmoid__norm__accuracy": learns(2, 3)}, [0, 1]),
    ("initialization", {"relu__norm__accuracy": learns(0, 1, 3, 4, 5)}, [2, 3]),
    ("initialization", {"relu__plain__accuracy": learns(*range(6))}, [3]),
    ("contour", {"norm__condition": [[3, 34]]}, [0]),
    ("contour", {"norm__steps": [[2, 40]]}, [1, 3]),
    ("contour", {"norm__detour": [9]}, [2]),
    ("contour", {"norm__steps": [[2, float("inf")]]}, [1, 3]),
    ("drift", {"alone__mean__bias": [[0, 1, 1.5]]}, [0]),
    ("drift", {"alone__mean__loss": [[2.3, 2.3, 2.2]]}, [1]),
    ("drift", {"alone__full__bias": [[0, 1, 2]]}, [2]),
    ("drift", {"all__full__bias": [[0, 1, 1]]}, [3]),
    ("drift", {"all__full__loss": [[2.3, 0.2, 0.2]]}, [4]),
    ("whitening", {"standard__correlation": [0.1]}, [0]),
    ("whitening", {"zca__correlation": [0.2]}, [1]),
    ("whitening", {"raw__condition": [200]}, [2]),
    ("whitening", {"zca__condition": [300]}, [3]),
    ("whitening", {"raw__loss": [[2.3, 1.0, 0.2, 0.1]]}, [4]),
    ("whitening", {"zca__loss": [[2.3, 1.0, 0.2, 0.1]]}, [5]),
    ("whitening", {"zca__likeness": [0.0]}, [6]),
    ("whitening", {"rank": [61]}, [7]),
    ("whitening", {"cost": {"time": [7, 0.9]}}, [8]),
    ("regularization", {"norm": ends_at(0.01, 0, 0.3, 0.03)}, [0, 2, 3]),
    # Gaps of -0.2 and -0.1: the ratio of those is 2.
    ("regularization", {"none": ends_at(0.4, 0, 0.2, 0.05), "norm": ends_at(0.2, 0, 0.1, 0.03)}, [0, 3]),
    ("regularization", {"norm__test_error": [[0.9, 0.05, 0.05]]}, [1]),
    ("regularization", {"dropout": ends_at(0.01, 0, 0.15, 0.04)}, [2]),
    # What never arrives, where the other does in the middle and at the end.
    ("regularization", {"dropout__test_loss": [[2.0, 0.3, 0.25]]}, [3]),
    ("regularization", {"dropout__test_loss": [[2.0, 0.3, 0.25]], "norm__test_loss": [[2.0, 0.3, 0.1]]}, [2, 3]),
    ("whitening", {"raw__loss": [[2.3, 2.0, 1.0, 0.5]]}, []),
    ("whitening", {"raw__loss": [[2.3, 2.0, 1.0, 0.5]], "standard__loss": [[2.3, 1.0, 0.5, 0.1]]}, [4]),
    ("contour", {"plain__steps": [[2, float("inf")]]}, []),
    ("contour", {"plain__steps": [[2, float("inf")]], "norm__steps": [[2, 90]]}, [1, 3]),
    ("ensemble", {"error": [[[0.04, 0.05], [0.0]]]}, []),  # no errors are fewer, if no number of times
    ("regularization", {"both__test_loss": [[2.0, 0.02, 0.02]]}, [3]),
]


@pytest.mark.parametrize("name", SUPPORT)
def test_networks_that_hardly_learn_are_drawn(name, tmp_path):
    """What never gets anywhere has no finite number of steps. Red with a figure or ratio that cannot do without one."""
    with contextlib.redirect_stdout(io.StringIO()):
        perform(import_module(f"paper.{name}"), Settings(steps=1, seeds=(0,), short=True), tmp_path)
    assert (tmp_path / f"{name}.png").exists()


def images(train, test, size=8):
    rng = np.random.default_rng(0)
    x, y = rng.random((train + test, 1, size, size), np.float32), rng.integers(0, 10, train + test)
    return Dataset("few", x[:train], y[:train], x[train:], y[train:], ("first.gz", "second.gz"))


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("mnist", images(59, 60), "first.gz: at least 60 images to train on are needed, found 59"),
        ("mnist", images(60, 59), "second.gz: at least 60 images to test on are needed, found 59"),
        ("ensemble", images(60, 40), "second.gz: at least 1 images to test on are needed, found 0"),
        ("ensemble", images(60, 10), "second.gz: at least 100 images to train on are needed, found 70"),
        ("regularization", images(200, 100), "second.gz: at least 1 images to test on are needed, found 0"),
        ("initialization", images(59, 2), "first.gz: at least 60 images to train on are needed, found 59"),
        ("drift", images(59, 2), "first.gz: at least 60 images to train on are needed, found 59"),
        ("small_batches", images(256, 255), "second.gz: at least 256 images to test on are needed, found 255"),
        ("small_batches", images(255, 256), "first.gz: at least 256 images to train on are needed, found 255"),
        ("whitening", images(170, 9), "first.gz: at least 171 images to train on are needed, found 170"),
    ],
)
def test_too_few_images_are_refused_before_training(name, data, message, monkeypatch):
    study = import_module(f"paper.{name}")
    monkeypatch.setattr("paper.study.load", lambda path: data)
    monkeypatch.setattr(study, "train", lambda *args, **kwargs: pytest.fail("trained"))
    with pytest.raises(ValueError, match=message):
        study.run(Settings(seeds=(0,)))


def test_constant_images_are_refused_before_training(monkeypatch):
    """Where nothing varies, or for `whitening` but one pixel, or what varies is left out of a seed's three quarters."""
    study, data = import_module("paper.whitening"), images(200, 9)
    constant = np.full_like(data.x_train, 0.5)
    one = constant.copy()
    one[:, 0, 0, 0] = data.x_train[:, 0, 0, 0]
    last = constant.copy()
    last[np.random.default_rng(0).permutation(200)[-1]] = 0
    monkeypatch.setattr(study, "train", lambda *args, **kwargs: pytest.fail("trained"))
    for x, message in (
        (constant, "at least 1 pixels must differ .* found 0 in 200"),
        (one, "at least 2 pixels must differ .* found 1 in 150"),
        (last, "at least 2 pixels must differ .* found 0 in 150"),
    ):
        monkeypatch.setattr("paper.study.load", lambda path, x=x: replace(data, x_train=x))
        with pytest.raises(ValueError, match=f"first.gz: {message}"):
            study.run(Settings(seeds=(0,)))


def test_a_gap_that_is_gone_is_smaller():
    """Red with a ratio of the gaps, which says nothing of one that is zero or below."""
    for test_loss in (0.1, 0.09):
        numbers = changed(SUPPORT["regularization"], norm=ends_at(0.1, 0, test_loss, 0.03))
        assert all(claim.holds for claim in import_module("paper.regularization").claims(numbers))


def test_features_left_out_of_a_panel_are_said(monkeypatch, tmp_path):
    study, figure = import_module("paper.whitening"), Figure()
    monkeypatch.setattr("paper.study.load", lambda path: images(180, 9, 16))
    study.draw(figure, study.run(Settings(steps=1, seeds=(0,), short=True)))
    labels = [axes.get_xlabel() for axes in figure.axes]
    assert labels.count("feature (1 in 4 shown)") == 4


def nothing(value):
    """The same lists with zeros for numbers."""
    if isinstance(value, dict):
        return {key: item if key in ("at", "ratios", "scales") else nothing(item) for key, item in value.items()}
    return [nothing(item) for item in value] if isinstance(value, list) else 0.0


@pytest.mark.parametrize("name", SUPPORT)
def test_nothing_follows_from_nothing(name):
    """Every ratio is of zeros. Red with a division that raises or warns, as where a network never gets better."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        claims = import_module(f"paper.{name}").claims(nothing(SUPPORT[name]))
    assert [str(claim) for claim in claims if claim.holds] == []


@pytest.mark.parametrize("name", SUPPORT)
def test_claims_follow_from_what_supports_them(name):
    claims = import_module(f"paper.{name}").claims(SUPPORT[name])
    assert [str(claim) for claim in claims if not claim.holds] == []
    refuted = {place for study, _, places in CONTRARY if study == name for place in places}
    assert refuted == set(range(len(claims)))


@pytest.mark.parametrize(("name", "changes", "places"), CONTRARY)
def test_claims_fail_where_numbers_are_contrary(name, changes, places):
    claims = import_module(f"paper.{name}").claims(changed(SUPPORT[name], **changes))
    assert [place for place, claim in enumerate(claims) if not claim.holds] == places
