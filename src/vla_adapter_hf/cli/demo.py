"""`vla-adapter demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vla_adapter_hf.demo.run import demo as predict
from vla_adapter_hf.demo.run import play


def demo(
    checkpoint: Annotated[str | None, typer.Option(help="Folder or Hub id; by default the embedded one.")] = None,
    output: Annotated[
        Path, typer.Option(help="Picture to write (.png). The film of --loop gets the same name with .gif.")
    ] = Path("demo.png"),
    unnorm_key: Annotated[str | None, typer.Option(help="Which of the checkpoint's statistics to use.")] = None,
    loop: Annotated[
        bool, typer.Option("--loop", help="Play an episode in the LIBERO simulator. Needs the extra libero.")
    ] = False,
    suite: Annotated[str, typer.Option(help="With --loop: suite of the episode.")] = "libero_object",
    task: Annotated[int, typer.Option(help="With --loop: number of the task.")] = 9,
    episode: Annotated[int, typer.Option(help="With --loop: number of the episode; 40 to 49 are held out.")] = 40,
    placement: Annotated[str, typer.Option(help="With --loop: official, jitter, shuffle or both.")] = "official",
) -> None:
    """Draw a policy's predictions over a recorded episode. Needs the extra plot."""
    if not loop:
        predict(checkpoint, output, unnorm_key, report_progress=typer.echo)
        return
    scene = {"suite": suite, "task": task, "episode": episode, "placement": placement}
    play(checkpoint, output, unnorm_key, **scene, report_progress=typer.echo)
