"""Checkpoints in LeRobot's layout, opened like all others."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from vla_adapter_hf.checkpoints.files import open_safetensors
from vla_adapter_hf.checkpoints.lerobot.layout import POLICY_TYPE, STATE_FILE, unpack_files
from vla_adapter_hf.checkpoints.own import OwnCheckpoint
from vla_adapter_hf.checkpoints.source import FolderFiles, HubFiles
from vla_adapter_hf.modeling.configuration_vla_adapter import VLAAdapterConfig
from vla_adapter_hf.processing.processing_vla_adapter import VLAAdapterProcessor


class LeRobotCheckpoint(OwnCheckpoint):
    """What `lerobot-train` or `vla-adapter to-lerobot` wrote. The weights' files are those of our own layout.

    Attributes:
        policy (`dict`): the content of LeRobot's `config.json`.
    """

    layout = "lerobot"
    policy: dict[str, Any]

    @classmethod
    def open(cls, files: FolderFiles | HubFiles, stored: dict[str, Any], fields: dict[str, Any]) -> LeRobotCheckpoint:
        """Read the model's configuration from LeRobot's, with some fields replaced.

        Raises:
            ValueError: when it holds none.
        """
        model = stored.get("model")
        if not isinstance(model, dict):
            raise ValueError(
                f"config.json of {files.source} must hold the model's configuration under 'model', got {model!r}. "
                "lerobot-train and `vla-adapter to-lerobot` write it."
            )
        checkpoint = cls(files, VLAAdapterConfig.from_dict(dict(model), name_or_path=files.source, **fields))
        checkpoint.policy = stored
        return checkpoint

    def load_processor(self, **options: Any) -> VLAAdapterProcessor:
        with tempfile.TemporaryDirectory() as folder:
            unpack_files(self.processor_files(), Path(folder))
            return VLAAdapterProcessor.from_pretrained(folder, **options, trust_remote_code=False)

    def processor_files(self) -> dict[str, torch.Tensor]:
        """The processor's files as tensors of bytes, by name.

        Raises:
            ValueError: when their file is missing or damaged.
        """
        if STATE_FILE not in self.files.names:
            raise ValueError(f"{self.files.title} has no {STATE_FILE}, which holds the processor.")
        path = self.files.path(STATE_FILE)
        open_safetensors(path)  # names a damaged file
        return load_file(path)


def is_lerobot(stored: dict[str, Any]) -> bool:
    """Whether a `config.json` is that of this policy in LeRobot."""
    return stored.get("model_type") is None and stored.get("type") == POLICY_TYPE
