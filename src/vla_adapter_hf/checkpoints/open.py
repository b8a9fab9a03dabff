"""The one entrance to checkpoints, whatever their layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vla_adapter_hf.checkpoints.checkpoint import Checkpoint
from vla_adapter_hf.checkpoints.exported import ExportedCheckpoint
from vla_adapter_hf.checkpoints.files import read_json
from vla_adapter_hf.checkpoints.lerobot.checkpoint import LeRobotCheckpoint, is_lerobot
from vla_adapter_hf.checkpoints.own import OwnCheckpoint
from vla_adapter_hf.checkpoints.published.checkpoint import PublishedCheckpoint
from vla_adapter_hf.checkpoints.published.files import MODEL_TYPE
from vla_adapter_hf.checkpoints.source import open_files
from vla_adapter_hf.modeling.configuration_vla_adapter import HUB_ARGUMENTS, VLAAdapterConfig, refuse_misspelt
from vla_adapter_hf.robots import RobotPreset


# By `model_type`.
LAYOUTS: dict[str, Any] = {
    OwnCheckpoint.layout: OwnCheckpoint,
    MODEL_TYPE: PublishedCheckpoint,
    ExportedCheckpoint.layout: ExportedCheckpoint,
}
CONFIG_FIELDS = set(VLAAdapterConfig.__dataclass_fields__) | {"attn_implementation"}


def open_checkpoint(
    source: str | Path,
    *,
    robot: str | RobotPreset | None = None,
    default_robot: str | RobotPreset | None = None,
    step: str | int | None = None,
    **options: Any,
) -> Checkpoint:
    """Read the configuration of a checkpoint, and give access to its processor and weights of the same revision.

    The layout follows from `model_type` in `config.json`, or from LeRobot's `type`. No code of the repository is run.
    Of a repository on the Hub, only small files and the headers of large ones are fetched here.

    Args:
        source (`str` or `Path`): a folder or a Hub id, in our layout, the published one or LeRobot's, or exported.
        robot (`str` or [`RobotPreset`], *optional*): for the published layout, the preset that supplies what the
            weights do not show; LIBERO by default. Refused for other layouts.
        default_robot (`str` or [`RobotPreset`], *optional*): the same if `robot` is not given. Other layouts ignore
            it, because they say it themselves.
        step (`str` or `int`, *optional*): for the published layout, which of several saved steps to take.
        options: `revision`, `token`, `cache_dir`, `subfolder`, `local_files_only` and `force_download`, and fields of
            [`VLAAdapterConfig`] that replace what the checkpoint says. Of an exported checkpoint, only `norm_stats`.

    Raises:
        FileNotFoundError: when there is no such folder or repository.
        ValueError: when it is not a VLA-Adapter, or a file is missing or damaged.
        TypeError: for an option that does not exist.
    """
    hub = {name: options.pop(name) for name in HUB_ARGUMENTS & set(options)}
    refuse_misspelt(options)
    if unknown := sorted(set(options) - CONFIG_FIELDS):
        raise TypeError(f"{', '.join(unknown)}: neither an option of open_checkpoint nor a field of VLAAdapterConfig.")
    files = open_files(source, **hub)
    stored = read_json(files.path("config.json"), files.source)
    layout = layout_of(stored, files.source)
    if robot is None and layout is PublishedCheckpoint:
        robot = default_robot
    for name, value in (("robot", robot), ("step", step)):
        if value is not None:
            options[name] = value
    return layout.open(files, stored, options)


def layout_of(stored: dict[str, Any], source: str) -> type[Checkpoint]:
    """The class for checkpoints with this `config.json`.

    Raises:
        ValueError: when it is not a VLA-Adapter.
    """
    if is_lerobot(stored):
        return LeRobotCheckpoint
    model_type = stored.get("model_type")
    if not isinstance(model_type, str) or model_type not in LAYOUTS:
        raise ValueError(f"{source} has model_type {model_type!r}; it is not a VLA-Adapter.")
    return LAYOUTS[model_type]
