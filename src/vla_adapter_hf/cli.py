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
    from vla_adapter_hf.info import checkpoint_info

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
    from vla_adapter_hf.convert import convert as run

    with readable_errors():
        run(source, destination, robot, step, _dtype(dtype), push_to_hub, say=typer.echo)


@app.command()
def demo(
    checkpoint: Annotated[str | None, typer.Option(help="Folder or Hub id; by default the embedded one.")] = None,
    output: Annotated[Path, typer.Option(help="Picture to write.")] = Path("demo.png"),
    unnorm_key: Annotated[str | None, typer.Option(help="Which of the checkpoint's statistics to use.")] = None,
) -> None:
    """Predict on a recorded LIBERO observation; print the actions and draw them."""
    from vla_adapter_hf.demo import demo as run

    with readable_errors():
        run(checkpoint, output, unnorm_key, say=typer.echo)


def _dtype(name: str | None):
    import torch

    choices = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name is not None and name not in choices:
        raise ValueError(f"--dtype must be one of {', '.join(choices)}, got {name!r}.")
    return choices.get(name)


if __name__ == "__main__":
    app()
