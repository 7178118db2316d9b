"""test_registry -- every tier that was built is in the table, whole, and answers when it is called by name.

Seeded bug that turns it red: an ISA unit that no line of the dispatch names.
"""

import os
import platform
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import arrays
import pytest
import twin
from arrays import normal, parameters
from tolerance import assert_close, assert_gradients

import fastbn
from fastbn import _native

C = Path(__file__).resolve().parent.parent / "src_c"
KERNELS = ("scalar", "avx2", "avx512", "avx512_bf16", "neon")


def test_tiers():
    built, runnable = _native.built_isas(), _native.isas()
    assert set(runnable) <= set(built) <= set(KERNELS)
    assert runnable[-1] == "scalar"
    assert built[-1] == "scalar"
    assert len(set(built)) == len(built)
    assert [isa for isa in built if isa in runnable] == list(runnable)


@pytest.mark.skipif(not C.is_dir(), reason="the sources are not here")
def test_every_unit_is_known_to_the_dispatch():
    units = {p.stem for p in (C / "isa").glob("*.c")}
    assert units == set(KERNELS)
    dispatch = (C / "dispatch.c").read_text()
    for unit in units:
        assert re.search(rf"&fbn_isa_{unit}\b", dispatch), unit


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="x86 tiers")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="gcc and clang on Linux know all tiers")
def test_what_the_compiler_can_is_built():
    compiler = [*(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc").split(), "-E", "-x", "c", os.devnull]
    knows = subprocess.run([*compiler, "-mavx512bf16"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    bf16 = ("avx512_bf16",) if knows.returncode == 0 else ()  # gcc since 10, clang since 9
    assert _native.built_isas() == (*bf16, "avx512", "avx2", "scalar")


def flags():
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((set(line.split()) for line in lines if line.startswith("flags")), None)


@pytest.mark.skipif(flags() is None, reason="needs /proc/cpuinfo of an x86")
def test_what_the_machine_can_is_runnable():
    """The kernel's list of flags already counts what the operating system saves."""
    needs = {
        "avx2": {"avx2", "fma", "f16c"},
        "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl"},
        "avx512_bf16": {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16"},
        "scalar": set(),
    }
    assert set(_native.isas()) == {isa for isa in _native.built_isas() if needs[isa] <= flags()}


@pytest.mark.parametrize("name", KERNELS)
def test_choosing_a_tier(name):
    before = _native.isa()
    if name in _native.isas():
        _native.use_isa(name)
        assert _native.isa() == name
        _native.use_isa(before)
    else:
        with pytest.raises(ValueError, match=name):
            _native.use_isa(name)
    assert _native.isa() == before


@pytest.mark.parametrize("added", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("activation", arrays.ACTIVATIONS, ids=str)
def test_every_kernel_of_every_tier_answers(isa, dtype, layout, activation, added, rng):
    """A missing entry of the table would be a call of address 0."""
    shape, axis = layout(3, 18, 35)
    x, grad_output, residual = (normal(rng, shape, dtype) for _ in range(3))
    weight, bias = parameters(rng, 18, dtype)
    options = {"channel_axis": axis, "activation": activation, "residual": residual if added else None}
    y, saved = fastbn.batch_norm_forward(x, weight, bias, **options)
    expected, reference = twin.batch_norm_forward(x, weight, bias, **options)
    assert_close(y, expected, twin.value_scale(reference, weight, bias, options["residual"]))
    grad_output = twin.off_kinks(grad_output, reference)
    assert_gradients(fastbn.batch_norm_backward(grad_output, x, saved, weight, bias), grad_output, reference, weight)


@pytest.mark.skipif(not C.is_dir(), reason="the sources are not here")
def test_every_operation_of_the_registry_has_a_body():
    header = (C / "kernels" / "kernels.h").read_text()
    operations = re.findall(r"\bOP\((\w+),", header)
    assert len(operations) == len(set(operations)) > 6
    bodies = "".join(p.read_text() for p in sorted((C / "kernels").glob("*.inc")))
    for operation in operations:
        assert re.search(rf"static \w+ FN\({operation}\)\(", bodies), operation
    drivers = "".join(p.read_text() for p in sorted(C.glob("*.c")))
    for operation in operations:
        assert re.search(rf"(?:->|\.){operation}\b", drivers), f"nobody calls {operation}"


def in_a_new_process(isa):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop("FASTBN_ISA", None)
    if isa is not None:
        environment["FASTBN_ISA"] = isa
    program = "from fastbn import _native; print(_native.isa())"
    return subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("name", [None, *_native.isas()], ids=str)
def test_the_environment_caps_the_tier(name):
    run = in_a_new_process(name)
    assert run.stdout.split() == [name or _native.isas()[0]], run.stderr


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="x86 tiers")
def test_a_cap_may_be_above_what_the_machine_has():
    run = in_a_new_process("avx512_bf16")
    assert run.stdout.split() == [_native.isas()[0]], run.stderr
    assert "FASTBN_ISA must be one that this machine could have" in in_a_new_process("neon").stderr


@pytest.mark.parametrize("name", ["sse", "AVX2", "avx2,scalar"])
def test_an_unknown_tier_in_the_environment_is_an_error(name):
    run = in_a_new_process(name)
    assert run.returncode == 1
    assert f"FASTBN_ISA must be one of {_native.known_isas()}, got {name!r}" in run.stderr
    for known in KERNELS:
        assert known in run.stderr
