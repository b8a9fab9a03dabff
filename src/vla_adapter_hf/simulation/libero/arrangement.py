"""Jittered and swapped scenes of the suites whose objects stand in relation to each other and on fixtures.

Which objects may move comes from the task file (`task_files`), where there is room from the simulator. The random
draws are geometry alone; `arranged` looks how they stand in the simulator.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from vla_adapter_hf.simulation.libero.task_files import Thing, pairs_to_swap
from vla_adapter_hf.simulation.placement import Footprint, gap


AMPLITUDE = 0.05  # largest jitter along x and along y, metres
CLEARANCE = 0.01  # between two footprints, metres
NEARER = 0.03  # by how much an object is nearer to its anchors than its twin is, metres

SLACK = 0.15  # how far from the other's place a swapped object may stand where there is no room, metres

_DRAWS = 2000
_QUARTERS = [np.array(turn) for turn in ([[1, 0], [0, 1]], [[0, -1], [1, 0]], [[-1, 0], [0, -1]], [[0, 1], [-1, 0]])]


@dataclass(frozen=True)
class Surface:
    """A rectangular region of a fixture, turned in the plane.

    Attributes:
        centre: (2,), metres.
        rotation: (2, 2), from the region's axes to the world's.
        half: (2,) half sizes along the region's axes, metres.
    """

    centre: np.ndarray
    rotation: np.ndarray
    half: np.ndarray

    def beyond(self, footprint: Footprint) -> np.ndarray:
        """(2,) how far a footprint reaches over the edges, metres; below 0 inside."""
        local = np.abs(self.rotation.T @ (footprint.centre - self.centre))
        # The footprints here are those of round things: turning them changes nothing.
        return local + footprint.half - self.half


@dataclass(frozen=True)
class Scene:
    """A scene as it stands, from above.

    Attributes:
        things: what may move.
        footprints: of the things.
        fixtures: footprints of the fixtures, without the table.
        surfaces: of the fixtures' regions on which things stand.
        reach: a disc in which things stay, as centre and (radius, radius).
    """

    things: Sequence[Thing]
    footprints: Mapping[str, Footprint]
    fixtures: Mapping[str, Footprint]
    surfaces: Mapping[str, Surface]
    reach: Footprint


@dataclass(frozen=True)
class Arrangement:
    """A drawn scene: how far each thing moves (2,), and which two have swapped places."""

    shifts: Mapping[str, np.ndarray]
    swapped: tuple[str, str] | None


def draw_arrangement(placement: str, scene: Scene, generator: np.random.Generator) -> Arrangement:
    """Draws positions for the things of a scene.

    With `shuffle` two things swap places, or come as near to it as there is room. With `jitter` each moves by up to
    `AMPLITUDE` in x and in y. With `both` both happen. A thing in or on a fixture stays in its region. A thing with
    anchors moves by the mean of their shifts, so that what is next to the plate, or between the plate and the ramekin,
    stays so. In a swap it may come to another side of its only anchor, at the same distance.

    Raises:
        ValueError: there is nothing to swap, or no free arrangement after many draws.
    """
    pairs = pairs_to_swap(list(scene.things))
    if placement in ("shuffle", "both") and not pairs:
        raise ValueError(f"placement={placement!r}: this scene has no two things that may swap places")
    for draw in range(_DRAWS):
        swapped = pairs[generator.integers(len(pairs))] if placement in ("shuffle", "both") else None
        slack = 2 * SLACK * max(0.0, draw / _DRAWS - 0.5)
        shifts = _draw_shifts(scene, swapped, placement in ("jitter", "both"), slack, generator)
        arrangement = Arrangement(shifts, swapped)
        if _fits(scene, arrangement.shifts):
            return arrangement
    raise ValueError(f"no free {placement!r} placement of {len(scene.things)} things found in {_DRAWS} draws")


def _draw_shifts(
    scene: Scene, swapped: tuple[str, str] | None, jitter: bool, slack: float, generator: np.random.Generator
) -> dict[str, np.ndarray]:
    shifts: dict[str, np.ndarray] = {}
    for thing in scene.things:
        if thing.anchors:
            continue
        shift = np.zeros(2)
        if swapped is not None and thing.name in swapped:
            other = swapped[1 - swapped.index(thing.name)]
            shift = scene.footprints[other].centre - scene.footprints[thing.name].centre
            if slack:
                shift = shift + generator.uniform(-slack, slack, size=2)
        if jitter and not thing.is_pinned:
            shift = shift + generator.uniform(-AMPLITUDE, AMPLITUDE, size=2)
        shifts[thing.name] = shift
    waiting = [thing for thing in scene.things if thing.anchors]
    while waiting:
        ready = [thing for thing in waiting if set(thing.anchors) <= set(shifts)]
        if not ready:
            names = ", ".join(thing.name for thing in waiting)
            raise ValueError(f"the task file places {names} in relation to each other only")
        for thing in ready:
            shifts[thing.name] = np.mean([shifts[anchor] for anchor in thing.anchors], axis=0)
            if swapped is not None and _is_next_to(thing, scene):
                offset = scene.footprints[thing.name].centre - scene.footprints[thing.anchors[0]].centre
                shifts[thing.name] += _QUARTERS[generator.integers(4)] @ offset - offset
        waiting = [thing for thing in waiting if thing.name not in shifts]
    return shifts


def _is_next_to(thing: Thing, scene: Scene) -> bool:
    """Whether a thing stands next to its only anchor, and so may stand on any side of it."""
    return len(thing.anchors) == 1 and gap(scene.footprints[thing.name], scene.footprints[thing.anchors[0]]) > 0


def _fits(scene: Scene, shifts: Mapping[str, np.ndarray]) -> bool:
    before = scene.footprints
    after = {name: Footprint(old.centre + shifts[name], old.half) for name, old in before.items()}
    # What is closer in the official scene may stay so.
    for one, other in combinations(after, 2):
        if gap(after[one], after[other]) < min(CLEARANCE, gap(before[one], before[other])) - 1e-9:
            return False
    for thing in scene.things:
        name = thing.name
        if thing.surface is not None:
            surface = scene.surfaces[thing.surface]
            if np.any(surface.beyond(after[name]) > np.maximum(0.0, surface.beyond(before[name])) + 1e-9):
                return False
        else:
            for fixture in scene.fixtures.values():
                if gap(after[name], fixture) < min(CLEARANCE, gap(before[name], fixture)) - 1e-9:
                    return False
        reach = max(scene.reach.half[0], _distance(before[name].centre, scene.reach.centre))
        if _distance(after[name].centre, scene.reach.centre) > reach + 1e-9:
            return False
    return all(_is_told_apart(thing, scene, before, after) for thing in scene.things)


def _is_told_apart(
    thing: Thing, scene: Scene, before: Mapping[str, Footprint], after: Mapping[str, Footprint]
) -> bool:
    """Whether a thing is still nearer to its anchors, or to its place on the table, than its twins are."""
    if not thing.has_twin or thing.surface is not None:
        return True

    def distance(name: str, footprints: Mapping[str, Footprint]) -> float:
        goals = [footprints[anchor].centre for anchor in thing.anchors] or [before[thing.name].centre]
        return sum(_distance(footprints[name].centre, goal) for goal in goals)

    for twin in scene.things:
        if twin.kind != thing.kind or twin.name == thing.name:
            continue
        margin = min(NEARER, distance(twin.name, before) - distance(thing.name, before))
        if distance(twin.name, after) - distance(thing.name, after) < margin - 1e-9:
            return False
    return True


def _distance(point: np.ndarray, other: np.ndarray) -> float:
    return float(np.hypot(*(point - other)))
