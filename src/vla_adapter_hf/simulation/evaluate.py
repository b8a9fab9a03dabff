"""Closed-loop evaluation: many environments, one batched policy, results that survive a kill."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from vla_adapter_hf.robots import get_robot
from vla_adapter_hf.simulation.action_queue import ActionChunkQueue
from vla_adapter_hf.simulation.environment import Suite
from vla_adapter_hf.simulation.libero.suite import LiberoSuite
from vla_adapter_hf.simulation.policies import OraclePolicy, Policy, Request, ResidentPolicy, blackened, make_policy
from vla_adapter_hf.simulation.results import (
    PUBLISHED_SUITES,
    EpisodeResult,
    ResultsFile,
    published_table,
    summarise,
    task_table,
    wilson_interval,
)
from vla_adapter_hf.simulation.rollout import draw_contact_sheet, draw_rollout, write_picture, write_rollout
from vla_adapter_hf.simulation.workers import Begin, Execute, Report, WorkerPool
from vla_adapter_hf.utils.files import atomic_path, exclusive_folder, write_json, write_text


@dataclass
class _Slot:
    """One worker and the episode that it plays."""

    worker: int
    queue: ActionChunkQueue
    task: int | None = None
    episode: int = 0
    report: Report | None = None
    queries: list[int] = field(default_factory=list)
    latency: list[float] = field(default_factory=list)


@dataclass
class Timing:
    """Where the seconds went, summed over all environments; `wall` is what the clock on the wall says.

    Attributes:
        physics: steps without frames, and the share of the others that those would have taken.
        rendering: the rest of the steps with frames.
        policy: queries.
    """

    wall: float = 0.0
    build: float = 0.0
    reset: float = 0.0
    physics: float = 0.0
    rendering: float = 0.0
    policy: float = 0.0
    episodes: int = 0
    steps: int = 0

    def add(self, report: Report) -> None:
        seconds, counts = report.seconds, report.counts
        blind = seconds["blind"] / counts["blind"] if counts["blind"] else 0.0
        physics = min(seconds["observed"], blind * counts["observed"])
        self.build += seconds["build"]
        self.reset += seconds["reset"]
        self.physics += seconds["blind"] + physics
        self.rendering += seconds["observed"] - physics
        self.episodes += 1
        self.steps += report.steps

    def table(self) -> str:
        """A Markdown table: episodes per minute and the share of each part in the time spent."""
        parts = {name: getattr(self, name) for name in ("rendering", "physics", "policy", "reset", "build")}
        total = sum(parts.values()) or 1.0
        head = "| Episodes per minute | Steps per second | " + " | ".join(f"{name}, %" for name in parts) + " |"
        rates = f"| {60 * self.episodes / (self.wall or 1.0):.1f} | {self.steps / (self.wall or 1.0):.1f} | "
        shares = " | ".join(f"{100 * seconds / total:.0f}" for seconds in parts.values())
        return "\n".join([head, "|---|---|" + "---|" * len(parts), rates + shares + " |"]) + "\n"


def evaluate(
    policy: str | Policy | ResidentPolicy,
    suite: str | Suite,
    output: str | Path,
    *,
    tasks: Iterable[int] | None = None,
    episodes: int | Iterable[int] = 50,
    placement: str = "official",
    seed: int = 0,
    hard_reset: bool = False,
    processes: int = 1,
    execute: int | None = None,
    ensemble: float | None = None,
    black_images: bool = False,
    instruction: str | None = None,
    rollouts: int = 0,
    rollout_format: str = "gif",
    save_actions: bool = False,
    unnorm_key: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    report: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Runs a policy in closed loop, by the published protocol unless told otherwise.

    Called again with the same arguments after a kill, it runs only what is missing. With more tasks or episodes it extends
    the run. The output folder holds `episodes.jsonl` (one line per episode), `settings.json`, `summary.json`,
    `summary.md` and, on request, `rollouts/` and `actions/`.

    Args:
        policy: `oracle`, `noop`, `embedded` (the checkpoint that ships with the package), a checkpoint's folder or Hub id,
            or an object of `policies.Policy`.
        suite: a LIBERO suite's name, or an object of `environment.Suite` (which then fixes placement and seed itself).
        output: folder of the results.
        tasks: numbers of the tasks; all by default.
        episodes: how many per task, or which. Episode e starts from initial state e.
        placement: LIBERO only: `official`, `jitter`, `shuffle` or `both`.
        seed: of the placements. The simulator's own seed is 0, as published.
        hard_reset: LIBERO only: rebuild the simulation before each episode, see `LiberoSuite`.
        processes: environments in parallel, one process each; 0 runs a single one in this process.
        execute: actions of a chunk that are executed before the next query; None is the whole chunk, as published.
        ensemble: temporal ensembling, see `ActionChunkQueue`.
        black_images: the policy sees black frames (a control).
        instruction: told to the policy instead of the task's words (a control). `other` names another object in view,
            and then success is that object's; so it is for a text that names one in libero_object's words.
        rollouts: how many episodes of each task to keep as films, each with a contact sheet (PNG) beside it. What was played
            before is not played again for it, nor for `save_actions`.
        rollout_format: `gif` or `mp4`.
        save_actions: keep the executed actions of every episode, for `ReplayPolicy`.
        unnorm_key, device, dtype: for checkpoints. The statistics of a suite are found by the suite's name; others, such as those
            of a dataset of your own, are named with `unnorm_key`.
        report: receives lines of progress.

    Returns:
        The summary as in `summary.json`, with `timing` of the episodes of the last call that played any.

    Raises:
        ValueError: unknown names, numbers out of range, an output that belongs to another run or that another process is
            writing to.
        RuntimeError: an environment failed; what was finished before is kept.
    """
    if processes < 0:
        raise ValueError(f"processes must be 0 or more, got {processes}")
    if rollout_format not in ("gif", "mp4"):
        raise ValueError(f"rollout_format must be 'gif' or 'mp4', got {rollout_format!r}")
    if rollouts < 0:
        raise ValueError(f"rollouts must be 0 or more films of each task, got {rollouts}")
    ActionChunkQueue(execute, ensemble)  # refuses what it cannot do before anything is written or built
    if isinstance(suite, str):
        suite = LiberoSuite(suite, placement=placement, seed=seed, hard_reset=hard_reset)
    if isinstance(policy, str):
        options = {"unnorm_key": unnorm_key, "suite": suite.name, "device": device, "dtype": dtype}
        policy = make_policy(policy, suite.robot, **options)
    if isinstance(suite, LiberoSuite) and suite.name != "libero_object":
        if isinstance(policy, OraclePolicy):
            raise ValueError(f"policy='oracle' solves suite='libero_object' only, got {suite.name!r}")
        if instruction == "other":
            raise ValueError(f"instruction='other' needs the objects of suite='libero_object', got {suite.name!r}")
    resident = policy if hasattr(policy, "attach") else None
    known = list(suite.tasks)
    chosen = list(range(len(known))) if tasks is None else list(dict.fromkeys(tasks))
    if not chosen or any(not 0 <= task < len(known) for task in chosen):
        raise ValueError(f"tasks must be among 0...{len(known) - 1}, got {chosen}")
    numbers = list(range(episodes)) if isinstance(episodes, int) else list(dict.fromkeys(episodes))
    if not numbers or min(numbers) < 0:
        raise ValueError(f"episodes must be a positive number or numbers of 0 or more, got {episodes!r}")

    described = suite.describe()
    settings = {
        **described,
        "policy": policy.name,
        "black_images": black_images,
        "instruction": instruction,
        "execute": execute,
        "ensemble": ensemble,
        **(policy.describe() if hasattr(policy, "describe") else {}),
    }
    output = Path(output)
    with exclusive_folder(output):
        results = ResultsFile(output, settings)
        missing = [(task, number) for task in chosen for number in numbers if (task, number) not in results.done]
        finished = len(chosen) * len(numbers) - len(missing)
        if finished and (rollouts or save_actions):
            report(f"{finished} episodes were played before: of them no films or actions are written now")
        timing = Timing()
        if missing:
            pool = WorkerPool(suite, min(processes, len(missing)))
            slots = [_Slot(worker, ActionChunkQueue(execute, ensemble)) for worker in range(len(pool))]
            run = _Run(policy, resident, suite, pool, slots, _Schedule(missing), results, timing, report, output)
            run.black_images, run.instruction = black_images, instruction
            run.filmed = {task: set(sorted(numbers)[:rollouts]) for task in chosen}
            run.rollout_format, run.save_actions = rollout_format, save_actions
            run.template = EpisodeResult(
                suite=suite.name,
                task=0,
                episode=0,
                seed=int(described.get("seed", 0)),
                placement=str(described.get("placement", "official")),
                black_images=black_images,
                instruction="",
                steps=0,
                success=False,
            )
            began = time.perf_counter()
            try:
                with _leave_cores_to(len(pool)):
                    run.play()
            finally:
                timing.wall = time.perf_counter() - began
                pool.close()
        wanted = {(task, number) for task in chosen for number in numbers}
        results.sort()
        selected = [result for result in results.results if result.key in wanted]
        return _finish(output, selected, known, settings, timing, policy.name, suite)


@contextmanager
def _leave_cores_to(environments: int) -> Iterator[None]:
    """While one environment waits for the policy the others work: the policy's threads must not take their cores."""
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
class _Run:
    """The loop that feeds workers and policy."""

    policy: Any
    resident: ResidentPolicy | None
    suite: Suite
    pool: WorkerPool
    slots: list[_Slot]
    schedule: _Schedule
    results: ResultsFile
    timing: Timing
    say: Callable[[str], None]
    output: Path
    black_images: bool = False
    instruction: str | None = None
    filmed: dict[int, set[int]] = field(default_factory=dict)
    rollout_format: str = "gif"
    save_actions: bool = False
    template: EpisodeResult | None = None

    def play(self) -> None:
        self._preset = get_robot(self.suite.robot)
        working = {slot.worker for slot in self.slots if self._begin(slot)}
        while working:
            waiting = []
            for worker, report in self.pool.receive(sorted(working)):
                slot = self.slots[worker]
                slot.report = report
                if not report.finished:
                    waiting.append(slot)
                else:
                    self._end(slot)
                    if not self._begin(slot):
                        working.discard(worker)
            if waiting:
                self._answer(waiting)

    def _begin(self, slot: _Slot) -> bool:
        entry = self.schedule.next(slot.worker)
        if entry is None:
            return False
        slot.task, slot.episode = entry
        slot.queue.reset()
        slot.queries, slot.latency = [], []
        filmed = slot.episode in self.filmed.get(slot.task, ())
        observe = self.resident is None and self.policy.needs_observation
        seen = observe and not self.black_images
        message = Begin(
            task=slot.task,
            episode=slot.episode,
            instruction=self.instruction,
            observe=observe,
            render=seen or filmed,
            frames_every=4 if filmed else 0,
            resident=self.resident,
        )
        self.pool.send(slot.worker, message)
        return True

    def _answer(self, slots: list[_Slot]) -> None:
        """One batched query for all environments that have run out of actions; then they go on."""
        requests = []
        for slot in slots:
            observation = slot.report.observation
            if self.black_images:
                observation = blackened(observation)
            requests.append(Request(observation, slot.report.instruction, slot.task, slot.episode, slot.report.steps))
        started = time.perf_counter()
        chunks = self.policy.predict(requests)
        seconds = time.perf_counter() - started
        self.timing.policy += seconds
        for slot, chunk in zip(slots, chunks, strict=True):
            slot.queries.append(slot.report.steps)
            slot.latency.append(round(seconds, 6))
            slot.queue.add(chunk)
            actions = np.stack([slot.queue.pop() for _ in range(slot.queue.steps_until_query())])
            self.pool.send(slot.worker, Execute(self._preset.to_environment(actions)))

    def _end(self, slot: _Slot) -> None:
        report = slot.report
        self.timing.add(report)
        told = report.instruction
        result = replace(
            self.template,
            task=slot.task,
            episode=slot.episode,
            instruction=told,
            task_instruction=report.task_instruction if report.task_instruction != told else None,
            steps=report.steps,
            success=report.success,
            latency=slot.latency,
            info=report.info,
        )
        name = f"{slot.task:02d}-{slot.episode:04d}"
        # Films and actions first: an episode whose line is written is never played again.
        if report.frames:
            images = draw_rollout(report.frames, slot.queries, report.steps, report.success)
            write_rollout(self.output / "rollouts" / f"{name}.{self.rollout_format}", images)
            sheet = draw_contact_sheet(report.frames, slot.queries, report.steps, report.success, told)
            write_picture(self.output / "rollouts" / f"{name}.png", sheet)
        if self.save_actions and report.actions is not None:
            folder = self.output / "actions"
            with atomic_path(folder / f"{name}.npy") as temporary:
                np.save(temporary, report.actions)
        self.results.append(result)
        self._progress(result)

    def _progress(self, result: EpisodeResult) -> None:
        finished = self.results.results
        task = [other for other in finished if other.task == result.task]
        rate = sum(other.success for other in finished) / len(finished)
        low, high = wilson_interval(sum(other.success for other in finished), len(finished))
        self.say(
            f"task {result.task} episode {result.episode}: {'solved' if result.success else 'failed'} after "
            f"{result.steps} steps | task {sum(other.success for other in task)}/{len(task)} | "
            f"all {len(finished)}: {100 * rate:.1f} % ({100 * low:.1f}–{100 * high:.1f})"
        )


def _finish(
    output: Path,
    results: list[EpisodeResult],
    tasks: list[str],
    settings: dict[str, Any],
    timing: Timing,
    policy: str,
    suite: Suite,
) -> dict[str, Any]:
    summary = {**summarise(results, tasks), "settings": settings}
    controls = [f"placement {settings.get('placement', 'official')}"]
    if settings["black_images"]:
        controls.append("black images")
    if settings["instruction"]:
        controls.append(f"instruction: {settings['instruction']}")
    if settings["execute"]:
        controls.append(f"{settings['execute']} actions of each chunk executed")
    if settings["ensemble"] is not None:
        controls.append(f"chunks averaged with ensemble={settings['ensemble']:g}")
    # Published scores stand beside those of the published protocol only: every task from each of its 50 states.
    official = suite.name in PUBLISHED_SUITES and controls == ["placement official"]
    whole = {result.key for result in results} == set(product(range(len(tasks)), range(50)))
    summary["published_protocol"] = official and whole
    text = f"## {policy} on {suite.name}\n\n{', '.join(controls)}; {len(results)} episodes; 95 % Wilson intervals.\n\n"
    text += published_table({policy: {suite.name: summary}}, compare=official and whole) + "\n" + task_table(summary)
    if timing.episodes:
        summary["timing"] = {name: round(value, 3) for name, value in vars(timing).items()}
    elif (output / "summary.json").exists():
        before = json.loads((output / "summary.json").read_text(encoding="utf-8"))
        summary |= {name: before[name] for name in ("timing",) if name in before}
    if "timing" in summary:
        text += "\n" + Timing(**summary["timing"]).table()
    write_json(output / "summary.json", summary)
    write_text(output / "summary.md", text)
    return summary
