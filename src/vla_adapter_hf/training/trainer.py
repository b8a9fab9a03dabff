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


LABEL_NAMES = ["actions", "action_is_pad", "action_scale"]
# Written last into a checkpoint; without it the checkpoint was not finished.
LAST_FILE = "README.md"


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

    Args:
        processor: is saved with the model.
        describe (`Callable`): gives title and summary for the model card at a step.
    """

    def __init__(self, processor: Any, describe: Callable[[int], dict[str, str]]):
        self.processor = processor
        self.describe = describe

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            complete_checkpoint(folder, model, self.processor, **self.describe(state.global_step))


def complete_checkpoint(folder: Path, model: nn.Module, processor: Any, **card: str) -> None:
    """Put beside what the Trainer saved whatever is missing to load and understand it."""
    if hasattr(model, "get_base_model"):
        base, state_dict = model.get_base_model(), merged_state_dict(model)
        size = sum(tensor.numel() * tensor.element_size() for tensor in state_dict.values())
        largest = max(tensor.numel() * tensor.element_size() for tensor in state_dict.values())
        base.save_pretrained(folder, state_dict=state_dict, max_shard_size=max(size // 2, largest))
    else:
        base = model
    processor.save_pretrained(folder)
    (folder / LAST_FILE).write_text(fill_model_card(base.config, **card), encoding="utf-8")


class VLAAdapterTrainer(Trainer):
    """A Trainer that can also load the best model at the end when a LoRA adapter is trained, and that gives every epoch
    its own augmentation in several processes too. Everything else works with a plain `Trainer`.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.add_callback(EpochCallback)

    def _load_best_model(self) -> None:
        if not hasattr(self.model, "get_base_model"):
            super()._load_best_model()
            return
        adapter = Path(self.state.best_model_checkpoint) / ADAPTER_NAME
        self.model.load_adapter(str(adapter), ADAPTER_NAME, is_trainable=True)
