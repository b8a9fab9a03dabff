"""`vla-adapter eval`, `scores` and `demonstrate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vla_adapter_hf.cli.options import format_numbers, parse_numbers
from vla_adapter_hf.recording.demonstrate import demonstrate as record
from vla_adapter_hf.recording.settings import RecordingSettings
from vla_adapter_hf.simulation.evaluate import evaluate as run_evaluation
from vla_adapter_hf.simulation.grid import evaluate_grid
from vla_adapter_hf.simulation.results import joined_table
from vla_adapter_hf.simulation.settings import EvaluationSettings


def evaluate(
    checkpoint: Annotated[str | None, typer.Option(help="Folder or Hub id of the policy.")] = None,
    policy: Annotated[str | None, typer.Option(help="Instead of a checkpoint: embedded, oracle or noop.")] = None,
    suite: Annotated[
        str,
        typer.Option(
            help="libero_spatial, libero_object, libero_goal, libero_10 or libero_90. With _object, _swap, _lan or "
            "_task at its end, a perturbation of LIBERO-PRO; with _pro, all of them."
        ),
    ] = "libero_object",
    output: Annotated[Path, typer.Option(help="Folder for results; an interrupted run goes on there.")] = Path("eval"),
    tasks: Annotated[str | None, typer.Option(help="Which, as in 3 or 0,2,5-7; all by default.")] = None,
    episodes: Annotated[str, typer.Option(help="How many per task, or which, as in 40-49 or 0,7.")] = str(
        EvaluationSettings.episodes
    ),
    placement: Annotated[str, typer.Option(help="official, jitter, shuffle or both.")] = EvaluationSettings.placement,
    seed: Annotated[int, typer.Option(help="Of the placements.")] = EvaluationSettings.seed,
    hard_reset: Annotated[
        bool, typer.Option(help="Rebuild the simulation for each episode: the same, slower.")
    ] = EvaluationSettings.hard_reset,
    processes: Annotated[
        int, typer.Option(help="Environments in parallel, about 2 GB each.")
    ] = EvaluationSettings.processes,
    execute: Annotated[
        int | None, typer.Option(help="Actions of a chunk before the next query; all by default.")
    ] = EvaluationSettings.execute,
    ensemble: Annotated[
        float | None, typer.Option(help="Temporal ensembling: how much less newer chunks count; 0 is their mean.")
    ] = EvaluationSettings.ensemble,
    strategy: Annotated[
        str, typer.Option(help="What the robot does while the policy thinks: sync, async or async-rolled.")
    ] = EvaluationSettings.strategy,
    delay: Annotated[
        int, typer.Option(help="Control steps that a prediction takes; 0 stops the world, as published.")
    ] = EvaluationSettings.delay,
    step_limit: Annotated[
        int | None, typer.Option(help="Steps after which an episode has failed, by default the suite's.")
    ] = EvaluationSettings.step_limit,
    black_images: Annotated[
        bool, typer.Option(help="A control: the policy sees black frames.")
    ] = EvaluationSettings.black_images,
    instruction: Annotated[
        str | None, typer.Option(help="A control: give this instruction instead, or 'other' for another object.")
    ] = EvaluationSettings.instruction,
    rollouts: Annotated[
        int, typer.Option(help="Episodes of each task to keep as films and contact sheets.")
    ] = EvaluationSettings.rollouts,
    rollout_format: Annotated[str, typer.Option(help="gif or mp4.")] = EvaluationSettings.rollout_format,
    save_actions: Annotated[
        bool, typer.Option(help="Keep the executed actions of every episode.")
    ] = EvaluationSettings.save_actions,
    unnorm_key: Annotated[
        str | None, typer.Option(help="Which of the checkpoint's statistics to use.")
    ] = EvaluationSettings.unnorm_key,
    device: Annotated[str | None, typer.Option(help="Such as cuda; the CPU by default.")] = EvaluationSettings.device,
    dtype: Annotated[
        str | None,
        typer.Option(help="Precision: float32, bfloat16, float16 or auto; on the CPU float32 by default, else auto."),
    ] = EvaluationSettings.dtype,
) -> None:
    """Run a policy in closed loop in the LIBERO simulator, by default as published. Needs the extra libero.

    \b
    Examples:
      vla-adapter eval --policy embedded --episodes 40-49 --output results
      vla-adapter eval --checkpoint pick-and-place --suite libero_goal --processes 4 --output results
    """
    if (checkpoint is None) == (policy is None):
        raise ValueError("give either --checkpoint or --policy.")
    if policy not in (None, "embedded", "oracle", "noop"):
        raise ValueError(f"--policy must be embedded, oracle or noop, got {policy!r}; a checkpoint is --checkpoint.")
    settings = EvaluationSettings(
        tasks=None if tasks is None else parse_numbers(tasks, "--tasks"),
        episodes=int(episodes) if episodes.isdecimal() else parse_numbers(episodes, "--episodes"),
        placement=placement,
        seed=seed,
        hard_reset=hard_reset,
        processes=processes,
        execute=execute,
        ensemble=ensemble,
        strategy=strategy,
        delay=delay,
        step_limit=step_limit,
        black_images=black_images,
        instruction=instruction,
        rollouts=rollouts,
        rollout_format=rollout_format,
        save_actions=save_actions,
        unnorm_key=unnorm_key,
        device=device,
        dtype=dtype,
    )
    if suite.endswith("_pro"):
        evaluate_grid(checkpoint or policy, suite.removesuffix("_pro"), output, settings, report=typer.echo)
    else:
        run_evaluation(checkpoint or policy, suite, output, settings, report=typer.echo)
    typer.echo(f"\n{(output / 'summary.md').read_text(encoding='utf-8')}\nwritten to {output}")


def demonstrate(
    output: Annotated[
        Path, typer.Option(help="Folder of the LeRobot dataset; an interrupted recording goes on there.")
    ],
    suite: Annotated[
        str, typer.Option(help="libero_object, the suite with a scripted expert.")
    ] = RecordingSettings.suite,
    official: Annotated[
        int, typer.Option(help="Episodes per task from the official states.")
    ] = RecordingSettings.official,
    jitter: Annotated[
        int, typer.Option(help="Episodes per task with objects moved by up to 5 cm.")
    ] = RecordingSettings.jitter,
    shuffle: Annotated[
        int, typer.Option(help="Episodes per task with objects in each other's places.")
    ] = RecordingSettings.shuffle,
    both: Annotated[int, typer.Option(help="Episodes per task, shuffled and moved.")] = RecordingSettings.both,
    tasks: Annotated[str | None, typer.Option(help="Which, as in 3 or 0,2,5-7; all by default.")] = None,
    workers: Annotated[int, typer.Option(help="Processes, about 2 GB each.")] = RecordingSettings.workers,
    minutes: Annotated[
        float | None, typer.Option(help="Begin nothing new after this time; the dataset holds what is there.")
    ] = RecordingSettings.minutes,
    disturbed: Annotated[
        float, typer.Option(help="Share of episodes with pushes to recover from.")
    ] = RecordingSettings.disturbed,
    retargeted: Annotated[
        float, typer.Option(help="Share of episodes that ask for another object in view.")
    ] = RecordingSettings.retargeted,
    alternatives: Annotated[
        int, typer.Option(help="Other objects for which each row also says what the expert would do.")
    ] = RecordingSettings.alternatives,
    render_every: Annotated[
        int, typer.Option(help="Steps from one row with frames to the next; divides 20.")
    ] = RecordingSettings.render_every,
    chunk_size: Annotated[int, typer.Option(help="Actions stored with each row.")] = RecordingSettings.chunk_size,
    tail: Annotated[int, typer.Option(help="Steps that the expert goes on after success.")] = RecordingSettings.tail,
    image_size: Annotated[
        int, typer.Option(help="Height and width of the stored frames.")
    ] = RecordingSettings.image_size,
    image_format: Annotated[str, typer.Option(help="png (lossless) or jpeg.")] = RecordingSettings.image_format,
    states: Annotated[
        str, typer.Option(help="Initial states to start from; evaluation holds out the others.")
    ] = format_numbers(RecordingSettings.states),
    seed: Annotated[int, typer.Option(help="Of everything that is drawn.")] = RecordingSettings.seed,
    batch: Annotated[
        int, typer.Option(help="Episodes of a task before a process changes to another.")
    ] = RecordingSettings.batch,
    driver: Annotated[
        str | None,
        typer.Option(
            help="Checkpoint (folder, Hub id or embedded) that acts, while the expert says what it should do."
        ),
    ] = RecordingSettings.driver,
    driver_share: Annotated[
        float, typer.Option(help="Of the chunks, how many are the driver's own.")
    ] = RecordingSettings.driver_share,
    driver_unnorm_key: Annotated[
        str | None, typer.Option(help="The driver's statistics; by default those of the suite's name.")
    ] = RecordingSettings.driver_unnorm_key,
) -> None:
    """Record demonstrations of a scripted expert in the LIBERO simulator. Needs the extra libero.

    \b
    Example:
      vla-adapter demonstrate --output recordings --tasks 0-2 --workers 2
    """
    settings = RecordingSettings(
        render_every=render_every,
        chunk_size=chunk_size,
        tail=tail,
        image_size=image_size,
        image_format=image_format,
        disturbed=disturbed,
        retargeted=retargeted,
        alternatives=alternatives,
        seed=seed,
        states=tuple(parse_numbers(states, "--states")),
        suite=suite,
        official=official,
        jitter=jitter,
        shuffle=shuffle,
        both=both,
        tasks=None if tasks is None else parse_numbers(tasks, "--tasks"),
        workers=workers,
        minutes=minutes,
        batch=batch,
        driver=driver,
        driver_share=driver_share,
        driver_unnorm_key=driver_unnorm_key,
    )
    summary = record(output, settings, report=typer.echo)
    typer.echo(
        f"{output}: {summary['episodes']} episodes, {summary['rows']} rows; {summary['recorded_now']} recorded now, "
        f"{summary['failed']} failed and left out"
    )


def scores(
    folders: Annotated[list[Path], typer.Argument(help="Outputs of vla-adapter eval, one per suite.")],
    name: Annotated[
        str | None, typer.Option(help="One name for all, if there is a checkpoint for each suite.")
    ] = None,
) -> None:
    """Join finished evaluations into one table of the published form, ready for a model card.

    \b
    Example:
      vla-adapter scores results/object results/goal --name my-policy
    """
    typer.echo(joined_table(folders, name), nl=False)
