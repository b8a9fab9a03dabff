"""The demonstrations of a training: datasets opened, augmented, mixed, and some episodes held out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vla_adapter_hf.data import (
    ImageAugmentation,
    ImageResize,
    VLAAdapterDataset,
    VLAAdapterMixture,
    load_demonstrations,
)
from vla_adapter_hf.data.augmentation import DEFAULT_CROP_AREA
from vla_adapter_hf.modeling.configuration_vla_adapter import VLAAdapterConfig
from vla_adapter_hf.training.arguments import DataArguments


@dataclass
class Demonstrations:
    """Training and validation parts of one or several datasets, and their statistics."""

    train: VLAAdapterDataset | VLAAdapterMixture
    validation: torch.utils.data.Dataset | None
    parts: list[VLAAdapterDataset]
    """The validation part of each dataset, or the whole of it where nothing is held out; for the pictures."""
    norm_stats: dict[str, Any]

    @property
    def held_out(self) -> dict[str, list[int]]:
        """The episodes that are held out, by the name of their dataset's statistics."""
        return {part.unnorm_key: part.episode_indices for part in self.parts} if self.validation is not None else {}


def load_data(
    arguments: DataArguments, config: VLAAdapterConfig, seed: int, progress: bool | None = None
) -> Demonstrations:
    """Open the datasets and hold out episodes for evaluation.

    Args:
        arguments: the datasets, and how they are read.
        config: of the start checkpoint: image size, crop, and the chunk size where none is given.
        seed: decides augmentation, held-out episodes and the draws of a mixture.
        progress: show progress bars; by default where standard error is a terminal.

    Raises:
        ValueError, TypeError: arguments that do not fit the data.
    """
    if arguments.augment:
        crop_area = config.image_center_crop or DEFAULT_CROP_AREA
        transform = ImageAugmentation(config.image_size, seed, crop_area=crop_area)
        # A model trained with random crops sees the centre at inference.
        unaugmented = ImageResize(config.image_size, crop_area)
    else:
        transform = unaugmented = ImageResize(config.image_size)
    options = {
        "format": arguments.format,
        "cameras": arguments.cameras,
        "chunk_size": arguments.chunk_size or config.chunk_size,
        "robot": arguments.robot,
        "pad_chunks": arguments.pad_chunks,
        "on_bad_episode": arguments.on_bad_episode,
        "action_mask": arguments.mask_of_actions(),
        "image_transform": transform,
        "progress": progress,
        **arguments.reader_options(),
    }
    datasets = [load_demonstrations(path, **options) for path in arguments.dataset]
    keys = [dataset.unnorm_key for dataset in datasets]
    for number, (path, key) in enumerate(zip(arguments.dataset, keys, strict=True)):
        if keys.count(key) > 1:  # the folders, or the repositories of several owners, have the same name
            longer = f"{Path(path).absolute().parent.name}_{key}"
            datasets[number] = load_demonstrations(path, **options, unnorm_key=longer)
    trains, validations = datasets, []
    if arguments.validation:
        share = int(arguments.validation) if arguments.validation >= 1 else arguments.validation
        pairs = [dataset.split_by_episode(share, seed, unaugmented) for dataset in datasets]
        trains, validations = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    if len(trains) == 1 and arguments.weights is None:
        train = trains[0]
    else:
        train = VLAAdapterMixture(trains, arguments.weights, seed=seed)
    validation = None
    if validations:
        validation = validations[0] if len(validations) == 1 else torch.utils.data.ConcatDataset(validations)
    unseen = validations or [dataset.select_episodes(dataset.episode_indices, unaugmented) for dataset in datasets]
    norm_stats = {key: entry for dataset in datasets for key, entry in dataset.norm_stats.items()}
    return Demonstrations(train, validation, unseen, norm_stats)


def check_camera_order(cameras: list[str], config: VLAAdapterConfig, source: str) -> None:
    """Refuse cameras of a checkpoint in another order: its weights know cameras by their position.

    Args:
        cameras: names in the order in which the dataset gives them.
        config: of the checkpoint.
        source: the checkpoint's name, for the message.

    Raises:
        ValueError: a camera of the checkpoint at another position, or two in another order.
    """
    shared = [name for name in cameras if name in config.cameras]
    in_order = [name for name in config.cameras if name in shared]
    moved = len(cameras) == config.num_cameras and any(
        name in config.cameras and name != config.cameras[position] for position, name in enumerate(cameras)
    )
    if moved or shared != in_order:
        raise ValueError(
            f"{source} sees the cameras {', '.join(config.cameras)} in this order, the demonstrations have "
            f"{', '.join(cameras)}. Give cameras={list(config.cameras)}. If the names mean other cameras, rename the "
            "dataset's columns."
        )


def wants_round_trip(choice: str, datasets: list[VLAAdapterDataset]) -> bool:
    """Whether frames go through JPEG at inference: as chosen, or if the demonstrations were recorded as JPEG.

    Raises:
        ValueError: for `"auto"`, when some datasets were and some were not.
    """
    if choice != "auto":
        return choice == "yes"
    recorded = {dataset.source.frames_are_jpeg() for dataset in datasets}
    if len(recorded) > 1:
        raise ValueError("jpeg_round_trip=auto: some datasets hold JPEG frames and some do not; choose yes or no.")
    return recorded.pop()
