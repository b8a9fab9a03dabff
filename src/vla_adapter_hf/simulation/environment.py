"""The environment protocol: a simulator, a benchmark or a real robot with the same six names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np


@dataclass(frozen=True)
class Observation:
    """Input of the policy at one step.

    Attributes:
        images: one uint8 array of shape (height, width, 3) per camera, in the robot preset's camera order, upright as
            in the training data.
        state: (S,) float64, raw physical units: positions in metres, angles in radians.
    """

    images: tuple[np.ndarray, ...]
    state: np.ndarray


@runtime_checkable
class Environment(Protocol):
    """One task that can be attempted many times.

    Actions are in the environment's own convention: the caller has un-normalised them and converted the gripper
    (`RobotPreset.to_environment`).

    Where rendering is slow, an environment may have an attribute `render`. While it is False nothing is rendered, and
    `observe` returns black frames and the true state. It is set before a reset.

    Where an episode can ask for something else in the scene, an environment has `other_instructions`, texts that fit
    the scene, and `reset` takes one of them as `instruction`. Success is then what that text asks for.

    Where an episode is several subtasks in a row, `step` returns whether the present one is solved, and `step_limit`
    is that of a subtask. Such an environment has `next_subtask()`, called after a subtask is solved: it returns False
    if none is left, and otherwise goes on without a reset. `outcome()` returns what the results file holds of the
    episode, with `completed`, the number of solved subtasks. `task_instruction` is the subtask's own text, and `reset`
    takes another text for the policy, `instruction`.
    """

    instruction: str
    """Text for the policy; known after `reset`."""
    step_limit: int
    """Steps after which an episode without success has failed."""

    def reset(self, episode: int) -> dict[str, Any]:
        """Begins an episode. The same number gives the same episode, whatever ran before it.

        Returns:
            What was drawn for the episode (JSON values), for the results file.
        """

    def observe(self) -> Observation:
        """The observation at the current step. After a `step(..., observe=False)` it may raise RuntimeError."""

    def step(self, action: np.ndarray, observe: bool = True) -> bool:
        """Executes one action of shape (A,) and returns whether the task is solved.

        With `observe=False` the observation after this step will not be used, so nothing has to be rendered.
        """

    def close(self) -> None:
        """Frees the simulator or lets go of the robot."""


@runtime_checkable
class Suite(Protocol):
    """A named set of tasks that can build its environments in any process; must be picklable."""

    name: str
    robot: str
    """Name of the robot preset (`vla_adapter_hf.robots`), which defines the action convention."""

    @property
    def tasks(self) -> Sequence[str]:
        """The tasks' instructions; a task's number is its index in this list."""

    def make(self, task: int) -> Environment:
        """Builds the environment of one task."""

    def describe(self) -> dict[str, Any]:
        """The settings that decide what an episode is (JSON values): two runs with equal settings may be merged."""
