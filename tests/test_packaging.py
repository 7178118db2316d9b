"""test_packaging.py -- what a user installs: the sdist, the wheel built from it, and the wheel without OpenMP."""

import email
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import fastbn

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.slow

# What the built module says of itself, from a process that sees nothing else.
REPORT = """
import json, sys
import numpy as np
import fastbn
x = np.arange(12, dtype=np.float32).reshape(4, 3)
y = fastbn.batch_norm(x, None, None, training=True)
print(json.dumps({
    "file": fastbn.__file__,
    "version": fastbn.__version__,
    "native": fastbn._native.__file__,
    "isas": fastbn._native.built_isas(),
    "sees_openmp": fastbn._native.parallel_sees_openmp(),
    "error": float(np.abs(y - (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)).max()),
}))
"""


def python(*arguments, cwd, **env):
    """Run this interpreter in an environment without our settings; its output must name whatever goes wrong."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("FASTBN_") and k != "PYTHONPATH"}
    done = subprocess.run([sys.executable, *arguments], cwd=cwd, env=clean | env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def source_files():
    """Every file of the project, by git in a checkout and by the manifest in an unpacked sdist."""
    if not (ROOT / ".git").exists():
        return (ROOT / "fastbn.egg-info" / "SOURCES.txt").read_text().splitlines()
    listing = ["git", "-c", f"safe.directory={ROOT}", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listing, cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0")
    return [name for name in names if name and (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    copy = tmp_path_factory.mktemp("sources")
    for name in source_files():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, copy / name)
    python("-c", "from setuptools import build_meta; build_meta.build_sdist('dist')", cwd=copy)
    (path,) = (copy / "dist").iterdir()
    return path


@pytest.fixture(scope="module")
def unpacked(sdist, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (top,) = folder.iterdir()
    return top


def build_wheel(folder, out, **env):
    done = python("-c", f"from setuptools import build_meta; build_meta.build_wheel({out!r})", cwd=folder, **env)
    (path,) = (folder / out).iterdir()
    return path, done.stdout + done.stderr


def installed(wheel, folder):
    """Unpack a wheel and import it from there."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    report = json.loads(python("-c", REPORT, cwd=folder, PYTHONPATH=str(folder)).stdout)
    assert Path(report["file"]).is_relative_to(folder)
    return report


@pytest.fixture(scope="module")
def wheel(unpacked):
    return build_wheel(unpacked, "dist")[0]


@pytest.fixture(scope="module")
def report(wheel, tmp_path_factory):
    return installed(wheel, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(archive.read(name))


def test_sdist_holds_every_file(sdist):
    """A file that MANIFEST.in forgets turns this red."""
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert set(source_files()) - held == set()


def test_sdist_builds_a_wheel_that_works(report):
    assert report["error"] < 1e-6
    assert "scalar" in report["isas"]


def test_wheel_holds_the_package_and_nothing_else(wheel):
    """No C, generated or ours, and no tests; the types are there."""
    with zipfile.ZipFile(wheel) as archive:
        names = {n for n in archive.namelist() if ".dist-info/" not in n}
    (extension,) = (n for n in names if Path(n).suffix in (".so", ".pyd"))
    expected = {n for n in source_files() if n.startswith("fastbn/") and Path(n).suffix in (".py", ".pyi", ".typed")}
    assert {"fastbn/py.typed", "fastbn/_native.pyi"} < expected
    assert names == expected | {extension}


def test_version_is_the_same_everywhere(report, metadata):
    newest = re.search(r"^## \[(\d.*?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    assert {report["version"], metadata["Version"], newest[1]} == {fastbn.__version__}


def test_numpy_is_the_only_dependency(metadata):
    needed = [r for r in metadata.get_all("Requires-Dist") if "extra ==" not in r]
    assert needed == ["numpy>=2"]


def test_licence_is_in_the_wheel(wheel, metadata):
    assert metadata["License-Expression"] == "BSD-3-Clause"
    with zipfile.ZipFile(wheel) as archive:
        assert any(n.endswith(".dist-info/licenses/LICENSE") for n in archive.namelist())


def test_without_openmp_it_works_and_says_so(unpacked, wheel, tmp_path):
    """Built in the folder of the first wheel, so it also proves that another configuration replaces the module."""
    serial, output = build_wheel(unpacked, "dist-serial", FASTBN_OPENMP="0")
    assert "WITHOUT OpenMP" in output
    report = installed(serial, tmp_path)
    assert report["error"] < 1e-6
    assert not report["sees_openmp"]


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("readelf"), reason="needs ELF and readelf")
def test_no_static_tls(report):
    """A module with initial-exec thread-local storage cannot be loaded once the static block is full."""
    table = subprocess.run(["readelf", "-rW", report["native"]], capture_output=True, text=True, check=True).stdout
    assert "R_" in table
    assert not re.search("TPOFF|TPREL", table)
