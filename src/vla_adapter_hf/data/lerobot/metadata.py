"""The `meta/` folder of a LeRobot dataset, v2.0, v2.1 and v3.0: which file holds what of which episode.

- v2.x: one parquet file per episode, one MP4 per episode and camera; episodes and tasks are JSON lines.
- v3.0: several episodes per file, for data and for each camera on its own; episodes and tasks are parquet.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from vla_adapter_hf.data.chunks import check_stored_shape
from vla_adapter_hf.data.columns import find_cameras, find_column


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
        tasks: task index -> instruction.
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

    def find(self, what: str, argument: str, given: str | None, usual: tuple[str, ...]) -> str:
        """A column of numbers; see `columns.find_column`."""
        return find_column(what, argument, given, usual, self.number_columns, self.where)

    def chunk_shape(self, column: str | None, action_column: str) -> tuple[int, int] | None:
        """Shape (K, A) of the chunks in `column`, None without one; see `chunks.check_stored_shape`."""
        if column is None:
            return None
        action_shape = self.features[action_column].get("shape")
        action_dim = int(action_shape[0]) if action_shape else None
        return check_stored_shape(self.features[column].get("shape"), action_dim, column, self.where)

    def find_cameras(self, given: list[str] | None, preset: tuple[str, ...] | None) -> list[str]:
        """Camera columns; see `columns.find_cameras`."""
        return find_cameras(given, preset, self.camera_columns, self.where)


def read_lerobot_metadata(folder: Path, where: str | None = None) -> LeRobotMetadata:
    """Read `meta/` of the dataset in `folder`.

    Raises:
        ValueError: no `meta/info.json`, a version that is not v2.0, v2.1 or v3.0, or metadata that lacks a key.
    """
    where = where or folder.name
    info_path = folder / "meta" / "info.json"
    if not info_path.is_file():
        raise ValueError(f"{where}: {info_path} does not exist; a LeRobot dataset has a meta/info.json")
    info = json.loads(info_path.read_text())
    missing = [key for key in ("codebase_version", "fps", "features", "data_path") if key not in info]
    if missing:
        raise ValueError(f"{where}: meta/info.json has no {', '.join(missing)}; it has {', '.join(info)}")
    version = str(info["codebase_version"])
    cameras = [name for name, feature in info["features"].items() if feature.get("dtype") == "video"]
    if version in ("v2.0", "v2.1"):
        tasks, episodes = _read_v2(folder, info, cameras)
    elif version == "v3.0":
        tasks, episodes = _read_v3(folder, info, cameras)
    else:
        raise ValueError(
            f"{where}: codebase_version is {version!r}; this package reads v2.0, v2.1 and v3.0. Convert the "
            "dataset with lerobot"
        )
    return LeRobotMetadata(
        where=where,
        version=version,
        fps=float(info["fps"]),
        features=info["features"],
        tasks=tasks,
        episodes=sorted(episodes, key=lambda episode: episode.index),
        splits=_read_splits(info.get("splits") or {}),
    )


def _read_splits(splits: dict[str, str]) -> dict[str, tuple[int, int]]:
    ranges = {}
    for name, span in splits.items():
        first, _, end = str(span).partition(":")
        if first.strip().isdigit() and end.strip().isdigit():
            ranges[name] = (int(first), int(end))
    return ranges


def _json_lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise ValueError(f"{path} does not exist; the dataset is incomplete, fetch it again")
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.strip()]


def _read_v2(folder: Path, info: dict[str, Any], cameras: list[str]) -> tuple[dict[int, str], list[LeRobotEpisode]]:
    tasks = {int(row["task_index"]): row["task"] for row in _json_lines(folder / "meta" / "tasks.jsonl")}
    per_chunk = int(info.get("chunks_size", 1000))
    episodes = []
    for row in _json_lines(folder / "meta" / "episodes.jsonl"):
        index = int(row["episode_index"])
        place = {"episode_chunk": index // per_chunk, "episode_index": index}
        episodes.append(
            LeRobotEpisode(
                index=index,
                length=int(row["length"]),
                data_path=info["data_path"].format(**place),
                tasks=tuple(row.get("tasks") or ()),
                videos={
                    key: VideoPlace(info["video_path"].format(**place, video_key=key), first_frame=0)
                    for key in cameras
                },
            )
        )
    return tasks, episodes


def _read_v3(folder: Path, info: dict[str, Any], cameras: list[str]) -> tuple[dict[int, str], list[LeRobotEpisode]]:
    tasks = _read_v3_tasks(folder / "meta" / "tasks.parquet")
    columns = ["episode_index", "length", "tasks", "data/chunk_index", "data/file_index"]
    for key in cameras:
        columns += [f"videos/{key}/{part}" for part in ("chunk_index", "file_index", "from_timestamp")]
    fps = float(info["fps"])
    episodes = []
    paths = sorted((folder / "meta" / "episodes").glob("*/*.parquet"))
    if not paths:
        raise ValueError(f"{folder}: meta/episodes has no parquet file; the dataset is incomplete, fetch it again")
    for path in paths:
        file = pq.ParquetFile(path)
        # The statistics in the same file (hundreds of nested columns) are not wanted.
        present = [name for name in columns if name in file.schema_arrow.names]
        for row in file.read(columns=present).to_pylist():
            episodes.append(
                LeRobotEpisode(
                    index=int(row["episode_index"]),
                    length=int(row["length"]),
                    data_path=info["data_path"].format(
                        chunk_index=row["data/chunk_index"], file_index=row["data/file_index"]
                    ),
                    tasks=tuple(row.get("tasks") or ()),
                    videos={
                        key: VideoPlace(
                            info["video_path"].format(
                                video_key=key,
                                chunk_index=row[f"videos/{key}/chunk_index"],
                                file_index=row[f"videos/{key}/file_index"],
                            ),
                            first_frame=round(row[f"videos/{key}/from_timestamp"] * fps),
                        )
                        for key in cameras
                        if row.get(f"videos/{key}/chunk_index") is not None
                    },
                )
            )
    return tasks, episodes


def _read_v3_tasks(path: Path) -> dict[int, str]:
    # Not through pandas: the text is its index, stored as a column of its own name or of a placeholder's.
    if not path.is_file():
        raise ValueError(f"{path} does not exist; the dataset is incomplete, fetch it again")
    table = pq.read_table(path)
    texts = [name for name in ("task", "__index_level_0__") if name in table.column_names]
    if not texts or "task_index" not in table.column_names:
        raise ValueError(f"{path}: has columns {', '.join(table.column_names)}; expected task_index and task")
    return dict(zip(table.column("task_index").to_pylist(), table.column(texts[0]).to_pylist(), strict=True))
