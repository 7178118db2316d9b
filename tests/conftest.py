"""conftest -- fixtures: the axes along which every promise must hold."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from typing import Any

import arrays
import numpy as np
import pytest

import fastbn
from fastbn import _native


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--huge", action="store_true", help="run the tests that need gigabytes of memory and minutes, too")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("huge") and not item.config.getoption("--huge"):
        pytest.skip("needs --huge, and gigabytes of memory")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what would be the same kernels once more."""

    def again(item: pytest.Item) -> bool:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        return params.get("isa") in arrays.BF16_ALONE and params.get("dtype", "bf16") != "bf16"

    left_out = [item for item in items if again(item)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if not again(item)]


@pytest.fixture(params=_native.isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every tier that this machine can run."""
    before = _native.isa()
    _native.use_isa(request.param)
    yield request.param
    _native.use_isa(before)


@pytest.fixture(params=[1, 2, 3], ids="threads{}".format)
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    with fastbn.num_threads(request.param):
        yield request.param


@pytest.fixture(params=arrays.DTYPES)
def dtype(request: pytest.FixtureRequest) -> np.dtype[Any]:
    found = arrays.DTYPES[request.param]
    if found is None:
        pytest.skip("bfloat16 needs ml_dtypes")
    return found


@pytest.fixture(params=arrays.LAYOUTS)
def layout(request: pytest.FixtureRequest) -> Callable[[int, int, int], tuple[tuple[int, ...], int]]:
    """(outer, channels, inner) -> (shape, channel_axis)."""
    return arrays.LAYOUTS[request.param]


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """Every test has its own numbers, the same in every run."""
    return np.random.default_rng(zlib.crc32(request.node.name.encode()))
