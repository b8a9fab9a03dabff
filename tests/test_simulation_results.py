"""Intervals, the results file, and the tables."""

import json
from pathlib import Path

import pytest

from vla_adapter_hf.simulation.intervals import wilson_interval
from vla_adapter_hf.simulation.libero.suite import LiberoSuite
from vla_adapter_hf.simulation.results import (
    EpisodeResult,
    ResultsFile,
    joined_table,
    published_table,
    read_results,
    summarise,
    task_table,
    write_summary,
)


def result(task: int, episode: int, success: bool = True, steps: int = 100) -> EpisodeResult:
    return EpisodeResult(
        suite="libero_object",
        task=task,
        episode=episode,
        seed=0,
        placement="official",
        black_images=False,
        instruction="pick up the milk",
        steps=steps,
        success=success,
        latency=[0.01, 0.03],
    )


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [
        # Newcombe 1998, table I (Wilson score, method 3): 81/263, 15/148, 0/20, 1/29.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_interval_is_the_one_in_the_literature(successes, trials, low, high):
    assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=5e-5)


def test_wilson_interval_stays_inside_at_the_ends():
    assert wilson_interval(0, 7)[0] == 0.0
    assert wilson_interval(7, 7)[1] == 1.0
    with pytest.raises(ValueError, match="successes must be in 0...trials"):
        wilson_interval(3, 2)


def test_a_torn_last_line_is_cut_off_and_nothing_else_is_lost(tmp_path):
    results = ResultsFile(tmp_path, {"policy": "noop"})
    results.append(result(0, 0))
    results.append(result(0, 1))
    path = tmp_path / "episodes.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"suite": "libero_obj')
    assert len(read_results(path)) == 2
    again = ResultsFile(tmp_path, {"policy": "noop"})
    assert again.done == {(0, 0), (0, 1)}
    assert path.read_bytes() == whole
    again.append(result(0, 2))
    assert ResultsFile(tmp_path, {"policy": "noop"}).done == {(0, 0), (0, 1), (0, 2)}


def test_a_broken_line_in_the_middle_is_reported_with_its_number(tmp_path):
    results = ResultsFile(tmp_path, {})
    results.append(result(0, 0))
    path = tmp_path / "episodes.jsonl"
    path.write_bytes(b"nonsense\n" + path.read_bytes())
    with pytest.raises(ValueError, match="line 1 of .*episodes.jsonl is not an episode"):
        ResultsFile(tmp_path, {})


def test_episodes_of_another_run_are_not_mixed_in(tmp_path):
    ResultsFile(tmp_path, {"policy": "noop", "seed": 0}).append(result(0, 0))
    with pytest.raises(ValueError, match="policy='noop' there, 'oracle' here"):
        ResultsFile(tmp_path, {"policy": "oracle", "seed": 0})


def test_every_line_has_the_fields_of_the_protocol(tmp_path):
    ResultsFile(tmp_path, {}).append(result(3, 4))
    line = json.loads((tmp_path / "episodes.jsonl").read_text())
    wanted = "suite task episode seed placement black_images instruction steps success latency".split()
    assert all(name in line for name in wanted)


def test_summary_counts_per_task_and_over_all():
    summary = summarise([result(0, 0), result(0, 1, success=False, steps=280), result(2, 0, steps=50)])
    assert (summary["successes"], summary["episodes"]) == (2, 3)
    assert summary["mean_steps_when_solved"] == 75
    assert [(row["task"], row["successes"], row["episodes"]) for row in summary["tasks"]] == [(0, 1, 2), (2, 1, 1)]
    assert summary["latency_ms"] == {"median": 20.0, "p95": 30.0, "queries": 6}
    assert "| **all** | 2/3 | 66.7 (20.8–93.9) | 75 |" in task_table(summary)


def test_summary_refuses_what_it_cannot_add_up():
    with pytest.raises(ValueError, match="one suite, got none"):
        summarise([])


def test_several_evaluations_are_joined_into_one_table(tmp_path):
    def finished(name: str, suite: str, rate: float, **settings) -> Path:
        entry = {"suite": suite, "success_rate": rate, "interval_95": [rate, rate], "published_protocol": not settings}
        entry["settings"] = {"policy": "mine", "black_images": False, "instruction": None, **settings}
        (tmp_path / name).mkdir()
        (tmp_path / name / "summary.json").write_text(json.dumps(entry), encoding="utf-8")
        return tmp_path / name

    suites = ("libero_spatial", "libero_object", "libero_goal", "libero_10")
    folders = [finished(suite, suite, rate) for suite, rate in zip(suites, (0.9, 0.8, 0.7, 0.6), strict=True)]
    lines = joined_table(folders).splitlines()
    assert lines[2].startswith("| mine | 90.0 (90.0–90.0) |") and lines[2].endswith("| 75.0 |")
    assert any(line.startswith("| VLA-Adapter-Pro (published) |") for line in lines)
    of_their_own = [finished(f"own-{suite}", suite, 0.5, policy=f"LIBERO-{suite}") for suite in suites]
    assert len(joined_table(of_their_own).splitlines()) == 2 + 4
    assert joined_table(of_their_own, "LIBERO").splitlines()[2].endswith("| 50.0 |")
    assert "published" not in joined_table([finished("few", "libero_object", 0.5, execute=4)])
    partly = finished("partly", "libero_spatial", 0.5, execute=4)
    assert "(published)" not in joined_table([partly, folders[1]])  # whichever of them comes last
    for wrong, message in (
        ([], "at least one folder"),
        ([tmp_path], "no summary.json"),
        ([folders[0], folders[0]], "second run of mine on libero_spatial"),
        ([finished("black", "libero_object", 0, black_images=True)], "holds a control"),
    ):
        with pytest.raises(ValueError, match=message):
            joined_table(wrong)


@pytest.mark.parametrize("other", [{}, {"image_size": 64}, {"states": (3,)}, {"robot": "calvin"}])
def test_frames_states_and_robot_of_other_kinds_are_named_and_are_not_the_published_protocol(tmp_path, other):
    settings = {"policy": "mine", "black_images": False, "instruction": None, "execute": None, "ensemble": None}
    settings |= LiberoSuite("libero_object", **other).describe()
    results = [result(task, episode) for task in range(10) for episode in range(50)]
    summary = write_summary(tmp_path, results, ["pick up the milk"] * 10, settings, timing=None)
    text = (tmp_path / "summary.md").read_text(encoding="utf-8")
    assert summary["published_protocol"] == ("(published)" in text) == (not other)
    assert all(f", {name} " in text for name in other)


def test_table_has_the_published_form_and_no_average_over_missing_suites():
    summary = summarise([result(0, number) for number in range(10)])
    table = published_table({"ours": {"libero_object": summary}})
    assert table.splitlines()[0] == "| Policy | Spatial | Object | Goal | Long | Average |"
    assert "| ours | — | 100.0 (72.2–100.0) | — | — | — |" in table
    assert "| VLA-Adapter (published) | 97.8 | 99.2 | 97.2 | 95.0 | 97.3 |" in table
