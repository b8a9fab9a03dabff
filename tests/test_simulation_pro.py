"""LIBERO-PRO: which suites there are, what their instructions are, and the table of the published form."""

import numpy as np
import pytest
from simulator import need_simulator
from typer.testing import CliRunner

from vla_adapter_cli import app
from vla_adapter_hf.simulation.evaluate import evaluate
from vla_adapter_hf.simulation.grid import evaluate_grid, grid_table
from vla_adapter_hf.simulation.libero.pro import BASES, PRO_PUBLISHED, PRO_SUITES, grid, task_instruction
from vla_adapter_hf.simulation.libero.suite import SUITES, LiberoSuite
from vla_adapter_hf.simulation.policies import NoopPolicy
from vla_adapter_hf.simulation.results import read_results
from vla_adapter_hf.simulation.settings import EvaluationSettings


def silent(line: str) -> None:
    """No progress."""


def test_every_base_suite_has_four_perturbations():
    assert len(PRO_SUITES) == 16 and set(PRO_SUITES) < set(SUITES)
    assert grid("libero_10") == ["libero_10", *(f"libero_10_{name}" for name in ("object", "swap", "lan", "task"))]
    assert all(LiberoSuite(name).base == base for name, base in PRO_SUITES.items())
    assert LiberoSuite("libero_90").base == "libero_90"


def test_only_a_changed_instruction_is_read_from_the_task_file(tmp_path):
    """The file's name is the base suite's everywhere; the published protocol reads the instruction from that name."""
    task = tmp_path / "pick_up_the_milk_and_place_it_in_the_basket.bddl"
    task.write_text("(define (problem X)\n  (:domain robosuite)\n  (:language grab milk\n   and put into basket)\n)")
    named = "pick up the milk and place it in the basket"
    for suite in ("libero_object", "libero_object_swap", "libero_object_object"):
        assert task_instruction(suite, named, task) == named
    for suite in ("libero_object_lan", "libero_object_task"):
        assert task_instruction(suite, named, task) == "grab milk and put into basket"
    task.write_text("(define (problem X))")
    with pytest.raises(ValueError, match=r"has no \(:language"):
        task_instruction("libero_object_lan", named, task)


def test_the_table_has_the_published_rows_below():
    rates = {name: {"success_rate": 0.5, "interval_95": [0.4, 0.6]} for name in grid("libero_goal")}
    lines = grid_table("mine", "libero_goal", rates).splitlines()
    assert lines[2] == "| Policy | Original | Object | Position | Semantic | Task |"
    assert lines[4] == "| mine |" + 5 * " 50.0 (40.0–60.0) |"
    assert "| π0.5 (published) | 97 | 97 | 38 | 97 | 0 |" in lines
    assert "| X-VLA (published) | — | 68 | 1 | 98 | 9 |" in lines
    assert all(len(rates) == 5 for base in BASES for rates in PRO_PUBLISHED[base].values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suite", "libero_90_pro"], "LIBERO-PRO perturbs libero_spatial, libero_object, libero_goal, libero_10"),
        (["--suite", "pro", "--placement", "jitter"], "have --placement official only"),
        (["--suite", "pro", "--shard", "1/2"], "--shard 1/2 is for one suite"),
        (["--suite", "pro", "--instruction", "other"], "suites have no --instruction other"),
        (
            ["--suite", "libero_object_pro", "--instruction", "other"],
            "suites have no --instruction other",
        ),
        (["--suite", "libero_goal_pro", "--placement", "jitter"], "have --placement official only"),
        (
            ["--suite", "libero_object_swap", "--placement", "jitter"],
            "--placement jitter is for libero_spatial, libero_object",
        ),
        (["--suite", "libero_object_env"], "--suite must be one of|suite must be one of"),
    ],
)
def test_what_a_perturbed_suite_cannot_do_is_named(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["eval", "--policy", "noop", *arguments])
    assert result.exit_code == 1
    assert any(text in result.stderr for text in message.split("|"))
    assert not list(tmp_path.iterdir())


@pytest.mark.simulator
def test_every_suite_of_the_installed_simulator_has_its_tasks():
    need_simulator()
    assert {name: len(LiberoSuite(name).tasks) for name in SUITES} == {
        name: 90 if name == "libero_90" else 10 for name in SUITES
    }
    milk = "pick up the milk and place it in the basket"
    words = {suite: LiberoSuite(suite).tasks[LiberoSuite("libero_object").tasks.index(milk)] for suite in SUITES[5:]}
    assert words["libero_object_swap"] == words["libero_object_object"] == milk
    assert words["libero_object_lan"] == "grab milk and put into basket"
    assert words["libero_object_task"] == "Pick the butter and place it in the basket"


@pytest.mark.simulator
def test_an_instruction_that_a_later_suite_cannot_play_is_refused_before_the_first_is_played(tmp_path):
    need_simulator()
    settings = EvaluationSettings(
        tasks=[1, 7], episodes=1, processes=0, instruction="pick up the milk and place it in the basket"
    )
    # In libero_object the milk of task 7 is also in the scene of task 1. The perturbed suites ask for their own only.
    with pytest.raises(ValueError, match=r"in libero_object_object tasks 1 have none: choose tasks=7$"):
        evaluate_grid(NoopPolicy("libero"), "libero_object", tmp_path, settings, silent)
    assert not list(tmp_path.iterdir())


@pytest.mark.simulator
def test_a_swapped_scene_has_two_objects_exchanged_and_the_expert_solves_it(tmp_path):
    need_simulator()
    positions = {}
    for name in ("libero_object", "libero_object_swap"):
        environment = LiberoSuite(name, image_size=64).make(6)
        environment.render = False
        environment.reset(0)
        positions[name] = {other: environment.object_position(other) for other in environment.movable_objects}
        environment.close()
    before, after = positions.values()
    moved = {name for name in before if np.abs(before[name] - after[name])[:2].max() > 0.03}
    assert moved == {"butter_1", "tomato_sauce_1"}
    np.testing.assert_allclose(after["butter_1"][:2], before["tomato_sauce_1"][:2], atol=0.01)
    np.testing.assert_allclose(after["tomato_sauce_1"][:2], before["butter_1"][:2], atol=0.01)
    settings = EvaluationSettings(tasks=[6], episodes=1, processes=0)
    for name in ("libero_object_swap", "libero_object_task"):
        suite = LiberoSuite(name, image_size=64)
        assert evaluate("oracle", suite, tmp_path / name, settings, silent)["successes"] == 1
    (result,) = read_results(tmp_path / "libero_object_task" / "episodes.jsonl")
    assert result.instruction == "Pick the orange juice and place it in the basket"


@pytest.mark.slow
@pytest.mark.simulator
def test_the_grid_plays_all_five_suites_and_resumes(tmp_path):
    need_simulator()
    settings = EvaluationSettings(tasks=[0], episodes=1, processes=0)
    summaries = evaluate_grid(NoopPolicy("libero"), "libero_object", tmp_path, settings, silent)
    assert [summary["suite"] for summary in summaries.values()] == grid("libero_object")
    assert all(summary["successes"] == 0 for summary in summaries.values())
    text = (tmp_path / "summary.md").read_text(encoding="utf-8")
    assert text == grid_table("noop", "libero_object", summaries)
    lines: list[str] = []
    evaluate_grid(NoopPolicy("libero"), "libero_object", tmp_path, settings, lines.append)
    assert lines == [f"{name}:" for name in grid("libero_object")]
