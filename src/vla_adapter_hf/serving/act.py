"""`POST /act`, as OpenVLA-OFT's and VLA-Adapter's clients call it."""

from __future__ import annotations

import json
import time

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from vla_adapter_hf.serving.errors import InvalidRequest
from vla_adapter_hf.serving.http import read_body
from vla_adapter_hf.serving.services import Services
from vla_adapter_hf.serving.wire import from_json


class ActEndpoint:
    """An observation in JSON with json_numpy's arrays in, a list of actions in physical units out.

    The body is the observation, or `{"encoded": "<the observation as a string>"}`. The second form is answered with a
    string that holds the JSON, as those clients expect. These clients turn the gripper into the robot's convention
    themselves, so the actions are those of `predict_action`.
    """

    def __init__(self, services: Services) -> None:
        self.services = services

    async def __call__(self, request: Request) -> Response:
        services = self.services
        body = await read_body(request, services)
        arrived = time.monotonic()
        with services.counting_observation("act", arrived):
            with services.timed("decode"):
                observation = from_json(body, services.settings.max_frame_bytes)
                is_encoded = isinstance(observation, dict) and "encoded" in observation
                if is_encoded:
                    if len(observation) != 1 or not isinstance(observation["encoded"], str):
                        raise InvalidRequest("encoded must be the only entry, and a string.")
                    observation = from_json(observation["encoded"], services.settings.max_frame_bytes)
            prediction = await services.predict(observation, arrived)
            with services.timed("encode"):
                actions = prediction.chunk.actions.tolist()
                return JSONResponse(json.dumps(actions) if is_encoded else actions)
