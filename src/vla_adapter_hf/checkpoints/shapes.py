"""Whether a checkpoint's tensors fill a model exactly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from vla_adapter_hf.checkpoints.files import Shapes
from vla_adapter_hf.modeling.checkpoint_names_vla_adapter import name_in_file
from vla_adapter_hf.modeling.configuration_vla_adapter import VLAAdapterConfig
from vla_adapter_hf.modeling.modeling_vla_adapter import VLAAdapterForActionPrediction


def model_shapes(config: VLAAdapterConfig) -> Shapes:
    """Names and shapes of a model's tensors, under the names of our files."""
    with torch.device("meta"):
        model = VLAAdapterForActionPrediction(config)
    return {name_in_file(name): tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def check_shapes(
    config: VLAAdapterConfig,
    tensors: Mapping[str, Any],
    source: str,
    kind: str = "a complete VLA-Adapter checkpoint",
    new_parts: tuple[str, ...] = (),
    other_shapes: bool = False,
) -> None:
    """Refuse a checkpoint that does not fill the model exactly.

    Args:
        config ([`VLAAdapterConfig`]): of the model.
        tensors (`Mapping`): tensors or shapes, under the names of our files.
        source, kind (`str`): for the message, what was read and what it should have been.
        new_parts (`tuple[str]`): beginnings of the names of parts that start from new weights.
        other_shapes (`bool`): let tensors have another shape than the model's; those start from new weights.

    Raises:
        ValueError: naming the first tensors that are missing, left over or of another shape.
    """
    found = {name: tuple(getattr(tensor, "shape", tensor)) for name, tensor in tensors.items()}
    expected = {name: shape for name, shape in model_shapes(config).items() if not name.startswith(new_parts)}
    problems = [f"{name} is missing" for name in sorted(expected.keys() - found.keys())]
    problems += [f"{name} has no place in the model" for name in sorted(found.keys() - expected.keys())]
    problems += [
        f"{name} has shape {found[name]}, expected {shape}"
        for name, shape in expected.items()
        if name in found and found[name] != shape and not other_shapes
    ]
    if problems:
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise ValueError(f"{source} is not {kind}: {'; '.join(problems[:4])}{more}.")
