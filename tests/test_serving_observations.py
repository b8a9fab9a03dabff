"""What clients call things, and what the model gets; in doubt an observation is refused."""

import io
import time

import numpy as np
import pytest
from PIL import Image

from vla_adapter_hf.serving.errors import InvalidRequest, ObservationTooOld, TooLarge
from vla_adapter_hf.serving.observations import ObservationReader, decode_image, pad_to_square
from vla_adapter_hf.serving.wire import EncodedImage


FRONT, WRIST, LEFT, RIGHT = (np.full((6, 8, 3), value, np.uint8) for value in (10, 20, 30, 40))
STATE = np.arange(8.0)
LIBERO, ALOHA, CALVIN = (
    ("image", "wrist_image"),
    ("primary", "left_wrist", "right_wrist"),
    ("rgb_static", "rgb_gripper"),
)


def read(cameras, message, renames=None):
    return ObservationReader(cameras, 8, renames).read(message, time.monotonic())


@pytest.mark.parametrize(
    ("cameras", "message", "expected"),
    [
        pytest.param(
            LIBERO,
            {"observation/image": FRONT, "observation/wrist_image": WRIST, "observation/state": STATE, "prompt": "go"},
            (FRONT, WRIST),
            id="openpi, LIBERO",
        ),
        pytest.param(
            ALOHA,
            {
                "state": STATE,
                "images": {"cam_high": FRONT, "cam_low": WRIST, "cam_left_wrist": LEFT, "cam_right_wrist": RIGHT},
                "prompt": "go",
            },
            (FRONT, LEFT, RIGHT),
            id="openpi, ALOHA",
        ),
        pytest.param(
            LIBERO,
            {
                "observation/exterior_image_1_left": FRONT,
                "observation/wrist_image_left": WRIST,
                "observation/joint_position": STATE[:7],
                "observation/gripper_position": STATE[7:],
                "prompt": "go",
            },
            (FRONT, WRIST),
            id="openpi, DROID",
        ),
        pytest.param(
            LIBERO,
            {"full_image": FRONT, "wrist_image": WRIST, "state": STATE, "instruction": "go"},
            (FRONT, WRIST),
            id="OpenVLA-OFT",
        ),
        pytest.param(
            ALOHA,
            {
                "full_image": FRONT,
                "left_wrist_image": LEFT,
                "right_wrist_image": RIGHT,
                "state": STATE,
                "instruction": "go",
            },
            (FRONT, LEFT, RIGHT),
            id="OpenVLA-OFT, ALOHA",
        ),
        pytest.param(
            LIBERO,
            {"images": {"agentview": FRONT, "wrist": WRIST}, "states": STATE, "task_description": "go"},
            (FRONT, WRIST),
            id="vla-eval, LIBERO",
        ),
        pytest.param(
            CALVIN,
            {"images": {"rgb_static": FRONT, "rgb_gripper": WRIST}, "states": STATE, "task_description": "go"},
            (FRONT, WRIST),
            id="vla-eval, CALVIN",
        ),
        pytest.param(
            ("top", "hand"),
            {"hand": WRIST, "top": FRONT, "state": STATE.tolist(), "task": "go"},
            (FRONT, WRIST),
            id="the configuration's names",
        ),
        pytest.param(
            ("top", "hand"),
            {
                "observation.images.hand": WRIST,
                "observation.images.top": FRONT,
                "observation.state": STATE,
                "task": "go",
            },
            (FRONT, WRIST),
            id="LeRobot",
        ),
    ],
)
def test_the_names_of_every_protocol_lead_to_the_same_observation(cameras, message, expected):
    observation = read(cameras, message)
    assert observation.instruction == "go"
    assert observation.state.dtype == np.float64 and np.array_equal(observation.state, STATE)
    assert all(frame is wanted for frame, wanted in zip(observation.frames, expected, strict=True))


def test_a_rename_leads_a_clients_camera_to_the_checkpoints():
    message = {"cam0": FRONT, "cam1": WRIST, "state": STATE, "prompt": "go"}
    assert read(LIBERO, message, {"cam1": "wrist_image", "cam0": "image"}).frames[0] is FRONT
    with pytest.raises(ValueError, match="no camera other"):
        ObservationReader(LIBERO, 8, {"cam0": "other"})
    with pytest.raises(ValueError, match="same camera"):
        ObservationReader(LIBERO, 8, {"cam0": "image", "cam1": "image"})


GOOD = {"image": FRONT, "wrist_image": WRIST, "state": STATE, "prompt": "go"}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"wrist_image": None}, "wrist_image"),
        ({"image": None, "full_image": FRONT, "agentview": LEFT}, "'image'"),  # two views that could be meant
        ({"image": [[1, 2], [3, 4]]}, "'image'"),
        ({"image": "front.png"}, r"'image' is a string, no frame \(height, width, 3\)"),
        ({"image": None, "full_image": FRONT[..., 0]}, r"'full_image' is an array of shape \(.*, no frame"),
        ({"images": {"front": FRONT[..., 0]}}, r"must be a frame \(height, width, 3\), got an array of shape"),
        ({"images": [FRONT]}, "images must be a map"),
        ({"images": {"image": 3}}, "images"),
        ({"observation/image": LEFT}, "image and observation/image are the same entry"),
        ({"observation/image": LEFT, "observation.images.image": RIGHT}, "are the same entry"),
        ({"observation.state": STATE + 1}, "state and observation.state are the same entry"),
        ({"observation/prompt": "stop"}, "prompt and observation/prompt are the same entry"),
        ({"images": {"image": LEFT}}, "the observation and its images both have 'image'"),
        ({"images": {"observation.images.image": LEFT}}, "both have 'image'"),
        ({"prompt": None}, "instruction"),
        ({"prompt": 3}, "prompt"),
        ({"prompt": "go", "task": "stop"}, "different instructions"),
        ({"prompt": "x" * 501}, "501 characters"),
        ({"state": None}, "state is missing"),
        ({"state": None, "joint_position": [1.0]}, "state is missing"),
        ({"states": STATE}, "one state"),
        ({"state": STATE[:7]}, "8 numbers"),
        ({"state": STATE[None]}, "8 numbers"),
        ({"state": STATE * float("nan")}, "finite"),
        ({"state": ["1", "2"]}, "numbers"),
        ({"state": STATE.astype(np.float16)}, "float32"),
        ({"state": {"x": 1}}, "numbers"),
        ({"state": [10**400]}, "numbers"),
        ({"age": "old"}, "age"),
        ({"age": float("nan")}, "finite"),
        ({"age": 10**400}, "age"),
        ({"timestamp": time.time() + 3600}, "future"),
        ({"request_id": b"x"}, "request_id"),
    ],
)
def test_what_is_missing_or_ambiguous_is_refused_and_named(change, named):
    message = {name: value for name, value in {**GOOD, **change}.items() if value is not None}
    with pytest.raises(InvalidRequest, match=named):
        read(LIBERO, message)


def test_a_client_that_names_other_statistics_is_refused():
    reader = ObservationReader(LIBERO, 8, unnorm_key="libero_object")
    with pytest.raises(InvalidRequest, match="unnorm_key is 'bridge'; this server's statistics are 'libero_object'"):
        reader.read({**GOOD, "unnorm_key": "bridge"}, time.monotonic())
    reader.read({**GOOD, "unnorm_key": "libero_object"}, time.monotonic())


@pytest.mark.parametrize("message", [None, 3, "text", [GOOD], {b"image": FRONT}])
def test_a_message_that_is_no_map_of_names_is_refused(message):
    with pytest.raises(InvalidRequest, match="map"):
        read(LIBERO, message)


def test_a_view_never_stands_in_for_two_of_the_models_cameras():
    with pytest.raises(InvalidRequest, match="'primary'"):
        read(("image", "primary"), {"image": FRONT, "agentview": WRIST, "state": STATE, "prompt": "go"})


def test_age_counts_from_when_the_observation_was_taken():
    observation = read(LIBERO, {**GOOD, "age": 2.0})
    assert 2.0 <= observation.age_now() < 3.0
    observation.check_age(None)
    observation.check_age(60.0)
    with pytest.raises(ObservationTooOld, match="limit is 1 s"):
        observation.check_age(1.0)
    assert 5.0 <= read(LIBERO, {**GOOD, "timestamp": time.time() - 5}).age_now() < 6.0


def encoded(array, image_format="PNG"):
    file = io.BytesIO()
    Image.fromarray(array).save(file, image_format)
    return EncodedImage(file.getvalue())


def test_an_encoded_image_over_the_limit_is_refused_before_it_is_decoded():
    image = encoded(np.zeros((100, 100, 3), np.uint8))
    assert decode_image(image, "front", 30_000).shape == (100, 100, 3)
    with pytest.raises(TooLarge, match="100 x 100"):
        decode_image(image, "front", 29_999)


@pytest.mark.parametrize("shape", [(1, 4097, 3), (4097, 1, 3), (3, 4097, 1)])
def test_a_frame_as_thin_as_a_line_is_refused_since_resizing_it_would_keep_others_waiting(shape):
    frame = np.zeros(shape, np.uint8)
    with pytest.raises(TooLarge, match="'front' has a side of 4097 pixels"):
        decode_image(frame, "front", 10**6)
    if shape[2] == 3:
        with pytest.raises(TooLarge, match="4097"):
            decode_image(encoded(frame), "front", 10**6)


@pytest.mark.parametrize("data", [b"", b"no image", encoded(FRONT).data[:40], encoded(FRONT, "BMP").data])
def test_a_broken_image_and_other_formats_are_refused(data):
    with pytest.raises(InvalidRequest, match="'front' cannot be decoded"):
        decode_image(EncodedImage(data), "front", 10**6)


def test_padding_keeps_the_frame_and_adds_black():
    padded = pad_to_square(FRONT)
    assert padded.shape == (8, 8, 3)
    assert np.array_equal(padded[1:7], FRONT) and not padded[0].any() and not padded[7].any()
