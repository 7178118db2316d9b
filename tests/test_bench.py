"""test_bench -- ``python -m fastbn bench`` tells what is right, says what it measured, and never what it did not.

Nothing here looks at a time. Seeded bug that turns it red: an engine that does not spoil the output between contenders,
so that one that writes nothing passes for the one before it.
"""

import errno
import importlib.util
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tolerance
import twin

import fastbn
from fastbn.__main__ import main, unread
from fastbn._bench import cases, cli, data, engine, peers, report

ROOT = Path(__file__).resolve().parents[1]
QUICK = ["bench", "--shapes", "3x16x5x4", "60x100", "--seconds", "0", "--threads", "1", "2"]


def test_bench_end_to_end(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- table: python -m fastbn bench -->\nold\n<!-- end of table -->\nafter\n")
    found = tmp_path / "found.json"
    shapes = ["--shapes", "3x16x56x56", "--ops", "forward", "backward"]
    command = ["bench", *shapes, "--seconds", "0", "--peers", "numpy", "--json", str(found), "--markdown", str(page)]
    assert main(command) == 0

    groups = json.loads(found.read_text())["groups"]
    assert [g["op"] for g in groups] == ["forward", "backward"]
    for group in groups:
        copy, *others = group["results"]
        assert (copy["contender"], copy["multiple"], copy["correct"]) == ("copy", 1, None)
        assert [r["contender"].split(" fresh")[0] for r in others] == ["fastbn NCHW", "fastbn NHWC", "NumPy NCHW"]
        for result in others:
            assert result["correct"] is True
            assert result["fastest"] / copy["slowest"] <= result["multiple"]
            assert result["multiple"] <= result["slowest"] / copy["fastest"]
            assert result["fastest"] <= result["median"] <= result["slowest"]

    out = capsys.readouterr().out
    assert "All results are correct." in out
    multiple = f"{groups[0]['results'][1]['multiple']:.2f}"
    assert f" {multiple} " in out

    text = page.read_text()
    assert text.startswith(f"before\n<!-- table: python -m fastbn {' '.join(command)} -->\n|")
    assert text.endswith("<!-- end of table -->\nafter\n")
    assert "old" not in text
    assert f"| fastbn NCHW | {multiple} |" in text
    assert report.MARKED.search(text)


def test_every_kind_of_case_runs(capsys):
    options = ["--ops", *cases.OPS, "--fuse", *cases.FUSIONS, "--out", "both", "--peers", "numpy"]
    assert main([*QUICK, *options]) == 0
    out = capsys.readouterr().out
    for op in cases.OPS:
        assert f"\n{op}, residual+relu, float32, 2 threads: microseconds" in out


@pytest.mark.parametrize("name", cases.ITEMSIZE)
def test_every_dtype_runs(name):
    if name == "bfloat16":
        pytest.importorskip("ml_dtypes")
    assert main([*QUICK, "--dtypes", name, "--fuse", "none", "residual+relu"]) == 0


@pytest.mark.parametrize("name", [pytest.param(p, marks=[pytest.mark.torch] * (p == "torch")) for p in cli.PEERS])
def test_peers_are_correct(name):
    """A peer that is asked the wrong question would lose or win for the wrong reason."""
    try:
        peer = cli.PEERS[name]()
    except ImportError as error:
        pytest.skip(str(error))
    taken_part = 0
    for op in cases.OPS:
        for fuse in cases.FUSIONS:
            for shape in ((3, 16, 5, 4), (60, 100)):
                case = cases.Case(op, shape, fuse=fuse)
                tensors = data.Tensors(shape, "float32")
                found = list(peers.entries(case, [peer], ("NCHW", "NHWC"), (False, True)))
                field = [entry.make(tensors) for entry in found]
                copy, *judged = [correct for _, correct in engine.check(found, field, lambda _, t=tensors: t)]
                assert copy is None
                assert all(judged)
                taken_part += len(judged)
    assert taken_part > 0


def test_a_wrong_result_is_told(monkeypatch, capsys):
    forward = fastbn.batch_norm_forward

    def wrong(x, *arguments, out, **options):
        y, saved = forward(x, *arguments, out=out, **options)
        y[-1, -1] += np.float32(1e-3)
        return y, saved

    monkeypatch.setattr(fastbn, "batch_norm_forward", wrong)
    assert main(["bench", "--shapes", "3x16x56x56", "--ops", "forward", "inference", "--seconds", "0"]) == 1
    forward_table, inference_table, _, verdict = capsys.readouterr().out.strip().split("\n\n")[1:]
    assert forward_table.count("!") == 2
    assert "!" not in inference_table
    assert "no excuse (2)" in verdict


def test_a_call_that_writes_nothing_is_wrong():
    case, tensors = cases.Case("inference", (3, 16, 5, 4)), data.Tensors((3, 16, 5, 4), "float32")
    entry = peers.Entry(case, peers.Fastbn(), "NCHW")
    good = entry.make(tensors)
    idle = peers.Contender("idle", lambda: tensors.out("NCHW"), good.results)
    right, wrong = engine.check([entry, entry], [good, idle], lambda _: tensors)
    assert right[0] < 4
    assert right[1] is True
    assert wrong == (np.inf, False)


def test_contenders_take_turns():
    """As many for each, and not one contender after the other."""
    turns = []
    samples = engine.measure([lambda i=i: turns.append(i) for i in range(3)], 0)
    assert [len(s) for s in samples] == [engine.MIN_ROUNDS] * 3
    runs = [i for i, before in zip(turns, [None, *turns], strict=False) if i != before]
    assert len(runs) >= 2 * engine.MIN_ROUNDS


def test_ratios_are_of_one_round():
    """A machine that becomes half as fast changes no ratio."""
    assert engine.median_ratio([1, 2, 2, 4, 4], [2, 4, 4, 8, 8]) == 0.5
    assert engine.median_ratio([1, 1, 9], [1, 2, 3]) == 1


def _measured(monkeypatch, seconds):
    """Let every contender take what ``seconds`` says of its label, and note the threads that it was given."""
    threads = {}

    def run(contest, tensors, _, *, run=engine.run):
        labels = list(map(str, contest.entries))

        def measure(calls, _, prepare):
            for label, ready in zip(labels, prepare, strict=True):
                ready()
                threads[label] = fastbn.get_num_threads()
            return [[seconds(label)] * 3 for label in labels]

        monkeypatch.setattr(engine, "measure", measure)
        return run(contest, tensors, 0)

    monkeypatch.setattr(cli, "run", run)
    return threads


@pytest.mark.parametrize(
    ("axis", "options", "base", "varied"),
    [
        ("fuse", ["--fuse", "none", "relu"], "fastbn NCHW", "fastbn NCHW relu"),
        ("dtypes", ["--dtypes", "float32", "float16"], "fastbn NCHW", "fastbn NCHW float16"),
        ("threads", ["--threads", "1", "3"], "fastbn NCHW", "fastbn NCHW 3 threads"),
        ("reader", [], "fastbn NCHW", "fastbn NCHW and a reader"),
        ("out", [], "fastbn NCHW", "fastbn NCHW fresh"),
        ("peers", ["--peers", "numpy"], "NumPy NCHW", "fastbn NCHW"),
    ],
)
def test_ratio(axis, options, base, varied, monkeypatch, capsys, tmp_path):
    """Every axis is measured within one group, over the first of its values."""
    found = tmp_path / "found.json"
    threads = _measured(monkeypatch, lambda label: {base: 4.0, varied: 5.0}.get(label, 2.0))
    command = ["bench", "--shapes", "3x16x56x56", "--ops", "forward", "--layouts", "NCHW", "--ratio", axis, *options]
    assert main([*command, "--json", str(found)]) == 0
    table = capsys.readouterr().out.split("\n\n")[1].splitlines()
    assert varied in table[1]
    for line, expected in zip(table[2:5], ["3x16x56x56", "geometric mean", "largest"], strict=True):
        assert line.startswith(expected)
        assert "1.25" in line
    (group,) = json.loads(found.read_text())["groups"]
    results = {r["contender"]: r for r in group["results"]}
    assert results[varied]["multiple"] == 2.5
    if axis != "peers":
        assert (results[varied]["over"], results[varied]["ratio"]) == (base, 1.25)
    if axis == "threads":
        assert (threads[base], threads[varied]) == (1, 3)


def test_in_place_gives_each_its_input(capsys):
    """Otherwise the second would normalize what the first has normalized."""
    options = ["--out", "inplace", "--fuse", "none", "relu", "--ratio", "fuse", "--ops", *cases.OPS]
    assert main(["bench", "--shapes", "3x16x56x56", "--seconds", "0", *options]) == 0
    out = capsys.readouterr().out
    assert "All results are correct." in out
    assert "backward" not in out
    assert "NHWC" not in out


@pytest.mark.parametrize("memory", [1 << 20, None, 1 << 40])
def test_what_does_not_fit_is_left_out(memory, monkeypatch, capsys):
    """Inputs in both layouts and results: 3 x 16 x 56 x 56 is 0.6 MB of float32."""
    monkeypatch.setattr(report, "free_memory", lambda: memory)
    command = ["bench", "--shapes", "3x16x56x56", "--seconds", "0", "--ops", "backward", "--fuse", "residual"]
    small = memory == 1 << 20
    assert main([*command, "--out", "both"]) == small
    assert ("without 3x16x56x56, backward, residual, float32" in capsys.readouterr().err) == small


def test_units(monkeypatch, capsys):
    _measured(monkeypatch, lambda _: 3.0e-6)
    command = ["bench", "--shapes", "10x100", "100x300", "--ops", "inference"]
    for unit, small, large in (("time", "3.00", "3.00"), ("element", "3000", "100.00"), ("copy", "1.00", "1.00")):
        assert main([*command, "--unit", unit]) == 0
        small_table, large_table = capsys.readouterr().out.split("\n\n")[1:3]
        assert small_table.splitlines()[2].split()[2] == small
        assert large_table.splitlines()[2].split()[2] == large


@pytest.mark.parametrize("share", [None, 0.01, 0.4])
def test_a_busy_machine_is_told(share):
    assert ("40% of the processors" in report.verdict([], share)) == (share == 0.4)


def test_others_are_not_us():
    others = report.Others()
    sum(range(10**6))
    share = others.share()
    assert share is None or 0 <= share <= 1


@pytest.mark.parametrize("layout", ["NCHW", "NHWC", "NCHW8c", "NCHW16c"])
def test_layouts(layout):
    a = np.arange(2 * 32 * 3 * 4).reshape(2, 32, 3, 4)
    there = data.to_layout(a, layout)
    assert np.array_equal(data.logical(there, layout), a)
    if layout == "NCHW8c":
        assert there.shape == (2, 4, 3, 4, 8)
        assert there[1, 2, 1, 3, 5] == a[1, 2 * 8 + 5, 1, 3]


@pytest.mark.parametrize("name", ["float32", "float64"])
@pytest.mark.parametrize("fuse", cases.FUSIONS)
@pytest.mark.parametrize("training", [True, False])
def test_reference_is_the_twin(name, fuse, training):
    """What judges in the field is judged by what judges in the tests."""
    case = cases.Case("backward" if training else "inference", (5, 7, 3, 2), name, fuse)
    t = data.Tensors(case.shape, name)
    x, dy, residual = (t.get(n, "NCHW") for n in ("x", "dy", "residual"))
    options = {"residual": residual if case.residual else None, "activation": "relu" if case.relu else None}
    found = data.reference(
        x,
        t.weight,
        t.bias,
        None if training else (t.mean, t.var),
        dy if training else None,
        options["residual"],
        case.relu,
    )
    if not training:
        y = twin.normalize(x, t.mean, t.var, t.weight, t.bias, **options)
        assert np.allclose(found["y"].value, y, rtol=1e-14, atol=1e-14)
        return
    y, saved = twin.batch_norm_forward(x, t.weight, t.bias, **options)
    gradients = twin.batch_norm_backward(dy, None, saved, t.weight, t.bias)
    for key, expected in zip(("y", "dx", "dw", "db", "dr"), (y, *gradients), strict=False):
        assert np.allclose(found[key].value, expected, rtol=1e-14, atol=1e-13), key


@pytest.mark.parametrize("name", cases.ITEMSIZE)
def test_error_counts_ulps(name):
    if name == "bfloat16":
        pytest.importorskip("ml_dtypes")
    dtype = data.dtype_of(name)
    value = np.array([0.25, 1.0, -100.0])
    expected = data.Expected(value, np.maximum(1, np.abs(value)))
    assert data.epsilon(dtype) == tolerance.epsilon(dtype)
    assert data.error(value.astype(dtype), expected) == 0
    wide = np.longdouble if name == "float64" else np.float64
    between = data.Expected(wide(1) + np.full(1, data.epsilon(dtype) / 4, wide), np.ones(1))
    assert data.error(np.ones(1, dtype), between) == (0.25 if dtype.itemsize >= 4 else 0)
    assert data.error((value * (1 + 2 * data.epsilon(dtype))).astype(dtype), expected) == 2
    assert data.error(np.array([0.25, np.nan, -100.0]).astype(dtype), expected) == np.inf


def test_full_has_all_there_is():
    full = cases.union(cases.FULL, 2)
    assert {c.op for c in full} == set(cases.OPS)
    assert {c.dtype for c in full} == set(cases.ITEMSIZE)
    assert {c.fuse for c in full} == set(cases.FUSIONS)
    assert {c.threads for c in full} == {1, 2}
    assert {c.shape for c in full} == {s for name, shapes in cases.SHAPES.items() if name != "sweep" for s in shapes}
    assert max(c.nbytes for c in full) > 1 << 31
    assert len(set(full)) == len(full)
    assert set(cases.union(cases.SHORT, 2)) <= set(full)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shapes", "32x0x4"], "32x0x4"),
        (["--shapes", "resnet"], "expected one of resnet50"),
        (["--shapes", "9" * 5000 + "x2"], "expected one of resnet50"),
        (["--shapes", "9999999999x9999999999"], "expected one of resnet50"),
        (["--shapes", "1x" * 64 + "8"], "expected one of resnet50"),
        (["--shapes", "1_0x2"], "expected one of resnet50"),
        (["--shapes", "1x8", "--ops", "forward"], "nothing to measure: of one value per channel there is no training"),
        *((["--threads", n], "expected a number of threads from 1 to 1024, or all") for n in ("0", "1025", "9" * 5000)),
        *((["--seconds", n], "seconds, finite and not negative") for n in ("nan", "-1", "inf", "1e999", "x")),
        (["--json", str(ROOT / "nowhere" / "found.json")], "found.json cannot be written: there is no folder"),
        (["--picture", str(ROOT / "nowhere" / "found.png")], "found.png cannot be written: there is no folder"),
        (["--picture", "found.xyz"], "found.xyz cannot be drawn: a picture's name ends with .png, .svg or .pdf"),
        (["--markdown", str(ROOT / "nowhere")], "nowhere cannot be read"),
        (["--shapes", "tiny", "--markdown", str(ROOT / "README.md")], "no chosen shape is large enough"),
        (["--peers", "caffe"], "invalid choice: 'caffe'"),
        (["--markdown", str(ROOT / "LICENSE")], "LICENSE has no table of python -m fastbn bench"),
    ],
)
def test_wrong_options_are_told(options, message, capsys):
    """Before anything is measured. What argparse refuses is a usage error."""
    with pytest.raises(SystemExit) as stopped:
        main(["bench", *options])
    captured = capsys.readouterr()
    assert message in f"{stopped.value.code} {captured.err}"
    assert (stopped.value.code == 2) == ("usage: " in captured.err)
    assert not captured.out


def test_a_peer_that_is_missing(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(SystemExit, match="torch is not installed"):
        main([*QUICK, "--peers", "torch"])
    assert main([*QUICK, "--ops", "inference", "--peers", "all"]) == 0
    assert "without torch: " in capsys.readouterr().err


@pytest.mark.parametrize("installed", [True, False])
def test_progress(installed, monkeypatch, capsys):
    if installed:
        pytest.importorskip("tqdm")
    else:
        monkeypatch.setitem(sys.modules, "tqdm", None)
    assert list(report.progress(["one", "two"])) == ["one", "two"]
    assert capsys.readouterr().err == ""  # a log wants no control characters
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert list(report.progress(["one", "two"])) == ["one", "two"]
    assert "two" in capsys.readouterr().err
    monkeypatch.setattr(sys, "stderr", None)
    assert list(report.progress(["one", "two"])) == ["one", "two"]


def test_picture(tmp_path):
    pytest.importorskip("matplotlib")
    found = tmp_path / "found.png"
    shapes = ["--shapes", "3x16x56x56", "4096x16"]
    assert main(["bench", *shapes, "--seconds", "0", "--peers", "numpy", "--picture", str(found)]) == 0
    assert found.read_bytes().startswith(b"\x89PNG")


def test_readme_has_a_place_for_the_table():
    assert report.MARKED.search((ROOT / "README.md").read_text())


def test_config(capsys):
    assert main(["config"]) == 0
    assert f"chosen: {fastbn.show_config('dicts')['isa']['chosen']}" in capsys.readouterr().out


@pytest.mark.skipif(sys.platform == "win32", reason="a closed pipe is another error there")
def test_a_reader_who_is_gone():
    """Red where it ends the command with a traceback."""
    command = [sys.executable, "-m", "fastbn", "config"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as gone:
        gone.stdout.close()
        assert gone.stderr.read() == ""
    assert gone.returncode == 141


def test_a_reader_who_is_gone_from_windows(monkeypatch):
    """Red where only a broken pipe is one; or where a file that cannot be, or what another system says, is one too."""
    gone, file = OSError(errno.EINVAL, "Invalid argument"), OSError(errno.EINVAL, "Invalid argument", "file?")
    for system, told in (("linux", [True, False, False]), ("win32", [True, True, False])):
        monkeypatch.setattr(sys, "platform", system)
        assert [unread(error) for error in (BrokenPipeError(), gone, file)] == told


def test_what_was_measured_is_written_before_it_is_printed(monkeypatch, tmp_path):
    """Red where whoever stops reading costs all that was measured."""

    class Gone(io.StringIO):
        def write(self, text):
            if text.startswith("\n") and len(text) > 1:  # the tables
                raise BrokenPipeError
            return len(text)

    monkeypatch.setattr(sys, "stdout", Gone())
    command = ["bench", "--shapes", "60x100", "--ops", "inference", "--seconds", "0"]
    with pytest.raises(BrokenPipeError):
        main([*command, "--json", str(tmp_path / "found.json")])
    assert json.loads((tmp_path / "found.json").read_text())["groups"]


@pytest.mark.slow
def test_suite(tmp_path):
    """benchmarks/ measures what the command does, and records multiples and correctness."""
    found = tmp_path / "found.json"
    options = ["--bench", "--shapes 60x100 --ops forward inference --seconds 0 --peers numpy"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "benchmarks", *options]
    command += [f"--benchmark-json={found}", "--benchmark-max-time=0.01"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    groups = {}
    for benchmark in json.loads(found.read_text())["benchmarks"]:
        groups.setdefault(benchmark["group"], []).append(benchmark["extra_info"])
    assert len(groups) == 2
    for members in groups.values():
        assert [m["contender"] for m in members] == ["copy", "fastbn NC", "NumPy NC"]
        assert [m["correct"] for m in members] == [None, True, True]
        assert members[0]["multiple"] == 1


@pytest.fixture(scope="module")
def model():
    """benchmarks/model.py, which is no package's."""
    spec = importlib.util.spec_from_file_location("model", ROOT / "benchmarks/model.py")
    found = importlib.util.module_from_spec(spec)
    sys.modules["model"] = found
    spec.loader.exec_module(found)
    return found


def _machine(model, *, arithmetic=0.0, memory=0.0, write=0.0, call=0.0, channel=0.0, worker=0.0, threads=2):
    """A machine with 1 MB of L2 for each core, and memory beyond 16 MB."""
    return model.Machine(
        l2=1 << 20,
        l3=32 << 20,
        follows=False,
        known=tuple(sorted({1, threads})),
        kernels={(k, f): [arithmetic] * len(runs) for k in model.READS for f, runs in model.RUNS.items()},
        calls=dict.fromkeys(model.STEPS, (call, channel)),
        worker=worker,
        reads={t: [memory * (f > 1 << 24) for f in model.FOOTPRINTS] for t in (1, threads)},
        writes=dict.fromkeys((1, threads), write),
    )


def test_model_adds_up(model):
    """What a call must do, for whom all but one of the machine's constants are zero."""
    shape, large = (2, 8, 10, 10), (64, 256, 56, 56)
    nbytes = 4 * 64 * 256 * 56 * 56
    for op in model.STEPS:
        assert model.predict(_machine(model, call=3.0, channel=0.5), op, "NCHW", shape, 1) == 3 + 8 * 0.5
        steps = 1 if op == "inference" else 2
        expected = steps * 1600 * 2.0
        assert model.predict(_machine(model, arithmetic=2.0), op, "NCHW", shape, 1) == pytest.approx(expected)
        assert model.predict(_machine(model, worker=1.0), op, "NCHW", shape, 2) == 0  # so small a call is serial
        assert model.predict(_machine(model, worker=1.0), op, "NHWC", large, 2) == steps  # its regions
        tensors = 2 if op == "backward" else 1
        once = model.predict(_machine(model, memory=1.0), op, "NCHW", large, 2)
        assert once == pytest.approx(tensors * nbytes)
        twice = model.predict(_machine(model, memory=1.0), op, "NHWC", large, 2)
        assert once * steps * 0.9 < twice <= once * steps  # a second sweep, but for what the cache has kept
        assert model.predict(_machine(model, write=1.0), op, "NHWC", large, 2) == pytest.approx(nbytes)
    both = _machine(model, memory=3.0, write=4.0)
    assert model.predict_copy(both, large, 2) == pytest.approx(5 * nbytes)


def test_model_of_a_bigger_machine(model):
    """Cores divide what is theirs, and nobody exceeds the bandwidth."""
    large = (64, 256, 56, 56)
    nbytes = 4 * 64 * 256 * 56 * 56
    for bandwidth, seconds in ((1.0, 2 * nbytes / 2e9), (1e9, nbytes * 1e-9 / 16)):
        guess = model.bigger(_machine(model, memory=1e-9), 2, bandwidth, 32)
        assert model.predict(guess, "inference", "NCHW", large, 16) == pytest.approx(seconds)
        assert model.predict_copy(guess, large, 16) == pytest.approx(seconds)
    cached = model.bigger(_machine(model, memory=1e-9), 2, 1.0, 1024)  # what is streamed goes to memory nevertheless
    assert model.predict_copy(cached, large, 16) == pytest.approx(nbytes / 2e9)


def test_model_runs(model, monkeypatch, capsys):
    monkeypatch.setattr(model, "FOOTPRINTS", [2**18, 2**20, 2**23])
    monkeypatch.setattr(sys, "argv", ["model.py", "--shapes", "3x16x56x56", "--seconds", "0", "--cores", "128"])
    with fastbn.num_threads(2):
        model.main()
        assert fastbn.get_num_threads() == 2
    out = capsys.readouterr().out
    assert re.search(r"^all .* of 12$", out, re.MULTILINE)
    assert "predicted, not measured: 128 cores" in out
