"""`vla-adapter info`, `convert`, `to-lerobot`, `from-lerobot` and `init`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vla_adapter_hf.checkpoints.convert import convert as convert_checkpoint
from vla_adapter_hf.checkpoints.convert import convert_to_published
from vla_adapter_hf.checkpoints.info import checkpoint_info
from vla_adapter_hf.checkpoints.lerobot import convert as lerobot_conversion
from vla_adapter_hf.cli.command import split_names
from vla_adapter_hf.cli.options import Cameras, Robot, Step, parse_dtype
from vla_adapter_hf.init.pretrained import PretrainedParts
from vla_adapter_hf.init.pretrained import init as init_pretrained
from vla_adapter_hf.init.untrained import init_untrained


def info(source: str, robot: Robot = None, step: Step = None) -> None:
    """Describe a checkpoint, published or our own, without loading its weights."""
    facts = checkpoint_info(source, robot, step)
    width = max(map(len, facts))
    for name, text in facts.items():
        typer.echo(f"{name:<{width}}  {text}")


def convert(
    source: str,
    destination: Path,
    robot: Robot = None,
    step: Step = None,
    dtype: Annotated[str | None, typer.Option(help="Precision to store: float32, bfloat16 or float16.")] = None,
    push_to_hub: Annotated[str | None, typer.Option(help="Hub id to upload the result to.")] = None,
    to: Annotated[str, typer.Option(help="Layout to write: own, or published for the original's tools.")] = "own",
) -> None:
    """Rewrite a published checkpoint as a transformers model, or the other way, and check it by reading it back.

    \b
    Examples:
      vla-adapter convert VLA-Adapter/LIBERO-Object-Pro libero-object --dtype bfloat16
      vla-adapter convert outputs/trained outputs/published --to published
    """
    if to not in ("own", "published"):
        raise ValueError(f"--to must be own or published, got {to!r}.")
    if to == "published":
        if step is not None:
            raise ValueError("--step chooses one of a published checkpoint's steps; leave it out with --to published.")
        precision = parse_dtype(dtype)
        convert_to_published(source, destination, robot, precision, push_to_hub, report_progress=typer.echo)
        return
    convert_checkpoint(source, destination, robot, step, parse_dtype(dtype), push_to_hub, report_progress=typer.echo)


def to_lerobot(
    source: str,
    destination: Path,
    robot: Annotated[
        str | None,
        typer.Option(
            help="Robot preset whose gripper convention the robot takes, e.g. libero; none sends actions as they were "
            "learnt."
        ),
    ] = None,
    unnorm_key: Annotated[
        str | None, typer.Option(help="Which of the checkpoint's statistics to use, where it has several.")
    ] = None,
) -> None:
    """Rewrite a checkpoint as a policy of LeRobot, for --policy.path of its commands. The weights stay the same.

    LeRobot finds the policy through the plugin lerobot_policy_vla_adapter.

    \b
    Example:
      vla-adapter to-lerobot pick-and-place pick-and-place-lerobot
    """
    lerobot_conversion.to_lerobot(source, destination, robot, unnorm_key, report_progress=typer.echo)


def from_lerobot(source: str, destination: Path) -> None:
    """Rewrite a policy that LeRobot trained as a transformers model. The weights stay the same.

    \b
    Example:
      vla-adapter from-lerobot outputs/train/run/checkpoints/last/pretrained_model pick-and-place
    """
    lerobot_conversion.from_lerobot(source, destination, report_progress=typer.echo)


def init(
    destination: Path,
    base: Annotated[str | None, typer.Option(help="Base vision-language model in its own layout.")] = None,
    config: Annotated[
        Path | None, typer.Option(help="JSON file of VLAAdapterConfig's fields: all weights are random.")
    ] = None,
    instructions: Annotated[
        Path | None,
        typer.Option(help="With --config: text file, one instruction a line. The vocabulary holds no more."),
    ] = None,
    dinov2: Annotated[str | None, typer.Option(help="DINOv2 with registers: folder or Hub id.")] = None,
    siglip: Annotated[str | None, typer.Option(help="SigLIP: folder or Hub id.")] = None,
    language_model: Annotated[str | None, typer.Option(help="Qwen2.5: folder or Hub id.")] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            help="Folder or Hub id of a Qwen2 tokenizer. By default that of the language model; with --config the "
            "small one that ships with the package."
        ),
    ] = None,
    robot: Annotated[
        str | None, typer.Option(help="Robot preset for sizes, cameras and normalisation, by default libero.")
    ] = None,
    cameras: Cameras = None,
    chunk_size: Annotated[int | None, typer.Option(help="Actions per chunk.")] = None,
    action_dim: Annotated[int | None, typer.Option(help="Size of an action.")] = None,
    proprio_dim: Annotated[int | None, typer.Option(help="Size of the state.")] = None,
    norm_type: Annotated[str | None, typer.Option(help="bounds_q99, bounds or normal.")] = None,
    norm_stats: Annotated[
        Path | None, typer.Option(help="JSON file of statistics, as vla-adapter stats writes it.")
    ] = None,
    policy_variant: Annotated[str | None, typer.Option(help="pro or original, by default pro.")] = None,
    prompt_style: Annotated[
        str | None, typer.Option(help="chat, as the published models, or in_out, which is short; by default chat.")
    ] = None,
    step: Step = None,
    dtype: Annotated[str, typer.Option(help="Precision to store: float32, bfloat16 or float16.")] = "float32",
    seed: Annotated[int, typer.Option(help="Seed of the new weights.")] = 0,
) -> None:
    """Write a model with a new policy, to be trained.

    Its other parts come from a base model (--base), from DINOv2, SigLIP and Qwen2.5 (--dinov2, --siglip,
    --language-model), or are new as well (--config).

    \b
    Examples:
      vla-adapter init start --dinov2 facebook/dinov2-with-registers-large \\
          --siglip google/siglip-so400m-patch14-224 --language-model Qwen/Qwen2.5-0.5B --cameras front wrist
      vla-adapter init start --config policy.json --instructions instructions.txt
    """
    fields = {"chunk_size": chunk_size, "action_dim": action_dim, "proprio_dim": proprio_dim, "norm_type": norm_type}
    fields |= {"cameras": split_names(cameras), "policy_variant": policy_variant}
    fields |= {"prompt_style": prompt_style}
    given = {name: value for name, value in fields.items() if value is not None}
    if config is not None:
        others = {"base": base, "dinov2": dinov2, "siglip": siglip, "language_model": language_model, "step": step}
        others |= {"robot": robot, "norm_stats": norm_stats}
        surplus = [f"--{name.replace('_', '-')}" for name, value in others.items() if value is not None]
        if surplus:
            raise ValueError(f"--config makes all parts new; leave out {', '.join(surplus)}.")
        about = {"tokenizer": tokenizer, "instructions": instructions, "seed": seed, "dtype": parse_dtype(dtype)}
        init_untrained(destination, config, report_progress=typer.echo, **about, **given)
        return
    if instructions is not None:
        raise ValueError("--instructions limits the vocabulary of a new language model; it needs --config.")
    parts = PretrainedParts(base, step, dinov2, siglip, language_model, tokenizer)
    about = {"robot": robot, "norm_stats": norm_stats, "dtype": parse_dtype(dtype), "seed": seed}
    init_pretrained(destination, parts, report_progress=typer.echo, **about, **given)
