"""An evaluation in parts, for machines of a batch system: each part has a folder, and one call joins them."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vla_adapter_hf.simulation.results import EpisodeResult, ResultsFile, read_results, write_summary
from vla_adapter_hf.utils.files import exclusive_folder, record_settings


PLAN = "shard.json"

Key = tuple[int, int]
"""Task and episode."""


@dataclass(frozen=True)
class Shard:
    """Part `number` of `count` parts, counted from 1.

    Raises:
        ValueError: a number that is not in 1...count.
    """

    number: int
    count: int

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.count:
            raise ValueError(f"shard must be a part such as 3/8, counted from 1, got {self.number}/{self.count}")

    @classmethod
    def parse(cls, text: str) -> Shard:
        """`"3/8"` is the third of eight."""
        found = re.fullmatch(r"(\d+)/(\d+)", text)
        if found is None:
            raise ValueError(f"shard must be a part such as 3/8, counted from 1, got {text!r}")
        return cls(int(found[1]), int(found[2]))

    @property
    def folder(self) -> str:
        """Name of its folder in the evaluation's output."""
        return f"shard-{self.number}-of-{self.count}"

    def part(self, selected: Sequence[Key]) -> list[Key]:
        """Its episodes: consecutive ones in the order of the tasks, because an environment takes long to build."""
        selected = sorted(selected)
        first, end = (len(selected) * number // self.count for number in (self.number - 1, self.number))
        if first == end:
            raise ValueError(f"shard={self.number}/{self.count} is empty: there are {len(selected)} episodes")
        return selected[first:end]

    def record(self, folder: Path, selected: Sequence[Key], instructions: Sequence[str]) -> None:
        """Writes next to the shard's results what the whole evaluation is.

        Raises:
            ValueError: the folder holds a part of other episodes.
        """
        selected = sorted(selected)
        plan = {"count": self.count, "selected": selected, "instructions": list(instructions)}
        if record_settings(folder / PLAN, plan):
            raise ValueError(f"{folder} holds a part of other episodes. Choose another output.")


def has_shards(output: str | Path) -> bool:
    """Whether an evaluation's output holds shards, finished or not."""
    return any(Path(output).glob(f"shard-*-of-*/{PLAN}"))


def join_shards(output: str | Path) -> dict[str, Any]:
    """Joins the shards in an evaluation's output.

    Afterwards the output has the lines, the settings and the summary of one run. Films and actions stay in the shards'
    folders. An episode that the output held before, of a short trial for instance, is replaced by the shard's.

    Args:
        output: the folder that was the `output` of every shard.

    Returns:
        The content of `summary.json`.

    Raises:
        ValueError: no shards, shards of several divisions or with other settings, episodes that are missing, or an
            output that holds other episodes than the shards. Says which.
    """
    output = Path(output)
    found = sorted(path.parent for path in output.glob(f"shard-*-of-*/{PLAN}"))
    if not found:
        raise ValueError(f"{output} holds neither summary.json nor shards of an evaluation")
    plans = {folder: json.loads((folder / PLAN).read_text(encoding="utf-8")) for folder in found}
    plan = plans[found[0]]
    for folder, other in plans.items():
        if other != plan:
            raise ValueError(f"{folder} and {found[0]} are parts of different evaluations: choose one output for each")
    folders = [output / Shard(number, plan["count"]).folder for number in range(1, plan["count"] + 1)]
    absent = [str(number) for number, folder in enumerate(folders, start=1) if folder not in plans]
    if absent:
        raise ValueError(f"{output}: of {plan['count']} shards these are missing: {', '.join(absent)}")
    settings = _equal_settings(folders)
    results = _all_results(folders, [tuple(key) for key in plan["selected"]])
    with exclusive_folder(output):
        joined = ResultsFile(output, settings)
        others = sorted(joined.done - {result.key for result in results})
        if others:
            task, episode = others[0]
            raise ValueError(
                f"{joined.path} holds {len(others)} episodes that are in no shard, the first is task {task} episode "
                f"{episode}. Move the shards' folders to a folder of their own and name that one."
            )
        joined.results = results
        joined.sort()
        return write_summary(output, results, plan["instructions"], settings, timing=None)


def _equal_settings(folders: Sequence[Path]) -> dict[str, Any]:
    first = None
    for folder in folders:
        path = folder / "settings.json"
        if not path.exists():
            raise ValueError(f"{folder} has played nothing yet: run this shard")
        settings = json.loads(path.read_text(encoding="utf-8"))
        first = settings if first is None else first
        differing = [name for name in {**first, **settings} if first.get(name) != settings.get(name)]
        if differing:
            changes = ", ".join(f"{name}={first.get(name)!r} and {settings.get(name)!r}" for name in differing)
            raise ValueError(f"{folders[0]} and {folder} were played with different settings: {changes}")
    return first


def _all_results(folders: Sequence[Path], selected: Sequence[Key]) -> list[EpisodeResult]:
    results, missing = [], []
    for number, folder in enumerate(folders, start=1):
        found = {result.key: result for result in read_results(folder / "episodes.jsonl")}
        part = Shard(number, len(folders)).part(selected)
        results += [found[key] for key in part if key in found]
        absent = [key for key in part if key not in found]
        if absent:
            task, episode = absent[0]
            missing.append(f"{len(absent)} of shard {number}, the first is task {task} episode {episode}")
    if missing:
        raise ValueError(f"episodes are missing: {'; '.join(missing)}. Run these shards again: they go on.")
    return results
