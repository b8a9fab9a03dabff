"""A program over the public names, which mypy must understand from the installed package. It is never run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from typing_extensions import assert_type

import vla_adapter_hf as vla


def describe(config: vla.VLAAdapterConfig) -> str:
    assert_type(config.chunk_size, int)
    assert_type(config.action_dim, int)
    assert_type(vla.__version__, str)
    return f"{config.num_cameras} cameras, {config.num_patches} patches"


def robot(name: str) -> vla.RobotPreset:
    assert_type(vla.get_robot(name), vla.RobotPreset)
    assert_type(vla.ROBOTS, dict[str, vla.RobotPreset])
    return vla.ROBOTS[name]


def predict(folder: Path, frames: list[np.ndarray], state: np.ndarray) -> np.ndarray:
    model: vla.VLAAdapterForActionPrediction = vla.VLAAdapterForActionPrediction.from_pretrained(str(folder))
    processor = vla.VLAAdapterProcessor.from_model_config(model.config, None)
    assert_type(processor, vla.VLAAdapterProcessor)
    images: vla.VLAAdapterImageProcessor = processor.image_processor
    print(images)
    compiled: vla.VLAAdapterForActionPrediction = model.compile_for_inference()
    actions = compiled.predict_action(**processor(images=frames, text="pick up the milk", state=state))
    return np.asarray(actions)


def train(
    folder: Path, model: vla.VLAAdapterForActionPrediction, processor: vla.VLAAdapterProcessor
) -> torch.nn.Module:
    transform = vla.ImageAugmentation(224)
    dataset = vla.VLAAdapterDataset.from_lerobot(folder, ["front", "wrist"], 8, image_transform=transform)
    assert_type(dataset, vla.VLAAdapterDataset)
    training, held_out = dataset.split_by_episode(1, validation_transform=vla.ImageResize(224))
    mixture = vla.VLAAdapterMixture([training, dataset], [1.0, 0.5])
    trainer = vla.VLAAdapterTrainer(
        vla.apply_preset(model, "frozen"),
        vla.VLAAdapterTrainingArguments("out", early_stopping_patience=3),
        vla.VLAAdapterDataCollator(processor, model.config),
        mixture,
        held_out,
        compute_metrics=vla.make_compute_metrics(model.config),
    )
    trainer.train()
    return vla.merge_lora(model)


def first_sample(folder: Path, cameras: Sequence[str]) -> dict[str, Any]:
    for sample in vla.VLAAdapterStreamingDataset.from_lerobot(folder, cameras):
        return dict(sample)
    raise ValueError("no sample")


def forward(model: vla.VLAAdapterForActionPrediction, batch: dict[str, torch.Tensor]) -> torch.Tensor | None:
    output: vla.VLAAdapterOutput = model(**batch)
    return output.loss


def options() -> list[Any]:
    return [vla.quantization_config("int8"), vla.CheckpointCallback, vla.open_checkpoint]
