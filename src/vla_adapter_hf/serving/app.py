"""The web application: every endpoint behind the access control."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket

from vla_adapter_hf.serving.access import AccessControl
from vla_adapter_hf.serving.act import ActEndpoint
from vla_adapter_hf.serving.errors import ServingError
from vla_adapter_hf.serving.http import answering
from vla_adapter_hf.serving.openpi import OpenpiEndpoint
from vla_adapter_hf.serving.page import Page
from vla_adapter_hf.serving.services import Services
from vla_adapter_hf.serving.vla_eval import VlaEvalEndpoint


VLLM_OMNI_PATH = "/v1/realtime/robot/openpi"
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def build_app(services: Services, api_key: str | None) -> Starlette:
    """The application of one server. It warms the model up before it takes requests.

    Args:
        services: of the server.
        api_key: what clients must give, or None.
    """
    page = Page(services)

    async def health(request: Request) -> Response:
        return PlainTextResponse("stopping", 503) if services.engine.is_stopping else PlainTextResponse("OK")

    async def health_json(request: Request) -> Response:  # vla-eval's
        return JSONResponse({"status": "ok"}, 503 if services.engine.is_stopping else 200)

    async def metrics(request: Request) -> Response:
        return Response(services.metrics.text(), media_type=METRICS_TYPE)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        await services.engine.start()
        yield
        await services.engine.stop()

    return Starlette(
        routes=[
            WebSocketRoute("/", _refusing(OpenpiEndpoint(services, errors_as_maps=False))),
            WebSocketRoute(VLLM_OMNI_PATH, _refusing(OpenpiEndpoint(services, errors_as_maps=True))),
            WebSocketRoute("/vla-eval", _refusing(VlaEvalEndpoint(services))),
            Route("/act", answering(services, "act", ActEndpoint(services)), methods=["POST"]),
            Route("/healthz", health),
            Route("/health", health_json),
            Route("/metrics", metrics),
            Route("/", page.html),
            Route("/metadata", page.metadata),
            Route("/example", page.example),
            Route("/latest", answering(services, "page", page.latest)),
            Route("/try", answering(services, "page", page.try_one), methods=["POST"]),
        ],
        middleware=[Middleware(AccessControl, api_key=api_key, is_loopback=services.settings.is_loopback)],
        lifespan=lifespan,
    )


def _refusing(endpoint):
    """A websocket that cannot be served gets an HTTP error instead of a connection."""

    async def serve(websocket: WebSocket) -> None:
        try:
            await endpoint(websocket)
        except ServingError as error:
            await websocket.send_denial_response(JSONResponse(error.as_dict(), error.status))

    return serve
