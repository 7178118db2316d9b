"""conftest -- takes the options of ``python -m fastbn bench`` as one: ``--bench "--peers all --threads 1"``."""

import argparse
import functools
import shlex

import pytest

from fastbn._bench import cli, engine
from fastbn._bench.data import Tensors


def pytest_addoption(parser):
    parser.addoption("--bench", default="", metavar="OPTIONS", help="options of python -m fastbn bench, as one string")


def pytest_configure(config):
    parser = argparse.ArgumentParser(prog="--bench", usage=argparse.SUPPRESS)
    cli.add_arguments(parser)
    config.bench = parser.parse_args(shlex.split(config.getoption("bench")))


def pytest_generate_tests(metafunc):
    options = metafunc.config.bench
    peers = cli.peers(options)
    found = [(case, entry) for case in cli.cases(options) for entry in cli.field(case, options, peers)]
    metafunc.parametrize(("case", "entry"), found, ids=[f"{case}, {entry}" for case, entry in found])


_tensors = functools.lru_cache(maxsize=1)(Tensors)


@functools.lru_cache(maxsize=1)
def _group(case, config):
    tensors = _tensors(case.shape, case.dtype)
    field = [entry.make(case, tensors) for entry in cli.field(case, config.bench, cli.peers(config.bench))]
    return engine.run(case, tensors, field, config.bench.seconds)


@pytest.fixture
def tensors(case):
    """The data of a case."""
    return _tensors(case.shape, case.dtype)


@pytest.fixture
def group(case, request):
    """All contenders of a case, measured against each other."""
    return _group(case, request.config)
