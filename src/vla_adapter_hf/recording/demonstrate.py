"""Records demonstrations of the scripted expert as a LeRobot v3.0 dataset.

Rendering is the cost, ten times that of physics. A chunk policy needs a frame at the step where a chunk begins and the
actions of the steps after it, so only every `render_every`-th step becomes a row, and each row holds the next actions at
full rate in the extra column `action_chunk`. The column `action` holds the row's own action, as LeRobot expects.

A policy may drive instead of the expert, who then only says at every chunk what it would do: the policy's mistakes become
examples of how to go on from them (DAgger, Ross et al. 2011).
"""

from __future__ import annotations

import functools
import json
import os
import time
import zlib
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers import AutoConfig

from vla_adapter_hf.modeling.configuration_vla_adapter import VLAAdapterConfig
from vla_adapter_hf.recording.expert import LiberoObjectExpert
from vla_adapter_hf.recording.lerobot_writer import (
    PARTS,
    LeRobotLayout,
    assemble,
    encode_image,
    save_episode,
    saved_episodes,
)
from vla_adapter_hf.robots import get_robot
from vla_adapter_hf.simulation.environment import Observation
from vla_adapter_hf.simulation.libero.suite import LiberoEnvironment, LiberoSuite, object_instruction
from vla_adapter_hf.simulation.placement import PLACEMENTS, STREAMS
from vla_adapter_hf.simulation.policies import Request, make_policy
from vla_adapter_hf.simulation.workers import process_pool
from vla_adapter_hf.utils.files import write_json


CONTROL_RATE = 20  # steps per second in LIBERO
CAMERA_COLUMNS = ("image", "wrist_image")
STATE_NAMES = ("x", "y", "z", "axis_angle1", "axis_angle2", "axis_angle3", "gripper_l", "gripper_r")
ACTION_NAMES = ("x", "y", "z", "axis_angle1", "axis_angle2", "axis_angle3", "gripper")


@dataclass(frozen=True)
class RecordingSettings:
    """How demonstrations are recorded.

    Attributes:
        render_every: every how many steps a frame is rendered and a row written; must divide 20. The first row's step is
            drawn per episode, so that all phases occur. Where a policy drives, a row begins at every chunk instead.
        chunk_size: actions in `action_chunk`. Rows without that many actions after them are not written.
        tail: steps that the expert goes on after success, so that the last steps before it begin whole chunks too.
        image_size: height and width of the stored frames. Rendered are 256, as in evaluation, then Lanczos.
        image_format: `png` (lossless) or `jpeg`.
        disturbed: share of episodes in which the arm is pushed at one to three times; what the expert does after a push
            is recorded, the push itself is not.
        retargeted: share of episodes that ask for another object in the scene than the task does, so that the scene does
            not give the instruction away.
        alternatives: for how many other objects of the scene the expert also says what it would do, at every row from
            which it is free to go anywhere: empty-handed and over what is near. The simulator tries the chunk and goes back.
            The same frames with another instruction become an episode of their own, without a frame more to render.
        seed: of everything that is drawn, 0 or more.
        states: official initial states to start from. The evaluation holds out the others.
    """

    render_every: int = 4
    chunk_size: int = 8
    tail: int = 8
    image_size: int = 112
    image_format: str = "png"
    disturbed: float = 0.0
    retargeted: float = 0.0
    alternatives: int = 0
    seed: int = 0
    states: tuple[int, ...] = field(default_factory=lambda: tuple(range(40)))

    def __post_init__(self) -> None:
        if self.render_every < 1 or CONTROL_RATE % self.render_every:
            raise ValueError(
                f"render_every must divide {CONTROL_RATE} (LeRobot's fps is whole), got {self.render_every}"
            )
        if self.chunk_size < 1 or self.tail < 0:
            raise ValueError(f"chunk_size must be positive and tail 0 or more, got {self.chunk_size} and {self.tail}")
        for name in ("alternatives", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")
        if self.image_size < 1:
            raise ValueError(f"image_size must be at least 1 pixel, got {self.image_size}")
        if not self.states or not all(0 <= state < 50 for state in self.states):
            raise ValueError(f"states must name initial states 0...49, got {self.states!r}")
        if self.image_format not in ("png", "jpeg"):
            raise ValueError(f"image_format must be 'png' or 'jpeg', got {self.image_format!r}")
        for name in ("disturbed", "retargeted"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a share of episodes, 0...1, got {getattr(self, name)}")

    def layout(self) -> LeRobotLayout:
        return LeRobotLayout(
            cameras=CAMERA_COLUMNS,
            image_size=self.image_size,
            state_names=STATE_NAMES,
            action_names=ACTION_NAMES,
            fps=CONTROL_RATE // self.render_every,
            chunk_size=self.chunk_size,
        )


@dataclass(frozen=True)
class EpisodePlan:
    """What was drawn for one recorded episode before it began.

    Attributes:
        target: object to pick, None for the task's own.
        phase: the first step that is rendered.
        pushes: per push the first step, the step after the last, and the direction (3,) as an action.
        driver: how keys name the policy that drives, empty for the expert.
    """

    placement: str
    task: int
    episode: int
    target: str | None
    phase: int
    pushes: tuple[tuple[int, int, tuple[float, float, float]], ...]
    driver: str = ""

    @property
    def key(self) -> str:
        return episode_key(self.placement, self.task, self.episode, self.driver)

    def is_pushed(self, first: int, end: int) -> bool:
        """Whether a push falls into the steps first...end-1."""
        return any(start < end and first < stop for start, stop, _ in self.pushes)


def episode_key(placement: str, task: int, episode: int, driver: str = "") -> str:
    """An episode's name among the saved ones. Episodes of one number sort together, whatever their task."""
    return f"{episode:05d}-{task:02d}-{driver}{'-' if driver else ''}{placement}"


def _draws(settings: RecordingSettings, driver: str) -> dict[str, Any]:
    """Stream and seed of all that is drawn, and the initial states in their order: every driver has its own, as the expert has."""
    if not driver:
        return {"stream": "demonstration", "seed": settings.seed, "states": settings.states}
    seed = zlib.crc32(f"{settings.seed} {driver}".encode())
    first = seed % len(settings.states)
    return {"stream": "correction", "seed": seed, "states": settings.states[first:] + settings.states[:first]}


def _generator(
    placement: str, task: int, episode: int, settings: RecordingSettings, driver: str, use: int
) -> np.random.Generator:
    draws = _draws(settings, driver)
    return np.random.default_rng(
        [STREAMS[draws["stream"]], draws["seed"], task, episode, PLACEMENTS.index(placement), use]
    )


def plan_episode(
    placement: str,
    task: int,
    episode: int,
    movable_objects: Sequence[str],
    settings: RecordingSettings,
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
    environment: LiberoEnvironment, plan: EpisodePlan, settings: RecordingSettings
) -> list[dict[str, Any]]:
    """Plays one planned episode and returns the arguments of `save_episode`; nothing if the expert failed.

    The episode itself comes last; before it come those of the other objects asked for (`RecordingSettings.alternatives`).
    """
    info = environment.reset(plan.episode, target=plan.target)
    expert = LiberoObjectExpert(environment)
    observations, actions = {}, []
    others = _other_objects(environment, plan, settings)
    alternatives: dict[str, dict[int, np.ndarray]] = {name: {} for name in others}
    solved_at: int | None = None
    observation = environment.observe()
    for step in range(environment.step_limit):
        if _begins_row(step, plan, settings):
            observations[step] = observation if step == 0 else environment.observe()
        action = expert.act()
        if step in observations and expert.is_approaching and _is_free(environment):
            for name in others:
                alternatives[name][step] = _try_chunk(environment, name, settings.chunk_size)
        for start, stop, direction in plan.pushes:
            if start <= step < stop:
                action[:3] = direction
        actions.append(action.astype(np.float32))
        # Whether an executed step succeeds is known after it; the frame for the next row is asked for with it.
        success = environment.step(actions[-1], observe=_begins_row(step + 1, plan, settings))
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
    return _as_episodes(environment, plan, settings, observations, chunks, alternatives, info, solved_at + 1)


def record_driven_episode(
    environment: LiberoEnvironment, plan: EpisodePlan, settings: RecordingSettings, policy: DrivingPolicy
) -> list[dict[str, Any]]:
    """As `record_episode`, with a policy that drives and the expert's chunks as what it should have done.

    A row begins where the policy is asked, at every chunk. Only some of the chunks are its own (`DrivingPolicy.share`): it
    gets to see what comes after a step that it has not learned yet. If the target is not in the basket at last, what the
    expert said may not have been of use, and nothing is returned. There are no alternatives.
    """
    info = environment.reset(plan.episode, target=plan.target)
    generator = _generator(plan.placement, plan.task, plan.episode, settings, plan.driver, 3)
    observations, chunks = {}, {}
    step, success, closing = 0, False, 0
    while not success and step < environment.step_limit:
        observations[step] = environment.observe()
        chunks[step] = _try_chunk(environment, environment.target, settings.chunk_size, closing)
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
    info |= {"driver": plan.driver, "driver_share": policy.share}
    return _as_episodes(environment, plan, settings, observations, chunks, {}, info, step)


class DrivingPolicy:
    """A checkpoint that acts while a recording goes on.

    Args:
        checkpoint: its folder or Hub id, or `embedded`.
        suite: whose robot it moves.
        share: of the chunks that are its own, 0...1; the others are the expert's.
        unnorm_key: statistics to use; by default those of the suite's name.

    Raises:
        ValueError: its robot, its statistics or its cameras are not the suite's.
    """

    def __init__(self, checkpoint: str, suite: str, share: float, unnorm_key: str | None = None) -> None:
        if checkpoint in ("oracle", "noop"):
            raise ValueError(f"driver={checkpoint!r} is no checkpoint; name a folder, a Hub id or 'embedded'.")
        if checkpoint != "embedded" and not isinstance(AutoConfig.from_pretrained(checkpoint), VLAAdapterConfig):
            raise ValueError(f"driver={checkpoint!r} is no VLA-Adapter; name a checkpoint of this package's model.")
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
        return {**self._policy.describe(), "share": self.share}

    def chunk(self, environment: LiberoEnvironment, observation: Observation) -> np.ndarray:
        """What it does now: (chunk_size, 7), as the environment takes it."""
        request = Request(observation, environment.instruction, environment.task, 0, 0)
        (chunk,) = self._policy.predict([request])
        if not np.isfinite(chunk).all():
            raise ValueError("the driver's chunk holds values that are not finite; it cannot be executed")
        return self._preset.to_environment(chunk)


def _as_episodes(
    environment: LiberoEnvironment,
    plan: EpisodePlan,
    settings: RecordingSettings,
    observations: dict[int, Observation],
    chunks: dict[int, np.ndarray],
    alternatives: dict[str, dict[int, np.ndarray]],
    info: dict[str, Any],
    steps: int,
) -> list[dict[str, Any]]:
    """The arguments of `save_episode`, the episode itself last."""
    common = {
        "suite": environment.suite.name,
        "task": plan.task,
        "episode": plan.episode,
        "seed": settings.seed,
        "steps": steps,
        "pushes": [[start, stop, list(direction)] for start, stop, direction in plan.pushes],
        **info,
    }
    encoded = {
        step: [encode_image(resized(image, settings.image_size), settings.image_format) for image in seen.images]
        for step, seen in observations.items()
    }

    def episode(key: str, target: str, instruction: str, chunks: dict[int, np.ndarray]) -> dict[str, Any]:
        return {
            "key": key,
            "layout": settings.layout(),
            "instruction": instruction,
            "images": {
                camera: [encoded[step][index] for step in chunks] for index, camera in enumerate(CAMERA_COLUMNS)
            },
            "states": np.stack([observations[step].state for step in chunks]).astype(np.float32),
            "actions": np.stack([chunk[0] for chunk in chunks.values()]),
            "chunks": np.stack(list(chunks.values())),
            "steps": np.array(list(chunks)),
            "extra": {**common, "target": target, "instruction": instruction},
        }

    asked = [
        episode(f"{plan.key}-{name}", name, object_instruction(name), tried)
        for name, tried in alternatives.items()
        if tried
    ]
    return [*asked, episode(plan.key, environment.target, environment.instruction, chunks)]


def _other_objects(environment: LiberoEnvironment, plan: EpisodePlan, settings: RecordingSettings) -> list[str]:
    """The objects that an episode's rows ask for as well, drawn anew for every episode."""
    if not settings.alternatives:
        return []
    generator = _generator(plan.placement, plan.task, plan.episode, settings, plan.driver, 2)
    others = [name for name in environment.movable_objects if name != environment.target]
    drawn = generator.permutation(len(others))
    return [others[index] for index in sorted(drawn[: settings.alternatives])]


def _is_free(environment: LiberoEnvironment) -> bool:
    """Whether the fingers are over the top of every object that the hand could touch on its way to another."""
    return not any(environment.meets_hand(name) for name in environment.movable_objects)


def _try_chunk(environment: LiberoEnvironment, target: str, chunk_size: int, closing: int = 0) -> np.ndarray:
    """What the expert would do from here if it were asked for `target`: (chunk_size, 7) float32. Nothing has happened.

    `closing` is for how many steps the gripper has been told to close by whoever acted until now.
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


def _begins_row(step: int, plan: EpisodePlan, settings: RecordingSettings) -> bool:
    """Rows start chunks of what the expert itself did: a chunk that would hold a push is no example."""
    return step % settings.render_every == plan.phase and not plan.is_pushed(step, step + settings.chunk_size)


def resized(image: np.ndarray, size: int) -> np.ndarray:
    if image.shape[0] == size:
        return image
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.LANCZOS))


@dataclass(frozen=True)
class _Job:
    """Some episodes of one task, so that building the environment pays off."""

    output: str
    suite: str
    task: int
    episodes: tuple[tuple[str, int], ...]
    settings: RecordingSettings
    driver: Driver | None


@dataclass(frozen=True)
class Driver:
    """Which checkpoint drives, for the processes that record; see `DrivingPolicy`."""

    checkpoint: str
    share: float
    unnorm_key: str | None
    threads: int

    @property
    def name(self) -> str:
        """How keys of episodes name it; a key's parts are divided by hyphens."""
        return f"by_{Path(self.checkpoint).name.replace('-', '_')}"


@functools.lru_cache(maxsize=1)
def _driving_policy(driver: Driver, suite: str) -> DrivingPolicy:
    """Loaded once in a process, for all its batches."""
    import torch

    torch.set_num_threads(driver.threads)
    return DrivingPolicy(driver.checkpoint, suite, driver.share, driver.unnorm_key)


def _record_job(job: _Job) -> dict[str, Any]:
    """Runs in a process of its own."""
    began = time.perf_counter()
    policy = None if job.driver is None else _driving_policy(job.driver, job.suite)
    driver = "" if job.driver is None else job.driver.name
    base = {**_draws(job.settings, driver), "hard_reset": False}
    environment = LiberoSuite(job.suite, **base).make(job.task)
    saved = failed = 0
    try:
        for placement, episode in job.episodes:
            environment.suite = LiberoSuite(job.suite, placement=placement, **base)
            plan = plan_episode(placement, job.task, episode, environment.movable_objects, job.settings, driver)
            if policy is None:
                recorded = record_episode(environment, plan, job.settings)
            else:
                recorded = record_driven_episode(environment, plan, job.settings, policy)
            if not recorded:
                failed += 1
                _mark_failed(Path(job.output), plan)
            else:
                # The episode itself is saved last: where it is, the others are.
                for part in recorded:
                    save_episode(Path(job.output), **part)
                saved += 1
    finally:
        environment.close()
    return {"task": job.task, "saved": saved, "failed": failed, "seconds": time.perf_counter() - began}


def _mark_failed(output: Path, plan: EpisodePlan) -> None:
    """Leaves a note, so that a resumed recording does not try the episode again."""
    folder = output / ".recording"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{plan.key}.failed").write_text("", encoding="utf-8")


def failed_episodes(output: Path) -> list[str]:
    """Keys of the episodes that ended without the target in the basket, sorted."""
    return sorted(path.stem for path in (Path(output) / ".recording").glob("*.failed"))


def demonstrate(
    suite: str,
    output: str | Path,
    episodes: Mapping[str, int] | int = 10,
    tasks: Iterable[int] | None = None,
    settings: RecordingSettings | None = None,
    workers: int = 1,
    minutes: float | None = None,
    batch: int = 12,
    driver: str | None = None,
    driver_share: float = 0.7,
    driver_unnorm_key: str | None = None,
    report: Any = print,
) -> dict[str, Any]:
    """Records demonstrations of the scripted expert into a LeRobot v3.0 dataset, resuming what was begun.

    Episodes that are already saved are skipped, so the same call after a kill finishes the recording, and a call with more
    episodes extends it. No evaluation draws the same placements.

    Args:
        suite: `libero_object`, the only suite with a scripted expert.
        output: the dataset's folder.
        episodes: episodes per task for each placement, such as `{"official": 10, "jitter": 20}`; a number means official.
        tasks: all by default.
        settings: how to record.
        workers: processes, each with an environment of about 2 GB, and the driver.
        minutes: stop beginning new batches after this time; the dataset is assembled from what there is.
        batch: episodes recorded before a process changes to another task.
        driver: folder or Hub id of a checkpoint that drives (or `embedded`), while the expert says at every chunk what it
            should do. Such episodes come beside the expert's own, under the last part of the checkpoint's name, with placements
            of their own. They begin a row at every chunk and have neither pushes nor alternatives, whatever the settings say.
        driver_share: of the chunks that this checkpoint chooses; the expert chooses the others.
        driver_unnorm_key: the driver's statistics; by default those of the suite's name.
        report: called with a line of progress after every batch.

    Returns:
        Numbers: episodes, rows, failed (the target was not in the basket at last), seconds.

    Raises:
        ValueError: a suite without an expert, an unknown placement or task, numbers out of range, a driver for another robot or
            of other chunks, or an output that was begun with other settings or another driver of this name.
        ImportError: LIBERO is not installed.
    """
    if suite != "libero_object":
        raise ValueError(f"suite={suite!r} has no scripted expert; demonstrations can be recorded for 'libero_object'")
    settings = settings or RecordingSettings()
    wanted = {"official": episodes} if isinstance(episodes, int) else dict(episodes)
    for placement, count in wanted.items():
        if placement not in PLACEMENTS:
            raise ValueError(f"episodes names placement {placement!r}; known are {', '.join(PLACEMENTS)}")
        if count < 0:
            raise ValueError(f"episodes[{placement!r}] must be 0 or more, got {count}")
    if not 0 < driver_share <= 1:
        raise ValueError(f"driver_share is a share of chunks, over 0 and at most 1, got {driver_share}")
    if workers < 1 or batch < 1:
        raise ValueError(f"workers and batch must be at least 1, got {workers} and {batch}")
    known = LiberoSuite(suite).tasks
    chosen = list(range(len(known))) if tasks is None else list(tasks)
    if any(not 0 <= task < len(known) for task in chosen):
        raise ValueError(f"tasks must be in 0...{len(known) - 1}, got {chosen}")

    output = Path(output)
    books = {output / PARTS / "settings.json": {"suite": suite, **asdict(settings)}}
    driving = None
    if driver is not None:
        threads = max(1, (os.cpu_count() or 1) // workers)
        driving = Driver(str(driver), driver_share, driver_unnorm_key, threads)
        books[output / PARTS / f"{driving.name}.json"] = describe_driver(driving, suite, settings)
    for path, entries in books.items():
        check_settings(output, path, entries, what=path.stem)
    began = time.perf_counter()
    jobs = _plan_jobs(str(output), suite, chosen, wanted, settings, batch, driving)
    done = failed = 0
    if jobs:
        with process_pool(workers) as pool:
            waiting = list(reversed(jobs))
            running = {pool.submit(_record_job, waiting.pop()) for _ in range(min(workers, len(waiting)))}
            while running:
                finished = next(as_completed(running))
                running.remove(finished)
                outcome = finished.result()
                done, failed = done + outcome["saved"], failed + outcome["failed"]
                minute = (time.perf_counter() - began) / 60
                report(
                    f"task {outcome['task']}: {outcome['saved']} recorded, {outcome['failed']} failed in "
                    f"{outcome['seconds']:.0f} s; {done} episodes after {minute:.1f} min"
                )
                if waiting and (minutes is None or minute < minutes):
                    running.add(pool.submit(_record_job, waiting.pop()))
    info = assemble(output)
    return {
        "episodes": info["total_episodes"],
        "rows": info["total_frames"],
        "recorded_now": done,
        "failed": len(failed_episodes(output)),
        "seconds": time.perf_counter() - began,
        "settings": asdict(settings),
    }


def check_settings(output: Path, path: Path, settings: dict[str, Any], what: str = "settings") -> None:
    """A folder holds recordings of one kind: extending it with other settings would mix them, or record nothing.

    Args:
        output: the folder, for the message.
        path: where the settings are kept, written if they are not there yet.
        what: `settings`, or how keys name the driver that these settings are of.
    """
    wanted = json.loads(json.dumps(settings))  # tuples come back from JSON as lists
    if path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))
        differing = [name for name in wanted if found.get(name) != wanted[name]]
        if differing:
            was = ", ".join(f"{name}={found.get(name)!r} and not {wanted[name]!r}" for name in differing)
            if what == "settings":
                raise ValueError(
                    f"output={output} was begun with {was}; name another folder, or record with the same settings."
                )
            raise ValueError(
                f"output={output} holds episodes of another driver {what!r}: {was}. Rename the driver's folder, or drive with the "
                "same share and statistics."
            )
        return
    write_json(path, wanted)


def describe_driver(driver: Driver, suite: str, settings: RecordingSettings) -> dict[str, Any]:
    """What decides a driver's actions; refuses one that could not drive, before an environment is built.

    Raises:
        ValueError: it is no VLA-Adapter, or its robot, statistics, cameras or chunks are not those of the recording.
    """
    policy = DrivingPolicy(driver.checkpoint, suite, driver.share, driver.unnorm_key)
    if policy.chunk_size != settings.chunk_size:
        raise ValueError(
            f"driver={driver.checkpoint!r} predicts {policy.chunk_size} actions, the recording's chunk_size is "
            f"{settings.chunk_size}: a row would not hold what it should have done. Record with the driver's chunk_size."
        )
    return policy.describe()


def _plan_jobs(
    output: str,
    suite: str,
    tasks: list[int],
    wanted: dict[str, int],
    settings: RecordingSettings,
    batch: int,
    driver: Driver | None,
) -> list[_Job]:
    """Batches of one task each, going round the tasks so that a recording stopped early has all of them."""
    name = "" if driver is None else driver.name
    present = set(saved_episodes(Path(output))) | set(failed_episodes(Path(output)))
    queues = {}
    for task in tasks:
        entries = []
        for placement, count in wanted.items():
            for episode in range(count):
                if episode_key(placement, task, episode, name) not in present:
                    # Placements are interleaved in proportion to their numbers.
                    entries.append(((episode + 0.5) / count, placement, episode))
        queues[task] = [(placement, episode) for _, placement, episode in sorted(entries)]
    jobs = []
    while any(queues.values()):
        for task in tasks:
            part, queues[task] = queues[task][:batch], queues[task][batch:]
            if part:
                jobs.append(_Job(output, suite, task, tuple(part), settings, driver))
    return jobs
