"""What the actions are: absolute targets, deltas or velocities, of which state dimensions, in which frame."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from vla_adapter_hf.doctor.findings import Finding
from vla_adapter_hf.doctor.fits import Fits, explained, fit_actions, quiet_median
from vla_adapter_hf.doctor.ranges import unit_guess
from vla_adapter_hf.doctor.recording import Recording
from vla_adapter_hf.doctor.rotations import ENCODINGS, to_axis_angle
from vla_adapter_hf.doctor.settings import CheckSettings


UNEXPLAINED = 0.2  # R² below which an action has nothing to do with the motion
GOOD = 0.5  # R² above which conclusions are drawn


@dataclass
class Semantics:
    """The explanation of the actions that fits best.

    Args:
        kind: `"absolute"`, `"delta"`, `"velocity"` or `"unknown"`.
        r2: by action dimension, of the best state dimension; the gripper's is 0.
        state_dims: by action dimension, the state dimension that explains it; -1 for none.
        slopes: by action dimension, action per state (absolute) or per motion of one step.
        lag: steps by which the motion follows the action; None if it cannot be found.
        r2_by_lag: the lags and the mean R² at each.
        alternatives: R² of every explanation.
        scale: action per motion of one step, for all dimensions together, of deltas and velocities.
        frame: `"base"`, `"tool"`, or why it cannot be decided.
        encoding: how the state writes an orientation, if that could be found.
        dims: action dimensions that were explained.
    """

    kind: str
    r2: np.ndarray
    state_dims: np.ndarray
    slopes: np.ndarray
    lag: int | None
    r2_by_lag: dict[int, float]
    alternatives: dict[str, float]
    scale: float | None = None
    frame: str = "not looked at"
    encoding: str | None = None
    dims: list[int] = field(default_factory=list)
    fits: Fits | None = None


def absolute_targets(semantics: Semantics) -> dict[int, int]:
    """Action dimensions that are surely absolute targets, each with the state dimension that follows it."""
    if semantics.kind != "absolute":
        return {}
    return {dim: int(semantics.state_dims[dim]) for dim in semantics.dims if semantics.r2[dim] > GOOD}


def find_semantics(recording: Recording, settings: CheckSettings, grippers: list[int]) -> Semantics:
    """Fit all explanations and take the best; see `Semantics`."""
    actions = recording.all_actions
    dims = [dim for dim in range(actions.shape[1]) if dim not in grippers and actions[:, dim].std() > 1e-9]
    absolute = fit_actions(recording, "absolute", settings.max_lag)
    delta = fit_actions(recording, "delta", settings.max_lag)
    nothing = np.zeros(actions.shape[1])
    if not delta.episodes or not dims:
        return Semantics("unknown", nothing, np.full(len(nothing), -1), nothing, None, {}, {})
    # A target further along the same axis moves the state forwards: a falling line is a controller, not a target.
    rising = np.nan_to_num(quiet_median(absolute.slope)) > 0
    scores = {"absolute": np.where(rising, absolute.typical(), 0.0), "delta": delta.typical()}
    best = {name: score.max(axis=(0, 2)) for name, score in scores.items()}
    weights = {
        name: float(np.sort(values[dims])[-max(1, (len(dims) + 1) // 2) :].mean()) for name, values in best.items()
    }
    kind = max(weights, key=weights.get)
    fits = delta if kind == "delta" else fit_actions(recording, "changes", settings.max_lag)
    by_lag, lag, state_dims = _common_lag(fits, scores[kind], dims)
    r2, slopes = nothing.copy(), nothing.copy()
    values = absolute if kind == "absolute" else delta
    chosen = int(np.flatnonzero(fits.lags == (lag if lag is not None else 0))[0])
    for dim in dims:
        r2[dim] = scores[kind][chosen, dim, state_dims[dim]]
        slopes[dim] = np.nan_to_num(quiet_median(values.slope[:, chosen, dim, state_dims[dim]]))
    semantics = Semantics(kind, r2, state_dims, slopes, lag, by_lag, weights, dims=dims, fits=fits)
    if kind == "delta":
        _look_for_frame(recording, semantics)
        semantics.kind = _delta_or_velocity(recording, settings, semantics)
    if max(r2[dims].max(), weights[kind], semantics.alternatives.get("tool frame", 0.0)) < UNEXPLAINED:
        semantics.kind, semantics.lag = "unknown", None
    return semantics


def _common_lag(fits: Fits, score: np.ndarray, dims: list[int]) -> tuple[dict[int, float], int | None, np.ndarray]:
    state_dims = np.full(score.shape[1], -1)
    for dim in dims:
        state_dims[dim] = int(score[:, dim].max(0).argmax())
    sharp = fits.typical()
    curves = np.stack([sharp[:, dim, state_dims[dim]] for dim in dims])
    strong = curves[curves.max(1) >= 0.5 * curves.max()]
    curve = strong.mean(0)
    by_lag = {int(lag): float(value) for lag, value in zip(fits.lags, curve, strict=True)}
    return by_lag, (int(fits.lags[curve.argmax()]) if curve.max() >= UNEXPLAINED else None), state_dims


def _delta_or_velocity(recording: Recording, settings: CheckSettings, semantics: Semantics) -> str:
    fps = settings.fps or recording.fps
    strong = [dim for dim in semantics.dims if semantics.r2[dim] >= GOOD]
    if semantics.scale is None and strong:
        semantics.scale = float(np.median(np.abs(semantics.slopes[strong])))
    if semantics.scale is None or not fps or fps < 2:
        return "delta"
    return "velocity" if 0.85 <= semantics.scale / fps <= 1.15 else "delta"


def _motions(recording: Recording, lag: int, width: int) -> tuple[np.ndarray, ...]:
    """Action, position's motion, orientation before and after, of all steps, at a lag."""
    actions, moved, before, after = [], [], [], []
    for _, states, acted in recording.episodes(4 + 2 * abs(lag)):
        first, end = max(0, -lag), min(len(acted), len(states) - 1 - lag)
        now, then = states[first + lag : end + lag], states[first + lag + 1 : end + lag + 1]
        actions.append(acted[first:end])
        moved.append(then[:, :3] - now[:, :3])
        before.append(now[:, 3 : 3 + width])
        after.append(then[:, 3 : 3 + width])
    return tuple(np.concatenate(part) for part in (actions, moved, before, after))


def _is_encoding(name: str, orientation: np.ndarray) -> bool:
    norms = np.linalg.norm(orientation, axis=1)
    if name.startswith("quaternion"):
        return bool(np.abs(norms - 1).max() < 0.05)
    largest = np.abs(orientation).max()
    if "degrees" in name:
        return bool(2 * np.pi + 0.1 <= largest <= 361)
    return bool(largest < 2 * np.pi + 0.1 and norms.max() > 1e-3)


def _possible_encodings(states: np.ndarray) -> list[str]:
    """Names of the ways in which the dimensions from the fourth on may be an orientation.

    Four values of length 1 are a quaternion: their first three would else pass for half of a rotation vector.
    """
    possible = [
        name
        for name, (width, _) in ENCODINGS.items()
        if states.shape[1] >= 3 + width and _is_encoding(name, states[:, 3 : 3 + width])
    ]
    return [name for name in possible if name.startswith("quaternion")] or possible


def _look_for_frame(recording: Recording, semantics: Semantics) -> None:
    """Base or tool frame, if the state begins with a position and an orientation."""
    size, actions_size = recording.all_states.shape[1], recording.all_actions.shape[1]
    named_joints = any("joint" in name.lower() for name in recording.state_names or ())
    if size < 6 or actions_size < 6 or named_joints or actions_size > 8:
        semantics.frame = "not an end-effector pose, or not named as one"
        return
    candidates: dict[str, tuple[float, str, str, float]] = {}
    encodings = _possible_encodings(recording.all_states)
    for lag in dict.fromkeys([semantics.lag or 0, 0, -1, 1]):
        for name in encodings:
            width, convert = ENCODINGS[name]
            actions, moved, before, after = _motions(recording, lag, width)
            start, end = convert(before), convert(after)
            turned = np.linalg.norm(to_axis_angle(np.swapaxes(start[:1], 1, 2) @ start), axis=1)
            if np.quantile(turned, 0.9) < 0.15:
                semantics.frame = f"cannot be decided: the tool turns by only {np.degrees(turned.max()):.0f} degrees"
                return
            back = np.swapaxes(start, 1, 2)
            tool_motion = (back @ moved[..., None])[..., 0]
            base_turn, tool_turn = to_axis_angle(end @ back), to_axis_angle(back @ end)
            for frame, motion, turn in (("base", moved, base_turn), ("tool", tool_motion, tool_turn)):
                position_r2, matrix = explained(motion, actions[:, :3])
                turn_r2, _ = explained(turn, actions[:, 3:6])
                still = actions[:, 3:6].std(0).max() < 1e-6
                scale = float(np.median(np.linalg.svd(matrix, compute_uv=False)))
                score = position_r2 + (0 if still else turn_r2)
                candidates[f"{frame}/{name}/{lag}"] = (score, frame, name, scale)
    _choose_frame(semantics, candidates)


def _choose_frame(semantics: Semantics, candidates: dict[str, tuple[float, str, str, float]]) -> None:
    if not candidates:
        semantics.frame = "cannot be decided: state 3 to 6 is no orientation"
        return
    best = {frame: max(value for value in candidates.values() if value[1] == frame) for frame in ("base", "tool")}
    semantics.alternatives |= {f"{frame} frame": value[0] / 2 for frame, value in best.items()}
    frame = max(best, key=lambda name: best[name][0])
    gap = abs(best["base"][0] - best["tool"][0])
    if best[frame][0] < 2 * UNEXPLAINED or gap < 0.1:
        semantics.frame = "cannot be decided: base and tool frame explain the actions equally well"
        return
    semantics.frame = frame
    key = max((key for key, value in candidates.items() if value[1] == frame), key=lambda name: candidates[name][0])
    others = [value[0] for value in candidates.values() if value[1] == frame and value[2] != best[frame][2]]
    if not others or best[frame][0] - max(others) > 0.02:
        semantics.encoding = best[frame][2]
    if frame == "tool":
        semantics.lag, semantics.scale = int(key.rsplit("/", 1)[1]), candidates[key][3]


def check_semantics(recording: Recording, semantics: Semantics, settings: CheckSettings) -> list[Finding]:
    """Findings about the meaning of the actions and their time."""
    if not semantics.dims or semantics.fits is None:
        return []
    findings = []
    evidence = {"R² of each explanation": semantics.alternatives}
    if semantics.kind == "unknown":
        findings.append(
            Finding(
                "actions have nothing to do with the motion",
                "high",
                evidence,
                "A policy learns commands that do not move the arm the way the demonstrations moved.",
                "Check that action and state come from the same robot and the same step, and that the action column "
                "is the right one.",
            )
        )
        return findings
    findings += _check_lag(semantics, settings)
    findings += _check_units(recording, semantics)
    findings += _check_unexplained(recording, semantics)
    if semantics.frame == "tool":
        findings.append(
            Finding(
                "actions are in the tool's frame",
                "low",
                evidence,
                "Nothing, as long as the arm is driven in the tool's frame too. "
                "In the base frame it would move wrongly.",
                "Make sure that the controller on the robot takes commands in the tool's frame.",
            )
        )
    return findings


def _check_lag(semantics: Semantics, settings: CheckSettings) -> list[Finding]:
    lag = semantics.lag
    if lag is None or max(semantics.r2_by_lag.values()) < GOOD:
        return []
    expected = 1 if semantics.kind == "absolute" else 0
    evidence = {"steps from action to motion": lag, "R² by lag": semantics.r2_by_lag}
    if lag < expected:
        if semantics.kind == "absolute" and lag == 0 and semantics.r2_by_lag[0] < 0.9999:
            return []  # a command that is as late as the measurement; only an exact copy is a fault
        copied = "The action equals the state of its own step" if lag == 0 else "The action repeats what has been done"
        return [
            Finding(
                "actions are late",
                "high",
                evidence,
                f"{copied}. A policy learns to stay where it is, or to copy the past.",
                f"Move the actions {expected - lag} step(s) towards the start of each episode.",
            )
        ]
    ahead = lag - expected
    if ahead == 0 or semantics.r2_by_lag[lag] < semantics.r2_by_lag.get(expected, 0.0) + 0.05:
        return []
    return [
        Finding(
            "actions are early",
            "medium" if ahead > settings.max_lead else "low",
            evidence,
            f"The arm follows {ahead} step(s) after its command: a slow arm, or actions that were shifted. A policy "
            "learns that delay; on an arm with another delay it overshoots.",
            "If the arm is faster than that, move the actions towards the end of each episode.",
        )
    ]


def _check_units(recording: Recording, semantics: Semantics) -> list[Finding]:
    strong = [dim for dim in semantics.dims if semantics.r2[dim] >= 0.8]
    if semantics.kind != "absolute" or not strong:
        return []
    scales = {recording.action_name(dim): semantics.slopes[dim] for dim in strong}
    off = {name: scale for name, scale in scales.items() if not 1 / 3 < scale < 3}
    if not off:
        return []
    scale = float(np.median(list(off.values())))
    return [
        Finding(
            "actions and states are in different units",
            "medium",
            {"action per state": off, "guess": unit_guess(scale)},
            "Statistics hide it, but whoever compares an action with a state, or starts from the state, is wrong by "
            "that factor.",
            "Record both in the same units.",
        )
    ]


def _check_unexplained(recording: Recording, semantics: Semantics) -> list[Finding]:
    """Single dimensions that the motion does not explain, where the others are explained well, and swapped ones."""
    if semantics.frame == "tool":
        return []
    findings = []
    strong = [dim for dim in semantics.dims if semantics.r2[dim] >= 0.8]
    order = [int(semantics.state_dims[dim]) for dim in strong]
    yaw_first = "zyx" in (semantics.encoding or "")
    if not yaw_first and len(order) > 1 and order != sorted(order) and len(set(order)) == len(order):
        findings.append(
            Finding(
                "actions are in another order than the states",
                "medium",
                {
                    "state of each action": {
                        recording.action_name(d): recording.state_name(s) for d, s in zip(strong, order, strict=True)
                    }
                },
                "Nothing in itself, but a controller that expects the state's order moves the wrong axis.",
                "Check the order of the dimensions against the robot's interface.",
            )
        )
    same_place = [dim for dim in strong if semantics.state_dims[dim] == dim]
    backwards = [recording.action_name(dim) for dim in same_place if semantics.slopes[dim] < 0]
    if backwards and len(backwards) < len(same_place):
        findings.append(
            Finding(
                "some actions point against the motion",
                "medium",
                {"dimensions": backwards, "action per motion": [semantics.slopes[dim] for dim in same_place]},
                "The axis of the action has another direction than that of the state.",
                "Check the sign of these dimensions against the robot's interface.",
            )
        )
    return findings
