"""CALVIN: observations, the published schedule value by value, sequences in the shared loop, the score, the check."""

import importlib.util
import json
import os
import sys
from dataclasses import dataclass, field
from functools import cache

import model_fixtures
import numpy as np
import pytest
from typer.testing import CliRunner

from vla_adapter_cli import app
from vla_adapter_hf.checkpoints.open import open_checkpoint
from vla_adapter_hf.robot.strategies import ChunkStrategy
from vla_adapter_hf.simulation.calvin import install
from vla_adapter_hf.simulation.calvin.check import OPEN_SCENE, SLIDER_TRAVEL, check_calvin
from vla_adapter_hf.simulation.calvin.schedules import STEP_LIMITS, PublishedSchedule
from vla_adapter_hf.simulation.calvin.scores import score_sequences, score_table
from vla_adapter_hf.simulation.calvin.simulation import CalvinSimulation, calvin_observation
from vla_adapter_hf.simulation.calvin.suite import CalvinSequence, CalvinSuite, SequenceEnvironment
from vla_adapter_hf.simulation.environment import Environment, Observation
from vla_adapter_hf.simulation.evaluate import evaluate
from vla_adapter_hf.simulation.policies import Request, make_policy
from vla_adapter_hf.simulation.results import joined_table
from vla_adapter_hf.simulation.settings import EvaluationSettings


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
            if schedule.wants_chunk():
                asked.append(step)
                schedule.answer([b0, b1, b2][len(asked) - 1])
            np.testing.assert_allclose(schedule.next_action(), expected[step], rtol=1e-12, err_msg=f"step {step}")
        assert asked == [0, 1, 2]


def test_published_schedule_averages_the_gripper_before_it_is_made_binary():
    """1, 1 and 0 average to 2/3, which opens. A vote of binary commands agrees there, but not for 0.6 and 0.3."""
    schedule = PublishedSchedule()
    chunks = [np.full((8, 7), value) for value in (0.6, 0.3)]
    schedule.answer(chunks[0])
    schedule.next_action()
    schedule.answer(chunks[1])
    assert schedule.next_action()[6] == pytest.approx(0.45)


def test_published_schedule_refuses_what_cannot_be_executed():
    with pytest.raises(ValueError, match="not finite"):
        PublishedSchedule().answer(np.full((8, 7), np.nan))


def test_published_schedule_begins_a_new_cycle_after_reset():
    schedule = PublishedSchedule()
    schedule.answer(np.zeros((8, 7)))
    schedule.next_action()
    schedule.reset()
    schedule.answer(np.ones((8, 7)))
    np.testing.assert_array_equal(schedule.next_action(), np.ones(7))


def test_published_schedule_wants_eight_actions():
    with pytest.raises(ValueError, match=r"shape \(8, A\), got \(5, 7\)"):
        PublishedSchedule().answer(np.zeros((5, 7)))


SUBTASKS = ("a", "b", "c", "d", "e")


class ScriptedSimulation:
    """A simulation whose subtasks are solved after a given number of steps, or never."""

    def __init__(self, outcomes: dict[str, int | None]) -> None:
        self.outcomes = outcomes
        self.render = True
        self.resets: list[str] = []
        self.actions: list[np.ndarray] = []
        self.rendered = 0

    def reset(self, initial_state) -> None:
        self.resets.append(initial_state)

    def begin_subtask(self, subtask: str) -> None:
        self._subtask, self._step = subtask, 0

    def observe(self) -> Observation:
        self.rendered += self.render
        return calvin_observation(raw_observation())

    def step(self, action: np.ndarray) -> bool:
        self.actions.append(action)
        self._step += 1
        return self.outcomes[self._subtask] == self._step

    def close(self) -> None:
        pass


@dataclass(frozen=True)
class ScriptedSuite(CalvinSuite):
    """CALVIN's suite with scripted simulations."""

    outcomes: dict = field(default_factory=dict)
    simulations: list = field(default_factory=list)

    def make(self, task: int) -> SequenceEnvironment:
        simulation = ScriptedSimulation(self.outcomes)
        self.simulations.append(simulation)
        return SequenceEnvironment(simulation, self.sequences, self.instructions, STEP_LIMITS[self.schedule])


def scripted(outcomes: dict, sequences: list[tuple[str, ...]] | None = None, **options) -> ScriptedSuite:
    drawn = tuple(CalvinSequence(f"scene {i}", names) for i, names in enumerate(sequences or [SUBTASKS]))
    return ScriptedSuite(drawn, {name: f"please {name}" for name in outcomes}, outcomes=outcomes, **options)


class HalfOpen:
    """Asks for an open gripper with just more than half."""

    name = "half-open"
    needs_observation = True

    def __init__(self) -> None:
        self.requests: list = []

    @property
    def instructions(self) -> list[str]:
        return [request.instruction for request in self.requests]

    def predict(self, requests):
        self.requests += requests
        return [np.full((8, 7), 0.51) for _ in requests]


def play(policy, suite, output, **settings) -> tuple[dict, list[dict]]:
    """The summary and the lines of an evaluation in this process."""
    chosen = EvaluationSettings(**{"processes": 0, "episodes": len(suite.sequences), **settings})
    summary = evaluate(policy, suite, output, chosen, report=lambda line: None)
    return summary, [json.loads(line) for line in (output / "episodes.jsonl").read_text().splitlines()]


def test_a_sequence_is_reset_once_and_ends_at_the_first_failure(tmp_path):
    suite, policy = scripted({"a": 7, "b": 25, "c": None, "d": 1, "e": 1}), HalfOpen()
    summary, [line] = play(policy, suite, tmp_path / "out")
    simulation = suite.simulations[0]
    assert (line["steps"], line["success"], line["instruction"]) == (7 + 25 + 800, False, "please c")
    assert line["info"] == {
        "subtasks": list(SUBTASKS),
        "completed": 2,
        "instructions": ["please a", "please b", "please c"],
    }
    assert summary["sequences"]["average_length"] == 2
    assert simulation.resets == ["scene 0"]
    # Subtask a is solved in its first cycle: three queries; b in its third: nine; c runs 80 cycles of three.
    assert policy.instructions == ["please a"] * 3 + ["please b"] * 9 + ["please c"] * 240
    assert all(action[6] == 1.0 for action in simulation.actions)


def test_a_new_subtask_begins_with_a_query_and_the_old_chunk_is_dropped(tmp_path):
    policy = HalfOpen()
    play(policy, scripted({"a": 5, "b": 1, "c": 4, "d": 2, "e": 1}), tmp_path / "out")
    asked = [(request.instruction[-1], request.step) for request in policy.requests]
    assert asked == [
        ("a", 0),
        ("a", 1),
        ("a", 2),
        ("b", 5),
        ("c", 6),
        ("c", 7),
        ("c", 8),
        ("d", 10),
        ("d", 11),
        ("e", 12),
    ]


def test_five_solved_subtasks_are_a_success(tmp_path):
    suite = scripted(dict.fromkeys(SUBTASKS, 3))
    summary, [line] = play(HalfOpen(), suite, tmp_path / "out")
    assert (line["info"]["completed"], line["success"], line["steps"]) == (5, True, 15)
    assert summary["success_rate"] == 1.0


def test_only_what_the_policy_sees_is_rendered(tmp_path):
    suite, policy = scripted(dict.fromkeys(SUBTASKS, 20)), HalfOpen()
    play(policy, suite, tmp_path / "out")
    assert suite.simulations[0].rendered == len(policy.requests) == 5 * 6
    suite = scripted(dict.fromkeys(SUBTASKS, 20))
    play("noop", suite, tmp_path / "noop")
    assert suite.simulations[0].rendered == 0


def test_open_loop_gives_a_subtask_360_steps_and_a_query_every_eight(tmp_path):
    policy = HalfOpen()
    suite = scripted({"a": None, "b": 1, "c": 1, "d": 1, "e": 1}, schedule="open-loop")
    _, [line] = play(policy, suite, tmp_path / "out")
    assert (line["info"]["completed"], line["steps"], len(policy.requests)) == (0, 360, 45)
    assert isinstance(suite.chunk_strategy(EvaluationSettings(execute=4)), ChunkStrategy)


def test_the_published_schedule_does_not_mix_with_other_ways_to_execute(tmp_path):
    with pytest.raises(ValueError, match="execute=4, delay=2 needs schedule='open-loop'"):
        play(HalfOpen(), scripted({}), tmp_path / "out", execute=4, delay=2)
    assert not (tmp_path / "out").exists()


def test_black_images_hide_the_frames_and_keep_the_state(tmp_path):
    suite, policy = scripted(dict.fromkeys(SUBTASKS, 1)), HalfOpen()
    summary, _ = play(policy, suite, tmp_path / "out", black_images=True)
    assert all(not image.any() for request in policy.requests for image in request.observation.images)
    assert policy.requests[0].observation.state[7] == 14
    assert suite.simulations[0].rendered == 0
    assert not summary["published_protocol"]


def test_instruction_other_asks_for_another_subtask_and_judges_the_own_one(tmp_path):
    suite, policy = scripted(dict.fromkeys(SUBTASKS, 1), [SUBTASKS] * 4), HalfOpen()
    _, lines = play(policy, suite, tmp_path / "out", instruction="other")
    for line in lines:
        assert line["info"]["completed"] == 5
        for subtask, given in zip(line["info"]["subtasks"], line["info"]["instructions"], strict=True):
            assert given != f"please {subtask}" and given[-1] in SUBTASKS
    assert lines[0]["task_instruction"] == "please e"
    given = HalfOpen()
    play(given, scripted(dict.fromkeys(SUBTASKS, 1)), tmp_path / "text", instruction="dance")
    assert set(given.instructions) == {"dance"}


def test_films_show_both_cameras_whole(tmp_path):
    from PIL import Image

    play(HalfOpen(), scripted(dict.fromkeys(SUBTASKS, 8)), tmp_path / "out", rollouts=1)
    with Image.open(tmp_path / "out" / "rollouts" / "00-0000.gif") as film:
        assert film.size == (284, 208)  # 200 and 84 pixels wide; a bar below
    assert (tmp_path / "out" / "rollouts" / "00-0000.png").is_file()


def test_a_sequence_fits_the_environment_protocol():
    outcomes = {"a": 1, "b": 2, "c": 1, "d": 1, "e": 1}
    environment = scripted(outcomes, [SUBTASKS, SUBTASKS[::-1]]).make(0)
    assert isinstance(environment, Environment) and environment.step_limit == 800
    assert environment.reset(1) == {"subtasks": list("edcba")}
    assert environment.instruction == environment.task_instruction == "please e"
    assert environment.observe().state.shape == (8,)
    for subtask in "edc":
        assert environment.subtask == subtask
        assert environment.step(np.zeros(7)) and environment.next_subtask()
    assert not environment.step(np.zeros(7)) and environment.step(np.zeros(7), observe=False)
    assert environment.next_subtask() and environment.step(np.zeros(7)) and not environment.next_subtask()
    assert environment.outcome()["completed"] == 5
    with pytest.raises(ValueError, match=r"episode must be in 0\.\.\.1, got 2"):
        environment.reset(2)
    with pytest.raises(ValueError, match="a sequence has 5 subtasks, got 2"):
        CalvinSequence(None, ("a", "b"))


@dataclass(frozen=True)
class CrashingSuite(CalvinSuite):
    """A suite whose simulator ends its process, as EGL does without a driver."""

    def make(self, task: int) -> SequenceEnvironment:
        os._exit(3)


def test_a_renderer_that_ends_the_process_is_named(tmp_path):
    sequences = (CalvinSequence(None, SUBTASKS),)
    chosen = EvaluationSettings(processes=1, episodes=1)
    with pytest.raises(
        ChildProcessError, match="exit code 3.*vla-adapter calvin-check tries, renderer='cpu' needs none"
    ):
        evaluate("noop", CrashingSuite(sequences, {}), tmp_path / "egl", chosen, report=lambda line: None)
    with pytest.raises(ChildProcessError) as error:
        evaluate("noop", CrashingSuite(sequences, {}, renderer="cpu"), tmp_path / "cpu", chosen, report=print)
    assert "renderer" not in str(error.value)


def test_a_published_checkpoint_plays_without_further_options(tmp_path, caplog):
    """Robot, cameras, statistics, state and gripper follow from the suite."""
    folder = model_fixtures.write_published_calvin(tmp_path / "CALVIN-ABC-Pro")
    suite = scripted({"a": 2, "b": None, "c": 1, "d": 1, "e": 1})
    _, [line] = play(str(folder), suite, tmp_path / "out", step_limit=12)
    assert line["info"]["completed"] == 1
    assert {action[6] for action in suite.simulations[0].actions} <= {-1.0, 1.0}
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert (settings["policy"], settings["unnorm_key"]) == ("CALVIN-ABC-Pro", "calvin_abc_rlds")
    assert "taken as a calvin model" in caplog.text and "No camera has the name" not in caplog.text


def test_a_published_checkpoint_gives_the_models_own_actions(tmp_path):
    folder = model_fixtures.write_published_calvin(tmp_path / "published")
    policy = make_policy(str(folder), "calvin", suite="calvin_abc_rlds")
    observation = calvin_observation(raw_observation())
    [chunk] = policy.predict([Request(observation, "open the drawer", 0, 0, 0)])
    opened = open_checkpoint(folder, robot="calvin")
    model, processor = opened.load_model(dtype="float32"), opened.load_processor()
    inputs = processor(images=list(observation.images), text="open the drawer", state=observation.state)
    np.testing.assert_array_equal(chunk, model.predict_action(**inputs, unnorm_key="calvin_abc_rlds")[0])
    assert chunk.shape == (8, 7) and model.config.cameras == ["rgb_static", "rgb_gripper"]


class PressesOn:
    """Reads the simulator's state: steps until the present subtask is solved."""

    name = "presses-on"

    def attach(self, environment):
        return lambda: np.zeros(7)


def test_a_policy_that_reads_the_simulator_plays_all_subtasks(tmp_path):
    _, [line] = play(PressesOn(), scripted({"a": 3, "b": 2, "c": 5, "d": 1, "e": None}), tmp_path / "out")
    assert (line["info"]["completed"], line["steps"]) == (4, 11 + 800)


def test_score_is_that_of_the_published_form():
    score = score_sequences([5, 5, 3, 0])
    assert score["success_rates"] == [0.75, 0.75, 0.75, 0.5, 0.5]
    assert score["average_length"] == 3.25
    low, high = score["average_length_95"]
    assert low == pytest.approx(sum(bounds[0] for bounds in score["intervals_95"]))
    assert low < 3.25 < high
    table = score_table({"ours": score})
    assert "| ours (4 sequences) | 75.0 (30.1–95.4) | 75.0 (30.1–95.4) |" in table and "| 3.25 (" in table
    assert "| VLA-Adapter-Pro (published) | 98.5 | 95.0 | 90.5 | 85.3 | 80.0 | 4.50 |" in table
    assert "published" not in score_table({"ours": score}, compare=False)
    with pytest.raises(ValueError, match=r"lengths must be numbers 0\.\.\.5"):
        score_sequences([6])


def test_every_subtask_is_counted_as_often_as_it_was_tried(tmp_path):
    outcomes = {"a": 1, "b": None, "c": 1, "d": 1, "e": 1}
    suite = scripted(outcomes, [tuple("acedb"), tuple("cabde"), tuple("baced")])
    summary, _ = play(HalfOpen(), suite, tmp_path / "out", step_limit=2)
    counts = {name: (score["tried"], score["solved"]) for name, score in summary["subtasks"].items()}
    assert counts == {"a": (2, 2), "b": (3, 0), "c": (2, 2), "d": (1, 1), "e": (1, 1)}
    assert "| b | 0/3 | 0.0 (0.0–56.1) |" in (tmp_path / "out" / "summary.md").read_text()


@cache
def thousand() -> tuple[dict, list[tuple[str, ...]]]:
    generator = np.random.default_rng(3)
    outcomes = {f"t{number}": (None if generator.random() < 0.1 else 1) for number in range(200)}
    return outcomes, [tuple(map(str, generator.choice(list(outcomes), 5, replace=False))) for _ in range(1000)]


def test_a_thousand_sequences_resume_where_they_were_killed(tmp_path):
    outcomes, sequences = thousand()
    chosen = EvaluationSettings(processes=0, step_limit=8)

    def run(output: str, report) -> dict:
        return evaluate("noop", scripted(outcomes, sequences, schedule="open-loop"), tmp_path / output, chosen, report)

    class Killed(Exception):
        pass

    def die_at_700(line: str) -> None:
        if line.startswith("sequence 700"):
            raise Killed

    whole = run("whole", lambda line: None)
    with pytest.raises(Killed):
        run("killed", die_at_700)
    resumed = run("killed", lambda line: None)
    assert resumed["sequences"] == whole["sequences"]
    lengths = [next((i for i, name in enumerate(names) if outcomes[name] is None), 5) for names in sequences]
    assert whole["sequences"] == score_sequences(lengths) and whole["episodes"] == 1000
    lines = [
        [
            {**json.loads(line), "latency": None}
            for line in (tmp_path / name / "episodes.jsonl").read_text().splitlines()
        ]
        for name in ("whole", "killed")
    ]
    assert lines[0] == lines[1] and len(lines[0]) == 1000
    with pytest.raises(ValueError, match="holds another run: sequences="):
        evaluate(
            "noop", scripted(outcomes, sequences[::-1], schedule="open-loop"), tmp_path / "whole", chosen, report=print
        )


def test_published_rows_need_the_published_protocol(tmp_path):
    def run(output: str, episodes: int = 1000, step_limit: int | None = None, **options) -> bool:
        suite = scripted(dict.fromkeys(SUBTASKS, 1), [SUBTASKS] * 1000, **options)
        chosen = EvaluationSettings(processes=0, episodes=episodes, step_limit=step_limit)
        return evaluate(AtOnce(), suite, tmp_path / output, chosen, report=lambda line: None)["published_protocol"]

    assert run("published")
    assert not run("short", episodes=999)
    assert not run("cpu", renderer="cpu")
    assert not run("open-loop", schedule="open-loop")
    assert not run("limit", step_limit=5)
    text = (tmp_path / "published" / "summary.md").read_text()
    assert "| VLA-Adapter (published) | 99.1 |" in text and "schedule published, renderer egl" in text
    assert "(published)" not in (tmp_path / "cpu" / "summary.md").read_text()
    joined = joined_table([tmp_path / "published"])
    assert "| at-once (1000 sequences) | 100.0 (99.6–100.0) |" in joined and "(published)" in joined


class AtOnce:
    name = "at-once"
    needs_observation = False

    def predict(self, requests):
        return [np.zeros((8, 7)) for _ in requests]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--suite", "calvin_abc_d", "--schedule", "fast"],
            "schedule must be one of published, open-loop, got 'fast'",
        ),
        (["--suite", "calvin_abc_d", "--renderer", "gpu"], "renderer must be one of egl, cpu, got 'gpu'"),
        (["--suite", "calvin_abc_d", "--placement", "jitter"], "is not for --suite calvin_abc_d"),
        (["--suite", "libero_goal", "--renderer", "cpu"], "is for --suite calvin_abc_d only"),
    ],
)
def test_the_command_refuses_what_does_not_fit(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["eval", "--policy", "noop", *arguments])
    assert result.exit_code == 1
    assert message in result.stderr
    assert not list(tmp_path.iterdir())


# -- what CALVIN needs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", 0),
        ("a", 0x61 * 0x01000193),  # the byte 61, a multiplication, the byte 00
        ("ab", ((((0x61 * 0x01000193 % 2**32) * 0x01000193 % 2**32) ^ 0x62) * 0x01000193) % 2**32),
        ("dict_values([0, 1])", 0xD527AD5D),
    ],
)
def test_the_hash_is_fnv_1_over_utf_16_from_zero(text, value):
    assert install.fnv1_32(text) == value


def test_the_hash_is_provided_only_where_it_is_missing(monkeypatch):
    monkeypatch.delitem(sys.modules, "pyhash", raising=False)
    monkeypatch.setattr(install, "is_importable", lambda module: True)
    install.provide_hash()
    assert "pyhash" not in sys.modules
    monkeypatch.setattr(install, "is_importable", lambda module: False)
    install.provide_hash()
    assert sys.modules["pyhash"].fnv1_32()("a") == install.fnv1_32("a")
    monkeypatch.delitem(sys.modules, "pyhash")


def calvin_with(tmp_path, monkeypatch, line: str) -> None:
    """A `calvin_env` whose environment module begins with that line."""
    folder = tmp_path / "calvin_env" / "envs"
    folder.mkdir(parents=True)
    for path in (folder, folder.parent):
        (path / "__init__.py").write_text("")
    (folder / "play_table_env.py").write_text(line)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [name for name in sys.modules if name.split(".")[0] == "calvin_env"]:
        monkeypatch.delitem(sys.modules, name)


def test_the_import_error_names_the_one_missing_package(tmp_path, monkeypatch):
    calvin_with(tmp_path, monkeypatch, "import absent_package_of_calvin.part")
    with pytest.raises(
        ImportError, match="^absent_package_of_calvin is missing.*pip install absent_package_of_calvin"
    ):
        install.import_calvin("calvin_env.envs.play_table_env")
    for module in ("quaternion", "git"):
        assert install.how_to_get(module) == f"pip install {install.PACKAGES[module]}" != f"pip install {module}"
    assert "github.com/mees/calvin" in install.how_to_get("calvin_agent")


def test_a_missing_library_is_not_reported_as_a_missing_package(tmp_path, monkeypatch):
    calvin_with(tmp_path, monkeypatch, "raise ImportError('libGL.so.1: cannot open shared object file')")
    with pytest.raises(ImportError, match="cannot be imported .*libGL"):
        install.import_calvin("calvin_env.envs.play_table_env")


def test_importing_calvin_keeps_the_processes_own_tracebacks(tmp_path, monkeypatch):
    calvin_with(tmp_path, monkeypatch, "import sys\nsys.excepthook = print\nprint('loud')")
    before = sys.excepthook
    install.import_calvin("calvin_env.envs.play_table_env")
    assert sys.excepthook is before


def test_the_first_of_the_thousand_sequences_are_played_and_drawing_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("VLA_ADAPTER_CACHE", str(tmp_path))
    drawn = []

    class Generator:
        @staticmethod
        def get_sequences(count):
            drawn.append(count)
            return [({"slider": number}, SUBTASKS) for number in range(count)]

    class Scenes:
        @staticmethod
        def get_env_state_for_initial_condition(state):
            return np.full(15, state["slider"] / 7), np.zeros(24)

    modules = dict(zip(install.SEQUENCE_MODULES, (Generator, Scenes), strict=True))
    monkeypatch.setattr(install, "import_calvin", modules.__getitem__)
    first, again = install.draw_sequences(), install.draw_sequences()
    assert drawn == [1000] and first == again
    assert first[3] == {"robot": [3 / 7] * 15, "scene": [0.0] * 24, "subtasks": list(SUBTASKS)}


def test_the_check_lists_every_missing_package_and_what_to_do(monkeypatch):
    present = install.is_importable
    absent = {"pybullet", "quaternion", "calvin_env"}
    monkeypatch.setattr(
        "vla_adapter_hf.simulation.calvin.check.is_importable", lambda name: name not in absent and bool(present)
    )
    lines: list[str] = []
    assert not check_calvin(lines.append)
    assert [line.split(":")[0] for line in lines] == [
        "missing  pybullet",
        "missing  quaternion",
        "missing  calvin_env",
    ]
    assert "pip install numpy-quaternion" in lines[1] and "git clone" in lines[2]


# -- the real simulator -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def simulation():
    if not all(install.is_importable(module) for module in ("pybullet", "calvin_env")):
        pytest.skip("CALVIN's simulator is not installed; vla-adapter calvin-check says what is missing")
    simulation = CalvinSimulation("cpu")
    yield simulation
    simulation.close()


SHUT = np.array([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0])
FORCED = {
    "move_slider_left": ("doors", "base__slide", SLIDER_TRAVEL),
    "open_drawer": ("doors", "base__drawer", 0.18),
}


@pytest.mark.calvin
@pytest.mark.parametrize("subtask", FORCED)
def test_a_forced_success_is_seen_and_nothing_else_is(simulation, subtask):
    simulation.reset(OPEN_SCENE)
    kind, name, value = FORCED[subtask]
    simulation.begin_subtask(subtask)
    assert not simulation.step(SHUT)
    before = simulation._start
    next(part for part in getattr(simulation.environment.scene, kind) if part.name == name).reset(value)
    assert simulation.step(SHUT)
    assert simulation.oracle.get_task_info(before, simulation.environment.get_info()) == {subtask}


@pytest.mark.calvin
def test_frames_are_upright_and_the_state_is_the_initial_one(simulation):
    simulation.reset(OPEN_SCENE)
    observation = simulation.observe()
    assert [image.shape for image in observation.images] == [(200, 200, 3), (84, 84, 3)]
    static = observation.images[0].astype(int)
    assert static[:30].mean() > static[150:].mean() - 60  # not a black band
    np.testing.assert_allclose(observation.state[:7], OPEN_SCENE["robot"][:7], atol=2e-3)
    assert observation.state[7] == 1
    simulation.render = False
    hidden = simulation.observe()
    simulation.render = True
    assert not any(image.any() for image in hidden.images)
    np.testing.assert_array_equal(hidden.state, observation.state)


@pytest.mark.calvin
def test_a_step_is_calvins_own_without_its_rendering(simulation):
    generator = np.random.default_rng(0)
    actions = [np.append(generator.uniform(-1, 1, 6), generator.choice([-1.0, 1.0])) for _ in range(5)]
    states = []
    for step in (simulation.step, lambda action: simulation.environment.step(action.copy())):
        simulation.reset(OPEN_SCENE)
        simulation.begin_subtask("open_drawer")
        for action in actions:
            step(action)
        raw = simulation.environment.get_state_obs()
        states.append(np.concatenate([raw["robot_obs"], raw["scene_obs"]]))
    np.testing.assert_array_equal(*states)


@pytest.mark.calvin
def test_an_episode_does_not_depend_on_the_one_before(simulation):
    simulation.reset(OPEN_SCENE)
    simulation.begin_subtask("open_drawer")
    simulation.step(SHUT)
    assert simulation.observe().state[7] == -1
    after = []
    for disturbance in (0, 20):
        for _ in range(disturbance):
            simulation.step(np.array([0.3, 0.5, -1.0, 0.2, 0.0, 0.0, -1.0]))
        simulation.reset(OPEN_SCENE)
        assert simulation.observe().state[7] == 1
        for _ in range(5):
            simulation.step(SHUT)
        after.append(simulation.environment.get_state_obs())
    for name in ("robot_obs", "scene_obs"):
        np.testing.assert_array_equal(after[0][name], after[1][name])


@pytest.mark.calvin
def test_the_instructions_are_the_published_ones():
    if importlib.util.find_spec("calvin_agent") is None:
        pytest.skip("calvin_agent is not installed")
    instructions = install.read_instructions()
    assert len(instructions) == 34
    assert instructions["open_drawer"] == "pull the handle to open the drawer"
