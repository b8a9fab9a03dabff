"""From episodes to training samples: which frames begin a chunk, and the chunk that begins there."""

from __future__ import annotations

import numpy as np


class WindowIndex:
    """Numbers all windows of some episodes, episode by episode.

    Args:
        lengths: steps of each episode.
        chunk_size: actions per window (K).
        pad: False: only windows that fit, `length - K + 1` per episode; True: one per step, the last K - 1 of which
            reach beyond the end of the episode.
    """

    def __init__(self, lengths: np.ndarray, chunk_size: int, pad: bool = False) -> None:
        lengths = np.asarray(lengths, np.int64)
        self.chunk_size = chunk_size
        self.pad = pad
        self.counts = lengths if pad else np.maximum(lengths - chunk_size + 1, 0)
        self._ends = np.cumsum(self.counts)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def locate(self, index: int) -> tuple[int, int]:
        """Window number -> (which of the episodes, its first step)."""
        episode = int(np.searchsorted(self._ends, index, side="right"))
        return episode, index - int(self._ends[episode] - self.counts[episode])


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


def whole_chunk(stored: np.ndarray, chunk_size: int) -> tuple[np.ndarray, np.ndarray]:
    """The first `chunk_size` (K) of a stored chunk's actions: float32 (K, A), a copy; bool (K,), all false."""
    return stored[:chunk_size].copy(), np.zeros(chunk_size, bool)
