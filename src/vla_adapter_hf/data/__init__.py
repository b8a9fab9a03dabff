"""Demonstrations as training samples: readers, statistics, augmentation."""

from vla_adapter_hf.data.augmentation import ImageAugmentation, ImageResize
from vla_adapter_hf.data.dataset import VLAAdapterDataset
from vla_adapter_hf.data.episodes import BadEpisode, BadEpisodeError
from vla_adapter_hf.data.loading import dataset_statistics, load_demonstrations
from vla_adapter_hf.data.mixture import VLAAdapterMixture
from vla_adapter_hf.data.statistics import compute_norm_stats, describe_norm_stats
from vla_adapter_hf.data.streaming import VLAAdapterStreamingDataset


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
