"""Norm stats of a dataset: what normalises its states and actions, by the rules of the published models.

They hold `min`, `max`, `mean`, the population's `std`, and NumPy's linear quantiles `q01` and `q99`. They cover every
transition whose numbers can be read: all splits, before chunking, episodes without an instruction included, after the
robot's gripper convention.

If a dataset stores action chunks, the actions of all its chunks are used instead of the rows' own. A model learns the
chunks, so every target then lies within `min` and `max`. The rows' own actions leave out what was executed between two
rows. An action counts as often as it is learnt from: with chunks of 8 every 4 steps, twice, and once at the ends of an
episode. `num_transitions` is the number of rows, which is the number of samples.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from tqdm.auto import tqdm

from vla_adapter_hf.data.columns import Columns
from vla_adapter_hf.data.episodes import BAD_EPISODE_HINT, BadEpisodeError, EpisodeTable, check_on_bad_episode
from vla_adapter_hf.data.source import DemonstrationSource
from vla_adapter_hf.data.storage import cache_directory
from vla_adapter_hf.utils.files import write_json


logger = logging.getLogger(__name__)

_RULES_VERSION = 1  # part of the cache key: change it with the rules below, so that old results are not found
_BLOCK = 1 << 16  # steps added up at a time


class HasSource(Protocol):
    """A dataset with random access."""

    source: DemonstrationSource
    unnorm_key: str
    action_mask: Sequence[bool] | None


class HasName(Protocol):
    """A reader or a source."""

    name: str
    where: str
    columns: Columns


def column_statistics(values: np.ndarray, progress: tqdm | None = None) -> dict[str, list[float]]:
    """Statistics of every column of float32 (steps, dims).

    Mean and standard deviation are added up in float64 and rounded to float32; the quantiles are exact and computed a
    column at a time, so that a million steps need 16 MB beyond the values themselves.

    Raises:
        ValueError: no steps.
    """
    if len(values) == 0:
        raise ValueError("statistics of no steps at all; the dataset has no readable episode")
    blocks = [values[start : start + _BLOCK] for start in range(0, len(values), _BLOCK)]
    mean = sum(block.sum(axis=0, dtype=np.float64) for block in blocks) / len(values)
    squares = sum(np.square(block - mean).sum(axis=0) for block in blocks) / len(values)
    quantiles = []
    for column in range(values.shape[1]):
        # In float64, as on the Python floats of the published files; float32 would round the interpolation.
        quantiles.append(np.quantile(values[:, column].astype(np.float64), [0.01, 0.99], overwrite_input=True))
        if progress is not None:
            progress.update(len(values))
    return {
        "mean": mean.astype(np.float32).tolist(),
        "std": np.sqrt(squares).astype(np.float32).tolist(),
        "max": values.max(axis=0).tolist(),
        "min": values.min(axis=0).tolist(),
        "q01": [float(low) for low, _ in quantiles],
        "q99": [float(high) for _, high in quantiles],
    }


def check_action_mask(mask: Sequence[bool], action_dim: int, where: str) -> list[bool]:
    """An action mask as a list of booleans.

    Raises:
        TypeError: entries that are not booleans.
        ValueError: not one entry per action dimension.
    """
    entries = list(mask)
    if not all(isinstance(entry, (bool, np.bool_)) for entry in entries):
        raise TypeError(f"{where}: action_mask={entries}; expected booleans, true where a dimension is normalised")
    if len(entries) != action_dim:
        raise ValueError(f"{where}: action_mask has {len(entries)} entries, the actions have {action_dim} dimensions")
    return [bool(entry) for entry in entries]


def compute_norm_stats(
    dataset: HasSource | DemonstrationSource,
    unnorm_key: str | None = None,
    action_mask: Sequence[bool] | None = None,
    on_bad_episode: str = "error",
    use_cache: bool = True,
    cache_dir: str | os.PathLike | None = None,
    progress: bool | None = None,
) -> dict[str, dict[str, Any]]:
    """Norm stats of a dataset, in the layout of a checkpoint's `norm_stats`.

    The result is cached under a hash of the content of the data files and of the conventions applied, so a dataset
    whose files did not change is not read again. Quantiles stored in a LeRobot v3.0 dataset are never used: they are
    averages of the episodes' quantiles.

    Args:
        dataset: a dataset, or its source.
        unnorm_key: the key; by default the dataset's own.
        action_mask: for each action dimension whether it is normalised; by default the dataset's or its robot's, else
            all are.
        on_bad_episode: `"error"`, or `"skip"` to leave out episodes whose states or actions cannot be used.
        use_cache: look in the cache, and store the result there.
        cache_dir: see `storage.cache_directory`.
        progress: show a progress bar; by default where standard error is a terminal.

    Returns:
        `{key: {"action": {"mean", "std", "max", "min", "q01", "q99", "mask"}, "proprio": {... without mask},
        "num_transitions", "num_trajectories"}}`, plain numbers and lists.

    Raises:
        BadEpisodeError: an episode whose numbers cannot be used, with `on_bad_episode="error"`.
        TypeError, ValueError: a mask that does not fit the actions; no readable episode.
    """
    check_on_bad_episode(on_bad_episode)
    source = dataset if isinstance(dataset, DemonstrationSource) else dataset.source
    if source is not dataset:
        action_mask = dataset.action_mask if action_mask is None else action_mask
        unnorm_key = dataset.unnorm_key if unnorm_key is None else unnorm_key
    entry = None
    path = None
    if use_cache:
        name = hashlib.blake2b(f"{_RULES_VERSION}:{source.fingerprint()}".encode(), digest_size=20).hexdigest()
        path = cache_directory(cache_dir) / "norm_stats" / f"{name}.json"
        try:
            entry = json.loads(path.read_text())
        except (OSError, ValueError):
            entry = None  # not there or not readable
    if entry is None:
        entry = table_statistics(source.table, source, on_bad_episode, progress)
        # With bad episodes the hash may be that of files before and after they were repaired.
        if path is not None and not source.table.problems:
            write_json(path, entry, indent=None)
    return with_key_and_mask(entry, source, unnorm_key, action_mask)


def table_statistics(
    table: EpisodeTable, named: HasName, on_bad_episode: str = "error", progress: bool | None = None
) -> dict[str, Any]:
    """The statistics of all episodes of a table, without key and mask; see `compute_norm_stats`."""
    if table.problems and on_bad_episode == "error":
        raise BadEpisodeError(named.where, list(table.problems.values()), BAD_EPISODE_HINT)
    if table.problems:
        first = next(iter(table.problems.values()))
        logger.warning("%s: statistics leave out %d episodes, the first: %s", named.where, len(table.problems), first)
    states, actions = table.states, table.learnt_actions
    if len(actions) == 0:
        raise ValueError(f"{named.where}: there is no readable episode to compute statistics from")
    with tqdm(
        total=states.size + actions.size,
        desc=f"Statistics of {named.name}",
        unit="value",
        unit_scale=True,
        disable=None if progress is None else not progress,
    ) as bar:
        return {
            "action": column_statistics(actions, bar),
            "proprio": column_statistics(states, bar),
            "num_transitions": len(table.actions),
            "num_trajectories": len(table) - len(table.problems),
        }


def with_key_and_mask(
    entry: dict[str, Any], named: HasName, unnorm_key: str | None, action_mask: Sequence[bool] | None
) -> dict[str, dict[str, Any]]:
    """Statistics in the layout of `norm_stats`; the mask is by default the robot's, else all dimensions'."""
    robot = named.columns.robot
    action_dim = len(entry["action"]["mean"])
    if action_mask is None:
        action_mask = robot.action_mask if robot is not None else [True] * action_dim
    mask = check_action_mask(action_mask, action_dim, named.where)
    return {unnorm_key or named.name: {**entry, "action": {**entry["action"], "mask": mask}}}


def describe_norm_stats(
    norm_stats: dict[str, dict[str, Any]],
    action_names: Sequence[str] | None = None,
    state_names: Sequence[str] | None = None,
) -> str:
    """Norm stats as a table for people, a line per dimension, with its name where names are given."""
    lines = []
    names = {"action": action_names or (), "proprio": state_names or ()}
    width = 1 + max([13, *(len(f"{part} {name}") for part in names for name in names[part])])
    for key, entry in norm_stats.items():
        lines.append(f"{key}: {entry['num_transitions']} transitions in {entry['num_trajectories']} trajectories")
        columns = ("min", "q01", "mean", "q99", "max", "std")
        lines.append(" " * width + "".join(f"{column:>11}" for column in columns))
        for part in ("action", "proprio"):
            stats = entry[part]
            for dimension in range(len(stats["mean"])):
                notes = []
                if not stats.get("mask", [True] * (dimension + 1))[dimension]:
                    notes.append("not normalised")
                if stats["min"][dimension] == stats["max"][dimension]:
                    notes.append("constant")
                label = f"{part}[{dimension}]"
                if len(names[part]) == len(stats["mean"]):
                    label = f"{part} {names[part][dimension]}"
                values = "".join(f"{stats[column][dimension]:11.4f}" for column in columns)
                lines.append(f"{label:{width}}{values}  {', '.join(notes)}".rstrip())
    return "\n".join(lines)
