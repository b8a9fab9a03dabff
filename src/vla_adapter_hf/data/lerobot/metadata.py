"""The `meta/` folder of a LeRobot dataset, v2.0, v2.1 and v3.0: which file holds what of which episode.

- v2.x: one parquet file per episode, one MP4 per episode and camera; episodes and tasks are JSON lines.
- v3.0: several episodes per file, for data and for each camera on its own; episodes and tasks are parquet.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vla_adapter_hf.data.arrow import column_to_texts
from vla_adapter_hf.data.episodes import is_damage


VERSIONS = ("v2.0", "v2.1", "v3.0")


@dataclass(frozen=True)
class VideoPlace:
    """Where an episode begins in an MP4 file: frame t of the episode is frame `first_frame + t` of the file."""

    path: str
    first_frame: int


@dataclass(frozen=True)
class LeRobotEpisode:
    """One episode as the metadata describes it; paths are relative to the dataset's folder."""

    index: int
    length: int
    data_path: str
    tasks: tuple[str, ...] = ()
    videos: dict[str, VideoPlace] = field(default_factory=dict)


@dataclass
class LeRobotMetadata:
    """What `meta/` says.

    Attributes:
        version: `codebase_version`, such as "v2.1".
        fps: frames per second.
        features: column name -> its dtype, shape and names.
        tasks: task index -> instruction; "" where it is not readable.
        episodes: in the order of their indices.
        splits: split name -> (first, last + 1) episode index.
    """

    where: str
    version: str
    fps: float
    features: dict[str, dict[str, Any]]
    tasks: dict[int, str]
    episodes: list[LeRobotEpisode]
    splits: dict[str, tuple[int, int]]

    @property
    def camera_columns(self) -> list[str]:
        """Features that hold camera frames, as images or as video."""
        return [name for name, feature in self.features.items() if feature.get("dtype") in ("image", "video")]

    @property
    def number_columns(self) -> list[str]:
        """All other features."""
        cameras = self.camera_columns
        return [name for name in self.features if name not in cameras]

    def is_video(self, column: str) -> bool:
        """Whether a camera's frames are in MP4 files (and not in the parquet)."""
        return self.features[column].get("dtype") == "video"

    def width(self, column: str) -> int | None:
        """Values per row of a column of numbers, if the metadata says so."""
        shape = self.features[column].get("shape")
        return int(shape[0]) if shape else None

    def names(self, column: str) -> tuple[str, ...] | None:
        """What each dimension of a column is, such as joint names. LeRobot writes a list, or a dict of one list."""
        names = self.features[column].get("names")
        if isinstance(names, dict) and len(names) == 1:
            names = next(iter(names.values()))
        if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
            return None
        return tuple(names) if len(names) == self.width(column) else None


def read_lerobot_metadata(folder: Path, where: str | None = None) -> LeRobotMetadata:
    """Read `meta/` of the dataset in `folder`.

    Raises:
        ValueError: no `meta/info.json`, a version that is not v2.0, v2.1 or v3.0, metadata that lacks a key, or a path
            that leads out of the folder.
    """
    where = where or folder.name
    info_path = folder / "meta" / "info.json"
    if not info_path.is_file():
        raise ValueError(f"{where}: {info_path} does not exist; a LeRobot dataset has a meta/info.json")
    info = _parsed(info_path.read_bytes(), f"{where}: {info_path}")
    required = {"codebase_version": str, "fps": (int, float), "features": dict, "data_path": str}
    _check_keys(info, required, f"{where}: meta/info.json")
    version = info["codebase_version"]
    if version not in VERSIONS:
        raise ValueError(
            f"{where}: codebase_version is {version!r}; this package reads v2.0, v2.1 and v3.0. Convert the dataset "
            "with lerobot"
        )
    for name, feature in info["features"].items():
        _check_keys(feature, {}, f"{where}: feature {name!r} of meta/info.json")
    cameras = [name for name, feature in info["features"].items() if feature.get("dtype") == "video"]
    if cameras:
        reason = f"{where}: meta/info.json; camera {cameras[0]!r} is video"
        _check_keys(info, {"video_path": str}, reason)
    read = _read_v3 if version == "v3.0" else _read_v2
    tasks, episodes = read(folder, info, cameras, where)
    return LeRobotMetadata(
        where=where,
        version=version,
        fps=float(info["fps"]),
        features=info["features"],
        tasks=tasks,
        episodes=sorted(episodes, key=lambda episode: episode.index),
        splits=_read_splits(info.get("splits") or {}),
    )


def _parsed(data: bytes, where: str) -> dict[str, Any]:
    try:
        return json.loads(data)
    except ValueError as error:  # UnicodeDecodeError is one
        raise ValueError(f"{where} is no JSON: {error}") from error


def _check_keys(entry: Any, required: dict[str, type | tuple[type, ...]], where: str) -> None:
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: found {entry!r}, expected a mapping")
    missing = [key for key in required if key not in entry]
    if missing:
        raise ValueError(f"{where}: there is no {', '.join(missing)}; it has {', '.join(entry)}")
    for key, kind in required.items():
        if not isinstance(entry[key], kind) or isinstance(entry[key], bool):
            raise ValueError(f"{where}: {key} is {entry[key]!r}, which is not of the expected type")


def _file_path(template: str, name: str, where: str, **values: Any) -> str:
    """A path of the dataset from its template, checked to stay within the dataset's folder."""
    try:
        path = template.format(**values)
    except (KeyError, IndexError, ValueError, AttributeError, TypeError) as error:
        raise ValueError(
            f"{where}: {name} in meta/info.json is {template!r}, which cannot be filled in with {', '.join(values)}: "
            f"{error!r}"
        ) from error
    inside = PurePosixPath(path), PureWindowsPath(path)
    if any(kind.is_absolute() or kind.drive or kind.root or ".." in kind.parts for kind in inside):
        raise ValueError(
            f"{where}: {name} in meta/info.json gives {path!r}, which is outside of the dataset's folder. Expected a "
            'relative path without ".."'
        )
    return path


def _read_splits(splits: dict[str, str]) -> dict[str, tuple[int, int]]:
    ranges = {}
    for name, span in splits.items():
        first, _, end = str(span).partition(":")
        if first.strip().isdigit() and end.strip().isdigit():
            ranges[name] = (int(first), int(end))
    return ranges


def _json_lines(path: Path, required: dict[str, type]) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        raise ValueError(f"{path} does not exist; the dataset is incomplete, fetch it again")
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                row = _parsed(line, f"{path}, line {number}")
                _check_keys(row, required, f"{path}, line {number}")
                yield row


_Parts = tuple[dict[int, str], list[LeRobotEpisode]]


def _read_v2(folder: Path, info: dict[str, Any], cameras: list[str], where: str) -> _Parts:
    meta = folder / "meta"
    tasks = {
        row["task_index"]: row["task"] for row in _json_lines(meta / "tasks.jsonl", {"task_index": int, "task": str})
    }
    per_chunk = int(info.get("chunks_size", 1000))
    episodes = []
    for row in _json_lines(meta / "episodes.jsonl", {"episode_index": int, "length": int}):
        index = row["episode_index"]
        values = {"episode_chunk": index // per_chunk, "episode_index": index}
        videos = {
            key: VideoPlace(_file_path(info["video_path"], "video_path", where, **values, video_key=key), 0)
            for key in cameras
        }
        data_path = _file_path(info["data_path"], "data_path", where, **values)
        episodes.append(LeRobotEpisode(index, row["length"], data_path, tuple(row.get("tasks") or ()), videos))
    return tasks, episodes


def _read_v3(folder: Path, info: dict[str, Any], cameras: list[str], where: str) -> _Parts:
    tasks = _read_v3_tasks(folder / "meta" / "tasks.parquet")
    needed = ["episode_index", "length", "data/chunk_index", "data/file_index"]
    columns = [*needed, "tasks"]
    for key in cameras:
        columns += [f"videos/{key}/{part}" for part in ("chunk_index", "file_index", "from_timestamp")]
    episodes = []
    paths = sorted((folder / "meta" / "episodes").glob("*/*.parquet"))
    if not paths:
        raise ValueError(f"{folder}: meta/episodes has no parquet file; the dataset is incomplete, fetch it again")
    for path in paths:
        # The statistics in the same file, hundreds of nested columns, are not read.
        for row in _parquet_rows(path, needed, columns).to_pylist():
            places = {"chunk_index": row["data/chunk_index"], "file_index": row["data/file_index"]}
            data_path = _file_path(info["data_path"], "data_path", where, **places)
            videos = {key: _video_place(row, key, info, where) for key in cameras}
            episodes.append(
                LeRobotEpisode(
                    index=int(row["episode_index"]),
                    length=int(row["length"]),
                    data_path=data_path,
                    tasks=tuple(row.get("tasks") or ()),
                    videos={key: place for key, place in videos.items() if place is not None},
                )
            )
    return tasks, episodes


def _video_place(row: dict[str, Any], key: str, info: dict[str, Any], where: str) -> VideoPlace | None:
    chunk, file, begin = (row.get(f"videos/{key}/{part}") for part in ("chunk_index", "file_index", "from_timestamp"))
    if chunk is None or file is None or begin is None:
        return None
    path = _file_path(info["video_path"], "video_path", where, video_key=key, chunk_index=chunk, file_index=file)
    return VideoPlace(path, first_frame=round(begin * float(info["fps"])))


def _parquet_rows(path: Path, needed: list[str], columns: list[str]) -> pa.Table:
    try:
        file = pq.ParquetFile(path)
        names = file.schema_arrow.names
        missing = [name for name in needed if name not in names]
        if not missing:
            return file.read(columns=[name for name in columns if name in names])
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        if not is_damage(error):
            raise
        reason = " ".join(str(error).split())  # Arrow's reasons have line breaks
        raise ValueError(f"{path} cannot be read: {reason}. Fetch the dataset again") from error
    raise ValueError(f"{path}: there is no column {', '.join(missing)}; columns that exist: {', '.join(names)}")


def _read_v3_tasks(path: Path) -> dict[int, str]:
    if not path.is_file():
        raise ValueError(f"{path} does not exist; the dataset is incomplete, fetch it again")
    # pandas stores the text as its index, in a column of its own name or of a placeholder's.
    texts = ["task", "__index_level_0__"]
    table = _parquet_rows(path, ["task_index"], ["task_index", *texts])
    found = [name for name in texts if name in table.column_names]
    if not found:
        raise ValueError(f"{path}: there is no column task; it has {', '.join(table.column_names)}")
    indices = table.column("task_index").to_pylist()
    return dict(zip(indices, (text or "" for text in column_to_texts(table.column(found[0]))), strict=True))
