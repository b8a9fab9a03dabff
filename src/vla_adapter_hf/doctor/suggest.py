"""Arguments for `vla-adapter train` that follow from the recording."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

from vla_adapter_hf.data.columns import camera_names
from vla_adapter_hf.doctor.gripper import Gripper
from vla_adapter_hf.doctor.recording import Recording
from vla_adapter_hf.doctor.settings import CheckSettings
from vla_adapter_hf.robots import ROBOTS


_ON_THE_HAND = ("wrist", "hand", "gripper")


def order_cameras(cameras: Sequence[str]) -> list[str]:
    """Short names of the cameras, third person first, as far as the names say which is which."""
    names = camera_names(cameras)
    return sorted(names, key=lambda name: any(word in name.lower() for word in _ON_THE_HAND))


def matching_preset(recording: Recording, gripper: Gripper | None) -> str | None:
    """The preset whose sizes, cameras and gripper values are those of the recording; None if none or several are."""
    state_size, action_size = recording.all_states.shape[1], recording.all_actions.shape[1]
    names = set(camera_names(recording.cameras))
    found = []
    for name, preset in ROBOTS.items():
        sizes = {preset.state_dim} | ({preset.raw_state[0]} if preset.raw_state else set())
        if state_size in sizes and action_size == preset.action_dim and set(preset.cameras) <= names:
            found.append(name)
    if found == ["libero"] and (gripper is None or gripper.low > -0.5 or gripper.closed == gripper.low):
        return None  # LIBERO's recordings close at +1
    return found[0] if len(found) == 1 else None


def _fits_unnormalised(gripper: Gripper) -> bool:
    """Whether a gripper may be learnt as it is: two values of about the size of normalised actions."""
    return gripper.binary and max(abs(gripper.low), abs(gripper.high)) <= 1.05


def suggest(
    recording: Recording,
    gripper: Gripper | None,
    settings: CheckSettings,
    robot: str | None,
    wide_bounds: bool,
    blocky: bool,
) -> dict[str, Any]:
    """Arguments by name; `action_mask` is the robot preset's, else false for a gripper with two values.

    Args:
        robot: the preset that the user chose, if any.
        wide_bounds: whether clipping to q01 and q99 would cost real motion.
        blocky: whether frames were JPEG before they were stored as something else.
    """
    chosen = robot or matching_preset(recording, gripper)
    size = recording.all_actions.shape[1]
    suggestion: dict[str, Any] = {
        "robot": chosen,
        "cameras": list(ROBOTS[chosen].cameras) if chosen else order_cameras(recording.cameras),
        "chunk_size": settings.chunk_size
        or (ROBOTS[chosen].chunk_size if chosen else settings.chunk_for(settings.fps or recording.fps)),
        "norm_type": "bounds" if wide_bounds else "bounds_q99",
        "action_dim": size,
        "state_dim": recording.all_states.shape[1],
        "action_mask": list(ROBOTS[chosen].action_mask)
        if chosen
        else [not (dim == (gripper.dim if gripper else None) and _fits_unnormalised(gripper)) for dim in range(size)],
        "augment": True,  # the only crop that training has: at random, and from the centre on the robot
    }
    if blocky:
        suggestion["jpeg_round_trip"] = "yes"
    return suggestion


def train_command(dataset: str, suggestion: dict[str, Any], columns: dict[str, str]) -> str:
    """A command line to copy. CHECKPOINT stands for where to start."""
    words = ["vla-adapter", "train", "--checkpoint", "CHECKPOINT", "--dataset", dataset]
    if suggestion["robot"]:
        words += ["--robot", suggestion["robot"]]
    if suggestion["cameras"]:
        words += ["--cameras", *suggestion["cameras"]]
    for name in ("chunk_size", "norm_type", "jpeg_round_trip", "augment"):
        if name in suggestion:
            value = suggestion[name]
            words += [f"--{name}", str(value).lower() if isinstance(value, bool) else str(value)]
    if not suggestion["robot"] and not all(suggestion["action_mask"]):
        words += ["--action_mask", *("true" if normalised else "false" for normalised in suggestion["action_mask"])]
    for name, value in columns.items():
        words += [f"--{name}", value]
    return shlex.join([*words, "--validation", "0.1", "--output_dir", "outputs/policy"])
