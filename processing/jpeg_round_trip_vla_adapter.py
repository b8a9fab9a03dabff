"""A frame as it looks after it was stored as JPEG and read by TensorFlow.

The published models were trained on frames that had been stored as JPEG, so at inference frames are encoded and
decoded in the same way: with Pillow's encoder at quality 95 with 4:2:0 chroma, and with libjpeg-turbo's decoder as
TensorFlow configures it (fast integer inverse DCT, "fancy" chroma upsampling).

It is written by hand because Pillow's own decoder uses the accurate inverse DCT, and differs in more than half of all
values, by up to 18 levels.

There are two implementations with equal results. `jpeg_round_trip_simplejpeg` uses the library simplejpeg.
`jpeg_round_trip_numpy` follows the arithmetic of libjpeg-turbo in NumPy (`jccolor.c`, `jcsample.c`, `jfdctint.c`,
`jcdctmgr.c`, `jidctfst.c`, `jdsample.c`, `jdcolor.c`), without entropy coding, which is lossless. `jpeg_round_trip`
uses simplejpeg if it is installed.

All matrix products below have integer operands, and their floating type holds every partial sum exactly. So neither
the order of summation nor fused multiply-add changes a result.
"""

import io

import numpy as np
from PIL import Image


try:
    import simplejpeg
except ImportError:  # optional: without it the result is the same and takes longer
    simplejpeg = None


QUALITY = 95

# The standard tables of ITU-T T.81, Annex K. A row holds one vertical frequency.
_LUMA_TABLE = np.array(
    [
        [16, 11, 10, 16, 24, 40, 51, 61],
        [12, 12, 14, 19, 26, 58, 60, 55],
        [14, 13, 16, 24, 40, 57, 69, 56],
        [14, 17, 22, 29, 51, 87, 80, 62],
        [18, 22, 37, 56, 68, 109, 103, 77],
        [24, 35, 55, 64, 81, 104, 113, 92],
        [49, 64, 78, 87, 103, 121, 120, 101],
        [72, 92, 95, 98, 112, 100, 103, 99],
    ]
)
_CHROMA_TABLE = np.full((8, 8), 99)
_CHROMA_TABLE[:4, :4] = [[17, 18, 24, 47], [18, 21, 26, 66], [24, 26, 56, 99], [47, 66, 99, 99]]

# RGB to Y, Cb, Cr in units of 2^-16, and the offsets before rounding down (for Cb and Cr: 128 and just under a half).
_RGB_TO_YCC = np.array([[19595, 38470, 7471], [-11059, -21709, 32768], [32768, -27439, -5329]], np.float32)
_RGB_TO_YCC_OFFSET = np.array([[32768], [(128 << 16) + 32767], [(128 << 16) + 32767]], np.float32)
# The parts of R, G and B that come from Cb - 128 and Cr - 128, in units of 2^-16.
_CHROMA_TO_RGB = np.array([[0, 91881], [-22554, -46802], [116130, 0]], np.float32)
_HALF = np.float32(32768)
_PER_65536 = np.float32(2**-16)

# One pass of the accurate ("ISLOW") forward DCT, in units of 2^-13. libjpeg computes it as a butterfly. Each entry
# here is a sum of the butterfly's rounded constants, so some entries differ from the rounded cosine by one.
_FORWARD_DCT = np.array(
    [
        [8192, 8192, 8192, 8192, 8192, 8192, 8192, 8192],
        [11363, 9633, 6437, 2260, -2260, -6437, -9633, -11363],
        [10703, 4433, -4433, -10703, -10703, -4433, 4433, 10703],
        [9633, -2259, -11362, -6436, 6436, 11362, 2259, -9633],
        [8192, -8192, -8192, 8192, 8192, -8192, -8192, 8192],
        [6437, -11362, 2261, 9633, -9633, -2261, 11362, -6437],
        [4433, -10704, 10704, -4433, -4433, 10704, -10704, 4433],
        [2260, -6436, 9633, -11363, 11363, -9633, 6436, -2260],
    ],
    np.float64,
)

# Constants of the fast ("IFAST") inverse DCT in units of 2^-8: sqrt(2), and three for the odd coefficients.
_SQRT_2, _1_8478, _1_0824, _2_6131 = 362, 473, 277, 669


def jpeg_round_trip(image: np.ndarray) -> np.ndarray:
    """Encode `image` as JPEG (quality 95, 4:2:0) and decode it as TensorFlow does.

    Args:
        image: uint8 (height, width, 3), RGB, of at least one pixel.

    Returns:
        uint8 (height, width, 3). The same bytes with and without `simplejpeg`.

    Raises:
        TypeError: `image` is not an array of uint8.
        ValueError: its shape is not (height, width, 3).
    """
    if simplejpeg is not None:
        return jpeg_round_trip_simplejpeg(image)
    return jpeg_round_trip_numpy(image)


def jpeg_round_trip_simplejpeg(image: np.ndarray) -> np.ndarray:
    """`jpeg_round_trip` with Pillow's encoder and simplejpeg's decoder. Raises an ImportError without simplejpeg."""
    if simplejpeg is None:
        raise ImportError("jpeg_round_trip_simplejpeg needs the package simplejpeg; jpeg_round_trip works without it")
    check_rgb_image(image)
    file = io.BytesIO()
    # simplejpeg's own encoder gives other bytes.
    Image.fromarray(image).save(file, format="JPEG", quality=QUALITY, subsampling=2)
    return simplejpeg.decode_jpeg(file.getvalue(), colorspace="RGB", fastdct=True, fastupsample=False)


def jpeg_round_trip_numpy(image: np.ndarray) -> np.ndarray:
    """`jpeg_round_trip` in NumPy only."""
    check_rgb_image(image)
    height, width = image.shape[:2]
    luma, chroma = _to_subsampled_ycc(image)
    luma = _quantize_and_restore(luma, _LUMA_TABLE)
    chroma = _quantize_and_restore(chroma, _CHROMA_TABLE)
    # Padding is removed before upsampling: there, libjpeg repeats the last row and column of the image itself.
    chroma = _upsample(chroma[:, : (height + 1) // 2, : (width + 1) // 2])
    return _to_rgb(luma[0, :height, :width], chroma[:, :height, :width])


def check_rgb_image(image: np.ndarray) -> None:
    """Raise a TypeError or ValueError unless `image` is a uint8 array (height, width, 3) of at least one pixel."""
    if not isinstance(image, np.ndarray):
        raise TypeError(f"expected an image as a NumPy array of uint8, got {type(image).__name__}")
    if image.dtype != np.uint8:
        raise TypeError(f"expected an image of dtype uint8, got {image.dtype}")
    if image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(f"expected an image of shape (height, width, 3), got {image.shape}")


def _to_subsampled_ycc(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """uint8 (height, width, 3) -> luma (1, h, w) and chroma (2, h', w'), float32 integers, padded to whole blocks."""
    height, width = image.shape[:2]
    rgb = image.reshape(-1, 3).T.astype(np.float32)
    planes = _RGB_TO_YCC @ rgb
    planes += _RGB_TO_YCC_OFFSET
    planes *= _PER_65536
    planes = np.floor(planes, out=planes).reshape(3, height, width)
    luma, chroma = planes[:1], planes[1:]

    # Before chroma is averaged, columns are repeated up to whole blocks, but rows only up to an even number. Rows are
    # repeated up to whole blocks afterwards.
    chroma_height, chroma_width = (height + 1) // 2, (width + 1) // 2
    chroma = _pad_by_repeating(chroma, 2 * chroma_height, 2 * _whole_blocks(chroma_width))
    chroma = chroma[:, ::2] + chroma[:, 1::2]
    chroma = chroma[:, :, ::2] + chroma[:, :, 1::2]
    # Before rounding down, 1/4 is added in even columns and 2/4 in odd ones, so that rounding does not shift the mean.
    chroma *= np.float32(0.25)
    chroma[:, :, ::2] += np.float32(0.25)
    chroma[:, :, 1::2] += np.float32(0.5)
    np.floor(chroma, out=chroma)

    luma = _pad_by_repeating(luma, _whole_blocks(height), _whole_blocks(width))
    return luma, _pad_by_repeating(chroma, _whole_blocks(chroma_height), _whole_blocks(chroma_width))


def _quantize_and_restore(planes: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Forward DCT, quantisation, inverse DCT: float32 (planes, h, w) of 0...255 -> int16, same shape and range."""
    count, height, width = planes.shape
    table = np.maximum((table * (200 - 2 * QUALITY) + 50) // 100, 1)
    # (planes, block rows, 8, block columns, 8) -> (row in block, column in block, blocks)
    blocks = planes.reshape(count, height // 8, 8, width // 8, 8).transpose(2, 4, 0, 1, 3)
    coefficients = _quantize(_forward_dct(blocks.reshape(8, 8, -1)), table)
    samples = _inverse_dct(coefficients, table)
    samples = samples.reshape(8, 8, count, height // 8, width // 8).transpose(2, 3, 0, 4, 1)
    return samples.reshape(count, height, width)


def _forward_dct(blocks: np.ndarray) -> np.ndarray:
    """Samples 0...255 (8, 8, blocks) -> coefficients times 8, integers in float64. Rows first, then columns."""
    blocks = blocks.astype(np.float64)
    blocks -= 128
    blocks = _FORWARD_DCT @ blocks
    _shift_right_rounding(blocks, 11)  # between the passes two more bits are kept than in the result
    blocks = (_FORWARD_DCT @ blocks.reshape(8, -1)).reshape(blocks.shape)
    _shift_right_rounding(blocks, 15)
    return blocks


def _shift_right_rounding(values: np.ndarray, bits: int) -> None:
    """Divide by 2^bits and round to the nearest integer, halves up, in place."""
    values *= 0.5**bits
    values += 0.5
    np.floor(values, out=values)


def _quantize(coefficients: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Coefficients times 8, float64 (8, 8, blocks) -> int16 multiples of the table, halves away from zero.

    `coefficients` is overwritten.
    """
    coefficients /= (8.0 * table)[:, :, None]
    coefficients += np.copysign(0.5, coefficients)
    return coefficients.astype(np.int16)  # truncates


def _inverse_dct(coefficients: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Quantised coefficients (8, 8, blocks) int16 -> samples 0...255 int16, by the fast integer method.

    The multipliers include the scale factors of Arai, Agui and Nakajima, in units of 2^-2. All sums are 16 bits wide
    and wrap around, as in libjpeg-turbo's vector code. Patterns of pure black and white do overflow.
    """
    scale = np.cos(np.arange(8) * np.pi / 16) * np.where(np.arange(8) > 0, np.sqrt(2), 1)
    scale = np.rint(np.outer(scale, scale) * 2**14).astype(np.int64)
    multipliers = ((table * scale + 2**11) >> 12).astype(np.int16)
    values = coefficients * multipliers[:, :, None]
    values = _inverse_dct_pass(values)  # columns
    values = _inverse_dct_pass(values.swapaxes(0, 1)).swapaxes(0, 1)  # rows
    values >>= 5
    values += 128
    return np.clip(values, 0, 255, out=values)


def _inverse_dct_pass(x: np.ndarray) -> np.ndarray:
    """One pass along the first axis (of 8): the even half, the odd half, and their sums and differences."""
    sum_04, difference_04 = x[0] + x[4], x[0] - x[4]
    sum_26 = x[2] + x[6]
    difference_26 = _times(x[2] - x[6], _SQRT_2) - sum_26
    even = (sum_04 + sum_26, difference_04 + difference_26, difference_04 - difference_26, sum_04 - sum_26)

    sum_53, difference_53 = x[5] + x[3], x[5] - x[3]
    sum_17, difference_17 = x[1] + x[7], x[1] - x[7]
    shared = _times(difference_53 + difference_17, _1_8478)
    odd_0 = sum_17 + sum_53
    # 2.6131 does not fit into a 16-bit constant, so the vector code multiplies by 1.6131 and subtracts once more.
    odd_1 = _times(difference_53, 256 - _2_6131) - difference_53 + shared - odd_0
    odd_2 = _times(sum_17 - sum_53, _SQRT_2) - odd_1
    odd_3 = -(_times(difference_17, _1_0824) - shared + odd_2)

    out = np.empty(x.shape, np.int16)
    for k, odd in enumerate((odd_0, odd_1, odd_2, odd_3)):
        np.add(even[k], odd, out=out[k])
        np.subtract(even[k], odd, out=out[7 - k])
    return out


def _times(x: np.ndarray, constant: int) -> np.ndarray:
    """int16 x * constant / 2^8, rounded down. As in the vector code, x is multiplied by 4 first and wraps around."""
    product = np.multiply(x << 2, constant << 6, dtype=np.int32)
    product >>= 16
    return product.astype(np.int16)


def _upsample(chroma: np.ndarray) -> np.ndarray:
    """int16 (2, h, w) -> (2, 2h, 2w): "fancy" upsampling, with weights 3:1 for the nearer row and column.

    libjpeg repeats pixels instead if a plane is at most two pixels wide.
    """
    planes, height, width = chroma.shape
    if width <= 2:
        return chroma.repeat(2, axis=1).repeat(2, axis=2)
    rows = np.empty((planes, height, 2, width + 2), np.int16)
    inner = rows[..., 1:-1]
    padded = _pad_by_repeating_around(chroma)
    tripled = 3 * chroma
    np.add(tripled, padded[:, :-2], out=inner[:, :, 0])
    np.add(tripled, padded[:, 2:], out=inner[:, :, 1])
    rows[..., 0], rows[..., -1] = rows[..., 1], rows[..., -2]

    out = np.empty((planes, height, 2, width, 2), np.int16)
    tripled = 3 * inner
    np.add(tripled, rows[..., :-2] + np.int16(8), out=out[..., 0])
    np.add(tripled, rows[..., 2:] + np.int16(7), out=out[..., 1])
    out >>= 4
    return out.reshape(planes, 2 * height, 2 * width)


def _to_rgb(luma: np.ndarray, chroma: np.ndarray) -> np.ndarray:
    """int16 (height, width) and (2, height, width) -> uint8 (height, width, 3)."""
    height, width = luma.shape
    chroma = chroma.reshape(2, -1).astype(np.float32)
    chroma -= np.float32(128)
    rgb = _CHROMA_TO_RGB @ chroma
    rgb += _HALF
    rgb *= _PER_65536
    np.floor(rgb, out=rgb)
    rgb += luma.reshape(-1)
    np.clip(rgb, 0, 255, out=rgb)
    return np.ascontiguousarray(rgb.astype(np.uint8).T).reshape(height, width, 3)


def _whole_blocks(length: int) -> int:
    return -(-length // 8) * 8


def _pad_by_repeating(planes: np.ndarray, height: int, width: int) -> np.ndarray:
    """Repeat the last row and column of (planes, h, w) up to (planes, height, width)."""
    below, right = height - planes.shape[1], width - planes.shape[2]
    return np.pad(planes, ((0, 0), (0, below), (0, right)), mode="edge") if below or right else planes


def _pad_by_repeating_around(planes: np.ndarray) -> np.ndarray:
    """Repeat the first row of (planes, h, w) above and the last row below."""
    return np.concatenate([planes[:, :1], planes, planes[:, -1:]], axis=1)
