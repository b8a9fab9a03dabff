"""The loop that moves an arm.

Policies here are scripted, robots keep what they are sent; threads and clock are real.
"""

import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vla_adapter_hf.checkpoints.saving import synthetic_observation
from vla_adapter_hf.recording.robot_episodes import EpisodeRecorder
from vla_adapter_hf.robot import (
    ChunkStrategy,
    LocalPolicy,
    LoopSettings,
    RobotInterface,
    StateModel,
    StrategySettings,
    run,
)


CHUNK = 8


class RecordingRobot:
    """Two joints and a gripper, one camera; keeps every action."""

    observation_features = {"a.pos": float, "b.pos": float, "gripper.pos": float, "top": (8, 8, 3)}
    action_features = {"a.pos": float, "b.pos": float, "gripper.pos": float}

    def __init__(self) -> None:
        self.sent: list[np.ndarray] = []
        self.calls: list[str] = []

    def connect(self) -> None:
        self.calls.append("connect")

    def disconnect(self) -> None:
        self.calls.append("disconnect")

    def get_observation(self) -> dict[str, Any]:
        return {"a.pos": 0.0, "b.pos": 1.0, "gripper.pos": 0.5, "top": np.zeros((8, 8, 3), np.uint8)}

    def send_action(self, action: dict[str, Any]) -> dict[str, Any]:
        self.sent.append(np.array(list(action.values())))
        return action


class CountingPolicy:
    """Chunks that say which query they answer and which action of the chunk each is: (query, index, 1)."""

    cameras, state_dim, action_dim = ("top",), 3, 3

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds, self.queries, self.states = seconds, 0, []

    def predict(self, images: dict[str, np.ndarray], instruction: str, state: np.ndarray) -> np.ndarray:
        time.sleep(self.seconds)
        self.states.append(state)
        chunk = np.stack([np.full(CHUNK, self.queries), np.arange(CHUNK), np.ones(CHUNK)], axis=1)
        self.queries += 1
        return chunk.astype(np.float64)


def played(settings: StrategySettings, delay: int, steps: int) -> list[tuple[int, int] | None]:
    """What is executed at each control step when every answer takes `delay` steps: (query, index in the chunk)."""
    strategy, queries, due, record = ChunkStrategy(settings), 0, None, []
    for now in range(steps):
        if due is not None and now >= due:
            strategy.answer(np.array([[queries - 1, index] for index in range(CHUNK)], float))
            due = None
        while due is None and strategy.wants_chunk(delay):
            strategy.ask(delay)
            queries, due = queries + 1, now + delay
            if delay == 0:
                strategy.answer(np.array([[queries - 1, index] for index in range(CHUNK)], float))
                due = None
        action = strategy.next_action()
        record.append(None if action is None else tuple(map(int, action)))
    return record


@pytest.fixture
def never():
    """An event for which a policy waits that never answers. In the end its thread goes on."""
    event = threading.Event()
    yield event
    event.set()


@contextmanager
def handling(number: int, handler: Any) -> Iterator[None]:
    """Within the block the signal has this handler. `nohup`, for one, has SIGHUP ignored."""
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)


class TestStrategies:
    def test_sync_stands_still_while_the_policy_thinks_and_executes_whole_chunks(self):
        record = played(StrategySettings("sync"), delay=3, steps=22)
        assert record == [None] * 3 + [(0, k) for k in range(8)] + [None] * 3 + [(1, k) for k in range(8)]

    def test_async_drops_the_actions_that_went_by_while_the_policy_thought(self):
        record = played(StrategySettings("async", blend=1.0), delay=3, steps=21)
        first = [None] * 3 + [(0, k) for k in range(8)]  # nothing went by: the arm stood still
        assert record == first + [(1, k) for k in range(3, 8)] + [(2, k) for k in range(3, 8)]

    def test_async_rolled_executes_whole_chunks_without_a_pause(self):
        record = played(StrategySettings("async-rolled"), delay=3, steps=27)
        assert record == [None] * 3 + [(query, k) for query in range(3) for k in range(8)]

    def test_sync_may_execute_the_first_actions_of_a_chunk_only(self):
        record = played(StrategySettings("sync", execute=3), delay=0, steps=7)
        assert record == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (2, 0)]

    def test_ensemble_stands_still_and_averages_the_chunks_that_overlap(self):
        strategy, executed = ChunkStrategy(StrategySettings("ensemble", execute=2)), []
        for query in range(3):
            assert strategy.wants_chunk(1) and len(strategy.ask(1)) == 0
            assert strategy.next_action() is None  # the policy thinks
            strategy.answer(np.full((CHUNK, 1), float(query)))
            executed += [float(strategy.next_action()[0]) for _ in range(2)]
        assert executed == [0.0, 0.0, 0.5, 0.5, 1.0, 1.0]

    @pytest.mark.parametrize("name", ["async", "async-rolled"])
    def test_without_delay_asynchronous_strategies_execute_what_sync_executes(self, name):
        assert played(StrategySettings(name), 0, 24) == played(StrategySettings("sync"), 0, 24)

    @pytest.mark.parametrize("name", ["async", "async-rolled"])
    def test_a_delay_longer_than_a_chunk_still_executes_new_actions(self, name):
        record = played(StrategySettings(name), delay=12, steps=120)
        assert len({query for query, _ in filter(None, record)}) >= 6
        assert max(index for _, index in filter(None, record)) == CHUNK - 1

    def test_dropped_chunks_leave_a_query_under_way_unless_its_state_was_rolled_by_them(self):
        chunk = np.arange(CHUNK, dtype=np.float64)[:, None]
        strategies = [ChunkStrategy(StrategySettings(name)) for name in ("async", "async-rolled")]
        for strategy in strategies:
            strategy.ask(0)
            strategy.answer(chunk)
            strategy.ask(3)
            strategy.forget()
            assert strategy.next_action() is None
        plain, rolled = strategies
        plain.answer(chunk)
        assert plain.next_action() == [0.0]
        with pytest.raises(RuntimeError, match="what was to be executed before this chunk was dropped"):
            rolled.answer(chunk)

    def test_two_chunks_about_one_step_are_blended(self):
        strategy = ChunkStrategy(StrategySettings("async", blend=0.7))
        strategy.ask(0)
        strategy.answer(np.zeros((CHUNK, 1)))
        for _ in range(5):
            strategy.next_action()
        strategy.ask(3)
        strategy.next_action()
        strategy.answer(np.ones((CHUNK, 1)))  # two steps earlier than expected: two actions of the old chunk are left
        assert [float(strategy.next_action()[0]) for _ in range(3)] == [0.7, 0.7, 1.0]

    def test_rolled_queries_name_the_actions_that_will_have_been_executed(self):
        strategy = ChunkStrategy(StrategySettings("async-rolled"))
        assert len(strategy.ask(3)) == 0
        strategy.answer(np.arange(CHUNK, dtype=float)[:, None])
        for _ in range(5):
            strategy.next_action()
        assert strategy.wants_chunk(3)
        assert strategy.ask(3).ravel().tolist() == [5.0, 6.0, 7.0]

    @pytest.mark.parametrize(
        "arguments, message",
        [
            ({"name": "later"}, "strategy must be one of"),
            ({"name": "async", "execute": 4}, "execute=4 is for sync and ensemble"),
            ({"name": "ensemble"}, "set execute"),
            ({"name": "async", "blend": 0.0}, "blend must be"),
        ],
    )
    def test_settings_that_cannot_work_are_refused(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            StrategySettings(**arguments)


class TestStateModel:
    def test_delta_actions_move_the_state_by_their_gain(self):
        model = StateModel(((0, 0), (2, 1)), (0.5, 0.1))
        rolled = model.roll(np.array([1.0, 7.0, 2.0]), np.array([[2.0, 1.0], [2.0, 3.0]]))
        assert np.allclose(rolled, [3.0, 7.0, 2.4])

    def test_targets_become_the_state(self):
        assert StateModel(((0, 1),)).roll(np.zeros(2), np.array([[1.0, 2.0], [3.0, 4.0]])).tolist() == [4.0, 0.0]

    def test_gains_are_found_in_recordings(self):
        generator = np.random.default_rng(0)
        actions = [generator.normal(size=(50, 2)) for _ in range(3)]
        states = [np.vstack([np.zeros(2), np.cumsum(episode * [0.02, 0.3], axis=0)]) for episode in actions]
        assert np.allclose(StateModel.fit(states, actions, [(0, 0), (1, 1)]).gain, [0.02, 0.3])

    def test_a_dimension_that_never_moves_has_no_gain(self):
        with pytest.raises(ValueError, match="action 0 is 0 in every step"):
            StateModel.fit([np.zeros((5, 1))], [np.zeros((5, 1))], [(0, 0)])


class TestLoop:
    def test_the_arm_gets_every_action_of_every_chunk_in_order(self):
        robot = RecordingRobot()
        report = run(CountingPolicy(), robot, "go", LoopSettings(fps=200, max_steps=40))
        chunks = [tuple(map(int, action[:2])) for action in dict.fromkeys(map(tuple, robot.sent))]
        assert chunks[:16] == [(query, index) for query in range(2) for index in range(8)]
        assert report.steps == 40 and report.ended_by == "max_steps"
        assert robot.calls == ["connect", "disconnect"]

    def test_asynchronous_actions_go_on_while_the_policy_thinks(self):
        held = {}
        for name in ("sync", "async"):
            settings = LoopSettings(fps=50, max_steps=60, strategy=StrategySettings(name))
            held[name] = run(CountingPolicy(seconds=0.06), RecordingRobot(), "go", settings).held
        assert held["async"] < held["sync"]

    @pytest.mark.parametrize("slow", ["get_observation", "send_action"])
    def test_after_a_stall_actions_still_come_one_by_one_and_jitter_shows_it(self, slow):
        period, stall = 0.04, 0.2
        robot, calls, moments = RecordingRobot(), [], []
        send, method = robot.send_action, getattr(robot, slow)

        def stalling(*arguments):
            calls.append(time.monotonic())
            if len(calls) == 2:
                time.sleep(stall)
            return method(*arguments)

        def sending(action):
            answer = send(action) if slow != "send_action" else stalling(action)
            moments.append(time.monotonic())  # when the robot took it
            return answer

        robot.send_action = sending
        if slow == "get_observation":
            robot.get_observation = stalling
        report = run(CountingPolicy(), robot, "go", LoopSettings(fps=1 / period, max_steps=16))
        gaps = np.diff(moments[:-1])  # the last brings the arm to rest
        assert gaps.max() > stall / 2 and gaps.min() > 0.6 * period
        assert max(report.jitter) > stall - 2 * period

    def test_observations_that_take_most_of_a_period_do_not_slow_the_clock(self, tmp_path):
        period, robot, moments = 0.04, RecordingRobot(), []
        observe = robot.get_observation
        robot.get_observation = lambda: time.sleep(0.6 * period) or observe()
        robot.send_action = lambda action: moments.append(time.monotonic())
        with EpisodeRecorder(tmp_path) as recorder:  # observes at every step
            run(CountingPolicy(), robot, "go", LoopSettings(fps=1 / period, max_steps=20), record=recorder)
        assert np.median(np.diff(moments)) < 1.2 * period  # on a busy machine some steps are late

    def test_to_hold_means_no_change_for_deltas_and_the_last_value_for_others(self, never):
        robot = RecordingRobot()
        settings = LoopSettings(fps=100, max_steps=20, delta_actions=(True, True, False), late_after=5)
        policy = CountingPolicy()
        first = policy.predict

        def once(*arguments):
            return first(*arguments) if policy.queries == 0 else never.wait()

        policy.predict = once
        report = run(policy, robot, "go", settings)
        assert report.held > 0
        assert robot.sent[-1].tolist() == [0.0, 0.0, 1.0]

    @pytest.mark.parametrize("given, held", [(None, [0.0, 0.0, 1.0]), ((False,) * 3, [0.0, 7.0, 1.0])])
    def test_changes_are_known_from_the_policy_and_what_the_settings_say_wins(self, given, held):
        robot, policy = RecordingRobot(), CountingPolicy()
        policy.delta_actions = (True, True, False)
        settings = LoopSettings(fps=200, max_steps=20, delta_actions=given)
        run(policy, robot, "go", settings, on_step=lambda step: step.position == CHUNK - 1)
        assert robot.sent[-2].tolist() == [0.0, 7.0, 1.0]
        assert robot.sent[-1].tolist() == held  # what brings the arm to rest

    def test_one_warning_says_what_hold_means_where_nothing_is_known(self, caplog):
        robot = RecordingRobot()
        run(CountingPolicy(), robot, "go", LoopSettings(fps=200, max_steps=2))
        assert not caplog.records  # joint targets
        robot.action_features = dict.fromkeys(("x.vel", "y", "gripper.pos"), float)
        run(CountingPolicy(), robot, "go", LoopSettings(fps=200, max_steps=2))
        assert [record.message.split("targets")[0] for record in caplog.records] == [
            "Nothing says whether x.vel, y are "
        ]
        run(CountingPolicy(), robot, "go", LoopSettings(fps=200, max_steps=2, delta_actions=(True, True, False)))
        assert len(caplog.records) == 1

    def test_changes_of_another_size_are_refused_before_the_robot_is_connected(self):
        robot = RecordingRobot()
        with pytest.raises(ValueError, match="delta_actions must have one value for each of the policy's 3 actions"):
            run(CountingPolicy(), robot, "go", LoopSettings(delta_actions=[True], max_steps=2))
        assert robot.calls == []

    def test_a_policy_that_never_answers_ends_the_loop_with_an_error_and_a_disconnected_robot(self, never):
        robot, policy = RecordingRobot(), CountingPolicy()
        policy.predict = lambda *arguments: never.wait()
        started = time.monotonic()
        with pytest.raises(RuntimeError, match="no usable answer for 0.3 s"):
            run(policy, robot, "go", LoopSettings(fps=100, late_after=0.1, give_up_after=0.3))
        assert time.monotonic() - started < 5
        assert robot.calls[-1] == "disconnect"
        assert not robot.sent  # it was never moved

    @pytest.mark.parametrize("limits", [None, ([-9.0] * 3, [9.0] * 3)])
    @pytest.mark.parametrize(
        "nonsense", [np.full((CHUNK, 3), np.nan), np.ones((CHUNK, 1)), np.ones((CHUNK, 2)), np.ones(3), None]
    )
    def test_what_is_not_a_finite_chunk_of_actions_is_never_executed(self, nonsense, limits):
        robot, policy = RecordingRobot(), CountingPolicy()
        policy.predict = lambda *arguments: nonsense
        with pytest.raises(RuntimeError, match="no usable answer") as raised:
            settings = LoopSettings(fps=100, late_after=0.1, give_up_after=0.2, limits=limits, max_steps=200)
            run(policy, robot, "go", settings)
        assert not robot.sent
        assert raised.value.__cause__ is not None

    def test_an_arm_whose_robot_refuses_an_action_is_sent_the_last_one_that_it_took(self):
        robot = RecordingRobot()
        send = robot.send_action

        def picky(action):
            if action["b.pos"] == 4:
                raise OSError("the bus does not answer")
            return send(action)

        robot.send_action = picky
        with pytest.raises(OSError, match="the bus does not answer"):
            run(CountingPolicy(), robot, "go", LoopSettings(fps=200))
        assert robot.sent[-2].tolist() == robot.sent[-1].tolist() == [0.0, 3.0, 1.0]
        assert robot.calls == ["connect", "disconnect"]

    def test_an_error_of_the_policy_is_survived(self):
        policy, failures = CountingPolicy(), iter([True, False, True])
        predict = policy.predict

        def sometimes(*arguments):
            if next(failures, False):
                raise ConnectionError("the server went away")
            return predict(*arguments)

        policy.predict = sometimes
        robot = RecordingRobot()
        report = run(policy, robot, "go", LoopSettings(fps=100, max_steps=40))
        assert report.failures == 2 and report.queries >= 3
        assert np.isfinite(robot.sent).all()

    def test_an_answer_about_an_old_observation_is_not_executed_and_a_new_one_is_asked_about(self):
        policy, robot = CountingPolicy(), RecordingRobot()
        observe, predict, observed = robot.get_observation, policy.predict, []
        robot.get_observation = lambda: observed.append(0) or observe()

        def after_an_outage(*arguments):
            time.sleep(0.0 if policy.queries else 0.5)
            return predict(*arguments)

        policy.predict = after_an_outage
        settings = LoopSettings(fps=100, max_age=0.3)
        report = run(policy, robot, "go", settings, on_step=lambda step: step.position == CHUNK - 1)
        assert (report.failures, report.queries, len(observed)) == (1, 1, 2)
        assert {action[0] for action in robot.sent} == {1.0}  # the first chunk's are 0

    def test_what_is_left_of_a_chunk_after_a_stall_is_dropped(self):
        policy, robot, stalled = CountingPolicy(), RecordingRobot(), []

        def stall(step) -> None:
            if step.position == 2 and not stalled:
                stalled.append(step.query)
                time.sleep(1.0)

        run(policy, robot, "go", LoopSettings(fps=50, max_steps=40, max_age=0.5), on_step=stall)
        executed = {(action[0], action[1]) for action in robot.sent}
        first = min(query for query, _ in executed)
        assert (first, 2) in executed and (first, CHUNK - 1) not in executed
        assert any(query > first for query, _ in executed)

    def test_a_chunk_from_before_an_outage_is_not_averaged_with_a_new_one(self):
        policy, robot = CountingPolicy(), RecordingRobot()
        predict = policy.predict

        def away(*arguments):
            if policy.queries == 1:
                policy.queries = 10
                time.sleep(1.0)
                raise ConnectionError("the server is away")
            return predict(*arguments)

        policy.predict = away
        strategy = StrategySettings("ensemble", execute=4)
        run(policy, robot, "go", LoopSettings(fps=50, max_steps=90, max_age=0.5, strategy=strategy))
        queries = {action[0] for action in robot.sent}
        assert {0.0, 10.0} <= queries  # chunks are averaged with those of after the outage only
        assert not any(0 < query < 10 for query in queries)

    def test_a_rolled_chunk_is_not_executed_where_the_actions_before_it_were_dropped(self):
        policy, robot = CountingPolicy(0.1), RecordingRobot()
        stalls = []

        def stall(step) -> None:
            if step.images is not None and policy.queries == 1 and not stalls:  # it was just asked again
                stalls.append(time.sleep(1.2))

        settings = LoopSettings(
            fps=50,
            max_steps=60,
            max_age=0.6,
            strategy=StrategySettings("async-rolled"),
            state_model=StateModel(((1, 1),)),
        )
        report = run(policy, robot, "go", settings, on_step=stall)
        assert stalls and report.failures >= 1
        assert 1.0 not in {action[0] for action in robot.sent}
        assert 2.0 in {action[0] for action in robot.sent}

    def test_a_policy_that_has_no_answer_yet_says_why(self):
        policy = CountingPolicy(seconds=1.0)
        policy.last_error = ConnectionRefusedError("nobody listens")
        with pytest.raises(RuntimeError, match="no usable answer for .* s: nobody listens") as raised:
            run(policy, RecordingRobot(), "go", LoopSettings(fps=100, late_after=0.1, give_up_after=0.2))
        assert raised.value.__cause__ is policy.last_error

    def test_the_watchdog_can_end_the_loop(self, never):
        policy, robot = CountingPolicy(), RecordingRobot()
        predict = policy.predict
        policy.predict = lambda *arguments: predict(*arguments) if not policy.queries else never.wait()
        settings = LoopSettings(fps=100, watchdog="stop", late_after=0.1)
        assert run(policy, robot, "go", settings).ended_by == "watchdog"

    def test_actions_are_clipped_to_the_limits(self):
        robot = RecordingRobot()
        limits = (np.array([0.0, 2.0, 0.0]), np.array([0.5, 5.0, 1.0]))
        run(CountingPolicy(), robot, "go", LoopSettings(fps=200, max_steps=20, limits=limits))
        assert all((limits[0] <= action).all() and (action <= limits[1]).all() for action in robot.sent)

    def test_limits_within_which_an_arm_cannot_hold_still_are_refused_before_it_is_connected(self):
        robot = RecordingRobot()
        limits = [-1, 0.2, 0.2], [1, 0.4, 0.4]
        with pytest.raises(ValueError, match="limits leave out 0 for action 1, which is a change"):
            run(CountingPolicy(), robot, "go", LoopSettings(limits=limits, delta_actions=(True, True, False)))
        assert robot.calls == []

    def test_limits_of_another_size_are_refused_before_the_robot_is_connected(self):
        robot = RecordingRobot()
        with pytest.raises(ValueError, match="limits have 2 values, the policy's actions 3"):
            run(CountingPolicy(), robot, "go", LoopSettings(limits=([0, 0], [1, 1])))
        assert robot.calls == []

    def test_ctrl_c_brings_the_arm_to_rest_and_disconnects(self):
        robot = RecordingRobot()

        def interrupt(step) -> None:
            if step.number == 12:
                os.kill(os.getpid(), signal.SIGINT)

        settings = LoopSettings(fps=200, max_steps=200, delta_actions=(True, True, False))
        report = run(CountingPolicy(), robot, "go", settings, on_step=interrupt)
        assert report.ended_by == "interrupt" and report.steps < 20
        assert robot.sent[-1].tolist() == [0.0, 0.0, 1.0] and robot.calls[-1] == "disconnect"

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
    def test_signals_that_end_a_program_bring_the_arm_to_rest_first(self, number):
        robot = RecordingRobot()

        def end(step) -> None:
            if step.number == 12:
                os.kill(os.getpid(), number)

        settings = LoopSettings(fps=200, max_steps=200, delta_actions=(True, True, False))
        with handling(number, signal.SIG_DFL):
            with pytest.raises(SystemExit) as raised:
                run(CountingPolicy(), robot, "go", settings, on_step=end)
            assert signal.getsignal(number) == signal.SIG_DFL
        assert raised.value.code == 128 + number  # as shells say it
        assert robot.sent[-1].tolist() == [0.0, 0.0, 1.0] and robot.calls[-1] == "disconnect"

    def test_a_signal_during_the_end_waits_for_it(self):
        robot = RecordingRobot()

        def disconnect() -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
            robot.calls.append("disconnected")

        robot.disconnect = disconnect
        with handling(signal.SIGTERM, signal.SIG_DFL), pytest.raises(SystemExit):
            run(CountingPolicy(), robot, "go", LoopSettings(fps=200, max_steps=4))
        assert robot.calls == ["connect", "disconnected"]

    def test_a_signal_that_the_program_handles_itself_stays_its_own(self):
        received = []
        kill = lambda step: step.number == 2 and os.kill(os.getpid(), signal.SIGTERM)  # noqa: E731
        with handling(signal.SIGTERM, lambda number, frame: received.append(number)):
            report = run(CountingPolicy(), RecordingRobot(), "go", LoopSettings(fps=200, max_steps=9), on_step=kill)
        assert received == [signal.SIGTERM] and report.steps == 9

    @pytest.mark.parametrize(("delta_actions", "sent"), [((True, True, False), [[0, 0, 1], [0, 0, 1]]), (None, [])])
    @pytest.mark.parametrize("error", [OSError("no answer from the bus"), KeyboardInterrupt()])
    def test_a_first_action_that_may_be_under_way_is_followed_by_rest_where_actions_are_changes(
        self, error, delta_actions, sent
    ):
        robot, policy = RecordingRobot(), CountingPolicy()
        send, predict = robot.send_action, policy.predict
        policy.predict = lambda *arguments: predict(*arguments) + [5.0, 5.0, 0.0]

        def fail(action):
            if len(robot.sent) or action["a.pos"] == 0:
                return send(action)
            robot.sent.append(None)
            raise error

        robot.send_action = fail
        settings = LoopSettings(fps=200, delta_actions=delta_actions, max_steps=50)
        if isinstance(error, OSError):
            with pytest.raises(OSError, match="no answer from the bus"):
                run(policy, robot, "go", settings)
        else:
            assert run(policy, robot, "go", settings).ended_by == "interrupt"
        assert [action.tolist() for action in robot.sent[1:]] == sent[:1]
        assert robot.calls == ["connect", "disconnect"]

    @pytest.mark.parametrize("error", [OSError("no camera"), KeyboardInterrupt()])
    @pytest.mark.parametrize("can_disconnect", [True, False])
    def test_a_robot_whose_connection_failed_half_way_is_disconnected(self, error, can_disconnect, caplog):
        robot = RecordingRobot()
        disconnect = robot.disconnect

        def fail() -> None:
            robot.calls.append("connect")
            raise error

        def refuse() -> None:
            disconnect()
            raise RuntimeError("not connected")

        robot.connect = fail
        if not can_disconnect:
            robot.disconnect = refuse
        with pytest.raises(type(error)):
            run(CountingPolicy(), robot, "go")
        assert robot.calls == ["connect", "disconnect"] and not robot.sent
        assert ("may be open still: not connected" in caplog.text) is not can_disconnect

    def test_an_error_of_disconnect_is_raised(self):
        robot = RecordingRobot()

        def fail() -> None:
            raise OSError("the motors are still on")

        robot.disconnect = fail
        with pytest.raises(OSError, match="the motors are still on"):
            run(CountingPolicy(), robot, "go", LoopSettings(fps=200, max_steps=2))

    def test_rolled_states_reach_the_policy(self):
        policy = CountingPolicy(seconds=0.02)
        model = StateModel(((1, 1),))
        settings = LoopSettings(fps=100, max_steps=60, strategy=StrategySettings("async-rolled"), state_model=model)
        run(policy, RecordingRobot(), "go", settings)
        assert policy.states[0].tolist() == [0.0, 1.0, 0.5]
        assert policy.states[-1][1] == CHUNK - 1  # the last action of the chunk that was being executed

    def test_states_are_rolled_by_the_actions_within_the_limits(self):
        policy, model, limits = CountingPolicy(seconds=0.02), StateModel(((1, 1),)), ([0, 0, 0], [99, 3, 1])
        strategy = StrategySettings("async-rolled")
        settings = LoopSettings(fps=100, max_steps=60, strategy=strategy, state_model=model, limits=limits)
        run(policy, RecordingRobot(), "go", settings)
        assert policy.states[-1][1] == 3.0

    def test_rolling_needs_a_state_model(self):
        with pytest.raises(ValueError, match="needs state_model"):
            LoopSettings(strategy=StrategySettings("async-rolled"))


class TestInterface:
    def test_a_robot_of_another_size_is_refused_before_it_is_connected(self):
        robot, policy = RecordingRobot(), CountingPolicy()
        policy.action_dim = 7
        with pytest.raises(ValueError, match="action of 7 values, the robot has 3: a.pos, b.pos, gripper.pos"):
            run(policy, robot, "go")
        assert robot.calls == []

    def test_an_unknown_camera_is_named(self):
        with pytest.raises(
            ValueError, match=r"no camera 'wrist'; it has top. Say which .*\{'wrist': the robot's name"
        ):
            RobotInterface(RecordingRobot(), ["wrist"])

    def test_a_camera_may_have_another_name_than_the_robots(self):
        policy = CountingPolicy()
        policy.cameras, predict, seen = ("image",), policy.predict, []
        policy.predict = lambda images, *rest: seen.append(list(images)) or predict(images, *rest)
        robot = RecordingRobot()
        interface = RobotInterface(robot, {"image": "top"})
        run(policy, robot, "go", LoopSettings(fps=200, max_steps=8), interface)
        assert seen[0] == ["image"]

    def test_an_interface_without_one_of_the_policys_cameras_is_refused_before_the_robot_is_connected(self):
        robot, policy = RecordingRobot(), CountingPolicy()
        policy.cameras = ("image", "top")
        with pytest.raises(ValueError, match="sees image, top, and the interface gives top; add image"):
            run(policy, robot, "go", interface=RobotInterface(robot, ["top"]))
        assert robot.calls == []

    def test_names_choose_and_order_the_state(self):
        frames, state = RobotInterface(RecordingRobot(), ["top"], state_names=["b.pos", "a.pos"]).read()
        assert state.tolist() == [1.0, 0.0] and list(frames) == ["top"]

    @pytest.mark.parametrize("answer", [None, True, [1.0, 2.0, 3.0], np.ones(3), {}])
    def test_a_robot_that_returns_no_values_by_name_is_believed_to_have_sent_the_action(self, answer):
        robot = RecordingRobot()
        robot.send_action = lambda action: answer
        assert RobotInterface(robot, ["top"]).write(np.array([0.1, 0.2, 0.3])).tolist() == [0.1, 0.2, 0.3]

    def test_values_that_the_robot_says_it_sent_are_taken(self):
        robot = RecordingRobot()
        robot.send_action = lambda action: {"b.pos": 0.0}
        assert RobotInterface(robot, ["top"]).write(np.array([0.1, 0.2, 0.3])).tolist() == [0.1, 0.0, 0.3]

    def test_joints_are_taken_in_the_policys_order_where_it_knows_their_names(self):
        robot, policy = RecordingRobot(), CountingPolicy()
        policy.state_names, policy.action_names = ["b.pos", "gripper.pos", "a.pos"], ["gripper.pos", "b.pos", "a.pos"]
        sent = []
        robot.send_action = lambda action: sent.append(action) or action
        run(policy, robot, "go", LoopSettings(fps=200, max_steps=20))
        assert policy.states[0].tolist() == [1.0, 0.5, 0.0]
        assert sent[1] == {"gripper.pos": 0.0, "b.pos": 1.0, "a.pos": 1.0}

    def test_names_of_another_robot_are_refused_until_an_interface_says_which_is_which(self):
        policy, robot = CountingPolicy(), RecordingRobot()
        policy.state_names = ["x", "y", "z"]
        with pytest.raises(ValueError, match="state_names are x, y, z, and the robot's are a.pos, b.pos, gripper.pos"):
            run(policy, robot, "go")
        assert robot.calls == []
        interface = RobotInterface(robot, ["top"], state_names=["b.pos", "a.pos", "gripper.pos"])
        run(policy, robot, "go", LoopSettings(fps=200, max_steps=2), interface)
        assert robot.calls == ["connect", "disconnect"]

    def test_another_frame_rate_is_warned_about(self, caplog):
        policy = CountingPolicy()
        policy.fps = 20
        run(policy, RecordingRobot(), "go", LoopSettings(fps=200, max_steps=2))
        assert "recordings of 20 frames a second" in caplog.text

    def test_frames_stay_as_they_were_when_a_camera_writes_into_the_same_memory(self):
        robot, memory = RecordingRobot(), np.zeros((8, 8, 3), np.uint8)
        observe = robot.get_observation
        robot.get_observation = lambda: observe() | {"top": memory}
        frames, _ = RobotInterface(robot, ["top"]).read()
        memory += 1
        assert not frames["top"].any()

    def test_a_state_that_is_not_finite_is_named(self):
        robot = RecordingRobot()
        observe = robot.get_observation
        robot.get_observation = lambda: observe() | {"b.pos": float("nan")}
        with pytest.raises(ValueError, match="not finite: b.pos"):
            RobotInterface(robot, ["top"]).read()


def test_a_checkpoint_moves_a_robot(tmp_path, published_pro):
    policy = LocalPolicy(published_pro, robot="libero")
    assert policy.delta_actions == (True,) * 6 + (False,)
    observation = synthetic_observation(policy.model.config)

    class Arm(RecordingRobot):
        observation_features = {f"s{index}": float for index in range(8)} | dict.fromkeys(policy.cameras, (64, 64, 3))
        action_features = {f"a{index}": float for index in range(7)}

        def get_observation(self) -> dict[str, Any]:
            values = {f"s{index}": value for index, value in enumerate(observation["state"])}
            return values | dict(zip(policy.cameras, observation["images"], strict=True))

    arm = Arm()
    strategy = StrategySettings("async")
    settings = LoopSettings(fps=50, late_after=60, give_up_after=120, max_age=120, strategy=strategy)
    report = run(policy, arm, observation["text"], settings, on_step=lambda step: step.query >= 1)
    assert report.queries >= 2 and report.failures == 0
    expected = policy.predict(
        dict(zip(policy.cameras, observation["images"], strict=True)), observation["text"], observation["state"]
    )
    assert np.allclose(arm.sent[0], expected[0], atol=1e-5)


ENDS_WHILE_THE_POLICY_THINKS = """
import numpy as np
from test_robot import RecordingRobot
from vla_adapter_hf.checkpoints.embedded import embedded_folder
from vla_adapter_hf.robot import LocalPolicy, LoopSettings, run
with embedded_folder() as folder:
    policy = LocalPolicy(folder / "checkpoint", robot="libero")
class Robot(RecordingRobot):
    observation_features = {camera: (64, 64, 3) for camera in policy.cameras} | {f"v{i}": float for i in range(8)}
    action_features = {f"a{i}": float for i in range(7)}
    def get_observation(self):
        frames = {camera: np.zeros((64, 64, 3), np.uint8) for camera in policy.cameras}
        return frames | {f"v{i}": 0.0 for i in range(8)}
report = run(policy, Robot(), "go", LoopSettings(fps=1000, max_steps=1))
print("ended by", report.ended_by)
"""


def test_a_program_that_ends_while_the_policy_computes_ends_without_an_error():
    """Python aborts a program whose threads are inside torch when it ends."""
    words = [sys.executable, "-c", ENDS_WHILE_THE_POLICY_THINKS]
    run = subprocess.run(words, capture_output=True, text=True, timeout=120, cwd=Path(__file__).parent)
    assert (run.returncode, run.stdout) == (0, "ended by max_steps\n"), run.stderr[-2_000:]


def test_the_example_arm_moves_without_a_pause_when_asynchronous():
    path = Path(__file__).parent.parent / "examples" / "simulated_arm.py"
    spec = importlib.util.spec_from_file_location("simulated_arm", path)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    arm, start = example.SimulatedArm(), example.SimulatedArm().joints
    settings = LoopSettings(fps=50, max_steps=60, strategy=StrategySettings("async"))
    report = run(example.WavePolicy(seconds=0.05), arm, "wave", settings)
    assert not arm.is_connected and report.held < 30  # without async, a third of all steps
    assert np.abs(arm.joints - start).max() > 5


def test_a_policy_on_a_cpu_whose_threads_spin_says_what_to_set(published_pro, monkeypatch, caplog):
    monkeypatch.setenv("GOMP_SPINCOUNT", "0")
    LocalPolicy(published_pro, robot="libero")
    assert "passively" not in caplog.text
    monkeypatch.setenv("GOMP_SPINCOUNT", "300000")
    LocalPolicy(published_pro, robot="libero")
    assert "OMP_WAIT_POLICY=passive" in caplog.text


def test_a_gripper_whose_convention_is_not_known_is_refused(published_pro):
    with pytest.raises(ValueError, match="a gripper that is learnt as 0...1, and robots take other values"):
        LocalPolicy(published_pro)
    without = LocalPolicy(published_pro, robot="none")
    assert without.robot is None and without.delta_actions is None
