"""The report of `vla-adapter bench --gpu` as Markdown."""

from __future__ import annotations

from typing import Any

from vla_adapter_hf.bench.measures import STAGES


# Of a compiled prediction in bfloat16 of one observation with two cameras.
GOAL_SECONDS = 0.010
# Published elsewhere, not measured here: milliseconds of one prediction with two cameras.
PUBLISHED = (
    ("the original, H100, as published", 36.5),
    ("the original, H100, as its users measure", 90.0),
    ("vla.cpp, RTX 5090, as published", 19.8),
)


def markdown(report: dict[str, Any]) -> str:
    """Tables of predictions and stages in milliseconds, the card's limit, and what others report."""
    batches = sorted({int(size) for times in report["predictions"].values() for size in times})
    lines = [f"# {_card(report)}", "", _limits(report), "", _row(["ms, median", *batches]), _rule(len(batches))]
    for name, times in report["predictions"].items():
        lines.append(_row([name, *(_milliseconds(times.get(str(size))) for size in batches)]))
    for precision in report["work"]["weights"]:
        limits = [f"{limit_seconds(report, precision, size) * 1000:.2f}" for size in batches]
        lines.append(_row([f"the card's limit, {precision}", *limits]))
    names = list(report["stages"])
    lines += ["", _row(["stage of one prediction, ms", *names]), _rule(len(names))]
    for stage in STAGES:
        times = [report["stages"][name].get(stage) for name in names]
        lines.append(_row([stage, *("" if seconds is None else f"{seconds * 1000:.2f}" for seconds in times)]))
    lines += ["", "Compiled stages are compiled one by one; a whole compiled prediction has no borders.", ""]
    lines += [_row(["others, not measured here", "ms"]), _rule(1)]
    lines += [_row([name, f"{milliseconds:.1f}"]) for name, milliseconds in PUBLISHED]
    lines += ["", _goal(report)]
    if report["left_out"]:
        lines.append(f"Left out, for lack of time: {'; '.join(report['left_out'])}.")
    return "\n".join(lines) + "\n"


def limit_seconds(report: dict[str, Any], precision: str, batch_size: int) -> float:
    """The least that a prediction can take at the rates measured: reading its weights once, or its operations."""
    work, limits = report["work"], report["limits"]
    reading = work["weights"][precision] / limits["bytes_per_second"]
    return max(reading, batch_size * work["flops"] / limits["operations_per_second"][precision])


def _card(report: dict[str, Any]) -> str:
    card = report["card"]
    versions = ", ".join(f"{name} {version}" for name, version in card["versions"].items() if version is not None)
    return f"{card['name']}, {report['size']} size, {versions}"


def _limits(report: dict[str, Any]) -> str:
    limits, work = report["limits"], report["work"]
    rates = ", ".join(f"{rate / 1e12:.1f} TOP/s in {name}" for name, rate in limits["operations_per_second"].items())
    weights = ", ".join(f"{size / 1e9:.2f} GB in {name}" for name, size in work["weights"].items())
    return (
        f"Measured: a copy at {limits['bytes_per_second'] / 1e9:.0f} GB/s, matrix products at {rates}. A prediction "
        f"reads weights of {weights} and makes {work['flops'] / 1e12:.3f} TFLOP, with {work['prompt_tokens']} prompt "
        "tokens."
    )


def _goal(report: dict[str, Any]) -> str:
    goal = f"Goal: at most {GOAL_SECONDS * 1000:.0f} ms for one observation at the published size, bfloat16, compiled"
    times = report["predictions"].get("bfloat16, compiled", {}).get("1")
    if report["size"] != "full" or times is None:
        return f"{goal}: not measured here."
    verdict = "met" if times["p50"] <= GOAL_SECONDS else "missed"
    return f"{goal}: {verdict}, {times['p50'] * 1000:.2f} ms."


def _milliseconds(times: dict[str, float] | None) -> str:
    return "" if times is None else f"{times['p50'] * 1000:.2f}"


def _row(cells: list[Any]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _rule(numbers: int) -> str:
    return f"|---|{'---:|' * numbers}"
