"""What all commands have in common: how options are written and how errors are shown."""

from __future__ import annotations

import os
import re
import traceback
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import typer
from typer.core import TyperCommand


# Packages whose `raise` statements tell users what is wrong with what they gave.
_EXPLAINING = ("vla_adapter_hf", "vla_adapter_cli", "transformers", "huggingface_hub")


class Command(TyperCommand):
    """A command whose options take `-` or `_`, whose lists take several words, and whose errors are one line.

    `--cameras a b`, `--cameras a --cameras b` and `--cameras a,b` mean the same.
    """

    def parse_args(self, context: Any, arguments: list[str]) -> list[str]:
        lists = {name for option in self.params if getattr(option, "multiple", False) for name in option.opts}
        return super().parse_args(context, spread_lists(arguments, lists))

    def invoke(self, context: Any) -> Any:
        options = [option for option in self.params if option.param_type_name == "option"]
        names = [word.removeprefix("--").replace("-", "_") for option in options for word in option.opts]
        with readable_errors(names, debug=bool(context.find_root().params.get("debug"))):
            return super().invoke(context)


def make_command(name: str, function: Callable[..., Any], reads_words: bool = False) -> TyperCommand:
    """A function as a command. Its docstring is the help.

    Args:
        reads_words: hand all words over in `typer.Context.args`, `--help` included.
    """
    settings: dict[str, Any] = {"token_normalize_func": lambda option: option.replace("_", "-")}
    if reads_words:
        settings = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command(name, cls=Command, context_settings=settings)(function)
    return typer.main.get_command(app)


def spread_lists(arguments: list[str], lists: Collection[str]) -> list[str]:
    """`--cameras a b` as `--cameras a --cameras b`, for the options that take lists."""
    spread: list[str] = []
    option = None
    for index, word in enumerate(arguments):
        if word == "--":
            return spread + arguments[index:]
        if word.startswith("-"):
            name = word.replace("_", "-")
            option = name if name in lists else None
            first = True
        elif option is not None:
            if not first:
                spread.append(option)
            first = False
        spread.append(word)
    return spread


def split_names(words: list[str] | None) -> list[str] | None:
    """Names that were given with spaces, with commas or one by one, as one list."""
    return None if words is None else [name.strip() for word in words for name in word.split(",") if name.strip()]


@contextmanager
def readable_errors(options: Collection[str] = (), debug: bool = False) -> Iterator[None]:
    """Print an error that a user can fix as one line; leave any other with its traceback.

    A user can fix what a `raise` statement of this package or of transformers refuses, and what the operating system
    reports. Everything else, such as a TypeError of Python itself, is a bug.

    Args:
        options: names of the command's options; `name=value` in a message becomes `--name value`.
        debug: leave all errors with their traceback.
    """
    try:
        yield
    except KeyboardInterrupt:
        typer.secho("interrupted", fg="yellow", err=True)
        raise typer.Exit(130) from None
    except Exception as error:
        if debug or not _is_explained(error):
            raise
        rank = os.environ.get("RANK", "0")
        where = "" if rank == "0" else f" (rank {rank})"
        message = str(error)
        if message.startswith("Caught "):  # from a worker of a DataLoader, with the worker's traceback
            message = message.strip().splitlines()[-1]
        typer.secho(f"error{where}: {in_option_words(message, options)}", fg="red", err=True)
        raise typer.Exit(1) from error


def in_option_words(message: str, options: Collection[str]) -> str:
    """A message of a Python function in the words of the command line: `pad_chunks=True` is `--pad_chunks true`."""
    if not options:
        return message
    names = "|".join(sorted(map(re.escape, options), key=len, reverse=True))
    value = r"\"[^\"]*\"|'[^']*'|\[[^\]]*\]|<[^>]*>|[^\s,;.()]+(?:\.\w+)*"
    return re.sub(
        rf"(?<![\w.-])({names})=({value})?", lambda found: f"--{found[1]} {_word(found[2])}".rstrip(), message
    )


def _word(value: str | None) -> str:
    if value is None:
        return ""
    if value.startswith("["):
        return value[1:-1].replace("'", "").replace('"', "").replace(",", "")
    return value.strip("'\"") if value not in ("True", "False") else value.lower()


def _is_explained(error: Exception) -> bool:
    if isinstance(error, OSError) or type(error).__module__.startswith("vla_adapter_hf."):
        return True
    if not isinstance(error, (ValueError, TypeError, ImportError)):
        return False
    frame, _ = list(traceback.walk_tb(error.__traceback__))[-1]
    package = frame.f_globals.get("__name__", "").partition(".")[0]
    statement = traceback.extract_tb(error.__traceback__)[-1].line or ""
    return package in _EXPLAINING and statement.startswith("raise ")
