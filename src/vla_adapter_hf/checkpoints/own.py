"""Checkpoints in our own layout: what `save_pretrained` writes."""

from __future__ import annotations

from typing import Any

import torch
from safetensors import SafetensorError

from vla_adapter_hf.checkpoints.checkpoint import Checkpoint
from vla_adapter_hf.checkpoints.files import (
    Shapes,
    converted_tensors,
    find_weights,
    read_shapes,
    safetensors_shapes,
    stored_dtypes,
)
from vla_adapter_hf.checkpoints.shapes import check_shapes
from vla_adapter_hf.checkpoints.source import FolderFiles, HubFiles
from vla_adapter_hf.modeling.configuration_vla_adapter import VLAAdapterConfig
from vla_adapter_hf.modeling.modeling_vla_adapter import VLAAdapterForActionPrediction
from vla_adapter_hf.processing.processing_vla_adapter import VLAAdapterProcessor


class OwnCheckpoint(Checkpoint):
    """A checkpoint that transformers itself can read."""

    layout = VLAAdapterConfig.model_type

    @classmethod
    def open(cls, files: FolderFiles | HubFiles, stored: dict[str, Any], fields: dict[str, Any]) -> OwnCheckpoint:
        """Read the configuration from the content of `config.json`, with some fields replaced."""
        return cls(files, VLAAdapterConfig.from_dict(stored, name_or_path=files.source, **fields))

    def load_processor(self, **options: Any) -> VLAAdapterProcessor:
        source, hub = self.files.address
        return VLAAdapterProcessor.from_pretrained(source, **hub, **options, trust_remote_code=False)

    def _load(self, model_class: type[VLAAdapterForActionPrediction], **options: Any) -> Any:
        source, hub = self.files.address
        try:
            if (state_dict := self._converted(options)) is not None:
                source, hub, options = None, {}, options | {"state_dict": state_dict}
            loaded = model_class.from_pretrained(source, config=self.config, **hub, **options)
        except SafetensorError as error:
            self.tensor_shapes()  # names the damaged file
            raise ValueError(f"The weights of {self.source} are damaged ({error}); download them again.") from error
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.config.name_or_path = model.name_or_path = self.source
        return loaded

    def _converted(self, options: dict[str, Any]) -> dict[str, torch.Tensor] | None:
        """The weights in the precision asked for, where the files have another one.

        transformers would keep the whole file in memory next to the converted weights.
        """
        dtype = options.get("dtype")
        quantized = options.get("quantization_config") or getattr(self.config, "quantization_config", None)
        if not isinstance(dtype, torch.dtype) or quantized is not None or "device_map" in options:
            return None
        paths = self.files.paths(find_weights(self.files))
        return None if all(stored_dtypes(path) == {dtype} for path in paths) else dict(converted_tensors(paths, dtype))

    def tensor_shapes(self) -> Shapes:
        return read_shapes(self.files, find_weights(self.files), safetensors_shapes)

    def check(self) -> None:
        shapes = self.tensor_shapes()
        if getattr(self.config, "quantization_config", None) is None:  # quantized tensors have other names
            check_shapes(self.config, shapes, self.source)
