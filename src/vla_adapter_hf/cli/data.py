"""`vla-adapter stats` and `plot`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vla_adapter_hf.cli.command import split_names
from vla_adapter_hf.cli.options import Cameras
from vla_adapter_hf.data import dataset_statistics, describe_norm_stats
from vla_adapter_hf.training.pictures import plot_checkpoint


def stats(
    dataset: Annotated[str, typer.Argument(help="Folder or Hub id of demonstrations.")],
    output: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
    format: Annotated[str, typer.Option(help="lerobot, rlds, dataset or auto.")] = "auto",
    robot: Annotated[str | None, typer.Option(help="Preset whose gripper and state conventions apply.")] = None,
    unnorm_key: Annotated[str | None, typer.Option(help="Key to file the statistics under.")] = None,
    name: Annotated[str | None, typer.Option(help="Which dataset, where an RLDS folder holds several.")] = None,
    on_bad_episode: Annotated[str, typer.Option(help="error or skip.")] = "error",
    use_cache: Annotated[bool, typer.Option(help="Take statistics computed earlier from the same content.")] = True,
) -> None:
    """Compute the statistics that normalise the states and actions of a dataset."""
    norm_stats = dataset_statistics(
        dataset,
        format,
        robot,
        unnorm_key,
        name=name,
        on_bad_episode=on_bad_episode,
        output=output,
        use_cache=use_cache,
    )
    typer.echo(describe_norm_stats(norm_stats))


def plot(
    checkpoint: str,
    dataset: str,
    output: Annotated[Path, typer.Option(help="Picture to write.")] = Path("chunks.png"),
    format: Annotated[str, typer.Option(help="lerobot, rlds, dataset or auto.")] = "auto",
    robot: Annotated[str | None, typer.Option(help="Preset whose gripper and state conventions apply.")] = None,
    cameras: Cameras = None,
    episodes: Annotated[int, typer.Option(help="How many episodes to draw, from the first on.")] = 3,
) -> None:
    """Draw what a checkpoint predicts for recorded episodes, next to what was recorded. Needs the extra plot."""
    typer.echo(plot_checkpoint(checkpoint, dataset, output, format, robot, split_names(cameras), episodes))
