"""Copies of episodes: within a dataset, across its splits, and in another dataset."""

from __future__ import annotations

import hashlib

import numpy as np

from vla_adapter_hf.doctor.findings import Finding
from vla_adapter_hf.doctor.recording import Recording


def digest(states: np.ndarray, actions: np.ndarray) -> bytes:
    """A number that two episodes have in common only if all their states and actions are the same, in float32."""
    content = hashlib.blake2b(digest_size=16)
    for values in (states, actions):
        content.update(np.ascontiguousarray(values, np.float32).tobytes())
    return content.digest()


def check_duplicates(recording: Recording) -> list[Finding]:
    """Episodes that come twice in a dataset, in one split or in two."""
    seen: dict[bytes, int] = {}
    copies, across = [], []
    for position, states, actions in recording.episodes(2):
        first = seen.setdefault(digest(states, actions), position)
        if first == position:
            continue
        is_across = recording.splits is not None and recording.splits[first] != recording.splits[position]
        (across if is_across else copies).append(recording.numbers[position])
    findings = []
    if across:
        findings.append(
            Finding(
                "the same episodes in several splits",
                "high",
                {"copies": len(across), "splits": sorted(set(recording.splits or []))},
                "What is held out was trained on: the evaluation says nothing about new episodes.",
                "Remove the copies from one of the splits.",
                across,
            )
        )
    if copies:
        findings.append(
            Finding(
                "duplicate episodes",
                "high" if len(copies) > 0.2 * len(recording.actions) else "medium",
                {"copies": len(copies), "of": len(recording.actions)},
                "They count twice, and a copy among the held-out episodes makes the evaluation too good.",
                "Remove the copies.",
                copies,
            )
        )
    return findings


def check_copies(recording: Recording, other: Recording) -> list[Finding]:
    """Episodes that another dataset has too, such as the one for validation.

    Raises:
        ValueError: states or actions of the two have different sizes, or one of them has no readable episode.
    """
    for each in (recording, other):
        if not any(map(len, each.actions)):
            problem = f": {each.problems[0]}" if each.problems else ""
            raise ValueError(f"no episode of {each.name} can be read{problem}")
    for name in ("state", "action"):
        own, theirs = (getattr(each, f"all_{name}s").shape[1] for each in (recording, other))
        if own != theirs:
            raise ValueError(
                f"{recording.name} has {own} values in a {name}, {other.name} has {theirs}: they are not of one "
                "robot. Give as against another dataset of the same robot, such as the one for validation."
            )
    findings = []
    unread = sum(len(actions) == 0 for actions in other.actions)
    if unread:
        findings.append(
            Finding(
                "episodes of the other dataset cannot be read",
                "medium",
                {"episodes": unread, "other dataset": other.name, "problems": other.problems[:3]},
                "They are not compared: copies of them are not found.",
                "Repair them or leave them out, and check again.",
            )
        )
    theirs = {digest(states, actions): other.numbers[position] for position, states, actions in other.episodes(2)}
    pairs = {
        recording.numbers[position]: theirs[content]
        for position, states, actions in recording.episodes(2)
        if (content := digest(states, actions)) in theirs
    }
    if pairs:
        findings.append(_shared(recording, other, pairs))
    return findings


def _shared(recording: Recording, other: Recording, pairs: dict[int, int]) -> Finding:
    """The finding for shared episodes, by their number in the recording and in the other one."""
    return Finding(
        "the same episodes in the other dataset",
        "high",
        {
            "copies": len(pairs),
            "of": len(recording.actions),
            "other dataset": other.name,
            "their numbers there": list(pairs.values()),
        },
        "If one is for training and the other for evaluation, the evaluation says nothing about new episodes.",
        "Remove the copies from one of the two.",
        list(pairs),
    )
