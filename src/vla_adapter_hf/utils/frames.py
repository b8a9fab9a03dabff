"""Camera frames, uint8 (height, width, 3), from and to encoded files."""

from __future__ import annotations

import io
import struct
import zlib
from contextlib import suppress

import numpy as np
from PIL import Image


try:
    import simplejpeg
except ImportError:
    simplejpeg = None
try:
    import pyspng
except ImportError:
    pyspng = None


_JPEG_START = b"\xff\xd8\xff"
# The first bytes of a PNG file up to its size, and bit depth and colour type after that: eight bits, RGB.
_PNG_START = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"
_EIGHT_BITS_RGB = b"\x08\x02"


def is_jpeg(data: bytes) -> bool:
    """Whether an encoded frame is a JPEG file."""
    return data[:3] == _JPEG_START


def _is_rgb_png(data: bytes) -> bool:
    """Whether an encoded frame is a PNG file of eight-bit RGB, without transparency or a palette."""
    return data[:16] == _PNG_START and data[24:26] == _EIGHT_BITS_RGB


def _is_intact(data: bytes) -> bool:
    """Whether every chunk of a PNG file has its checksum; pyspng does not look."""
    position = 8
    while position + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        end = position + 8 + length
        if data[end : end + 4] != zlib.crc32(memoryview(data)[position + 4 : end]).to_bytes(4, "big"):
            return False
        if kind == b"IEND":
            return True
        position = end + 4
    return False


def decode_frame(data: bytes, like_tensorflow: bool = False) -> np.ndarray:
    """JPEG, PNG or anything else Pillow reads -> uint8 (height, width, 3), RGB.

    PNG is decoded by pyspng if it is installed (`pip install vla-adapter-hf[fast-png]`), in less time and to the same
    pixels.

    Args:
        data: the encoded frame.
        like_tensorflow: decode JPEG with the fast inverse DCT, as TensorFlow does for RLDS datasets. The pixels are
            TensorFlow's if simplejpeg is installed (`pip install vla-adapter-hf[fast-jpeg]`). Without it Pillow's
            accurate DCT is used, whose pixels differ by 1.3 levels on average and by 16 at most.

    Raises:
        ValueError: `data` is not an image.
    """
    if like_tensorflow and simplejpeg is not None and is_jpeg(data):
        try:
            return simplejpeg.decode_jpeg(data, colorspace="RGB", fastdct=True, fastupsample=False)
        except ValueError as error:
            raise ValueError(f"the frame cannot be decoded: {error}") from error
    if pyspng is not None and _is_rgb_png(data) and _is_intact(data):
        with suppress(RuntimeError):  # a broken file; Pillow says what is wrong with it
            return pyspng.load(data)
    try:
        with Image.open(io.BytesIO(data)) as image:
            return np.array(image if image.mode == "RGB" else image.convert("RGB"))
    except (OSError, SyntaxError) as error:  # Pillow's PNG reader raises SyntaxError on a broken file
        raise ValueError(f"the frame cannot be decoded: {error}") from error


def encode_image(image: np.ndarray, image_format: str = "png") -> bytes:
    """A uint8 frame (height, width, 3) as PNG (lossless) or JPEG (quality 95).

    Raises:
        ValueError: another format, dtype or shape.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"image must be uint8 of shape (height, width, 3), got {image.dtype} {image.shape}")
    buffer = io.BytesIO()
    if image_format == "png":
        Image.fromarray(image).save(buffer, "PNG", compress_level=4)
    elif image_format == "jpeg":
        Image.fromarray(image).save(buffer, "JPEG", quality=95)
    else:
        raise ValueError(f"image_format must be 'png' or 'jpeg', got {image_format!r}")
    return buffer.getvalue()
