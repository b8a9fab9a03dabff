"""Training augmentation: the published operations, their order and ranges, and draws that are the same everywhere."""

import colorsys

import numpy as np
import pytest
from data_fixtures import DEMOS
from hypothesis import given, settings
from hypothesis import strategies as st

from vla_adapter_hf.data import ImageAugmentation, ImageResize, VLAAdapterDataset
from vla_adapter_hf.data.augmentation import adjust_saturation_and_hue
from vla_adapter_hf.processing.image_preparation_vla_adapter import (
    center_crop,
    crop_and_resize,
    resize_lanczos3,
    to_float01,
    to_uint8,
)


@pytest.fixture(scope="module")
def frame():
    from data_fixtures import golden

    return golden("rlds")["ep0_image_tensorflow_first"]


def reference(image, draw, size):
    """The operations of the published training one after the other, the colours a pixel at a time."""
    side = np.sqrt(np.float32(0.9))
    y, x = np.float32(draw["y"]), np.float32(draw["x"])
    out = crop_and_resize(to_float01(resize_lanczos3(image, size)), (y, x, y + side, x + side), size)
    out = np.clip(out.astype(np.float64), 0, 1)
    out = np.clip(out + draw["brightness"], 0, 1)
    mean = out.mean(axis=(0, 1))
    out = np.clip((out - mean) * draw["contrast"] + mean, 0, 1)
    for pixel in out.reshape(-1, 3):
        hue, saturation, value = colorsys.rgb_to_hsv(*pixel)
        pixel[:] = colorsys.hsv_to_rgb(hue, min(saturation * draw["saturation"], 1.0), value)
        pixel[:] = np.clip(pixel, 0, 1)
        hue, saturation, value = colorsys.rgb_to_hsv(*pixel)
        pixel[:] = np.clip(colorsys.hsv_to_rgb((hue + draw["hue"]) % 1.0, saturation, value), 0, 1)
    return np.clip(out, 0, 1) * 255.5


@pytest.mark.parametrize("index", range(6))
def test_operations_are_the_published_ones_in_their_order(frame, index):
    augmentation = ImageAugmentation(64)
    got = augmentation([frame, frame], epoch=1, index=index)
    for camera in (0, 1):
        expected = reference(frame, augmentation.draws(1, index, camera), (64, 64))
        assert got[camera].shape == (64, 64, 3) and got[camera].dtype == np.uint8
        # Truncation: a value on the edge of a level may fall to either side by float32's rounding.
        assert np.abs(got[camera] - (expected - 0.5)).max() < 0.5 + 1e-3


def test_a_known_draw_gives_known_pixels():
    """No crop, one colour: brightness +0.1, contrast does nothing, saturation doubles, hue turns by a third."""
    augmentation = ImageAugmentation(4, crop_area=1.0)
    image = np.full((4, 4, 3), (153, 102, 102), np.uint8)  # 0.6, 0.4, 0.4
    draw = {"y": 0.0, "x": 0.0, "brightness": 0.1, "contrast": 1.2, "saturation": 2.0, "hue": 1 / 3}
    got = augmentation._augment(image, draw)
    # 0.7 0.5 0.5 -> saturation 2/7 doubled: 0.7 0.3 0.3 -> red becomes green
    assert np.abs(got[0, 0] - np.array([0.3, 0.7, 0.3]) * 255.5).max() < 1
    assert (got == got[0, 0]).all()


def test_draws_stay_in_their_ranges_and_reach_their_ends():
    augmentation = ImageAugmentation(8)
    draws = [augmentation.draws(0, index, 0) for index in range(2000)]
    room = 1 - np.sqrt(0.9)
    for name, low, high in (
        ("y", 0.0, room),
        ("brightness", -0.2, 0.2),
        ("contrast", 0.8, 1.2),
        ("saturation", 0.8, 1.2),
        ("hue", -0.05, 0.05),
    ):
        values = np.array([draw[name] for draw in draws])
        assert values.min() >= low - 1e-7 and values.max() <= high + 1e-7
        assert values.min() < low + 0.01 * (high - low) and values.max() > high - 0.01 * (high - low)
        assert abs(values.mean() - (low + high) / 2) < 0.03 * (high - low)
    matrix = np.array(
        [[draw[name] for name in ("y", "brightness", "contrast", "saturation", "hue")] for draw in draws]
    )
    correlation = np.corrcoef(matrix.T) - np.eye(5)
    assert np.abs(correlation).max() < 0.1


def test_the_crop_moves_along_the_diagonal_unless_offsets_are_independent():
    diagonal = [ImageAugmentation(8).draws(0, index, 0) for index in range(50)]
    assert all(draw["x"] == draw["y"] for draw in diagonal)
    free = [ImageAugmentation(8, independent_offsets=True).draws(0, index, 0) for index in range(50)]
    assert abs(np.corrcoef([[draw["x"], draw["y"]] for draw in free], rowvar=False)[0, 1]) < 0.5
    # Choosing independent offsets changes no other draw.
    assert [draw["hue"] for draw in free] == [draw["hue"] for draw in diagonal]


def test_draws_depend_on_seed_epoch_index_and_camera_and_nothing_else():
    draws = ImageAugmentation(8, seed=3).draws(2, 5, 1)
    assert draws == ImageAugmentation(224, seed=3).draws(2, 5, 1)
    for other in (
        ImageAugmentation(8, seed=4).draws(2, 5, 1),
        ImageAugmentation(8, seed=3).draws(3, 5, 1),
        ImageAugmentation(8, seed=3).draws(2, 6, 1),
        ImageAugmentation(8, seed=3).draws(2, 5, 0),
    ):
        assert other["hue"] != draws["hue"] and other["y"] != draws["y"]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.0, 2.0), st.floats(-0.5, 0.5))
def test_saturation_and_hue_are_those_of_hsv(seed, factor, delta):
    rng = np.random.default_rng(seed)
    planes = rng.random((3, 4, 4), dtype=np.float32)
    planes[:, 0] = planes[0, 0]  # greys, which have no hue
    planes[:, 1, 0], planes[:, 1, 1] = 0, 1
    planes[:2, 2] = planes[0, 2]  # two largest channels alike
    got = adjust_saturation_and_hue(planes, factor, delta)
    for pixel, out in zip(planes.reshape(3, -1).T.tolist(), got.reshape(3, -1).T, strict=True):
        hue, saturation, value = colorsys.rgb_to_hsv(*pixel)
        expected = colorsys.hsv_to_rgb((hue + delta) % 1, min(saturation * factor, 1), value)
        assert np.abs(out - expected).max() < 3e-6


def test_validation_is_resized_and_nothing_else_unless_asked(frame):
    assert np.array_equal(ImageResize(96)([frame])[0], resize_lanczos3(frame, (96, 96)))
    assert np.array_equal(ImageResize(128)([frame])[0], frame)
    cropped = ImageResize((96, 80), crop_area=0.9)([frame], epoch=4, index=9)[0]
    assert np.array_equal(cropped, center_crop(resize_lanczos3(frame, (96, 80)), 0.9))


def test_a_frame_without_change_survives_the_way_through_floats(frame):
    none = ImageAugmentation(128, crop_area=1.0, brightness=0, contrast=(1, 1), saturation=(1, 1), hue=0)
    assert np.array_equal(none([frame])[0], to_uint8(to_float01(frame)))
    assert np.array_equal(none([frame])[0], frame)


def test_the_dataset_applies_it_by_epoch_and_index_and_validation_never(tmp_path):
    augmentation = ImageAugmentation(32, seed=7)
    dataset = VLAAdapterDataset.from_lerobot(
        DEMOS / "lerobot_v30_image", robot="libero", image_transform=augmentation, cache_dir=tmp_path
    )
    plain = VLAAdapterDataset.from_lerobot(DEMOS / "lerobot_v30_image", robot="libero", cache_dir=tmp_path)
    dataset.set_epoch(3)
    expected = augmentation(plain[11]["images"], epoch=3, index=11)
    for image, wanted in zip(dataset[11]["images"], expected, strict=True):
        assert np.array_equal(image, wanted)
    train, validation = dataset.split_by_episode([1], validation_transform=ImageResize(32))
    assert train.image_transform is augmentation
    assert np.array_equal(validation[0]["images"][0], resize_lanczos3(plain[13]["images"][0], (32, 32)))
    dataset.set_epoch(4)
    assert not np.array_equal(dataset[11]["images"][0], expected[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"crop_area": 0.0}, "crop_area=0.0"),
        ({"image_size": 0}, "image_size=0"),
        ({"contrast": (1.2, 0.8)}, "contrast=\\(1.2, 0.8\\)"),
        ({"hue": -0.1}, "hue=-0.1"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_senseless_settings_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ImageAugmentation(**arguments)
