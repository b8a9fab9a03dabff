"""What is measured: a checkpoint's model and processor, and observations for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import cycle, islice
from typing import Any, NamedTuple

import numpy as np
import torch
from huggingface_hub import snapshot_download

from vla_adapter_hf.bench.measures import time_calls
from vla_adapter_hf.bench.random_weights import random_checkpoint
from vla_adapter_hf.bench.settings import BenchSettings
from vla_adapter_hf.checkpoints.attention import choose_attention
from vla_adapter_hf.checkpoints.embedded import embedded_folder
from vla_adapter_hf.checkpoints.exported import ExportedModel
from vla_adapter_hf.checkpoints.open import open_checkpoint
from vla_adapter_hf.checkpoints.saving import synthetic_observation
from vla_adapter_hf.modeling.configuration_vla_adapter import VLAAdapterConfig
from vla_adapter_hf.recording.played_episode import embedded_episode


class Subject(NamedTuple):
    """What is measured."""

    model: Any
    processor: Any
    device: torch.device

    @property
    def exported(self) -> bool:
        """Whether another engine than torch computes."""
        return isinstance(self.model, ExportedModel)

    @property
    def matmul_dtype(self) -> torch.dtype:
        """The precision of the matrix product that the model is compared with."""
        if self.exported:
            return torch.float32 if self.model.record["precision"] == "fp32" else torch.bfloat16
        return self.model.dtype

    def inputs(self, batch_size: int = 1) -> dict[str, Any]:
        """Arguments of `predict_action`."""
        key = next(iter(self.model.config.norm_stats or {}), None)
        return {**self.processor(**observations(self.model.config, batch_size)), "unnorm_key": key}

    def prediction(self, batch_size: int = 1) -> Callable[[], Any]:
        """A prediction to call without arguments, with inputs that are prepared once."""
        inputs = self.inputs(batch_size)
        return lambda: self.model.predict_action(**inputs)


@contextmanager
def checkpoint_source(settings: BenchSettings, report_progress: Callable[[str], None]) -> Iterator[str]:
    """The folder of the checkpoint to measure; the CPU's threads are set."""
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    if settings.size is not None:
        report_progress(f"Writing random weights, {settings.size} size")
        with random_checkpoint(settings.size, settings.dtype or torch.bfloat16, settings.torch_device) as folder:
            yield str(folder)
    elif settings.checkpoint is None:
        with embedded_folder() as folder:
            yield str(folder / "checkpoint")
    else:
        commit = open_checkpoint(settings.checkpoint).commit
        # A download must not count as loading.
        yield settings.checkpoint if commit is None else snapshot_download(settings.checkpoint, revision=commit)


def load_subject(source: str, settings: BenchSettings, load_options: dict[str, Any]) -> tuple[Subject, float]:
    """The model with its processor, and the seconds that loading the model took."""
    device = settings.torch_device
    loaded: list[Any] = []
    checkpoint = open_checkpoint(source)

    def load() -> None:
        loaded.append(checkpoint.load_model(device=None if "device_map" in load_options else device, **load_options))

    (seconds,) = time_calls(load, device, 0, 1)
    if settings.attention is None and not settings.compiled:
        choose_attention(loaded[0])
    return Subject(loaded[0], checkpoint.load_processor(), device), seconds


def observations(config: VLAAdapterConfig, batch_size: int) -> dict[str, Any]:
    """Recorded frames, as many as the model has cameras; state and instruction of the right sizes."""
    one = synthetic_observation(config)
    frames = list(islice(cycle(embedded_episode().frames[0]), config.num_cameras))
    return {
        "images": [frames] * batch_size,
        "text": [one["text"]] * batch_size,
        "state": np.stack([one["state"]] * batch_size),
    }
