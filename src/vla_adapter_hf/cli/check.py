"""`vla-adapter check`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vla_adapter_hf.cli.command import split_names
from vla_adapter_hf.cli.options import (
    ActionColumn,
    Cameras,
    DataRobot,
    DatasetName,
    EpisodeColumn,
    Format,
    FrameColumn,
    Instruction,
    InstructionColumn,
    Revision,
    StateColumn,
)
from vla_adapter_hf.doctor.check import check as run
from vla_adapter_hf.doctor.page import as_text
from vla_adapter_hf.doctor.settings import CheckSettings
from vla_adapter_hf.training.arguments import DataArguments


def check(
    dataset: Annotated[str, typer.Argument(help="Folder or Hub id of demonstrations.")],
    output: Annotated[Path, typer.Option(help="Folder for report.json and report.html.")] = Path("check"),
    format: Format = DataArguments.format,
    robot: DataRobot = None,
    cameras: Cameras = None,
    full: Annotated[bool, typer.Option(help="Read more frames: the first of every episode.")] = CheckSettings.full,
    chunk_size: Annotated[
        int | None, typer.Option(help="Actions per chunk; by default 0.4 seconds of them.")
    ] = CheckSettings.chunk_size,
    fps: Annotated[
        float | None, typer.Option(help="Control steps per second; by default the dataset's.")
    ] = CheckSettings.fps,
    state_column: StateColumn = None,
    action_column: ActionColumn = None,
    episode_column: EpisodeColumn = None,
    frame_column: FrameColumn = None,
    instruction_column: InstructionColumn = None,
    instruction: Instruction = None,
    name: DatasetName = None,
    revision: Revision = None,
) -> None:
    """Check demonstrations for what would make a policy fail: wrong actions, late frames, swapped cameras and more.

    \b
    Examples:
      vla-adapter check me/pick-and-place
      vla-adapter check recordings --cameras front wrist --output outputs/check
    """
    arguments = DataArguments(
        [dataset],
        state_column=state_column,
        action_column=action_column,
        episode_column=episode_column,
        frame_column=frame_column,
        instruction_column=instruction_column,
        instruction=instruction,
        name=name,
        revision=revision,
    )
    report = run(
        dataset,
        output,
        CheckSettings(full=full, chunk_size=chunk_size, fps=fps),
        format,
        robot,
        report_progress=lambda line: typer.echo(line, err=True),
        cameras=split_names(cameras),
        **arguments.reader_options(),
    )
    typer.echo(as_text(report))
    typer.echo(f"\nwrote {output / 'report.html'} and {output / 'report.json'}")
