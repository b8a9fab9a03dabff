"""Robots and their leaders without hardware, for LeRobot: the six-joint arm of `examples/simulated_arm.py`, and two
arms of seven values each with three cameras, as on ALOHA. And the parts of LeRobot's own SO-101 that are hardware: its
motors and cameras.

`--robot.discover_packages_path=simulated_robots` registers the robots for LeRobot's commands.
"""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import simulated_arm
from lerobot.robots import Robot, RobotConfig
from lerobot.teleoperators import Teleoperator, TeleoperatorConfig


@RobotConfig.register_subclass("simulated_so101")
@dataclass
class SimulatedSO101Config(RobotConfig):
    pass


@RobotConfig.register_subclass("simulated_aloha")
@dataclass
class SimulatedAlohaConfig(RobotConfig):
    pass


@TeleoperatorConfig.register_subclass("simulated_so101_leader")
@dataclass
class SimulatedSO101LeaderConfig(TeleoperatorConfig):
    pass


@TeleoperatorConfig.register_subclass("simulated_aloha_leader")
@dataclass
class SimulatedAlohaLeaderConfig(TeleoperatorConfig):
    pass


class Always:
    """What LeRobot asks of every device and a simulated one does not have."""

    is_calibrated = True
    made: list[Any] = []  # devices, the newest last: LeRobot's commands make them and do not hand them out
    feedback_features: dict[str, Any] = {}

    def calibrate(self) -> None:
        pass

    def configure(self) -> None:
        pass

    def send_feedback(self, feedback: dict[str, Any]) -> None:
        pass


class SimulatedSO101(Always, Robot):
    """One arm of six joints in degrees, with the cameras `front` and `wrist`."""

    config_class = SimulatedSO101Config
    name = "simulated_so101"

    def __init__(self, config: RobotConfig) -> None:
        super().__init__(config)
        self.made.append(self)
        self.arm = simulated_arm.SimulatedArm()
        self.cameras = {"front": None, "wrist": None}
        self.sent: list[dict[str, float]] = []

    @cached_property
    def observation_features(self) -> dict[str, Any]:
        return dict(self.arm.observation_features)

    @cached_property
    def action_features(self) -> dict[str, Any]:
        return dict(self.arm.action_features)

    @property
    def is_connected(self) -> bool:
        return self.arm.is_connected

    def connect(self, calibrate: bool = True) -> None:
        self.arm.connect()

    def disconnect(self) -> None:
        self.arm.disconnect()

    def get_observation(self) -> dict[str, Any]:
        return self.arm.get_observation()

    def send_action(self, action: dict[str, Any]) -> dict[str, Any]:
        self.sent.append({name: float(value) for name, value in action.items()})
        return self.arm.send_action(action)


class SimulatedAloha(Always, Robot):
    """Two arms of seven joints in radians, 14 values, with the cameras `primary`, `left_wrist` and `right_wrist`."""

    config_class = SimulatedAlohaConfig
    name = "simulated_aloha"
    joints = [f"{side}_joint_{number}.pos" for side in ("left", "right") for number in range(7)]
    cameras = {"primary": None, "left_wrist": None, "right_wrist": None}
    is_connected = False

    def __init__(self, config: RobotConfig) -> None:
        super().__init__(config)
        self.made.append(self)
        self.positions = np.zeros(14)
        self.sent: list[dict[str, float]] = []

    @cached_property
    def observation_features(self) -> dict[str, Any]:
        return dict.fromkeys(self.joints, float) | dict.fromkeys(self.cameras, (48, 64, 3))

    @cached_property
    def action_features(self) -> dict[str, Any]:
        return dict.fromkeys(self.joints, float)

    def connect(self, calibrate: bool = True) -> None:
        self.is_connected = True

    def disconnect(self) -> None:
        self.is_connected = False

    def get_observation(self) -> dict[str, Any]:
        shades = (127 + 60 * self.positions[:3]).clip(0, 255).astype(np.uint8)
        frames = {name: np.full((48, 64, 3), shade) for name, shade in zip(self.cameras, shades, strict=True)}
        return dict(zip(self.joints, self.positions.tolist(), strict=True)) | frames

    def send_action(self, action: dict[str, Any]) -> dict[str, Any]:
        self.sent.append({name: float(value) for name, value in action.items()})
        self.positions += 0.5 * (np.array([action[name] for name in self.joints]) - self.positions)
        return action


class SimulatedLeader(Always, Teleoperator):
    """A hand that leads every joint along a slow wave of its own."""

    features: dict[str, Any]
    amplitude = 1.0
    is_connected = False

    def __init__(self, config: TeleoperatorConfig) -> None:
        super().__init__(config)
        self.step = 0

    @property
    def action_features(self) -> dict[str, Any]:
        return self.features

    def connect(self, calibrate: bool = True) -> None:
        self.is_connected = True

    def disconnect(self) -> None:
        self.is_connected = False

    def get_action(self) -> dict[str, float]:
        self.step += 1
        return {
            name: self.amplitude * float(np.sin(self.step / 6 + number)) for number, name in enumerate(self.features)
        }


class SimulatedSO101Leader(SimulatedLeader):
    config_class = SimulatedSO101LeaderConfig
    name = "simulated_so101_leader"
    features = simulated_arm.SimulatedArm.action_features
    amplitude = 30.0


class SimulatedAlohaLeader(SimulatedLeader):
    config_class = SimulatedAlohaLeaderConfig
    name = "simulated_aloha_leader"
    features = dict.fromkeys(SimulatedAloha.joints, float)


class SimulatedMotors:
    """In place of `FeetechMotorsBus`: motors that go half of the way to their goals at once."""

    is_connected = False
    is_calibrated = True

    def __init__(self, port: str, motors: dict[str, Any], calibration: dict[str, Any]) -> None:
        self.motors = motors
        self.positions = {name: 10.0 * number for number, name in enumerate(motors)}
        self.goals: list[tuple[float, dict[str, float]]] = []  # with the moment, by `time.monotonic()`

    def connect(self) -> None:
        self.is_connected = True

    def disconnect(self, disable_torque: bool) -> None:
        self.is_connected = False

    def torque_disabled(self) -> nullcontext:
        return nullcontext()

    def configure_motors(self) -> None:
        pass

    def write(self, register: str, motor: str, value: int) -> None:
        assert motor in self.motors

    def sync_read(self, register: str, num_retry: int) -> dict[str, float]:
        assert register == "Present_Position"
        return dict(self.positions)

    def sync_write(self, register: str, values: dict[str, float]) -> None:
        assert register == "Goal_Position" and values.keys() == self.motors.keys()
        self.goals.append((time.monotonic(), dict(values)))
        for name, goal in values.items():
            self.positions[name] += 0.5 * (goal - self.positions[name])


class SimulatedCamera:
    """In place of a camera of LeRobot: a still frame of the size that its configuration asks for."""

    is_connected = False

    def __init__(self, width: int, height: int, seed: int) -> None:
        self.width, self.height = width, height
        self.frame = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)

    def connect(self) -> None:
        self.is_connected = True

    def disconnect(self) -> None:
        self.is_connected = False

    def read_latest(self) -> np.ndarray:
        return self.frame


def simulated_cameras(configs: dict[str, Any]) -> dict[str, SimulatedCamera]:
    """In place of `make_cameras_from_configs`."""
    return {name: SimulatedCamera(one.width, one.height, seed) for seed, (name, one) in enumerate(configs.items())}
