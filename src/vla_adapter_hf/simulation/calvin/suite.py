"""CALVIN ABC->D: observations, two ways to execute chunks, and the score over 1,000 sequences of five subtasks.

`CalvinSimulation` needs CALVIN's simulator, which is not on PyPI; that class has not been run. Everything else works
with any object that fits `SequenceSimulation`.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from vla_adapter_hf.robot.action_queue import ActionChunkQueue
from vla_adapter_hf.robots import get_robot
from vla_adapter_hf.simulation.environment import Observation
from vla_adapter_hf.simulation.policies import Policy, Request
from vla_adapter_hf.simulation.results import EpisodeResult, ResultsFile
from vla_adapter_hf.utils.files import exclusive_folder


SUBTASKS = 5
STATIC_SIZE, GRIPPER_SIZE = 200, 84
CHUNK_SIZE = 8
PUBLISHED_SCORES = {
    "VLA-Adapter": (99.1, 94.6, 88.8, 82.8, 76.5, 4.42),
    "VLA-Adapter-Pro": (98.5, 95.0, 90.5, 85.3, 80.0, 4.50),
}
"""Success in per cent at 1...5 subtasks in a row, and the average length (arXiv 2509.09372)."""


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
    for name, size in (("rgb_static", STATIC_SIZE), ("rgb_gripper", GRIPPER_SIZE)):
        image = raw.get("rgb_obs", {}).get(name)
        if image is None or image.shape != (size, size, 3) or image.dtype != np.uint8:
            given = None if image is None else f"{image.dtype} {image.shape}"
            raise ValueError(f"rgb_obs[{name!r}] must be uint8 of shape ({size}, {size}, 3), got {given}")
        images.append(image)
    robot = np.asarray(raw.get("robot_obs", ()), dtype=np.float64)
    if robot.shape != (15,):
        raise ValueError(f"robot_obs must have shape (15,), got {robot.shape}")
    return Observation(tuple(images), np.concatenate([robot[:7], robot[-1:]]))


class PublishedSchedule:
    """Executes chunks as the published CALVIN evaluation does: cycles of ten steps with three queries each.

    The policy is queried at steps 0, 1 and 2 of a cycle, for chunks b0, b1 and b2 of eight actions. The executed
    actions are plain means of un-normalised actions, gripper included, before the gripper is made binary:

    | step | action |
    |---|---|
    | 0 | b0[0] |
    | 1 | (b0[1] + b1[0]) / 2 |
    | 2 | (b0[2] + b1[1] + b2[0]) / 3 |
    | 3...7 | (b0[t] + b1[t-1] + b2[t-2]) / 3 for t = 2...6 |
    | 8 | (b1[7] + b2[6]) / 2 |
    | 9 | b2[7] |

    Time index 2 is executed twice and index 7 of b0 never, as for the published scores. The interface is that of
    `ActionChunkQueue`.
    """

    step_limit = 800  # 80 cycles per subtask

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Begins a new cycle. Call it for every subtask."""
        self._chunks: list[np.ndarray] = []
        self._step = 0

    @property
    def needs_chunk(self) -> bool:
        return self._step < 3 and len(self._chunks) == self._step

    def steps_until_query(self) -> int:
        """Actions left before the next query."""
        if self.needs_chunk:
            return 0
        return 1 if self._step < 2 else 10 - self._step

    def add(self, chunk: np.ndarray) -> None:
        """Takes the chunk (8, A) of the present step.

        Raises:
            ValueError: another number of actions, or values that are not finite.
            RuntimeError: no chunk is due.
        """
        chunk = np.asarray(chunk)
        if chunk.ndim != 2 or len(chunk) != CHUNK_SIZE:
            raise ValueError(f"chunk must have shape ({CHUNK_SIZE}, A), got {chunk.shape}")
        if not np.isfinite(chunk).all():
            raise ValueError("chunk holds values that are not finite; the policy's output cannot be executed")
        if not self.needs_chunk:
            raise RuntimeError(f"no chunk is due at step {self._step} of the cycle")
        self._chunks.append(chunk)

    def pop(self) -> np.ndarray:
        """The action (A,) of the present step.

        Raises:
            RuntimeError: a chunk is due.
        """
        if self.needs_chunk:
            raise RuntimeError("no action left: add a chunk first (see needs_chunk)")
        step, chunks = self._step, self._chunks
        if step < 3:
            parts = [chunk[step - asked] for asked, chunk in enumerate(chunks)]
        elif step < 8:
            parts = [chunk[step - 1 - asked] for asked, chunk in enumerate(chunks)]
        elif step == 8:
            parts = [chunks[1][7], chunks[2][6]]
        else:
            parts = [chunks[2][7]]
        self._step += 1
        if self._step == 10:
            self.reset()
        return np.mean(parts, axis=0)


class OpenLoopSchedule(ActionChunkQueue):
    """Whole chunks of eight actions, at most 360 steps per subtask."""

    step_limit = 360


SCHEDULES: dict[str, type[PublishedSchedule] | type[OpenLoopSchedule]] = {
    "published": PublishedSchedule,
    "open-loop": OpenLoopSchedule,
}


@dataclass(frozen=True)
class CalvinSequence:
    """Five subtasks to solve in a row.

    Attributes:
        initial_state: CALVIN's description of the initial scene, in the simulation's format.
        subtasks: names such as `rotate_blue_block_right`.
    """

    initial_state: Any
    subtasks: tuple[str, ...]


class SequenceSimulation(Protocol):
    """A simulation that plays a sequence."""

    def reset(self, initial_state: Any) -> None:
        """Sets robot and scene; called once per sequence, not between subtasks."""

    def begin_subtask(self, subtask: str) -> str:
        """Returns the instruction of the next subtask; success will be judged from the present state on."""

    def observe(self) -> Observation: ...

    def step(self, action: np.ndarray) -> bool:
        """Executes one action (7,), gripper -1 or +1, and returns whether the subtask is solved."""


class SequenceEnvironment:
    """Sequences as an `Environment`: an episode is a sequence, and success is that of the present subtask.

    `reset` begins with the first subtask. `next_subtask` goes on to the next one without resetting the scene.

    Args:
        simulation: plays the sequences.
        sequences: episode e is `sequences[e]`.
        schedule: one of `SCHEDULES`; a subtask has its step limit.

    Raises:
        ValueError: an unknown schedule or a sequence that does not have five subtasks.
    """

    def __init__(
        self, simulation: SequenceSimulation, sequences: Sequence[CalvinSequence], schedule: str = "published"
    ) -> None:
        if schedule not in SCHEDULES:
            raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {schedule!r}")
        for sequence in sequences:
            if len(sequence.subtasks) != SUBTASKS:
                raise ValueError(
                    f"a sequence has {SUBTASKS} subtasks, got {len(sequence.subtasks)}: {sequence.subtasks}"
                )
        self.step_limit: int = SCHEDULES[schedule].step_limit
        self.instruction = ""
        self._simulation = simulation
        self._sequences = sequences
        self._left: list[str] = []

    def reset(self, episode: int) -> dict[str, Any]:
        sequence = self._sequences[episode]
        self._simulation.reset(sequence.initial_state)
        self._left = list(sequence.subtasks)
        self.next_subtask()
        return {"subtasks": list(sequence.subtasks)}

    def next_subtask(self) -> bool:
        """Goes on to the next subtask; False if the sequence has none left."""
        if not self._left:
            return False
        self.instruction = self._simulation.begin_subtask(self._left.pop(0))
        return True

    def observe(self) -> Observation:
        return self._simulation.observe()

    def step(self, action: np.ndarray, observe: bool = True) -> bool:
        return self._simulation.step(action)

    def close(self) -> None:
        """Does nothing: the simulation belongs to the caller."""


def play_sequence(
    policy: Policy,
    simulation: SequenceSimulation,
    sequence: CalvinSequence,
    schedule: str = "published",
    index: int = 0,
) -> tuple[int, int, str]:
    """Plays one sequence until a subtask fails.

    Returns:
        Subtasks solved in a row (0...5), executed steps, and the instruction of the last subtask.

    Raises:
        ValueError: an unknown schedule or a sequence that does not have five subtasks.
    """
    environment = SequenceEnvironment(simulation, [sequence], schedule)
    preset = get_robot("calvin")
    queue = SCHEDULES[schedule]()
    environment.reset(0)
    steps = solved = 0
    while True:
        queue.reset()
        for step in range(environment.step_limit):
            if queue.needs_chunk:
                request = Request(environment.observe(), environment.instruction, solved, index, step)
                queue.add(policy.predict([request])[0])
            steps += 1
            if environment.step(preset.to_environment(queue.pop())):
                break
        else:
            return solved, steps, environment.instruction
        solved += 1
        if not environment.next_subtask():
            return solved, steps, environment.instruction


def score_sequences(lengths: Sequence[int]) -> dict[str, Any]:
    """The published score from the number of subtasks solved in each sequence.

    Returns:
        `success_rates`: share of the sequences with at least 1, 2, 3, 4, 5 in a row; `average_length`; `sequences`.

    Raises:
        ValueError: no sequences, or a length outside 0...5.
    """
    array = np.asarray(lengths)
    if array.ndim != 1 or not len(array) or array.min() < 0 or array.max() > SUBTASKS:
        raise ValueError(f"lengths must be numbers 0...{SUBTASKS}, at least one, got {lengths!r}")
    rates = [float((array >= count).mean()) for count in range(1, SUBTASKS + 1)]
    return {"success_rates": rates, "average_length": float(array.mean()), "sequences": len(array)}


def score_table(scores: Mapping[str, Mapping[str, Any]], compare: bool = True) -> str:
    """A Markdown table in the published form."""
    lines = ["| Policy | 1 | 2 | 3 | 4 | 5 | Average length |", "|---|---|---|---|---|---|---|"]
    for name, score in scores.items():
        rates = " | ".join(f"{100 * rate:.1f}" for rate in score["success_rates"])
        lines.append(f"| {name} ({score['sequences']} sequences) | {rates} | {score['average_length']:.2f} |")
    for name, numbers in PUBLISHED_SCORES.items() if compare else ():
        rates = " | ".join(f"{rate:.1f}" for rate in numbers[:5])
        lines.append(f"| {name} (published) | {rates} | {numbers[5]:.2f} |")
    return "\n".join(lines) + "\n"


def evaluate_calvin(
    policy: Policy,
    simulation: SequenceSimulation,
    sequences: Sequence[CalvinSequence],
    output: str | Path,
    schedule: str = "published",
    report: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Plays all sequences, resuming after a kill, and returns the score of `score_sequences`.

    `<output>/episodes.jsonl` holds one line per sequence, with `info.completed` subtasks. More sequences extend a run.

    Raises:
        ValueError: an output with other sequences, another policy or schedule, or that another process is writing to.
    """
    settings = {
        "suite": "calvin_abc_d",
        "policy": policy.name,
        "schedule": schedule,
        **(policy.describe() if hasattr(policy, "describe") else {}),
    }
    with exclusive_folder(output):
        return _play_all(policy, simulation, sequences, ResultsFile(output, settings), schedule, report)


def _play_all(
    policy: Policy,
    simulation: SequenceSimulation,
    sequences: Sequence[CalvinSequence],
    results: ResultsFile,
    schedule: str,
    report: Callable[[str], None],
) -> dict[str, Any]:
    played = {result.episode: result.info["sequence"] for result in results.results}
    checksums = [f"crc32 {zlib.crc32(repr(sequence).encode()):08x}" for sequence in sequences]
    for index, checksum in enumerate(checksums):
        if played.get(index, checksum) != checksum:
            raise ValueError(f"{results.path} holds another sequence {index}; choose another output")
    for index, sequence in enumerate(sequences):
        if index in played:
            continue
        completed, steps, instruction = play_sequence(policy, simulation, sequence, schedule, index)
        results.append(
            EpisodeResult(
                suite="calvin_abc_d",
                task=0,
                episode=index,
                seed=0,
                placement="official",
                black_images=False,
                instruction=instruction,
                steps=steps,
                success=completed == SUBTASKS,
                info={
                    "completed": completed,
                    "subtasks": list(sequence.subtasks),
                    "sequence": checksums[index],
                },
            )
        )
        lengths = [result.info["completed"] for result in results.results]
        report(f"sequence {index}: {completed} in a row | average length {np.mean(lengths):.2f} over {len(lengths)}")
    wanted = {(0, index) for index in range(len(sequences))}
    return score_sequences([result.info["completed"] for result in results.results if result.key in wanted])


class CalvinSimulation:
    """CALVIN's own simulator, environment D. **Not tested here**: `calvin_env` and `calvin_agent` are not on PyPI.

    Args:
        dataset: the folder `task_ABC_D`, whose `validation` holds the environment's configuration and annotations.

    Raises:
        ImportError: CALVIN is not installed.
    """

    def __init__(self, dataset: str | Path) -> None:
        try:
            import hydra
            from calvin_agent.evaluation.utils import get_env_state_for_initial_condition
            from calvin_env.envs.play_table_env import get_env
            from omegaconf import OmegaConf
        except ImportError as error:
            raise ImportError(
                "CALVIN's simulator is not installed and not on PyPI; install calvin_env and calvin_agent from the "
                "CALVIN repository (mees/calvin on GitHub)"
            ) from error
        import calvin_agent

        validation = Path(dataset) / "validation"
        self._initial_condition = get_env_state_for_initial_condition
        self._environment = get_env(validation, show_gui=False)
        configuration = Path(calvin_agent.__file__).parents[1] / "conf" / "callbacks" / "rollout" / "tasks"
        self._oracle = hydra.utils.instantiate(OmegaConf.load(configuration / "new_playtable_tasks.yaml"))
        annotations = configuration.parents[1] / "annotations" / "new_playtable_validation.yaml"
        self._annotations = OmegaConf.load(annotations)
        self._subtask, self._start = "", None

    def reset(self, initial_state: Any) -> None:
        robot, scene = self._initial_condition(initial_state)
        self._environment.reset(robot_obs=robot, scene_obs=scene)

    def begin_subtask(self, subtask: str) -> str:
        self._subtask, self._start = subtask, self._environment.get_info()
        return str(self._annotations[subtask][0])

    def observe(self) -> Observation:
        return calvin_observation(self._environment.get_obs())

    def step(self, action: np.ndarray) -> bool:
        _, _, _, info = self._environment.step(np.asarray(action))
        return bool(self._oracle.get_task_info_for_set(self._start, info, {self._subtask}))


def published_sequences(count: int = 1000) -> list[CalvinSequence]:
    """The sequences that CALVIN's own generator draws. **Not tested here**, like `CalvinSimulation`.

    Raises:
        ImportError: CALVIN is not installed.
    """
    try:
        from calvin_agent.evaluation.multistep_sequences import get_sequences
    except ImportError as error:
        raise ImportError(
            "CALVIN's sequences come from calvin_agent (mees/calvin on GitHub), which is not installed"
        ) from error
    return [CalvinSequence(state, tuple(subtasks)) for state, subtasks in get_sequences(count)]
