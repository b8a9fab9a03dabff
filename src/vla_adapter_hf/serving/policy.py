"""The model that a server asks: loading, preparing one observation, predicting a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

from vla_adapter_hf.checkpoints.attention import choose_attention
from vla_adapter_hf.checkpoints.checksum import weights_checksum
from vla_adapter_hf.checkpoints.exported import ExportedModel
from vla_adapter_hf.checkpoints.open import open_checkpoint
from vla_adapter_hf.checkpoints.quantization import quantization_config
from vla_adapter_hf.modeling.configuration_vla_adapter import VLAAdapterConfig
from vla_adapter_hf.modeling.normalization_vla_adapter import select_norm_stats
from vla_adapter_hf.robots import (
    ROBOTS,
    RobotPreset,
    check_learnt_gripper,
    get_robot,
    normalized_values,
    why_to_name_a_robot,
)
from vla_adapter_hf.serving.errors import InvalidRequest, StateOutOfRange
from vla_adapter_hf.serving.example import example_observation
from vla_adapter_hf.serving.observations import Observation, ObservationReader, decode_image, pad_to_square
from vla_adapter_hf.serving.settings import PHYSICAL, ServeSettings
from vla_adapter_hf.utils.attention import overlay_attention, predict_with_attention


@dataclass(frozen=True)
class PreparedObservation:
    """One observation as the model takes it.

    Attributes:
        observation: where it comes from.
        inputs: `input_ids` and `attention_mask` `(1, prompt)`, `pixel_values` `(1, 6 * cameras, height, width)`,
            `state` `(1, proprio_dim)`, and `preparation`, which the model compares with its configuration.
    """

    observation: Observation
    inputs: dict[str, Any]


@dataclass(frozen=True)
class Chunk:
    """The actions for one observation.

    Attributes:
        actions: `(chunk_size, action_dim)` in physical units, float64, after clipping.
        robot_actions: the same in the robot's convention.
        clipped: how many values were outside the range of the training data.
    """

    actions: np.ndarray
    robot_actions: np.ndarray
    clipped: int


@dataclass(frozen=True)
class ActionRules:
    """What becomes of the model's actions before they are answered.

    Attributes:
        unnorm_key: the statistics they are un-normalised with.
        robot: the preset whose convention robot actions follow; None for physical units.
        limits: lowest and highest `(action_dim,)` values to clip to, or None.
    """

    unnorm_key: str
    robot: RobotPreset | None
    limits: tuple[np.ndarray, np.ndarray] | None

    @classmethod
    def of(cls, config: VLAAdapterConfig, settings: ServeSettings) -> ActionRules:
        """The rules that the settings and the checkpoint's statistics ask for.

        Raises:
            ValueError: unknown statistics, a gripper whose convention is not known, or no range to clip to.
        """
        key, stats = select_norm_stats(config.norm_stats, settings.unnorm_key)
        robot = _robot(settings.robot, key, stats["action"], config.action_dim)
        return cls(key, robot, _limits(stats["action"]) if settings.clip else None)

    def apply(self, actions: np.ndarray) -> Chunk:
        """The chunk of `(chunk_size, action_dim)` actions in physical units."""
        clipped = 0
        if self.limits is not None:
            limited = np.clip(actions, *self.limits)
            clipped, actions = int((limited != actions).sum()), limited
        return Chunk(actions, actions if self.robot is None else self.robot.to_environment(actions), clipped)


class ServedPolicy:
    """A checkpoint, ready to predict.

    Args:
        model, processor: the checkpoint's. The model stays on its device.
        settings: resizing, batch size, whether to compile.
        rules: what becomes of the actions.
    """

    def __init__(self, model: Any, processor: Any, settings: ServeSettings, rules: ActionRules) -> None:
        self.model, self.processor, self.settings, self.rules = model.eval(), processor, settings, rules
        self.config = model.config
        self.reader = make_reader(model.config, settings)
        self._weights = weights_checksum(model)
        # A compiled model has one graph per batch size, so batches are filled up to one of a few sizes.
        self.batch_sizes = _graph_sizes(settings.max_batch) if settings.compiled else None
        if settings.compiled:
            model.compile_for_inference()

    @classmethod
    def load(cls, source: str, settings: ServeSettings) -> ServedPolicy:
        """The checkpoint of a folder or a Hub id. Everything is checked before the weights are loaded.

        Raises:
            ValueError: the checkpoint does not fit the settings.
        """
        checkpoint = open_checkpoint(source)
        rules = ActionRules.of(checkpoint.config, settings)
        make_reader(checkpoint.config, settings)
        dtype = settings.dtype or ("float32" if torch.device(settings.device).type == "cpu" else "auto")
        processor = checkpoint.load_processor()
        options = {"attn_implementation": settings.attention}
        if settings.quantize is None:
            model = checkpoint.load_model(dtype, settings.device, **options)
            if not settings.compiled and settings.attention is None:
                choose_attention(model)
        else:
            options["quantization_config"] = quantization_config(settings.quantize, settings.device)
            model = checkpoint.load_model(dtype, device_map={"": settings.device}, **options)
        return cls(model, processor, settings, rules)

    def prepare(self, observation: Observation) -> PreparedObservation:
        """Frames, instruction and state to tensors.

        Raises:
            InvalidRequest: the observation does not fit the model; the message names the field.
            StateOutOfRange: with `out_of_range="error"`, a state far outside the training data.
        """
        inputs = self._inputs(observation)
        if self.settings.out_of_range == "error":
            try:
                self.model.check_state_range(inputs["state"], self.rules.unnorm_key)
            except ValueError as error:
                raise StateOutOfRange(str(error)) from error
        return PreparedObservation(observation, inputs)

    def _inputs(self, observation: Observation) -> dict[str, Any]:
        try:
            frames = [
                decode_image(frame, camera, self.settings.max_frame_bytes)
                for frame, camera in zip(observation.frames, self.config.cameras, strict=True)
            ]
            if self.settings.resize == "pad":
                images = self.processor.image_processor
                frames = [pad_to_square(images.process_image(frame, do_convert_rgb=True)) for frame in frames]
            state = np.asarray(observation.state, np.float64)[None]
            return dict(self.processor(images=[frames], text=[observation.instruction], state=state))
        except (ValueError, TypeError) as error:
            raise InvalidRequest(str(error)) from error

    def predict(self, batch: Sequence[PreparedObservation]) -> list[Chunk]:
        """One chunk per observation, predicted at once.

        A row's actions do not depend on the other rows, up to the rounding of float additions.

        Raises:
            ValueError: the model's actions are not finite.
        """
        return self._predict([prepared.inputs for prepared in batch], self.settings.out_of_range)

    def _predict(self, rows: list[dict[str, Any]], out_of_range: str) -> list[Chunk]:
        count = len(rows)
        if self.batch_sizes is not None:
            size = next(size for size in self.batch_sizes if size >= count)
            rows = rows + [rows[-1]] * (size - count)
        actions = self.model.predict_action(
            **_joined(rows), unnorm_key=self.rules.unnorm_key, out_of_range=out_of_range
        )
        return [self.rules.apply(chunk) for chunk in actions[:count]]

    def warm_up(self) -> None:
        """Predict once for every batch size that has a graph of its own, so that no robot waits for the first time.

        The state is made up. Out of range, it is no error, and does not use up the warning that a client's needs.
        """
        example = example_observation(self.config)
        frames = tuple(example.images.values())
        inputs = self._inputs(Observation(frames, example.instruction, example.state, arrived=0.0))
        for size in self.batch_sizes or (1,):
            self._predict([inputs] * size, out_of_range="ignore")

    def frames_as_seen(self, prepared: PreparedObservation) -> list[np.ndarray]:
        """The frames that the vision towers see, uint8 `(height, width, 3)`: un-normalised `pixel_values`."""
        images = self.processor.image_processor
        mean, std = (np.asarray(values[0], np.float32) for values in (images.tower_means, images.tower_stds))
        pixels = prepared.inputs["pixel_values"][0].float().numpy()  # (6 * cameras, height, width)
        frames = [pixels[first : first + 3].transpose(1, 2, 0) * std + mean for first in range(0, len(pixels), 6)]
        return [np.clip(np.rint(255 * frame), 0, 255).astype(np.uint8) for frame in frames]

    def attention_pictures(self, prepared: PreparedObservation) -> list[np.ndarray] | None:
        """Per camera the frame with the policy's attention over it, uint8 `(height, width, 3)`.

        None for a compiled or an exported model, which returns no attention, and where matplotlib is missing. It takes
        a prediction of its own, with eager attention.
        """
        without_attention = self.settings.compiled or isinstance(self.model, ExportedModel)
        if without_attention or find_spec("matplotlib") is None:
            return None
        _, attention = predict_with_attention(self.model, _joined([prepared.inputs]), self.rules.unnorm_key)
        brightest = float(attention[0].max())
        frames = self.frames_as_seen(prepared)
        return [overlay_attention(frame, seen, brightest) for frame, seen in zip(frames, attention[0], strict=True)]

    def describe(self) -> dict[str, Any]:
        """What clients learn on connecting: openpi's metadata, with vLLM-Omni's names."""
        config, robot = self.config, self.rules.robot
        _, stats = select_norm_stats(config.norm_stats, self.rules.unnorm_key)
        return {
            "model": "vla-adapter",
            "action_horizon": config.chunk_size,
            "max_action_horizon": config.chunk_size,
            "action_dim": config.action_dim,
            "action_keys": ["actions"],
            "action_space": "physical units" if robot is None else f"{robot.name}: the robot's own commands",
            "robot": PHYSICAL if robot is None else robot.name,
            "cameras": list(config.cameras),
            "image_resolution": [config.image_size, config.image_size],
            "state_dim": config.proprio_dim,
            "state_names": _listed(config.state_names),
            "action_names": _listed(config.action_names),
            "action_mask": normalized_values(stats["action"]).tolist(),
            "fps": config.fps,
            "unnorm_key": self.rules.unnorm_key,
            "clip": self.rules.limits is not None,
            "weights": self._weights,
        }


def _listed(names: Sequence[str] | None) -> list[str] | None:
    return None if names is None else list(names)


def make_reader(config: VLAAdapterConfig, settings: ServeSettings) -> ObservationReader:
    """The reader of observations for a model.

    Raises:
        ValueError: the settings rename a camera to one that the model does not have.
    """
    key, _ = select_norm_stats(config.norm_stats, settings.unnorm_key)
    return ObservationReader(config.cameras, config.proprio_dim, settings.cameras, key)


def _joined(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One batch of several observations; shorter prompts are padded, which changes no action."""
    length = max(row["input_ids"].shape[1] for row in rows)

    def padded(name: str) -> torch.Tensor:
        parts = [torch.nn.functional.pad(row[name], (0, length - row[name].shape[1])) for row in rows]
        return torch.cat(parts)

    return {
        "input_ids": padded("input_ids"),
        "attention_mask": padded("attention_mask"),
        "pixel_values": torch.cat([row["pixel_values"] for row in rows]),
        "state": np.concatenate([row["state"] for row in rows]),
        "preparation": [row["preparation"] for row in rows],
    }


def _graph_sizes(max_batch: int) -> list[int]:
    sizes = [1]
    while sizes[-1] < max_batch:
        sizes.append(min(2 * sizes[-1], max_batch))
    return sizes


def _robot(name: str | None, unnorm_key: str, stats: dict[str, Any], action_dim: int) -> RobotPreset | None:
    """The preset whose convention the answers follow; None for physical units.

    Raises:
        ValueError: the last action dimension was not normalised, as a gripper's is that has a convention, and neither
            the setting nor the name of the statistics says which.
    """
    if name == PHYSICAL:
        return None
    if name is None:
        name = next((robot for robot in ROBOTS if unnorm_key.lower().startswith(robot)), None)
    if name is None:
        reason = why_to_name_a_robot(stats, "--robot")
        if reason is None:
            return None
        raise ValueError(f"the statistics {unnorm_key!r} have {reason}")
    robot = get_robot(name)
    if robot.action_dim != action_dim:
        raise ValueError(f"--robot {name} has actions of {robot.action_dim} values, the checkpoint has {action_dim}.")
    check_learnt_gripper(robot, stats)
    return robot


def _limits(stats: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    missing = [name for name in ("min", "max") if name not in stats]
    if missing:
        raise ValueError(f"--clip needs {' and '.join(missing)} in the checkpoint's statistics of actions.")
    return np.asarray(stats["min"], np.float64), np.asarray(stats["max"], np.float64)
