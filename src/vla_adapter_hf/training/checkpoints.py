"""Checkpoints of a training: complete for transformers' Auto classes, and found again for resuming."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from vla_adapter_hf.checkpoints.files import safetensors_shapes
from vla_adapter_hf.checkpoints.model_card import fill_model_card
from vla_adapter_hf.processing.processing_vla_adapter import VLAAdapterProcessor
from vla_adapter_hf.training.presets import ADAPTER_NAME, merged_state_dict
from vla_adapter_hf.utils.files import write_text


CARD = "README.md"
TRAINER_STATE = "trainer_state.json"


class CheckpointCallback(TrainerCallback):
    """Completes every checkpoint of a Trainer: whichever preset trains, `AutoModel` and `AutoProcessor` load it.

    [`VLAAdapterTrainer`] has one of its own. With a plain Trainer, pass it in `callbacks`. A plain Trainer calls it
    after it has removed older checkpoints (`save_total_limit`), [`VLAAdapterTrainer`] before.

    With LoRA the merged model is written next to the adapter. It is written in shards: from a single
    `model.safetensors` the Trainer would resume, where only the adapter will do.

    With `push_to_hub` the upload is complete too: the output folder, which gets the checkpoint's weights from the
    Trainer, also gets its processor, code and model card.

    It also sets the dataset's epoch, for the draws of the augmentation: accelerate leaves that out with several
    processes, and after resuming in the middle of an epoch.

    Args:
        processor ([`VLAAdapterProcessor`]): is saved with the model.
        describe (`Callable`, *optional*): gives arguments of [`fill_model_card`] at a step.
    """

    def __init__(self, processor: VLAAdapterProcessor, describe: Callable[[int], dict[str, Any]] | None = None):
        self.processor = processor
        self.describe = describe

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs
    ) -> None:
        if getattr(model, "active_adapter", None) == "default":
            raise ValueError(
                'An adapter named "default" is saved where AutoModel would take it for the whole checkpoint; name it: '
                f'get_peft_model(..., adapter_name="{ADAPTER_NAME}"), or use apply_preset.'
            )

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, train_dataloader: Any, **kwargs
    ) -> None:
        dataset = getattr(train_dataloader, "dataset", None)
        if hasattr(dataset, "set_epoch"):
            dataset.set_epoch(int(state.epoch))

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs
    ) -> None:
        folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if state.is_world_process_zero and not _has_card(folder):
            self.complete(folder, model, state.global_step)

    def on_push_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs
    ) -> None:
        output = Path(args.output_dir)
        checkpoint = output / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if not checkpoint.is_dir():
            return  # the Trainer saves the whole model where it is pushed from
        if not _has_card(checkpoint):
            self.complete(checkpoint, model, state.global_step)
        self.processor.save_pretrained(output)
        for path in [*checkpoint.glob("*.py"), checkpoint / CARD]:
            shutil.copy(path, output / path.name)

    def complete(self, folder: Path, model: nn.Module, step: int) -> None:
        """Add to what the Trainer saved whatever is missing to load and understand it."""
        if hasattr(model, "get_base_model"):
            base, state_dict = model.get_base_model(), merged_state_dict(model)
            sizes = [tensor.numel() * tensor.element_size() for tensor in state_dict.values()]
            base.save_pretrained(folder, state_dict=state_dict, max_shard_size=max(sum(sizes) // 2, max(sizes)))
        else:
            base = model
        self.processor.save_pretrained(folder)
        write_text(folder / CARD, fill_model_card(base.config, **self.card(folder, step)))

    def card(self, folder: Path, step: int) -> dict[str, Any]:
        """Arguments of [`fill_model_card`] at a step."""
        if self.describe is not None:
            return self.describe(step)
        run = folder.parent if folder.name.startswith(PREFIX_CHECKPOINT_DIR) else folder
        return {"title": run.name, "summary": f"Fine-tuned, {step} steps."}


def list_checkpoints(output: Path) -> list[Path]:
    """The `checkpoint-<step>` folders, the newest first."""
    found = [path for path in output.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.name.rsplit("-", 1)[1].isdigit()]
    return sorted(found, key=lambda path: int(path.name.rsplit("-", 1)[1]), reverse=True)


def last_finished_checkpoint(output: Path) -> Path | None:
    """The newest checkpoint that a training can go on from; see [`find_damage`]."""
    return next((path for path in list_checkpoints(output) if find_damage(path) is None), None)


def find_damage(checkpoint: Path) -> str | None:
    """Why a training cannot go on from a checkpoint, such as "optimizer.pt is cut short"; None if it can.

    A kill or a full disk leaves checkpoints that were not written to their end. Contents are not read.
    """
    # The Trainer writes its state last, and the card comes after weights and processor.
    try:
        json.loads((checkpoint / TRAINER_STATE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"has no {TRAINER_STATE}"
    except (OSError, ValueError):
        return f"{TRAINER_STATE} is cut short"
    if not _has_card(checkpoint):
        return f"has no {CARD}"
    # Sharded trainings keep the optimizer in folders of other names.
    if not any(name.startswith(("optimizer", "global_step")) for name in (path.name for path in checkpoint.iterdir())):
        return "has no optimizer.pt"
    for path in sorted(checkpoint.rglob("*")):
        if path.suffix in (".pt", ".pth") and not zipfile.is_zipfile(path):
            return f"{path.name} is cut short"
        if path.suffix == ".safetensors":
            try:
                with open(path, "rb") as file:
                    safetensors_shapes(file, path.name)
            except ValueError:
                return f"{path.name} is cut short"
    return None


def _has_card(checkpoint: Path) -> bool:
    """Whether a [`CheckpointCallback`] has been here: it writes the model card last. PEFT writes another one first."""
    card = checkpoint / CARD
    return card.is_file() and "library_name: peft" not in card.read_text(encoding="utf-8")
