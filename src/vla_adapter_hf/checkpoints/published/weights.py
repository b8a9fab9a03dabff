"""The weights of a checkpoint in the published layout, under the names of our files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from transformers.utils import logging

from vla_adapter_hf.checkpoints.files import (
    Shapes,
    as_state_dict,
    converted_tensors,
    open_safetensors,
    read_pickle,
    stored_dtypes,
)
from vla_adapter_hf.checkpoints.published.files import PublishedFiles
from vla_adapter_hf.checkpoints.published.names import (
    POLICY_NAMES,
    WITHOUT_EFFECT,
    has_effect,
    renamed,
    translate_weight,
)


logger = logging.get_logger(__name__)

StateDict = dict[str, torch.Tensor]


def translated_shapes(files: PublishedFiles) -> Shapes:
    """Shapes of all tensors that have an effect, under the names of our files. No weights are read."""

    def empty(shapes: Shapes) -> StateDict:
        return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}

    pickles = empty(files.action_head_shapes), empty(files.proprio_projector_shapes)
    tensors = _translate(empty(files.shapes).items(), files.shapes, *pickles)
    return {name: tuple(tensor.shape) for name, tensor in tensors}


def read_state_dict(files: PublishedFiles, paths: list[Path], dtype: torch.dtype | None = None) -> StateDict:
    """All tensors that have an effect, under the names of our files.

    Args:
        files ([`PublishedFiles`]): what was found.
        paths (`list[Path]`): of `files.weights`, the action head and the proprio projector, in this order.
        dtype (`torch.dtype`, *optional*): the precision; that of the files by default.
    """
    *weights, action_head, proprio_projector = paths
    converted = dtype is not None and any(stored_dtypes(path) != {dtype} for path in weights)
    tensors = converted_tensors(weights, dtype) if converted else _read_weights(weights, files.shapes)
    pickles = [as_state_dict(read_pickle(path), path.name) for path in (action_head, proprio_projector)]
    if converted:
        pickles = [{name: tensor.to(dtype) for name, tensor in part.items()} for part in pickles]
    state_dict = dict(_translate(tensors, files.shapes, *pickles))
    queries = state_dict["action_queries.weight"].float()
    if 0.0195 < queries.std() < 0.0205 and queries.mean().abs() < 0.002:
        logger.warning(
            f"{files.source}: the action queries look like they did before training (standard deviation "
            f"{queries.std():.4f}). Folders merged by the original's separate script have lost the trained ones."
        )
    return state_dict


def _read_weights(paths: list[Path], shapes: Shapes) -> Iterator[tuple[str, torch.Tensor]]:
    for path in paths:
        with open_safetensors(path) as file:
            for name in file.keys():
                if has_effect(name, shapes):
                    yield name, file.get_tensor(name)


def _translate(
    weights: Iterable[tuple[str, torch.Tensor]],
    shapes: Shapes,
    action_head: StateDict,
    proprio_projector: StateDict,
) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in weights:
        if has_effect(name, shapes):
            yield from translate_weight(name, tensor)
    for name, tensor in action_head.items():
        if not WITHOUT_EFFECT.match(name):
            yield f"policy.{renamed(name.removeprefix('model.'), POLICY_NAMES)}", tensor
    for name, tensor in proprio_projector.items():
        yield f"proprio_projector.{name}", tensor
