"""Between a robot's named values and the model's arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np


@runtime_checkable
class Robot(Protocol):
    """A robot with LeRobot's method names, so that LeRobot's robots fit as they are."""

    observation_features: dict[str, Any]
    """Name of each value of an observation: `float` for a number, a shape `(height, width, 3)` for a camera."""
    action_features: dict[str, Any]
    """Name of each value of an action, in the order of the action's dimensions."""

    def connect(self) -> None:
        """Open the connection and prepare the arm to move."""

    def get_observation(self) -> dict[str, Any]:
        """The numbers and the camera frames (uint8 RGB) of this moment, by name."""

    def send_action(self, action: dict[str, Any]) -> dict[str, Any]:
        """Send one action; returns what was really sent, after the robot's own limits."""

    def disconnect(self) -> None:
        """Let go of the robot."""


class RobotInterface:
    """Reads observations of a robot as the model takes them, and writes actions as the robot takes them.

    Args:
        robot: the robot.
        cameras: names of the model's cameras, in its order; or a map from each to the robot's name, where that is
            another. A robot's camera may also have a longer name that ends in `.name`.
        state_names: names of the state's values in the model's order; by default all numbers of an observation, in the
            robot's order.
        action_names: names of the action's values in the model's order; by default those of the robot, in its order.

    Raises:
        ValueError: the robot has no camera or value of a name; the message lists those that it has.
    """

    def __init__(
        self,
        robot: Robot,
        cameras: Sequence[str] | Mapping[str, str],
        state_names: Sequence[str] | None = None,
        action_names: Sequence[str] | None = None,
    ) -> None:
        self.robot = robot
        frames = [name for name, kind in robot.observation_features.items() if isinstance(kind, tuple)]
        numbers = [name for name in robot.observation_features if name not in frames]
        named = cameras if isinstance(cameras, Mapping) else {camera: camera for camera in cameras}
        self.cameras = {camera: _find("camera", name, frames) for camera, name in named.items()}
        self.state_names = numbers if state_names is None else [_find("state", name, numbers) for name in state_names]
        known = list(robot.action_features)
        self.action_names = known if action_names is None else [_find("action", name, known) for name in action_names]

    def check_fits(self, cameras: Sequence[str], state_dim: int, action_dim: int) -> None:
        """Refuse a robot without one of the policy's cameras, or with a state or an action of another size.

        Raises:
            ValueError: the message names the camera, or has both sizes and the robot's names.
        """
        missing = [camera for camera in cameras if camera not in self.cameras]
        if missing:
            raise ValueError(
                f"the policy sees {', '.join(cameras)}, and the interface gives {', '.join(self.cameras) or 'none'}; "
                f"add {', '.join(missing)} to its cameras"
            )
        for what, names, expected in (
            ("state", self.state_names, state_dim),
            ("action", self.action_names, action_dim),
        ):
            if len(names) != expected:
                raise ValueError(
                    f"the policy has a {what} of {expected} values, the robot has {len(names)}: {', '.join(names)}. "
                    f"Give {what}_names=[...] in the policy's order, or a policy for this robot"
                )

    def read(self) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """The frames by the model's camera names, uint8 (height, width, 3), and the state (S,) float64.

        Frames are copies: a camera may write its next frame into the same memory.

        Raises:
            ValueError: a frame or a number is missing, a number is not finite, or a frame is no uint8 RGB image.
        """
        observation = self.robot.get_observation()
        missing = [name for name in (*self.cameras.values(), *self.state_names) if name not in observation]
        if missing:
            raise ValueError(f"the robot's observation lacks {', '.join(missing)}")
        frames = {}
        for camera, name in self.cameras.items():
            frame = np.array(observation[name])
            if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
                raise ValueError(
                    f"camera {name!r} must give uint8 RGB frames (height, width, 3), got {frame.dtype} {frame.shape}"
                )
            frames[camera] = frame
        state = np.array([float(observation[name]) for name in self.state_names])
        if not np.isfinite(state).all():
            wrong = [name for name, value in zip(self.state_names, state, strict=True) if not np.isfinite(value)]
            raise ValueError(f"the robot's state is not finite: {', '.join(wrong)}")
        return frames, state

    def write(self, action: np.ndarray) -> np.ndarray:
        """Send an action (A,). Returns what was really sent: the robot's values by name, or else this action."""
        named = {name: float(value) for name, value in zip(self.action_names, action, strict=True)}
        answer = self.robot.send_action(named)
        # The motion has been sent: an answer of another kind must not end the loop now.
        sent = {**named, **answer} if isinstance(answer, Mapping) else named
        return np.array([float(sent[name]) for name in self.action_names])


def _find(what: str, name: str, names: Sequence[str]) -> str:
    if name in names:
        return name
    longer = [candidate for candidate in names if candidate.replace("/", ".").endswith(f".{name}")]
    if len(longer) == 1:
        return longer[0]
    advice = ""
    if what == "camera":
        advice = f". Say which is which: RobotInterface(robot, {{{name!r}: the robot's name, ...}})"
    raise ValueError(f"the robot has no {what} {name!r}; it has {', '.join(names) or 'none'}{advice}")
