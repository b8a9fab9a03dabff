"""`vla-adapter serve`."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from vla_adapter_hf.cli.command import split_names
from vla_adapter_hf.cli.options import parse_attention
from vla_adapter_hf.cli.settings import Text, takes_settings
from vla_adapter_hf.serving.settings import ServeSettings
from vla_adapter_hf.utils.extras import install_hint


@takes_settings(
    ServeSettings,
    texts={
        "cameras": Text(lambda words: parse_cameras(split_names(words)), None, list[str] | None),
        "attention": Text(parse_attention),
    },
    names={
        "cameras": "--camera",
        "attention": "--attn",
        "compiled": "--compile",
        "without_key": "--without-key",
        "clip": "--clip",
    },
)
def serve(
    checkpoint: Annotated[str | None, typer.Argument(help="Folder or Hub id; by default the embedded one.")] = None,
    *,
    settings: ServeSettings,
) -> None:
    """Answer robots and simulators over the network, in the protocols of openpi, vLLM-Omni, OpenVLA-OFT and vla-eval.

    An API key is read from the environment variable VLA_ADAPTER_API_KEY. The page at the server's address shows the
    last prediction.
    """
    try:
        from vla_adapter_hf.serving.server import serve as run_server
    except ModuleNotFoundError as error:
        raise ImportError(f"vla-adapter serve needs {error.name}: {install_hint('serve')}") from error

    run_server(checkpoint, settings, report_progress=show)


def show(line: str) -> None:
    """Print a line. Where nobody reads the output any more, a server goes on without it."""
    try:
        print(line, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def parse_cameras(words: list[str]) -> dict[str, str]:
    """`["front=image"]` is `{"front": "image"}`.

    Raises:
        ValueError: a word without `=`, or a name that comes twice.
    """
    pairs = [word.partition("=") for word in words]
    if not all(name and equals and camera for name, equals, camera in pairs):
        raise ValueError(
            f"--camera must be the client's name, = and the checkpoint's, such as front=image, got {words}."
        )
    if len({name for name, _, _ in pairs}) != len(pairs):
        raise ValueError(f"--camera names a camera twice: {words}.")
    return {name: camera for name, _, camera in pairs}
