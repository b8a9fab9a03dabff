"""A dataset by its path alone: what the command line calls."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets

from vla_adapter_hf.data.chunks import CHUNK_COLUMN
from vla_adapter_hf.data.dataset import VLAAdapterDataset
from vla_adapter_hf.data.lerobot.metadata import read_lerobot_metadata
from vla_adapter_hf.data.lerobot.source import LeRobotSource
from vla_adapter_hf.data.rlds.files import find_version_folder, read_rlds_files
from vla_adapter_hf.data.rlds.source import RLDSSource
from vla_adapter_hf.data.source import DemonstrationSource
from vla_adapter_hf.data.statistics import compute_norm_stats
from vla_adapter_hf.data.storage import dataset_folder
from vla_adapter_hf.data.streaming import VLAAdapterStreamingDataset
from vla_adapter_hf.data.table import PlainSource, camera_columns
from vla_adapter_hf.robots import RobotPreset, get_robot
from vla_adapter_hf.utils.files import write_json


FORMATS = ("auto", "lerobot", "rlds", "dataset")


def detect_format(path: str | os.PathLike) -> str:
    """`"lerobot"`, `"rlds"` or `"dataset"` (saved with `save_to_disk`) of a folder; a repository id is LeRobot.

    Raises:
        ValueError: a folder that is none of these.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        return "lerobot"  # dataset_folder tells a repository id from a mistake
    if (folder / "meta" / "info.json").is_file():
        return "lerobot"
    if (folder / "state.json").is_file():
        return "dataset"
    try:
        find_version_folder(folder)
    except ValueError as error:
        if "several RLDS datasets" in str(error):
            return "rlds"
        raise ValueError(
            f"dataset {str(path)!r} is not recognised: no meta/info.json (LeRobot), no TFRecord shards (RLDS), "
            "no state.json "
            "(datasets.save_to_disk)"
        ) from None
    return "rlds"


def _format(path: str | os.PathLike, format: str) -> str:
    if format not in FORMATS:
        raise ValueError(f"format={format!r} is not known; use one of {', '.join(FORMATS)}")
    return detect_format(path) if format == "auto" else format


def load_demonstrations(
    path: str | os.PathLike, format: str = "auto", streaming: bool = False, **options: Any
) -> VLAAdapterDataset | VLAAdapterStreamingDataset:
    """Open the dataset at `path`, whatever its format.

    Args:
        path: a folder, or the id of a Hub dataset repository (LeRobot, or RLDS with `format="rlds"`).
        format: `"lerobot"`, `"rlds"`, `"dataset"` (a folder written by `datasets`' `save_to_disk`) or `"auto"`.
        streaming: return a `VLAAdapterStreamingDataset`.
        options: arguments of `from_lerobot`, `from_rlds` or `from_dataset`.

    Raises:
        ValueError: a format that is not known or not recognised, and what the reader refuses.
        TypeError: an option that this format does not have.
    """
    kind = _format(path, format)
    dataset_class = VLAAdapterStreamingDataset if streaming else VLAAdapterDataset
    make = {"lerobot": dataset_class.from_lerobot, "rlds": dataset_class.from_rlds}.get(
        kind, dataset_class.from_dataset
    )
    _check_options(path, kind, options, make, dataset_class)
    if kind != "dataset":
        return make(path, **options)
    rows = datasets.load_from_disk(os.fspath(path))
    options.setdefault("unnorm_key", Path(path).name)
    return make(rows.to_iterable_dataset() if streaming else rows, **options)


def _check_options(path: str | os.PathLike, kind: str, options: dict[str, Any], *functions: Callable) -> None:
    known = {name for function in functions for name in inspect.signature(function).parameters}
    unknown = [name for name in options if name not in known]
    if unknown:
        choices = sorted(known - {"path", "dataset", "source", "stream", "options"})
        raise TypeError(
            f"dataset {str(path)!r} has format {kind!r}, which has no {', '.join(unknown)}; it has {', '.join(choices)}"
        )


def open_source(
    path: str | os.PathLike,
    format: str = "auto",
    robot: str | RobotPreset | None = None,
    state_column: str | None = None,
    action_column: str | None = None,
    name: str | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike | None = None,
    progress: bool | None = None,
    chunk_column: str | None = CHUNK_COLUMN,
) -> DemonstrationSource:
    """The recorded numbers of a dataset, for which cameras need not be chosen and no frame is read.

    Args as for `VLAAdapterDataset.from_lerobot` and `from_rlds`.
    """
    kind = _format(path, format)
    preset = get_robot(robot) if robot is not None else None
    if kind == "lerobot":
        # Of a Hub dataset only metadata and parquet files: no video.
        folder = dataset_folder(path, revision, ("meta/**", "data/**"))
        cameras = read_lerobot_metadata(folder).camera_columns
        own_name = os.fspath(path).rstrip("/").rsplit("/", 1)[-1]
        return LeRobotSource(
            folder,
            cameras,
            preset,
            state_column,
            action_column,
            name=own_name,
            cache_dir=cache_dir,
            progress=progress,
            chunk_column=chunk_column,
        )
    if kind == "rlds":
        folder = dataset_folder(path, revision, (f"{name}/**",) if name is not None else None)
        files = read_rlds_files(find_version_folder(folder, name))
        return RLDSSource(
            files.folder,
            files.image_features or None,
            preset,
            state_column,
            action_column,
            cache_dir=cache_dir,
            progress=progress,
        )
    rows = datasets.load_from_disk(os.fspath(path))
    return PlainSource(
        rows,
        camera_columns(rows.features),
        preset,
        state_column,
        action_column,
        instruction="",
        name=Path(path).name,
        chunk_column=chunk_column,
    )


def dataset_statistics(
    path: str | os.PathLike,
    format: str = "auto",
    robot: str | RobotPreset | None = None,
    unnorm_key: str | None = None,
    action_mask: Sequence[bool] | None = None,
    state_column: str | None = None,
    action_column: str | None = None,
    name: str | None = None,
    revision: str | None = None,
    on_bad_episode: str = "error",
    output: str | os.PathLike | None = None,
    use_cache: bool = True,
    cache_dir: str | os.PathLike | None = None,
    progress: bool | None = None,
    chunk_column: str | None = CHUNK_COLUMN,
) -> dict[str, dict[str, Any]]:
    """`vla-adapter stats DATASET`: the norm stats of a dataset, also written to the JSON file `output`.

    Args as for `open_source` and `statistics.compute_norm_stats`.
    """
    source = open_source(
        path, format, robot, state_column, action_column, name, revision, cache_dir, progress, chunk_column
    )
    norm_stats = compute_norm_stats(source, unnorm_key, action_mask, on_bad_episode, use_cache, cache_dir, progress)
    if output is not None:
        write_json(output, norm_stats)
    return norm_stats


def describe_norm_stats(norm_stats: dict[str, dict[str, Any]]) -> str:
    """Norm stats as a table to be read by a person, a line per dimension."""
    lines = []
    for key, entry in norm_stats.items():
        lines.append(f"{key}: {entry['num_transitions']} transitions in {entry['num_trajectories']} trajectories")
        columns = ("min", "q01", "mean", "q99", "max", "std")
        lines.append(f"{'':14}" + "".join(f"{column:>11}" for column in columns))
        for part in ("action", "proprio"):
            stats = entry[part]
            for dimension in range(len(stats["mean"])):
                notes = []
                if not stats.get("mask", [True] * (dimension + 1))[dimension]:
                    notes.append("not normalised")
                if stats["min"][dimension] == stats["max"][dimension]:
                    notes.append("constant")
                label = f"{part}[{dimension}]"
                values = "".join(f"{stats[column][dimension]:11.4f}" for column in columns)
                lines.append(f"{label:14}{values}  {', '.join(notes)}".rstrip())
    return "\n".join(lines)
