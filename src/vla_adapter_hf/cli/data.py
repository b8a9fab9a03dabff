"""`vla-adapter stats` and `plot`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vla_adapter_hf.cli.command import split_names
from vla_adapter_hf.cli.options import (
    ActionColumn,
    Cameras,
    ChunkColumn,
    DataRobot,
    DatasetName,
    EpisodeColumn,
    Format,
    FrameColumn,
    Instruction,
    InstructionColumn,
    OnBadEpisode,
    Revision,
    StateColumn,
)
from vla_adapter_hf.data.loading import open_source
from vla_adapter_hf.data.statistics import compute_norm_stats, describe_norm_stats
from vla_adapter_hf.training.arguments import DataArguments
from vla_adapter_hf.training.pictures import plot_checkpoint
from vla_adapter_hf.utils.files import write_json


def stats(
    dataset: Annotated[str, typer.Argument(help="Folder or Hub id of demonstrations.")],
    output: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
    format: Format = DataArguments.format,
    robot: DataRobot = None,
    unnorm_key: Annotated[
        str | None, typer.Option(help="Key of the statistics, by default the dataset's name.")
    ] = None,
    state_column: StateColumn = None,
    action_column: ActionColumn = None,
    chunk_column: ChunkColumn = None,
    episode_column: EpisodeColumn = None,
    frame_column: FrameColumn = None,
    name: DatasetName = None,
    revision: Revision = None,
    on_bad_episode: OnBadEpisode = DataArguments.on_bad_episode,
    use_cache: Annotated[bool, typer.Option(help="Take statistics computed earlier from the same content.")] = True,
) -> None:
    """Compute the statistics that normalise the states and actions of a dataset.

    \b
    Examples:
      vla-adapter stats me/pick-and-place --output stats.json
      vla-adapter stats recordings --robot libero --state-column observation.joints
    """
    arguments = DataArguments(
        [dataset],
        format=format,
        robot=robot,
        state_column=state_column,
        action_column=action_column,
        chunk_column=chunk_column,
        episode_column=episode_column,
        frame_column=frame_column,
        name=name,
        revision=revision,
    )
    source = open_source(dataset, format, robot, **arguments.reader_options())
    norm_stats = compute_norm_stats(source, unnorm_key, on_bad_episode=on_bad_episode, use_cache=use_cache)
    if output is not None:
        write_json(output, norm_stats)
    typer.echo(describe_norm_stats(norm_stats, source.reader.action_names, source.reader.state_names))


def plot(
    checkpoint: Annotated[str, typer.Argument(help="Folder or Hub id of a checkpoint.")],
    dataset: Annotated[str, typer.Argument(help="Folder or Hub id of demonstrations.")],
    output: Annotated[Path, typer.Option(help="Picture to write.")] = Path("chunks.png"),
    format: Format = DataArguments.format,
    robot: DataRobot = None,
    cameras: Cameras = None,
    episodes: Annotated[
        int, typer.Option(help="How many episodes to draw, from the first on.")
    ] = DataArguments.picture_episodes,
    attention: Annotated[
        bool, typer.Option("--attention", help="Draw where the policy looks, on the frames, instead of actions.")
    ] = False,
    state_column: StateColumn = None,
    action_column: ActionColumn = None,
    chunk_column: ChunkColumn = None,
    episode_column: EpisodeColumn = None,
    frame_column: FrameColumn = None,
    instruction_column: InstructionColumn = None,
    instruction: Instruction = None,
    name: DatasetName = None,
    revision: Revision = None,
    on_bad_episode: OnBadEpisode = DataArguments.on_bad_episode,
) -> None:
    """Draw what a checkpoint predicts for recorded episodes, next to what was recorded. Needs the extra plot.

    \b
    Examples:
      vla-adapter plot pick-and-place me/pick-and-place
      vla-adapter plot pick-and-place recordings --cameras front wrist --episodes 1
    """
    arguments = DataArguments(
        [dataset],
        format=format,
        robot=robot,
        cameras=split_names(cameras),
        picture_episodes=episodes,
        state_column=state_column,
        action_column=action_column,
        chunk_column=chunk_column,
        episode_column=episode_column,
        frame_column=frame_column,
        instruction_column=instruction_column,
        instruction=instruction,
        name=name,
        revision=revision,
        on_bad_episode=on_bad_episode,
    )
    typer.echo(plot_checkpoint(checkpoint, arguments, output, attention))
