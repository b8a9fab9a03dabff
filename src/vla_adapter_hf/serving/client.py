"""The robot's side: ask a server for chunks, survive its restarts, know how old an answer is."""

from __future__ import annotations

import itertools
import logging
import os
import random
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any

import numpy as np

from vla_adapter_hf.robots import ROBOTS
from vla_adapter_hf.serving.errors import ServingError
from vla_adapter_hf.serving.settings import API_KEY_VARIABLE
from vla_adapter_hf.utils.extras import install_hint


try:
    import msgpack
    from websockets.exceptions import InvalidStatus, WebSocketException
    from websockets.sync.client import ClientConnection, connect

    from vla_adapter_hf.serving.wire import pack, unpack
except ImportError as error:
    raise ImportError(f"PolicyClient needs {error.name}: {install_hint('serve')}") from error

logger = logging.getLogger(__name__)

PATH = "/v1/realtime/robot/openpi"
FIRST_WAIT, LONGEST_WAIT = 0.05, 5.0
MAX_REPLY_BYTES = 16_000_000
# A connection that is silent, as after a cable was pulled, is noticed by its pings and not by a slow answer.
PING_SECONDS, PONG_SECONDS = 2.0, 3.0
# What must be the same after a reconnection: a robot must not go on with another policy.
FIXED = (
    "cameras",
    "state_dim",
    "action_dim",
    "state_names",
    "action_names",
    "action_mask",
    "action_horizon",
    "robot",
    "unnorm_key",
    "weights",
    "clip",
    "fps",
)


class PolicyError(RuntimeError):
    """The server refused an observation.

    Attributes:
        kind: the server's short name for the reason, such as `invalid`, `too_old` or `busy`.
        may_retry: the same observation may succeed a moment later.
    """

    def __init__(self, kind: str, message: str, may_retry: bool = False) -> None:
        super().__init__(f"{kind}: {message}")
        self.kind, self.may_retry = kind, may_retry


@dataclass(frozen=True)
class Answer:
    """A chunk from the server.

    Attributes:
        actions: `(chunk_size, action_dim)` float32, in the convention that the server's metadata names.
        observed_at: when the observation was taken, by `time.monotonic()`.
        attempts: how often the observation was sent; more than 1 after a reconnection.
        server: the rest of the server's reply, e.g. `server_timing`.
    """

    actions: np.ndarray
    observed_at: float
    attempts: int
    server: dict[str, Any] = field(default_factory=dict)

    @property
    def age(self) -> float:
        """Seconds from the moment that the observation was taken until now."""
        return time.monotonic() - self.observed_at


class PolicyClient:
    """A connection to `vla-adapter serve` that comes back by itself.

    ```python
    with PolicyClient("ws://127.0.0.1:8000") as policy:
        answer = policy.predict({"image": frame, "wrist_image": wrist}, "pick up the bowl", state)
        if answer.age < 0.5:
            execute(answer.actions)
    ```

    Args:
        url: `ws://host:port` or `wss://host:port`.
        session: name of the robot; the server lets one client control it at a time. Without a name each connection is
            on its own.
        api_key: by default from the environment variable `VLA_ADAPTER_API_KEY`.
        timeout: seconds to wait for an answer before connecting again.
        give_up_after: seconds after which [`predict`] raises; also for an observation that is as old.
        tls: context for `wss`, e.g. one that knows your own certificate; by default the system's.

    Attributes:
        metadata: what the server says about its policy.
        last_error: why the present request has no answer yet; None once there was one.

    Raises:
        ConnectionError: no server answered within `give_up_after`.
    """

    def __init__(
        self,
        url: str = "ws://127.0.0.1:8000",
        session: str | None = None,
        api_key: str | None = None,
        timeout: float = 10.0,
        give_up_after: float = 30.0,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        if not url.startswith(("ws://", "wss://")):
            raise ValueError(f"url must begin with ws:// or wss://, got {url!r}.")
        self.url = url.rstrip("/") + ("" if url.rstrip("/").endswith(PATH) else PATH)
        self.session, self.timeout, self.give_up_after = session, timeout, give_up_after
        self._key = os.environ.get(API_KEY_VARIABLE) if api_key is None else api_key
        self._tls = tls
        self._numbers = itertools.count(1)
        self._connection: ClientConnection | None = None
        self._open = ExitStack()  # closes the connection
        self._closed = threading.Event()  # of the requests until the next close()
        self._turn = threading.Lock()
        self.metadata: dict[str, Any] = {}
        self.last_error: Exception | None = None
        self._persist(lambda: None, time.monotonic())

    @property
    def cameras(self) -> list[str]:
        """The model's cameras, as the server says."""
        return list(self.metadata["cameras"])

    @property
    def state_dim(self) -> int:
        """Size of a state."""
        return int(self.metadata["state_dim"])

    @property
    def action_dim(self) -> int:
        """Size of an action."""
        return int(self.metadata["action_dim"])

    @property
    def state_names(self) -> list[str] | None:
        """Names of the state's values in the model's order, if the checkpoint has them."""
        return self.metadata.get("state_names")

    @property
    def action_names(self) -> list[str] | None:
        """Names of the action's values in the model's order, if the checkpoint has them."""
        return self.metadata.get("action_names")

    @property
    def averaged(self) -> np.ndarray:
        """Boolean `(A,)`: which of an action's values were normalised. The others, such as a gripper with two values,
        must not be averaged between chunks."""
        return np.array(self.metadata["action_mask"], bool)

    @property
    def delta_actions(self) -> tuple[bool, ...] | None:
        """For each action dimension whether it is a change and not a target, by the server's robot preset; None
        without one."""
        robot = ROBOTS.get(self.metadata.get("robot"))
        return None if robot is None else robot.delta_actions

    @property
    def fps(self) -> float | None:
        """Frames a second of the recordings that the model learnt from, if the checkpoint has it."""
        return self.metadata.get("fps")

    def predict(
        self,
        images: Mapping[str, np.ndarray],
        instruction: str,
        state: np.ndarray,
        observed_at: float | None = None,
    ) -> Answer:
        """The chunk for one observation. While the server is away or busy, it is asked again, with growing pauses.

        Args:
            images: uint8 frames `(height, width, 3)` by the checkpoint's camera names, which `metadata` lists.
            instruction: the task, in words.
            state: `(proprio_dim,)` in physical units.
            observed_at: when the observation was taken, by `time.monotonic()`; by default now.

        Raises:
            PolicyError: the server refuses the observation, and asking again would not help.
            ConnectionError: no answer within `give_up_after`.
        """
        observed_at = time.monotonic() if observed_at is None else observed_at
        request = {
            "images": {name: np.ascontiguousarray(image) for name, image in images.items()},
            "prompt": instruction,
            "state": np.asarray(state, np.float64),
            "request_id": next(self._numbers),
        }

        def ask() -> dict[str, Any]:
            return self._exchange({**request, "age": time.monotonic() - observed_at})

        reply, attempts = self._persist(ask, observed_at)
        actions = reply.pop("actions", None)
        if not isinstance(actions, np.ndarray) or actions.ndim != 2 or not np.isfinite(actions).all():
            self._disconnect()
            raise PolicyError("bad_reply", "the reply holds no finite (chunk_size, action_dim) array of actions.")
        return Answer(actions, observed_at, attempts, reply)

    def reset(self) -> None:
        """Tell the server that a new episode begins.

        Raises:
            ConnectionError: no answer within `give_up_after`.
        """
        self._persist(lambda: self._exchange({"endpoint": "reset"}), time.monotonic())

    def close(self) -> None:
        """End the connection and the requests of other threads; a request after that opens another connection."""
        closed, self._closed = self._closed, threading.Event()
        closed.set()
        self._disconnect()

    def __enter__(self) -> PolicyClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _persist(self, ask: Callable[[], Any], since: float) -> tuple[Any, int]:
        """Try until it works, and say how often. One request at a time: threads that share the client take turns."""
        closed = self._closed
        with self._turn:
            return self._persist_alone(ask, since, closed)

    def _persist_alone(self, ask: Callable[[], Any], since: float, closed: threading.Event) -> tuple[Any, int]:
        wait = FIRST_WAIT
        for attempt in itertools.count(1):
            try:
                self._ensure_connected(closed)
                answer = ask()
                self.last_error = None
                return answer, attempt
            except PolicyError as error:
                if not error.may_retry:
                    raise
                reason: Exception = error
            except (OSError, WebSocketException, TimeoutError, ServingError, msgpack.UnpackException) as error:
                self._disconnect()  # a late answer to this request must not be taken for one to the next
                reason = error
            self.last_error = reason
            left = self.give_up_after - (time.monotonic() - since)
            if left <= 0:
                raise ConnectionError(f"{self.url}: no answer within {self.give_up_after:g} s: {reason}") from reason
            if attempt == 1 and not isinstance(reason, PolicyError):
                logger.warning("%s: %s; asking again for up to %.3g s", self.url, reason, left)
            # Robots that lost the same server do not return all at once.
            if closed.wait(min(wait * random.uniform(0.5, 1.0), left)):
                raise ConnectionError(f"{self.url}: the client was closed before an answer came") from reason
            wait = min(2 * wait, LONGEST_WAIT)
        raise AssertionError("unreachable")

    def _disconnect(self) -> None:
        self._connection = None
        opened, self._open = self._open, ExitStack()
        opened.close()

    def _ensure_connected(self, closed: threading.Event) -> None:
        if closed.is_set():
            raise ConnectionError("the client was closed")
        if self._connection is not None:
            return
        headers = {"Authorization": f"Api-Key {self._key}"} if self._key else None
        options = {"compression": None, "max_size": MAX_REPLY_BYTES, "proxy": None, "ssl": self._tls}
        options |= {"ping_interval": PING_SECONDS, "ping_timeout": PONG_SECONDS}
        connecting = partial(connect, self.url, **options)
        opened = ExitStack()
        try:
            connection = opened.enter_context(
                connecting(additional_headers=headers, open_timeout=self.timeout, close_timeout=1.0)
            )
        except InvalidStatus as error:
            status = error.response.status_code
            if status >= 500:
                raise
            text = (error.response.body or b"").decode("utf-8", "replace")
            raise PolicyError("refused", f"{self.url} answered {status}: {text}") from error
        self._open, self._connection = opened, connection
        if closed.is_set():  # while this thread connected: close() may not have seen the connection
            raise ConnectionError("the client was closed")
        metadata = self._receive()
        changed = [name for name in FIXED if self.metadata and metadata.get(name) != self.metadata.get(name)]
        if changed:
            self._disconnect()
            raise PolicyError(
                "changed",
                f"the server came back with another policy: {', '.join(changed)} changed. Make a new PolicyClient if "
                "that is what you want.",
            )
        self.metadata = metadata

    def _exchange(self, request: dict[str, Any]) -> dict[str, Any]:
        if self.session is not None:
            request["session_id"] = self.session
        self._open_connection().send(pack(request))
        reply = self._receive()
        if reply.get("type") == "error":
            raise PolicyError(str(reply.get("kind")), str(reply.get("message")), bool(reply.get("may_retry")))
        if reply.get("request_id") != request.get("request_id"):
            raise ConnectionError("the reply belongs to another request.")
        return reply

    def _open_connection(self) -> ClientConnection:
        connection = self._connection
        if connection is None:
            raise ConnectionError("another thread closed the connection.")
        return connection

    def _receive(self) -> dict[str, Any]:
        message = self._open_connection().recv(timeout=self.timeout)
        reply = unpack(message, MAX_REPLY_BYTES) if isinstance(message, bytes) else None
        if not isinstance(reply, dict):
            raise ConnectionError(f"the server sent {str(message)[:200]!r}, not a map.")
        return reply
