"""test_selftest -- ``python -m fastbn selftest`` is green on what is right, and red on any broken promise."""

import sys

import numpy as np
import pytest

import fastbn
from fastbn import _native, _selftest
from fastbn.__main__ import main


@pytest.fixture
def grid(monkeypatch):
    """A grid that takes no time."""
    monkeypatch.setattr(_selftest, "ITEMSIZE", {"float32": 4, "float16": 2})
    monkeypatch.setattr(_selftest, "OFFSETS", ((0, 1), (1e6, 1)))
    monkeypatch.setattr(_selftest, "SHAPES", (("NCHW", (2, 6, 90, 61)), ("NC", (6000, 7))))


@pytest.fixture
def small(grid, monkeypatch):
    """The same without PyTorch."""
    monkeypatch.setitem(sys.modules, "torch", None)


def spoil(monkeypatch, name, change):
    """Let a function of fastbn's return what `change` makes of its first result."""
    function = getattr(fastbn, name)

    def spoiled(*arguments, **keywords):
        found = function(*arguments, **keywords)
        change(found[0])
        return found

    monkeypatch.setattr(fastbn, name, spoiled)


@pytest.mark.usefixtures("small")
def test_green(capsys):
    isa, threads = _native.isa(), fastbn.get_num_threads()
    assert main(["selftest"]) == 0
    out = capsys.readouterr().out
    assert f"All errors are as promised, and all bits the same on {', '.join(_native.isas())}" in out
    assert [line.split()[-1] for line in out.splitlines() if line.startswith("float16")] == ["-", "-"]
    assert "!" not in out
    assert (_native.isa(), fastbn.get_num_threads()) == (isa, threads)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(("name", "op"), [("batch_norm_forward", "forward"), ("batch_norm_backward", "backward")])
def test_an_error_is_red(name, op, monkeypatch, capsys):
    """One element out of thousands: y is measured at its own scale, dx at that of its terms.

    Red with a status that is 0 whatever was found.
    """

    def change(y):
        ulps = 4 if op == "forward" else 16
        y[-1, -1, ...].flat[-1] += ulps * np.finfo(y.dtype).eps * max(1, abs(y[-1, -1, ...].flat[-1]))

    spoil(monkeypatch, name, change)
    assert main(["selftest"]) == 1
    out = capsys.readouterr().out
    where = f"float32 NC 6000x7, mean 0, deviation 1: {op} ({_native.isa()}, threads=1)"
    assert f"{where}: {'y' if op == 'forward' else 'dx'} is off by" in out
    assert "other bits" not in out
    assert "as promised" not in out
    assert "! " in out


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("where", ["isa", "threads"])
def test_other_bits_are_red(where, monkeypatch, capsys):
    """A last bit that only one ISA, or only one number of threads, gets otherwise: no error to speak of."""

    def change(y):
        if _native.isa() == "scalar" if where == "isa" else fastbn.get_num_threads() == 3:
            y[0, 0, ...] = np.nextafter(y[0, 0, ...], y.dtype.type(0))

    if where == "isa" and _native.isas() == ("scalar",):
        pytest.skip("there is one ISA")
    spoil(monkeypatch, "batch_norm_forward", change)
    assert main(["selftest"]) == 1
    out = capsys.readouterr().out
    there = "scalar, threads=1" if where == "isa" else f"{_native.isa()}, threads=3"
    assert f"forward ({there}): other bits than forward ({_native.isas()[0]}, threads=1)" in out


@pytest.mark.usefixtures("small")
def test_nothing_written_is_red(monkeypatch, capsys):
    """What an earlier call left in the output is no result."""
    forward = fastbn.batch_norm_forward

    def idle(*arguments, out, **keywords):
        return (out, None) if fastbn.get_num_threads() == 3 else forward(*arguments, out=out, **keywords)

    monkeypatch.setattr(fastbn, "batch_norm_forward", idle)
    monkeypatch.setattr(_selftest, "OPS", ("forward",))
    assert main(["selftest"]) == 1
    assert "threads=3): y is off by inf ulp" in capsys.readouterr().out


@pytest.mark.slow
def test_the_whole_grid(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert main(["selftest"]) == 0
    assert capsys.readouterr().out.count("\n") >= 20


@pytest.mark.torch
@pytest.mark.usefixtures("grid")
def test_pytorch_stands_beside(capsys):
    pytest.importorskip("torch")
    assert main(["selftest"]) == 0
    out = capsys.readouterr().out
    beside = [float(cell) for line in out.splitlines() if line.startswith("float32") for cell in line.split("|")[-1:]]
    assert min(beside) > 3
