"""What every checkpoint offers, whatever its layout."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from vla_adapter_hf.checkpoints.files import Shapes
from vla_adapter_hf.checkpoints.source import FolderFiles, HubFiles
from vla_adapter_hf.modeling.configuration_vla_adapter import VLAAdapterConfig
from vla_adapter_hf.modeling.modeling_vla_adapter import VLAAdapterForActionPrediction
from vla_adapter_hf.processing.processing_vla_adapter import VLAAdapterProcessor


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


@dataclass
class Checkpoint(ABC):
    """A checkpoint whose configuration has been read. All that it loads is of one revision.

    Args:
        files ([`FolderFiles`] or [`HubFiles`]): where it is.
        config ([`VLAAdapterConfig`]): with the norm stats, and with the fields that the caller replaced.
    """

    files: FolderFiles | HubFiles
    config: VLAAdapterConfig
    layout: ClassVar[str]

    @property
    def source(self) -> str:
        """The folder or Hub id."""
        return self.files.source

    @property
    def commit(self) -> str | None:
        """The commit on the Hub; `None` for a folder."""
        return self.files.commit

    @abstractmethod
    def load_processor(self, **options: Any) -> VLAAdapterProcessor:
        """The processor, with options of the processor, the images and the tokenizer replaced.

        Raises:
            ValueError, OSError: when its files are missing or damaged; the message names the file.
        """

    def load_model(
        self, dtype: torch.dtype | str | None = None, device: torch.device | str | None = None, **options: Any
    ) -> VLAAdapterForActionPrediction:
        """The model, in evaluation mode.

        Args:
            dtype (`torch.dtype` or `str`, *optional*): such as `"bfloat16"`; that of the files by default.
            device (`torch.device` or `str`, *optional*): where to move it.
            options: as in `from_pretrained`, e.g. `ignore_mismatched_sizes`, `attn_implementation`, `device_map`.

        Raises:
            ValueError: for an unknown precision, and when the weights are damaged or do not fill the model; the
                message names the file or the tensors.
        """
        given = {name: value for name, value in options.items() if value is not None}
        model = self._load(VLAAdapterForActionPrediction, dtype=check_dtype(dtype), **given)
        return model if device is None else model.to(device)

    @abstractmethod
    def _load(self, model_class: type[VLAAdapterForActionPrediction], **options: Any) -> Any:
        """What `model_class.from_pretrained` returns."""

    @abstractmethod
    def tensor_shapes(self) -> Shapes:
        """Shapes of the weights under the names of our files. Only the files' headers are read.

        Raises:
            ValueError: when a file is missing or damaged.
        """

    @abstractmethod
    def check(self) -> None:
        """Compare the files' headers and sizes with the configuration, without loading weights.

        Raises:
            ValueError: when the weights are incomplete, damaged or those of another model.
        """


def check_dtype(dtype: torch.dtype | str | None, argument: str = "dtype") -> torch.dtype | str | None:
    """The precision that a name stands for; `None` and `"auto"` pass.

    Raises:
        ValueError: for a name that is not known.
    """
    if dtype is None or dtype == "auto" or isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise ValueError(f"{argument} must be one of {', '.join(DTYPES)} or auto, got {dtype!r}.")
    return DTYPES[dtype]
