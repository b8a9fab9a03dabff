"""Recorded demonstrations of `tests/fixtures/demos`, what their own readers return, and copies to damage."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np


DEMOS = Path(__file__).parent / "fixtures" / "demos"
RLDS = DEMOS / "rlds" / "libero_object_no_noops" / "1.0.0"
LEROBOT = ("lerobot_v30_image", "lerobot_v30_video", "lerobot_v21_video")
TASKS = [
    "pick up the alphabet soup and place it in the basket",
    "pick up the bbq sauce and place it in the basket",
    "pick up the milk and place it in the basket",
]


def golden(prefix):
    """Arrays of one dataset: `golden("rlds")["ep0_action"]`."""
    with np.load(DEMOS / "golden.npz") as stored:
        return {
            name.removeprefix(prefix + "/"): stored[name] for name in stored.files if name.startswith(prefix + "/")
        }


def pixels(image):
    """SHA-256 of an image's pixels, as the goldens have it."""
    assert image.dtype == np.uint8 and image.shape == (128, 128, 3)
    return hashlib.sha256(np.ascontiguousarray(image).tobytes()).hexdigest()


def copy_of(name, tmp_path):
    """A writable copy of a fixture folder."""
    folder = tmp_path / name
    shutil.copytree(DEMOS / name, folder)
    return folder


def edit_info(folder, **changes):
    """Change entries of a LeRobot dataset's meta/info.json."""
    path = folder / "meta" / "info.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def libero_gripper(actions):
    """The training convention of the LIBERO gripper, written out."""
    actions = actions.copy()
    actions[..., -1] = 1 - np.clip(actions[..., -1], 0, 1)
    return actions
