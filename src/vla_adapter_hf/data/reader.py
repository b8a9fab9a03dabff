"""What every format has to offer: its episodes, one after the other."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from tqdm.auto import tqdm

from vla_adapter_hf.data.columns import Columns
from vla_adapter_hf.data.episodes import BadEpisode, Episode, EpisodeTable, EpisodeTableBuilder, check_episode


class DemonstrationReader(ABC):
    """Recorded episodes in one format, read from front to back. `source` adds random access to it.

    Attributes:
        name: the dataset's name, the default statistics key.
        where: the dataset as messages call it.
        columns: the columns it reads, all filled in.
        num_shards: files, or other parts, that workers can share out.
        num_episodes: how many episodes there are, if known before reading; for progress bars.
        is_local: whether the files are here, so that random access is possible.
        chunk_shape: (K, A) of the stored chunks, None if chunks are cut from consecutive steps.
        fps: control steps or frames per second, if the dataset says so.
        state_names, action_names: what each dimension is, such as joint names, if the dataset says so.
    """

    name: str
    where: str
    columns: Columns
    num_shards: int
    num_episodes: int | None = None
    is_local: bool = True
    chunk_shape: tuple[int, int] | None = None
    fps: float | None = None
    state_names: tuple[str, ...] | None = None
    action_names: tuple[str, ...] | None = None
    _sizes: tuple[int, int] | None = None  # of state and action, after the first good episode

    @abstractmethod
    def episodes(
        self, shard: int, keep: Callable[[int], bool] | None = None, load_frames: bool = True
    ) -> Iterator[Episode | BadEpisode]:
        """The episodes of one shard in order.

        Args:
            shard: which.
            keep: called with an episode's number; the episode is passed over if it returns False.
            load_frames: False if only the numbers are wanted; `Episode.frames` is then not to be called.
        """

    def shards_of_split(self, split: str) -> list[int]:
        """Shards of a split that the dataset itself declares.

        Raises:
            ValueError: it declares no split of that name.
        """
        raise ValueError(f"{self.where}: split={split!r} does not exist; this dataset declares no splits")

    def converted(self, episode: Episode, expected_length: int | None = None) -> Episode | BadEpisode:
        """An episode as recorded -> float32 after the robot's conventions, or what is wrong with it.

        Raises:
            ValueError: the sizes of the first episode are not the robot's: the wrong column or robot was chosen. In a
                later episode that is a BadEpisode.
        """
        episode.states = np.asarray(episode.states, np.float32)
        episode.actions = np.asarray(episode.actions, np.float32)
        bad = check_episode(episode, expected_length)
        if bad is not None:
            return bad
        robot = self.columns.robot
        if robot is not None:
            try:
                episode.states, episode.actions = robot.episode_to_training(episode.states, episode.actions)
                if episode.chunks is not None:
                    episode.chunks = robot.to_training(episode.chunks)
            except ValueError as error:
                if self._sizes is None:
                    raise ValueError(f"{self.where}: {error}") from error
                return BadEpisode(episode.index, 0, str(error))
        sizes = (episode.states.shape[1], episode.actions.shape[1])
        self._sizes = self._sizes or sizes
        for name, size, first in zip(("state", "action"), sizes, self._sizes, strict=True):
            if size != first:
                reason = f"{name} has {size} values, those of the first episode {first}"
                return BadEpisode(episode.index, 0, reason)
        # A robot may drop the last step.
        episode.texts = episode.texts[: len(episode.actions)]
        if episode.control_steps is not None:
            episode.control_steps = episode.control_steps[: len(episode.actions)]
        if episode.unusable is None:
            frame = next((frame for frame, text in enumerate(episode.texts) if not text.strip()), None)
            if frame is not None:
                episode.unusable = BadEpisode(episode.index, frame, "has no instruction")
        return episode

    def texts(self, recorded: Sequence[str]) -> list[str]:
        """The instruction of each step: the recorded ones, or the one given for all episodes."""
        return list(recorded) if self.columns.text is None else [self.columns.text] * len(recorded)


def index_episodes(
    reader: DemonstrationReader,
    progress: bool | None = None,
    take: Callable[[int, Episode | BadEpisode], None] | None = None,
) -> EpisodeTable:
    """Read the numbers of all episodes.

    Args:
        reader: the dataset.
        progress: show a progress bar; by default where standard error is a terminal.
        take: called with the shard and each of its episodes, in order.
    """
    builder = EpisodeTableBuilder()
    disable = None if progress is None else not progress
    with tqdm(total=reader.num_episodes, desc=f"Reading {reader.name}", unit="episode", disable=disable) as bar:
        for shard in range(reader.num_shards):
            for episode in reader.episodes(shard, load_frames=False):
                builder.add(episode)
                if take is not None:
                    take(shard, episode)
                bar.update()
    return builder.build()
