"""Starts, ends and grips: episodes of one instruction that differ from the others, and instructions that count."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

import numpy as np

from vla_adapter_hf.doctor.findings import Finding
from vla_adapter_hf.doctor.gripper import SHORT_HOLD, Gripper
from vla_adapter_hf.doctor.pictures import one_over_the_other
from vla_adapter_hf.doctor.recording import Recording
from vla_adapter_hf.doctor.timing import motion, state_spread
from vla_adapter_hf.training.probing import plain_text


LEAST_EPISODES = 5  # of an instruction; with fewer nothing is decided
FEW = 0.2  # share of an instruction's episodes up to which they are exceptions
SAME_PLACE = 0.05  # of the range of the states: starts or ends that are closer are one
FAR = 0.15  # of the range of the states
AT_REST, MOVING = 0.15, 0.5  # of the speed of a fast motion
EDGE = 3  # steps at a start or an end whose motion is looked at

_NUMBERS = {"two": 2, "three": 3, "four": 4, "five": 5} | {str(count): count for count in range(2, 10)}
# Plurals that are no objects and no repetitions, and words that only look like plurals.
_NOT_COUNTED = (
    "hands|arms|grippers|fingers|sides|ends|steps|seconds|degrees|centimeters|centimetres|is|this|its|as"
    "|towards|upwards|downwards|forwards|backwards|sideways|always"
)
_THINGS = rf"(?: (?!(?:{_NOT_COUNTED})\b)\w+){{0,2}} (?!(?:{_NOT_COUNTED})\b)\w*[^\Ws]s\b"
_COUNTS = re.compile(rf"(?<!between )(?<!between the )\b({'|'.join(_NUMBERS)}){_THINGS}")
_BOTH = re.compile(rf"(?<!between )\bboth\b(?! (?:{_NOT_COUNTED})\b)")


@dataclass
class Endings:
    """Starts and ends of the episodes of one instruction, N of them.

    Args:
        text: the instruction.
        positions: of the episodes in the recording.
        starts, ends: float64 (N, S), first and last state as shares of the range of all states.
        speeds: float64 (N, 2), motion at the start and at the end, as a share of a fast motion.
        grips: int (N,), how often a gripper closes.
        closed: bool (N, 2, grippers), whether a gripper is closed at the start and at the end.
    """

    text: str
    positions: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    speeds: np.ndarray
    grips: np.ndarray
    closed: np.ndarray


def is_closed(values: np.ndarray, gripper: Gripper) -> np.ndarray:
    """Whether commands (n,) close a gripper, bool (n,). Inner changes of under `SHORT_HOLD` steps are left out."""
    middle = (gripper.low + gripper.high) / 2
    closed = values > middle if gripper.closed == gripper.high else values < middle
    changes = [0, *(np.flatnonzero(np.diff(closed)) + 1), len(closed)]
    for first, end in zip(changes[1:-2], changes[2:-1], strict=True):
        if end - first < SHORT_HOLD:
            closed[first:end] = closed[first - 1]
    return closed


def expected_grips(text: str) -> int | None:
    """How many things or times an instruction counts: "both", "two cubes", "three times". None if it does not."""
    words = plain_text(text)
    counts = [_NUMBERS[match.group(1)] for match in _COUNTS.finditer(words)]
    counts += [2] * (len(_BOTH.findall(words)) + len(re.findall(r"\btwice\b", words)))
    return counts[0] if len(counts) == 1 else None


def find_endings(recording: Recording, grippers: list[Gripper]) -> list[Endings]:
    """Starts and ends by instruction, for instructions with `LEAST_EPISODES` episodes or more.

    Args:
        grippers: whose closing end is known is used; the same in all episodes.
    """
    known = [gripper for gripper in grippers if gripper.closed is not None]
    low, high = np.quantile(recording.all_states, [0.01, 0.99], axis=0)
    live = high - low > 1e-9
    spread = state_spread(recording)
    groups: dict[str, list[int]] = {}
    for position, _, _ in recording.episodes(4 * EDGE):
        if len(recording.texts[position]) == 1:
            groups.setdefault(plain_text(recording.texts[position][0]), []).append(position)
    found = []
    for positions in groups.values():
        if len(positions) < LEAST_EPISODES or not live.any():
            continue
        states = [recording.states[position] for position in positions]
        moves = [motion(values, spread) for values in states]
        fast = max(float(np.quantile(np.concatenate(moves), 0.9)), 1e-9)
        closed = [[is_closed(recording.actions[place][:, grip.dim], grip) for grip in known] for place in positions]
        found.append(
            Endings(
                recording.texts[positions[0]][0],
                np.array(positions),
                np.array([(values[0] - low)[live] / (high - low)[live] for values in states]),
                np.array([(values[-1] - low)[live] / (high - low)[live] for values in states]),
                np.array([[move[:EDGE].mean(), move[-EDGE:].mean()] for move in moves]) / fast,
                np.array([sum(int((np.diff(part.astype(int)) > 0).sum()) for part in parts) for parts in closed]),
                np.array([[[part[edge] for part in parts] for edge in (0, -1)] for parts in closed], bool),
            )
        )
    return found


def describe_endings(endings: list[Endings]) -> dict[str, str]:
    """By instruction: how many episodes, starts and ends it has, and how often its gripper closes."""
    return {
        group.text: f"{len(group.positions)} episodes, {_count_places(group.starts)} starts, "
        f"{_count_places(group.ends)} ends"
        + (f", gripper closes {_listed(group.grips)}" if group.closed.shape[2] else "")
        for group in endings
    }


def check_endings(recording: Recording, endings: list[Endings]) -> list[Finding]:
    """Findings about starts, ends and grips."""
    findings = [_exceptions(recording, endings, edge) for edge in (0, 1)]
    findings += [check(recording, endings) for check in (_other_grips, _two_ways_to_end, _miscounted)]
    return [finding for finding in findings if finding is not None]


def _listed(grips: np.ndarray) -> str:
    return ", ".join(
        f"{count} time(s) in {number} episode(s)" for count, number in sorted(Counter(grips.tolist()).items())
    )


def _count_places(states: np.ndarray) -> int:
    """How many of the states (N, S) are farther from each other than `SAME_PLACE`."""
    kept = states[:0]
    for state in states:
        if (np.sqrt(((kept - state) ** 2).mean(1)) > SAME_PLACE).all():
            kept = np.concatenate([kept, state[None]])
    return len(kept)


def _minority(values: np.ndarray) -> np.ndarray:
    """Where the values (N, ...) are not the most frequent ones, if those are the ones of nearly all; else nowhere."""
    rows = [tuple(row) for row in values.reshape(len(values), -1).tolist()]
    usual = Counter(rows).most_common(1)[0][0]
    other = np.array([row != usual for row in rows])
    return other if other.mean() <= FEW else np.zeros(len(rows), bool)


def _is_far(states: np.ndarray) -> np.ndarray:
    """States (N, S) whose nearest neighbour is much farther away than those of the others."""
    nearest = np.empty(len(states))
    for place, state in enumerate(states):
        distance = np.sqrt(((states - state) ** 2).mean(1))
        distance[place] = np.inf
        nearest[place] = distance.min()
    usual = np.quantile(nearest, 1 - FEW, method="lower")
    far = (nearest > FAR) & (nearest > 3 * usual)
    return far if far.mean() <= FEW else np.zeros(len(states), bool)


def _exceptions(recording: Recording, endings: list[Endings], edge: int) -> Finding | None:
    """Episodes that start (edge 0) or end (edge 1) in another way than the others of their instruction."""
    counts, numbers, total, example = Counter(), [], 0, None
    for group in endings:
        at_rest = (group.speeds[:, edge] < AT_REST).mean() >= 1 - FEW
        reasons = {
            "by the gripper": _minority(group.closed[:, edge]),
            "in motion, the others at rest": (group.speeds[:, edge] > MOVING) & at_rest,
            "far from the others": _is_far(group.ends if edge else group.starts),
        }
        odd = np.any(list(reasons.values()), axis=0)
        if not odd.any():
            continue
        counts.update({reason: int(which.sum()) for reason, which in reasons.items() if which.any()})
        numbers += [recording.numbers[position] for position in group.positions[odd]]
        total += len(odd)
        example = example or (group.positions[odd][0], group.positions[~odd][0])
    if example is None:
        return None
    what = "end" if edge else "start"
    return Finding(
        f"episodes {what} in another way than the others",
        "low" if set(counts) == {"far from the others"} else "medium",
        {"episodes": len(numbers), "of the same instructions": total, **counts},
        "They may be cut off, or failed: the policy learns to stop before the task is done."
        if edge
        else "They may have lost their beginning: the policy sees the task begin in two ways.",
        "Look at them, and repair or leave out those that are not whole.",
        sorted(numbers),
        one_over_the_other(recording, *((position, -1 if edge else 0) for position in example)),
    )


def _other_grips(recording: Recording, endings: list[Endings]) -> Finding | None:
    """Episodes whose gripper closes another number of times than that of nearly all others of their instruction."""
    counts, numbers, total, fewer, example = Counter(), [], 0, False, None
    for group in endings:
        odd = _minority(group.grips)
        if not odd.any() or not group.closed.shape[2]:
            continue
        usual = int(group.grips[~odd][0])
        fewer |= bool((group.grips[odd] < usual).any())
        counts.update(f"{count} instead of {usual} times" for count in group.grips[odd].tolist())
        numbers += [recording.numbers[position] for position in group.positions[odd]]
        total += len(odd)
        example = example or (group.positions[odd][0], group.positions[~odd][0])
    if example is None:
        return None
    return Finding(
        "the gripper closes more or less often than in the other episodes",
        "medium" if fewer else "low",
        {
            "episodes": len(numbers),
            "of the same instructions": total,
            "gripper closes": [f"{words} in {count} episode(s)" for words, count in counts.items()],
        },
        "Less often: something was not gripped, and the policy learns to leave it out. More often: a second try, "
        "which the policy may repeat without need.",
        "Look at them, and leave out those that failed.",
        sorted(numbers),
        one_over_the_other(recording, *((position, -1) for position in example)),
    )


def _two_ways_to_end(recording: Recording, endings: list[Endings]) -> Finding | None:
    """Instructions whose episodes end with an open gripper and, in more than a few cases, with a closed one."""
    counts, example = {}, None
    for group in endings:
        for closed in group.closed[:, 1].T:
            if FEW < closed.mean() < 1 - FEW:
                counts.setdefault(group.text, {"closed": int(closed.sum()), "open": int((~closed).sum())})
                example = example or (group.positions[closed][0], group.positions[~closed][0])
    if example is None:
        return None
    return Finding(
        "one instruction ends in two ways",
        "medium",
        {"episodes that end with the gripper": counts},
        "The words do not say whether to let go at the end, so the policy cannot know.",
        "Give the two ways two instructions, or record one of them only.",
        picture=one_over_the_other(recording, *((position, -1) for position in example)),
    )


def _miscounted(recording: Recording, endings: list[Endings]) -> Finding | None:
    """Instructions that count otherwise than the gripper. Without any grip, things are moved in another way."""
    counts, positions, fewer = {}, [], False
    for group in endings:
        expected, usual = expected_grips(group.text), float(np.median(group.grips))
        if expected is None or usual in (0, expected):
            continue
        counts[group.text] = {"says": expected, "gripper closes": _listed(group.grips)}
        positions += group.positions[group.grips != expected].tolist()
        fewer |= usual < expected
    if not positions:
        return None
    return Finding(
        "the instruction counts otherwise than the gripper",
        "medium" if fewer else "low",
        counts,
        "The demonstrations do another part of the task than the words say, and the policy learns that part.",
        "Check whether the episodes end too early or the instruction is wrong.",
        [recording.numbers[position] for position in positions],
    )
