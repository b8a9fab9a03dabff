"""`vla-adapter train`: fine-tune on demonstrations and show what was learned."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType
from huggingface_hub import HfApi
from torch import nn
from transformers import set_seed
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from vla_adapter_hf.checkpoints.checkpoint import Checkpoint
from vla_adapter_hf.checkpoints.model_card import fill_model_card
from vla_adapter_hf.checkpoints.open import open_checkpoint
from vla_adapter_hf.data import (
    ImageAugmentation,
    ImageResize,
    VLAAdapterDataset,
    VLAAdapterMixture,
    load_demonstrations,
)
from vla_adapter_hf.modeling.configuration_vla_adapter import VLAAdapterConfig
from vla_adapter_hf.processing.processing_vla_adapter import VLAAdapterProcessor
from vla_adapter_hf.robots import get_robot
from vla_adapter_hf.training.arguments import DataArguments, ModelArguments
from vla_adapter_hf.training.collator import VLAAdapterDataCollator
from vla_adapter_hf.training.metrics import make_compute_metrics
from vla_adapter_hf.training.presets import ADAPTER_NAME, apply_preset, merge_lora
from vla_adapter_hf.training.trainer import (
    CARD,
    CheckpointCallback,
    VLAAdapterTrainer,
    VLAAdapterTrainingArguments,
    is_finished,
    last_finished_checkpoint,
)
from vla_adapter_hf.utils.plotting import plot_chunks, plot_training, save_figure


@dataclass
class Demonstrations:
    """Training and validation parts of one or several datasets, and what they say about the robot."""

    train: VLAAdapterDataset | VLAAdapterMixture
    validation: torch.utils.data.Dataset | None
    parts: list[VLAAdapterDataset]
    """The validation part of each dataset, or the whole of it where nothing is held out; for the pictures."""
    norm_stats: dict[str, Any]


def train(
    model_arguments: ModelArguments,
    data_arguments: DataArguments,
    training_arguments: VLAAdapterTrainingArguments,
    say: Callable[[str], None] = print,
) -> dict[str, float]:
    """Fine-tune a checkpoint on demonstrations.

    The output folder ends up holding the trained model (merged, with processor and model card), `training.png` with the
    loss, `chunks.png` with predicted beside recorded actions, and `metrics.json`. A run that was interrupted goes on where
    it was with `resume_from_checkpoint=True`. With `push_to_hub` all but the checkpoints is uploaded at the end; whether these
    are as well, and when, is up to `hub_strategy`.

    Returns:
        `dict[str, float]`: the metrics of training and of the last evaluation.

    Raises:
        ValueError: when data, checkpoint and arguments do not fit together, before weights are loaded.
    """
    if training_arguments.fsdp and model_arguments.preset.startswith("lora"):
        raise ValueError(
            f"preset={model_arguments.preset!r} does not go with fsdp: checkpoints hold the merged weights, which no "
            "process has whole. The adapter is small: use several processes without fsdp, or preset=full."
        )
    output = Path(training_arguments.output_dir)
    resume_from = _checkpoint_to_resume(training_arguments, say)
    set_seed(training_arguments.seed)

    say(f"Reading {', '.join(data_arguments.dataset)}")
    checkpoint = open_checkpoint(model_arguments.checkpoint, **_layout(model_arguments))
    config = checkpoint.config
    demonstrations = load_data(data_arguments, config, training_arguments.seed)
    overrides = config_overrides(model_arguments, data_arguments, config, demonstrations)
    say(f"  {len(demonstrations.train)} samples, statistics of {', '.join(demonstrations.norm_stats)}")

    say(f"Loading {model_arguments.checkpoint}")
    model = open_checkpoint(
        model_arguments.checkpoint, revision=checkpoint.commit, **overrides, **_layout(model_arguments)
    ).load_model(
        dtype=model_arguments.dtype,
        attn_implementation=model_arguments.attn_implementation,
        ignore_mismatched_sizes=_changes_sizes(config, overrides),
    )
    processor = make_processor(checkpoint, model.config)
    trained = apply_preset(model, model_arguments.preset, model_arguments.lora_rank)
    count = sum(parameter.numel() for parameter in trained.parameters() if parameter.requires_grad)
    say(f"  preset {model_arguments.preset}: {count / 1e6:.2f} M parameters train")

    def describe(step: int) -> dict[str, str]:
        names = ", ".join(f"`{Path(name).name}`" for name in data_arguments.dataset)
        return {
            "title": output.name,
            "summary": f"Fine-tuned from `{Path(model_arguments.checkpoint).name}` on {names}, preset "
            f"`{model_arguments.preset}`, {step} steps.",
        }

    trainer = VLAAdapterTrainer(
        model=trained,
        args=training_arguments,
        train_dataset=demonstrations.train,
        eval_dataset=demonstrations.validation,
        data_collator=VLAAdapterDataCollator(processor, model.config),
        compute_metrics=make_compute_metrics(model.config),
        callbacks=[CheckpointCallback(processor, describe)],
    )
    if training_arguments.fsdp and trainer.accelerator.distributed_type != DistributedType.FSDP:
        raise ValueError("fsdp was asked for, but accelerate shards on accelerators only and would ignore it here.")
    result = trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
    metrics = {**result.metrics, **(trainer.evaluate() if demonstrations.validation is not None else {})}

    if trainer.is_world_process_zero():
        say("Saving")
        final = merge_lora(trainer.accelerator.unwrap_model(trainer.model))
        save_trained(final, processor, output, describe(trainer.state.global_step))
        (output / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
        save_figure(plot_training(trainer.state.log_history), output / "training.png")
        figure = plot_chunks(final, processor, demonstrations.parts, data_arguments.picture_episodes)
        save_figure(figure, output / "chunks.png")
        if training_arguments.push_to_hub:
            upload(output, trainer.hub_model_id, training_arguments)
            say(f"Uploaded to {trainer.hub_model_id}")
        say(f"Done: {output} (model, metrics.json, training.png, chunks.png)")
    return metrics


def load_data(arguments: DataArguments, config: VLAAdapterConfig, seed: int) -> Demonstrations:
    """Open the datasets and hold out what is to be held out."""
    if arguments.augment:
        transform = ImageAugmentation(config.image_size, seed, crop_area=config.image_center_crop or 0.9)
    else:
        transform = ImageResize(config.image_size)
    # As at inference: a model trained with crops looks at the centre.
    steady = ImageResize(config.image_size, transform.crop_area if arguments.augment else None)
    options = {
        "format": arguments.format,
        "cameras": arguments.cameras,
        "chunk_size": arguments.chunk_size or config.chunk_size,
        "robot": arguments.robot,
        "pad_chunks": arguments.pad_chunks,
        "on_bad_episode": arguments.on_bad_episode,
        "image_transform": transform,
        **arguments.reader_options(),
    }
    datasets = [load_demonstrations(path, **options) for path in arguments.dataset]
    trains, validations = datasets, []
    if arguments.validation:
        share = int(arguments.validation) if arguments.validation >= 1 else arguments.validation
        pairs = [dataset.split_by_episode(share, seed, steady) for dataset in datasets]
        trains, validations = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    if len(trains) == 1 and arguments.weights is None:
        train = trains[0]
    else:
        train = VLAAdapterMixture(trains, arguments.weights, seed=seed)
    validation = None
    if validations:
        validation = validations[0] if len(validations) == 1 else torch.utils.data.ConcatDataset(validations)
    unseen = validations or [dataset.select_episodes(dataset.episode_indices, steady) for dataset in datasets]
    norm_stats = {key: entry for dataset in datasets for key, entry in dataset.norm_stats.items()}
    return Demonstrations(train, validation, unseen, norm_stats)


def config_overrides(
    model_arguments: ModelArguments, data_arguments: DataArguments, config: VLAAdapterConfig, data: Demonstrations
) -> dict[str, Any]:
    """Fields of the start checkpoint's configuration that the demonstrations decide."""
    dataset = data.parts[0]
    norm_type = model_arguments.norm_type
    if norm_type is None and data_arguments.robot is not None:
        norm_type = get_robot(data_arguments.robot).norm_type
    return {
        "cameras": dataset.camera_names,
        "chunk_size": dataset.chunk_size,
        "action_dim": dataset.action_dim,
        "proprio_dim": dataset.state_dim,
        "norm_stats": data.norm_stats,
        "norm_type": norm_type or config.norm_type,
        # The published split of the states at 512 is what two cameras' weights mean. With another number of them there are
        # no such weights, and the split goes where the patches end.
        "policy_task_tokens": config.policy_task_tokens if len(dataset.cameras) == config.num_cameras else None,
        # With statistics of its own the model follows the rule that is the same on both sides.
        "constant_dims": "zero",
        "image_center_crop": (config.image_center_crop or 0.9) if data_arguments.augment else None,
        "image_jpeg_round_trip": _wants_round_trip(data_arguments.jpeg_round_trip, data.parts),
    }


def make_processor(checkpoint: Checkpoint, config: VLAAdapterConfig) -> VLAAdapterProcessor:
    """The start checkpoint's tokenizer and prompt, with the new model's cameras, sizes and image preparation."""
    start = checkpoint.load_processor()
    processor = VLAAdapterProcessor.from_model_config(config, start.tokenizer, start.prompt_style)
    if config.prompt_style is None:  # as in older checkpoints
        config.prompt_style = processor.prompt_style
    return processor


def save_trained(model: nn.Module, processor: VLAAdapterProcessor, output: Path, card: dict[str, str]) -> None:
    """The trained model, merged, in the output folder itself: written beside, then moved file by file."""
    with tempfile.TemporaryDirectory(prefix=".model-", dir=output) as partial:
        model.save_pretrained(partial)
        processor.save_pretrained(partial)
        (Path(partial) / CARD).write_text(fill_model_card(model.config, **card), encoding="utf-8")
        written = list(Path(partial).iterdir())
        for path in written:
            path.replace(output / path.name)
    # Weights that `push_to_hub` put here out of a checkpoint, in other files than the merged ones.
    for path in set(output.glob("model*.safetensors*")) - {output / path.name for path in written}:
        path.unlink()


def upload(output: Path, repo_id: str, arguments: VLAAdapterTrainingArguments) -> None:
    """The output folder to the Hub, without its checkpoints, by the `hub_` arguments."""
    HfApi().upload_folder(
        repo_id=repo_id,
        folder_path=output,
        commit_message="End of training",
        token=arguments.hub_token,
        revision=getattr(arguments, "hub_revision", None),
        ignore_patterns=["_*", f"{PREFIX_CHECKPOINT_DIR}-*"],
    )


def _checkpoint_to_resume(arguments: VLAAdapterTrainingArguments, say: Callable[[str], None]) -> Path | None:
    """What `--resume_from_checkpoint` means: a folder, or `true` for the last finished checkpoint."""
    output, wanted = Path(arguments.output_dir), str(arguments.resume_from_checkpoint or "")
    found = last_finished_checkpoint(output)
    if wanted.lower() in ("", "false"):
        if found is not None:
            raise ValueError(
                f"output_dir={output} holds {found.name}. Go on with --resume_from_checkpoint true, or name a new folder."
            )
        return None
    if wanted.lower() != "true":
        return Path(wanted)
    unfinished = [path.name for path in output.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if not is_finished(path)]
    if unfinished:
        say(f"Passing over what was cut short: {', '.join(sorted(unfinished))}")
    say(f"Resuming from {found.name}" if found else "No finished checkpoint to resume from, starting anew")
    return found


def _layout(arguments: ModelArguments) -> dict[str, str]:
    return {} if arguments.start_robot is None else {"robot": arguments.start_robot}


def _changes_sizes(config: VLAAdapterConfig, overrides: dict[str, Any]) -> bool:
    """Whether layers of the start checkpoint do not fit the robot and start anew."""
    return any(overrides[name] != getattr(config, name) for name in ("action_dim", "proprio_dim"))


def _wants_round_trip(choice: str, datasets: list[VLAAdapterDataset]) -> bool:
    if choice not in ("auto", "yes", "no"):
        raise ValueError(f"jpeg_round_trip must be auto, yes or no, got {choice!r}.")
    if choice != "auto":
        return choice == "yes"
    recorded = {dataset.source.frames_are_jpeg() for dataset in datasets}
    if len(recorded) > 1:
        raise ValueError("jpeg_round_trip: some datasets hold JPEG frames and some do not; choose yes or no.")
    return recorded.pop()


__all__ = ["ADAPTER_NAME", "train"]
