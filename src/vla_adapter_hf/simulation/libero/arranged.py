"""A drawn scene in the simulator: whether everything stands where it was put."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vla_adapter_hf.simulation.libero.arrangement import Scene, draw_arrangement
from vla_adapter_hf.simulation.libero.scene import LiberoScene
from vla_adapter_hf.simulation.libero.task_files import Predicates, Thing, read_relations, read_things
from vla_adapter_hf.simulation.placement import Footprint


TRIES = 20
"""How often an episode's scene is drawn again because it does not stand still."""

STILL, STILL_ANGLE = 0.01, 0.1  # metres and radians between where an object was put and where it rests


@dataclass(frozen=True)
class ArrangedScene:
    """A drawn scene, before the simulator has run.

    Attributes:
        poses: position (3,) and rotation (3, 3) that each object should have at rest.
        relations: what the task file says of the scene and was true before.
        goal: the predicates of success.
        reached: those of them that were true before.
        info: what was drawn, for the results file.
    """

    poses: Mapping[str, tuple[np.ndarray, np.ndarray]]
    relations: Predicates
    goal: Predicates
    reached: Predicates
    info: dict[str, Any]

    def problem(self, scene: LiberoScene) -> str | None:
        """What is wrong with the scene now, or None: something is not where it should be, or is done already."""
        for name, (position, rotation) in self.poses.items():
            now, turned = scene.object_pose(name)
            angle = math.acos(float(np.clip((np.trace(rotation.T @ turned) - 1) / 2, -1, 1)))
            if np.linalg.norm(now - position) > STILL or angle > STILL_ANGLE:
                return f"{name} does not stay where it was put"
            if scene.meets_hand(name):
                return f"{name} is under the hand"
        if scene.holding(self.relations) != self.relations:
            return "an object has left what it stood on"
        if scene.holding(self.goal) != self.reached:
            return "a part of the goal is reached"
        return None


def arrange(
    scene: LiberoScene,
    problem: Mapping[str, Any],
    goal: Predicates,
    placement: str,
    state: np.ndarray,
    generator: np.random.Generator,
    reach: float,
) -> ArrangedScene:
    """Draws a scene and writes it into a flattened simulator state.

    Args:
        scene: the simulator, in the official scene at rest.
        problem: the task file.
        goal: the predicates of success.
        placement: `jitter`, `shuffle` or `both`.
        state: the official initial state; changed in place.
        generator: random numbers.
        reach: metres from the robot's base.

    Raises:
        ValueError: there is nothing to swap, or no free arrangement.
    """
    seen = _look(scene, [thing for thing in read_things(problem) if scene.is_at_rest(thing.name)], reach)
    arrangement = draw_arrangement(placement, seen, generator)
    poses = {}
    for name, shift in arrangement.shifts.items():
        position, rotation = scene.object_pose(name)
        poses[name] = position + np.append(shift, 0.0), rotation
        scene.shift_object(state, name, shift)
    centres = {name: old.centre + arrangement.shifts[name] for name, old in seen.footprints.items()}
    return ArrangedScene(
        poses=poses,
        relations=scene.holding(read_relations(problem)),
        goal=goal,
        reached=scene.holding(goal),
        info={
            "positions": {name: [round(float(value), 4) for value in centre] for name, centre in centres.items()},
            "swapped": list(arrangement.swapped or ()),
        },
    )


def _look(scene: LiberoScene, things: Sequence[Thing], reach: float) -> Scene:
    """What decides where the things can go."""
    return Scene(
        things=things,
        footprints={thing.name: scene.footprint(thing.name) for thing in things},
        fixtures={name: scene.footprint(name) for name in scene.fixtures},
        surfaces={thing.surface: scene.surface(thing.surface) for thing in things if thing.surface is not None},
        reach=Footprint(scene.robot_base, np.array([reach, reach])),
    )
