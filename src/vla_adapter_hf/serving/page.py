"""The page at `/`: the last prediction, live, and a form to ask for one."""

from __future__ import annotations

import asyncio
import base64
import io
import time
from importlib.resources import files
from typing import Any

import numpy as np
from PIL import Image
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response

from vla_adapter_hf.serving.batching import Prediction
from vla_adapter_hf.serving.errors import InvalidRequest
from vla_adapter_hf.serving.example import example_observation
from vla_adapter_hf.serving.http import read_body
from vla_adapter_hf.serving.services import Services
from vla_adapter_hf.serving.wire import EncodedImage, from_base64, from_json
from vla_adapter_hf.utils.plotting import action_names


# Nothing is loaded from elsewhere, and no other page may show this one in a frame.
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
        "connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
NO_STORE = {"Cache-Control": "no-store"}


class Page:
    """The endpoints of the page.

    Args:
        services: of the server.
    """

    def __init__(self, services: Services) -> None:
        self.services = services
        self._html = files("vla_adapter_hf").joinpath("serving", "page.html").read_text(encoding="utf-8")
        self._seen: tuple[int, dict[str, Any]] | None = None
        self._drawing = asyncio.Lock()

    async def html(self, request: Request) -> Response:
        """The page itself."""
        return HTMLResponse(self._html, headers=HEADERS)

    async def metadata(self, request: Request) -> Response:
        """What the model is, as clients learn it on connecting."""
        return JSONResponse(self.services.policy.describe(), headers=NO_STORE)

    async def example(self, request: Request) -> Response:
        """An observation to fill the form with."""
        example = example_observation(self.services.policy.config)
        content = {
            "images": {name: data_url(image) for name, image in example.images.items()},
            "instruction": example.instruction,
            "state": example.state.tolist(),
        }
        return JSONResponse(content, headers=NO_STORE)

    async def latest(self, request: Request) -> Response:
        """The last prediction; 204 if there is none after the number `after`.

        It is drawn when a page asks for it, once for all pages, and never while observations wait.
        """
        after = request.query_params.get("after", "0")
        if not after.isascii() or not after.isdecimal() or len(after) > 18:
            raise InvalidRequest(f"after must be a number, got {after[:40]!r}.")
        async with self._drawing:
            latest = self.services.engine.latest
            if latest is None or latest[0] <= int(after):
                return Response(status_code=204)
            number, prediction = latest
            if self._seen is None or self._seen[0] != number:
                self._seen = number, await self._draw(prediction)
            return JSONResponse({"number": number, **self._seen[1]}, headers=NO_STORE)

    async def try_one(self, request: Request) -> Response:
        """A prediction for the form: `images` in base64 by camera, `instruction` and `state`."""
        body = await read_body(request, self.services)
        arrived = time.monotonic()
        with self.services.counting_observation("page", arrived):
            form = from_json(body, self.services.settings.max_frame_bytes)
            if not isinstance(form, dict) or not isinstance(form.get("images"), dict):
                raise InvalidRequest("images must be a map of pictures (PNG or JPEG in base64) by camera.")
            images = {name: EncodedImage(from_base64(data)) for name, data in form["images"].items()}
            prediction = await self.services.predict({**form, "images": images}, arrived)
        return JSONResponse(await self._draw(prediction), headers=NO_STORE)

    async def _draw(self, prediction: Prediction) -> dict[str, Any]:
        attention = None
        if self.services.engine.waiting == 0:
            attention = await self.services.engine.in_predict_thread(
                self.services.policy.attention_pictures, prediction.prepared
            )
        return await asyncio.to_thread(drawn, self.services.policy, prediction, attention)


def drawn(policy: Any, prediction: Prediction, attention: list[np.ndarray] | None) -> dict[str, Any]:
    """A prediction as JSON values, pictures as data URLs.

    Args:
        policy: whose prediction it is.
        prediction: what to show.
        attention: one uint8 `(height, width, 3)` picture per camera, or None.
    """
    observation, chunk = prediction.prepared.observation, prediction.chunk
    frames = policy.frames_as_seen(prediction.prepared)
    pictures = [None] * len(frames) if attention is None else [data_url(picture) for picture in attention]
    return {
        "instruction": observation.instruction,
        "state": np.asarray(observation.state, np.float64).tolist(),
        "cameras": [
            {"name": name, "frame": data_url(frame), "attention": picture}
            for name, frame, picture in zip(policy.config.cameras, frames, pictures, strict=True)
        ],
        "action_names": action_names(policy.config.action_dim, policy.config.action_names),
        "actions": chunk.actions.tolist(),
        "robot_actions": chunk.robot_actions.tolist(),
        "batch_size": prediction.batch_size,
        "clipped": chunk.clipped,
        "milliseconds": {stage: 1e3 * seconds for stage, seconds in prediction.seconds.items()},
        "age": observation.age_now(),
    }


def data_url(picture: np.ndarray) -> str:
    """A uint8 picture as a PNG in a `data:` address."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG", compress_level=1)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
