"""What clients send, in the names of several protocols, to one observation of the model."""

from __future__ import annotations

import io
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from vla_adapter_hf.serving.errors import InvalidRequest, ObservationTooOld, TooLarge
from vla_adapter_hf.serving.wire import EncodedImage
from vla_adapter_hf.utils.frames import decode_frame


# Prefixes that clients put before the names of cameras and of the state: openpi's and LeRobot's.
PREFIXES = ("observation/", "observation.images.", "observation.")
# Names for the same view in openpi's LIBERO, ALOHA and DROID clients, OpenVLA-OFT's, vla-eval's, and our presets.
# Only views of one row stand in for each other, and only where nothing else could be meant.
SAME_VIEW = (
    ("image", "full_image", "primary", "agentview", "rgb_static", "cam_high", "exterior_image_1_left", "base_0_rgb"),
    ("wrist_image", "wrist", "rgb_gripper", "wrist_image_left"),
    ("left_wrist", "left_wrist_image", "cam_left_wrist", "left_wrist_0_rgb"),
    ("right_wrist", "right_wrist_image", "cam_right_wrist", "right_wrist_0_rgb"),
)
FRAME_SHAPE = "(height, width, 3)"
INSTRUCTION_KEYS = ("prompt", "task", "instruction", "task_description")
STATE_KEYS = ("state", "states")
JOINTS, GRIPPER = "joint_position", "gripper_position"  # DROID's state, in two parts
MAX_INSTRUCTION = 500
# Resizing takes time with a frame's longest side, whatever its bytes: 10 s for a line of 200 000 pixels.
MAX_SIDE = 4096
# Clocks of two machines differ; a timestamp from the future by more than this is refused.
CLOCK_TOLERANCE = 1.0


@dataclass(frozen=True)
class Observation:
    """One observation as a client sent it.

    Attributes:
        frames: one per camera, in the model's order: uint8 arrays, float arrays in 0...1, or encoded images.
        instruction: the task, in words.
        state: `(proprio_dim,)` in physical units.
        arrived: when the message came, by `time.monotonic()`.
        age: seconds that the observation was old then; 0 where the client does not say.
        request_id: the client's own number, which the answer repeats.
    """

    frames: tuple[np.ndarray | EncodedImage, ...]
    instruction: str
    state: Any
    arrived: float
    age: float = 0.0
    request_id: Any = None

    def age_now(self) -> float:
        """Seconds since the observation was taken."""
        return self.age + time.monotonic() - self.arrived

    def check_age(self, limit: float | None) -> None:
        """Raises ObservationTooOld past the limit (seconds)."""
        if limit is not None and self.age_now() > limit:
            raise ObservationTooOld(f"the observation is {self.age_now():.3f} s old; the limit is {limit:g} s.")


class ObservationReader:
    """Finds frames, state and instruction in a client's message.

    Args:
        cameras: the checkpoint's cameras, in order.
        state_dim: size of the state.
        renames: the client's name of a camera -> the checkpoint's name.
        unnorm_key: the statistics of the answers. A client that names others is refused.

    Raises:
        ValueError: a rename leads to a camera that the checkpoint does not have, or two lead to the same.
    """

    def __init__(
        self,
        cameras: Sequence[str],
        state_dim: int,
        renames: Mapping[str, str] | None = None,
        unnorm_key: str | None = None,
    ) -> None:
        self.cameras, self.state_dim, self.unnorm_key = tuple(cameras), state_dim, unnorm_key
        self.renames = dict(renames or {})
        unknown = sorted(set(self.renames.values()) - set(cameras))
        if unknown:
            raise ValueError(f"--camera: the checkpoint has no camera {', '.join(unknown)}; it has {list(cameras)}.")
        if len(set(self.renames.values())) != len(self.renames):
            raise ValueError(f"--camera: two names lead to the same camera: {self.renames}.")

    def read(self, message: Any, arrived: float) -> Observation:
        """The observation of a decoded message.

        Raises:
            InvalidRequest: something is missing, ambiguous or of the wrong kind; the message names it.
        """
        if not isinstance(message, dict) or not all(isinstance(key, str) for key in message):
            raise InvalidRequest(f"an observation must be a map with names as keys, got {type(message).__name__}.")
        message = _with_plain_names(message)
        request_id = message.get("request_id")
        if request_id is not None and not (isinstance(request_id, (int, str)) and len(str(request_id)) <= 64):
            raise InvalidRequest("request_id must be a number or a string of at most 64 characters.")
        key = message.get("unnorm_key")
        if key is not None and self.unnorm_key is not None and key != self.unnorm_key:
            raise InvalidRequest(f"unnorm_key is {str(key)[:40]!r}; this server's statistics are {self.unnorm_key!r}.")
        return Observation(
            frames=self._frames(message),
            instruction=_instruction(message),
            state=self._check_state(_state(message)),
            arrived=arrived,
            age=_age(message),
            request_id=request_id,
        )

    def _check_state(self, state: np.ndarray) -> np.ndarray:
        if state.shape != (self.state_dim,):
            raise InvalidRequest(f"state must be a list of {self.state_dim} numbers, got shape {state.shape}.")
        if not np.isfinite(state).all():
            raise InvalidRequest(f"state holds values that are not finite: {state.tolist()}.")
        return state

    def _frames(self, message: dict[str, Any]) -> tuple[Any, ...]:
        sent = {name: value for name, value in message.items() if _is_frame(value)}
        images = message.get("images")
        if images is not None:
            if not isinstance(images, dict) or not all(isinstance(name, str) for name in images):
                raise InvalidRequest(f"images must be a map of frames by camera, got {type(images).__name__}.")
            for name, frame in images.items():
                if not _is_frame(frame):
                    raise InvalidRequest(f"images[{name[:40]!r}] must be a frame {FRAME_SHAPE}, got {_kind(frame)}.")
            images = _with_plain_names(images)
            twice = sorted(sent.keys() & images.keys())
            if twice:
                raise InvalidRequest(f"the observation and its images both have {twice[0][:40]!r}; send one frame.")
            sent |= images
        found = {self.renames[name]: frame for name, frame in sent.items() if name in self.renames}
        rest = {name: frame for name, frame in sent.items() if name not in self.renames}
        lacking = {name: value for name, value in message.items() if name not in sent and self._names_a_camera(name)}
        return tuple(
            found[camera] if camera in found else self._find(camera, rest, sent, lacking) for camera in self.cameras
        )

    def _names_a_camera(self, name: str) -> bool:
        return name in self.cameras or name in self.renames or any(name in row for row in SAME_VIEW)

    def _find(self, camera: str, candidates: dict[str, Any], sent: dict[str, Any], lacking: dict[str, Any]) -> Any:
        if camera in candidates:
            return candidates[camera]
        views = next((row for row in SAME_VIEW if camera in row), ())
        matches = [name for name in candidates if name in views and name not in self.cameras]
        # Two of the checkpoint's cameras in one row: which of them is meant cannot be known.
        if len(matches) == 1 and sum(name in views for name in self.cameras) == 1:
            return candidates[matches[0]]
        others = "".join(f" {name!r} is {_kind(value)}, no frame {FRAME_SHAPE}." for name, value in lacking.items())
        raise InvalidRequest(
            f"no frame for the camera {camera!r}: the model needs {list(self.cameras)}, the observation has "
            f"{sorted(name[:40] for name in sent)[:10]}. Send the model's names, or start the server with "
            f"--camera theirs={camera}.{others}"
        )


def _with_plain_names(message: dict[str, Any]) -> dict[str, Any]:
    """The entries without the protocols' prefixes; an entry of None is as one that is not there.

    Raises:
        InvalidRequest: two entries have the same name then.
    """
    given: dict[str, str] = {}
    for key, value in message.items():
        name = _without_prefix(key)
        if value is not None and given.setdefault(name, key) != key:
            raise InvalidRequest(f"{given[name][:40]} and {key[:40]} are the same entry; send one.")
    return {name: message[key] for name, key in given.items()}


def _without_prefix(key: str) -> str:
    for prefix in PREFIXES:
        if key.startswith(prefix):
            return key[len(prefix) :]
    return key


def _is_frame(value: Any) -> bool:
    return isinstance(value, EncodedImage) or (isinstance(value, np.ndarray) and value.ndim == 3)


def _kind(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"an array of shape {value.shape}"
    return "a string" if isinstance(value, str) else f"of type {type(value).__name__}"


def _instruction(message: dict[str, Any]) -> str:
    given = {key: message[key] for key in INSTRUCTION_KEYS if message.get(key) is not None}
    if not given:
        raise InvalidRequest(f"the instruction is missing; send it as {' or '.join(INSTRUCTION_KEYS)}.")
    for key, text in given.items():
        if not isinstance(text, str):
            raise InvalidRequest(f"{key} must be a string, got {type(text).__name__}.")
        if len(text) > MAX_INSTRUCTION:
            raise InvalidRequest(f"{key} has {len(text)} characters; the limit is {MAX_INSTRUCTION}.")
    if len(set(given.values())) > 1:
        raise InvalidRequest(f"{' and '.join(given)} hold different instructions; send one.")
    return next(iter(given.values()))


def _state(message: dict[str, Any]) -> np.ndarray:
    given = {key: message[key] for key in STATE_KEYS if message.get(key) is not None}
    if len(given) > 1:
        raise InvalidRequest(f"the observation has {' and '.join(given)}; send one state.")
    if not given and JOINTS in message and GRIPPER in message:
        parts = [np.atleast_1d(_numbers(name, message[name])) for name in (JOINTS, GRIPPER)]
        if any(part.ndim != 1 for part in parts):
            raise InvalidRequest(f"{JOINTS} and {GRIPPER} must be lists of numbers.")
        return np.concatenate(parts)
    if not given:
        raise InvalidRequest(f"the state is missing; send it as state, or as {JOINTS} and {GRIPPER}.")
    ((key, value),) = given.items()
    return _numbers(key, value)


def _numbers(name: str, value: Any) -> np.ndarray:
    """float64; an array of float16 has lost digits already and is refused."""
    if isinstance(value, np.ndarray):
        if value.dtype.kind not in "iuf" or value.dtype == np.float16:
            raise InvalidRequest(f"{name} must be float32 or float64, got {value.dtype}.")
        return value.astype(np.float64)
    parts = value if isinstance(value, (list, tuple)) else [value]
    if not all(isinstance(part, (int, float)) and not isinstance(part, bool) for part in parts):
        raise InvalidRequest(f"{name} must be a list of numbers.")
    try:
        return np.asarray(value, np.float64)
    except (OverflowError, ValueError) as error:
        raise InvalidRequest(f"{name} must be a list of numbers: {error}") from error


def _age(message: dict[str, Any]) -> float:
    """Seconds, from `age` (by the client's own clock) or `timestamp` (seconds since 1970)."""
    age, timestamp = message.get("age"), message.get("timestamp")
    for name, value in (("age", age), ("timestamp", timestamp)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise InvalidRequest(f"{name} must be a number of seconds, got {type(value).__name__}.")
    try:
        known = [float(age)] if age is not None else []
        known += [time.time() - float(timestamp)] if timestamp is not None else []
    except OverflowError as error:
        raise InvalidRequest(f"age and timestamp must be numbers of seconds: {error}") from error
    oldest = max(known, default=0.0)
    if not all(np.isfinite(known)) or any(value < -CLOCK_TOLERANCE for value in known):
        raise InvalidRequest(
            "the observation is from the future or not finite: age must be seconds of at least 0, timestamp seconds "
            "since 1970 by a clock that agrees with the server's."
        )
    return max(oldest, 0.0)


def decode_image(image: np.ndarray | EncodedImage, camera: str, max_frame_bytes: int) -> np.ndarray:
    """A camera's frame as an array. Sizes are checked before anything is decoded.

    Raises:
        InvalidRequest: the image is broken.
        TooLarge: decoded, it is over `max_frame_bytes`, or a side is over `MAX_SIDE`.
    """
    if isinstance(image, np.ndarray):
        check_sides(image.shape, camera)
        return image
    try:
        with Image.open(io.BytesIO(image.data), formats=("PNG", "JPEG")) as opened:
            width, height = opened.size
        check_sides((width, height), camera)
        if 3 * width * height > max_frame_bytes:
            raise TooLarge(
                f"the frame of {camera!r}, {width} x {height} pixels, is over the limit of {max_frame_bytes} bytes."
            )
        return decode_frame(image.data)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InvalidRequest(
            f"the frame of {camera!r} cannot be decoded: it is no PNG or JPEG, or damaged."
        ) from error


def check_sides(shape: tuple[int, ...], camera: str) -> None:
    """Raises TooLarge for a frame with a side that is too long."""
    if max(shape, default=0) > MAX_SIDE:
        raise TooLarge(f"the frame of {camera!r} has a side of {max(shape)} pixels; the limit is {MAX_SIDE}.")


def pad_to_square(frame: np.ndarray) -> np.ndarray:
    """Black borders around a frame (height, width, 3), so that resizing it does not squeeze it."""
    height, width = frame.shape[:2]
    size = max(height, width)
    if height == width:
        return frame
    top, left = (size - height) // 2, (size - width) // 2
    padded = np.zeros((size, size, frame.shape[2]), frame.dtype)
    padded[top : top + height, left : left + width] = frame
    return padded
