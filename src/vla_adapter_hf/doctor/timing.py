"""Time: timestamps, dropped steps, and the lag between frames and states."""

from __future__ import annotations

import numpy as np

from vla_adapter_hf.doctor.findings import Finding
from vla_adapter_hf.doctor.recording import FrameSample, Recording, Window
from vla_adapter_hf.doctor.semantics import Semantics
from vla_adapter_hf.doctor.settings import CheckSettings


LEAST_FRAMES = 120  # fewer say nothing about a lag between frames and states


def motion(states: np.ndarray, spread: np.ndarray) -> np.ndarray:
    """How far the state (n, S) moves in each step: (n - 1,), dimensions weighted by their spread over the dataset."""
    return np.linalg.norm(np.diff(states, axis=0) / spread, axis=1)


def state_spread(recording: Recording) -> np.ndarray:
    """The standard deviation of each state dimension, without zeros."""
    spread = recording.all_states.std(0)
    return np.where(spread > 1e-9, spread, np.inf)


def check_timestamps(recording: Recording, settings: CheckSettings) -> list[Finding]:
    """Timestamps against fps, and gaps in them."""
    fps = settings.fps or recording.fps
    if recording.timestamps is None:
        return []
    gaps = [np.diff(seconds) for seconds in recording.timestamps if len(seconds) > 2]
    if not gaps:
        return []
    steps = np.concatenate(gaps)
    usual = float(np.median(steps))
    findings = []
    if usual <= 0 or (fps and abs(usual * fps - 1) > 0.05):
        findings.append(
            Finding(
                "timestamps disagree with fps",
                "high" if usual <= 0 or abs(usual * fps - 1) > 0.3 else "medium",
                {"seconds between steps": usual, "expected": 1 / fps if fps else None},
                "A policy is run at another speed than the demonstrations.",
                "Correct fps in the metadata, or record the time of each step.",
            )
        )
    missing = steps > 1.6 * usual
    if usual > 0 and missing.any():
        numbers = [
            recording.numbers[position]
            for position, seconds in enumerate(recording.timestamps)
            if len(seconds) > 2 and (np.diff(seconds) > 1.6 * usual).any()
        ]
        findings.append(_dropped("timestamps", int(missing.sum()), len(steps), numbers))
    return findings


def _dropped(source: str, count: int, total: int, numbers: list[int]) -> Finding:
    return Finding(
        "steps were dropped",
        "high" if count > 0.05 * total else "medium",
        {"steps": count, "of": total, "seen in": source},
        "Across a gap one action seems to move the arm twice as far, and chunks are shorter in time than they look.",
        "Record without gaps; cut episodes at the gaps.",
        numbers,
    )


def check_dropped_steps(recording: Recording, semantics: Semantics) -> list[Finding]:
    """Steps in which the arm moved twice as far as the delta says, where it usually moves just as far."""
    strong = [dim for dim in semantics.dims if semantics.r2[dim] > 0.5]
    if semantics.kind not in ("delta", "velocity") or semantics.lag is None or len(strong) < 2:
        return []
    if semantics.frame == "tool":
        return []
    ratios, owners = [], []
    for position, states, actions in recording.episodes(8 + 2 * abs(semantics.lag)):
        moved = np.diff(states, axis=0)[:, semantics.state_dims[strong]]
        first, end = max(0, -semantics.lag), min(len(actions), len(moved) - semantics.lag)
        moved = moved[first + semantics.lag : end + semantics.lag]
        expected = actions[first:end, strong] / semantics.slopes[strong]
        size = (expected**2).sum(1)
        ratio = (expected * moved).sum(1) / np.maximum(size, 1e-12)
        moving = size > 0.05 * np.quantile(size, 0.95)
        low, middle, high = np.quantile(ratio[moving], [0.1, 0.5, 0.9])
        # Where the motion is not that of the action, a step that is twice as far means nothing.
        if high - low < 0.3 and 0.8 < middle < 1.2:
            ratios.append(ratio[moving])
            owners.append(np.full(moving.sum(), position))
    if not ratios or sum(map(len, ratios)) < 50:
        return []
    ratio, owner = np.concatenate(ratios), np.concatenate(owners)
    # The action that belongs to the gap is gone, so the motion is that of two or three neighbours.
    gap = (ratio > 1.6) & (ratio < 4.5)
    if gap.mean() < 0.005:
        return []
    numbers = [recording.numbers[position] for position in np.unique(owner[gap])]
    return [_dropped("motion per action", int(gap.sum()), len(gap), numbers)]


def frame_changes(sample: FrameSample, camera: int) -> list[np.ndarray]:
    """By window, how much the frame changes from each step to the next: mean absolute difference of the thumbnails."""
    return [np.abs(np.diff(window.thumbnails[:, camera], axis=0)).mean(axis=(1, 2, 3)) for window in sample.windows]


def frame_lag(recording: Recording, sample: FrameSample, camera: int, max_lag: int) -> dict[int, float]:
    """Correlation of frame changes and motion by lag: at lag k the frame shows the state of k steps before.

    A camera does not see every motion, such as that of fingers or a turn on the spot. So the motion of all state
    dimensions, of the first two and three (a position, usually) and of each one are tried. The choice is made on one
    half of the windows, and the correlation is measured on the other half, in turn: the best of many tries would
    often be high by chance. The result is the mean of the two measurements.
    """
    size = recording.all_states.shape[1]
    groups = [list(range(size)), [0, 1], [0, 1, 2], *([dim] for dim in range(size))]
    groups = [dims for dims in groups if max(dims) < size]
    windows = list(zip(sample.windows, frame_changes(sample, camera), strict=True))
    spread = state_spread(recording)
    measured = []
    for half in (0, 1):
        curves = [_lag_curve(recording, windows[half::2], max_lag, dims, spread) for dims in groups]
        best = max(range(len(groups)), key=lambda place: max(curves[place].values(), default=-1.0))
        measured.append(_lag_curve(recording, windows[1 - half :: 2], max_lag, groups[best], spread))
    return {lag: float(np.mean([curve[lag] for curve in measured])) for lag in measured[0] if lag in measured[1]}


def _lag_curve(
    recording: Recording,
    windows: list[tuple[Window, np.ndarray]],
    max_lag: int,
    dims: list[int],
    spread: np.ndarray,
) -> dict[int, float]:
    """The curve of `frame_lag` for the motion of some state dimensions.

    Args:
        windows: each with its frame changes.
        spread: of all state dimensions, as of `state_spread`.
    """
    pairs: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {lag: [] for lag in range(-max_lag, max_lag + 1)}
    for window, changes in windows:
        moves = motion(recording.states[window.position][:, dims], spread[dims])
        # Slow changes of speed say little about a lag of a step.
        a, b = np.diff(np.log(changes + 0.05)), np.diff(np.log(moves + 0.02 * (moves.max(initial=0) + 1e-9)))
        for lag, found in pairs.items():
            offset = window.start - lag
            first, end = max(0, -offset), min(len(changes), len(moves) - offset)
            if end - first >= 8:
                found.append((a[first : end - 1], b[offset + first : offset + end - 1]))
    curve = {}
    for lag, found in pairs.items():
        if not found:
            continue
        a, b = (np.concatenate(part) for part in zip(*found, strict=True))
        curve[lag] = float(np.corrcoef(a, b)[0, 1]) if a.std() > 1e-6 and b.std() > 1e-6 else 0.0
    return curve


def check_frame_lag(recording: Recording, sample: FrameSample, settings: CheckSettings) -> list[Finding]:
    """Cameras that show another moment than the state."""
    findings = []
    if sum(len(window.thumbnails) for window in sample.windows) < LEAST_FRAMES or len(sample.windows) < 4:
        return []
    for camera, name in enumerate(recording.cameras):
        curve = frame_lag(recording, sample, camera, settings.max_lag)
        if not curve:
            continue
        lag = max(curve, key=curve.get)
        neighbours = [value for other, value in curve.items() if abs(other - lag) > 1]
        clear = curve[lag] > 0.3 and curve[lag] > max(neighbours, default=0) + 0.15
        if not clear or lag == 0 or curve[lag] < curve.get(0, 0.0) + 0.2:
            continue
        when = "later" if lag > 0 else "earlier"
        findings.append(
            Finding(
                "frames and states are of different moments",
                "high" if abs(lag) > 1 else "medium",
                {"camera": name, "steps": lag, "correlation by lag": curve},
                f"The camera shows a motion {abs(lag)} step(s) {when} than the state: the policy sees one moment and "
                "feels another, and on the robot the offset is a different one.",
                "Record the camera's own timestamps and pair each state with the frame nearest in time.",
            )
        )
    return findings
