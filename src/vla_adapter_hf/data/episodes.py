"""States, actions and instructions of all episodes as arrays, and the record of what is wrong with some of them.

A million steps of a robot with 15 numbers per step are 60 MB of float32: small enough to keep, so windows are cut and
statistics are computed from here, and files are only opened again for camera frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from vla_adapter_hf.robots import RobotPreset


ON_BAD_EPISODE = ("error", "skip")


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
            # So a DataLoader makes anew, from its text alone, what a worker has raised.
            super().__init__(source)
            return
        more = f" (and {len(self.bad_episodes) - 1} more)" if len(self.bad_episodes) > 1 else ""
        super().__init__(f"{source}: {self.bad_episodes[0]}{more}.{' ' + hint if hint else ''}")


def is_damage(error: Exception) -> bool:
    """Whether an error met while reading says that the data are damaged or missing.

    Other errors are the machine's or the network's (too many open files, a disk that fails, a Hub that does not
    answer): the same file may be read well a moment later, so no episode must be given up for them.
    """
    if isinstance(error, OSError):
        # Arrow raises a plain OSError without a number for damage. The network's errors are subclasses, often without
        # a number too; one of them, a file that is not in the Hub's cache, derives from FileNotFoundError.
        return type(error) is FileNotFoundError or (type(error) is OSError and error.errno is None)
    return isinstance(error, (ValueError, pa.ArrowException))


def check_on_bad_episode(value: str) -> None:
    """Raises ValueError unless `value` is "error" or "skip"."""
    if value not in ON_BAD_EPISODE:
        raise ValueError(f'on_bad_episode={value!r} is not known; use "error" or "skip"')


@dataclass
class EpisodeTable:
    """All episodes of a source, in its order. Episodes whose numbers cannot be used have no steps here.

    Attributes:
        states: float32 (steps, S), physical units.
        actions: float32 (steps, A), physical units, after the robot's gripper convention.
        text_ids: int32 (steps,) into `texts`.
        texts: the instructions.
        episode_indices: int64 (episodes,), the dataset's own numbers.
        starts: int64 (episodes + 1,): the steps of episode e are starts[e] ... starts[e + 1] - 1.
        problems: by position, the episodes whose numbers cannot be used.
        chunks: float32 (steps, K, A), the chunk stored with each step, in the units of `actions`; None where chunks are
            cut from `actions`.
        control_steps: int64 (steps,), the control step of each row where the dataset stores it beside its chunks; None
            where rows are consecutive.
    """

    states: np.ndarray
    actions: np.ndarray
    text_ids: np.ndarray
    texts: list[str]
    episode_indices: np.ndarray
    starts: np.ndarray
    problems: dict[int, BadEpisode] = field(default_factory=dict)
    chunks: np.ndarray | None = None
    control_steps: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.episode_indices)

    @property
    def lengths(self) -> np.ndarray:
        """Steps of each episode, int64 (episodes,)."""
        return np.diff(self.starts)

    def steps(self, position: int) -> slice:
        """Where the episode at `position` lies in the arrays."""
        return slice(int(self.starts[position]), int(self.starts[position + 1]))

    @property
    def learnt_actions(self) -> np.ndarray:
        """The actions that are learnt from, which statistics cover: float32 (number, A); see `statistics`."""
        return self.actions if self.chunks is None else self.chunks.reshape(-1, self.chunks.shape[-1])


class TextTable:
    """Instructions, each stored once."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self._ids: dict[str, int] = {}

    def id_of(self, text: str) -> int:
        known = self._ids.get(text)
        if known is None:
            known = self._ids[text] = len(self.texts)
            self.texts.append(text)
        return known


def check_episode(
    episode_index: int,
    states: np.ndarray,
    actions: np.ndarray,
    expected_length: int | None = None,
    chunks: np.ndarray | None = None,
) -> BadEpisode | None:
    """What is wrong with the numbers of one episode: states (n, S), actions (n, A), chunks (n, K, A) as float arrays."""
    if len(states) != len(actions):
        return BadEpisode(episode_index, None, f"has {len(states)} states and {len(actions)} actions")
    if expected_length is not None and len(actions) != expected_length:
        return BadEpisode(
            episode_index, None, f"should have {expected_length} frames by the metadata, the data has {len(actions)}"
        )
    if len(actions) == 0:
        return BadEpisode(episode_index, None, "is empty")
    for name, values in (("state", states), ("action", actions)):
        finite = np.isfinite(values)
        if not finite.all():
            frame, dimension = np.argwhere(~finite)[0].tolist()
            return BadEpisode(episode_index, frame, f"{name}[{dimension}] is {values[frame, dimension]}")
    if chunks is not None and not np.isfinite(chunks).all():
        frame, step, dimension = np.argwhere(~np.isfinite(chunks))[0].tolist()
        value = chunks[frame, step, dimension]
        return BadEpisode(episode_index, frame, f"action_chunk[{step}, {dimension}] is {value}")
    return None


class EpisodeTableBuilder:
    """Collects episodes one by one: checks them, converts them to float32 and applies the robot's conventions."""

    def __init__(self, where: str, robot: RobotPreset | None = None) -> None:
        self.where = where
        self.robot = robot
        self.texts = TextTable()
        self._states: list[np.ndarray] = []
        self._actions: list[np.ndarray] = []
        self._chunks: list[np.ndarray] = []
        self._control_steps: list[np.ndarray] = []
        self._text_ids: list[np.ndarray] = []
        self._indices: list[int] = []
        self._lengths: list[int] = []
        self._problems: dict[int, BadEpisode] = {}

    def add_bad(self, bad: BadEpisode) -> None:
        """Take note of an episode that cannot be used."""
        self._problems[len(self._indices)] = bad
        self._indices.append(bad.episode_index)
        self._lengths.append(0)

    def add(
        self,
        episode_index: int,
        states: np.ndarray,
        actions: np.ndarray,
        text_ids: np.ndarray | int,
        expected_length: int | None = None,
        chunks: np.ndarray | None = None,
        control_steps: np.ndarray | None = None,
    ) -> int:
        """Take one episode: states (n, S) and actions (n, A) as recorded, text ids (n,) or one for all its frames.

        Stored chunks (n, K, A), as recorded, and control steps (n,) come with every episode of a dataset or with none.

        Returns:
            How many of its steps are in the table: all, none of a bad episode, fewer if the robot drops the last.

        Raises:
            ValueError: the sizes of the first episode are not the robot's. (Of a later one, that is a bad episode.)
        """
        states = np.asarray(states, np.float32)
        actions = np.asarray(actions, np.float32)
        bad = check_episode(episode_index, states, actions, expected_length, chunks)
        if bad is None and self.robot is not None:
            try:
                states, actions = self.robot.episode_to_training(states, actions)
                chunks = None if chunks is None else self.robot.to_training(chunks)
            except ValueError as error:
                if not self._states:  # then it is not this episode, but the choice of columns or robot
                    raise ValueError(f"{self.where}: {error}") from error
                bad = BadEpisode(episode_index, 0, str(error))
        elif bad is None and self._states:
            for name, values, first in (("state", states, self._states[0]), ("action", actions, self._actions[0])):
                if values.shape[1] != first.shape[1]:
                    reason = f"{name} has {values.shape[1]} values, those of the first episode {first.shape[1]}"
                    bad = BadEpisode(episode_index, 0, reason)
        if bad is not None:
            self.add_bad(bad)
            return 0
        length = len(actions)
        ids = np.full(length, text_ids, np.int32) if np.ndim(text_ids) == 0 else np.asarray(text_ids, np.int32)
        self._states.append(states)
        self._actions.append(actions)
        if chunks is not None:
            self._chunks.append(chunks)
        if control_steps is not None:
            self._control_steps.append(np.asarray(control_steps, np.int64)[:length])
        self._text_ids.append(ids[:length])
        self._indices.append(episode_index)
        self._lengths.append(length)
        return length

    def build(self) -> EpisodeTable:
        """The table of everything taken so far. The builder is empty afterwards."""

        def join(parts: list[np.ndarray], empty: np.ndarray) -> np.ndarray:
            joined = np.concatenate(parts) if parts else empty
            parts.clear()
            return np.ascontiguousarray(joined)

        # Files may differ in whether they have them.
        has_control_steps = bool(self._lengths) and len(self._control_steps) == len(self._lengths)
        return EpisodeTable(
            states=join(self._states, np.zeros((0, 0), np.float32)),
            actions=join(self._actions, np.zeros((0, 0), np.float32)),
            text_ids=join(self._text_ids, np.zeros(0, np.int32)),
            texts=self.texts.texts,
            episode_indices=np.array(self._indices, np.int64),
            starts=np.concatenate([[0], np.cumsum(self._lengths, dtype=np.int64)]).astype(np.int64),
            problems=dict(self._problems),
            chunks=join(self._chunks, np.zeros(0, np.float32)) if self._chunks else None,
            control_steps=join(self._control_steps, np.zeros(0, np.int64)) if has_control_steps else None,
        )
