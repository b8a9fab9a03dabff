"""Watching a training: does the policy begin to look and to listen?"""

from __future__ import annotations

from typing import Any

import numpy as np
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from vla_adapter_hf.modeling.configuration_vla_adapter import VLAAdapterConfig
from vla_adapter_hf.modeling.normalization_vla_adapter import normalize, select_norm_stats
from vla_adapter_hf.training.probing import AS_IS, MEAN, OTHER_FRAMES, OTHER_INSTRUCTION, Probe, Sample


# In the Trainer's log, by condition.
LOG_NAMES = {
    AS_IS: "check_as_it_is",
    OTHER_FRAMES: "check_other_frames",
    OTHER_INSTRUCTION: "check_other_instruction",
    MEAN: "check_mean_action",
}


class LookingCallback(TrainerCallback):
    """Logs every `every` steps the error on some samples, as they are and with other frames or another instruction.

    The errors are mean absolute ones of normalised actions, as the loss. They stay apart once the policy looks and
    listens. Nothing random is drawn, so a training with this callback computes the same as one without.

    Args:
        trainer (`Trainer`): with a [`VLAAdapterDataCollator`].
        probe (`Probe`): the samples.
        config (`VLAAdapterConfig`): of the model, with norm stats.
        every (`int`): steps between two checks. The first is before the first step.
    """

    def __init__(self, trainer: Trainer, probe: Probe, config: VLAAdapterConfig, every: int):
        self.trainer, self.every = trainer, every
        conditions = {AS_IS: probe.samples, OTHER_FRAMES: probe.with_other_frames()}
        other = probe.with_other_instruction()
        self.conditions = conditions | ({} if other is None else {OTHER_INSTRUCTION: other})
        self.mean_error = mean_action_error(probe, config)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step == 0:
            self._check()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step % self.every == 0:
            is_loss_due = control.should_log
            self._check()
            control.should_log = is_loss_due  # logging the check has cleared it

    def _check(self) -> None:
        # The Trainer sets training mode again before its next step.
        self.trainer.model.eval()
        errors = {LOG_NAMES[name]: self._error(samples) for name, samples in self.conditions.items()}
        self.trainer.log(errors | {LOG_NAMES[MEAN]: self.mean_error})

    def _error(self, samples: list[Sample]) -> float:
        size = self.trainer.args.per_device_eval_batch_size
        total, count = 0.0, 0
        for start in range(0, len(samples), size):
            batch = samples[start : start + size]
            inputs = self.trainer.data_collator(batch)
            loss, _, _ = self.trainer.prediction_step(self.trainer.model, inputs, prediction_loss_only=True)
            # The loss is a mean over the actions that are there, so batches count by them.
            real = int(sum((~sample["action_is_pad"]).sum() for sample in batch))
            total, count = total + float(loss) * real, count + real
        return total / count


def mean_action_error(probe: Probe, config: VLAAdapterConfig) -> float:
    """The error of predicting the mean action of the dataset, in normalised actions."""
    total = []
    for sample in probe.samples:
        _, stats = select_norm_stats(config.norm_stats, sample["unnorm_key"])
        recorded, mean = (
            normalize(np.asarray(values, np.float64), stats["action"], config.norm_type, config.constant_dims)
            for values in (sample["actions"], stats["action"]["mean"])
        )
        total.append(np.abs(recorded - mean)[~sample["action_is_pad"]])
    return float(np.concatenate(total).mean())
