"""The commands of the simulators: `vla-adapter eval`, `scores`, `demonstrate`, `calvin-check`, `convert-dataset`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vla_adapter_hf.cli.command import split_names
from vla_adapter_hf.cli.options import format_numbers, parse_numbers
from vla_adapter_hf.cli.settings import Text, takes_settings
from vla_adapter_hf.recording.convert_calvin import ConversionSettings, convert_calvin
from vla_adapter_hf.recording.demonstrate import demonstrate as record
from vla_adapter_hf.recording.settings import RecordingSettings
from vla_adapter_hf.simulation.calvin.check import check_calvin
from vla_adapter_hf.simulation.calvin.install import RENDERERS
from vla_adapter_hf.simulation.delays import delay_table, evaluate_delays, is_delay_grid, read_cells, write_delays
from vla_adapter_hf.simulation.evaluate import evaluate as run_evaluation
from vla_adapter_hf.simulation.grid import evaluate_grid, evaluate_grids
from vla_adapter_hf.simulation.results import joined_table
from vla_adapter_hf.simulation.settings import DelaySettings
from vla_adapter_hf.simulation.shards import Shard, has_shards, join_shards


TASKS = Text(lambda text: parse_numbers(text, "--tasks"))


def parse_episodes(text: str) -> int | list[int]:
    """`"50"` is how many, `"40-49"` or `"0,7"` which."""
    return int(text) if text.isdecimal() else parse_numbers(text, "--episodes")


@takes_settings(
    DelaySettings,
    without=("delay", "strategy"),
    texts={
        "tasks": TASKS,
        "episodes": Text(parse_episodes),
        "delays": Text(lambda text: parse_numbers(text, "--delay"), "0"),
        "strategies": Text(lambda text: split_names([text]), "sync"),
    },
    names={"delays": "--delay", "strategies": "--strategy"},
)
def evaluate(
    checkpoint: Annotated[str | None, typer.Option(help="Folder or Hub id of the policy.")] = None,
    policy: Annotated[str | None, typer.Option(help="Instead of a checkpoint: embedded, oracle or noop.")] = None,
    suite: Annotated[
        str,
        typer.Option(
            help="libero_spatial, libero_object, libero_goal, libero_10, libero_90 or calvin_abc_d. With _object, "
            "_swap, _lan or _task at its end, a perturbation of LIBERO-PRO; with _pro, all of them; pro is all of "
            "them for all four suites."
        ),
    ] = "libero_object",
    output: Annotated[Path, typer.Option(help="Folder for results; an interrupted run goes on there.")] = Path("eval"),
    *,
    settings: DelaySettings,
) -> None:
    """Run a policy in closed loop in LIBERO or CALVIN, by default as published. LIBERO needs the extra libero.

    Several delays or strategies make a table and a plot of what a slow answer costs.

    \b
    Examples:
      vla-adapter eval --policy embedded --episodes 40-49 --output results
      vla-adapter eval --checkpoint pick-and-place --suite libero_goal --processes 4 --output results
      vla-adapter eval --policy embedded --delay 0,4,8 --strategy sync,async --step-limit 600 --output delays
    """
    if (checkpoint is None) == (policy is None):
        raise ValueError("give either --checkpoint or --policy.")
    if policy not in (None, "embedded", "oracle", "noop"):
        raise ValueError(f"--policy must be embedded, oracle or noop, got {policy!r}; a checkpoint is --checkpoint.")
    table = "summary.md"
    if len(settings.delays) > 1 or len(settings.strategies) > 1:
        evaluate_delays(checkpoint or policy, suite, output, settings, report=typer.echo)
        table = "delays.md"
    else:
        [cell] = settings.cells().values()
        if suite == "pro":
            evaluate_grids(checkpoint or policy, output, cell, report=typer.echo)
        elif suite.endswith("_pro"):
            evaluate_grid(checkpoint or policy, suite.removesuffix("_pro"), output, cell, report=typer.echo)
        else:
            run_evaluation(checkpoint or policy, suite, output, cell, report=typer.echo)
    if settings.shard is not None:
        output = output / Shard.parse(settings.shard).folder
    typer.echo(f"\n{(output / table).read_text(encoding='utf-8')}\nwritten to {output}")


@takes_settings(
    RecordingSettings,
    texts={
        "tasks": TASKS,
        "states": Text(lambda text: tuple(parse_numbers(text, "--states")), format_numbers(RecordingSettings.states)),
    },
)
def demonstrate(
    output: Annotated[
        Path, typer.Option(help="Folder of the LeRobot dataset; an interrupted recording goes on there.")
    ],
    *,
    settings: RecordingSettings,
) -> None:
    """Record demonstrations of a scripted expert in the LIBERO simulator. Needs the extra libero.

    \b
    Example:
      vla-adapter demonstrate --output recordings --tasks 0-2 --workers 2
    """
    summary = record(output, settings, report=typer.echo)
    typer.echo(
        f"{output}: {summary['episodes']} episodes, {summary['rows']} rows; {summary['recorded_now']} recorded now, "
        f"{summary['failed']} failed and left out"
    )


def calvin_check(
    renderer: Annotated[
        str | None, typer.Option(help="egl or cpu; by default both are tried, egl in a process of its own.")
    ] = None,
) -> None:
    """Say whether CALVIN's simulator works here, what is missing and what to do.

    Tries a reset, a rendering and a subtask that is solved by force. The exit status is 0 if all is there.

    \b
    Example:
      vla-adapter calvin-check --renderer cpu
    """
    if not check_calvin(report=typer.echo, renderers=RENDERERS if renderer is None else (renderer,)):
        raise typer.Exit(1)


@takes_settings(ConversionSettings)
def convert_dataset(
    format: Annotated[str, typer.Argument(help="What the recordings are: calvin.")],
    source: Annotated[Path, typer.Argument(help="Folder with episode_*.npz, such as task_ABC_D/training.")],
    output: Annotated[
        Path, typer.Argument(help="Folder of the LeRobot dataset; an interrupted conversion goes on there.")
    ],
    *,
    settings: ConversionSettings,
) -> None:
    """Rewrite CALVIN's own recordings as a LeRobot v3.0 dataset: every annotated span becomes an episode.

    \b
    Example:
      vla-adapter convert-dataset calvin task_ABC_D/training calvin_abc_rlds --workers 4
    """
    if format != "calvin":
        raise ValueError(f"format={format!r} cannot be converted; calvin can. LeRobot and RLDS are read as they are.")
    summary = convert_calvin(source, output, settings, report=typer.echo)
    typer.echo(
        f"{output}: {summary['episodes']} episodes, {summary['rows']} rows; {summary['converted_now']} converted now. "
        f"Train with --robot calvin."
    )


def scores(
    folders: Annotated[
        list[Path],
        typer.Argument(help="Outputs of vla-adapter eval: one per suite, or one per placement with several delays."),
    ],
    name: Annotated[
        str | None, typer.Option(help="One name for all, if there is a checkpoint for each suite.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="With several delays: folder for the table, its numbers and a plot.")
    ] = None,
) -> None:
    """Join finished evaluations into one table of the published form, ready for a model card.

    Outputs with several delays become one table of delays and strategies. Shards in a folder
    (eval --shard) are joined first. The folder then has the lines and the summary of one run.

    \b
    Examples:
      vla-adapter scores results/object results/goal --name my-policy
      vla-adapter scores delays/official delays/jitter --output delays
    """
    if not all(map(is_delay_grid, folders)):
        if output is not None:
            raise ValueError(f"output={str(output)!r} is for evaluations with several delays.")
        for folder in folders:
            if has_shards(folder):
                join_shards(folder)
        typer.echo(joined_table(folders, name), nl=False)
        return
    if name is not None:
        raise ValueError(f"name={name!r} is for evaluations without a delay.")
    cells = read_cells(folders) if output is None else write_delays(folders, output, report=typer.echo)
    typer.echo(delay_table(cells), nl=False)
