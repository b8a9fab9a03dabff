"""Environments in processes of their own. The parent asks the policy; a worker only resets, steps and renders."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

import numpy as np

from vla_adapter_hf.simulation.environment import Environment, Observation, Suite
from vla_adapter_hf.simulation.policies import ResidentPolicy


def process_pool(workers: int) -> ProcessPoolExecutor:
    """Processes for jobs with environments of their own. They end with this one, even if it is killed."""
    # A forked copy of a process that has rendered or computed on a GPU is broken.
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(max_workers=workers, mp_context=context, initializer=_end_with_parent)


def _end_with_parent() -> None:
    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@dataclass(frozen=True)
class Begin:
    """Parent to worker: reset to this episode and report.

    Attributes:
        instruction: what to tell the policy instead of the task's own words; `other` names another object in view.
        observe: whether the policy looks at observations.
        render: whether anyone looks at the frames; without, environments that can do so render nothing.
        frames_every: keep a frame every so many steps for a rollout; 0 keeps none.
        resident: plays the whole episode in the worker, without the parent.
    """

    task: int
    episode: int
    instruction: str | None
    observe: bool
    render: bool = True
    frames_every: int = 0
    resident: ResidentPolicy | None = None


@dataclass(frozen=True)
class Execute:
    """Parent to worker: execute these actions (n, A), the environment's convention, then report."""

    actions: np.ndarray


@dataclass
class Report:
    """Worker to parent: the episode has begun, goes on, or is over (`finished`).

    Attributes:
        seconds: time spent so far in this episode: `build`, `reset`, `observed` and `blind` steps.
        counts: number of `observed` and `blind` steps.
        frames: (step, frames of all cameras side by side), sent with the last report.
        actions: (steps, A) executed so far, sent with the last report.
    """

    observation: Observation | None = None
    instruction: str = ""
    task_instruction: str = ""
    info: dict[str, Any] = field(default_factory=dict)
    steps: int = 0
    success: bool = False
    finished: bool = False
    seconds: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    frames: list[tuple[int, np.ndarray]] = field(default_factory=list)
    actions: np.ndarray | None = None


# What is wrong with a call or an installation, and not with an environment.
USERS_ERRORS = (ValueError, TypeError, ImportError, OSError)


@dataclass(frozen=True)
class Failure:
    """Worker to parent, instead of a report: an exception, which ends the worker."""

    kind: type[Exception]
    message: str
    trace: str


class EpisodeRunner:
    """Plays episodes of a suite on request, keeping the environment of the last task."""

    def __init__(self, suite: Suite) -> None:
        self.suite = suite
        self._task: int | None = None
        self._environment: Environment | None = None

    def begin(self, message: Begin) -> Report:
        self._message = message
        self._seconds = {"build": 0.0, "reset": 0.0, "observed": 0.0, "blind": 0.0}
        self._counts = {"observed": 0, "blind": 0}
        self._frames: list[tuple[int, np.ndarray]] = []
        self._actions: list[np.ndarray] = []
        started = time.perf_counter()
        if self._task != message.task:
            self.close()
            self._environment = self.suite.make(message.task)
            self._task = message.task
        built = time.perf_counter()
        environment = self._environment
        if hasattr(environment, "render"):
            environment.render = message.render
        self._told, self._info, self._official = begin_episode(environment, message, self.suite)
        self._seconds["build"] = built - started
        self._seconds["reset"] = time.perf_counter() - built
        if message.frames_every:
            self._keep_frame(environment.observe())
        if message.resident is not None:
            return self._play_out(message.resident)
        return self._report(environment.observe() if message.observe else None)

    def execute(self, message: Execute) -> Report:
        """Executes actions until they run out, the task is solved or the limit is reached."""
        limit = self._environment.step_limit
        last = len(message.actions) - 1
        for index, action in enumerate(message.actions):
            # After the limit's step nobody is asked any more.
            asked = self._message.observe and index == last and len(self._actions) + 1 < limit
            success = self._step(action, observe=asked)
            if success or len(self._actions) >= limit:
                return self._report(None, success=success, finished=True)
        return self._report(self._environment.observe() if self._message.observe else None)

    def close(self) -> None:
        if self._environment is not None:
            self._environment.close()
        self._environment = self._task = None

    def _play_out(self, resident: ResidentPolicy) -> Report:
        act = resident.attach(self._environment)
        success = False
        while not success and len(self._actions) < self._environment.step_limit:
            success = self._step(act(), observe=False)
        return self._report(None, success=success, finished=True)

    def _step(self, action: np.ndarray, observe: bool) -> bool:
        number = len(self._actions) + 1
        every = self._message.frames_every
        keep = bool(every) and number % every == 0
        kind = "observed" if observe or keep else "blind"
        started = time.perf_counter()
        success = self._environment.step(action, observe=observe or keep)
        self._seconds[kind] += time.perf_counter() - started
        self._counts[kind] += 1
        self._actions.append(np.asarray(action, dtype=np.float32))
        if keep:
            self._keep_frame(self._environment.observe())
        return success

    def _keep_frame(self, observation: Observation) -> None:
        height = min(image.shape[0] for image in observation.images)
        tiles = [image[:height] for image in observation.images]
        self._frames.append((len(self._actions), np.concatenate(tiles, axis=1)))

    def _report(self, observation: Observation | None, success: bool = False, finished: bool = False) -> Report:
        return Report(
            observation=observation,
            instruction=self._told,
            task_instruction=self._official,
            info=self._info,
            steps=len(self._actions),
            success=success,
            finished=finished,
            seconds=dict(self._seconds),
            counts=dict(self._counts),
            frames=self._frames if finished else [],
            actions=np.stack(self._actions) if finished and self._actions else None,
        )


def begin_episode(environment: Environment, message: Begin, suite: Suite) -> tuple[str, dict[str, Any], str]:
    """Resets the environment and returns what the policy is told, what was drawn, and the task's own words.

    If the instruction names another object of a libero_object scene, success is that object's; any other text is only
    told to the policy, and success stays the task's.

    Raises:
        ValueError: the instruction is another task's, and this scene does not hold its object.
    """
    objects = list(getattr(environment, "movable_objects", ()))
    wanted = message.instruction
    if wanted is None:
        info = environment.reset(message.episode)
        return environment.instruction, info, environment.instruction
    official = suite.tasks[message.task]
    target = None
    if wanted == "other":
        if len(objects) < 2:
            raise ValueError(f"instruction='other' needs a suite whose scenes hold other objects, not {suite.name!r}")
        # Every distractor has its turn, whatever the number of processes.
        target = objects[1 + (message.episode + message.task) % (len(objects) - 1)]
    elif objects:
        from vla_adapter_hf.simulation.libero.suite import object_instruction

        target = next((name for name in objects if object_instruction(name) == wanted), None)
    if target is None:
        if objects and wanted in suite.tasks:
            raise ValueError(
                f"instruction={wanted!r}: the scene of task {message.task} does not hold that object; choose tasks that do"
            )
        info = environment.reset(message.episode)
        return wanted, info, official
    info = environment.reset(message.episode, target=target)
    return environment.instruction, {**info, "target": target}, official


def _serve(connection: Connection, suite: Suite) -> None:
    # Ctrl-C reaches the whole process group; the parent decides what happens.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    runner = EpisodeRunner(suite)
    try:
        failed = False
        while not failed:
            message = connection.recv()
            try:
                report = runner.begin(message) if isinstance(message, Begin) else runner.execute(message)
            except Exception as error:  # whatever it was, the parent must hear of it
                kind = next((kind for kind in USERS_ERRORS if isinstance(error, kind)), RuntimeError)
                report, failed = Failure(kind, str(error), traceback.format_exc()), True
            connection.send(report)
    except (EOFError, ConnectionError):
        pass  # the parent has finished, or was killed
    finally:
        runner.close()


class WorkerPool:
    """Environments side by side, one per process; with `processes=0` a single one in this process.

    Raises:
        RuntimeError: from `receive`, with the worker's traceback, if an environment failed; what the user can mend stays
            what it was, one of `USERS_ERRORS`.
        ChildProcessError: from `receive`, if a process died.
    """

    def __init__(self, suite: Suite, processes: int) -> None:
        self._local = EpisodeRunner(suite) if processes == 0 else None
        self._inbox: list[Report] = []
        self._processes: list[Any] = []
        self._connections: list[Connection] = []
        # A forked copy of a process that has rendered or computed on a GPU is broken.
        context = multiprocessing.get_context("spawn")
        for _ in range(processes):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, suite), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._connections.append(ours)

    def __len__(self) -> int:
        return max(1, len(self._processes))

    def send(self, worker: int, message: Begin | Execute) -> None:
        if self._local is not None:
            begun = isinstance(message, Begin)
            self._inbox.append(self._local.begin(message) if begun else self._local.execute(message))
        else:
            self._connections[worker].send(message)

    def receive(self, waiting: Sequence[int]) -> list[tuple[int, Report]]:
        """Reports of all workers among `waiting` that have one, at least one of them; in the order of their numbers."""
        if self._local is not None:
            return [(0, self._inbox.pop())]
        ready = wait([self._connections[worker] for worker in waiting])
        reports = []
        for worker in waiting:
            if self._connections[worker] not in ready:
                continue
            try:
                report = self._connections[worker].recv()
            except EOFError as error:
                self._processes[worker].join(timeout=10)
                raise ChildProcessError(
                    f"an environment's process ended unexpectedly (exit code {self._processes[worker].exitcode}; -9 is often too "
                    "little memory: use fewer processes). Episodes that had ended are kept; the same call goes on with the rest."
                ) from error
            if isinstance(report, Failure):
                failure = RuntimeError(f"an environment failed:\n{report.trace}")
                if report.kind is RuntimeError:
                    raise failure
                raise report.kind(report.message) from failure
            reports.append((worker, report))
        return reports

    def close(self) -> None:
        if self._local is not None:
            self._local.close()
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.join(timeout=10)
            if process.is_alive():
                process.terminate()
