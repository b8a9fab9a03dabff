"""A LIBERO task as a robot with LeRobot's methods, for the loop that moves an arm."""

from __future__ import annotations

from typing import Any

import numpy as np

from vla_adapter_hf.robots import get_robot
from vla_adapter_hf.simulation.libero.suite import LiberoEnvironment


class LiberoRobot:
    """One episode of a LIBERO task. A frame is rendered when an observation is asked for, and not otherwise.

    Args:
        environment: the task.
        episode: which episode begins when the robot is connected.

    Attributes:
        is_solved: whether the task has been solved.
    """

    def __init__(self, environment: LiberoEnvironment, episode: int) -> None:
        preset = get_robot("libero")
        size = environment.suite.image_size
        self.environment, self.episode, self.is_solved = environment, episode, False
        self._state_names = [f"state.{index}" for index in range(preset.state_dim)]
        self._cameras = preset.cameras
        self.observation_features: dict[str, Any] = dict.fromkeys(self._state_names, float)
        self.observation_features |= dict.fromkeys(self._cameras, (size, size, 3))
        self.action_features: dict[str, Any] = {f"action.{index}": float for index in range(preset.action_dim)}

    def connect(self) -> None:
        """Reset to the episode."""
        self.environment.reset(self.episode)

    def get_observation(self) -> dict[str, Any]:
        """The state's values and a frame of each camera, of this moment."""
        observation = self.environment.look()
        values = dict(zip(self._state_names, map(float, observation.state), strict=True))
        return values | dict(zip(self._cameras, observation.images, strict=True))

    def send_action(self, action: dict[str, Any]) -> dict[str, Any]:
        """One control step of 0.05 s."""
        solved = self.environment.step(np.array([action[name] for name in self.action_features]), observe=False)
        self.is_solved = self.is_solved or solved
        return action

    def disconnect(self) -> None:
        """Nothing: the environment is closed by its owner."""
