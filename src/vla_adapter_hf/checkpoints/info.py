"""`vla-adapter info`: what a checkpoint is, without loading its weights."""

from __future__ import annotations

from pathlib import Path

from vla_adapter_hf.checkpoints.lerobot.checkpoint import LeRobotCheckpoint
from vla_adapter_hf.checkpoints.model_card import describe, parameter_summary
from vla_adapter_hf.checkpoints.open import open_checkpoint
from vla_adapter_hf.checkpoints.own import OwnCheckpoint
from vla_adapter_hf.checkpoints.published.checkpoint import PublishedCheckpoint
from vla_adapter_hf.robots import RobotPreset


def checkpoint_info(
    source: str | Path,
    robot: str | RobotPreset | None = None,
    step: str | int | None = None,
    revision: str | None = None,
) -> dict[str, str]:
    """Short texts about a checkpoint in any layout, by name.

    The sizes and headers of the weights' files are checked.

    Args:
        source (`str` or `Path`): a folder or a Hub id.
        robot, step, revision (*optional*): as in [`open_checkpoint`].

    Raises:
        ValueError: when it is not a VLA-Adapter, or its files are incomplete or damaged.
    """
    checkpoint = open_checkpoint(source, robot=robot, step=step, revision=revision)
    checkpoint.check()
    config = checkpoint.config
    parameters = {part: _count(count) for part, count in parameter_summary(config).items()}
    total = parameters.pop("all")
    stats = [
        f"{key} ({entry['num_transitions']} transitions)" if "num_transitions" in entry else key
        for key, entry in (config.norm_stats or {}).items()
    ]
    layouts = {
        OwnCheckpoint.layout: "vla-adapter-hf",
        LeRobotCheckpoint.layout: "LeRobot's (`vla-adapter from-lerobot` writes it in transformers' own)",
        PublishedCheckpoint.layout: "published (`vla-adapter convert` writes it in transformers' own)",
    }
    return {
        "checkpoint": Path(source).name,
        **({"commit": checkpoint.commit} if checkpoint.commit else {}),
        "layout": layouts.get(checkpoint.layout, checkpoint.layout),
        **describe(config),
        "precision": str(config.dtype).removeprefix("torch."),
        "parameters": f"{total}: " + ", ".join(f"{part} {count}" for part, count in parameters.items()),
        "statistics": ", ".join(stats) or "none: predict_action needs norm_stats=...",
    }


def _count(number: int) -> str:
    return f"{number / 1e6:.1f} M" if number >= 1e5 else f"{number / 1e3:.1f} k"
