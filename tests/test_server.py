"""test_server.py -- row 2 of docs/reliability.md: examples/server under load, with rows 1 and 3 holding.

Red with children that believe in their parent's workers.
"""

import http.client
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
    subprocess.run([sys.executable, "-P", SERVER / "train.py", path], env=environment, check=True, capture_output=True)
    return path


def refused(port, announced):
    """The answer to a body that is announced and then breaks off."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.putrequest("POST", "/predict")
    connection.putheader("Content-Length", str(announced))
    connection.endheaders(bytes(8192))
    status = connection.getresponse().status
    connection.close()
    return status


@pytest.mark.parametrize("server", ["uvicorn", "gunicorn --preload -w 2"])
def test_every_request_is_answered(server, parameters, monkeypatch):
    """Row 2, 2 x 200 requests. gunicorn: red with a child that believes in its parent's workers, and with
    FBN_OPENMP_TEAM, whose forked workers hang. Both: red with a token that is never taken (wrong bits, or more threads
    than the bound). A body that is too large is not waited for: red with `await request.body()`.
    """
    monkeypatch.syspath_prepend(SERVER)
    monkeypatch.setenv("FASTBN_NUM_THREADS", "3")
    import load

    expected = load.questions(parameters)
    with load.serve(server, "fastbn", parameters) as port:
        result = load.load(port, requests=200, clients=40, expected=expected)
        assert refused(port, announced=1 << 30) == 413

    assert result.answered == 200
    assert result.wrong == 0
    assert result.processes
    for process in result.processes.values():
        assert process["threads"] <= load.bound(3)
        assert process["ours"] == 2
        assert process["parallel"] > 18, "the parent's warm-up is at most 9"
