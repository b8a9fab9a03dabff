"""A dataset by its path -> the recording that the checks look at."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from vla_adapter_hf.data.dataset import VLAAdapterDataset
from vla_adapter_hf.data.lerobot.reader import LeRobotReader
from vla_adapter_hf.data.opening import chosen_format, open_reader, random_access, rows_of_folder
from vla_adapter_hf.data.rlds.reader import RLDSReader
from vla_adapter_hf.data.source import DemonstrationSource
from vla_adapter_hf.data.table import PlainReader
from vla_adapter_hf.doctor.recording import Recording


def open_recording(
    path: str | os.PathLike,
    format: str = "auto",
    robot: str | None = None,
    cameras: Sequence[str] | None = None,
    with_frames: bool = True,
    **options: Any,
) -> Recording:
    """Read the numbers of a dataset; frames are read later, one by one.

    Args:
        path, format, robot: as of `load_demonstrations`. Without a robot, actions are judged as they were recorded.
        cameras: cameras to look at, all by default.
        with_frames: without them no video is fetched from the Hub.
        options: column names, `name` and `revision` as of `from_lerobot`, `from_rlds` or `from_dataset`. None stands
            for an option that was not given, except for `chunk_column`.

    Raises:
        ValueError: what the reader refuses.
    """
    kind = chosen_format(path, format)
    options = {name: value for name, value in options.items() if value is not None or name == "chunk_column"}
    VLAAdapterDataset.check_options(kind, options, path)
    data: Any = path
    if kind == "dataset":
        data, options["unnorm_key"] = rows_of_folder(path), Path(path).name
    fetch = ("every camera" if cameras is None else "all") if with_frames else "numbers"
    source = random_access(open_reader(kind, data, cameras, robot, options, fetch=fetch))
    if source is None:
        raise ValueError(f"dataset {str(path)!r} must be on this machine to be checked")
    return recording_of(source)


def recording_of(source: DemonstrationSource) -> Recording:
    """The recording in a source with random access."""
    table, reader = source.table, source.reader
    ranges = [slice(first, end) for first, end in zip(table.starts[:-1], table.starts[1:], strict=True)]
    texts = [[table.texts[text] for text in dict.fromkeys(table.text_ids[steps].tolist())] for steps in ranges]
    control_steps = table.control_steps
    has_steps = bool(table.lengths.sum())
    return Recording(
        name=source.name,
        states=[table.states[steps].astype(np.float64) for steps in ranges],
        actions=[table.actions[steps].astype(np.float64) for steps in ranges],
        texts=texts,
        numbers=table.episode_indices.tolist(),
        cameras=source.columns.cameras,
        fps=reader.fps,
        state_names=reader.state_names,
        action_names=reader.action_names,
        timestamps=_timestamps(source),
        problems=[str(bad) for bad in [*table.problems.values(), *table.unusable.values()]],
        consecutive=control_steps is None
        or all((np.diff(control_steps[steps]) == 1).all() for steps in ranges if steps.stop > steps.start),
        frames_are_jpeg=has_steps and source.frames_are_jpeg(),
        read_images=source.read_images,
        splits=_splits(source),
    )


def _splits(source: DemonstrationSource) -> list[str] | None:
    """The declared split of each episode; None if there are not two."""
    reader = source.reader
    if isinstance(reader, LeRobotReader):
        names = list(reader.metadata.splits)
    else:
        names = list(dict.fromkeys(shard.split for shard in reader.shards)) if isinstance(reader, RLDSReader) else []
    if len(names) < 2:
        return None
    splits = [""] * len(source.table.lengths)
    for name in names:
        for position in source.positions_of_split(name):
            splits[position] = name
    return splits


def _timestamps(source: DemonstrationSource) -> list[np.ndarray] | None:
    """Seconds of each step by episode, where the dataset has a column for them."""
    table, reader = source.table, source.reader
    found: dict[int, np.ndarray] = {}
    if isinstance(reader, LeRobotReader):
        for data_path, _ in reader.files:
            path = reader.folder / data_path
            if not path.is_file() or "timestamp" not in pq.read_schema(path).names:
                return None
            columns = pq.read_table(path, columns=["episode_index", "timestamp"])
            episodes = columns.column("episode_index").to_numpy()
            seconds = columns.column("timestamp").to_numpy().astype(np.float64)
            for index in np.unique(episodes):
                found[int(index)] = seconds[episodes == index]
    elif isinstance(reader, PlainReader) and "timestamp" in reader.rows.features and not table.problems:
        seconds = np.asarray(reader.rows.select_columns(["timestamp"])["timestamp"], np.float64).reshape(-1)
        for index, first, end in zip(table.episode_indices, table.starts[:-1], table.starts[1:], strict=True):
            found[int(index)] = seconds[first:end]
    timestamps = [found.get(int(index), np.zeros(0)) for index in table.episode_indices]
    return timestamps if any(len(seconds) for seconds in timestamps) else None
