"""One episode, all episodes as arrays, and the record of what is wrong with some of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa


ON_BAD_EPISODE = ("error", "skip")
BAD_EPISODE_HINT = 'Repair the dataset or pass on_bad_episode="skip"'

# Decodes one camera frame: uint8 (height, width, 3).
FrameReader = Callable[[], np.ndarray]


@dataclass(frozen=True)
class BadEpisode:
    """Why an episode cannot be used. `frame_index` is None where the reason is not a frame's."""

    episode_index: int
    frame_index: int | None
    reason: str

    def __str__(self) -> str:
        frame = "" if self.frame_index is None else f", frame {self.frame_index}"
        # Arrow's reasons have line breaks.
        return f"episode {self.episode_index}{frame}: {' '.join(self.reason.split())}"


class BadEpisodeError(ValueError):
    """An episode that is empty, too short, has the wrong sizes or NaN, or whose frames cannot be read."""

    def __init__(self, source: str, bad: BadEpisode | Sequence[BadEpisode] = (), hint: str = "") -> None:
        self.bad_episodes = [bad] if isinstance(bad, BadEpisode) else list(bad)
        if not self.bad_episodes:
            # A DataLoader rebuilds a worker's error from its text alone.
            super().__init__(source)
            return
        more = f" (and {len(self.bad_episodes) - 1} more)" if len(self.bad_episodes) > 1 else ""
        super().__init__(f"{source}: {self.bad_episodes[0]}{more}.{' ' + hint if hint else ''}")


def is_damage(error: Exception) -> bool:
    """Whether an error met while reading says that the data are damaged or missing.

    Other errors come from the machine or the network: too many open files, a disk that fails, a Hub that does not
    answer. The same file may be readable a moment later, so no episode is given up for them.
    """
    if isinstance(error, OSError):
        # Arrow raises a plain OSError without a number for damage. Errors of the network are subclasses, and one of
        # them, for a file that is not in the Hub's cache, derives from FileNotFoundError.
        return type(error) is FileNotFoundError or (type(error) is OSError and error.errno is None)
    return isinstance(error, (ValueError, pa.ArrowException))


def check_on_bad_episode(value: str) -> None:
    """Raises ValueError unless `value` is "error" or "skip"."""
    if value not in ON_BAD_EPISODE:
        raise ValueError(f'on_bad_episode={value!r} is not known; use "error" or "skip"')


@dataclass
class Episode:
    """One episode.

    Attributes:
        index: the dataset's own number.
        states: (n, S). A reader yields float32 in physical units, after the robot's conventions.
        actions: (n, A), likewise.
        texts: an instruction per step, "" where there is none.
        frames: `frames(t)` gives a function per camera that decodes the frame of step t and holds no more than the
            frame's own bytes.
        chunks: (n, K, A), the chunk stored with each step; None if chunks are cut from the actions.
        control_steps: int64 (n,), the control step of each row, if stored with the chunks.
        unusable: why no sample can be made of it although its numbers are good. Statistics count such episodes.
        location: where its frames are, in the form its format's index needs.
    """

    index: int
    states: np.ndarray
    actions: np.ndarray
    texts: Sequence[str] = ()
    frames: Callable[[int], list[FrameReader]] | None = None
    chunks: np.ndarray | None = None
    control_steps: np.ndarray | None = None
    unusable: BadEpisode | None = None
    location: Any = None


def check_episode(episode: Episode, expected_length: int | None = None) -> BadEpisode | None:
    """What is wrong with the numbers of an episode, None if nothing is."""
    states, actions, chunks = episode.states, episode.actions, episode.chunks
    if len(states) != len(actions):
        return BadEpisode(episode.index, None, f"has {len(states)} states and {len(actions)} actions")
    if expected_length is not None and len(actions) != expected_length:
        reason = f"should have {expected_length} frames by the metadata, the data has {len(actions)}"
        return BadEpisode(episode.index, None, reason)
    if len(actions) == 0:
        return BadEpisode(episode.index, None, "is empty")
    for name, values in (("state", states), ("action", actions), ("action_chunk", chunks)):
        if values is not None and not np.isfinite(values).all():
            frame, *place = np.argwhere(~np.isfinite(values))[0].tolist()
            return BadEpisode(episode.index, frame, f"{name}{place} is {values[(frame, *place)]}")
    return None


def too_short(episode_index: int, length: int, rows: int, chunk_size: int) -> BadEpisode | None:
    """A BadEpisode if an episode of `length` rows has less than the `rows` that a sample needs."""
    if length >= rows:
        return None
    reason = f"the episode ends after {length} steps, a chunk needs {chunk_size}"
    reason += f" (give chunk_size={length} or less, or pad_chunks=True)"
    return BadEpisode(episode_index, length - 1, reason)


@dataclass
class EpisodeTable:
    """All episodes of a dataset, in its order. Episodes whose numbers cannot be used have no steps here.

    A million steps of a robot with 15 numbers per step are 60 MB, so they are kept in memory: windows and statistics
    come from here, and files are only opened again for camera frames.

    Attributes:
        states: float32 (steps, S), physical units.
        actions: float32 (steps, A), physical units, after the robot's gripper convention.
        text_ids: int32 (steps,) into `texts`.
        texts: the instructions.
        episode_indices: int64 (episodes,), the dataset's own numbers.
        starts: int64 (episodes + 1,): the steps of episode e are starts[e] ... starts[e + 1] - 1.
        problems: by position, the episodes whose numbers cannot be used.
        unusable: by position, the episodes with good numbers of which no sample can be made.
        chunks: float32 (steps, K, A), the chunk stored with each step, in the units of `actions`; None if chunks are
            cut from `actions`.
        control_steps: int64 (steps,), the control step of each row, if stored with the chunks; None if rows are
            consecutive.
    """

    states: np.ndarray
    actions: np.ndarray
    text_ids: np.ndarray
    texts: list[str]
    episode_indices: np.ndarray
    starts: np.ndarray
    problems: dict[int, BadEpisode] = field(default_factory=dict)
    unusable: dict[int, BadEpisode] = field(default_factory=dict)
    chunks: np.ndarray | None = None
    control_steps: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.episode_indices)

    @property
    def lengths(self) -> np.ndarray:
        """Steps of each episode, int64 (episodes,)."""
        return np.diff(self.starts)

    def steps(self, position: int) -> slice:
        """The rows of the arrays that hold the episode at `position`."""
        return slice(int(self.starts[position]), int(self.starts[position + 1]))

    @property
    def learnt_actions(self) -> np.ndarray:
        """The actions that are learnt from, which statistics cover: float32 (number, A); see `statistics`."""
        return self.actions if self.chunks is None else self.chunks.reshape(-1, self.chunks.shape[-1])


class EpisodeTableBuilder:
    """Collects episodes one by one into an `EpisodeTable`."""

    def __init__(self) -> None:
        self._arrays: dict[str, list[np.ndarray]] = {
            name: [] for name in ("states", "actions", "text_ids", "chunks", "control_steps")
        }
        self._ids_of_texts: dict[str, int] = {}
        self._indices: list[int] = []
        self._lengths: list[int] = []
        self._problems: dict[int, BadEpisode] = {}
        self._unusable: dict[int, BadEpisode] = {}

    def add(self, episode: Episode | BadEpisode) -> None:
        """Take one episode as a reader yields it."""
        position = len(self._indices)
        if isinstance(episode, BadEpisode):
            self._problems[position] = episode
            self._indices.append(episode.episode_index)
            self._lengths.append(0)
            return
        if episode.unusable is not None:
            self._unusable[position] = episode.unusable
        ids = [self._ids_of_texts.setdefault(text, len(self._ids_of_texts)) for text in episode.texts]
        self._arrays["text_ids"].append(np.array(ids, np.int32))
        for name in ("states", "actions", "chunks", "control_steps"):
            values = getattr(episode, name)
            if values is not None:
                self._arrays[name].append(values)
        self._indices.append(episode.index)
        self._lengths.append(len(episode.actions))

    def build(self) -> EpisodeTable:
        """The table of everything taken so far. The builder is empty afterwards."""
        good = len(self._arrays["actions"])

        def join(name: str, empty: np.ndarray) -> np.ndarray:
            parts = self._arrays.pop(name)
            return np.ascontiguousarray(np.concatenate(parts) if parts else empty)

        # Files may differ in whether they have control steps.
        has_steps = 0 < good == len(self._arrays["control_steps"])
        return EpisodeTable(
            states=join("states", np.zeros((0, 0), np.float32)),
            actions=join("actions", np.zeros((0, 0), np.float32)),
            text_ids=join("text_ids", np.zeros(0, np.int32)),
            texts=list(self._ids_of_texts),
            episode_indices=np.array(self._indices, np.int64),
            starts=np.concatenate([[0], np.cumsum(self._lengths, dtype=np.int64)]).astype(np.int64),
            problems=self._problems,
            unusable=self._unusable,
            chunks=join("chunks", np.zeros(0, np.float32)) if self._arrays["chunks"] else None,
            control_steps=join("control_steps", np.zeros(0, np.int64)) if has_steps else None,
        )
