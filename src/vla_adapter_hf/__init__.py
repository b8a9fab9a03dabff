"""VLA-Adapter for transformers. Importing the package extends `AutoModel`, `AutoProcessor` and `AutoConfig`."""

import vla_adapter_hf._passive_waiting  # noqa: F401, isort: skip

from contextlib import suppress
from importlib import import_module
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoProcessor

from vla_adapter_hf._version import __version__
from vla_adapter_hf.checkpoints.auto import (
    ExportedLayout,
    ExportedModelLoader,
    ExportedVLAAdapterConfig,
    PrismaticProcessor,
    PublishedLayout,
    PublishedModel,
    PublishedVLAAdapterConfig,
)
from vla_adapter_hf.checkpoints.open import open_checkpoint
from vla_adapter_hf.modeling.configuration_vla_adapter import OTHER_LAYOUTS, VLAAdapterConfig
from vla_adapter_hf.modeling.modeling_vla_adapter import VLAAdapterForActionPrediction, VLAAdapterOutput
from vla_adapter_hf.processing.image_processing_vla_adapter import VLAAdapterImageProcessor
from vla_adapter_hf.processing.processing_vla_adapter import VLAAdapterProcessor
from vla_adapter_hf.robots import ROBOTS, RobotPreset, get_robot


if TYPE_CHECKING:  # so that type checkers know what `__getattr__` returns
    from vla_adapter_hf.checkpoints.quantization import quantization_config
    from vla_adapter_hf.data import (
        ImageAugmentation,
        ImageResize,
        VLAAdapterDataset,
        VLAAdapterMixture,
        VLAAdapterStreamingDataset,
    )
    from vla_adapter_hf.training.collator import VLAAdapterDataCollator
    from vla_adapter_hf.training.metrics import make_compute_metrics
    from vla_adapter_hf.training.presets import apply_preset, merge_lora
    from vla_adapter_hf.training.trainer import CheckpointCallback, VLAAdapterTrainer, VLAAdapterTrainingArguments


def _register() -> None:
    OTHER_LAYOUTS[PublishedVLAAdapterConfig.model_type] = PublishedLayout()
    OTHER_LAYOUTS[ExportedVLAAdapterConfig.model_type] = ExportedLayout()
    AutoConfig.register(VLAAdapterConfig.model_type, VLAAdapterConfig, exist_ok=True)
    AutoConfig.register(PublishedVLAAdapterConfig.model_type, PublishedVLAAdapterConfig, exist_ok=True)
    AutoModel.register(VLAAdapterConfig, VLAAdapterForActionPrediction, exist_ok=True)
    AutoModel.register(PublishedVLAAdapterConfig, PublishedModel, exist_ok=True)
    AutoConfig.register(ExportedVLAAdapterConfig.model_type, ExportedVLAAdapterConfig, exist_ok=True)
    AutoModel.register(ExportedVLAAdapterConfig, ExportedModelLoader, exist_ok=True)
    AutoProcessor.register(VLAAdapterConfig, VLAAdapterProcessor, exist_ok=True)
    AutoProcessor.register(PublishedVLAAdapterConfig, PrismaticProcessor, exist_ok=True)
    # In older releases, AutoImageProcessor needs torchvision. The processor does not need AutoImageProcessor.
    with suppress(ImportError):
        AutoImageProcessor.register(
            VLAAdapterConfig, image_processor_classes={"pil": VLAAdapterImageProcessor}, exist_ok=True
        )
    # With these, save_pretrained copies the code of modeling/ and processing/ into the checkpoint.
    VLAAdapterConfig.register_for_auto_class()
    VLAAdapterForActionPrediction.register_for_auto_class("AutoModel")
    VLAAdapterImageProcessor.register_for_auto_class()
    VLAAdapterProcessor.register_for_auto_class()


_register()

# Imported on first use: they bring the Trainer and datasets with them, which prediction does without.
_ON_FIRST_USE = {
    "ImageAugmentation": "vla_adapter_hf.data",
    "ImageResize": "vla_adapter_hf.data",
    "VLAAdapterDataset": "vla_adapter_hf.data",
    "VLAAdapterMixture": "vla_adapter_hf.data",
    "VLAAdapterStreamingDataset": "vla_adapter_hf.data",
    "VLAAdapterDataCollator": "vla_adapter_hf.training.collator",
    "quantization_config": "vla_adapter_hf.checkpoints.quantization",
    "CheckpointCallback": "vla_adapter_hf.training.checkpoints",
    "VLAAdapterTrainer": "vla_adapter_hf.training.trainer",
    "VLAAdapterTrainingArguments": "vla_adapter_hf.training.trainer",
    "apply_preset": "vla_adapter_hf.training.presets",
    "merge_lora": "vla_adapter_hf.training.presets",
    "make_compute_metrics": "vla_adapter_hf.training.metrics",
}


def __getattr__(name: str) -> Any:
    if name not in _ON_FIRST_USE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_ON_FIRST_USE[name]), name)


__all__ = [
    "CheckpointCallback",
    "ImageAugmentation",
    "ImageResize",
    "ROBOTS",
    "RobotPreset",
    "VLAAdapterConfig",
    "VLAAdapterDataCollator",
    "VLAAdapterDataset",
    "VLAAdapterForActionPrediction",
    "VLAAdapterImageProcessor",
    "VLAAdapterMixture",
    "VLAAdapterOutput",
    "VLAAdapterProcessor",
    "VLAAdapterStreamingDataset",
    "VLAAdapterTrainer",
    "VLAAdapterTrainingArguments",
    "__version__",
    "apply_preset",
    "get_robot",
    "make_compute_metrics",
    "merge_lora",
    "open_checkpoint",
    "quantization_config",
]
