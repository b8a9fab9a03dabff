"""Several datasets in one, each with its own statistics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from vla_adapter_hf.data.dataset import VLAAdapterDataset


class VLAAdapterMixture(torch.utils.data.Dataset):
    """Draws every sample from one of several datasets, with probability weight x number of transitions.

    The draws depend on seed and epoch only. No sample of a dataset is drawn twice before all were drawn once. Samples
    keep their dataset's `unnorm_key`, and `norm_stats` holds the statistics of all datasets.

    Args:
        datasets: datasets of the same chunk length, action size, state size and number of cameras.
        weights: one per dataset, multiplied by its number of transitions; 1 by default.
        num_samples: samples per epoch; by default those of all datasets together.
        seed: decides the draws.

    Raises:
        ValueError: weights that do not fit, datasets that do not fit together, two with the same statistics key.
    """

    def __init__(
        self,
        datasets: Sequence[VLAAdapterDataset],
        weights: Sequence[float] | None = None,
        num_samples: int | None = None,
        seed: int = 0,
    ) -> None:
        self.datasets = list(datasets)
        if not self.datasets:
            raise ValueError("a mixture of no datasets; give at least one")
        weights = [1.0] * len(self.datasets) if weights is None else [float(weight) for weight in weights]
        if len(weights) != len(self.datasets):
            raise ValueError(f"{len(weights)} weights for {len(self.datasets)} datasets; give one for each")
        if not all(np.isfinite(weight) and weight >= 0 for weight in weights) or sum(weights) == 0:
            raise ValueError(f"weights={weights}; expected numbers that are not negative and not all zero")
        for field in ("chunk_size", "action_dim", "state_dim"):
            self._check_same(field, [getattr(dataset, field) for dataset in self.datasets])
        self._check_same("number of cameras", [len(dataset.cameras) for dataset in self.datasets])
        keys = [dataset.unnorm_key for dataset in self.datasets]
        if len(set(keys)) != len(keys):
            raise ValueError(
                f"statistics keys {keys} are not distinct; in Python give each dataset its own unnorm_key=, on the "
                "command line rename a folder"
            )
        expected = np.array(weights) * [dataset.num_transitions for dataset in self.datasets]
        self.probabilities = expected / expected.sum()
        self.weights = weights
        self.num_samples = sum(map(len, self.datasets)) if num_samples is None else num_samples
        if self.num_samples < 1:
            raise ValueError(f"num_samples={num_samples}; expected at least one sample per epoch")
        self.seed = seed
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._plan: tuple[int, np.ndarray, np.ndarray] | None = None

    def _check_same(self, field: str, values: list[int]) -> None:
        if len(set(values)) > 1:
            listed = ", ".join(f"{d.unnorm_key}: {value}" for d, value in zip(self.datasets, values, strict=True))
            raise ValueError(f"datasets of a mixture differ in {field} ({listed}); one model needs one")

    def __len__(self) -> int:
        return self.num_samples

    def _planned(self) -> tuple[np.ndarray, np.ndarray]:
        """Which dataset and which of its samples each index stands for, in the current epoch."""
        epoch = self.epoch
        if self._plan is None or self._plan[0] != epoch:
            rng = np.random.default_rng((self.seed, epoch))
            chosen = rng.choice(len(self.datasets), self.num_samples, p=self.probabilities).astype(np.int32)
            samples = np.zeros(self.num_samples, np.int64)
            for number, dataset in enumerate(self.datasets):
                places = np.flatnonzero(chosen == number)
                rounds = -(-len(places) // len(dataset))
                order = [rng.permutation(len(dataset)) for _ in range(rounds)]
                samples[places] = np.concatenate(order)[: len(places)] if order else []
            self._plan = (epoch, chosen, samples)
        return self._plan[1:]

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        index = int(index) % len(self)
        chosen, samples = self._planned()
        # The index in the mixture decides the augmentation, so a sample that is drawn twice looks different.
        return self.datasets[chosen[index]].get(int(samples[index]), draw_index=index)

    @property
    def epoch(self) -> int:
        """The epoch that is drawn for."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Draw for another epoch from now on; reaches running workers too."""
        self._epoch.fill_(int(epoch))
        for dataset in self.datasets:
            dataset.set_epoch(epoch)

    @property
    def norm_stats(self) -> dict[str, dict[str, Any]]:
        """The statistics of all datasets by their keys."""
        merged: dict[str, dict[str, Any]] = {}
        for dataset in self.datasets:
            merged.update(dataset.norm_stats)
        return merged

    @property
    def chunk_size(self) -> int:
        """Actions per sample (K)."""
        return self.datasets[0].chunk_size

    @property
    def action_dim(self) -> int:
        """Size of an action (A)."""
        return self.datasets[0].action_dim

    @property
    def state_dim(self) -> int:
        """Size of the proprio state (S)."""
        return self.datasets[0].state_dim

    @property
    def cameras(self) -> tuple[str, ...]:
        """Camera columns of the first dataset; the others have as many."""
        return self.datasets[0].cameras

    @property
    def num_transitions(self) -> int:
        """Steps of all datasets together."""
        return sum(dataset.num_transitions for dataset in self.datasets)
