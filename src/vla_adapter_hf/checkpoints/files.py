"""Reading files of strangers as data: none of their code is run, and what is damaged is said in plain words."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open


def read_json(path: Path, source: str) -> dict[str, Any]:
    """The JSON object in a file of the checkpoint called `source`.

    Raises:
        ValueError: when the file is missing or damaged.
    """
    if not path.is_file():
        raise ValueError(f"{source} has no {path.name}.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path.name} of {source} is damaged: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} of {source} must hold a JSON object, got {type(content).__name__}.")
    return content


def open_safetensors(path: Path) -> Any:
    """The file, opened for reading tensor by tensor.

    Raises:
        ValueError: when it is damaged.
    """
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path.name} is damaged or cut short ({error}); download it again.") from error


def read_pickle(path: Path) -> Any:
    """What `torch.save` wrote, as tensors and plain containers; memory-mapped where the file's format allows.

    Raises:
        ValueError: when the file is damaged, or holds anything that would have to be executed to be read.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except pickle.UnpicklingError as error:
        # torch's own message goes on to say how to run the code all the same; of it only what was found is told.
        code = re.search(r"(?:GLOBAL|function) (\S+)", str(error))
        if code is None:
            raise ValueError(
                f"{path.name} is damaged, or no file of tensors; it was refused and nothing was run."
            ) from error
        raise ValueError(
            f"{path.name} holds something other than tensors ({code[1]}), which would have to be executed to be read; "
            "it was refused and nothing was run."
        ) from error
    except Exception as error:  # reading damaged bytes ends in errors of many kinds, struct.error among them
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(f"{path.name} is damaged or cut short ({reason}).") from error


def as_state_dict(content: Any, what: str) -> dict[str, torch.Tensor]:
    """`content`, without the prefix that distributed training leaves on its names.

    Raises:
        ValueError: when it is not a state dict; `what` says in the message where it comes from.
    """
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise ValueError(f"{what} must hold a state dict of tensors, got {type(content).__name__}.")
    return {name.removeprefix("module."): tensor for name, tensor in content.items()}


def _is_zip(path: Path) -> bool:
    """Whether the file has the format that can be memory-mapped; older ones are read."""
    with open(path, "rb") as file:
        return file.read(4) == b"PK\x03\x04"
