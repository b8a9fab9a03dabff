"""Where a model is to compute, checked before anything is loaded."""

from __future__ import annotations

import torch


def check_device(device: str, name: str = "device") -> torch.device:
    """A device that is there.

    Args:
        device (`str`): such as `"cpu"`, `"cuda"` or `"cuda:1"`.
        name (`str`): what to call it in messages.

    Raises:
        ValueError: torch knows no such device, or does not find it here.
    """
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"{name} must be cpu, cuda or the like, got {device!r}.") from error
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"{name} {device}: torch finds {torch.cuda.device_count()} CUDA devices here.")
    return place
