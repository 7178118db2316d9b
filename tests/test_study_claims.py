"""test_study_claims -- the claims of the studies on NumPy can fail: from contrary numbers they are not read.

Red with a claim that compares the wrong way round, or something with itself. Skipped without the extra `demo`.
"""

import contextlib
import copy
import io
import sys
from importlib import import_module
from pathlib import Path

import pytest

for module in ("matplotlib", "sklearn", "tqdm"):
    pytest.importorskip(module)

EXAMPLES = str(Path(__file__).resolve().parent.parent / "examples")
if EXAMPLES not in sys.path:
    sys.path.append(EXAMPLES)

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
    ("regularization", {"norm__test_error": [[0.9, 0.05, 0.05]]}, [1]),
    ("regularization", {"dropout": ends_at(0.01, 0, 0.15, 0.04)}, [2]),
    ("regularization", {"both__test_loss": [[2.0, 0.02, 0.02]]}, [3]),
]


@pytest.mark.parametrize("name", SUPPORT)
def test_networks_that_hardly_learn_are_drawn(name, tmp_path):
    """What never gets anywhere has no finite number of steps. Red with a figure or ratio that cannot do without one."""
    with contextlib.redirect_stdout(io.StringIO()):
        perform(import_module(f"paper.{name}"), Settings(steps=1, seeds=(0,), short=True), tmp_path)
    assert (tmp_path / f"{name}.png").exists()


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
