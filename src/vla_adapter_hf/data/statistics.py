"""Norm stats of a dataset: what normalises its states and actions, by the rules of the published models.

They cover every transition whose numbers can be read, of all splits, before chunking, unlabelled episodes included,
after the robot's gripper convention: `min`, `max`, `mean`, the population's `std`, and NumPy's linear quantiles `q01`
and `q99`.

Where a dataset stores action chunks, the actions of all its chunks take the place of the rows' own. They are what is
learnt, so every target lies within `min` and `max`; the rows' own are a fraction of them, and an action executed only
between two rows would be missing. An executed action counts as often as it is learnt from: in chunks of 8 every 4
steps twice, at the ends of an episode once. `num_transitions` remains the number of rows, which is that of the samples.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm.auto import tqdm

from vla_adapter_hf.data.episodes import BadEpisodeError, check_on_bad_episode
from vla_adapter_hf.data.source import DemonstrationSource
from vla_adapter_hf.data.storage import cache_directory
from vla_adapter_hf.utils.files import write_json


if TYPE_CHECKING:
    from vla_adapter_hf.data.dataset import VLAAdapterDataset

logger = logging.getLogger(__name__)

_RULES_VERSION = 1  # part of the cache key: a change of the rules below must not find old results
_BLOCK = 1 << 16  # steps added up at a time


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
    dataset: VLAAdapterDataset | DemonstrationSource,
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
        dataset: a dataset, or the source below it.
        unnorm_key: the key; by default the dataset's own.
        action_mask: for each action dimension whether it is normalised; by default the dataset's or its robot's, else
            all.
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
    if action_mask is None:
        action_mask = getattr(dataset, "action_mask", None) or (source.robot.action_mask if source.robot else None)
    if unnorm_key is None:
        unnorm_key = source.name if isinstance(dataset, DemonstrationSource) else dataset.unnorm_key
    entry = None
    path = None
    if use_cache:
        name = hashlib.blake2b(f"{_RULES_VERSION}:{source.fingerprint()}".encode(), digest_size=20).hexdigest()
        path = cache_directory(cache_dir) / "norm_stats" / f"{name}.json"
        try:
            entry = json.loads(path.read_text())
        except (OSError, ValueError):
            entry = None  # not there, or not readable: made again below
    if entry is None:
        table = source.table
        if table.problems and on_bad_episode == "error":
            raise BadEpisodeError(
                source.where, list(table.problems.values()), 'Mend the dataset or pass on_bad_episode="skip"'
            )
        if table.problems:
            first = next(iter(table.problems.values()))
            logger.warning(
                "%s: statistics leave out %d episodes, the first: %s", source.where, len(table.problems), first
            )
        entry = _norm_stats_of(table.states, table.learnt_actions, source, progress)
        entry["num_transitions"] = len(table.actions)
        entry["num_trajectories"] = len(table) - len(table.problems)
        # With bad episodes the hash may be that of files before and after they were mended.
        if path is not None and not table.problems:
            write_json(path, entry, indent=None)
    action_dim = len(entry["action"]["mean"])
    mask = check_action_mask(action_mask if action_mask is not None else [True] * action_dim, action_dim, source.where)
    return {
        unnorm_key: {
            "action": {**entry["action"], "mask": mask},
            "proprio": entry["proprio"],
            "num_transitions": entry["num_transitions"],
            "num_trajectories": entry["num_trajectories"],
        }
    }


def _norm_stats_of(
    states: np.ndarray, actions: np.ndarray, source: DemonstrationSource, progress: bool | None
) -> dict[str, Any]:
    if len(actions) == 0:
        raise ValueError(f"{source.where}: there is no readable episode to compute statistics from")
    with tqdm(
        total=states.size + actions.size,
        desc=f"Statistics of {source.name}",
        unit="value",
        unit_scale=True,
        disable=None if progress is None else not progress,
    ) as bar:
        return {"action": column_statistics(actions, bar), "proprio": column_statistics(states, bar)}
