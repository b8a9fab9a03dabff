"""Robot presets: chunk length, sizes, cameras, normalisation, and the conventions of gripper and state.

Both directions of a convention are here: `to_training` turns recorded actions into those that a model learns, and
`to_environment` turns a model's physical actions into those that the robot or simulator takes. The numbers are from
the published VLA-Adapter configurations (arXiv 2509.09372).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np

from vla_adapter_hf.modeling.normalization_vla_adapter import EPSILON, NORM_TYPES, USED_STATISTICS


class GripperConvention(str, Enum):
    """How the last action dimension is written in the recordings and in the simulator.

    - `LIBERO`: recorded -1 (open) ... +1 (closed); learnt as 1 (open) or 0 (closed); the simulator takes -1 / +1.
    - `CALVIN`: recorded and taken by the simulator as +1 (open) / -1 (closed); learnt as 1 / 0, without inversion.
    - `BRIDGE`: recorded 0 (closed) ... 1 (open); learnt as 0 or 1, see [`binarize_gripper`]; the robot takes the same.
    - `NONE`: recorded, learnt and taken are the same.
    """

    LIBERO = "libero"
    CALVIN = "calvin"
    BRIDGE = "bridge"
    NONE = "none"


def _clip_and_invert(gripper: np.ndarray) -> np.ndarray:
    return 1.0 - np.clip(gripper, 0.0, 1.0)


def _clip(gripper: np.ndarray) -> np.ndarray:
    return np.clip(gripper, 0.0, 1.0)


def _unchanged(gripper: np.ndarray) -> np.ndarray:
    return gripper


def _negative_sign(gripper: np.ndarray) -> np.ndarray:
    # sign(0) is 0: a gripper of exactly 0.5 becomes a command of 0. Adding 0.0 turns -0.0 into 0.0.
    return -np.sign(2.0 * gripper - 1.0) + 0.0


def _open_above_half(gripper: np.ndarray) -> np.ndarray:
    return np.where(gripper > 0.5, 1.0, -1.0)


def binarize_gripper(gripper: np.ndarray) -> np.ndarray:
    """Gripper (steps,) in 0...1 of one whole episode -> 0 (below 0.05) or 1 (above 0.95).

    A value in between is a moving gripper. It becomes the 0 or 1 that the gripper reaches next. If the episode ends
    first, it becomes the episode's last value.
    """
    gripper = np.asarray(gripper)
    binary = gripper.copy()
    reached = gripper[-1] if len(gripper) else 0.0
    for step in range(len(gripper) - 1, -1, -1):
        if gripper[step] > 0.95:
            reached = 1.0
        elif gripper[step] < 0.05:
            reached = 0.0
        binary[step] = reached
    return binary


_TO_TRAINING: dict[GripperConvention, Callable[[np.ndarray], np.ndarray]] = {
    GripperConvention.LIBERO: _clip_and_invert,
    GripperConvention.CALVIN: _clip,
    GripperConvention.BRIDGE: binarize_gripper,
    GripperConvention.NONE: _unchanged,
}
_TO_ENVIRONMENT: dict[GripperConvention, Callable[[np.ndarray], np.ndarray]] = {
    GripperConvention.LIBERO: _negative_sign,
    GripperConvention.CALVIN: _open_above_half,
    GripperConvention.BRIDGE: _unchanged,
    GripperConvention.NONE: _unchanged,
}


@dataclass(frozen=True)
class RobotPreset:
    """A robot and how its demonstrations are written.

    Args:
        name: the preset's name, as in `get_robot`.
        chunk_size: actions per chunk (K).
        action_dim: size of an action (A).
        state_dim: size of the proprio state (S).
        cameras: camera names in the order the model sees them, third person first.
        norm_type: `"bounds_q99"`, `"bounds"` or `"normal"`.
        action_mask: for each action dimension whether it is normalised; false for a binary gripper.
        gripper: how the last action dimension is written.
        relabel_deltas: learn the differences of successive states instead of the first six recorded action
            dimensions; the last step of an episode has no successor and is dropped.
        raw_state: for recordings whose state has another size, that size and the indices that make up the state.
        delta_actions: for each action dimension whether the robot takes it as a change and not as a target. An arm
            stands still if changes are 0 and targets stay as they are. None: not known.

    Raises:
        ValueError: a norm type that does not exist, a mask or `delta_actions` whose length is not `action_dim`.
    """

    name: str
    chunk_size: int
    action_dim: int
    state_dim: int
    cameras: tuple[str, ...]
    norm_type: str
    action_mask: tuple[bool, ...]
    gripper: GripperConvention = GripperConvention.NONE
    relabel_deltas: bool = False
    raw_state: tuple[int, tuple[int, ...]] | None = None
    delta_actions: tuple[bool, ...] | None = None

    def __post_init__(self) -> None:
        if self.norm_type not in NORM_TYPES:
            raise ValueError(f"norm_type={self.norm_type!r} is not one of {', '.join(map(repr, NORM_TYPES))}")
        for field in ("action_mask", "delta_actions"):
            values = getattr(self, field)
            if values is not None and len(values) != self.action_dim:
                raise ValueError(
                    f"{field} of robot {self.name!r} has {len(values)} entries for action_dim={self.action_dim}"
                )

    def to_training(self, actions: np.ndarray) -> np.ndarray:
        """Recorded actions (..., A) -> the physical actions a model learns, same shape and dtype.

        For `GripperConvention.BRIDGE` the input is one whole episode (steps, A): its gripper depends on later steps.

        Raises:
            ValueError: the last axis is not `action_dim` long.
        """
        return self._with_gripper(actions, _TO_TRAINING[self.gripper])

    def to_environment(self, actions: np.ndarray) -> np.ndarray:
        """A model's physical actions (..., A) -> what the robot or simulator takes, same shape and dtype.

        LIBERO: gripper = -sign(2g - 1), so open (1) becomes -1, closed (0) becomes +1, and exactly 0.5 becomes 0.
        CALVIN: gripper = +1 if g > 0.5, else -1, so exactly 0.5 closes.

        Raises:
            ValueError: the last axis is not `action_dim` long.
        """
        return self._with_gripper(actions, _TO_ENVIRONMENT[self.gripper])

    def state_to_training(self, states: np.ndarray) -> np.ndarray:
        """Recorded states (..., raw size or S) -> proprio states (..., S). A state that has S values is left alone.

        Raises:
            ValueError: the last axis is neither `state_dim` nor the recording's own size.
        """
        states = np.asarray(states)
        if states.shape[-1] == self.state_dim:
            return states
        if self.raw_state is not None and states.shape[-1] == self.raw_state[0]:
            return states[..., list(self.raw_state[1])]
        other = "" if self.raw_state is None else f" or {self.raw_state[0]} as recorded"
        raise ValueError(
            f"state has {states.shape[-1]} values, robot {self.name!r} expects {self.state_dim}{other}; "
            "choose another state column or another robot, or leave the robot out to take the values as recorded"
        )

    def episode_to_training(self, states: np.ndarray, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """One recorded episode -> what a model learns from it.

        Args:
            states: (steps, raw size or S) as recorded.
            actions: (steps, A) as recorded.

        Returns:
            states (n, S) and actions (n, A); n is `steps`, or `steps - 1` with `relabel_deltas`. Frame t of the result
            is frame t of the recording.

        Raises:
            ValueError: sizes that are not this robot's.
        """
        states, actions = self.state_to_training(states), self.to_training(actions)
        if not self.relabel_deltas:
            return states, actions
        relabelled = actions[:-1].copy()
        relabelled[:, :6] = states[1:, :6] - states[:-1, :6]
        return states[:-1], relabelled

    def _with_gripper(self, actions: np.ndarray, convert: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        actions = np.asarray(actions)
        if actions.ndim == 0 or actions.shape[-1] != self.action_dim:
            raise ValueError(
                f"actions have shape {actions.shape}, robot {self.name!r} expects (..., {self.action_dim}); "
                "choose another action column or another robot"
            )
        if self.gripper is GripperConvention.NONE:
            return actions
        converted = actions.copy()
        converted[..., -1] = convert(actions[..., -1])
        return converted


_SIX_AND_GRIPPER = (True,) * 6 + (False,)

ROBOTS: dict[str, RobotPreset] = {
    "libero": RobotPreset(
        name="libero",
        chunk_size=8,
        action_dim=7,
        state_dim=8,
        cameras=("image", "wrist_image"),
        norm_type="bounds_q99",
        action_mask=_SIX_AND_GRIPPER,
        gripper=GripperConvention.LIBERO,
        delta_actions=_SIX_AND_GRIPPER,
    ),
    "calvin": RobotPreset(
        name="calvin",
        chunk_size=8,
        action_dim=7,
        state_dim=8,
        cameras=("rgb_static", "rgb_gripper"),
        norm_type="bounds_q99",
        action_mask=_SIX_AND_GRIPPER,
        gripper=GripperConvention.CALVIN,
        # robot_obs has 15 values: position, Euler angles, gripper width, seven joints, and last the gripper command.
        raw_state=(15, (0, 1, 2, 3, 4, 5, 6, 14)),
        delta_actions=_SIX_AND_GRIPPER,
    ),
    "aloha": RobotPreset(
        name="aloha",
        chunk_size=25,
        action_dim=14,
        state_dim=14,
        cameras=("primary", "left_wrist", "right_wrist"),
        norm_type="bounds",
        action_mask=(True,) * 14,
        delta_actions=(False,) * 14,
    ),
    "bridge": RobotPreset(
        name="bridge",
        chunk_size=5,
        action_dim=7,
        state_dim=7,
        cameras=("primary",),
        norm_type="bounds_q99",
        action_mask=_SIX_AND_GRIPPER,
        gripper=GripperConvention.BRIDGE,
        relabel_deltas=True,
        delta_actions=_SIX_AND_GRIPPER,
    ),
}


def get_robot(name: str | RobotPreset) -> RobotPreset:
    """The preset called `name` (upper or lower case); a `RobotPreset` is returned as it is.

    Raises:
        ValueError: no preset has that name; the message lists those that exist.
    """
    if isinstance(name, RobotPreset):
        return name
    preset = ROBOTS.get(name.lower()) if isinstance(name, str) else None
    if preset is None:
        raise ValueError(f"robot={name!r} is not known; use one of {', '.join(ROBOTS)}, or a RobotPreset of your own")
    return preset


def normalized_values(stats: Mapping[str, Any]) -> np.ndarray:
    """Which values of an action are normalised, boolean `(A,)`; all where the statistics have no mask.

    Args:
        stats: statistics of actions.
    """
    return np.asarray(stats.get("mask", [True] * len(next(iter(stats.values())))), dtype=bool)


def physical_scale(stats: Mapping[str, Any], norm_type: str) -> np.ndarray:
    """What a normalised change of 1 is in an action's own units, `(A,)`.

    Args:
        stats: statistics of actions.
        norm_type: kind of normalisation.
    """
    first, second = (np.asarray(stats[name], dtype=np.float64) for name in USED_STATISTICS[norm_type])
    scale = second + EPSILON if norm_type == "normal" else 0.5 * (second - first + EPSILON)
    return np.where(normalized_values(stats), scale, 1.0)


def learnt_range(stats: Mapping[str, Any], dim: int = -1) -> tuple[float, float] | None:
    """Lowest and highest value of an action dimension in training; None if the statistics do not say.

    Args:
        stats: statistics of actions. Which entries there are depends on the kind of normalisation.
        dim: which dimension, by default the last, which presets convert.
    """
    for low, high in (("min", "max"), ("q01", "q99")):
        if low in stats and high in stats:
            return float(stats[low][dim]), float(stats[high][dim])
    return None


def is_zero_to_one(learnt: tuple[float, float] | None) -> bool:
    """Whether a gripper may have been learnt as 0...1, as presets convert it; not if it goes down to -1."""
    return learnt is None or (learnt[0] > -0.5 and learnt[1] < 2.0)


def why_to_name_a_robot(stats: Mapping[str, Any], option: str = "robot") -> str | None:
    """What is not known about a gripper that was not normalised, and which robot to name; None if all were normalised.

    Args:
        stats: statistics of actions.
        option: what the setting is called.
    """
    ranges = [learnt_range(stats, dim) for dim, normalised in enumerate(stats.get("mask") or []) if not normalised]
    if not ranges:
        return None
    other = next((learnt for learnt in ranges if not is_zero_to_one(learnt)), None)
    if other is not None:
        return (
            f"a gripper that is learnt as {other[0]:g}...{other[1]:g}, and presets convert 0...1 only. Give {option} "
            "as none to send it as it was learnt."
        )
    return (
        f"a gripper that is learnt as 0...1, and robots take other values. Give {option} as one of "
        f"{', '.join(ROBOTS)}, or none to send it as it was learnt."
    )


def check_learnt_gripper(preset: RobotPreset, stats: Mapping[str, Any]) -> None:
    """Refuse a preset that converts a gripper from 0...1 for statistics in which it has another range.

    Args:
        preset: whose convention the robot's actions would have.
        stats: statistics of actions of the preset's size.

    Raises:
        ValueError: naming both ranges. The preset would turn such a gripper round.
    """
    learnt = learnt_range(stats)
    if preset.gripper is not GripperConvention.NONE and not is_zero_to_one(learnt):
        raise ValueError(
            f"robot={preset.name!r} converts a gripper that is learnt as 0...1, and in this policy's statistics it is "
            f"{learnt[0]:g}...{learnt[1]:g}: it might open where it should close. Give robot as none to send it as "
            "it was learnt."
        )


def quaternion_to_axis_angle(quaternion: np.ndarray) -> np.ndarray:
    """Quaternion (..., 4) as x, y, z, w -> axis times angle (..., 3) in radians, as LIBERO's recordings have it.

    There is no sign change for w < 0, so the angle runs up to 2 pi. LIBERO's gripper points down, near an angle of pi,
    where the rotation vector of a general library flips its sign: it is not what the models were trained on.
    """
    quaternion = np.asarray(quaternion)
    w = np.clip(quaternion[..., 3:], -1.0, 1.0)
    sine = np.sqrt(1.0 - w * w)
    still = np.isclose(sine, 0.0)
    angle = 2.0 * np.arccos(w)
    return np.where(still, 0.0, quaternion[..., :3] * angle / np.where(still, 1.0, sine))
