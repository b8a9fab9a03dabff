"""Runs the application until SIGTERM or Ctrl-C; requests that have arrived are answered first."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable
from types import FrameType

import torch
import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol

from vla_adapter_hf.checkpoints.embedded import embedded_folder
from vla_adapter_hf.serving.app import build_app
from vla_adapter_hf.serving.policy import ServedPolicy
from vla_adapter_hf.serving.services import Services
from vla_adapter_hf.serving.settings import ServeSettings, api_key_from_environment


# Plain requests (health, metrics, the page) that may be open besides the websockets.
HTTP_CONNECTIONS = 64


def serve(checkpoint: str | None, settings: ServeSettings, report_progress: Callable[[str], None] = print) -> None:
    """Load a checkpoint and serve it until the process gets SIGTERM or Ctrl-C.

    Args:
        checkpoint: folder or Hub id; None is the small one that ships with the package.
        settings: of the server.
        report_progress: receives the lines to print.

    Raises:
        ValueError: settings that cannot work, or a checkpoint that does not fit them.
        OSError: the port is taken.
    """
    api_key = api_key_from_environment()
    settings.check_access(api_key)
    with contextlib.closing(
        listen(settings.host, settings.port)
    ) as listener:  # before the model takes its time to load
        report_progress(f"Loading {checkpoint or 'the embedded checkpoint'}")
        services = _load_services(checkpoint, settings)
        for line in _facts(services, api_key):
            report_progress(line)
        server = DrainingServer(
            server_config(services, api_key), services, report_progress, address_of(listener, settings)
        )
        server.run(sockets=[listener])


def load_app(checkpoint: str | None = None, settings: ServeSettings | None = None) -> Starlette:
    """The application with a loaded checkpoint, for another program that serves it, such as Ray Serve.

    Args:
        checkpoint: folder or Hub id; None is the small one that ships with the package.
        settings: of the server. `host` says who may connect. Where to listen, TLS and the limit of a message's bytes
            are that program's.

    Raises:
        ValueError: as [`serve`].
    """
    settings = settings or ServeSettings()
    api_key = api_key_from_environment()
    settings.check_access(api_key)
    return build_app(_load_services(checkpoint, settings), api_key)


def _load_services(checkpoint: str | None, settings: ServeSettings) -> Services:
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    with embedded_folder() as embedded:
        policy = ServedPolicy.load(checkpoint or str(embedded / "checkpoint"), settings)
    return Services(policy, settings)


class PromptProtocol(H11Protocol):
    """uvicorn's HTTP, which also closes a connection on which no request's head arrives.

    uvicorn waits for the first byte, and for the rest of a head, without end, and counts such connections in
    `limit_concurrency`. A connection is closed after one to two times `timeout_keep_alive`.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._close_if_silent(earlier=None)

    def _close_if_silent(self, earlier: tuple[object, bool] | None) -> None:
        if self.transport.is_closing() or self.transport.get_protocol() is not self:  # closed, or a websocket by now
            return
        is_waiting = self.cycle is None or self.cycle.response_complete
        if is_waiting and (self.cycle, is_waiting) == earlier:
            self.transport.close()
        else:
            self.loop.call_later(self.timeout_keep_alive, self._close_if_silent, (self.cycle, is_waiting))


class DrainingServer(uvicorn.Server):
    """Answers what has arrived before it closes connections. A second signal ends it at once."""

    def __init__(
        self, config: uvicorn.Config, services: Services, report_progress: Callable[[str], None], address: str
    ) -> None:
        super().__init__(config)
        self.services, self.report_progress, self.address = services, report_progress, address
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Task | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        if not self.should_exit:
            self.report_progress(f"Serving on {self.address}")

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._loop is None or self.services.engine.is_stopping:
            self.should_exit = self.force_exit = True
            return
        self.services.engine.is_stopping = True
        self._loop.call_soon_threadsafe(self._begin_to_drain)

    def _begin_to_drain(self) -> None:
        self._draining = asyncio.create_task(self._drain())  # first, because the line may have no reader any more
        self.report_progress("Stopping: requests that have arrived are answered first")

    async def _drain(self) -> None:
        # No answer takes longer than this.
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self.services.engine.drained(), self.services.settings.max_seconds)
        self.should_exit = True


def listen(host: str, port: int) -> socket.socket:
    """A socket that is bound, so that a port that is taken is noticed before a model is loaded.

    Raises:
        OSError: with the address in the message.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise OSError(f"cannot listen on --host {host} --port {port}: {error}") from error


def server_config(services: Services, api_key: str | None) -> uvicorn.Config:
    """uvicorn's settings: limits, pings and TLS."""
    settings = services.settings
    config = uvicorn.Config(
        build_app(services, api_key),
        log_level="warning",
        access_log=False,
        server_header=False,
        http=PromptProtocol,
        ws="websockets-sansio",
        ws_max_size=settings.max_message_bytes,
        ws_per_message_deflate=False,  # frames do not compress, and it takes milliseconds
        ws_ping_interval=min(20.0, settings.ping_seconds),
        ws_ping_timeout=settings.ping_seconds,
        limit_concurrency=settings.max_connections + HTTP_CONNECTIONS,
        timeout_graceful_shutdown=3,
    )
    config.load()
    config.ssl = settings.ssl_context()
    return config


def address_of(listener: socket.socket, settings: ServeSettings) -> str:
    """The address of the page."""
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    return f"{'https' if settings.tls_certificate else 'http'}://{host}:{listener.getsockname()[1]}"


def _facts(services: Services, api_key: str | None) -> list[str]:
    settings, policy = services.settings, services.policy
    facts = policy.describe()
    lines = [
        f"cameras:    {', '.join(facts['cameras'])}",
        f"statistics: {facts['unnorm_key']}",
        f"actions:    {facts['action_horizon']} x {facts['action_dim']}, {facts['action_space']}",
        f"API key:    {'needed' if api_key else 'none'}",
    ]
    if not settings.is_loopback and api_key is not None and settings.tls_certificate is None:
        lines.append("warning:    without --tls-certificate the key and the frames cross the network unencrypted.")
    if not settings.is_loopback and api_key is None:
        lines.append("warning:    everybody on the network may ask for actions.")
    return lines
