"""The README's demo, short. Skipped without the extra `demo`."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

for module in ("matplotlib", "sklearn", "tqdm"):
    pytest.importorskip(module)

ROOT = Path(__file__).resolve().parent.parent


def demo(*arguments):
    command = re.search(r"\.venv/bin/python (examples/\S+ mnist)", (ROOT / "README.md").read_text())[1].split()
    return subprocess.run([sys.executable, *command, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True)


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


@pytest.mark.parametrize("arguments", [("--steps", 0), ("--data", "nowhere"), ("--seeds", -1)], ids=str)
def test_what_makes_no_sense_is_said(arguments, tmp_path):
    done = demo(*arguments, "--out", tmp_path / "figures")
    assert done.returncode != 0
    assert str(arguments[0]).lstrip("-") in done.stderr or str(arguments[1]) in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "figures").exists()
