"""Presets of the robots: sizes, and both sides of the gripper and state conventions."""

import numpy as np
import pytest

from vla_adapter_hf.robots import (
    ROBOTS,
    GripperConvention,
    RobotPreset,
    binarize_gripper,
    get_robot,
    normalized_values,
    physical_scale,
    quaternion_to_axis_angle,
)
from vla_adapter_hf.simulation.policies import check_gripper


def actions_with_gripper(values, dtype=np.float32):
    actions = np.full((len(values), 7), 0.25, dtype)
    actions[:, -1] = values
    return actions


@pytest.mark.parametrize(
    ("name", "chunk", "action", "state", "cameras", "norm_type"),
    [
        ("libero", 8, 7, 8, ("image", "wrist_image"), "bounds_q99"),
        ("calvin", 8, 7, 8, ("rgb_static", "rgb_gripper"), "bounds_q99"),
        ("aloha", 25, 14, 14, ("primary", "left_wrist", "right_wrist"), "bounds"),
        ("bridge", 5, 7, 7, ("primary",), "bounds_q99"),
    ],
)
def test_presets_have_the_published_sizes(name, chunk, action, state, cameras, norm_type):
    robot = get_robot(name.upper())
    assert (robot.chunk_size, robot.action_dim, robot.state_dim) == (chunk, action, state)
    assert (robot.cameras, robot.norm_type) == (cameras, norm_type)
    assert robot.action_mask == ((True,) * 14 if name == "aloha" else (True,) * 6 + (False,))
    assert robot.delta_actions == ((False,) * 14 if name == "aloha" else (True,) * 6 + (False,))


def test_unknown_robot_is_refused_with_the_known_names():
    with pytest.raises(ValueError, match="'panda'.*libero, calvin, aloha, bridge"):
        get_robot("panda")
    assert get_robot(ROBOTS["calvin"]) is ROBOTS["calvin"]


def test_libero_gripper_is_clipped_and_inverted_for_training():
    robot = get_robot("libero")
    trained = robot.to_training(actions_with_gripper([-1.0, -0.3, 0.0, 0.25, 1.0, 1.5]))
    assert trained.dtype == np.float32
    assert trained[:, -1].tolist() == [1.0, 1.0, 1.0, 0.75, 0.0, 0.0]
    assert (trained[:, :-1] == 0.25).all()


def test_libero_gripper_goes_back_with_the_opposite_sign_and_a_tie_is_zero():
    out = get_robot("libero").to_environment(actions_with_gripper([1.0, 0.51, 0.5, 0.49, 0.0]))
    assert out[:, -1].tolist() == [-1.0, -1.0, 0.0, 1.0, 1.0]
    assert not np.signbit(out[2, -1])


@pytest.mark.parametrize("name", ["libero", "calvin"])
def test_a_binary_gripper_survives_the_way_to_training_and_back(name):
    recorded = actions_with_gripper([-1.0, 1.0])
    robot = get_robot(name)
    assert np.array_equal(robot.to_environment(robot.to_training(recorded)), recorded)


def test_calvin_gripper_is_not_inverted_and_a_tie_closes():
    robot = get_robot("calvin")
    assert robot.to_training(actions_with_gripper([-1.0, 0.5, 1.0]))[:, -1].tolist() == [0.0, 0.5, 1.0]
    assert robot.to_environment(actions_with_gripper([0.0, 0.5, 0.50001, 1.0]))[:, -1].tolist() == [-1, -1, 1, 1]


def test_calvin_state_is_cut_from_robot_obs():
    robot_obs = np.arange(30, dtype=np.float32).reshape(2, 15)
    assert get_robot("calvin").state_to_training(robot_obs)[0].tolist() == [0, 1, 2, 3, 4, 5, 6, 14]
    assert get_robot("calvin").state_to_training(robot_obs[:, :8]).shape == (2, 8)
    with pytest.raises(ValueError, match="state has 9 values, robot 'calvin' expects 8 or 15"):
        get_robot("calvin").state_to_training(robot_obs[:, :9])


def test_conversions_do_not_write_into_their_input():
    recorded = actions_with_gripper([-1.0, 1.0])
    before = recorded.copy()
    get_robot("libero").to_training(recorded)
    get_robot("libero").to_environment(recorded)
    assert np.array_equal(recorded, before)


def test_bridge_gripper_on_its_way_takes_the_value_it_reaches():
    assert binarize_gripper(np.array([0.0, 0.3, 0.97, 0.6, 0.02, 0.5, 0.4])).tolist() == [0, 1, 1, 0, 0, 0.4, 0.4]
    assert binarize_gripper(np.zeros(0)).shape == (0,)


def test_bridge_deltas_come_from_successive_states_and_the_last_step_is_dropped():
    states = np.cumsum(np.arange(28, dtype=np.float32).reshape(4, 7), axis=0)
    new_states, new_actions = get_robot("bridge").episode_to_training(states, actions_with_gripper([1, 1, 0, 0]))
    assert np.array_equal(new_states, states[:3])
    assert np.array_equal(new_actions[:, :6], np.diff(states[:, :6], axis=0))
    assert new_actions[:, 6].tolist() == [1, 1, 0]


def test_wrong_action_size_is_named():
    with pytest.raises(ValueError, match=r"shape \(3, 6\).*'libero' expects \(\.\.\., 7\)"):
        get_robot("libero").to_training(np.zeros((3, 6)))


def test_a_preset_of_ones_own_is_checked():
    with pytest.raises(ValueError, match="norm_type='q99'"):
        RobotPreset("arm", 4, 2, 2, ("front",), "q99", (True, True))
    with pytest.raises(ValueError, match="action_mask of robot 'arm' has 1 entries for action_dim=2"):
        RobotPreset("arm", 4, 2, 2, ("front",), "bounds", (True,))
    with pytest.raises(ValueError, match="delta_actions of robot 'arm' has 1 entries for action_dim=2"):
        RobotPreset("arm", 4, 2, 2, ("front",), "bounds", (True, True), delta_actions=(True,))
    own = RobotPreset("arm", 4, 2, 2, ("front",), "bounds", (True, True))
    assert own.gripper is GripperConvention.NONE
    assert np.array_equal(own.to_environment(np.ones((4, 2))), np.ones((4, 2)))


def test_axis_angle_keeps_angles_beyond_pi():
    angle = 1.2 * np.pi
    quaternion = np.array([np.sin(angle / 2), 0.0, 0.0, np.cos(angle / 2)])
    assert quaternion[3] < 0
    assert quaternion_to_axis_angle(quaternion) == pytest.approx([angle, 0, 0])
    assert quaternion_to_axis_angle(np.array([0.0, 0.0, 0.0, 1.0])).tolist() == [0, 0, 0]
    assert quaternion_to_axis_angle(np.array([0.0, 0.0, 0.0, -1.0000001])).tolist() == [0, 0, 0]


@pytest.mark.parametrize("names", [("min", "max"), ("q01", "q99")])
def test_an_evaluation_refuses_a_gripper_that_was_learnt_as_recorded(names):
    """It would open where it should close."""
    low, high = names
    check_gripper({low: [-1.0] * 6 + [0.0], high: [1.0] * 7}, "libero")
    with pytest.raises(ValueError, match=r"gripper is -1\.\.\.1 .* robot 'libero' has 0\.\.\.1"):
        check_gripper({low: [-1.0] * 7, high: [1.0] * 7}, "libero")


def test_a_normalised_change_has_a_size_in_the_actions_units():
    stats = {"q01": [-1.0, 0.0], "q99": [3.0, 1.0], "mean": [0.0, 0.0], "std": [0.5, 9.0]}
    assert physical_scale(stats, "bounds_q99") == pytest.approx([2.0, 0.5])
    stats["mask"] = [True, False]
    assert physical_scale(stats, "bounds_q99") == pytest.approx([2.0, 1.0])
    assert physical_scale(stats, "normal") == pytest.approx([0.5, 1.0])
    assert normalized_values(stats).tolist() == [True, False]
