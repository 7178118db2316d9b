"""mutate.py -- plants bugs, one at a time, in a copy of the checkout, and looks whether their tests turn red.

    python tests/mutate.py --list           the bugs, by row of docs/reliability.md
    python tests/mutate.py                  all of them: about an hour
    python tests/mutate.py 5 signals        those of a row, or of a name
    python tests/mutate.py --some 3         three that are drawn; --seed repeats a draw

Each bug is a few words replaced in one file. What it touches is built again, and the one test that must catch it is
run, before the bug and after: it has to be green, and then red for the reason that a test is red for. A test that
cannot be collected or set up, or stumbles over a name, an import or the syntax, has caught nothing. The exit status is
1 if a bug survives, if its words are no longer in the file, or if its test cannot run here. Needs what the tests need,
and make and clang for `make` tests.
"""

import argparse
import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PATIENCE, HANGS = 900, 124


class Bug(NamedTuple):
    """`old` becomes `new` in `file`; `test` is what pytest is told, or a command line of make in tests/c.

    `sign` is how the test says what it found: the beginning of pytest's reason, or words in the output of make.
    """

    row: int
    name: str
    file: str
    old: str
    new: str
    test: str
    sign: str = r"AssertionError|assert |Failed: "


TOKEN = "return !atomic_flag_test_and_set(&fbn_pool.taken);"
BUGS = [
    Bug(
        1,
        "fork, workers",
        "src_c/parallel.c",
        "    fbn_pool.workers = 0;\n",
        "",
        "test_fork.py::test_fork_after_a_parallel_call",
    ),
    Bug(
        9,
        "planes that are not there",
        "src_c/pass.c",
        "int64_t abreast = fbn_min(b->planes, g->outer - plane);",
        "int64_t abreast = b->planes;",
        "test_forward.py::test_sizes",
    ),
    Bug(
        9,
        "a run that lags behind",
        "src_c/kernels/sums.inc",
        "const int64_t lag = single ? 16 : 0;",
        "const int64_t lag = 0;",
        "test_forward.py::test_sizes",
    ),
    Bug(
        11,
        "huge, gate",
        "src_c/kernels/sums.inc",
        "int64_t c = from == to ? to : from / 16 * 16;",
        "int64_t c = from;",
        "test_exactness.py::test_a_huge_channel_behind_a_gate",
    ),
    Bug(
        1,
        "fork, token",
        "src_c/parallel.c",
        "    fbn_forget_workers();\n    fbn_release_team();\n",
        "    fbn_forget_workers();\n",
        "test_fork.py::test_fork_while_another_thread_is_inside_a_call",
    ),
    Bug(
        1,
        "fork, store",
        "src_c/recycle.c",
        "    fbn_store_leave();\n}\n\nvoid fbn_recycle_init(void) {",
        "    fbn_after_fork_in_parent();\n}\n\nvoid fbn_recycle_init(void) {",
        "make forks",
        "^FAILED the child of the inner fork",
    ),
    Bug(
        2,
        "preload",
        "src_c/parallel.c",
        "    fbn_pool.workers = 0;\n",
        "",
        "test_server.py -k gunicorn",
    ),
    Bug(
        3,
        "no token",
        "src_c/parallel.c",
        TOKEN,
        "(void)atomic_flag_test_and_set(&fbn_pool.taken);\n    return true;",
        "test_threads.py::test_forty_callers",
    ),
    Bug(
        3,
        "idle workers, row 3",
        "src_c/parallel.c",
        "        if (fbn_take_share(tid)) {\n            fbn_helped",
        "        while (fbn_waiting(tid)) sched_yield();\n        if (false) {\n            fbn_helped",
        "test_threads.py::test_forty_callers",
    ),
    Bug(
        4,
        "workers for one job",
        "src_c/parallel.c",
        "            fbn_do_share(tid);\n        }\n    }\n",
        "            fbn_do_share(tid);\n            return NULL;\n        }\n    }\n",
        "test_threads.py::test_no_thread_is_created_after_the_first",
    ),
    Bug(
        4,
        "idle workers, row 4",
        "src_c/parallel.c",
        "        if (fbn_take_share(tid)) {\n            fbn_helped",
        "        while (fbn_waiting(tid)) sched_yield();\n        if (false) {\n            fbn_helped",
        "test_threads.py::test_no_thread_is_created_after_the_first",
    ),
    Bug(
        4,
        "a smaller team",
        "src_c/plan.c",
        "return fbn_bytes(g) >= FBN_SERIAL_BYTES ? call->threads : 1;",
        "return (int)fbn_clamp(fbn_bytes(g) / FBN_SERIAL_BYTES, 1, call->threads);",
        "test_threads.py::test_a_team_is_whole_or_none",
    ),
    Bug(
        5,
        "quota rounded up",
        "fastbn/_threads.py",
        "int(max(1, min(len(cpus), cores, quota, most)))",
        "math.ceil(max(1, min(len(cpus), cores, quota, most)))",
        "test_threads.py::test_quota_affinity_cores",
    ),
    Bug(
        5,
        "only the own group",
        "fastbn/_threads.py",
        "for step in (below, *below.parents))",
        "for step in (below,))",
        "test_threads.py::test_quota_affinity_cores",
    ),
    Bug(
        6,
        "spinning",
        "src_c/parallel.c",
        "} while (fbn_nanoseconds() < deadline);",
        "} while (deadline > 0);",
        "test_idle.py",
    ),
    Bug(
        6,
        "idle workers, row 6",
        "src_c/parallel.c",
        "        if (fbn_take_share(tid)) {\n            fbn_helped",
        "        while (fbn_waiting(tid)) sched_yield();\n        if (false) {\n            fbn_helped",
        "test_idle.py",
    ),
    Bug(
        7,
        "blind to regions",
        "src_c/parallel.c",
        "    if (omp_in_parallel()) return 1;\n",
        "",
        "test_company.py::test_serial_inside_a_parallel_region",
    ),
    Bug(
        8,
        "parts of threads",
        "src_c/pass.c",
        "    w->partials.strips = fbn_strips(&w->pass);\n",
        "    w->partials.strips = fbn_min(w->pass.plan.team, fbn_strips(&w->pass));\n",
        "test_bits.py::test_large",
    ),
    Bug(
        8,
        "a seam the wrong way round",
        "src_c/kernels/apply.inc",
        "FN(seam)(first, k, next)",
        "FN(seam)(first, next, k)",
        "test_bits.py::test_channel_by_channel",
    ),
    Bug(
        8,
        "a seam with the gate of one row",
        "src_c/kernels/apply.inc",
        "FN(open_at)(p, end + next_shift, 16 - own, mode) << own",
        "FN(open_at)(p, end + shift, 16 - own, mode) << own",
        "make native THOROUGHNESS=1",
        "^FAILED backward_apply_rows .*, gate, .*: scalar differs",
    ),
    Bug(
        8,
        "a turn that goes on in the first row",
        "src_c/kernels/apply.inc",
        "(at.row - base + 1) * s.width;",
        "s.width;",
        "make native THOROUGHNESS=1",
        "^FAILED (moments|backward_reduce)_rows .*: scalar applies wrongly",
    ),
    Bug(
        8,
        "turns that end early",
        "src_c/pass.c",
        "        fbn_turn_to_end(pass, room);\n        fbn_combine",
        "        fbn_combine",
        "test_bits.py::test_past_the_cache",
    ),
    Bug(
        8,
        "a slab beside a sum that goes on in the same image",
        "src_c/kernels/apply.inc",
        "(last ? s->x_image - b->row * s->x_stride : s->x_stride)",
        "s->x_stride",
        "make native THOROUGHNESS=1",
        "^FAILED moments_rows .*: avx2 applies wrongly",
    ),
    Bug(
        8,
        "a run beside a sum that ends as the next one begins",
        "src_c/kernels/apply.inc",
        "FN(applied)(p, i, (int)own, b->k, 0,",
        "FN(applied)(p, i, (int)own, b->next, 0,",
        "make native THOROUGHNESS=1",
        "^FAILED moments_rows .*: avx2 applies wrongly",
    ),
    Bug(
        8,
        "the first image again",
        "src_c/kernels/apply.inc",
        "    p.y += image * s->y_image;\n",
        "",
        "make native THOROUGHNESS=1",
        "^FAILED moments_rows .*: avx2 applies wrongly",
    ),
    Bug(
        8,
        "an fma that rounds twice",
        "src_c/simd/scalar.h",
        "fmaf(a.l[i], b.l[i], c.l[i])",
        "a.l[i] * b.l[i] + c.l[i]",
        "test_bits.py::test_small",
    ),
    Bug(
        9,
        "a mean of one part",
        "src_c/kernels/coefs.inc",
        "fbn_affine_of(mean[i], lo[i], (double)(R)mean[i],",
        "fbn_affine_of((double)(R)mean[i], 0.0, (double)(R)mean[i],",
        "test_exactness.py::TestLargeMeans::test_forward",
    ),
    Bug(
        9,
        "a selftest that is always green",
        "fastbn/_selftest.py",
        "return int(bool(breaches))",
        "return 0",
        "test_selftest.py::test_an_error_is_red",
    ),
    Bug(
        10,
        "0 times infinity",
        "src_c/kernels/coefs.inc",
        "affine->eps, batch != 0, wide, &range);",
        "affine->eps, batch != 0 && affine->eps > 0.0, wide, &range);",
        "test_exactness.py::TestConstantChannels::test_forward",
    ),
    Bug(
        10,
        "one value",
        "fastbn/_native.pyx",
        "if cnp.PyArray_SIZE(x) > 0 and cnp.PyArray_SIZE(x) == channels:",
        "if False:",
        "test_semantics.py::test_one_value_per_channel",
    ),
    Bug(
        11,
        "flushing",
        "src_c/normalize.c",
        "    n.coefs = &prepared->coefs;\n",
        "    n.coefs = &prepared->coefs;\n    __builtin_ia32_ldmxcsr(__builtin_ia32_stmxcsr() | 0x8040);\n",
        "test_exactness.py::test_mxcsr_is_never_touched",
    ),
    Bug(
        11,
        "overflow",
        "src_c/kernels/coefs.inc",
        "{0x1p100, FLT_MIN,",
        "{0x1p128, FLT_MIN,",
        "test_exactness.py::test_huge_numbers",
    ),
    Bug(
        11,
        "a subnormal scale",
        "src_c/kernels/channel.h",
        " || (gain != 0.0 && fabs(gain) < range->smallest)",
        "",
        "test_exactness.py::test_a_subnormal_scale_reaches_no_kernel",
    ),
    Bug(
        12,
        "any length",
        "fastbn/_native.pyx",
        "if cnp.PyArray_NDIM(a) != 1 or cnp.PyArray_DIM(a, 0) != channels:",
        "if cnp.PyArray_NDIM(a) != 1:",
        "test_errors.py::test_one_wrong_argument -k long",
    ),
    Bug(
        12,
        "a bool for a number",
        "fastbn/_native.pyx",
        "isinstance(value, (bool, np.bool_, str, bytes))",
        "isinstance(value, (str, bytes))",
        "test_errors.py::test_one_wrong_argument",
    ),
    Bug(
        12,
        "an array of the layer to blame",
        "fastbn/_layer.py",
        "            self._check_channels(x)  # what is wrong then is x, and not what it was compared with\n",
        "",
        "test_errors.py::test_x_with_another_number_of_channels",
    ),
    Bug(
        13,
        "half turned round",
        "src_c/geometry.c",
        "dim.stride[a] = -dim.stride[a];",
        "dim.stride[a] = dim.stride[a] < 0 ? -dim.stride[a] : dim.stride[a];",
        "test_layouts.py::test_mixed_arrangements",
    ),
    Bug(
        13,
        "overlap",
        "fastbn/_native.pyx",
        "            if clashes(x, out) or (other is not None and clashes(other, out)):\n",
        "            if False:\n",
        "test_layouts.py::test_partial_overlap",
    ),
    Bug(
        14,
        "a tail read whole",
        "src_c/simd/avx2.h",
        "static inline v_f32 v_load_part_f32(const float *p, int n)\n{\n",
        "static inline v_f32 v_load_part_f32(const float *p, int n)\n{\n    if (n > 3) return v_load_f32(p);\n",
        "make native THOROUGHNESS=1",
        "^FAILED .*avx2 touches memory out of bounds",
    ),
    Bug(
        14,
        "a race for the job",
        "src_c/parallel.c",
        TOKEN,
        "(void)atomic_flag_test_and_set(&fbn_pool.taken);\n    return true;",
        "make tsan TSAN_RUNS=2000",
        "^WARNING: ThreadSanitizer: data race",
    ),
    Bug(
        15,
        "an unchecked stride",
        "src_c/geometry.c",
        "(g->family == FBN_ROWS || t->channel_stride == 1) &&",
        "",
        "make fuzz FUZZ_SECONDS=30",
        "ERROR: (AddressSanitizer|libFuzzer)",
    ),
    Bug(
        15,
        "a third too little",
        "src_c/pass.c",
        "malloc((size_t)count.used + FBN_LINE)",
        "malloc((size_t)count.used / 3 * 2 + FBN_LINE)",
        "make fuzz FUZZ_SECONDS=30",
        "ERROR: AddressSanitizer",
    ),
    Bug(
        16,
        "any dtype",
        "fastbn/_state.py",
        """        if dtype.kind not in "fiu":
            raise _BadFileError(f"{said} must""",
        """        if False:
            raise _BadFileError(f"{said} must""",
        "test_state.py::test_a_hostile_file_is_a_value_error",
    ),
    Bug(
        16,
        "a bomb",
        "fastbn/_state.py",
        "    if total > max_bytes:\n",
        "    if total > 1 << 40:\n",
        "test_state.py::test_a_hostile_file_is_a_value_error",
    ),
    Bug(
        16,
        "a file in a pipe's place",
        "fastbn/_state.py",
        "            _check_regular(os.stat(path).st_mode)\n",
        "            os.stat(path)\n",
        "test_state.py::test_a_pipe_or_a_device_is_no_file",
    ),
    Bug(
        16,
        "a pickle that is believed",
        "fastbn/_layer.py",
        "            arrays, _ = _state.check_state(state, new._template(), new._name(), finite=False)\n",
        "            arrays = state\n",
        "test_layer.py::test_a_pickled_state_goes_through_the_checker",
    ),
    Bug(
        17,
        "a guard of the mean alone",
        "fastbn/_native.pyx",
        "holds(mean, stats.mean[i]) and holds(var, unbiased[i])",
        "holds(mean, stats.mean[i])",
        "test_layer.py::test_a_batch_that_is_not_finite_may_be_kept_out",
    ),
    Bug(
        17,
        "malloc taken for granted",
        "src_c/pass.c",
        "    if (w->memory == NULL) {\n",
        "    if (false) {\n",
        "test_memory.py::test_every_allocation_may_fail",
    ),
    Bug(
        17,
        "memory before the counter",
        "fastbn/_native.pyx",
        "            layer._tracked = count\n",
        "            layer._tracked += 1\n",
        "test_memory.py::test_every_allocation_may_fail",
    ),
    Bug(
        17,
        "signals",
        "fastbn/_layer.py",
        '"propagate", self,\n                    )  # fmt: skip\n',
        '"propagate", None,\n                    )\n                    self._tracked += saved.moved\n',
        "test_layer.py::test_a_signal_leaves_the_statistics_old_or_new",
    ),
    Bug(
        17,
        "trust in x",
        "fastbn/_layer.py",
        'self._on_nonfinite != "propagate", self,\n',
        'self._on_nonfinite == "skip", self,\n',
        "test_memory.py::test_data_that_change_under_a_call",
    ),
    Bug(
        17,
        "a copy that shares",
        "fastbn/_layer.py",
        "    def __getstate__(self) -> dict[str, Any]:\n",
        """    def __copy__(self):
        new = object.__new__(type(self))
        new.__dict__.update(self.__dict__)
        return new

    def __getstate__(self) -> dict[str, Any]:
""",
        "test_machine.py",
    ),
    Bug(
        17,
        "a state of two moments",
        "fastbn/_layer.py",
        "        with self._lock:\n            return _state.StateDict(",
        "        if True:\n            return _state.StateDict(",
        "test_layer.py::test_what_others_take_while_a_thread_trains_belongs_together",
    ),
    Bug(
        17,
        "a counter without a lock",
        "fastbn/_layer.py",
        "with self._lock:\n                    momentum = self._momentum\n",
        "if True:\n                    momentum = self._momentum\n",
        "test_layer.py::test_training_from_many_threads_loses_no_batch",
    ),
    Bug(
        18,
        "a hold without a lock",
        "fastbn/_watch.py",
        "            with layer._lock:\n                if layer._watch is not None",
        "            if True:\n                if layer._watch is not None",
        "test_calibrate.py::test_to_look_and_to_hold_is_one_step",
    ),
    Bug(
        18,
        "nobody stands aside",
        "fastbn/_watch.py",
        "session.instead = {id(layer): functools.partial(aside, layer) for _, layer in every}",
        "session.instead = {}",
        "test_calibrate.py::test_layers_that_are_not_named_stand_aside",
    ),
]


def planted(bug: Bug, root: Path) -> str:
    """Return the file's text with the bug in it."""
    text = (root / bug.file).read_text()
    if text.count(bug.old) != 1:
        raise LookupError(f"what it replaces is {text.count(bug.old)} times in {bug.file}")
    return text.replace(bug.old, bug.new)


# What ends a test that has not looked at anything yet, here or in an interpreter of its own.
STUMBLED = re.compile(r"\b(ImportError|ModuleNotFoundError|SyntaxError|IndentationError|NameError|AttributeError)\b")


def found(bug: Bug, outcome: "Outcome") -> str:
    """Say `caught` where the output tells that the test of a bug is red because of what it is there to find."""
    words, *_ = bug.test.split()
    if outcome.status == 0:
        return "SURVIVED"
    if words == "make":
        return "caught" if re.search(bug.sign, outcome.output, re.MULTILINE) else "make fails, and not by the test"
    node = re.escape(f"tests/{words}")
    if outcome.status == HANGS:
        # Under -v the name of a test is there before its result.
        begun = re.match(rf"{node}(?!.*(PASSED|FAILED|SKIPPED))", outcome.output.rstrip().rpartition("\n")[2])
        return "caught, for it hangs" if begun else "something hangs, and not the test"
    if outcome.status < 0 and f"in {words.rpartition('::')[2]}" in outcome.output:
        return "caught, for it crashes"
    reasons = re.findall(rf"^FAILED {node}(?:::\w+)*(?:\[.*\])? - (.*)", outcome.output, re.MULTILINE)
    if not reasons or re.search(r"^ERROR ", outcome.output, re.MULTILINE):
        return "pytest fails, and not by the test"
    if not re.match(bug.sign, reasons[0]) or STUMBLED.search(outcome.output):
        return f"its test is red for another reason: {reasons[0]}"
    return "caught"


class Outcome(NamedTuple):
    status: int
    output: str


def run(command: list[str], folder: Path) -> Outcome:
    """Run a command with `folder` first on the path, and end all that it started when it takes too long."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("FASTBN_")}
    environment |= {"PYTHONPATH": str(folder), "COLUMNS": "300"}
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            status = HANGS
        finally:
            # A test that was broken on purpose may leave processes behind.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        log.seek(0)
        return Outcome(status, log.read())


def build(folder: Path) -> Outcome:
    return run([sys.executable, "setup.py", "build_ext", "--inplace"], folder)


def test(bug: Bug, folder: Path) -> Outcome:
    """Run the test of a bug."""
    tool, *words = bug.test.split()
    if tool == "make":
        return run(["make", "-s", "-C", "tests/c", "SEED=1", *words], folder)
    return run([sys.executable, "-m", "pytest", "-x", "-v", f"tests/{tool}", *words], folder)


def verdict(bug: Bug, pristine: Path, greens: dict[str, bool]) -> str:
    """Say `caught`, or what is wrong."""
    try:
        text = planted(bug, pristine)
    except LookupError as error:
        return str(error)
    if bug.test not in greens:
        before = test(bug, pristine)
        greens[bug.test] = before.status == 0 and (bug.test.startswith("make") or " passed" in before.output)
        if not greens[bug.test]:
            print(before.output)
    if not greens[bug.test]:
        return "its test is not green without it"
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "copy")
        shutil.copytree(pristine, copy, symlinks=True)
        (copy / bug.file).write_text(text)
        if bug.file.endswith((".c", ".h", ".inc", ".pyx")) and not bug.test.startswith("make"):
            built = build(copy)
            if built.status != 0:
                print(built.output)
                return "it does not compile"
        after = test(bug, copy)
    if re.search(r"^make.*\.o\] Error", after.output, re.MULTILINE):
        print(after.output)
        return "it does not compile"
    said = found(bug, after)
    if not said.startswith("caught"):
        print(after.output)
    return said


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", nargs="*", help="rows or names (default: all)")
    parser.add_argument("--list", action="store_true", help="name the bugs and do nothing")
    parser.add_argument("--some", type=int, metavar="N", help="N of them, drawn")
    parser.add_argument("--seed", default="", help="what a draw depends on, such as a commit")
    arguments = parser.parse_args()
    bugs = [bug for bug in BUGS if not arguments.which or {str(bug.row), bug.name} & {*arguments.which}]
    if arguments.some is not None:
        bugs = random.Random(arguments.seed or None).sample(bugs, min(arguments.some, len(bugs)))
    if arguments.list or not bugs:
        for bug in bugs or BUGS:
            print(f"{bug.row:2}  {bug.name:32} {bug.file:20} {bug.test}")
        return not bugs
    with tempfile.TemporaryDirectory() as folder:
        pristine = Path(folder, "pristine")
        names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True).stdout
        for name in filter(None, names.split("\0")):
            (pristine / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, pristine / name)
        if (ROOT / "build").is_dir():  # what is built already and still fits need not be built again
            for built_before in (ROOT / "build").glob("temp.*"):
                shutil.copytree(built_before, pristine / "build" / built_before.name)
        built = build(pristine)
        if built.status != 0:
            print(built.output)
            return 1
        greens: dict[str, bool] = {}
        missed = 0
        for bug in bugs:
            start = time.monotonic()
            said = verdict(bug, pristine, greens)
            missed += not said.startswith("caught")
            print(f"row {bug.row:2}  {bug.name:32} {said}  ({time.monotonic() - start:.0f} s)", flush=True)
    print(f"{len(bugs) - missed} caught, {missed} not")
    return missed > 0


if __name__ == "__main__":
    sys.exit(main())
