"""TFRecord files and the `tf.train.Example` in them, read without TensorFlow.

Written by hand: random access needs the place of every frame's bytes in the file, which no protobuf library gives.

A record is: length (8 bytes, little endian), masked CRC-32C of those 8 bytes, data, masked CRC-32C of the data. The
data is a protocol buffer `Example { Features { map<string, Feature> } }`; a feature is a list of byte strings, floats
or integers. Only what that message needs of the wire format is here.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

import google_crc32c
import numpy as np


_HEADER = struct.Struct("<QI")
_FOOTER = struct.Struct("<I")
_VARINT, _FIXED64, _LENGTH_DELIMITED, _FIXED32 = 0, 1, 2, 5


def masked_crc32c(data: bytes) -> int:
    """The checksum as TFRecord stores it: CRC-32C, rotated right by 15 bits, plus a constant."""
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


class TFRecordError(ValueError):
    """A TFRecord file that is cut short, damaged, or does not hold `tf.train.Example` records."""


@dataclass(frozen=True)
class Record:
    """Where one record's data is in its file, and the checksum stored for it."""

    offset: int
    length: int
    stored_crc: int


def scan_records(path: str | os.PathLike) -> list[Record]:
    """Positions of all records of a file, from the headers alone: the data is not read.

    Raises:
        TFRecordError: the file ends within a record, or a length does not match its checksum; names file and record.
    """
    records = []
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        position = 0
        while position < size:
            file.seek(position)
            header = file.read(_HEADER.size)
            if len(header) < _HEADER.size:
                raise TFRecordError(f"{path}: record {len(records)} at byte {position} is cut off in its header")
            length, length_crc = _HEADER.unpack(header)
            if masked_crc32c(header[:8]) != length_crc:
                raise TFRecordError(
                    f"{path}: record {len(records)} at byte {position} has a length that does not match its checksum; "
                    "the file is damaged or is no TFRecord file. Fetch it again."
                )
            offset = position + _HEADER.size
            if offset + length + _FOOTER.size > size:
                raise TFRecordError(
                    f"{path}: record {len(records)} at byte {position} should have {length} bytes, but the file ends "
                    f"after {size - offset}. Fetch it again."
                )
            file.seek(offset + length)
            records.append(Record(offset, length, _FOOTER.unpack(file.read(_FOOTER.size))[0]))
            position = offset + length + _FOOTER.size
    return records


def read_record(file: BinaryIO, record: Record, name: str, verify: bool = True) -> bytes:
    """The data of one record.

    Raises:
        TFRecordError: the data does not match its checksum (only with `verify`).
    """
    file.seek(record.offset)
    data = file.read(record.length)
    if len(data) != record.length:
        raise TFRecordError(f"{name}: the record at byte {record.offset} is cut off. Fetch the file again.")
    if verify and masked_crc32c(data) != record.stored_crc:
        raise TFRecordError(
            f"{name}: the record at byte {record.offset} does not match its checksum; the file is damaged. "
            "Fetch it again."
        )
    return data


def _read_varint(data: bytes, position: int, stop: int) -> tuple[int, int]:
    """(value, where it ends) of the varint at a position; raises TFRecordError if `stop` or 64 bits cut it off."""
    value = 0
    for shift, byte in enumerate(data[position : min(stop, position + 10)]):
        value |= (byte & 0x7F) << 7 * shift
        if byte < 0x80:
            return value, position + shift + 1
    raise TFRecordError(f"the integer at byte {position} is cut off or has more than 64 bits")


def _fields(data: bytes, start: int, stop: int) -> Iterator[tuple[int, int, int, int]]:
    """(field number, wire type, start, stop) of every field in data[start:stop]; of a varint the span of its bytes."""
    position = start
    while position < stop:
        tag, position = _read_varint(data, position, stop)
        number, wire = tag >> 3, tag & 7
        if wire == _LENGTH_DELIMITED:
            length, position = _read_varint(data, position, stop)
            end = position + length
        elif wire == _FIXED32:
            end = position + 4
        elif wire == _FIXED64:
            end = position + 8
        elif wire == _VARINT:
            end = _read_varint(data, position, stop)[1]
        else:
            raise TFRecordError(f"wire type {wire} at byte {position} does not occur in a tf.train.Example")
        if end > stop:
            raise TFRecordError(f"a field at byte {position} is longer than the message around it")
        yield number, wire, position, end
        position = end


@dataclass(frozen=True)
class Feature:
    """One feature of an Example, not decoded until asked: its kind and where its list is in the record's data."""

    data: bytes
    kind: str  # "bytes", "float", "int64", or "empty"
    start: int
    stop: int

    def spans(self) -> np.ndarray:
        """(n, 2) int64: start and stop of every byte string within the record's data."""
        if self.kind not in ("bytes", "empty"):
            raise TFRecordError(f"a list of byte strings was expected, found one of {self.kind}")
        spans = [(start, stop) for number, _, start, stop in _fields(self.data, self.start, self.stop) if number == 1]
        return np.array(spans, np.int64).reshape(-1, 2)

    def strings(self) -> list[bytes]:
        """The byte strings."""
        return [self.data[start:stop] for start, stop in self.spans().tolist()]

    def numbers(self) -> np.ndarray:
        """float32 (n,) or int64 (n,)."""
        if self.kind == "empty":
            return np.zeros(0, np.float32)
        if self.kind == "bytes":
            raise TFRecordError("a list of numbers was expected, found one of byte strings")
        parts = []
        for number, _, start, stop in _fields(self.data, self.start, self.stop):
            if number != 1:
                continue
            if self.kind == "float":  # packed or one by one, the bytes are the same
                if (stop - start) % 4:
                    raise TFRecordError(f"the list of floats at byte {start} is cut off")
                parts.append(np.frombuffer(self.data, "<f4", (stop - start) // 4, start))
            else:
                parts.append(_varints(np.frombuffer(self.data, np.uint8, stop - start, start)))
        dtype = np.float32 if self.kind == "float" else np.int64
        return np.concatenate(parts) if parts else np.zeros(0, dtype)


def _varints(raw: np.ndarray) -> np.ndarray:
    """Packed varints as bytes (n,) -> int64 (m,)."""
    if len(raw) == 0:
        return np.zeros(0, np.int64)
    last = raw < 0x80
    first = np.flatnonzero(np.concatenate([[True], last[:-1]]))
    which = np.concatenate([[0], np.cumsum(last)[:-1]])
    place = np.arange(len(raw)) - first[which]
    if not last[-1] or place.max() > 9:
        raise TFRecordError("a list of integers is cut off or has one of more than 64 bits")
    values = np.zeros(int(last.sum()), np.uint64)
    np.bitwise_or.at(values, which, (raw & np.uint8(0x7F)).astype(np.uint64) << (7 * place).astype(np.uint64))
    return values.view(np.int64)


_KINDS = {1: "bytes", 2: "float", 3: "int64"}


def parse_example(data: bytes) -> dict[str, Feature]:
    """The features of a serialized `tf.train.Example` by name. Lists are decoded only when asked for.

    Raises:
        TFRecordError: `data` is not such a message.
    """
    features: dict[str, Feature] = {}
    try:
        for number, wire, start, stop in _fields(data, 0, len(data)):
            if number != 1 or wire != _LENGTH_DELIMITED:
                continue
            for _, entry_wire, entry_start, entry_stop in _fields(data, start, stop):
                if entry_wire == _LENGTH_DELIMITED:
                    name, feature = _parse_entry(data, entry_start, entry_stop)
                    features[name] = feature
    except UnicodeDecodeError as error:
        raise TFRecordError(f"the record is no tf.train.Example: {error}") from error
    return features


def _parse_entry(data: bytes, start: int, stop: int) -> tuple[str, Feature]:
    name, feature = "", Feature(data, "empty", 0, 0)
    for number, wire, inner_start, inner_stop in _fields(data, start, stop):
        if wire != _LENGTH_DELIMITED:
            continue
        if number == 1:
            name = data[inner_start:inner_stop].decode()
        elif number == 2:
            for kind, _, list_start, list_stop in _fields(data, inner_start, inner_stop):
                feature = Feature(data, _KINDS.get(kind, "empty"), list_start, list_stop)
    return name, feature
