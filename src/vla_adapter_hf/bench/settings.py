"""What `vla-adapter bench` measures, checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from vla_adapter_hf.bench.random_weights import SIZES
from vla_adapter_hf.checkpoints.quantization import quantization_config
from vla_adapter_hf.utils.devices import check_device


@dataclass(frozen=True, kw_only=True)
class BenchSettings:
    """Which model is measured, and how.

    Args:
        checkpoint (`str`, *optional*): folder or Hub id; by default the small one that ships with the package.
        size (`str`, *optional*): random weights instead of a checkpoint: `"full"`, the published size; `"shallow"`,
            three of its layers of each kind; or `"small"`.
        dtype (`torch.dtype`, *optional*): precision; by default the checkpoint's, for random weights bfloat16.
        device (`str`): `"cpu"`, `"cuda"`, `"cuda:1"`, ...
        threads (`int`, *optional*): threads of the CPU; by default torch's choice.
        batch_sizes (`tuple[int, ...]`): how many observations are predicted at once.
        runs (`int`): predictions that count, for every figure.
        warmup (`int`): predictions before them that do not count.
        compiled (`bool`): measure whole predictions after `compile_for_inference`. Stages, loading and memory are
            always measured without it. Operations are counted for the prompt without padding.
        quantize (`str`, *optional*): `"int8"` or `"int4"`, see [`quantization_config`].
        attention (`str` or `Mapping[str, str]`, *optional*): transformers' `attn_implementation`: one for all, or one
            each for `dinov2_config`, `siglip_config` and `text_config`.
        busy (`int`): other processes that compute while predictions are measured.

    Raises:
        ValueError: for arguments that contradict each other, a number out of range, or a device that is not there.
    """

    checkpoint: str | None = None
    size: str | None = None
    dtype: torch.dtype | None = None
    device: str = "cpu"
    threads: int | None = None
    batch_sizes: tuple[int, ...] = (1,)
    runs: int = 10
    warmup: int = 2
    compiled: bool = False
    quantize: str | None = None
    attention: str | Mapping[str, str] | None = None
    busy: int = 0

    def __post_init__(self) -> None:
        if self.checkpoint is not None and self.size is not None:
            raise ValueError(f"give either a checkpoint ({self.checkpoint}) or --size {self.size}, not both.")
        if self.size is not None and self.size not in SIZES:
            raise ValueError(f"--size must be one of {', '.join(SIZES)}, got {self.size!r}.")
        limits = [("runs", self.runs, 1), ("warmup", self.warmup, 0), ("busy", self.busy, 0)]
        limits += [("batch", batch_size, 1) for batch_size in self.batch_sizes]
        limits += [] if self.threads is None else [("threads", self.threads, 1)]
        for option, value, least in limits:
            if value < least:
                raise ValueError(f"--{option} must be at least {least}, got {value}.")
        if self.torch_device.type not in ("cpu", "cuda"):
            raise ValueError(f"--device must be cpu or cuda, got {self.device!r}.")

    @property
    def torch_device(self) -> torch.device:
        return check_device(self.device, "--device")

    @property
    def name(self) -> str:
        """How the report calls the model."""
        return self.checkpoint or (f"random weights, {self.size}" if self.size else "embedded")

    def load_options(self) -> dict[str, Any]:
        """Arguments of [`Checkpoint.load_model`].

        Raises:
            ValueError: for a quantisation that does not exist or that the device cannot compute.
        """
        device = self.torch_device
        options: dict[str, Any] = {} if self.dtype is None else {"dtype": self.dtype}
        if self.attention is not None:
            options["attn_implementation"] = self.attention
        if self.quantize is None:
            return options
        if device.type == "cuda":  # torchao packs weights on the device that they are for
            options["device_map"] = {"": str(device)}
            if self.quantize == "int4" and options.setdefault("dtype", torch.bfloat16) != torch.bfloat16:
                raise ValueError(f"--quantize int4 on CUDA computes in bfloat16 only, got --dtype {self.dtype}.")
        return options | {"quantization_config": quantization_config(self.quantize, device)}
