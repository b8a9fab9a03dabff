"""What a check finds, and the report that collects it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np


SEVERITIES = ("high", "medium", "low")


@dataclass
class Finding:
    """One thing that is wrong, or may be.

    Args:
        name: the cause in a few words; the same cause has the same name in every report.
        severity: `"high"` (a policy trained on this fails), `"medium"` (it gets worse) or `"low"` (worth knowing).
        evidence: what was measured, numbers by name.
        effect: what it does to a policy.
        advice: what to do.
        episodes: the dataset's own numbers of the episodes concerned; empty if it is all of them.
        picture: uint8 (height, width, 3) that shows it, if a picture can.
    """

    name: str
    severity: str
    evidence: dict[str, Any]
    effect: str
    advice: str
    episodes: list[int] = field(default_factory=list)
    picture: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.severity not in SEVERITIES:
            raise ValueError(f"severity={self.severity!r} is not one of {', '.join(SEVERITIES)}")


@dataclass(frozen=True)
class Verdict:
    """The answer to one question about a policy.

    Args:
        question: such as `"looks"`.
        answer: `"yes"`, `"a little"`, `"no"`, `"cannot be decided"`, or names.
        reason: the numbers that it follows from.
    """

    question: str
    answer: str
    reason: str


@dataclass
class Report:
    """The result of a check.

    Args:
        dataset: the dataset as messages call it.
        facts: what the recording is, by subject: each a dict of plain values.
        findings: the most severe first.
        suggestion: arguments for `vla-adapter train` by name.
        command: a command line to copy.
        pictures: uint8 (height, width, 3) by caption.
        verdicts: about a policy, if one was checked.
        rule: how the verdicts follow from the numbers.
        tables: by title, rows of plain values by column.
        targets: action dimensions that are absolute targets, each with the state dimension that follows it.
    """

    dataset: str
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    suggestion: dict[str, Any] = field(default_factory=dict)
    command: str = ""
    pictures: dict[str, np.ndarray] = field(default_factory=dict)
    verdicts: list[Verdict] = field(default_factory=list)
    rule: str = ""
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    targets: dict[int, int] = field(default_factory=dict)

    def add(self, findings: list[Finding]) -> None:
        """Take more findings, and keep the most severe first."""
        self.findings = sorted([*self.findings, *findings], key=lambda finding: SEVERITIES.index(finding.severity))

    def named(self, name: str) -> Finding | None:
        """The finding of that name, if there is one."""
        return next((finding for finding in self.findings if finding.name == name), None)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, without the pictures."""
        findings = [
            {
                "name": finding.name,
                "severity": finding.severity,
                "evidence": plain(finding.evidence),
                "effect": finding.effect,
                "advice": finding.advice,
                "episodes": plain(finding.episodes),
            }
            for finding in self.findings
        ]
        return {
            "dataset": self.dataset,
            "facts": plain(self.facts),
            "findings": findings,
            "suggestion": plain(self.suggestion),
            "command": self.command,
            "verdicts": [asdict(verdict) for verdict in self.verdicts],
            "tables": plain(self.tables),
        }


def plain(value: Any) -> Any:
    """A value of numpy's or Python's as JSON has it, numbers with four significant digits."""
    if isinstance(value, dict):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [plain(inner) for inner in value]
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    if isinstance(value, (int, np.integer)):
        return int(value)
    if isinstance(value, (float, np.floating)):
        return float(f"{float(value):.4g}") if np.isfinite(value) else None
    return value
