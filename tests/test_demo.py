"""`vla-adapter demo`: predictions over a recorded episode, and an episode where the simulator is."""

import subprocess
import sys
import time
from importlib.resources import files

import model_fixtures
import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence
from simulator import need_simulator

from vla_adapter_hf.checkpoints.embedded import embedded_folder
from vla_adapter_hf.checkpoints.model_card import fill_model_card
from vla_adapter_hf.checkpoints.open import open_checkpoint
from vla_adapter_hf.demo.predictions import OTHER_OBJECT, ArmResponse, predict_episode
from vla_adapter_hf.demo.run import card_results, demo, play
from vla_adapter_hf.recording.play_episode import play_episode
from vla_adapter_hf.recording.played_episode import PlayedEpisode, embedded_episode
from vla_adapter_hf.simulation.libero.suite import object_instruction
from vla_adapter_hf.utils.attention import predict_with_attention


@pytest.fixture(scope="module")
def episode() -> PlayedEpisode:
    return embedded_episode()


@pytest.fixture(scope="module")
def policy():
    with embedded_folder() as folder:
        opened = open_checkpoint(folder / "checkpoint")
        return opened.load_model(dtype=torch.float32), opened.load_processor()


@pytest.fixture(scope="module")
def predictions(policy, episode):
    return predict_episode(*policy, episode)


class TestEpisode:
    def test_it_is_held_out_small_and_complete(self, episode):
        assert episode.source["initial_state"] in range(40, 50)
        assert episode.source["suite"] == "libero_object" and "simulator_seed" in episode.source
        size = sum(file.stat().st_size for file in files("vla_adapter_hf").joinpath("embedded", "episode").iterdir())
        assert size < 2_000_000
        moments = len(episode.steps)
        assert episode.frames.shape == (moments, 2, 256, 256, 3) and episode.states.shape == (moments, 8)
        assert len(episode.positions) == len(episode.actions) + 1
        assert episode.steps[-1] + 8 <= len(episode.actions)
        assert episode.source["solved_at_step"] < len(episode.actions)

    def test_states_and_positions_are_of_the_same_moments(self, episode):
        # The simulator samples a state shortly before the end of a step.
        np.testing.assert_allclose(episode.states[:, :3], episode.positions[episode.steps], atol=2e-3)

    def test_the_camera_matrix_finds_the_object_in_the_frame(self, episode):
        """The milk carton is red, and nothing else near it is."""
        milk = np.array(episode.objects[episode.target])
        column, row = (episode.project(milk) * len(episode.scene)).astype(int)
        around = episode.scene[row - 8 : row + 8, column - 8 : column + 8].reshape(-1, 3).mean(axis=0)
        assert around[0] > 1.5 * around[1] and around[0] > 1.5 * around[2]

    def test_what_is_saved_reads_back(self, episode, tmp_path):
        episode.save(tmp_path / "episode")
        again = PlayedEpisode.load(tmp_path / "episode")
        for name in ("steps", "states", "actions", "positions", "camera_matrix"):
            np.testing.assert_array_equal(getattr(again, name), getattr(episode, name))
        assert (again.instruction, again.source, again.objects) == (
            episode.instruction,
            episode.source,
            episode.objects,
        )
        assert again.frames.shape == episode.frames.shape
        assert np.abs(again.frames.astype(int) - episode.frames).mean() < 2  # JPEG once more

    @pytest.mark.simulator
    def test_recording_it_again_gives_the_same_episode(self, episode):
        need_simulator()
        again = play_episode(episode.source["task"], episode.source["initial_state"])
        assert again.source == episode.source and again.objects == episode.objects
        np.testing.assert_allclose(again.actions, episode.actions, atol=1e-3)
        np.testing.assert_allclose(again.camera_matrix, episode.camera_matrix, atol=1e-9)
        assert np.abs(again.frames.astype(int) - episode.frames).mean() < 3  # stored as JPEG


class TestPredictions:
    def test_the_policy_predicts_what_was_executed_and_the_controls_differ(self, predictions, episode):
        executed = np.stack([episode.actions[step : step + 8] for step in episode.steps])
        errors = {name: np.abs(getattr(predictions, name) - executed).mean() for name in ("asked", "other", "black")}
        assert errors["asked"] < 0.04
        assert errors["other"] > 5 * errors["asked"] and errors["black"] > 5 * errors["asked"]

    def test_predicted_paths_end_where_the_gripper_went(self, predictions, episode):
        response = ArmResponse(episode)
        for chunks, limit in ((predictions.asked, 0.01), (predictions.other, None)):
            apart = [
                np.linalg.norm(response.path(step, chunk)[-1] - episode.positions[step + 8])
                for step, chunk in zip(episode.steps, chunks, strict=True)
            ]
            if limit is not None:
                assert np.mean(apart) < limit
            else:
                assert np.mean(apart) > 0.05

    def test_asked_for_another_object_the_path_turns_to_it(self, predictions, episode):
        """Over the floor, from everywhere on the way to the milk."""
        response, other = ArmResponse(episode), np.array(episode.objects[OTHER_OBJECT])
        closes = int(np.argmax(episode.actions[:, 6] > 0))
        for moment in np.flatnonzero(episode.steps < closes):
            begin, end = response.path(episode.steps[moment], predictions.other[moment])[[0, -1]]
            moved, direction = (end - begin)[:2], (other - begin)[:2]
            assert moved @ direction > 0.7 * np.linalg.norm(moved) * np.linalg.norm(direction)

    def test_it_looks_at_the_object_that_is_asked_for(self, policy, episode):
        """Of 8 x 8 patches of the third-person frame, the one with most attention is at the object or next to it."""
        model, processor = policy
        for name in (episode.target, OTHER_OBJECT):
            inputs = processor(images=list(episode.frames[0]), text=object_instruction(name), state=episode.states[0])
            _, attention = predict_with_attention(model, inputs)
            row, column = np.unravel_index(attention[0, 0].argmax(), (8, 8))
            expected = episode.project(np.array(episode.objects[name])) * 8
            assert np.hypot(column + 0.5 - expected[0], row + 0.5 - expected[1]) < 1.5


def test_the_demo_draws_its_picture_within_a_minute_without_the_simulator(tmp_path):
    pytest.importorskip("matplotlib")
    program = (
        "import sys; sys.modules.update(dict.fromkeys(['libero', 'robosuite', 'mujoco']));"
        f"from vla_adapter_hf.demo.run import demo; demo(output={str(tmp_path / 'new' / 'demo.png')!r})"
    )
    begin = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert time.perf_counter() - begin < 60
    lines = {line.split(":")[0]: line for line in done.stdout.splitlines() if ":" in line}
    assert {"policy", "episode", "instruction", "mean error", "prediction", "picture"} <= set(lines)
    assert " ms" in lines["prediction"] and "pick up the milk" in lines["instruction"]
    with Image.open(tmp_path / "new" / "demo.png") as picture:
        assert picture.size == (1650, 1309)
        pixels = np.asarray(picture.convert("RGB"))
    predicted = np.abs(pixels.astype(int) - (255, 140, 26)).max(axis=-1) < 8
    assert predicted[300:980, :900].sum() > 1000  # the path in the frame
    assert predicted[300:980, 950:].sum() > 1000  # the commands


def test_a_policy_for_another_robot_is_refused_before_anything_is_predicted(tmp_path, processor):
    pytest.importorskip("matplotlib")
    model = model_fixtures.tiny_model(cameras=["image"])
    model.save_pretrained(tmp_path / "one camera")
    type(processor).from_model_config(model.config, processor.tokenizer).save_pretrained(tmp_path / "one camera")
    with pytest.raises(ValueError, match=r"num_cameras=2; .* has 1"):
        demo(str(tmp_path / "one camera"), tmp_path / "demo.png", report_progress=lambda line: None)
    assert not (tmp_path / "demo.png").exists()


def test_results_are_read_from_the_card(tiny_config):
    config = tiny_config()
    assert card_results(fill_model_card(config, "title", "summary")) == ""
    results = "97 of 100 solved\n\n| a | b |"
    assert card_results(fill_model_card(config, "title", "summary", results=results)) == results
    assert card_results("# A card without them\n\n## Limits\n\nMany.\n") == ""


@pytest.mark.simulator
def test_the_embedded_policy_solves_a_rendered_episode(tmp_path):
    need_simulator()
    lines: list[str] = []
    output = tmp_path / "new" / "demo.png"
    summary = play(output=output, report_progress=lines.append)
    assert (summary["successes"], summary["episodes"]) == (1, 1) and summary["settings"]["policy"] == "embedded"
    assert summary["timing"]["rendering"] > 0
    ending = [line for line in lines if line.startswith("success:")]
    assert ending and "yes" in ending[0]
    with Image.open(output) as sheet, Image.open(output.with_suffix(".gif")) as film:
        frames = 1 + summary["timing"]["steps"] // 4
        assert sum(1 for _ in ImageSequence.Iterator(film)) == frames
        # Both cameras side by side, and a bar below.
        assert film.size == (512, 264)
        assert sheet.size[0] == 5 * 262 + 6


def test_an_episodes_picture_must_be_a_png(tmp_path):
    with pytest.raises(ValueError, match="output must end in .png"):
        play(output=tmp_path / "demo.gif")
