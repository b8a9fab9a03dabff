"""What an environment is to this package: a simulator, a benchmark or a real robot behind the same six names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
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


@dataclass
class EpisodeRecord:
    """What one finished episode left behind, in memory: used by rollouts and by the recorder.

    Attributes:
        steps: number of executed actions.
        success: whether the task was solved within the limit.
        queries: steps at which the policy was asked.
        latencies: seconds each query took, as the policy's caller saw them.
        frames: images kept for a rollout, if asked for: (step, image) pairs.
    """

    steps: int = 0
    success: bool = False
    queries: list[int] = field(default_factory=list)
    latencies: list[float] = field(default_factory=list)
    frames: list[tuple[int, np.ndarray]] = field(default_factory=list)
