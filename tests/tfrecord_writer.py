"""Writes TFRecord files of `tf.train.Example` messages, as TensorFlow does, for tests and benchmarks."""

import os
import struct
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from vla_adapter_hf.data.rlds import tfrecord


def _varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _message(number: int, payload: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(payload)) + payload


def encode_example(features: Mapping[str, Sequence[bytes] | np.ndarray]) -> bytes:
    """Serialized `tf.train.Example`: a list of byte strings, a float array or an integer array per name.

    Raises:
        TypeError: a feature that is none of these.
    """
    entries = []
    for name, values in features.items():
        if isinstance(values, np.ndarray) and values.dtype.kind == "f":
            payload = _message(2, _message(1, values.astype("<f4").tobytes()))
        elif isinstance(values, np.ndarray) and values.dtype.kind in "iub":
            payload = _message(3, _message(1, b"".join(_varint(int(value)) for value in values.ravel())))
        elif not isinstance(values, np.ndarray) and all(isinstance(value, bytes) for value in values):
            payload = _message(1, b"".join(_message(1, value) for value in values))
        else:
            raise TypeError(
                f"feature {name!r} is {type(values).__name__}; expected a list of bytes or an array of numbers"
            )
        entries.append(_message(1, _message(1, name.encode()) + _message(2, payload)))
    return _message(1, b"".join(entries))


def write_records(path: str | os.PathLike, records: Iterable[bytes]) -> None:
    """Write a TFRecord file."""
    with open(path, "wb") as file:
        for data in records:
            header = struct.pack("<Q", len(data))
            file.write(header + struct.pack("<I", tfrecord.masked_crc32c(header)))
            file.write(data)
            file.write(struct.pack("<I", tfrecord.masked_crc32c(data)))
