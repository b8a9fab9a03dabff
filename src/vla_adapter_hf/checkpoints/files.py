"""Reading files of strangers as data: none of their code is run, and a damaged file is named.

Functions that take an open file read only its header, so they also serve files on the Hub (see `source.py`).
"""

from __future__ import annotations

import json
import os
import pickle
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open


if TYPE_CHECKING:
    from vla_adapter_hf.checkpoints.source import FolderFiles, HubFiles


Shapes = dict[str, tuple[int, ...]]

ZIP_MAGIC = b"PK\x03\x04"
BLOCK_BYTES = 2**25
DTYPE_NAMES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


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


def converted_tensors(paths: Sequence[Path], dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors of safetensors files, in another precision.

    The files are opened again and again. So no more than `BLOCK_BYTES` of them, or one tensor, are in memory next to
    the result.

    Raises:
        ValueError: when a file is damaged.
    """
    for path in paths:
        with open_safetensors(path) as file:
            names = list(file.keys())
        while names:
            left = BLOCK_BYTES
            with open_safetensors(path) as file:
                while names and left > 0:
                    tensor = file.get_tensor(names[0])
                    left -= tensor.numel() * tensor.element_size()
                    yield names.pop(0), tensor.to(dtype if tensor.is_floating_point() else tensor.dtype, copy=True)
                    del tensor


def stored_dtypes(path: Path) -> set[torch.dtype | None]:
    """The precisions of a safetensors file's tensors, from its header; `None` for other types of numbers."""
    with open_safetensors(path) as file:
        return {DTYPE_NAMES.get(file.get_slice(name).get_dtype()) for name in file.keys()}


def find_weights(files: FolderFiles | HubFiles) -> list[str]:
    """The names of `model.safetensors` or, without that, of the shards. transformers has the same order.

    Raises:
        ValueError: when a file is missing, or the index of the shards is damaged.
    """
    names, source = ["model.safetensors"], files.source
    index = "model.safetensors.index.json"
    if names[0] not in files.names and index in files.names:
        weight_map = read_json(files.path(index), source).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{index} of {source} must hold a weight_map of files, got {weight_map!r}.")
        for name in weight_map.values():
            if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
                raise ValueError(f"{index} of {source} names {name!r}, which is no .safetensors file of its folder.")
        names = sorted(set(weight_map.values()))
    missing = [name for name in names if name not in files.names]
    if missing:
        raise ValueError(f"{files.title} has no {', '.join(missing)}.")
    return names


def read_shapes(files: FolderFiles | HubFiles, names: list[str], read: Any) -> Shapes:
    """Shapes of the tensors in several files, read by [`safetensors_shapes`] or [`pickle_shapes`]."""
    shapes: Shapes = {}
    for name in names:
        with files.open(name) as file:
            shapes.update(read(file, name))
    return shapes


def safetensors_shapes(file: BinaryIO, name: str) -> Shapes:
    """Names and shapes of the tensors in a safetensors file, from its header.

    Raises:
        ValueError: when the header is damaged, or the file has another size than the header says.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    try:
        if not 2 <= length <= size - 8:
            raise ValueError(f"its header has {length} bytes, the file {size}")
        header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        shapes = {tensor: tuple(entry["shape"]) for tensor, entry in header.items()}
        expected = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if size != expected:
            raise ValueError(f"it has {size} bytes and should have {expected}")
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise ValueError(f"{name} is damaged or cut short ({error}); download it again.") from error
    return shapes


def pickle_shapes(file: BinaryIO, name: str) -> Shapes:
    """Names and shapes of the tensors that `torch.save` wrote, without reading their values.

    Raises:
        ValueError: as [`read_pickle`] and [`as_state_dict`].
    """
    with torch.serialization.skip_data():
        content = _load_pickle(file, name, mmap=False)
    return {tensor: tuple(value.shape) for tensor, value in as_state_dict(content, name).items()}


def read_pickle(path: Path) -> Any:
    """What `torch.save` wrote, as tensors and plain containers; memory-mapped where the file's format allows.

    Raises:
        ValueError: when the file is damaged, or holds anything that would have to be executed to be read.
    """
    with open(path, "rb") as file:
        mmap = file.read(4) == ZIP_MAGIC
    return _load_pickle(path, path.name, mmap)


def _load_pickle(file: Path | BinaryIO, name: str, mmap: bool) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        # torch's message also explains how to run the code all the same, so only its finding is repeated.
        code = re.search(r"(?:GLOBAL|function) (\S+)", str(error))
        if code is None:
            raise ValueError(
                f"{name} is damaged, or no file of tensors; it was refused and nothing was run."
            ) from error
        raise ValueError(
            f"{name} holds something other than tensors ({code[1]}), which would have to be executed to be read; "
            "it was refused and nothing was run."
        ) from error
    except Exception as error:  # damaged bytes cause errors of many kinds, struct.error among them
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(f"{name} is damaged or cut short ({reason}).") from error


def as_state_dict(content: Any, what: str) -> dict[str, torch.Tensor]:
    """`content`, without the prefix that distributed training leaves on its names.

    Raises:
        ValueError: when it is not a state dict; `what` says in the message where it comes from.
    """
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise ValueError(f"{what} must hold a state dict of tensors, got {type(content).__name__}.")
    return {name.removeprefix("module."): tensor for name, tensor in content.items()}
