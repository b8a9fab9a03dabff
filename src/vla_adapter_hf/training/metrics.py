"""Errors of predicted chunks, in the robot's units."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from vla_adapter_hf.modeling.configuration_vla_adapter import VLAAdapterConfig


def make_compute_metrics(config: VLAAdapterConfig) -> Callable[[Any], dict[str, float]]:
    """The `compute_metrics` of a Trainer.

    Returns:
        `Callable`: gives `l1_normalized` (what the loss measures), `l1_first` and `l1_rest` (mean absolute error of
        the first action of a chunk and of the others, physical units, dimensions that are not normalised left out),
        `l1_dim_<name>` for each dimension (its number where the configuration has no `action_names`), and, where the
        last dimension is not normalised, `gripper_accuracy`: how often it is on the right side of one half. Steps past
        an episode's end do not count.
    """

    def compute_metrics(evaluation: Any) -> dict[str, float]:
        predicted = evaluation.predictions
        predicted = np.asarray(predicted[0] if isinstance(predicted, tuple) else predicted, dtype=np.float64)
        actions, is_pad, scale, mask = (np.asarray(labels) for labels in evaluation.label_ids)
        real = ~is_pad.astype(bool)
        errors = np.abs(predicted - actions)  # (samples, chunk, dims)
        physical = errors * scale[:, None, :]
        counted = real[..., None] & mask.astype(bool)[:, None, :]
        metrics = {
            "l1_normalized": errors[real].mean(),
            "l1_first": _mean(physical[:, :1], counted[:, :1]),
            "l1_rest": _mean(physical[:, 1:], counted[:, 1:]),
        }
        for dimension, name in enumerate(config.action_names or range(config.action_dim)):
            metrics[f"l1_dim_{name}"] = _mean(physical[..., dimension], real)
        gripper = real & ~mask[:, None, -1].astype(bool)
        if gripper.any():
            right = (predicted[..., -1] > 0.5) == (actions[..., -1] > 0.5)
            metrics["gripper_accuracy"] = right[gripper].mean()
        return {name: float(value) for name, value in metrics.items()}

    return compute_metrics


def _mean(errors: np.ndarray, real: np.ndarray) -> float:
    chosen = errors[real]
    return float(chosen.mean()) if chosen.size else 0.0
