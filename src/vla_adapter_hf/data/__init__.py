"""Demonstrations as training samples: readers, statistics, augmentation."""

from .augmentation import ImageAugmentation, ImageResize
from .dataset import VLAAdapterDataset
from .episodes import BadEpisode, BadEpisodeError
from .loading import dataset_statistics, describe_norm_stats, load_demonstrations
from .mixture import VLAAdapterMixture
from .statistics import compute_norm_stats
from .streaming import VLAAdapterStreamingDataset


__all__ = [
    "BadEpisode",
    "BadEpisodeError",
    "ImageAugmentation",
    "ImageResize",
    "VLAAdapterDataset",
    "VLAAdapterMixture",
    "VLAAdapterStreamingDataset",
    "compute_norm_stats",
    "dataset_statistics",
    "describe_norm_stats",
    "load_demonstrations",
]
