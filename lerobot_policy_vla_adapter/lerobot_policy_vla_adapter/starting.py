"""From a checkpoint and a LeRobot dataset to a model that is ready to be trained, as `vla-adapter train` does it."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from torch import nn

from vla_adapter_hf.checkpoints.checkpoint import Checkpoint
from vla_adapter_hf.checkpoints.lerobot.checkpoint import LeRobotCheckpoint
from vla_adapter_hf.checkpoints.published.checkpoint import PublishedCheckpoint
from vla_adapter_hf.modeling.modeling_vla_adapter import VLAAdapterForActionPrediction
from vla_adapter_hf.processing.processing_vla_adapter import VLAAdapterProcessor
from vla_adapter_hf.training.arguments import DataArguments, ModelArguments
from vla_adapter_hf.training.demonstrations import load_data
from vla_adapter_hf.training.presets import ADAPTER_NAME, apply_preset, check_merged
from vla_adapter_hf.training.train import config_overrides, load_start

from .command_line import given_episodes, given_rename_map
from .configuration_vla_adapter import VLAAdapterConfig


# Weights, statistics and processors follow these options. After the training, another value would have no effect.
FIXED_OPTIONS = ("robot", "cameras", "chunk_size", "norm_type", "action_mask", "jpeg_round_trip")


def load_for_training(
    source: str, config: VLAAdapterConfig, dataset_meta: Any, revision: str | None = None
) -> tuple[nn.Module, VLAAdapterProcessor]:
    """The model with the dataset's sizes, cameras and statistics, and the preset applied.

    A checkpoint that LeRobot wrote while it trained on the same dataset is gone on with: with LoRA, the adapter is
    loaded, and the frozen weights come from where that training began. `config` gets the model's configuration and
    the origin of the weights.

    Args:
        source: folder or Hub id of the checkpoint.
        config ([`VLAAdapterConfig`]): of the policy; is changed.
        dataset_meta (`LeRobotDatasetMetadata`): of the dataset.
        revision: of the checkpoint on the Hub.

    Returns:
        the model, for LoRA a `PeftModel` around it, and its processor.

    Raises:
        ValueError: when checkpoint, dataset and options do not fit together, before weights are loaded; or when the
            frozen weights of a training with LoRA have changed.
    """
    start = config.open_start(source, revision)
    model_arguments, data_arguments = arguments_of(source, config, start, dataset_meta)
    demonstrations = load_data(data_arguments, start.config, config.augmentation_seed)
    demonstrations.norm_stats = {dataset_name(dataset_meta): entry for entry in demonstrations.norm_stats.values()}
    fields = json.loads(json.dumps(config_overrides(model_arguments, data_arguments, start.config, demonstrations)))
    goes_on = isinstance(start, LeRobotCheckpoint) and goes_on_with(start, config, fields)
    if not goes_on:
        config.base_checkpoint, config.base_revision = without_links(source), start.commit
        config.trained_batches = 0
    config.unnorm_key = None  # from now on the dataset's statistics are the only ones
    merged = None
    if goes_on and config.preset == "lora":
        merged, adapter = start, adapter_folder(start)
        start = config.open_start(str(config.base_checkpoint), config.base_revision)
    model_arguments.checkpoint = start.source
    model_arguments.start_robot = config.start_robot if isinstance(start, PublishedCheckpoint) else None
    model, processor = load_start(start, model_arguments, fields)
    config.model = stored_config(model)
    config.use_features_of_model()
    trained = apply_preset(model, config.preset, config.lora_rank)
    if merged is not None:
        trained.load_adapter(str(adapter), ADAPTER_NAME, is_trainable=True)
        check_merged(
            trained,
            merged.load_model("float32").state_dict(),  # mapped, and not copied
            adapter=merged.source,
            base=str(config.base_checkpoint),
            remedy=f"begin a new training with the merged ones: vla-adapter from-lerobot {merged.source} START, and "
            "--policy.type=vla_adapter --policy.pretrained_path=START",
        )
    return trained, processor


def arguments_of(
    source: str, config: VLAAdapterConfig, start: Checkpoint, dataset_meta: Any
) -> tuple[ModelArguments, DataArguments]:
    """The arguments of `vla-adapter train` that the policy's options stand for."""
    robot = None if config.robot == "none" else config.robot
    cameras = config.cameras
    if cameras is None and robot is None:
        cameras = list(start.config.cameras)
    model = ModelArguments(
        checkpoint=source,
        preset=config.preset,
        lora_rank=config.lora_rank,
        norm_type=config.norm_type,
    )
    data = DataArguments(
        dataset=[str(dataset_meta.root)],
        format="lerobot",
        robot=robot,
        cameras=cameras,
        chunk_size=config.chunk_size,
        # LeRobot pads the chunks at an episode's end, and cuts them from consecutive rows.
        pad_chunks=True,
        chunk_column="none",
        episodes=given_episodes(),
        augment=config.augment,
        jpeg_round_trip=config.jpeg_round_trip,
        action_mask=None if config.action_mask is None else [str(entry) for entry in config.action_mask],
    )
    return model, data


def check_fixed_options(config: VLAAdapterConfig, start: Checkpoint) -> None:
    """Compare options that only a training can change with those that the checkpoint was trained with.

    A checkpoint of another layout has no robot of its own: `robot` is free there.

    Raises:
        ValueError: an option differs.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    stored = start.policy if isinstance(start, LeRobotCheckpoint) else {"robot": config.robot}
    of_model = {name: getattr(start.config, name) for name in ("cameras", "chunk_size", "norm_type")}
    of_model["jpeg_round_trip"] = "yes" if start.config.image_jpeg_round_trip else "no"
    for name in FIXED_OPTIONS:
        given, default, kept = getattr(config, name), defaults[name], stored.get(name, defaults[name])
        if name == "robot":
            given, default, kept = given or "none", default or "none", kept or "none"
        trained = of_model.get(name, kept)
        if given not in (kept, trained):
            remedy = "Name it with --policy.path, which takes its options along"
            if given != default:
                remedy = "Leave the option out"
            raise ValueError(
                f"policy.{name}={given!r} would have no effect: {start.source} was trained with {trained!r}, and only "
                f"a training can change it. {remedy}."
            )


def refuse_rename_map() -> None:
    """In training LeRobot hands `--rename_map` only to processors that it reads from a file.

    Raises:
        ValueError: it was given.
    """
    if given_rename_map():
        raise ValueError("--rename_map has no effect in training; name the dataset's cameras with --policy.cameras.")


def dataset_name(dataset_meta: Any) -> str:
    """The key of the dataset's statistics. The folder may be named after a commit."""
    return str(dataset_meta.repo_id).rsplit("/", 1)[-1]


def goes_on_with(start: LeRobotCheckpoint, config: VLAAdapterConfig, fields: dict[str, Any]) -> bool:
    """Whether a training on the same dataset goes on from its own checkpoint.

    Raises:
        ValueError: the checkpoint was trained on a dataset of this name with other statistics.
    """
    stored = json.loads(json.dumps(start.policy["model"]))
    before, now = stored.get("norm_stats") or {}, fields["norm_stats"]
    if not set(before) & set(now) or config.base_checkpoint is None:
        return False
    differing = [name for name, value in fields.items() if stored.get(name) != value]
    if differing:
        raise ValueError(
            f"{start.source} was trained on {', '.join(now)} with other values of {', '.join(differing)}: the dataset "
            "or the options have changed. A training cannot go on like this. To begin a new one with these weights: "
            f"vla-adapter from-lerobot {start.source} START, and --policy.type=vla_adapter "
            "--policy.pretrained_path=START."
        )
    return True


def adapter_folder(start: LeRobotCheckpoint) -> Path:
    """Where a checkpoint has its LoRA adapter.

    Raises:
        ValueError: it has none.
    """
    files = start.files.subfolder(ADAPTER_NAME)
    names = [name for name in files.names if name.startswith("adapter_")]
    if "adapter_config.json" not in names:
        raise ValueError(f"{start.source} has no {ADAPTER_NAME}/ to go on with; policy.preset was not lora then.")
    return files.paths(names)[0].parent


def without_links(source: str) -> str:
    """The source of a checkpoint as it can be found again. LeRobot moves its link `last` to newer checkpoints."""
    if not Path(source).exists():
        return source  # on the Hub, or the embedded one
    folder = os.path.realpath(source)
    return folder if os.path.isabs(source) else os.path.relpath(folder)


def stored_config(model: VLAAdapterForActionPrediction) -> dict[str, Any]:
    """The content of the `config.json` that `save_pretrained` of the model writes."""
    return json.loads(model.config.to_json_string())


__all__ = ["load_for_training"]
