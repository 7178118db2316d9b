"""test_doctests.py -- every example in a docstring of the package, wherever the package is installed."""

import doctest
import importlib
import pkgutil

import pytest

import fastbn

MODULES = ["fastbn", *(m.name for m in pkgutil.iter_modules(fastbn.__path__, "fastbn."))]
OPTIONS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    failed, _ = doctest.testmod(importlib.import_module(name), optionflags=OPTIONS)
    assert failed == 0


def test_examples_are_found():
    assert sum(doctest.testmod(importlib.import_module(name), optionflags=OPTIONS).attempted for name in MODULES) > 0
