"""test_config.py -- show_config tells what runs, how many threads, and why."""

import os
import subprocess
import sys

import pytest

import fastbn


def test_dicts_tell_what_runs():
    config = fastbn.show_config("dicts")
    assert config["version"]["fastbn"] == fastbn.__version__
    isa = config["isa"]
    assert isa["chosen"] in isa["available"]
    assert set(isa["available"]) <= set(isa["built"])
    assert "scalar" in isa["available"]
    assert all(isinstance(size, int) and size > 0 for size in config["caches"].values())


def test_the_number_of_threads_and_why():
    """Seeded bug: the number at import, or its reason, after it was set."""
    with fastbn.num_threads(3):
        threads = fastbn.show_config("dicts")["threads"]
        assert (threads["number"], threads["why"]) == (3, "set_num_threads")
    code = "import fastbn; t = fastbn.show_config('dicts')['threads']; print(t['number'], t['why'])"
    environment = {**os.environ, "FASTBN_NUM_THREADS": "2"}
    told = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert told.stdout == "2 FASTBN_NUM_THREADS=2\n"


def test_stdout_is_the_same_in_words(capsys):
    assert fastbn.show_config() is None
    printed = capsys.readouterr().out
    for section, entries in fastbn.show_config("dicts").items():
        assert f"{section}:\n" in printed
        for name, value in entries.items():
            assert f"  {name}: {', '.join(value) if isinstance(value, list) else value}\n" in printed


def test_another_mode_is_an_error():
    with pytest.raises(ValueError, match=r"mode must be one of \('stdout', 'dicts'\), got 'json'"):
        fastbn.show_config("json")
