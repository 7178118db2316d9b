"""test_studies -- the studies of examples/paper: each is found, runs short, and shows what it claims.

A study is tested by being there; what is particular to one has a test of its own in its `test_study_` file. Skipped
without the extra `demo`, and the studies of convolutions without PyTorch.
"""

import contextlib
import io
import json
import re
import sys
from importlib import import_module
from pathlib import Path

import pytest

for module in ("matplotlib", "sklearn", "tqdm"):
    pytest.importorskip(module)

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT / "examples") not in sys.path:
    sys.path.append(str(ROOT / "examples"))

from paper.study import Settings, perform, studies  # noqa: E402

STUDIES = studies()
GALLERY = ROOT / "docs" / "paper.md"

every_study = pytest.mark.parametrize("name", STUDIES)


@every_study
def test_its_claims_hold_in_short(name, tmp_path):
    """Red where batch norm does not do what the study says it does; a claim about time is not asserted."""
    try:
        study = import_module(f"paper.{name}")
    except ImportError as error:
        if (error.name or "").partition(".")[0] != "torch":
            raise
        pytest.skip("needs PyTorch")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        claims = perform(study, Settings(seeds=(0,), short=True), tmp_path)
    assert claims
    assert [str(claim) for claim in claims if not claim.holds and not claim.timing] == []
    assert study.TITLE in printed.getvalue()
    assert "Data: " in printed.getvalue()
    numbers = json.loads((tmp_path / f"{name}.json").read_text(), parse_constant=pytest.fail)
    assert numbers["study"] == name
    assert numbers["data"]
    assert numbers["seeds"] == [0]
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


@every_study
def test_it_hangs_in_the_gallery(name):
    """With the figure of its default run, and under its own name."""
    (section,) = re.findall(rf"^## {name}\n(.*?)(?=^## |\Z)", GALLERY.read_text(), re.MULTILINE | re.DOTALL)
    assert f"](paper/{name}.png)" in section
    assert (ROOT / "docs" / "paper" / f"{name}.png").stat().st_size < 120_000


def test_they_are_in_the_order_of_the_page():
    headings = re.findall(r"^## (\w+)$", GALLERY.read_text(), re.MULTILINE)
    assert [name for name in headings if name in STUDIES] == list(STUDIES)
    numbers = [int(subject.partition(".")[0]) for subject in STUDIES.values()]
    assert len(set(numbers)) == len(numbers)
