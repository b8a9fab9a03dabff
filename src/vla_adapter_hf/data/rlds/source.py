"""Random access to an RLDS dataset.

Every shard is read once: checksums are verified, states, actions and instructions are kept, and of each camera frame
the place of its bytes. That index is stored in the cache directory; afterwards a frame is one read of some kilobytes.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import OrderedDict
from dataclasses import asdict
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from vla_adapter_hf.data.episodes import BadEpisode, Episode, EpisodeTable
from vla_adapter_hf.data.rlds.files import shard_key
from vla_adapter_hf.data.rlds.reader import RLDSReader
from vla_adapter_hf.data.source import DemonstrationSource
from vla_adapter_hf.data.storage import cache_directory
from vla_adapter_hf.utils.files import atomic_path
from vla_adapter_hf.utils.frames import decode_frame, is_jpeg


_INDEX_VERSION = 2
_MAX_OPEN_SHARDS = 32
_ARRAYS = ("states", "actions", "text_ids", "episode_indices", "starts")


class RLDSSource(DemonstrationSource):
    """An RLDS dataset in a local folder, with random access."""

    reader: RLDSReader

    def __init__(self, reader: RLDSReader, cache_dir: Any = None, progress: bool | None = None) -> None:
        super().__init__(reader, cache_dir, progress)
        self._spans: list[np.ndarray] | np.ndarray = []  # (steps, cameras, 2), absolute, in the shard's file
        self._shard_of_episode: list[int] | np.ndarray = []
        self._open: OrderedDict[int, int] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}

    def __del__(self) -> None:
        for descriptor in getattr(self, "_open", {}).values():
            os.close(descriptor)

    def content_digest(self) -> str:
        # The stored checksums stand for the data: they are verified when it is read.
        columns = (self.columns.state, self.columns.action)
        digest = hashlib.blake2b(repr(columns).encode(), digest_size=20)
        for shard, records in zip(self.reader.shards, self.reader.records, strict=True):
            digest.update(shard_key(shard).encode())
            digest.update(np.array([(r.offset, r.length, r.stored_crc) for r in records], np.int64).tobytes())
        return digest.hexdigest()

    def _take(self, shard: int, episode: Episode | BadEpisode) -> None:
        self._shard_of_episode.append(shard)
        if isinstance(episode, Episode):
            self._spans.append(episode.location[: len(episode.actions)])

    def _load_table(self) -> EpisodeTable:
        parts = (_INDEX_VERSION, self.fingerprint(), self.columns, self.reader.verify_checksums)
        name = hashlib.blake2b(repr(parts).encode(), digest_size=20).hexdigest()
        index_path = cache_directory(self.cache_dir) / "rlds_index" / f"{name}.npz"
        try:
            return self._load_index(index_path)
        except (OSError, KeyError, ValueError, BadZipFile):
            pass  # not there or not readable
        self._spans, self._shard_of_episode = [np.zeros((0, len(self.columns.cameras), 2), np.int64)], []
        table = super()._load_table()
        self._spans = np.concatenate(self._spans)
        self._shard_of_episode = np.array(self._shard_of_episode, np.int64)
        if not table.problems:  # a damaged record may be replaced under the same checksum
            with atomic_path(index_path) as temporary:
                self._save_index(temporary, table)
        return table

    def _save_index(self, path: Path, table: EpisodeTable) -> None:
        unusable = [[position, asdict(bad)] for position, bad in table.unusable.items()]
        np.savez(
            path,
            **{name: getattr(table, name) for name in _ARRAYS},
            spans=self._spans,
            shard_of_episode=self._shard_of_episode,
            words=np.frombuffer(json.dumps([table.texts, unusable]).encode(), np.uint8),
        )

    def _load_index(self, path: Path) -> EpisodeTable:
        with np.load(path) as stored:  # allow_pickle is off by default
            self._spans, self._shard_of_episode = stored["spans"], stored["shard_of_episode"]
            texts, unusable = json.loads(stored["words"].tobytes())
            arrays = {name: stored[name] for name in _ARRAYS}
        return EpisodeTable(
            **arrays, texts=texts, unusable={position: BadEpisode(**described) for position, described in unusable}
        )

    def positions_of_split(self, split: str) -> list[int]:
        shards = self.reader.shards_of_split(split)
        self.table  # noqa: B018 - fills the index
        return np.flatnonzero(np.isin(self._shard_of_episode, shards)).tolist()

    def read_images(self, position: int, frame: int) -> list[np.ndarray]:
        return [decode_frame(data, like_tensorflow=True) for data in self._encoded(position, frame)]

    def frames_are_jpeg(self) -> bool:
        lengths = self.table.lengths
        return is_jpeg(self._encoded(int(np.flatnonzero(lengths)[0]), 0)[0])

    def _encoded(self, position: int, frame: int) -> list[bytes]:
        step = int(self.table.starts[position]) + frame
        shard = int(self._shard_of_episode[position])
        # pread keeps no position: a descriptor that came with a fork is safe to share.
        return [os.pread(self._descriptor(shard), stop - start, start) for start, stop in self._spans[step].tolist()]

    def _descriptor(self, shard: int) -> int:
        descriptor = self._open.pop(shard, None)
        if descriptor is None:
            descriptor = os.open(self.reader.shards[shard].path, os.O_RDONLY)
        self._open[shard] = descriptor
        while len(self._open) > _MAX_OPEN_SHARDS:
            os.close(self._open.popitem(last=False)[1])
        return descriptor
