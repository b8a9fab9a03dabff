"""An evaluation in parts, joined to what one run would have left."""

import json

import pytest
from point_environment import PointSuite
from typer.testing import CliRunner

from vla_adapter_cli import app
from vla_adapter_hf.simulation.evaluate import evaluate
from vla_adapter_hf.simulation.policies import NoopPolicy
from vla_adapter_hf.simulation.results import read_results
from vla_adapter_hf.simulation.settings import EvaluationSettings
from vla_adapter_hf.simulation.shards import Shard, join_shards


SUITE = PointSuite(step_limit=8)


def play(output, shard: str | None, **settings) -> dict:
    settings = EvaluationSettings(episodes=3, processes=0, shard=shard, **settings)
    return evaluate(NoopPolicy("libero"), SUITE, output, settings, lambda line: None)


def lines(folder) -> list[dict]:
    found = [json.loads(line) for line in (folder / "episodes.jsonl").read_text().splitlines()]
    return [{**line, "latency": len(line["latency"])} for line in found]


@pytest.mark.parametrize("count", [1, 4, 9])
def test_shards_are_equal_parts_that_hold_every_episode_once(count):
    selected = [(task, episode) for episode in range(3) for task in range(3)]
    parts = [Shard(number, count).part(selected) for number in range(1, count + 1)]
    assert [key for part in parts for key in part] == sorted(selected)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("text", ["3", "0/8", "9/8", "a/b", "3/8/2", "-1/8"])
def test_a_part_that_cannot_be_is_refused(text):
    with pytest.raises(ValueError, match="shard must be a part such as 3/8"):
        EvaluationSettings(shard=text)


def test_more_shards_than_episodes_are_refused(tmp_path):
    with pytest.raises(ValueError, match="shard=1/10 is empty: there are 9 episodes"):
        play(tmp_path, "1/10")
    assert not list(tmp_path.iterdir())


def test_joined_shards_are_the_whole_run(tmp_path):
    whole = play(tmp_path / "whole", None)
    for number in (2, 1, 4, 3):
        play(tmp_path / "parts", f"{number}/4")
    result = CliRunner().invoke(app, ["scores", str(tmp_path / "parts")])
    assert result.exit_code == 0, result.output
    assert "| noop | 0.0 (0.0–29.9)" in result.stdout
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole")
    assert (tmp_path / "parts" / "settings.json").read_text() == (tmp_path / "whole" / "settings.json").read_text()
    joined = json.loads((tmp_path / "parts" / "summary.json").read_text())
    for summary in (joined, whole):
        summary.pop("timing", None), summary.pop("latency_ms")
    assert joined == whole
    assert CliRunner().invoke(app, ["scores", str(tmp_path / "parts")]).stdout == result.stdout


def test_a_trial_in_the_same_folder_does_not_hide_the_shards(tmp_path):
    whole = play(tmp_path / "whole", None)
    trial = EvaluationSettings(tasks=[2], episodes=1, processes=0)
    evaluate(NoopPolicy("libero"), SUITE, tmp_path / "parts", trial, lambda line: None)
    for number in (1, 2):
        play(tmp_path / "parts", f"{number}/2")
    result = CliRunner().invoke(app, ["scores", str(tmp_path / "parts")])
    assert result.exit_code == 0, result.output
    assert "| noop | 0.0 (0.0–29.9)" in result.stdout
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole")
    summary = json.loads((tmp_path / "parts" / "summary.json").read_text())
    assert (summary["episodes"], "timing" in summary) == (whole["episodes"], False)  # the trial's time is not theirs


def test_a_folder_with_episodes_of_no_shard_is_refused_and_kept(tmp_path):
    trial = EvaluationSettings(tasks=[2], episodes=[7, 8], processes=0)
    evaluate(NoopPolicy("libero"), SUITE, tmp_path, trial, lambda line: None)
    files = [tmp_path / "episodes.jsonl", tmp_path / "summary.json"]
    before = [path.read_bytes() for path in files]
    for number in (1, 2):
        play(tmp_path, f"{number}/2")
    with pytest.raises(ValueError, match="holds 2 episodes that are in no shard, the first is task 2 episode 7"):
        join_shards(tmp_path)
    assert [path.read_bytes() for path in files] == before


def test_shards_are_not_forgotten_while_some_are_missing(tmp_path):
    play(tmp_path, None)
    play(tmp_path, "1/2")
    result = CliRunner().invoke(app, ["scores", str(tmp_path)])
    assert result.exit_code == 1 and "of 2 shards these are missing: 2" in result.stderr


def test_films_and_actions_stay_in_the_shards(tmp_path):
    for number in (1, 2):
        play(tmp_path, f"{number}/2", save_actions=True)
    join_shards(tmp_path)
    assert not (tmp_path / "actions").exists()
    assert len(list(tmp_path.glob("shard-*/actions/*.npy"))) == 9


def test_a_shard_goes_on_after_an_interruption(tmp_path):
    play(tmp_path, "2/3")
    path = tmp_path / "shard-2-of-3" / "episodes.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:1]))
    play(tmp_path, "2/3")
    assert [result.key for result in read_results(path)] == [(1, 0), (1, 1), (1, 2)]


def test_what_is_missing_is_said(tmp_path):
    play(tmp_path, "1/4")
    with pytest.raises(ValueError, match="of 4 shards these are missing: 2, 3, 4"):
        join_shards(tmp_path)
    for number in (2, 3, 4):
        play(tmp_path, f"{number}/4")
    path = tmp_path / "shard-3-of-4" / "episodes.jsonl"
    path.write_bytes(path.read_bytes().splitlines(keepends=True)[0])
    with pytest.raises(ValueError, match="1 of shard 3, the first is task 1 episode 2"):
        join_shards(tmp_path)
    assert not (tmp_path / "episodes.jsonl").exists()


def test_shards_with_other_settings_or_of_another_division_are_not_joined(tmp_path):
    play(tmp_path / "settings", "1/2")
    play(tmp_path / "settings", "2/2", black_images=True)
    with pytest.raises(ValueError, match="different settings: black_images=False and True"):
        join_shards(tmp_path / "settings")
    play(tmp_path / "division", "1/2")
    play(tmp_path / "division", "2/3")
    with pytest.raises(ValueError, match="parts of different evaluations"):
        join_shards(tmp_path / "division")


def test_a_folder_of_other_episodes_is_refused(tmp_path):
    play(tmp_path, "1/2")
    with pytest.raises(ValueError, match="holds a part of other episodes"):
        play(tmp_path, "1/2", tasks=[0, 1])


def test_one_shard_alone_is_no_score(tmp_path):
    play(tmp_path, "1/2")
    result = CliRunner().invoke(app, ["scores", str(tmp_path / "shard-1-of-2")])
    assert result.exit_code == 1 and "is one shard of an evaluation" in result.stderr
    empty = CliRunner().invoke(app, ["scores", str(tmp_path / "nothing")])
    assert empty.exit_code == 1 and "holds no summary.json" in empty.stderr
