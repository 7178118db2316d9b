"""test_mutate.py -- the bugs that mutate.py plants are bugs in the code as it is, one at least for every row."""

import re
from pathlib import Path

import mutate
import pytest

pytestmark = pytest.mark.skipif(not (mutate.ROOT / "src_c").is_dir(), reason="the sources are not here")


def test_every_row_has_a_bug():
    assert {bug.row for bug in mutate.BUGS} == set(range(1, 18))
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
    for name in names:
        assert re.search(rf"^\s*(def|class) {name}\b", text, re.MULTILINE)
