"""Whether a suite's scenes allow what an evaluation asks for. The task files say so; no simulator is built."""

from __future__ import annotations

from collections.abc import Sequence

from vla_adapter_hf.simulation.libero.suite import STATES, LiberoSuite
from vla_adapter_hf.simulation.libero.task_files import has_fixtures, pairs_to_swap, read_things


def check_scenes(suite: LiberoSuite, tasks: Sequence[int], episodes: Sequence[int], instruction: str | None) -> None:
    """Refuses placements, instructions and episodes that the scenes of some tasks do not have.

    Args:
        suite: the suite.
        tasks: numbers of the tasks to be played.
        episodes: numbers of the episodes of each task, each once.
        instruction: text for the policy instead of the task's instruction, `other`, or None.

    Raises:
        ValueError: a placement has nothing to swap, or an instruction of the suite asks for something that a scene
            does not hold; says which tasks are fine. Or two of the episodes are the same.
    """
    if suite.placement in ("shuffle", "both") and suite.name != "libero_object":
        fine = [task for task in tasks if pairs_to_swap(read_things(suite.task_file(task)))]
        needs = "two different objects that may swap places"
        _refuse_all_but(fine, tasks, suite, f"placement={suite.placement!r}", needs)
    texts = suite.tasks
    if instruction == "other":
        fine = [task for task in tasks if suite.other_goals(task)]
        _refuse_all_but(fine, tasks, suite, "instruction='other'", "what another instruction of the suite asks for")
    elif instruction in texts:
        fine = [task for task in tasks if instruction in (texts[task], *suite.other_goals(task))]
        _refuse_all_but(fine, tasks, suite, f"instruction={instruction!r}", "what it asks for")
    if suite.placement == "official":
        _refuse_repeated(suite, tasks, episodes, asks_for_other=instruction == "other")


def _refuse_all_but(fine: Sequence[int], tasks: Sequence[int], suite: LiberoSuite, setting: str, needs: str) -> None:
    refused = ", ".join(str(task) for task in tasks if task not in fine)
    if refused:
        advice = f"choose tasks={','.join(map(str, fine))}" if fine else "none of the chosen tasks has one"
        raise ValueError(f"{setting} needs scenes with {needs}; in {suite.name} tasks {refused} have none: {advice}")


def _refuse_repeated(suite: LiberoSuite, tasks: Sequence[int], episodes: Sequence[int], asks_for_other: bool) -> None:
    states = suite.states or range(STATES)
    starts = [states[episode % len(states)] for episode in episodes]
    if len(set(starts)) == len(episodes):
        return
    for task in tasks:
        if has_fixtures(suite.task_file(task)):
            continue  # each reset draws their places
        texts = len(suite.other_goals(task)) if asks_for_other else 1
        different = len({(start, episode % texts) for start, episode in zip(starts, episodes, strict=True)})
        if different < len(episodes):
            raise ValueError(
                f"episodes must be different ones: of {len(episodes)} in task {task} of {suite.name} only {different} "
                f"are. Initial states repeat after {len(states)}, and nothing else is drawn. Choose fewer, or a "
                "placement such as jitter where the suite has it."
            )
