"""From the errors of a policy to words: does it look, does it listen, does it lean on the state, which camera carries.

The rule is the same for all inputs. The gain of an input is the share of the error that the right input takes away,
compared with a wrong one: 1 - error as it is / error with the wrong input. Its interval comes from drawing episodes
with replacement. With fewer than five episodes there is no interval, and nothing is decided.

- no: the gain's lower bound is not above 2 %, and its upper bound is below 20 %;
- cannot be decided: the lower bound is not above 2 %, and the upper bound is 20 % or more: too few samples;
- a little: the lower bound is above 2 %, and the gain is below 20 %;
- yes: the lower bound is above 2 %, and the gain is 20 % or more.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


NOTHING = 0.02  # a gain that could be chance
CLEAR = 0.2  # the gain from which on the answer is yes
DRAWS = 2000
LEAST_EPISODES = 5  # with fewer, an interval from drawing them is far too narrow


@dataclass(frozen=True)
class Errors:
    """Errors of N chunks under one condition.

    Args:
        dims: float64 (N, A), mean absolute error of each chunk by dimension, the robot's units.
        first: float64 (N, A), of its first action.
        rest: float64 (N, A), of its other actions; of the first again where a chunk has only one.
        signed: float64 (N, A), mean of predicted minus recorded.
        total: float64 (N,), the mean over dimensions in units of the data's range (half the way from q01 to q99).
    """

    dims: np.ndarray
    first: np.ndarray
    rest: np.ndarray
    signed: np.ndarray
    total: np.ndarray


def measure(predicted: np.ndarray, recorded: np.ndarray, is_real: np.ndarray, scale: np.ndarray) -> Errors:
    """Errors of predicted chunks (N, K, A).

    Args:
        predicted, recorded: the robot's units.
        is_real: (N, K), false after the end of an episode.
        scale: (A,), the robot's units per unit of the data's range; dimensions with 0 do not count in the total.
    """
    weights = is_real[..., None].astype(np.float64)
    signed = (predicted - recorded) * weights
    count = weights.sum(1)
    dims = np.abs(signed).sum(1) / count
    rest = np.abs(signed[:, 1:]).sum(1) / np.maximum(weights[:, 1:].sum(1), 1) if recorded.shape[1] > 1 else dims
    live = scale > 0
    total = (dims[:, live] / scale[live]).mean(1)
    return Errors(dims, np.abs(signed[:, 0]), rest, signed.sum(1) / count, total)


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval, which is infinite if there are too few episodes."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        if not np.isfinite(self.high):
            return f"{self.value:.0%}"
        return f"{self.value:.0%} ({self.low:.0%} to {self.high:.0%})"


def ratio(above: np.ndarray, below: np.ndarray, episodes: np.ndarray, seed: int = 0) -> Estimate:
    """The mean of `above` (N,) over that of `below` (N,), with an interval from drawing whole episodes.

    With fewer than `LEAST_EPISODES` episodes the interval is infinite: samples of one episode depend on each other.
    """
    value = float(above.mean() / max(below.mean(), 1e-12))
    groups = np.unique(episodes, return_inverse=True)[1].reshape(-1)
    count = int(groups.max()) + 1
    if count < LEAST_EPISODES:
        return Estimate(value, -np.inf, np.inf)
    sums = np.stack([np.bincount(groups, values, count) for values in (above, below)])
    draws = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), DRAWS)  # (draws, groups)
    upper, lower = draws @ sums.T.astype(np.float64)[:, 0], draws @ sums.T.astype(np.float64)[:, 1]
    drawn = upper / np.maximum(lower, 1e-12)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Estimate(value, float(low), float(high))


def gain(as_it_is: Errors, wrong: Errors, episodes: np.ndarray) -> Estimate:
    """The share of the error that the right input takes away."""
    share = ratio(as_it_is.total, wrong.total, episodes)
    return Estimate(1 - share.value, 1 - share.high, 1 - share.low)


def answer(gained: Estimate) -> str:
    """`yes`, `a little`, `no` or `cannot be decided`, by the rule of this module."""
    if gained.low <= NOTHING:
        return "no" if gained.high < CLEAR else "cannot be decided"
    return "yes" if gained.value >= CLEAR else "a little"


def carrying_cameras(gains: dict[str, Estimate]) -> list[str]:
    """The cameras whose black frames make the policy worse, the one that matters most first.

    A camera with less than half of the largest gain is left out.
    """
    used = {name: gained.value for name, gained in gains.items() if gained.low > NOTHING}
    most = max(used.values(), default=0.0)
    return sorted((name for name, value in used.items() if value >= most / 2), key=used.get, reverse=True)
