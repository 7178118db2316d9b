"""conftest -- takes the options of ``python -m fastbn bench`` as one: ``--bench "--peers all --threads 1"``."""

import argparse
import functools
import shlex

import pytest

from fastbn._bench import cli, engine


def pytest_addoption(parser):
    parser.addoption("--bench", default="", metavar="OPTIONS", help="options of python -m fastbn bench, as one string")


def pytest_configure(config):
    parser = argparse.ArgumentParser(prog="--bench", usage=argparse.SUPPRESS)
    cli.add_arguments(parser)
    config.bench = parser.parse_args(shlex.split(config.getoption("bench")))


def pytest_generate_tests(metafunc):
    options = metafunc.config.bench
    contests = cli.contests(options, cli.peers(options))
    found = [(contest, entry) for contest in contests for entry in contest.entries]
    metafunc.parametrize(("contest", "entry"), found, ids=[f"{c.case}, {entry}" for c, entry in found])


@functools.lru_cache(maxsize=1)
def _data(config):
    return cli.Data(config.bench.out == "inplace")


@functools.lru_cache(maxsize=1)
def _group(contest, config):
    _data(config).keep(contest)
    return engine.run(contest, _data(config), config.bench.seconds)


@pytest.fixture
def tensors(entry, request):
    """The data of a contender."""
    return _data(request.config)(entry.case)


@pytest.fixture
def group(contest, request):
    """All contenders of a contest, measured against each other."""
    return _group(contest, request.config)
