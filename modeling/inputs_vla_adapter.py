"""Checks of the model's inputs: a wrong type, shape or value is an error that names the field."""

import json
from typing import Any

import numpy as np
import torch

from .configuration_vla_adapter import VLAAdapterConfig


# Arguments that forward ignores: the collator's for metrics, and those that the Trainer, PEFT and generic code of
# transformers pass to every model.
IGNORED = {"action_scale", "action_mask", "num_items_in_batch", "return_dict", "use_cache", "task_ids"}

# Fields that older files do not have.
MAY_BE_UNKNOWN = ("prompt_style", "tokenizer_fingerprint")


def check_images(config: VLAAdapterConfig, pixel_values: torch.Tensor) -> None:
    expected = (6 * config.num_cameras, config.image_size, config.image_size)
    if pixel_values.ndim != 4 or tuple(pixel_values.shape[1:]) != expected:
        raise ValueError(
            f"pixel_values must have shape (batch, {', '.join(map(str, expected))}) for cameras {config.cameras}, "
            f"got {tuple(pixel_values.shape)}."
        )


def check_observation(config: VLAAdapterConfig, input_ids: Any, attention_mask: Any, pixel_values: Any) -> None:
    """Check types and shapes of what `forward` and `predict_action` both take."""
    if pixel_values is None:
        raise ValueError("pixel_values is missing: the model needs the processor's images.")
    values = {"input_ids": input_ids, "attention_mask": attention_mask, "pixel_values": pixel_values}
    for name, value in values.items():
        if value is not None and not isinstance(value, torch.Tensor):
            raise TypeError(f"{name} must be a torch tensor, got {type(value).__name__}.")
    if input_ids.ndim != 2:
        raise ValueError(f"input_ids must have shape (batch, prompt), got {tuple(input_ids.shape)}.")
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask must have shape {tuple(input_ids.shape)}, got {tuple(attention_mask.shape)}."
        )
    check_images(config, pixel_values)
    if pixel_values.shape[0] != input_ids.shape[0]:
        raise ValueError(
            f"pixel_values has a batch of {pixel_values.shape[0]}, input_ids of {input_ids.shape[0]}; they must be "
            "equal."
        )


def check_normalized(
    config: VLAAdapterConfig, batch_size: int, proprio: Any, actions: Any, action_is_pad: Any
) -> None:
    """Check what only `forward` takes."""
    if proprio is None:
        raise ValueError("proprio is missing: forward needs the normalised state.")
    for name, value in (("proprio", proprio), ("actions", actions)):
        if value is not None and not isinstance(value, torch.Tensor):
            raise TypeError(
                f"{name} must be a torch tensor, got {type(value).__name__}. (The processor's `state` is raw and "
                "belongs to predict_action.)"
            )
    for name, value, shape in (
        ("proprio", proprio, (batch_size, config.proprio_dim)),
        ("actions", actions, (batch_size, config.chunk_size, config.action_dim)),
        ("action_is_pad", action_is_pad, (batch_size, config.chunk_size)),
    ):
        if value is not None and tuple(value.shape) != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(value.shape)}.")


def check_preparation(config: VLAAdapterConfig, preparation: str | list[str] | None) -> None:
    """Compare how the inputs were prepared with how those of the training were.

    Args:
        config ([`VLAAdapterConfig`]): of the model.
        preparation (`str` or `list[str]`): what [`VLAAdapterProcessor.describe_preparation`] returned, or several of
            them after samples were collated. `None`, for inputs that no processor made, is not checked.

    Raises:
        ValueError: naming the fields that differ, and both values.
    """
    for text in [preparation] if isinstance(preparation, str) else preparation or []:
        try:
            prepared = json.loads(text)
        except (TypeError, ValueError) as error:
            raise ValueError(f"preparation must be what the processor returned, got {text!r}.") from error
        if not isinstance(prepared, dict) or not all(hasattr(config, name) for name in prepared):
            raise ValueError(f"preparation must be what the processor returned, got {text!r}.")
        differing = [
            f"{name} (inputs: {value!r}, model: {getattr(config, name)!r})"
            for name, value in prepared.items()
            if value != getattr(config, name) and not (name in MAY_BE_UNKNOWN and getattr(config, name) is None)
        ]
        if differing:
            raise ValueError(
                f"The processor prepared the inputs in another way than the model expects: {'; '.join(differing)}. "
                "Load the processor from the model's folder, or make it with VLAAdapterProcessor.from_model_config("
                "model.config, tokenizer). If the difference is intended, leave `preparation` out of the inputs."
            )


def check_tokens(config: VLAAdapterConfig, input_ids: torch.Tensor) -> None:
    """Refuse tokens that the language model does not have. On CUDA they would end the process."""
    low, high = (int(value) for value in input_ids.aminmax())
    size = config.text_config.vocab_size
    if low < 0 or high >= size:
        raise ValueError(
            f"input_ids holds token {low if low < 0 else high}, but the model has tokens 0 to {size - 1}. Load the "
            "processor from the model's folder: its tokenizer is that of another model."
        )


def check_state(state: Any, batch_size: int, proprio_dim: int) -> np.ndarray:
    if state is None:
        raise ValueError("state is missing: give the robot's state to the processor (state=...) or to predict_action.")
    if isinstance(state, torch.Tensor):
        if state.dtype in (torch.float16, torch.bfloat16):
            raise ValueError(f"state is {state.dtype}, which has already lost digits; give float32 or float64.")
        state = state.detach().cpu().numpy()
    state = np.asarray(state, dtype=np.float64)
    if state.ndim == 1 and batch_size == 1:
        state = state[None]
    if state.shape != (batch_size, proprio_dim):
        raise ValueError(f"state must have shape ({batch_size}, {proprio_dim}), got {state.shape}.")
    if not np.isfinite(state).all():
        raise ValueError(f"state holds values that are not finite: {state.tolist()}.")
    return state


__all__ = [
    "IGNORED",
    "check_images",
    "check_observation",
    "check_normalized",
    "check_preparation",
    "check_state",
    "check_tokens",
]
