"""Messages are read as their senders write them, within limits, and nothing else is."""

import io
import json
import pickle

import json_numpy
import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vla_adapter_hf.serving.errors import InvalidRequest, ServingError, TooLarge
from vla_adapter_hf.serving.wire import EncodedImage, from_json, make_array, pack, unpack


LIMIT = 10_000


def openpi_array(array: np.ndarray) -> dict[bytes, object]:
    """As `openpi_client.msgpack_numpy` writes it."""
    return {b"__ndarray__": True, b"data": array.tobytes(), b"dtype": array.dtype.str, b"shape": array.shape}


def openpi_number(value: np.generic) -> dict[bytes, object]:
    return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int16", "int64", "float16", "float32", "float64", ">f4", ">i8"])
def test_arrays_of_openpi_are_read_exactly(dtype):
    array = np.arange(24).reshape(2, 3, 4).astype(dtype)
    read = unpack(msgpack.packb({"x": openpi_array(array), "n": openpi_number(np.float32(0.5))}), LIMIT)
    assert read["n"] == 0.5
    assert read["x"].dtype.isnative and np.array_equal(read["x"], array)


def test_what_is_packed_is_unpacked_the_same():
    value = {"actions": np.linspace(0, 1, 14, dtype=np.float32).reshape(2, 7), "ms": np.float64(1.5), "text": "ok"}
    for keys_as_bytes in (True, False):
        read = unpack(pack(value, keys_as_bytes), LIMIT)
        assert np.array_equal(read["actions"], value["actions"]) and read["ms"] == 1.5 and read["text"] == "ok"


def test_images_of_vla_eval_are_kept_encoded():
    file = io.BytesIO()
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(file, "PNG")
    message = {"__image__": True, "format": "png", "data": file.getvalue(), "shape": [4, 4, 3]}
    assert unpack(msgpack.packb(message), LIMIT) == EncodedImage(file.getvalue())


def test_arrays_of_json_numpy_are_read_exactly():
    observation = {"full_image": np.arange(12, dtype=np.uint8).reshape(2, 2, 3), "state": np.array([1.5, -2.0])}
    read = from_json(json_numpy.dumps(observation), LIMIT)
    assert all(np.array_equal(read[name], array) for name, array in observation.items())
    assert from_json(json_numpy.dumps({"x": np.float32(2)}), LIMIT) == {"x": 2.0}


@pytest.mark.parametrize(
    ("data", "dtype", "shape", "field"),
    [
        (b"\0" * 16, "|O", [2], "dtype"),
        (b"\0" * 16, "<c16", [1], "dtype"),
        (b"\0" * 16, "<i4,<f4", [2], "dtype"),
        (b"\0" * 16, [["a", "<i4"]], [4], "dtype"),
        (b"\0" * 16, "<f4", [5], "16 bytes"),
        (b"\0" * 16, "<f4", [-4], "shape"),
        (b"\0" * 16, "<f4", [True, 4], "shape"),
        (b"\0" * 16, "<f4", [2**40, 2**40], "16 bytes"),
        (b"\0" * 16, "<f4", [1] * 6 + [4], "shape"),
        (b"\0" * 16, "<f4", None, "shape"),
        ("text", "<f4", [1], "bytes"),
        (None, "<f4", [1], "bytes"),
    ],
)
def test_an_array_that_is_none_is_refused_and_named(data, dtype, shape, field):
    with pytest.raises(InvalidRequest, match=field):
        make_array(data, dtype, shape, LIMIT)


def test_an_array_over_the_limit_is_too_large():
    with pytest.raises(TooLarge, match="10001 bytes"):
        make_array(b"\0" * (LIMIT + 1), "|u1", [LIMIT + 1], LIMIT)


class Trap:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was loaded",))


def test_a_pickle_is_never_loaded():
    trap = pickle.dumps(Trap())
    for message in (trap, msgpack.packb(openpi_array(np.zeros(1)) | {b"data": trap, b"dtype": "|O"})):
        with pytest.raises(InvalidRequest):
            unpack(message, LIMIT)
    with pytest.raises(InvalidRequest):
        from_json(trap, LIMIT)


def test_nesting_without_end_is_refused():
    with pytest.raises(InvalidRequest):
        unpack(b"\x91" * 100_000, LIMIT)
    with pytest.raises(InvalidRequest):
        from_json("[" * 9_000, LIMIT)


@pytest.mark.parametrize("value", [[[{}] * 999] * 11, [{str(key): 0 for key in range(1000)}] * 10, [[[]] * 999] * 11])
def test_a_message_of_more_values_than_an_observation_has_is_refused_before_they_take_time_and_memory(value):
    for read, message in ((unpack, msgpack.packb(value)), (from_json, json.dumps(value))):
        with pytest.raises(TooLarge, match="10000 values"):
            read(message, LIMIT)
    assert unpack(msgpack.packb(value[:4]), LIMIT) == from_json(json.dumps(value[:4]), LIMIT) == value[:4]


def test_a_list_that_is_long_is_refused():
    with pytest.raises(InvalidRequest, match="1001"):
        unpack(msgpack.packb([0] * 1001), LIMIT)


def test_a_list_that_claims_more_than_is_there_is_refused():
    with pytest.raises(InvalidRequest):
        unpack(b"\xdd\xff\xff\xff\xff", LIMIT)


PLAIN = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary()
ANY = st.recursive(
    PLAIN,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text() | st.binary(), inner, max_size=4),
    max_leaves=10,
)
# Maps that claim to be arrays or images.
CLAIMED = st.fixed_dictionaries(
    {
        "__ndarray__": st.just(True),
        "data": st.binary(max_size=64) | ANY,
        "dtype": st.sampled_from(["<f4", "|u1", "|O", "<U4", ">f8", "|V8"]) | ANY,
        "shape": st.lists(st.integers(-2, 20), max_size=7) | ANY,
    }
)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300) | (ANY | CLAIMED).map(msgpack.packb))
def test_any_bytes_give_a_value_or_a_serving_error(message):
    try:
        unpack(message, LIMIT)
    except ServingError:
        pass


@settings(max_examples=300, deadline=None)
@given(
    st.text(max_size=200)
    | st.binary(max_size=200)
    | st.builds(
        lambda data, dtype, shape: json.dumps({"__numpy__": data, "dtype": dtype, "shape": shape}),
        st.text(max_size=20),
        st.sampled_from(["<f4", "|O", [["a", "<f4"]], None]),
        st.lists(st.integers(-2, 9), max_size=3),
    )
)
def test_any_body_gives_a_value_or_a_serving_error(body):
    try:
        from_json(body, LIMIT)
    except ServingError:
        pass
