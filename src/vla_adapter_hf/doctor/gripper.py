"""The gripper: which dimension, which values, which end is closed, and how often it changes its mind."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vla_adapter_hf.doctor.findings import Finding
from vla_adapter_hf.doctor.recording import Recording


SHORT_HOLD = 3  # steps; a gripper that changes again sooner chatters


@dataclass
class Gripper:
    """One gripper dimension of the actions.

    Args:
        dim: which.
        binary: whether it takes two values only (within 2 % of its range).
        low, high: its ends, the 1st and 99th percentile.
        closed: the command that closes it, if the state shows an aperture.
        aperture: the state dimension that opens and closes with it; None if there is none.
        correlation: of command and the aperture some steps later.
        signs: by episode, the sign of that correlation; 0 where it cannot be decided.
    """

    dim: int
    binary: bool
    low: float
    high: float
    closed: float | None = None
    aperture: int | None = None
    correlation: float = 0.0
    signs: np.ndarray | None = None


def is_binary(values: np.ndarray) -> bool:
    """Whether nearly all values (n,) are at one of two ends, and both ends are used."""
    low, high = values.min(), values.max()
    if high - low < 1e-6:
        return False
    place = (values - low) / (high - low)
    at_low, at_high = (place < 0.02).mean(), (place > 0.98).mean()
    return bool(at_low + at_high > 0.97 and min(at_low, at_high) > 0.01)


def is_binary_in_episodes(recording: Recording, dim: int) -> bool:
    """Whether an action dimension takes two values in most episodes, and one or two in nearly all.

    Episodes are looked at one by one: their two values may differ from those of the others by mistake.
    """
    columns = [actions[:, dim] for _, _, actions in recording.episodes(2)]
    binary = np.array([is_binary(values) for values in columns])
    constant = np.array([np.ptp(values) < 1e-6 for values in columns])
    return bool(len(columns) and binary.mean() >= 0.5 and (binary | constant).mean() >= 0.9)


def find_grippers(recording: Recording) -> list[int]:
    """Action dimensions that are grippers: by their names, else those with two values, else none."""
    names = recording.action_names or ()
    named = [dim for dim, name in enumerate(names) if "grip" in name.lower() or "finger" in name.lower()]
    if named:
        return named
    binary = [dim for dim in range(recording.all_actions.shape[1]) if is_binary_in_episodes(recording, dim)]
    return binary if len(binary) <= 2 else []


def describe_gripper(recording: Recording, dim: int) -> Gripper:
    """Range, kind and closing end of a gripper; the aperture is the state dimension that follows the command best."""
    values = recording.all_actions[:, dim]
    low, high = np.quantile(values, [0.01, 0.99])
    gripper = Gripper(dim, is_binary_in_episodes(recording, dim), float(low), float(high))
    states = recording.all_states
    floor = 0.02 * (states.std(0) + 1e-12)  # what moves less within an episode is noise
    totals, signs = np.zeros(states.shape[1]), np.zeros((len(recording.actions), states.shape[1]))
    counted = np.zeros(states.shape[1])
    for position, episode_states, actions in recording.episodes(8):
        best = np.zeros(states.shape[1])
        for lag in (0, 1, 2, 4, 6, 8, 12):
            command, state = actions[: len(actions) - lag, dim], episode_states[lag:]
            if len(command) < 8 or command.std() < 1e-6 * max(1.0, high - low):
                continue
            spread = state.std(0) * command.std()
            covariance = ((command - command.mean())[:, None] * (state - state.mean(0))).mean(0)
            moving = state.std(0) > floor
            correlation = np.where(moving & (spread > 1e-12), covariance / np.maximum(spread, 1e-12), 0)
            best = np.where(np.abs(correlation) > np.abs(best), correlation, best)
        signs[position] = best
        totals += np.abs(best)
        counted += best != 0
    strength = totals / np.maximum(counted, 1)
    named = [dim for dim, name in enumerate(recording.state_names or ()) if "grip" in name.lower()]
    candidates = named or list(range(states.shape[1]))
    aperture = max(candidates, key=lambda place: strength[place])
    if strength[aperture] < 0.6:
        return gripper
    gripper.aperture, gripper.signs = aperture, np.where(np.abs(signs[:, aperture]) > 0.4, signs[:, aperture], 0)
    gripper.correlation = float(np.sum(gripper.signs) / max(1, np.count_nonzero(gripper.signs)))
    # Fingers may be written as negative numbers: the aperture is how far they are from zero.
    sign = -1 if np.abs(states[:, aperture].min()) > np.abs(states[:, aperture].max()) else 1
    opens_upwards = gripper.correlation * sign > 0
    gripper.closed = gripper.low if opens_upwards else gripper.high
    return gripper


def check_gripper(recording: Recording, gripper: Gripper) -> list[Finding]:
    """Findings about one gripper."""
    findings = []
    name = recording.action_name(gripper.dim)
    if gripper.signs is not None and abs(gripper.correlation) > 0.02:
        wrong = np.flatnonzero(gripper.signs * gripper.correlation < 0)
        if len(wrong) and len(wrong) < np.count_nonzero(gripper.signs):
            findings.append(
                Finding(
                    "the gripper's sign differs between episodes",
                    "high",
                    {"dimension": name, "episodes": len(wrong), "of": int(np.count_nonzero(gripper.signs))},
                    "Open and closed mean the opposite in some episodes: the policy opens and closes at random.",
                    "Turn the gripper of these episodes.",
                    [recording.numbers[position] for position in wrong],
                )
            )
    findings += _check_range(recording, gripper, name)
    changes, short = _changes(recording, gripper)
    if changes.sum() >= 10 and short.sum() / changes.sum() > 0.3:
        findings.append(
            Finding(
                "the gripper chatters",
                "medium",
                {
                    "dimension": name,
                    "changes per episode": changes.mean(),
                    f"held under {SHORT_HOLD} steps": short.sum(),
                },
                "The policy learns to open and close again at once, and drops what it holds.",
                "Smooth the command, or hold it for some steps.",
            )
        )
    return findings


def _check_range(recording: Recording, gripper: Gripper, name: str) -> list[Finding]:
    tops = np.array([actions[:, gripper.dim].max() for _, _, actions in recording.episodes()])
    bottoms = np.array([actions[:, gripper.dim].min() for _, _, actions in recording.episodes()])
    span = np.maximum(np.abs(tops), np.abs(bottoms))
    typical = float(np.median(span))
    # Where 0 is closed and 1 open, a gripper that stays closed is 0 throughout.
    from_an_end = np.minimum(np.abs(tops - gripper.low), np.abs(tops - gripper.high))
    stays_at_an_end = (tops - bottoms < 1e-6) & (from_an_end < 1e-6)
    odd = (span > 5 * typical) | ((span < typical / 5) & ~stays_at_an_end)
    odd = np.flatnonzero(odd) if typical > 0 else []
    numbers = [recording.numbers[position] for position, _, _ in recording.episodes()]
    if not len(odd):
        return []
    return [
        Finding(
            "the gripper's range differs between episodes",
            "high",
            {"dimension": name, "episodes": len(odd), "usual end": typical, "their end": float(np.median(span[odd]))},
            "One threshold cannot tell open from closed in both.",
            "Bring all episodes to one range.",
            [numbers[place] for place in odd],
        )
    ]


def _changes(recording: Recording, gripper: Gripper) -> tuple[np.ndarray, np.ndarray]:
    """By episode: how often the gripper changes, and how many of these are taken back within `SHORT_HOLD` steps."""
    changes, short = [], []
    middle = (gripper.low + gripper.high) / 2
    for _, _, actions in recording.episodes():
        places = np.flatnonzero(np.diff((actions[:, gripper.dim] > middle).astype(int)))
        changes.append(len(places))
        short.append(int((np.diff(places) < SHORT_HOLD).sum()))
    return np.array(changes), np.array(short)


def check_preset_gripper(recording: Recording, gripper: Gripper, robot: str | None) -> list[Finding]:
    """After a preset's convention a gripper is learnt as 1 for open: find one that is the other way round."""
    if robot not in ("libero", "calvin", "bridge") or gripper.closed is None or gripper.dim != 6:
        return []
    if gripper.closed < (gripper.low + gripper.high) / 2:
        return []
    return [
        Finding(
            f"the gripper is the wrong way round for robot {robot}",
            "high",
            {"command that closes": gripper.closed, "command that should close": 0.0},
            "The policy opens where it should close.",
            "Turn the gripper of the recording, or choose another robot preset.",
        )
    ]
