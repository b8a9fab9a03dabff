"""Several evaluations of a policy in one call: LIBERO-PRO's table, a suite and its four perturbations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vla_adapter_hf.simulation.environment import Suite
from vla_adapter_hf.simulation.evaluate import check_controls, evaluate, load_policy, make_suite
from vla_adapter_hf.simulation.libero.pro import BASES, PERTURBATIONS, PRO_PUBLISHED, grid
from vla_adapter_hf.simulation.policies import Policy, ResidentPolicy
from vla_adapter_hf.simulation.results import rate_cell
from vla_adapter_hf.simulation.settings import EvaluationSettings
from vla_adapter_hf.utils.files import write_text


def evaluate_grid(
    policy: str | Policy | ResidentPolicy,
    base: str,
    output: str | Path,
    settings: EvaluationSettings | None = None,
    report: Callable[[str], None] = print,
) -> dict[str, dict[str, Any]]:
    """Runs a policy on a base suite and on its perturbations, and resumes such a run.

    Args:
        policy: as for [`~vla_adapter_hf.simulation.evaluate.evaluate`].
        base: one of `BASES`.
        output: folder of the table, `summary.md`, and of a folder for every suite.
        settings: of every suite's evaluation.
        report: receives lines of progress.

    Returns:
        The summary of every suite.

    Raises:
        ValueError: another base suite, a placement other than `official`, `instruction='other'`, or a shard; otherwise
            as for `evaluate`.
    """
    settings = settings or EvaluationSettings()
    suites = _grid_suites(base, settings)
    if isinstance(policy, str):
        policy = load_policy(policy, suites[base], settings)
    output = Path(output)
    summaries = evaluate_cells(policy, {name: (suite, settings) for name, suite in suites.items()}, output, report)
    write_text(output / "summary.md", grid_table(policy.name, base, summaries))
    return summaries


def _grid_suites(base: str, settings: EvaluationSettings) -> dict[str, Suite]:
    if base not in BASES:
        raise ValueError(f"LIBERO-PRO perturbs {', '.join(BASES)}; got suite={base!r}")
    if settings.placement != "official":
        raise ValueError(f"LIBERO-PRO's suites have placement='official' only, got {settings.placement!r}")
    if settings.instruction == "other":
        raise ValueError(f"LIBERO-PRO's suites have no instruction='other'; it is for {', '.join(BASES)} alone")
    if settings.shard is not None:
        raise ValueError(f"shard={settings.shard} is for one suite; play the suites of LIBERO-PRO one by one")
    return {name: make_suite(name, settings) for name in grid(base)}


def evaluate_cells(
    policy: Policy | ResidentPolicy,
    cells: Mapping[str, tuple[Suite, EvaluationSettings]],
    output: Path,
    report: Callable[[str], None],
) -> dict[str, dict[str, Any]]:
    """Plays every cell of a grid in a folder of its own, and resumes such a run.

    Args:
        policy: plays all cells.
        cells: suite and settings, by the name of the cell's folder.
        output: holds these folders.
        report: receives lines of progress.

    Returns:
        The summary of every cell.

    Raises:
        ValueError: as for `evaluate`. What a cell cannot play is refused before any cell is played.
    """
    for suite, settings in cells.values():
        check_controls(policy, suite, settings)
    summaries = {}
    for name, (suite, settings) in cells.items():
        report(f"{name}:")
        summaries[name] = evaluate(policy, suite, output / name, settings, report)
    return summaries


def evaluate_grids(
    policy: str,
    output: str | Path,
    settings: EvaluationSettings | None = None,
    report: Callable[[str], None] = print,
) -> None:
    """`evaluate_grid` for all of `BASES`, in a folder for each. `summary.md` in `output` holds all tables.

    Raises:
        ValueError: as for `evaluate_grid`, before anything is played.
    """
    output = Path(output)
    settings = settings or EvaluationSettings()
    for suite in [suite for base in BASES for suite in _grid_suites(base, settings).values()]:
        check_controls(None, suite, settings)
    for base in BASES:
        evaluate_grid(policy, base, output / base, settings, report)
    tables = [(output / base / "summary.md").read_text(encoding="utf-8") for base in BASES]
    write_text(output / "summary.md", "\n".join(tables))


def grid_table(policy: str, base: str, summaries: Mapping[str, Mapping[str, Any]]) -> str:
    """The table of LIBERO-PRO for one base suite as Markdown, success in per cent, with the published rows below.

    Args:
        policy: name of the policy.
        base: one of `BASES`.
        summaries: of the suites in `grid(base)`.
    """
    names = ["Original", *PERTURBATIONS.values()]
    lines = [f"## {base} and LIBERO-PRO", "", "| Policy | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
    lines.append(f"| {policy} | " + " | ".join(rate_cell(summaries.get(suite)) for suite in grid(base)) + " |")
    for model, rates in PRO_PUBLISHED[base].items():
        cells = ["—" if rate is None else str(rate) for rate in rates]
        lines.append(f"| {model} (published) | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
