"""Arrow tables -> NumPy arrays, without going through Python objects."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vla_adapter_hf.data.columns import STEP_COLUMN, Columns
from vla_adapter_hf.data.episodes import BadEpisode, Episode


def joined_array(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    """A column as one array of plain Arrow types."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if isinstance(array, pa.ChunkedArray):  # no chunk, or too many to join
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], array.type)
    return array.storage if isinstance(array, pa.ExtensionArray) else array


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind)


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_fixed_size_list(kind) or pa.types.is_list(kind) or pa.types.is_large_list(kind)


def _numbers(array: pa.Array) -> np.ndarray:
    # A null becomes NaN, which is then reported with its frame.
    if array.null_count:
        array = array.cast(pa.float64())
    return array.to_numpy(zero_copy_only=False).astype(np.float32, copy=False)


def _lengths(array: pa.Array) -> np.ndarray:
    return np.asarray(pc.list_value_length(array).fill_null(0), np.int64)


def column_to_matrix(
    column: pa.ChunkedArray | pa.Array, name: str, width: int | None = None
) -> tuple[np.ndarray, dict[int, str]]:
    """Arrow column of number lists -> float32 (rows, width).

    Args:
        column: numbers, or lists of numbers of fixed or variable size.
        name: its name, for messages.
        width: values per row, if known; by default that of most rows.

    Returns:
        The matrix, and {row: what is wrong} for rows of another length; their values are NaN.

    Raises:
        ValueError: the column does not hold numbers or lists of numbers.
    """
    array = joined_array(column)
    if _is_number(array.type):
        lengths, values = np.ones(len(array), np.int64), _numbers(array)
    elif _is_list(array.type) and _is_number(array.type.value_type):
        lengths, values = _lengths(array), _numbers(array.flatten())
    else:
        raise ValueError(f"column {name!r} has type {array.type}; expected a list of numbers per row")
    if width is None:
        width = int(np.bincount(lengths).argmax()) if len(lengths) else 0
    right = lengths == width
    if right.all():
        return values.reshape(len(array), width), {}
    matrix = np.full((len(array), width), np.nan, np.float32)
    matrix[right] = values[np.repeat(right, lengths)].reshape(-1, width)
    wrong = np.flatnonzero(~right).tolist()
    return matrix, {row: f"{name} has {lengths[row]} values, expected {width}" for row in wrong}


def column_to_chunks(
    column: pa.ChunkedArray | pa.Array, name: str, shape: tuple[int, int]
) -> tuple[np.ndarray, dict[int, str]]:
    """Arrow column with a list of actions per row -> float32 (rows, K, A).

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
    if not (_is_list(array.type) and _is_list(array.type.value_type) and _is_number(array.type.value_type.value_type)):
        raise ValueError(f"column {name!r} has type {array.type}; expected a list of actions per row")
    size, width = shape
    sizes = _lengths(array)
    actions = array.flatten()
    widths = _lengths(actions)
    values = _numbers(actions.flatten())
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


def column_to_texts(column: pa.ChunkedArray | pa.Array) -> list[str | None]:
    """Arrow column of texts -> a string per row; None for a null and for bytes that are not UTF-8."""
    array = joined_array(column)
    if not (pa.types.is_string(array.type) or pa.types.is_large_string(array.type)):
        return [None if value is None else str(value) for value in array.to_pylist()]
    texts: list[str | None] = []
    for data in array.cast(pa.large_binary()).to_pylist():
        try:
            texts.append(None if data is None else data.decode())
        except UnicodeDecodeError:
            texts.append(None)
    return texts


def rows_to_episode(
    index: int, table: pa.Table, columns: Columns, widths: dict[str, int], chunk_shape: tuple[int, int] | None
) -> Episode | BadEpisode:
    """The numbers of one episode, as recorded; its texts and frames are left out.

    Args:
        index: the episode's number.
        table: its rows, in order.
        columns: the columns to read.
        widths: values per row of the state and action column, where they are known.
        chunk_shape: (K, A) of the stored chunks.
    """
    states, wrong = column_to_matrix(table.column(columns.state), columns.state, widths.get(columns.state))
    actions, more = column_to_matrix(table.column(columns.action), columns.action, widths.get(columns.action))
    wrong = {**more, **wrong}
    chunks = control_steps = None
    if columns.chunk is not None:
        chunks, more = column_to_chunks(table.column(columns.chunk), columns.chunk, chunk_shape)
        wrong = {**more, **wrong}
        steps = table.column(STEP_COLUMN) if STEP_COLUMN in table.column_names else None
        # They only serve plots: a missing step makes no episode bad.
        if steps is not None and pa.types.is_integer(steps.type) and not steps.null_count:
            control_steps = steps.to_numpy().astype(np.int64)
    if wrong:
        return BadEpisode(index, min(wrong), wrong[min(wrong)])
    return Episode(index, states, actions, chunks=chunks, control_steps=control_steps)


def consecutive_runs(tables: Iterable[pa.Table], column: str) -> Iterator[tuple[int, int | str, pa.Table]]:
    """Rows joined as long as `column` keeps its value: (first row, value, rows) of each run."""
    first, key, parts, row = 0, None, [], 0
    for table in tables:
        values = table.column(column)
        if values.null_count:
            raise ValueError(f"column {column!r} has rows without a value; every row must belong to an episode")
        keys = np.asarray(values.to_numpy() if pa.types.is_integer(values.type) else values.to_pylist())
        edges = [0, *(np.flatnonzero(keys[1:] != keys[:-1]) + 1).tolist(), len(keys)]
        for start, stop in zip(edges[:-1], edges[1:], strict=True):
            if start == stop:
                continue
            if parts and keys[start] != key:
                yield first, key, pa.concat_tables(parts)
                parts = []
            if not parts:
                first, key = row + start, keys[start].item()
            parts.append(table.slice(start, stop - start))
        row += len(keys)
    if parts:
        yield first, key, pa.concat_tables(parts)
