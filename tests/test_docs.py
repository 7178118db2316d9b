"""test_docs -- the pages tell the truth: what they name is there, what they show runs.

Seeded bugs that turn it red: a file renamed, a function renamed, an extra renamed, an example with a wrong argument.
"""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

import fastbn

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SUFFIXES = {".py", ".pyx", ".pyi", ".c", ".h", ".inc", ".md", ".toml", ".in", ".yaml", ".txt", ".png", ".svg"}
SOURCES = "fastbn/**/*.py* src_c/**/*.* tests/*.py tests/c/*.* tests/c/Makefile setup.py pyproject.toml .ci/run".split()
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def files():
    return [path for pattern in SOURCES for path in ROOT.glob(pattern) if path.suffix not in (".so", ".pyd", ".pyc")]


def blocks(page, language):
    return [body for found, body in FENCE.findall(page.read_text()) if found == language]


def spans(page):
    """What stands in backticks, fenced blocks apart."""
    return re.findall(r"`([^`\n]+)`", FENCE.sub("", page.read_text()))


def is_path(word):
    known = word.startswith(tuple(f"{path.name}/" for path in ROOT.iterdir() if path.is_dir() and path.name != ".venv"))
    return re.fullmatch(r"[\w./-]+", word) and (known or (Path(word).suffix in SUFFIXES and word[0] != "/"))


def is_there(word):
    """A path from the root or below the page's own folders; a bare name may be anywhere among the sources."""
    return (ROOT / word).exists() or ("/" not in word and any(path.name == word for path in files()))


def tree():
    """The paths that the tree of CONTRIBUTING.md lists."""
    (listing,) = (body for body in blocks(ROOT / "CONTRIBUTING.md", "") if "setup.py" in body)
    folder = ""
    for line in filter(str.strip, listing.splitlines()):
        indented, words = line.startswith(" "), line.split()
        if not indented:
            folder = words[0] if words[0].endswith("/") else ""
            yield words[0]
            continue
        for word in words:
            yield folder + word.rstrip(",")
            if not word.endswith(","):
                break


@every_page
def test_paths_exist(page):
    links = {link for link in re.findall(r"\]\(([^)#]+)", page.read_text()) if "://" not in link}
    assert {link for link in links if not (page.parent / link).exists()} == set()
    words = {word for span in spans(page) for word in re.split(r"[\s,]+", span) if word and is_path(word)}
    assert {word for word in words if not is_there(word)} == set()


@every_page
def test_names_exist(page):
    """A name in backticks is a word of the sources."""
    words = {word for path in files() for word in re.findall(r"\w+", path.read_text())}
    assert {span for span in spans(page) if re.fullmatch(r"[A-Za-z_]\w*", span)} - words == set()


def test_the_tree_lists_what_exists():
    listed = list(tree())
    assert len(listed) > 50
    assert [name for name in listed if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("folder", ["fastbn", "src_c"])
def test_the_tree_lists_the_whole_house(folder):
    listed = set(tree())
    held = {path.relative_to(ROOT).as_posix() for path in files() if path.relative_to(ROOT).parts[0] == folder}
    assert held
    told_as_one = tuple(name for name in listed if name.endswith("/") and name != f"{folder}/")
    assert {name for name in held - listed if not name.startswith(told_as_one)} == set()


@pytest.mark.filterwarnings("error")
def test_readme_runs(tmp_path, monkeypatch):
    """All Python of the README, from top to bottom."""
    monkeypatch.chdir(tmp_path)
    namespace = {}
    examples = blocks(ROOT / "README.md", "python")
    assert len(examples) >= 2
    for example in examples:
        exec(compile(example, "README.md", "exec"), namespace)


def test_readme_names_all_that_is_public():
    told = set(re.findall(r"\w+", " ".join(spans(ROOT / "README.md"))))
    assert set(fastbn.__all__) - told == {"__version__", "FoldReport", "GapReport", "LayerGap", "Moments"}


@every_page
def test_commands(page):
    """Shell blocks are shell, and install extras that exist."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"].keys()
    for command in blocks(page, "sh"):
        subprocess.run(["bash", "-n", "-c", command], check=True)
        for wanted in re.findall(r"\.\[([\w,]+)\]", command):
            assert set(wanted.split(",")) <= extras
        for word in re.findall(r"[\w./-]+", command):
            assert not is_path(word) or is_there(word), word


def test_both_commands_set_themselves_up():
    """The demo, and the tests where .ci/run looks for them: one line each, from nothing."""
    readme = (ROOT / "README.md").read_text()
    demo, tests = blocks(ROOT / "README.md", "sh")
    assert f"<!-- test command -->\n```sh\n{tests}```" in readme
    for command in (demo, tests):
        assert len(command.splitlines()) == 1
        assert command.startswith("python3 -m venv .venv && ")


def test_every_variable_is_told():
    """Of the environment, what a user may set is in the README, what a builder may set in CONTRIBUTING.md."""

    def read_in(paths):
        return {name for path in paths for name in re.findall(r"\bFASTBN_[A-Z_]+\b", path.read_text())} - {"FASTBN_H"}

    users = read_in([*(ROOT / "fastbn").glob("*.py"), *(ROOT / "fastbn").glob("*.pyx")])
    assert users
    assert users <= read_in([ROOT / "README.md"])
    assert read_in([ROOT / "setup.py"]) <= read_in([ROOT / "CONTRIBUTING.md"])
