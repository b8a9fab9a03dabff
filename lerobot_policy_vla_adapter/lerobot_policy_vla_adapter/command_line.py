"""Options of LeRobot's commands that it keeps from policies: `--rename_map`, and those of `--dataset.`.

They are read as LeRobot reads them: from the command line, else from the file of `--config_path`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from lerobot.configs import parser
from lerobot.configs.train import TRAIN_CONFIG_NAME


def given_option(name: str) -> Any:
    """The value of an option such as `dataset.episodes`, or None if it was not given.

    A configuration on the Hub is not read.
    """
    text = parser.parse_arg(name)
    if text is not None:
        return yaml.safe_load(text)
    path = Path(parser.parse_arg("config_path") or "")
    if path.is_dir():
        path = path / TRAIN_CONFIG_NAME
    value = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None
    for part in name.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def given_rename_map() -> dict[str, str]:
    """The names that `--rename_map` gives a robot's or a simulator's features.

    Raises:
        ValueError: it does not map names to names.
    """
    names = given_option("rename_map") or {}
    if not isinstance(names, dict) or not all(isinstance(name, str) for pair in names.items() for name in pair):
        raise ValueError(f"--rename_map must map names to names, such as {{old: new}}, got {names!r}.")
    return names


def given_episodes() -> list[int] | None:
    """The episodes that `--dataset.episodes` names; None stands for all.

    Raises:
        ValueError: it is no list of numbers, or the dataset is streamed.
    """
    if given_option("dataset.streaming"):
        raise ValueError(
            "--dataset.streaming=true does not go with this policy, whose statistics are those of the whole dataset; "
            "leave it out."
        )
    episodes = given_option("dataset.episodes")
    if episodes is None:
        return None
    if not isinstance(episodes, list) or not all(isinstance(number, int) for number in episodes):
        raise ValueError(f"--dataset.episodes must be a list of numbers, such as [0, 1, 5], got {episodes!r}.")
    return episodes
