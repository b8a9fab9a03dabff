"""`VLAAdapterDataset`: demonstrations as training samples, with random access."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import datasets
import numpy as np
import torch

from vla_adapter_hf.data.chunks import CHUNK_COLUMN, choose_chunk_size
from vla_adapter_hf.data.episodes import BadEpisode, BadEpisodeError, check_on_bad_episode, is_damage
from vla_adapter_hf.data.lerobot.source import LeRobotSource, lerobot_folder
from vla_adapter_hf.data.rlds.source import RLDSSource
from vla_adapter_hf.data.source import DemonstrationSource
from vla_adapter_hf.data.statistics import check_action_mask, compute_norm_stats
from vla_adapter_hf.data.storage import dataset_folder
from vla_adapter_hf.data.table import PlainSource
from vla_adapter_hf.data.windows import WindowIndex, action_chunk, whole_chunk
from vla_adapter_hf.robots import RobotPreset, get_robot


logger = logging.getLogger(__name__)

ImageTransform = Callable[..., list[np.ndarray]]


class VLAAdapterDataset(torch.utils.data.Dataset):
    """Recorded demonstrations, one sample per step at which an action chunk begins.

    A chunk is cut from the actions of consecutive rows, unless the dataset stores one with each row (LeRobot and plain
    datasets, column `action_chunk`): then every row is a sample, whatever follows it.

    Made by `from_lerobot`, `from_rlds` or `from_dataset`. A sample is a dict:

    - `images`: list of uint8 (height, width, 3) arrays, one per camera in camera order;
    - `images_are_prepared`: whether an `image_transform` has brought them to the model's size;
    - `text`: the instruction;
    - `state`: float32 (S,), the robot's units;
    - `actions`: float32 (K, A), the robot's units after its gripper convention; the first is the sample's step;
    - `action_is_pad`: bool (K,), true after the end of the episode, where the last action is repeated;
    - `unnorm_key`: the key of this dataset's statistics;
    - `episode_index`, `frame_index`: where the sample comes from.

    Args:
        source: the recorded episodes.
        chunk_size: actions per sample (K); by default the robot's, else all of a stored chunk, else 8. Of stored chunks
            the first K actions are taken.
        pad_chunks: False: only chunks that fit, n - K + 1 from an episode of n steps. True: one from every step,
            padded at the end of the episode, as LeRobot does. Stored chunks are whole, with them it changes nothing.
        unnorm_key: key of the statistics; by default the dataset's name.
        action_mask: for each action dimension whether it is normalised; by default the robot's, else all are.
        on_bad_episode: `"error"` raises for the first episode that cannot be used; `"skip"` leaves such episodes out,
            says how many in a warning and lists them in `bad_episodes`.
        image_transform: called as `transform(images, epoch=..., index=...)`, see `augmentation`; None leaves frames as
            decoded.
        split: only episodes of a split that the dataset itself declares, such as "train".
        episodes: only these episode indices.
        cache_dir: where statistics, indices and unpacked frames are kept; see `storage.cache_directory`.
        progress: show progress bars; by default where standard error is a terminal.

    Raises:
        BadEpisodeError: an episode that cannot be used, with `on_bad_episode="error"`; names episode and frame.
        TypeError, ValueError: arguments that do not fit the data.
    """

    def __init__(
        self,
        source: DemonstrationSource,
        chunk_size: int | None = None,
        pad_chunks: bool = False,
        unnorm_key: str | None = None,
        action_mask: Sequence[bool] | None = None,
        on_bad_episode: str = "error",
        image_transform: ImageTransform | None = None,
        split: str | None = None,
        episodes: Iterable[int] | None = None,
        cache_dir: str | os.PathLike | None = None,
        progress: bool | None = None,
    ) -> None:
        check_on_bad_episode(on_bad_episode)
        robot = source.robot
        self.source = source
        stored = source.stored_chunk_size
        self.chunk_size = choose_chunk_size(chunk_size, robot, stored, source.chunk_column, source.where)
        # Rows that a sample needs: its own one, or as many as the chunk is cut from.
        self._window_size = self.chunk_size if stored is None else 1
        self.pad_chunks = pad_chunks
        self.unnorm_key = unnorm_key or source.name
        self.on_bad_episode = on_bad_episode
        self.image_transform = image_transform
        self.cache_dir = cache_dir
        self.progress = progress
        # Shared memory: workers that live over several epochs see `set_epoch` too.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._norm_stats: dict[str, Any] | None = None

        table = source.table
        if action_mask is None and robot is not None:
            action_mask = robot.action_mask
        self.action_mask = (
            check_action_mask(action_mask, table.actions.shape[1], source.where)
            if action_mask is not None and len(table.actions)
            else None
        )
        chosen = self._choose_positions(split, episodes)
        self.bad_episodes = self._find_bad_episodes(chosen)
        bad = {episode.episode_index for episode in self.bad_episodes}
        usable = [position for position in chosen if int(table.episode_indices[position]) not in bad]
        self._use(usable)
        if len(self) == 0:
            raise ValueError(
                f"{source.where}: there are no samples; {len(chosen)} episodes, {len(self.bad_episodes)} of "
                "them skipped" + (f", the first because {self.bad_episodes[0]}" if self.bad_episodes else "")
            )
        source.prepare_images()

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
        table = self.source.table
        frame_problems = self.source.frame_problems()
        bad = []
        for position in chosen:
            problem = table.problems.get(position) or frame_problems.get(position)
            length = int(table.lengths[position])
            if problem is None and not self.pad_chunks and length < self._window_size:
                problem = BadEpisode(
                    int(table.episode_indices[position]),
                    length - 1,
                    f"the episode ends after {length} steps, a chunk needs {self.chunk_size}",
                )
            if problem is not None:
                bad.append(problem)
        if bad and self.on_bad_episode == "error":
            raise BadEpisodeError(
                self.source.where,
                bad,
                'Mend the dataset, leave it out with episodes=[...], or pass on_bad_episode="skip"',
            )
        if bad:
            logger.warning("%s: skipped %d bad episodes, the first: %s", self.source.where, len(bad), bad[0])
        return bad

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
    ) -> VLAAdapterDataset:
        """A LeRobot dataset, v2.0, v2.1 or v3.0, with frames in its parquet files or as MP4.

        Args:
            path: a folder, or the id of a Hub dataset repository.
            cameras: camera names in the order the model sees them, third person first; may be left out with one
                camera, or with a robot whose cameras all exist.
            chunk_size: see the class.
            robot: a preset of `robots` whose gripper and state conventions the recordings follow; None applies none.
            state_column, action_column: where their names are not `observation.state` and `action`.
            instruction: one text for all episodes, instead of the dataset's tasks.
            revision: branch, tag or commit on the Hub.
            max_open_videos: MP4 files each process keeps open.
            chunk_column: column with the actions that follow each row, (stored K, A) raw; the usual one may be missing.
                None cuts chunks from consecutive rows, which must then be consecutive control steps.
            options: the class's other arguments.
        """
        preset = get_robot(robot) if robot is not None else None
        source = LeRobotSource(
            lerobot_folder(path, cameras, preset, revision),
            cameras,
            preset,
            state_column,
            action_column,
            instruction,
            # A repository's snapshot folder is named after its commit.
            name=os.fspath(path).rstrip("/").rsplit("/", 1)[-1] or None,
            max_open_videos=max_open_videos,
            chunk_column=chunk_column,
            cache_dir=options.get("cache_dir"),
            progress=options.get("progress"),
        )
        return cls(source, chunk_size, **options)

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
    ) -> VLAAdapterDataset:
        """An RLDS / TFDS dataset of TFRecord files.

        Statistics are those of all splits, samples come from `split`.

        Args:
            path: the folder with the shards or one above it, or the id of a Hub dataset repository.
            cameras: camera names in the order the model sees them; see `from_lerobot`.
            chunk_size: see the class.
            robot: a preset of `robots` whose gripper and state conventions the recordings follow; None applies none.
            name: which dataset, where the folder or repository holds several.
            state_column, action_column, instruction_column: where their names are not the usual ones.
            instruction: one text for all episodes, instead of the recorded ones.
            revision: branch, tag or commit on the Hub.
            verify_checksums: check the data's checksums when it is indexed.
            split: the split; None for all of them.
            options: the class's other arguments.
        """
        preset = get_robot(robot) if robot is not None else None
        source = RLDSSource(
            dataset_folder(path, revision, (f"{name}/**",) if name is not None else None),
            cameras,
            preset,
            state_column,
            action_column,
            instruction_column,
            instruction,
            name=name,
            verify_checksums=verify_checksums,
            cache_dir=options.get("cache_dir"),
            progress=options.get("progress"),
        )
        return cls(source, chunk_size, split=split, **options)

    @classmethod
    def from_dataset(
        cls,
        dataset: datasets.Dataset,
        cameras: Sequence[str] | None = None,
        chunk_size: int | None = None,
        robot: str | RobotPreset | None = None,
        state_column: str | None = None,
        action_column: str | None = None,
        episode_column: str | None = None,
        frame_column: str | None = None,
        instruction_column: str | None = None,
        instruction: str | None = None,
        unnorm_key: str = "dataset",
        chunk_column: str | None = CHUNK_COLUMN,
        **options: Any,
    ) -> VLAAdapterDataset:
        """A plain `datasets.Dataset` with one row per step.

        Args:
            dataset: the rows.
            cameras: image columns in the order the model sees them; see `from_lerobot`.
            chunk_size: see the class.
            robot: a preset of `robots` whose gripper and state conventions the recordings follow; None applies none.
            state_column, action_column, episode_column, frame_column, instruction_column: where their names are not
                the usual ones. `frame_column` orders the rows of an episode; without one they are taken as they come.
            instruction: one text for all episodes, instead of a column.
            unnorm_key: key of the statistics.
            chunk_column: see `from_lerobot`.
            options: the class's other arguments.
        """
        source = PlainSource(
            dataset,
            cameras,
            get_robot(robot) if robot is not None else None,
            state_column,
            action_column,
            episode_column,
            frame_column,
            instruction_column,
            instruction,
            name=unnorm_key,
            chunk_column=chunk_column,
        )
        return cls(source, chunk_size, unnorm_key=unnorm_key, **options)

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.get(index)

    def get(self, index: int, draw_index: int | None = None, load_images: bool = True) -> dict[str, Any]:
        """One sample.

        Args:
            index: which; negative numbers count from the end.
            draw_index: what the image transform is told instead of `index`, where one sample is drawn more than once.
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
        episode_index = int(table.episode_indices[position])
        if table.chunks is not None:
            actions, is_pad = whole_chunk(table.chunks[steps.start + frame], self.chunk_size)
        else:
            actions, is_pad = action_chunk(table.actions[steps], frame, self.chunk_size)
        sample: dict[str, Any] = {
            "text": table.texts[table.text_ids[steps.start + frame]],
            "state": table.states[steps.start + frame].copy(),
            "actions": actions,
            "action_is_pad": is_pad,
            "unnorm_key": self.unnorm_key,
            "episode_index": episode_index,
            "frame_index": frame,
        }
        if load_images:
            try:
                images = self.source.read_images(position, frame)
            except (ValueError, OSError) as error:
                if not is_damage(error):
                    raise
                raise BadEpisodeError(self.source.where, BadEpisode(episode_index, frame, str(error))) from error
            if self.image_transform is not None:
                images = self.image_transform(
                    images, epoch=self.epoch, index=index if draw_index is None else draw_index
                )
            sample["images"] = images
            sample["images_are_prepared"] = self.image_transform is not None
        return sample

    def control_step(self, index: int) -> int:
        """The control step of its episode at which a sample's chunk begins: the recorded one where rows are farther apart
        than steps and a column `step` beside the stored chunks says so, else the sample's `frame_index`."""
        episode, frame = self._windows.locate(index)
        table = self.source.table
        if table.control_steps is None:
            return frame
        return int(table.control_steps[int(table.starts[self._positions[episode]]) + frame])

    @property
    def epoch(self) -> int:
        """The epoch that image transforms draw for."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Draw for another epoch from now on; reaches running workers too."""
        self._epoch.fill_(int(epoch))

    @property
    def norm_stats(self) -> dict[str, dict[str, Any]]:
        """`{unnorm_key: statistics}` over the whole dataset, whatever part of it this is; see `statistics`."""
        if self._norm_stats is None:
            # Bad episodes among the chosen ones have been dealt with; others must not stand in the way now.
            self._norm_stats = compute_norm_stats(
                self, on_bad_episode="skip", cache_dir=self.cache_dir, progress=self.progress
            )
        return self._norm_stats

    @property
    def cameras(self) -> tuple[str, ...]:
        """Camera columns, in the order of `images`."""
        return self.source.cameras

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
