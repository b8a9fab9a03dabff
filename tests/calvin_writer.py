"""Writes recordings in CALVIN's own format: a file per step, the bounds of recordings, the annotated spans."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np


def write_step(folder: Path, step: int, rgb_static, rgb_gripper, robot_obs, rel_actions) -> None:
    """Writes one time step. The arrays that CALVIN has and nobody here reads are there too."""
    np.savez_compressed(
        folder / f"episode_{step:07d}.npz",
        rgb_static=rgb_static,
        rgb_gripper=rgb_gripper,
        robot_obs=robot_obs,
        rel_actions=rel_actions,
        actions=np.zeros(7),
        scene_obs=np.zeros(24),
        depth_gripper=np.zeros((84, 84), np.float32),
    )


def write_spans(
    folder: Path, recordings: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int, str, str]]
) -> None:
    """Writes the bounds of the recordings, and spans of first step, last step, instruction and subtask."""
    np.save(folder / "ep_start_end_ids.npy", np.array(recordings, dtype=np.int64).reshape(-1, 2))
    language = {
        "ann": [text for _, _, text, _ in spans],
        "task": [subtask for *_, subtask in spans],
        "emb": np.zeros((len(spans), 1, 384), np.float32),
    }
    # CALVIN's indices are NumPy's integers.
    bounds = [(np.int64(first), np.int64(last)) for first, last, *_ in spans]
    write_annotations(folder, {"language": language, "info": {"episodes": [], "indx": bounds}})


def write_annotations(folder: Path, content: Any) -> None:
    """Writes any object as the file of annotations, as CALVIN does: a pickle."""
    (folder / "lang_annotations").mkdir(parents=True, exist_ok=True)
    holder = np.empty((), dtype=object)
    holder[()] = content
    np.save(folder / "lang_annotations" / "auto_lang_ann.npy", holder)
