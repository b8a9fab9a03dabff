"""From physical units to the model's normalised space and back, in float64 on the host.

The formulas are those of the published models. `state` and physical `actions` are in the robot's units. `proprio` and
normalised actions are what the network takes and returns.
"""

from typing import Any

import numpy as np


NORM_TYPES = ("bounds_q99", "bounds", "normal")
CONSTANT_DIM_RULES = ("zero", "published")
# The two statistics that each type uses: low and high, or mean and standard deviation.
USED_STATISTICS = {"bounds_q99": ("q01", "q99"), "bounds": ("min", "max"), "normal": ("mean", "std")}
# Keeps the division finite where a dimension does not move. It is part of the published formula in both directions.
EPSILON = 1e-8
# How far a rotation may jump while the robot hardly moves, from -pi to pi.
ANGLE_JUMP = 2 * np.pi


def normalize(
    values: np.ndarray, stats: dict[str, Any], norm_type: str = "bounds_q99", constant_dims: str = "zero"
) -> np.ndarray:
    """Physical units to normalised space, along the last axis.

    Bounds: `clip(2 (x - low) / (high - low + 1e-8) - 1, -1, 1)`. Normal: `(x - mean) / (std + 1e-8)`, not clipped.
    Dimensions where `stats["mask"]` is false are not changed.

    Args:
        values (`np.ndarray`): `(..., dims)`, states or actions in physical units.
        stats (`dict`): the `"action"` or `"proprio"` part of a set of norm stats.
        norm_type (`str`): `"bounds_q99"`, `"bounds"` or `"normal"`.
        constant_dims (`str`): `"zero"` maps normalised dimensions whose min equals their max to 0. `"published"`
            applies the formula to them, as the original code does at inference, which gives -1.

    Returns:
        `np.ndarray`: float64, of the same shape.
    """
    values = _as_float64(values, stats)
    first, second, mask, constant = _prepared(stats, norm_type, constant_dims)
    if norm_type == "normal":
        normalized = (values - first) / (second + EPSILON)
    else:
        normalized = np.clip(2 * (values - first) / (second - first + EPSILON) - 1, -1, 1)
    normalized = np.where(constant, 0.0, normalized)
    return np.where(mask, normalized, values)


def unnormalize(
    values: np.ndarray, stats: dict[str, Any], norm_type: str = "bounds_q99", constant_dims: str = "zero"
) -> np.ndarray:
    """Normalised space to physical units, along the last axis: the inverse of [`normalize`] within its bounds.

    Bounds: `0.5 (x + 1) (high - low + 1e-8) + low`. Normal: `x (std + 1e-8) + mean`. Values are not clipped first, as
    in the original. Dimensions where the mask is false (the gripper) are not changed. With `constant_dims="zero"` a
    constant dimension becomes its constant, whatever the network returned.

    Returns:
        `np.ndarray`: float64, of the same shape.
    """
    values = _as_float64(values, stats)
    first, second, mask, constant = _prepared(stats, norm_type, constant_dims)
    if norm_type == "normal":
        physical = values * (second + EPSILON) + first
    else:
        physical = 0.5 * (values + 1) * (second - first + EPSILON) + first
    if constant.any():
        physical = np.where(constant, np.asarray(stats["min"], dtype=np.float64), physical)
    return np.where(mask, physical, values)


def find_out_of_range(states: np.ndarray, stats: dict[str, Any]) -> list[tuple[int, float, float, float]]:
    """Dimensions of states that are far outside the range of the training data, as after a mistake of units.

    Far means: farther from the range than the range is wide, and farther than [`ANGLE_JUMP`]. States of held-out
    episodes leave the range by less. Far is also a value next to 0 where the range is not: below a fiftieth of the
    nearer bound, for a range that is no wider than twice that bound (0.4 m where the model knows 200 to 600 mm).
    Values of a wrong unit that fall into the range (metres for millimetres around 0) cannot be found.

    The range is minimum to maximum; without these the 1st to the 99th percentile, or three standard deviations around
    the mean.

    Args:
        states (`np.ndarray`): `(batch, dims)` in physical units.
        stats (`dict`): the `"proprio"` part of a set of norm stats.

    Returns:
        `list`: per such dimension its index, the value that is farthest, and the range's lower and upper bound.
    """
    low, high = _recorded_range(stats)
    distance = np.maximum(low - states, states - high)  # (batch, dims)
    rows = distance.argmax(axis=0)
    is_far = distance.max(axis=0) > np.maximum(high - low, ANGLE_JUMP)
    nearer = np.minimum(np.abs(low), np.abs(high))
    excludes_zero = (low * high > 0) & (high - low <= 2 * nearer)
    is_far |= excludes_zero & (np.abs(states).min(axis=0) < nearer / 50)
    return [
        (int(dim), float(states[rows[dim], dim]), float(low[dim]), float(high[dim])) for dim in np.flatnonzero(is_far)
    ]


def _recorded_range(stats: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    for low, high in (("min", "max"), ("q01", "q99")):
        if low in stats and high in stats:
            return np.asarray(stats[low], dtype=np.float64), np.asarray(stats[high], dtype=np.float64)
    mean, std = (np.asarray(stats[name], dtype=np.float64) for name in ("mean", "std"))
    return mean - 3 * std, mean + 3 * std


def select_norm_stats(norm_stats: dict[str, Any] | None, unnorm_key: str | None) -> tuple[str, dict[str, Any]]:
    """The set of statistics with the name `unnorm_key`.

    The key is not needed if there is one set only. `libero_object` finds `libero_object_no_noops`, the name of the
    published LIBERO statistics.

    Returns:
        `tuple[str, dict]`: the key as stored, and its statistics.

    Raises:
        ValueError: without statistics, or when the key is missing or unknown; the message lists the keys.
    """
    if not norm_stats:
        raise ValueError(
            "The model has no norm_stats, so it cannot convert physical units: train it with statistics, or pass "
            "norm_stats={...} to from_pretrained."
        )
    keys = ", ".join(sorted(norm_stats))
    if unnorm_key is not None and not isinstance(unnorm_key, str):
        raise TypeError(f"unnorm_key must be one key, a string, got {unnorm_key!r}; the model has: {keys}.")
    if unnorm_key is None:
        if len(norm_stats) > 1:
            raise ValueError(f"unnorm_key is needed, because the model has several sets of norm_stats: {keys}.")
        return next(iter(norm_stats.items()))
    for key in (unnorm_key, f"{unnorm_key}_no_noops"):
        if key in norm_stats:
            return key, norm_stats[key]
    raise ValueError(f"unnorm_key={unnorm_key!r} is not in the model's norm_stats, which has: {keys}.")


def check_norm_stats(
    norm_stats: Any, norm_type: str, action_dim: int, proprio_dim: int, constant_dims: str = "zero"
) -> None:
    """Refuse statistics that are incomplete, of the wrong length, not finite, or with a lower bound above the upper.

    Raises:
        TypeError, ValueError: naming the entry, what came and what was expected.
    """
    if not isinstance(norm_stats, dict):
        raise TypeError(f"norm_stats must be a dict of sets of statistics by key, got {type(norm_stats).__name__}.")
    for key, entry in norm_stats.items():
        for part, dims in (("action", action_dim), ("proprio", proprio_dim)):
            name = f"norm_stats[{key!r}][{part!r}]"
            if not isinstance(entry, dict) or not isinstance(entry.get(part), dict):
                raise ValueError(f"{name} is missing; a set of statistics needs 'action' and 'proprio'.")
            _check_part(name, entry[part], norm_type, constant_dims, dims, f"{part}_dim")


def _check_part(name: str, stats: dict[str, Any], norm_type: str, constant_dims: str, dims: int, field: str) -> None:
    used = USED_STATISTICS[norm_type]
    needed = [(statistic, f"norm_type={norm_type!r}") for statistic in used]
    if constant_dims == "zero":
        needed += [(statistic, f"constant_dims={constant_dims!r}") for statistic in ("min", "max")]
    for statistic, reader in needed:
        if statistic not in stats:
            raise ValueError(f"{name} lacks {statistic!r}, which {reader} needs; it has {sorted(stats)}.")
    for statistic in ("min", "max", "mean", "std", "q01", "q99", "mask"):
        if statistic not in stats:
            continue
        values = np.asarray(stats[statistic])
        if values.shape != (dims,):
            raise ValueError(
                f"{name}[{statistic!r}] has shape {values.shape}, but {field}={dims}. Give statistics of this robot "
                "(norm_stats=...) or set the size that they are for."
            )
        if statistic == "mask":
            if values.dtype != bool:
                raise TypeError(f"{name}['mask'] must hold booleans, got {stats['mask']!r}.")
        elif not np.issubdtype(values.dtype, np.number) or not np.isfinite(values.astype(np.float64)).all():
            raise ValueError(f"{name}[{statistic!r}] must hold finite numbers, got {stats[statistic]!r}.")
    for low, high in (("mean", "std"), ("q01", "q99"), ("min", "max")):
        if low not in stats or high not in stats:
            continue
        first, second = (np.asarray(stats[statistic], np.float64) for statistic in (low, high))
        wrong = second < 0 if high == "std" else second < first
        if wrong.any():
            index = int(np.argmax(wrong))
            expected = "std must not be negative" if high == "std" else f"{low} must not exceed {high}"
            raise ValueError(f"{name}: {expected}, but dimension {index} has {first[index]} and {second[index]}.")


def _as_float64(values: np.ndarray, stats: dict[str, Any]) -> np.ndarray:
    values = np.asarray(values, dtype=np.float64)
    dims = len(next(iter(stats.values())))
    if values.shape[-1:] != (dims,):
        # Otherwise a (batch, 1) array would be broadcast against the statistics and be taken for a state.
        raise ValueError(f"values have shape {values.shape}, but the statistics are for {dims} dimensions.")
    return values


def _prepared(stats: dict[str, Any], norm_type: str, constant_dims: str) -> tuple[np.ndarray, ...]:
    first, second = (np.asarray(stats[name], dtype=np.float64) for name in USED_STATISTICS[norm_type])
    mask = np.asarray(stats.get("mask", np.ones(first.shape, dtype=bool)))
    constant = np.zeros(first.shape, dtype=bool)
    if constant_dims == "zero":
        constant = np.asarray(stats["min"], np.float64) == np.asarray(stats["max"], np.float64)
    return first, second, mask, constant


__all__ = ["normalize", "unnormalize", "find_out_of_range", "select_norm_stats", "check_norm_stats"]
