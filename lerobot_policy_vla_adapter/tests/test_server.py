"""A robot of LeRobot that a policy on our server moves while it thinks: the program that docs/lerobot.md shows.

The robot is LeRobot's own class for an SO-101 with simulated motors and cameras. The server is a process of its own.
"""

import re
import time

import numpy as np
import plugin_environment
import simulated_robots
from serving_fixtures import ServerProcess, free_port

from vla_adapter_hf import open_checkpoint
from vla_adapter_hf.checkpoints.lerobot.convert import to_lerobot
from vla_adapter_hf.serving.client import PolicyClient


SERVER = "ws://gpu-box:8000"
JOINTS = ("shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll", "gripper")
# Another order than the robot's: values are sent by name.
NAMES = [f"{joint}.pos" for joint in reversed(JOINTS)]
TASK = "put the cup on the plate"


def program_of_the_page() -> str:
    text = (plugin_environment.ROOT / "docs/lerobot.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert SERVER in program and TASK in program
    return program


def test_a_robot_of_lerobot_moves_while_the_server_thinks(write_arm_policy, tmp_path, monkeypatch):
    from lerobot.robots.so_follower import so_follower

    monkeypatch.setattr(so_follower, "FeetechMotorsBus", simulated_robots.SimulatedMotors)
    monkeypatch.setattr(so_follower, "make_cameras_from_configs", simulated_robots.simulated_cameras)
    questions, predict = [], PolicyClient.predict

    def watched(self, *arguments):
        asked_at = time.monotonic()
        answer = predict(self, *arguments)
        time.sleep(0.1)  # a network
        questions.append((asked_at, time.monotonic(), arguments, answer.actions))
        return answer

    monkeypatch.setattr(PolicyClient, "predict", watched)
    own = write_arm_policy(fps=30, state_names=NAMES, action_names=NAMES)
    policy = to_lerobot(str(own), tmp_path / "policy")
    with ServerProcess(free_port(), [str(policy)]) as server:
        server.start()
        names = {}
        program = program_of_the_page().replace(SERVER, f"ws://127.0.0.1:{server.port}")
        # Long enough for some answers on a busy machine.
        exec(program.replace("max_steps=60", "max_steps=300"), names)

    report, robot = names["report"], names["robot"]
    assert (report.ended_by, report.failures) == ("max_steps", 0)
    assert report.queries >= 2
    assert not robot.is_connected
    moments = np.array([moment for moment, _ in robot.bus.goals])
    goals = np.array([[goal[joint] for joint in reversed(JOINTS)] for _, goal in robot.bus.goals])

    # The first chunk is what the checkpoint says about the first observation. Half of it is executed before another.
    _, _, (images, instruction, state), actions = questions[0]
    assert instruction == TASK
    assert state.tolist() == [50.0, 40.0, 30.0, 20.0, 10.0, 0.0]
    inputs = open_checkpoint(own).load_processor()(images=images, text=instruction, state=state)
    expected = open_checkpoint(own).load_model().predict_action(**inputs)[0]
    np.testing.assert_allclose(actions, expected, atol=1e-4)
    np.testing.assert_allclose(goals[:6], expected[:6], atol=1e-4)

    # An arm that waits gets the last goal again.
    moved = np.abs(np.diff(goals, axis=0)).max(axis=1) > 0
    meanwhile = [moved[(begin < moments[1:]) & (moments[1:] < end)].sum() for begin, end, *_ in questions[1:]]
    assert max(meanwhile) >= 2
