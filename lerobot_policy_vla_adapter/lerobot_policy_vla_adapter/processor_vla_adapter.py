"""LeRobot's processors around our own: observations to the model's inputs, actions to the robot's convention."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lerobot.configs import PipelineFeatureType, PolicyFeature
from lerobot.lerobot_types import EnvTransition, PolicyAction, TransitionKey
from lerobot.processor import (
    AddBatchDimensionProcessorStep,
    DeviceProcessorStep,
    PolicyProcessorPipeline,
    ProcessorStep,
    ProcessorStepRegistry,
    RenameObservationsProcessorStep,
    policy_action_to_transition,
    transition_to_policy_action,
)
from lerobot.utils.constants import OBS_IMAGES, OBS_STATE

from vla_adapter_hf.checkpoints.lerobot.layout import (
    ACTIONS_STEP,
    INPUTS_STEP,
    POSTPROCESSOR,
    PREPROCESSOR,
    pack_processor,
    unpack_processor,
)
from vla_adapter_hf.data.augmentation import ImageAugmentation
from vla_adapter_hf.processing.camera_names_vla_adapter import matching_names
from vla_adapter_hf.processing.processing_vla_adapter import VLAAdapterProcessor
from vla_adapter_hf.robots import RobotPreset, get_robot
from vla_adapter_hf.training.collator import VLAAdapterDataCollator

from .command_line import given_rename_map
from .configuration_vla_adapter import VLAAdapterConfig


# In LeRobot's batches, what the model takes has this prefix. Only names that begin with `observation.` pass through.
MODEL_INPUT = "observation.vla_adapter."


def make_vla_adapter_pre_post_processors(
    config: VLAAdapterConfig,
    dataset_stats: dict[str, dict[str, torch.Tensor]] | None = None,
    dataset_meta: Any = None,
) -> tuple[
    PolicyProcessorPipeline[dict[str, Any], dict[str, Any]], PolicyProcessorPipeline[PolicyAction, PolicyAction]
]:
    """The pre- and the post-processor of a policy.

    Args:
        config ([`VLAAdapterConfig`]): of a loaded policy.
        dataset_stats, dataset_meta: not used: the model has statistics of its own.
    """
    preprocessor = PolicyProcessorPipeline[dict[str, Any], dict[str, Any]](
        steps=[
            # LeRobot hands the option only to processors that it reads from a file.
            RenameObservationsProcessorStep(rename_map=given_rename_map()),
            AddBatchDimensionProcessorStep(),
            VLAAdapterInputsStep(config.robot, processor_of(config), config),
            DeviceProcessorStep(device=config.device),
        ],
        name=PREPROCESSOR,
    )
    postprocessor = PolicyProcessorPipeline[PolicyAction, PolicyAction](
        steps=[VLAAdapterActionsStep(config.robot), DeviceProcessorStep(device="cpu")],
        name=POSTPROCESSOR,
        to_transition=policy_action_to_transition,
        to_output=transition_to_policy_action,
    )
    return preprocessor, postprocessor


def processor_of(config: VLAAdapterConfig) -> VLAAdapterProcessor:
    """The model's processor: that of the policy which was loaded with this configuration, else of its checkpoint."""
    loaded = getattr(config, "_loaded_processor", None)
    if loaded is not None:
        return loaded
    source, revision = config.pretrained_path, config.pretrained_revision
    if source is None:
        source, revision = config.base_checkpoint, config.base_revision
    if source is None:
        raise ValueError("the policy's configuration names no checkpoint to take the processor from; load the policy.")
    start = config.open_start(str(source), revision).load_processor()
    return VLAAdapterProcessor.from_model_config(config.model_config(), start.tokenizer)


@ProcessorStepRegistry.register(INPUTS_STEP)
@dataclass
class VLAAdapterInputsStep(ProcessorStep):
    """Frames, task and state of LeRobot to the model's inputs, through our processor.

    LeRobot does not tell a processor whether it runs for training. This one takes a batch for training that has
    actions and comes while gradients are recorded, as in the training loop of `lerobot-train`, and augments its
    frames. Batches with actions and without gradients are those of an evaluation on held-out episodes.

    Args:
        robot: name of the preset whose conventions state and actions have.
        processor ([`VLAAdapterProcessor`]): of the model. A step that is read from a file gets it from its state.
        config ([`VLAAdapterConfig`]): of the policy; needed for batches with actions.
    """

    robot: str | None = None
    processor: VLAAdapterProcessor | None = field(default=None, repr=False)
    config: VLAAdapterConfig | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self._preset = _preset(self.robot)
        self._packed: dict[str, torch.Tensor] | None = None

    def __call__(self, transition: EnvTransition) -> EnvTransition:
        observation = dict(transition[TransitionKey.OBSERVATION] or {})
        extra = transition.get(TransitionKey.COMPLEMENTARY_DATA) or {}
        frames = self._take_frames(observation)
        text = _instructions(extra.get("task"), len(frames))
        state = _numpy(observation, OBS_STATE)
        if self._preset is not None:
            state = self._preset.state_to_training(state)
        action = transition.get(TransitionKey.ACTION)
        if action is None:
            inputs = dict(self.processor(images=frames, text=text, state=state))
            inputs["state"] = torch.from_numpy(inputs["state"])
        else:
            inputs = self._training_inputs(frames, text, state, action, extra)
            action = inputs.pop("actions")
        observation |= {f"{MODEL_INPUT}{name}": value for name, value in inputs.items()}
        return {**transition, TransitionKey.OBSERVATION: observation, TransitionKey.ACTION: action}

    def _take_frames(self, observation: dict[str, Any]) -> list[list[np.ndarray]]:
        """Take the cameras' frames out of a batch of observations: per observation one uint8 frame per camera."""
        available = [name for name in observation if name.startswith(OBS_IMAGES)]
        cameras = []
        for camera in self.processor.image_processor.cameras:
            found = matching_names(camera, available)
            if len(found) != 1:
                raise ValueError(
                    f"the model's camera {camera!r} is {'ambiguous' if found else 'missing'} among "
                    f"{', '.join(available) or 'no cameras'}; --rename_map gives LeRobot's cameras the model's names: "
                    f"{', '.join(self.processor.image_processor.cameras)}. For a simulator in lerobot-train it is "
                    "--env.camera_name_mapping."
                )
            cameras.append(_uint8_frames(observation[found[0]], found[0]))
        for name in available:
            del observation[name]
        return [list(frames) for frames in zip(*cameras, strict=True)]

    def _training_inputs(
        self, frames: list[list[np.ndarray]], text: list[str], state: np.ndarray, action: torch.Tensor, extra: dict
    ) -> dict[str, Any]:
        if self.config is None:
            raise ValueError(
                "this processor was read from a file and makes inputs for predictions only; lerobot-train builds one "
                "that also takes actions."
            )
        model_config = self.config.model_config()
        if not hasattr(self, "_collate"):
            self._collate = VLAAdapterDataCollator(self.processor, model_config)
            self._augment = ImageAugmentation.from_model_config(model_config, self.config.augmentation_seed)
        actions = action.detach().cpu().numpy()
        if self._preset is not None:
            actions = self._preset.to_training(actions)
        augments = self.config.augment and torch.is_grad_enabled()
        if augments:
            # The frame's number in the dataset, so that processes which train together draw differently.
            numbers = extra.get("index", range(len(frames)))
            epoch = self.config.trained_batches
            frames = [self._augment(sample, epoch, int(row)) for sample, row in zip(frames, numbers, strict=True)]
        is_pad = extra.get("action_is_pad")
        is_pad = np.zeros(actions.shape[:2], bool) if is_pad is None else is_pad.cpu().numpy()
        samples = [
            {
                "images": frames[row],
                "images_are_prepared": augments,
                "text": text[row],
                "state": state[row],
                "actions": actions[row],
                "action_is_pad": is_pad[row],
                "unnorm_key": self.config.unnorm_key,
            }
            for row in range(len(frames))
        ]
        inputs = self._collate(samples)
        return {name: value for name, value in inputs.items() if name not in ("action_scale", "action_mask")}

    def get_config(self) -> dict[str, Any]:
        return {"robot": self.robot}

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The processor's files as tensors of bytes."""
        if self._packed is None:
            with tempfile.TemporaryDirectory() as folder:
                self._packed = pack_processor(self.processor, Path(folder))
        return dict(self._packed)

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            self.processor = unpack_processor(state, Path(folder))
        self._packed = dict(state)

    def transform_features(
        self, features: dict[PipelineFeatureType, dict[str, PolicyFeature]]
    ) -> dict[PipelineFeatureType, dict[str, PolicyFeature]]:
        return features


@ProcessorStepRegistry.register(ACTIONS_STEP)
@dataclass
class VLAAdapterActionsStep(ProcessorStep):
    """Actions of the model, `(batch, values)` or `(batch, chunk, values)`, in the convention that the robot takes.

    Args:
        robot: name of the preset that knows the convention; `none` or None leave actions as they were learnt.
    """

    robot: str | None = None

    def __post_init__(self) -> None:
        self._preset = _preset(self.robot)

    def __call__(self, transition: EnvTransition) -> EnvTransition:
        if self._preset is None:
            return transition
        action = transition[TransitionKey.ACTION]
        converted = torch.from_numpy(self._preset.to_environment(action.detach().cpu().numpy())).to(action)
        return {**transition, TransitionKey.ACTION: converted}

    def get_config(self) -> dict[str, Any]:
        return {"robot": self.robot}

    def transform_features(
        self, features: dict[PipelineFeatureType, dict[str, PolicyFeature]]
    ) -> dict[PipelineFeatureType, dict[str, PolicyFeature]]:
        return features


def _preset(robot: str | None) -> RobotPreset | None:
    return None if robot in (None, "none") else get_robot(robot)


def _instructions(task: Any, count: int) -> list[str]:
    """One instruction per observation."""
    texts = [task] * count if isinstance(task, str) else list(task or [])
    if len(texts) != count or not all(isinstance(text, str) and text.strip() for text in texts):
        raise ValueError(
            f"every observation needs an instruction under 'task', got {task!r} for {count} observations. For "
            "lerobot-rollout give --task."
        )
    return texts


def _numpy(observation: dict[str, Any], name: str) -> np.ndarray:
    if name not in observation:
        raise ValueError(f"{name} is missing among the observations: {', '.join(sorted(observation))}.")
    return observation[name].detach().cpu().numpy()


def _uint8_frames(frames: torch.Tensor, name: str) -> np.ndarray:
    """LeRobot's frames, float (batch, 3, height, width) in 0...1, as the uint8 frames that they were made from.

    Raises:
        ValueError: frames of another shape or range.
    """
    if frames.ndim != 4 or frames.shape[1] != 3:
        raise ValueError(f"{name} must have shape (batch, 3, height, width), got {tuple(frames.shape)}.")
    if frames.dtype == torch.uint8:
        return frames.permute(0, 2, 3, 1).contiguous().cpu().numpy()
    low, high = (float(value) for value in frames.aminmax())
    if not (0 <= low and high <= 1):
        raise ValueError(f"{name} must be in 0...1, got values from {low:.4g} to {high:.4g}.")
    if frames.dtype in (torch.float16, torch.bfloat16):
        raise ValueError(f"{name} is {frames.dtype}, which has already lost digits; give float32 or uint8.")
    return frames.mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()


__all__ = ["make_vla_adapter_pre_post_processors", "VLAAdapterActionsStep", "VLAAdapterInputsStep"]
