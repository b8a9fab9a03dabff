"""Handing out the actions of a chunk, and which checkpoints may give them."""

import json
import shutil

import numpy as np
import pytest

from vla_adapter_hf.checkpoints.embedded import embedded_folder
from vla_adapter_hf.robot.action_queue import ActionChunkQueue
from vla_adapter_hf.robot.policy import LocalPolicy
from vla_adapter_hf.robot.strategies import ChunkStrategy, StrategySettings
from vla_adapter_hf.simulation.policies import camera_order, make_policy


def chunk(first: float, size: int = 8) -> np.ndarray:
    """Actions whose first dimension counts the steps from `first` on."""
    return np.stack([[first + step, -1.0] for step in range(size)])


def test_whole_chunk_is_executed_in_order_before_the_next_query():
    queue = ActionChunkQueue()
    assert queue.needs_chunk
    queue.add(chunk(0))
    assert queue.steps_until_query() == 8
    assert [queue.pop()[0] for _ in range(8)] == list(range(8))
    assert queue.needs_chunk


def test_only_k_actions_of_a_chunk_are_executed_when_asked():
    queue = ActionChunkQueue(execute=3)
    queue.add(chunk(0))
    assert [queue.pop()[0] for _ in range(3)] == [0, 1, 2]
    assert queue.needs_chunk
    queue.add(chunk(100))
    assert queue.pop()[0] == 100


def test_pop_without_a_chunk_is_refused():
    with pytest.raises(RuntimeError, match="add a chunk first"):
        ActionChunkQueue().pop()


def test_reset_forgets_the_last_episodes_actions():
    queue = ActionChunkQueue(execute=1, ensemble=0.0)
    queue.add(chunk(50))
    queue.pop()
    queue.reset()
    queue.add(chunk(0))
    assert queue.pop()[0] == 0


def test_ensemble_of_weight_zero_is_the_mean_of_all_chunks_that_speak_about_the_step():
    queue = ActionChunkQueue(execute=1, ensemble=0.0)
    queue.add(chunk(0))
    queue.pop()
    queue.add(chunk(11))
    # Step 1: the first chunk says 1, the second 11.
    assert queue.pop()[0] == pytest.approx(6.0)
    queue.add(chunk(32))
    # Step 2: 2, 12 and 32.
    assert queue.pop()[0] == pytest.approx(46 / 3)


def test_ensemble_weights_are_acts_with_the_oldest_chunk_heaviest():
    queue = ActionChunkQueue(execute=1, ensemble=0.5)
    queue.add(chunk(0))
    queue.pop()
    queue.add(chunk(11))
    newer = np.exp(-0.5)
    assert queue.pop()[0] == pytest.approx((1 + newer * 11) / (1 + newer), rel=1e-12)


@pytest.mark.parametrize(
    ("settings", "arm"),
    [
        (StrategySettings("ensemble", execute=1, ensemble=0.0), 6.0),
        (StrategySettings("async", blend=0.7), 0.3 * 1 + 0.7 * 11),
    ],
)
def test_a_gripper_of_two_values_is_that_of_the_newest_chunk(settings, arm):
    strategy = ChunkStrategy(settings, averaged=np.array([True, False]))
    older, newer = chunk(0), chunk(11)
    newer[:, 1] = 1.0
    strategy.ask(0)
    strategy.answer(older)
    strategy.next_action()
    strategy.ask(0)
    strategy.answer(newer)
    assert strategy.next_action().tolist() == [pytest.approx(arm), 1.0]


def test_a_policy_says_which_values_may_be_averaged():
    with embedded_folder() as folder:
        policy = LocalPolicy(folder / "checkpoint", robot="libero")
    assert policy.averaged.tolist() == [True] * 6 + [False]


def test_chunks_that_have_run_out_no_longer_count():
    queue = ActionChunkQueue(execute=1, ensemble=0.0)
    for step in range(5):
        queue.add(np.full((3, 1), float(step)))
        value = queue.pop()[0]
    # At step 4 only the chunks of steps 2, 3 and 4 still speak.
    assert value == pytest.approx(3.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"execute": 0}, "execute must be at least 1"),
        ({"ensemble": 0.1}, "ensemble needs overlapping chunks"),
        ({"execute": 1, "ensemble": -1.0}, "ensemble must be a finite number"),
    ],
)
def test_settings_that_cannot_work_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        ActionChunkQueue(**arguments)


@pytest.mark.parametrize(
    ("actions", "message"),
    [
        (np.zeros(7), r"shape \(K, A\)"),
        (np.zeros((2, 7)), "fewer than execute=3"),
        (np.full((8, 7), np.nan), "not finite"),
    ],
)
def test_chunks_that_cannot_be_executed_are_refused(actions, message):
    with pytest.raises(ValueError, match=message):
        ActionChunkQueue(execute=3).add(actions)


@pytest.mark.parametrize(
    "wanted, present, order",
    [
        (["image", "wrist_image"], ["image", "wrist_image"], [0, 1]),
        (["wrist_image", "image"], ["image", "wrist_image"], [1, 0]),
        (["wrist_image"], ["image", "wrist_image"], [1]),
        (["front", "hand"], ["image", "wrist_image"], [0, 1]),
    ],
)
def test_a_model_gets_the_frames_of_its_own_cameras(wanted, present, order):
    assert camera_order(wanted, present) == order


def test_cameras_that_are_taken_by_their_order_are_reported(caplog):
    camera_order(["image", "wrist_image"], ["wrist_image", "image"])
    assert not caplog.records
    camera_order(["wrist", "top"], ["image", "wrist_image"])
    assert "taken by their order: image as wrist, wrist_image as top" in caplog.text


@pytest.mark.parametrize("wanted", [["image", "hand"], ["front"], ["image", "wrist_image", "left"]])
def test_cameras_that_the_environment_lacks_are_refused(wanted):
    with pytest.raises(ValueError, match=f"cameras are {', '.join(wanted)}; the environment has image, wrist_image"):
        camera_order(wanted, ["image", "wrist_image"])


def test_statistics_of_another_suite_are_refused_unless_they_are_named():
    with pytest.raises(ValueError, match="unnorm_key='libero_spatial' is not in the model's norm_stats"):
        make_policy("embedded", "libero", suite="libero_spatial")
    policy = make_policy("embedded", "libero", suite="libero_spatial", unnorm_key="libero_object")
    assert policy.unnorm_key in ("libero_object", "libero_object_no_noops")
    assert make_policy("embedded", "libero", suite="libero_object").unnorm_key == policy.unnorm_key


def test_a_model_that_learnt_the_gripper_as_recorded_is_refused(tmp_path):
    with embedded_folder() as folder:
        shutil.copytree(folder / "checkpoint", tmp_path / "checkpoint")
    path = tmp_path / "checkpoint" / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["norm_stats"]["libero_object"]["action"]["min"][-1] = -1.0
    path.write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ValueError, match="gripper is -1...1 in its statistics"):
        make_policy(str(tmp_path / "checkpoint"), "libero", suite="libero_object")
