"""CALVIN's simulator, environment D."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from vla_adapter_hf.simulation.calvin.install import make_environment, make_oracle, quiet
from vla_adapter_hf.simulation.environment import Observation


STATIC_SIZE, GRIPPER_SIZE = 200, 84
SIZES = {"rgb_static": STATIC_SIZE, "rgb_gripper": GRIPPER_SIZE}


def calvin_observation(raw: Mapping[str, Any]) -> Observation:
    """CALVIN's observation as in the policy's training data: both frames unrotated, and eight of the robot's values.

    Args:
        raw: `rgb_obs` with `rgb_static` (200, 200, 3) and `rgb_gripper` (84, 84, 3), uint8; `robot_obs` (15,).

    Returns:
        The images in that order and the state (8,): position, Euler angles, gripper width, gripper command.

    Raises:
        ValueError: a missing entry or another shape or dtype.
    """
    images = []
    for name, size in SIZES.items():
        image = raw.get("rgb_obs", {}).get(name)
        if image is None or image.shape != (size, size, 3) or image.dtype != np.uint8:
            given = None if image is None else f"{image.dtype} {image.shape}"
            raise ValueError(f"rgb_obs[{name!r}] must be uint8 of shape ({size}, {size}, 3), got {given}")
        images.append(image)
    robot = np.asarray(raw.get("robot_obs", ()), dtype=np.float64)
    if robot.shape != (15,):
        raise ValueError(f"robot_obs must have shape (15,), got {robot.shape}")
    return Observation(tuple(images), np.concatenate([robot[:7], robot[-1:]]))


class CalvinSimulation:
    """CALVIN's own simulator. A step renders nothing; `observe` renders.

    Args:
        renderer: `egl`, as published, or `cpu`; see `install.make_environment`.

    Attributes:
        render: False renders nothing: `observe` then returns black frames and the true state.

    Raises:
        ImportError: CALVIN or a package that it needs is missing; the message names it.
        OSError: EGL is not there.
    """

    def __init__(self, renderer: str = "egl") -> None:
        self.environment = make_environment(renderer)
        self.oracle = make_oracle()
        self.render = True
        self._subtask, self._start = "", None

    def reset(self, initial_state: Mapping[str, Any]) -> None:
        """Sets robot and scene.

        Args:
            initial_state: `robot` (15,) and `scene` (24,).
        """
        # An episode must not depend on the one before: CALVIN's reset keeps contacts and the last gripper command.
        environment = self.environment
        environment.robot.gripper_action = 1
        environment.load()
        environment.reset(
            robot_obs=np.array(initial_state["robot"]), scene_obs=np.array(initial_state["scene"], dtype=np.float64)
        )

    def begin_subtask(self, subtask: str) -> None:
        """Success is judged from the present state on."""
        self._subtask, self._start = subtask, self.environment.get_info()

    def observe(self) -> Observation:
        """The frames and the state (8,) at this moment."""
        raw = self.environment.get_state_obs()
        if self.render:
            raw["rgb_obs"] = self.environment.get_camera_obs()[0]
        else:
            raw["rgb_obs"] = {name: np.zeros((size, size, 3), dtype=np.uint8) for name, size in SIZES.items()}
        return calvin_observation(raw)

    def step(self, action: np.ndarray) -> bool:
        """CALVIN's own step without its rendering: the action (7,), 1/30 s of physics, buttons and switches."""
        environment = self.environment
        environment.robot.apply_action(np.array(action, dtype=np.float64))
        for _ in range(environment.action_repeat):
            environment.p.stepSimulation(physicsClientId=environment.cid)
        environment.scene.step()
        return self._subtask in self.oracle.get_task_info_for_set(self._start, environment.get_info(), {self._subtask})

    def close(self) -> None:
        """Frees the simulator."""
        with quiet():
            self.environment.close()
        self.environment.close = lambda: None  # its destructor closes again, and prints
