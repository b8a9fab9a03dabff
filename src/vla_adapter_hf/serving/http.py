"""Bodies of HTTP requests within limits, and errors with a status."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from vla_adapter_hf.serving.errors import InvalidRequest, ServingError, TookTooLong, TooLarge
from vla_adapter_hf.serving.services import Services


async def read_body(request: Request, services: Services) -> bytes:
    """The body of a request.

    Raises:
        TooLarge: over the limit of a message.
        TookTooLong: it did not arrive within the limit of seconds.
    """
    limit = services.settings.max_message_bytes

    async def read() -> bytes:
        parts, size = [], 0
        async for part in request.stream():
            size += len(part)
            if size > limit:
                raise TooLarge(f"the body is over the limit of {limit} bytes.")
            parts.append(part)
        return b"".join(parts)

    try:
        return await asyncio.wait_for(read(), services.settings.max_seconds)
    except asyncio.TimeoutError as error:
        raise TookTooLong(f"the body did not arrive within {services.settings.max_seconds:g} s.") from error
    except ClientDisconnect as error:
        raise InvalidRequest("the client went away before its body had arrived.") from error


def answering(
    services: Services, protocol: str, answer: Callable[[Request], Awaitable[Response]]
) -> Callable[[Request], Awaitable[Response]]:
    """An endpoint that counts its errors and answers them as JSON with a status of 4xx or 5xx."""

    async def endpoint(request: Request) -> Response:
        try:
            with services.engine.answering(), services.counting_errors(protocol):
                return await answer(request)
        except ServingError as error:
            headers = {"Retry-After": "1"} if error.may_retry else None
            return JSONResponse({**error.as_dict(), "error": str(error)}, error.status, headers)

    return endpoint
