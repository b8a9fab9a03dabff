"""`vla-adapter train`: fine-tune on demonstrations and show what was learned."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from accelerate import DistributedType
from huggingface_hub import HfApi
from torch import nn
from transformers import set_seed
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from vla_adapter_hf.checkpoints.checkpoint import Checkpoint
from vla_adapter_hf.checkpoints.model_card import fill_model_card
from vla_adapter_hf.checkpoints.open import open_checkpoint
from vla_adapter_hf.data import VLAAdapterDataset
from vla_adapter_hf.data.augmentation import DEFAULT_CROP_AREA
from vla_adapter_hf.modeling.configuration_vla_adapter import VLAAdapterConfig
from vla_adapter_hf.processing.processing_vla_adapter import VLAAdapterProcessor
from vla_adapter_hf.robots import get_robot
from vla_adapter_hf.training.arguments import DataArguments, ModelArguments
from vla_adapter_hf.training.checkpoints import CARD
from vla_adapter_hf.training.collator import VLAAdapterDataCollator
from vla_adapter_hf.training.demonstrations import (
    Demonstrations,
    check_camera_order,
    load_data,
    wants_round_trip,
)
from vla_adapter_hf.training.looking import LookingCallback
from vla_adapter_hf.training.metrics import make_compute_metrics
from vla_adapter_hf.training.presets import apply_preset, check_preset, merge_lora
from vla_adapter_hf.training.probing import choose_samples
from vla_adapter_hf.training.resuming import (
    check_same_run,
    find_checkpoint,
    keep_arguments,
    kept_start_commit,
    run_arguments,
)
from vla_adapter_hf.training.trainer import VLAAdapterTrainer, VLAAdapterTrainingArguments
from vla_adapter_hf.utils.files import write_json, write_text
from vla_adapter_hf.utils.plotting import new_figure, plot_chunks, plot_training, save_figure


# The weights of a saved model, whole or in shards.
WEIGHT_FILES = "model*.safetensors*"


def train(
    model_arguments: ModelArguments,
    data_arguments: DataArguments,
    training_arguments: VLAAdapterTrainingArguments,
    report_progress: Callable[[str], None] = print,
) -> dict[str, float]:
    """Fine-tune a checkpoint on demonstrations.

    The output folder ends up holding the trained model (merged, with processor and model card), `training.png` with
    the loss, `chunks.png` with predicted and recorded actions, and `metrics.json`. An interrupted run goes on where it
    was with `resume_from_checkpoint=True`. With `push_to_hub` all but the checkpoints is uploaded at the end;
    `hub_strategy` decides whether and when these are as well.

    Returns:
        `dict[str, float]`: the metrics of training and of the last evaluation.

    Raises:
        ValueError: when data, checkpoint and arguments do not fit together, before weights are loaded; when the frozen
            weights of a resumed adapter have changed, before the first step.
        ImportError: when PEFT or matplotlib is missing, before anything is read.
    """
    _check_requirements(model_arguments, training_arguments)
    output = Path(training_arguments.output_dir)
    resume_from = find_checkpoint(training_arguments, report_progress)
    set_seed(training_arguments.seed)

    report_progress(f"Reading {', '.join(data_arguments.dataset)}")
    arguments = run_arguments(model_arguments, data_arguments, training_arguments.seed)
    commit = None if resume_from is None else kept_start_commit(resume_from, arguments)
    start = open_checkpoint(model_arguments.checkpoint, revision=commit, **model_arguments.layout())
    progress = None if training_arguments.process_index == 0 else False
    demonstrations = load_data(data_arguments, start.config, training_arguments.seed, progress)
    fields = config_overrides(model_arguments, data_arguments, start.config, demonstrations)
    report_progress(f"  {len(demonstrations.train)} samples, statistics of {', '.join(demonstrations.norm_stats)}")
    if resume_from is not None:
        check_same_run(resume_from, arguments, fields)
    if training_arguments.process_index == 0:
        keep_arguments(arguments, demonstrations.held_out, start.commit, output)

    report_progress(f"Loading {model_arguments.checkpoint}")
    model, processor = load_start(start, model_arguments, fields)
    trained = apply_preset(model, model_arguments.preset, model_arguments.lora_rank)
    count = sum(parameter.numel() for parameter in trained.parameters() if parameter.requires_grad)
    report_progress(f"  preset {model_arguments.preset}: {count / 1e6:.2f} M parameters train")

    trainer = VLAAdapterTrainer(
        model=trained,
        args=training_arguments,
        train_dataset=demonstrations.train,
        eval_dataset=demonstrations.validation,
        data_collator=VLAAdapterDataCollator(processor, model.config),
        compute_metrics=make_compute_metrics(model.config),
        describe=lambda step: describe_run(model_arguments, data_arguments, demonstrations, output, step),
    )
    if data_arguments.check_every is not None:
        probe = choose_samples(demonstrations.parts, data_arguments.check_samples, training_arguments.seed)
        trainer.add_callback(LookingCallback(trainer, probe, model.config, data_arguments.check_every))
    if training_arguments.fsdp and trainer.accelerator.distributed_type != DistributedType.FSDP:
        raise ValueError("fsdp was asked for, but accelerate shards on accelerators only and would ignore it here.")
    result = trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
    metrics = {**result.metrics, **(trainer.evaluate() if demonstrations.validation is not None else {})}
    if trainer.is_world_process_zero():
        report_progress("Saving")
        write_results(trainer, metrics, demonstrations, data_arguments.picture_episodes)
        if training_arguments.push_to_hub:
            upload(output, trainer.hub_model_id, training_arguments)
            report_progress(f"Uploaded to {trainer.hub_model_id}")
        report_progress(f"Done: {output} (model, metrics.json, training.png, chunks.png)")
    return metrics


def _check_requirements(model: ModelArguments, training: VLAAdapterTrainingArguments) -> None:
    """What would stop the training later is found before any work."""
    check_preset(model.preset)
    new_figure()  # raises without matplotlib
    if training.fsdp and model.preset.startswith("lora"):
        raise ValueError(
            f"preset={model.preset} does not go with fsdp: checkpoints hold the merged weights, which no process has "
            "whole. The adapter is small: use several processes without fsdp, or preset=full."
        )
    if training.fsdp and training.world_size > 1:
        raise ValueError(
            f"fsdp={training.fsdp} in {training.world_size} processes: the result and its pictures could not be "
            "written at the end, because no process has the whole model. Leave fsdp out, or train with "
            "VLAAdapterTrainer in a script of your own and save with trainer.save_model."
        )


def config_overrides(
    model_arguments: ModelArguments, data_arguments: DataArguments, config: VLAAdapterConfig, data: Demonstrations
) -> dict[str, Any]:
    """Fields of the start checkpoint's configuration that the demonstrations decide.

    Raises:
        ValueError: cameras in another order than the start checkpoint's.
    """
    dataset = data.parts[0]
    cameras = dataset.camera_names
    check_camera_order(cameras, config, model_arguments.checkpoint)
    norm_type = model_arguments.norm_type
    if norm_type is None and data_arguments.robot is not None:
        norm_type = get_robot(data_arguments.robot).norm_type
    return {
        "cameras": cameras,
        "chunk_size": dataset.chunk_size,
        "action_dim": dataset.action_dim,
        "proprio_dim": dataset.state_dim,
        "action_names": _names(dataset.action_names, dataset.action_dim),
        "state_names": _names(dataset.state_names, dataset.state_dim),
        "fps": _frame_rate(data.parts),
        "norm_stats": data.norm_stats,
        "norm_type": norm_type or config.norm_type,
        # The published split of the states at 512 is what two cameras' weights mean. With another number of cameras
        # there are no such weights, and the split is where the patches end.
        "policy_task_tokens": config.policy_task_tokens if len(cameras) == config.num_cameras else None,
        # With statistics of its own the model follows the rule that is the same in training and at inference.
        "constant_dims": "zero",
        "image_center_crop": (config.image_center_crop or DEFAULT_CROP_AREA) if data_arguments.augment else None,
        "image_jpeg_round_trip": wants_round_trip(data_arguments.jpeg_round_trip, data.parts),
    }


def _names(names: Sequence[str] | None, size: int) -> list[str] | None:
    """Names of a dataset's values, if the robot's conventions have left their number as it was."""
    return list(names) if names is not None and len(names) == size else None


def _frame_rate(datasets: list[VLAAdapterDataset]) -> float | None:
    """Actions per second, if all datasets have the same rate.

    The actions of a stored chunk may be closer together than the dataset's rows.
    """
    rates = {dataset.fps if dataset.reader.chunk_shape is None else None for dataset in datasets}
    return rates.pop() if len(rates) == 1 else None


def load_start(
    start: Checkpoint, arguments: ModelArguments, fields: dict[str, Any]
) -> tuple[nn.Module, VLAAdapterProcessor]:
    """The start checkpoint with other fields, and its tokenizer and prompt with the new image preparation.

    Layers whose sizes follow from the robot are new where the sizes differ.
    """
    before = start.load_processor()
    changes_sizes = any(fields[name] != getattr(start.config, name) for name in ("action_dim", "proprio_dim"))
    model = open_checkpoint(arguments.checkpoint, revision=start.commit, **arguments.layout(), **fields).load_model(
        arguments.dtype,
        attn_implementation=arguments.attn_implementation,
        ignore_mismatched_sizes=changes_sizes,
    )
    # Older checkpoints record these with the processor only.
    model.config.prompt_style = before.prompt_style
    model.config.tokenizer_fingerprint = before.tokenizer_fingerprint
    return model, VLAAdapterProcessor.from_model_config(model.config, before.tokenizer)


def describe_run(
    model: ModelArguments, data: DataArguments, demonstrations: Demonstrations, output: Path, step: int
) -> dict[str, Any]:
    """Arguments of the model card after some steps."""
    datasets = ", ".join(f"`{Path(name).name}`" for name in data.dataset)
    start = f"Fine-tuned from `{Path(model.checkpoint).name}` on {datasets}"
    return {
        "title": output.name,
        "summary": f"{start}, preset `{model.preset}`, {step} steps.",
        "base_model": [model.checkpoint],
        "datasets": data.dataset,
        "instruction": demonstrations.parts[0].get(0, load_images=False)["text"],
    }


def write_results(
    trainer: VLAAdapterTrainer, metrics: dict[str, float], demonstrations: Demonstrations, episodes: int
) -> None:
    """The trained model, its metrics and the pictures, in the output folder."""
    output = Path(trainer.args.output_dir)
    model = merge_lora(trainer.accelerator.unwrap_model(trainer.model))
    callback, state = trainer.checkpoint_callback, trainer.state
    # The weights are those of the best checkpoint if it was loaded.
    is_best = trainer.args.load_best_model_at_end and state.best_model_checkpoint is not None
    step = state.best_global_step if is_best else state.global_step
    save_trained(model, callback.processor, output, callback.card(output, step))
    write_json(output / "metrics.json", metrics)
    save_figure(plot_training(trainer.state.log_history), output / "training.png")
    save_figure(plot_chunks(model, callback.processor, demonstrations.parts, episodes), output / "chunks.png")


def save_trained(model: nn.Module, processor: VLAAdapterProcessor, output: Path, card: dict[str, Any]) -> None:
    """The trained, merged model in the output folder: written to a folder of its own, then moved file by file."""
    with tempfile.TemporaryDirectory(prefix=".model-", dir=output) as whole:
        model.save_pretrained(whole)
        processor.save_pretrained(whole)
        write_text(Path(whole) / CARD, fill_model_card(model.config, **card))
        written = list(Path(whole).iterdir())
        for path in written:
            path.replace(output / path.name)
    # `push_to_hub` has put the weights of a checkpoint here, in other files than the merged ones.
    for path in set(output.glob(WEIGHT_FILES)) - {output / path.name for path in written}:
        path.unlink()


def upload(output: Path, repo_id: str, arguments: VLAAdapterTrainingArguments) -> None:
    """The output folder to the Hub, without its checkpoints, by the `hub_` arguments.

    Weights that were pushed during the training, in other files, are deleted there.
    """
    HfApi().upload_folder(
        repo_id=repo_id,
        folder_path=output,
        commit_message="End of training",
        token=arguments.hub_token,
        revision=getattr(arguments, "hub_revision", None),
        ignore_patterns=["_*", ".*", f"{PREFIX_CHECKPOINT_DIR}-*"],
        delete_patterns=[WEIGHT_FILES],
    )
