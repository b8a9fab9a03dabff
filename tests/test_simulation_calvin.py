"""CALVIN: observations, the two schedules value by value, and the score."""

import numpy as np
import pytest

from vla_adapter_hf.simulation.calvin.suite import (
    CalvinSequence,
    OpenLoopSchedule,
    PublishedSchedule,
    SequenceEnvironment,
    calvin_observation,
    evaluate_calvin,
    play_sequence,
    score_sequences,
    score_table,
)
from vla_adapter_hf.simulation.environment import Environment, Observation


def raw_observation() -> dict:
    generator = np.random.default_rng(0)
    return {
        "rgb_obs": {
            "rgb_static": generator.integers(0, 256, (200, 200, 3), dtype=np.uint8),
            "rgb_gripper": generator.integers(0, 256, (84, 84, 3), dtype=np.uint8),
        },
        "robot_obs": np.arange(15, dtype=np.float64),
    }


def test_observation_keeps_the_frames_unrotated_and_picks_eight_of_the_robots_values():
    raw = raw_observation()
    observation = calvin_observation(raw)
    np.testing.assert_array_equal(observation.images[0], raw["rgb_obs"]["rgb_static"])
    np.testing.assert_array_equal(observation.images[1], raw["rgb_obs"]["rgb_gripper"])
    np.testing.assert_array_equal(observation.state, [0, 1, 2, 3, 4, 5, 6, 14])


def test_observation_of_another_size_is_refused_by_name():
    raw = raw_observation()
    raw["rgb_obs"]["rgb_gripper"] = np.zeros((200, 200, 3), dtype=np.uint8)
    with pytest.raises(ValueError, match="rgb_gripper.*84, 84, 3"):
        calvin_observation(raw)
    with pytest.raises(ValueError, match=r"robot_obs must have shape \(15,\), got \(8,\)"):
        calvin_observation({**raw_observation(), "robot_obs": np.zeros(8)})


def test_published_schedule_value_by_value():
    b0, b1, b2 = (np.random.default_rng(seed).normal(size=(8, 7)) for seed in range(3))
    expected = [
        b0[0],
        (b0[1] + b1[0]) / 2,
        (b0[2] + b1[1] + b2[0]) / 3,
        (b0[2] + b1[1] + b2[0]) / 3,
        (b0[3] + b1[2] + b2[1]) / 3,
        (b0[4] + b1[3] + b2[2]) / 3,
        (b0[5] + b1[4] + b2[3]) / 3,
        (b0[6] + b1[5] + b2[4]) / 3,
        (b1[7] + b2[6]) / 2,
        b2[7],
    ]
    schedule = PublishedSchedule()
    for _ in range(2):  # the second cycle is like the first
        asked = []
        for step in range(10):
            if schedule.needs_chunk:
                asked.append(step)
                schedule.add([b0, b1, b2][len(asked) - 1])
            np.testing.assert_allclose(schedule.pop(), expected[step], rtol=1e-12, err_msg=f"step {step}")
        assert asked == [0, 1, 2]


def test_published_schedule_averages_the_gripper_before_it_is_made_binary():
    """1, 1 and 0 average to 2/3, which opens. A vote of binary commands agrees there, but not for 0.6 and 0.3."""
    schedule = PublishedSchedule()
    chunks = [np.full((8, 7), value) for value in (0.6, 0.3)]
    schedule.add(chunks[0])
    schedule.pop()
    schedule.add(chunks[1])
    assert schedule.pop()[6] == pytest.approx(0.45)


def test_published_schedule_says_how_long_it_can_go_without_an_observation():
    schedule, left = PublishedSchedule(), []
    for _ in range(20):
        if schedule.needs_chunk:
            assert schedule.steps_until_query() == 0
            schedule.add(np.zeros((8, 7)))
        left.append(schedule.steps_until_query())
        schedule.pop()
    assert left == [1, 1, 8, 7, 6, 5, 4, 3, 2, 1] * 2


def test_published_schedule_refuses_what_cannot_be_executed():
    with pytest.raises(ValueError, match="not finite"):
        PublishedSchedule().add(np.full((8, 7), np.nan))


def test_published_schedule_begins_anew_after_reset():
    schedule = PublishedSchedule()
    schedule.add(np.zeros((8, 7)))
    schedule.pop()
    schedule.reset()
    schedule.add(np.ones((8, 7)))
    np.testing.assert_array_equal(schedule.pop(), np.ones(7))


def test_published_schedule_wants_eight_actions():
    with pytest.raises(ValueError, match=r"shape \(8, A\), got \(5, 7\)"):
        PublishedSchedule().add(np.zeros((5, 7)))


class ScriptedSimulation:
    """A simulation whose subtasks are solved after a given number of steps, or never."""

    def __init__(self, outcomes: dict[str, int | None]) -> None:
        self.outcomes = outcomes
        self.resets = 0
        self.actions: list[np.ndarray] = []

    def reset(self, initial_state) -> None:
        self.resets += 1

    def begin_subtask(self, subtask: str) -> str:
        self._subtask, self._step = subtask, 0
        return f"please {subtask}"

    def observe(self) -> Observation:
        return calvin_observation(raw_observation())

    def step(self, action: np.ndarray) -> bool:
        self.actions.append(action)
        self._step += 1
        return self.outcomes[self._subtask] == self._step


class HalfOpen:
    """Asks for an open gripper with just more than half."""

    name = "half-open"
    needs_observation = True

    def __init__(self) -> None:
        self.instructions: list[str] = []

    def predict(self, requests):
        self.instructions += [request.instruction for request in requests]
        return [np.full((8, 7), 0.51) for _ in requests]


SUBTASKS = ("a", "b", "c", "d", "e")


def test_sequence_is_reset_once_and_ends_at_the_first_failure():
    simulation = ScriptedSimulation({"a": 7, "b": 25, "c": None, "d": 1, "e": 1})
    policy = HalfOpen()
    completed, steps, instruction = play_sequence(policy, simulation, CalvinSequence(None, SUBTASKS), "published")
    assert (completed, steps, instruction) == (2, 7 + 25 + 800, "please c")
    assert simulation.resets == 1
    # Subtask a is solved in its first cycle: three queries; b in its third: nine; c runs 80 cycles of three.
    assert len(policy.instructions) == 3 + 9 + 240
    assert all(action[6] == 1.0 for action in simulation.actions)


def test_a_sequence_fits_the_environment_protocol():
    outcomes = {"a": 1, "b": 2, "c": 1, "d": 1, "e": 1}
    environment = SequenceEnvironment(
        ScriptedSimulation(outcomes), [CalvinSequence(None, tuple("abcde")), CalvinSequence(None, tuple("edcba"))]
    )
    assert isinstance(environment, Environment) and environment.step_limit == 800
    assert environment.reset(1) == {"subtasks": list("edcba")}
    instructions = [environment.instruction]
    action = np.zeros(7)
    assert environment.observe().state.shape == (8,)
    while environment.step(action) and environment.next_subtask():
        instructions.append(environment.instruction)
    assert len(set(instructions)) == 4  # the second step of "b" is still to come
    assert environment.step(action, observe=False) and environment.next_subtask() and environment.step(action)
    assert not environment.next_subtask()
    environment.reset(0)
    assert environment.instruction != instructions[0]
    with pytest.raises(ValueError, match="a sequence has 5 subtasks, got 2"):
        SequenceEnvironment(ScriptedSimulation(outcomes), [CalvinSequence(None, ("a", "b"))])


def test_open_loop_schedule_gives_a_subtask_360_steps_and_a_query_every_eight():
    simulation = ScriptedSimulation({"a": None, "b": 1, "c": 1, "d": 1, "e": 1})
    policy = HalfOpen()
    completed, steps, _ = play_sequence(policy, simulation, CalvinSequence(None, SUBTASKS), "open-loop")
    assert (completed, steps, len(policy.instructions)) == (0, 360, 45)
    assert OpenLoopSchedule.step_limit == 360


def test_score_is_that_of_the_published_form():
    score = score_sequences([5, 5, 3, 0])
    assert score["success_rates"] == [0.75, 0.75, 0.75, 0.5, 0.5]
    assert score["average_length"] == 3.25
    assert "| ours (4 sequences) | 75.0 | 75.0 | 75.0 | 50.0 | 50.0 | 3.25 |" in score_table({"ours": score})
    with pytest.raises(ValueError, match="lengths must be numbers 0...5"):
        score_sequences([6])


def test_a_thousand_sequences_resume_where_they_were_killed(tmp_path):
    generator = np.random.default_rng(3)
    outcomes = {f"t{number}": (None if generator.random() < 0.1 else 1) for number in range(200)}
    names = list(outcomes)
    sequences = [CalvinSequence(None, tuple(generator.choice(names, 5, replace=False))) for _ in range(1000)]
    whole = evaluate_calvin(
        HalfOpen(), ScriptedSimulation(outcomes), sequences, tmp_path / "whole", "open-loop", report=lambda line: None
    )

    class Killed(Exception):
        pass

    def die_at_700(line: str) -> None:
        if line.startswith("sequence 700"):
            raise Killed

    with pytest.raises(Killed):
        evaluate_calvin(
            HalfOpen(), ScriptedSimulation(outcomes), sequences, tmp_path / "killed", "open-loop", report=die_at_700
        )
    resumed = evaluate_calvin(
        HalfOpen(), ScriptedSimulation(outcomes), sequences, tmp_path / "killed", "open-loop", report=lambda line: None
    )
    assert resumed == whole
    assert whole["sequences"] == 1000
    lengths = [next((i for i, name in enumerate(s.subtasks) if outcomes[name] is None), 5) for s in sequences]
    assert whole == score_sequences(lengths)
    with pytest.raises(ValueError, match="holds another sequence 0"):
        evaluate_calvin(
            HalfOpen(), ScriptedSimulation(outcomes), sequences[::-1], tmp_path / "whole", "open-loop", report=print
        )
    written = [(tmp_path / name / "episodes.jsonl").read_text() for name in ("whole", "killed")]
    assert written[0] == written[1]
