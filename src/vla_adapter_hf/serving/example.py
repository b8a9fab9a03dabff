"""An observation to try a model with."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vla_adapter_hf.checkpoints.saving import synthetic_observation
from vla_adapter_hf.modeling.configuration_vla_adapter import VLAAdapterConfig
from vla_adapter_hf.modeling.normalization_vla_adapter import find_out_of_range
from vla_adapter_hf.recording.played_episode import embedded_episode


@dataclass(frozen=True)
class ExampleObservation:
    """Frames by camera name, uint8 `(height, width, 3)`; the instruction; the state `(proprio_dim,)`, float64."""

    images: dict[str, np.ndarray]
    instruction: str
    state: np.ndarray


def example_observation(config: VLAAdapterConfig) -> ExampleObservation:
    """The first observation of the embedded LIBERO episode, for models that it fits; made-up frames for others.

    It fits a model of two cameras whose states have as many values and the same units.
    """
    episode = embedded_episode()
    state = episode.states[:1]
    fits_in_size = config.num_cameras == 2 and config.proprio_dim == state.shape[1]
    if fits_in_size and not any(find_out_of_range(state, stats["proprio"]) for stats in config.norm_stats.values()):
        images = dict(zip(config.cameras, episode.frames[0], strict=True))
        return ExampleObservation(images, episode.instruction, episode.states[0])
    made_up = synthetic_observation(config)
    images = dict(zip(config.cameras, made_up["images"], strict=True))
    return ExampleObservation(images, made_up["text"], np.asarray(made_up["state"], np.float64))
