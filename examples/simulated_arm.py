"""A six-joint arm without hardware, with LeRobot's robot methods, and the loop that moves it.

    python examples/simulated_arm.py                  # a scripted policy of 150 ms, async-rolled
    python examples/simulated_arm.py --strategy sync  # the same policy; the arm stands still while it thinks
    python examples/simulated_arm.py --record wave    # keeps the run as an episode of a LeRobot dataset

The arm follows position targets with the lag of a small servo and draws itself into two cameras.
"""

from __future__ import annotations

import argparse
import time
from contextlib import nullcontext
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from vla_adapter_hf.recording.robot_episodes import EpisodeRecorder
from vla_adapter_hf.robot import LoopSettings, StateModel, StrategySettings, run


JOINTS = ("shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll", "gripper")
# Share of the way to its target that a joint goes in one step of 1/30 s.
SERVO = 0.35


class SimulatedArm:
    """Six joints in degrees, as an SO-101 reports them, and two cameras of different sizes."""

    observation_features = {f"{joint}.pos": float for joint in JOINTS} | {
        "front": (240, 320, 3),
        "wrist": (120, 160, 3),
    }
    action_features = {f"{joint}.pos": float for joint in JOINTS}

    def __init__(self) -> None:
        self.joints = np.array([0.0, 30.0, -40.0, 10.0, 0.0, 50.0])
        self.is_connected = False

    def connect(self) -> None:
        self.is_connected = True

    def disconnect(self) -> None:
        self.is_connected = False

    def get_observation(self) -> dict[str, Any]:
        values = {f"{joint}.pos": float(value) for joint, value in zip(JOINTS, self.joints, strict=True)}
        return values | {"front": self._draw(320, 240), "wrist": self._draw(160, 120)}

    def send_action(self, action: dict[str, Any]) -> dict[str, Any]:
        targets = np.array([action[f"{joint}.pos"] for joint in JOINTS])
        self.joints += SERVO * (np.clip(targets, -100.0, 100.0) - self.joints)
        return action

    def _draw(self, width: int, height: int) -> np.ndarray:
        picture = Image.new("RGB", (width, height), (235, 235, 225))
        draw = ImageDraw.Draw(picture)
        point, angle = np.array([width / 2, 0.9 * height]), np.pi / 2 + np.radians(self.joints[0] / 2)
        for joint, length in zip(self.joints[1:4], (0.35, 0.3, 0.2), strict=True):
            angle -= np.radians(joint)
            end = point + length * height * np.array([np.cos(angle), -np.sin(angle)])
            draw.line([*point, *end], fill=(40, 90, 160), width=max(3, height // 40))
            point = end
        draw.ellipse([*(point - 5), *(point + 5)], fill=(200, 60, 40))
        return np.asarray(picture)


class WavePolicy:
    """A scripted policy: chunks of a slow wave of the joints, starting from the state that it is given."""

    cameras = ("front", "wrist")
    state_dim = action_dim = len(JOINTS)

    def __init__(self, seconds: float = 0.15, chunk_size: int = 16, fps: float = 30.0) -> None:
        self.seconds, self.chunk_size, self.fps = seconds, chunk_size, fps

    def predict(self, images: dict[str, np.ndarray], instruction: str, state: np.ndarray) -> np.ndarray:
        time.sleep(self.seconds)
        steps = 1 + np.arange(self.chunk_size)[:, None]
        return state + steps * 30.0 / self.fps * np.sign(np.cos(state / 20.0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strategy", default="async-rolled", choices=("sync", "async", "async-rolled"))
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--record", help="folder of the dataset")
    arguments = parser.parse_args()
    settings = LoopSettings(
        fps=30.0,
        strategy=StrategySettings(arguments.strategy),
        max_steps=arguments.steps,
        state_model=StateModel(tuple((joint, joint) for joint in range(len(JOINTS)))),
    )
    with EpisodeRecorder(arguments.record) if arguments.record else nullcontext() as recorder:
        print(run(WavePolicy(), SimulatedArm(), "wave", settings, record=recorder).summary())


if __name__ == "__main__":
    main()
