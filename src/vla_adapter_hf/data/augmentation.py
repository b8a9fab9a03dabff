"""What happens to camera frames between decoding and the processor: resize, and in training augmentation.

A transform is called with all cameras' frames of one sample and returns frames of the model's size. Its draws depend
on seed, epoch, sample index and camera only: the number of workers and the order of samples change nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from vla_adapter_hf.processing.image_preparation_vla_adapter import (
    center_crop,
    crop_and_resize,
    resize_lanczos3,
    to_float01,
    to_uint8,
)


DEFAULT_CROP_AREA = 0.9

_TINY = np.finfo(np.float32).tiny
_TWO, _FOUR, _SIX = np.float32(2), np.float32(4), np.float32(6)


def _size(image_size: int | Sequence[int]) -> tuple[int, int]:
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    if height < 1 or width < 1:
        raise ValueError(f"image_size={image_size}; expected a positive number of pixels, or (height, width)")
    return int(height), int(width)


def _resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return image if image.shape[:2] == size else resize_lanczos3(image, size)


class ImageResize:
    """Bring frames to the model's size and change nothing else; for validation.

    Args:
        image_size: pixels, one number or (height, width).
        crop_area: also cut out the centre of this area, as at inference with a model trained with crops. None, as in
            the published training, does not.

    Raises:
        ValueError: a size that is not positive.
    """

    def __init__(self, image_size: int | Sequence[int] = 224, crop_area: float | None = None) -> None:
        self.image_size = _size(image_size)
        self.crop_area = crop_area

    @classmethod
    def from_model_config(cls, config: Any) -> ImageResize:
        """As the model with this [`VLAAdapterConfig`] sees frames at inference."""
        return cls(config.image_size, config.image_center_crop)

    def __call__(self, images: Sequence[np.ndarray], epoch: int = 0, index: int = 0) -> list[np.ndarray]:
        """uint8 (height, width, 3) per camera -> uint8 of the model's size per camera."""
        resized = [_resize(image, self.image_size) for image in images]
        if self.crop_area is None:
            return resized
        return [center_crop(image, self.crop_area) for image in resized]

    def __repr__(self) -> str:
        return f"ImageResize(image_size={self.image_size}, crop_area={self.crop_area})"


class ImageAugmentation:
    """Resize, then the published training's augmentation. Every operation is applied to every frame, in this order:

    1. a crop of `crop_area` of the area, resized back bilinearly;
    2. brightness: x + d, d in [-brightness, brightness);
    3. contrast: (x - m) f + m, f in `contrast`, m the mean of each channel over the frame;
    4. saturation: S f in HSV, f in `saturation`;
    5. hue: H + d in HSV, d in [-hue, hue) of a full turn.

    Values are clipped to 0...1 after each. They become uint8 by truncating x * 255.5.

    Args:
        image_size: pixels, one number or (height, width).
        seed: decides all draws, together with epoch, sample index and camera.
        crop_area: share of the area that the crop keeps; the model's `image_center_crop` must be the same.
        independent_offsets: draw the crop's two offsets independently. The published training uses one draw for both,
            so its window moves along the diagonal only. That is the default.
        brightness, contrast, saturation, hue: the ranges of the draws.

    Raises:
        ValueError: a size, an area or a range that is not valid.
    """

    def __init__(
        self,
        image_size: int | Sequence[int] = 224,
        seed: int = 0,
        crop_area: float = DEFAULT_CROP_AREA,
        independent_offsets: bool = False,
        brightness: float = 0.2,
        contrast: tuple[float, float] = (0.8, 1.2),
        saturation: tuple[float, float] = (0.8, 1.2),
        hue: float = 0.05,
    ) -> None:
        if not 0 < crop_area <= 1:
            raise ValueError(f"crop_area={crop_area}; expected a share of the area, above 0 and at most 1")
        for name, (low, high) in (("contrast", contrast), ("saturation", saturation)):
            if not 0 <= low <= high:
                raise ValueError(f"{name}={(low, high)}; expected 0 <= low <= high")
        if brightness < 0 or hue < 0:
            raise ValueError(f"brightness={brightness}, hue={hue}; expected numbers that are not negative")
        if seed < 0:
            raise ValueError(f"seed={seed}; expected a number that is not negative")
        self.image_size = _size(image_size)
        self.seed = seed
        self.crop_area = crop_area
        self.independent_offsets = independent_offsets
        self.brightness = brightness
        self.contrast = contrast
        self.saturation = saturation
        self.hue = hue

    @classmethod
    def from_model_config(cls, config: Any, seed: int = 0) -> ImageAugmentation:
        """For training the model with this [`VLAAdapterConfig`]: its image size, and its crop or none."""
        return cls(config.image_size, seed, crop_area=config.image_center_crop or 1.0)

    def draws(self, epoch: int, index: int, camera: int) -> dict[str, float]:
        """The parameters for one frame: offsets y and x of the crop, brightness, contrast, saturation, hue."""
        rng = np.random.default_rng((self.seed, epoch, index, camera))
        room = 1.0 - float(np.sqrt(np.float32(self.crop_area)))
        y, x, brightness, contrast, saturation, hue = rng.random(6, dtype=np.float32).tolist()
        return {
            "y": y * room,
            "x": (x if self.independent_offsets else y) * room,
            "brightness": (2.0 * brightness - 1.0) * self.brightness,
            "contrast": self.contrast[0] + contrast * (self.contrast[1] - self.contrast[0]),
            "saturation": self.saturation[0] + saturation * (self.saturation[1] - self.saturation[0]),
            "hue": (2.0 * hue - 1.0) * self.hue,
        }

    def __call__(self, images: Sequence[np.ndarray], epoch: int = 0, index: int = 0) -> list[np.ndarray]:
        """Augment the frames of one sample.

        Args:
            images: uint8 (height, width, 3) per camera, in camera order.
            epoch: the epoch.
            index: which sample; any number that identifies it.

        Returns:
            uint8 of the model's size per camera.
        """
        return [self._augment(image, self.draws(epoch, index, camera)) for camera, image in enumerate(images)]

    def _augment(self, image: np.ndarray, draw: dict[str, float]) -> np.ndarray:
        image = to_float01(_resize(image, self.image_size))
        side = np.sqrt(np.float32(self.crop_area))
        y, x = np.float32(draw["y"]), np.float32(draw["x"])
        image = crop_and_resize(image, (y, x, y + side, x + side), self.image_size)
        # One plane per channel: every operation then runs over memory in order.
        planes = np.empty((3, *self.image_size), np.float32)
        np.clip(image.transpose(2, 0, 1), 0.0, 1.0, out=planes)
        adjust_brightness(planes, draw["brightness"])
        adjust_contrast(planes, draw["contrast"])
        planes = adjust_saturation_and_hue(planes, draw["saturation"], draw["hue"])
        augmented = np.empty((*self.image_size, 3), np.uint8)
        for channel, plane in enumerate(to_uint8(planes)):  # three times as fast as transposing at once
            augmented[:, :, channel] = plane
        return augmented

    def __repr__(self) -> str:
        shown = (
            "image_size",
            "seed",
            "crop_area",
            "independent_offsets",
            "brightness",
            "contrast",
            "saturation",
            "hue",
        )
        return f"ImageAugmentation({', '.join(f'{name}={getattr(self, name)!r}' for name in shown)})"


def adjust_brightness(planes: np.ndarray, delta: float) -> None:
    """Add `delta` to float32 planes (3, height, width) in 0...1 and clip, in place."""
    planes += np.float32(delta)
    np.clip(planes, 0.0, 1.0, out=planes)


def adjust_contrast(planes: np.ndarray, factor: float) -> None:
    """Scale the distance from each channel's mean by `factor` and clip, in place."""
    mean = planes.mean(axis=(1, 2), dtype=np.float64).astype(np.float32)[:, None, None]
    planes -= mean
    planes *= np.float32(factor)
    planes += mean
    np.clip(planes, 0.0, 1.0, out=planes)


def adjust_saturation_and_hue(planes: np.ndarray, factor: float, delta: float) -> np.ndarray:
    """In HSV, scale S by `factor` (clipped to 0...1), then turn H by `delta` of a full turn.

    Both are done in one conversion to HSV and back. The saturation step changes neither V nor, except for grey, H, and
    its result is within 0...1, so going back to RGB in between would change nothing.

    Args:
        planes: float32 (3, height, width) in 0...1.

    Returns:
        float32 (3, height, width) in 0...1.
    """
    factor, turn = np.float32(factor), np.float32(6.0 * delta)
    red, green, blue = planes
    value = np.maximum(red, green)
    np.maximum(value, blue, out=value)
    chroma = np.minimum(red, green)
    np.minimum(chroma, blue, out=chroma)
    np.subtract(value, chroma, out=chroma)
    # Hue in sixths of a turn: the largest channel gives the sector, the difference of the other two the place in it.
    # For grey the differences are zero, whatever they are multiplied with.
    scale = np.reciprocal(np.maximum(chroma, _TINY))
    hue = red - green
    hue *= scale
    hue += _FOUR
    difference = blue - red
    difference *= scale
    difference += _TWO
    np.copyto(hue, difference, where=value == green)
    np.subtract(green, blue, out=difference)
    difference *= scale
    np.copyto(hue, difference, where=value == red)
    hue += turn
    hue -= _SIX * np.floor(hue / _SIX)
    # Saturation is chroma / value, so clipping it at one means clipping the chroma at the value.
    chroma *= factor
    np.minimum(chroma, value, out=chroma)
    value -= chroma  # the smallest channel of the result
    out = np.empty_like(planes)
    for channel, (centre, sign, offset) in enumerate(((3, 1, -1), (2, -1, 2), (4, -1, 2))):
        # A channel is above the smallest one by the whole chroma within a sixth of a turn of its own hue.
        share = np.abs(hue - np.float32(centre))
        share *= np.float32(sign)
        share += np.float32(offset)
        np.clip(share, 0.0, 1.0, out=share)
        share *= chroma
        np.add(share, value, out=out[channel])
    return out
