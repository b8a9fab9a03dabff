"""The files of an RLDS / TFDS dataset: its version folder, its shards, and which features are images."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any


_SHARD = re.compile(r".+-(?P<split>[^-.]+)\.tfrecord-(?P<shard>\d+)-of-(?P<count>\d+)")
_VERSION = re.compile(r"\d+\.\d+\.\d+")


@dataclass(frozen=True)
class Shard:
    """One TFRecord file. `records` is the number of episodes by `dataset_info.json`, if it says so."""

    path: Path
    split: str
    records: int | None


@dataclass(frozen=True)
class RLDSFiles:
    """A version folder of a TFDS dataset.

    Attributes:
        name: the dataset's name, from `dataset_info.json` or the folder above the version.
        shards: in reading order, split after split.
        image_features: flattened names of the image features, or None where there is no `features.json`.
        shapes: flattened name -> shape of one step, for features that declare one.
    """

    folder: Path
    name: str
    shards: list[Shard]
    image_features: list[str] | None
    shapes: dict[str, tuple[int, ...]]


def find_version_folder(folder: Path, name: str | None = None) -> Path:
    """The folder that holds the shards: `folder` itself, or `[name/]<version>` below it, the newest version.

    Raises:
        ValueError: there are no shards, or several datasets to choose from.
    """
    if name is not None:
        folder = folder / name
    if any(_SHARD.fullmatch(entry.name) for entry in _entries(folder)):
        return folder
    versions = [entry for entry in _entries(folder) if entry.is_dir() and _VERSION.fullmatch(entry.name)]
    if versions:
        return find_version_folder(max(versions, key=lambda entry: [int(part) for part in entry.name.split(".")]))
    datasets = [
        entry
        for entry in _entries(folder)
        if entry.is_dir() and any(_VERSION.fullmatch(inner.name) for inner in _entries(entry))
    ]
    if len(datasets) == 1:
        return find_version_folder(datasets[0])
    if datasets:
        raise ValueError(
            f"{folder} holds several RLDS datasets: {', '.join(entry.name for entry in datasets)}; choose one with "
            "name=..."
        )
    found = ", ".join(entry.name for entry in _entries(folder)[:10]) or "nothing"
    raise ValueError(
        f"{folder} holds no RLDS dataset: expected files such as <name>-train.tfrecord-00000-of-00016, there or in a "
        f"version folder such as 1.0.0; found {found}"
    )


def _entries(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    return sorted(folder.iterdir())


def read_rlds_files(folder: Path) -> RLDSFiles:
    """Describe the dataset whose shards are in `folder`.

    Raises:
        ValueError: a shard is missing, the files are not TFRecord, or there are none.
    """
    info = _json(folder / "dataset_info.json")
    file_format = info.get("fileFormat", "tfrecord")
    if file_format != "tfrecord":
        raise ValueError(f"{folder}: fileFormat is {file_format!r}; this package reads tfrecord")
    shards: dict[str, dict[int, Path]] = {}
    counts: dict[str, int] = {}
    # The template in dataset_info.json is not used: the prefix of the files is not always the dataset's name.
    for entry in _entries(folder):
        match = _SHARD.fullmatch(entry.name)
        if match:
            split, count = match["split"], int(match["count"])
            if counts.setdefault(split, count) != count:
                raise ValueError(
                    f"{folder}: split {split!r} has files of {counts[split]} and of {count} shards; remove one"
                )
            shards.setdefault(split, {})[int(match["shard"])] = entry
    if not shards:
        raise ValueError(f"{folder}: there are no files such as <name>-train.tfrecord-00000-of-00016")
    promised = _shard_lengths(info, folder)
    ordered = []
    for split in sorted(shards, key=lambda split: (split != "train", split)):
        missing = sorted(set(range(counts[split])) - set(shards[split]))
        if missing:
            raise ValueError(
                f"{folder}: split {split!r} lacks {len(missing)} of {counts[split]} shards, the first is number "
                f"{missing[0]}. Fetch the dataset again."
            )
        lengths = promised.get(split, [])
        for number, path in sorted(shards[split].items()):
            ordered.append(Shard(path, split, lengths[number] if len(lengths) == counts[split] else None))
    features_path = folder / "features.json"
    images: list[str] | None = None
    shapes: dict[str, tuple[int, ...]] = {}
    if features_path.is_file():
        images = []
        try:
            _walk_features(_json(features_path), "", images, shapes)
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"{features_path} cannot be read: {error!r}") from error
    name = info.get("name") or (folder.parent.name if _VERSION.fullmatch(folder.name) else folder.name)
    return RLDSFiles(folder, name, ordered, images, shapes)


def _json(path: Path) -> dict[str, Any]:
    """A JSON file's mapping; empty if there is no such file."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:  # UnicodeDecodeError is one
        raise ValueError(f"{path} is no JSON: {error}. Fetch the dataset again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {type(content).__name__}, expected a mapping")
    return content


def _shard_lengths(info: dict[str, Any], folder: Path) -> dict[str, list[int]]:
    """Episodes of each shard of each split."""
    try:
        return {split["name"]: [int(n) for n in split.get("shardLengths", [])] for split in info.get("splits", [])}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder}: splits in dataset_info.json cannot be read: {error!r}") from error


def _walk_features(node: Any, name: str, images: list[str], shapes: dict[str, tuple[int, ...]]) -> None:
    """Flatten the nesting of features.json into the names that records use."""
    if not isinstance(node, dict):
        return
    if "featuresDict" in node:
        for key, inner in node["featuresDict"].get("features", {}).items():
            _walk_features(inner, f"{name}/{key}" if name else key, images, shapes)
    elif "sequence" in node:
        _walk_features(node["sequence"].get("feature"), name, images, shapes)
    elif "image" in node:
        images.append(name)
    elif "tensor" in node:
        dimensions = node["tensor"].get("shape", {}).get("dimensions", [])
        shapes[name] = tuple(int(size) for size in dimensions)


def shard_key(shard: Shard) -> str:
    """Name and size of a shard, for hashes."""
    return f"{shard.path.name}:{os.path.getsize(shard.path)}"
