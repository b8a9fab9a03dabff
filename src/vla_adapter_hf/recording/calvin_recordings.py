"""CALVIN's own recordings: one file per time step, and the spans of steps that have an instruction.

A folder such as `task_ABC_D/training` holds `episode_XXXXXXX.npz` for every step, `ep_start_end_ids.npy` with the
first and the last step of every recording, and `lang_annotations/auto_lang_ann.npy` with the annotated spans. The last
one is a pickle. The unpickler here builds NumPy's arrays and nothing else, so that a file can run no code.
"""

from __future__ import annotations

import os
import pickle
import re
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from vla_adapter_hf.simulation.calvin.simulation import SIZES, calvin_observation
from vla_adapter_hf.simulation.environment import Observation


ANNOTATIONS = Path("lang_annotations") / "auto_lang_ann.npy"
RECORDINGS = "ep_start_end_ids.npy"
ACTION_SIZE = 7
_STEP_NAME = re.compile(r"episode_(\d{7,})\.npz")
_MODULES = ("numpy.core.multiarray", "numpy._core.multiarray")  # by NumPy 1 and NumPy 2
_KNOWN = {(module, name) for module in _MODULES for name in ("_reconstruct", "scalar")} | {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
}


@dataclass(frozen=True)
class Span:
    """Steps `first` to `last`, both included, in which the instruction is carried out.

    Attributes:
        subtask: CALVIN's name for it, such as `open_drawer`.
    """

    first: int
    last: int
    instruction: str
    subtask: str

    def __len__(self) -> int:
        return self.last - self.first + 1


class CalvinRecordings:
    """The annotated spans of a folder, all of whose steps are there. The steps themselves are read by `read_step`.

    Args:
        folder: holds `episode_*.npz`, such as `task_ABC_D/training`.

    Attributes:
        spans: in the order of the annotations. Spans may overlap.

    Raises:
        FileNotFoundError: a file is missing; the message names it.
        ValueError: annotations of another form, or that ask for more than arrays, texts and numbers; a span that is
            empty or leaves its recording.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise FileNotFoundError(f"source={str(folder)!r} is no folder")
        for name in (RECORDINGS, ANNOTATIONS):
            if not (self.folder / name).is_file():
                raise FileNotFoundError(f"{self.folder / name} does not exist. {self._advice()}")
        self.spans = read_annotations(self.folder / ANNOTATIONS)
        _check_within(self.spans, _read_recordings(self.folder / RECORDINGS), self.folder / ANNOTATIONS)
        self._check_files()

    def _advice(self) -> str:
        inner = [name for name in ("training", "validation") if (self.folder / name / RECORDINGS).is_file()]
        if inner:
            return f"Did you mean {' or '.join(str(self.folder / name) for name in inner)}?"
        return "Name a folder of CALVIN's recordings that holds episode_*.npz, such as task_ABC_D/training."

    def _check_files(self) -> None:
        with os.scandir(self.folder) as entries:
            found = (_STEP_NAME.fullmatch(entry.name) for entry in entries)
            present = np.sort(np.fromiter((int(match[1]) for match in found if match), np.int64))
        for span in self.spans:
            first, stop = np.searchsorted(present, [span.first, span.last + 1])
            if stop - first == len(span):
                continue
            missing = sorted(set(range(span.first, span.last + 1)) - set(present[first:stop].tolist()))
            raise FileNotFoundError(
                f"{step_path(self.folder, missing[0])} does not exist, nor do {len(missing) - 1} others of the span "
                f"{span.first}...{span.last} ({span.subtask}). Fetch the recordings again."
            )


def step_path(folder: Path, step: int) -> Path:
    """The file of a step."""
    return folder / f"episode_{step:07d}.npz"


def read_step(folder: Path, step: int) -> tuple[Observation, np.ndarray]:
    """A step: what the published policy sees, and the relative action (7,) float32 as recorded, gripper -1 or +1.

    Raises:
        ValueError: a damaged file, or values of another form; the message names the file.
    """
    path = step_path(folder, step)
    try:
        with np.load(path, allow_pickle=False) as stored:
            values = {name: stored[name] for name in (*SIZES, "robot_obs", "rel_actions")}
    except (KeyError, EOFError, OSError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    try:
        observation = calvin_observation({"rgb_obs": values, "robot_obs": values["robot_obs"]})
        return observation, _checked_action(values["rel_actions"], observation.state)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _checked_action(stored: np.ndarray, state: np.ndarray) -> np.ndarray:
    action = np.asarray(stored, dtype=np.float32)
    if action.shape != (ACTION_SIZE,):
        raise ValueError(f"rel_actions must have shape ({ACTION_SIZE},), got {action.shape}")
    if not np.isfinite(action).all() or not np.isfinite(state).all():
        raise ValueError("robot_obs and rel_actions must be finite")
    if abs(action[-1]) != 1:
        raise ValueError(f"the gripper, the last of rel_actions, must be -1 (closed) or +1 (open), got {action[-1]:g}")
    return action


def read_annotations(path: Path) -> list[Span]:
    """The spans of `auto_lang_ann.npy`.

    Raises:
        ValueError: a file of another form, or one that asks for more than arrays, texts and numbers.
    """
    with path.open("rb") as file:
        content = _read_pickled_array(file, path)
    try:
        bounds, texts, subtasks = content["info"]["indx"], content["language"]["ann"], content["language"]["task"]
        rows = list(zip(bounds, texts, subtasks, strict=True))
        spans = [Span(int(first), int(last), str(text).strip(), str(subtask)) for (first, last), text, subtask in rows]
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise ValueError(
            f"{path} must hold info.indx (pairs of steps), language.ann and language.task (texts), one of each for "
            f"every span: {type(error).__name__}: {error}"
        ) from error
    if not spans:
        raise ValueError(f"{path} has no annotated span")
    return spans


def _read_pickled_array(file: BinaryIO, path: Path) -> Mapping[str, Any]:
    """What a .npy file with one Python object holds."""
    try:
        version = np.lib.format.read_magic(file)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        shape, _, dtype = read(file)
    except (ValueError, KeyError) as error:
        raise ValueError(f"{path} is no .npy file: {error}") from error
    if shape != () or not dtype.hasobject:
        raise ValueError(f"{path} must hold one Python object, got an array of {dtype} with shape {shape}")
    try:
        content = _ArraysOnly(file).load()
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} cannot be read as a pickle: {error}") from error
    except (EOFError, AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {type(error).__name__}: {error}") from error
    return content.item() if isinstance(content, np.ndarray) and content.shape == () else {}


class _ArraysOnly(pickle.Unpickler):
    """Builds NumPy's arrays and numbers, and what pickles hold without naming a class: dicts, lists, tuples, texts."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _KNOWN:
            raise pickle.UnpicklingError(
                f"it asks for {module}.{name}. Only NumPy's arrays, texts and numbers are read, because anything else "
                "could run code"
            )
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def _read_recordings(path: Path) -> np.ndarray:
    """First and last step of every recording, sorted: (n, 2)."""
    try:
        bounds = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if bounds.ndim != 2 or bounds.shape[1] != 2 or not len(bounds) or not np.issubdtype(bounds.dtype, np.integer):
        raise ValueError(f"{path} must hold integers of shape (recordings, 2), got {bounds.dtype} {bounds.shape}")
    return bounds[np.argsort(bounds[:, 0])]


def _check_within(spans: list[Span], recordings: np.ndarray, path: Path) -> None:
    """Refuses spans that are empty, or that lie in no recording or in more than one."""
    for number, span in enumerate(spans):
        where = f"span {number} of {path} ({span.subtask}, steps {span.first}...{span.last})"
        if len(span) < 1 or span.first < 0:
            raise ValueError(f"{where} must end after its beginning")
        if not span.instruction:
            raise ValueError(f"{where} has no instruction")
        recording = int(np.searchsorted(recordings[:, 0], span.first, side="right")) - 1
        if recording < 0 or span.last > recordings[recording, 1]:
            raise ValueError(f"{where} is not within one of the recordings of {RECORDINGS}: its steps do not follow")
