"""Orientations in the state: jumps where the pose does not jump, and two orders of a quaternion in one dataset."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from vla_adapter_hf.doctor.findings import Finding
from vla_adapter_hf.doctor.recording import Recording


def check_orientations(recording: Recording) -> list[Finding]:
    """Findings about angles, rotation vectors and quaternions in the state."""
    return [
        *_angle_jumps(recording),
        *_vector_jumps(recording),
        *_sign_jumps(recording),
        *_quaternion_order(recording),
    ]


def _angle_jumps(recording: Recording) -> list[Finding]:
    """Angles that jump by a full turn within an episode."""
    counts = np.zeros(recording.all_states.shape[1], int)
    numbers = []
    states = recording.all_states
    turn = np.where(np.quantile(np.abs(states), 0.99, axis=0) > 7.0, 360.0, 2 * np.pi)
    for position, values, _ in recording.episodes(2):
        steps = np.abs(np.diff(values, axis=0))
        jumps = (np.abs(steps - turn) < 0.15 * turn).sum(0)
        counts += jumps
        if jumps.any():
            numbers.append(recording.numbers[position])
    # Only angles: values that reach both sides of zero, and never more than a turn.
    angles = (np.abs(states).max(0) <= 1.01 * turn) & (states.min(0) < 0) & (states.max(0) > 0) & (counts > 0)
    if not angles.any():
        return []
    return [
        Finding(
            "angles in the state jump by a full turn",
            "medium",
            {"jumps": {recording.state_name(dim): counts[dim] for dim in np.flatnonzero(angles)}},
            "Two equal poses look far apart to the policy, and their average is the opposite pose.",
            "Unwrap the angle, turn the zero away from where the arm works, or use another encoding.",
            numbers,
        )
    ]


def _blocks(recording: Recording, width: int) -> list[int]:
    """Where a block of so many state dimensions may begin."""
    return list(range(recording.all_states.shape[1] - width + 1))


def _jumping(recording: Recording, width: int, is_jump: Callable[[np.ndarray], np.ndarray]) -> dict[int, list[int]]:
    """By first dimension of a block, the episodes in which `is_jump` finds one between two steps."""
    found: dict[int, list[int]] = {}
    for first in _blocks(recording, width):
        numbers = [
            recording.numbers[position]
            for position, states, _ in recording.episodes(2)
            if is_jump(states[:, first : first + width]).any()
        ]
        if numbers:
            found[first] = numbers
    return found


def _vector_jumps(recording: Recording) -> list[Finding]:
    """Rotation vectors (axis times angle) that turn round at an angle of pi: nearly opposite, both of length pi."""

    def is_jump(values: np.ndarray) -> np.ndarray:
        before, after = values[:-1], values[1:]
        lengths = np.linalg.norm(before, axis=1), np.linalg.norm(after, axis=1)
        near_pi = (np.abs(lengths[0] - np.pi) < 0.3) & (np.abs(lengths[1] - np.pi) < 0.3)
        several = (np.abs(before) > 0.3).sum(1) > 1  # a single angle is found by itself
        return near_pi & several & ((before * after).sum(1) < -0.9 * lengths[0] * lengths[1])

    found = _jumping(recording, 3, is_jump)
    if not found:
        return []
    first, numbers = max(found.items(), key=lambda entry: len(entry[1]))
    return [
        Finding(
            "rotation vectors in the state turn round at pi",
            "medium",
            {"dimensions": [recording.state_name(dim) for dim in range(first, first + 3)], "episodes": len(numbers)},
            "Two equal poses look far apart to the policy, and their average is no turn at all.",
            "Let the vector grow past pi, as LIBERO does, or use another encoding.",
            numbers,
        )
    ]


def _quaternions(recording: Recording) -> list[int]:
    """Where four state dimensions are a quaternion: of length 1 in all episodes, with three that move."""
    states = recording.all_states
    spread = states.std(0)
    return [
        first
        for first in _blocks(recording, 4)
        if np.abs(np.linalg.norm(states[:, first : first + 4], axis=1) - 1).max() < 0.02
        and (spread[first : first + 4] > 1e-4).sum() >= 2
    ]


def _sign_jumps(recording: Recording) -> list[Finding]:
    """Quaternions that change to their negative, which is the same orientation."""
    found = {
        first: numbers
        for first, numbers in _jumping(recording, 4, lambda values: (values[:-1] * values[1:]).sum(1) < -0.9).items()
        if first in _quaternions(recording)
    }
    if not found:
        return []
    first, numbers = max(found.items(), key=lambda entry: len(entry[1]))
    return [
        Finding(
            "quaternions in the state change their sign",
            "medium",
            {"dimensions": [recording.state_name(dim) for dim in range(first, first + 4)], "episodes": len(numbers)},
            "A quaternion and its negative are the same pose and look far apart to the policy.",
            "Choose the sign: the one nearer to the step before, or the one with w above 0.",
            numbers,
        )
    ]


def _quaternion_order(recording: Recording) -> list[Finding]:
    """Episodes whose quaternions look like those of the others only with w at the other end."""
    for first in _quaternions(recording):
        means = np.array([np.abs(states[:, first : first + 4]).mean(0) for _, states, _ in recording.episodes()])
        numbers = np.array([recording.numbers[position] for position, _, _ in recording.episodes()])
        usual = np.median(means, axis=0)
        own = np.abs(means - usual).sum(1)
        turned = np.minimum(*(np.abs(np.roll(means, shift, axis=1) - usual).sum(1) for shift in (1, -1)))
        odd = (turned < 0.5 * own) & (own > 0.5)
        if len(means) >= 4 and odd.any() and odd.mean() < 0.5:
            return [
                Finding(
                    "two orders of the quaternion are mixed",
                    "high",
                    {"episodes": int(odd.sum()), "of": len(odd), "difference as it is": own[odd].mean(),
                     "with w at the other end": turned[odd].mean()},
                    "x, y, z, w in some episodes and w, x, y, z in others: the policy cannot tell the poses apart.",
                    "Bring all episodes into one order.",
                    numbers[odd].tolist(),
                )
            ]  # fmt: skip
    return []
