"""Environments in processes of their own. The parent queries the policy; a worker only resets, steps and renders.

The pool is hand-written because a worker keeps its environment between messages, which executors cannot promise.
"""

from __future__ import annotations

import multiprocessing
import signal
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

import numpy as np

from vla_adapter_hf.simulation.environment import Environment, Observation, Suite
from vla_adapter_hf.simulation.policies import ResidentPolicy


@dataclass(frozen=True)
class Begin:
    """Parent to worker: reset to this episode and report.

    Attributes:
        instruction: text for the policy instead of the task's instruction; `other` asks for something else in view.
        observe: whether the policy uses observations.
        render: whether anyone uses the frames. If not, environments that can do so render nothing.
        frames_every: keep a frame every so many steps for a rollout; 0 keeps none.
        step_limit: steps after which the episode has failed; by default the environment's.
        resident: plays the whole episode in the worker, without the parent.
    """

    task: int
    episode: int
    instruction: str | None
    observe: bool
    render: bool = True
    frames_every: int = 0
    resident: ResidentPolicy | None = None
    step_limit: int | None = None


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
        began_subtask: the next one of several subtasks has begun, so what is left of the chunk is out of date.
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
    began_subtask: bool = False


USERS_ERRORS = (ValueError, ImportError, OSError)
"""Before the first step these come from the call or the installation, and the message is for the user. Afterwards they
are bugs, like all other errors, and are reported with the worker's traceback."""


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
        self.steps = 0  # of the present episode
        self._task: int | None = None
        self._environment: Environment | None = None

    def answer(self, message: Begin | Execute) -> Report:
        """Does what the message says."""
        return self.begin(message) if isinstance(message, Begin) else self.execute(message)

    def begin(self, message: Begin) -> Report:
        """Resets to an episode; with a resident policy, plays it to its end."""
        self._message = message
        self.steps = self._subtask_began = 0
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
        self._instruction, self._info, self._task_instruction = begin_episode(environment, message, self.suite)
        self._seconds["build"] = built - started
        self._seconds["reset"] = time.perf_counter() - built
        if message.frames_every:
            self._keep_frame(environment.observe())
        if message.resident is not None:
            return self._play_out(message.resident)
        return self._report(self._observation())

    def execute(self, message: Execute) -> Report:
        """Executes actions until they run out, the task is solved or the limit is reached."""
        last = len(message.actions) - 1
        for index, action in enumerate(message.actions):
            # There is no query after the last step.
            observe = self._message.observe and index == last and self._steps_left() > 1
            if self._step(action, observe=observe):
                if not self._next_subtask():
                    return self._report(None, success=True, finished=True)
                return self._report(self._observation(), began_subtask=True)
            if not self._steps_left():
                return self._report(None, finished=True)
        return self._report(self._observation())

    def close(self) -> None:
        if self._environment is not None:
            self._environment.close()
        self._environment = self._task = None

    def _play_out(self, resident: ResidentPolicy) -> Report:
        act = resident.attach(self._environment)
        while self._steps_left():
            if self._step(act(), observe=False) and not self._next_subtask():
                return self._report(None, success=True, finished=True)
        return self._report(None, finished=True)

    def _steps_left(self) -> int:
        """Of the task, or of the present one of several subtasks."""
        return (self._message.step_limit or self._environment.step_limit) - (self.steps - self._subtask_began)

    def _next_subtask(self) -> bool:
        """Goes on to the next one of several subtasks; False if the episode is over."""
        environment = self._environment
        if not hasattr(environment, "next_subtask") or not environment.next_subtask():
            return False
        self._subtask_began = self.steps
        self._instruction, self._task_instruction = environment.instruction, environment.task_instruction
        return True

    def _observation(self) -> Observation | None:
        return self._environment.observe() if self._message.observe else None

    def _step(self, action: np.ndarray, observe: bool) -> bool:
        self.steps += 1
        every = self._message.frames_every
        keep = bool(every) and self.steps % every == 0
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
        height = max(image.shape[0] for image in observation.images)
        tiles = [np.pad(image, ((0, height - len(image)), (0, 0), (0, 0))) for image in observation.images]
        self._frames.append((self.steps, np.concatenate(tiles, axis=1)))

    def _report(
        self,
        observation: Observation | None,
        success: bool = False,
        finished: bool = False,
        began_subtask: bool = False,
    ) -> Report:
        if finished and hasattr(self._environment, "outcome"):
            self._info = {**self._info, **self._environment.outcome()}
        return Report(
            observation=observation,
            instruction=self._instruction,
            task_instruction=self._task_instruction,
            info=self._info,
            steps=self.steps,
            success=success,
            finished=finished,
            seconds=dict(self._seconds),
            counts=dict(self._counts),
            frames=self._frames if finished else [],
            actions=np.stack(self._actions) if finished and self._actions else None,
            began_subtask=began_subtask,
        )


def begin_episode(environment: Environment, message: Begin, suite: Suite) -> tuple[str, dict[str, Any], str]:
    """Resets the environment and returns the policy's instruction, what was drawn, and the task's instruction.

    If the scene holds what the text asks for (`other_instructions`), success is that. Any other text only goes to the
    policy, and success stays the task's.

    Raises:
        ValueError: the text is another task's instruction, and this scene does not hold what it asks for.
    """
    text = message.instruction
    if hasattr(environment, "next_subtask"):
        info = environment.reset(message.episode, instruction=text)
        return environment.instruction, info, environment.task_instruction
    if text is None:
        info = environment.reset(message.episode)
        return environment.instruction, info, environment.instruction
    official = suite.tasks[message.task]
    others = list(getattr(environment, "other_instructions", ()))
    if text == "other":
        if not others:
            raise ValueError(
                f"instruction='other' needs a scene with something else to ask for; task {message.task} of "
                f"{suite.name!r} has none"
            )
        # Each has its turn, whatever the number of processes.
        text = others[(message.episode + message.task) % len(others)]
    if text in others:
        return text, environment.reset(message.episode, instruction=text), official
    if text != official and text in suite.tasks and hasattr(environment, "other_instructions"):
        raise ValueError(
            f"instruction={text!r}: the scene of task {message.task} does not hold what it asks for; choose tasks "
            "whose scenes do"
        )
    return text, environment.reset(message.episode), official


def answer_or_fail(runner: EpisodeRunner, message: Begin | Execute) -> Report | Failure:
    """The runner's report, or what went wrong."""
    try:
        return runner.answer(message)
    except Exception as error:
        is_users = not runner.steps and isinstance(error, USERS_ERRORS)
        kind = next(kind for kind in (*USERS_ERRORS, Exception) if isinstance(error, kind))
        return Failure(kind if is_users else RuntimeError, str(error), traceback.format_exc())


def check(report: Report | Failure) -> Report:
    """The report of another process.

    Raises:
        Exception: it is a failure; `WorkerPool` says of what kind.
    """
    if isinstance(report, Failure):
        failure = RuntimeError(f"an environment failed:\n{report.trace}")
        if report.kind is RuntimeError:
            raise failure
        raise report.kind(report.message) from failure
    return report


def _serve(connection: Connection, suite: Suite) -> None:
    # Ctrl-C reaches the whole process group; the parent decides what happens.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    runner = EpisodeRunner(suite)
    try:
        report: Report | Failure | None = None
        while not isinstance(report, Failure):
            report = answer_or_fail(runner, connection.recv())
            connection.send(report)
    except (EOFError, ConnectionError):
        pass  # the parent has finished, or was killed
    finally:
        runner.close()


class WorkerPool:
    """Environments in parallel, one per process; with `processes=0` a single one in this process.

    A context manager: where the block ends with an error, all processes are stopped at once.

    Raises:
        RuntimeError: from `receive`, with the worker's traceback, if an environment failed. An error that the user can
            repair keeps its type, one of `USERS_ERRORS`, and has the traceback as its cause.
        ChildProcessError: from `receive`, if a process died.
    """

    def __init__(self, suite: Suite, processes: int) -> None:
        self._local = EpisodeRunner(suite) if processes == 0 else None
        self._inbox: list[Report] = []
        self._processes: list[Any] = []
        self._connections: list[Connection] = []
        # A forked copy of a process that has rendered or computed on a GPU is broken.
        context = multiprocessing.get_context("spawn")
        try:
            for _ in range(processes):
                ours, theirs = context.Pipe()
                self._connections.append(ours)
                process = context.Process(target=_serve, args=(theirs, suite), daemon=True)
                process.start()
                self._processes.append(process)
                theirs.close()
        except BaseException:
            self.close(at_once=True)
            raise

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, kind: type[BaseException] | None, *unused: Any) -> None:
        self.close(at_once=kind is not None)

    def __len__(self) -> int:
        return max(1, len(self._processes))

    @property
    def local_processes(self) -> int:
        """Processes that share this machine's cores with the policy."""
        return len(self)

    def send(self, worker: int, message: Begin | Execute) -> None:
        """Gives a worker something to do."""
        if self._local is not None:
            self._inbox.append(self._local.answer(message))
        else:
            self._connections[worker].send(message)

    def receive(self, waiting: Sequence[int]) -> list[tuple[int, Report]]:
        """Waits for a report of the workers in `waiting` and returns all that have come, in the workers' order."""
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
                    f"an environment's process ended unexpectedly (exit code {self._processes[worker].exitcode}; -9 "
                    "often means too little memory: use fewer processes). Finished episodes are kept; the same call "
                    "plays the rest."
                ) from error
            reports.append((worker, check(report)))
        return reports

    def release(self, worker: int) -> None:
        """There is nothing left for this worker. Its process ends with the pool."""

    def close(self, at_once: bool = False) -> None:
        """Ends all processes. `at_once` does not wait for what they are doing."""
        if self._local is not None:
            self._local.close()
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            if not at_once:
                process.join(timeout=10)
            process.terminate()  # does nothing to a process that has ended
        for process in self._processes:
            process.join()
