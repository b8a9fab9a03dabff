"""RLDS / TFDS datasets with random access, without TensorFlow.

Every shard is read once: checksums are verified, states, actions and instructions are kept, and of each camera frame
the place of its bytes. That index is stored in the cache directory; afterwards a frame is one read of some kilobytes.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from tqdm.auto import tqdm

from vla_adapter_hf.data.columns import ACTION_NAMES, STATE_NAMES, find_cameras, find_column, last_name
from vla_adapter_hf.data.episodes import BadEpisode, EpisodeTable, EpisodeTableBuilder
from vla_adapter_hf.data.frames import decode_frame, is_jpeg
from vla_adapter_hf.data.rlds.files import RLDSFiles, Shard, find_version_folder, read_rlds_files, shard_key
from vla_adapter_hf.data.rlds.tfrecord import Feature, Record, TFRecordError, parse_example, read_record, scan_records
from vla_adapter_hf.data.source import DemonstrationSource
from vla_adapter_hf.data.storage import cache_directory
from vla_adapter_hf.robots import RobotPreset
from vla_adapter_hf.utils.files import atomic_path


_INSTRUCTION_NAMES = ("language_instruction", "natural_language_instruction", "instruction", "language_text")
_INDEX_VERSION = 1
_MAX_OPEN_SHARDS = 32


@dataclass(frozen=True)
class RLDSColumns:
    """Flattened feature names of what is read from a record."""

    cameras: tuple[str, ...]
    state: str
    action: str
    instruction: str | None


@dataclass
class RLDSEpisode:
    """One record taken apart: states (n, S), actions (n, A), one text per step, image spans (n, cameras, 2)."""

    states: np.ndarray
    actions: np.ndarray
    texts: list[str]
    spans: np.ndarray


def find_rlds_columns(
    files: RLDSFiles,
    features: dict[str, Feature],
    where: str,
    cameras: Sequence[str] | None = None,
    robot: RobotPreset | None = None,
    state_column: str | None = None,
    action_column: str | None = None,
    instruction_column: str | None = None,
) -> RLDSColumns:
    """The columns to read, from `features.json` and the features of a first record; see `columns`."""
    steps = {name: feature for name, feature in features.items() if name.startswith("steps/")}
    numbers = [name for name, feature in steps.items() if feature.kind in ("float", "int64")]
    if files.image_features is not None:
        images = [name for name in files.image_features if name in steps]
    else:
        images = [name for name, feature in steps.items() if feature.kind == "bytes" and _looks_like_image(feature)]
    texts = [name for name, feature in steps.items() if feature.kind == "bytes" and name not in images]
    instruction = None
    if instruction_column is not None or any(last_name(name) in _INSTRUCTION_NAMES for name in texts):
        instruction = find_column(
            "instruction", "instruction_column", instruction_column, _INSTRUCTION_NAMES, texts, where
        )
    return RLDSColumns(
        cameras=tuple(find_cameras(cameras, robot.cameras if robot is not None else None, sorted(images), where)),
        state=find_column("state", "state_column", state_column, STATE_NAMES, sorted(numbers), where),
        action=find_column("action", "action_column", action_column, ACTION_NAMES, sorted(numbers), where),
        instruction=instruction,
    )


def first_readable_example(shards: Sequence[Shard], where: str) -> dict[str, Feature]:
    """The features of the first record that is not damaged: what shows which columns there are.

    Raises:
        ValueError: there is none.
    """
    damage = None
    for shard in shards:
        with open(shard.path, "rb") as file:
            for record in scan_records(shard.path):
                try:
                    return parse_example(read_record(file, record, str(shard.path)))
                except TFRecordError as error:
                    damage = error
    raise ValueError(f"{where}: there are no episodes that can be read{f': {damage}' if damage else ''}")


def _looks_like_image(feature: Feature) -> bool:
    first = feature.strings()[:1]
    return bool(first) and first[0][:4] in (b"\xff\xd8\xff\xe0", b"\xff\xd8\xff\xe1", b"\xff\xd8\xff\xdb", b"\x89PNG")


def read_rlds_episode(
    data: bytes, columns: RLDSColumns, files: RLDSFiles, episode_index: int
) -> RLDSEpisode | BadEpisode:
    """Take one record's data apart; sizes that do not fit together are a BadEpisode."""
    try:
        features = parse_example(data)
        missing = [name for name in (*columns.cameras, columns.state, columns.action) if name not in features]
        if missing:
            return BadEpisode(episode_index, None, f"has no {', '.join(missing)}")
        spans = [features[camera].spans() for camera in columns.cameras]
        steps = len(spans[0])
        for camera, camera_spans in zip(columns.cameras, spans, strict=True):
            if len(camera_spans) != steps:
                return BadEpisode(
                    episode_index,
                    min(len(camera_spans), steps),
                    f"has {len(camera_spans)} frames of {camera} and {steps} of {columns.cameras[0]}",
                )
        values = {}
        for name in (columns.state, columns.action):
            flat = features[name].numbers().astype(np.float32, copy=False)
            width = int(np.prod(files.shapes[name])) if name in files.shapes else (len(flat) // steps if steps else 0)
            if len(flat) != width * steps:
                return BadEpisode(
                    episode_index,
                    len(flat) // width if width else 0,
                    f"{name} has {len(flat)} values, expected {width} for each of {steps} steps",
                )
            values[name] = flat.reshape(steps, width)
        texts = [""]
        if columns.instruction is not None and columns.instruction in features:
            texts = [text.decode() for text in features[columns.instruction].strings()] or [""]
    except TFRecordError as error:
        return BadEpisode(episode_index, None, str(error))
    if len(texts) != steps:
        texts = texts[:1] * steps
    return RLDSEpisode(
        values[columns.state], values[columns.action], texts, np.stack(spans, axis=1).reshape(steps, len(spans), 2)
    )


class RLDSSource(DemonstrationSource):
    """An RLDS dataset in a local folder; episodes are numbered in reading order over all splits, `train` first.

    Args:
        folder: the version folder with the shards, or a folder above it.
        cameras: camera names or full feature names, in order; see `columns.find_cameras`.
        robot: the preset whose conventions are applied, or None.
        state_column, action_column, instruction_column: features, where their names are not the usual ones.
        instruction: one text for all episodes, instead of the recorded ones.
        name: which dataset, where `folder` holds several.
        verify_checksums: check every record's data while indexing (a third of a gigabyte per second).
        cache_dir: where the index is stored; see `storage.cache_directory`.
        progress: show a progress bar while indexing.

    Raises:
        ValueError: files that are missing or damaged, columns that are missing or ambiguous.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        cameras: Sequence[str] | None = None,
        robot: RobotPreset | None = None,
        state_column: str | None = None,
        action_column: str | None = None,
        instruction_column: str | None = None,
        instruction: str | None = None,
        name: str | None = None,
        verify_checksums: bool = True,
        cache_dir: str | os.PathLike | None = None,
        progress: bool | None = None,
    ) -> None:
        self.files = read_rlds_files(find_version_folder(Path(folder), name))
        self.name = self.files.name
        self.where = f"RLDS dataset {self.name}"
        self.robot = robot
        self.instruction = instruction
        self.verify_checksums = verify_checksums
        self.cache_dir = cache_dir
        self.progress = progress
        self._records = [scan_records(shard.path) for shard in self.files.shards]
        for shard, records in zip(self.files.shards, self._records, strict=True):
            if shard.records is not None and shard.records != len(records):
                raise ValueError(
                    f"{self.where}: {shard.path.name} has {len(records)} episodes, dataset_info.json says "
                    f"{shard.records}"
                )
        first = first_readable_example(self.files.shards, self.where)
        self.columns = find_rlds_columns(
            self.files, first, self.where, cameras, robot, state_column, action_column, instruction_column
        )
        self.cameras = self.columns.cameras
        self._spans = np.zeros((0, len(self.cameras), 2), np.int64)  # absolute, in the shard's file
        self._shard_of_episode = np.zeros(0, np.int64)
        self._open: OrderedDict[int, int] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}

    def __del__(self) -> None:
        for descriptor in getattr(self, "_open", {}).values():
            os.close(descriptor)

    def content_digest(self) -> str:
        # The stored checksums stand for the data: they are verified when it is read.
        digest = hashlib.blake2b(repr((self.columns.state, self.columns.action)).encode(), digest_size=20)
        for shard, records in zip(self.files.shards, self._records, strict=True):
            digest.update(shard_key(shard).encode())
            digest.update(np.array([(r.offset, r.length, r.stored_crc) for r in records], np.int64).tobytes())
        return digest.hexdigest()

    def _load_table(self) -> EpisodeTable:
        parts = (_INDEX_VERSION, self.fingerprint(), self.columns, self.instruction, self.verify_checksums)
        name = hashlib.blake2b(repr(parts).encode(), digest_size=20).hexdigest()
        index_path = cache_directory(self.cache_dir) / "rlds_index" / f"{name}.npz"
        try:
            return self._load_index(index_path)
        except (OSError, KeyError, ValueError, BadZipFile):
            pass  # not there, or not readable: made again below
        table = self._build_index()
        if not table.problems:  # a damaged record may be replaced, under the same checksum
            with atomic_path(index_path) as temporary:
                self._save_index(temporary, table)
        return table

    def _build_index(self) -> EpisodeTable:
        builder = EpisodeTableBuilder(self.where, self.robot)
        spans: list[np.ndarray] = []
        shard_of_episode: list[int] = []
        total = sum(record.length for records in self._records for record in records)
        with tqdm(
            total=total,
            desc=f"Indexing {self.name}",
            unit="B",
            unit_scale=True,
            disable=None if self.progress is None else not self.progress,
        ) as bar:
            for number, (shard, records) in enumerate(zip(self.files.shards, self._records, strict=True)):
                with open(shard.path, "rb") as file:
                    for record in records:
                        shard_of_episode.append(number)
                        spans.append(self._add_record(builder, file, shard.path, record, len(shard_of_episode) - 1))
                        bar.update(record.length)
        table = builder.build()
        self._spans = np.concatenate(spans) if spans else self._spans
        self._shard_of_episode = np.array(shard_of_episode, np.int64)
        return table

    def _add_record(
        self, builder: EpisodeTableBuilder, file: Any, path: Path, record: Record, index: int
    ) -> np.ndarray:
        """Add one record's episode to the table; returns its frames' spans in the file, (steps kept, cameras, 2)."""
        nothing = np.zeros((0, len(self.cameras), 2), np.int64)
        try:
            data = read_record(file, record, path.name, self.verify_checksums)
        except TFRecordError as error:
            builder.add_bad(BadEpisode(index, None, str(error)))
            return nothing
        episode = read_rlds_episode(data, self.columns, self.files, index)
        if isinstance(episode, BadEpisode):
            builder.add_bad(episode)
            return nothing
        if self.instruction is not None:
            ids: np.ndarray | int = builder.texts.id_of(self.instruction)
        else:
            ids = np.array([builder.texts.id_of(text) for text in episode.texts], np.int32)
        kept = builder.add(index, episode.states, episode.actions, ids)
        return episode.spans[:kept] + record.offset

    def _save_index(self, path: Path, table: EpisodeTable) -> None:
        np.savez(
            path,
            states=table.states,
            actions=table.actions,
            text_ids=table.text_ids,
            episode_indices=table.episode_indices,
            starts=table.starts,
            spans=self._spans,
            shard_of_episode=self._shard_of_episode,
            texts=np.frombuffer(json.dumps(table.texts).encode(), np.uint8),
        )

    def _load_index(self, path: Path) -> EpisodeTable:
        with np.load(path) as stored:
            self._spans, self._shard_of_episode = stored["spans"], stored["shard_of_episode"]
            return EpisodeTable(
                states=stored["states"],
                actions=stored["actions"],
                text_ids=stored["text_ids"],
                texts=json.loads(stored["texts"].tobytes()),
                episode_indices=stored["episode_indices"],
                starts=stored["starts"],
            )

    def frame_problems(self) -> dict[int, BadEpisode]:
        empty = [number for number, text in enumerate(self.table.texts) if not text.strip()]
        problems = {}
        if empty:
            for position in range(len(self.table)):
                unlabelled = np.flatnonzero(np.isin(self.table.text_ids[self.table.steps(position)], empty))
                if len(unlabelled):
                    problems[position] = BadEpisode(position, int(unlabelled[0]), "has no instruction")
        return problems

    def positions_of_split(self, split: str) -> list[int]:
        splits = [shard.split for shard in self.files.shards]
        if split not in splits:
            raise ValueError(
                f"{self.where}: split={split!r} does not exist; splits that do: {', '.join(dict.fromkeys(splits))}"
            )
        of_split = [number for number, name in enumerate(splits) if name == split]
        self.table  # noqa: B018 - fills the index
        return np.flatnonzero(np.isin(self._shard_of_episode, of_split)).tolist()

    def read_images(self, position: int, frame: int) -> list[np.ndarray]:
        return [decode_frame(data, like_tensorflow=True) for data in self._encoded(position, frame)]

    def frames_are_jpeg(self) -> bool:
        return is_jpeg(self._encoded(0, 0)[0])

    def _encoded(self, position: int, frame: int) -> list[bytes]:
        step = int(self.table.starts[position]) + frame
        shard = int(self._shard_of_episode[position])
        # pread keeps no position: a descriptor that came with a fork is safe to share.
        return [os.pread(self._descriptor(shard), stop - start, start) for start, stop in self._spans[step].tolist()]

    def _descriptor(self, shard: int) -> int:
        descriptor = self._open.pop(shard, None)
        if descriptor is None:
            descriptor = os.open(self.files.shards[shard].path, os.O_RDONLY)
        self._open[shard] = descriptor
        while len(self._open) > _MAX_OPEN_SHARDS:
            os.close(self._open.popitem(last=False)[1])
        return descriptor
