"""A run of the loop becomes an episode of a LeRobot dataset: whole or not at all, and fit to train on."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import model_fixtures
import numpy as np
import pyarrow.parquet as pq
import pytest
from test_robot import CHUNK, CountingPolicy, RecordingRobot, handling
from training_fixtures import QUIET

from vla_adapter_hf import (
    VLAAdapterDataCollator,
    VLAAdapterDataset,
    VLAAdapterProcessor,
    VLAAdapterTrainingArguments,
)
from vla_adapter_hf.data import ImageResize
from vla_adapter_hf.recording import robot_episodes
from vla_adapter_hf.recording.lerobot_writer import assemble, saved_episodes
from vla_adapter_hf.recording.robot_episodes import EpisodeRecorder
from vla_adapter_hf.robot import LoopSettings, StrategySettings, run
from vla_adapter_hf.training.trainer import VLAAdapterTrainer


EXAMPLES = Path(__file__).parent.parent / "examples"


def rows_of(folder: Path) -> list[dict]:
    return [row for file in sorted((folder / "data").rglob("*.parquet")) for row in pq.read_table(file).to_pylist()]


def record(folder: Path, policy=None, robot=None, task="go", **settings):
    robot = robot or RecordingRobot()
    given = {"fps": 100, "max_steps": 30, **settings}
    with EpisodeRecorder(folder, image_format="png") as recorder:
        report = run(policy or CountingPolicy(), robot, task, LoopSettings(**given), record=recorder)
    return robot, report


@pytest.fixture(scope="module")
def simulated_arm():
    spec = importlib.util.spec_from_file_location("simulated_arm", EXAMPLES / "simulated_arm.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    return example


def test_a_row_is_what_was_seen_and_what_was_sent_and_the_chunk_it_came_from(tmp_path):
    robot, report = record(tmp_path)
    rows = rows_of(tmp_path)
    # The action that brings the arm to rest belongs to no control step.
    assert np.array_equal([row["action"] for row in rows], np.stack(robot.sent[:-1]).astype(np.float32))
    for row in rows:
        assert row["observation.state"] == [0.0, 1.0, 0.5]
        held = row["query"] == -1
        assert row["position"] == -1 if held else row["action"][:2] == [row["query"], row["position"]]
    assert sum(row["query"] == -1 for row in rows) <= report.held
    assert [row["position"] for row in rows if row["query"] == 0] == list(range(CHUNK))
    assert rows[1]["timestamp"] == pytest.approx(0.01)
    info = json.loads((tmp_path / "meta/info.json").read_text())
    assert info["fps"] == 100 and info["robot_type"] == "RecordingRobot"
    assert info["features"]["action"]["names"] == ["a.pos", "b.pos", "gripper.pos"]


def test_the_action_is_the_one_that_the_robot_says_it_took(tmp_path):
    robot = RecordingRobot()
    robot.send_action = lambda action: {name: min(value, 0.5) for name, value in action.items()}
    record(tmp_path, robot=robot)
    assert max(max(row["action"]) for row in rows_of(tmp_path)) == 0.5


def test_blended_actions_name_the_newer_chunk(tmp_path):
    record(tmp_path, CountingPolicy(0.02), max_steps=60, strategy=StrategySettings("async", blend=1.0))
    rows = [row for row in rows_of(tmp_path) if row["query"] >= 0]
    assert all(row["action"][:2] == [row["query"], row["position"]] for row in rows)
    assert len({row["query"] for row in rows}) > 2


def test_runs_become_episodes_with_their_instructions_and_how_they_ended(tmp_path):
    record(tmp_path, task="go left")
    record(tmp_path, task="go right", max_steps=20)
    episodes = pq.read_table(tmp_path / "meta/episodes/chunk-000/file-000.parquet").to_pylist()
    assert [episode["tasks"] for episode in episodes] == [["go left"], ["go right"]]
    lines = (tmp_path / "meta/demonstrations.jsonl").read_text().splitlines()
    assert [json.loads(line)["ended_by"] for line in lines] == ["max_steps", "max_steps"]


def test_a_dataset_of_the_loop_is_read_and_trained_on(tmp_path, simulated_arm, processor):
    arm = simulated_arm.SimulatedArm()
    with EpisodeRecorder(tmp_path / "data") as recorder:
        settings = LoopSettings(fps=30, max_steps=20)
        run(simulated_arm.WavePolicy(seconds=0.0), arm, "wave", settings, record=recorder)
    dataset = VLAAdapterDataset.from_lerobot(
        tmp_path / "data", ["front", "wrist"], 4, image_transform=ImageResize(28, 0.9), cache_dir=tmp_path
    )
    sample = dataset[0]
    rows = rows_of(tmp_path / "data")
    assert sample["text"] == "wave" and len(dataset) == len(rows) - 3  # rows that begin a whole chunk
    np.testing.assert_allclose(sample["actions"], [row["action"] for row in rows[:4]], atol=1e-6)
    np.testing.assert_allclose(sample["state"], [0.0, 30.0, -40.0, 10.0, 0.0, 50.0], atol=1e-5)
    config = model_fixtures.tiny_config(
        cameras=["front", "wrist"], action_dim=6, proprio_dim=6, norm_stats=dataset.norm_stats
    )
    model = model_fixtures.tiny_model(config)
    collator = VLAAdapterDataCollator(VLAAdapterProcessor.from_model_config(config, processor.tokenizer), config)
    arguments = VLAAdapterTrainingArguments(**QUIET, output_dir=str(tmp_path / "run"), max_steps=2, save_strategy="no")
    trainer = VLAAdapterTrainer(model, arguments, collator, dataset)
    trainer.train()
    assert all(np.isfinite(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry)


def test_frames_that_come_faster_than_they_are_encoded_end_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(robot_episodes, "BACKLOG_SECONDS", 0.2)
    robot = RecordingRobot()
    robot.observation_features = {**robot.observation_features, "top": (960, 1280, 3)}
    noise = np.random.default_rng(0).integers(0, 256, (960, 1280, 3), dtype=np.uint8)
    observe = robot.get_observation
    robot.get_observation = lambda: {**observe(), "top": noise}
    with pytest.raises(RuntimeError, match="faster than they can be encoded as png: .* wait. Record image_format='jp"):
        record(tmp_path, robot=robot, max_steps=400)
    assert robot.calls[-1] == "disconnect"
    (line,) = (tmp_path / "meta/demonstrations.jsonl").read_text().splitlines()
    assert json.loads(line)["ended_by"] == "error"


class TestAbortedRuns:
    def test_sigterm_keeps_the_episode_up_to_there(self, tmp_path):
        def end(step) -> None:
            if step.number == 12:
                os.kill(os.getpid(), signal.SIGTERM)

        with (
            handling(signal.SIGTERM, signal.SIG_DFL),
            pytest.raises(SystemExit),
            EpisodeRecorder(tmp_path) as recorder,
        ):
            run(CountingPolicy(), RecordingRobot(), "go", LoopSettings(fps=100), on_step=end, record=recorder)
        (line,) = (tmp_path / "meta/demonstrations.jsonl").read_text().splitlines()
        assert json.loads(line)["ended_by"] == "interrupt"
        assert 0 < len(rows_of(tmp_path)) <= 13

    def test_ctrl_c_keeps_the_episode_up_to_there(self, tmp_path):
        def interrupt(step) -> None:
            if step.number == 12:
                os.kill(os.getpid(), signal.SIGINT)

        with EpisodeRecorder(tmp_path) as recorder:
            run(CountingPolicy(), RecordingRobot(), "go", LoopSettings(fps=100), on_step=interrupt, record=recorder)
        (line,) = (tmp_path / "meta/demonstrations.jsonl").read_text().splitlines()
        assert json.loads(line)["ended_by"] == "interrupt"
        assert 0 < len(rows_of(tmp_path)) <= 13

    def test_an_error_keeps_the_episode_up_to_there_and_is_raised(self, tmp_path):
        policy = CountingPolicy()
        predict = policy.predict
        policy.predict = lambda *arguments: predict(*arguments) if not policy.queries else np.full((8, 3), np.nan)
        with pytest.raises(RuntimeError, match="no usable answer"):
            record(tmp_path, policy, max_steps=None, late_after=0.1, give_up_after=0.3)
        (line,) = (tmp_path / "meta/demonstrations.jsonl").read_text().splitlines()
        assert json.loads(line)["ended_by"] == "error"
        rows = rows_of(tmp_path)
        assert np.isfinite([row["action"] for row in rows]).all() and rows[-1]["query"] == -1

    def test_a_run_without_an_action_leaves_nothing(self, tmp_path):
        policy = CountingPolicy()
        policy.predict = lambda *arguments: None
        with pytest.raises(RuntimeError, match="no usable answer"):
            record(tmp_path, policy, max_steps=None, late_after=0.1, give_up_after=0.2)
        assert not saved_episodes(tmp_path) and not (tmp_path / "meta").exists()

    def test_a_killed_program_leaves_whole_episodes_only(self, tmp_path):
        program = f"""
import os, sys
sys.path[:0] = [{str(Path(__file__).parent)!r}]
from test_robot_recording import *
kill = lambda step: os.kill(os.getpid(), signal.SIGKILL) if step.number == 12 else None
with EpisodeRecorder({str(tmp_path)!r}, image_format="png") as recorder:
    run(CountingPolicy(), RecordingRobot(), "go", LoopSettings(fps=100, max_steps=20), record=recorder)
    run(CountingPolicy(), RecordingRobot(), "go", LoopSettings(fps=100), on_step=kill, record=recorder)
"""
        ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        assert ended.returncode == -signal.SIGKILL, ended.stderr
        assert saved_episodes(tmp_path) == ["000000"]
        record(tmp_path, max_steps=10)  # goes on behind it
        assert json.loads((tmp_path / "meta/info.json").read_text())["total_episodes"] == 2

    def test_the_arm_is_disconnected_before_an_error_of_the_recording_is_raised(self, tmp_path):
        robot = RecordingRobot()
        observe = robot.get_observation
        robot.get_observation = lambda: {**observe(), "top": np.zeros((4, 4, 3), np.uint8)}
        with pytest.raises(ValueError, match=r"camera 'top' gives frames of \(4, 4\) pixels, the robot says \(8, 8\)"):
            record(tmp_path, robot=robot)
        assert robot.calls == ["connect", "disconnect"]


class TestRefused:
    def test_another_robot_or_rate_is_refused_before_the_robot_is_connected(self, tmp_path):
        record(tmp_path)
        robot = RecordingRobot()
        with pytest.raises(ValueError, match="was begun with fps=100 and not 50; record into another folder"):
            record(tmp_path, robot=robot, fps=50)
        assert robot.calls == []
        assert len(saved_episodes(tmp_path)) == 1

    def test_a_rate_that_lerobot_cannot_store_is_refused(self, tmp_path):
        with pytest.raises(ValueError, match="whole number of frames per second, got fps=12.5"):
            record(tmp_path, fps=12.5)

    def test_a_recorder_needs_its_block(self, tmp_path):
        with pytest.raises(RuntimeError, match="works in a with block"):
            run(CountingPolicy(), RecordingRobot(), "go", record=EpisodeRecorder(tmp_path))

    def test_two_programs_do_not_record_into_one_folder(self, tmp_path):
        with EpisodeRecorder(tmp_path), pytest.raises(ValueError, match="another process is writing"):
            with EpisodeRecorder(tmp_path):
                pass


def test_without_a_recorder_the_robot_is_observed_only_for_the_policy():
    robot, policy = RecordingRobot(), CountingPolicy()
    observed = []
    observe = robot.get_observation
    robot.get_observation = lambda: observed.append(0) or observe()
    run(policy, robot, "go", LoopSettings(fps=100, max_steps=30))
    assert len(observed) == policy.queries


def test_assembling_again_changes_nothing(tmp_path):
    record(tmp_path)
    before = rows_of(tmp_path)
    assemble(tmp_path)
    assert rows_of(tmp_path) == before
