"""Random access to a dataset: its reader, the numbers of all episodes, and where each camera frame is."""

from __future__ import annotations

import hashlib
import json
import os
from abc import ABC, abstractmethod
from functools import cached_property

import numpy as np

from vla_adapter_hf.data.columns import Columns
from vla_adapter_hf.data.episodes import BadEpisode, Episode, EpisodeTable
from vla_adapter_hf.data.reader import DemonstrationReader, index_episodes


class DemonstrationSource(ABC):
    """Recorded episodes in one format with random access, with the cameras in the order the model will see them.

    Args:
        reader: the dataset.
        cache_dir: where indices and unpacked frames are kept; see `storage.cache_directory`.
        progress: show progress bars; by default where standard error is a terminal.

    Attributes:
        name, where, columns: those of the reader.
    """

    def __init__(
        self, reader: DemonstrationReader, cache_dir: str | os.PathLike | None = None, progress: bool | None = None
    ) -> None:
        self.reader = reader
        self.name: str = reader.name
        self.where: str = reader.where
        self.columns: Columns = reader.columns
        self.cache_dir = cache_dir
        self.progress = progress

    @cached_property
    def table(self) -> EpisodeTable:
        """States, actions and instructions of all episodes; read on first use."""
        return self._load_table()

    def _load_table(self) -> EpisodeTable:
        return index_episodes(self.reader, self.progress, self._take)

    @abstractmethod
    def _take(self, shard: int, episode: Episode | BadEpisode) -> None:
        """Note where the frames of the next episode are, while the table is made."""

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

    @abstractmethod
    def frames_are_jpeg(self) -> bool:
        """Whether camera frames were recorded as JPEG, judged by the first one.

        A model trained on such frames needs its camera's frames to go through JPEG at inference too.
        """

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
        # Presets are frozen dataclasses of plain values, so their repr is the convention.
        described = json.dumps([self.content_digest(), repr(self.columns.robot)])
        return hashlib.blake2b(described.encode(), digest_size=20).hexdigest()
