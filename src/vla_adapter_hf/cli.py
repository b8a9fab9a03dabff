"""The command line: `vla-adapter`. Every command is a thin layer over a function that can be called as well."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer


app = typer.Typer(
    help="VLA-Adapter, the tiny vision-language-action policy, for transformers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Robot = Annotated[str | None, typer.Option(help="Robot preset for what published weights do not tell: libero, ...")]
Step = Annotated[str | None, typer.Option(help="Which of several saved steps to take, e.g. 150000 or latest.")]


@contextmanager
def readable_errors() -> Iterator[None]:
    """What the user can mend is one line and exit code 1; what is a bug keeps its traceback."""
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError) as error:
        typer.secho(f"error: {error}", fg="red", err=True)
        raise typer.Exit(1) from error
    except KeyboardInterrupt:
        typer.secho("interrupted", fg="yellow", err=True)
        raise typer.Exit(130) from None


@app.command()
def info(source: str, robot: Robot = None, step: Step = None) -> None:
    """Say what a checkpoint is (either layout), without loading its weights."""
    from vla_adapter_hf.checkpoints.info import checkpoint_info

    with readable_errors():
        facts = checkpoint_info(source, robot, step)
    width = max(map(len, facts))
    for name, text in facts.items():
        typer.echo(f"{name:<{width}}  {text}")


@app.command()
def convert(
    source: str,
    destination: Path,
    robot: Robot = None,
    step: Step = None,
    dtype: Annotated[str | None, typer.Option(help="Precision to store: float32, bfloat16 or float16.")] = None,
    push_to_hub: Annotated[str | None, typer.Option(help="Hub id to upload the result to.")] = None,
) -> None:
    """Write a published checkpoint as a normal transformers model."""
    from vla_adapter_hf.checkpoints.convert import convert as run

    with readable_errors():
        run(source, destination, robot, step, _dtype(dtype), push_to_hub, say=typer.echo)


@app.command()
def init(
    destination: Path,
    base: Annotated[str | None, typer.Option(help="Base vision-language model in its own layout.")] = None,
    config: Annotated[
        Path | None, typer.Option(help="JSON of VLAAdapterConfig's fields: a model from nothing, all weights random.")
    ] = None,
    instructions: Annotated[
        Path | None, typer.Option(help="With --config: text file, one per line, to cut the vocabulary down to.")
    ] = None,
    dinov2: Annotated[str | None, typer.Option(help="DINOv2 with registers: folder or Hub id.")] = None,
    siglip: Annotated[str | None, typer.Option(help="SigLIP: folder or Hub id.")] = None,
    language_model: Annotated[str | None, typer.Option(help="Qwen2.5: folder or Hub id.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="Where it is, if not with the language model.")] = None,
    robot: Annotated[
        str | None, typer.Option(help="Robot preset for sizes, cameras and normalisation; libero by default.")
    ] = None,
    cameras: Annotated[str | None, typer.Option(help="Camera names in order, as in front,wrist.")] = None,
    chunk_size: Annotated[int | None, typer.Option(help="Actions per chunk.")] = None,
    action_dim: Annotated[int | None, typer.Option(help="Size of an action.")] = None,
    proprio_dim: Annotated[int | None, typer.Option(help="Size of the state.")] = None,
    norm_type: Annotated[str | None, typer.Option(help="bounds_q99, bounds or normal.")] = None,
    norm_stats: Annotated[Path | None, typer.Option(help="JSON file of statistics.")] = None,
    policy_variant: Annotated[str | None, typer.Option(help="pro (the default) or original.")] = None,
    prompt_style: Annotated[
        str, typer.Option(help="chat, as the published models, or in_out, which is short.")
    ] = "chat",
    step: Step = None,
    dtype: Annotated[str, typer.Option(help="Precision to store: float32, bfloat16 or float16.")] = "float32",
    seed: Annotated[int, typer.Option(help="What the new parts are drawn from.")] = 0,
) -> None:
    """Write a model with a new policy, to train from: a base model, DINOv2 + SigLIP + Qwen2.5, or nothing at all."""
    from vla_adapter_hf.init.pretrained import init as run
    from vla_adapter_hf.init.untrained import init_untrained

    fields = {"chunk_size": chunk_size, "action_dim": action_dim, "proprio_dim": proprio_dim, "norm_type": norm_type}
    fields |= {"cameras": cameras.split(",") if cameras else None, "policy_variant": policy_variant}
    options = {"dinov2": dinov2, "siglip": siglip, "language_model": language_model, "tokenizer": tokenizer}
    options |= {"robot": robot, "norm_stats": norm_stats, "step": step, "seed": seed, "prompt_style": prompt_style}
    with readable_errors():
        given = {name: value for name, value in fields.items() if value is not None}
        if config is not None:
            others = {"base": base, "dinov2": dinov2, "siglip": siglip, "language_model": language_model, "step": step}
            others |= {"robot": robot, "norm_stats": norm_stats}
            surplus = [f"--{name.replace('_', '-')}" for name, value in others.items() if value is not None]
            if surplus:
                raise ValueError(f"--config starts from nothing; leave {', '.join(surplus)} out.")
            if tokenizer is None:
                raise ValueError("--config needs --tokenizer: the folder or Hub id of a Qwen2 tokenizer.")
            about = {"tokenizer": tokenizer, "instructions": instructions, "prompt_style": prompt_style, "seed": seed}
            given |= {"dtype": _dtype(dtype)}
            init_untrained(destination, config, **about, say=typer.echo, **given)
            return
        if instructions is not None:
            raise ValueError("--instructions cuts down the vocabulary of a model from nothing; it needs --config.")
        run(destination, base, dtype=_dtype(dtype), say=typer.echo, **options, **given)


@app.command()
def demo(
    checkpoint: Annotated[str | None, typer.Option(help="Folder or Hub id; by default the embedded one.")] = None,
    output: Annotated[
        Path, typer.Option(help="Picture to write (.png); an episode's film goes beside it as .gif.")
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
    """Play an episode in the LIBERO simulator; without it, predict on a recorded observation. Draws either."""
    with readable_errors():
        from vla_adapter_hf.demo import demo as run

        run(checkpoint, output, unnorm_key, loop, suite, task, episode, placement, say=typer.echo)


@app.command()
def bench(
    checkpoint: Annotated[str | None, typer.Argument(help="Folder or Hub id; by default the embedded one.")] = None,
    size: Annotated[
        str | None, typer.Option(help="Random weights instead of a checkpoint: full, shallow or small.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="Precision: float32, bfloat16 or float16.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    threads: Annotated[int | None, typer.Option(help="Of the CPU; by default torch's choice.")] = None,
    batch: Annotated[str, typer.Option(help="Observations at once, as in 1,2,4,8.")] = "1",
    runs: Annotated[int, typer.Option(help="Predictions that count, for every figure.")] = 10,
    warmup: Annotated[int, typer.Option(help="Predictions before them that do not.")] = 2,
    compiled: Annotated[
        bool, typer.Option("--compile", help="A switch: predict after compile_for_inference.")
    ] = False,
    quantize: Annotated[str | None, typer.Option(help="Weights in int8 or int4.")] = None,
    attn: Annotated[
        str | None, typer.Option(help="Attention: sdpa, eager, ..., or by part, as in dinov2=eager,siglip=eager.")
    ] = None,
    against: Annotated[str | None, typer.Option(help="Command of a program to predict in turn with.")] = None,
    turns: Annotated[bool, typer.Option(help="Be that program: a prediction per line of input.")] = False,
    output: Annotated[Path | None, typer.Option(help="JSON file to write the report to.")] = None,
) -> None:
    """Time predictions by stage, set them against the machine's matrix products, and measure memory and loading."""
    with readable_errors():
        from vla_adapter_hf.bench.run import bench as run
        from vla_adapter_hf.bench.run import serve_turns
        from vla_adapter_hf.bench.settings import BenchSettings

        settings = BenchSettings(
            checkpoint=checkpoint,
            size=size,
            dtype=_dtype(dtype),
            device=device,
            threads=threads,
            batch_sizes=tuple(_batch_sizes(batch)),
            runs=runs,
            warmup=warmup,
            compiled=compiled,
            quantize=quantize,
            attention=_attention(attn),
        )
        if not turns:
            run(settings, against=against, output=output, report_progress=typer.echo)
        elif against is not None or output is not None:
            raise ValueError("--turns answers with seconds only: leave --against and --output out.")
        else:
            serve_turns(settings, report_progress=lambda line: typer.echo(line, err=True))


@app.command()
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
    """Compute the statistics that a dataset is normalised with."""
    from vla_adapter_hf.data import dataset_statistics, describe_norm_stats

    with readable_errors():
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


@app.command()
def plot(
    checkpoint: str,
    dataset: str,
    output: Annotated[Path, typer.Option(help="Picture to write.")] = Path("chunks.png"),
    format: Annotated[str, typer.Option(help="lerobot, rlds, dataset or auto.")] = "auto",
    robot: Annotated[str | None, typer.Option(help="Preset whose gripper and state conventions apply.")] = None,
    cameras: Annotated[list[str] | None, typer.Option(help="Camera columns, in the model's order.")] = None,
    episodes: Annotated[int, typer.Option(help="How many episodes to draw, from the first on.")] = 3,
) -> None:
    """Draw what a checkpoint predicts over recorded episodes beside what was recorded."""
    from vla_adapter_hf.training.pictures import plot_checkpoint

    with readable_errors():
        typer.echo(plot_checkpoint(checkpoint, dataset, output, format, robot, cameras, episodes))


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
)
def train(context: typer.Context) -> None:
    """Fine-tune on demonstrations; arguments are listed by `vla-adapter train --help`."""
    from vla_adapter_hf.training.arguments import parse_arguments
    from vla_adapter_hf.training.train import train as run

    with readable_errors():
        run(*parse_arguments(context.args), say=typer.echo)


@app.command(name="eval")
def evaluate(
    checkpoint: Annotated[str | None, typer.Option(help="Folder or Hub id of the policy.")] = None,
    policy: Annotated[str | None, typer.Option(help="Instead of a checkpoint: embedded, oracle or noop.")] = None,
    suite: Annotated[
        str, typer.Option(help="libero_spatial, libero_object, libero_goal, libero_10, ...")
    ] = "libero_object",
    output: Annotated[Path, typer.Option(help="Folder for results; an interrupted run goes on there.")] = Path("eval"),
    tasks: Annotated[str | None, typer.Option(help="Which, as in 3 or 0,2,5-7; all by default.")] = None,
    episodes: Annotated[str, typer.Option(help="How many per task, or which, as in 40-49 or 0,7.")] = "50",
    placement: Annotated[str, typer.Option(help="official, jitter, shuffle or both.")] = "official",
    seed: Annotated[int, typer.Option(help="Of the placements.")] = 0,
    hard_reset: Annotated[
        bool, typer.Option(help="Rebuild the simulation for each episode: the same, slower.")
    ] = False,
    processes: Annotated[int, typer.Option(help="Environments in parallel, about 2 GB each.")] = 1,
    execute: Annotated[
        int | None, typer.Option(help="Actions of a chunk before the next query; all by default.")
    ] = None,
    ensemble: Annotated[
        float | None, typer.Option(help="Temporal ensembling: how much less newer chunks count; 0 is their mean.")
    ] = None,
    black_images: Annotated[bool, typer.Option(help="A control: the policy sees black frames.")] = False,
    instruction: Annotated[
        str | None, typer.Option(help="A control: tell it this, or 'other' for another object.")
    ] = None,
    rollouts: Annotated[int, typer.Option(help="Episodes of each task to keep as films and contact sheets.")] = 0,
    rollout_format: Annotated[str, typer.Option(help="gif or mp4.")] = "gif",
    save_actions: Annotated[bool, typer.Option(help="Keep the executed actions of every episode.")] = False,
    unnorm_key: Annotated[str | None, typer.Option(help="Which of the checkpoint's statistics to use.")] = None,
    device: Annotated[str | None, typer.Option(help="Such as cuda; the CPU by default.")] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="Precision: float32, bfloat16, float16 or auto; on the CPU float32 by default, else auto."),
    ] = None,
) -> None:
    """Run a policy in closed loop in the LIBERO simulator, by the published protocol unless told otherwise."""
    with readable_errors():
        from vla_adapter_hf.simulation.evaluate import evaluate as run

        if (checkpoint is None) == (policy is None):
            raise ValueError("give either --checkpoint or --policy.")
        if policy not in (None, "embedded", "oracle", "noop"):
            raise ValueError(
                f"--policy must be embedded, oracle or noop, got {policy!r}; a checkpoint is --checkpoint."
            )
        run(
            checkpoint or policy,
            suite,
            output,
            tasks=None if tasks is None else _numbers(tasks, "--tasks"),
            episodes=int(episodes) if episodes.isdecimal() else _numbers(episodes, "--episodes"),
            placement=placement,
            seed=seed,
            hard_reset=hard_reset,
            processes=processes,
            execute=execute,
            ensemble=ensemble,
            black_images=black_images,
            instruction=instruction,
            rollouts=rollouts,
            rollout_format=rollout_format,
            save_actions=save_actions,
            unnorm_key=unnorm_key,
            device=device,
            dtype=dtype,
            report=typer.echo,
        )
        typer.echo(f"\n{(output / 'summary.md').read_text(encoding='utf-8')}\nwritten to {output}")


@app.command()
def demonstrate(
    output: Annotated[
        Path, typer.Option(help="Folder of the LeRobot dataset; an interrupted recording goes on there.")
    ],
    suite: Annotated[str, typer.Option(help="libero_object, the suite with a scripted expert.")] = "libero_object",
    official: Annotated[int, typer.Option(help="Episodes per task from the official states.")] = 10,
    jitter: Annotated[int, typer.Option(help="Episodes per task with objects moved by up to 5 cm.")] = 0,
    shuffle: Annotated[int, typer.Option(help="Episodes per task with objects in each other's places.")] = 0,
    both: Annotated[int, typer.Option(help="Episodes per task, shuffled and moved.")] = 0,
    tasks: Annotated[str | None, typer.Option(help="Which, as in 3 or 0,2,5-7; all by default.")] = None,
    workers: Annotated[int, typer.Option(help="Processes, about 2 GB each.")] = 1,
    minutes: Annotated[
        float | None, typer.Option(help="Begin nothing new after this time; the dataset holds what is there.")
    ] = None,
    disturbed: Annotated[float, typer.Option(help="Share of episodes with pushes to recover from.")] = 0.0,
    retargeted: Annotated[float, typer.Option(help="Share of episodes that ask for another object in view.")] = 0.0,
    alternatives: Annotated[
        int, typer.Option(help="Other objects for which each row also says what the expert would do.")
    ] = 0,
    render_every: Annotated[int, typer.Option(help="Steps from one row with frames to the next; divides 20.")] = 4,
    chunk_size: Annotated[int, typer.Option(help="Actions stored with each row.")] = 8,
    tail: Annotated[int, typer.Option(help="Steps that the expert goes on after success.")] = 8,
    image_size: Annotated[int, typer.Option(help="Height and width of the stored frames.")] = 112,
    image_format: Annotated[str, typer.Option(help="png (lossless) or jpeg.")] = "png",
    states: Annotated[
        str, typer.Option(help="Initial states to start from; evaluation holds out the others.")
    ] = "0-39",
    seed: Annotated[int, typer.Option(help="Of everything that is drawn.")] = 0,
    batch: Annotated[int, typer.Option(help="Episodes of a task before a process changes to another.")] = 12,
    driver: Annotated[
        str | None,
        typer.Option(
            help="Checkpoint (folder, Hub id or embedded) that acts, while the expert says what it should do."
        ),
    ] = None,
    driver_share: Annotated[float, typer.Option(help="Of the chunks, how many are the driver's own.")] = 0.7,
    driver_unnorm_key: Annotated[
        str | None, typer.Option(help="The driver's statistics; by default those of the suite's name.")
    ] = None,
) -> None:
    """Record demonstrations of a scripted expert in the LIBERO simulator."""
    with readable_errors():
        from vla_adapter_hf.recording.demonstrate import RecordingSettings
        from vla_adapter_hf.recording.demonstrate import demonstrate as run

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
            states=tuple(_numbers(states, "--states")),
        )
        summary = run(
            suite,
            output,
            {"official": official, "jitter": jitter, "shuffle": shuffle, "both": both},
            tasks=None if tasks is None else _numbers(tasks, "--tasks"),
            settings=settings,
            workers=workers,
            minutes=minutes,
            batch=batch,
            driver=driver,
            driver_share=driver_share,
            driver_unnorm_key=driver_unnorm_key,
            report=typer.echo,
        )
        typer.echo(
            f"{output}: {summary['episodes']} episodes, {summary['rows']} rows; {summary['recorded_now']} recorded now, "
            f"{summary['failed']} failed and left out"
        )


def _numbers(text: str, option: str) -> list[int]:
    """`"0,2,5-7"` is 0, 2, 5, 6 and 7."""
    numbers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or (dash and int(last) < int(first)):
            raise ValueError(f"{option} must hold numbers and ranges such as 0,2,5-7, got {text!r}.")
        numbers += range(int(first), int(last if dash else first) + 1)
    return sorted(set(numbers))


def _attention(text: str | None) -> str | dict[str, str] | None:
    if text is None or "=" not in text:
        return text
    parts = {"dinov2": "dinov2_config", "siglip": "siglip_config", "language_model": "text_config"}
    pairs = [entry.partition("=") for entry in text.split(",")]
    if not all(part in parts and implementation for part, _, implementation in pairs):
        raise ValueError(f"--attn must be an implementation, or one for each of {', '.join(parts)}, got {text!r}.")
    return {parts[part]: implementation for part, _, implementation in pairs}


def _batch_sizes(text: str) -> list[int]:
    """`"1,2,4"` is three sizes."""
    if not all(part.strip().isdigit() for part in text.split(",")):
        raise ValueError(f"--batch must be numbers such as 1,2,4,8, got {text!r}.")
    return [int(part) for part in text.split(",")]


def _dtype(name: str | None):
    import torch

    choices = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name is not None and name not in choices:
        raise ValueError(f"--dtype must be one of {', '.join(choices)}, got {name!r}.")
    return choices.get(name)


@app.command()
def scores(
    folders: Annotated[list[Path], typer.Argument(help="Outputs of vla-adapter eval, one per suite.")],
    name: Annotated[
        str | None, typer.Option(help="One name for all, if there is a checkpoint for each suite.")
    ] = None,
) -> None:
    """Join finished evaluations into one table of the published form, ready for a model card."""
    from vla_adapter_hf.simulation.results import joined_table

    with readable_errors():
        typer.echo(joined_table(folders, name), nl=False)


if __name__ == "__main__":
    app()
