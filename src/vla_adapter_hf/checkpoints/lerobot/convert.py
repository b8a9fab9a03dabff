"""`vla-adapter to-lerobot` and `from-lerobot`: the same weights in LeRobot's layout and in our own."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers.dynamic_module_utils import custom_object_save

from vla_adapter_hf.checkpoints.checkpoint import Checkpoint
from vla_adapter_hf.checkpoints.embedded import named_source
from vla_adapter_hf.checkpoints.files import find_weights, read_json, stored_dtypes
from vla_adapter_hf.checkpoints.lerobot.checkpoint import LeRobotCheckpoint
from vla_adapter_hf.checkpoints.lerobot.layout import (
    PROCESSOR_FILES,
    STATE_FILE,
    check_robot,
    pack_files,
    pipelines,
    policy_config,
    unpack_files,
)
from vla_adapter_hf.checkpoints.model_card import fill_model_card
from vla_adapter_hf.checkpoints.open import open_checkpoint
from vla_adapter_hf.checkpoints.own import OwnCheckpoint
from vla_adapter_hf.checkpoints.saving import check_destination
from vla_adapter_hf.modeling.modeling_vla_adapter import VLAAdapterForActionPrediction
from vla_adapter_hf.utils.files import atomic_path, write_json, write_text


CARD = "README.md"
INDEX = "model.safetensors.index.json"


def to_lerobot(
    source: str,
    destination: str | Path,
    robot: str | None = None,
    unnorm_key: str | None = None,
    report_progress: Callable[[str], None] = print,
) -> Path:
    """Write a checkpoint of our own layout as a policy that LeRobot's commands take as `--policy.path`.

    The weights' files are copied. Statistics, processor and model card come along. LeRobot's commands then compute in
    the weights' precision (`--policy.dtype`).

    Args:
        source (`str`): folder or Hub id of a checkpoint in our own layout, or `embedded`.
        destination (`str` or `Path`): folder to make. It appears complete or not at all.
        robot (`str`, *optional*): preset of the robot's conventions, e.g. `libero`; `none` sends actions as they were
            learnt. Needed where the gripper was learnt as 0...1.
        unnorm_key (`str`, *optional*): which of the model's statistics to use. Not needed if there is one set.
        report_progress (`Callable`): receives lines of progress.

    Returns:
        `Path`: the destination.

    Raises:
        ValueError: for a source in another layout or without statistics, a robot that does not fit, or a destination
            that exists; nothing is written.
    """
    destination = check_destination(destination)
    with named_source(source) as opened:
        _write_policy(open_checkpoint(opened), source, destination, robot, unnorm_key)
    report_progress(f"Done: {destination}, for --policy.path of LeRobot's commands")
    return destination


def _write_policy(
    checkpoint: Checkpoint, source: str, destination: Path, robot: str | None, unnorm_key: str | None
) -> None:
    if type(checkpoint) is not OwnCheckpoint:
        raise ValueError(
            f"{source} has the layout {checkpoint.layout!r}; to-lerobot takes our own. A published checkpoint is "
            f"rewritten with `vla-adapter convert {source} DESTINATION`."
        )
    checkpoint.check()
    check_robot(checkpoint.config, robot, unnorm_key)
    files = checkpoint.files
    model = read_json(files.path("config.json"), files.source)
    processor = {name: files.path(name).read_bytes() for name in PROCESSOR_FILES if name in files.names}
    with atomic_path(destination) as temporary:
        temporary.mkdir()
        _copy(checkpoint, [*_weights(checkpoint), *([CARD] if CARD in files.names else [])], temporary)
        config = policy_config(model, checkpoint.config, robot, unnorm_key)
        write_json(temporary / "config.json", {**config, "dtype": _stored_dtype(checkpoint)})
        for name, pipeline in pipelines(robot).items():
            write_json(temporary / f"{name}.json", pipeline)
        save_file(pack_files(processor), temporary / STATE_FILE)
        written = open_checkpoint(temporary)
        written.check()
        written.load_processor()


def from_lerobot(source: str, destination: str | Path, report_progress: Callable[[str], None] = print) -> Path:
    """Write a policy that LeRobot trained as a checkpoint of our own layout. The weights' files are copied.

    Args:
        source (`str`): folder or Hub id: the folder `pretrained_model` of LeRobot's training.
        destination (`str` or `Path`): folder to make. It appears complete or not at all.
        report_progress (`Callable`): receives lines of progress.

    Returns:
        `Path`: the destination.

    Raises:
        ValueError: for a source that is no VLA-Adapter in LeRobot's layout, or a destination that exists; nothing is
            written.
    """
    destination = check_destination(destination)
    checkpoint = open_checkpoint(source)
    if not isinstance(checkpoint, LeRobotCheckpoint):
        raise ValueError(f"{source} has the layout {checkpoint.layout!r}; from-lerobot takes what LeRobot wrote.")
    checkpoint.check()
    processor, config = checkpoint.load_processor(), checkpoint.config
    with atomic_path(destination) as temporary:
        temporary.mkdir()
        processor.save_pretrained(temporary)
        unpack_files(checkpoint.processor_files(), temporary)
        _copy(checkpoint, _weights(checkpoint), temporary)
        # The code for trust_remote_code, and its entry in config.json, as `save_pretrained` of a model writes them.
        with torch.device("meta"):
            custom_object_save(VLAAdapterForActionPrediction(config), temporary, config=config)
        config.save_pretrained(temporary)
        if CARD in checkpoint.files.names:
            _copy(checkpoint, [CARD], temporary)
        else:
            card = fill_model_card(config, destination.name, "Trained with LeRobot.", destination.name)
            write_text(temporary / CARD, card)
        open_checkpoint(temporary).check()
    policy = checkpoint.policy
    if policy.get("dtype") == _stored_dtype(checkpoint):
        policy = {**policy, "dtype": None}
    for option in ("robot", "unnorm_key", "dtype"):
        if policy.get(option) is not None:
            report_progress(f"  not in our layout: {option}={policy[option]!r}; name it where it is needed")
    report_progress(f"Done: {destination}")
    return destination


def _stored_dtype(checkpoint: Checkpoint) -> str:
    """The precision in which LeRobot's commands compute what ours compute in that of the files."""
    paths = [checkpoint.files.path(name) for name in find_weights(checkpoint.files)]
    found = set.union(*map(stored_dtypes, paths))
    return "bfloat16" if found == {torch.bfloat16} else "float32"


def _weights(checkpoint: Checkpoint) -> list[str]:
    names = find_weights(checkpoint.files)
    return names if names == ["model.safetensors"] else [*names, INDEX]


def _copy(checkpoint: Checkpoint, names: list[str], folder: Path) -> None:
    for name in names:
        shutil.copyfile(checkpoint.files.path(name), folder / name)
