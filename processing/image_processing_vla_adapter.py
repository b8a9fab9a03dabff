"""Image processor of VLA-Adapter: camera frames to `pixel_values`, equal in every bit to the original code's."""

from typing import Any

import numpy as np
from PIL import Image
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import ChannelDimension, infer_channel_dimension_format, is_valid_image, to_numpy_array
from transformers.processing_utils import ImagesKwargs

from .camera_names_vla_adapter import matching_names
from .image_preparation_vla_adapter import normalize, prepare

# Not used here, but older releases of transformers copy only the files that this one imports itself.
from .jpeg_round_trip_vla_adapter import jpeg_round_trip  # noqa: F401


class VLAAdapterImageProcessorKwargs(ImagesKwargs, total=False):
    """
    cameras (`list[str]`):
        Names of the camera views, in the order in which the model sees them.
    do_jpeg_round_trip (`bool`):
        Whether a frame of another size than the model's is encoded as JPEG and decoded before it is resized.
    crop_area (`float`):
        Share of the area that the centre crop keeps.
    tower_means (`list[list[float]]`):
        Per vision tower the means of the three channels.
    tower_stds (`list[list[float]]`):
        Per vision tower the standard deviations of the three channels.
    """

    cameras: list[str]
    do_jpeg_round_trip: bool
    crop_area: float
    tower_means: list[list[float]]
    tower_stds: list[list[float]]


class VLAAdapterImageProcessor(PilBackend):
    r"""
    Prepares the frames of one or several cameras: JPEG round trip, Lanczos-3 resize, centre crop, and one
    normalisation per vision tower. `image_preparation_vla_adapter` explains the steps.

    Round trip and crop must be as in training (the published models use both), so they are saved with the checkpoint.

    Args:
        size (`dict`, *optional*, defaults to `{"height": 224, "width": 224}`): the size that the towers see.
        cameras (`list[str]`, *optional*, defaults to `["image", "wrist_image"]`): the model's cameras, in order.
        do_jpeg_round_trip (`bool`, *optional*, defaults to `True`): for models whose data was stored as JPEG.
        do_center_crop (`bool`, *optional*, defaults to `True`): for models trained with random crops.
        crop_area (`float`, *optional*, defaults to 0.9): the share of the area that the crop keeps.
    """

    valid_kwargs = VLAAdapterImageProcessorKwargs
    model_input_names = ["pixel_values"]
    size = {"height": 224, "width": 224}
    do_convert_rgb = True
    do_resize = True
    do_rescale = True
    do_normalize = True
    do_jpeg_round_trip = True
    do_center_crop = True
    crop_area = 0.9
    cameras = ["image", "wrist_image"]
    # For DINOv2 ImageNet's, for SigLIP one half. ImageNet's are rounded to bfloat16, as in the published code. (The
    # published files also hold the exact numbers.)
    tower_means = [[0.484375, 0.455078125, 0.40625], [0.5, 0.5, 0.5]]
    tower_stds = [[0.228515625, 0.2236328125, 0.224609375], [0.5, 0.5, 0.5]]

    @classmethod
    def from_model_config(cls, config: Any, **overrides: Any) -> "VLAAdapterImageProcessor":
        """The image processor that a [`VLAAdapterConfig`] asks for."""
        arguments = {
            "size": {"height": config.image_size, "width": config.image_size},
            "cameras": list(config.cameras),
            "do_jpeg_round_trip": config.image_jpeg_round_trip,
            "do_center_crop": config.image_center_crop is not None,
        }
        if config.image_center_crop is not None:
            arguments["crop_area"] = config.image_center_crop
        return cls(**{**arguments, **overrides})

    def make_samples(self, images: Any) -> list[list[Any]]:
        """Sort what was given into one list of frames per sample, cameras in order.

        One sample is a list of its frames, a `dict` of them by camera name, an array with a leading camera axis or,
        for a model with one camera, the frame itself. A batch is a list of samples. A flat list of frames is one
        sample, except for a model with one camera, for which it is a batch.

        A camera name may be a full column name that ends in it: `observation.images.top` for the camera `top`.

        Raises:
            ValueError: when a sample does not have one frame per camera, or a camera's name is missing, unknown or
                ambiguous.
        """
        cameras = self.cameras
        if isinstance(images, dict) or _is_frame(images):
            samples = [images]
        elif len(images) == 0:
            raise ValueError(f"images is empty; give one frame for each camera: {', '.join(cameras)}.")
        elif _is_frame(images[0]) and len(cameras) > 1:
            samples = [images]
        else:
            samples = list(images)
        return [self._order_by_camera(sample, index) for index, sample in enumerate(samples)]

    def _order_by_camera(self, sample: Any, index: int) -> list[Any]:
        cameras = self.cameras
        if isinstance(sample, dict):
            return [sample[name] for name in self._find_cameras(list(sample), index)]
        frames = [sample] if _is_frame(sample) else list(sample)
        if len(frames) != len(cameras):
            raise ValueError(
                f"images of sample {index} has {len(frames)} frames, but the model has {len(cameras)} cameras "
                f"({', '.join(cameras)}). Give one frame for each, in this order, or a dict by camera name."
            )
        return frames

    def _find_cameras(self, names: list[str], index: int) -> list[str]:
        """The names under which a sample's dict holds the cameras, in the model's order."""
        cameras = self.cameras
        exact = [name for name in names if name in cameras]
        rest = [name for name in names if name not in cameras]
        found = []
        for camera in cameras:
            matches = matching_names(camera, exact if camera in exact else rest)
            if len(matches) > 1:
                raise ValueError(
                    f"images of sample {index}: camera {camera!r} could be any of {', '.join(matches)}; give the "
                    f"frames under the model's own camera names {list(cameras)}."
                )
            found += matches
        if len(found) != len(cameras) or sorted(found) != sorted(names):
            raise ValueError(
                f"images of sample {index} have the cameras {sorted(names)}, the model needs {list(cameras)}."
            )
        return found

    def preprocess(self, images: Any, *args, **kwargs) -> BatchFeature:
        """
        Prepare frames for the model.

        Args:
            images: one sample or a batch, see [`make_samples`]. A frame is a PIL image, or a NumPy array or torch
                tensor with three channels, first or last (`input_data_format` decides where that is ambiguous),
                either uint8 or floating point in 0...1.

        Returns:
            `BatchFeature`: `pixel_values`, float32 `(batch, 6 * cameras, height, width)`. Per camera three channels
            that are normalised for DINOv2, then three for SigLIP.

        Raises:
            TypeError: for an unknown option, and for `cameras`, which cannot be changed in a call.
        """
        unknown = sorted(set(kwargs) - set(self.valid_kwargs.__annotations__))
        if unknown:
            raise TypeError(f"{', '.join(unknown)}: the image processor has no such option.")
        if "cameras" in kwargs:
            raise TypeError(
                f"cameras belong to the model, here {list(self.cameras)}, and cannot be changed in a call; to give "
                "the frames in any order, give a dict by camera name."
            )
        return super().preprocess(images, *args, **kwargs)

    def process_image(
        self,
        image: Any,
        do_convert_rgb: bool | None = None,
        input_data_format: str | ChannelDimension | None = None,
        **kwargs: Any,
    ) -> np.ndarray:
        """One frame of any accepted kind as uint8 `(height, width, 3)`."""
        if not is_valid_image(image):
            raise TypeError(
                f"a frame must be a PIL image, a NumPy array or a torch tensor, got {type(image).__name__}."
            )
        if isinstance(image, Image.Image):
            # Not with transformers' own conversion: how it treats transparency depends on the release.
            image = image.convert("RGB") if do_convert_rgb else image
            input_data_format = ChannelDimension.LAST
        # bfloat16 has 8 significant bits, too few for 256 levels in 0...1. float16 has 11.
        if str(getattr(image, "dtype", "")).removeprefix("torch.") == "bfloat16":
            raise TypeError("a frame is bfloat16, which has already lost digits; give uint8 or float32.")
        array = to_numpy_array(image)
        if array.ndim != 3 or 3 not in (array.shape[0], array.shape[-1]):
            raise ValueError(
                f"a frame must have three channels, (height, width, 3) or (3, height, width), got {array.shape}."
            )
        if input_data_format is None:
            input_data_format = _channel_dimension(array)
        if ChannelDimension(input_data_format) == ChannelDimension.FIRST:
            array = array.transpose(1, 2, 0)
        return np.ascontiguousarray(_as_uint8(array))

    def _prepare_image_like_inputs(self, images: Any, *args, **kwargs) -> list[list[np.ndarray]]:
        kwargs.pop("expected_ndims", None)
        return [[self.process_image(frame, **kwargs) for frame in sample] for sample in self.make_samples(images)]

    def _validate_preprocess_kwargs(self, **kwargs: Any) -> None:
        size, crop_area = kwargs["size"], kwargs["crop_area"]
        if not (size and size.height and size.width):
            raise ValueError(f"size must give height and width in pixels, got {size}.")
        if not 0 < crop_area <= 1:
            raise ValueError(f"crop_area must be a share of the area in (0, 1], got {crop_area}.")
        for name in ("do_resize", "do_rescale", "do_normalize"):
            if not kwargs[name]:
                raise ValueError(f"{name}=False is not possible: the model was trained with it.")
        # Other arguments of transformers that have no effect here must not be ignored silently.
        for name in ("resample", "image_mean", "image_std", "crop_size", "do_pad", "pad_size"):
            if kwargs[name] is not None and kwargs[name] is not False:
                raise ValueError(
                    f"{name}={kwargs[name]!r} is not possible; see tower_means, tower_stds and crop_area."
                )
        if kwargs["rescale_factor"] != type(self).rescale_factor:
            raise ValueError(f"rescale_factor must be {type(self).rescale_factor}, got {kwargs['rescale_factor']}.")

    def _preprocess(
        self,
        images: list[list[np.ndarray]],
        size: Any,
        do_jpeg_round_trip: bool,
        do_center_crop: bool,
        crop_area: float,
        tower_means: list[list[float]],
        tower_stds: list[list[float]],
        return_tensors: str | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        crop = crop_area if do_center_crop else None
        size = (size.height, size.width)
        pixel_values = [
            np.concatenate(
                [
                    normalize(prepare(frame, size, do_jpeg_round_trip, crop), tower_means, tower_stds)
                    for frame in sample
                ]
            )
            for sample in images
        ]
        return BatchFeature(data={"pixel_values": pixel_values}, tensor_type=return_tensors)


def _is_frame(images: Any) -> bool:
    """Whether this is one frame rather than a collection of frames."""
    if isinstance(images, (list, tuple, dict)):
        return False
    return not hasattr(images, "ndim") or images.ndim <= 3


def _channel_dimension(array: np.ndarray) -> ChannelDimension:
    if array.shape[0] == array.shape[-1] == 3:
        raise ValueError(
            f"a frame of shape {array.shape} may have its channels first or last; give input_data_format."
        )
    return infer_channel_dimension_format(array, num_channels=3)


def _as_uint8(array: np.ndarray) -> np.ndarray:
    if array.dtype == np.uint8:
        return array
    if not np.issubdtype(array.dtype, np.floating):
        raise TypeError(f"a frame must be uint8, or floating point in 0...1, got {array.dtype}.")
    low, high = float(array.min()), float(array.max())
    if not (0 <= low and high <= 1):
        raise ValueError(
            f"a floating point frame must be in 0...1, got values in {low:.4g}...{high:.4g}; or give uint8."
        )
    return np.rint(array.astype(np.float64) * 255).astype(np.uint8)


__all__ = ["VLAAdapterImageProcessor", "VLAAdapterImageProcessorKwargs"]
