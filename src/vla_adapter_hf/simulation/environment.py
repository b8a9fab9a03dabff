"""What an environment is to this package: a simulator, a benchmark or a real robot behind the same six names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np


@dataclass(frozen=True)
class Observation:
    """What the policy is given at one step.

    Attributes:
        images: one uint8 array of shape (height, width, 3) per camera, in the robot preset's camera order, upright as in
            the training data.
        state: (S,) float64, raw physical units: positions in metres, angles in radians.
    """

    images: tuple[np.ndarray, ...]
    state: np.ndarray


@runtime_checkable
class Environment(Protocol):
    """One task that can be attempted again and again.

    Actions are in the environment's own convention: the caller has un-normalised them and turned the gripper round
    (`RobotPreset.to_environment`).

    Where frames are costly, an environment may have an attribute `render`: while it is False nothing is rendered, and
    `observe` gives black frames and the true state. It is set before a reset, when nobody will look at the episode.
    """

    instruction: str
    """What the policy is told; known after `reset`."""
    step_limit: int
    """Steps after which an episode without success has failed."""

    def reset(self, episode: int) -> dict[str, Any]:
        """Begins an episode. The same number gives the same episode, whatever ran before it.

        Returns what was drawn for the episode (JSON values), for the record.
        """

    def observe(self) -> Observation:
        """The observation at the current step. After a `step(..., observe=False)` it may raise RuntimeError."""

    def step(self, action: np.ndarray, observe: bool = True) -> bool:
        """Executes one action of shape (A,) and returns whether the task is solved.

        `observe=False` promises that nobody will ask for the observation after this step, so no frame need be rendered.
        """

    def close(self) -> None:
        """Frees the simulator or lets go of the robot."""


@runtime_checkable
class Suite(Protocol):
    """A named set of tasks that can build its environments in any process; must be picklable."""

    name: str
    robot: str
    """The robot preset's name (`vla_adapter_hf.robots`), which knows the action convention."""

    @property
    def tasks(self) -> Sequence[str]:
        """The tasks' instructions; a task is named by its place in this list."""

    def make(self, task: int) -> Environment:
        """Builds the environment of one task."""

    def describe(self) -> dict[str, Any]:
        """The settings that decide what an episode is (JSON values): two runs with equal settings may be merged."""
