"""LeRobot's layout of a policy: which files it has, and what they hold. LeRobot itself is not needed.

- `config.json`: LeRobot's configuration. Its entry `model` is the whole of our `config.json`.
- `model.safetensors`, or shards of it: the same file as in our own layout.
- `policy_preprocessor.json` and `policy_postprocessor.json`: steps that LeRobot applies to observations and actions.
- The state of the preprocessor's step `vla_adapter_inputs`, a safetensors file: each file of our processor as one
  tensor of bytes. LeRobot finds this file by itself, in a folder and on the Hub.
- `README.md`: the model card.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from vla_adapter_hf.modeling.configuration_vla_adapter import VLAAdapterConfig
from vla_adapter_hf.modeling.normalization_vla_adapter import select_norm_stats
from vla_adapter_hf.processing.processing_vla_adapter import VLAAdapterProcessor
from vla_adapter_hf.robots import RobotPreset, check_learnt_gripper, get_robot, why_to_name_a_robot
from vla_adapter_hf.utils.files import write_bytes


# The policy's name in LeRobot: `type` in its config.json, and `--policy.type`.
POLICY_TYPE = "vla_adapter"
PREPROCESSOR, POSTPROCESSOR = "policy_preprocessor", "policy_postprocessor"
INPUTS_STEP, ACTIONS_STEP = "vla_adapter_inputs", "vla_adapter_actions"
# LeRobot's names: pipeline, number of the step, registered name of the step.
STATE_FILE = f"{PREPROCESSOR}_step_2_{INPUTS_STEP}.safetensors"
# What an image processor and a Qwen2 tokenizer are saved as; which of them are there depends on the release.
PROCESSOR_FILES = (
    "processor_config.json",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


def policy_config(
    model: dict[str, Any], config: VLAAdapterConfig, robot: str | None, unnorm_key: str | None
) -> dict[str, Any]:
    """The content of LeRobot's `config.json`. Fields that are left out have their defaults in the plugin.

    Args:
        model: the content of our `config.json`.
        config ([`VLAAdapterConfig`]): the same, read.
        robot: name of the robot preset whose convention the robot's actions have, or None.
        unnorm_key: which of the model's statistics to use; None where there is one set.
    """
    size = [3, config.image_size, config.image_size]
    inputs = {image_feature(camera): {"type": "VISUAL", "shape": size} for camera in config.cameras}
    inputs["observation.state"] = {"type": "STATE", "shape": [config.proprio_dim]}
    return {
        "type": POLICY_TYPE,
        "input_features": inputs,
        "output_features": {"action": {"type": "ACTION", "shape": [config.action_dim]}},
        "push_to_hub": False,
        # With rtc, lerobot-rollout takes the order of the values from these names. Its sync sends them by position.
        "action_feature_names": config.action_names,
        "robot": robot,
        "unnorm_key": unnorm_key,
        "model": model,
    }


def image_feature(camera: str) -> str:
    """LeRobot's full name of a camera: `observation.images.top` for `top`."""
    return camera if camera.startswith("observation.") else f"observation.images.{camera}"


def pipelines(robot: str | None) -> dict[str, dict[str, Any]]:
    """The contents of the two files that describe the processors, by name of the pipeline."""
    device = {"registry_name": "device_processor", "config": {"device": "cpu", "float_dtype": None}}
    inputs = {"registry_name": INPUTS_STEP, "config": {"robot": robot}, "state_file": STATE_FILE}
    steps = {
        PREPROCESSOR: [
            {"registry_name": "rename_observations_processor", "config": {"rename_map": {}}},
            {"registry_name": "to_batch_processor", "config": {}},
            inputs,
            device,
        ],
        POSTPROCESSOR: [{"registry_name": ACTIONS_STEP, "config": {"robot": robot}}, device],
    }
    return {name: {"name": name, "steps": entries} for name, entries in steps.items()}


def check_robot(config: VLAAdapterConfig, robot: str | None, unnorm_key: str | None) -> RobotPreset | None:
    """The preset of that name; None stands for actions that the robot takes as they were learnt.

    Args:
        config ([`VLAAdapterConfig`]): of the model.
        robot: a preset's name, `"none"`, or None if it was not given.
        unnorm_key: which of the model's statistics to use.

    Raises:
        ValueError: an unknown robot or key, a robot with actions of another size, or no robot for a policy whose
            gripper was not normalised, or a robot that converts another gripper than the policy learnt.
    """
    _, stats = select_norm_stats(config.norm_stats, unnorm_key)
    if robot in (None, "none"):
        reason = why_to_name_a_robot(stats["action"])
        if robot is None and reason is not None:
            raise ValueError(f"the policy has {reason}")
        return None
    preset = get_robot(robot)
    if preset.action_dim != config.action_dim:
        raise ValueError(
            f"robot={robot!r} has actions of {preset.action_dim} values, the policy has {config.action_dim}."
        )
    check_learnt_gripper(preset, stats["action"])
    return preset


def pack_files(contents: Mapping[str, bytes]) -> dict[str, torch.Tensor]:
    """Files as tensors of bytes, by the files' names."""
    return {name: torch.frombuffer(bytearray(content), dtype=torch.uint8) for name, content in contents.items()}


def unpack_files(tensors: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Write the files that [`pack_files`] packed.

    Raises:
        ValueError: an entry that is none of a processor's files.
    """
    for name, tensor in tensors.items():
        if name not in PROCESSOR_FILES or tensor.dtype != torch.uint8:
            raise ValueError(f"{STATE_FILE} holds {name!r}, which is no file of the processor.")
        write_bytes(folder / name, tensor.cpu().numpy().tobytes())


def pack_processor(processor: VLAAdapterProcessor, folder: Path) -> dict[str, torch.Tensor]:
    """A processor as tensors of bytes. Its files are written to a `folder` that may be removed afterwards."""
    processor.save_pretrained(folder)
    return pack_files({name: (folder / name).read_bytes() for name in PROCESSOR_FILES if (folder / name).is_file()})


def unpack_processor(tensors: Mapping[str, torch.Tensor], folder: Path) -> VLAAdapterProcessor:
    """The processor that [`pack_processor`] packed, read from an empty `folder` that may be removed afterwards."""
    unpack_files(tensors, folder)
    return VLAAdapterProcessor.from_pretrained(folder)
