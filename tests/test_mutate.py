"""test_mutate.py -- the bugs that mutate.py plants are bugs in the code as it is, one at least for every row."""

import ast
import re
from pathlib import Path

import mutate
import pytest

pytestmark = pytest.mark.skipif(not (mutate.ROOT / "src_c").is_dir(), reason="the sources are not here")


def test_every_row_has_a_bug():
    assert {bug.row for bug in mutate.BUGS} == set(range(1, 19))
    assert len({bug.name for bug in mutate.BUGS}) == len(mutate.BUGS)


@pytest.mark.parametrize("bug", mutate.BUGS, ids=lambda bug: bug.name)
def test_the_bug_can_be_planted(bug):
    """Red when the code has moved on, or a test has another name."""
    assert mutate.planted(bug, mutate.ROOT) != (mutate.ROOT / bug.file).read_text()
    tool, *words = bug.test.split()
    if tool == "make":
        assert re.search(rf"^{words[0]}:", (mutate.ROOT / "tests/c/Makefile").read_text(), re.MULTILINE)
        return
    file, *names = tool.split("::")
    text = Path(mutate.ROOT, "tests", file).read_text()
    node = ast.parse(text)
    for name in names:
        node = next(inner for inner in node.body if getattr(inner, "name", None) == name)
    assert re.search(r"\b[Rr]ed\b|Seeded bug", ast.get_docstring(node)), "its docstring names no bug"


RESULTS = {
    "survived": ("assert True", "SURVIVED"),
    "caught": ("assert 1 == 2", "caught"),
    "no error": ("with pytest.raises(ValueError): pass", "caught"),
    "crash": ("os.abort()", "caught, for it crashes"),
    "import": ("import nothing_of_this_name", "its test is red for another reason: ModuleNotFoundError"),
    "child": ("raise AssertionError('exit status 1: NameError: name x')", "its test is red for another reason"),
    "fixture": ("nothing", "pytest fails, and not by the test"),
    "collection": (")", "pytest fails, and not by the test"),
    "gone": (None, "pytest fails, and not by the test"),
}


@pytest.mark.parametrize("case", RESULTS)
def test_a_bug_is_caught_by_what_its_test_finds(case, tmp_path):
    """Red when any failure counts as a bug that was caught."""
    body, said = RESULTS[case]
    (tmp_path / "tests").mkdir()
    lines = [
        "import os, pytest",
        "@pytest.mark.parametrize('n', ['in words - of its own'])",
        f"def test_it(n{', nothing' if case == 'fixture' else ''}):",
        f"    {body}",
    ]
    (tmp_path / "tests/test_it.py").write_text("\n".join(lines if body else lines[:1]))
    bug = mutate.Bug(0, case, "", "", "", "test_it.py::test_it")
    assert mutate.found(bug, mutate.test(bug, tmp_path)).startswith(said)


@pytest.mark.parametrize(("last", "said"), [("", "caught, for it hangs"), (" PASSED [ 50%]", "something hangs")])
def test_what_hangs_is_the_test_or_something_else(last, said):
    bug = mutate.Bug(0, "", "", "", "", "test_it.py::test_it")
    output = f"collected 2 items\n\ntests/test_it.py::test_it[in words]{last}\n"
    assert mutate.found(bug, mutate.Outcome(mutate.HANGS, output)).startswith(said)


def test_make_fails_by_its_test_or_otherwise():
    bug = mutate.Bug(0, "", "", "", "", "make tsan", "^WARNING: ThreadSanitizer: data race")
    assert mutate.found(bug, mutate.Outcome(2, "x\nWARNING: ThreadSanitizer: data race (1)\n")) == "caught"
    assert mutate.found(bug, mutate.Outcome(2, "make: *** no rule")) == "make fails, and not by the test"
