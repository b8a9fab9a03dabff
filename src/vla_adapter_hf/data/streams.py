"""Episodes one after the other, for streaming: from LeRobot datasets, RLDS shards and iterable `datasets`."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from huggingface_hub import hf_hub_download

from vla_adapter_hf.data.chunks import CHUNK_COLUMN, column_to_chunks, find_chunk_column
from vla_adapter_hf.data.columns import ACTION_NAMES, STATE_NAMES, column_to_matrix
from vla_adapter_hf.data.episodes import BadEpisode, check_episode, is_damage
from vla_adapter_hf.data.frames import decode_frame
from vla_adapter_hf.data.lerobot.metadata import LeRobotEpisode, read_lerobot_metadata
from vla_adapter_hf.data.lerobot.source import LeRobotSource
from vla_adapter_hf.data.lerobot.video import VideoCache
from vla_adapter_hf.data.rlds.files import Shard, find_version_folder, read_rlds_files
from vla_adapter_hf.data.rlds.source import RLDSSource, find_rlds_columns, first_readable_example, read_rlds_episode
from vla_adapter_hf.data.rlds.tfrecord import TFRecordError, read_record, scan_records
from vla_adapter_hf.data.source import DemonstrationSource
from vla_adapter_hf.data.storage import dataset_folder
from vla_adapter_hf.data.table import find_plain_columns, frame_from_cell, stored_chunk_shape
from vla_adapter_hf.robots import RobotPreset


FrameReader = Callable[[], np.ndarray]
_BATCH_ROWS = 32


@dataclass
class StreamedEpisode:
    """One episode on its way: states (n, S), actions (n, A) after the robot's conventions, a text per step.

    `chunks` (n, K, A) are those stored with the steps, or None where chunks are cut from the actions.
    `readers(frame)` gives a function per camera that decodes that frame; it holds no more than the frame's own bytes.
    """

    index: int
    states: np.ndarray
    actions: np.ndarray
    texts: Sequence[str]
    readers: Callable[[int], list[FrameReader]]
    chunks: np.ndarray | None = None

    @property
    def learnt_actions(self) -> np.ndarray:
        """What statistics cover, (number, A); see `EpisodeTable.learnt_actions`."""
        return self.actions if self.chunks is None else self.chunks.reshape(-1, self.chunks.shape[-1])


class EpisodeStream(ABC):
    """Episodes of one dataset, in shards that workers can share out; attributes as of `DemonstrationSource`."""

    name: str
    where: str
    cameras: tuple[str, ...]
    robot: RobotPreset | None
    num_shards: int
    chunk_column: str | None = None
    stored_chunk_size: int | None = None

    @abstractmethod
    def episodes(
        self, shard: int, keep: Callable[[int], bool] | None = None, load_frames: bool = True
    ) -> Iterator[StreamedEpisode | BadEpisode]:
        """The episodes of one shard in order.

        Args:
            shard: which.
            keep: told an episode's number; those it refuses are passed over.
            load_frames: False where only the numbers are wanted.
        """

    def source(self) -> DemonstrationSource | None:
        """The same dataset with random access, where its files are here: statistics come from there, cached."""
        return None

    def _converted(
        self,
        index: int,
        states: np.ndarray,
        actions: np.ndarray,
        texts: Sequence[str],
        readers: Callable[[int], list[FrameReader]],
        expected_length: int | None = None,
        chunks: np.ndarray | None = None,
    ) -> StreamedEpisode | BadEpisode:
        states, actions = np.asarray(states, np.float32), np.asarray(actions, np.float32)
        bad = check_episode(index, states, actions, expected_length, chunks)
        if bad is not None:
            return bad
        if self.robot is not None:
            try:
                states, actions = self.robot.episode_to_training(states, actions)
                chunks = None if chunks is None else self.robot.to_training(chunks)
            except ValueError as error:
                return BadEpisode(index, 0, str(error))
        return StreamedEpisode(index, states, actions, texts, readers, chunks)


class LeRobotStream(EpisodeStream):
    """A LeRobot dataset, local or on the Hub, its parquet files read through `datasets` streaming.

    From the Hub, `meta/` is fetched first, parquet files are read as they come, and MP4 files are fetched one by one
    when their first frame is needed. A shard is a data file.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        cameras: Sequence[str] | None = None,
        robot: RobotPreset | None = None,
        state_column: str | None = None,
        action_column: str | None = None,
        instruction: str | None = None,
        revision: str | None = None,
        max_open_videos: int = 16,
        chunk_column: str | None = CHUNK_COLUMN,
    ) -> None:
        self.repo_id = None if Path(path).expanduser().is_dir() else str(path)
        self.folder = dataset_folder(path, revision, ("meta/**",))
        self.revision = self.folder.name if self.repo_id is not None else None  # a snapshot is named after its commit
        self.name = os.fspath(path).rstrip("/").rsplit("/", 1)[-1]
        self.where = f"LeRobot dataset {self.name}"
        self.robot = robot
        self.instruction = instruction
        self.metadata = read_lerobot_metadata(self.folder, self.where)
        self.cameras = tuple(self.metadata.find_cameras(cameras, robot.cameras if robot is not None else None))
        self.state_column = self.metadata.find("state", "state_column", state_column, STATE_NAMES)
        self.action_column = self.metadata.find("action", "action_column", action_column, ACTION_NAMES)
        self.chunk_column = find_chunk_column(chunk_column, self.metadata.number_columns, robot, self.where)
        self._chunk_shape = self.metadata.chunk_shape(self.chunk_column, self.action_column)
        self.stored_chunk_size = self._chunk_shape[0] if self._chunk_shape is not None else None
        self._files: dict[str, dict[int, LeRobotEpisode]] = {}
        for episode in self.metadata.episodes:
            self._files.setdefault(episode.data_path, {})[episode.index] = episode
        self.num_shards = len(self._files)
        self._videos = VideoCache(max_open_videos)

    def source(self) -> DemonstrationSource | None:
        if self.repo_id is not None:
            return None
        return LeRobotSource(
            self.folder,
            self.cameras,
            self.robot,
            self.state_column,
            self.action_column,
            self.instruction,
            name=self.name,
            chunk_column=self.chunk_column,
        )

    def _url(self, data_path: str) -> str:
        if self.repo_id is None:
            return str(self.folder / data_path)
        return f"hf://datasets/{self.repo_id}@{self.revision}/{data_path}"

    def _local_video(self, path: str) -> str:
        if self.repo_id is None:
            return str(self.folder / path)
        return hf_hub_download(self.repo_id, path, repo_type="dataset", revision=self.revision)

    def episodes(
        self, shard: int, keep: Callable[[int], bool] | None = None, load_frames: bool = True
    ) -> Iterator[StreamedEpisode | BadEpisode]:
        data_path, episodes = list(self._files.items())[shard]
        wanted = {index: episode for index, episode in episodes.items() if keep is None or keep(index)}
        if not wanted:
            return
        if self.repo_id is None and not (self.folder / data_path).is_file():
            for index in wanted:
                yield BadEpisode(index, None, f"{data_path} does not exist")
            return
        seen, problem = set(), "is empty"
        try:
            for index, table in self._tables(data_path, load_frames):
                if index in wanted:
                    seen.add(index)
                    yield self._episode(wanted[index], table, load_frames)
        except (pa.ArrowException, OSError) as error:
            if not is_damage(error):
                raise
            problem = f"{data_path} cannot be read: {error}"
        for index in wanted:
            if index not in seen:
                yield BadEpisode(index, None, problem)

    def _tables(self, data_path: str, load_frames: bool) -> Iterator[tuple[int, pa.Table]]:
        """The rows of one episode after the other."""
        columns = [self.state_column, self.action_column, "episode_index"]
        columns += [name for name in ("task_index",) if name in self.metadata.features]
        columns += [self.chunk_column] if self.chunk_column is not None else []
        if load_frames:
            columns += [camera for camera in self.cameras if not self.metadata.is_video(camera)]
        rows = datasets.load_dataset(
            "parquet", data_files={"train": [self._url(data_path)]}, columns=columns, split="train", streaming=True
        )
        current, parts = -1, []
        for batch in rows.with_format("arrow").iter(_BATCH_ROWS):
            index = batch.column("episode_index").to_numpy()
            edges = [0, *(np.flatnonzero(np.diff(index)) + 1).tolist(), len(index)]
            for start, stop in zip(edges[:-1], edges[1:], strict=True):
                if parts and index[start] != current:
                    yield current, pa.concat_tables(parts)
                    parts = []
                current = int(index[start])
                parts.append(batch.slice(start, stop - start))
        if parts:
            yield current, pa.concat_tables(parts)

    def _episode(self, episode: LeRobotEpisode, table: pa.Table, load_frames: bool) -> StreamedEpisode | BadEpisode:
        values = []
        for column in (self.state_column, self.action_column):
            matrix, wrong = column_to_matrix(table.column(column), column)
            for frame, length in wrong.items():
                return BadEpisode(episode.index, frame, f"{column} has {length} values, expected {matrix.shape[1]}")
            values.append(matrix)
        chunks = None
        if self.chunk_column is not None:
            chunks, reasons = column_to_chunks(table.column(self.chunk_column), self.chunk_column, self._chunk_shape)
            for frame, reason in reasons.items():
                return BadEpisode(episode.index, frame, reason)
        if self.instruction is not None:
            texts = [self.instruction] * len(table)
        elif "task_index" in table.column_names:
            texts = [self.metadata.tasks.get(task, "") for task in table.column("task_index").to_pylist()]
        else:
            texts = [episode.tasks[0] if episode.tasks else ""] * len(table)
        cells = {
            camera: pa.concat_arrays([chunk.field("bytes") for chunk in table.column(camera).chunks])
            for camera in self.cameras
            if load_frames and not self.metadata.is_video(camera)
        }
        for camera in self.cameras if load_frames and self.repo_id is None else ():
            if self.metadata.is_video(camera):
                place = episode.videos.get(camera)
                if place is None or not (self.folder / place.path).is_file():
                    missing = "" if place is None else f" {place.path}"
                    return BadEpisode(episode.index, 0, f"video{missing} of camera {camera!r} is missing")

        def readers(frame: int) -> list[FrameReader]:
            found: list[FrameReader] = []
            for camera in self.cameras:
                if camera in cells:
                    found.append(partial(_decode, cells[camera][frame].as_py(), camera))
                else:
                    place = episode.videos[camera]
                    found.append(partial(self._read_video, place.path, place.first_frame + frame))
            return found

        return self._converted(episode.index, values[0], values[1], texts, readers, episode.length, chunks)

    def _read_video(self, path: str, frame: int) -> np.ndarray:
        return self._videos.read(self._local_video(path), frame, self.metadata.fps)


def _decode(data: bytes | None, camera: str, like_tensorflow: bool = False) -> np.ndarray:
    if not data:
        raise ValueError(f"camera {camera!r} has no image")
    return decode_frame(data, like_tensorflow)


class RLDSStream(EpisodeStream):
    """RLDS shards read from front to back: nothing is indexed, one episode is in memory at a time."""

    def __init__(
        self,
        path: str | os.PathLike,
        cameras: Sequence[str] | None = None,
        robot: RobotPreset | None = None,
        name: str | None = None,
        state_column: str | None = None,
        action_column: str | None = None,
        instruction_column: str | None = None,
        instruction: str | None = None,
        revision: str | None = None,
        split: str | None = "train",
        verify_checksums: bool = True,
    ) -> None:
        folder = dataset_folder(path, revision, (f"{name}/**",) if name is not None else None)
        self.files = read_rlds_files(find_version_folder(folder, name))
        self.name = self.files.name
        self.where = f"RLDS dataset {self.name}"
        self.robot = robot
        self.instruction = instruction
        self.verify_checksums = verify_checksums
        splits = dict.fromkeys(shard.split for shard in self.files.shards)
        if split is not None and split not in splits:
            raise ValueError(f"{self.where}: split={split!r} does not exist; splits that do: {', '.join(splits)}")
        # Episodes are numbered over all shards, so that they have the same numbers as with random access.
        self._shards: list[tuple[Shard, int]] = []
        records_before = 0
        for shard in self.files.shards:
            if split is None or shard.split == split:
                self._shards.append((shard, records_before))
            records_before += shard.records if shard.records is not None else len(scan_records(shard.path))
        self.num_shards = len(self._shards)
        first = first_readable_example([shard for shard, _ in self._shards], self.where)
        self.columns = find_rlds_columns(
            self.files, first, self.where, cameras, robot, state_column, action_column, instruction_column
        )
        self.cameras = self.columns.cameras

    def source(self) -> DemonstrationSource | None:
        return RLDSSource(
            self.files.folder,
            self.columns.cameras,
            self.robot,
            self.columns.state,
            self.columns.action,
            self.columns.instruction,
            self.instruction,
            verify_checksums=self.verify_checksums,
        )

    def episodes(
        self, shard: int, keep: Callable[[int], bool] | None = None, load_frames: bool = True
    ) -> Iterator[StreamedEpisode | BadEpisode]:
        described, first = self._shards[shard]
        with open(described.path, "rb") as file:
            for index, record in enumerate(scan_records(described.path), first):
                if keep is not None and not keep(index):
                    continue
                try:
                    data = read_record(file, record, described.path.name, self.verify_checksums)
                except TFRecordError as error:
                    yield BadEpisode(index, None, str(error))
                    continue
                episode = read_rlds_episode(data, self.columns, self.files, index)
                if isinstance(episode, BadEpisode):
                    yield episode
                    continue
                texts = episode.texts if self.instruction is None else [self.instruction] * len(episode.texts)
                yield self._converted(
                    index, episode.states, episode.actions, texts, partial(self._readers, data, episode.spans)
                )

    def _readers(self, data: bytes, spans: np.ndarray, frame: int) -> list[FrameReader]:
        return [
            partial(_decode, data[start:stop], camera, True)
            for camera, (start, stop) in zip(self.cameras, spans[frame].tolist(), strict=True)
        ]


class PlainStream(EpisodeStream):
    """A `datasets.IterableDataset` with one row per step; the rows of an episode follow each other within a shard."""

    def __init__(
        self,
        dataset: datasets.IterableDataset,
        cameras: Sequence[str] | None = None,
        robot: RobotPreset | None = None,
        state_column: str | None = None,
        action_column: str | None = None,
        episode_column: str | None = None,
        instruction_column: str | None = None,
        instruction: str | None = None,
        name: str = "dataset",
        chunk_column: str | None = CHUNK_COLUMN,
    ) -> None:
        if not isinstance(dataset, datasets.IterableDataset):
            raise TypeError(f"expected a datasets.IterableDataset, got {type(dataset).__name__}")
        self.name = name
        self.where = f"dataset {name}"
        self.robot = robot
        self.instruction = instruction
        if dataset.features is None:
            dataset = dataset._resolve_features()
        self.columns = find_plain_columns(
            dataset.features,
            self.where,
            cameras,
            robot,
            state_column,
            action_column,
            episode_column,
            None,
            instruction_column,
            has_instruction=instruction is not None,
            chunk_column=chunk_column,
        )
        self.cameras = self.columns.cameras
        for camera in self.cameras:
            if isinstance(dataset.features[camera], datasets.Image):
                dataset = dataset.cast_column(camera, datasets.Image(decode=False))
        self._dataset = dataset
        self.chunk_column = self.columns.chunk
        self._chunk_shape = stored_chunk_shape(dataset, self.columns, self.where)
        self.stored_chunk_size = self._chunk_shape[0] if self._chunk_shape is not None else None
        self.num_shards = dataset.num_shards

    def episodes(
        self, shard: int, keep: Callable[[int], bool] | None = None, load_frames: bool = True
    ) -> Iterator[StreamedEpisode | BadEpisode]:
        columns = self.columns
        rows = self._dataset.shard(self.num_shards, shard)
        if not load_frames:
            rows = rows.select_columns([name for name in columns.number_columns() if name is not None])
        episode: list[dict[str, Any]] = []
        number = -1
        for row in rows:
            if episode and row[columns.episode] != episode[-1][columns.episode]:
                number += 1
                if keep is None or keep(number):
                    yield self._episode(self._index(shard, number, episode), episode)
                episode = []
            episode.append(row)
        if episode and (keep is None or keep(number + 1)):
            yield self._episode(self._index(shard, number + 1, episode), episode)

    def _index(self, shard: int, number: int, rows: list[dict[str, Any]]) -> int:
        key = rows[0][self.columns.episode]
        return key if isinstance(key, int) else number * self.num_shards + shard

    def _episode(self, index: int, rows: list[dict[str, Any]]) -> StreamedEpisode | BadEpisode:
        values = []
        for column in (self.columns.state, self.columns.action):
            sizes = [np.size(row[column]) for row in rows]
            wrong = np.flatnonzero(np.array(sizes) != sizes[0])
            if len(wrong):
                frame = int(wrong[0])
                return BadEpisode(index, frame, f"{column} has {sizes[frame]} values, expected {sizes[0]}")
            values.append(np.array([row[column] for row in rows], np.float32).reshape(len(rows), -1))
        chunks = None
        if self._chunk_shape is not None:
            cells = [np.asarray(row[self.chunk_column], object).tolist() for row in rows]
            stored = pa.array(cells, pa.list_(pa.list_(pa.float32())))
            chunks, reasons = column_to_chunks(stored, self.chunk_column, self._chunk_shape)
            for frame, reason in reasons.items():
                return BadEpisode(index, frame, reason)
        if self.instruction is not None:
            texts = [self.instruction] * len(rows)
        else:
            texts = [row[self.columns.instruction] or "" for row in rows]

        def readers(frame: int) -> list[FrameReader]:
            return [partial(frame_from_cell, rows[frame][camera]) for camera in self.cameras]

        return self._converted(index, values[0], values[1], texts, readers, chunks=chunks)
