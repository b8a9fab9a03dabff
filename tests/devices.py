"""The devices that tests run on: the CPU always, a GPU where there is one (`pytest -m gpu` runs only those)."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch


NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")


def on_gpu(*values: Any) -> Any:
    """Values of a test's parameters that need a GPU."""
    return pytest.param(*values, marks=[pytest.mark.gpu, NO_GPU])


CUDA = on_gpu("cuda")
DEVICES = ["cpu", CUDA]


@contextmanager
def exact_float32() -> Iterator[None]:
    """Float32 products and convolutions of CUDA in float32.

    By default cuDNN rounds the operands of a convolution to TF32, which has ten bits.
    """
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def move(inputs: dict[str, Any], device: str | torch.device, dtype: torch.dtype | None = None) -> dict[str, Any]:
    """Tensors of `inputs` on a device; those of floating point in `dtype`, if it is given."""
    return {
        name: value.to(device, dtype if value.is_floating_point() else None)
        if isinstance(value, torch.Tensor)
        else value
        for name, value in inputs.items()
    }
