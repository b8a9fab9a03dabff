"""`vla-adapter info`: what a checkpoint is, without loading its weights."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, PreTrainedConfig

from vla_adapter_hf.checkpoints.model_card import describe, parameter_summary
from vla_adapter_hf.modeling.configuration_vla_adapter import VLAAdapterConfig
from vla_adapter_hf.modeling.modeling_vla_adapter import VLAAdapterForActionPrediction


def checkpoint_info(source: str, robot: str | None = None, step: str | None = None) -> dict[str, str]:
    """What can be said of a checkpoint in either layout, as short texts by name.

    Args:
        source (`str`): a folder or a Hub id.
        robot, step (`str`, *optional*): for the published layout, see [`build_config`].

    Raises:
        ValueError: when it is not a VLA-Adapter or its files are incomplete.
    """
    layout = {name: value for name, value in (("robot", robot), ("step", step)) if value is not None}
    stored = PreTrainedConfig.get_config_dict(source)[0].get("model_type")
    config = AutoConfig.from_pretrained(source, **layout)
    if not isinstance(config, VLAAdapterConfig):
        raise ValueError(f"{source} has model_type {stored!r}; it is not a VLA-Adapter.")
    with torch.device("meta"):
        shapes = {
            name: tuple(value.shape) for name, value in VLAAdapterForActionPrediction(config).state_dict().items()
        }
    parameters = {part: _count(count) for part, count in parameter_summary(shapes).items()}
    total = parameters.pop("all")
    stats = [
        f"{key} ({entry['num_transitions']} transitions)" if "num_transitions" in entry else key
        for key, entry in (config.norm_stats or {}).items()
    ]
    own = stored == VLAAdapterConfig.model_type
    return {
        "checkpoint": Path(source).name,
        "layout": "vla-adapter-hf" if own else "published (run `vla-adapter convert` to have it in transformers' own)",
        **describe(config),
        "precision": str(config.dtype).removeprefix("torch."),
        "parameters": f"{total}: " + ", ".join(f"{part} {count}" for part, count in parameters.items()),
        "statistics": ", ".join(stats) or "none: predict_action needs norm_stats=...",
    }


def _count(number: int) -> str:
    return f"{number / 1e6:.1f} M" if number >= 1e5 else f"{number / 1e3:.1f} k"
