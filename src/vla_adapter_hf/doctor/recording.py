"""What the checks look at: the numbers of all episodes, and a sample of frames."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from vla_adapter_hf.doctor.settings import CheckSettings


THUMBNAIL = 24  # pixels of a frame's smaller copy, in both directions
ReadImages = Callable[[int, int], list[np.ndarray]]


@dataclass
class Window:
    """Consecutive frames of one episode.

    Args:
        position: place of the episode in the recording.
        start: step of the first frame.
        thumbnails: float32 (frames, cameras, `THUMBNAIL`, `THUMBNAIL`, 3), 0 to 255.
        first: the first frame of each camera, as recorded.
    """

    position: int
    start: int
    thumbnails: np.ndarray
    first: list[np.ndarray]


@dataclass
class Recording:
    """Episodes as a dataset has them, before any robot's convention unless one was chosen.

    Args:
        name: the dataset's name.
        states, actions: per episode (steps, S) and (steps, A).
        texts: per episode its instructions, in the order in which they come.
        numbers: the dataset's own number of each episode.
        cameras: camera columns.
        fps: frames per second by the dataset, if it says so.
        state_names, action_names: of the dimensions, if the dataset has them.
        timestamps: per episode (steps,) in seconds, if the dataset has them.
        problems: what is wrong with episodes that cannot be read.
        consecutive: whether rows are consecutive control steps.
        frames_are_jpeg: whether frames are stored as JPEG.
        read_images: frames of all cameras by episode and step; None leaves frames out.
        splits: per episode the split that the dataset declares for it, such as "train"; None if it declares none.
    """

    name: str
    states: list[np.ndarray]
    actions: list[np.ndarray]
    texts: list[list[str]]
    numbers: list[int]
    cameras: tuple[str, ...] = ()
    fps: float | None = None
    state_names: tuple[str, ...] | None = None
    action_names: tuple[str, ...] | None = None
    timestamps: list[np.ndarray] | None = None
    problems: list[str] = field(default_factory=list)
    consecutive: bool = True
    frames_are_jpeg: bool = False
    read_images: ReadImages | None = None
    splits: list[str] | None = None

    def action_name(self, dim: int) -> str:
        """The name of an action dimension, or its number."""
        return self.action_names[dim] if self.action_names else f"action {dim}"

    def state_name(self, dim: int) -> str:
        """The name of a state dimension, or its number."""
        return self.state_names[dim] if self.state_names else f"state {dim}"

    def episodes(self, least: int = 1) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Position, states and actions of the episodes that have at least so many steps."""
        for position, (states, actions) in enumerate(zip(self.states, self.actions, strict=True)):
            if len(actions) >= least:
                yield position, states, actions

    @property
    def all_actions(self) -> np.ndarray:
        """The actions of all episodes, (steps, A)."""
        return np.concatenate(self.actions)

    @property
    def all_states(self) -> np.ndarray:
        """The states of all episodes, (steps, S)."""
        return np.concatenate(self.states)


@dataclass
class FrameSample:
    """Frames that were read.

    Args:
        first: by episode position, (cameras, `THUMBNAIL`, `THUMBNAIL`, 3) of its first frame.
        windows: runs of consecutive frames.
        sizes: by camera, (height, width) of each first frame that was read, with how often it comes.
        unreadable: what was wrong with frames that could not be read.
    """

    first: dict[int, np.ndarray] = field(default_factory=dict)
    windows: list[Window] = field(default_factory=list)
    sizes: dict[str, dict[tuple[int, int], int]] = field(default_factory=dict)
    unreadable: list[str] = field(default_factory=list)


def evenly(items: list[int], count: int) -> list[int]:
    """At most `count` of the items, evenly spread."""
    if len(items) <= count:
        return items
    return [items[place] for place in np.linspace(0, len(items) - 1, count).round().astype(int)]


def thumbnail(frame: np.ndarray) -> np.ndarray:
    """A frame -> float32 (`THUMBNAIL`, `THUMBNAIL`, 3), averaged over areas."""
    return np.asarray(Image.fromarray(frame).resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX), np.float32)


def sample_frames(recording: Recording, settings: CheckSettings) -> FrameSample:
    """Read first frames and runs of frames, evenly spread over the episodes. Only small copies are kept.

    A run lies in the middle of its episode, where the robot moves.
    """
    sample = FrameSample()
    if recording.read_images is None:
        return sample
    usable = [position for position, _, _ in recording.episodes()]
    with_window = evenly(usable, settings.windows * (4 if settings.full else 1))
    with_first = usable if settings.full else evenly(usable, settings.first_frames)
    for position in sorted({*with_window, *with_first}):
        try:
            _sample_episode(recording, sample, position, settings.window_frames if position in with_window else 0)
        except ValueError as error:
            sample.unreadable.append(f"episode {recording.numbers[position]}: {error}")
    return sample


def _sample_episode(recording: Recording, sample: FrameSample, position: int, count: int) -> None:
    frames = recording.read_images(position, 0)
    for camera, frame in zip(recording.cameras, frames, strict=True):
        counts = sample.sizes.setdefault(camera, {})
        counts[frame.shape[:2]] = counts.get(frame.shape[:2], 0) + 1
    sample.first[position] = np.stack([thumbnail(frame) for frame in frames])
    if count:
        steps = len(recording.actions[position])
        start = max(0, (steps - count) // 2)
        run = [recording.read_images(position, step) for step in range(start, min(steps, start + count))]
        thumbnails = np.stack([np.stack([thumbnail(frame) for frame in images]) for images in run])
        sample.windows.append(Window(position, start, thumbnails, frames))
