"""test_studies -- the studies of examples/paper: each is found, runs short, and shows what it claims.

A study is tested by being there; what is particular to one has a test of its own in its `test_study_` file. Skipped
without the extra `demo`, and the studies of convolutions without PyTorch.
"""

import contextlib
import io
import itertools
import json
import re
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

for module in ("matplotlib", "sklearn", "tqdm"):
    pytest.importorskip(module)

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT / "examples") not in sys.path:
    sys.path.append(str(ROOT / "examples"))

from paper import study as house  # noqa: E402
from paper.study import Claim, Settings, perform, reduced, reserve, save, studies, without  # noqa: E402
from PIL import Image  # noqa: E402

STUDIES = studies()
GALLERY = ROOT / "docs" / "paper.md"

every_study = pytest.mark.parametrize("name", STUDIES)


class Watched(Settings):
    """Notes in `asked` which of the settings are asked for."""

    def __getattribute__(self, name):
        super().__getattribute__("__dict__").setdefault("asked", set()).add(name)
        return super().__getattribute__(name)


@every_study
def test_its_claims_hold_in_short(name, tmp_path):
    """Red where batch norm does not do what the study says it does; a claim about time is not asserted."""
    try:
        study = import_module(f"paper.{name}")
    except ImportError as error:
        if (error.name or "").partition(".")[0] != "torch":
            raise
        pytest.skip("needs PyTorch")
    settings = Watched(seeds=(0,), short=True)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        claims = perform(study, settings, tmp_path)
    assert claims
    options = {"path": "data", "steps": "steps", "paper": "paper"}
    assert {option for name, option in options.items() if name not in settings.asked} == set(without(name))
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
    figure = ROOT / "docs" / "paper" / f"{name}.png"
    assert figure.stat().st_size < 120_000
    text = (ROOT / "examples" / "paper" / f"{name}.py").read_text(encoding="utf-8")
    with Image.open(figure) as image:
        there = colours(image)
    for colour in ("PLAIN", "NORM", "THIRD", "FOURTH", "FIFTH", "SIXTH"):
        assert (getattr(house, colour) in there) == bool(re.search(rf"\b{colour}\b", text)), colour


def colours(image):
    return {f"#{r:02X}{g:02X}{b:02X}" for r, g, b in np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0)}


@pytest.mark.parametrize("reach", [0, 1, 9])
def test_the_palette_has_what_a_figure_is_made_of(reach):
    """The house's colours, were it for a single dot among others like it, and the commonest; the rest is near."""
    ours = np.array([list(bytes.fromhex(colour[1:])) for colour in house.COLOURS])
    common = np.array([[255, 255, 255], [228, 228, 228], [17, 34, 51]])
    around = np.random.default_rng(0).integers(-reach, reach + 1, (200, 1, 3))
    rare = np.clip(np.concatenate([ours, common]) + around, 0, 255).reshape(-1, 3)
    # All the shades of grey many times, and a few dots between our colours and white.
    greys = np.repeat(np.arange(256), 100)[:, None] * [1, 1, 1]
    pixels = np.concatenate([np.repeat(common, 1000, 0), ours, (ours + 255) // 2, greys, rare]).astype(np.uint8)
    small = reduced(Image.fromarray(pixels[None]))
    assert small.mode == "P"
    away = np.abs(np.asarray(small.convert("RGB"), int)[0] - pixels).max(-1)
    assert away[:3007].max() == 0
    assert away.max() <= 16


def made_up(value, figures):
    study = ModuleType("paper.made_up")
    study.TITLE, study.run = "All is well", lambda settings: settings.header("nothing", 1)
    study.claims = lambda numbers: [Claim("It rises.", "times", [2.0, value], 1), Claim("It is.", "times", [2.0], 1)]
    study.table = lambda numbers: (["a", "b"], [["c", 1]])
    study.draw = lambda figure, numbers: figures.append(figure)
    return study


@pytest.mark.parametrize("value", [2.0, 0.5, float("nan"), float("inf")])
def test_the_figure_says_what_the_run_showed(value, tmp_path):
    """Red where the title of a figure is the same whether its claims hold or not, or infinity supports one."""
    figures = []
    study = made_up(value, figures)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        perform(study, Settings(), tmp_path)
    title, foot = figures[0].get_suptitle(), figures[0].get_supxlabel()
    assert title in printed.getvalue()
    if value == 2:
        assert (title, "Did not hold" in foot) == ("All is well", False)
    else:
        assert title == "All is well?\nIn this run 1 of 2 claims did not hold"
        assert foot.endswith("Did not hold: It rises.")


def test_what_was_found_is_written_before_it_is_printed(monkeypatch, tmp_path):
    """Red where whoever stops reading, or cannot show a letter, costs all that was computed."""

    class Gone(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", Gone())
    with pytest.raises(BrokenPipeError):
        perform(made_up(2.0, []), Settings(), tmp_path)
    assert json.loads((tmp_path / "made_up.json").read_text())["claims"][0]["holds"] is True
    assert (tmp_path / "made_up.png").read_bytes().startswith(b"\x89PNG")


def test_what_cannot_be_written_is_known_beforehand(tmp_path):
    """And looking leaves nothing behind, neither folders nor files."""
    reserve(tmp_path / "a" / "b", ["mnist.json"])
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("whole")
    (tmp_path / "mnist.json").mkdir()
    for out in (tmp_path / "file", tmp_path / "file" / "below", tmp_path):
        with pytest.raises(ValueError, match="cannot write to .*" + ("mnist" if out == tmp_path else "file")):
            reserve(out, ["mnist.json"])
    reserve(tmp_path, ["file"])
    assert (tmp_path / "file").read_text() == "whole"
    assert len(list(tmp_path.iterdir())) == 2


def test_ticks_of_many_seeds_keep_apart(tmp_path):
    """Red with a label for each."""
    from paper import ensemble

    of_size = [[0.1] * 6, [0.09] * 15, [0.08] * 20, [0.08] * 15, [0.08] * 6, [0.07]]
    for count in (1, 3, 16, 40):
        numbers = {"error": [of_size] * count, "loss": [of_size] * count, "seeds": list(range(5, 5 + count))}
        drawn = []

        def draw(figure, numbers, drawn=drawn):
            ensemble.draw(figure, numbers)
            drawn.append(figure)

        save(draw, numbers, "title", "foot", tmp_path / "ensemble.png")
        for axes in drawn[0].axes[:2]:
            boxes = [label.get_window_extent() for label in axes.get_xticklabels()]
            assert all(a.x1 + 2 < b.x0 for a, b in itertools.pairwise(boxes))
            assert axes.get_xticklabels()[0].get_text() == "5"


def test_they_are_in_the_order_of_the_page():
    headings = re.findall(r"^## (\w+)$", GALLERY.read_text(), re.MULTILINE)
    assert [name for name in headings if name in STUDIES] == list(STUDIES)
    numbers = [int(subject.partition(".")[0]) for subject in STUDIES.values()]
    assert len(set(numbers)) == len(numbers)
