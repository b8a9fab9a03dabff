"""Writes a LeRobot v3.0 dataset with its frames inside the parquet files, without LeRobot.

Every episode is first saved as one file (`save_episode`), which appears whole. `assemble` then builds the dataset from
all saved episodes. So a recording can be killed, resumed, spread over processes and read before it ends.
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from vla_adapter_hf.utils.files import atomic_path, readable_disk_errors, visible_files, write_json, write_text


CODEBASE_VERSION = "v3.0"
DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
EPISODES_PATH = "meta/episodes/chunk-000/file-000.parquet"
PARTS = ".recording"
QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}
_CHUNKS_SIZE = 1000  # data files per chunk folder, LeRobot's default
_INDEX_COLUMNS = ("timestamp", "frame_index", "episode_index", "index", "task_index")


@dataclass(frozen=True)
class LeRobotLayout:
    """What the rows of a dataset hold.

    Args:
        cameras: camera names; the columns are `observation.images.<camera>`.
        image_size: height and width of the frames, pixels, one number if they are equal; a tuple has one size for each
            camera, a number or (height, width).
        state_names, action_names: one name per dimension.
        fps: rows per second of an episode, a whole number.
        chunk_size: actions in the extra column `action_chunk`; 0 leaves the column out.
        robot_type: LeRobot's `robot_type`.
        numbers: names of further columns, which hold one whole number per row.
    """

    cameras: tuple[str, ...]
    image_size: int | tuple[int | tuple[int, int], ...]
    state_names: tuple[str, ...]
    action_names: tuple[str, ...]
    fps: int
    chunk_size: int = 0
    robot_type: str = "panda"
    numbers: tuple[str, ...] = ()

    @property
    def number_columns(self) -> tuple[str, ...]:
        """The columns of whole numbers: `step` where rows hold chunks, and `numbers`."""
        return (*(("step",) if self.chunk_size else ()), *self.numbers)

    def features(self) -> dict[str, Any]:
        """The `features` entry of `meta/info.json`."""
        sizes = self.image_size if isinstance(self.image_size, tuple) else (self.image_size,) * len(self.cameras)
        features: dict[str, Any] = {
            f"observation.images.{camera}": {
                "dtype": "image",
                "shape": [*((size, size) if isinstance(size, int) else size), 3],
                "names": ["height", "width", "channel"],
            }
            for camera, size in zip(self.cameras, sizes, strict=True)
        }
        features["observation.state"] = _vector("float32", len(self.state_names), list(self.state_names))
        features["action"] = _vector("float32", len(self.action_names), list(self.action_names))
        if self.chunk_size:
            features["action_chunk"] = {
                "dtype": "float32",
                "shape": [self.chunk_size, len(self.action_names)],
                "names": ["time", "action"],
            }
        for column in self.number_columns:
            features[column] = _vector("int64", 1, None)
        features["timestamp"] = _vector("float32", 1, None)
        for column in _INDEX_COLUMNS[1:]:
            features[column] = _vector("int64", 1, None)
        return features

    def schema(self) -> pa.Schema:
        """The parquet schema, with the metadata by which `datasets` decodes frames and two-dimensional columns."""
        columns: dict[str, Any] = {}
        for name, feature in self.features().items():
            shape, value = feature["shape"], feature["dtype"]
            if value == "image":
                columns[name] = datasets.Image()
            elif len(shape) == 2:
                columns[name] = datasets.Array2D(tuple(shape), value)
            elif name in ("observation.state", "action"):
                columns[name] = datasets.List(datasets.Value(value), length=shape[0])
            else:
                columns[name] = datasets.Value(value)
        schema = datasets.Features(columns).arrow_schema
        # Plain types instead of extension types: readers without `datasets` know only those.
        fields = [field.with_type(getattr(field.type, "storage_type", field.type)) for field in schema]
        return pa.schema(fields, metadata=schema.metadata)


def _vector(dtype: str, size: int, names: list[str] | None) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [size], "names": names}


def save_episode(
    output: Path,
    key: str,
    layout: LeRobotLayout,
    instruction: str,
    images: Mapping[str, Sequence[bytes]],
    states: np.ndarray,
    actions: np.ndarray,
    chunks: np.ndarray | None = None,
    numbers: Mapping[str, np.ndarray] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """Saves one episode of T rows in `output`, to be assembled later. The file appears whole or not at all.

    Args:
        key: the episode's name: saving it again replaces it, and episodes are assembled in the order of their keys.
        images: per camera, T encoded frames.
        states: (T, S) float32.
        actions: (T, A) float32, raw.
        chunks: (T, chunk_size, A) float32: the actions executed at every control step from the row on.
        numbers: (T,) per column of whole numbers. With chunks, `step` is the control step of each row; rows need not
            be consecutive steps.
        extra: JSON values about the episode, for `meta/demonstrations.jsonl`.

    Raises:
        ValueError: a length or a shape that does not fit the layout.
    """
    rows = len(states)
    expected = {"states": (rows, len(layout.state_names)), "actions": (rows, len(layout.action_names))}
    given = {"states": np.shape(states), "actions": np.shape(actions)}
    if layout.chunk_size:
        expected["chunks"], given["chunks"] = (rows, layout.chunk_size, len(layout.action_names)), np.shape(chunks)
    for column in layout.number_columns:
        expected[column], given[column] = (rows,), np.shape((numbers or {}).get(column))
    for name, shape in expected.items():
        if given[name] != shape or not rows:
            raise ValueError(
                f"{name} of episode {key!r} must have shape {shape} with at least one row, got {given[name]}"
            )
    columns: dict[str, pa.Array] = {}
    schema = layout.schema()
    for camera in layout.cameras:
        if len(images.get(camera, ())) != rows:
            raise ValueError(
                f"images[{camera!r}] of episode {key!r} must hold {rows} frames, got {len(images.get(camera, ()))}"
            )
        name = f"observation.images.{camera}"
        frames = [{"bytes": data, "path": f"frame-{row:06d}"} for row, data in enumerate(images[camera])]
        columns[name] = pa.array(frames, type=schema.field(name).type)
    columns["observation.state"] = _fixed(states, schema.field("observation.state").type)
    columns["action"] = _fixed(actions, schema.field("action").type)
    if layout.chunk_size:
        columns["action_chunk"] = pa.array(np.asarray(chunks, np.float32).tolist(), schema.field("action_chunk").type)
    for column in layout.number_columns:
        columns[column] = pa.array(np.asarray(numbers[column], np.int64))
    # LeRobot derives a row's time from its index; where rows were left out, `step` has the true time.
    columns["timestamp"] = pa.array(np.arange(rows, dtype=np.float32) / np.float32(layout.fps))
    columns["frame_index"] = pa.array(np.arange(rows, dtype=np.int64))
    metadata = {"instruction": instruction, "extra": dict(extra or {}), "layout": layout_record(layout)}
    table = pa.table(columns).replace_schema_metadata({"episode": json.dumps(metadata)})
    path = Path(output) / PARTS / f"{key}.parquet"
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary)
    return path


def saved_episodes(output: Path) -> list[str]:
    """Keys of the episodes saved so far, sorted."""
    return [path.stem for path in visible_files(Path(output) / PARTS, "*.parquet")]


def assemble(output: Path, rows_per_file: int = 4000) -> dict[str, Any]:
    """Builds `data/` and `meta/` of the dataset from all saved episodes, replacing an earlier build.

    LeRobot and this package read the result. The statistics are exact over all rows (LeRobot's own `stats.json`
    averages the episodes' quantiles).

    Returns:
        `meta/info.json` as a dict.

    Raises:
        ValueError: no episode was saved, or episodes with different layouts.
        OSError: the disk is full. The saved episodes are kept.
    """
    output = Path(output)
    keys = saved_episodes(output)
    if not keys:
        raise ValueError(f"output={str(output)!r} holds no saved episode; record some first")
    build = output / ".assembling"
    shutil.rmtree(build, ignore_errors=True)
    builder = _Builder(build, rows_per_file)
    with readable_disk_errors(output):
        for key in keys:
            builder.add(key, pq.read_table(output / PARTS / f"{key}.parquet"))
        info = builder.finish()
    # `meta` is removed first and moved last: readers recognise a dataset without meta/info.json as unfinished.
    for folder in ("meta", "data"):
        shutil.rmtree(output / folder, ignore_errors=True)
    for folder in ("data", "meta"):
        (build / folder).replace(output / folder)
    build.rmdir()
    return info


class _Builder:
    """Appends episodes to data files and collects their metadata and statistics."""

    def __init__(self, root: Path, rows_per_file: int) -> None:
        self.root = root
        self.rows_per_file = rows_per_file
        self.layout: dict[str, Any] | None = None
        self.schema: pa.Schema | None = None
        self.features: dict[str, Any] = {}
        self.tasks: dict[str, int] = {}
        self.episodes: list[dict[str, Any]] = []
        self.extras: list[dict[str, Any]] = []
        self.statistics: dict[str, list[np.ndarray]] = {}
        self.pending: list[pa.Table] = []
        self.file_index = 0
        self.rows = 0

    def add(self, key: str, table: pa.Table) -> None:
        metadata = json.loads(table.schema.metadata[b"episode"])
        if self.layout is None:
            self.layout = metadata["layout"]
            layout = LeRobotLayout(**{k: tuple(v) if isinstance(v, list) else v for k, v in self.layout.items()})
            self.schema, self.features, self.fps = layout.schema(), layout.features(), layout.fps
        elif metadata["layout"] != self.layout:
            changed = [name for name, value in self.layout.items() if metadata["layout"].get(name) != value]
            raise ValueError(
                f"episode {key!r} was recorded with another layout ({', '.join(changed)} differ); "
                f"record it again or into another output"
            )
        rows, number = table.num_rows, len(self.episodes)
        task = self.tasks.setdefault(metadata["instruction"], len(self.tasks))
        indices = {
            "episode_index": np.full(rows, number, dtype=np.int64),
            "index": np.arange(self.rows, self.rows + rows, dtype=np.int64),
            "task_index": np.full(rows, task, dtype=np.int64),
        }
        for name, values in indices.items():
            table = table.append_column(name, pa.array(values))
        table = table.select(self.schema.names).cast(self.schema)
        moments = {name: _measure(table.column(name), feature) for name, feature in self.features.items()}
        for name, measured in moments.items():
            before = self.statistics.setdefault(name, [])
            if before and self.features[name]["dtype"] == "image":
                before[0] += measured  # histograms add up: memory does not grow with the episodes
            else:
                before.append(measured)
        if self.pending and sum(part.num_rows for part in self.pending) + rows > self.rows_per_file:
            self._flush()
        self.pending.append(table)
        self.episodes.append(
            {
                "episode_index": number,
                "tasks": [metadata["instruction"]],
                "length": rows,
                "data/chunk_index": self.file_index // _CHUNKS_SIZE,
                "data/file_index": self.file_index % _CHUNKS_SIZE,
                "dataset_from_index": self.rows,
                "dataset_to_index": self.rows + rows,
                **{
                    f"stats/{name}/{statistic}": value
                    for name, measured in moments.items()
                    for statistic, value in _summarise([measured], self.features[name]).items()
                },
                "meta/episodes/chunk_index": 0,
                "meta/episodes/file_index": 0,
            }
        )
        self.extras.append({"episode_index": number, "key": key, **metadata["extra"]})
        self.rows += rows

    def finish(self) -> dict[str, Any]:
        self._flush()
        (self.root / "meta").mkdir(parents=True, exist_ok=True)
        names = list(self.tasks)
        # LeRobot keeps the texts in the pandas index.
        tasks = pandas.DataFrame({"task_index": np.arange(len(names), dtype=np.int64)}, index=names)
        tasks.to_parquet(self.root / "meta/tasks.parquet")
        episodes = self.root / EPISODES_PATH
        episodes.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(self.episodes), episodes)
        statistics = {name: _summarise(self.statistics[name], feature) for name, feature in self.features.items()}
        write_json(self.root / "meta/stats.json", statistics, indent=4)
        lines = "".join(json.dumps(extra) + "\n" for extra in self.extras)
        write_text(self.root / "meta/demonstrations.jsonl", lines)
        info = {
            "codebase_version": CODEBASE_VERSION,
            "robot_type": self.layout["robot_type"],
            "total_episodes": len(self.episodes),
            "total_frames": self.rows,
            "total_tasks": len(names),
            "chunks_size": _CHUNKS_SIZE,
            "data_files_size_in_mb": 100,
            "video_files_size_in_mb": 200,
            "fps": self.fps,
            "splits": {"train": f"0:{len(self.episodes)}"},
            "data_path": DATA_PATH,
            "video_path": None,
            "features": self.features,
        }
        write_json(self.root / "meta/info.json", info, indent=4)
        return info

    def _flush(self) -> None:
        if not self.pending:
            return
        chunk, file = divmod(self.file_index, _CHUNKS_SIZE)
        path = self.root / DATA_PATH.format(chunk_index=chunk, file_index=file)
        path.parent.mkdir(parents=True, exist_ok=True)
        # Small row groups: a reader that wants one frame does not decode a thousand.
        pq.write_table(pa.concat_tables(self.pending), path, row_group_size=100)
        self.pending, self.file_index = [], self.file_index + 1


def _fixed(values: np.ndarray, kind: pa.DataType) -> pa.Array:
    flat = pa.array(np.ascontiguousarray(values, dtype=np.float32).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, kind.list_size)


def _measure(column: pa.ChunkedArray, feature: Mapping[str, Any]) -> np.ndarray:
    """Input of the statistics: the values; for frames a histogram (3, 256) of the levels, and the number of frames."""
    if feature["dtype"] != "image":
        values = np.array(column.to_pylist(), dtype=np.float64)
        return values.reshape(len(values), *feature["shape"])
    histogram = np.zeros((3, 256), dtype=np.int64)
    for frame in column.to_pylist():
        pixels = np.asarray(Image.open(io.BytesIO(frame["bytes"])).convert("RGB"))
        for channel in range(3):
            histogram[channel] += np.bincount(pixels[..., channel].reshape(-1), minlength=256)
    return np.concatenate([histogram.reshape(-1), [len(column)]])


def _summarise(measured: list[np.ndarray], feature: Mapping[str, Any]) -> dict[str, Any]:
    if feature["dtype"] == "image":
        return _summarise_levels(np.sum(measured, axis=0))
    values = np.concatenate(measured)
    whole = feature["dtype"].startswith("int")
    summary: dict[str, Any] = {
        "min": values.min(axis=0).astype(np.int64 if whole else np.float64).tolist(),
        "max": values.max(axis=0).astype(np.int64 if whole else np.float64).tolist(),
        "mean": values.mean(axis=0).tolist(),
        "std": values.std(axis=0).tolist(),
        "count": [len(values)],
    }
    return summary | {name: np.quantile(values, share, axis=0).tolist() for name, share in QUANTILES.items()}


def _summarise_levels(counts: np.ndarray) -> dict[str, Any]:
    """Statistics per channel of frames scaled to 0...1, in LeRobot's shape (3, 1, 1)."""
    histogram, frames = counts[:-1].reshape(3, 256), int(counts[-1])
    levels = np.arange(256) / 255.0
    pixels = histogram.sum(axis=1)
    mean = histogram @ levels / pixels
    variance = np.maximum(histogram @ levels**2 / pixels - mean**2, 0.0)
    cumulative = histogram.cumsum(axis=1)
    summary = {
        "min": np.array([levels[np.flatnonzero(row)[0]] for row in histogram]),
        "max": np.array([levels[np.flatnonzero(row)[-1]] for row in histogram]),
        "mean": mean,
        "std": np.sqrt(variance),
    }
    for name, share in QUANTILES.items():
        summary[name] = levels[(cumulative >= share * pixels[:, None]).argmax(axis=1)]
    shaped = {name: value.reshape(3, 1, 1).tolist() for name, value in summary.items()}
    return shaped | {"count": [frames]}


def layout_record(layout: LeRobotLayout) -> dict[str, Any]:
    """The layout as JSON values, without `numbers` if there are none."""
    return json.loads(json.dumps({name: value for name, value in vars(layout).items() if value != ()}))
