"""LeRobot datasets v2.0, v2.1 and v3.0, in a folder or on the Hub, without the lerobot package."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import HfFileSystem, hf_hub_download

from vla_adapter_hf.data.arrow import consecutive_runs, joined_array, rows_to_episode
from vla_adapter_hf.data.chunks import check_stored_shape
from vla_adapter_hf.data.columns import STEP_COLUMN, Columns
from vla_adapter_hf.data.episodes import BadEpisode, Episode, FrameReader, is_damage
from vla_adapter_hf.data.lerobot.metadata import LeRobotEpisode, LeRobotMetadata, read_lerobot_metadata
from vla_adapter_hf.data.lerobot.video import VideoCache
from vla_adapter_hf.data.reader import DemonstrationReader
from vla_adapter_hf.utils.frames import decode_frame


_BATCH_ROWS = 1 << 15
_BATCH_ROWS_WITH_FRAMES = 32


class LeRobotReader(DemonstrationReader):
    """A LeRobot dataset. A shard is a data file.

    From the Hub, parquet files are read as they come, and each MP4 file is fetched when its first frame is needed.

    Args:
        folder: the folder that holds `meta/` and, unless `repo_id` is given, `data/` and `videos/`.
        columns: the columns to read.
        name: the dataset's name, by default the folder's.
        repo_id: the Hub dataset repository, if only `meta/` is here. The folder is then named after the commit.
        max_open_videos: MP4 files that each process keeps open.
        video_backend: what decodes them, `"pyav"` or `"torchcodec"`.

    Raises:
        ValueError: metadata that cannot be read, columns that are missing or ambiguous, a `video_backend` that is not
            known.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        columns: Columns = Columns(),  # noqa: B008 - frozen
        name: str | None = None,
        repo_id: str | None = None,
        max_open_videos: int = 16,
        video_backend: str = "pyav",
    ) -> None:
        self.folder = Path(folder)
        self.repo_id = repo_id
        self.is_local = repo_id is None
        self.name = name or self.folder.resolve().name
        self.where = f"LeRobot dataset {self.name}"
        metadata: LeRobotMetadata = read_lerobot_metadata(self.folder, self.where)
        self.metadata = metadata
        self.columns = columns = columns.find(metadata.camera_columns, metadata.number_columns, self.where)
        self._widths = {column: metadata.width(column) for column in (columns.state, columns.action)}
        if columns.chunk is not None:
            shape = metadata.features[columns.chunk].get("shape")
            self.chunk_shape = check_stored_shape(shape, self._widths[columns.action], columns.chunk, self.where)
        self.fps = metadata.fps
        self.state_names, self.action_names = metadata.names(columns.state), metadata.names(columns.action)
        files: dict[str, dict[int, LeRobotEpisode]] = {}
        for episode in metadata.episodes:
            files.setdefault(episode.data_path, {})[episode.index] = episode
        self.files = list(files.items())
        self.num_shards = len(files)
        self.num_episodes = len(metadata.episodes)
        self._videos = VideoCache(max_open_videos, video_backend)

    @contextmanager
    def _open(self, data_path: str) -> Iterator[pq.ParquetFile]:
        if self.is_local:
            with pq.ParquetFile(self.folder / data_path, memory_map=True) as file:
                yield file
            return
        # A snapshot's folder is named after its commit.
        with HfFileSystem().open(f"datasets/{self.repo_id}@{self.folder.name}/{data_path}", "rb") as remote:
            yield pq.ParquetFile(remote)

    def read_video(self, path: str, frame: int) -> np.ndarray:
        """One frame of an MP4 file of the dataset: uint8 (height, width, 3).

        Raises:
            VideoError: see `VideoFile`.
        """
        if self.is_local:
            local = str(self.folder / path)
        else:
            local = hf_hub_download(self.repo_id, path, repo_type="dataset", revision=self.folder.name)
        return self._videos.read(local, frame, self.metadata.fps)

    def episodes(
        self, shard: int, keep: Callable[[int], bool] | None = None, load_frames: bool = True
    ) -> Iterator[Episode | BadEpisode]:
        data_path, described = self.files[shard]
        wanted = {index: episode for index, episode in described.items() if keep is None or keep(index)}
        if not wanted:
            return
        seen: set[int] = set()
        problem = None
        if self.is_local and not (self.folder / data_path).is_file():
            problem = f"{data_path} does not exist"
        try:
            for first_row, index, rows in self._episode_rows(data_path, load_frames) if problem is None else ():
                if index in wanted and index not in seen:
                    yield self._episode(wanted[index], first_row, rows, load_frames)
                elif index not in described and (keep is None or keep(index)):
                    yield BadEpisode(index, None, f"is in {data_path} but not in meta/episodes")
                seen.add(index)
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            if not is_damage(error):
                raise
            problem = f"{data_path} cannot be read: {error}"
        for index, episode in wanted.items():
            if index not in seen:
                missing = f"should have {episode.length} frames by the metadata, the data has 0"
                yield BadEpisode(index, None, problem or (missing if episode.length else "is empty"))

    def _episode_rows(self, data_path: str, load_frames: bool) -> Iterator[tuple[int, int, pa.Table]]:
        """(first row in the file, episode index, rows) of one episode after the other."""
        columns = self.columns
        needed = [columns.state, columns.action, "episode_index"]
        needed += [columns.chunk] if columns.chunk is not None else []
        needed += [camera for camera in columns.cameras if not self.metadata.is_video(camera)] if load_frames else []
        optional = ["frame_index", "task_index", *([STEP_COLUMN] if columns.chunk is not None else [])]
        with self._open(data_path) as file:
            names = file.schema_arrow.names
            missing = [name for name in needed if name not in names]
            if missing:
                raise ValueError(
                    f"{self.where}: {data_path} has no column {', '.join(missing)}; columns that exist: "
                    f"{', '.join(names)}"
                )
            read = list(dict.fromkeys([*needed, *(name for name in optional if name in names)]))
            size = _BATCH_ROWS_WITH_FRAMES if load_frames else _BATCH_ROWS
            batches = file.iter_batches(size, columns=read, use_threads=False)
            yield from consecutive_runs((pa.Table.from_batches([batch]) for batch in batches), "episode_index")

    def _episode(
        self, described: LeRobotEpisode, first_row: int, rows: pa.Table, load_frames: bool
    ) -> Episode | BadEpisode:
        episode = rows_to_episode(described.index, rows, self.columns, self._widths, self.chunk_shape)
        if isinstance(episode, BadEpisode):
            return episode
        if "frame_index" in rows.column_names:
            numbers = rows.column("frame_index").to_numpy()
            wrong = np.flatnonzero(numbers != np.arange(len(numbers)))
            if len(wrong):
                frame = int(wrong[0])
                return BadEpisode(described.index, frame, f"frame_index is {numbers[frame]}, expected {frame}")
        episode.location = first_row
        episode.texts = self.texts(self._tasks(described, rows))
        episode.unusable = self._without_task(episode, rows) or self._without_video(described)
        if load_frames and episode.unusable is None:
            stored = [camera for camera in self.columns.cameras if not self.metadata.is_video(camera)]
            cells = {camera: encoded_images(rows.column(camera), camera) for camera in stored}
            episode.frames = partial(self._frame_readers, cells, described)
        return self.converted(episode, described.length)

    def _tasks(self, described: LeRobotEpisode, rows: pa.Table) -> list[str]:
        if "task_index" not in rows.column_names:
            return [described.tasks[0] if described.tasks else ""] * len(rows)
        return [self.metadata.tasks.get(task, "") for task in rows.column("task_index").to_pylist()]

    def _without_task(self, episode: Episode, rows: pa.Table) -> BadEpisode | None:
        frame = next((frame for frame, text in enumerate(episode.texts) if not text.strip()), None)
        if frame is None or "task_index" not in rows.column_names or self.columns.text is not None:
            return None
        task = rows.column("task_index")[frame].as_py()
        return BadEpisode(episode.index, frame, f"task_index {task} has no text in meta/tasks")

    def _without_video(self, described: LeRobotEpisode) -> BadEpisode | None:
        for camera in self.columns.cameras:
            if self.metadata.is_video(camera):
                place = described.videos.get(camera)
                if place is None:
                    return BadEpisode(described.index, None, f"has no video of camera {camera!r}")
                if self.is_local and not _has_content(self.folder / place.path):
                    return BadEpisode(described.index, 0, f"video {place.path} is missing or empty")
        return None

    def _frame_readers(self, cells: dict[str, pa.Array], described: LeRobotEpisode, frame: int) -> list[FrameReader]:
        readers: list[FrameReader] = []
        for camera in self.columns.cameras:
            if camera in cells:
                readers.append(partial(decode_cell, cells[camera][frame].as_py(), camera))
            else:
                place = described.videos[camera]
                readers.append(partial(self.read_video, place.path, place.first_frame + frame))
        return readers


def encoded_images(column: pa.ChunkedArray | pa.Array, name: str) -> pa.Array:
    """The encoded frames of a camera column of parquet.

    Raises:
        ValueError: the column does not hold images.
    """
    if not pa.types.is_struct(column.type) or column.type.get_field_index("bytes") < 0:
        raise ValueError(f"column {name!r} has type {column.type}; expected images as a struct of bytes and path")
    # The path next to the bytes is from the machine that recorded them.
    return joined_array(column).field("bytes")


def decode_cell(data: bytes | None, camera: str) -> np.ndarray:
    """One encoded frame -> uint8 (height, width, 3).

    Raises:
        ValueError: there is no frame, or none that can be decoded.
    """
    if not data:
        raise ValueError(f"camera {camera!r} has no image")
    return decode_frame(data)


def _has_content(path: Path) -> bool:
    try:
        return path.stat().st_size > 0
    except FileNotFoundError:
        return False
