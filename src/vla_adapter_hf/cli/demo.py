"""`vla-adapter demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vla_adapter_hf.demo import demo as run_demo


def demo(
    checkpoint: Annotated[str | None, typer.Option(help="Folder or Hub id; by default the embedded one.")] = None,
    output: Annotated[
        Path, typer.Option(help="Picture to write (.png). The film of an episode gets the same name with .gif.")
    ] = Path("demo.png"),
    unnorm_key: Annotated[str | None, typer.Option(help="Which of the checkpoint's statistics to use.")] = None,
    loop: Annotated[
        bool | None,
        typer.Option(help="Play an episode, or predict once; by default an episode where the simulator is installed."),
    ] = None,
    suite: Annotated[str, typer.Option(help="Suite of the episode.")] = "libero_object",
    task: Annotated[int, typer.Option(help="Number of the task.")] = 9,
    episode: Annotated[int, typer.Option(help="Number of the episode; 40 to 49 are held out.")] = 40,
    placement: Annotated[str, typer.Option(help="official, jitter, shuffle or both.")] = "official",
) -> None:
    """Draw a prediction for a recorded observation, or an episode in the LIBERO simulator where that is installed."""
    run_demo(checkpoint, output, unnorm_key, loop, suite, task, episode, placement, say=typer.echo)
