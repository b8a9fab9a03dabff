"""Random access to a LeRobot dataset in a local folder."""

from __future__ import annotations

import glob
import hashlib
import os
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vla_adapter_hf.data.episodes import BadEpisode, BadEpisodeError, Episode, EpisodeTable, is_damage
from vla_adapter_hf.data.lerobot.metadata import LeRobotEpisode
from vla_adapter_hf.data.lerobot.reader import LeRobotReader, decode_cell, encoded_images
from vla_adapter_hf.data.source import DemonstrationSource
from vla_adapter_hf.data.storage import cache_directory
from vla_adapter_hf.utils.frames import is_jpeg


class LeRobotSource(DemonstrationSource):
    """A LeRobot dataset in a local folder, with random access."""

    reader: LeRobotReader

    def __init__(self, reader: LeRobotReader, cache_dir: Any = None, progress: bool | None = None) -> None:
        super().__init__(reader, cache_dir, progress)
        self.metadata = reader.metadata
        self._image_columns = [name for name in self.columns.cameras if not self.metadata.is_video(name)]
        self._described = {episode.index: episode for episode in self.metadata.episodes}
        self._shards: list[int] = []  # of each episode
        self._rows: list[int] = []  # its first row in the file, -1 if not known
        self._first_rows: np.ndarray = np.zeros(0, np.int64)  # its first row in the table of images
        self._image_files: list[Path] = []
        self._image_rows = 0
        self._image_table: datasets.Dataset | None = None
        self._image_chunks: dict[str, tuple[list[int], list[pa.Array]]] = {}

    def __getstate__(self) -> dict[str, Any]:
        # Arrow's arrays would be copied into a spawned worker; the memory-mapped table travels as file names.
        return {**self.__dict__, "_image_chunks": {}}

    def content_digest(self) -> str:
        columns = [self.columns.state, self.columns.action, "episode_index", "frame_index"]
        if self.columns.chunk is not None:
            columns.append(self.columns.chunk)
        # The files are hashed in their own order, which does not tell the state from the action.
        digest = hashlib.blake2b(repr(columns).encode(), digest_size=20)
        for data_path, episodes in self.reader.files:
            digest.update(repr([(episode.index, episode.length) for episode in episodes.values()]).encode())
            try:
                _hash_columns(self.reader.folder / data_path, columns, digest)
            except (pa.ArrowException, OSError) as error:
                if not is_damage(error):
                    raise
                # Its episodes are bad ones, see the table.
                digest.update(type(error).__name__.encode())
        return digest.hexdigest()

    def _take(self, shard: int, episode: Episode | BadEpisode) -> None:
        self._shards.append(shard)
        self._rows.append(-1 if isinstance(episode, BadEpisode) else episode.location)

    def _load_table(self) -> EpisodeTable:
        self._shards, self._rows = [], []
        table = super()._load_table()
        self._first_rows = np.array(self._rows, np.int64)
        if self._image_columns:
            # The table of images joins the files that have a readable episode.
            shards = sorted({shard for shard, row in zip(self._shards, self._rows, strict=True) if row >= 0})
            self._image_files = [self.reader.folder / self.reader.files[shard][0] for shard in shards]
            counts = [pq.read_metadata(path).num_rows for path in self._image_files]
            self._image_rows = sum(counts)
            before = dict(zip(shards, np.cumsum([0, *counts]).tolist(), strict=False))
            self._first_rows += [before.get(shard, 0) for shard in self._shards]
            self._first_rows[np.array(self._rows) < 0] = -1
        return table

    def _episode_at(self, position: int) -> LeRobotEpisode:
        return self._described[int(self.table.episode_indices[position])]

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
        """Give random access to frames in parquet: `datasets` writes them, once, to memory-mapped Arrow files.

        A parquet file has to be unpacked by the page, a hundred frames at a time.
        """
        self.table  # noqa: B018 - finds the files
        if self._image_columns and self._image_table is None and self._image_files:
            # `datasets` knows files by path and time of change, and takes a path for a pattern.
            cache = cache_directory(self.cache_dir) / "arrow" / _footers_digest(self._image_files)
            files = [str(path) for path in self._image_files]
            try:
                table = datasets.Dataset.from_parquet(
                    [glob.escape(path) for path in files], columns=self._image_columns, cache_dir=str(cache)
                )
            except datasets.exceptions.DatasetGenerationError as error:
                bad = self._first_unreadable_frame()
                if bad is None:  # a full disk, for one
                    raise
                raise BadEpisodeError(self.where, bad, "Fetch or record that file again") from error
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(
                    f"{self.where}: `datasets` cannot read the description of the columns in {files[0]} and the files "
                    f"after it: {error!r}. Fetch or record them again"
                ) from error
            if len(table) != self._image_rows:
                raise ValueError(
                    f"{self.where}: the cache in {cache} holds {len(table)} frames, the files {self._image_rows}. "
                    "Remove that folder"
                )
            self._image_table = table

    def _first_unreadable_frame(self) -> BadEpisode | None:
        """The first frame in the parquet files that cannot be unpacked; None if all can be."""
        row = 0
        for path in self._image_files:
            try:
                for batch in pq.ParquetFile(path).iter_batches(1, columns=self._image_columns, use_threads=False):
                    row += batch.num_rows
            except (pa.ArrowException, OSError) as error:
                if not is_damage(error):
                    raise
                first = self._first_rows
                position = int(np.flatnonzero((first >= 0) & (first <= row))[-1])
                index = int(self.table.episode_indices[position])
                return BadEpisode(index, row - int(first[position]), f"{path.name} is damaged: {error}")
        return None

    def read_images(self, position: int, frame: int) -> list[np.ndarray]:
        images = []
        for column in self.columns.cameras:
            if self.metadata.is_video(column):
                place = self._episode_at(position).videos[column]
                images.append(self.reader.read_video(place.path, place.first_frame + frame))
            else:
                images.append(decode_cell(self._encoded(column, int(self._first_rows[position]) + frame), column))
        return images

    def frames_are_jpeg(self) -> bool:
        column = self.columns.cameras[0]
        if self.metadata.is_video(column):
            return False
        self.table  # noqa: B018 - finds the rows
        return is_jpeg(self._encoded(column, int(self._first_rows[self._first_rows >= 0][0])) or b"")

    def _encoded(self, column: str, row: int) -> bytes | None:
        if column not in self._image_chunks:
            self.prepare_images()
            chunks = [encoded_images(chunk, column) for chunk in self._image_table.data.column(column).chunks]
            starts = np.cumsum([0] + [len(chunk) for chunk in chunks])[:-1].tolist()
            self._image_chunks[column] = starts, chunks
        starts, chunks = self._image_chunks[column]
        chunk = bisect_right(starts, row) - 1
        return chunks[chunk][row - starts[chunk]].as_py()


def _footers_digest(paths: Sequence[Path]) -> str:
    """A hash of where everything is in some parquet files, and how large it is."""
    digest = hashlib.blake2b(digest_size=16)
    for path in paths:
        with path.open("rb") as file:
            file.seek(-8 - pq.read_metadata(path).serialized_size, os.SEEK_END)
            digest.update(file.read())
    return digest.hexdigest()


def _hash_columns(path: Path, columns: Sequence[str], digest: Any) -> None:
    """Feed the stored bytes of some columns of a parquet file to a hash."""
    metadata = pq.read_metadata(path)
    with path.open("rb") as file:
        for group in range(metadata.num_row_groups):
            for index in range(metadata.num_columns):
                chunk = metadata.row_group(group).column(index)
                name = chunk.path_in_schema
                if not any(name == column or name.startswith(column + ".") for column in columns):
                    continue
                start = chunk.data_page_offset
                if chunk.has_dictionary_page and chunk.dictionary_page_offset:
                    start = min(start, chunk.dictionary_page_offset)
                digest.update(f"{name}:{chunk.num_values}:".encode())
                file.seek(start)
                digest.update(file.read(chunk.total_compressed_size))
