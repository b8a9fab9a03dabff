"""`vla-adapter bench --serve`: what the server adds to a prediction, how it carries load, and how it comes back."""

from __future__ import annotations

import multiprocessing
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from vla_adapter_hf.checkpoints.embedded import embedded_folder
from vla_adapter_hf.checkpoints.open import open_checkpoint
from vla_adapter_hf.serving.client import Answer, PolicyClient
from vla_adapter_hf.serving.example import ExampleObservation, example_observation
from vla_adapter_hf.serving.server import serve
from vla_adapter_hf.serving.settings import ServeSettings
from vla_adapter_hf.utils.files import write_json


START_SECONDS = 300.0
WARM_UP = 5


@dataclass(frozen=True, kw_only=True)
class ServeBenchSettings:
    """What is measured.

    Args:
        checkpoint: folder or Hub id; by default the small one that ships with the package.
        server: how it is served.
        requests: that one client sends for the added latency.
        clients: how many clients ask at once, one number for each row of the table.
        seconds: of load for each of them.
        memory_minutes: of load by the largest number of clients, while the server's memory is read; 0 leaves it out.

    Raises:
        ValueError: a number that is out of range.
    """

    checkpoint: str | None = None
    server: ServeSettings = ServeSettings()
    requests: int = 100
    clients: tuple[int, ...] = (1, 4, 16)
    seconds: float = 10.0
    memory_minutes: float = 0.0

    def __post_init__(self) -> None:
        if self.requests < 1 or not self.clients or min(self.clients) < 1:
            raise ValueError(f"requests={self.requests} and clients={self.clients} must be at least 1.")
        if not self.seconds > 0 or not self.memory_minutes >= 0:
            raise ValueError(
                f"seconds={self.seconds} must be above 0, memory_minutes={self.memory_minutes} at least 0."
            )


def bench_server(
    settings: ServeBenchSettings | None = None,
    output: str | Path | None = None,
    report_progress: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Measure a server in a process of its own, on a loopback port.

    Args:
        settings: what is measured.
        output: JSON file to write the report to.
        report_progress: receives the lines to print.

    Returns:
        `dict`: the report; times in milliseconds, memory in bytes.

    Raises:
        RuntimeError: the server does not start.
    """
    settings = settings or ServeBenchSettings()
    with embedded_folder() as folder:
        source = settings.checkpoint or str(folder / "checkpoint")
        example = example_observation(open_checkpoint(source).config)
        server = replace(
            settings.server, port=_free_port(), max_queue=max(settings.server.max_queue, *settings.clients)
        )
        report: dict[str, Any] = {"checkpoint": settings.checkpoint or "embedded", "cpus": os.cpu_count()}
        with _server(source, server) as process:
            with _client(server) as client:
                report["latency"] = latency = _added_latency(client, example, settings.requests)
            report_progress(
                f"one client: {latency['round_trip']['p50']:.1f} ms a round trip, of which the model and the "
                f"preparation of its inputs {latency['model_and_preparation']['p50']:.1f} ms; added: median "
                f"{latency['added']['p50']:.2f} ms, 95 % {latency['added']['p95']:.2f} ms"
            )
            report["load"] = []
            for clients in settings.clients:
                row = _load(server, example, clients, settings.seconds)
                report["load"].append(row)
                report_progress(
                    f"{clients:>3} clients: {row['per_second']:.1f} chunks/s, median {row['p50']:.1f} ms, 95 % "
                    f"{row['p95']:.1f} ms, 99 % {row['p99']:.1f} ms, batches of {row['batch_size']:.1f} on average"
                )
            if settings.memory_minutes:
                report["memory"] = memory = _memory_under_load(process.pid, server, example, settings)
                report_progress(
                    f"memory: {memory['resident'][0] / 1e6:.0f} MB at first, {memory['resident'][-1] / 1e6:.0f} MB "
                    f"after {settings.memory_minutes:g} minutes of {max(settings.clients)} clients, "
                    f"{memory['bytes_per_minute'] / 1e6:+.2f} MB a minute over the second half"
                )
            report["reconnect"] = reconnect = _reconnect(process, source, server, example)
            report_progress(
                f"killed and started again: the client had its answer {reconnect['after_start_ms']:.0f} ms after the "
                f"new server was up, at attempt {reconnect['attempts']}"
            )
    if output is not None:
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        write_json(output, report, indent=1)
    return report


def _added_latency(client: PolicyClient, example: ExampleObservation, requests: int) -> dict[str, Any]:
    """Round trips of one client, less what the server reports for the model and for its inputs, request by request."""
    round_trips, work = [], []
    for number in range(-WARM_UP, requests):
        start = time.perf_counter()
        answer = _ask(client, example)
        round_trip = 1e3 * (time.perf_counter() - start)
        timing = answer.server["server_timing"]
        if number >= 0:
            round_trips.append(round_trip)
            work.append(timing["prepare_ms"] + timing["predict_ms"])
    added = np.subtract(round_trips, work)
    return {
        "round_trip": _percentiles(round_trips),
        "model_and_preparation": _percentiles(work),
        "added": _percentiles(added),
    }


def _load(server: ServeSettings, example: ExampleObservation, clients: int, seconds: float) -> dict[str, Any]:
    """Clients that ask again as soon as they have their answer."""
    milliseconds: list[float] = []
    batch_sizes: list[int] = []
    failures: list[BaseException] = []
    begin = threading.Barrier(clients + 1)
    end = threading.Event()

    def run() -> None:
        try:
            with _client(server) as client:
                _ask(client, example)
                begin.wait()
                while not end.is_set():
                    start = time.perf_counter()
                    answer = _ask(client, example)
                    milliseconds.append(1e3 * (time.perf_counter() - start))
                    batch_sizes.append(answer.server["batch_size"])
        except BaseException as error:
            failures.append(error)
            begin.abort()

    threads = [threading.Thread(target=run) for _ in range(clients)]
    for thread in threads:
        thread.start()
    try:
        begin.wait(START_SECONDS)
        started = time.perf_counter()
        end.wait(seconds)
        end.set()
        elapsed = time.perf_counter() - started
    except threading.BrokenBarrierError:
        end.set()
    for thread in threads:
        thread.join()
    if failures:
        raise RuntimeError(f"a client failed under load: {failures[0]}") from failures[0]
    return {
        "clients": clients,
        "answers": len(milliseconds),
        "per_second": len(milliseconds) / elapsed,
        "batch_size": float(np.mean(batch_sizes)),
        **_percentiles(milliseconds),
    }


def _memory_under_load(
    pid: int, server: ServeSettings, example: ExampleObservation, settings: ServeBenchSettings
) -> dict[str, Any]:
    """The server's resident memory, once a second of load."""
    resident: list[int] = []
    seconds: list[float] = []
    end = threading.Event()

    def read() -> None:
        start = time.monotonic()
        while not end.wait(1.0):
            resident.append(resident_bytes(pid))
            seconds.append(time.monotonic() - start)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        load = _load(server, example, max(settings.clients), 60 * settings.memory_minutes)
    finally:
        end.set()
        reader.join()
    half = len(resident) // 2
    slope = float(np.polyfit(seconds[half:], resident[half:], 1)[0]) if len(resident) - half > 1 else 0.0
    return {"resident": resident, "bytes_per_minute": 60 * slope, "answers": load["answers"]}


def _reconnect(process: Any, source: str, server: ServeSettings, example: ExampleObservation) -> dict[str, Any]:
    """Kill the server while a client asks, start another, and see when the client has its answer."""
    answers: list[tuple[float, Answer]] = []

    def ask(client: PolicyClient) -> None:
        answer = _ask(client, example)
        answers.append((time.monotonic(), answer))

    with _client(server) as client:
        _ask(client, example)
        process.kill()
        process.join()
        asking = threading.Thread(target=ask, args=(client,))
        asking.start()
        with _server(source, server):
            up = time.monotonic()
            asking.join()
    if not answers:
        raise RuntimeError("the client had no answer from the server that was started again.")
    answered, answer = answers[0]
    return {
        "after_start_ms": 1e3 * (answered - up),
        "attempts": answer.attempts,
        "age_seconds": answered - answer.observed_at,
    }


@contextmanager
def _server(source: str, settings: ServeSettings) -> Iterator[Any]:
    """A process with the server, once it answers."""
    arguments = {"checkpoint": source, "settings": settings, "report_progress": _ignore}
    process = multiprocessing.get_context("spawn").Process(target=serve, kwargs=arguments)
    process.start()
    try:
        end = time.monotonic() + START_SECONDS
        while not _answers(settings.port):
            if not process.is_alive() or time.monotonic() > end:
                raise RuntimeError(f"the server did not start; exit code {process.exitcode}.")
            time.sleep(0.02)
        yield process
    finally:
        process.terminate()
        process.join()


def _answers(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1.0) as connection:
            connection.settimeout(1.0)
            connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            return connection.recv(64).startswith(b"HTTP/1.1 200")
    except OSError:
        return False


def _client(server: ServeSettings) -> PolicyClient:
    return PolicyClient(f"ws://127.0.0.1:{server.port}", timeout=60.0, give_up_after=START_SECONDS)


def _ask(client: PolicyClient, example: ExampleObservation) -> Answer:
    return client.predict(example.images, example.instruction, example.state)


def _ignore(line: str) -> None:
    """Receives the server's lines; a function of the module, so that it can be sent to another process."""


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _percentiles(values: Any) -> dict[str, float]:
    return {f"p{share}": float(np.percentile(values, share)) for share in (5, 50, 95, 99)}


def resident_bytes(pid: int) -> int:
    """Memory that a process holds, from `/proc`.

    Raises:
        ValueError: the system does not say.
    """
    status = Path(f"/proc/{pid}/status")
    if not status.exists():
        raise ValueError("memory_minutes needs a system with /proc.")
    lines = dict(line.split(":", 1) for line in status.read_text(encoding="utf-8").splitlines() if ":" in line)
    return int(lines["VmRSS"].split()[0]) * 1024
