"""LeRobot datasets v2.0, v2.1 and v3.0 with random access, without the lerobot package."""

from __future__ import annotations

import hashlib
import os
from bisect import bisect_right
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm.auto import tqdm

from vla_adapter_hf.data.chunks import CHUNK_COLUMN, STEP_COLUMN, column_to_chunks, find_chunk_column
from vla_adapter_hf.data.columns import ACTION_NAMES, STATE_NAMES, column_to_matrix
from vla_adapter_hf.data.episodes import BadEpisode, BadEpisodeError, EpisodeTable, EpisodeTableBuilder, is_damage
from vla_adapter_hf.data.frames import decode_frame, is_jpeg
from vla_adapter_hf.data.lerobot.metadata import LeRobotEpisode, LeRobotMetadata, read_lerobot_metadata
from vla_adapter_hf.data.lerobot.video import VideoCache
from vla_adapter_hf.data.source import DemonstrationSource
from vla_adapter_hf.data.storage import cache_directory, dataset_folder
from vla_adapter_hf.robots import RobotPreset


_BATCH_ROWS = 1 << 15


class LeRobotSource(DemonstrationSource):
    """A LeRobot dataset in a local folder.

    Args:
        folder: the folder that holds `meta/`, `data/` and, with MP4 frames, `videos/`.
        cameras: camera names or full column names, in order; see `columns.find_cameras`.
        robot: the preset whose conventions are applied, or None.
        state_column, action_column: columns of numbers, where their names are not the usual ones.
        instruction: one text for all episodes, instead of the dataset's tasks.
        name: the dataset's name, by default the folder's.
        max_open_videos: MP4 files kept open per process.
        cache_dir: where frames of parquet files are unpacked to; see `storage.cache_directory`.
        progress: show a progress bar while reading.
        chunk_column: the column of stored action chunks; see `chunks.find_chunk_column`.

    Raises:
        ValueError: metadata that cannot be read, columns that are missing or ambiguous.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        cameras: Sequence[str] | None = None,
        robot: RobotPreset | None = None,
        state_column: str | None = None,
        action_column: str | None = None,
        instruction: str | None = None,
        name: str | None = None,
        max_open_videos: int = 16,
        cache_dir: str | os.PathLike | None = None,
        progress: bool | None = None,
        chunk_column: str | None = CHUNK_COLUMN,
    ) -> None:
        self.folder = Path(folder)
        self.name = name or self.folder.resolve().name
        self.where = f"LeRobot dataset {self.name}"
        self.robot = robot
        self.instruction = instruction
        self.cache_dir = cache_dir
        self.progress = progress
        self.metadata: LeRobotMetadata = read_lerobot_metadata(self.folder, self.where)
        preset = robot.cameras if robot is not None else None
        self.cameras = tuple(self.metadata.find_cameras(cameras, preset))
        self.state_column = self.metadata.find("state", "state_column", state_column, STATE_NAMES)
        self.action_column = self.metadata.find("action", "action_column", action_column, ACTION_NAMES)
        self.chunk_column = find_chunk_column(chunk_column, self.metadata.number_columns, robot, self.where)
        self._chunk_shape = self.metadata.chunk_shape(self.chunk_column, self.action_column)
        self.stored_chunk_size = self._chunk_shape[0] if self._chunk_shape is not None else None
        self._videos = VideoCache(max_open_videos)
        self._unlabelled: dict[int, BadEpisode] = {}
        self._first_rows: list[int] = []  # of each episode, counted over all data files that exist
        self._image_files: list[str] = []
        self._image_table: datasets.Dataset | None = None
        self._image_chunks: dict[str, tuple[list[int], list[pa.Array]]] = {}

    def __getstate__(self) -> dict[str, Any]:
        # Arrow's arrays would be copied into a spawned worker; the memory-mapped table travels as file names.
        return {**self.__dict__, "_image_chunks": {}}

    @property
    def _image_columns(self) -> list[str]:
        return [column for column in self.cameras if not self.metadata.is_video(column)]

    def _data_files(self) -> dict[str, list[LeRobotEpisode]]:
        files: dict[str, list[LeRobotEpisode]] = {}
        for episode in self.metadata.episodes:
            files.setdefault(episode.data_path, []).append(episode)
        return files

    def content_digest(self) -> str:
        digest = hashlib.blake2b(digest_size=20)
        columns = [self.state_column, self.action_column, "episode_index", "frame_index"]
        if self.chunk_column is not None:
            columns.append(self.chunk_column)
        for data_path, episodes in self._data_files().items():
            digest.update(repr([(episode.index, episode.length) for episode in episodes]).encode())
            try:
                _hash_columns(self.folder / data_path, columns, digest)
            except (pa.ArrowException, OSError) as error:
                if not is_damage(error):
                    raise
                # Its episodes are bad ones, see the table.
                digest.update(type(error).__name__.encode())
        return digest.hexdigest()

    def _load_table(self) -> EpisodeTable:
        builder = EpisodeTableBuilder(self.where, self.robot)
        self._first_rows, self._image_files, self._unlabelled = [], [], {}
        rows_before = 0
        files = self._data_files()
        bar = tqdm(
            total=sum(episode.length for episode in self.metadata.episodes),
            desc=f"Reading {self.name}",
            unit="step",
            disable=_disable(self.progress),
        )
        with bar:
            for data_path, episodes in files.items():
                path = self.folder / data_path
                try:
                    numbers = _read_numbers(
                        path, self.state_column, self.action_column, self.chunk_column, self._chunk_shape
                    )
                except (pa.ArrowException, OSError) as error:
                    if not is_damage(error):
                        raise
                    problem = f"cannot be read: {error}" if path.is_file() else "does not exist"
                    for episode in episodes:
                        self._first_rows.append(-1)
                        builder.add_bad(BadEpisode(episode.index, None, f"{data_path} {problem}"))
                    continue
                rows_before += self._take_file(path, numbers, episodes, builder, rows_before, bar)
                self._image_files.append(str(path))
        return builder.build()

    def _take_file(
        self,
        path: Path,
        numbers: _FileNumbers,
        episodes: list[LeRobotEpisode],
        builder: EpisodeTableBuilder,
        rows_before: int,
        bar: tqdm,
    ) -> int:
        for column, values in ((self.state_column, numbers.states), (self.action_column, numbers.actions)):
            shape = self.metadata.features[column].get("shape")
            if len(values) and shape and values.shape[1] != shape[0]:
                raise ValueError(
                    f"{self.where}: {path.name} has {values.shape[1]} values in {column!r}, meta/info.json "
                    f"says {shape[0]}"
                )
        runs: dict[int, list[tuple[int, int]]] = {}
        edges = np.flatnonzero(np.diff(numbers.episode_index)) + 1
        edges = [0, *edges.tolist(), len(numbers.episode_index)] if len(numbers.episode_index) else [0]
        for start, stop in zip(edges[:-1], edges[1:], strict=True):
            runs.setdefault(int(numbers.episode_index[start]), []).append((start, stop))
        for episode in episodes:
            start, stop = runs.pop(episode.index, [(0, 0)])[0]
            self._first_rows.append(rows_before + start)
            bad = numbers.first_problem(episode.index, start, stop)
            if bad is not None:
                builder.add_bad(bad)
            else:
                text_ids = self._text_ids(episode, numbers, start, stop, builder)
                builder.add(
                    episode.index,
                    numbers.states[start:stop],
                    numbers.actions[start:stop],
                    text_ids,
                    episode.length,
                    numbers.chunks[start:stop] if numbers.chunks is not None else None,
                    numbers.control_steps[start:stop] if numbers.control_steps is not None else None,
                )
            bar.update(stop - start)
        for index in runs:
            self._first_rows.append(-1)
            builder.add_bad(BadEpisode(index, None, f"is in {path.name} but not in meta/episodes"))
        return len(numbers.episode_index)

    def _text_ids(
        self, episode: LeRobotEpisode, numbers: _FileNumbers, start: int, stop: int, builder: EpisodeTableBuilder
    ) -> np.ndarray | int:
        texts = builder.texts
        if self.instruction is not None:
            return texts.id_of(self.instruction)
        if numbers.task_index is None:
            text = episode.tasks[0] if episode.tasks else ""
            unlabelled = (0, "has no task") if not text else None
            ids: np.ndarray | int = texts.id_of(text)
        else:
            task_index = numbers.task_index[start:stop]
            known = {int(task): self.metadata.tasks.get(int(task), "") for task in np.unique(task_index)}
            empty = [task for task, text in known.items() if not text.strip()]
            unlabelled = None
            if empty:
                frame = int(np.flatnonzero(np.isin(task_index, empty))[0])
                unlabelled = (frame, f"task_index {int(task_index[frame])} has no text in meta/tasks")
            ids = np.array([texts.id_of(known[int(task)]) for task in task_index], np.int32)
        if unlabelled is not None:
            self._unlabelled[len(self._first_rows) - 1] = BadEpisode(episode.index, *unlabelled)
        return ids

    def frame_problems(self) -> dict[int, BadEpisode]:
        problems = {}
        for position in range(len(self.table)):
            if position in self._unlabelled:
                problems[position] = self._unlabelled[position]
                continue
            episode = self._episode_at(position)
            for column in self.cameras:
                if episode is None or not self.metadata.is_video(column):
                    continue
                place = episode.videos.get(column)
                if place is None:
                    problems[position] = BadEpisode(episode.index, None, f"has no video of camera {column!r}")
                elif not _has_content(self.folder / place.path):
                    problems[position] = BadEpisode(episode.index, 0, f"video {place.path} is missing or empty")
                else:
                    continue
                break
        return problems

    @cached_property
    def _episode_of_index(self) -> dict[int, LeRobotEpisode]:
        return {episode.index: episode for episode in self.metadata.episodes}

    def _episode_at(self, position: int) -> LeRobotEpisode | None:
        return self._episode_of_index.get(int(self.table.episode_indices[position]))

    def positions_of_split(self, split: str) -> list[int]:
        if split not in self.metadata.splits:
            raise ValueError(
                f"{self.where}: split={split!r} does not exist; splits in meta/info.json: "
                f"{', '.join(self.metadata.splits) or 'none'}"
            )
        first, end = self.metadata.splits[split]
        indices = self.table.episode_indices
        return np.flatnonzero((indices >= first) & (indices < end)).tolist()

    def prepare_images(self) -> None:
        """Make frames in parquet accessible at random: `datasets` writes them, once, to memory-mapped Arrow files.

        A parquet file has to be unpacked by the page, which for one random frame is a hundred too many.
        """
        self.table  # noqa: B018 - finds the files
        if self._image_columns and self._image_table is None and self._image_files:
            cache = cache_directory(self.cache_dir) / "arrow"
            try:
                self._image_table = datasets.Dataset.from_parquet(
                    self._image_files, columns=self._image_columns, cache_dir=str(cache)
                )
            except datasets.exceptions.DatasetGenerationError as error:
                bad = self._first_unreadable_frame()
                if bad is None:  # a full disk, for one
                    raise
                raise BadEpisodeError(self.where, bad, "Fetch or record that file again") from error

    def _first_unreadable_frame(self) -> BadEpisode | None:
        """Where in the parquet files the stored frames end that can be unpacked; None if all can be."""
        row = 0
        for path in self._image_files:
            try:
                for batch in pq.ParquetFile(path).iter_batches(1, columns=self._image_columns, use_threads=False):
                    row += batch.num_rows
            except (pa.ArrowException, OSError) as error:
                if not is_damage(error):
                    raise
                first = np.array(self._first_rows)
                position = int(np.flatnonzero((first >= 0) & (first <= row))[-1])
                index = int(self.table.episode_indices[position])
                return BadEpisode(index, row - int(first[position]), f"{Path(path).name} is damaged: {error}")
        return None

    def read_images(self, position: int, frame: int) -> list[np.ndarray]:
        images = []
        for column in self.cameras:
            if self.metadata.is_video(column):
                place = self._episode_at(position).videos[column]
                path = self.folder / place.path
                images.append(self._videos.read(path, place.first_frame + frame, self.metadata.fps))
            else:
                images.append(decode_frame(self._encoded(column, self._first_rows[position] + frame)))
        return images

    def frames_are_jpeg(self) -> bool:
        column = self.cameras[0]
        return not self.metadata.is_video(column) and is_jpeg(self._encoded(column, self._first_rows[0]))

    def _encoded(self, column: str, row: int) -> bytes:
        if column not in self._image_chunks:
            self.prepare_images()
            self._image_chunks[column] = _bytes_chunks(self._image_table.data.column(column), column)
        starts, chunks = self._image_chunks[column]
        chunk = bisect_right(starts, row) - 1
        data = chunks[chunk][row - starts[chunk]].as_py()
        if not data:
            raise ValueError(f"camera {column!r} has no image")
        return data


def lerobot_folder(
    path: str | os.PathLike,
    cameras: Sequence[str] | None = None,
    robot: RobotPreset | None = None,
    revision: str | None = None,
) -> Path:
    """A LeRobot dataset's local folder; from the Hub metadata first, then data and the chosen cameras' videos.

    Raises:
        ValueError: see `storage.dataset_folder` and `columns.find_cameras`.
    """
    folder = dataset_folder(path, revision, ("meta/**",))
    if Path(path).expanduser().is_dir():
        return folder
    metadata = read_lerobot_metadata(folder, f"LeRobot dataset {path}")
    chosen = metadata.find_cameras(cameras, robot.cameras if robot is not None else None)
    videos = [f"videos/*{column}/*" for column in chosen if metadata.is_video(column)]
    return dataset_folder(path, revision, ("meta/**", "data/**", *videos))


def _disable(progress: bool | None) -> bool | None:
    # None lets tqdm decide: no bar where standard error is not a terminal.
    return None if progress is None else not progress


def _has_content(path: Path) -> bool:
    try:
        return path.stat().st_size > 0
    except FileNotFoundError:
        return False


def _bytes_chunks(column: pa.ChunkedArray, name: str) -> tuple[list[int], list[pa.Array]]:
    """First row of every chunk, and its encoded images."""
    if not pa.types.is_struct(column.type) or column.type.get_field_index("bytes") < 0:
        raise ValueError(f"column {name!r} has type {column.type}; expected images as a struct of bytes and path")
    # The path beside the bytes is a leftover of the machine that recorded them.
    chunks = [chunk.field("bytes") for chunk in column.chunks]
    starts = np.cumsum([0] + [len(chunk) for chunk in chunks])[:-1].tolist()
    return starts, chunks


class _FileNumbers:
    """The number columns of one data file: (rows, ...) arrays, and what is wrong with rows of another length."""

    def __init__(self, rows: int) -> None:
        self.states = np.zeros((rows, 0), np.float32)
        self.actions = np.zeros((rows, 0), np.float32)
        self.chunks: np.ndarray | None = None
        self.control_steps: np.ndarray | None = None
        self.episode_index = np.zeros(rows, np.int64)
        self.frame_index: np.ndarray | None = None
        self.task_index: np.ndarray | None = None
        self.wrong_lengths: dict[int, str] = {}

    def first_problem(self, episode_index: int, start: int, stop: int) -> BadEpisode | None:
        """What is wrong with rows start ... stop - 1 as an episode, beyond what the table checks itself."""
        for row in sorted(self.wrong_lengths):
            if start <= row < stop:
                return BadEpisode(episode_index, row - start, self.wrong_lengths[row])
        if self.frame_index is not None:
            wrong = np.flatnonzero(self.frame_index[start:stop] != np.arange(stop - start))
            if len(wrong):
                frame = int(wrong[0])
                found = int(self.frame_index[start + frame])
                return BadEpisode(episode_index, frame, f"frame_index is {found}, expected {frame}")
        return None


def _read_numbers(
    path: Path,
    state_column: str,
    action_column: str,
    chunk_column: str | None = None,
    chunk_shape: tuple[int, int] | None = None,
) -> _FileNumbers:
    """Read the number columns of one parquet file, a batch at a time: the images beside them stay on disk."""
    file = pq.ParquetFile(path, memory_map=True)
    names = file.schema_arrow.names
    needed = [state_column, action_column, "episode_index", *([chunk_column] if chunk_column is not None else [])]
    indices = {"episode_index": "episode_index", "frame_index": "frame_index", "task_index": "task_index"}
    has_steps = STEP_COLUMN in names and pa.types.is_integer(file.schema_arrow.field(STEP_COLUMN).type)
    if chunk_column is not None and has_steps:
        indices[STEP_COLUMN] = "control_steps"
    wanted = [*needed, *(name for name in indices if name not in needed)]
    missing = [name for name in needed if name not in names]
    if missing:
        raise ValueError(f"{path}: has no column {', '.join(missing)}; columns that exist: {', '.join(names)}")
    numbers = _FileNumbers(file.metadata.num_rows)
    for name, attribute in indices.items():
        if name in names:
            setattr(numbers, attribute, np.zeros(file.metadata.num_rows, np.int64))
    if chunk_column is not None:
        numbers.chunks = np.zeros((file.metadata.num_rows, *chunk_shape), np.float32)
    row = 0
    for batch in file.iter_batches(_BATCH_ROWS, columns=[name for name in wanted if name in names], use_threads=False):
        stop = row + batch.num_rows
        for attribute, column in (("states", state_column), ("actions", action_column)):
            matrix, wrong = column_to_matrix(batch.column(column), column)
            if getattr(numbers, attribute).shape[1] == 0:
                setattr(numbers, attribute, np.zeros((file.metadata.num_rows, matrix.shape[1]), np.float32))
            values = getattr(numbers, attribute)
            for line, length in wrong.items():
                numbers.wrong_lengths[row + line] = f"{column} has {length} values, expected {values.shape[1]}"
            values[row:stop] = matrix
        if chunk_column is not None:
            numbers.chunks[row:stop], reasons = column_to_chunks(batch.column(chunk_column), chunk_column, chunk_shape)
            for line, reason in reasons.items():
                numbers.wrong_lengths.setdefault(row + line, reason)
        if numbers.control_steps is not None and batch.column(STEP_COLUMN).null_count:
            numbers.control_steps = None  # they only serve plots: rows without one make no episode bad
        for name, attribute in indices.items():
            if getattr(numbers, attribute) is not None:
                getattr(numbers, attribute)[row:stop] = batch.column(name).to_numpy(zero_copy_only=False)
        row = stop
    return numbers


def _hash_columns(path: Path, columns: Sequence[str], digest: Any) -> None:
    """Feed the stored bytes of some columns of a parquet file to a hash."""
    metadata = pq.read_metadata(path)
    with path.open("rb") as file:
        for group in range(metadata.num_row_groups):
            for index in range(metadata.num_columns):
                chunk = metadata.row_group(group).column(index)
                if not any(
                    chunk.path_in_schema == name or chunk.path_in_schema.startswith(name + ".") for name in columns
                ):
                    continue
                start = chunk.data_page_offset
                if chunk.has_dictionary_page and chunk.dictionary_page_offset:
                    start = min(start, chunk.dictionary_page_offset)
                digest.update(f"{chunk.path_in_schema}:{chunk.num_values}:".encode())
                file.seek(start)
                digest.update(file.read(chunk.total_compressed_size))
