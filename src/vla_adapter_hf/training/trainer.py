"""What our training adds to transformers' Trainer: defaults that fit, and checkpoints that can be used."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn
from transformers import (
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput

from vla_adapter_hf.checkpoints.model_card import fill_model_card
from vla_adapter_hf.training.presets import ADAPTER_NAME, merged_state_dict


LABEL_NAMES = ["actions", "action_is_pad", "action_scale", "action_mask"]
CARD = "README.md"
TRAINER_STATE = "trainer_state.json"


@dataclass
class VLAAdapterTrainingArguments(TrainingArguments):
    """`TrainingArguments` with the two defaults that the Trainer needs to leave samples whole and to compute metrics.

    Of the metrics, errors (`l1_...`) are better when they are smaller; `greater_is_better` need not be given.

    Raises:
        ValueError: for `early_stopping_patience` without evaluations.
    """

    remove_unused_columns: bool | None = field(
        default=False, metadata={"help": "Leave images, text and state in the samples for the collator."}
    )
    label_names: list[str] | None = field(
        default_factory=lambda: list(LABEL_NAMES), metadata={"help": "What evaluation compares predictions with."}
    )
    early_stopping_patience: int | None = field(
        default=None,
        metadata={
            "help": "Stop after so many evaluations in a row without a better metric_for_best_model (the loss, if not "
            "given). VLAAdapterTrainer and the command line only."
        },
    )

    def __post_init__(self) -> None:
        if self.early_stopping_patience is not None:
            if self.early_stopping_patience < 1:
                raise ValueError(
                    f"early_stopping_patience={self.early_stopping_patience}; expected a number of evaluations, at least 1."
                )
            if str(getattr(self.eval_strategy, "value", self.eval_strategy)) == "no":
                raise ValueError(
                    f"early_stopping_patience={self.early_stopping_patience} counts evaluations and there are none; give "
                    "eval_strategy=steps (or epoch) and held-out episodes."
                )
            self.metric_for_best_model = self.metric_for_best_model or "loss"
        if self.greater_is_better is None and (self.metric_for_best_model or "").removeprefix("eval_").startswith(
            "l1_"
        ):
            self.greater_is_better = False
        super().__post_init__()


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

    With `push_to_hub` what is uploaded is complete too: beside the weights, which the Trainer itself takes out of the newest
    checkpoint, the output folder gets its processor, code and model card.

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
        if state.is_world_process_zero and not _has_card(folder):
            self.complete(folder, model, state.global_step)

    def on_push_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
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
    """What a plain `Trainer` does, and six things more.

    - Checkpoints are completed (by a [`CheckpointCallback`]) before older ones are removed or anything is pushed: a full disk
      or a kill never costs the last finished one.
    - `train(resume_from_checkpoint=True)` takes the last finished checkpoint, not one that was cut short.
    - The best model can be loaded at the end when a LoRA adapter is trained.
    - `early_stopping_patience` of [`VLAAdapterTrainingArguments`] stops it.
    - Every epoch has its own augmentation in several processes too.
    - Weight decay acts on everything that trains, as published; a plain Trainer leaves out biases and norms.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.add_callback(EpochCallback)
        patience = getattr(self.args, "early_stopping_patience", None)
        if patience is not None:
            self.add_callback(EarlyStoppingCallback(patience))

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """As `Trainer.train`.

        Raises:
            ValueError: for `resume_from_checkpoint=True` without a finished checkpoint in `output_dir`.
        """
        if resume_from_checkpoint is True:
            output = Path(self.args.output_dir)
            found = last_finished_checkpoint(output, with_card=bool(self._checkpoint_callbacks()))
            if found is None:
                there = ", ".join(sorted(path.name for path in _checkpoints(output))) or "none"
                raise ValueError(
                    f"resume_from_checkpoint=True: output_dir={output} holds no finished checkpoint (cut short: {there}). "
                    "Leave the argument out to start anew."
                )
            resume_from_checkpoint = str(found)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        for callback in self._checkpoint_callbacks():
            if self.args.should_save:
                callback.complete(Path(output_dir or self.args.output_dir), self.model, self.state.global_step)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        # `save_model` has written a better one, which must not be replaced before it is pushed.
        if not self._checkpoint_callbacks():
            super().create_model_card(*args, **kwargs)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        return [name for name, _ in model.named_parameters()]

    def _checkpoint_callbacks(self) -> list[CheckpointCallback]:
        return [callback for callback in self.callback_handler.callbacks if isinstance(callback, CheckpointCallback)]

    def _load_best_model(self) -> None:
        if not hasattr(self.model, "get_base_model"):
            super()._load_best_model()
            return
        adapter = self.model.active_adapter
        self.model.load_adapter(str(Path(self.state.best_model_checkpoint) / adapter), adapter, is_trainable=True)


def last_finished_checkpoint(output: Path, with_card: bool = True) -> Path | None:
    """The newest checkpoint that was written to its end; one that a kill or a full disk cut short is passed over.

    Args:
        output: the folder with the `checkpoint-<step>` folders.
        with_card: whether a [`CheckpointCallback`] completes checkpoints, which then are not finished without a model card.
    """
    checkpoints = sorted(_checkpoints(output), key=lambda path: int(path.name.rsplit("-", 1)[1]))
    return next((path for path in reversed(checkpoints) if is_finished(path, with_card)), None)


def is_finished(checkpoint: Path, with_card: bool = True) -> bool:
    """Whether a checkpoint was written to its end; see [`last_finished_checkpoint`]."""
    # The Trainer writes its state last, and the card comes after weights and processor.
    try:
        json.loads((checkpoint / TRAINER_STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return not with_card or _has_card(checkpoint)


def _has_card(checkpoint: Path) -> bool:
    """Whether a [`CheckpointCallback`] has been here: it writes the model card last. PEFT writes another one first."""
    card = checkpoint / CARD
    return card.is_file() and "library_name: peft" not in card.read_text(encoding="utf-8")


def _checkpoints(output: Path) -> list[Path]:
    return [path for path in output.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.name.rsplit("-", 1)[1].isdigit()]
