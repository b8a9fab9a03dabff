"""What every format has to offer: the numbers of all episodes, and the camera frames of one step."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from functools import cached_property

import numpy as np

from vla_adapter_hf.data.episodes import BadEpisode, EpisodeTable
from vla_adapter_hf.robots import RobotPreset


class DemonstrationSource(ABC):
    """Recorded episodes in one format, with the cameras in the order the model will see them.

    Attributes:
        name: the dataset's name, the default statistics key.
        where: the dataset as messages call it.
        cameras: camera columns, in order.
        robot: the preset whose conventions are applied to states and actions, or None for none.
        chunk_column: the column of stored action chunks, or None where chunks are cut from consecutive steps.
        stored_chunk_size: actions in a stored chunk, or None.
    """

    name: str
    where: str
    cameras: tuple[str, ...]
    robot: RobotPreset | None
    chunk_column: str | None = None
    stored_chunk_size: int | None = None

    @cached_property
    def table(self) -> EpisodeTable:
        """States, actions and instructions of all episodes; read on first use."""
        return self._load_table()

    @abstractmethod
    def _load_table(self) -> EpisodeTable: ...

    @abstractmethod
    def content_digest(self) -> str:
        """A hash of the content that states and actions are read from, without decoding it."""

    @abstractmethod
    def read_images(self, position: int, frame: int) -> list[np.ndarray]:
        """Frames of all cameras at one step: uint8 (height, width, 3) each, as their own format decodes them.

        Args:
            position: place of the episode in `table`.
            frame: step within the episode.

        Raises:
            ValueError: a frame that is missing or cannot be decoded. The caller adds episode and frame.
        """

    def frames_are_jpeg(self) -> bool:
        """Whether camera frames were recorded as JPEG, going by the first one.

        A model trained on such frames wants its camera's frames to go through JPEG at inference too.
        """
        return False

    def frame_problems(self) -> dict[int, BadEpisode]:
        """By position, episodes whose camera frames are known to be missing. Their numbers may still be good."""
        return {}

    def prepare_images(self) -> None:  # noqa: B027 - most formats need nothing
        """Do once what makes frames quick to read, before workers are started."""

    def positions_of_split(self, split: str) -> list[int]:
        """Positions of the episodes of a split that the dataset itself declares.

        Raises:
            ValueError: it declares no split of that name.
        """
        raise ValueError(f"{self.where}: split={split!r} does not exist; this dataset declares no splits")

    def fingerprint(self) -> str:
        """A hash of everything that statistics depend on: the content and the conventions applied to it."""
        # Presets are frozen dataclasses of plain values, their repr is the convention.
        described = json.dumps([self.content_digest(), repr(self.robot)])
        return hashlib.blake2b(described.encode(), digest_size=20).hexdigest()
