"""What delay costs: the grid of delays and strategies, its table, its numbers and its plot."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from point_environment import PointSuite, SeeingPolicy
from typer.testing import CliRunner

from vla_adapter_cli import app
from vla_adapter_hf.simulation.delays import delay_table, evaluate_delays, read_cells
from vla_adapter_hf.simulation.evaluate import evaluate
from vla_adapter_hf.simulation.intervals import mean_interval
from vla_adapter_hf.simulation.results import read_results
from vla_adapter_hf.simulation.settings import DELAY_STRATEGIES, DelaySettings, EvaluationSettings


class SlowPolicy(SeeingPolicy):
    """Goes a fifth of the way, so that an episode takes several chunks."""

    def _chunk(self, request):
        chunk = super()._chunk(request)
        chunk[:, :2] *= 0.2
        return chunk


def silent(line: str) -> None:
    """No progress."""


def play_grid(output: Path, report=silent, policy=None, suite=None, **settings):
    given = {"delays": (0, 4), "strategies": DELAY_STRATEGIES, "episodes": 2, "processes": 0, "step_limit": 200}
    policy, suite = policy or SeeingPolicy(), suite or PointSuite()
    return evaluate_delays(policy, suite, output, DelaySettings(**{**given, **settings}), report)


def test_every_delay_meets_every_strategy_and_no_delay_is_played_once(tmp_path):
    cells = play_grid(tmp_path)
    named = [(cell.strategy, cell.delay) for cell in cells]
    assert named == [("sync", 0), ("sync", 4), ("async", 4), ("async-rolled", 4)]
    assert sorted(path.name for path in tmp_path.glob("*_delay*")) == [
        "async-rolled_delay4",
        "async_delay4",
        "sync_delay0",
        "sync_delay4",
    ]
    assert {cell.episodes for cell in cells} == {6}
    numbers = json.loads((tmp_path / "delays.json").read_text(encoding="utf-8"))
    assert [entry["steps"] for entry in numbers] == [cell.steps for cell in cells]
    assert (tmp_path / "delays.md").read_text(encoding="utf-8") == delay_table(cells)


def test_a_shard_of_a_grid_is_refused_before_anything_is_played(tmp_path):
    with pytest.raises(ValueError, match="shard=1/2 is for one delay and one strategy"):
        play_grid(tmp_path, shard="1/2")
    assert not list(tmp_path.iterdir())


def test_the_plot_is_small_enough_for_documentation(tmp_path):
    pytest.importorskip("matplotlib")
    play_grid(tmp_path)
    with Image.open(tmp_path / "delays.png") as picture:
        assert picture.width > 400
    assert (tmp_path / "delays.png").stat().st_size < 100_000


def test_without_a_delay_all_strategies_execute_the_same(tmp_path):
    actions = []
    for strategy in DELAY_STRATEGIES:
        settings = EvaluationSettings(
            tasks=[0], episodes=1, processes=0, strategy=strategy, step_limit=60, save_actions=True
        )
        evaluate(SlowPolicy(), PointSuite(), tmp_path / strategy, settings, silent)
        actions.append(np.load(tmp_path / strategy / "actions" / "00-0000.npy"))
    assert len(actions[0]) > 16
    assert all(np.array_equal(actions[0], others) for others in actions[1:])


def test_the_steps_that_a_sync_robot_stands_still_count(tmp_path):
    play_grid(tmp_path, policy=SlowPolicy(), strategies=("sync",))
    prompt, delayed = (read_results(tmp_path / f"sync_delay{delay}" / "episodes.jsonl") for delay in (0, 4))
    assert min(len(result.latency) for result in prompt) > 1
    assert [late.steps for late in delayed] == [soon.steps + 4 * len(soon.latency) for soon in prompt]
    cells = read_cells([tmp_path])
    assert [cell.seconds for cell in cells] == [cell.steps / 20 for cell in cells]


def test_a_grid_that_is_called_again_plays_only_what_is_missing(tmp_path):
    play_grid(tmp_path, strategies=("sync",))
    before = (tmp_path / "sync_delay4" / "episodes.jsonl").read_bytes()
    lines: list[str] = []
    policy = SeeingPolicy()
    cells = play_grid(tmp_path, lines.append, policy, strategies=("sync", "async"))
    assert len(cells) == 3 and sum(policy.batches) > 0
    assert [line for line in lines if not line.startswith("task")] == ["sync_delay0:", "sync_delay4:", "async_delay4:"]
    assert sum(line.startswith("task") for line in lines) == 6
    assert (tmp_path / "sync_delay4" / "episodes.jsonl").read_bytes() == before


def test_several_grids_stand_next_to_each_other_and_unfinished_cells_are_left_out(tmp_path):
    play_grid(tmp_path / "near", strategies=("sync",))
    play_grid(tmp_path / "far", strategies=("sync",), delays=(0,))
    (tmp_path / "far" / "async_delay4").mkdir()
    (tmp_path / "far" / "async_delay4" / "settings.json").write_text("{}", encoding="utf-8")
    result = CliRunner().invoke(app, ["scores", str(tmp_path / "near"), str(tmp_path / "far")])
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines.pop(0) == "6 episodes a cell; 95 % intervals; steps and seconds of the solved ones."
    assert lines.pop(0) == ""
    assert lines[0].startswith("| Delay | Strategy | near: success, % | steps | seconds | far: success, % |")
    assert lines[2].startswith("| 0 | any | 100.0 (61.0–100.0) |")
    assert lines[3].startswith("| 4 (200 ms) | sync | 100.0 (61.0–100.0) |") and lines[3].endswith("| — | — | — |")
    assert len(lines) == 4


@pytest.mark.parametrize(
    "other, message",
    [
        ({"step_limit": 100}, "step_limit differ"),
        ({"episodes": [7]}, "no episode in common"),
        ({"suite": PointSuite(seed=1)}, "seed differ"),
    ],
)
def test_grids_that_cannot_be_compared_are_not_joined(tmp_path, other, message):
    play_grid(tmp_path / "one", delays=(0,))
    play_grid(tmp_path / "two", delays=(0,), **other)
    with pytest.raises(ValueError, match=message):
        read_cells([tmp_path / "one", tmp_path / "two"])


def test_cells_that_were_extended_are_compared_over_the_episodes_that_all_have(tmp_path):
    play_grid(tmp_path, delays=(0, 4), strategies=("sync",))
    play_grid(tmp_path / "more", delays=(0,), episodes=5)
    assert {cell.episodes for cell in read_cells([tmp_path, tmp_path / "more"])} == {6}


def test_a_grid_without_a_finished_cell_is_named(tmp_path):
    with pytest.raises(ValueError, match="holds no finished evaluation with a delay"):
        read_cells([tmp_path])


def test_a_cell_in_which_nothing_was_solved_has_no_time(tmp_path):
    blind = play_grid(tmp_path, delays=(0,), black_images=True, step_limit=10)
    assert blind[0].steps is None and blind[0].interval_95[0] == 0.0
    assert delay_table(blind).splitlines()[4] == "| 0 | any | 0.0 (0.0–39.0) | — | — |"


def test_settings_that_cannot_be_played_are_refused_before_anything_is():
    for settings, message in (
        ({"delays": ()}, "must name at least one each"),
        ({"delays": (0, -1)}, "delay must be 0 or more"),
        ({"delays": (4,), "strategies": ("late",)}, "strategy must be one of sync, async, async-rolled, got 'late'$"),
        ({"strategies": ("sync", "ensemble"), "execute": 4}, "got 'ensemble'; give ensemble=0 instead"),
        ({"delay": 4}, "give delays and strategies"),
    ):
        with pytest.raises(ValueError, match=message):
            DelaySettings(**settings)


def test_the_interval_of_a_mean_is_that_of_the_textbook():
    # 1...9: mean 5, standard deviation sqrt(7.5), so 1.96 * sqrt(7.5 / 9) to either side.
    assert mean_interval(range(1, 10)) == pytest.approx((5 - 1.7892, 5 + 1.7892), abs=1e-4)
    with pytest.raises(ValueError, match="two values or more, got 1"):
        mean_interval([3.0])
