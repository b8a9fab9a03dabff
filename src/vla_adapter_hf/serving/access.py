"""Who may talk to the server: the API key, and no other website through a user's browser."""

from __future__ import annotations

import base64
import binascii
import hmac
from collections.abc import Awaitable, Callable
from urllib.parse import urlsplit

from starlette.requests import HTTPConnection
from starlette.responses import JSONResponse
from starlette.websockets import WebSocket

from vla_adapter_hf.serving.settings import API_KEY_VARIABLE


# Load balancers ask without a key. They learn nothing but that the server is up.
OPEN_PATHS = ("/healthz", "/health")
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")


class AccessControl:
    """ASGI middleware in front of every endpoint.

    The key is accepted as `Authorization: Api-Key <key>` (openpi), `Bearer <key>`, or `Basic` with any user and the
    key as password, which browsers and websocket addresses (`ws://user:key@host`) can give.

    Args:
        app: the application behind.
        api_key: the key, or None for no check.
        is_loopback: the server listens to this machine only. Then a request must also name it so: a website whose own
            name was pointed at 127.0.0.1 does not.
    """

    def __init__(self, app: Callable[..., Awaitable[None]], api_key: str | None, is_loopback: bool) -> None:
        self.app, self.is_loopback = app, is_loopback
        self._key = None if api_key is None else api_key.encode()

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        connection = HTTPConnection(scope)
        refusal = self._refusal(connection)
        if refusal is None:
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await WebSocket(scope, receive, send).send_denial_response(refusal)
        else:
            await refusal(scope, receive, send)

    def _refusal(self, connection: HTTPConnection) -> JSONResponse | None:
        host = _host_name(f"//{connection.headers.get('host', '')}")
        if self.is_loopback and host not in LOOPBACK_NAMES:
            return _refuse(403, "the Host header names another machine than this one.")
        origin = connection.headers.get("origin")
        if origin is not None and _netloc(origin) != connection.headers.get("host"):
            return _refuse(403, "requests from other websites are refused.")
        if self._key is None or connection.url.path in OPEN_PATHS:
            return None
        given = _given_key(connection.headers.get("authorization", ""))
        if hmac.compare_digest(given, self._key):  # in constant time
            return None
        response = _refuse(401, f"send the key that {API_KEY_VARIABLE} holds: Authorization: Api-Key <key>.")
        response.headers["WWW-Authenticate"] = 'Basic realm="vla-adapter: any user, the API key as password"'
        return response


def _refuse(status: int, message: str) -> JSONResponse:
    return JSONResponse({"type": "error", "kind": "refused", "message": message, "may_retry": False}, status)


def _host_name(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None


def _netloc(url: str) -> str | None:
    try:
        return urlsplit(url).netloc
    except ValueError:
        return None


def _given_key(header: str) -> bytes:
    scheme, _, value = header.partition(" ")
    value = value.strip()
    if scheme.lower() in ("api-key", "bearer"):
        return value.encode("utf-8", "replace")
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(value, validate=True).partition(b":")[2]
        except (binascii.Error, ValueError):
            return b""
    return b""
