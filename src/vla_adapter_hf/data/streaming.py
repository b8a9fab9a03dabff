"""`VLAAdapterStreamingDataset`: the samples of `VLAAdapterDataset` one after the other, without random access."""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from vla_adapter_hf.data.chunks import window_count
from vla_adapter_hf.data.episodes import BAD_EPISODE_HINT, BadEpisode, BadEpisodeError, Episode, FrameReader, too_short
from vla_adapter_hf.data.opening import random_access
from vla_adapter_hf.data.reader import DemonstrationReader, index_episodes
from vla_adapter_hf.data.samples import DemonstrationSamples, SampleSettings
from vla_adapter_hf.data.statistics import compute_norm_stats, table_statistics, with_key_and_mask


logger = logging.getLogger(__name__)

# Draws of a sample depend on its episode and frame: this many frames at most in an episode.
_FRAMES_PER_EPISODE = 1 << 24


class VLAAdapterStreamingDataset(DemonstrationSamples, torch.utils.data.IterableDataset):
    """Recorded demonstrations as a stream of samples; see `VLAAdapterDataset` for what a sample holds.

    Made by `from_lerobot`, `from_rlds` or `from_dataset`. DataLoader workers share the shards (files) among them, or,
    if there are fewer shards than workers, the episodes. All processes of a distributed run read the same stream
    and, with `VLAAdapterTrainingArguments`, take turns with its batches. There is no length: give `max_steps` to the
    Trainer.

    Args:
        reader: the episodes.
        settings: chunk length, statistics key, image transform and so on.
        split: RLDS: only the shards of this split.
        shuffle_buffer: samples to draw from at random; the order of the shards is then random too. 0 keeps the order.
            Frames stay encoded in the buffer.
        seed: with the epoch it decides the order.
        norm_stats: statistics of the dataset, `{unnorm_key: ...}`; by default they are computed in a pass of their own
            over the numbers when first asked for.
        cache_dir: where statistics are cached; see `storage.cache_directory`.
    """

    _streaming = True

    def __init__(
        self,
        reader: DemonstrationReader,
        settings: SampleSettings = SampleSettings(),  # noqa: B008 - frozen
        split: str | None = None,
        shuffle_buffer: int = 0,
        seed: int = 0,
        norm_stats: dict[str, dict[str, Any]] | None = None,
        cache_dir: str | os.PathLike | None = None,
    ) -> None:
        self._set_up(reader, settings)
        if shuffle_buffer < 0:
            raise ValueError(f"shuffle_buffer={shuffle_buffer}; expected a number of samples, or 0 for none")
        if reader.num_shards == 0:
            raise ValueError(f"{reader.where}: there are no episodes")
        self._shards = np.arange(reader.num_shards) if split is None else np.array(reader.shards_of_split(split))
        self.shuffle_buffer = shuffle_buffer
        self.seed = seed
        self.cache_dir = cache_dir
        if norm_stats is not None and self.unnorm_key not in norm_stats:
            raise ValueError(
                f"norm_stats has {', '.join(norm_stats) or 'no keys'}, expected {self.unnorm_key!r}; give unnorm_key="
            )
        self._norm_stats = norm_stats
        self._skipped = torch.zeros((), dtype=torch.int64).share_memory_()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return _ClosedAtExit(self._samples())

    def _samples(self) -> Iterator[dict[str, Any]]:
        worker = torch.utils.data.get_worker_info()
        number, count = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        windows = self._windows(number, count)
        if self.shuffle_buffer:
            rng = np.random.default_rng((self.seed, self.epoch, 1, number))
            windows = _shuffled(windows, self.shuffle_buffer, rng)
        for sample, readers in windows:
            index = sample["episode_index"] * _FRAMES_PER_EPISODE + sample["frame_index"]
            self._add_images(sample, lambda: [read() for read in readers], index)  # noqa: B023 - called at once
            yield sample

    def _windows(self, worker: int, workers: int) -> Iterator[tuple[dict[str, Any], list[FrameReader]]]:
        shards = self._shards
        if self.shuffle_buffer:
            shards = np.random.default_rng((self.seed, self.epoch, 0)).permutation(shards)
        keep = None
        if len(shards) >= workers:
            shards = shards[worker::workers]
        else:

            def keep(episode: int) -> bool:
                return episode % workers == worker

        for shard in shards.tolist():
            for episode in self.reader.episodes(shard, keep):
                yield from self._windows_of(episode)

    def _windows_of(self, episode: Episode | BadEpisode) -> Iterator[tuple[dict[str, Any], list[FrameReader]]]:
        bad = episode if isinstance(episode, BadEpisode) else episode.unusable
        if bad is None and not self.pad_chunks:
            bad = too_short(episode.index, len(episode.actions), self._window_size, self.chunk_size)
        if bad is not None:
            if self.on_bad_episode == "error":
                raise BadEpisodeError(self.reader.where, bad, BAD_EPISODE_HINT)
            self._skipped += 1
            logger.warning("%s: skipped %s", self.reader.where, bad)
            return
        for frame in range(window_count(len(episode.actions), self._window_size, self.pad_chunks)):
            sample = {
                "text": episode.texts[frame],
                **self._numbers(episode.states, episode.actions, episode.chunks, frame),
                "episode_index": episode.index,
                "frame_index": frame,
            }
            yield sample, episode.frames(frame)

    @property
    def num_skipped_episodes(self) -> int:
        """Bad episodes skipped so far, in all workers."""
        return int(self._skipped)

    @property
    def norm_stats(self) -> dict[str, dict[str, Any]]:
        """`{unnorm_key: statistics}`; see `statistics`. The first use takes a pass over the dataset's numbers."""
        if self._norm_stats is None:
            key, mask = self.unnorm_key, self.action_mask
            source = random_access(self.reader, self.cache_dir)
            if source is not None:
                self._norm_stats = compute_norm_stats(source, key, mask, self.on_bad_episode, cache_dir=self.cache_dir)
            else:
                entry = table_statistics(index_episodes(self.reader), self.reader, self.on_bad_episode)
                self._norm_stats = with_key_and_mask(entry, self.reader, key, mask)
        return self._norm_stats

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.reader.where}, {len(self._shards)} shards, chunk_size={self.chunk_size}, "
            f"cameras={list(self.cameras)}, unnorm_key={self.unnorm_key!r})"
        )


class _ClosedAtExit(Iterator[Any]):
    """An iterator over a generator that is closed, at the latest, before the interpreter takes its modules apart.

    A generator that is still open then runs its `except` clauses with names that are already gone.
    """

    def __init__(self, generator: Any) -> None:
        self._generator = generator
        weakref.finalize(self, generator.close)

    def __next__(self) -> Any:
        return next(self._generator)


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
