"""RLDS / TFDS datasets, without TensorFlow: one record, which is one episode, is in memory at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from vla_adapter_hf.data.columns import Columns, find_column, last_name
from vla_adapter_hf.data.episodes import BadEpisode, Episode, FrameReader
from vla_adapter_hf.data.reader import DemonstrationReader
from vla_adapter_hf.data.rlds.files import Shard, find_version_folder, read_rlds_files
from vla_adapter_hf.data.rlds.tfrecord import Feature, Record, TFRecordError, parse_example, read_record, scan_records
from vla_adapter_hf.utils.frames import decode_frame


_TEXT_NAMES = ("language_instruction", "natural_language_instruction", "instruction", "language_text")
_IMAGE_STARTS = (b"\xff\xd8\xff\xe0", b"\xff\xd8\xff\xe1", b"\xff\xd8\xff\xdb", b"\x89PNG")


class RLDSReader(DemonstrationReader):
    """An RLDS dataset in a local folder. Episodes are numbered in reading order over all splits, `train` first.

    Args:
        folder: the version folder with the shards, or a folder above it.
        columns: the features to read.
        name: which dataset, where `folder` holds several.
        verify_checksums: check every record's data.

    Raises:
        ValueError: files that are missing or damaged, columns that are missing or ambiguous.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        columns: Columns = Columns(),  # noqa: B008 - frozen
        name: str | None = None,
        verify_checksums: bool = True,
    ) -> None:
        self.files = read_rlds_files(find_version_folder(Path(folder), name))
        self.name = self.files.name
        self.where = f"RLDS dataset {self.name}"
        self.verify_checksums = verify_checksums
        self.shards: list[Shard] = self.files.shards
        self.num_shards = len(self.shards)
        self.records: list[list[Record]] = [self._scan(shard) for shard in self.shards]
        self._first_episodes = np.cumsum([0, *map(len, self.records)]).tolist()
        self.num_episodes = self._first_episodes[-1]
        self.columns = self._find_columns(columns, self._first_readable_example())

    def _scan(self, shard: Shard) -> list[Record]:
        records = scan_records(shard.path)
        if shard.records is not None and shard.records != len(records):
            raise ValueError(
                f"{self.where}: {shard.path.name} has {len(records)} episodes, dataset_info.json says {shard.records}"
            )
        return records

    def _first_readable_example(self) -> dict[str, Feature]:
        """The features of the first record that is not damaged: it shows which columns there are."""
        damage = None
        for shard, records in zip(self.shards, self.records, strict=True):
            with open(shard.path, "rb") as file:
                for record in records:
                    try:
                        return parse_example(read_record(file, record, str(shard.path)))
                    except TFRecordError as error:
                        damage = error
        raise ValueError(f"{self.where}: there are no episodes that can be read{f': {damage}' if damage else ''}")

    def _find_columns(self, columns: Columns, features: dict[str, Feature]) -> Columns:
        steps = {name: feature for name, feature in features.items() if name.startswith("steps/")}
        numbers = sorted(name for name, feature in steps.items() if feature.kind in ("float", "int64"))
        if self.files.image_features is not None:
            images = [name for name in self.files.image_features if name in steps]
        else:
            images = [
                name for name, feature in steps.items() if feature.kind == "bytes" and _looks_like_image(feature)
            ]
        texts = [name for name, feature in steps.items() if feature.kind == "bytes" and name not in images]
        instruction = columns.instruction
        if instruction is not None or any(last_name(name) in _TEXT_NAMES for name in texts):
            instruction = find_column("instruction", instruction, _TEXT_NAMES, texts, self.where)
        columns = replace(columns, chunk=None, instruction=instruction)  # records hold no chunks
        return columns.find(sorted(images), numbers, self.where)

    def shards_of_split(self, split: str) -> list[int]:
        splits = [shard.split for shard in self.shards]
        if split not in splits:
            known = ", ".join(dict.fromkeys(splits))
            raise ValueError(f"{self.where}: split={split!r} does not exist; splits that do: {known}")
        return [number for number, name in enumerate(splits) if name == split]

    def episodes(
        self, shard: int, keep: Callable[[int], bool] | None = None, load_frames: bool = True
    ) -> Iterator[Episode | BadEpisode]:
        path = self.shards[shard].path
        with open(path, "rb") as file:
            for index, record in enumerate(self.records[shard], self._first_episodes[shard]):
                if keep is not None and not keep(index):
                    continue
                try:
                    data = read_record(file, record, path.name, self.verify_checksums)
                    episode = self._episode(index, data)
                except TFRecordError as error:
                    yield BadEpisode(index, None, str(error))
                    continue
                if isinstance(episode, Episode):
                    episode.frames = partial(self._frame_readers, data, episode.location)
                    episode.location = episode.location + record.offset
                    episode = self.converted(episode)
                yield episode

    def _episode(self, index: int, data: bytes) -> Episode | BadEpisode:
        """Take one record's data apart. `location` is the frames' spans in it, int64 (n, cameras, 2)."""
        columns = self.columns
        features = parse_example(data)
        missing = [name for name in (*columns.cameras, columns.state, columns.action) if name not in features]
        if missing:
            return BadEpisode(index, None, f"has no {', '.join(missing)}")
        spans = [features[camera].spans() for camera in columns.cameras]
        steps = len(spans[0])
        for camera, of_camera in zip(columns.cameras, spans, strict=True):
            if len(of_camera) != steps:
                reason = f"has {len(of_camera)} frames of {camera} and {steps} of {columns.cameras[0]}"
                return BadEpisode(index, min(len(of_camera), steps), reason)
        values = []
        for name in (columns.state, columns.action):
            flat = features[name].numbers().astype(np.float32, copy=False)
            shape = self.files.shapes.get(name)
            width = int(np.prod(shape)) if shape is not None else (len(flat) // steps if steps else 0)
            if len(flat) != width * steps:
                reason = f"{name} has {len(flat)} values, expected {width} for each of {steps} steps"
                return BadEpisode(index, len(flat) // width if width else 0, reason)
            values.append(flat.reshape(steps, width))
        texts, unusable = self._texts(index, features)
        if len(texts) != steps:
            texts = texts[:1] * steps
        location = np.stack(spans, axis=1).reshape(steps, len(spans), 2)
        return Episode(index, *values, texts=self.texts(texts), unusable=unusable, location=location)

    def _texts(self, index: int, features: dict[str, Feature]) -> tuple[list[str], BadEpisode | None]:
        name = self.columns.instruction
        if name is None or name not in features or self.columns.text is not None:
            return [""], None
        recorded = features[name].strings() or [b""]
        try:
            return [text.decode() for text in recorded], None
        except UnicodeDecodeError as error:
            frame = recorded.index(error.object)
            return [""], BadEpisode(index, frame, f"the instruction in {name} is not UTF-8 text")

    def _frame_readers(self, data: bytes, spans: np.ndarray, frame: int) -> list[FrameReader]:
        return [partial(decode_frame, data[start:stop], True) for start, stop in spans[frame].tolist()]


def _looks_like_image(feature: Feature) -> bool:
    first: Sequence[bytes] = feature.strings()[:1]
    return bool(first) and first[0][:4] in _IMAGE_STARTS
