"""Plain datasets of `datasets`: one row per step, whatever their columns are called."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from PIL import Image

from vla_adapter_hf.data.arrow import column_to_texts, consecutive_runs, rows_to_episode
from vla_adapter_hf.data.chunks import check_stored_shape
from vla_adapter_hf.data.columns import EPISODE_NAMES, FRAME_NAMES, STEP_COLUMN, TEXT_NAMES, Columns, find_column
from vla_adapter_hf.data.episodes import BadEpisode, Episode, FrameReader, is_damage
from vla_adapter_hf.data.reader import DemonstrationReader
from vla_adapter_hf.data.source import DemonstrationSource
from vla_adapter_hf.utils.frames import decode_frame, is_jpeg


_BATCH_ROWS = 1 << 15
_BATCH_ROWS_WITH_FRAMES = 32


def camera_columns(features: datasets.Features) -> list[str]:
    """Columns that can hold camera frames: Image features, or arrays of three dimensions."""
    found = []
    for name, feature in features.items():
        is_array = isinstance(feature, datasets.Array3D)
        is_bytes = isinstance(feature, dict) and "bytes" in feature
        if is_array or is_bytes or isinstance(feature, datasets.Image):
            found.append(name)
    return found


def frame_from_cell(cell: Any, camera: str) -> np.ndarray:
    """What a camera column holds in one row -> uint8 (height, width, 3).

    Raises:
        ValueError: nothing there, or something that is no image; names the camera.
    """
    try:
        return _frame_from_cell(cell)
    except (ValueError, OSError) as error:
        if not is_damage(error):
            raise
        raise ValueError(f"camera {camera!r}: {error}") from error


def _frame_from_cell(cell: Any) -> np.ndarray:
    if isinstance(cell, dict):
        if cell.get("bytes"):
            return decode_frame(cell["bytes"])
        if cell.get("path"):
            with open(cell["path"], "rb") as file:
                return decode_frame(file.read())
        cell = None
    if isinstance(cell, bytes):
        return decode_frame(cell)
    if isinstance(cell, Image.Image):
        return np.array(cell.convert("RGB"))
    if cell is None:
        raise ValueError("there is no image")
    array = np.asarray(cell)
    if array.ndim != 3 or array.shape[2] != 3 or array.dtype.kind not in "iu":
        raise ValueError(f"an array of shape {array.shape} and dtype {array.dtype}; expected uint8 (height, width, 3)")
    if array.dtype != np.uint8:
        if array.min() < 0 or array.max() > 255:
            raise ValueError(f"pixel values from {array.min()} to {array.max()}; expected 0 to 255")
        array = array.astype(np.uint8)
    return array


class PlainReader(DemonstrationReader):
    """A `datasets.Dataset` or `datasets.IterableDataset` with one row per step.

    The rows of an episode in a `Dataset` may be anywhere. In an `IterableDataset` they are in order and next to each
    other, within one shard. Episodes are numbered by the episode column if it holds integers, else as they appear.

    Args:
        rows: the dataset.
        columns: the columns to read.
        name: the dataset's name.

    Raises:
        TypeError: not such a dataset.
        ValueError: columns that are missing or ambiguous.
    """

    def __init__(
        self,
        rows: datasets.Dataset | datasets.IterableDataset,
        columns: Columns = Columns(),  # noqa: B008 - frozen
        name: str = "dataset",
    ) -> None:
        self.name = name
        self.where = f"dataset {name}"
        self.is_local = isinstance(rows, datasets.Dataset)
        rows = rows.with_format(None) if self.is_local else rows
        if rows.features is None:
            rows = rows._resolve_features()
        self.columns = columns = self._find_columns(columns, rows.features)
        for camera in columns.cameras:
            if isinstance(rows.features[camera], datasets.Image):
                # The stored bytes, to be decoded here: `datasets` would go through a Pillow image and its EXIF rules.
                rows = rows.cast_column(camera, datasets.Image(decode=False))
        self.chunk_shape = self._stored_chunk_shape(rows)
        if self.is_local:
            rows = _in_order(rows, columns)
        self.rows = rows
        self.num_shards = 1 if self.is_local else rows.num_shards

    def _find_columns(self, columns: Columns, features: datasets.Features) -> Columns:
        images = camera_columns(features)
        others = [name for name in features if name not in images]

        def optional(what: str, given: str | None, usual: tuple[str, ...]) -> str | None:
            if given is None and not any(name in usual for name in others):
                return None
            return find_column(what, given, usual, others, self.where)

        # LeRobot's own number of a row goes before a recording's control step, which is in the same order.
        frame = "frame_index" if columns.frame is None and "frame_index" in others else columns.frame
        instruction = columns.instruction
        if columns.text is None:
            instruction = find_column("instruction", instruction, TEXT_NAMES, others, self.where)
        return replace(
            columns.find(images, others, self.where),
            episode=find_column("episode", columns.episode, EPISODE_NAMES, others, self.where),
            frame=optional("frame", frame, FRAME_NAMES),
            instruction=instruction if columns.text is None else None,
        )

    def _stored_chunk_shape(self, rows: datasets.Dataset | datasets.IterableDataset) -> tuple[int, int] | None:
        """Shape (K, A) of the stored chunks, judged by the first row; None without chunks or rows."""
        columns = self.columns
        if columns.chunk is None:
            return None
        first = next(iter(rows.select_columns([columns.action, columns.chunk])), None)
        if first is None:
            return None
        try:
            shape = np.shape(first[columns.chunk])
        except ValueError:  # actions of several sizes
            shape = None
        return check_stored_shape(shape, np.size(first[columns.action]), columns.chunk, self.where)

    def episodes(
        self, shard: int, keep: Callable[[int], bool] | None = None, load_frames: bool = True
    ) -> Iterator[Episode | BadEpisode]:
        columns = self.columns
        rows = self.rows if self.is_local else self.rows.shard(self.num_shards, shard)
        read = [columns.state, columns.action, columns.episode, columns.instruction, columns.chunk]
        read += [STEP_COLUMN] if columns.chunk is not None and STEP_COLUMN in rows.features else []
        read += columns.cameras if load_frames else ()
        rows = rows.select_columns(list(dict.fromkeys(name for name in read if name is not None)))
        batches = rows.with_format("arrow").iter(_BATCH_ROWS_WITH_FRAMES if load_frames else _BATCH_ROWS)
        for number, (first_row, key, table) in enumerate(consecutive_runs(batches, columns.episode)):
            if keep is None or keep(number):
                index = key if isinstance(key, int) else number * self.num_shards + shard
                yield self._episode(index, first_row, table)

    def _episode(self, index: int, first_row: int, table: pa.Table) -> Episode | BadEpisode:
        columns = self.columns
        episode = rows_to_episode(index, table, columns, {}, self.chunk_shape)
        if isinstance(episode, BadEpisode):
            return episode
        if columns.instruction is None:
            episode.texts = self.texts([""] * len(table))
        else:
            episode.texts = [text or "" for text in column_to_texts(table.column(columns.instruction))]
        episode.location = first_row
        episode.frames = partial(self._frame_readers, table)
        return self.converted(episode)

    def _frame_readers(self, table: pa.Table, frame: int) -> list[FrameReader]:
        cameras = self.columns.cameras
        return [partial(frame_from_cell, table.column(camera)[frame].as_py(), camera) for camera in cameras]


def _in_order(rows: datasets.Dataset, columns: Columns) -> datasets.Dataset:
    """The rows episode by episode, as episodes first appear, and each in the order of its frame column."""
    if len(rows) == 0:
        return rows
    numbers = rows.select_columns(list(dict.fromkeys(name for name in (columns.episode, columns.frame) if name)))
    table = pa.concat_tables(numbers.with_format("arrow").iter(_BATCH_ROWS))
    keys = table.column(columns.episode)
    if keys.null_count:
        raise ValueError(f"column {columns.episode!r} has rows without a value; every row must belong to an episode")
    _, first, episode = np.unique(np.asarray(keys.to_pylist()), return_index=True, return_inverse=True)
    frame = np.arange(len(rows)) if columns.frame is None else table.column(columns.frame).to_numpy()
    order = np.lexsort((frame, first[episode.reshape(-1)]))
    return rows if np.array_equal(order, np.arange(len(rows))) else rows.select(order)


class PlainSource(DemonstrationSource):
    """A `datasets.Dataset` with random access."""

    reader: PlainReader

    def __init__(self, reader: PlainReader, cache_dir: Any = None, progress: bool | None = None) -> None:
        super().__init__(reader, cache_dir, progress)
        self._frames = reader.rows.select_columns(list(self.columns.cameras))
        self._first_rows: list[int] = []  # of each episode, -1 for a bad one

    def content_digest(self) -> str:
        digest = hashlib.blake2b(digest_size=20)
        table = self.table
        for array in (table.states, table.actions, table.episode_indices, table.starts):
            digest.update(repr(array.shape).encode() + np.ascontiguousarray(array).tobytes())
        if table.chunks is not None:
            digest.update(repr(table.chunks.shape).encode() + table.chunks.tobytes())
        return digest.hexdigest()

    def _take(self, shard: int, episode: Episode | BadEpisode) -> None:
        self._first_rows.append(-1 if isinstance(episode, BadEpisode) else episode.location)

    def read_images(self, position: int, frame: int) -> list[np.ndarray]:
        self.table  # noqa: B018 - finds the rows
        row = self._frames[self._first_rows[position] + frame]
        return [frame_from_cell(row[camera], camera) for camera in self.columns.cameras]

    def frames_are_jpeg(self) -> bool:
        self.table  # noqa: B018 - finds the rows
        cell = self._frames[next(row for row in self._first_rows if row >= 0)][self.columns.cameras[0]]
        data = cell
        if isinstance(cell, dict):
            data = cell.get("bytes")
            if not data and cell.get("path"):
                with open(cell["path"], "rb") as file:
                    data = file.read(3)
        return isinstance(data, bytes) and is_jpeg(data)
