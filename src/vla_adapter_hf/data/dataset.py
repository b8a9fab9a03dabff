"""`VLAAdapterDataset`: demonstrations as training samples, with random access."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from vla_adapter_hf.data.chunks import WindowIndex
from vla_adapter_hf.data.episodes import BAD_EPISODE_HINT, BadEpisode, BadEpisodeError, too_short
from vla_adapter_hf.data.opening import random_access
from vla_adapter_hf.data.reader import DemonstrationReader
from vla_adapter_hf.data.samples import DemonstrationSamples, ImageTransform, SampleSettings
from vla_adapter_hf.data.source import DemonstrationSource
from vla_adapter_hf.data.statistics import check_action_mask, compute_norm_stats


logger = logging.getLogger(__name__)


class VLAAdapterDataset(DemonstrationSamples, torch.utils.data.Dataset):
    """Recorded demonstrations, one sample per step at which an action chunk begins.

    A chunk is cut from the actions of consecutive rows, unless the dataset stores one with each row (LeRobot and plain
    datasets, column `action_chunk`): then every row is a sample.

    Made by `from_lerobot`, `from_rlds` or `from_dataset`. A sample is a dict:

    - `images`: list of uint8 (height, width, 3) arrays, one per camera in camera order;
    - `images_are_prepared`: whether an `image_transform` has brought them to the model's size;
    - `crop_area`: the share of a frame that the `image_transform` kept, `None` for all of it, if it says so;
    - `text`: the instruction;
    - `state`: float32 (S,), the robot's units;
    - `actions`: float32 (K, A), the robot's units after its gripper convention; the first is the sample's step;
    - `action_is_pad`: bool (K,), true after the end of the episode, where the last action is repeated;
    - `unnorm_key`: the key of this dataset's statistics;
    - `episode_index`, `frame_index`: the step that the sample begins at.

    Args:
        reader: the recorded episodes, in local files.
        settings: chunk length, statistics key, image transform and so on.
        split: only episodes of a split that the dataset itself declares, such as "train".
        episodes: only these episode indices.
        cache_dir: where statistics, indices and unpacked frames are kept; see `storage.cache_directory`.
        progress: show progress bars; by default where standard error is a terminal.

    Attributes:
        source: the episodes with random access.
        bad_episodes: those that were left out, with the reasons.

    Raises:
        BadEpisodeError: an episode that cannot be used, with `on_bad_episode="error"`; names episode and frame.
        TypeError, ValueError: arguments that do not fit the data.
    """

    def __init__(
        self,
        reader: DemonstrationReader,
        settings: SampleSettings = SampleSettings(),  # noqa: B008 - frozen
        split: str | None = None,
        episodes: Iterable[int] | None = None,
        cache_dir: str | os.PathLike | None = None,
        progress: bool | None = None,
    ) -> None:
        self._set_up(reader, settings)
        self.cache_dir = cache_dir
        self.progress = progress
        self._norm_stats: dict[str, Any] | None = None
        self.source: DemonstrationSource = random_access(reader, cache_dir, progress)
        table = self.source.table
        if self.action_mask is not None and len(table.actions):
            self.action_mask = check_action_mask(self.action_mask, table.actions.shape[1], reader.where)
        chosen = self._choose_positions(split, episodes)
        self.bad_episodes = self._find_bad_episodes(chosen)
        bad = {episode.episode_index for episode in self.bad_episodes}
        self._use([position for position in chosen if int(table.episode_indices[position]) not in bad])
        if len(self) == 0:
            reason = f", the first because {self.bad_episodes[0]}" if self.bad_episodes else ""
            raise ValueError(
                f"{reader.where}: there are no samples; {len(chosen)} episodes, {len(self.bad_episodes)} of them "
                f"skipped{reason}"
            )
        self.source.prepare_images()

    def _use(self, positions: Sequence[int]) -> None:
        self._positions = np.asarray(positions, np.int64)
        self._windows = WindowIndex(self.source.table.lengths[self._positions], self._window_size, self.pad_chunks)

    def _choose_positions(self, split: str | None, episodes: Iterable[int] | None) -> list[int]:
        indices = self.source.table.episode_indices
        chosen = list(range(len(indices))) if split is None else self.source.positions_of_split(split)
        if episodes is None:
            return chosen
        wanted = {int(index) for index in episodes}
        numbers = indices[chosen].tolist()
        missing = wanted - set(numbers)
        if missing:
            there = (
                f"there are {len(numbers)}, numbered {min(numbers)} to {max(numbers)}" if numbers else "there are none"
            )
            raise ValueError(f"{self.source.where}: episode {min(missing)} does not exist; {there}")
        return [position for position in chosen if int(indices[position]) in wanted]

    def _find_bad_episodes(self, chosen: list[int]) -> list[BadEpisode]:
        table, where = self.source.table, self.source.where
        bad = []
        for position in chosen:
            problem = table.problems.get(position) or table.unusable.get(position)
            if problem is None and not self.pad_chunks:
                index, length = int(table.episode_indices[position]), int(table.lengths[position])
                problem = too_short(index, length, self._window_size, self.chunk_size)
            if problem is not None:
                bad.append(problem)
        if bad and self.on_bad_episode == "error":
            hint = f"{BAD_EPISODE_HINT}, or leave it out with episodes=[...]"
            raise BadEpisodeError(where, bad, hint)
        if bad:
            logger.warning("%s: skipped %d bad episodes, the first: %s", where, len(bad), bad[0])
        return bad

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.get(index)

    def get(self, index: int, draw_index: int | None = None, load_images: bool = True) -> dict[str, Any]:
        """One sample.

        Args:
            index: which; negative numbers count from the end.
            draw_index: the index given to the image transform instead of `index`, if one sample is drawn more than
                once.
            load_images: False leaves `images` out: nothing is read from disk.

        Raises:
            IndexError: there are not so many samples.
            BadEpisodeError: a frame that cannot be read; names episode and frame.
        """
        size = len(self)
        index = int(index)
        if not -size <= index < size:
            raise IndexError(f"sample {index} of {size}")
        index %= size
        episode, frame = self._windows.locate(index)
        position = int(self._positions[episode])
        table = self.source.table
        steps = table.steps(position)
        chunks = None if table.chunks is None else table.chunks[steps]
        sample: dict[str, Any] = {
            "text": table.texts[table.text_ids[steps.start + frame]],
            **self._numbers(table.states[steps], table.actions[steps], chunks, frame),
            "episode_index": int(table.episode_indices[position]),
            "frame_index": frame,
        }
        if load_images:
            index = index if draw_index is None else draw_index
            self._add_images(sample, lambda: self.source.read_images(position, frame), index)
        return sample

    def control_step(self, index: int) -> int:
        """The control step of its episode at which a sample's chunk begins.

        It is the recorded one if the dataset has a column `step` with its stored chunks, else the `frame_index`.
        """
        episode, frame = self._windows.locate(index)
        table = self.source.table
        if table.control_steps is None:
            return frame
        return int(table.control_steps[int(table.starts[self._positions[episode]]) + frame])

    @property
    def norm_stats(self) -> dict[str, dict[str, Any]]:
        """`{unnorm_key: statistics}` of the whole dataset, even if this is a part of it; see `statistics`."""
        if self._norm_stats is None:
            # Bad episodes among the chosen ones were reported or skipped already; others do not matter here.
            self._norm_stats = compute_norm_stats(
                self, on_bad_episode="skip", cache_dir=self.cache_dir, progress=self.progress
            )
        return self._norm_stats

    @property
    def action_dim(self) -> int:
        """Size of an action (A)."""
        return self.source.table.actions.shape[1]

    @property
    def state_dim(self) -> int:
        """Size of the proprio state (S)."""
        return self.source.table.states.shape[1]

    @property
    def episode_indices(self) -> list[int]:
        """The episodes that samples come from."""
        return self.source.table.episode_indices[self._positions].tolist()

    @property
    def num_transitions(self) -> int:
        """Steps (rows) of the whole dataset, which mixing weights are multiplied by."""
        return len(self.source.table.actions)

    @property
    def num_skipped_episodes(self) -> int:
        """Episodes left out because they cannot be used."""
        return len(self.bad_episodes)

    def select_episodes(
        self, episodes: Iterable[int], image_transform: ImageTransform | None = None
    ) -> VLAAdapterDataset:
        """The same dataset with samples from some of its episodes only; it shares files, statistics and epoch.

        Args:
            episodes: episode indices, all among `episode_indices`.
            image_transform: the new dataset's; None leaves frames as decoded.

        Raises:
            ValueError: an episode that is not there, or none at all.
        """
        wanted = [int(index) for index in episodes]
        places = dict(zip(self.episode_indices, self._positions.tolist(), strict=True))
        missing = [index for index in wanted if index not in places]
        if missing or not wanted:
            what = f"episode {missing[0]} is not" if missing else "no episodes were asked for, of those"
            raise ValueError(f"{self.source.where}: {what} among {len(places)} episodes")
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other.image_transform = image_transform
        other._use([places[index] for index in sorted(set(wanted))])
        return other

    def split_by_episode(
        self,
        validation: float | int | Sequence[int] = 0.1,
        seed: int = 0,
        validation_transform: ImageTransform | None = None,
    ) -> tuple[VLAAdapterDataset, VLAAdapterDataset]:
        """Train and validation parts with no episode in both; statistics stay those of the whole dataset.

        Args:
            validation: a share of the episodes (float below 1), a number of them (int), or their indices.
            seed: decides which, for a share or a number.
            validation_transform: of the validation part, which is never augmented; give an `ImageResize` of the
                training transform's size.

        Raises:
            ValueError: one of the two parts would be empty.
        """
        indices = self.episode_indices
        if isinstance(validation, (int, float)):
            count = validation if isinstance(validation, int) else round(validation * len(indices))
            if not 1 <= count < len(indices):
                raise ValueError(
                    f"validation={validation} of {len(indices)} episodes is {count}; both parts need at least one"
                )
            chosen = np.random.default_rng(seed).permutation(indices)[:count].tolist()
        else:
            chosen = [int(index) for index in validation]
        train = [index for index in indices if index not in set(chosen)]
        return (
            self.select_episodes(train, self.image_transform),
            self.select_episodes(chosen, validation_transform),
        )

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.source.where}, {len(self)} samples of {len(self._positions)} episodes, "
            f"chunk_size={self.chunk_size}, cameras={list(self.cameras)}, unnorm_key={self.unnorm_key!r})"
        )
