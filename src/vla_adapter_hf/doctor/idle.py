"""Idle steps: how many there are, which of them can be left out, and what a dataset without them would be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from vla_adapter_hf.doctor.findings import Finding
from vla_adapter_hf.doctor.recording import Recording
from vla_adapter_hf.doctor.semantics import Semantics
from vla_adapter_hf.doctor.settings import CheckSettings
from vla_adapter_hf.doctor.timing import motion, state_spread


GRIPPER_SECONDS = 0.5  # for which an arm may have to wait until its fingers have closed
GRIPPER_STEPS = 5  # the same where the frame rate is not known
NO_COMMAND = 0.1  # of a large delta or velocity, below which the arm is not to move


@dataclass
class IdleSteps:
    """Idle steps of the episodes with two steps or more, bool (steps,) by episode.

    Args:
        idle: neither the state moves nor a gripper's command changes; the last step of an episode is not counted.
        at_gripper: idle steps right after a gripper's command, in which the arm may wait for its fingers.
        commanded: the other idle steps with a command to move: the arm moves some steps later or, if actions are
            deltas or velocities, pushes against something.
    """

    idle: list[np.ndarray]
    at_gripper: list[np.ndarray]
    commanded: list[np.ndarray]

    @property
    def share(self) -> float:
        """The share of idle steps."""
        return float(np.concatenate(self.idle).mean()) if self.idle else 0.0

    @property
    def removable(self) -> list[np.ndarray]:
        """Idle steps that can be left out: no gripper moves, and the arm is not to move."""
        parts = zip(self.idle, self.at_gripper, self.commanded, strict=True)
        return [idle & ~at_gripper & ~commanded for idle, at_gripper, commanded in parts]


def find_idle(recording: Recording, semantics: Semantics, grippers: list[int], fps: float | None) -> IdleSteps:
    """Find the idle steps.

    Args:
        semantics: says how many steps the motion follows its command.
        grippers: action dimensions of grippers.
        fps: control steps per second, if known.
    """
    spread = state_spread(recording)
    found = IdleSteps([], [], [])
    moved = [motion(states, spread) for _, states, _ in recording.episodes(2)]
    if not moved:
        return found
    floor = 0.02 * np.quantile(np.concatenate(moved), 0.9)
    sizes = _action_sizes(recording, semantics, grippers)
    large = float(np.quantile(np.concatenate(sizes), 0.9)) if semantics.kind in ("delta", "velocity") else np.inf
    wait = GRIPPER_STEPS if fps is None else max(1, round(GRIPPER_SECONDS * fps))
    # At lag k an absolute action is the state of k steps later: the motion that ends there.
    delay = max(0, (semantics.lag or 0) - (semantics.kind == "absolute"))
    for (_, _, actions), moves, size in zip(recording.episodes(2), moved, sizes, strict=True):
        still = moves <= floor
        commands = actions[:-1, grippers]
        gripping = np.abs(np.diff(commands, axis=0, prepend=commands[:1])).sum(1) > 1e-6
        idle = still & ~gripping
        waiting = np.convolve(gripping, np.ones(wait + 1), "full")[: len(idle)] > 0.5
        commanded = size[:-1] > NO_COMMAND * large
        for later in range(1, delay + 1):
            commanded[:-later] |= ~still[later:]
        parts = (idle, idle & waiting, idle & commanded & ~waiting)
        for total, part in zip((found.idle, found.at_gripper, found.commanded), parts, strict=True):
            total.append(np.append(part, False))
    return found


def without_idle(
    recording: Recording, semantics: Semantics, steps: IdleSteps, grippers: list[int], settings: CheckSettings
) -> dict[str, Any]:
    """What leaving out the removable idle steps would do, plain values by name; empty if there are none."""
    removable = steps.removable
    if not any(part.any() for part in removable):
        return {}
    fps = settings.fps or recording.fps
    chunk = settings.chunk_for(fps)
    kept = [~part for part in removable]
    before, after = np.array([len(part) for part in kept]), np.array([part.sum() for part in kept])
    sizes = _action_sizes(recording, semantics, grippers)
    large = max(float(np.quantile(np.concatenate(sizes), 0.99)), 1e-12)
    left = np.concatenate([size[part] for size, part in zip(sizes, kept, strict=True)])
    longer = before.sum() / max(1, after.sum())
    covers = f"{chunk} steps of the recording, then {chunk * longer:.1f} on average"
    if fps:
        covers += f" ({chunk / fps:.2f} s, then {chunk * longer / fps:.2f} s)"
    return {
        "idle steps": int(sum(part.sum() for part in steps.idle)),
        "can be left out": int(sum(part.sum() for part in removable)),
        "must stay, a gripper moves": int(sum(part.sum() for part in steps.at_gripper)),
        "must stay, the arm is to move": int(sum(part.sum() for part in steps.commanded)),
        "median steps of an episode": f"{np.median(before):.0f}, then {np.median(after):.0f}",
        "median action, of a large one": f"{np.median(np.concatenate(sizes)) / large:.2f}, then "
        f"{np.median(left) / large:.2f}",
        f"a chunk of {chunk} covers": covers,
    }


def _action_sizes(recording: Recording, semantics: Semantics, grippers: list[int]) -> list[np.ndarray]:
    """By episode how large each action is, (steps,): of absolute targets the change to the next one; no grippers."""
    actions = recording.all_actions
    dims = [dim for dim in range(actions.shape[1]) if dim not in grippers]
    spread = actions[:, dims].std(0)
    spread = np.where(spread > 1e-9, spread, np.inf)
    sizes = []
    for _, _, values in recording.episodes(2):
        scaled = values[:, dims] / spread
        if semantics.kind == "absolute":
            scaled = np.diff(scaled, axis=0, append=scaled[-1:])
        sizes.append(np.linalg.norm(scaled, axis=1))
    return sizes


def check_idle(share: float, effect: dict[str, Any]) -> list[Finding]:
    """A finding if the arm stands still for much of the time.

    Args:
        share: of idle steps.
        effect: what `without_idle` says.
    """
    if share < 0.15:
        return []
    return [
        Finding(
            "many idle steps",
            "medium",
            {"share of steps": share, **effect},
            "A policy that sees the arm stand still so often learns to stand still, and may never start.",
            "Cut the waiting at the start and end of episodes, or leave out steps without motion, as LIBERO's "
            "no_noops do. Keep those in which a gripper moves, or the policy moves on before its fingers have closed.",
        )
    ]
