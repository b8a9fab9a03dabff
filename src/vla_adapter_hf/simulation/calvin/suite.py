"""CALVIN ABC->D: 1,000 sequences of five subtasks, each played until a subtask fails."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from vla_adapter_hf.robot.strategies import ChunkStrategy
from vla_adapter_hf.robots import get_robot
from vla_adapter_hf.simulation.calvin.install import check_renderer, draw_sequences, read_instructions
from vla_adapter_hf.simulation.calvin.schedules import STEP_LIMITS, PublishedSchedule
from vla_adapter_hf.simulation.calvin.scores import PUBLISHED_SEQUENCES, SUBTASKS
from vla_adapter_hf.simulation.calvin.simulation import CalvinSimulation
from vla_adapter_hf.simulation.environment import Observation
from vla_adapter_hf.simulation.settings import EvaluationSettings


@dataclass(frozen=True)
class CalvinSequence:
    """Five subtasks to solve in a row.

    Attributes:
        initial_state: the initial scene, in the simulation's format.
        subtasks: names such as `rotate_blue_block_right`.

    Raises:
        ValueError: another number of subtasks.
    """

    initial_state: Any
    subtasks: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(self.subtasks) != SUBTASKS:
            raise ValueError(f"a sequence has {SUBTASKS} subtasks, got {len(self.subtasks)}: {self.subtasks}")


class SequenceSimulation(Protocol):
    """A simulation that plays a sequence."""

    render: bool
    """False renders nothing, and frames are black."""

    def reset(self, initial_state: Any) -> None:
        """Sets robot and scene; called once per sequence, not between subtasks."""

    def begin_subtask(self, subtask: str) -> None:
        """Success will be judged from the present state on."""

    def observe(self) -> Observation:
        """Renders the present state."""

    def step(self, action: np.ndarray) -> bool:
        """Executes one action (7,), gripper -1 or +1, and returns whether the subtask is solved."""

    def close(self) -> None:
        """Frees the simulator."""


class SequenceEnvironment:
    """Sequences as an `Environment`: an episode is a sequence, and success is that of the present subtask.

    `reset` begins with the first subtask. `next_subtask` goes on to the next one without resetting the scene.

    Args:
        simulation: plays the sequences.
        sequences: episode e is `sequences[e]`.
        instructions: the text of every subtask.
        step_limit: steps per subtask.
    """

    def __init__(
        self,
        simulation: SequenceSimulation,
        sequences: Sequence[CalvinSequence],
        instructions: Mapping[str, str],
        step_limit: int,
    ) -> None:
        self.step_limit = step_limit
        self.simulation = simulation
        self.instruction = self.task_instruction = self.subtask = ""
        self._sequences, self._instructions = sequences, instructions
        self._left: list[str] = []
        self._given: list[str] = []

    @property
    def render(self) -> bool:
        return self.simulation.render

    @render.setter
    def render(self, wanted: bool) -> None:
        self.simulation.render = wanted

    def reset(self, episode: int, instruction: str | None = None) -> dict[str, Any]:
        """Begins a sequence; see `Environment.reset`.

        Args:
            episode: number of the sequence.
            instruction: a text for the policy at every subtask. `other` gives it another subtask's instruction, while
                success stays the subtask's own.

        Raises:
            ValueError: there is no such sequence.
        """
        if not 0 <= episode < len(self._sequences):
            raise ValueError(f"episode must be in 0...{len(self._sequences) - 1}, got {episode}")
        self._episode, self._given, self._text = episode, [], instruction
        sequence = self._sequences[episode]
        self.simulation.reset(sequence.initial_state)
        self._left = list(sequence.subtasks)
        self._begin_subtask()
        return {"subtasks": list(sequence.subtasks)}

    def next_subtask(self) -> bool:
        """Goes on after a subtask is solved; False if the sequence has none left."""
        self._left.pop(0)
        if self._left:
            self._begin_subtask()
        return bool(self._left)

    def outcome(self) -> dict[str, Any]:
        """For the results: how many subtasks were solved, and the text that the policy got for each one."""
        completed = len(self._sequences[self._episode].subtasks) - len(self._left)
        return {"completed": completed, "instructions": list(self._given)}

    def observe(self) -> Observation:
        return self.simulation.observe()

    def step(self, action: np.ndarray, observe: bool = True) -> bool:
        return self.simulation.step(action)

    def close(self) -> None:
        self.simulation.close()

    def _begin_subtask(self) -> None:
        self.subtask = self._left[0]
        self.simulation.begin_subtask(self.subtask)
        self.task_instruction = self._instructions[self.subtask]
        self.instruction = self._instruction_for_policy()
        self._given.append(self.instruction)

    def _instruction_for_policy(self) -> str:
        if self._text != "other":
            return self._text or self.task_instruction
        # Every other instruction has its turn.
        others = [text for text in self._instructions.values() if text != self.task_instruction]
        return others[(self._episode * SUBTASKS + len(self._given)) % len(others)]


@dataclass(frozen=True)
class CalvinSuite:
    """CALVIN ABC->D and every setting that decides what its episodes are. [`published_suite`] builds it.

    Args:
        sequences: episode e is `sequences[e]`.
        instructions: the text of every subtask.
        schedule: how chunks are executed, one of `STEP_LIMITS`.
        renderer: `egl`, as published, or `cpu`.

    Raises:
        ValueError: an unknown schedule or renderer.
    """

    sequences: tuple[CalvinSequence, ...]
    instructions: Mapping[str, str]
    schedule: str = "published"
    renderer: str = "egl"
    name: str = field(default="calvin_abc_d", init=False)
    robot: str = field(default="calvin", init=False)
    base: str = field(default="calvin_abc_rlds", init=False)  # the published name of the statistics
    episodes: int = field(default=PUBLISHED_SEQUENCES, init=False)

    def __post_init__(self) -> None:
        if self.schedule not in STEP_LIMITS:
            raise ValueError(f"schedule must be one of {', '.join(STEP_LIMITS)}, got {self.schedule!r}")
        check_renderer(self.renderer)

    @property
    def tasks(self) -> list[str]:
        """One task: all sequences are episodes of it."""
        return ["five subtasks in a row"]

    def make(self, task: int) -> SequenceEnvironment:
        """Builds the simulator: some seconds."""
        return SequenceEnvironment(
            CalvinSimulation(self.renderer), self.sequences, self.instructions, STEP_LIMITS[self.schedule]
        )

    @property
    def crash_hint(self) -> str:
        """What to do where the process of a simulator ended."""
        if self.renderer != "egl":
            return ""
        return (
            "renderer='egl' ends it where no driver works: vla-adapter calvin-check tries, renderer='cpu' needs none."
        )

    def chunk_strategy(self, settings: EvaluationSettings) -> ChunkStrategy | PublishedSchedule:
        """What executes chunks.

        Raises:
            ValueError: settings of other strategies together with the published schedule.
        """
        if self.schedule != "published":
            return settings.chunk_strategy(averaged=np.array(get_robot(self.robot).action_mask))
        chosen = {"execute": settings.execute, "ensemble": settings.ensemble, "delay": settings.delay or None}
        chosen |= {"strategy": None if settings.strategy == "sync" else settings.strategy}
        given = [f"{name}={value}" for name, value in chosen.items() if value is not None]
        if given:
            raise ValueError(f"{', '.join(given)} needs schedule='open-loop': the published one says when to ask")
        return PublishedSchedule()

    def describe(self) -> dict[str, Any]:
        content = json.dumps([[s.initial_state, s.subtasks] for s in self.sequences], sort_keys=True, default=str)
        return {
            "suite": self.name,
            "schedule": self.schedule,
            "renderer": self.renderer,
            "sequences": f"crc32 {zlib.crc32(content.encode()):08x}",
        }


def published_suite(schedule: str = "published", renderer: str = "egl") -> CalvinSuite:
    """The suite of CALVIN's 1,000 published sequences.

    Raises:
        ValueError: an unknown schedule or renderer.
        ImportError: CALVIN or a package that it needs is missing; the message names it.
    """
    CalvinSuite((), {}, schedule, renderer)  # refuses unknown names before minutes of drawing
    sequences = tuple(
        CalvinSequence({"robot": drawn["robot"], "scene": drawn["scene"]}, tuple(drawn["subtasks"]))
        for drawn in draw_sequences()
    )
    return CalvinSuite(sequences, read_instructions(), schedule, renderer)
