"""`VLAAdapterStreamingDataset`: the samples of `VLAAdapterDataset` one after the other, without random access."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from typing import Any

import datasets
import numpy as np
import torch

from vla_adapter_hf.data.chunks import CHUNK_COLUMN, choose_chunk_size
from vla_adapter_hf.data.dataset import ImageTransform
from vla_adapter_hf.data.episodes import BadEpisode, BadEpisodeError, check_on_bad_episode, is_damage
from vla_adapter_hf.data.statistics import check_action_mask, column_statistics, compute_norm_stats
from vla_adapter_hf.data.streams import (
    EpisodeStream,
    FrameReader,
    LeRobotStream,
    PlainStream,
    RLDSStream,
    StreamedEpisode,
)
from vla_adapter_hf.data.windows import action_chunk, whole_chunk
from vla_adapter_hf.robots import RobotPreset, get_robot


logger = logging.getLogger(__name__)

# Draws of a sample depend on its episode and frame: this many frames at most in an episode.
_FRAMES_PER_EPISODE = 1 << 24


class VLAAdapterStreamingDataset(torch.utils.data.IterableDataset):
    """Recorded demonstrations as a stream of samples; see `VLAAdapterDataset` for what a sample holds.

    Made by `from_lerobot`, `from_rlds` or `from_dataset`. DataLoader workers share the shards (files) out among them,
    or, where there are fewer shards than workers, the episodes. All processes of a distributed run see the same stream
    and accelerate deals it out. There is no length: give `max_steps` to the Trainer.

    Args:
        stream: the episodes.
        chunk_size, pad_chunks, unnorm_key, action_mask, on_bad_episode, image_transform: see `VLAAdapterDataset`.
        shuffle_buffer: samples to draw from at random; the order of the shards is then random too. 0 keeps the order.
            Frames wait in it undecoded.
        seed: with the epoch it decides the order.
        norm_stats: statistics of the dataset, `{unnorm_key: ...}`; by default they are computed in a pass of their own
            over the numbers when first asked for.
        cache_dir: where statistics are cached; see `storage.cache_directory`.
    """

    def __init__(
        self,
        stream: EpisodeStream,
        chunk_size: int | None = None,
        pad_chunks: bool = False,
        unnorm_key: str | None = None,
        action_mask: Sequence[bool] | None = None,
        on_bad_episode: str = "error",
        image_transform: ImageTransform | None = None,
        shuffle_buffer: int = 0,
        seed: int = 0,
        norm_stats: dict[str, dict[str, Any]] | None = None,
        cache_dir: str | os.PathLike | None = None,
    ) -> None:
        check_on_bad_episode(on_bad_episode)
        robot = stream.robot
        stored = stream.stored_chunk_size
        self.chunk_size = choose_chunk_size(chunk_size, robot, stored, stream.chunk_column, stream.where)
        self._window_size = self.chunk_size if stored is None else 1  # rows that a sample needs
        if shuffle_buffer < 0:
            raise ValueError(f"shuffle_buffer={shuffle_buffer}; expected a number of samples, or 0 for none")
        if stream.num_shards == 0:
            raise ValueError(f"{stream.where}: there are no episodes")
        self.stream = stream
        self.pad_chunks = pad_chunks
        self.unnorm_key = unnorm_key or stream.name
        self.action_mask = action_mask if action_mask is not None or robot is None else robot.action_mask
        self.on_bad_episode = on_bad_episode
        self.image_transform = image_transform
        self.shuffle_buffer = shuffle_buffer
        self.seed = seed
        self.cache_dir = cache_dir
        if norm_stats is not None and self.unnorm_key not in norm_stats:
            raise ValueError(
                f"norm_stats has {', '.join(norm_stats) or 'no keys'}, expected {self.unnorm_key!r}; give unnorm_key="
            )
        self._norm_stats = norm_stats
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._skipped = torch.zeros((), dtype=torch.int64).share_memory_()

    @classmethod
    def from_lerobot(
        cls,
        path: str | os.PathLike,
        cameras: Sequence[str] | None = None,
        chunk_size: int | None = None,
        robot: str | RobotPreset | None = None,
        state_column: str | None = None,
        action_column: str | None = None,
        instruction: str | None = None,
        revision: str | None = None,
        max_open_videos: int = 16,
        chunk_column: str | None = CHUNK_COLUMN,
        **options: Any,
    ) -> VLAAdapterStreamingDataset:
        """A LeRobot dataset, local or on the Hub; arguments as for `VLAAdapterDataset.from_lerobot`."""
        stream = LeRobotStream(
            path,
            cameras,
            _preset(robot),
            state_column,
            action_column,
            instruction,
            revision,
            max_open_videos,
            chunk_column,
        )
        return cls(stream, chunk_size, **options)

    @classmethod
    def from_rlds(
        cls,
        path: str | os.PathLike,
        cameras: Sequence[str] | None = None,
        chunk_size: int | None = None,
        robot: str | RobotPreset | None = None,
        name: str | None = None,
        state_column: str | None = None,
        action_column: str | None = None,
        instruction_column: str | None = None,
        instruction: str | None = None,
        revision: str | None = None,
        verify_checksums: bool = True,
        split: str | None = "train",
        **options: Any,
    ) -> VLAAdapterStreamingDataset:
        """An RLDS / TFDS dataset; arguments as for `VLAAdapterDataset.from_rlds`."""
        stream = RLDSStream(
            path,
            cameras,
            _preset(robot),
            name,
            state_column,
            action_column,
            instruction_column,
            instruction,
            revision,
            split,
            verify_checksums,
        )
        return cls(stream, chunk_size, **options)

    @classmethod
    def from_dataset(
        cls,
        dataset: datasets.IterableDataset,
        cameras: Sequence[str] | None = None,
        chunk_size: int | None = None,
        robot: str | RobotPreset | None = None,
        state_column: str | None = None,
        action_column: str | None = None,
        episode_column: str | None = None,
        instruction_column: str | None = None,
        instruction: str | None = None,
        unnorm_key: str = "dataset",
        chunk_column: str | None = CHUNK_COLUMN,
        **options: Any,
    ) -> VLAAdapterStreamingDataset:
        """A `datasets.IterableDataset` with one row per step, those of an episode in order and next to each other.

        Arguments as for `VLAAdapterDataset.from_dataset`.
        """
        stream = PlainStream(
            dataset,
            cameras,
            _preset(robot),
            state_column,
            action_column,
            episode_column,
            instruction_column,
            instruction,
            name=unnorm_key,
            chunk_column=chunk_column,
        )
        return cls(stream, chunk_size, unnorm_key=unnorm_key, **options)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = torch.utils.data.get_worker_info()
        number, count = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        windows = self._windows(number, count)
        if self.shuffle_buffer:
            windows = _shuffled(
                windows, self.shuffle_buffer, np.random.default_rng((self.seed, self.epoch, 1, number))
            )
        for sample, readers in windows:
            try:
                images = [read() for read in readers]
            except (ValueError, OSError) as error:
                if not is_damage(error):
                    raise
                bad = BadEpisode(sample["episode_index"], sample["frame_index"], str(error))
                raise BadEpisodeError(self.stream.where, bad) from error
            if self.image_transform is not None:
                index = sample["episode_index"] * _FRAMES_PER_EPISODE + sample["frame_index"]
                images = self.image_transform(images, epoch=self.epoch, index=index)
            sample["images"] = images
            sample["images_are_prepared"] = self.image_transform is not None
            yield sample

    def _windows(self, worker: int, workers: int) -> Iterator[tuple[dict[str, Any], list[FrameReader]]]:
        shards = np.arange(self.stream.num_shards)
        if self.shuffle_buffer:
            shards = np.random.default_rng((self.seed, self.epoch, 0)).permutation(shards)
        keep = None
        if len(shards) >= workers:
            shards = shards[worker::workers]
        else:

            def keep(episode: int) -> bool:
                return episode % workers == worker

        for shard in shards.tolist():
            for episode in self.stream.episodes(shard, keep):
                yield from self._windows_of(episode)

    def _windows_of(self, episode: StreamedEpisode | BadEpisode) -> Iterator[tuple[dict[str, Any], list[FrameReader]]]:
        bad = episode if isinstance(episode, BadEpisode) else self._problem(episode)
        if bad is not None:
            if self.on_bad_episode == "error":
                raise BadEpisodeError(self.stream.where, bad, 'Mend the dataset or pass on_bad_episode="skip"')
            self._skipped += 1
            logger.warning("%s: skipped %s", self.stream.where, bad)
            return
        last = len(episode.actions) if self.pad_chunks else len(episode.actions) - self._window_size + 1
        for frame in range(last):
            if episode.chunks is not None:
                actions, is_pad = whole_chunk(episode.chunks[frame], self.chunk_size)
            else:
                actions, is_pad = action_chunk(episode.actions, frame, self.chunk_size)
            sample = {
                "text": episode.texts[frame],
                "state": episode.states[frame].copy(),
                "actions": actions,
                "action_is_pad": is_pad,
                "unnorm_key": self.unnorm_key,
                "episode_index": episode.index,
                "frame_index": frame,
            }
            yield sample, episode.readers(frame)

    def _problem(self, episode: StreamedEpisode) -> BadEpisode | None:
        length = len(episode.actions)
        if length == 0 or (not self.pad_chunks and length < self._window_size):
            reason = f"the episode ends after {length} steps, a chunk needs {self.chunk_size}"
            return BadEpisode(episode.index, length - 1, reason)
        for frame, text in enumerate(episode.texts[:length]):
            if not text.strip():
                return BadEpisode(episode.index, frame, "has no instruction")
        return None

    @property
    def epoch(self) -> int:
        """The epoch that order and image transforms are drawn for."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Draw for another epoch from now on; reaches running workers too."""
        self._epoch.fill_(int(epoch))

    @property
    def num_skipped_episodes(self) -> int:
        """Bad episodes skipped so far, in all workers."""
        return int(self._skipped)

    @property
    def cameras(self) -> tuple[str, ...]:
        """Camera columns, in the order of `images`."""
        return self.stream.cameras

    @property
    def norm_stats(self) -> dict[str, dict[str, Any]]:
        """`{unnorm_key: statistics}`; see `statistics`. The first use takes a pass over the dataset's numbers."""
        if self._norm_stats is None:
            source = self.stream.source()
            if source is not None:
                self._norm_stats = compute_norm_stats(
                    source, self.unnorm_key, self.action_mask, self.on_bad_episode, cache_dir=self.cache_dir
                )
            else:
                self._norm_stats = self._stream_norm_stats()
        return self._norm_stats

    def _stream_norm_stats(self) -> dict[str, dict[str, Any]]:
        states, actions = [], []
        for shard in range(self.stream.num_shards):
            for episode in self.stream.episodes(shard, load_frames=False):
                if not isinstance(episode, BadEpisode):
                    states.append(episode.states)
                    actions.append(episode.learnt_actions)
                elif self.on_bad_episode == "error":
                    raise BadEpisodeError(self.stream.where, episode, 'Mend the dataset or pass on_bad_episode="skip"')
        if not actions:
            raise ValueError(f"{self.stream.where}: there is no readable episode to compute statistics from")
        count = len(actions)
        states, actions = np.concatenate(states), np.concatenate(actions)
        mask = self.action_mask if self.action_mask is not None else [True] * actions.shape[1]
        return {
            self.unnorm_key: {
                "action": {
                    **column_statistics(actions),
                    "mask": check_action_mask(mask, actions.shape[1], self.stream.where),
                },
                "proprio": column_statistics(states),
                "num_transitions": len(states),
                "num_trajectories": count,
            }
        }

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.stream.where}, {self.stream.num_shards} shards, "
            f"chunk_size={self.chunk_size}, "
            f"cameras={list(self.cameras)}, unnorm_key={self.unnorm_key!r})"
        )


def _preset(robot: str | RobotPreset | None) -> RobotPreset | None:
    return get_robot(robot) if robot is not None else None


def _shuffled(items: Iterator[Any], size: int, rng: np.random.Generator) -> Iterator[Any]:
    """Each item leaves when a later one takes its place in a buffer of `size`; what is left comes out at random."""
    buffer: list[Any] = []
    for item in items:
        if len(buffer) < size:
            buffer.append(item)
            continue
        place = int(rng.integers(size))
        buffer[place], item = item, buffer[place]
        yield item
    for place in rng.permutation(len(buffer)).tolist():
        yield buffer[place]
