"""openpi's websocket, and vLLM-Omni's, which is the same with sessions, a reset and errors as maps."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from starlette.websockets import WebSocket, WebSocketDisconnect

from vla_adapter_hf.serving.batching import Prediction
from vla_adapter_hf.serving.errors import InvalidRequest, ServingError
from vla_adapter_hf.serving.services import Services
from vla_adapter_hf.serving.sessions import Controller
from vla_adapter_hf.serving.wire import pack, unpack


INTERNAL_ERROR = 1011  # the code with which openpi closes after an error


class OpenpiEndpoint:
    """Metadata on connecting; then an observation in, a chunk out.

    Args:
        services: of the server.
        errors_as_maps: an error is a map and the connection stays open (vLLM-Omni). Otherwise it is a text and the
            connection is closed (openpi).
    """

    def __init__(self, services: Services, errors_as_maps: bool) -> None:
        self.services, self.errors_as_maps = services, errors_as_maps
        self.protocol = "vllm-omni" if errors_as_maps else "openpi"

    async def __call__(self, websocket: WebSocket) -> None:
        try:
            with self.services.sessions.connection() as controller, self.services.connected(self.protocol):
                await websocket.accept()
                await websocket.send_bytes(pack(self.services.policy.describe()))
                await self._answer_all(websocket, controller)
        except WebSocketDisconnect:
            pass

    async def _answer_all(self, websocket: WebSocket, controller: Controller) -> None:
        previous_ms: float | None = None
        while (message := await websocket.receive())["type"] != "websocket.disconnect":
            arrived = time.monotonic()
            try:
                with self.services.engine.answering():
                    reply = await self._reply(message, controller, arrived, previous_ms)
                    await websocket.send_bytes(reply)
            except ServingError as error:
                if not self.errors_as_maps:
                    await websocket.send_text(f"{error.kind}: {error}")
                    await websocket.close(INTERNAL_ERROR)
                    return
                await websocket.send_bytes(pack(error.as_dict()))
            previous_ms = 1e3 * (time.monotonic() - arrived)

    async def _reply(
        self, message: dict[str, Any], controller: Controller, arrived: float, previous_ms: float | None
    ) -> bytes:
        services = self.services
        with services.counting_errors(self.protocol):
            data = message.get("bytes")
            if data is None:
                raise InvalidRequest("a message must be binary msgpack, got text.")
            with services.timed("decode"):
                request = unpack(data, services.settings.max_frame_bytes)
            if not isinstance(request, dict):
                raise InvalidRequest(f"a message must be a map, got {type(request).__name__}.")
            controller.take(request.get("session_id"))
            endpoint = request.get("endpoint", "infer")
            if endpoint == "reset":  # the policy keeps nothing between observations
                return pack({"status": "reset successful"})
            if endpoint != "infer":
                raise InvalidRequest(f"endpoint must be infer or reset, got {str(endpoint)[:40]!r}.")
            with services.counting_observation(self.protocol, arrived):
                prediction = await services.predict(request, arrived)
                with services.timed("encode"):
                    return pack(reply_of(prediction, previous_ms))


def reply_of(prediction: Prediction, previous_ms: float | None) -> dict[str, Any]:
    """openpi's reply: `actions` `(chunk_size, action_dim)` in the robot's convention, float32, and times in ms."""
    observation, seconds = prediction.prepared.observation, prediction.seconds
    timing = {f"{stage}_ms": 1e3 * value for stage, value in seconds.items()}
    timing["infer_ms"] = sum(timing.values())
    if previous_ms is not None:
        timing["prev_total_ms"] = previous_ms
    reply = {
        "actions": prediction.chunk.robot_actions.astype(np.float32),
        "server_timing": timing,
        "policy_timing": {"infer_ms": 1e3 * seconds["predict"]},
        "batch_size": prediction.batch_size,
        "clipped": prediction.chunk.clipped,
        "age_ms": 1e3 * observation.age_now(),
    }
    if observation.request_id is not None:
        reply["request_id"] = observation.request_id
    return reply
