"""What an evaluation leaves behind: one JSON line per episode, a summary, and the table of the published form."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from vla_adapter_hf.simulation.calvin.scores import (
    PUBLISHED_SEQUENCES,
    score_sequences,
    score_subtasks,
    score_table,
    subtask_table,
)
from vla_adapter_hf.simulation.intervals import wilson_interval
from vla_adapter_hf.utils.files import readable_disk_errors, record_settings, write_bytes, write_json, write_text


PUBLISHED = {
    "VLA-Adapter": {
        "libero_spatial": 97.8,
        "libero_object": 99.2,
        "libero_goal": 97.2,
        "libero_10": 95.0,
        "all": 97.3,
    },
    "VLA-Adapter-Pro": {
        "libero_spatial": 99.6,
        "libero_object": 99.6,
        "libero_goal": 98.2,
        "libero_10": 96.4,
        "all": 98.5,
    },
    "OpenVLA-OFT 7B": {
        "libero_spatial": 97.6,
        "libero_object": 98.4,
        "libero_goal": 97.9,
        "libero_10": 94.5,
        "all": 97.1,
    },
    "π0": {"libero_spatial": 96.8, "libero_object": 98.8, "libero_goal": 95.8, "libero_10": 85.2, "all": 94.2},
    "SmolVLA": {"libero_spatial": 93.0, "libero_object": 94.0, "libero_goal": 91.0, "libero_10": 77.0, "all": 88.8},
}
"""Success rates in per cent as published (arXiv 2509.09372 and the works compared there)."""

PUBLISHED_SUITES = ("libero_spatial", "libero_object", "libero_goal", "libero_10")

TITLES = {
    "libero_spatial": "Spatial",
    "libero_object": "Object",
    "libero_goal": "Goal",
    "libero_10": "Long",
    "libero_90": "90",
}


@dataclass(frozen=True)
class EpisodeResult:
    """One line of the results file.

    Attributes:
        suite, task, episode: which episode; `task` is the task's number.
        seed, placement: how its scene was drawn.
        black_images: whether the policy saw black frames (a control).
        instruction: the text that the policy got.
        steps: executed steps, no-ops at the beginning not counted.
        success: whether the task was solved within the limit.
        latency: seconds of each query to the policy; the queries of a batch share the time of the batch.
        info: what was drawn for the episode, such as object positions.
        task_instruction: the task's own instruction, if the policy got another text.
    """

    suite: str
    task: int
    episode: int
    seed: int
    placement: str
    black_images: bool
    instruction: str
    steps: int
    success: bool
    latency: list[float] = field(default_factory=list)
    info: dict[str, Any] = field(default_factory=dict)
    task_instruction: str | None = None

    @property
    def key(self) -> tuple[int, int]:
        return self.task, self.episode


class ResultsFile:
    """Append-only JSON lines that survive a kill at any moment.

    The run's settings are in `settings.json` in the same folder: episodes of another run are never mixed in. A last
    line that was torn by a kill is cut off when the file is opened again, and its episode is run again.

    Args:
        folder: holds `episodes.jsonl` and `settings.json`; created if it does not exist.
        settings: JSON values that decide what an episode is.

    Raises:
        ValueError: the folder belongs to a run with other settings, or a line in the middle is broken.
    """

    def __init__(self, folder: str | Path, settings: Mapping[str, Any]) -> None:
        self.path = Path(folder) / "episodes.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._check_settings(self.path.with_name("settings.json"), settings)
        self._cut_torn_line()
        self.results = read_results(self.path)

    @property
    def done(self) -> set[tuple[int, int]]:
        """(task, episode) of the episodes that need not be run again."""
        return {result.key for result in self.results}

    def append(self, result: EpisodeResult) -> None:
        """Writes one episode; when this returns, a kill no longer loses it.

        Raises:
            OSError: the disk is full. The episodes before this one are kept.
        """
        with readable_disk_errors(self.path), open(self.path, "ab") as stream:
            stream.write(_as_line(result))
            stream.flush()
            os.fsync(stream.fileno())
        self.results.append(result)

    def sort(self) -> None:
        """Puts the lines in the order of task and episode: parallel episodes end in any order."""
        self.results.sort(key=lambda result: result.key)
        write_bytes(self.path, b"".join(_as_line(result) for result in self.results))

    def _check_settings(self, path: Path, settings: Mapping[str, Any]) -> None:
        played = self.path.exists() and b"\n" in self.path.read_bytes()
        if played and not path.exists():
            raise ValueError(f"{self.path} has no settings.json next to it; choose another output")
        if not played:
            path.unlink(missing_ok=True)  # of an attempt in which no episode ended
        differing = record_settings(path, settings)
        if differing:
            changes = ", ".join(f"{name}={there!r} there, {here!r} here" for name, (there, here) in differing.items())
            raise ValueError(f"{path.parent} holds another run: {changes}. Choose another output.")

    def _cut_torn_line(self) -> None:
        data = self.path.read_bytes() if self.path.exists() else b""
        whole = data.rfind(b"\n") + 1
        if whole != len(data):
            with open(self.path, "r+b") as stream:
                stream.truncate(whole)


def read_results(path: str | Path) -> list[EpisodeResult]:
    """The episodes of a results file, in the order of its lines; a torn last line is left out.

    Raises:
        ValueError: a whole line that is not an episode.
    """
    path = Path(path)
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    results = []
    for number, line in enumerate(lines, start=1):
        try:
            results.append(EpisodeResult(**json.loads(line)))
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"line {number} of {path} is not an episode ({error}); repair or remove the file"
            ) from error
    return results


def _as_line(result: EpisodeResult) -> bytes:
    return json.dumps(asdict(result), ensure_ascii=False).encode("utf-8") + b"\n"


def summarise(results: Iterable[EpisodeResult], tasks: Sequence[str] | None = None) -> dict[str, Any]:
    """Success rates with 95 % intervals, over all episodes and per task, and the latency of a query.

    Args:
        results: episodes of one suite.
        tasks: the tasks' instructions, to name the rows.

    Raises:
        ValueError: no episodes, or episodes of several suites.
    """
    results = list(results)
    suites = {result.suite for result in results}
    if len(suites) != 1:
        raise ValueError(f"results must hold episodes of one suite, got {sorted(suites) or 'none'}")
    latencies = np.array([seconds for result in results for seconds in result.latency])
    per_task = []
    for task in sorted({result.task for result in results}):
        part = [result for result in results if result.task == task]
        name = tasks[task] if tasks is not None else part[0].task_instruction or part[0].instruction
        per_task.append({"task": task, "name": name, **_rate(part)})
    summary = {"suite": suites.pop(), **_rate(results), "tasks": per_task}
    if all("completed" in result.info for result in results):
        summary["sequences"] = score_sequences([result.info["completed"] for result in results])
        summary["subtasks"] = score_subtasks([result.info for result in results])
    if len(latencies):
        summary["latency_ms"] = {
            "median": round(1000 * float(np.median(latencies)), 2),
            "p95": round(1000 * float(np.quantile(latencies, 0.95)), 2),
            "queries": len(latencies),
        }
    return summary


def _rate(results: Sequence[EpisodeResult]) -> dict[str, Any]:
    successes = sum(result.success for result in results)
    low, high = wilson_interval(successes, len(results))
    solved = [result.steps for result in results if result.success]
    return {
        "episodes": len(results),
        "successes": successes,
        "success_rate": successes / len(results),
        "interval_95": [low, high],
        "mean_steps_when_solved": float(np.mean(solved)) if solved else None,
    }


def published_table(measured: Mapping[str, Mapping[str, Mapping[str, Any]]], compare: bool = True) -> str:
    """A Markdown table in the published form: one row per policy, one column per suite, and the average.

    Args:
        measured: policy name -> suite -> a summary of `summarise`.
        compare: add the published rows.

    Suites of several subtasks in a row have a table of their own below.
    """
    sequences = {
        policy: summary["sequences"]
        for policy, row in measured.items()
        for summary in row.values()
        if "sequences" in summary
    }
    measured = {
        policy: {name: summary for name, summary in row.items() if "sequences" not in summary}
        for policy, row in measured.items()
    }
    measured = {policy: row for policy, row in measured.items() if row}
    tables = [_suites_table(measured, compare)] if measured else []
    tables += [score_table(sequences, compare)] if sequences else []
    return "\n".join(tables)


def _suites_table(measured: Mapping[str, Mapping[str, Mapping[str, Any]]], compare: bool) -> str:
    named = {name for row in measured.values() for name in row}
    suites = [name for name in TITLES if name in named or (compare and name in PUBLISHED_SUITES)]
    # A user's own suite has no published title: its name stands for it.
    suites += sorted(named - set(TITLES))
    lines = ["| Policy | " + " | ".join(TITLES.get(name, name) for name in suites) + " | Average |"]
    lines.append("|---|" + "---|" * (len(suites) + 1))
    for policy, row in measured.items():
        cells = [rate_cell(row.get(name)) for name in suites]
        rates = [100 * row[name]["success_rate"] for name in suites if name in row]
        # An average over some of the suites is not comparable with the published ones.
        average = f"{np.mean(rates):.1f}" if len(rates) == len(suites) else "—"
        lines.append(f"| {policy} | " + " | ".join(cells) + f" | {average} |")
    for policy, row in PUBLISHED.items() if compare else ():
        cells = [f"{row[name]:.1f}" if name in row else "—" for name in suites]
        lines.append(f"| {policy} (published) | " + " | ".join(cells) + f" | {row['all']:.1f} |")
    return "\n".join(lines) + "\n"


def joined_table(folders: Sequence[str | Path], name: str | None = None) -> str:
    """The table in the published form over several finished evaluations: one row per policy, with its average.

    Args:
        folders: outputs of `evaluate`; shards are joined before (`shards`). The published rows are added if all are
            runs of the published protocol: every task from each of its 50 states, whole chunks; for CALVIN all 1,000
            sequences, as published, with `egl`.
        name: puts all into one row, where each suite has a checkpoint of its own; by default there is a row for each
            policy's name.

    Raises:
        ValueError: a folder without a summary, controls that are no part of such a table, or two runs of a policy on a
            suite.
    """
    measured: dict[str, dict[str, Any]] = {}
    compare = True
    for folder in map(Path, folders):
        if (folder / "shard.json").is_file():
            raise ValueError(f"{folder} is one shard of an evaluation; name the folder that holds all of them")
        if not (folder / "summary.json").is_file():
            raise ValueError(f"{folder} holds no summary.json of an evaluation")
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        settings = summary["settings"]
        is_control = settings["black_images"] or settings["instruction"] or settings.get("time")
        if is_control or settings.get("placement", "official") != "official":
            raise ValueError(f"{folder} holds a control, which is no score of the published form")
        policy = name or settings["policy"]
        row = measured.setdefault(policy, {})
        if summary["suite"] in row:
            raise ValueError(f"{folder} is a second run of {policy} on {summary['suite']}")
        row[summary["suite"]] = summary
        compare = compare and summary.get("published_protocol", False)
    if not measured:
        raise ValueError("name at least one folder of an evaluation")
    return published_table(measured, compare=compare)


def task_table(summary: Mapping[str, Any]) -> str:
    """A Markdown table with one row per task of a suite."""
    lines = ["| Task | Solved | Success, % (95 % interval) | Steps when solved |", "|---|---|---|---|"]
    rows = [*summary["tasks"], {"name": "**all**", **{k: v for k, v in summary.items() if k != "tasks"}}]
    for row in rows:
        steps = row["mean_steps_when_solved"]
        solved = f"{row['successes']}/{row['episodes']}"
        lines.append(f"| {row['name']} | {solved} | {rate_cell(row)} | {'—' if steps is None else f'{steps:.0f}'} |")
    return "\n".join(lines) + "\n"


def rate_cell(summary: Mapping[str, Any] | None) -> str:
    """A success rate in per cent with its interval, for a table."""
    if summary is None:
        return "—"
    low, high = summary["interval_95"]
    return f"{100 * summary['success_rate']:.1f} ({100 * low:.1f}–{100 * high:.1f})"


@dataclass
class Timing:
    """Seconds of an evaluation, summed over all environments; `wall` is elapsed time.

    Attributes:
        physics: steps without frames, and the share of the other steps that physics would have taken.
        rendering: the rest of the steps with frames.
        policy: queries.
    """

    wall: float = 0.0
    build: float = 0.0
    reset: float = 0.0
    physics: float = 0.0
    rendering: float = 0.0
    policy: float = 0.0
    episodes: int = 0
    steps: int = 0

    def add(self, seconds: Mapping[str, float], counts: Mapping[str, int]) -> None:
        """Adds an episode: the `seconds` and `counts` of a worker's last report."""
        per_blind_step = seconds["blind"] / counts["blind"] if counts["blind"] else 0.0
        physics = min(seconds["observed"], per_blind_step * counts["observed"])
        self.build += seconds["build"]
        self.reset += seconds["reset"]
        self.physics += seconds["blind"] + physics
        self.rendering += seconds["observed"] - physics
        self.episodes += 1
        self.steps += counts["blind"] + counts["observed"]

    def table(self) -> str:
        """A Markdown table: episodes per minute and the share of each part in the time spent."""
        parts = {name: getattr(self, name) for name in ("rendering", "physics", "policy", "reset", "build")}
        total = sum(parts.values()) or 1.0
        head = "| Episodes per minute | Steps per second | " + " | ".join(f"{name}, %" for name in parts) + " |"
        rates = f"| {60 * self.episodes / (self.wall or 1.0):.1f} | {self.steps / (self.wall or 1.0):.1f} | "
        shares = " | ".join(f"{100 * seconds / total:.0f}" for seconds in parts.values())
        return "\n".join([head, "|---|---|" + "---|" * len(parts), rates + shares + " |"]) + "\n"


def _controls(settings: Mapping[str, Any]) -> list[str]:
    """How the episodes of a run were played, in words; the first says how scenes are drawn."""
    if "schedule" in settings:
        controls = [f"schedule {settings['schedule']}, renderer {settings['renderer']}"]
    else:
        controls = [f"placement {settings.get('placement', 'official')}"]
    for name, published in (("image_size", 256), ("states", None), ("robot", "libero")):
        if settings.get(name, published) != published:
            controls.append(f"{name} {settings[name]}")
    if settings["black_images"]:
        controls.append("black images")
    if settings["instruction"]:
        controls.append(f"instruction: {settings['instruction']}")
    if settings["execute"]:
        controls.append(f"{settings['execute']} actions of each chunk executed")
    if settings["ensemble"] is not None:
        controls.append(f"chunks averaged with ensemble={settings['ensemble']:g}")
    if time := settings.get("time"):
        limit = f", at most {time['step_limit']} steps" if time["step_limit"] else ""
        controls.append(f"delay of {time['delay']} steps, {time['strategy']}{limit}")
    return controls


def write_summary(
    output: Path,
    results: Sequence[EpisodeResult],
    tasks: Sequence[str],
    settings: Mapping[str, Any],
    timing: Timing | None,
) -> dict[str, Any]:
    """Writes `summary.json` and `summary.md` of an evaluation and returns the former's content.

    Args:
        output: the evaluation's folder.
        results: its episodes.
        tasks: the instructions of the suite's tasks.
        settings: as in `settings.json`; they name the policy and every control.
        timing: of this call. If it played no episode, the timing of the call before is kept. None: the summary has no
            timing, because the episodes were played elsewhere.
    """
    summary = summarise(results, tasks)
    suite, policy = summary["suite"], settings["policy"]
    controls = _controls(settings)
    # Published scores are compared with runs of the published protocol only: every task from each of its 50 states, or
    # all of CALVIN's sequences.
    is_sequences = suite == "calvin_abc_d"
    published = "schedule published, renderer egl" if is_sequences else "placement official"
    episodes = PUBLISHED_SEQUENCES if is_sequences else 50
    is_published = (
        (suite in PUBLISHED_SUITES or is_sequences)
        and controls == [published]
        and {result.key for result in results} == set(product(range(len(tasks)), range(episodes)))
    )
    summary |= {"settings": dict(settings), "published_protocol": is_published}
    text = f"## {policy} on {suite}\n\n{', '.join(controls)}; {len(results)} episodes; 95 % Wilson intervals.\n\n"
    text += published_table({policy: {suite: summary}}, compare=is_published) + "\n"
    text += subtask_table(summary["subtasks"]) if is_sequences else task_table(summary)
    path = output / "summary.json"
    if timing is not None and timing.episodes:
        summary["timing"] = {name: round(value, 3) for name, value in vars(timing).items()}
    elif timing is not None and path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        summary |= {name: before[name] for name in ("timing",) if name in before}
    if "timing" in summary:
        text += "\n" + Timing(**summary["timing"]).table()
    write_json(path, summary)
    write_text(output / "summary.md", text)
    return summary
