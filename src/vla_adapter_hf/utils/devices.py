"""Compute devices, checked before anything is loaded."""

from __future__ import annotations

import os

import torch


def check_device(device: str, name: str = "device") -> torch.device:
    """Returns a device that exists on this machine.

    Args:
        device (`str`): such as `"cpu"`, `"cuda"` or `"cuda:1"`.
        name (`str`): the argument's name in error messages.

    Raises:
        ValueError: torch does not know the device, or does not find it on this machine.
    """
    try:
        checked = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"{name} must be cpu, cuda or the like, got {device!r}.") from error
    if checked.type == "cuda" and (checked.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"{name} {device}: torch finds {torch.cuda.device_count()} CUDA devices on this machine.")
    return checked


def waits_passively() -> bool:
    """Whether OpenMP's threads are set to sleep while they wait. `GOMP_SPINCOUNT` counts before the policy."""
    turns = os.environ.get("GOMP_SPINCOUNT")
    if turns is not None:
        return turns.strip() == "0"
    return os.environ.get("OMP_WAIT_POLICY", "").strip().lower() == "passive"
