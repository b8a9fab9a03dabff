"""A plain `datasets.Dataset`: one row per step, whatever its columns are called."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from PIL import Image

from vla_adapter_hf.data.chunks import (
    CHUNK_COLUMN,
    STEP_COLUMN,
    check_stored_shape,
    column_to_chunks,
    find_chunk_column,
)
from vla_adapter_hf.data.columns import ACTION_NAMES, STATE_NAMES, column_to_matrix, find_cameras, find_column
from vla_adapter_hf.data.episodes import BadEpisode, EpisodeTable, EpisodeTableBuilder, is_damage
from vla_adapter_hf.data.frames import decode_frame, is_jpeg
from vla_adapter_hf.data.source import DemonstrationSource
from vla_adapter_hf.robots import RobotPreset


_EPISODE_NAMES = ("episode_index", "episode", "episode_id", "trajectory_id")
_FRAME_NAMES = ("frame_index", "step", "step_index", "timestep")
_INSTRUCTION_NAMES = ("task", "instruction", "language_instruction", "text", "prompt")
_BATCH_ROWS = 1 << 15


def camera_columns(features: datasets.Features) -> list[str]:
    """Columns that can hold camera frames: Image features, or arrays of three dimensions."""
    found = []
    for name, feature in features.items():
        is_array = isinstance(feature, datasets.Array3D)
        is_bytes = isinstance(feature, dict) and "bytes" in feature
        if is_array or is_bytes or isinstance(feature, datasets.Image):
            found.append(name)
    return found


def frame_from_cell(cell: Any) -> np.ndarray:
    """What a camera column holds in one row -> uint8 (height, width, 3).

    Raises:
        ValueError: nothing there, or something that is no image.
    """
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
    if array.ndim != 3 or array.shape[2] != 3 or (array.dtype != np.uint8 and array.dtype.kind not in "iu"):
        raise ValueError(f"an array of shape {array.shape} and dtype {array.dtype}; expected uint8 (height, width, 3)")
    if array.dtype != np.uint8:
        if array.min() < 0 or array.max() > 255:
            raise ValueError(f"pixel values from {array.min()} to {array.max()}; expected 0 to 255")
        array = array.astype(np.uint8)
    return array


class PlainSource(DemonstrationSource):
    """A map-style `datasets.Dataset` with one row per step.

    Args:
        dataset: the rows; those of an episode need not be neighbours.
        cameras: image columns, in order; see `columns.find_cameras`.
        robot: the preset whose conventions are applied, or None.
        state_column, action_column: columns of numbers, where their names are not the usual ones.
        episode_column: tells episodes apart: integers, or texts, which are then numbered as they appear.
        frame_column: orders the steps of an episode; without one, the order of the rows counts.
        instruction_column: texts, where the name is not a usual one.
        instruction: one text for all episodes, instead of a column.
        name: the dataset's name.
        chunk_column: the column of stored action chunks; see `chunks.find_chunk_column`.

    Raises:
        TypeError: not a `datasets.Dataset`.
        ValueError: columns that are missing or ambiguous.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        cameras: Sequence[str] | None = None,
        robot: RobotPreset | None = None,
        state_column: str | None = None,
        action_column: str | None = None,
        episode_column: str | None = None,
        frame_column: str | None = None,
        instruction_column: str | None = None,
        instruction: str | None = None,
        name: str = "dataset",
        chunk_column: str | None = CHUNK_COLUMN,
    ) -> None:
        if isinstance(dataset, datasets.DatasetDict):
            raise TypeError(f"expected one datasets.Dataset, got a DatasetDict; choose one of {', '.join(dataset)}")
        if not isinstance(dataset, datasets.Dataset):
            raise TypeError(f"expected a datasets.Dataset, got {type(dataset).__name__}")
        self.name = name
        self.where = f"dataset {name}"
        self.robot = robot
        self.instruction = instruction
        names = find_plain_columns(
            dataset.features,
            self.where,
            cameras,
            robot,
            state_column,
            action_column,
            episode_column,
            frame_column,
            instruction_column,
            has_instruction=instruction is not None,
            chunk_column=chunk_column,
        )
        self.columns = names
        self.cameras = names.cameras
        for camera in self.cameras:
            if isinstance(dataset.features[camera], datasets.Image):
                # The stored bytes, to be decoded here: `datasets` would go through a Pillow image and its EXIF rules.
                dataset = dataset.cast_column(camera, datasets.Image(decode=False))
        self._dataset = dataset.with_format(None)
        self.chunk_column = names.chunk
        self._chunk_shape = stored_chunk_shape(self._dataset, names, self.where)
        self.stored_chunk_size = self._chunk_shape[0] if self._chunk_shape is not None else None
        self._frames = self._dataset.select_columns(list(self.cameras))
        self._rows = np.zeros(0, np.int64)  # of each step in the table

    def content_digest(self) -> str:
        digest = hashlib.blake2b(digest_size=20)
        table = self.table
        for array in (table.states, table.actions, table.episode_indices, table.starts):
            digest.update(np.ascontiguousarray(array).tobytes())
        if table.chunks is not None:
            digest.update(repr(table.chunks.shape).encode() + table.chunks.tobytes())
        return digest.hexdigest()

    def _load_table(self) -> EpisodeTable:
        columns = self.columns
        wanted = [name for name in columns.number_columns() if name is not None]
        rows = len(self._dataset)
        states = actions = None
        chunks = np.zeros((rows, *self._chunk_shape), np.float32) if self._chunk_shape is not None else None
        episode_keys: list[np.ndarray] = []
        frames: list[np.ndarray] = []
        control_steps: list[np.ndarray] = []
        text_ids: list[np.ndarray] = []
        wrong: dict[int, str] = {}
        builder = EpisodeTableBuilder(self.where, self.robot)
        row = 0
        for batch in self._dataset.select_columns(wanted).with_format("arrow").iter(_BATCH_ROWS):
            for name, is_state in ((columns.state, True), (columns.action, False)):
                matrix, lengths = column_to_matrix(batch.column(name), name)
                values = states if is_state else actions
                if values is None:
                    values = np.zeros((rows, matrix.shape[1]), np.float32)
                for line, length in lengths.items():
                    wrong[row + line] = f"{name} has {length} values, expected {values.shape[1]}"
                if matrix.shape[1] == values.shape[1]:
                    values[row : row + len(matrix)] = matrix
                else:
                    for line in range(len(matrix)):
                        wrong[row + line] = f"{name} has {matrix.shape[1]} values, expected {values.shape[1]}"
                if is_state:
                    states = values
                else:
                    actions = values
            if chunks is not None:
                part, reasons = column_to_chunks(batch.column(columns.chunk), columns.chunk, self._chunk_shape)
                chunks[row : row + len(part)] = part
                wrong.update({row + line: reason for line, reason in reasons.items()})
            episode_keys.append(_keys(batch.column(columns.episode), columns.episode))
            if columns.frame is not None:
                frames.append(batch.column(columns.frame).to_numpy())
            if columns.step is not None and not batch.column(columns.step).null_count:
                control_steps.append(batch.column(columns.step).to_numpy())
            if columns.instruction is not None and self.instruction is None:
                texts = batch.column(columns.instruction).to_pylist()
                text_ids.append(np.array([builder.texts.id_of(text or "") for text in texts], np.int32))
            row += batch.num_rows
        if row == 0:
            raise ValueError(f"{self.where}: there are no rows")
        ids = (
            np.concatenate(text_ids)
            if text_ids
            else np.full(row, builder.texts.id_of(self.instruction or ""), np.int32)
        )
        keys, numbers = _number_episodes(np.concatenate(episode_keys))
        order = np.lexsort((np.concatenate(frames) if frames else np.arange(row), numbers))
        starts = np.searchsorted(numbers[order], np.arange(len(keys) + 1))
        at_steps = np.concatenate(control_steps) if control_steps else None
        if at_steps is not None and len(at_steps) < row:
            at_steps = None  # they only serve plots: rows without one make no episode bad
        kept_rows = []
        for number, key in enumerate(keys):
            of_episode = order[starts[number] : starts[number + 1]]
            bad = (
                next(
                    (BadEpisode(key, frame, wrong[r]) for frame, r in enumerate(of_episode.tolist()) if r in wrong),
                    None,
                )
                if wrong
                else None
            )
            if bad is not None:
                builder.add_bad(bad)
                continue
            of_chunks = chunks[of_episode] if chunks is not None else None
            kept = builder.add(
                key,
                states[of_episode],
                actions[of_episode],
                ids[of_episode],
                chunks=of_chunks,
                control_steps=at_steps[of_episode] if at_steps is not None else None,
            )
            kept_rows.append(of_episode[:kept])
        self._rows = np.concatenate(kept_rows) if kept_rows else self._rows
        return builder.build()

    def frame_problems(self) -> dict[int, BadEpisode]:
        empty = [number for number, text in enumerate(self.table.texts) if not text.strip()]
        problems = {}
        for position in range(len(self.table)) if empty else []:
            unlabelled = np.flatnonzero(np.isin(self.table.text_ids[self.table.steps(position)], empty))
            if len(unlabelled):
                index = int(self.table.episode_indices[position])
                problems[position] = BadEpisode(index, int(unlabelled[0]), "has no instruction")
        return problems

    def read_images(self, position: int, frame: int) -> list[np.ndarray]:
        row = self._frames[int(self._rows[int(self.table.starts[position]) + frame])]
        images = []
        for camera in self.cameras:
            try:
                images.append(frame_from_cell(row[camera]))
            except (ValueError, OSError) as error:
                if not is_damage(error):
                    raise
                raise ValueError(f"camera {camera!r}: {error}") from error
        return images

    def frames_are_jpeg(self) -> bool:
        cell = self._frames[int(self._rows[0])][self.cameras[0]]
        data = cell.get("bytes") if isinstance(cell, dict) else cell
        return isinstance(data, bytes) and is_jpeg(data)


@dataclass(frozen=True)
class PlainColumns:
    """The columns of a plain dataset that are read."""

    cameras: tuple[str, ...]
    state: str
    action: str
    episode: str
    frame: str | None
    instruction: str | None
    chunk: str | None = None
    step: str | None = None

    def number_columns(self) -> tuple[str | None, ...]:
        """Everything but the frames, each column once."""
        columns = (self.state, self.action, self.episode, self.frame, self.instruction, self.chunk, self.step)
        return tuple(dict.fromkeys(columns))


def find_plain_columns(
    features: datasets.Features,
    where: str,
    cameras: Sequence[str] | None,
    robot: RobotPreset | None,
    state_column: str | None,
    action_column: str | None,
    episode_column: str | None,
    frame_column: str | None,
    instruction_column: str | None,
    has_instruction: bool,
    chunk_column: str | None = None,
) -> PlainColumns:
    """The columns to read; see `columns`. Raises ValueError for what is missing or ambiguous."""
    images = camera_columns(features)
    others = [name for name in features if name not in images]

    def optional(what: str, argument: str, given: str | None, usual: tuple[str, ...]) -> str | None:
        if given is None and not any(name in usual for name in others):
            return None
        return find_column(what, argument, given, usual, others, where)

    if frame_column is None and "frame_index" in others:
        # LeRobot's own number of a row. A recording may have its control step beside it, in the same order.
        frame_column = "frame_index"
    preset = robot.cameras if robot is not None else None
    instruction = optional("instruction", "instruction_column", instruction_column, _INSTRUCTION_NAMES)
    if instruction is None and not has_instruction:
        find_column("instruction", "instruction_column", None, _INSTRUCTION_NAMES, others, where)
    chunk = find_chunk_column(chunk_column, others, robot, where)
    return PlainColumns(
        cameras=tuple(find_cameras(cameras, preset, images, where)),
        state=find_column("state", "state_column", state_column, STATE_NAMES, others, where),
        action=find_column("action", "action_column", action_column, ACTION_NAMES, others, where),
        episode=find_column("episode", "episode_column", episode_column, _EPISODE_NAMES, others, where),
        frame=optional("frame", "frame_column", frame_column, _FRAME_NAMES),
        instruction=instruction,
        chunk=chunk,
        step=STEP_COLUMN if chunk is not None and _is_integer(features.get(STEP_COLUMN)) else None,
    )


def _is_integer(feature: Any) -> bool:
    return isinstance(feature, datasets.Value) and pa.types.is_integer(feature.pa_type)


def stored_chunk_shape(
    rows: datasets.Dataset | datasets.IterableDataset, columns: PlainColumns, where: str
) -> tuple[int, int] | None:
    """Shape (K, A) of the stored chunks, going by the first row; None without chunks or rows.

    Raises:
        ValueError: that row holds no list of actions.
    """
    if columns.chunk is None:
        return None
    first = next(iter(rows.select_columns([columns.action, columns.chunk])), None)
    if first is None:
        return None
    try:
        shape = np.shape(first[columns.chunk])
    except ValueError:  # actions of several sizes
        shape = None
    return check_stored_shape(shape, np.size(first[columns.action]), columns.chunk, where)


def _keys(column: pa.ChunkedArray, name: str) -> np.ndarray:
    if column.null_count:
        raise ValueError(f"column {name!r} has rows without a value; every row must belong to an episode")
    return np.asarray(column.to_pylist()) if not pa.types.is_integer(column.type) else column.to_numpy()


def _number_episodes(keys: np.ndarray) -> tuple[list[int], np.ndarray]:
    """Episode of every row -> (index of each episode, which of them each row belongs to), as they first appear."""
    unique, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    rank = np.argsort(np.argsort(first))
    by_appearance = unique[np.argsort(first)]
    indices = by_appearance.tolist() if unique.dtype.kind in "iu" else list(range(len(unique)))
    return indices, rank[inverse.reshape(-1)]
