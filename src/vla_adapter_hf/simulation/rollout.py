"""A finished episode as a film or a contact sheet, with the chunk boundaries visible."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vla_adapter_hf.utils.extras import install_hint
from vla_adapter_hf.utils.files import atomic_path


_MARK = np.array([255, 140, 0], dtype=np.uint8)
_BARS = {True: np.array([40, 170, 70], dtype=np.uint8), False: np.array([200, 50, 50], dtype=np.uint8)}
_BORDER = 4
_BAR = 8
_CELL_WIDTH = 256  # of a contact sheet, pixels
_LABEL = 16
_COLUMNS = 5
_MARGIN = 6


def draw_rollout(
    frames: Sequence[tuple[int, np.ndarray]], queries: Sequence[int], steps: int, success: bool
) -> list[np.ndarray]:
    """Frames with an orange border where a chunk begins, above a progress bar with a mark for every query.

    Args:
        frames: (step, image) pairs, uint8 (height, width, 3).
        queries: steps at which the policy was queried.
        steps: the episode's length.
        success: green bar if true, red if not.

    Returns:
        Images of one size, (height + bar, width, 3), both even, as MP4 encoders require.

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


def draw_contact_sheet(
    frames: Sequence[tuple[int, np.ndarray]],
    queries: Sequence[int],
    steps: int,
    success: bool,
    instruction: str,
    most: int = 30,
) -> np.ndarray:
    """One picture of an episode: the instruction, how the episode ended, and its frames in rows.

    Frames where a new chunk begins have the orange border of the film, and an orange label.

    Args:
        frames, queries, steps, success: as for `draw_rollout`.
        instruction: text that the policy got.
        most: number of frames to show at most; they are evenly spread, from the first to the last.

    Returns:
        uint8 (height, width, 3).

    Raises:
        ValueError: no frames, or `most` under 2.
    """
    if most < 2:
        raise ValueError(f"most must be at least 2 frames, got {most}")
    if len(frames) > most:
        frames = [frames[index] for index in np.linspace(0, len(frames) - 1, most).round().astype(int)]
    cells = draw_rollout(frames, queries, steps, success)
    height = round(cells[0].shape[0] * _CELL_WIDTH / cells[0].shape[1])
    columns = min(_COLUMNS, len(cells))
    width = columns * (_CELL_WIDTH + _MARGIN) + _MARGIN
    # Letters of Pillow's default font are about half as wide as high.
    title = textwrap.wrap(f"“{instruction}”", max(20, width // 10))
    ending = f"{'solved' if success else 'not solved'} after {steps} steps"
    if queries:
        ending += f", {len(queries)} chunks"
    top = _MARGIN + 24 * (len(title) + 1)
    rows = -(-len(cells) // columns)
    sheet = Image.new("RGB", (width, top + rows * (height + _LABEL + _MARGIN)), "white")
    draw, large, small = ImageDraw.Draw(sheet), ImageFont.load_default(18), ImageFont.load_default(12)
    for number, line in enumerate(title):
        draw.text((_MARGIN, _MARGIN + 24 * number), line, "black", large)
    draw.text((_MARGIN, _MARGIN + 24 * len(title)), ending, tuple(int(part) for part in _BARS[success]), large)
    shown_before = -1
    for number, ((step, _), cell) in enumerate(zip(frames, cells, strict=True)):
        left = _MARGIN + number % columns * (_CELL_WIDTH + _MARGIN)
        upper = top + number // columns * (height + _LABEL + _MARGIN)
        begun = [query for query in queries if shown_before < query <= step]
        shown_before = step
        label = f"step {step}" + (f" · chunk {queries.index(begun[-1]) + 1}" if begun else "")
        draw.text((left, upper), label, tuple(int(part) for part in _MARK) if begun else "gray", small)
        sheet.paste(
            Image.fromarray(cell).resize((_CELL_WIDTH, height), Image.Resampling.LANCZOS), (left, upper + _LABEL)
        )
    return np.asarray(sheet)


def write_picture(path: str | Path, image: np.ndarray) -> Path:
    """Writes an image (height, width, 3) uint8 as PNG; the file appears whole."""
    with atomic_path(path) as temporary:
        Image.fromarray(image).save(temporary, "PNG", optimize=True)
    return Path(path)


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
    with atomic_path(path) as temporary:
        if path.suffix == ".gif":
            pictures = [Image.fromarray(image).quantize(128) for image in images]
            animation = {"append_images": pictures[1:], "duration": round(1000 / fps), "loop": 0}
            pictures[0].save(temporary, "GIF", save_all=True, optimize=False, **animation)
        else:
            _write_mp4(temporary, images, fps)
    return path


def _write_mp4(path: Path, images: Sequence[np.ndarray], fps: float) -> None:
    try:
        import av
    except ImportError as error:
        raise ImportError(f"writing MP4 needs PyAV: {install_hint('video')}; or choose .gif") from error
    height, width = images[0].shape[:2]
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=round(fps))
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = width, height, "yuv420p", 2_000_000
        for image in images:
            for packet in stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
