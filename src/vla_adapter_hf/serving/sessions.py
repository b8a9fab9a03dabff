"""One controller per session: two programs must not steer one arm."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vla_adapter_hf.serving.errors import InvalidRequest, ServerBusy, SessionTaken


MAX_NAME = 128


class Sessions:
    """Which connection controls which session, and how many connections there are."""

    def __init__(self, max_connections: int) -> None:
        self.max_connections = max_connections
        self._controllers: dict[str, Controller] = {}
        self._connections = 0

    @contextmanager
    def connection(self) -> Iterator[Controller]:
        """A connection, for as long as it lasts; what it controls is free afterwards.

        Raises:
            ServerBusy: there are too many.
        """
        if self._connections >= self.max_connections:
            raise ServerBusy(f"{self._connections} connections are open already, which is the limit.")
        self._connections += 1
        controller = Controller(self)
        try:
            yield controller
        finally:
            self._connections -= 1
            controller.release()

    def claim(self, name: str, controller: Controller) -> None:
        """Raises SessionTaken if another connection controls the session."""
        if self._controllers.setdefault(name, controller) is not controller:
            raise SessionTaken(f"another connection controls the session {name!r}; close it first.")

    def release(self, name: str) -> None:
        del self._controllers[name]


class Controller:
    """One connection's claim. It controls one session at a time: the one that it named last."""

    def __init__(self, sessions: Sessions) -> None:
        self._sessions = sessions
        self.session: str | None = None

    def take(self, name: Any) -> None:
        """Control the session of this name; without a name nothing changes.

        Raises:
            InvalidRequest: the name is no string, or long.
            SessionTaken: another connection controls it.
        """
        if name is None or name == self.session:
            return
        if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME:
            raise InvalidRequest(f"session_id must be a string of 1...{MAX_NAME} characters.")
        self._sessions.claim(name, self)
        self.release()
        self.session = name

    def release(self) -> None:
        """Let go of the session."""
        if self.session is not None:
            self._sessions.release(self.session)
            self.session = None
