"""The loop that moves an arm: a fixed clock, a policy that answers late, and a watchdog."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike

from vla_adapter_hf.robot.ending import connect, signals_as_exits
from vla_adapter_hf.robot.interface import Robot, RobotInterface
from vla_adapter_hf.robot.queries import Query
from vla_adapter_hf.robot.state_model import StateModel
from vla_adapter_hf.robot.strategies import ChunkStrategy, StrategySettings


logger = logging.getLogger(__name__)

WATCHDOG_ACTIONS = ("hold", "last", "stop")
# How LeRobot's robots name the target of a joint.
TARGET_SUFFIX = ".pos"
# The shortest time between two actions, as a share of the period. The rest makes up for steps that were a little late.
SHORTEST_GAP = 0.9
# Latencies that the next query's lead is taken from.
REMEMBERED_LATENCIES = 20


class ChunkPolicy(Protocol):
    """A policy on this machine ([`LocalPolicy`]) or on a server (`PolicyClient`)."""

    cameras: Sequence[str]
    state_dim: int
    action_dim: int

    def predict(self, images: dict[str, np.ndarray], instruction: str, state: np.ndarray) -> Any:
        """The chunk (K, A) in the robot's convention, or an object whose `actions` it is."""


@dataclass(frozen=True)
class LoopSettings:
    """How the loop runs.

    Args:
        fps: control steps per second; the rate at which the training data was recorded.
        strategy: what happens while the policy thinks.
        max_steps: control steps after which the loop ends; None runs until Ctrl-C or `on_step` says so.
        watchdog: what is sent at a step without an action, because the policy is late, failed or answered nonsense.
            `"hold"` keeps the arm where it is, `"last"` repeats the last action, `"stop"` ends the loop.
        late_after: seconds without an action of a chunk after which steps count as late, and `"stop"` ends the loop.
        give_up_after: seconds without an action of a chunk after which the loop ends with an error.
        max_age: seconds from the beginning of an observation until its chunk is there. An older chunk, as after a
            server was away, is not executed: it counts as a failure, and a new observation is asked about. A policy
            that needs longer needs more. What is left of a chunk after as long, and the time that it takes to execute,
            is dropped too, as after a stall.
        delta_actions: for each action dimension whether it is a change, such as a motion or a speed, and not a target.
            To hold means 0 for changes and the last value for targets. None: as the policy's robot preset says. Where
            there is none, all are taken as targets: to hold then repeats the last action, and an arm that takes
            changes goes on moving. A warning says so, unless all names of the robot's actions end in `.pos`, as those
            of LeRobot's joint targets do.
        state_model: how actions move the state, for the strategy `async-rolled`.
        limits: lowest and highest action, each (A,); actions are clipped to them. None clips nothing.

    Raises:
        ValueError: a number or a name out of range, limits of two sizes or with a lowest above its highest, or
            `async-rolled` without a state model.
    """

    fps: float = 30.0
    strategy: StrategySettings = field(default_factory=StrategySettings)
    max_steps: int | None = None
    watchdog: str = "hold"
    late_after: float = 1.0
    give_up_after: float = 10.0
    max_age: float = 5.0
    delta_actions: Sequence[bool] | None = None
    state_model: StateModel | None = None
    limits: tuple[ArrayLike, ArrayLike] | None = None

    def __post_init__(self) -> None:
        if not 0 < self.fps <= 1000:
            raise ValueError(f"fps must be above 0 and at most 1000 control steps per second, got {self.fps}")
        if self.watchdog not in WATCHDOG_ACTIONS:
            raise ValueError(f"watchdog must be one of {', '.join(WATCHDOG_ACTIONS)}, got {self.watchdog!r}")
        if not 0 < self.late_after <= self.give_up_after:
            raise ValueError(
                f"late_after must be above 0 and at most give_up_after, got {self.late_after} and {self.give_up_after}"
            )
        if not self.max_age > 0:
            raise ValueError(f"max_age must be a number of seconds above 0, got {self.max_age}")
        if self.max_steps is not None and self.max_steps < 1:
            raise ValueError(f"max_steps must be at least 1 or None, got {self.max_steps}")
        if self.limits is not None:
            low, high = (np.asarray(limit, dtype=np.float64) for limit in self.limits)
            if low.ndim != 1 or low.shape != high.shape or not (low <= high).all():
                raise ValueError(f"limits must be the lowest and the highest action, got {low} and {high}")
        if self.strategy.name == "async-rolled" and self.state_model is None:
            raise ValueError("strategy='async-rolled' needs state_model=: how actions move this robot's state")


@dataclass(frozen=True)
class Step:
    """One control step, for `on_step`.

    Attributes:
        number: counts from 0.
        action: (A,) what was sent, as the robot says, or None if nothing was.
        source: `chunk`, or the watchdog's `hold` or `last`, or `nothing` before the first action.
        query: number of the chunk that the action came from, from 0; -1 without one. Of chunks that were blended it is
            the newest.
        position: index of the action in that chunk; -1 without one.
        images, state: the observation before the action, at every step that is recorded, else at steps at which the
            policy was asked; else None.
    """

    number: int
    action: np.ndarray | None
    source: str
    query: int
    position: int
    images: dict[str, np.ndarray] | None = None
    state: np.ndarray | None = None


class Recorder(Protocol):
    """Keeps what happens, such as `recording.robot_episodes.EpisodeRecorder`."""

    def begin(self, interface: RobotInterface, instruction: str, fps: float) -> None:
        """A run begins; the robot is not connected yet. An error ends the run."""

    def add(self, step: Step) -> None:
        """A control step, with its observation. It must return at once."""

    def end(self, report: LoopReport) -> None:
        """The run is over, in whatever way; the robot is disconnected."""


@dataclass
class LoopReport:
    """What happened.

    Attributes:
        steps: control steps.
        held: those at which no action of a chunk was there.
        late: those of them after `late_after`.
        queries, failures: chunks that came, and queries that failed or answered what cannot be executed.
        latency: seconds of each query.
        jitter: seconds by which each step began after its time; a stall of the step before shows in full.
        ended_by: `max_steps`, `on_step`, `interrupt` (Ctrl-C or a signal), `watchdog` or `error`.
    """

    steps: int = 0
    held: int = 0
    late: int = 0
    queries: int = 0
    failures: int = 0
    latency: list[float] = field(default_factory=list)
    jitter: list[float] = field(default_factory=list)
    ended_by: str = "max_steps"

    def summary(self) -> str:
        """The report in two lines."""
        latency, jitter = (np.asarray(values or [math.nan]) * 1e3 for values in (self.latency, self.jitter))
        answers = f"latency {np.median(latency):.0f} ms (95 %: {np.percentile(latency, 95):.0f})"
        return (
            f"{self.steps} steps, {self.held} held ({self.late} late), {self.queries} chunks, {self.failures} failed; "
            f"ended by {self.ended_by}\n"
            f"{answers if self.latency else 'no chunk came'}, "
            f"jitter {np.median(jitter):.1f} ms (95 %: {np.percentile(jitter, 95):.1f}, worst {jitter.max():.1f})"
        )


def run(
    policy: ChunkPolicy,
    robot: Robot,
    instruction: str,
    settings: LoopSettings | None = None,
    interface: RobotInterface | None = None,
    on_step: Callable[[Step], bool | None] | None = None,
    record: Recorder | None = None,
) -> LoopReport:
    """Let a policy move a robot.

    The robot is connected first and disconnected in the end, whatever happens, also if connecting fails. Ctrl-C ends
    the loop: the arm is sent the action that holds it, so that it comes to rest. SIGTERM and SIGHUP do the same and
    then end the program, where nothing else handles them.

    Args:
        policy: a [`LocalPolicy`] or a `PolicyClient`; it is asked in a thread of its own, one query at a time.
        robot: anything with LeRobot's methods, see [`Robot`].
        instruction: what the robot is to do.
        settings: how the loop runs.
        interface: which names of the robot are the model's cameras, state and action; by default the policy's cameras,
            and all numbers: in the policy's order if it knows the same names as the robot, else in the robot's.
        on_step: called after each step; returning True ends the loop.
        record: an `EpisodeRecorder`, which keeps the run as an episode of a LeRobot dataset. The robot is then
            observed at every step.

    Returns:
        [`LoopReport`].

    Raises:
        ValueError: the robot does not fit the policy.
        RuntimeError: no usable answer for `give_up_after` seconds; the cause is the policy's last error, if it is
            known.
    """
    settings = settings or LoopSettings()
    interface = interface or _make_interface(robot, policy)
    interface.check_fits(policy.cameras, policy.state_dim, policy.action_dim)
    if settings.limits is not None and np.size(settings.limits[0]) != policy.action_dim:
        raise ValueError(f"limits have {np.size(settings.limits[0])} values, the policy's actions {policy.action_dim}")
    delta_actions = _find_delta_actions(settings, policy, interface)
    if settings.limits is not None:
        _check_that_holding_is_allowed(delta_actions, *settings.limits)
    recorded_fps = getattr(policy, "fps", None)
    if recorded_fps is not None and not math.isclose(settings.fps, recorded_fps, rel_tol=0.02):
        logger.warning(
            f"The loop runs at fps={settings.fps:g}, the policy learnt from recordings of {recorded_fps:g} frames a "
            f"second: its movements take {recorded_fps / settings.fps:.2g} times as long"
        )
    loop = _Loop(policy, interface, instruction, settings, delta_actions, record)
    with ExitStack() as ending:  # from the last to the first, each even if the one before fails
        let_signals_wait = ending.enter_context(signals_as_exits())
        if record is not None:
            record.begin(interface, instruction, settings.fps)
            ending.callback(record.end, loop.report)
        ending.callback(loop.finish_query)
        connect(robot, ending)
        ending.callback(loop.come_to_rest)
        ending.callback(let_signals_wait)
        try:
            loop.run(on_step)
        except KeyboardInterrupt:
            loop.report.ended_by = "interrupt"
        except SystemExit:
            loop.report.ended_by = "interrupt"
            raise
        except BaseException:
            loop.report.ended_by = "error"
            raise
    return loop.report


def _make_interface(robot: Robot, policy: ChunkPolicy) -> RobotInterface:
    interface = RobotInterface(robot, policy.cameras)
    for field_name in ("state_names", "action_names"):
        learnt, found = getattr(policy, field_name, None), getattr(interface, field_name)
        if learnt is None or list(learnt) == found:
            continue
        if sorted(learnt) == sorted(found):
            setattr(interface, field_name, list(learnt))
        else:
            raise ValueError(
                f"the policy's {field_name} are {', '.join(learnt)}, and the robot's are {', '.join(found)}. Say "
                f"which is which: interface=RobotInterface(robot, cameras, {field_name}=[...]), in the policy's order"
            )
    return interface


def _find_delta_actions(settings: LoopSettings, policy: ChunkPolicy, interface: RobotInterface) -> np.ndarray:
    """Which values of an action are changes, boolean (A,): those of the settings, else of the policy's preset."""
    known = settings.delta_actions
    if known is None:
        known = getattr(policy, "delta_actions", None)
    if known is None:
        unclear = [name for name in interface.action_names if not name.endswith(TARGET_SUFFIX)]
        if unclear:
            logger.warning(
                "Nothing says whether %s are targets or changes. They are taken as targets: an arm that takes changes "
                "goes on moving where it should hold. Set LoopSettings(delta_actions=...), True for each change",
                ", ".join(unclear),
            )
        return np.zeros(policy.action_dim, dtype=bool)
    delta_actions = np.asarray(known, dtype=bool)
    if delta_actions.shape != (policy.action_dim,):
        raise ValueError(
            f"delta_actions must have one value for each of the policy's {policy.action_dim} actions, got {known}"
        )
    return delta_actions


def _check_that_holding_is_allowed(delta_actions: np.ndarray, low: ArrayLike, high: ArrayLike) -> None:
    """Raises ValueError for limits within which a value that is a change cannot be 0."""
    moving = np.flatnonzero(delta_actions & ((np.asarray(low) > 0) | (np.asarray(high) < 0)))
    if len(moving):
        raise ValueError(
            f"limits leave out 0 for action {moving[0]}, which is a change: the arm could not hold still. Widen them"
        )


class _Loop:
    def __init__(
        self,
        policy: ChunkPolicy,
        interface: RobotInterface,
        instruction: str,
        settings: LoopSettings,
        delta_actions: np.ndarray,
        record: Recorder | None,
    ) -> None:
        self.policy, self.interface, self.instruction, self.settings = policy, interface, instruction, settings
        self.delta_actions, self.record = delta_actions, record
        self.report = LoopReport()
        # A policy that does not say which values may be averaged gets all of them averaged.
        self.strategy = ChunkStrategy(settings.strategy, getattr(policy, "averaged", None))
        self.last_action: np.ndarray | None = None
        self.query: Query | None = None
        self.valid_until = math.inf  # the end of the newest chunk, at the oldest that it may be
        self.acted_at = 0.0  # the last action of a chunk
        self.sent_at = -math.inf  # the last action of any source
        self.observed_at = 0.0  # the observation that the policy was asked about last
        self.upcoming = 0  # actions that are executed between the last query and its chunk, for async-rolled
        self.error: Exception | None = None
        self.recent: deque[float] = deque(maxlen=REMEMBERED_LATENCIES)

    def run(self, on_step: Callable[[Step], bool | None] | None) -> None:
        settings, report = self.settings, self.report
        period = 1 / settings.fps
        due = self.acted_at = time.monotonic()
        while settings.max_steps is None or report.steps < settings.max_steps:
            late = time.monotonic() - due
            report.jitter.append(late)
            # Less than a period is made up for by and by; a longer stall shifts the clock.
            due += max(0.0, late - period)
            step = self._step()
            if self.record is not None:
                self.record.add(step)
            if on_step is not None and on_step(step):
                report.ended_by = "on_step"
                return
            if step.source != "chunk" and settings.watchdog == "stop" and self._is_late():
                report.ended_by = "watchdog"
                return
            due += period
            time.sleep(max(0.0, due - time.monotonic()))

    def come_to_rest(self) -> None:
        """Send the action that holds the arm, once."""
        action = self._watchdog_action("hold")
        if action is not None:
            self.interface.write(action)

    def _step(self) -> Step:
        if time.monotonic() > self.valid_until:  # after a stall, or while there are no answers
            self.strategy.forget()
            self.valid_until = math.inf
        self._take_answer()
        images = state = None
        wants_chunk = self.query is None and self.strategy.wants_chunk(self._delay())
        began = time.monotonic()
        if wants_chunk or self.record is not None:
            images, state = self.interface.read()
        if wants_chunk:
            self.observed_at = began
            self._ask(images, state)
        action, source = self.strategy.next_action(), "chunk"
        if action is not None:
            self.acted_at = time.monotonic()
        else:
            self._check_patience()
            action, source = self._watchdog_action(self.settings.watchdog), self.settings.watchdog
            self.report.held += 1
            self.report.late += self._is_late()
            if action is None:
                source = "nothing"
        if action is not None:
            action = self._send(action)
        self.report.steps += 1
        query, position = self.strategy.origin if source == "chunk" else (-1, -1)
        return Step(self.report.steps - 1, action, source, query, position, images, state)

    def _send(self, action: np.ndarray) -> np.ndarray:
        """Send an action within the limits, not too soon after the one before. Returns what the robot says it sent."""
        action = self._within_limits(action)
        period = 1 / self.settings.fps
        time.sleep(max(0.0, self.sent_at + SHORTEST_GAP * period - time.monotonic()))
        if self.last_action is None and self.delta_actions.any():
            self.last_action = action  # if the call fails, the arm may be moving and must be held
        began = time.monotonic()
        sent = self.interface.write(action)
        # When the robot took the action is not known: with a call that stalled it may have been at the end.
        ended = time.monotonic()
        self.sent_at = began if ended - began < period else ended
        self.last_action = action
        return sent

    def _within_limits(self, actions: np.ndarray) -> np.ndarray:
        return actions if self.settings.limits is None else np.clip(actions, *self.settings.limits)

    def _ask(self, images: dict[str, np.ndarray], state: np.ndarray) -> None:
        upcoming = self.strategy.ask(self._delay())
        self.upcoming = len(upcoming)
        if len(upcoming):
            state = self.settings.state_model.roll(state, self._within_limits(upcoming))
        self.query = Query(partial(self.policy.predict, images, self.instruction, state))

    def finish_query(self) -> None:
        """Give the policy a moment for its last answer, which is not executed."""
        if self.query is not None:
            self.query.finish()

    def _take_answer(self) -> None:
        if self.query is None or not self.query.is_answered:
            return
        query, self.query = self.query, None
        seconds = time.monotonic() - query.asked_at
        try:
            result = query.result()
            age = time.monotonic() - self.observed_at
            if age > self.settings.max_age:
                raise ValueError(
                    f"the chunk is about what the robot saw {age:.1f} s ago, and max_age is {self.settings.max_age:g} "
                    "s. If the policy always needs that long, raise LoopSettings.max_age"
                )
            chunk = np.asarray(getattr(result, "actions", result))
            if chunk.ndim != 2 or chunk.shape[1] != self.policy.action_dim:
                raise ValueError(f"a chunk must have shape (K, {self.policy.action_dim}), got {chunk.shape}")
            self.strategy.answer(chunk)
        except Exception as error:  # the policy's own, or a chunk that cannot or must not be executed
            self.error = error
            self.report.failures += 1
            self.strategy.give_up()
            logger.warning("no usable answer from the policy: %s", error)
            return
        self.error = None
        steps = len(chunk) + self.upcoming
        self.valid_until = self.observed_at + self.settings.max_age + steps / self.settings.fps
        self.report.queries += 1
        self.report.latency.append(seconds)
        self.recent.append(seconds)

    def _delay(self) -> int:
        """Control steps that an answer takes, by the slowest of the latest ones."""
        return math.ceil(max(self.recent, default=0.0) * self.settings.fps)

    def _is_late(self) -> bool:
        return time.monotonic() - self.acted_at > self.settings.late_after

    def _check_patience(self) -> None:
        waited = time.monotonic() - self.acted_at
        if waited > self.settings.give_up_after:
            # A client asks a server that is away again and again; it knows why there is no answer.
            reason = getattr(self.policy, "last_error", None) or self.error
            text = "" if reason is None else f": {reason}"
            raise RuntimeError(f"the policy gave no usable answer for {waited:.1f} s{text}") from reason

    def _watchdog_action(self, kind: str) -> np.ndarray | None:
        """The action to send where there is none; None before the first, when the arm has not been moved yet."""
        if self.last_action is None:
            return None
        if kind == "last":
            return self.last_action
        return np.where(self.delta_actions, 0.0, self.last_action)
