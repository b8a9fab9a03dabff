"""What a policy predicts for recorded samples, as they are and with one input swapped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vla_adapter_hf.doctor.frames import CHANGES
from vla_adapter_hf.doctor.verdicts import Errors, measure
from vla_adapter_hf.training.probing import (
    AS_IS,
    MEAN,
    OTHER_FRAMES,
    OTHER_INSTRUCTION,
    OTHER_STATE,
    Predict,
    Probe,
    Sample,
)


CAMERAS_SWAPPED = "cameras in reverse order"
HOLD = "hold the state"


@dataclass
class Measured:
    """What was predicted for a probe.

    Args:
        probe: the samples.
        errors: by condition.
        predicted: chunks (N, K, A) as it is, the robot's units.
        action_names: of the dimensions.
        cameras: short names.
        scale: (A,), the robot's units per unit of the data's range; see `verdicts.measure`.
        facts: what was asked of which policy, for the report.
    """

    probe: Probe
    errors: dict[str, Errors]
    predicted: np.ndarray
    action_names: list[str]
    cameras: list[str]
    scale: np.ndarray
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def baseline(self) -> str:
        """The better of the predictions that need no policy: the mean action, and for absolute targets the state."""
        return min(
            (name for name in (MEAN, HOLD) if name in self.errors), key=lambda name: self.errors[name].total.mean()
        )


@dataclass(frozen=True)
class Hold:
    """The action that holds the arm where it is: for absolute targets a line of the state, else the mean action.

    Args:
        mean: (A,), the mean action of the dataset.
        lines: by action dimension that is a target, its state dimension, slope and offset.
    """

    mean: np.ndarray
    lines: dict[int, tuple[int, float, float]]

    @classmethod
    def fit(cls, actions: np.ndarray, states: np.ndarray, targets: dict[int, int]) -> Hold:
        """Lines through actions (n, A) and states (n, S) of the same steps, so that their units may differ."""
        lines = {
            dim: (state_dim, *map(float, np.polyfit(states[:, state_dim].astype(np.float64), actions[:, dim], 1)))
            for dim, state_dim in targets.items()
        }
        return cls(actions.mean(0, dtype=np.float64), lines)

    def actions(self, samples: list[Sample]) -> np.ndarray:
        """(N, 1, A) for the states of N samples."""
        held = np.tile(self.mean, (len(samples), 1))
        for dim, (state_dim, slope, offset) in self.lines.items():
            held[:, dim] = [slope * sample["state"][state_dim] + offset for sample in samples]
        return held[:, None]


def model_inputs(processor: Any, samples: list[Sample]) -> dict[str, Any]:
    """Arguments of `predict_action` for samples with prepared frames."""
    inputs = processor(
        images=[sample["images"] for sample in samples],
        text=[sample["text"] for sample in samples],
        state=np.stack([sample["state"] for sample in samples]),
        do_jpeg_round_trip=False,
        do_center_crop=False,
    )
    # It says how a robot's frames are prepared; recorded frames need less.
    return {name: value for name, value in inputs.items() if name != "preparation"}


def make_predict(model: Any, processor: Any, unnorm_key: str, batch_size: int) -> Predict:
    """A function from samples with prepared frames to chunks (N, K, A) in the robot's units, batch by batch."""

    def predict(samples: list[Sample]) -> np.ndarray:
        parts = []
        for start in range(0, len(samples), batch_size):
            batch = samples[start : start + batch_size]
            inputs = model_inputs(processor, batch)
            parts.append(model.predict_action(**inputs, unnorm_key=unnorm_key, out_of_range="ignore"))
        return np.concatenate(parts)

    return predict


def measure_policy(
    probe: Probe,
    predict: Predict,
    cameras: list[str],
    hold: Hold,
    scale: np.ndarray,
    report_progress: Callable[[str], None] = lambda line: None,
) -> Measured:
    """Predict the samples under all conditions.

    Args:
        probe: the samples.
        predict: from samples to chunks in the robot's units.
        cameras: short names, in the order of the frames.
        hold: the simplest predictions.
        scale: (A,), see `verdicts.measure`.
        report_progress: called with a line of text before each condition.
    """
    conditions: dict[str, list[Sample] | None] = {
        AS_IS: probe.samples,
        OTHER_FRAMES: probe.with_other_frames(),
        **{f"black {camera}": probe.without_camera(place) for place, camera in enumerate(cameras)},
        OTHER_INSTRUCTION: probe.with_other_instruction(),
        OTHER_STATE: probe.with_other_state(),
        **{f"frames {name}": probe.with_frames(lambda images, turn=turn: [np.ascontiguousarray(turn(image))
           for image in images]) for name, turn in CHANGES.items()},
    }  # fmt: skip
    if len(cameras) > 1:
        conditions[CAMERAS_SWAPPED] = probe.with_frames(lambda images: images[::-1])
    recorded, is_real = probe.actions, probe.is_real
    errors, as_it_is = {}, recorded
    asked = {name: samples for name, samples in conditions.items() if samples is not None}
    for place, (name, samples) in enumerate(asked.items()):
        report_progress(f"Predicting {len(samples)} samples, {name} ({place + 1} of {len(asked)})")
        predicted = predict(samples)
        if name == AS_IS:
            as_it_is = predicted
        errors[name] = measure(predicted, recorded, is_real, scale)
        if name == OTHER_STATE and hold.lines:
            # A target begins at the state. Counted from there, a motion that follows from the frames stays right.
            moved = predicted + hold.actions(probe.samples) - hold.actions(samples)
            from_there = measure(moved, recorded, is_real, scale).dims.mean(0) < errors[name].dims.mean(0)
            errors[name] = measure(np.where(from_there, moved, predicted), recorded, is_real, scale)
    errors[MEAN] = measure(np.broadcast_to(hold.mean, recorded.shape), recorded, is_real, scale)
    if hold.lines:
        held = np.broadcast_to(hold.actions(probe.samples), recorded.shape)
        errors[HOLD] = measure(held, recorded, is_real, scale)
    return Measured(probe, errors, as_it_is, [], cameras, scale)
