"""test_floors -- the house: higher floors call lower ones only, and every floor keeps to what it may know.

Seeded bug that turns it red: a kernel that allocates, or a layer imported by the functions.
"""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
C = ROOT / "src_c"
PACKAGE = ROOT / "fastbn"

pytestmark = pytest.mark.skipif(not C.is_dir(), reason="the sources are not here")

SOURCES = sorted(p for pattern in ("*.h", "*.c", "*.inc") for p in C.rglob(pattern))
NAMES = [str(p.relative_to(C)) for p in SOURCES]
# The public types that every floor speaks in.
VOCABULARY = "fastbn.h"


def floor(path):
    """The floor of a C file; what is not a floor below is a driver."""
    name = str(Path(path).relative_to(C)) if Path(path).is_absolute() else str(path)
    if name.startswith("simd/"):
        return 0
    if name.startswith(("kernels/", "isa/")):
        return 1
    return {"dispatch": 2, "plan": 3}.get(Path(name).stem, 4)


def code(path):
    """The text without comments; strings stay."""
    text = path.read_text()
    text = re.sub(r"/\*.*?\*/", " ", text, flags=re.DOTALL)
    return re.sub(r"//[^\n]*", " ", text)


def resolve(including, name):
    for folder in (including.parent, C):
        if (folder / name).is_file():
            return (folder / name).resolve()
    return None


def test_there_are_files_on_every_floor():
    assert {floor(p) for p in SOURCES} == set(range(5))


@pytest.mark.parametrize("name", NAMES)
def test_includes_go_down(name):
    path = C / name
    for included in re.findall(r'#\s*include\s*"([^"]+)"', code(path)):
        target = resolve(path, included)
        assert target is not None, f"{name} includes {included}, which is not there"
        if target.name != VOCABULARY:
            assert floor(target) <= floor(path), f"{name} includes {included} from a higher floor"


def definitions():
    """Functions with external linkage, and the floor of the file that defines them."""
    found = {}
    for path in SOURCES:
        if path.suffix == ".c":
            text = re.sub(r"\bstatic\b[^;{]*\{", "{", code(path))
            for function in re.findall(r"^[a-z][\w \t*]*?\b(fbn_\w+)\([^;{}]*\)\s*\{", text, flags=re.MULTILINE):
                found[function] = floor(path)
    return found


def test_calls_go_down():
    """By name, so that a declaration copied into a file does not help."""
    functions = definitions()
    assert len(functions) > 15
    for path in SOURCES:
        if path.name == VOCABULARY:
            continue
        for function in set(re.findall(r"\b(fbn_\w+)\s*\(", code(path))) & functions.keys():
            assert functions[function] <= floor(path), f"{path.name} mentions {function} of a higher floor"


INTRINSICS = re.compile(
    r"\b_mm\d*_\w+|\b__m(?:128|256|512)[di]?\b|immintrin\.h|arm_neon\.h|\b(?:float|u?int)\d+x\d+(?:x\d)?_t\b"
    r"|\bv\w+q_[fsu]\d+\b|__builtin_ia32_(?!pause)"
)
OPENMP = re.compile(r"\bomp_\w+|omp\.h|#\s*pragma\s+omp|_Pragma\s*\(\s*\"omp|\b_OPENMP\b|\bGOMP_")
MEMORY = re.compile(r"\b(?:malloc|calloc|realloc|free|alloca|aligned_alloc|posix_memalign)\s*\(")
SYSTEM = re.compile(
    r"<(?:stdio|stdlib|pthread|signal|time|unistd|stdatomic|threads)\.h>|\bthread_local\b|_Thread_local"
)
PYTHON = re.compile(r"\bPy\w+_\w+|Python\.h|numpy/|\bNPY_")
TARGET = re.compile(r"__(?:AVX|SSE|FMA|ARM|aarch64|x86_64|F16C)")


def offenders(pattern, allowed):
    return {
        f"{name}: {match.group()}" for name in NAMES if not allowed(name) for match in pattern.finditer(code(C / name))
    }


def test_intrinsics_live_in_simd_alone():
    assert not offenders(INTRINSICS, lambda name: name.startswith("simd/"))
    assert any(INTRINSICS.search(code(C / name)) for name in NAMES if name.startswith("simd/"))


def test_openmp_lives_in_one_file():
    assert not offenders(OPENMP, lambda name: name == "parallel.c")
    assert OPENMP.search(code(C / "parallel.c"))


@pytest.mark.parametrize("what", [MEMORY, SYSTEM, OPENMP, PYTHON], ids=["memory", "system", "openmp", "python"])
def test_kernels_know_numbers_alone(what):
    assert not offenders(what, lambda name: floor(C / name) > 1)


def test_kernels_do_not_know_the_isa():
    """One source for every ISA: a kernel that asks which one it is compiled for is two kernels."""
    assert not offenders(TARGET, lambda name: not name.startswith("kernels/"))


def test_the_core_does_not_know_python():
    assert not offenders(PYTHON, lambda name: False)


def test_threads_are_asked_for_by_drivers_alone():
    assert not offenders(re.compile(r"parallel\.h|\bfbn_parallel\b"), lambda name: floor(C / name) >= 4)


def test_the_plan_runs_nothing():
    """Policy is testable without a kernel: the plan sees no table and no data."""
    for name in ("plan.c", "plan.h"):
        assert not re.search(r"kernels\.h|\bfbn_kernels\b|\bfbn_tensor\b|\bsqrt", code(C / name)), name


def test_isa_units_are_a_define_and_two_includes():
    """Else a tier would grow a mathematics of its own."""
    for path in sorted((C / "isa").glob("*.c")):
        lines = [line for line in code(path).splitlines() if line.strip()]
        assert len(lines) == 3, path.name
        assert lines[0] == f"#define FBN_ISA {path.stem}"
        assert {f'#include "simd/{path.stem}.h"', '#include "kernels/kernels.inc"'} == set(lines[1:])


def test_simd_headers_offer_the_same_operations():
    """The names in one are the names in all, or a kernel compiles on one ISA only."""
    headers = {
        p.stem: code(p) for p in sorted((C / "simd").glob("*.h")) if p.stem in {q.stem for q in (C / "isa").glob("*.c")}
    }
    for isa, text in headers.items():  # one may be another and more
        headers[isa] = text + "".join(code(C / "simd" / name) for name in re.findall(r'#include "(\w+\.h)"', text))
    used = set()
    for path in sorted((C / "kernels").glob("*.inc")):
        text = code(path)
        used |= set(re.findall(r"\bv_[a-z]\w*(?=\()", text))
        used |= {f"v_{name}_{type}" for name in re.findall(r"\bM\((\w+)\)", text) for type in ("f32", "f64")}
    used = {name for name in used if not name.endswith("_")} - {"v_op_f32", "v_op_f64"}  # of the definition of M(op)
    assert {"v_load_f32", "v_fma_f64", "v_sum_f64", "v_prefetch"} <= used
    for isa, text in headers.items():
        if isa == "scalar":
            continue  # made by macros; the compiler is its test
        offered = set(re.findall(r"\bv_\w+(?=\()", text))
        assert used <= offered, (isa, used - offered)


def test_only_the_binding_is_cython():
    found = [
        p
        for suffix in ("*.pyx", "*.pxd", "*.pxi")
        for p in ROOT.rglob(suffix)
        if not set(p.relative_to(ROOT).parts) & {"build", ".venv", "venv"}
    ]
    assert [p.relative_to(ROOT).as_posix() for p in found] == ["fastbn/_native.pyx"]


# Python. What is not named is on the top floor: it may use all others, and none of them may use it.
PYTHON_FLOORS = {"_version": 0, "_native": 5, "_state": 6, "_moments": 6, "_functional": 6, "_threads": 6, "_memory": 6}
TOP = {"__init__": 9, "__main__": 9, "_selftest": 9}  # the public names, and what uses them


def python_floor(module):
    return PYTHON_FLOORS.get(module, TOP.get(module, 7))


def imports(path):
    """Modules of the package that this one imports when it runs, which imports for type checkers alone do not."""
    tree = ast.parse(path.read_text())
    skipped = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (a.name.partition(".")[2] or "__init__" for a in node.names if a.name.split(".")[0] == "fastbn")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            if node.module == "fastbn":
                yield from (
                    a.name if (PACKAGE / f"{a.name}.py").exists() or a.name == "_native" else "__init__"
                    for a in node.names
                )
            elif node.module and node.module.startswith("fastbn."):
                yield node.module.split(".")[1]


MODULES = sorted(p.stem for p in PACKAGE.glob("*.py"))


@pytest.mark.parametrize("module", MODULES)
def test_python_imports_go_down(module):
    for imported in imports(PACKAGE / f"{module}.py"):
        assert python_floor(imported) <= python_floor(module), f"{module} imports {imported} from a higher floor"


def test_python_imports_have_no_circle():
    graph = {m: set(imports(PACKAGE / f"{m}.py")) - {m} for m in MODULES}

    def visit(module, path):
        assert module not in path, " -> ".join([*path, module])
        for imported in graph.get(module, ()):
            visit(imported, [*path, module])

    for module in MODULES:
        visit(module, [])


def test_the_layers_hold_no_pointers_and_no_threads():
    """Floor 7 knows state and modes; ISA and tiles are none of its business."""
    for module in ("_layer", "_frozen", "_functional", "_calibrate", "_watch"):
        text = (PACKAGE / f"{module}.py").read_text()
        assert not re.search(r"\bctypes\b|\buse_isa\b|\bisas\b|_native\.plan|\bset_num_threads\b", text), module
