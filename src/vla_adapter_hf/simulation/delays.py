"""What delay costs: a policy that needs time to answer, played with several strategies, as one table and one plot."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vla_adapter_hf.robot.strategies import STRATEGIES
from vla_adapter_hf.simulation.environment import Suite
from vla_adapter_hf.simulation.evaluate import CALVIN, load_policy, make_suite
from vla_adapter_hf.simulation.grid import evaluate_cells
from vla_adapter_hf.simulation.intervals import mean_interval, wilson_interval
from vla_adapter_hf.simulation.policies import Policy, ResidentPolicy
from vla_adapter_hf.simulation.results import EpisodeResult, rate_cell, read_results
from vla_adapter_hf.simulation.settings import CALVIN_RATE, CONTROL_RATE, DelaySettings
from vla_adapter_hf.utils.files import write_json, write_text
from vla_adapter_hf.utils.plotting import new_figure, save_figure


if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Settings in which the cells of one table may differ.
VARIED = ("placement", "time")
COLOURS = {"sync": "tab:gray", "async": "tab:orange", "async-rolled": "tab:blue"}


@dataclass(frozen=True)
class DelayCell:
    """The outcome of one delay and one strategy.

    Attributes:
        scenes: how the scenes were drawn, or the name of the grid's folder.
        strategy: what the robot did during the delay.
        delay, delay_seconds: control steps that an answer took, and the time of these steps.
        episodes, successes: numbers of episodes.
        success_rate, interval_95: share of the solved episodes, and its 95 % Wilson interval.
        steps, steps_95: mean of the executed steps of solved episodes, those of delays among them, and its 95 %
            interval; None where there are too few.
        seconds, seconds_95: the same in seconds of the robot's clock.
    """

    scenes: str
    strategy: str
    delay: int
    delay_seconds: float
    episodes: int
    successes: int
    success_rate: float
    interval_95: tuple[float, float]
    steps: float | None
    steps_95: tuple[float, float] | None
    seconds: float | None
    seconds_95: tuple[float, float] | None


def evaluate_delays(
    policy: str | Policy | ResidentPolicy,
    suite: str | Suite,
    output: str | Path,
    settings: DelaySettings,
    report: Callable[[str], None] = print,
) -> list[DelayCell]:
    """Runs a policy with every delay and strategy, and resumes such a run.

    Each cell is an evaluation in the folder `<strategy>_delay<delay>` of the output. The output's `delays.md` is the
    table, `delays.json` its numbers, `delays.png` the plot (with the extra `plot`).

    Args:
        policy, suite: as for [`~vla_adapter_hf.simulation.evaluate.evaluate`].
        output: folder of the results.
        settings: everything else. A delay uses up steps, so it needs a larger `step_limit` than the suite's own.
        report: receives lines of progress.

    Returns:
        The cells.

    Raises:
        ValueError: a shard, or a strategy that the suite or the policy cannot play; otherwise as for `evaluate`.
    """
    if settings.shard is not None:
        raise ValueError(f"shard={settings.shard} is for one delay and one strategy; play the cells one by one")
    if isinstance(suite, str):
        suite = make_suite(suite, settings)
    if isinstance(policy, str):
        policy = load_policy(policy, suite, settings)
    output = Path(output)
    evaluate_cells(policy, {name: (suite, cell) for name, cell in settings.cells().items()}, output, report)
    return write_delays([output], output, report)


def is_delay_grid(folder: str | Path) -> bool:
    """Whether a folder is an output of [`evaluate_delays`], finished or not."""
    return any(True for strategy in STRATEGIES for _ in Path(folder).glob(f"{strategy}_delay*/settings.json"))


def read_cells(folders: Sequence[str | Path]) -> list[DelayCell]:
    """The finished cells of some outputs of [`evaluate_delays`].

    Args:
        folders: grids of one policy. Episodes that not all of their cells hold are left out, so that all cells are
            about the same ones. Grids are named by their placement, or by their folder where two have the same.

    Raises:
        ValueError: no finished cell, or cells that cannot be compared; the message says what differs.
    """
    grids: list[list[_Finished]] = []
    for folder in map(Path, folders):
        grids.append([_Finished.read(path.parent) for path in sorted(folder.glob("*_delay*/summary.json"))])
        if not grids[-1]:
            raise ValueError(f"{folder} holds no finished evaluation with a delay")
    placements = [grid[0].settings.get("placement", "official") for grid in grids]
    if len(set(placements)) < len(grids):
        placements = [grid[0].folder.parent.name for grid in grids]
    everything = [finished for grid in grids for finished in grid]
    for finished in everything:
        finished.check_comparable(everything[0])
    common = set.intersection(*({result.key for result in finished.results} for finished in everything))
    if not common:
        raise ValueError(f"{', '.join(map(str, folders))} have no episode in common: they cannot be compared")
    cells = []
    for grid, scenes in zip(grids, placements, strict=True):
        cells += sorted(
            (finished.cell(scenes, common) for finished in grid),
            key=lambda cell: (cell.delay, STRATEGIES.index(cell.strategy)),
        )
    return cells


@dataclass(frozen=True)
class _Finished:
    """The files of one cell."""

    folder: Path
    settings: dict[str, Any]
    results: list[EpisodeResult]

    @classmethod
    def read(cls, folder: Path) -> _Finished:
        settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
        return cls(folder, settings, read_results(folder / "episodes.jsonl"))

    def check_comparable(self, other: _Finished) -> None:
        differing = [
            name
            for name in {**self.settings, **other.settings}
            if name not in VARIED and self.settings.get(name) != other.settings.get(name)
        ]
        limits = [finished.settings.get("time", {}).get("step_limit") for finished in (self, other)]
        differing += ["step_limit"] if limits[0] != limits[1] else []
        if differing:
            raise ValueError(f"{self.folder} cannot be compared with {other.folder}: {', '.join(differing)} differ")

    def cell(self, scenes: str, episodes: set[tuple[int, int]]) -> DelayCell:
        """The outcome of the chosen episodes, by task and number."""
        time = self.settings.get("time", {"strategy": "sync", "delay": 0})
        solved = [result.steps for result in self.results if result.success and result.key in episodes]
        rate = CALVIN_RATE if self.settings["suite"] == CALVIN else CONTROL_RATE
        steps = sum(solved) / len(solved) if solved else None
        interval = mean_interval(solved) if len(solved) > 1 else None
        return DelayCell(
            scenes=scenes,
            strategy=time["strategy"],
            delay=time["delay"],
            delay_seconds=time["delay"] / rate,
            episodes=len(episodes),
            successes=len(solved),
            success_rate=len(solved) / len(episodes),
            interval_95=wilson_interval(len(solved), len(episodes)),
            steps=steps,
            steps_95=interval,
            seconds=None if steps is None else steps / rate,
            seconds_95=None if interval is None else (interval[0] / rate, interval[1] / rate),
        )


def delay_table(cells: Iterable[DelayCell]) -> str:
    """A Markdown table with a row for each delay and strategy, and three columns for each kind of scenes."""
    by_row: dict[tuple[int, str], dict[str, DelayCell]] = {}
    for cell in sorted(cells, key=lambda cell: (cell.delay, STRATEGIES.index(cell.strategy))):
        by_row.setdefault((cell.delay, cell.strategy), {})[cell.scenes] = cell
    scenes = list(dict.fromkeys(name for row in by_row.values() for name in row))
    head = ["Delay", "Strategy"]
    for name in scenes:
        head += [f"{name}: success, %", "steps", "seconds"]
    episodes = next(iter(next(iter(by_row.values())).values())).episodes
    lines = [f"{episodes} episodes a cell; 95 % intervals; steps and seconds of the solved ones.", ""]
    lines += ["| " + " | ".join(head) + " |", "|---|---|" + "---:|" * (len(head) - 2)]
    for (delay, strategy), row in by_row.items():
        seconds = next(iter(row.values())).delay_seconds
        parts = [f"{delay} ({1000 * seconds:.0f} ms)", strategy] if delay else ["0", "any"]
        for name in scenes:
            parts += _numbers(row.get(name))
        lines.append("| " + " | ".join(parts) + " |")
    return "\n".join(lines) + "\n"


def _numbers(cell: DelayCell | None) -> list[str]:
    if cell is None:
        return ["—"] * 3
    return [
        rate_cell(asdict(cell)),
        _with_interval(cell.steps, cell.steps_95, 0),
        _with_interval(cell.seconds, cell.seconds_95, 1),
    ]


def _with_interval(value: float | None, interval: tuple[float, float] | None, digits: int) -> str:
    if value is None:
        return "—"
    bounds = "" if interval is None else f" ({interval[0]:.{digits}f}–{interval[1]:.{digits}f})"
    return f"{value:.{digits}f}{bounds}"


def plot_delays(cells: Sequence[DelayCell]) -> Figure:
    """Success and seconds to success over the delay, a column for each kind of scenes, with 95 % intervals.

    Raises:
        ImportError: matplotlib is missing.
    """
    scenes = list(dict.fromkeys(cell.scenes for cell in cells))
    strategies = [name for name in STRATEGIES if any(cell.strategy == name and cell.delay for cell in cells)]
    strategies = strategies or ["sync"]
    figure = new_figure(figsize=(1 + 4 * len(scenes), 6), layout="constrained")
    grid = figure.subplots(2, len(scenes), sharex=True, sharey="row", squeeze=False)
    for name, (above, below) in zip(scenes, grid.T, strict=True):
        above.set_title(f"{name} scenes")
        for place, strategy in enumerate(strategies):
            # All strategies begin at the cell without a delay. A shift keeps the intervals apart.
            shown = [cell for cell in cells if cell.scenes == name and (cell.strategy == strategy or not cell.delay)]
            shift = 0.12 * (place - (len(strategies) - 1) / 2)
            rates = [
                (cell.delay, 100 * cell.success_rate, [100 * bound for bound in cell.interval_95]) for cell in shown
            ]
            times = [(cell.delay, cell.seconds, cell.seconds_95) for cell in shown if cell.seconds_95 is not None]
            for axis, points in ((above, rates), (below, times)):
                if points:
                    _draw_line(axis, points, shift, strategy)
        below.set_xlabel("delay, control steps")
        below.set_xticks(sorted({cell.delay for cell in cells}))
        for axis in (above, below):
            axis.grid(alpha=0.3)
    grid[0, 0].set_ylabel("success, %")
    grid[0, 0].set_ylim(0, 103)
    grid[1, 0].set_ylabel("seconds, when solved")
    grid[0, 0].legend(loc="lower left")
    return figure


def _draw_line(axis: Any, points: list[tuple[int, float, Sequence[float]]], shift: float, strategy: str) -> None:
    delays, values, intervals = zip(*points, strict=True)
    errors = [[value - low for value, (low, _) in zip(values, intervals, strict=True)]]
    errors += [[high - value for value, (_, high) in zip(values, intervals, strict=True)]]
    axis.errorbar(
        [delay + shift for delay in delays],
        values,
        errors,
        label=strategy,
        color=COLOURS.get(strategy),
        marker="o",
        markersize=4,
        capsize=3,
    )


def write_delays(
    folders: Sequence[str | Path], output: str | Path, report: Callable[[str], None] = print
) -> list[DelayCell]:
    """Writes `delays.md`, `delays.json` and `delays.png` of the finished cells in some grids.

    Args:
        folders: as for [`read_cells`].
        output: folder of the three files.
        report: receives a line where matplotlib is missing, and then there is no plot.

    Returns:
        The cells.
    """
    cells, output = read_cells(folders), Path(output)
    write_text(output / "delays.md", delay_table(cells))
    write_json(output / "delays.json", [asdict(cell) for cell in cells])
    try:
        save_figure(plot_delays(cells), output / "delays.png")
    except ImportError as error:
        report(f"delays.png was not drawn: {error}")
    return cells
