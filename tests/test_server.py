"""test_server.py -- row 2 of docs/reliability.md: examples/server under load, with rows 1 and 3 holding."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fresh import needs_proc

SERVER = Path(__file__).parents[1] / "examples" / "server"
MISSING = [name for name in ("starlette", "uvicorn", "gunicorn", "sklearn") if importlib.util.find_spec(name) is None]

pytestmark = [
    pytest.mark.slow,
    needs_proc,
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
]


@pytest.fixture(scope="module")
def parameters(tmp_path_factory):
    path = tmp_path_factory.mktemp("server") / "parameters.npz"
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
    subprocess.run([sys.executable, SERVER / "train.py", path], env=environment, check=True, capture_output=True)
    return path


@pytest.mark.parametrize("server", ["uvicorn", "gunicorn --preload -w 2"])
def test_every_request_is_answered(server, parameters, monkeypatch):
    """Row 2, 2 x 200 requests. gunicorn: red with a child that believes in its parent's workers, and with
    FBN_OPENMP_TEAM, whose forked workers hang. Both: red with a token that is never taken (wrong bits, or more threads
    than the bound).
    """
    monkeypatch.syspath_prepend(SERVER)
    monkeypatch.setenv("FASTBN_NUM_THREADS", "3")
    import load

    expected = load.questions(parameters)
    with load.serve(server, "fastbn", parameters) as port:
        result = load.load(port, requests=200, clients=40, expected=expected)

    assert result.answered == 200
    assert result.wrong == 0
    assert result.processes
    for process in result.processes.values():
        assert process["threads"] <= load.bound(3)
        assert process["ours"] == 2
        assert process["parallel"] > 18, "the parent's warm-up is at most 9"
