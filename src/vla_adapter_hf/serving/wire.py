"""Messages to values and back: msgpack with arrays, and JSON with arrays. Nothing is unpickled.

Three ways to write an array are read in msgpack: openpi's (`b"__ndarray__"`, `b"__npgeneric__"`), vla-eval's
(`"__ndarray__"`, and `"__image__"` for PNG and JPEG), and in JSON json_numpy's (`"__numpy__"`).
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import re
from dataclasses import dataclass
from typing import Any

import msgpack
import numpy as np

from vla_adapter_hf.serving.errors import InvalidRequest, TooLarge


# Booleans, integers and floats, as `dtype.str` writes them. Objects, structures and complex numbers are refused.
PLAIN_DTYPE = re.compile(r"[<>|=]?(?:b1|[iu][1248]|f[248])")
MAX_DIMENSIONS = 5
# A list of a message is a state or a few names; frames are arrays.
MAX_LENGTH = 1_000
# Values of a message in all. Messages are decoded between the answers to other robots, so it must not take long.
MAX_VALUES = 10_000


@dataclass(frozen=True)
class EncodedImage:
    """A PNG or JPEG file that was not decoded yet."""

    data: bytes


def unpack(message: bytes, max_frame_bytes: int) -> Any:
    """A msgpack message to Python values, arrays and [`EncodedImage`]s.

    Raises:
        InvalidRequest: the message is broken, nested too deeply, or holds something that is no plain data.
        TooLarge: an array is over `max_frame_bytes`, or there are more than `MAX_VALUES` values.
    """
    values = 0

    def count(collection: Any) -> Any:
        nonlocal values
        values += 1 + len(collection)
        _check_count(values)
        return collection

    def restore(value: dict[Any, Any]) -> Any:
        count(value)
        if b"__ndarray__" in value:
            return make_array(value.get(b"data"), value.get(b"dtype"), value.get(b"shape"), max_frame_bytes)
        if "__ndarray__" in value:
            return make_array(value.get("data"), value.get("dtype"), value.get("shape"), max_frame_bytes)
        if b"__npgeneric__" in value:
            return _number(value.get(b"data"))
        if "__image__" in value:
            return _image(value, max_frame_bytes)
        return value

    try:
        return msgpack.unpackb(
            message,
            object_hook=restore,
            list_hook=count,
            max_array_len=MAX_LENGTH,
            max_map_len=MAX_LENGTH,
            max_ext_len=0,
        )
    except (ValueError, TypeError, OverflowError, RecursionError, msgpack.UnpackException) as error:
        raise InvalidRequest(f"the message is no valid msgpack: {error or type(error).__name__}") from error


def pack(value: Any, keys_as_bytes: bool = True) -> bytes:
    """Python values and arrays to msgpack.

    Args:
        value: what to write; arrays of booleans, integers and floats are allowed everywhere.
        keys_as_bytes: write arrays as openpi does; otherwise as vla-eval does.
    """

    def encode(array: Any) -> Any:
        if isinstance(array, np.generic):
            return array.item()
        if not isinstance(array, np.ndarray) or not PLAIN_DTYPE.fullmatch(array.dtype.str):
            kind = f"an array of {array.dtype}" if isinstance(array, np.ndarray) else f"a {type(array).__name__}"
            raise TypeError(f"cannot write {kind} to a message; arrays hold booleans, integers or floats.")
        parts = {"__ndarray__": True, "data": array.tobytes(), "dtype": array.dtype.str, "shape": list(array.shape)}
        return {name.encode(): part for name, part in parts.items()} if keys_as_bytes else parts

    return msgpack.packb(value, default=encode)


def from_json(body: bytes | str, max_frame_bytes: int) -> Any:
    """JSON with json_numpy's arrays to Python values.

    Raises:
        InvalidRequest: the text is no JSON, or an array in it is broken.
        TooLarge: an array is over `max_frame_bytes`, or there may be more than `MAX_VALUES` values.
    """
    # Before anything is made of it. Base64 has none of these signs.
    signs = ",[{" if isinstance(body, str) else (b",", b"[", b"{")
    _check_count(sum(body.count(sign) for sign in signs))

    def restore(value: dict[str, Any]) -> Any:
        if "__numpy__" not in value:
            return value
        array = make_array(from_base64(value["__numpy__"]), value.get("dtype"), value.get("shape"), max_frame_bytes)
        return array if array.ndim else array.item()

    try:
        return json.loads(body, object_hook=restore)
    except (ValueError, TypeError, RecursionError) as error:
        raise InvalidRequest(f"the body is no valid JSON: {error}") from error


def _check_count(values: int) -> None:
    if values > MAX_VALUES:
        raise TooLarge(f"a message may have {MAX_VALUES} values; send frames as arrays or encoded, not as lists.")


def from_base64(text: Any) -> bytes:
    """Raises InvalidRequest for anything but base64 text."""
    if not isinstance(text, str):
        raise InvalidRequest(f"base64 data must be a string, got {type(text).__name__}.")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidRequest(f"broken base64 data: {error}") from error


def make_array(data: Any, dtype: Any, shape: Any, max_bytes: int) -> np.ndarray:
    """An array of the machine's byte order from what a message says about it.

    Raises:
        InvalidRequest: another kind of numbers, or a shape that does not fit the data.
        TooLarge: more than `max_bytes`.
    """
    if isinstance(dtype, bytes):
        dtype = dtype.decode("ascii", "replace")
    if not isinstance(dtype, str) or not PLAIN_DTYPE.fullmatch(dtype):
        raise InvalidRequest(f"an array must hold booleans, integers or floats, got dtype {str(dtype)[:40]!r}.")
    if not isinstance(data, bytes):
        raise InvalidRequest(f"the data of an array must be bytes, got {type(data).__name__}.")
    if (
        not isinstance(shape, (list, tuple))
        or len(shape) > MAX_DIMENSIONS
        or not all(isinstance(size, int) and not isinstance(size, bool) and size >= 0 for size in shape)
    ):
        raise InvalidRequest(f"the shape of an array must be at most {MAX_DIMENSIONS} sizes, got {str(shape)[:80]}.")
    if len(data) > max_bytes:
        raise TooLarge(f"an array of {len(data)} bytes is over the limit of {max_bytes}.")
    kind = np.dtype(dtype)
    if math.prod(shape) * kind.itemsize != len(data):
        raise InvalidRequest(f"an array of shape {list(shape)} and dtype {dtype} cannot have {len(data)} bytes.")
    array = np.frombuffer(data, kind).reshape(shape)
    return array if kind.isnative else array.astype(kind.newbyteorder("="))


def _number(value: Any) -> bool | int | float:
    if not isinstance(value, (bool, int, float)):
        raise InvalidRequest(f"a number was expected, got {type(value).__name__}.")
    return value


def _image(value: dict[Any, Any], max_frame_bytes: int) -> np.ndarray | EncodedImage:
    data, image_format = value.get("data"), value.get("format")
    if image_format == "raw":
        return make_array(data, value.get("dtype"), value.get("shape"), max_frame_bytes)
    if image_format not in ("png", "jpeg") or not isinstance(data, bytes):
        raise InvalidRequest(f"an image must be raw, png or jpeg with bytes, got {str(image_format)[:40]!r}.")
    return EncodedImage(data)
