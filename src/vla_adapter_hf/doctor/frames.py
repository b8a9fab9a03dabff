"""Camera frames: dark, bright, frozen, swapped, turned, in another channel order, once JPEG."""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations

import numpy as np

from vla_adapter_hf.doctor.findings import Finding
from vla_adapter_hf.doctor.recording import FrameSample, Recording
from vla_adapter_hf.doctor.timing import frame_changes, motion, state_spread


SAME_PICTURE = 4.0  # levels by which a thumbnail changes although nothing was moved

# What may have been done to a frame (..., height, width, 3) in some episodes.
CHANGES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "upside down": lambda frame: frame[..., ::-1, ::-1, :],
    "flipped vertically": lambda frame: frame[..., ::-1, :, :],
    "mirrored": lambda frame: frame[..., :, ::-1, :],
    "in BGR order": lambda frame: frame[..., ::-1],
}


def check_frames(recording: Recording, sample: FrameSample) -> list[Finding]:
    """Findings about the camera frames."""
    findings = []
    if sample.unreadable:
        findings.append(
            Finding(
                "frames that cannot be read",
                "high",
                {"episodes": len(sample.unreadable), "first": sample.unreadable[0]},
                "Training stops there.",
                "Record or fetch these episodes again, or train with --on_bad_episode skip.",
            )
        )
    if not sample.first:
        return findings
    positions = sorted(sample.first)
    first = np.stack([sample.first[position] for position in positions])  # (episodes, cameras, height, width, 3)
    numbers = [recording.numbers[position] for position in positions]
    for camera, name in enumerate(recording.cameras):
        findings += _exposure(name, first[:, camera], numbers)
        findings += _frozen(recording, sample, camera, name)
    findings += _same_places(recording, first)
    findings += _turned(recording, first, numbers)
    findings += _compressed(recording, sample)
    return findings


def _exposure(camera: str, first: np.ndarray, numbers: list[int]) -> list[Finding]:
    mean, spread = first.mean(axis=(1, 2, 3)), first.std(axis=(1, 2)).max(-1)
    black = (mean < 10) & (spread < 8)
    bright = ((first > 248).all(-1)).mean(axis=(1, 2)) > 0.5
    flat = ~black & ~bright & (spread < 2)
    findings = []
    for name, bad in (("black frames", black), ("over-exposed frames", bright), ("frames without content", flat)):
        if bad.any():
            findings.append(
                Finding(
                    name,
                    "high",
                    {"camera": camera, "episodes": int(bad.sum()), "of": len(bad), "mean level": mean[bad].mean()},
                    "The policy sees nothing there, and learns not to look.",
                    "Leave these episodes out, or leave out the camera.",
                    [number for number, wrong in zip(numbers, bad, strict=True) if wrong],
                )
            )
    return findings


def _frozen(recording: Recording, sample: FrameSample, camera: int, name: str) -> list[Finding]:
    """Frames that stay the same while the arm moves: all of an episode, or now and then."""
    spread = state_spread(recording)
    changes = frame_changes(sample, camera)
    if not changes or not sum(len(change) for change in changes):
        return []
    moves = [
        motion(recording.states[window.position], spread)[window.start : window.start + len(change)]
        for window, change in zip(sample.windows, changes, strict=True)
    ]
    everything = np.concatenate(moves)
    moving = [move > 0.5 * np.median(everything) if everything.any() else move > 0 for move in moves]
    moving = [place & (move > 1e-9) for place, move in zip(moving, moves, strict=True)]
    still = [change < 1e-6 for change in changes]
    shares = np.array(
        [stop[move].mean() if move.sum() >= 3 else np.nan for stop, move in zip(still, moving, strict=True)]
    )
    # A black picture stays the same too, and is a finding of its own.
    flat = np.array([window.thumbnails[:, camera].std(axis=(1, 2)).max() < 8 for window in sample.windows])
    known = np.isfinite(shares) & ~flat
    frozen = known & (shares > 0.95)
    findings = []
    if frozen.any():
        findings.append(
            Finding(
                "a frozen camera",
                "high",
                {"camera": name, "episodes": int(frozen.sum()), "of those looked at": int(known.sum())},
                "The picture does not change while the arm moves: the policy learns not to look.",
                "Leave these episodes out.",
                [
                    recording.numbers[window.position]
                    for window, bad in zip(sample.windows, frozen, strict=True)
                    if bad
                ],
            )
        )
    rest = known & ~frozen
    if rest.any() and shares[rest].mean() > 0.05:
        findings.append(
            Finding(
                "repeated frames",
                "medium" if shares[rest].mean() < 0.7 else "high",
                {"camera": name, "share of moving steps": shares[rest].mean()},
                "The camera is slower than the control loop: the policy often sees a moment that has passed.",
                "Record at the camera's rate, or lower the control rate.",
            )
        )
    return findings


def _same_places(recording: Recording, first: np.ndarray) -> list[Finding]:
    """First frames (episodes, cameras, height, width, 3) that are the same in all episodes."""
    if len(first) < 8:
        return []
    change = first.std(0).mean(-1).max((1, 2))  # by camera, where it is largest
    if change.max() > SAME_PICTURE:
        return []
    return [
        Finding(
            "objects are in the same places in all episodes",
            "low",
            {"largest change of a first frame": dict(zip(recording.cameras, change, strict=True)), "of": 255},
            "A policy can do this without looking, and fails as soon as an object is moved.",
            "Move the objects between episodes.",
        )
    ]


def _distance(first: np.ndarray, usual: np.ndarray) -> np.ndarray:
    return np.abs(first - usual).mean(axis=(-3, -2, -1))


def _turned(recording: Recording, first: np.ndarray, numbers: list[int]) -> list[Finding]:
    """Episodes whose first frames look like those of the others only after a change: turned, or cameras swapped."""
    if len(first) < 4:
        return []
    usual = np.median(first, axis=0)  # (cameras, height, width, 3)
    findings = []
    own = _distance(first, usual)  # (episodes, cameras)
    # A dataset of many places has no usual picture.
    floor = np.quantile(own, 0.25, axis=0)
    swapped = np.zeros(len(first), bool)
    if first.shape[1] > 1:
        others = [order for order in permutations(range(first.shape[1])) if list(order) != sorted(order)]
        best = np.min([_distance(first[:, list(order)], usual).mean(1) for order in others], axis=0)
        swapped = best < 0.6 * own.mean(1)
    if swapped.any():
        findings.append(
            Finding(
                "cameras are swapped in some episodes",
                "high",
                {"episodes": int(swapped.sum()), "of": len(first), "difference as it is": own[swapped].mean(),
                 "after swapping": best[swapped].mean()},
                "The policy cannot rely on which camera it looks through.",
                "Swap the cameras of these episodes back.",
                [number for number, bad in zip(numbers, swapped, strict=True) if bad],
                _over_usual(first[np.flatnonzero(swapped)[0]], usual),
            )
        )  # fmt: skip
    for camera, name in enumerate(recording.cameras):
        after = {change: _distance(turn(first[:, camera]), usual[camera]) for change, turn in CHANGES.items()}
        cause = np.array(list(after))[np.argmin(list(after.values()), axis=0)]
        best = np.min(list(after.values()), axis=0)
        bad = ~swapped & (best < 0.6 * own[:, camera]) & (own[:, camera] > 1.5 * floor[camera])
        for change in CHANGES:
            those = bad & (cause == change)
            if those.any():
                findings.append(
                    Finding(
                        f"frames are {change} in some episodes",
                        "high",
                        {"camera": name, "episodes": int(those.sum()), "of": len(first),
                         "difference as it is": own[those, camera].mean(), "after the change": best[those].mean()},
                        "The same scene looks different, and on the robot only one of the two comes.",
                        "Change the frames of these episodes back.",
                        [number for number, wrong in zip(numbers, those, strict=True) if wrong],
                        _over_usual(first[np.flatnonzero(those)[0], camera][None], usual[camera][None]),
                    )
                )  # fmt: skip
    return findings


def _over_usual(frames: np.ndarray, usual: np.ndarray) -> np.ndarray:
    """The frames of an odd episode over the usual ones, four times as large."""
    rows = [np.concatenate(list(part), axis=1) for part in (frames, usual)]
    picture = np.concatenate(rows, axis=0).clip(0, 255).astype(np.uint8)
    return picture.repeat(4, axis=0).repeat(4, axis=1)


def blockiness(frame: np.ndarray) -> float:
    """How much stronger edges are at every eighth pixel than elsewhere, 1 for none: a sign of an earlier JPEG."""
    grey = frame.astype(np.float32).mean(-1)
    ratios = []
    for axis in (0, 1):
        steps = np.abs(np.diff(grey, axis=axis))
        # An edge of the block against those next to it, so that smooth and busy parts count alike.
        steps = steps.mean(axis=1 - axis)
        phases = [float(np.median(steps[phase::8])) for phase in range(8)]
        ratios.append((phases[7] + 0.1) / (np.median(phases[:7]) + 0.1))
    return float(np.mean(ratios))


def blockiness_by_camera(recording: Recording, sample: FrameSample) -> dict[str, float]:
    """The median of `blockiness` over the frames that were kept whole."""
    return {
        camera: float(np.median([blockiness(window.first[place]) for window in sample.windows]))
        for place, camera in enumerate(recording.cameras)
        if sample.windows
    }


def _compressed(recording: Recording, sample: FrameSample) -> list[Finding]:
    blocky = {camera: value for camera, value in blockiness_by_camera(recording, sample).items() if value > 1.35}
    if not blocky or recording.frames_are_jpeg:
        return []
    return [
        Finding(
            "frames were JPEG before they were stored",
            "low",
            {"edges at every eighth pixel": blocky},
            "The model trains on JPEG's blocks, but its processor is set for frames without them.",
            "Train with --jpeg_round_trip yes, so that the robot's frames go through JPEG too.",
        )
    ]
