"""What the published layout cannot say about a model, found by reading a folder's configuration back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from transformers import PreTrainedConfig

from vla_adapter_hf.checkpoints.published.config import build_config
from vla_adapter_hf.checkpoints.published.files import PublishedFiles
from vla_adapter_hf.checkpoints.published.writing import (
    ACTION_HEAD,
    PROPRIO_PROJECTOR,
    WEIGHTS,
    PublishedTensors,
    published_config,
)
from vla_adapter_hf.modeling.configuration_vla_adapter import VLAAdapterConfig
from vla_adapter_hf.robots import RobotPreset, get_robot


# Fields that change no action and are not in published files.
LOST = ("action_names", "state_names", "fps")
# Fields that change no action, or that are compared in another way.
NOT_COMPARED = {
    *LOST,
    "cameras",
    "tokenizer_fingerprint",
    "initializer_range",
    "policy_noise_std",
    "policy_task_tokens",
}
# The same in the configurations of the towers and the language model.
NOT_COMPARED_IN_PARTS = {
    "architectures",
    "attention_dropout",
    "attention_probs_dropout_prob",
    "drop_path_rate",
    "dtype",
    "hidden_dropout_prob",
    "initializer_range",
    "max_window_layers",
    "out_features",
    "out_indices",
    "pad_token_id",
    "stage_names",
    "transformers_version",
    "use_cache",
    "use_mrope",
}


def check_expressible(
    config: VLAAdapterConfig, tensors: PublishedTensors, pad_token_id: int, robot: str | RobotPreset | None = None
) -> list[str]:
    """Refuse a model that a reader of the published layout would take for another one.

    Args:
        config ([`VLAAdapterConfig`]): of the model.
        tensors ([`PublishedTensors`]): its tensors. Only their shapes are used.
        pad_token_id (`int`): of the tokenizer.
        robot (`str` or [`RobotPreset`], *optional*): the preset that readers are given, LIBERO by default.

    Returns:
        `list[str]`: what is lost without changing an action.

    Raises:
        ValueError: naming the fields that the layout cannot say, and what a reader would assume.
    """
    preset = get_robot(robot or "libero")
    if not config.norm_stats:
        raise ValueError("the model has no norm stats, and a published checkpoint cannot be read without them.")
    if len(config.cameras) != len(preset.cameras):
        names = ", ".join(config.cameras)
        raise ValueError(
            f"the model has {len(config.cameras)} cameras ({names}). The published layout does not "
            f"say how many: a reader takes the {len(preset.cameras)} of a {preset.name} robot. Name another preset "
            "(--robot), or keep the checkpoint in this package's own layout."
        )
    shapes = [{name: tuple(tensor.shape) for name, tensor in part.items()} for part in tensors]
    stored = published_config(config, pad_token_id)
    files = PublishedFiles(
        "the folder to write", stored, config.norm_stats, [WEIGHTS], ACTION_HEAD, PROPRIO_PROJECTOR, *shapes
    )
    differences = list(_differences(config, build_config(files, preset)))
    if differences:
        raise ValueError(
            f"the published layout has no place for {'; '.join(differences)}. Actions would be other ones. Keep the "
            "checkpoint in this package's own layout."
        )
    lost = [name for name in LOST if getattr(config, name) is not None]
    return lost if list(config.cameras) == list(preset.cameras) else [*lost, "the cameras' names"]


def _differences(config: VLAAdapterConfig, read: VLAAdapterConfig) -> Iterator[str]:
    """The fields in which a reader's configuration would predict other actions."""
    ignored = set(NOT_COMPARED)
    if config.policy_variant == "original":  # it has no rotary positions
        ignored |= {"policy_rope_dtype", "policy_rope_theta"}
    if not _has_constant_dims(config.norm_stats or {}):
        ignored.add("constant_dims")
    for name in sorted(set(VLAAdapterConfig.__dataclass_fields__) - set(PreTrainedConfig.__dataclass_fields__)):
        ours, theirs = getattr(config, name), getattr(read, name)
        if name in VLAAdapterConfig.sub_configs:
            yield from _part_differences(name, ours.to_dict(), theirs.to_dict())
        elif name not in ignored and ours != theirs:
            yield f"{name}={ours!r} (read as {theirs!r})"
    if config.num_task_tokens != read.num_task_tokens:
        yield f"policy_task_tokens={config.num_task_tokens} (read as {read.num_task_tokens})"


def _part_differences(part: str, ours: dict[str, Any], theirs: dict[str, Any]) -> Iterator[str]:
    for field in sorted((set(ours) | set(theirs)) - NOT_COMPARED_IN_PARTS):
        if not field.startswith("_") and ours.get(field) != theirs.get(field):
            yield f"{part}.{field}={ours.get(field)!r} (read as {theirs.get(field)!r})"


def _has_constant_dims(norm_stats: dict[str, Any]) -> bool:
    """Whether any dimension never moves, or the statistics do not show it."""
    parts = [entry[part] for entry in norm_stats.values() for part in ("action", "proprio")]
    return any("min" not in part or (np.asarray(part["min"]) == np.asarray(part["max"])).any() for part in parts)
