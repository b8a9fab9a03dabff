"""A checksum of a model's weights, by which a retrained checkpoint of the same shape is known."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any

import torch

from vla_adapter_hf.checkpoints.exported import ExportedModel


def weights_checksum(model: Any) -> str:
    """CRC-32 of all weights in the model's precision, as `"crc32 6a212810"`. An export's is that of its files."""
    checksum = 0
    for part in _weights(model):
        checksum = zlib.crc32(part, checksum)
    return f"crc32 {checksum:08x}"


def _weights(model: Any) -> Iterator[Any]:
    """The bytes of a model's weights, in parts."""
    if isinstance(model, ExportedModel):
        yield from (path.read_bytes() for path in model.paths)
        return
    for weight in model.state_dict().values():
        is_plain = type(weight) in (torch.Tensor, torch.nn.Parameter)
        values = weight if is_plain else weight.dequantize()  # int8 and int4 have no bytes of their own
        yield values.detach().contiguous().cpu().flatten().view(torch.uint8).numpy()
