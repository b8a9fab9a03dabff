"""A robot of one's own from recording to rollout with LeRobot's commands: one arm of six joints, and two of 14 values.

The robots are simulated; recorder, dataset writer, training and rollout are LeRobot's.
"""

import json

import numpy as np
import pytest
import simulated_robots
from lerobot.scripts.lerobot_record import record
from lerobot.scripts.lerobot_rollout import rollout
from test_training import checkpoint

from lerobot_policy_vla_adapter import VLAAdapterPolicy
from vla_adapter_hf import open_checkpoint
from vla_adapter_hf.checkpoints.lerobot.convert import from_lerobot, to_lerobot


TASK = "wave"


@pytest.fixture
def record_waves(command, tmp_path):
    """`record_waves(robot)`: two episodes that a simulated hand leads, with `lerobot-record`."""

    def run(robot: str):
        command(
            record,
            f"--robot.type={robot}",
            f"--teleop.type={robot}_leader",
            "--dataset.repo_id=me/waves",
            f"--dataset.root={tmp_path / 'waves'}",
            f"--dataset.single_task={TASK}",
            "--dataset.num_episodes=2",
            "--dataset.episode_time_s=2",
            "--dataset.reset_time_s=0",
            "--dataset.fps=10",
            "--dataset.video=false",
            "--dataset.push_to_hub=false",
            "--play_sounds=false",
        )
        return tmp_path / "waves"

    return run


@pytest.fixture
def roll_out(command):
    """`roll_out(policy, robot, *words)`: the robot that `lerobot-rollout` moved."""

    def run(policy, robot: str, *words: str):
        command(
            rollout,
            f"--policy.path={policy}",
            f"--robot.type={robot}",
            f"--task={TASK}",
            "--device=cpu",
            "--play_sounds=false",
            "--return_to_initial_position=false",
            *words,
        )
        return simulated_robots.Always.made[-1]

    return run


@pytest.mark.parametrize(
    ("robot", "cameras", "size", "options"),
    [
        ("simulated_so101", ["front", "wrist"], 6, []),
        ("simulated_aloha", ["primary", "left_wrist", "right_wrist"], 14, ["--policy.robot=aloha"]),
    ],
)
def test_record_train_and_roll_out(robot, cameras, size, options, record_waves, train, roll_out, start, tmp_path):
    dataset = record_waves(robot)
    info = json.loads((dataset / "meta/info.json").read_text())
    assert info["total_episodes"] == 2
    assert info["features"]["action"]["shape"] == [size]

    losses = train(
        "--policy.type=vla_adapter",
        f"--policy.pretrained_path={start}",
        f"--policy.cameras={json.dumps(cameras)}",
        "--policy.preset=full",
        *options,
        "--dataset.repo_id=me/waves",
        f"--dataset.root={dataset}",
        f"--output_dir={tmp_path / 'run'}",
        "--batch_size=4",
        "--steps=4",
    )
    assert len(losses) == 4 and np.isfinite(losses).all()
    policy = checkpoint(tmp_path / "run", 4)
    own = open_checkpoint(from_lerobot(str(policy), tmp_path / "own"))
    assert own.config.cameras == cameras
    assert (own.config.action_dim, own.config.proprio_dim) == (size, size)
    assert own.config.norm_type == ("bounds" if robot == "simulated_aloha" else "bounds_q99")
    assert own.config.action_names == info["features"]["action"]["names"]
    assert own.config.fps == 10

    moved = roll_out(policy, robot, "--fps=10", "--duration=2")
    assert len(moved.sent) > 4
    assert set(moved.sent[0]) == set(info["features"]["action"]["names"])
    assert not moved.is_connected


@pytest.fixture(scope="module")
def own_arm_policy(write_arm_policy):
    return write_arm_policy(fps=10)


def test_a_policy_that_we_trained_moves_lerobots_robot_as_our_own_code_would(own_arm_policy, roll_out, tmp_path):
    policy = to_lerobot(str(own_arm_policy), tmp_path / "policy")
    robot = simulated_robots.SimulatedSO101(simulated_robots.SimulatedSO101Config())
    observation = robot.get_observation()
    own = open_checkpoint(own_arm_policy)
    state = [observation[name] for name in robot.action_features]
    inputs = own.load_processor()(
        images={name: observation[name] for name in ("front", "wrist")}, text=TASK, state=state
    )
    expected = own.load_model().predict_action(**inputs)[0]

    moved = roll_out(policy, "simulated_so101", "--fps=5", "--duration=3")
    sent = np.array([[action[name] for name in robot.action_features] for action in moved.sent[: len(expected)]])
    assert len(sent) >= 4
    np.testing.assert_allclose(sent, expected[: len(sent)], atol=1e-5)


def test_rtc_moves_the_arm_while_the_policy_thinks(own_arm_policy, roll_out, tmp_path, monkeypatch):
    policy = to_lerobot(str(own_arm_policy), tmp_path / "policy")
    chunks, left_overs, errors = [], [], []
    predict = VLAAdapterPolicy.predict_action_chunk

    def watched(self, *arguments, **options):
        left_overs.append(options["prev_chunk_left_over"])
        try:
            chunks.append(predict(self, *arguments, **options))
        except Exception as error:  # LeRobot logs it and tries again
            errors.append(error)
            raise
        return chunks[-1]

    monkeypatch.setattr(VLAAdapterPolicy, "predict_action_chunk", watched)
    moved = roll_out(policy, "simulated_so101", "--inference.type=rtc", "--fps=5", "--duration=6")
    assert not errors
    assert left_overs[0] is None
    assert any(left_over is not None and left_over.any() for left_over in left_overs), "no chunk was continued"
    sent = np.array([[action[name] for name in moved.action_features] for action in moved.sent])
    assert len(sent) >= 5
    # LeRobot drops the actions of the steps that went by: all of the first chunk where the model warms up slowly.
    predicted = np.concatenate([chunk[0].numpy() for chunk in chunks])
    assert all(np.isclose(predicted, action, atol=1e-5).all(axis=1).any() for action in sent)
