"""From samples of a dataset to a batch for the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from vla_adapter_hf.modeling.configuration_vla_adapter import VLAAdapterConfig
from vla_adapter_hf.modeling.inputs_vla_adapter import check_preparation
from vla_adapter_hf.modeling.normalization_vla_adapter import (
    normalize,
    select_norm_stats,
)
from vla_adapter_hf.processing.processing_vla_adapter import VLAAdapterProcessor
from vla_adapter_hf.robots import normalized_values, physical_scale


class VLAAdapterDataCollator:
    """Samples of a [`VLAAdapterDataset`] as a batch: prompts and images through the processor, numbers normalised.

    Frames make no JPEG round trip here. At inference it imitates how the training frames were stored.
    Frames that the dataset's `image_transform` has prepared are only normalised. Other frames are resized, and cropped
    if the model has a centre crop: training without augmentation shows the model what it sees at inference.

    Args:
        processor ([`VLAAdapterProcessor`]): of the model.
        config ([`VLAAdapterConfig`]): of the model, with the norm stats of every dataset in the samples.

    Raises:
        ValueError: when the model has no statistics, the processor has other settings than the model, or sizes do not
            fit those of the model.
    """

    def __init__(self, processor: VLAAdapterProcessor, config: VLAAdapterConfig):
        if not config.norm_stats:
            raise ValueError("The model has no norm_stats; load it with norm_stats=dataset.norm_stats.")
        check_preparation(config, processor.describe_preparation())
        self.processor = processor
        self.config = config

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """
        Returns:
            `dict`: `input_ids`, `attention_mask`, `pixel_values`, `proprio` `(batch, proprio_dim)`, `actions`
            `(batch, chunk_size, action_dim)`, `action_is_pad` `(batch, chunk_size)`, and `action_scale`
            `(batch, action_dim)`, the physical units of one normalised unit, and `action_mask` `(batch, action_dim)`,
            true for dimensions that are normalised. The metrics use the last two.

        Raises:
            ValueError: for samples of other sizes than the model's, or frames that were prepared in another way.
        """
        missing = {"images", "text", "state", "actions"} - set(samples[0])
        if missing:
            raise ValueError(
                f"The samples lack {', '.join(sorted(missing))}; they have {', '.join(sorted(samples[0]))}. A plain "
                "Trainer removes what the model's forward does not name: use VLAAdapterTrainingArguments, or set "
                "remove_unused_columns=False."
            )
        prepared = self._are_prepared(samples)
        inputs = self.processor(
            images=[sample["images"] for sample in samples],
            text=[sample["text"] for sample in samples],
            do_jpeg_round_trip=False,
            do_center_crop=self.config.image_center_crop is not None and not prepared,
        )
        del inputs["preparation"]  # checked above, with the options of inference
        normalized = [self._normalize(sample) for sample in samples]
        batch = {name: torch.from_numpy(np.stack(values)) for name, values in _transposed(normalized).items()}
        return {**inputs, **batch}

    def _are_prepared(self, samples: Sequence[Mapping[str, Any]]) -> bool:
        prepared = {bool(sample.get("images_are_prepared", False)) for sample in samples}
        if len(prepared) > 1:
            raise ValueError(
                "Some samples of a batch have an image_transform and some have not; give all datasets one."
            )
        size, crop = self.config.image_size, self.config.image_center_crop
        remedy = "make it with ImageAugmentation.from_model_config(model.config), or ImageResize likewise."
        for sample in samples:
            kept = sample.get("crop_area", crop)
            if (kept or 1) != (crop or 1):
                raise ValueError(
                    f"image_transform has crop_area={kept}, the model has image_center_crop={crop} at inference; "
                    f"{remedy}"
                )
            for frame in sample["images"] if True in prepared else []:
                if frame.shape[:2] != (size, size):
                    raise ValueError(
                        f"image_transform returned frames of {frame.shape[:2]} pixels, the model sees "
                        f"({size}, {size}); {remedy}"
                    )
        return prepared.pop()

    def _normalize(self, sample: Mapping[str, Any]) -> dict[str, np.ndarray]:
        config = self.config
        _, stats = select_norm_stats(config.norm_stats, sample.get("unnorm_key"))
        actions = np.asarray(sample["actions"])
        expected = (config.chunk_size, config.action_dim)
        if actions.shape != expected:
            raise ValueError(
                f"a sample's actions have shape {actions.shape}, the model predicts {expected} (chunk_size, "
                "action_dim)."
            )
        is_pad = np.asarray(sample.get("action_is_pad", np.zeros(config.chunk_size)), dtype=bool)
        rules = (config.norm_type, config.constant_dims)
        return {
            "proprio": normalize(sample["state"], stats["proprio"], *rules).astype(np.float32),
            "actions": normalize(actions, stats["action"], *rules).astype(np.float32),
            "action_is_pad": is_pad,
            "action_scale": physical_scale(stats["action"], config.norm_type).astype(np.float32),
            "action_mask": normalized_values(stats["action"]),
        }


def _transposed(rows: list[dict[str, np.ndarray]]) -> dict[str, list[np.ndarray]]:
    return {name: [row[name] for row in rows] for name in rows[0]}
