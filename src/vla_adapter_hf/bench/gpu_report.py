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
    """Tables of predictions and stages in milliseconds, the card's limit, and what others report.

    Cells of what was not measured are empty.
    """
    batches = sorted({int(size) for times in report["predictions"].values() for size in times})
    lines = [f"# {_card(report)}", "", _limits(report), "", _row(["ms, median", *batches]), _rule(len(batches))]
    for name, times in report["predictions"].items():
        lines.append(_row([name, *(_milliseconds(times.get(str(size))) for size in batches)]))
    for precision in report["work"]["weights"]:
        limits = [limit_seconds(report, precision, size) for size in batches]
        cells = ["" if seconds is None else f"{seconds * 1000:.2f}" for seconds in limits]
        lines.append(_row([f"the card's limit, {precision}", *cells]))
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
        lines += ["", "Left out:", ""]
        lines += [f"- {entry['what']}: {in_one_line(entry['reason'])}" for entry in report["left_out"]]
    return "\n".join(lines) + "\n"


def limit_seconds(report: dict[str, Any], precision: str, batch_size: int) -> float | None:
    """The least that a prediction can take at the rates measured: reading its weights once, or its operations.

    `None` where one of them was not measured.
    """
    work, limits = report["work"], report["limits"]
    if "flops" not in work or "bytes_per_second" not in limits or precision not in limits["operations_per_second"]:
        return None
    reading = work["weights"][precision] / limits["bytes_per_second"]
    return max(reading, batch_size * work["flops"] / limits["operations_per_second"][precision])


def in_one_line(reason: str, most: int = 300) -> str:
    """The beginning of a message of several lines."""
    text = " ".join(reason.split())
    return text if len(text) <= most else f"{text[:most]} ..."


def _card(report: dict[str, Any]) -> str:
    card = report["card"]
    versions = ", ".join(f"{name} {version}" for name, version in card["versions"].items() if version is not None)
    return f"{card['name']}, {report['size']} size, {versions}"


def _limits(report: dict[str, Any]) -> str:
    limits, work = report["limits"], report["work"]
    measured = [f"a copy at {limits['bytes_per_second'] / 1e9:.0f} GB/s"] if "bytes_per_second" in limits else []
    rates = limits["operations_per_second"]
    measured += [f"matrix products at {rate / 1e12:.1f} TOP/s in {name}" for name, rate in rates.items()]
    text = f"Measured: {', '.join(measured) or 'no limits'}."
    if "flops" not in work:
        return text
    weights = ", ".join(f"{size / 1e9:.2f} GB in {name}" for name, size in work["weights"].items())
    return (
        f"{text} A prediction reads weights of {weights} and makes {work['flops'] / 1e12:.3f} TFLOP, with "
        f"{work['prompt_tokens']} prompt tokens."
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
