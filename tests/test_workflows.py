"""What the workflows run exists, and what takes too long for every commit is run by one of them."""

import re
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
TARGETS = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def run_by(workflow: Path) -> set[str]:
    return set(re.findall(r"run: make ([\w-]+)", workflow.read_text(encoding="utf-8")))


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_runs_targets_that_the_makefile_has(workflow):
    assert run_by(workflow)
    assert run_by(workflow) <= TARGETS


def test_the_plugin_and_the_slow_tests_are_run_by_a_workflow():
    assert {"test", "test-slow", "test-lerobot"} <= set().union(*map(run_by, WORKFLOWS))
