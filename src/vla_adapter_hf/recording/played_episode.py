"""One episode with everything that `vla-adapter demo` draws. Demonstrations to train on are LeRobot datasets."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vla_adapter_hf.checkpoints.embedded import embedded_folder
from vla_adapter_hf.recording.settings import CAMERA_COLUMNS
from vla_adapter_hf.utils.files import atomic_path, write_bytes, write_json
from vla_adapter_hf.utils.frames import encode_image


@dataclass(frozen=True)
class PlayedEpisode:
    """An episode of n steps, seen by the policy every `chunk_size` steps.

    Attributes:
        instruction: what the robot is asked to do.
        source: what the episode is and how it was recorded, as JSON values.
        steps: (k,) the steps at which the policy is asked: those that begin a whole chunk.
        frames: (k, 2, 256, 256, 3) uint8, the third-person camera and the wrist camera at these steps.
        scene: (768, 768, 3) uint8, the third-person camera at the first step, sharper than the policy sees it.
        states: (k, 8) float64, the robot's state at these steps, physical units.
        actions: (n, 7) what was executed, as the environment takes it: the gripper is -1 open or +1 closed.
        positions: (n + 1, 3) the point between the fingertips before and after every step, metres.
        camera_matrix: (3, 4) of the third-person camera, see `LiberoEnvironment.camera_matrix`.
        objects: positions (3,) of all objects at the first step, metres. The one that is asked for comes first.
    """

    instruction: str
    source: dict[str, Any]
    steps: np.ndarray
    frames: np.ndarray
    scene: np.ndarray
    states: np.ndarray
    actions: np.ndarray
    positions: np.ndarray
    camera_matrix: np.ndarray
    objects: dict[str, list[float]]

    @property
    def target(self) -> str:
        return next(iter(self.objects))

    def project(self, points: np.ndarray) -> np.ndarray:
        """Points (..., 3) of the world in the third-person frame: (..., 2), fractions of its width and height."""
        seen = np.concatenate([points, np.ones((*points.shape[:-1], 1))], axis=-1) @ self.camera_matrix.T
        return seen[..., :2] / seen[..., 2:]

    def save(self, folder: str | Path) -> None:
        """Write `episode.json`, one JPEG per camera with all its frames below each other, and one of the scene."""
        values = asdict(self)
        frames, scene = values.pop("frames"), values.pop("scene")
        entries = {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in values.items()}
        with atomic_path(folder) as temporary:
            for index, name in enumerate(CAMERA_COLUMNS):
                write_bytes(temporary / f"{name}.jpg", encode_image(np.concatenate(frames[:, index]), "jpeg"))
            write_bytes(temporary / "scene.jpg", encode_image(scene, "jpeg"))
            write_json(temporary / "episode.json", entries, indent=None)

    @classmethod
    def load(cls, folder: str | Path) -> PlayedEpisode:
        """Read what `save` wrote."""
        values = json.loads((Path(folder) / "episode.json").read_text(encoding="utf-8"))
        images = {}
        for name in (*CAMERA_COLUMNS, "scene"):
            with Image.open(Path(folder) / f"{name}.jpg") as image:
                images[name] = np.asarray(image)
        frames = [np.split(images[name], len(values["steps"])) for name in CAMERA_COLUMNS]
        arrays = {name: np.array(value) for name, value in values.items() if isinstance(value, list)}
        return cls(**{**values, **arrays}, frames=np.stack(frames, axis=1), scene=images["scene"])


def embedded_episode() -> PlayedEpisode:
    """The episode that ships with the package. No checkpoint was trained on its initial state."""
    with embedded_folder() as folder:
        return PlayedEpisode.load(folder / "episode")
