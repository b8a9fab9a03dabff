"""What our training adds to transformers' Trainer: defaults that fit, and checkpoints that can be used."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from vla_adapter_hf.model_card import fill_model_card
from vla_adapter_hf.training.presets import ADAPTER_NAME, merged_state_dict


LABEL_NAMES = ["actions", "action_is_pad", "action_scale", "action_mask"]
CARD = "README.md"


@dataclass
class VLAAdapterTrainingArguments(TrainingArguments):
    """`TrainingArguments` with the two defaults that the Trainer needs to leave samples whole and to compute metrics."""

    remove_unused_columns: bool | None = field(
        default=False, metadata={"help": "Leave images, text and state in the samples for the collator."}
    )
    label_names: list[str] | None = field(
        default_factory=lambda: list(LABEL_NAMES), metadata={"help": "What evaluation compares predictions with."}
    )


class EpochCallback(TrainerCallback):
    """Tells the dataset which epoch it is, for new draws of the augmentation.

    In one process accelerate does so; with several and its seedable sampler it passes the dataset over.
    """

    def on_epoch_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        train_dataloader: Any,
        **kwargs: Any,
    ) -> None:
        dataset = getattr(train_dataloader, "dataset", None)
        if hasattr(dataset, "set_epoch"):
            dataset.set_epoch(int(state.epoch))


class CheckpointCallback(TrainerCallback):
    """Completes every checkpoint of a Trainer: whichever preset trains, `AutoModel` and `AutoProcessor` load it.

    For LoRA the merged model is written beside the adapter. It is written in shards: the Trainer takes a single
    `model.safetensors` for what it should resume from, where only the adapter will do.

    A plain Trainer calls this after it has removed older checkpoints (`save_total_limit`); [`VLAAdapterTrainer`] before.

    Args:
        processor: is saved with the model.
        describe (`Callable`): gives title and summary for the model card at a step.
    """

    def __init__(self, processor: Any, describe: Callable[[int], dict[str, str]]):
        self.processor = processor
        self.describe = describe

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        if getattr(model, "active_adapter", None) == "default":
            raise ValueError(
                'An adapter named "default" is saved where AutoModel would take it for the whole checkpoint; name it: '
                f'get_peft_model(..., adapter_name="{ADAPTER_NAME}"), or use apply_preset.'
            )

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if state.is_world_process_zero and not (folder / CARD).is_file():
            self.complete(folder, model, state.global_step)

    def complete(self, folder: Path, model: nn.Module, step: int) -> None:
        """Put beside what the Trainer saved whatever is missing to load and understand it."""
        if hasattr(model, "get_base_model"):
            base, state_dict = model.get_base_model(), merged_state_dict(model)
            sizes = [tensor.numel() * tensor.element_size() for tensor in state_dict.values()]
            base.save_pretrained(folder, state_dict=state_dict, max_shard_size=max(sum(sizes) // 2, max(sizes)))
        else:
            base = model
        self.processor.save_pretrained(folder)
        (folder / CARD).write_text(fill_model_card(base.config, **self.describe(step)), encoding="utf-8")


class VLAAdapterTrainer(Trainer):
    """What a plain `Trainer` does, and four things more.

    - Checkpoints are completed (by a [`CheckpointCallback`]) before older ones are removed or anything is pushed: a full disk
      or a kill never costs the last finished one.
    - The best model can be loaded at the end when a LoRA adapter is trained.
    - Every epoch has its own augmentation in several processes too.
    - Weight decay acts on everything that trains, as published; a plain Trainer leaves out biases and norms.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.add_callback(EpochCallback)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, CheckpointCallback) and self.args.should_save:
                callback.complete(Path(output_dir or self.args.output_dir), self.model, self.state.global_step)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        return [name for name, _ in model.named_parameters()]

    def _load_best_model(self) -> None:
        if not hasattr(self.model, "get_base_model"):
            super()._load_best_model()
            return
        adapter = self.model.active_adapter
        self.model.load_adapter(str(Path(self.state.best_model_checkpoint) / adapter), adapter, is_trainable=True)
