"""vla-eval's protocol: the harness of allenai connects here as to one of its own model servers.

Its benchmarks take one action per observation, so each connection keeps the rest of its chunk. The rest is dropped
when an episode starts or ends, when a benchmark restarts inside an episode, and when the instruction changes.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from starlette.websockets import WebSocket, WebSocketDisconnect

from vla_adapter_hf._version import __version__
from vla_adapter_hf.serving.errors import InvalidRequest, ServingError
from vla_adapter_hf.serving.services import Services
from vla_adapter_hf.serving.wire import pack, unpack


PROTOCOL_VERSION = 1
PROTOCOL = "vla-eval"
LANGUAGE = {"name": "language", "dims": 0, "format": "language"}
# The harness' names for the rotations and grippers of our robots; it warns where a benchmark has others.
ACTION_FORMATS = {"libero": ("axis_angle", "binary_close_positive"), "calvin": ("euler_xyz", "binary_close_negative")}
# From a robot's units to the benchmark's. CALVIN's actions are in -1...1, and its simulator makes 2 cm and 0.05 rad of
# a 1. vla-eval's benchmark leaves that step out: it adds what it gets to the pose, in metres and radians.
ACTION_UNITS = {"calvin": np.array([0.02] * 3 + [0.05] * 3 + [1.0])}
# LIBERO's state as the models were trained on it: the angle of a rotation runs up to 2 pi.
OBSERVATION_PARAMETERS = {"libero": {"quat_no_antipodal": True}}


@dataclass
class _RestOfChunk:
    """What a connection has not been sent yet, and the instruction that it was predicted for."""

    actions: deque[np.ndarray] = field(default_factory=deque)
    instruction: str | None = None


class VlaEvalEndpoint:
    """Answers `hello`, `episode_start`, `observation` and `episode_end`."""

    def __init__(self, services: Services) -> None:
        self.services = services

    async def __call__(self, websocket: WebSocket) -> None:
        try:
            with self.services.sessions.connection(), self.services.connected(PROTOCOL):
                await websocket.accept()
                await self._answer_all(websocket)
        except WebSocketDisconnect:
            pass

    async def _answer_all(self, websocket: WebSocket) -> None:
        chunk = _RestOfChunk()
        while (message := await websocket.receive())["type"] != "websocket.disconnect":
            arrived, seq, reply = time.monotonic(), 0, None
            try:
                with self.services.engine.answering():
                    with self.services.counting_errors(PROTOCOL):
                        kind, payload, seq = self._read(message)
                        if kind == "hello":
                            reply = self.hello()
                        elif kind == "observation":
                            with self.services.counting_observation(PROTOCOL, arrived):
                                kind, reply = "action", {"actions": await self._action(payload, arrived, chunk)}
                        else:  # an episode starts or ends: what is left of the chunk belongs to the one before
                            chunk.actions.clear()
                    if reply is not None:
                        await websocket.send_bytes(_message(kind, reply, seq))
            except ServingError as error:
                chunk.actions.clear()
                await websocket.send_bytes(_message("error", {**error.as_dict(), "error": str(error)}, seq))

    async def _action(self, payload: dict[str, Any], arrived: float, chunk: _RestOfChunk) -> np.ndarray:
        """The next action of the chunk, `(action_dim,)`. A new task, or nothing left, gets a new chunk."""
        observation = self.services.reader.read(payload, arrived)
        if payload.get("episode_restart") or observation.instruction != chunk.instruction:
            chunk.actions.clear()
        if not chunk.actions:
            prediction = await self.services.engine.predict(observation)
            chunk.instruction = observation.instruction
            chunk.actions.extend(self.in_benchmark_units(prediction.chunk.robot_actions))
        return chunk.actions.popleft()

    def _read(self, message: dict[str, Any]) -> tuple[str, dict[str, Any], int]:
        data = message.get("bytes")
        if data is None:
            raise InvalidRequest("a message must be binary msgpack, got text.")
        with self.services.timed("decode"):
            request = unpack(data, self.services.settings.max_frame_bytes)
        if not isinstance(request, dict):
            raise InvalidRequest(f"a message must be a map, got {type(request).__name__}.")
        kind, payload, seq = request.get("type"), request.get("payload"), request.get("seq")
        if kind not in ("hello", "observation", "episode_start", "episode_end", "error"):
            raise InvalidRequest(f"type must be one of vla-eval's messages, got {str(kind)[:40]!r}.")
        if not isinstance(payload, dict):
            raise InvalidRequest(f"payload must be a map, got {type(payload).__name__}.")
        if isinstance(seq, bool) or not isinstance(seq, int):
            raise InvalidRequest(f"seq must be a number, got {type(seq).__name__}.")
        return kind, payload, seq

    def in_benchmark_units(self, actions: np.ndarray) -> np.ndarray:
        """The robot's actions `(chunk_size, action_dim)` in the units of vla-eval's benchmark, float32."""
        robot = self.services.policy.rules.robot
        units = 1.0 if robot is None else ACTION_UNITS.get(robot.name, 1.0)
        return (actions * units).astype(np.float32)

    def hello(self) -> dict[str, Any]:
        """Who answers, what a benchmark must send, and how the actions are to be understood."""
        config, robot = self.services.policy.config, self.services.policy.rules.robot
        name = None if robot is None else robot.name
        payload = {
            "harness_version": f"vla-adapter-hf {__version__}",
            "protocol_version": PROTOCOL_VERSION,
            "model_server": "vla-adapter",
            "capabilities": {},
            "observation_params": {
                "send_state": True,
                **({"send_wrist_image": True} if config.num_cameras > 1 else {}),
                **OBSERVATION_PARAMETERS.get(name or "", {}),
            },
        }
        if name in ACTION_FORMATS:
            rotation, gripper = ACTION_FORMATS[name]
            payload["action_spec"] = {
                "position": {"name": "position", "dims": 3, "format": "delta_xyz", "range": [-1, 1]},
                "rotation": {"name": "rotation", "dims": 3, "format": rotation, "range": [-3.15, 3.15]},
                "gripper": {"name": "gripper", "dims": 1, "format": gripper, "range": [-1, 1]},
            }
            payload["observation_spec"] = {"language": LANGUAGE}
        return payload


def _message(kind: str, payload: dict[str, Any], seq: int) -> bytes:
    return pack({"type": kind, "payload": payload, "seq": seq, "timestamp": time.time()}, keys_as_bytes=False)
