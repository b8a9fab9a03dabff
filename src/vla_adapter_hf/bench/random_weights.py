"""Checkpoints of random weights, to measure sizes of which no weights are at hand."""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from vla_adapter_hf.checkpoints.backbones import load_tokenizer
from vla_adapter_hf.checkpoints.embedded import embedded_folder
from vla_adapter_hf.checkpoints.open import open_checkpoint
from vla_adapter_hf.init.untrained import init_from_config
from vla_adapter_hf.modeling.configuration_vla_adapter import (
    PUBLISHED_DINOV2,
    PUBLISHED_QWEN2,
    PUBLISHED_SIGLIP,
    VLAAdapterConfig,
)


SMALL_TOWER = {"hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "patch_size": 14}
# Fields of the configuration that differ from the published size.
SIZES: dict[str, dict[str, Any]] = {
    "full": {},
    # Three of the published layers of each kind: the same speed per layer in an eighth of the time.
    "shallow": {
        "dinov2_config": {**PUBLISHED_DINOV2, "num_hidden_layers": 3},
        "siglip_config": {**PUBLISHED_SIGLIP, "num_hidden_layers": 3},
        "text_config": {**PUBLISHED_QWEN2, "num_hidden_layers": 3, "vocab_size": 1024},
        "policy_num_layers": 3,
    },
    "small": {
        "dinov2_config": SMALL_TOWER,
        "siglip_config": {**SMALL_TOWER, "intermediate_size": 256, "vision_use_head": False},
        "text_config": {
            "hidden_size": 128,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 256,
        },
        "policy_num_layers": 4,
    },
}


@contextmanager
def random_checkpoint(size: str, dtype: torch.dtype, device: str | torch.device = "cpu") -> Iterator[Path]:
    """A temporary folder with a checkpoint of random weights of one of `SIZES`, removed when the context ends.

    The weights are drawn on `device`. A GPU draws those of the published size in seconds.
    """
    with tempfile.TemporaryDirectory(prefix="vla-adapter-bench-") as folder:
        # In a process of its own: the memory that making the weights takes must not count as the prediction's.
        writer = multiprocessing.get_context("spawn").Process(
            target=write_random, args=(folder, size, dtype, str(device))
        )
        writer.start()
        writer.join()
        if writer.exitcode:
            raise RuntimeError(f"writing random weights ended with exit code {writer.exitcode}.")
        yield Path(folder)


def write_random(folder: str, size: str, dtype: torch.dtype, device: str = "cpu") -> None:
    """Write a checkpoint of random weights of one of `SIZES`."""
    with embedded_folder() as embedded:
        tokenizer = load_tokenizer(str(embedded / "tokenizer"))
        norm_stats = open_checkpoint(embedded / "checkpoint").config.norm_stats
    config = VLAAdapterConfig(**SIZES[size], norm_stats=norm_stats, dtype=dtype)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model, processor = init_from_config(config, tokenizer)
    finally:
        torch.set_default_dtype(before)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
