"""Closed-loop evaluation: many environments, one batched policy, results that survive a kill."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from vla_adapter_hf.robot.state_model import STATE_MODELS
from vla_adapter_hf.robot.strategies import ChunkStrategy
from vla_adapter_hf.robots import get_robot
from vla_adapter_hf.simulation.calvin.schedules import PublishedSchedule
from vla_adapter_hf.simulation.calvin.scores import score_sequences
from vla_adapter_hf.simulation.calvin.suite import published_suite
from vla_adapter_hf.simulation.cluster import RayPool, ReplicatedPolicy, connected, import_ray
from vla_adapter_hf.simulation.environment import Suite
from vla_adapter_hf.simulation.intervals import wilson_interval
from vla_adapter_hf.simulation.libero.checks import check_scenes
from vla_adapter_hf.simulation.libero.suite import PLACED, LiberoSuite
from vla_adapter_hf.simulation.policies import (
    OraclePolicy,
    Policy,
    Request,
    ResidentPolicy,
    blackened,
    changes,
    make_policy,
    standing_still,
)
from vla_adapter_hf.simulation.results import EpisodeResult, ResultsFile, Timing, write_summary
from vla_adapter_hf.simulation.rollout import draw_contact_sheet, draw_rollout, write_picture, write_rollout
from vla_adapter_hf.simulation.settings import DEFAULT_EPISODES, EvaluationSettings, choose_tasks
from vla_adapter_hf.simulation.shards import Shard
from vla_adapter_hf.simulation.workers import Begin, Execute, Report, WorkerPool
from vla_adapter_hf.utils.files import atomic_path, exclusive_folder


CALVIN = "calvin_abc_d"
FRAMES_EVERY = 4  # steps between two frames of a film


def evaluate(
    policy: str | Policy | ResidentPolicy,
    suite: str | Suite,
    output: str | Path,
    settings: EvaluationSettings | None = None,
    report: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Runs a policy in closed loop, by default by the published protocol.

    Called again with the same arguments after a kill, it runs only what is missing. With more tasks or episodes it
    extends the run. The output folder holds `episodes.jsonl` (one line per episode), `settings.json`, `summary.json`,
    `summary.md` and, on request, `rollouts/` and `actions/`.

    Args:
        policy: `oracle`, `noop`, `embedded` (the checkpoint that ships with the package), a checkpoint's folder or Hub
            id, or an object of `policies.Policy`.
        suite: a LIBERO suite's name, `calvin_abc_d`, or an object of `environment.Suite`, which then decides
            placement and seed itself.
        output: folder of the results; a shard's are in a folder inside.
        settings: everything else, see [`EvaluationSettings`].
        report: receives lines of progress.

    Returns:
        The content of `summary.json`. Its `timing` is that of the last call that played any episode.

    Raises:
        ValueError: unknown names, numbers out of range, or an output that belongs to another run or that another
            process is writing to.
        OSError: the disk is full. Finished episodes are kept.
        RuntimeError: an environment failed. Finished episodes are kept.
    """
    settings = settings or EvaluationSettings()
    if settings.ray is not None:
        import_ray()
    if isinstance(suite, str):
        suite = make_suite(suite, settings)
    if settings.episodes is None:
        settings = replace(settings, episodes=getattr(suite, "episodes", DEFAULT_EPISODES))
    _chunk_strategy(suite, settings)
    load: Callable[[], Policy] = partial(_same, policy)
    if isinstance(policy, str):
        load = partial(load_policy, policy, suite, settings)
        policy = load()
    check_controls(policy, suite, settings)
    if getattr(suite, "renderer", None) == "cpu":
        report(
            "renderer=cpu draws no shadows and other colours than egl: do not compare its scores with published ones"
        )
    instructions = list(suite.tasks)
    tasks = choose_tasks(settings.tasks, len(instructions))
    selected = [(task, episode) for task in tasks for episode in settings.episode_numbers]
    described = {
        **suite.describe(),
        "policy": policy.name,
        "black_images": settings.black_images,
        "instruction": settings.instruction,
        "execute": settings.execute,
        "ensemble": settings.ensemble,
        **({} if settings.ensemble is None else {"binary_gripper": "of the newest chunk"}),
        **settings.timing(),
        **(policy.describe() if hasattr(policy, "describe") else {}),
    }
    output = Path(output)
    shard = None if settings.shard is None else Shard.parse(settings.shard)
    if shard is not None:
        output, whole, selected = output / shard.folder, selected, shard.part(selected)
    with exclusive_folder(output):
        if shard is not None:
            shard.record(output, whole, instructions)
        results = ResultsFile(output, described)
        missing = [key for key in selected if key not in results.done]
        if len(missing) < len(selected) and (settings.rollouts or settings.save_actions):
            report(
                f"{len(selected) - len(missing)} episodes were played before: of these no films or actions are written"
            )
        timing = Timing()
        if missing:
            loop = _EpisodeLoop(policy, suite, settings, described, results, timing, report)
            loop.play(missing, load)
        results.sort()
        finished = [result for result in results.results if result.key in set(selected)]
        return write_summary(output, finished, instructions, described, timing)


def _same(policy: Policy) -> Policy:
    return policy


def make_suite(name: str, settings: EvaluationSettings) -> Suite:
    """The suite of this name.

    Raises:
        ValueError: an unknown name, or settings that are for other suites.
        ImportError: the simulator is missing.
    """
    default = EvaluationSettings()
    if name == CALVIN:
        for option in ("placement", "seed", "hard_reset"):
            if getattr(settings, option) != getattr(default, option):
                raise ValueError(f"{option}={getattr(settings, option)!r} is not for suite={name!r}")
        return published_suite(settings.schedule, settings.renderer)
    for option in ("schedule", "renderer"):
        if getattr(settings, option) != getattr(default, option):
            raise ValueError(f"{option}={getattr(settings, option)!r} is for suite={CALVIN!r} only, not {name!r}")
    return LiberoSuite(name, placement=settings.placement, seed=settings.seed, hard_reset=settings.hard_reset)


def check_controls(policy: Policy | ResidentPolicy | None, suite: Suite, settings: EvaluationSettings) -> None:
    """Refuses settings that the suite or the policy cannot play, before anything is built.

    Args:
        policy: None checks what does not depend on it.
        suite: the suite.
        settings: of the evaluation.

    Raises:
        ValueError: the message names the setting.
    """
    is_libero = isinstance(suite, LiberoSuite)
    if isinstance(policy, OraclePolicy) and (suite.name == CALVIN or is_libero and suite.base != "libero_object"):
        raise ValueError(f"policy='oracle' solves suite='libero_object' only, got {suite.name!r}")
    if settings.instruction == "other" and is_libero and suite.name not in PLACED:
        raise ValueError(f"instruction='other' is for {', '.join(PLACED)}, got suite={suite.name!r}")
    if settings.strategy == "async-rolled" and suite.robot not in STATE_MODELS:
        raise ValueError(
            f"strategy='async-rolled' knows how actions move {', '.join(STATE_MODELS)}, not {suite.robot!r}"
        )
    if settings.delay and not changes(get_robot(suite.robot)).any():
        raise ValueError(
            f"delay={settings.delay} needs a robot whose actions are changes; the targets of {suite.robot!r} say "
            "nothing about how the arm holds still before the first chunk"
        )
    tasks = choose_tasks(settings.tasks, len(suite.tasks))
    if is_libero:
        check_scenes(suite, tasks, settings.episode_numbers, settings.instruction)


def _chunk_strategy(suite: Suite, settings: EvaluationSettings) -> ChunkStrategy | PublishedSchedule:
    """What executes chunks: the suite's choice, where it has one. A binary gripper is the newest chunk's."""
    if hasattr(suite, "chunk_strategy"):
        return suite.chunk_strategy(settings)
    return settings.chunk_strategy(averaged=np.array(get_robot(suite.robot).action_mask))


def load_policy(name: str, suite: Suite, settings: EvaluationSettings) -> Policy | ResidentPolicy:
    """The policy of this name for a suite. A checkpoint takes the statistics of the suite, or of its base suite."""
    options = {"unnorm_key": settings.unnorm_key, "device": settings.device, "dtype": settings.dtype}
    return make_policy(name, suite.robot, suite=getattr(suite, "base", suite.name), **options)


@contextmanager
def _leave_cores_to(environments: int) -> Iterator[None]:
    """Keeps the policy's threads off the cores on which the other environments work in the meantime."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads - environments + 1))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class _Schedule:
    """Gives a worker the next episode of the task whose environment it has, else one of the fullest task."""

    def __init__(self, missing: Sequence[tuple[int, int]]) -> None:
        self._left: dict[int, list[int]] = {}
        for task, episode in missing:
            self._left.setdefault(task, []).append(episode)
        self._busy: dict[int, int] = {}

    def give_back(self, task: int, episode: int) -> None:
        """An episode that has to be played again."""
        self._left.setdefault(task, []).insert(0, episode)

    def next(self, worker: int) -> tuple[int, int] | None:
        task = self._busy.get(worker)
        if task not in self._left:
            if not self._left:
                return None
            # Building an environment takes seconds: a task is shared only when no other is left.
            others = set(self._busy.values())
            task = max(self._left, key=lambda name: (name not in others, len(self._left[name]), -name))
        self._busy[worker] = task
        episode = self._left[task].pop(0)
        if not self._left[task]:
            del self._left[task]
        return task, episode


@dataclass
class _Slot:
    """One worker and the episode that it plays."""

    worker: int
    strategy: ChunkStrategy | PublishedSchedule
    hold: np.ndarray | None = None  # what is executed where no action of a chunk is left
    task: int | None = None
    episode: int = 0
    report: Report | None = None
    queries: list[int] = field(default_factory=list)
    latency: list[float] = field(default_factory=list)


class _EpisodeLoop:
    """The loop that feeds workers and policy."""

    def __init__(
        self,
        policy: Policy | ResidentPolicy,
        suite: Suite,
        settings: EvaluationSettings,
        described: dict[str, Any],
        results: ResultsFile,
        timing: Timing,
        report_progress: Callable[[str], None],
    ) -> None:
        self.policy, self.suite, self.settings = policy, suite, settings
        self.results, self.timing, self.report_progress = results, timing, report_progress
        self.resident = policy if hasattr(policy, "attach") else None
        self.preset = get_robot(suite.robot)
        self.filmed = set(sorted(settings.episode_numbers)[: settings.rollouts])
        self.common = {
            "suite": suite.name,
            "seed": int(described.get("seed", 0)),
            "placement": str(described.get("placement", "official")),
            "black_images": settings.black_images,
        }

    def play(self, missing: Sequence[tuple[int, int]], load: Callable[[], Policy]) -> None:
        """Plays the (task, episode) pairs in `missing`; `load` loads the policy on other machines."""
        began = time.perf_counter()
        self.schedule = _Schedule(missing)
        try:
            with self._pool(len(missing), load) as self.pool:
                self.slots = [
                    _Slot(worker, _chunk_strategy(self.suite, self.settings)) for worker in range(len(self.pool))
                ]
                with _leave_cores_to(self.pool.local_processes):
                    self._play_slots()
        except ChildProcessError as error:
            raise ChildProcessError(f"{error} {getattr(self.suite, 'crash_hint', '')}".rstrip()) from error
        finally:
            self.timing.wall = time.perf_counter() - began

    @contextmanager
    def _pool(self, episodes: int, load: Callable[[], Policy]) -> Iterator[WorkerPool | RayPool]:
        """The environments; on a cluster, also the copies of the policy."""
        settings, count = self.settings, min(self.settings.processes, episodes)
        if settings.ray is None:
            with WorkerPool(self.suite, count) as pool:
                yield pool
            return
        with connected(settings.ray) as ray, ExitStack() as stack:
            if settings.replicas and self.resident is None:
                gpus = 1 if (settings.device or "").startswith("cuda") else 0
                copies = ReplicatedPolicy(ray, self.policy, load, settings.replicas, gpus)
                self.policy = stack.enter_context(closing(copies))
            yield stack.enter_context(RayPool(ray, self.suite, max(1, count)))

    def _play_slots(self) -> None:
        working = {slot.worker for slot in self.slots if self._begin(slot)}
        while working:
            waiting = []
            for worker, report in self.pool.receive(sorted(working)):
                slot = self.slots[worker]
                slot.report = report
                if report is None:
                    self.report_progress(f"task {slot.task} episode {slot.episode}: its environment is lost; again")
                    self.schedule.give_back(slot.task, slot.episode)
                elif not report.finished:
                    waiting.append(slot)
                    continue
                else:
                    self._end(slot)
                if not self._begin(slot):
                    working.discard(worker)
                    self.pool.release(worker)
            if waiting:
                self._answer(waiting)

    def _begin(self, slot: _Slot) -> bool:
        entry = self.schedule.next(slot.worker)
        if entry is None:
            return False
        slot.task, slot.episode = entry
        slot.strategy.reset()
        slot.hold = standing_still(self.preset)
        slot.queries, slot.latency = [], []
        filmed = slot.episode in self.filmed
        observe = self.resident is None and self.policy.needs_observation
        message = Begin(
            task=slot.task,
            episode=slot.episode,
            instruction=self.settings.instruction,
            observe=observe,
            render=filmed or (observe and not self.settings.black_images),
            frames_every=FRAMES_EVERY if filmed else 0,
            resident=self.resident,
            step_limit=self.settings.step_limit,
        )
        self.pool.send(slot.worker, message)
        return True

    def _answer(self, slots: list[_Slot]) -> None:
        """One batched query for all environments that have run out of actions; then they go on."""
        requests = []
        for slot in slots:
            if slot.report.began_subtask:
                slot.strategy.reset()
            observation = slot.report.observation
            if self.settings.black_images:
                observation = blackened(observation)
            upcoming = slot.strategy.ask(self.settings.delay)
            if observation is not None and len(upcoming):
                state = STATE_MODELS[self.suite.robot].roll(observation.state, upcoming)
                observation = replace(observation, state=state)
            requests.append(Request(observation, slot.report.instruction, slot.task, slot.episode, slot.report.steps))
        started = time.perf_counter()
        chunks = self.policy.predict(requests)
        seconds = time.perf_counter() - started
        self.timing.policy += seconds
        for slot, chunk in zip(slots, chunks, strict=True):
            slot.queries.append(slot.report.steps)
            slot.latency.append(round(seconds, 6))
            actions = self._actions_until_query(slot, chunk)
            self.pool.send(slot.worker, Execute(self.preset.to_environment(actions)))

    def _actions_until_query(self, slot: _Slot, chunk: np.ndarray) -> np.ndarray:
        """What is executed while the policy thinks, and then until it is asked again: (n, A)."""
        delay = self.settings.delay
        actions = [self._next_action(slot) for _ in range(delay)]
        slot.strategy.answer(chunk)
        while not slot.strategy.wants_chunk(delay):
            actions.append(self._next_action(slot))
        return np.stack(actions)

    def _next_action(self, slot: _Slot) -> np.ndarray:
        action = slot.strategy.next_action()
        if action is not None:
            slot.hold = np.where(changes(self.preset), 0.0, action)
        return slot.hold if action is None else action

    def _end(self, slot: _Slot) -> None:
        report = slot.report
        self.timing.add(report.seconds, report.counts)
        result = EpisodeResult(
            **self.common,
            task=slot.task,
            episode=slot.episode,
            instruction=report.instruction,
            task_instruction=report.task_instruction if report.task_instruction != report.instruction else None,
            steps=report.steps,
            success=report.success,
            latency=slot.latency,
            info=report.info,
        )
        # Films and actions first: an episode whose line is written is never played again.
        self._write_extras(slot)
        self.results.append(result)
        self._report(result)

    def _write_extras(self, slot: _Slot) -> None:
        report, output = slot.report, self.results.path.parent
        name = f"{slot.task:02d}-{slot.episode:04d}"
        if report.frames:
            shown = report.frames, slot.queries, report.steps, report.success
            write_rollout(output / "rollouts" / f"{name}.{self.settings.rollout_format}", draw_rollout(*shown))
            text = ", then ".join(report.info.get("instructions", [report.instruction]))
            write_picture(output / "rollouts" / f"{name}.png", draw_contact_sheet(*shown, text))
        if self.settings.save_actions and report.actions is not None:
            with atomic_path(output / "actions" / f"{name}.npy") as temporary:
                np.save(temporary, report.actions)

    def _report(self, result: EpisodeResult) -> None:
        finished = self.results.results
        if "completed" in result.info:
            score = score_sequences([other.info["completed"] for other in finished])
            rates = " ".join(f"{100 * rate:.1f}" for rate in score["success_rates"])
            self.report_progress(
                f"sequence {result.episode}: {result.info['completed']} in a row after {result.steps} steps | "
                f"all {len(finished)}: {rates} %, average length {score['average_length']:.2f}"
            )
            return
        task = [other for other in finished if other.task == result.task]
        solved = sum(other.success for other in finished)
        low, high = wilson_interval(solved, len(finished))
        self.report_progress(
            f"task {result.task} episode {result.episode}: {'solved' if result.success else 'failed'} after "
            f"{result.steps} steps | task {sum(other.success for other in task)}/{len(task)} | "
            f"all {len(finished)}: {100 * solved / len(finished):.1f} % ({100 * low:.1f}–{100 * high:.1f})"
        )
