"""How the published CALVIN evaluation executes chunks."""

from __future__ import annotations

import numpy as np


CHUNK_SIZE = 8
STEP_LIMITS = {"published": 800, "open-loop": 360}
"""Steps per subtask by schedule. `published` is [`PublishedSchedule`]; `open-loop` executes whole chunks."""


class PublishedSchedule:
    """Executes chunks as the published CALVIN evaluation does: cycles of ten steps with three queries each.

    The policy is queried at steps 0, 1 and 2 of a cycle, for chunks b0, b1 and b2 of eight actions. The executed
    actions are plain means of un-normalised actions, gripper included, before the gripper is made binary:

    | step | action |
    |---|---|
    | 0 | b0[0] |
    | 1 | (b0[1] + b1[0]) / 2 |
    | 2 | (b0[2] + b1[1] + b2[0]) / 3 |
    | 3...7 | (b0[t] + b1[t-1] + b2[t-2]) / 3 for t = 2...6 |
    | 8 | (b1[7] + b2[6]) / 2 |
    | 9 | b2[7] |

    Time index 2 is executed twice and index 7 of b0 never, as for the published scores. The interface is that of
    `ChunkStrategy`, without a delay.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Begins a new cycle. Call it for every subtask."""
        self._chunks: list[np.ndarray] = []
        self._step = 0

    def wants_chunk(self, delay: int = 0) -> bool:
        """Whether the policy is queried before the next action."""
        return self._step < 3 and len(self._chunks) == self._step

    def ask(self, delay: int = 0) -> np.ndarray:
        """No action is executed before the answer: an empty array."""
        return np.empty((0, 0))

    def answer(self, chunk: np.ndarray) -> None:
        """Takes the chunk (8, A) of the present step.

        Raises:
            ValueError: another number of actions, or values that are not finite.
            RuntimeError: no chunk is due.
        """
        chunk = np.asarray(chunk)
        if chunk.ndim != 2 or len(chunk) != CHUNK_SIZE:
            raise ValueError(f"chunk must have shape ({CHUNK_SIZE}, A), got {chunk.shape}")
        if not np.isfinite(chunk).all():
            raise ValueError("chunk holds values that are not finite; the policy's output cannot be executed")
        if not self.wants_chunk():
            raise RuntimeError(f"no chunk is due at step {self._step} of the cycle")
        self._chunks.append(chunk)

    def next_action(self) -> np.ndarray:
        """The action (A,) of the present step.

        Raises:
            RuntimeError: a chunk is due.
        """
        if self.wants_chunk():
            raise RuntimeError("no action left: answer with a chunk first (see wants_chunk)")
        step, chunks = self._step, self._chunks
        if step < 3:
            parts = [chunk[step - asked] for asked, chunk in enumerate(chunks)]
        elif step < 8:
            parts = [chunk[step - 1 - asked] for asked, chunk in enumerate(chunks)]
        elif step == 8:
            parts = [chunks[1][7], chunks[2][6]]
        else:
            parts = [chunks[2][7]]
        self._step += 1
        if self._step == 10:
            self.reset()
        return np.mean(parts, axis=0)
