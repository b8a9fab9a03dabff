"""An observation to try a model with."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vla_adapter_hf.checkpoints.embedded import embedded_folder
from vla_adapter_hf.checkpoints.saving import synthetic_observation
from vla_adapter_hf.modeling.configuration_vla_adapter import VLAAdapterConfig


@dataclass(frozen=True)
class ExampleObservation:
    """Frames by camera name, uint8 `(height, width, 3)`; the instruction; the state `(proprio_dim,)`, float64."""

    images: dict[str, np.ndarray]
    instruction: str
    state: np.ndarray


def example_observation(config: VLAAdapterConfig) -> ExampleObservation:
    """The recorded LIBERO observation that ships with the package, for models that it fits; made-up frames for others."""
    with embedded_folder() as folder, np.load(folder / "observation.npz") as recorded:
        if config.num_cameras == 2 and config.proprio_dim == len(recorded["state"]):
            frames = (recorded["full_image"], recorded["wrist_image"])
            images = dict(zip(config.cameras, frames, strict=True))
            return ExampleObservation(images, str(recorded["instruction"]), recorded["state"].astype(np.float64))
    made_up = synthetic_observation(config)
    images = dict(zip(config.cameras, made_up["images"], strict=True))
    return ExampleObservation(images, made_up["text"], np.asarray(made_up["state"], np.float64))
