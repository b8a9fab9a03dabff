"""Frames as PNG or JPEG."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image


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
