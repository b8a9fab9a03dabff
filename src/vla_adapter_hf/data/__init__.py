"""Demonstrations as training samples: readers, statistics, augmentation."""

from .augmentation import ImageAugmentation, ImageResize
from .dataset import VLAAdapterDataset
from .episodes import BadEpisode, BadEpisodeError
from .statistics import compute_norm_stats


__all__ = [
    "BadEpisode",
    "BadEpisodeError",
    "ImageAugmentation",
    "ImageResize",
    "VLAAdapterDataset",
    "compute_norm_stats",
]
