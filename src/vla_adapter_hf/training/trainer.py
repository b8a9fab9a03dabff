"""What our training adds to transformers' Trainer: defaults that fit, and checkpoints that can be used."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn
from transformers import (
    EarlyStoppingCallback,
    Trainer,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import TrainOutput

from vla_adapter_hf.checkpoints.open import open_checkpoint
from vla_adapter_hf.training.checkpoints import (
    CheckpointCallback,
    find_damage,
    last_finished_checkpoint,
    list_checkpoints,
)
from vla_adapter_hf.training.presets import check_merged


logger = logging.getLogger(__name__)

LABEL_NAMES = ["actions", "action_is_pad", "action_scale", "action_mask"]


@dataclass
class VLAAdapterTrainingArguments(TrainingArguments):
    """`TrainingArguments` with the two defaults that the Trainer needs to leave samples whole and to compute metrics.

    Several processes take turns with the batches of a stream (`dispatch_batches` of `accelerator_config` is off).
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
            "help": "Stop after so many evaluations in a row without a better metric_for_best_model, by default the "
            "loss. For VLAAdapterTrainer and the command line."
        },
    )

    def __post_init__(self) -> None:
        if self.early_stopping_patience is not None:
            if self.early_stopping_patience < 1:
                raise ValueError(
                    f"early_stopping_patience={self.early_stopping_patience}; expected a number of evaluations, at "
                    "least 1."
                )
            if str(getattr(self.eval_strategy, "value", self.eval_strategy)) == "no":
                raise ValueError(
                    f"early_stopping_patience={self.early_stopping_patience} counts evaluations and there are none; "
                    "give eval_strategy=steps (or epoch) and held-out episodes."
                )
            self.metric_for_best_model = self.metric_for_best_model or "loss"
        metric = (self.metric_for_best_model or "").removeprefix("eval_")
        if self.greater_is_better is None and metric.startswith("l1_"):
            self.greater_is_better = False
        super().__post_init__()
        # Of a stream, accelerate would join the batches of all processes, and prompts are padded batch by batch.
        if self.accelerator_config.dispatch_batches is None:
            self.accelerator_config.dispatch_batches = False


class PatienceCallback(EarlyStoppingCallback):
    """Early stopping that goes on counting when a training is resumed."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        kept = state.stateful_callbacks.get(type(self).__name__, {}).get("attributes", {})
        self.early_stopping_patience_counter = kept.get("early_stopping_patience_counter", 0)


class VLAAdapterTrainer(Trainer):
    """A `Trainer` whose checkpoints load with `AutoModel` and `AutoProcessor`. It differs from a plain one in this:

    - Every checkpoint gets the processor, the code and a model card, and with LoRA the merged model. This
      happens before older checkpoints are removed or anything is pushed: a full disk or a kill never costs the last
      finished one.
    - `train(resume_from_checkpoint=True)` takes the last finished checkpoint, not one that was cut short.
    - A LoRA adapter is not resumed on other frozen weights than it was trained on.
    - The best model can be loaded at the end when a LoRA adapter is trained.
    - `early_stopping_patience` of [`VLAAdapterTrainingArguments`] stops it, and a resumed training goes on counting.
    - Weight decay acts on everything that trains, as published; a plain Trainer leaves out biases and norms.

    Args:
        args, kwargs: as for `Trainer`. The processor is that of the [`VLAAdapterDataCollator`], or `processing_class`.
        describe (`Callable`, *optional*): gives arguments of `fill_model_card` at a step, such as `title` and
            `summary`.

    Raises:
        ValueError: when no processor is given; from `train`, when the frozen weights of an adapter have changed.
    """

    def __init__(self, *args: Any, describe: Callable[[int], dict[str, Any]] | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        given = [callback for callback in self.callback_handler.callbacks if isinstance(callback, CheckpointCallback)]
        if not given:
            processor = self.processing_class or getattr(self.data_collator, "processor", None)
            if processor is None:
                raise ValueError(
                    "The checkpoints need the model's processor: give data_collator=VLAAdapterDataCollator(processor, "
                    "config) or processing_class=processor."
                )
            given = [CheckpointCallback(processor, describe)]
            self.add_callback(given[0])
        self.checkpoint_callback = given[0]
        patience = getattr(self.args, "early_stopping_patience", None)
        if patience is not None:
            self.add_callback(PatienceCallback(patience))

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """As `Trainer.train`.

        Raises:
            ValueError: for `resume_from_checkpoint=True` without a finished checkpoint in `output_dir`.
        """
        if resume_from_checkpoint is True:
            output = Path(self.args.output_dir)
            found = last_finished_checkpoint(output)
            damaged = {path: find_damage(path) for path in list_checkpoints(output)}
            listed = ", ".join(f"{path.name}: {damage}" for path, damage in damaged.items() if damage) or "none"
            if found is None:
                raise ValueError(
                    f"resume_from_checkpoint=True: output_dir={output} holds no finished checkpoint (cut short: "
                    f"{listed}). Leave the argument out to start from the beginning."
                )
            if listed != "none":
                logger.warning("Resuming from %s; passing over %s", found.name, listed)
            resume_from_checkpoint = str(found)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            self.checkpoint_callback.complete(folder, self.model, self.state.global_step)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: `save_model` has written a better card, which must not be replaced before it is pushed."""

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        return [name for name, _ in model.named_parameters()]

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        try:
            super()._save_checkpoint(*args, **kwargs)
        except (RuntimeError, SafetensorError) as error:
            # So torch and safetensors report that a file could not be written.
            if isinstance(error, RuntimeError) and "inline_container" not in str(error):
                raise
            raise OSError(
                errno.ENOSPC,
                f"the checkpoint of step {self.state.global_step} could not be written, is the disk full? "
                f"({str(error).splitlines()[0]})",
                str(self.args.output_dir),
            ) from error

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        folder = Path(resume_from_checkpoint)
        if hasattr(self.model, "get_base_model") and (folder / "config.json").is_file():
            check_merged(
                self.model,
                open_checkpoint(folder).load_model().state_dict(),  # mapped, and not copied
                adapter=str(folder),
                base=self.model.get_base_model().config.name_or_path or "the start checkpoint",
                remedy=f"begin a new training with the merged ones: checkpoint {folder}, another output_dir",
            )

    def _load_best_model(self) -> None:
        if not hasattr(self.model, "get_base_model"):
            super()._load_best_model()
            return
        adapter = self.model.active_adapter
        self.model.load_adapter(str(Path(self.state.best_model_checkpoint) / adapter), adapter, is_trainable=True)
