"""Sizes of frames, and borders that show nothing."""

from __future__ import annotations

import numpy as np

from vla_adapter_hf.doctor.findings import Finding
from vla_adapter_hf.doctor.recording import FrameSample, Recording


SAME_LEVEL = 12  # of 255: pixels of an empty border differ by less, also after a lossy video
LEAST_WINDOWS = 4
LEAST_AREA = 0.05  # of a frame, below which a border does not matter
SIDES = ("top", "bottom", "left", "right")


def describe_shapes(sample: FrameSample) -> dict[str, str]:
    """By camera its sizes, and what becomes of them in the square that the model sees."""
    described = {}
    for camera, counts in sample.sizes.items():
        ratios = {width / height for height, width in counts}
        seen = ""
        if len(ratios) == 1 and (ratio := ratios.pop()) != 1:
            seen = f", squeezed to a square: {max(ratio, 1 / ratio):.2f} times as {'narrow' if ratio > 1 else 'flat'}"
        described[camera] = ", ".join(f"{width} x {height}" for height, width in counts) + seen
    return described


def empty_borders(recording: Recording, sample: FrameSample) -> dict[str, dict[str, int]]:
    """By camera, how many lines of pixels at which side have one colour that is the same in all frames."""
    found = {}
    for camera, name in enumerate(recording.cameras):
        frames = [window.first[camera] for window in sample.windows]
        if len(frames) < LEAST_WINDOWS or len({frame.shape for frame in frames}) > 1:
            continue
        low, high = np.minimum.reduce(frames).astype(int), np.maximum.reduce(frames).astype(int)
        thumbnails = np.concatenate([window.thumbnails[:, camera] for window in sample.windows])
        changes = np.ptp(thumbnails, axis=0).max(-1) > SAME_LEVEL  # (THUMBNAIL, THUMBNAIL)
        counts = {}
        for axis, (first, last) in enumerate((SIDES[:2], SIDES[2:])):
            flat = ((high.max(1 - axis) - low.min(1 - axis)) < SAME_LEVEL).all(-1)
            moving = changes.any(1 - axis)
            counts |= {first: _border(flat, moving), last: _border(flat[::-1], moving[::-1])}
        height, width = frames[0].shape[:2]
        rows, columns = height - counts["top"] - counts["bottom"], width - counts["left"] - counts["right"]
        # A frame of one colour is no border, and a finding of its own.
        if rows > 0 and columns > 0 and rows * columns <= (1 - LEAST_AREA) * height * width:
            found[name] = {side: count for side, count in counts.items() if count}
    return found


def _border(flat: np.ndarray, moving: np.ndarray) -> int:
    """How many of the first lines are empty.

    Args:
        flat: bool (pixels,), lines of one colour that is the same in the first frames.
        moving: bool (`THUMBNAIL`,), lines of the smaller copies that change over time.
    """
    count = len(flat) if flat.all() else int((~flat).argmax())
    inside = moving[: count * len(moving) // len(flat)]
    return int(inside.argmax() * len(flat) // len(moving)) if inside.any() else count


def check_shapes(sample: FrameSample, borders: dict[str, dict[str, int]]) -> list[Finding]:
    """Findings about sizes and borders.

    Args:
        borders: as of `empty_borders`.
    """
    findings = []
    mixed = {camera: counts for camera, counts in sample.sizes.items() if len(counts) > 1}
    if mixed:
        findings.append(
            Finding(
                "frames of several sizes",
                "medium",
                {camera: {f"{w} x {h}": n for (h, w), n in counts.items()} for camera, counts in mixed.items()},
                "Frames are squeezed to one square, so the same scene has several shapes.",
                "Record with one size, or crop all frames to one shape.",
            )
        )
    wide = {
        camera: f"{w} x {h}"
        for camera, counts in sample.sizes.items()
        for (h, w) in list(counts)[:1]
        if max(h, w) > 1.6 * min(h, w)
    }
    if wide:
        findings.append(
            Finding(
                "frames are far from square",
                "low",
                wide,
                "The model squeezes frames to a square: objects get narrower, and the robot must squeeze them alike.",
                "Crop to the part that matters when you record. train has no option for it.",
            )
        )
    if borders:
        findings.append(
            Finding(
                "frames have empty borders",
                "low",
                {camera: {f"pixels at the {side}": count for side, count in sides.items()} for camera, sides in
                 borders.items()},
                "The border takes room in the square that the model sees, and everything else gets smaller.",
                "Cut it off in the recording and, in the same way, on the robot. train has no option for it.",
            )
        )  # fmt: skip
    return findings
