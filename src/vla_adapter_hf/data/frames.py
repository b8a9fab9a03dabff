"""Encoded camera frame -> uint8 (height, width, 3)."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image


try:
    import simplejpeg
except ImportError:
    simplejpeg = None


_JPEG_START = b"\xff\xd8\xff"


def is_jpeg(data: bytes) -> bool:
    """Whether an encoded frame is a JPEG file."""
    return data[:3] == _JPEG_START


def decode_frame(data: bytes, like_tensorflow: bool = False) -> np.ndarray:
    """JPEG, PNG or anything else Pillow reads -> uint8 (height, width, 3), RGB.

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
    try:
        with Image.open(io.BytesIO(data)) as image:
            return np.array(image if image.mode == "RGB" else image.convert("RGB"))
    except (OSError, SyntaxError) as error:  # Pillow's PNG reader raises SyntaxError on a broken file
        raise ValueError(f"the frame cannot be decoded: {error}") from error
