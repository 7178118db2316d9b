"""test_demo -- the README's demo, short, and the face of all studies. Skipped without the extra `demo`."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

for module in ("matplotlib", "sklearn", "tqdm"):
    pytest.importorskip(module)

ROOT = Path(__file__).resolve().parent.parent


def python(*arguments):
    return subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True)


def demo(*arguments):
    command = re.search(r"\.venv/bin/python (examples/\S+ mnist)", (ROOT / "README.md").read_text())[1].split()
    return python(*command, *arguments)


def test_what_it_trains_prints_draws_and_serves(tmp_path):
    """Red with a freeze that forgets eps, or a backward of the wrong sign."""
    done = demo("--steps", 300, "--seeds", 1, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    for word in ("with batch norm", "without batch norm", "final test accuracy", "inference", "NumPy", "holds"):
        assert word in done.stdout
    numbers = json.loads((tmp_path / "mnist.json").read_text())
    plain, norm = (numbers[kind]["accuracy"][0] for kind in ("plain", "norm"))
    assert norm[-1] > 0.9 > plain[-1]
    assert [row["batch"] for row in numbers["inference"]] == [1, 60]
    assert all(row["difference"] < 1e-4 for row in numbers["inference"])
    assert (tmp_path / "mnist.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "arguments",
    [
        ("--steps", 0),
        ("--data", "nowhere"),
        ("--seeds", -1),
        ("--seed", -1),
        ("--out", __file__),
        ("--out", Path(__file__) / "below"),
        ("--out", "/dev/null/below"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_said(arguments, tmp_path):
    done = demo("--out", tmp_path / "figures", *arguments)
    assert done.returncode != 0
    assert str(arguments[0]).lstrip("-") in done.stderr or str(arguments[1]) in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""  # nothing was trained
    assert not (tmp_path / "figures").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("mnist", "--data", ""), "--data: a path is wanted, found nothing"),
        (("contour", "--data", ""), "--data: a path is wanted, found nothing"),
        (
            ("mnist", "--seed", 2**63 - 2),
            "--seed: seeds from 0 to 9223372036854775807 are possible, not 3 from .*06 on",
        ),
    ],
)
def test_a_seed_or_path_that_is_none_is_an_error_of_usage(arguments, message, tmp_path):
    done = python("examples/paper", *arguments, "--out", tmp_path)
    assert done.returncode == 2
    assert re.fullmatch(f"python examples/paper: error: {message}", done.stderr.splitlines()[-1])
    assert not list(tmp_path.iterdir())


SHORT = [sys.executable, "examples/paper", "contour", "--short", "--steps", "40", "--out"]


def test_a_terminal_that_lacks_letters_has_others(tmp_path):
    poor = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([*SHORT, tmp_path], cwd=ROOT, capture_output=True, text=True, env=poor)
    assert (done.returncode, done.stderr) == (0, "")
    assert "y = 4 x?/?? + 6 x?/??" in done.stdout


@pytest.mark.skipif(sys.platform == "win32", reason="a closed pipe is another error there")
def test_a_reader_who_is_gone_costs_nothing(tmp_path):
    """Red where it ends the command with a traceback, or before all is written."""
    command = [*SHORT, tmp_path]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as gone:
        gone.stdout.close()
        assert gone.stderr.read() == ""
    assert gone.returncode == 141
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["contour.json", "contour.png"]


def performing(line, folder, name):
    """The command, whose studies do this instead."""
    (folder / "__main__.py").write_text(f"""
import errno, runpy, sys
sys.path.insert(0, "examples")
from paper import study
def perform(*study):
    {line}
study.perform = perform
sys.argv = ["examples/paper", {name!r}, "--out", {str(folder / "figures")!r}]
runpy.run_path("examples/paper", run_name="__main__")
""")
    return python(folder)


def test_a_reader_who_is_gone_from_windows(tmp_path):
    """Red where only a broken pipe is one; or where a file that cannot be, or what another system says, is one too."""
    gone = "raise OSError(errno.EINVAL, 'Invalid argument'"
    done = performing(f"sys.platform = 'win32'; {gone})", tmp_path, "all")
    assert (done.returncode, done.stdout, done.stderr) == (141, "", "")
    for other in (f"sys.platform = 'linux'; {gone})", f"sys.platform = 'win32'; {gone}, 'file?')"):
        done = performing(other, tmp_path, "contour")
        assert done.returncode == 1
        assert done.stderr.startswith("python examples/paper contour: [Errno 22] Invalid argument")


def test_an_interrupt_is_one_line(tmp_path):
    """Red where it ends the command by a signal if it came in a string of code."""
    done = performing("exec('raise KeyboardInterrupt')", tmp_path, "all")
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "python examples/paper: interrupted\n")


def test_a_name_that_is_none_is_told_from_those_that_are():
    names = [line.split()[0] for line in python("examples/paper", "list").stdout.splitlines()]
    assert len(names) == 11
    for arguments, code in ((("paper",), 2), (("--help",), 0)):
        done = python("examples/paper", *arguments)
        assert done.returncode == code
        for name in (*names, "all", "list"):
            assert name in done.stdout + done.stderr
        assert "Traceback" not in done.stderr


def test_of_all_studies_those_that_can_run(tmp_path):
    """Red where the first that fails ends the command, or the command ends well."""
    done = python("examples/paper", "all", "--short", "--steps", 1, "--data", "nowhere", "--out", tmp_path)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    said = dict(re.findall(r"^python examples/paper (\w+): (.*)$", done.stderr, re.MULTILINE))
    assert len(said) == 10
    assert said["mnist"] == "nowhere: no such file or directory"
    assert f"  mnist failed: {said['mnist']}" in done.stdout.splitlines()
    assert len(re.findall(r"^  \w+ +failed +\d+$", done.stdout, re.MULTILINE)) == 10
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["contour.json", "contour.png"]
    assert re.search(r"^  contour +\d of 4 +\d+$", done.stdout, re.MULTILINE)


def test_of_all_studies_any_error_stops_one(tmp_path):
    """Red where only errors of some kinds are caught. Nothing is trained: all raise at once."""
    lines = f"""
import runpy, sys
sys.path.insert(0, "examples")
from paper import study
def perform(module, *rest):
    raise ZeroDivisionError(module.__name__)
study.perform = perform
sys.argv = ["examples/paper", "all", "--out", {str(tmp_path / "figures")!r}]
runpy.run_path("examples/paper", run_name="__main__")
"""
    done = python("-c", lines)
    assert done.returncode == 1
    assert re.findall(r"^  (\w+) failed: paper\.\w+$", done.stdout, re.MULTILINE)[0] == "mnist"
    assert len(re.findall(r"^  (\w+) +failed +\d+$", done.stdout, re.MULTILINE)) == 11
    assert "line" in done.stderr  # of the traceback: this is nobody's input
    assert not (tmp_path / "figures").exists()


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (("contour", "--data", "nope"), "data"),
        (("gradients", "--steps", 7), "steps"),
        (("whitening", "--paper"), "paper"),
    ],
)
def test_an_option_without_a_use_is_refused(arguments, option, tmp_path):
    done = python("examples/paper", *arguments, "--out", tmp_path)
    assert done.returncode == 2
    assert f"{arguments[0]} has no use for --{option}" in done.stderr
    assert not list(tmp_path.iterdir())
    listed = python("examples/paper", "list").stdout
    assert re.search(rf"^{arguments[0]} .*\(without .*--{option}\b", listed, re.MULTILINE)


@pytest.mark.parametrize(
    ("module", "name"), [("matplotlib", "mnist"), ("torch", "cifar"), ("sklearn.datasets", "mnist")]
)
def test_what_is_not_installed_is_named(module, name, tmp_path):
    lines = f"""
import runpy, sys
sys.modules["{module}"] = None  # as if it were not there
sys.argv = ["examples/paper", "{name}", "--out", {str(tmp_path / "figures")!r}]
sys.path.insert(0, "")
runpy.run_path("examples/paper", run_name="__main__")
"""
    done = python("-c", lines)
    assert done.returncode == 1
    assert re.fullmatch(rf"python examples/paper.*: .*\b{module}\b.*; .*pip install \"\.\[paper\]\".*\n", done.stderr)


def test_studies_of_perceptrons_need_no_pytorch():
    lines = """
import sys
from importlib import import_module
sys.modules["torch"] = None  # as if it were not there
sys.path.insert(0, "examples")
from paper.study import studies
for name in studies():
    try:
        import_module("paper." + name)
    except ImportError:
        print(name)
"""
    done = python("-c", lines)
    assert (done.stdout.split(), done.stderr) == (["inception", "gradients", "cifar"], "")
