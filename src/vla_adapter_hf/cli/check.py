"""`vla-adapter check`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vla_adapter_hf.checkpoints.embedded import embedded_folder
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
    parse_numbers,
)
from vla_adapter_hf.doctor.check import check as run
from vla_adapter_hf.doctor.page import as_text
from vla_adapter_hf.doctor.settings import CheckSettings, PolicySettings
from vla_adapter_hf.training.arguments import DataArguments


def check(
    dataset: Annotated[str, typer.Argument(help="Folder or Hub id of demonstrations.")],
    output: Annotated[Path, typer.Option(help="Folder for report.json and report.html.")] = Path("check"),
    against: Annotated[
        str | None,
        typer.Option(help="Folder or Hub id of another dataset that should not have the same episodes."),
    ] = None,
    checkpoint: Annotated[
        str | None,
        typer.Option(help="Folder or Hub id of a policy to ask about the demonstrations; embedded is the one inside."),
    ] = None,
    unnorm_key: Annotated[
        str | None, typer.Option(help="With --checkpoint: its statistics, by default those that fit best.")
    ] = PolicySettings.unnorm_key,
    samples: Annotated[int, typer.Option(help="With --checkpoint: samples to predict.")] = PolicySettings.samples,
    episodes: Annotated[
        str | None,
        typer.Option(help="With --checkpoint: episodes that the policy was not trained on, as in 0,2,5-7."),
    ] = None,
    batch_size: Annotated[
        int, typer.Option(help="With --checkpoint: samples that are predicted at once.")
    ] = PolicySettings.batch_size,
    device: Annotated[str, typer.Option(help="With --checkpoint: cpu, cuda or the like.")] = PolicySettings.device,
    dtype: Annotated[
        str, typer.Option(help="With --checkpoint: float32, bfloat16 or float16.")
    ] = PolicySettings.dtype,
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

    With --checkpoint also check a policy on them: whether it looks, listens, or leans on the state.

    \b
    Examples:
      vla-adapter check me/pick-and-place
      vla-adapter check recordings --cameras front wrist --output outputs/check
      vla-adapter check recordings --against held-out
      vla-adapter check recordings --checkpoint outputs/policy --episodes 40-49
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
    policy = PolicySettings(
        unnorm_key=unnorm_key,
        samples=samples,
        episodes=None if episodes is None else parse_numbers(episodes, "--episodes"),
        batch_size=batch_size,
        device=device,
        dtype=dtype,
    )
    with embedded_folder() as folder:
        report = run(
            dataset,
            output,
            CheckSettings(full=full, chunk_size=chunk_size, fps=fps),
            format,
            robot,
            against,
            str(folder / "checkpoint") if checkpoint == "embedded" else checkpoint,
            policy,
            report_progress=lambda line: typer.echo(line, err=True),
            cameras=split_names(cameras),
            **arguments.reader_options(),
        )
    typer.echo(as_text(report))
    typer.echo(f"\nwrote {output / 'report.html'} and {output / 'report.json'}")
