"""TFRecord framing, checksums and tf.train.Example, against files written by TensorFlow and against known values."""

import numpy as np
import pytest
from data_fixtures import RLDS
from hypothesis import given, settings
from hypothesis import strategies as st
from tfrecord_writer import encode_example, write_records

from vla_adapter_hf.data.rlds.tfrecord import (
    TFRecordError,
    masked_crc32c,
    parse_example,
    read_record,
    scan_records,
)


SHARD = next(RLDS.glob("*.tfrecord-*"))


def test_records_written_by_tensorflow_are_found_and_their_checksums_hold():
    records = scan_records(SHARD)
    assert len(records) == 2
    with open(SHARD, "rb") as file:
        for record in records:
            data = read_record(file, record, "shard")
            assert masked_crc32c(data) == record.stored_crc
            features = parse_example(data)
            assert features["steps/action"].numbers().dtype == np.float32
            assert features["steps/is_first"].numbers()[:3].tolist() == [1, 0, 0]
            assert features["steps/observation/image"].strings()[0][:3] == b"\xff\xd8\xff"


numbers = st.lists(st.integers(-(2**63), 2**63 - 1), max_size=20)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.binary(max_size=300), max_size=5), st.lists(st.floats(width=32), max_size=20), numbers)
def test_examples_survive_writing_and_reading(strings, floats, integers):
    example = {"a/b": strings, "f": np.array(floats, np.float32), "i": np.array(integers, np.int64)}
    parsed = parse_example(encode_example(example))
    assert parsed["a/b"].strings() == strings
    assert parsed["f"].numbers().tobytes() == example["f"].tobytes()
    assert parsed["i"].numbers().tolist() == integers


def test_numbers_may_be_stored_unpacked():
    # Feature { float_list { value: 1.5 value: -2 } } with a tag before each value, as proto2 writers do.
    values = b"\x0d" + np.float32(1.5).tobytes() + b"\x0d" + np.float32(-2).tobytes()
    integers = b"\x08\x96\x01\x08\x07"
    entry = b"\x0a\x01f\x12" + bytes([len(values) + 2]) + b"\x12" + bytes([len(values)]) + values
    other = b"\x0a\x01i\x12" + bytes([len(integers) + 2]) + b"\x1a" + bytes([len(integers)]) + integers
    features = b"".join(b"\x0a" + bytes([len(part)]) + part for part in (entry, other))
    parsed = parse_example(b"\x0a" + bytes([len(features)]) + features)
    assert parsed["f"].numbers().tolist() == [1.5, -2.0]
    assert parsed["i"].numbers().tolist() == [150, 7]


def test_files_survive_writing_and_reading(tmp_path):
    path = tmp_path / "x.tfrecord"
    payloads = [b"", b"one", np.random.default_rng(0).bytes(5000)]
    write_records(path, payloads)
    with open(path, "rb") as file:
        assert [read_record(file, record, "x") for record in scan_records(path)] == payloads


def test_a_file_cut_short_is_refused_with_its_record(tmp_path):
    path = tmp_path / "cut.tfrecord"
    write_records(path, [b"a" * 100, b"b" * 100])
    whole = path.read_bytes()
    path.write_bytes(whole[:-50])
    with pytest.raises(TFRecordError, match="cut.tfrecord: record 1 at byte 116 should have 100 bytes"):
        scan_records(path)
    path.write_bytes(whole[:120])
    with pytest.raises(TFRecordError, match="record 1 at byte 116 is cut off in its header"):
        scan_records(path)


def test_a_damaged_length_or_datum_is_refused(tmp_path):
    path = tmp_path / "bad.tfrecord"
    write_records(path, [b"a" * 100])
    whole = bytearray(path.read_bytes())
    whole[50] ^= 1
    path.write_bytes(whole)
    record = scan_records(path)[0]
    with open(path, "rb") as file:
        with pytest.raises(TFRecordError, match="does not match its checksum"):
            read_record(file, record, "bad.tfrecord")
        assert len(read_record(file, record, "bad.tfrecord", verify=False)) == 100
    whole[0] ^= 1
    path.write_bytes(whole)
    with pytest.raises(TFRecordError, match="record 0 at byte 0 has a length that does not match"):
        scan_records(path)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_bytes_that_are_no_example_are_refused_or_empty_but_never_crash(data):
    try:
        features = parse_example(data)
        for feature in features.values():
            feature.spans() if feature.kind == "bytes" else feature.numbers()
    except TFRecordError:
        pass
