"""app.py -- the ASGI application: digits in, their numbers out.

``PARAMETERS`` is the file that train.py wrote, ``NORM`` who computes batch norm: fastbn or numpy.

    uvicorn --app-dir examples/server app:app
    gunicorn --chdir examples/server -k asgi --preload -w 2 app:app
"""

import contextlib
import hashlib
import os
from pathlib import Path

import numpy as np
from network import Network
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

import fastbn
from fastbn import _native

MOST, BYTES = 64, 64

network = Network(
    np.load(os.environ.get("PARAMETERS", Path(__file__).with_name("parameters.npz"))), os.environ.get("NORM", "fastbn")
)
# Under --preload this runs in the parent: its team of threads is up when the workers are forked.
network(np.zeros((MOST, 8, 8), np.uint8))


async def predict(request: Request) -> JSONResponse:
    """Up to 64 digits of 64 bytes each."""
    body, wanted = bytearray(), {"error": f"send 1 to {MOST} digits of {BYTES} bytes"}
    async for chunk in request.stream():
        body += chunk
        if len(body) > MOST * BYTES:  # however much is announced or may yet come: it is not read
            return JSONResponse(wanted, status_code=413, headers={"Connection": "close"})
    if not body or len(body) % BYTES:
        return JSONResponse(wanted, status_code=400)
    # Starlette's pool of threads, 40 at most: that many requests compute at a time.
    logits = await run_in_threadpool(network, np.frombuffer(body, np.uint8).reshape(-1, 8, 8))
    return JSONResponse(
        {"digits": logits.argmax(1).tolist(), "bits": hashlib.sha256(logits).hexdigest(), "pid": os.getpid()}
    )


async def status(request: Request) -> JSONResponse:
    """What the process has become: its threads, fastbn's among them, and how often it had a team."""
    names = []
    for name in Path("/proc/self/task").glob("*/comm"):
        with contextlib.suppress(OSError):  # a thread that has just ended
            names.append(name.read_text().strip())
    return JSONResponse(
        {
            "pid": os.getpid(),
            "threads": len(names),
            "ours": names.count("fastbn"),
            "team": fastbn.get_num_threads(),
            **_native.parallel_counters(),
        }
    )


app = Starlette(routes=[Route("/predict", predict, methods=["POST"]), Route("/status", status)])
