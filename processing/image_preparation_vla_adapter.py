"""From a camera frame to `pixel_values` in NumPy, bit for bit as TensorFlow computes it in the original code.

`prepare` resizes a frame to the model's size (JPEG round trip, Lanczos-3) and takes the centre crop. `normalize`
computes the channels for the two vision towers. Training uses `resize_lanczos3`, and `crop_and_resize` with
`to_float01` and `to_uint8` for random crops.

It is written by hand because no library resizes to the same bits as TensorFlow. The bits depend on the order of
additions: the loops below go through the taps of a filter one by one and are vectorised over pixels. A matrix product
may add in another order.
"""

import operator
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from .jpeg_round_trip_vla_adapter import check_rgb_image, jpeg_round_trip


LANCZOS_RADIUS = np.float32(3)
PI = np.float32(3.14159265359)

# The constants of `sinf` in the GNU C library (since 2.28, file `sincosf.h`), in double: 2^24 / (pi/2), pi/2, and the
# coefficients of polynomials for the sine (x^3, x^5, x^7) and the cosine (1, x^2, ... x^8) on [-pi/4, pi/4].
_QUADRANTS = float.fromhex("0x1.45F306DC9C883p+23")
_HALF_PI = float.fromhex("0x1.921FB54442D18p0")
_SINE = [float.fromhex(c) for c in "-0x1.555545995a603p-3 0x1.1107605230bc4p-7 -0x1.994eb3774cf24p-13".split()]
_COSINE = [1.0]
_COSINE += [float.fromhex(c) for c in "-0x1.ffffffd0c621cp-2 0x1.55553e1068f19p-5".split()]
_COSINE += [float.fromhex(c) for c in "-0x1.6c087e89a359dp-10 0x1.99343027bf8c3p-16".split()]


def prepare(image: np.ndarray, size: tuple[int, int], round_trip: bool = True, crop: float | None = 0.9) -> np.ndarray:
    """Resize and crop a camera frame as the model sees it, before normalisation.

    Args:
        image: uint8 (height, width, 3), RGB.
        size: (height, width) of the result.
        round_trip: whether the frame is encoded as JPEG and decoded before it is resized, for models trained on
            frames that were stored as JPEG. A frame that already has the right size is neither encoded nor resized.
        crop: the share of the area that the centre crop keeps, for models trained with random crops. None for no
            crop.

    Returns:
        uint8 (size[0], size[1], 3). `image` itself if there is nothing to do.

    Raises:
        TypeError: `image` is not an array of uint8, or `size` is not a pair of integers.
        ValueError: `image` is not (height, width, 3), or `size` or `crop` is out of range.
    """
    check_rgb_image(image)
    if image.shape[:2] != _checked_size(size):
        if round_trip:
            image = jpeg_round_trip(image)
        image = resize_lanczos3(image, size)
    if crop is not None:
        image = center_crop(image, crop)
    return image


def resize_lanczos3(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize as `tf.image.resize(image, size, "lanczos3", antialias=True)`, then round (halves to even) and clip.

    Args:
        image: uint8 (height, width, 3).
        size: (height, width) of the result.

    Returns:
        uint8 (size[0], size[1], 3).
    """
    check_rgb_image(image)
    height, width = _checked_size(size)
    resized = np.empty((height, width, 3), np.uint8)
    for channel in range(3):  # one at a time stays in the processor's cache
        rows = image[:, :, channel].astype(np.float32)
        rows = _filter_first_axis(rows, height)
        columns = _filter_first_axis(np.ascontiguousarray(rows.T), width)
        np.rint(columns, out=columns)
        np.clip(columns, 0, 255, out=columns)
        resized[:, :, channel] = columns.T
    return resized


def center_crop(image: np.ndarray, area: float = 0.9) -> np.ndarray:
    """Cut out the centre, and resize it to the size of the image.

    Args:
        image: uint8 (height, width, 3).
        area: the share of the area that is kept, above 0 and at most 1. Height and width are multiplied by its root.

    Returns:
        uint8 (height, width, 3).
    """
    check_rgb_image(image)
    if not 0 < area <= 1:
        raise ValueError(f"expected the area of the crop to be above 0 and at most 1, got {area}")
    side = np.sqrt(np.float32(area))
    start = (np.float32(1) - side) / np.float32(2)
    box = (start, start, start + side, start + side)
    return to_uint8(crop_and_resize(to_float01(image), box, image.shape[:2]))


def crop_and_resize(image: np.ndarray, box: Sequence[float], size: tuple[int, int]) -> np.ndarray:
    """Cut out a box and resize it bilinearly, as `tf.image.crop_and_resize`: the outer samples are on the box's edges.

    Args:
        image: float32 (height, width, channels).
        box: (y1, x1, y2, x2), where 0 is the centre of the first row or column and 1 that of the last.
        size: (height, width) of the result.

    Returns:
        float32 (size[0], size[1], channels). Samples outside the centres of the outer pixels are 0.
    """
    _check_dtype(image, np.float32)
    if image.ndim != 3 or 0 in image.shape:
        raise ValueError(f"expected an image of shape (height, width, channels), got {image.shape}")
    if len(box) != 4:
        raise ValueError(f"expected a box (y1, x1, y2, x2), got {len(box)} numbers")
    height, width = _checked_size(size)
    channels = image.shape[2]
    top, bottom, down, outside_rows = _bilinear_taps(image.shape[0], height, box[0], box[2])
    left, right, across, outside_columns = _bilinear_taps(image.shape[1], width, box[1], box[3])

    # Columns first: interpolate between two pixels of a row, in the rows that are needed.
    first, last = top.min(), bottom.max() + 1
    pixels = image[first:last].reshape(last - first, -1)
    channel = np.arange(channels)
    out = np.take(pixels, (left[:, None] * channels + channel).reshape(-1), axis=1)  # (rows, width * channels)
    step = np.take(pixels, (right[:, None] * channels + channel).reshape(-1), axis=1)
    step -= out
    step *= across.repeat(channels)
    out += step

    # Then rows: interpolate between two of these rows.
    upper = np.take(out, top - first, axis=0)  # (height, width * channels)
    step = np.take(out, bottom - first, axis=0)
    step -= upper
    step *= down[:, None]
    upper += step

    result = upper.reshape(height, width, channels)
    result[outside_rows] = 0
    result[:, outside_columns] = 0
    return result


def to_float01(image: np.ndarray) -> np.ndarray:
    """uint8 0...255 -> float32 0...1, multiplied by float32(1/255) as in TensorFlow (not divided)."""
    _check_dtype(image, np.uint8)
    return image * np.float32(1 / 255)


def to_uint8(image: np.ndarray) -> np.ndarray:
    """float32, clipped to 0...1 -> uint8 0...255: x * 255.5, truncated as in TensorFlow (not rounded)."""
    _check_dtype(image, np.float32)
    image = np.clip(image, 0, 1)
    image *= np.float32(255.5)
    return image.astype(np.uint8)


def normalize(image: np.ndarray, means: Sequence[Sequence[float]], stds: Sequence[Sequence[float]]) -> np.ndarray:
    """`(x / 255 - mean) / std` per vision tower, stacked along channels: torchvision's `to_tensor` and `normalize`.

    Args:
        image: uint8 (height, width, 3), as `prepare` returns it.
        means: per tower, the means of the three channels.
        stds: per tower, their standard deviations.

    Returns:
        float32 (3 * towers, height, width).
    """
    check_rgb_image(image)
    means, stds = np.asarray(means, np.float32), np.asarray(stds, np.float32)
    if means.ndim != 2 or means.shape[1] != 3 or means.shape != stds.shape:
        raise ValueError(f"expected means and stds of shape (towers, 3), got {means.shape} and {stds.shape}")
    planes = np.ascontiguousarray(image.transpose(2, 0, 1)).astype(np.float32)
    planes /= np.float32(255)
    pixel_values = planes - means[:, :, None, None]  # (towers, 3, height, width)
    pixel_values /= stds[:, :, None, None]
    return pixel_values.reshape(-1, *image.shape[:2])


def _check_dtype(image: np.ndarray, dtype: type) -> None:
    if not isinstance(image, np.ndarray):
        raise TypeError(f"expected an image as a NumPy array of {np.dtype(dtype)}, got {type(image).__name__}")
    if image.dtype != dtype:
        raise TypeError(f"expected an image of dtype {np.dtype(dtype)}, got {image.dtype}")


def _checked_size(size: tuple[int, int]) -> tuple[int, int]:
    if not isinstance(size, (tuple, list)) or len(size) != 2:
        raise TypeError(f"expected a size (height, width), got {size!r}")
    height, width = map(operator.index, size)
    if height < 1 or width < 1:
        raise ValueError(f"expected a size (height, width) of at least one pixel each, got {tuple(size)}")
    return height, width


def _filter_first_axis(values: np.ndarray, out_length: int) -> np.ndarray:
    """Lanczos-3 along the first axis: float32 (length, n) -> (out_length, n)."""
    starts, weights = _lanczos3_taps(values.shape[0], out_length)
    out = np.zeros((out_length, values.shape[1]), np.float32)
    product = np.empty_like(out)
    for tap, weight in enumerate(weights):
        # Windows that the edge cuts off have weight 0 here, so any row may be taken for them.
        np.take(values, starts + tap, axis=0, out=product, mode="clip")
        product *= weight[:, None]
        out += product
    return out


@lru_cache(maxsize=64)
def _lanczos3_taps(in_length: int, out_length: int) -> tuple[np.ndarray, np.ndarray]:
    """First input and float32 weights (taps, out_length) of every output sample, as TensorFlow's ScaleAndTranslate."""
    one, half = np.float32(1), np.float32(0.5)
    inverse_scale = one / (np.float32(out_length) / np.float32(in_length))
    kernel_scale = max(inverse_scale, one)  # antialiasing: the kernel is wider if the image shrinks
    centers = (np.arange(out_length, dtype=np.float32) + half) * inverse_scale
    reach = LANCZOS_RADIUS * kernel_scale
    starts = np.clip(np.ceil(centers - reach - half), 0, in_length - 1).astype(np.int64)
    ends = np.clip(np.floor(centers + reach - half), 0, in_length - 1).astype(np.int64) + 1

    inputs = starts + np.arange((ends - starts).max())[:, None]  # (taps, out_length)
    positions = inputs.astype(np.float32) + half - centers
    weights = _lanczos3_kernel(np.abs(positions * (one / kernel_scale)))
    weights[inputs >= ends] = 0
    total = np.zeros(out_length, np.float32)
    for weight in weights:
        total += weight
    weights *= one / total
    return starts, weights


def _lanczos3_kernel(x: np.ndarray) -> np.ndarray:
    """The Lanczos window of radius 3 at distances `x` >= 0, float32 throughout."""
    with np.errstate(divide="ignore", invalid="ignore"):
        sines = LANCZOS_RADIUS * _sin_float32(PI * x) * _sin_float32(PI * x / LANCZOS_RADIUS)
        window = sines / (PI * PI * x * x)
    window[x > LANCZOS_RADIUS] = 0
    window[x <= np.float32(1e-3)] = 1
    return window


def _sin_float32(x: np.ndarray) -> np.ndarray:
    """The sine of float32 values in [0, 120), as `sinf` of the GNU C library computes it.

    The correctly rounded sine and NumPy's own in float32 (which depends on the processor) both give other last bits
    for some weights. All steps are in double, and only the result is rounded.
    """
    x = x.astype(np.float64)
    quadrant = ((x * _QUADRANTS).astype(np.int64) + (1 << 23)) >> 24
    x = x - quadrant * _HALF_PI
    square = x * x
    cube, fourth = x * square, square * square
    sine = (x + cube * _SINE[0]) + (cube * square) * (_SINE[1] + square * _SINE[2])
    cosine = (_COSINE[0] + square * _COSINE[1]) + fourth * _COSINE[2]
    cosine = cosine + (fourth * square) * (_COSINE[3] + square * _COSINE[4])
    values = np.where(quadrant % 2 == 0, sine, cosine)
    return np.where(quadrant % 4 < 2, values, -values).astype(np.float32)


def _bilinear_taps(
    in_length: int, out_length: int, start: float, end: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Per output sample of an axis: lower and upper input, the fraction between them, and whether it is outside."""
    start, end, last = np.float32(start), np.float32(end), np.float32(in_length - 1)
    if out_length > 1:
        step = (end - start) * last / np.float32(out_length - 1)
        positions = start * last + np.arange(out_length, dtype=np.float32) * step
    else:
        positions = np.float32(0.5) * (start + end) * last + np.zeros(1, np.float32)
    outside = (positions < 0) | (positions > last)
    positions = np.clip(positions, 0, last)
    lower = np.floor(positions)
    return lower.astype(np.int64), np.ceil(positions).astype(np.int64), positions - lower, outside
