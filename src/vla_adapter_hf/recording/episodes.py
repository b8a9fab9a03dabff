"""One recorded episode: drawn, played by the expert or by a policy, and turned into rows."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from vla_adapter_hf.recording.lerobot_writer import LeRobotLayout
from vla_adapter_hf.recording.settings import CAMERA_COLUMNS, EpisodeSettings
from vla_adapter_hf.robots import get_robot
from vla_adapter_hf.simulation.environment import Observation
from vla_adapter_hf.simulation.libero.expert import LiberoObjectExpert
from vla_adapter_hf.simulation.libero.suite import LiberoEnvironment, LiberoSuite, object_instruction
from vla_adapter_hf.simulation.placement import PLACEMENTS, STREAMS
from vla_adapter_hf.simulation.policies import Request, make_policy
from vla_adapter_hf.simulation.settings import CONTROL_RATE
from vla_adapter_hf.utils.frames import encode_image


STATE_NAMES = ("x", "y", "z", "axis_angle1", "axis_angle2", "axis_angle3", "gripper_l", "gripper_r")
ACTION_NAMES = ("x", "y", "z", "axis_angle1", "axis_angle2", "axis_angle3", "gripper")


def recording_layout(settings: EpisodeSettings) -> LeRobotLayout:
    """The columns of a recording."""
    return LeRobotLayout(
        cameras=CAMERA_COLUMNS,
        image_size=settings.image_size,
        state_names=STATE_NAMES,
        action_names=ACTION_NAMES,
        fps=CONTROL_RATE // settings.render_every,
        chunk_size=settings.chunk_size,
    )


def episode_key(placement: str, task: int, episode: int, driver: str = "") -> str:
    """An episode's name among the saved ones. Episodes of one number sort together, whatever their task."""
    return f"{episode:05d}-{task:02d}-{driver}{'-' if driver else ''}{placement}"


@dataclass(frozen=True)
class EpisodePlan:
    """What was drawn for one recorded episode before it began.

    Attributes:
        target: object to pick, None for the task's own.
        phase: the first step that is rendered.
        pushes: per push the first step, the step after the last, and the direction (3,) as an action.
        driver: name in the keys of the policy that drives, empty for the expert.
    """

    placement: str
    task: int
    episode: int
    target: str | None
    phase: int
    pushes: tuple[tuple[int, int, tuple[float, float, float]], ...]
    driver: str = ""

    @property
    def instruction(self) -> str | None:
        """What asks for the target, None for the task's own instruction."""
        return None if self.target is None else object_instruction(self.target)

    @property
    def key(self) -> str:
        return episode_key(self.placement, self.task, self.episode, self.driver)

    def begins_row(self, step: int, settings: EpisodeSettings) -> bool:
        """Whether the step is rendered and its chunk is free of pushes: a chunk with a push is no demonstration."""
        end = step + settings.chunk_size
        pushed = any(start < end and step < stop for start, stop, _ in self.pushes)
        return step % settings.render_every == self.phase and not pushed


def suite_options(settings: EpisodeSettings, driver: str) -> dict[str, Any]:
    """Stream, seed and initial states, as arguments of `LiberoSuite`; the expert and every driver have their own."""
    if not driver:
        return {"stream": "demonstration", "seed": settings.seed, "states": settings.states}
    seed = zlib.crc32(f"{settings.seed} {driver}".encode())
    first = seed % len(settings.states)
    return {"stream": "correction", "seed": seed, "states": settings.states[first:] + settings.states[:first]}


def _generator(
    placement: str, task: int, episode: int, settings: EpisodeSettings, driver: str, use: int
) -> np.random.Generator:
    options = suite_options(settings, driver)
    placed = PLACEMENTS.index(placement)
    return np.random.default_rng([STREAMS[options["stream"]], options["seed"], task, episode, placed, use])


def plan_episode(
    placement: str,
    task: int,
    episode: int,
    movable_objects: Sequence[str],
    settings: EpisodeSettings,
    driver: str = "",
) -> EpisodePlan:
    """Draws an episode's target, phase and pushes; the same arguments give the same plan. A policy is not pushed."""
    generator = _generator(placement, task, episode, settings, driver, 1)
    target = None
    if generator.random() < settings.retargeted and len(movable_objects) > 1:
        target = movable_objects[1 + int(generator.integers(len(movable_objects) - 1))]
    pushes = []
    if not driver and generator.random() < settings.disturbed:
        if generator.random() < 0.5:
            pushes.append((0, int(generator.integers(5, 16))))
        for _ in range(int(generator.integers(1, 3))):
            start = int(generator.integers(10, 80))
            pushes.append((start, start + int(generator.integers(3, 9))))
    directed = []
    for start, stop in pushes:
        direction = generator.normal(size=3)
        direction *= generator.uniform(0.4, 1.0) / np.abs(direction).max()
        directed.append((start, stop, tuple(round(float(value), 4) for value in direction)))
    return EpisodePlan(
        placement=placement,
        task=task,
        episode=episode,
        target=target,
        phase=int(generator.integers(settings.render_every)),
        pushes=tuple(directed),
        driver=driver,
    )


def record_episode(
    environment: LiberoEnvironment, plan: EpisodePlan, settings: EpisodeSettings
) -> list[dict[str, Any]]:
    """Plays a planned episode and returns the arguments of `save_episode`; an empty list if the expert failed.

    The episode itself is last, after those of the other objects (`EpisodeSettings.alternatives`).
    """
    info = environment.reset(plan.episode, instruction=plan.instruction)
    expert = LiberoObjectExpert(environment)
    observations, actions = {}, []
    others = _other_objects(environment, plan, settings)
    alternatives: dict[str, dict[int, np.ndarray]] = {name: {} for name in others}
    solved_at: int | None = None
    observation = environment.observe()
    for step in range(environment.step_limit):
        if plan.begins_row(step, settings):
            observations[step] = observation if step == 0 else environment.observe()
        action = expert.act()
        if step in observations and expert.is_approaching and _is_free(environment):
            for name in others:
                alternatives[name][step] = try_chunk(environment, name, settings.chunk_size)
        for start, stop, direction in plan.pushes:
            if start <= step < stop:
                action[:3] = direction
        actions.append(action.astype(np.float32))
        success = environment.step(actions[-1], observe=plan.begins_row(step + 1, settings))
        if success and solved_at is None:
            solved_at = step
        if solved_at is not None and step - solved_at >= settings.tail:
            break
    if solved_at is None:
        return []
    executed = np.stack(actions)
    last = len(executed) - settings.chunk_size
    chunks = {
        step: executed[step : step + settings.chunk_size]
        for step in observations
        if step <= last and step <= solved_at
    }
    if not chunks:
        return []
    asked = {(name, object_instruction(name)): tried for name, tried in alternatives.items() if tried}
    to_rows = _RowEncoder(plan, settings, observations, info | {"steps": solved_at + 1})
    own = to_rows(plan.key, environment.target, environment.instruction, chunks)
    return [to_rows(f"{plan.key}-{name}", name, text, tried) for (name, text), tried in asked.items()] + [own]


def record_driven_episode(
    environment: LiberoEnvironment, plan: EpisodePlan, settings: EpisodeSettings, policy: DrivingPolicy
) -> list[dict[str, Any]]:
    """As `record_episode`, with a policy that drives, and the expert's chunks as what it should have done.

    A row begins at every chunk. Only a share of the chunks are the policy's own (`DrivingPolicy.share`), so that it
    also meets situations after a step that it has not learnt yet. If the target is not in the basket at the end, the
    expert's chunks may have been useless, and an empty list is returned. There are no alternatives.
    """
    info = environment.reset(plan.episode, instruction=plan.instruction)
    generator = _generator(plan.placement, plan.task, plan.episode, settings, plan.driver, 3)
    observations, chunks = {}, {}
    step, success, closing = 0, False, 0
    while not success and step < environment.step_limit:
        observations[step] = environment.observe()
        chunks[step] = try_chunk(environment, environment.target, settings.chunk_size, closing)
        own = generator.random() < policy.share
        actions = policy.chunk(environment, observations[step]) if own else chunks[step]
        for index, action in enumerate(actions):
            success = environment.step(action, observe=index == len(actions) - 1)
            closing = closing + 1 if action[-1] > 0 else 0
            step += 1
            if success or step == environment.step_limit:
                break
    if not success:
        return []
    info |= {"driver": plan.driver, "driver_share": policy.share, "steps": step}
    to_rows = _RowEncoder(plan, settings, observations, info)
    return [to_rows(plan.key, environment.target, environment.instruction, chunks)]


class DrivingPolicy:
    """A checkpoint that acts during a recording.

    Args:
        checkpoint: its folder or Hub id, or `embedded`.
        suite: the suite, whose robot it moves.
        share: share of the chunks that are its own, 0...1; the others are the expert's.
        unnorm_key: statistics to use; by default those with the suite's name.

    Raises:
        ValueError: its robot, its statistics or its cameras are not the suite's.
    """

    def __init__(self, checkpoint: str, suite: str, share: float, unnorm_key: str | None = None) -> None:
        if checkpoint in ("oracle", "noop"):
            raise ValueError(f"driver={checkpoint!r} is no checkpoint; name a folder, a Hub id or 'embedded'.")
        self.share = share
        self._preset = get_robot(LiberoSuite.robot)
        self._policy = make_policy(checkpoint, LiberoSuite.robot, suite=suite, unnorm_key=unnorm_key)
        config = self._policy.model.config
        dims = config.action_dim, config.proprio_dim
        if dims != (len(ACTION_NAMES), len(STATE_NAMES)):
            raise ValueError(
                f"driver={checkpoint!r} has {dims[0]} actions and {dims[1]} numbers of state, {suite} has "
                f"{len(ACTION_NAMES)} and {len(STATE_NAMES)}; name a checkpoint for this robot."
            )
        self.chunk_size = config.chunk_size

    def describe(self) -> dict[str, Any]:
        """What decides its actions (JSON values)."""
        return {**self._policy.describe(), "share": self.share}

    def chunk(self, environment: LiberoEnvironment, observation: Observation) -> np.ndarray:
        """Its actions for an observation, (chunk_size, 7), in the environment's convention.

        Raises:
            ValueError: values that are not finite.
        """
        request = Request(observation, environment.instruction, environment.task, 0, 0)
        (chunk,) = self._policy.predict([request])
        if not np.isfinite(chunk).all():
            raise ValueError("the driver's chunk holds values that are not finite; it cannot be executed")
        return self._preset.to_environment(chunk)


class _RowEncoder:
    """Turns chunks of an episode into the arguments of `save_episode`; every frame is encoded once."""

    def __init__(
        self,
        plan: EpisodePlan,
        settings: EpisodeSettings,
        observations: dict[int, Observation],
        info: dict[str, Any],
    ) -> None:
        self.layout = recording_layout(settings)
        self.states = {step: seen.state for step, seen in observations.items()}
        self.frames = {
            step: [encode_image(resized(image, settings.image_size), settings.image_format) for image in seen.images]
            for step, seen in observations.items()
        }
        self.common = {
            "suite": settings.suite,
            "task": plan.task,
            "episode": plan.episode,
            "seed": settings.seed,
            "steps": info["steps"],
            "pushes": [[start, stop, list(direction)] for start, stop, direction in plan.pushes],
            **info,
        }

    def __call__(self, key: str, target: str, instruction: str, chunks: dict[int, np.ndarray]) -> dict[str, Any]:
        return {
            "key": key,
            "layout": self.layout,
            "instruction": instruction,
            "images": {
                camera: [self.frames[step][index] for step in chunks] for index, camera in enumerate(CAMERA_COLUMNS)
            },
            "states": np.stack([self.states[step] for step in chunks]).astype(np.float32),
            "actions": np.stack([chunk[0] for chunk in chunks.values()]),
            "chunks": np.stack(list(chunks.values())),
            "numbers": {"step": np.array(list(chunks))},
            "extra": {**self.common, "target": target, "instruction": instruction},
        }


def _other_objects(environment: LiberoEnvironment, plan: EpisodePlan, settings: EpisodeSettings) -> list[str]:
    """The objects that an episode's rows also ask for, drawn for every episode."""
    if not settings.alternatives:
        return []
    generator = _generator(plan.placement, plan.task, plan.episode, settings, plan.driver, 2)
    others = [name for name in environment.movable_objects if name != environment.target]
    drawn = generator.permutation(len(others))
    return [others[index] for index in sorted(drawn[: settings.alternatives])]


def _is_free(environment: LiberoEnvironment) -> bool:
    """Whether the fingers are above every object that the hand could touch on its way to another."""
    return not any(environment.meets_hand(name) for name in environment.movable_objects)


def try_chunk(environment: LiberoEnvironment, target: str, chunk_size: int, closing: int = 0) -> np.ndarray:
    """What the expert would do from here if the instruction asked for `target`: (chunk_size, 7) float32.

    The environment is left as it was. `closing` is the number of steps for which the gripper has been commanded to
    close.
    """
    saved = environment.save_state()
    environment.ask_for(target)
    expert = LiberoObjectExpert(environment, closing=closing)
    chunk = []
    for _ in range(chunk_size):
        chunk.append(expert.act().astype(np.float32))
        environment.step(chunk[-1], observe=False)
    environment.restore_state(saved)
    return np.stack(chunk)


def resized(image: np.ndarray, size: int) -> np.ndarray:
    """A square frame in another size, by Lanczos."""
    if image.shape[0] == size:
        return image
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.LANCZOS))
