"""The console script `vla-adapter`: lists the commands, and imports the package only when one of them runs.

This module is outside of `vla_adapter_hf` because importing that package registers classes with transformers, which
takes seconds. The commands are functions in `vla_adapter_hf.cli`.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import Annotated, Any, NamedTuple

import typer
from typer.core import TyperCommand, TyperGroup


class Entry(NamedTuple):
    """A command: its module in `vla_adapter_hf.cli`, its function there, and its line in the overview."""

    module: str
    function: str
    summary: str
    reads_words: bool = False
    """Whether the command reads its words itself."""


# In brackets: the extras that a command needs.
COMMANDS = {
    "demo": Entry("demo", "demo", "Draw a prediction, or an episode in the simulator [plot]"),
    "info": Entry("checkpoints", "info", "Describe a checkpoint without loading its weights"),
    "convert": Entry("checkpoints", "convert", "Rewrite a published checkpoint as a transformers model, or back"),
    "to-lerobot": Entry("checkpoints", "to_lerobot", "Rewrite a checkpoint for LeRobot's commands"),
    "from-lerobot": Entry("checkpoints", "from_lerobot", "Rewrite what LeRobot trained as a transformers model"),
    "export": Entry("export", "export", "Write a checkpoint for OpenVINO or ONNX Runtime [openvino,onnx]"),
    "init": Entry("checkpoints", "init", "Write a model with a new policy, to be trained"),
    "stats": Entry("data", "stats", "Compute the statistics that normalise a dataset"),
    "check": Entry("check", "check", "Check demonstrations, and a policy on them [video,plot]"),
    "train": Entry("train", "train", "Fine-tune a checkpoint on demonstrations [lora,plot]", reads_words=True),
    "plot": Entry("data", "plot", "Draw predicted next to recorded actions [plot]"),
    "eval": Entry("simulation", "evaluate", "Run a policy in the LIBERO or CALVIN simulator [libero]"),
    "calvin-check": Entry("simulation", "calvin_check", "Say whether CALVIN's simulator works here"),
    "convert-dataset": Entry("simulation", "convert_dataset", "Rewrite CALVIN's recordings as a LeRobot dataset"),
    "scores": Entry("simulation", "scores", "Join finished evaluations into one table"),
    "demonstrate": Entry("simulation", "demonstrate", "Record a scripted expert in LIBERO [libero]"),
    "serve": Entry("serve", "serve", "Answer robots over the network [serve]"),
    "bench": Entry("bench", "bench", "Measure speed and memory of predictions"),
}

NOTES = """\b
[...] names the extras that a command needs, and [video] reads MP4 frames:
  pip install 'vla-adapter-hf[lora,plot]'      in a clone: pip install -e '.[lora,plot]'

\b
Examples:
  vla-adapter demo
  vla-adapter info VLA-Adapter/LIBERO-Object-Pro
  vla-adapter stats me/pick-and-place
  vla-adapter train --checkpoint VLA-Adapter/LIBERO-Object-Pro \\
      --dataset me/pick-and-place --cameras front wrist \\
      --max_steps 20000 --output_dir pick-and-place
  vla-adapter plot pick-and-place me/pick-and-place
  vla-adapter eval --checkpoint pick-and-place --suite libero_object

`vla-adapter COMMAND --help` explains a command. Options may be written with - or _."""

UsageError: type[Exception] = typer.BadParameter.__base__  # from click, or from typer's own copy of it


def load_command(name: str) -> TyperCommand:
    """The command of that name with its options; imports the package."""
    entry = COMMANDS[name]
    function = getattr(import_module(f"vla_adapter_hf.cli.{entry.module}"), entry.function)
    return import_module("vla_adapter_hf.cli.command").make_command(name, function, entry.reads_words)


class Commands(TyperGroup):
    """Commands that are imported when they are called, not when they are listed."""

    def __init__(self, **settings: Any) -> None:
        settings["commands"] = {name: TyperCommand(name, help=entry.summary) for name, entry in COMMANDS.items()}
        super().__init__(**settings)

    def list_commands(self, context: Any) -> list[str]:
        return list(self.commands)

    def resolve_command(self, context: Any, arguments: list[str]) -> tuple[str | None, Any, list[str]]:
        name, _, rest = super().resolve_command(context, arguments)
        return name, load_command(name), rest

    def invoke(self, context: Any) -> Any:
        try:
            return super().invoke(context)
        except UsageError as error:
            path = context.command_path if error.ctx is None else error.ctx.command_path
            typer.secho(f"error: {error.format_message().rstrip('.')}; see {path} --help.", fg="red", err=True)
            raise typer.Exit(2) from error


app = typer.Typer(cls=Commands, no_args_is_help=True, add_completion=False, rich_markup_mode=None, epilog=NOTES)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"vla-adapter-hf {version('vla-adapter-hf')}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", envvar="VLA_ADAPTER_DEBUG", help="Show the traceback of every error.")
    ] = False,
) -> None:
    """VLA-Adapter, the tiny vision-language-action policy, for transformers."""
