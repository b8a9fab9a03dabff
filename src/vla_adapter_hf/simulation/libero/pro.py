"""LIBERO-PRO (arXiv 2510.03827): LIBERO's suites with one thing changed, to tell skill from memory."""

from __future__ import annotations

import re
from pathlib import Path


BASES = ("libero_spatial", "libero_object", "libero_goal", "libero_10")

PERTURBATIONS = {"object": "Object", "swap": "Position", "lan": "Semantic", "task": "Task"}
"""Suffixes of the suites, and their names in the paper. The simulator has no files for its fifth, the environment.

`object`: other colours and shapes of the same objects. `swap`: the target and another object swap positions. `lan`:
the instruction is paraphrased. `task`: the instruction asks for something else in the same scene, and success means
that."""

PRO_SUITES = {f"{base}_{suffix}": base for base in BASES for suffix in PERTURBATIONS}
"""The base suite of every perturbed one."""

_REWORDED = ("lan", "task")

_MODELS = ("OpenVLA", "π0", "π0.5", "MolmoAct", "NORA", "X-VLA")
_RATES = {
    "libero_spatial": [[95, 97, 0, 97, 0], [90, 95, 0, 97, 0], [96, 97, 20, 97, 1], [None, 90, 0, 88, 0]]
    + [[None, 92, 0, 91, 0], [None, 97, 0, 96, 0]],
    "libero_object": [[99, 98, 0, 98, 0], [98, 94, 0, 90, 0], [98, 98, 17, 96, 1], [None, 92, 6, 96, 0]]
    + [[None, 86, 0, 92, 0], [None, 89, 2, 98, 8]],
    "libero_goal": [[98, 96, 0, 98, 0], [92, 94, 0, 93, 0], [97, 97, 38, 97, 0], [None, 68, 0, 85, 0]]
    + [[None, 58, 0, 88, 0], [None, 68, 1, 98, 9]],
    "libero_10": [[93, 81, 0, 96, 0], [82, 79, 0, 82, 0], [93, 92, 8, 93, 1], [None, 54, 0, 74, 6]]
    + [[None, 46, 0, 74, 0], [None, 62, 0, 95, 10]],
}
PRO_PUBLISHED = {base: dict(zip(_MODELS, rates, strict=True)) for base, rates in _RATES.items()}
"""Success rates in per cent, unperturbed and then in the order of `PERTURBATIONS`, from LIBERO-PRO's leaderboard."""


def grid(base: str) -> list[str]:
    """A base suite and its perturbations, in the order of the published table."""
    return [base, *(f"{base}_{suffix}" for suffix in PERTURBATIONS)]


def task_instruction(suite: str, language: str, task_file: str | Path) -> str:
    """The instruction of a task.

    The published protocol takes it from the name of the task's file. Perturbed suites have the base suite's file
    names, so a changed instruction is in the file only. Where only the scene is changed, the instruction is the base
    suite's.

    Args:
        suite: name of the suite.
        language: the instruction from the file's name.
        task_file: the task's BDDL file.

    Raises:
        ValueError: the file has no instruction.
    """
    base = PRO_SUITES.get(suite)
    if base is None or suite.removeprefix(f"{base}_") not in _REWORDED:
        return language
    found = re.search(r"\(:language\s+([^)]+)\)", Path(task_file).read_text(encoding="utf-8"))
    if found is None:
        raise ValueError(f"{task_file} has no (:language ...)")
    return " ".join(found.group(1).split())
