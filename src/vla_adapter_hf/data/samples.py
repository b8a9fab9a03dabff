"""What `VLAAdapterDataset` and `VLAAdapterStreamingDataset` share: how they are made and what a sample is."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from vla_adapter_hf.data.chunks import action_chunk, choose_chunk_size
from vla_adapter_hf.data.columns import camera_names
from vla_adapter_hf.data.episodes import BadEpisode, BadEpisodeError, check_on_bad_episode, is_damage
from vla_adapter_hf.data.opening import OPTIONS, check_rows, open_reader
from vla_adapter_hf.data.reader import DemonstrationReader
from vla_adapter_hf.robots import RobotPreset


if TYPE_CHECKING:
    from typing_extensions import Self

ImageTransform = Callable[..., list[np.ndarray]]


@dataclass(frozen=True)
class SampleSettings:
    """How episodes become samples. The constructors take these as keyword arguments.

    Args:
        chunk_size: actions per sample (K); by default the robot's, else all of a stored chunk, else 8. Of stored
            chunks the first K actions are taken.
        pad_chunks: False: only chunks that fit, n - K + 1 from an episode of n steps. True: one from every step,
            padded at the end of the episode, as LeRobot does. Stored chunks are whole and need no padding.
        unnorm_key: key of the statistics; by default the dataset's name.
        action_mask: for each action dimension whether it is normalised; by default the robot's, else all are.
        on_bad_episode: `"error"` raises for the first episode that cannot be used; `"skip"` leaves such episodes out
            and warns.
        image_transform: called as `transform(images, epoch=..., index=...)`, see `augmentation`; None leaves frames as
            decoded.
    """

    chunk_size: int | None = None
    pad_chunks: bool = False
    unnorm_key: str | None = None
    action_mask: Sequence[bool] | None = None
    on_bad_episode: str = "error"
    image_transform: ImageTransform | None = None


class DemonstrationSamples:
    """Base of the two datasets: their constructors, settings and epoch.

    Attributes:
        reader: the recorded episodes.
        chunk_size: actions per sample (K).
        fps: frames per second, if the dataset says so.
        state_names, action_names: what each dimension is, such as joint names, if the dataset says so.
    """

    _streaming = False

    def _set_up(self, reader: DemonstrationReader, settings: SampleSettings) -> None:
        check_on_bad_episode(settings.on_bad_episode)
        robot = reader.columns.robot
        self.reader = reader
        stored = None if reader.chunk_shape is None else reader.chunk_shape[0]
        self.chunk_size = choose_chunk_size(settings.chunk_size, robot, stored, reader.columns.chunk, reader.where)
        # Rows that a sample needs: one with stored chunks, else as many as the chunk is cut from.
        self._window_size = self.chunk_size if stored is None else 1
        self.pad_chunks = settings.pad_chunks
        self.unnorm_key = settings.unnorm_key or reader.name
        self.action_mask = settings.action_mask
        if self.action_mask is None and robot is not None:
            self.action_mask = robot.action_mask
        self.on_bad_episode = settings.on_bad_episode
        self.image_transform = settings.image_transform
        # Shared memory: workers that live over several epochs see `set_epoch` too.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self.fps = reader.fps
        self.state_names, self.action_names = reader.state_names, reader.action_names

    @classmethod
    def from_lerobot(
        cls,
        path: str | os.PathLike,
        cameras: Sequence[str] | None = None,
        chunk_size: int | None = None,
        robot: str | RobotPreset | None = None,
        **options: Any,
    ) -> Self:
        """A LeRobot dataset, v2.0, v2.1 or v3.0, with frames in its parquet files or as MP4.

        Args:
            path: a folder, or the id of a Hub dataset repository.
            cameras: camera names in the order the model sees them, third person first; may be left out with one
                camera, or with a robot whose cameras all exist.
            chunk_size: see `SampleSettings`.
            robot: a preset of `robots` whose gripper and state conventions the recordings follow; None applies none.
            state_column, action_column: columns whose names are not `observation.state` and `action`.
            chunk_column: column with the actions that follow each row, (stored K, A) raw; the usual one,
                `action_chunk`, may be missing. None cuts chunks from consecutive rows, which must then be consecutive
                control steps.
            instruction: one text for all episodes, instead of the dataset's tasks.
            revision: branch, tag or commit on the Hub.
            max_open_videos: MP4 files each process keeps open, 16 by default.
            video_backend: what decodes MP4 frames, `"pyav"` by default, or `"torchcodec"` (extra: torchcodec), which
                gives the same frames in less time.
            options: arguments of `SampleSettings` and of the class.
        """
        return cls._open("lerobot", path, cameras, robot, {"chunk_size": chunk_size, **options})

    @classmethod
    def from_rlds(
        cls,
        path: str | os.PathLike,
        cameras: Sequence[str] | None = None,
        chunk_size: int | None = None,
        robot: str | RobotPreset | None = None,
        *,
        split: str | None = "train",
        **options: Any,
    ) -> Self:
        """An RLDS / TFDS dataset of TFRecord files.

        Statistics are those of all splits, samples come from `split`.

        Args:
            path: the folder with the shards or one above it, or the id of a Hub dataset repository.
            cameras: camera names in the order the model sees them; see `from_lerobot`.
            chunk_size: see `SampleSettings`.
            robot: a preset of `robots` whose gripper and state conventions the recordings follow; None applies none.
            split: the split; None for all of them.
            name: which dataset, if the folder or repository holds several.
            state_column, action_column, instruction_column: features whose names are not the usual ones.
            instruction: one text for all episodes, instead of the recorded ones.
            revision: branch, tag or commit on the Hub.
            verify_checksums: check the data's checksums when it is read; True by default.
            options: arguments of `SampleSettings` and of the class.
        """
        return cls._open("rlds", path, cameras, robot, {"chunk_size": chunk_size, "split": split, **options})

    @classmethod
    def from_dataset(
        cls,
        dataset: Any,
        cameras: Sequence[str] | None = None,
        chunk_size: int | None = None,
        robot: str | RobotPreset | None = None,
        *,
        unnorm_key: str = "dataset",
        **options: Any,
    ) -> Self:
        """A plain dataset of `datasets` with one row per step.

        Args:
            dataset: the rows: a `Dataset`, or for a stream an `IterableDataset` in which the rows of an episode are in
                order and next to each other.
            cameras: image columns in the order the model sees them; see `from_lerobot`.
            chunk_size: see `SampleSettings`.
            robot: a preset of `robots` whose gripper and state conventions the recordings follow; None applies none.
            unnorm_key: key of the statistics.
            state_column, action_column, episode_column, instruction_column: columns whose names are not the usual
                ones.
            frame_column: the column that orders the rows of an episode in a `Dataset`; without one they are taken as
                they come.
            instruction: one text for all episodes, instead of a column.
            chunk_column: see `from_lerobot`.
            options: arguments of `SampleSettings` and of the class.
        """
        rows = check_rows(dataset, cls._streaming)
        return cls._open(
            "dataset", rows, cameras, robot, {"chunk_size": chunk_size, "unnorm_key": unnorm_key, **options}
        )

    @classmethod
    def _open(
        cls,
        format: str,
        data: Any,
        cameras: Sequence[str] | None,
        robot: str | RobotPreset | None,
        options: dict[str, Any],
    ) -> Self:
        cls.check_options(format, options, data)
        of_reader = {name: value for name, value in options.items() if name in (*OPTIONS[format], "unnorm_key")}
        of_settings = {name: options[name] for name in _SETTINGS if name in options}
        others = {name: value for name, value in options.items() if name not in (*OPTIONS[format], *_SETTINGS)}
        reader = open_reader(format, data, cameras, robot, of_reader, fetch="metadata" if cls._streaming else "all")
        return cls(reader, SampleSettings(**of_settings), **others)

    @classmethod
    def check_options(cls, format: str, options: dict[str, Any], data: Any) -> None:
        """Raises TypeError for an argument that this class and format do not have; lists those that there are."""
        own = set(inspect.signature(cls.__init__).parameters) - {"self", "reader", "settings"}
        known = {"cameras", "robot", *OPTIONS[format], *_SETTINGS, *own}
        if cls._streaming:
            known -= {"frame_column", *(() if format == "rlds" else ("split",))}
        unknown = [name for name in options if name not in known]
        if unknown:
            what = f"dataset {str(data)!r}" if isinstance(data, (str, os.PathLike)) else "the dataset"
            raise TypeError(
                f"{what} has format {format!r}, which has no {', '.join(unknown)}; it has {', '.join(sorted(known))}"
            )

    def _numbers(
        self, states: np.ndarray, actions: np.ndarray, chunks: np.ndarray | None, frame: int
    ) -> dict[str, Any]:
        """State and chunk of a sample from the arrays of its episode; copies, so that a sample may be written to."""
        if chunks is not None:
            chunk, is_pad = chunks[frame, : self.chunk_size].copy(), np.zeros(self.chunk_size, bool)
        else:
            chunk, is_pad = action_chunk(actions, frame, self.chunk_size)
        return {
            "state": states[frame].copy(),
            "actions": chunk,
            "action_is_pad": is_pad,
            "unnorm_key": self.unnorm_key,
        }

    def _add_images(self, sample: dict[str, Any], read: Callable[[], list[np.ndarray]], index: int) -> None:
        """Read the frames of a sample and transform them; `index` decides the transform's draws."""
        try:
            images = read()
        except (ValueError, OSError) as error:
            if not is_damage(error):
                raise
            bad = BadEpisode(sample["episode_index"], sample["frame_index"], str(error))
            raise BadEpisodeError(self.reader.where, bad) from error
        if self.image_transform is not None:
            images = self.image_transform(images, epoch=self.epoch, index=index)
        sample["images"] = images
        sample["images_are_prepared"] = self.image_transform is not None
        if hasattr(self.image_transform, "crop_area"):
            sample["crop_area"] = self.image_transform.crop_area

    @property
    def epoch(self) -> int:
        """The epoch that order and image transforms are drawn for."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Draw for another epoch from now on; reaches running workers too."""
        self._epoch.fill_(int(epoch))

    @property
    def cameras(self) -> tuple[str, ...]:
        """Camera columns, in the order of `images`."""
        return self.reader.columns.cameras

    @property
    def camera_names(self) -> list[str]:
        """Short names of the cameras, each unique: what a model's configuration calls them."""
        return camera_names(self.cameras)


_SETTINGS = tuple(field.name for field in fields(SampleSettings))
