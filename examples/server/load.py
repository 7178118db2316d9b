"""load.py -- the load test: real servers on the loopback interface, with fastbn and with the NumPy expression.

    python examples/server/load.py

trains the network if there are no parameters yet, starts uvicorn, and gunicorn with --preload and two workers, each
with either batch norm, sends each of them the same requests from 40 clients, and prints what came back.
"""

import argparse
import http.client
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

HERE = Path(__file__).parent
PARAMETERS = HERE / "parameters.npz"
DIGITS, SAMPLES, PATIENCE = 4, 16, 30

# gunicorn's control socket would be a file in the user's home.
SERVERS = {
    "uvicorn": [sys.executable, "-m", "uvicorn", "app:app", "--log-level", "warning", "--fd"],
    "gunicorn --preload -w 2": [
        *(sys.executable, "-m", "gunicorn", "app:app", "--log-level", "warning", "--preload", "-w", "2"),
        *("-k", "asgi", "--no-control-socket", "--bind"),
    ],
}


class Result(NamedTuple):
    """What one server did with all the requests."""

    answered: int
    wrong: int
    per_second: float
    p50: float
    p99: float
    slowest: float
    processes: dict[int, dict[str, int]]


@contextmanager
def serve(server: str, norm: str, parameters: Path) -> Iterator[int]:
    """Run a server for the length of a block, and give its port."""
    with socket.create_server(("127.0.0.1", 0), backlog=256) as listener:
        fd = listener.fileno()
        environment = {"PARAMETERS": str(parameters.resolve()), "NORM": norm, "OPENBLAS_NUM_THREADS": "1"}
        process = subprocess.Popen(
            [*SERVERS[server], str(fd) if server == "uvicorn" else f"fd://{fd}"],
            cwd=HERE,
            env=os.environ | environment,
            pass_fds=[fd],
        )
        try:
            yield listener.getsockname()[1]
        finally:
            process.terminate()
            try:
                process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def ask(port: int, path: str, body: bytes | None = None) -> Any:
    """Send one request; an error is an answer that is None."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    try:
        connection.request("GET" if body is None else "POST", path, body)
        response = connection.getresponse()
        text = response.read()
        return json.loads(text) if response.status == 200 else None
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def load(port: int, requests: int, clients: int, expected: dict[bytes, list[int]]) -> Result:
    """Send `requests` requests from `clients` threads, and count."""
    bodies = list(expected)
    # The first answers come when the server is up; every process should have had one.
    ask(port, "/predict", bodies[0])
    numbers = iter(range(requests))
    lock = threading.Lock()
    latencies: list[float] = []
    bits: dict[bytes, set[str]] = {body: set() for body in bodies}
    processes: dict[int, dict[str, int]] = {}
    wrong = 0

    def client() -> None:
        nonlocal wrong
        while True:
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            body = bodies[number % len(bodies)]
            begin = time.perf_counter()
            answer = ask(port, "/predict", body)
            latency = time.perf_counter() - begin
            state = ask(port, "/status") if number % 5 == 0 else None
            with lock:
                if answer is not None:
                    latencies.append(latency)
                    wrong += answer["digits"] != expected[body]
                    bits[body].add(answer["bits"])
                if state is not None:
                    most = processes.setdefault(state["pid"], state)
                    processes[state["pid"]] = {key: max(most[key], state[key]) for key in state}

    threads = [threading.Thread(target=client) for _ in range(clients)]
    begin = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - begin
    # The same question has one answer, to the last bit, whichever process, thread or team computed it.
    wrong += sum(len(answers) > 1 for answers in bits.values())
    p50, p99, slowest = np.percentile(latencies or [np.nan], [50, 99, 100])
    return Result(len(latencies), wrong, len(latencies) / seconds, p50, p99, slowest, processes)


def bound(team: int) -> int:
    """Live threads that 40 callers and one team may make, whatever comes."""
    return 1 + 40 + (team - 1) + 2


def questions(parameters: Path) -> dict[bytes, list[int]]:
    """Requests, and what the network answers to them in this process."""
    sys.path.insert(0, str(HERE))  # where it is anyway, but under python -P
    from network import Network

    network = Network(np.load(parameters))
    digits = np.random.default_rng(0).integers(0, 17, (SAMPLES, DIGITS, 8, 8), dtype=np.uint8)
    return {sample.tobytes(): network(sample).argmax(1).tolist() for sample in digits}


def measure(parameters: Path, requests: int, clients: int) -> dict[tuple[str, str], Result]:
    """Put every server under load, one after the other."""
    expected = questions(parameters)
    results = {}
    for server in SERVERS:
        for norm in ("fastbn", "numpy"):
            with serve(server, norm, parameters) as port:
                results[server, norm] = load(port, requests, clients, expected)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--requests", type=int, default=1000, help="for each server (default: %(default)s)")
    parser.add_argument("--clients", type=int, default=40, help="threads that ask (default: %(default)s)")
    parser.add_argument("--parameters", type=Path, default=PARAMETERS, help="the file that train.py writes")
    arguments = parser.parse_args()
    if min(arguments.requests, arguments.clients) < 1:
        parser.error("--requests and --clients must be at least 1")
    if not arguments.parameters.exists():
        subprocess.run([sys.executable, HERE / "train.py", arguments.parameters], check=True)

    results = measure(arguments.parameters, arguments.requests, arguments.clients)
    print(f"\n{arguments.requests} requests of {DIGITS} digits from {arguments.clients} clients; times in ms\n")
    print(f"{'server':24} {'norm':8} {'answered':>8} {'wrong':>6} {'req/s':>7} {'p50':>7} {'p99':>7} {'max':>7}")
    for (server, norm), r in results.items():
        times = "".join(f" {1e3 * seconds:7.1f}" for seconds in (r.p50, r.p99, r.slowest))
        print(f"{server:24} {norm:8} {r.answered:8} {r.wrong:6} {r.per_second:7.1f}{times}")
    print("\nevery process that answered with fastbn: live threads (their bound), fastbn's own of them, parallel calls")
    for (server, norm), r in results.items():
        for p in r.processes.values() if norm == "fastbn" else ():
            print(f"{server:24} {p['threads']:4} ({bound(p['team'])}) {p['ours']:4} {p['parallel']:8}")


if __name__ == "__main__":
    main()
