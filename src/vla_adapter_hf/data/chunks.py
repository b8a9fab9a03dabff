"""From episodes to training samples: how long a chunk is, which rows begin one, and the chunk that begins there.

Chunks are cut from the actions of consecutive rows, which is right only if consecutive rows are consecutive control
steps. A recording whose frames are farther apart than its actions stores with each row the actions that follow it, at
the rate they were executed. Then every row is a sample of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vla_adapter_hf.robots import RobotPreset


DEFAULT_CHUNK_SIZE = 8


def check_stored_shape(
    shape: Sequence[int] | None, action_dim: int | None, column: str, where: str
) -> tuple[int, int]:
    """The shape (K, A) of a stored chunk, as the dataset describes it.

    Raises:
        ValueError: not two dimensions, or actions of another size than `action_dim`.
    """
    if shape is None or len(shape) != 2 or min(shape) < 1 or (action_dim is not None and shape[1] != action_dim):
        size = "values" if action_dim is None else str(action_dim)
        raise ValueError(
            f"{where}: a row of column {column!r} has shape {None if shape is None else tuple(shape)}; expected "
            f"(actions, {size}). Give another chunk_column, or chunk_column=None if consecutive rows are consecutive "
            "steps"
        )
    return int(shape[0]), int(shape[1])


def choose_chunk_size(
    given: int | None, robot: RobotPreset | None, stored: int | None, column: str | None, where: str
) -> int:
    """Actions per sample (K): as given, else the robot's, else all that are stored, else `DEFAULT_CHUNK_SIZE`.

    Args:
        given: the argument `chunk_size`.
        robot: the preset whose conventions are applied, or None.
        stored: actions in a stored chunk of `column`; None if chunks are cut from consecutive rows.
        column: the column of stored chunks, for the message.
        where: the dataset, for the message.

    Raises:
        ValueError: not a positive number, or more than are stored.
    """
    chunk_size = given
    if chunk_size is None:
        chunk_size = robot.chunk_size if robot is not None else stored or DEFAULT_CHUNK_SIZE
    if not isinstance(chunk_size, int) or chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size!r}; expected a positive number of actions")
    if stored is not None and chunk_size > stored:
        whose = f" (robot {robot.name!r})" if given is None else ""
        raise ValueError(
            f"{where}: chunk_size={chunk_size}{whose}, but column {column!r} holds {stored} actions per row. Give "
            f"chunk_size={stored} or less, or record again with chunks of {chunk_size}"
        )
    return chunk_size


class WindowIndex:
    """Numbers all windows of some episodes, episode by episode.

    Args:
        lengths: steps of each episode.
        chunk_size: actions per window (K).
        pad: False: only windows that fit, `length - K + 1` per episode; True: one per step, the last K - 1 of which
            reach beyond the end of the episode.
    """

    def __init__(self, lengths: np.ndarray, chunk_size: int, pad: bool = False) -> None:
        self.counts = np.array([window_count(length, chunk_size, pad) for length in lengths], np.int64)
        self._ends = np.cumsum(self.counts)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def locate(self, index: int) -> tuple[int, int]:
        """Window number -> (which of the episodes, its first step)."""
        episode = int(np.searchsorted(self._ends, index, side="right"))
        return episode, index - int(self._ends[episode] - self.counts[episode])


def window_count(length: int, chunk_size: int, pad: bool) -> int:
    """How many windows an episode of `length` steps has; see `WindowIndex`."""
    return length if pad else max(length - chunk_size + 1, 0)


def action_chunk(actions: np.ndarray, frame: int, chunk_size: int) -> tuple[np.ndarray, np.ndarray]:
    """The chunk that begins at a step of an episode.

    Args:
        actions: float32 (steps, A) of the whole episode.
        frame: first step of the chunk.
        chunk_size: K.

    Returns:
        float32 (K, A), after the end of the episode the last action repeated; bool (K,), true there.
    """
    steps = np.arange(frame, frame + chunk_size)
    return actions[np.minimum(steps, len(actions) - 1)], steps >= len(actions)
