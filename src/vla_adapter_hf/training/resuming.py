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
# In that file, by the name of the statistics: the episodes that were held out.
HELD_OUT = "held_out"
# In that file: the commit of a start checkpoint on the Hub.
START_COMMIT = "start_commit"
# A resumed run may have other values of these. A dataset may have moved: its statistics are compared instead.
MAY_CHANGE = {"dataset", "picture_episodes", "attn_implementation", "revision", "check_every", "check_samples"}


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


def run_arguments(model: ModelArguments, data: DataArguments, seed: int) -> dict[str, Any]:
    """The arguments that decide the samples and the model, as JSON values. The seed decides what is held out."""
    arguments = dataclasses.asdict(model) | dataclasses.asdict(data) | {"seed": seed}
    if Path(model.checkpoint).exists():
        arguments["checkpoint"] = str(Path(model.checkpoint).resolve())
    return json.loads(json.dumps({name: value for name, value in arguments.items() if name not in MAY_CHANGE}))


def keep_arguments(
    arguments: dict[str, Any], held_out: dict[str, list[int]], start_commit: str | None, output: Path
) -> None:
    """Write to the output folder [`run_arguments`], which episodes are held out, and the start's commit on the Hub."""
    write_json(output / ARGUMENTS, arguments | {HELD_OUT: held_out, START_COMMIT: start_commit})


def kept_start_commit(checkpoint: Path, arguments: dict[str, Any]) -> str | None:
    """The commit of the start checkpoint with which the run of a checkpoint began.

    Its repository may have changed since then, and LoRA's frozen weights come from there.

    Args:
        checkpoint: the checkpoint to resume from.
        arguments: [`run_arguments`] of the run that resumes.

    Returns:
        `None` if the start is a folder, another one, or none was kept.
    """
    kept = checkpoint.parent / ARGUMENTS
    before = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else {}
    return before.get(START_COMMIT) if before.get("checkpoint") == arguments["checkpoint"] else None


def check_same_run(checkpoint: Path, arguments: dict[str, Any], fields: dict[str, Any]) -> None:
    """Refuse to go on with another model or other samples than the run began with.

    Args:
        checkpoint: the checkpoint to resume from.
        arguments: [`run_arguments`] of the run that resumes.
        fields: the model's configuration that follows from them and from the demonstrations.

    Raises:
        ValueError: naming every argument or field that differs, with both values.
    """
    kept = checkpoint.parent / ARGUMENTS
    differing = _differing(kept, arguments) if kept.is_file() else {}
    differing = differing or _differing(checkpoint / "config.json", json.loads(json.dumps(fields)))
    if differing:
        listed = "; ".join(
            f"{name} was {_short(old)} and is now {_short(new)}" for name, (old, new) in differing.items()
        )
        raise ValueError(
            f"{checkpoint} belongs to another run: {listed}. Resume with the arguments that the run began with, or "
            "start a new run in another output_dir."
        )


def _differing(path: Path, values: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Entries of a JSON file that have other values now: (in the file, now) by name."""
    before = json.loads(path.read_text(encoding="utf-8"))
    return {name: (before[name], now) for name, now in values.items() if name in before and before[name] != now}


def _short(value: Any) -> str:
    if value is None:
        return "not given"
    text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) < 60 else f"{text[:50]}..."
