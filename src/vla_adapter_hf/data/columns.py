"""Which column is the state, which the action, which the cameras: found by their usual names, or given.

Nothing is guessed: two candidates, or none, are an error that lists the columns that exist.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa


STATE_NAMES = ("observation.state", "state", "proprio", "robot_obs")
ACTION_NAMES = ("action", "actions", "rel_actions")


def last_name(column: str) -> str:
    """The last part of a column's name: `steps/observation/wrist_image` -> `wrist_image`."""
    return column.replace("/", ".").rsplit(".", 1)[-1]


def _listed(columns: Sequence[str]) -> str:
    return ", ".join(columns) if columns else "none"


def find_column(
    what: str, argument: str, given: str | None, usual: Sequence[str], available: Sequence[str], where: str
) -> str:
    """The column that holds `what`.

    Args:
        what: what is looked for, for the message.
        argument: the argument a user can give it by, for the message.
        given: the column's full name, or its last part, if the user gave one.
        usual: names it usually has.
        available: columns that exist.
        where: the dataset, for the message.

    Raises:
        ValueError: the given column does not exist, or no column or several have a usual name.
    """
    if given is not None:
        if given in available:
            return given
        matches = [column for column in available if last_name(column) == given]
        problem = f"{argument}={given!r} is not a column"
    else:
        matches = [column for column in available if column in usual]
        matches = matches or [column for column in available if last_name(column) in usual]
        problem = f"no column for the {what} was found (looked for {', '.join(usual)})"
    if len(matches) == 1:
        return matches[0]
    if matches:
        asked = f"{argument}={given!r}" if given is not None else f"the {what}"
        raise ValueError(f"{where}: {asked} could be any of {_listed(matches)}; give {argument}=<full column name>")
    raise ValueError(f"{where}: {problem}; columns that exist: {_listed(available)}. Give {argument}=<column name>")


def find_cameras(
    given: Sequence[str] | None, preset: Sequence[str] | None, available: Sequence[str], where: str
) -> list[str]:
    """The camera columns in the order the model will see them.

    Args:
        given: full column names or their last parts, in order, if the user gave them.
        preset: the robot's cameras, used if all of them exist.
        available: columns with camera frames.
        where: the dataset, for the message.

    Raises:
        TypeError: `given` is a string instead of a list.
        ValueError: a camera that does not exist, that is ambiguous or given twice; no cameras given and more than one
            there.
    """
    if isinstance(given, str):
        raise TypeError(f"cameras={given!r} is a string; expected a list of camera names, such as [{given!r}]")
    if not available:
        raise ValueError(f"{where}: there is no column with camera frames")
    if given is None:
        if preset is not None:
            given = preset
        elif len(available) == 1:
            return [available[0]]
        else:
            raise ValueError(
                f"{where}: there are {len(available)} cameras ({_listed(available)}); their order matters to "
                "the model. "
                "Give cameras=[...], third person first, then the wrist camera(s)"
            )
    if len(given) == 0:
        raise ValueError(f"{where}: cameras is empty; cameras that exist: {_listed(available)}")
    found = []
    for name in given:
        matches = [name] if name in available else [column for column in available if last_name(column) == name]
        if not matches:
            raise ValueError(
                f"{where}: camera {name!r} does not exist; cameras that exist: {_listed(available)}. Give "
                "cameras=[...]"
            )
        if len(matches) > 1:
            raise ValueError(f"{where}: camera {name!r} could be any of {_listed(matches)}; give its full column name")
        found.append(matches[0])
    if len(set(found)) != len(found):
        raise ValueError(f"{where}: cameras={list(given)} names the same camera twice")
    return found


def column_to_matrix(column: pa.ChunkedArray | pa.Array, name: str) -> tuple[np.ndarray, dict[int, int]]:
    """Arrow column of number lists -> float32 (rows, width), without going through Python objects.

    Returns:
        The matrix, and {row: its length} for rows of another length than most; their values are NaN.

    Raises:
        ValueError: the column does not hold numbers or lists of numbers.
    """
    array = joined_array(column)
    if is_number(array.type):
        return numbers_of(array).reshape(-1, 1), {}
    if not is_list(array.type) or not is_number(array.type.value_type):
        raise ValueError(f"column {name!r} has type {array.type}; expected a list of numbers per row")
    if pa.types.is_fixed_size_list(array.type) and array.null_count == 0:
        return numbers_of(array.flatten()).reshape(len(array), array.type.list_size), {}
    lengths = np.array(array.value_lengths().fill_null(0), np.int64) if len(array) else np.zeros(0, np.int64)
    values = numbers_of(array.flatten())
    width = int(np.bincount(lengths).argmax()) if len(lengths) else 0
    if (lengths == width).all():
        return values.reshape(len(array), width), {}
    matrix = np.full((len(array), width), np.nan, np.float32)
    right = lengths == width
    matrix[right] = values[np.repeat(right, lengths)].reshape(-1, width)
    return matrix, {int(row): int(lengths[row]) for row in np.flatnonzero(~right)}


def joined_array(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    """A column as one array of plain Arrow types."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if isinstance(array, pa.ChunkedArray):  # no chunk, or too many to join
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], array.type)
    return array.storage if isinstance(array, pa.ExtensionArray) else array


def is_number(kind: pa.DataType) -> bool:
    """Whether a type is an integer's or a float's."""
    return pa.types.is_integer(kind) or pa.types.is_floating(kind)


def is_list(kind: pa.DataType) -> bool:
    """Whether a type is a list's, of fixed or variable size."""
    return pa.types.is_fixed_size_list(kind) or pa.types.is_list(kind) or pa.types.is_large_list(kind)


def numbers_of(array: pa.Array) -> np.ndarray:
    """An array of numbers as float32; a null becomes NaN and is then reported as such, with its frame."""
    if array.null_count:
        array = array.cast(pa.float64())
    return array.to_numpy(zero_copy_only=False).astype(np.float32, copy=False)
