"""Ranges and units of states and actions: dead, saturated and tiny dimensions, outliers, what clipping costs."""

from __future__ import annotations

import numpy as np

from vla_adapter_hf.doctor.findings import Finding
from vla_adapter_hf.doctor.recording import Recording


def ranges(values: np.ndarray) -> dict[str, np.ndarray]:
    """Minimum, q01, median, q99 and maximum of each column of (n, D)."""
    q01, median, q99 = np.quantile(values, [0.01, 0.5, 0.99], axis=0)
    return {"min": values.min(0), "q01": q01, "median": median, "q99": q99, "max": values.max(0)}


def unit_guess(scale: float) -> str:
    """The pair of units whose ratio a factor is, in words."""
    known = {180 / np.pi: "degrees and radians", 1000.0: "millimetres and metres", 100.0: "centimetres and metres"}
    for factor, name in known.items():
        if 0.8 < max(scale, 1 / scale) / factor < 1.25:
            return name
    return "no usual pair of units"


def check_ranges(recording: Recording, grippers: list[int]) -> list[Finding]:
    """Findings about the numbers of actions and states."""
    actions, states = recording.all_actions, recording.all_states
    found = [
        *_dead(recording, actions),
        *_saturated(recording, actions, grippers),
        *_outliers(recording, grippers),
        *_clipping(recording, actions, grippers),
        *_tiny(recording, actions, grippers),
        *_state_units(recording, states),
        *_state_scale(recording),
    ]
    return found


def _dead(recording: Recording, actions: np.ndarray) -> list[Finding]:
    dead = np.flatnonzero(np.ptp(actions, axis=0) <= 1e-9 + 1e-6 * np.abs(actions).max(0))
    if not len(dead):
        return []
    return [
        Finding(
            "constant action dimensions",
            "high" if len(dead) == actions.shape[1] else "medium",
            {"dimensions": [recording.action_name(dim) for dim in dead], "values": actions[0, dead]},
            "The policy learns one value. If the robot needs that dimension, it was not recorded.",
            "Check that it is meant to be constant. Normalisation passes it on as it is.",
        )
    ]


def _saturated(recording: Recording, actions: np.ndarray, grippers: list[int]) -> list[Finding]:
    span = np.ptp(actions, axis=0)
    tolerance = 1e-6 * span
    share = ((actions >= actions.max(0) - tolerance) | (actions <= actions.min(0) + tolerance)).mean(0)
    few = [len(np.unique(np.round(actions[:, dim] / max(span[dim], 1e-12), 4))) < 8 for dim in range(len(span))]
    bad = [
        dim
        for dim in range(len(span))
        if share[dim] > 0.2 and span[dim] > 1e-9 and dim not in grippers and not few[dim]
    ]
    if not bad:
        return []
    return [
        Finding(
            "saturated action dimensions",
            "medium",
            {"share at an end": {recording.action_name(dim): share[dim] for dim in bad}},
            "The command was cut off: how far the teacher meant to move is lost.",
            "Raise the limit or lower the gain of the teleoperation.",
        )
    ]


def _outliers(recording: Recording, grippers: list[int]) -> list[Finding]:
    findings = []
    for what, values, names in (
        ("actions", recording.all_actions, recording.action_name),
        ("states", recording.all_states, recording.state_name),
    ):
        numbers = ranges(values)
        width = np.maximum(numbers["q99"] - numbers["q01"], 1e-12)
        beyond = np.maximum(numbers["max"] - numbers["q99"], numbers["q01"] - numbers["min"]) / width
        skipped = grippers if what == "actions" else []
        is_constant = width < 1e-4 * np.maximum(np.ptp(values, axis=0), 1e-9)
        bad = [dim for dim in np.flatnonzero((beyond > 5) & ~is_constant) if dim not in skipped]
        if not bad:
            continue
        outside = ((values > numbers["q99"] + 5 * width) | (values < numbers["q01"] - 5 * width))[:, bad].any(1)
        owners = np.repeat(recording.numbers, [len(actions) for actions in recording.actions])
        findings.append(
            Finding(
                f"outliers in the {what}",
                "medium",
                {"ranges beyond q01 to q99": {names(dim): beyond[dim] for dim in bad}, "steps": int(outside.sum())},
                "With bounds as limits they squeeze everything else; with q01 and q99 they are clipped.",
                "Look at these steps: lost packets and jumps of a sensor look like that. Prefer norm_type bounds_q99.",
                np.unique(owners[outside]).tolist(),
            )
        )
    return findings


def clipping_cost(actions: np.ndarray) -> np.ndarray:
    """By dimension, the share of the motion that clipping to q01 and q99 takes away."""
    low, high = np.quantile(actions, [0.01, 0.99], axis=0)
    lost = np.abs(actions - np.clip(actions, low, high)).sum(0)
    return lost / np.maximum(np.abs(actions - np.median(actions, axis=0)).sum(0), 1e-12)


def _clipping(recording: Recording, actions: np.ndarray, grippers: list[int]) -> list[Finding]:
    cost = clipping_cost(actions)
    live = np.ptp(actions, axis=0) > 1e-9
    bad = [dim for dim in np.flatnonzero((cost > 0.15) & live) if dim not in grippers]
    if not bad:
        return []
    return [
        Finding(
            "q01 and q99 cut off motion",
            "medium",
            {"share of motion lost": {recording.action_name(dim): cost[dim] for dim in bad}},
            "These dimensions move rarely but far. Clipped to q01 and q99, the policy never moves them that far.",
            "Train with --norm_type bounds if the large values are real.",
        )
    ]


def _tiny(recording: Recording, actions: np.ndarray, grippers: list[int]) -> list[Finding]:
    low, high = np.quantile(actions, [0.01, 0.99], axis=0)
    live = [dim for dim in range(actions.shape[1]) if dim not in grippers and np.ptp(actions[:, dim]) > 1e-9]
    if len(live) < 3:
        return []
    width = high - low
    usual = float(np.median(width[live]))
    bad = [dim for dim in live if 0 < width[dim] < 0.005 * usual or (width[dim] <= 0 < usual)]
    if not bad:
        return []
    return [
        Finding(
            "tiny action ranges",
            "medium",
            {"q99 - q01": {recording.action_name(dim): width[dim] for dim in bad}, "usual": usual},
            "Normalisation stretches them to -1 to 1, so their noise weighs as much as real motion.",
            "Set the dimension to a constant, or leave it out.",
        )
    ]


def _state_units(recording: Recording, states: np.ndarray) -> list[Finding]:
    high = np.quantile(np.abs(states), 0.99, axis=0)
    large = np.flatnonzero(high > 7.0)
    if not len(large):
        return []
    return [
        Finding(
            "states are not in metres and radians",
            "low",
            {"99th percentile": {recording.state_name(dim): high[dim] for dim in large}},
            "Nothing, if the robot gives the same numbers: degrees, millimetres and encoder ticks are normalised too.",
            "Make sure that the robot's driver gives the same units.",
        )
    ]


def _state_scale(recording: Recording) -> list[Finding]:
    """Episodes whose states are many times larger or smaller than those of the others."""
    sizes = np.array([np.abs(states).mean(0) for _, states, _ in recording.episodes()])
    numbers = np.array([recording.numbers[position] for position, _, _ in recording.episodes()])
    usual = np.median(sizes, axis=0)
    live = usual > 1e-6
    if len(sizes) < 4 or not live.any():
        return []
    ratio = np.median(sizes[:, live] / usual[live], axis=1)
    odd = (ratio > 10) | (ratio < 0.1)
    if not odd.any():
        return []
    return [
        Finding(
            "units of the state differ between episodes",
            "high",
            {"episodes": int(odd.sum()), "of": len(sizes), "factor": float(np.median(ratio[odd]))},
            "The policy's proprio is wrong by that factor in these episodes.",
            "Convert these episodes to the units of the others.",
            numbers[odd].tolist(),
        )
    ]
