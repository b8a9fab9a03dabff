"""A finished episode as a GIF or an MP4, with the chunk boundaries visible."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image


_MARK = np.array([255, 140, 0], dtype=np.uint8)
_BARS = {True: np.array([40, 170, 70], dtype=np.uint8), False: np.array([200, 50, 50], dtype=np.uint8)}
_BORDER = 4
_BAR = 8


def draw_rollout(
    frames: Sequence[tuple[int, np.ndarray]], queries: Sequence[int], steps: int, success: bool
) -> list[np.ndarray]:
    """Frames with an orange border where a new chunk begins, and a bar of progress with a notch per query below.

    Args:
        frames: (step, image) pairs, uint8 (height, width, 3).
        queries: steps at which the policy was asked.
        steps: the episode's length.
        success: green bar if true, red if not.

    Returns:
        Images of one size, (height + bar, width, 3), both even (MP4 encoders want that).

    Raises:
        ValueError: no frames.
    """
    if not frames:
        raise ValueError("frames is empty: run the episode with rollouts switched on")
    drawn = []
    shown_before = -1
    for step, image in frames:
        picture = image.copy()
        # A query between two kept frames is shown on the later one.
        if any(shown_before < query <= step for query in queries):
            picture[:_BORDER] = picture[-_BORDER:] = _MARK
            picture[:, :_BORDER] = picture[:, -_BORDER:] = _MARK
        shown_before = step
        width = picture.shape[1]
        bar = np.full((_BAR, width, 3), 60, dtype=np.uint8)
        bar[:, : max(1, round(width * step / max(1, steps)))] = _BARS[success]
        for query in queries:
            column = min(width - 1, round(width * query / max(1, steps)))
            bar[:, column] = _MARK
        picture = np.concatenate([picture, bar])
        drawn.append(picture[: picture.shape[0] // 2 * 2, : width // 2 * 2])
    return drawn


def write_rollout(path: str | Path, images: Sequence[np.ndarray], fps: float = 10.0) -> Path:
    """Writes images as `.gif` or `.mp4` (needs the extra `video`); the file appears whole.

    Raises:
        ValueError: another file ending, no images, or images of different sizes.
    """
    path = Path(path)
    if path.suffix not in (".gif", ".mp4"):
        raise ValueError(f"path must end in .gif or .mp4, got {path.name!r}")
    if not len(images) or len({image.shape for image in images}) != 1:
        raise ValueError(f"images must be one or more frames of one size, got {[image.shape for image in images][:3]}")
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{os.getpid()}-{path.name}")
    if path.suffix == ".gif":
        pictures = [Image.fromarray(image).quantize(128) for image in images]
        pictures[0].save(
            beside,
            "GIF",
            save_all=True,
            append_images=pictures[1:],
            duration=round(1000 / fps),
            loop=0,
            optimize=False,
        )
    else:
        _write_mp4(beside, images, fps)
    beside.replace(path)
    return path


def _write_mp4(path: Path, images: Sequence[np.ndarray], fps: float) -> None:
    try:
        import av
    except ImportError as error:
        raise ImportError("writing MP4 needs PyAV: pip install 'vla-adapter-hf[video]', or choose .gif") from error
    height, width = images[0].shape[:2]
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=round(fps))
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = width, height, "yuv420p", 2_000_000
        for image in images:
            for packet in stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
