"""Where the arm will be after some actions: what an asynchronous policy is asked about."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class StateModel:
    """How actions move the state.

    Args:
        dims: pairs (index in the state, index in the action) of values that belong together. Other values of the state
            are left as they are.
        gain: for delta actions, how far an action of 1 moves each of them in one control step, in the state's units;
            one number per pair. None: actions are targets in the state's own units, and the state is where the last
            one points.

    Raises:
        ValueError: no pairs, or another number of gains than pairs.
    """

    dims: tuple[tuple[int, int], ...]
    gain: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if not self.dims:
            raise ValueError("dims must hold at least one pair (index in the state, index in the action)")
        if self.gain is not None and len(self.gain) != len(self.dims):
            raise ValueError(f"gain has {len(self.gain)} numbers for {len(self.dims)} pairs of dims")

    def roll(self, state: np.ndarray, actions: np.ndarray) -> np.ndarray:
        """The state (S,) after executing actions (n, A), in physical units as the policy predicts them."""
        rolled = np.array(state, dtype=np.float64)
        if not len(actions):
            return rolled
        in_state, in_action = (list(indices) for indices in zip(*self.dims, strict=True))
        if self.gain is None:
            rolled[in_state] = actions[-1, in_action]
        else:
            rolled[in_state] += np.asarray(self.gain) * actions[:, in_action].sum(axis=0)
        return rolled

    @classmethod
    def fit(
        cls, states: Sequence[np.ndarray], actions: Sequence[np.ndarray], dims: Sequence[tuple[int, int]]
    ) -> StateModel:
        """A model for delta actions, with the gains that explain recorded episodes best (least squares).

        Args:
            states: per episode (T, S), or (T + 1, S) with the state after the last action.
            actions: per episode (T, A).
            dims: pairs (index in the state, index in the action).

        Raises:
            ValueError: an action that never moves, so its gain cannot be known.
        """
        gains = []
        for in_state, in_action in dims:
            moved = np.concatenate([np.diff(episode[:, in_state]) for episode in states])
            acted = np.concatenate(
                [episode[: len(of) - 1, in_action] for episode, of in zip(actions, states, strict=True)]
            )
            if not (acted @ acted) > 0:
                raise ValueError(f"action {in_action} is 0 in every step; its gain cannot be known")
            gains.append(float(acted @ moved / (acted @ acted)))
        return cls(tuple((int(in_state), int(in_action)) for in_state, in_action in dims), tuple(gains))


# LIBERO's controller moves the gripper by about 1.25 cm for an action of 1, a quarter of what it is asked for: the arm
# lags behind. Fitted to episodes of the scripted expert. Orientation and fingers are left as they are.
STATE_MODELS = {"libero": StateModel(((0, 0), (1, 1), (2, 2)), (0.0125, 0.0125, 0.0125))}
