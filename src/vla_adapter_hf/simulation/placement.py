"""Positions of the objects of a scene: as in the benchmark, jittered, permuted, or both.

libero_object's initial states hardly move (0 to 2 cm), so a policy can solve them without looking. These placements
move the target and the distractors in the floor plane; heights and orientations stay.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


PLACEMENTS = ("official", "jitter", "shuffle", "both")
"""`official`: unchanged. `jitter`: every object moves by up to ±5 cm in x and in y. `shuffle`: the objects swap
positions, and the first one (the target) always gets another. `both`: shuffle, then jitter."""

STREAMS = {"evaluation": 0, "demonstration": 1, "correction": 2}
"""First number of every seed: evaluations and recordings draw different numbers, whatever their seeds are."""

FINGERS = (0.02, 0.066)
"""Half sizes (x, y) of the space that the open fingers of LIBERO's gripper need around an object, metres."""
HAND = (0.03, 0.10)
"""The same for the hand above the fingers."""
PALM_OVER_TOP = 0.01
"""Distance of the palm above the top of the grasped object, metres."""

_ATTEMPTS = 2000


@dataclass(frozen=True)
class Footprint:
    """An axis-aligned rectangle on the floor: centre and half sizes, each (2,), metres."""

    centre: np.ndarray
    half: np.ndarray


def placement_generator(stream: str, seed: int, task: int, episode: int) -> np.random.Generator:
    """The random numbers of one episode's placement, the same in every process.

    Args:
        stream: one of `STREAMS`.
        seed: the run's seed, at least 0.
        task, episode: as in the results.
    """
    if stream not in STREAMS:
        raise ValueError(f"stream must be one of {sorted(STREAMS)}, got {stream!r}")
    if seed < 0:
        raise ValueError(f"seed must be 0 or more, got {seed}")
    return np.random.default_rng([STREAMS[stream], seed, task, episode])


def gap(first: Footprint, second: Footprint) -> float:
    """The free distance between two footprints in metres; 0 if they touch or overlap."""
    apart = np.abs(first.centre - second.centre) - first.half - second.half
    return float(np.hypot(*np.maximum(apart, 0.0)))


def draw_placement(
    placement: str,
    centres: np.ndarray,
    halves: np.ndarray,
    tops: np.ndarray,
    obstacles: list[Footprint],
    generator: np.random.Generator,
    amplitude: float = 0.05,
    clearance: float = 0.02,
    reachable: Footprint | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Draws positions for the movable objects of a scene.

    Args:
        placement: one of `PLACEMENTS`.
        centres: (N, 2), present positions of the objects, the target first.
        halves: (N, 2), half sizes of their footprints.
        tops: (N,), heights of the objects' tops over the floor.
        obstacles: footprints that do not move, such as the basket.
        generator: the episode's random numbers.
        amplitude: largest jitter along x and along y, metres.
        clearance: smallest free distance between two footprints, metres.
        reachable: a disc in which jittered centres stay, as centre and (radius, radius); None for no limit.

    Around every object there is room for an open gripper (`FINGERS`) and, where a neighbour is tall enough to touch
    the palm, for the hand (`HAND`), so every object can be grasped.

    Returns:
        The new centres (N, 2) and the source of each (N,): object i is now where object `places[i]` was.

    Raises:
        ValueError: an unknown placement, or no free arrangement after many draws.
    """
    if placement not in PLACEMENTS:
        raise ValueError(f"placement must be one of {', '.join(PLACEMENTS)}, got {placement!r}")
    centres = np.asarray(centres, dtype=np.float64)
    halves = np.asarray(halves, dtype=np.float64)
    count = len(centres)
    if centres.shape != (count, 2) or halves.shape != (count, 2):
        raise ValueError(f"centres and halves must both have shape (N, 2), got {centres.shape} and {halves.shape}")
    identity = np.arange(count)
    if placement == "official":
        return centres.copy(), identity
    if placement != "jitter" and count < 2:
        raise ValueError(f"placement={placement!r} needs at least two objects to swap, got {count}")

    for _ in range(_ATTEMPTS):
        places = identity
        if placement in ("shuffle", "both"):
            places = generator.permutation(count)
            if places[0] == 0:
                continue
        drawn = centres[places]
        if placement in ("jitter", "both"):
            drawn = _jitter(drawn, halves, obstacles, generator, amplitude, clearance, reachable)
        if drawn is None or _collides(drawn, halves, tops, obstacles, clearance):
            continue
        return drawn, places
    raise ValueError(
        f"no collision-free {placement!r} placement of {count} objects found in {_ATTEMPTS} draws with "
        f"amplitude={amplitude} and clearance={clearance}; lower one of them"
    )


def _jitter(centres, halves, obstacles, generator, amplitude, clearance, reachable) -> np.ndarray | None:
    """Places the objects one by one in random order; None if there is no room for one of them."""
    placed = list(obstacles)
    drawn = np.empty_like(centres)
    for index in generator.permutation(len(centres)):
        for _ in range(50):
            candidate = Footprint(centres[index] + generator.uniform(-amplitude, amplitude, size=2), halves[index])
            # An object outside the disc may stay at its distance.
            near = reachable is None or _distance(candidate.centre, reachable) <= max(
                reachable.half[0], _distance(centres[index], reachable)
            )
            if near and all(gap(candidate, other) >= clearance for other in placed):
                placed.append(candidate)
                drawn[index] = candidate.centre
                break
        else:
            return None
    return drawn


def _distance(point: np.ndarray, disc: Footprint) -> float:
    return float(np.hypot(*(point - disc.centre)))


def _collides(centres, halves, tops, obstacles, clearance) -> bool:
    footprints = [Footprint(centre, half) for centre, half in zip(centres, halves, strict=True)]
    for i, one in enumerate(footprints):
        if any(gap(one, other) < clearance for other in obstacles):
            return True
        for j, other in enumerate(footprints):
            if i == j:
                continue
            room = HAND if tops[j] > tops[i] + PALM_OVER_TOP else FINGERS
            if gap(one, other) < clearance or gap(Footprint(one.centre, np.array(room)), other) == 0.0:
                return True
    return False
