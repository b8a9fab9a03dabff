"""Readers of datasets from what users give: a path or rows, a format, and keyword arguments."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets

from vla_adapter_hf.data.columns import Columns
from vla_adapter_hf.data.lerobot.metadata import read_lerobot_metadata
from vla_adapter_hf.data.lerobot.reader import LeRobotReader
from vla_adapter_hf.data.lerobot.source import LeRobotSource
from vla_adapter_hf.data.reader import DemonstrationReader
from vla_adapter_hf.data.rlds.files import find_version_folder
from vla_adapter_hf.data.rlds.reader import RLDSReader
from vla_adapter_hf.data.rlds.source import RLDSSource
from vla_adapter_hf.data.source import DemonstrationSource
from vla_adapter_hf.data.storage import dataset_folder
from vla_adapter_hf.data.table import PlainReader, PlainSource
from vla_adapter_hf.robots import RobotPreset


FORMATS = ("auto", "lerobot", "rlds", "dataset")

# Keyword arguments of each format.
OPTIONS = {
    "lerobot": (
        "state_column", "action_column", "chunk_column", "instruction", "revision", "max_open_videos", "video_backend",
    ),
    "rlds": (
        "name", "state_column", "action_column", "instruction_column", "instruction", "revision", "verify_checksums",
    ),
    "dataset": (
        "state_column", "action_column", "episode_column", "frame_column", "instruction_column", "instruction",
        "chunk_column",
    ),
}  # fmt: skip


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
            "no state.json (datasets.save_to_disk)"
        ) from None
    return "rlds"


def chosen_format(path: str | os.PathLike, format: str) -> str:
    """The format of a dataset, looked up if it is `"auto"`.

    Raises:
        ValueError: a format that is not known or not recognised.
    """
    if format not in FORMATS:
        raise ValueError(f"format={format!r} is not known; use one of {', '.join(FORMATS)}")
    return detect_format(path) if format == "auto" else format


def open_reader(
    format: str,
    data: Any,
    cameras: Sequence[str] | None,
    robot: str | RobotPreset | None,
    options: dict[str, Any],
    fetch: str = "all",
) -> DemonstrationReader:
    """The reader of a dataset.

    Args:
        format: `"lerobot"`, `"rlds"` or `"dataset"`.
        data: a path or a Hub dataset repository; with `"dataset"` the rows, or the folder that holds them.
        cameras: see `Columns`.
        robot: see `Columns`.
        options: keyword arguments from `OPTIONS` of this format, and `unnorm_key` with `"dataset"`.
        fetch: which files of a LeRobot repository are fetched from the Hub now: `"all"`, `"metadata"`, or `"numbers"`.
            The last is for statistics: all cameras are taken, and no instruction is needed. `"every camera"` is
            `"all"` with all cameras, in any order.

    Raises:
        TypeError, ValueError: what the reader refuses.
    """
    columns = Columns.from_arguments(cameras, robot, options)
    if fetch in ("numbers", "every camera"):
        columns = replace(columns, all_cameras=True)
    if format == "lerobot":
        more = {name: options[name] for name in ("max_open_videos", "video_backend") if name in options}
        return _open_lerobot(data, columns, options.get("revision"), fetch, more)
    if format == "rlds":
        name = options.get("name")
        folder = dataset_folder(data, options.get("revision"), (f"{name}/**",) if name is not None else None)
        return RLDSReader(folder, columns, name, options.get("verify_checksums", True))
    if fetch == "numbers":
        columns = replace(columns, text="")
    return PlainReader(data, columns, options.get("unnorm_key") or "dataset")


def _open_lerobot(
    path: str | os.PathLike, columns: Columns, revision: str | None, fetch: str, more: dict[str, Any]
) -> LeRobotReader:
    folder = dataset_folder(path, revision, ("meta/**",))
    is_local = Path(path).expanduser().is_dir()
    # A repository's snapshot folder is named after its commit.
    name = os.fspath(path).rstrip("/").rsplit("/", 1)[-1] or None
    if not is_local and fetch != "metadata":
        patterns = ["meta/**", "data/**"]
        if fetch in ("all", "every camera"):
            metadata = read_lerobot_metadata(folder, f"LeRobot dataset {name}")
            cameras = columns.find(metadata.camera_columns, metadata.number_columns, metadata.where).cameras
            patterns += [f"videos/*{camera}/*" for camera in cameras if metadata.is_video(camera)]
        folder, is_local = dataset_folder(path, revision, patterns), True
    return LeRobotReader(folder, columns, name, None if is_local else str(path), **more)


_SOURCES = {LeRobotReader: LeRobotSource, RLDSReader: RLDSSource, PlainReader: PlainSource}


def random_access(
    reader: DemonstrationReader, cache_dir: str | os.PathLike | None = None, progress: bool | None = None
) -> DemonstrationSource | None:
    """The dataset of a reader with random access; None if its files are not here. Args as of `DemonstrationSource`."""
    return _SOURCES[type(reader)](reader, cache_dir, progress) if reader.is_local else None


def rows_of_folder(path: str | os.PathLike) -> datasets.Dataset:
    """The rows in a folder written by `save_to_disk`.

    Raises:
        TypeError: it holds several splits.
    """
    return check_rows(datasets.load_from_disk(os.fspath(path)))


def check_rows(rows: Any, streaming: bool = False) -> Any:
    """`rows`, if it is the class of `datasets` that is wanted.

    Raises:
        TypeError: it is another one.
    """
    if isinstance(rows, (datasets.DatasetDict, datasets.IterableDatasetDict)):
        raise TypeError(f"expected one datasets.Dataset, got a {type(rows).__name__}; choose one of {', '.join(rows)}")
    wanted = datasets.IterableDataset if streaming else datasets.Dataset
    if not isinstance(rows, wanted):
        raise TypeError(f"expected a datasets.{wanted.__name__}, got {type(rows).__name__}")
    return rows
