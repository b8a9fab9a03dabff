"""From samples of a dataset to a batch for the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from vla_adapter_hf.modeling.configuration_vla_adapter import VLAAdapterConfig
from vla_adapter_hf.modeling.normalization_vla_adapter import (
    EPSILON,
    USED_STATISTICS,
    normalize,
    select_norm_stats,
)
from vla_adapter_hf.processing.processing_vla_adapter import VLAAdapterProcessor


class VLAAdapterDataCollator:
    """Samples of a [`VLAAdapterDataset`] as a batch: prompts and images through the processor, numbers normalised.

    Frames get neither JPEG round trip nor centre crop here: the first imitates, at inference, what happened to the training
    frames long ago, the second stands for the random crops of the augmentation, which the dataset's `image_transform` does.

    Args:
        processor ([`VLAAdapterProcessor`]): of the model.
        config ([`VLAAdapterConfig`]): of the model, with the norm stats of every dataset in the samples.

    Raises:
        ValueError: when the model has no statistics, or sizes do not fit those of the model.
    """

    def __init__(self, processor: VLAAdapterProcessor, config: VLAAdapterConfig):
        if not config.norm_stats:
            raise ValueError("The model has no norm_stats; load it with norm_stats=dataset.norm_stats.")
        self.processor = processor
        self.config = config

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """
        Returns:
            `dict`: `input_ids`, `attention_mask`, `pixel_values`, `proprio` `(batch, proprio_dim)`, `actions`
            `(batch, chunk_size, action_dim)`, `action_is_pad` `(batch, chunk_size)`, and `action_scale`
            `(batch, action_dim)`, the physical units of one normalised unit, for the metrics.
        """
        missing = {"images", "text", "state", "actions"} - set(samples[0])
        if missing:
            raise ValueError(
                f"The samples lack {', '.join(sorted(missing))}; they have {', '.join(sorted(samples[0]))}. A plain Trainer "
                "removes what the model's forward does not name: use VLAAdapterTrainingArguments, or set "
                "remove_unused_columns=False."
            )
        inputs = self.processor(
            images=[sample["images"] for sample in samples],
            text=[sample["text"] for sample in samples],
            do_jpeg_round_trip=False,
            do_center_crop=False,
        )
        normalized = [self._normalize(sample) for sample in samples]
        batch = {name: torch.from_numpy(np.stack(values)) for name, values in _transposed(normalized).items()}
        return {**inputs, **batch}

    def _normalize(self, sample: Mapping[str, Any]) -> dict[str, np.ndarray]:
        config = self.config
        _, stats = select_norm_stats(config.norm_stats, sample.get("unnorm_key"))
        actions = np.asarray(sample["actions"])
        expected = (config.chunk_size, config.action_dim)
        if actions.shape != expected:
            raise ValueError(
                f"a sample's actions have shape {actions.shape}, the model predicts {expected} (chunk_size, action_dim)."
            )
        is_pad = np.asarray(sample.get("action_is_pad", np.zeros(config.chunk_size)), dtype=bool)
        rules = (config.norm_type, config.constant_dims)
        return {
            "proprio": normalize(sample["state"], stats["proprio"], *rules).astype(np.float32),
            "actions": normalize(actions, stats["action"], *rules).astype(np.float32),
            "action_is_pad": is_pad,
            "action_scale": _physical_scale(stats["action"], config.norm_type).astype(np.float32),
        }


def _physical_scale(stats: dict[str, Any], norm_type: str) -> np.ndarray:
    first, second = (np.asarray(stats[name], dtype=np.float64) for name in USED_STATISTICS[norm_type])
    scale = second + EPSILON if norm_type == "normal" else 0.5 * (second - first + EPSILON)
    return np.where(np.asarray(stats.get("mask", np.ones(first.shape, dtype=bool))), scale, 1.0)


def _transposed(rows: list[dict[str, np.ndarray]]) -> dict[str, list[np.ndarray]]:
    return {name: [row[name] for row in rows] for name in rows[0]}
