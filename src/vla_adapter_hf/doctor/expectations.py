"""What a checkpoint expects against what a dataset holds: ranges, units, sizes, names, frame rate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vla_adapter_hf.doctor.findings import Finding
from vla_adapter_hf.doctor.gripper import is_binary
from vla_adapter_hf.doctor.ranges import unit_guess
from vla_adapter_hf.robots import is_zero_to_one, learnt_range


PARTS = {"action": "actions", "proprio": "states"}
OUTSIDE = 0.3  # share of values outside a checkpoint's range from which on a dimension has another range
APART = 3.0  # ratio of widths from which on the units may be others


def distance(stats: dict[str, Any], data: dict[str, Any]) -> float:
    """How far the ranges of two sets of statistics are apart: 1 - overlap, the mean over dimensions; 0 if equal."""
    overlaps = []
    for part in PARTS:
        mine, theirs = (_range(entry[part]) for entry in (stats, data))
        if mine.shape != theirs.shape:
            return 1.0
        both = np.minimum(mine[1], theirs[1]) - np.maximum(mine[0], theirs[0])
        either = np.maximum(mine[1], theirs[1]) - np.minimum(mine[0], theirs[0])
        overlaps.append(np.where(either > 1e-9, np.maximum(both, 0) / np.maximum(either, 1e-9), 1.0))
    return float(1 - np.concatenate(overlaps).mean())


def _range(stats: dict[str, Any]) -> np.ndarray:
    """(2, D): q01 and q99, or what there is instead of them."""
    if "q01" in stats and "q99" in stats:
        return np.asarray([stats["q01"], stats["q99"]], np.float64)
    if "min" in stats and "max" in stats:
        return np.asarray([stats["min"], stats["max"]], np.float64)
    mean, std = (np.asarray(stats[name], np.float64) for name in ("mean", "std"))
    return np.stack([mean - 2.3 * std, mean + 2.3 * std])


def choose_key(norm_stats: dict[str, Any], given: str | None, data: dict[str, Any], name: str) -> str:
    """The statistics to use: those that were named, else the dataset's own name, else those that fit it best."""
    if given is not None:
        return given
    if name in norm_stats:
        return name
    return min(norm_stats, key=lambda key: distance(norm_stats[key], data))


def check_statistics(
    norm_stats: dict[str, Any],
    key: str,
    data: dict[str, Any],
    values: dict[str, np.ndarray],
    names: dict[str, Sequence[str]],
) -> list[Finding]:
    """Findings about a checkpoint's statistics `key` against a dataset.

    Args:
        norm_stats: all statistics of the checkpoint, by key.
        key: the ones that are used.
        data: statistics of the dataset.
        values: `"action"` and `"proprio"`, (n, D) of the dataset.
        names: of the dimensions, likewise.
    """
    findings = _wrong_key(norm_stats, key, data)
    for part, what in PARTS.items():
        findings += _ranges(norm_stats[key][part], values[part], names[part], what)
    return findings


def _wrong_key(norm_stats: dict[str, Any], key: str, data: dict[str, Any]) -> list[Finding]:
    apart = {name: distance(entry, data) for name, entry in norm_stats.items()}
    best = min(apart, key=apart.get)
    if best == key or apart[key] < apart[best] + 0.15:
        return []
    return [
        Finding(
            "other statistics of the checkpoint fit better",
            "high",
            {"unnorm_key": key, "fits better": best, "distance of the ranges": apart},
            "States and actions are scaled by the numbers of another robot or task.",
            f"Use --unnorm-key {best}, or find out which data the policy is meant for.",
        )
    ]


def _ranges(stats: dict[str, Any], values: np.ndarray, names: Sequence[str], what: str) -> list[Finding]:
    low, high = _range(stats)
    width = high - low
    margin = np.maximum(0.1 * width, 1e-6)
    outside = ((values < low - margin) | (values > high + margin)).mean(0)
    own_low, own_high = np.quantile(values, [0.01, 0.99], axis=0)
    wide = np.maximum(own_high - own_low, 1e-9) / np.maximum(width, 1e-9)
    live = (width > 1e-6) & (own_high - own_low > 1e-6)
    off = live & ((wide > APART) | (wide < 1 / APART))
    if off.sum() >= max(2, 0.5 * live.sum()):
        factor = float(np.median(wide[off]))
        return [
            Finding(
                f"{what} are in other units than the policy's",
                "high",
                {"range here per range in training": {names[dim]: wide[dim] for dim in np.flatnonzero(off)},
                 "guess": unit_guess(factor)},
                "The policy reads and writes numbers that mean something else.",
                "Convert the data to the units of the training, or use the statistics of this data.",
            )
        ]  # fmt: skip
    shifted = np.flatnonzero((outside > OUTSIDE) & (live | (width <= 1e-6)))
    if not len(shifted):
        return []
    return [
        Finding(
            f"{what} lie outside the range that the policy knows",
            "high" if (outside[shifted] > 0.8).any() else "medium",
            {
                "share outside": {names[dim]: outside[dim] for dim in shifted},
                "q01 and q99 of the policy": {names[dim]: [low[dim], high[dim]] for dim in shifted},
                "here": {names[dim]: [own_low[dim], own_high[dim]] for dim in shifted},
            },
            "Values outside are cut to the ends of the range, so the policy cannot tell them apart.",
            "Check the zero and the sign of these dimensions, the robot preset and the unnorm_key.",
        )
    ]


def check_conventions(
    config: Any, dataset: Any, frames_are_jpeg: bool, sizes: dict[str, tuple[int, int]]
) -> list[Finding]:
    """Findings about names, frame rate, JPEG and frame sizes of a dataset against a checkpoint's configuration.

    Args:
        config: the checkpoint's `VLAAdapterConfig`.
        dataset: a `VLAAdapterDataset`.
        frames_are_jpeg: whether the dataset's frames are stored as JPEG.
        sizes: by camera, height and width of its frames.
    """
    findings = []
    for what in ("action_names", "state_names"):
        theirs, mine = getattr(dataset, what), getattr(config, what)
        if theirs and mine and list(theirs) != list(mine):
            findings.append(
                Finding(
                    f"other {what.replace('_', ' ')} than the policy's",
                    "high" if sorted(theirs) == sorted(mine) else "medium",
                    {"policy": list(mine), "data": list(theirs)},
                    "The dimensions may mean something else, or come in another order.",
                    "Bring the dimensions into the policy's order, or rename them if they mean the same.",
                )
            )
    if dataset.fps and config.fps and abs(dataset.fps / config.fps - 1) > 0.05:
        findings.append(
            Finding(
                "another frame rate than the policy's",
                "medium",
                {"policy": config.fps, "data": dataset.fps},
                "A chunk covers another time, and deltas of one step have another size.",
                "Record or run the policy at the rate of its training.",
            )
        )
    if frames_are_jpeg != bool(config.image_jpeg_round_trip):
        findings.append(
            Finding(
                "frames are JPEG here and were not in training"
                if frames_are_jpeg
                else "frames were JPEG in training and are not here",
                "low",
                {"image_jpeg_round_trip of the policy": bool(config.image_jpeg_round_trip)},
                "The policy sees small differences that it did not see in training.",
                "Nothing here. On the robot the processor imitates the frames of the training by itself.",
            )
        )
    small = {camera: f"{width} x {height}" for camera, (height, width) in sizes.items()
             if min(height, width) < 0.5 * config.image_size}  # fmt: skip
    if small:
        findings.append(
            Finding(
                "frames are much smaller than the policy's",
                "medium",
                {"frames": small, "the policy sees": f"{config.image_size} x {config.image_size}"},
                "They are enlarged, and details that the policy may need are not there.",
                "Record larger frames.",
            )
        )
    return findings


def check_gripper_convention(stats: Mapping[str, Any], actions: np.ndarray) -> list[Finding]:
    """A gripper that the policy learnt with other numbers than those of a dataset.

    Args:
        stats: of the checkpoint's actions; the mask is false for dimensions that are not normalised.
        actions: (n, A) of the dataset, as the chosen robot preset has them.
    """
    for dim in np.flatnonzero(~np.asarray(stats.get("mask") or [True], bool)):
        learnt = learnt_range(stats, dim) or (0.0, 1.0)
        ends, width = np.array([actions[:, dim].min(), actions[:, dim].max()]), max(learnt[1] - learnt[0], 1e-6)
        outside = max(learnt[0] - ends[0], ends[1] - learnt[1]) > 0.05 * width
        # Two values, one of which is far from both ends: 0 and 1 where -1 and 1 were learnt.
        between = np.abs(ends[:, None] - learnt).min(1).max() > 0.25 * width and is_binary(actions[:, dim])
        if outside or between:
            return [
                Finding(
                    "the gripper is written in another way than the policy's",
                    "high",
                    {"range here": ends, "range that the policy learnt": list(learnt)},
                    "Its predictions of the gripper cannot be compared, and on a robot they open and close wrongly.",
                    "Give the robot preset of the recording, such as --robot libero."
                    if is_zero_to_one(learnt)
                    else "Bring the gripper of the recording into the range that the policy learnt.",
                )
            ]
    return []
