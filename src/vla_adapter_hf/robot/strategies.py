"""Which action an arm executes at each control step, while the policy needs time to answer.

Nothing here knows a clock or a thread. The caller counts control steps: a loop on a real arm does, and so does the
evaluation with a delay.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vla_adapter_hf.robot.action_queue import ActionChunkQueue


STRATEGIES = ("sync", "ensemble", "async", "async-rolled")


@dataclass(frozen=True)
class StrategySettings:
    """How chunks become actions.

    Args:
        name: `"sync"` executes a chunk, stands still while the policy thinks, and executes the next. `"ensemble"` does
            the same and averages the chunks that overlap. `"async"` asks while the last actions of a chunk are still
            being executed and drops the actions of the answer that went by. `"async-rolled"` tells the policy the
            state in which the arm will be when the answer comes, and drops nothing.
        execute: actions of a chunk that are executed before the next query; None is the whole chunk. Not for async.
        ensemble: weights of the ensemble, see `ActionChunkQueue`; 0 is the mean.
        blend: for async, the share of the newer chunk where two chunks say something about a step.
        lead: for async, the most actions that may be left when the policy is asked, as a share of the chunk. More lead
            bridges a longer delay and makes the actions older.

    Raises:
        ValueError: an unknown name, or a number out of its range.
    """

    name: str = "sync"
    execute: int | None = None
    ensemble: float = 0.0
    blend: float = 0.7
    lead: float = 0.5

    def __post_init__(self) -> None:
        if self.name not in STRATEGIES:
            raise ValueError(f"strategy must be one of {', '.join(STRATEGIES)}, got {self.name!r}")
        if self.is_async and self.execute is not None:
            raise ValueError(f"execute={self.execute} is for sync and ensemble; {self.name} asks by the delay it sees")
        if self.name == "ensemble" and self.execute is None:
            raise ValueError(
                "strategy='ensemble' needs overlapping chunks: set execute to fewer actions than a chunk has"
            )
        for name in ("blend", "lead"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must be above 0 and at most 1, got {getattr(self, name)}")

    @property
    def is_async(self) -> bool:
        return self.name.startswith("async")


class ChunkStrategy:
    """Hands out one action per control step and says when the policy is to be asked.

    The order of calls: `wants_chunk`, then `ask` when the observation is taken, `answer` when the chunk is there, and
    `next_action` at every control step. Between `ask` and `answer` the arm may go on.

    Args:
        settings: which strategy.
        averaged: which of an action's values may be averaged, see `ActionChunkQueue`.
    """

    def __init__(self, settings: StrategySettings, averaged: np.ndarray | None = None) -> None:
        self.settings = settings
        ensemble = settings.ensemble if settings.name == "ensemble" else None
        blend = settings.blend if settings.is_async else 1.0
        self._queue = ActionChunkQueue(settings.execute, ensemble, blend, averaged)
        self.reset()

    def reset(self) -> None:
        """Forget all chunks and the query that is under way."""
        self._queue.reset()
        self._begins: int | None = None  # the executed action at which the chunk that was asked for begins
        self._chunk_size = 0

    @property
    def is_waiting(self) -> bool:
        """Whether the policy has been asked and has not answered."""
        return self._begins is not None

    @property
    def origin(self) -> tuple[int, int] | None:
        """Chunk and position of the last action, see `ActionChunkQueue.origin`."""
        return self._queue.origin

    def wants_chunk(self, delay: int) -> bool:
        """Whether to ask now, if the answer takes `delay` control steps."""
        if self.is_waiting:
            return False
        lead = min(delay, int(self.settings.lead * self._chunk_size)) if self.settings.is_async else 0
        return self._queue.steps_until_query() <= lead

    def ask(self, delay: int) -> np.ndarray:
        """Note that the policy is asked now.

        Returns:
            The actions (n, A) that are executed before the first action of the answer. The state given to the policy
            must be rolled forward by them. It is empty unless the strategy is `async-rolled`.
        """
        upcoming = self._queue.upcoming(delay if self.settings.name == "async-rolled" else 0)
        self._begins = self._queue.step + len(upcoming)
        return upcoming

    def answer(self, chunk: np.ndarray) -> None:
        """Take the chunk (K, A) that was asked for. Actions whose step has gone by are dropped."""
        if self._begins is None:
            raise RuntimeError("nobody was asked, or what was to be executed before this chunk was dropped")
        self._queue.add(chunk, begins=self._begins)
        self._chunk_size = len(chunk)
        self._begins = None

    def give_up(self) -> None:
        """Forget the query that is under way: its answer will not come, or is not wanted."""
        self._begins = None

    def forget(self) -> None:
        """Drop what is left of all chunks. A query under way stays, unless its chunk would begin behind them."""
        self._queue.forget()
        if self.settings.name == "async-rolled":
            self._begins = None

    def next_action(self) -> np.ndarray | None:
        """The action (A,) of this control step, or None where there is none and the arm must hold."""
        return None if self._queue.needs_chunk else self._queue.pop()
