"""Options that several commands have, and the texts that stand for lists of numbers and precisions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
import typer

from vla_adapter_hf.training.arguments import DataArguments


Robot = Annotated[
    str | None,
    typer.Option(help="Robot preset (libero, calvin, ...) for the chunk size and cameras of published weights."),
]
Step = Annotated[str | None, typer.Option(help="Which of several saved steps to take, e.g. 150000 or latest.")]
Cameras = Annotated[
    list[str] | None,
    typer.Option(help="Camera names, in the order in which the model sees them: --cameras front wrist."),
]


def _of_train(name: str, kind: object = str | None) -> object:
    """An option that `vla-adapter train` has too, with the same help."""
    return Annotated[kind, typer.Option(help=DataArguments.__dataclass_fields__[name].metadata["help"])]


Format = _of_train("format", str)
DataRobot = _of_train("robot")
OnBadEpisode = _of_train("on_bad_episode", str)
StateColumn = _of_train("state_column")
ActionColumn = _of_train("action_column")
ChunkColumn = _of_train("chunk_column")
EpisodeColumn = _of_train("episode_column")
FrameColumn = _of_train("frame_column")
InstructionColumn = _of_train("instruction_column")
Instruction = _of_train("instruction")
DatasetName = _of_train("name")
Revision = _of_train("revision")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def parse_dtype(name: str | None) -> torch.dtype | None:
    """The precision called `name`, or None for none.

    Raises:
        ValueError: torch has no such precision, or it is of no use here.
    """
    if name is not None and name not in DTYPES:
        raise ValueError(f"--dtype must be one of {', '.join(DTYPES)}, got {name!r}.")
    return DTYPES.get(name)


def parse_numbers(text: str, option: str) -> list[int]:
    """`"0,2,5-7"` is 0, 2, 5, 6 and 7.

    Raises:
        ValueError: a text that is neither a number nor a range.
    """
    numbers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or (dash and int(last) < int(first)):
            raise ValueError(f"{option} must hold numbers and ranges such as 0,2,5-7, got {text!r}.")
        numbers += range(int(first), int(last if dash else first) + 1)
    return sorted(set(numbers))


def format_numbers(numbers: Sequence[int]) -> str:
    """Consecutive numbers as [`parse_numbers`] reads them: 0, 1, 2 and 3 are `"0-3"`."""
    return f"{numbers[0]}-{numbers[-1]}"


def parse_attention(text: str | None) -> str | dict[str, str] | None:
    """The attention implementation of all parts, or `{configuration: implementation}`.

    Raises:
        ValueError: a part that does not exist.
    """
    if text is None or "=" not in text:
        return text
    parts = {"dinov2": "dinov2_config", "siglip": "siglip_config", "language_model": "text_config"}
    pairs = [entry.partition("=") for entry in text.split(",")]
    if not all(part in parts and implementation for part, _, implementation in pairs):
        raise ValueError(f"--attn must be an implementation, or one for each of {', '.join(parts)}, got {text!r}.")
    return {parts[part]: implementation for part, _, implementation in pairs}
