"""Servers for the tests of `vla_adapter_hf.serving`: real processes and threads on free loopback ports."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from model_fixtures import FIXTURES
from websockets.sync.client import ClientConnection, connect

from vla_adapter_hf.serving.policy import ServedPolicy
from vla_adapter_hf.serving.server import DrainingServer, address_of, listen, server_config
from vla_adapter_hf.serving.services import Services
from vla_adapter_hf.serving.settings import ServeSettings
from vla_adapter_hf.serving.wire import unpack


RECORDED = FIXTURES / "libero_spatial_observation.npz"
START_SECONDS = 240
MAX_BYTES = 10**8


def recorded_observation() -> dict[str, Any]:
    """The recorded LIBERO observation: `image`, `wrist_image`, `state`, `prompt`."""
    with np.load(RECORDED) as recorded:
        return {
            "image": recorded["full_image"],
            "wrist_image": recorded["wrist_image"],
            "state": recorded["state"],
            "prompt": str(recorded["instruction"]),
        }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class HttpAnswer(NamedTuple):
    status: int
    headers: Any
    body: bytes


def request(url: str, body: bytes | str | None = None, headers: dict[str, str] | None = None) -> HttpAnswer:
    """GET, or POST with a body; a status of 4xx or 5xx is an answer like others."""
    data = body.encode() if isinstance(body, str) else body
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(urllib.request.Request(url, data, headers or {}), timeout=30) as answer:
            return HttpAnswer(answer.status, answer.headers, answer.read())
    except urllib.error.HTTPError as error:
        with error:
            return HttpAnswer(error.code, error.headers, error.read())


@dataclass
class ServerProcess:
    """`vla-adapter serve` with the embedded checkpoint in a process of its own."""

    port: int
    options: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    process: subprocess.Popen | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self, wait: bool = True) -> None:
        command = [sys.executable, "-m", "vla_adapter_hf.cli", "serve", "--port", str(self.port), *self.options]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **self.environment}
        self.process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        end = time.monotonic() + START_SECONDS
        while wait:
            with contextlib.suppress(OSError):
                if request(f"{self.url}/healthz").status == 200:
                    return
            if self.process.poll() is not None or time.monotonic() > end:
                self.process.kill()  # its output ends then
                raise AssertionError(f"the server did not start:\n{self.process.stdout.read()}")
            time.sleep(0.2)

    def stop(self, with_signal: int = signal.SIGTERM, seconds: float = 30) -> tuple[int, str]:
        """The exit code and what was printed."""
        self.process.send_signal(with_signal)
        output, _ = self.process.communicate(timeout=seconds)
        return self.process.returncode, output

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, *error: object) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.communicate()


@dataclass
class ServerThread:
    """A server in a thread, whose parts a test can look at."""

    services: Services
    server: DrainingServer
    port: int
    lines: list[str]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def websocket(self, path: str = "/", **options: Any) -> ClientConnection:
        return connect(f"ws://127.0.0.1:{self.port}{path}", compression=None, max_size=None, proxy=None, **options)


@contextlib.contextmanager
def server_thread(policy: ServedPolicy, settings: ServeSettings, api_key: str | None = None) -> Iterator[ServerThread]:
    """A server with a policy that is loaded already."""
    lines: list[str] = []
    policy = ServedPolicy(policy.model, policy.processor, settings, policy.rules)
    services = Services(policy, settings)
    with contextlib.closing(listen(settings.host, 0)) as listener:
        server = DrainingServer(
            server_config(services, api_key), services, lines.append, address_of(listener, settings)
        )
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            end = time.monotonic() + START_SECONDS
            while not server.started:
                assert thread.is_alive() and time.monotonic() < end, "the server did not start"
                time.sleep(0.02)
            yield ServerThread(services, server, listener.getsockname()[1], lines)
        finally:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()


def receive(websocket: ClientConnection, seconds: float = 30) -> Any:
    """The next message: a text as it is, msgpack unpacked."""
    message = websocket.recv(timeout=seconds)
    return message if isinstance(message, str) else unpack(message, MAX_BYTES)
