"""Going on with an interrupted training: from which checkpoint, and only if the run is the same."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vla_adapter_hf.training.arguments import DataArguments, ModelArguments
from vla_adapter_hf.training.checkpoints import (
    TRAINER_STATE,
    find_damage,
    last_finished_checkpoint,
    list_checkpoints,
)
from vla_adapter_hf.training.trainer import VLAAdapterTrainingArguments
from vla_adapter_hf.utils.files import write_json


# Names with this first letter are not uploaded: the file holds paths of this machine.
ARGUMENTS = "_arguments.json"
# A resumed run may have other values of these: they change neither the samples nor the model.
MAY_CHANGE = {"dataset", "picture_episodes", "attn_implementation", "revision"}


def find_checkpoint(arguments: VLAAdapterTrainingArguments, report_progress: Callable[[str], None]) -> Path | None:
    """The checkpoint that `resume_from_checkpoint` means: a folder, or `true` for the last finished one.

    Raises:
        ValueError: the folder holds a training and `resume_from_checkpoint` was not given, or the checkpoint that it
            names cannot be resumed from.
    """
    output, wanted = Path(arguments.output_dir), str(arguments.resume_from_checkpoint or "")
    checkpoints = list_checkpoints(output)
    if wanted.lower() in ("", "false"):
        finished = [path for path in checkpoints if (path / TRAINER_STATE).is_file()]
        if finished:
            raise ValueError(
                f"output_dir={output} holds {finished[0].name}. Go on with --resume_from_checkpoint true, or name a "
                "new folder."
            )
        return None
    if wanted.lower() != "true":
        damage = find_damage(Path(wanted)) if Path(wanted).is_dir() else "is no folder"
        if damage is not None:
            raise ValueError(f"resume_from_checkpoint={wanted} cannot be resumed from: {damage}.")
        return Path(wanted)
    found = last_finished_checkpoint(output)
    for path in checkpoints:
        if path == found:
            break
        report_progress(f"Passing over {path.name}: {find_damage(path)}")
    report_progress(
        f"Resuming from {found.name}"
        if found
        else "No finished checkpoint to resume from, starting from the beginning"
    )
    return found


def keep_arguments(model: ModelArguments, data: DataArguments, output: Path) -> None:
    """Write the arguments to the output folder, for [`check_same_run`]."""
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / ARGUMENTS, _as_dict(model, data))


def check_same_run(checkpoint: Path, model: ModelArguments, data: DataArguments, fields: dict[str, Any]) -> None:
    """Refuse to go on with another model or other samples than the run began with.

    Args:
        checkpoint: the checkpoint to resume from.
        model, data: the arguments of the run that resumes.
        fields: the model's configuration that follows from them and from the demonstrations.

    Raises:
        ValueError: naming every argument or field that differs, with both values.
    """
    kept = checkpoint.parent / ARGUMENTS
    differing = {}
    if kept.is_file():
        before = json.loads(kept.read_text(encoding="utf-8"))
        now = _as_dict(model, data)
        differing = {name: (before[name], now[name]) for name in now if name in before and before[name] != now[name]}
    if not differing:
        before = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
        now = json.loads(json.dumps(fields))
        differing = {
            name: (before.get(name), now[name]) for name in now if name in before and before[name] != now[name]
        }
    if differing:
        listed = "; ".join(
            f"{name} was {_short(old)} and is now {_short(new)}" for name, (old, new) in differing.items()
        )
        raise ValueError(
            f"{checkpoint} belongs to another run: {listed}. Resume with the arguments that the run began with, or "
            "start a new run in another output_dir."
        )


def _as_dict(model: ModelArguments, data: DataArguments) -> dict[str, Any]:
    arguments = dataclasses.asdict(model) | dataclasses.asdict(data)
    if Path(model.checkpoint).exists():
        arguments["checkpoint"] = str(Path(model.checkpoint).resolve())
    return json.loads(json.dumps({name: value for name, value in arguments.items() if name not in MAY_CHANGE}))


def _short(value: Any) -> str:
    if value is None:
        return "not given"
    text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) < 60 else f"{text[:50]}..."
