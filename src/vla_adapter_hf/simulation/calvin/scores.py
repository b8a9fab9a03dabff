"""CALVIN's score: how many of five subtasks a policy solves in a row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vla_adapter_hf.simulation.intervals import wilson_interval


SUBTASKS = 5
PUBLISHED_SEQUENCES = 1000
PUBLISHED_SCORES = {
    "VLA-Adapter": (99.1, 94.6, 88.8, 82.8, 76.5, 4.42),
    "VLA-Adapter-Pro": (98.5, 95.0, 90.5, 85.3, 80.0, 4.50),
}
"""Success in per cent at 1...5 subtasks in a row, and the average length (arXiv 2509.09372)."""


def score_sequences(lengths: Sequence[int]) -> dict[str, Any]:
    """The published score from the number of subtasks solved in each sequence.

    Returns:
        `success_rates`: share of the sequences with at least 1, 2, 3, 4, 5 in a row; `average_length`; `sequences`;
        and 95 % intervals: `intervals_95` of the rates (Wilson), and `average_length_95`, the sums of their bounds.

    Raises:
        ValueError: no sequences, or a length outside 0...5.
    """
    array = np.asarray(lengths)
    if array.ndim != 1 or not len(array) or array.min() < 0 or array.max() > SUBTASKS:
        raise ValueError(f"lengths must be numbers 0...{SUBTASKS}, at least one, got {lengths!r}")
    reached = [int((array >= count).sum()) for count in range(1, SUBTASKS + 1)]
    intervals = [list(wilson_interval(count, len(array))) for count in reached]
    return {
        "success_rates": [count / len(array) for count in reached],
        "intervals_95": intervals,
        "average_length": float(array.mean()),
        "average_length_95": [sum(bounds) for bounds in zip(*intervals, strict=True)],
        "sequences": len(array),
    }


def score_subtasks(sequences: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """How often each subtask was tried and solved. One after a failure is never tried.

    Args:
        sequences: `subtasks` and how many were `completed`, of every sequence.

    Returns:
        By subtask, in alphabetical order: `tried`, `solved`, and `interval_95` of the rate.
    """
    solved: Counter[str] = Counter()
    tried: Counter[str] = Counter()
    for sequence in sequences:
        solved.update(sequence["subtasks"][: sequence["completed"]])
        tried.update(sequence["subtasks"][: sequence["completed"] + 1])
    return {
        name: {
            "tried": tried[name],
            "solved": solved[name],
            "interval_95": list(wilson_interval(solved[name], tried[name])),
        }
        for name in sorted(tried)
    }


def subtask_table(scores: Mapping[str, Mapping[str, Any]]) -> str:
    """A Markdown table of `score_subtasks`."""
    lines = ["| Subtask | Solved | Success, % (95 % interval) |", "|---|---|---|"]
    for name, score in scores.items():
        low, high = score["interval_95"]
        rate = f"{100 * score['solved'] / score['tried']:.1f} ({100 * low:.1f}–{100 * high:.1f})"
        lines.append(f"| {name} | {score['solved']}/{score['tried']} | {rate} |")
    return "\n".join(lines) + "\n"


def score_table(scores: Mapping[str, Mapping[str, Any]], compare: bool = True) -> str:
    """A Markdown table in the published form.

    Args:
        scores: of `score_sequences`, by policy.
        compare: add the published rows.
    """
    lines = ["| Policy | 1 | 2 | 3 | 4 | 5 | Average length |", "|---|---|---|---|---|---|---|"]
    for name, score in scores.items():
        rates = " | ".join(
            f"{100 * rate:.1f} ({100 * low:.1f}–{100 * high:.1f})"
            for rate, (low, high) in zip(score["success_rates"], score["intervals_95"], strict=True)
        )
        low, high = score["average_length_95"]
        length = f"{score['average_length']:.2f} ({low:.2f}–{high:.2f})"
        lines.append(f"| {name} ({score['sequences']} sequences) | {rates} | {length} |")
    for name, numbers in PUBLISHED_SCORES.items() if compare else ():
        rates = " | ".join(f"{rate:.1f}" for rate in numbers[:SUBTASKS])
        lines.append(f"| {name} (published) | {rates} | {numbers[SUBTASKS]:.2f} |")
    return "\n".join(lines) + "\n"
