"""Action chunks that a dataset brings along, one per row, and how many actions of them make a sample.

Chunks are cut from the actions of consecutive rows, which is right only where consecutive rows are consecutive control
steps. A recording whose frames are farther apart than its actions stores with each row the actions that follow it, at
the rate they were executed; then every row is a sample of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vla_adapter_hf.data.columns import find_column, is_list, is_number, joined_array, numbers_of
from vla_adapter_hf.robots import GripperConvention, RobotPreset


CHUNK_COLUMN = "action_chunk"
# Beside stored chunks: the control step at which a row's chunk begins, counted within its episode.
STEP_COLUMN = "step"
DEFAULT_CHUNK_SIZE = 8


def find_chunk_column(
    given: str | None, available: Sequence[str], robot: RobotPreset | None, where: str
) -> str | None:
    """The column of stored chunks, or None where chunks are to be cut from consecutive rows.

    Args:
        given: the column's name. `CHUNK_COLUMN`, the default everywhere, may be missing; another one may not. None
            looks for none.
        available: columns that exist.
        robot: the preset whose conventions are applied, or None.
        where: the dataset, for the message.

    Raises:
        ValueError: the given column does not exist, or the robot's conventions need whole episodes.
    """
    if given is None or (given == CHUNK_COLUMN and given not in available):
        return None
    column = find_column("action chunk", "chunk_column", given, (CHUNK_COLUMN,), available, where)
    if robot is not None and (robot.relabel_deltas or robot.gripper is GripperConvention.BRIDGE):
        raise ValueError(
            f"{where}: robot {robot.name!r} rebuilds actions from whole episodes of consecutive steps, column "
            f"{column!r} holds chunks as they were executed. Give another robot, or chunk_column=None if consecutive "
            "rows are consecutive steps"
        )
    return column


def check_stored_shape(
    shape: Sequence[int] | None, action_dim: int | None, column: str, where: str
) -> tuple[int, int]:
    """The shape (K, A) of a stored chunk, as the dataset describes it.

    Raises:
        ValueError: not two dimensions, or actions of another size than `action_dim`.
    """
    if shape is None or len(shape) != 2 or min(shape) < 1 or (action_dim is not None and shape[1] != action_dim):
        size = "values" if action_dim is None else str(action_dim)
        raise ValueError(
            f"{where}: a row of column {column!r} has shape {None if shape is None else tuple(shape)}; expected "
            f"(actions, {size}). Give chunk_column= another column, or None if consecutive rows are consecutive steps"
        )
    return int(shape[0]), int(shape[1])


def choose_chunk_size(
    given: int | None, robot: RobotPreset | None, stored: int | None, column: str | None, where: str
) -> int:
    """Actions per sample (K): as given, else the robot's, else all that are stored, else `DEFAULT_CHUNK_SIZE`.

    Args:
        given: the argument `chunk_size`.
        robot: the preset whose conventions are applied, or None.
        stored: actions in a stored chunk of `column`; None where chunks are cut from consecutive rows.
        column: the column of stored chunks, for the message.
        where: the dataset, for the message.

    Raises:
        ValueError: not a positive number, or more than are stored.
    """
    chunk_size = given
    if chunk_size is None:
        chunk_size = robot.chunk_size if robot is not None else stored or DEFAULT_CHUNK_SIZE
    if not isinstance(chunk_size, int) or chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size!r}; expected a positive number of actions")
    if stored is not None and chunk_size > stored:
        whose = f" (robot {robot.name!r})" if given is None else ""
        raise ValueError(
            f"{where}: chunk_size={chunk_size}{whose}, but column {column!r} holds {stored} actions per row. Give "
            f"chunk_size={stored} or less, or record again with chunks of {chunk_size}"
        )
    return chunk_size


def column_to_chunks(
    column: pa.ChunkedArray | pa.Array, name: str, shape: tuple[int, int]
) -> tuple[np.ndarray, dict[int, str]]:
    """Arrow column with a list of actions per row -> float32 (rows, K, A), without going through Python objects.

    Args:
        column: lists of lists of numbers, of fixed or variable size, or `datasets`' Array2D.
        name: its name, for messages.
        shape: (K, A), the same for every row.

    Returns:
        The chunks, and {row: what is wrong} for rows of another shape; their values are NaN.

    Raises:
        ValueError: the column does not hold lists of lists of numbers.
    """
    array = joined_array(column)
    if (
        not is_list(array.type)
        or not is_list(array.type.value_type)
        or not is_number(array.type.value_type.value_type)
    ):
        raise ValueError(f"column {name!r} has type {array.type}; expected a list of actions per row")
    size, width = shape
    sizes = _lengths(array)
    actions = array.flatten()
    widths = _lengths(actions)
    values = numbers_of(actions.flatten())
    owner = np.repeat(np.arange(len(array)), sizes)
    right = sizes == size
    right[owner[widths != width]] = False
    if right.all():
        return values.reshape(len(array), size, width), {}
    chunks = np.full((len(array), size, width), np.nan, np.float32)
    chunks[right] = values[np.repeat(right[owner], widths)].reshape(-1, size, width)
    wrong = {}
    for row in np.flatnonzero(~right).tolist():
        if sizes[row] != size:
            wrong[row] = f"{name} has {sizes[row]} actions, expected {size}"
        else:
            of_row = widths[owner == row]
            wrong[row] = f"an action of {name} has {of_row[of_row != width][0]} values, expected {width}"
    return chunks, wrong


def _lengths(array: pa.Array) -> np.ndarray:
    return np.asarray(pc.list_value_length(array).fill_null(0), np.int64)
