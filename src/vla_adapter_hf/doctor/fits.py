"""Least squares of actions against states: which explanation leaves the smallest rest, at which lag."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vla_adapter_hf.doctor.recording import Recording, evenly


MOST_EPISODES = 200
LEAST_STEPS = 16


@dataclass
class Fits:
    """Straight lines from one state dimension to one action dimension, for every episode and lag.

    Args:
        episodes: positions of the episodes, E of them.
        lags: L lags; at lag k the action of step t is compared with the state (or the motion) of step t + k.
        r2: float64 (E, L, A, S), the share of the action's variance within the episode that the line explains; NaN
            where the action or the state does not change.
        slope: float64 (E, L, A, S), action per state.
    """

    episodes: list[int]
    lags: np.ndarray
    r2: np.ndarray
    slope: np.ndarray

    def typical(self) -> np.ndarray:
        """The median over episodes, (L, A, S). 0 where fewer than a tenth of the episodes have a value."""
        counted = np.isfinite(self.r2).sum(0)
        median = np.nan_to_num(quiet_median(self.r2))
        return np.where(counted >= max(1, 0.1 * len(self.episodes)), median, 0.0)


def quiet_median(values: np.ndarray, axis: int = 0) -> np.ndarray:
    """The median without NaN; NaN where nothing else is there, without numpy's warning."""
    blank = np.isnan(values).all(axis)
    filled = np.where(np.expand_dims(blank, axis), 0.0, values)
    return np.where(blank, np.nan, np.nanmedian(filled, axis))


def fit_actions(recording: Recording, hypothesis: str, max_lag: int) -> Fits:
    """Fit every action dimension by every state dimension.

    Args:
        recording: the episodes; at most 200 of them are taken, evenly spread.
        hypothesis: `"absolute"` (the action is a state), `"changes"` (the change of the action is the change of a
            state; it says the same as `"absolute"`, and finds the lag sharply) or `"delta"` (the action is the motion
            of one step).
        max_lag: lags from `-max_lag` to `max_lag`.
    """
    actions, states = recording.all_actions, recording.all_states
    # What moves less than this within an episode is noise.
    action_floor, state_floor = 1e-3 * actions.std(0) + 1e-9, 1e-3 * states.std(0) + 1e-9
    lags = np.arange(-max_lag, max_lag + 1)
    positions = [position for position, _, _ in recording.episodes(LEAST_STEPS + 2 * max_lag)]
    positions = evenly(positions, MOST_EPISODES)
    shape = (len(positions), len(lags), actions.shape[1], states.shape[1])
    r2, slope = np.full(shape, np.nan), np.full(shape, np.nan)
    for place, position in enumerate(positions):
        target, source = recording.actions[position], recording.states[position]
        if hypothesis != "absolute":
            source = np.diff(source, axis=0)
        if hypothesis == "changes":
            target = np.diff(target, axis=0)
        for index, lag in enumerate(lags):
            first, end = max(0, -lag), min(len(target), len(source) - lag)
            r2[place, index], slope[place, index] = lines(
                source[first + lag : end + lag], target[first:end], state_floor, action_floor
            )
    return Fits(positions, lags, r2, slope)


def lines(
    source: np.ndarray, target: np.ndarray, source_floor: np.ndarray, target_floor: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """R² and slope of the line from each column of `source` (n, S) to each of `target` (n, A): (A, S) each."""
    source, target = source - source.mean(0), target - target.mean(0)
    source_spread, target_spread = source.std(0), target.std(0)
    covariance = target.T @ source / len(source)
    with np.errstate(divide="ignore", invalid="ignore"):
        slope = covariance / source_spread**2
        r2 = (covariance / (target_spread[:, None] * source_spread)) ** 2
    moving = (target_spread > target_floor)[:, None] & (source_spread > source_floor)
    return np.where(moving, r2, np.nan), np.where(moving, slope, np.nan)


def explained(source: np.ndarray, target: np.ndarray) -> tuple[float, np.ndarray]:
    """R² over all columns of the best linear map from `source` (n, S) to `target` (n, A), and the map (S, A).

    Both are centred first. Of the steps, the hundredth with the largest rest is left out once, as spikes would rule.
    """
    source, target = source - source.mean(0), target - target.mean(0)
    matrix = np.linalg.lstsq(source, target, rcond=None)[0]
    rest = ((target - source @ matrix) ** 2).sum(1)
    kept = rest <= np.quantile(rest, 0.99)
    source, target = source[kept], target[kept]
    matrix = np.linalg.lstsq(source, target, rcond=None)[0]
    total = ((target - target.mean(0)) ** 2).sum()
    return float(1 - ((target - source @ matrix) ** 2).sum() / max(total, 1e-30)), matrix
