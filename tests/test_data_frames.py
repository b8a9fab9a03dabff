"""Encoded frames become the same pixels with the faster decoder and without it, and damaged ones are refused."""

import io

import numpy as np
import pytest
from PIL import Image

from vla_adapter_hf.utils import frames
from vla_adapter_hf.utils.frames import decode_frame


def encoded(image: Image.Image, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", **options)
    return file.getvalue()


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height * width).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture(params=["pyspng", "Pillow"])
def decoder(request, monkeypatch):
    if request.param == "Pillow":
        monkeypatch.setattr(frames, "pyspng", None)
    else:
        pytest.importorskip("pyspng")


@pytest.mark.parametrize("size", [(1, 1), (7, 3), (64, 256), (256, 256)])
def test_png_frames_are_decoded_exactly(decoder, size):
    picture = noise(*size)
    smooth = np.asarray(Image.fromarray(picture).resize((33, 17)))
    for expected in (picture, smooth, np.zeros_like(picture)):
        decoded = decode_frame(encoded(Image.fromarray(expected)))
        np.testing.assert_array_equal(decoded, expected)
        assert decoded.dtype == np.uint8 and decoded.flags.writeable


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1", "I;16"])
def test_other_kinds_of_png_become_rgb_as_pillow_converts_them(decoder, mode):
    image = Image.fromarray(noise(8, 12))
    image = Image.new("I;16", (12, 8), 300) if mode == "I;16" else image.convert(mode)
    np.testing.assert_array_equal(decode_frame(encoded(image)), np.array(image.convert("RGB")))


def test_a_damaged_png_is_refused_wherever_the_damage_is(decoder):
    whole = encoded(Image.fromarray(noise(16, 16)))
    for position in range(41, len(whole) - 16, 29):  # in the pixels
        damaged = bytearray(whole)
        damaged[position] ^= 0x10
        with pytest.raises(ValueError, match="the frame cannot be decoded"):
            decode_frame(bytes(damaged))


@pytest.mark.parametrize("kept", [20, 60, 400])
def test_a_png_that_is_cut_short_is_refused(decoder, kept):
    with pytest.raises(ValueError, match="the frame cannot be decoded"):
        decode_frame(encoded(Image.fromarray(noise(16, 16)))[:kept])


def test_what_is_no_image_is_refused(decoder):
    with pytest.raises(ValueError, match="the frame cannot be decoded"):
        decode_frame(b"no image")
