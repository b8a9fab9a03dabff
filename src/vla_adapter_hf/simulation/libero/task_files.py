"""What LIBERO's task files (BDDL) say of a scene: what stands where, what may move, what else can be asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

from vla_adapter_hf.simulation.libero.install import import_libero


Predicates = list[list[str]]
"""Such as `[["on", "akita_black_bowl_1", "plate_1"]]`."""


@dataclass(frozen=True)
class Thing:
    """An object of a scene that is no fixture.

    Attributes:
        name: such as `plate_1`.
        kind: such as `plate`.
        anchors: the objects on which it stands, or after which its region is named, as in `next_to_plate_region`. The
            instruction may call it by this relation, so it moves with them.
        surface: the region of a fixture on or in which it stands, such as a stove's; None on the table.
        is_pinned: it stays, because a fixture or a region of the goal gives it its place.
        has_twin: another object of its kind is in the scene, and their places tell them apart.
        matters: the goal names it, or something that stands in relation to it.
    """

    name: str
    kind: str
    anchors: tuple[str, ...] = ()
    surface: str | None = None
    is_pinned: bool = False
    has_twin: bool = False
    matters: bool = False


def read_task_file(path: str | Path) -> dict[str, Any]:
    """A task file as LIBERO's own parser reads it.

    Raises:
        ImportError: LIBERO is not installed.
    """
    import_libero()
    from libero.libero.envs.bddl_utils import robosuite_parse_problem

    return robosuite_parse_problem(str(path))


def read_things(problem: Mapping[str, Any]) -> list[Thing]:
    """The movable objects of a scene, in the order of the task file."""
    places = _places(problem)
    table = _table(problem)
    kinds = {name: kind for kind, names in problem["objects"].items() for name in names}
    words = {name: _words(problem, place) for name, place in places.items() if _is_on_table(problem, place, table)}
    goal_words = [
        _words(problem, name)
        for _, *names in problem["goal_state"]
        for name in names
        if _is_on_table(problem, name, table)
    ]
    things = {}
    for name, kind in kinds.items():
        place, anchors, surface, is_pinned = places[name], [], None, False
        if place in kinds:
            anchors = [place]
        elif name in words:
            named = [other for other in words if other != name and _is_part(words[other], words[name])]
            anchors = [other for other in named if other in kinds]
            is_pinned = len(anchors) < len(named) or any(_is_part(words[name], goal) for goal in goal_words)
        elif problem["regions"][place]["target"] in kinds:
            anchors = [problem["regions"][place]["target"]]
        else:
            surface = place
        has_twin = len(problem["objects"][kind]) > 1
        things[name] = Thing(name, kind, tuple(anchors), surface, is_pinned, has_twin)
    named = {name for _, *names in problem["goal_state"] for name in names}
    named |= {problem["regions"][name]["target"] for name in named if name in problem["regions"]}
    matter = set()
    for name in kinds:
        if name in named:
            matter |= {name, *things[name].anchors}
    pinned = {name for thing in things.values() if thing.is_pinned for name in (thing.name, *thing.anchors)}
    return [replace(thing, matters=thing.name in matter, is_pinned=thing.name in pinned) for thing in things.values()]


def pairs_to_swap(things: list[Thing]) -> list[tuple[str, str]]:
    """Pairs of objects on the table that may swap places; what stands on them or next to them goes with them.

    One of each pair matters to the task, if anything does. An object with a twin keeps its place: the instruction
    tells the two apart by it.
    """
    free = [thing for thing in things if not (thing.anchors or thing.surface or thing.is_pinned or thing.has_twin)]
    pairs = [(one, other) for one, other in combinations(free, 2)]
    matter = [pair for pair in pairs if any(thing.matters for thing in pair)]
    return [(one.name, other.name) for one, other in matter or pairs]


def has_fixtures(problem: Mapping[str, Any]) -> bool:
    """Whether something is fixed to the table; each reset draws its place within its region."""
    return sum(map(len, problem["fixtures"].values())) > 1


def read_relations(problem: Mapping[str, Any]) -> Predicates:
    """What the file says of the scene at the beginning, without places on the table: what is on, in, open, ..."""
    table = _table(problem)
    return [state for state in problem["initial_state"] if not _is_on_table(problem, state[-1], table)]


def goal_in(problem: Mapping[str, Any], other: Mapping[str, Any]) -> Predicates | None:
    """The goal of another task, for the objects of this scene.

    Args:
        problem: the task file of this scene.
        other: the other task's file.

    Returns:
        The goal. None if this scene does not hold what the other task needs, in the relation in which the other
        task's instruction has it, or if the goal is the task's own or true from the beginning.
    """
    renamed = {}
    for name in {name for _, *names in other["goal_state"] for name in names}:
        renamed[name] = _counterpart(name, problem, other)
    if None in renamed.values():
        return None
    goal = [[predicate, *(renamed[name] for name in names)] for predicate, *names in other["goal_state"]]
    same_goal = sorted(goal) == sorted(problem["goal_state"])
    already_true = all(state in problem["initial_state"] for state in goal)
    return None if same_goal or already_true else goal


def _counterpart(name: str, problem: Mapping[str, Any], other: Mapping[str, Any]) -> str | None:
    """What an object, a fixture or a region of the other task is called in this scene; None if it is not there."""
    if name in other["regions"]:
        region, target = other["regions"][name], other["regions"][name]["target"]
        mine = _counterpart(target, problem, other)
        renamed = None if mine is None else mine + name.removeprefix(target)
        found = problem["regions"].get(renamed)
        return renamed if found is not None and found["ranges"] == region["ranges"] else None
    for group in ("fixtures", "objects"):
        for kind, names in other[group].items():
            if name not in names:
                continue
            here = problem[group].get(kind, [])
            if len(names) == len(here) == 1:
                return here[0]
            # Of several alike, it is the one in the same place.
            there = _places(other).get(name)
            places = _places(problem)
            return next((twin for twin in here if there is not None and places.get(twin) == there), None)
    return None


def _places(problem: Mapping[str, Any]) -> dict[str, str]:
    """For every object and fixture the region, the object or the fixture on or in which it begins."""
    return {state[1]: state[2] for state in problem["initial_state"] if state[0] in ("on", "in")}


def _table(problem: Mapping[str, Any]) -> str:
    """The fixture that stands in no region: the table or the floor."""
    places = _places(problem)
    return next(name for names in problem["fixtures"].values() for name in names if name not in places)


def _is_on_table(problem: Mapping[str, Any], place: str, table: str) -> bool:
    return place in problem["regions"] and problem["regions"][place]["target"] == table


def _words(problem: Mapping[str, Any], region: str) -> tuple[str, ...]:
    """The words of a region's name: `main_table_next_to_box_region` is next, to, box."""
    words = region.removeprefix(problem["regions"][region]["target"] + "_").split("_")
    return tuple(word for word in words if word not in ("region", "init"))


def _is_part(words: tuple[str, ...], longer: tuple[str, ...]) -> bool:
    """Whether words stand in this order, one after the other, in a longer name."""
    return len(words) < len(longer) and words in _windows(longer, len(words))


def _windows(words: tuple[str, ...], size: int) -> Iterator[tuple[str, ...]]:
    return (words[first : first + size] for first in range(len(words) - size + 1))
