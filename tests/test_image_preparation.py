"""Image preparation gives TensorFlow's bytes, with and without simplejpeg.

`fixtures/preprocessing_images.npz` holds
* per image of `IMAGES`: `input`, and from TensorFlow 2.15 `jpeg_difference`, `resized` and `prepared` (all stages);
* `size_HxW` and `harsh_64`: `input` (noise; blocks whose inverse DCT overflows 16 bits) and `jpeg_difference` from
  Pillow's encoder and simplejpeg's decoder;
* the JPEG round trip's result is there as its difference to the input, modulo 256, which packs smaller;
* `normalized_levels` (6, 256): what the original's processor makes of every level in every channel, NaN where its
  frames have no such level;
* `sinf/x`, `sinf/y`: arguments at which the GNU C library's `sinf` is not the correctly rounded sine, and its values.
"""

import ast
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vla_adapter_hf.processing import image_preparation_vla_adapter as preparation
from vla_adapter_hf.processing import jpeg_round_trip_vla_adapter as jpeg


IMAGES = ["full_256", "full_200", "wrist_84", "smooth_480x640", "obs_full_224", "noise_256", "checker_256"]
JPEG_ONLY = [f"size_{size}" for size in "1x1 2x2 1x9 9x1 3x4 4x3 5x5 7x9 8x8 15x17 16x16 17x33 31x30".split()] + [
    "harsh_64"
]
SIZE = (224, 224)
MEANS = [[0.484375, 0.455078125, 0.40625], [0.5, 0.5, 0.5]]
STDS = [[0.228515625, 0.2236328125, 0.224609375], [0.5, 0.5, 0.5]]

needs_simplejpeg = pytest.mark.skipif(jpeg.simplejpeg is None, reason="simplejpeg is not installed")


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(Path(__file__).parent / "fixtures" / "preprocessing_images.npz") as arrays:
        stored = dict(arrays)
    round_trips = {
        name.replace("jpeg_difference", "jpeg_roundtrip"): stored[name.replace("jpeg_difference", "input")]
        + difference
        for name, difference in stored.items()
        if name.endswith("/jpeg_difference")
    }
    return {**stored, **round_trips}


@pytest.fixture(params=["numpy", pytest.param("simplejpeg", marks=needs_simplejpeg)])
def jpeg_route(request, monkeypatch) -> str:
    """Run a test once as on a machine without simplejpeg, and once with it."""
    if request.param == "numpy":
        monkeypatch.setattr(jpeg, "simplejpeg", None)
    return request.param


def differing(actual: np.ndarray, expected: np.ndarray) -> int:
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    return int((actual != expected).sum())


# JPEG round trip


@pytest.mark.parametrize("name", IMAGES)
def test_jpeg_round_trip_is_tensorflows(golden, jpeg_route, name):
    assert differing(jpeg.jpeg_round_trip(golden[f"{name}/input"]), golden[f"{name}/jpeg_roundtrip"]) == 0


@pytest.mark.parametrize("name", JPEG_ONLY)
def test_jpeg_round_trip_of_edge_cases_is_the_librarys(golden, jpeg_route, name):
    assert differing(jpeg.jpeg_round_trip(golden[f"{name}/input"]), golden[f"{name}/jpeg_roundtrip"]) == 0


@st.composite
def images(draw) -> np.ndarray:
    """Noise, black and white, primary colours, gradients and flat colours of any small size."""
    height, width = draw(st.integers(1, 50)), draw(st.integers(1, 50))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kind = draw(st.sampled_from(["noise", "black and white", "primary colours", "gradient", "flat", "soft noise"]))
    if kind == "noise":
        image = rng.integers(0, 256, (height, width, 3))
    elif kind == "black and white":
        image = 255 * rng.integers(0, 2, (height, width, 1)).repeat(3, axis=2)
    elif kind == "primary colours":
        image = 255 * rng.integers(0, 2, (height, width, 3))
    elif kind == "gradient":
        down, across, start = rng.integers(-9, 10, 3), rng.integers(-9, 10, 3), rng.integers(0, 256, 3)
        image = np.arange(height)[:, None, None] * down + np.arange(width)[:, None] * across + start
    elif kind == "flat":
        image = np.broadcast_to(rng.integers(0, 256, 3), (height, width, 3))
    else:
        image = rng.normal(128, 30, (height, width, 3))
    return np.clip(image, 0, 255).astype(np.uint8)


@needs_simplejpeg
@settings(max_examples=300, deadline=None)
@given(images())
def test_both_jpeg_routes_agree_on_any_image(image):
    assert differing(jpeg.jpeg_round_trip_numpy(image), jpeg.jpeg_round_trip_simplejpeg(image)) == 0


def test_jpeg_round_trip_reads_a_rotated_view(golden, jpeg_route):
    rotated = golden["wrist_84/input"][::-1, ::-1]
    assert differing(jpeg.jpeg_round_trip(rotated), jpeg.jpeg_round_trip(rotated.copy())) == 0


def test_jpeg_round_trip_works_without_simplejpeg(monkeypatch):
    monkeypatch.setattr(jpeg, "simplejpeg", None)
    image = np.zeros((8, 8, 3), np.uint8)
    assert jpeg.jpeg_round_trip(image).shape == (8, 8, 3)
    with pytest.raises(ImportError, match="simplejpeg"):
        jpeg.jpeg_round_trip_simplejpeg(image)


# Lanczos-3 resize


@pytest.mark.parametrize("name", IMAGES)
def test_resize_is_tensorflows(golden, name):
    assert (
        differing(preparation.resize_lanczos3(golden[f"{name}/jpeg_roundtrip"], SIZE), golden[f"{name}/resized"]) == 0
    )


def test_sine_is_that_of_the_gnu_c_library(golden):
    assert differing(preparation._sin_float32(golden["sinf/x"]), golden["sinf/y"]) == 0


def test_resize_takes_height_before_width(golden):
    image = golden["smooth_480x640/input"]
    resized = preparation.resize_lanczos3(image, (48, 80))
    pillow = np.asarray(Image.fromarray(image).resize((80, 48), Image.Resampling.LANCZOS))
    assert resized.shape == (48, 80, 3)
    # Pillow's fixed-point weights are a level off here and there.
    assert np.abs(resized.astype(int) - pillow).max() <= 1


@pytest.mark.parametrize("size", [(1, 1), (5, 300), (300, 5), (28, 28)])
def test_resize_keeps_a_flat_image_flat_at_any_size(size):
    image = np.full((37, 23, 3), [0, 128, 255], np.uint8)
    assert np.array_equal(preparation.resize_lanczos3(image, size), np.full((*size, 3), [0, 128, 255], np.uint8))


# Crops


def test_center_crop_is_tensorflows(golden):
    image, expected = golden["obs_full_224/input"], golden["obs_full_224/prepared"]
    assert differing(preparation.center_crop(image), expected) == 0


def test_center_crop_keeps_the_given_share_of_the_area():
    image = np.zeros((101, 201, 3), np.uint8)
    image[:] = np.arange(201, dtype=np.uint8)[:, None]
    row = preparation.center_crop(image, 0.25)[0, :, 0]
    assert (row[0], row[100], row[-1]) == (50, 100, 150)


def test_crop_and_resize_of_the_whole_box_is_the_identity():
    image = np.random.default_rng(0).random((9, 12, 3), np.float32)
    assert differing(preparation.crop_and_resize(image, (0, 0, 1, 1), (9, 12)), image) == 0


def test_crop_and_resize_puts_the_boxs_edges_on_the_outer_samples():
    image = np.arange(5, dtype=np.float32)[:, None, None] * 10 + np.arange(9, dtype=np.float32)[:, None]
    # rows 1 to 2, columns 4 to 8
    cropped = preparation.crop_and_resize(image, (0.25, 0.5, 0.5, 1.0), (3, 5))
    assert cropped[:, :, 0].tolist() == [[14, 15, 16, 17, 18], [19, 20, 21, 22, 23], [24, 25, 26, 27, 28]]


def test_crop_and_resize_to_one_pixel_takes_the_centre():
    image = np.arange(9, dtype=np.float32).reshape(3, 3, 1)
    assert preparation.crop_and_resize(image, (0, 0, 1, 1), (1, 1)).tolist() == [[[4.0]]]


def test_crop_and_resize_is_black_beyond_the_image():
    image = np.ones((3, 3, 1), np.float32)
    cropped = preparation.crop_and_resize(image, (-0.5, 0, 0.5, 2), (3, 5))
    assert cropped[:, :, 0].tolist() == [[0, 0, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 0, 0]]


def test_to_float01_multiplies_by_the_reciprocal():
    levels = np.arange(256, dtype=np.uint8)
    values = preparation.to_float01(levels)
    assert differing(values, levels.astype(np.float32) * np.float32(1 / 255)) == 0
    assert differing(values, levels.astype(np.float32) / np.float32(255)) > 0


def test_to_uint8_truncates_255_and_a_half_times_the_value():
    values = np.array([-1, 0, 1.9 / 255.5, 2.1 / 255.5, 0.999, 1, 7], np.float32)
    assert preparation.to_uint8(values).tolist() == [0, 0, 1, 2, 255, 255, 255]
    assert values[0] == -1 and values[-1] == 7  # the argument stays as it was


def test_to_uint8_undoes_to_float01():
    levels = np.arange(256, dtype=np.uint8)
    assert differing(preparation.to_uint8(preparation.to_float01(levels)), levels) == 0


# The whole preparation


@pytest.mark.parametrize("name", IMAGES)
def test_prepared_image_is_tensorflows(golden, jpeg_route, name):
    assert differing(preparation.prepare(golden[f"{name}/input"], SIZE, True, 0.9), golden[f"{name}/prepared"]) == 0


def test_image_of_the_target_size_makes_no_round_trip_and_is_not_resized(golden):
    image = golden["obs_full_224/input"]
    assert differing(preparation.prepare(image, SIZE, round_trip=True, crop=None), image) == 0


def test_round_trip_can_be_left_out(golden):
    image = golden["wrist_84/input"]
    prepared = preparation.prepare(image, SIZE, round_trip=False, crop=None)
    assert differing(prepared, preparation.resize_lanczos3(image, SIZE)) == 0
    assert differing(prepared, golden["wrist_84/resized"]) > 0


def test_crop_can_be_left_out(golden):
    prepared = preparation.prepare(golden["wrist_84/input"], SIZE, round_trip=True, crop=None)
    assert differing(prepared, golden["wrist_84/resized"]) == 0


def test_prepare_crops_to_the_share_that_it_is_given(golden):
    image = golden["obs_full_224/input"]
    assert differing(preparation.prepare(image, SIZE, crop=0.5), preparation.center_crop(image, 0.5)) == 0


def test_prepare_takes_any_target_size(golden):
    assert preparation.prepare(golden["full_256/input"], (28, 42), True, 0.9).shape == (28, 42, 3)


def test_preparing_leaves_the_frame_as_it_was(golden, jpeg_route):
    frame = golden["wrist_84/input"].copy()
    preparation.prepare(frame, SIZE, True, 0.9)
    preparation.prepare(frame, frame.shape[:2], True, 0.9)
    assert differing(frame, golden["wrist_84/input"]) == 0


# Normalisation


def test_normalized_levels_are_the_originals(golden):
    image = np.arange(256, dtype=np.uint8)[None, :, None].repeat(3, axis=2)
    expected = golden["normalized_levels"]
    known = ~np.isnan(expected)
    assert known.mean() > 0.9
    assert differing(preparation.normalize(image, MEANS, STDS)[:, 0][known], expected[known]) == 0


def test_normalize_stacks_the_towers_and_keeps_the_pixels_in_place():
    image = np.random.default_rng(0).integers(0, 256, (4, 5, 3), np.uint8)
    values = preparation.normalize(image, [[0, 0, 0], [1, 2, 3]], [[1 / 255] * 3, [1 / 255] * 3])
    assert values.shape == (6, 4, 5)
    np.testing.assert_allclose(values[:3], image.transpose(2, 0, 1), atol=1e-4)
    np.testing.assert_allclose(
        values[3:] - values[:3], -255 * np.arange(1, 4)[:, None, None].repeat(4, 1).repeat(5, 2), atol=1e-3
    )


# Refusals

GREY, RGB = np.zeros((8, 8), np.uint8), np.zeros((8, 8, 3), np.uint8)


@pytest.mark.parametrize(
    "function",
    [
        jpeg.jpeg_round_trip,
        jpeg.jpeg_round_trip_numpy,
        lambda image: preparation.resize_lanczos3(image, (4, 4)),
        preparation.center_crop,
        lambda image: preparation.prepare(image, (4, 4)),
        lambda image: preparation.normalize(image, MEANS, STDS),
    ],
    ids=["jpeg_round_trip", "jpeg_round_trip_numpy", "resize_lanczos3", "center_crop", "prepare", "normalize"],
)
@pytest.mark.parametrize(
    "image, error, message",
    [
        ([[0]], TypeError, "uint8, got list"),
        (RGB.astype(np.float32), TypeError, "uint8, got float32"),
        (GREY, ValueError, r"\(height, width, 3\), got \(8, 8\)"),
        (np.zeros((3, 8, 8), np.uint8), ValueError, r"\(height, width, 3\), got \(3, 8, 8\)"),
        (np.zeros((0, 8, 3), np.uint8), ValueError, r"\(height, width, 3\), got \(0, 8, 3\)"),
    ],
    ids=["list", "float", "grey", "channels first", "empty"],
)
def test_what_is_not_an_rgb_image_is_refused(function, image, error, message):
    with pytest.raises(error, match=message):
        function(image)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: preparation.resize_lanczos3(RGB, (0, 4)), ValueError, r"at least one pixel each, got \(0, 4\)"),
        (lambda: preparation.resize_lanczos3(RGB, 224), TypeError, r"size \(height, width\), got 224"),
        (lambda: preparation.prepare(RGB, (8, 8, 3)), TypeError, r"size \(height, width\), got \(8, 8, 3\)"),
        (lambda: preparation.center_crop(RGB, 0), ValueError, "at most 1, got 0"),
        (lambda: preparation.center_crop(RGB, 1.1), ValueError, "at most 1, got 1.1"),
        (lambda: preparation.crop_and_resize(RGB, (0, 0, 1, 1), (4, 4)), TypeError, "float32, got uint8"),
        (lambda: preparation.crop_and_resize(np.float32(GREY), (0, 0, 1, 1), (4, 4)), ValueError, r"got \(8, 8\)"),
        (lambda: preparation.crop_and_resize(np.float32(RGB), (0, 1), (4, 4)), ValueError, "got 2 numbers"),
        (lambda: preparation.to_float01([0, 255]), TypeError, "uint8, got list"),
        (lambda: preparation.to_float01(np.float32(RGB)), TypeError, "uint8, got float32"),
        (lambda: preparation.to_uint8(RGB), TypeError, "float32, got uint8"),
        (
            lambda: preparation.normalize(RGB, [0.5] * 3, [0.5] * 3),
            ValueError,
            r"\(towers, 3\), got \(3,\) and \(3,\)",
        ),
        (lambda: preparation.normalize(RGB, MEANS, STDS[:1]), ValueError, r"got \(2, 3\) and \(1, 3\)"),
    ],
)
def test_what_is_out_of_range_is_refused_by_name(call, error, message):
    with pytest.raises(error, match=message):
        call()


# Travelling with a checkpoint


@pytest.mark.parametrize("module", [preparation, jpeg], ids=lambda module: module.__name__.rsplit(".")[-1])
def test_needs_only_numpy_and_pillow(module):
    required = set()
    for node in ast.parse(Path(module.__file__).read_text(encoding="utf-8")).body:  # what `try` guards is deeper
        if isinstance(node, ast.Import):
            required.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            required.add(node.module)
    assert required <= {"numpy", "PIL", "io", "operator", "functools", "collections.abc"}
