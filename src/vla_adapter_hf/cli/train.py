"""`vla-adapter train`: the words of the command line and of YAML files as arguments of a training."""

from __future__ import annotations

import json
import logging
import os
import warnings
from argparse import RawDescriptionHelpFormatter
from collections.abc import Collection, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

import datasets
import torch
import typer
import yaml
from huggingface_hub.utils import disable_progress_bars
from transformers import HfArgumentParser
from transformers.utils import logging as transformers_logging

from vla_adapter_hf.cli.command import readable_errors, split_names
from vla_adapter_hf.training.arguments import DataArguments, ModelArguments
from vla_adapter_hf.training.presets import PRESETS
from vla_adapter_hf.training.train import train as run_training
from vla_adapter_hf.training.trainer import VLAAdapterTrainingArguments


DESCRIPTION = """Fine-tune a checkpoint on demonstrations. Needs the extras lora and plot, and video for MP4 frames:
pip install 'vla-adapter-hf[lora,plot,video]', in a clone pip install -e '.[lora,plot,video]'.

The first word may be a YAML file with the same names; words after it replace what it says.

examples:
  vla-adapter train --checkpoint VLA-Adapter/LIBERO-Object-Pro --dataset me/pick-and-place --cameras front wrist \\
      --validation 0.1 --max_steps 20000 --bf16 true --output_dir pick-and-place
  vla-adapter train run.yaml --learning_rate 1e-4
  vla-adapter train run.yaml --resume_from_checkpoint true

Arguments after those of data and model are those of transformers' TrainingArguments."""


class _Parser(HfArgumentParser):
    """A parser whose errors are one line, without the list of all arguments."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see vla-adapter train --help.")


def train(context: typer.Context) -> None:
    """Fine-tune on demonstrations; `vla-adapter train --help` lists the arguments."""
    is_main = int(os.environ.get("RANK", 0)) == 0
    if not is_main:
        _be_quiet()
    types = (ModelArguments, DataArguments, VLAAdapterTrainingArguments)
    names = [field.name for arguments in types for field in fields(arguments)]
    with readable_errors(names, debug=context.find_root().params["debug"]):
        model, data, training = parse_arguments(context.args)
        report_progress = typer.echo if is_main else lambda line: None
        if not torch.accelerator.is_available():
            report_progress("No accelerator found: training on the CPU.")
        run_training(model, data, training, report_progress)


def parse_arguments(
    arguments: Sequence[str],
) -> tuple[ModelArguments, DataArguments, VLAAdapterTrainingArguments]:
    """Command-line words, the first of which may be a YAML file of the same names.

    The file replaces what the preset says, and the words replace what the file says. Without an accelerator `use_cpu`
    is true: the precision and the processes that were asked for then work on the CPU too.

    Raises:
        ValueError: for a name that does not exist, a value of the wrong type, a file that is no mapping, or processes
            that are not connected.
    """
    # Whole names only: what is nearly an argument is a mistake.
    types = (ModelArguments, DataArguments, VLAAdapterTrainingArguments)
    parser = _Parser(
        types,
        prog="vla-adapter train",
        usage="vla-adapter train [FILE.yaml] --checkpoint SRC --dataset SRC [SRC ...] --output_dir DIR [--NAME VALUE "
        "...]",
        description=DESCRIPTION,
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    words = list(arguments)
    from_file: list[str] = []
    if words and words[0].endswith((".yaml", ".yml")):
        from_file = _as_words(_read_yaml(Path(words.pop(0))))
    chosen = _value_after("--preset", words) or _value_after("--preset", from_file) or ModelArguments.preset
    if chosen not in PRESETS:
        raise ValueError(f"--preset must be one of {', '.join(PRESETS)}, got {chosen!r}.")
    lists = {name for action in parser._actions if action.nargs == "+" for name in action.option_strings}
    on_cpu = [] if torch.accelerator.is_available() else ["--use_cpu", "true"]
    # Later words replace earlier ones.
    model, data, training, unknown = parser.parse_args_into_dataclasses(
        [*_as_words(PRESETS[chosen]), *from_file, *_join_lists(words, lists), *on_cpu], return_remaining_strings=True
    )
    if unknown:
        raise ValueError(f"unknown arguments: {' '.join(unknown)}; see vla-adapter train --help.")
    data.cameras = split_names(data.cameras)
    check_processes(training)
    return model, data, training


def check_processes(training: VLAAdapterTrainingArguments) -> None:
    """Refuse processes that do not know of each other: each would train the whole model and write the same folder.

    Raises:
        ValueError: more processes were started than train together.
    """
    started = int(os.environ.get("WORLD_SIZE", 1))
    if training.world_size != started:
        raise ValueError(
            f"{started} processes were started (WORLD_SIZE), but they train in groups of {training.world_size}. "
            "Add --use_cpu true, or start one process."
        )


def _be_quiet() -> None:
    """Only the main process speaks; errors are shown by all."""
    logging.getLogger("vla_adapter_hf").setLevel(logging.ERROR)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    disable_progress_bars()
    warnings.simplefilter("ignore")


def _join_lists(words: Sequence[str], lists: Collection[str]) -> list[str]:
    """`--cameras a --cameras b` as `--cameras a b`, which argparse would take for `--cameras b`."""
    joined: dict[str, list[str]] = {}
    others: list[str] = []
    current = others
    for word in words:
        name, equals, value = word.partition("=")
        if not word.startswith("--"):
            current.append(word)
        elif name in lists:
            current = joined.setdefault(name.replace("-", "_").replace("__", "--", 1), [])
            current += [value] if equals else []
        else:
            current = others
            current.append(word)
    return others + [word for name, values in joined.items() for word in (name, *values)]


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"the file of arguments {path} does not exist.")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a mapping of argument names to values, got {type(content).__name__}.")
    return content


def _as_words(values: dict[str, Any]) -> list[str]:
    words = []
    for name, value in values.items():
        if value is None:
            continue  # `robot:` with nothing behind it leaves the default
        items = value if isinstance(value, list) else [value]
        words += [f"--{name}", *(json.dumps(item) if isinstance(item, dict) else str(item) for item in items)]
    return words


def _value_after(name: str, words: list[str]) -> str | None:
    for index, word in enumerate(words):
        if word == name and index + 1 < len(words):
            return words[index + 1]
        if word.startswith(f"{name}="):
            return word.split("=", 1)[1]
    return None
