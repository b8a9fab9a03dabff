"""From chunks of predicted actions to the action of the present step."""

from __future__ import annotations

from collections import deque

import numpy as np


class ActionChunkQueue:
    """Hands out one action per step and says when the policy has to be asked again.

    Used by evaluation and by real robots alike: `while running: if queue.needs_chunk: queue.add(policy(...));
    act(queue.pop())`.

    Args:
        execute: actions of a chunk that are executed before the next query; None executes whole chunks, as in the
            published evaluation.
        ensemble: None to execute the newest chunk only. A number m blends all chunks that speak about a step with
            weights exp(-m * i), where i counts them from 0, the oldest, as in ACT (Zhao et al. 2023, temporal
            ensembling): m = 0 is the plain mean, m > 0 favours older chunks. It needs overlapping chunks, so `execute`
            must be smaller than the chunk.
        blend: share of the newest chunk in an action about which the chunk before it also says something; 1 takes the
            newest chunk alone.
        averaged: which of an action's values are averaged or blended, boolean `(A,)`; by default all. Of the others,
            such as a gripper with two values, the newest chunk's are taken.

    Raises:
        ValueError: `execute` is not positive, or `ensemble` is given without `execute`, negative or not finite.
    """

    def __init__(
        self,
        execute: int | None = None,
        ensemble: float | None = None,
        blend: float = 1.0,
        averaged: np.ndarray | None = None,
    ) -> None:
        if execute is not None and execute < 1:
            raise ValueError(f"execute must be at least 1 action or None for whole chunks, got {execute}")
        if ensemble is not None:
            if execute is None:
                raise ValueError("ensemble needs overlapping chunks: set execute to fewer actions than a chunk has")
            if not (np.isfinite(ensemble) and ensemble >= 0):
                raise ValueError(f"ensemble must be a finite number, 0 or more, got {ensemble}")
        self.execute = execute
        self.ensemble = ensemble
        self.blend = blend
        self.averaged = averaged
        self.reset()

    def reset(self) -> None:
        """Forgets all chunks. To be called at the beginning of every episode: old actions belong to another scene."""
        # (number, step of the first action, actions), oldest first
        self._chunks: deque[tuple[int, int, np.ndarray]] = deque()
        self._added = 0
        self._origin: tuple[int, int] | None = None
        self._step = 0
        self._query_at = 0

    @property
    def step(self) -> int:
        """Actions handed out since the last reset."""
        return self._step

    @property
    def origin(self) -> tuple[int, int] | None:
        """Where the last action that was handed out came from: the number of its chunk since the last reset, from 0,
        and its index in it. Of chunks that were blended it is the newest."""
        return self._origin

    @property
    def needs_chunk(self) -> bool:
        """Whether the policy must be asked before the next `pop`."""
        return self._step >= self._query_at

    def steps_until_query(self) -> int:
        """Actions left before the policy is asked: how many steps can go by without an observation."""
        return max(0, self._query_at - self._step)

    def forget(self) -> None:
        """Drop what is left of all chunks; the steps go on counting."""
        self._chunks.clear()
        self._query_at = self._step

    def upcoming(self, count: int) -> np.ndarray:
        """The next `count` actions (n, A) that `pop` will return as things stand; fewer where a query comes before."""
        count = min(count, self.steps_until_query())
        return np.stack([self._action_at(self._step + ahead) for ahead in range(count)]) if count else np.empty((0, 0))

    def add(self, chunk: np.ndarray, begins: int | None = None) -> None:
        """Take a chunk.

        Args:
            chunk: (K, A), in any units: averaging happens on the values given here.
            begins: the `step` to which the first action belongs; by default the present one. Actions of steps that
                have gone by are dropped. Before a `begins` in the future the earlier chunks go on.

        Raises:
            ValueError: another shape, fewer actions than `execute`, or values that are not finite.
        """
        chunk = np.asarray(chunk)
        begins = self._step if begins is None else begins
        if chunk.ndim != 2 or not len(chunk):
            raise ValueError(f"chunk must have shape (K, A) with at least one action, got {chunk.shape}")
        if self.execute is not None and len(chunk) < self.execute:
            raise ValueError(f"chunk has {len(chunk)} actions, fewer than execute={self.execute}")
        if self.ensemble is not None and len(chunk) == self.execute:
            raise ValueError(f"ensemble needs chunks of more than execute={self.execute} actions, got {len(chunk)}")
        if not np.isfinite(chunk).all():
            raise ValueError("chunk holds values that are not finite; the policy's output cannot be executed")
        self._chunks.append((self._added, begins, chunk))
        self._added += 1
        self._query_at = begins + (self.execute or len(chunk))

    def pop(self) -> np.ndarray:
        """The action (A,) of the present step.

        Raises:
            RuntimeError: a new chunk is due.
        """
        if self.needs_chunk:
            raise RuntimeError("no action left: add a chunk first (see needs_chunk)")
        while self._chunks[0][1] + len(self._chunks[0][2]) <= self._step:
            self._chunks.popleft()
        action = self._action_at(self._step)
        number, begins, _ = self._about(self._step)[-1]
        self._origin = number, self._step - begins
        self._step += 1
        return action

    def _about(self, step: int) -> list[tuple[int, int, np.ndarray]]:
        """The chunks that say something about a step, oldest first."""
        return [entry for entry in self._chunks if entry[1] <= step < entry[1] + len(entry[2])]

    def _action_at(self, step: int) -> np.ndarray:
        candidates = [chunk[step - start] for _, start, chunk in self._about(step)]
        if self.ensemble is not None:
            weights = np.exp(-self.ensemble * np.arange(len(candidates)))
            action = (weights[:, None] * np.stack(candidates)).sum(axis=0) / weights.sum()
        elif len(candidates) == 1 or self.blend == 1.0:
            return candidates[-1]
        else:
            action = self.blend * candidates[-1] + (1 - self.blend) * candidates[-2]
        return action if self.averaged is None else np.where(self.averaged, action, candidates[-1])
