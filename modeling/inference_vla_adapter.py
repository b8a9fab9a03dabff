"""From what the processor returns to a chunk of actions in physical units."""

import inspect
from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from .inputs_vla_adapter import check_observation, check_preparation, check_state
from .normalization_vla_adapter import normalize, select_norm_stats, unnormalize


# A compiled model keeps one graph per shape; torch's own limit of eight is soon used up by batches of several sizes.
MAX_COMPILED_SHAPES = 64

Model = TypeVar("Model", bound="ActionPredictionMixin")


class ActionPredictionMixin:
    """`predict_action` and `compile_for_inference` of the model."""

    _prompt_multiple: int | None = None  # of tokens, once compiled for inference

    @torch.no_grad()
    def predict_action(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        state: np.ndarray | torch.Tensor | list | None = None,
        unnorm_key: str | None = None,
        preparation: str | list[str] | None = None,
    ) -> np.ndarray:
        r"""
        Predict a chunk of actions in physical units from what the processor returns.

        Inputs are moved to the model's device and precision here. The state is normalised in float64 before it is
        rounded to anything.

        Args:
            input_ids, attention_mask, pixel_values: as in [`forward`].
            state (`np.ndarray`, `torch.Tensor` or `list`): `(batch, proprio_dim)`, or `(proprio_dim,)` for a batch of
                one: the robot's state in physical units, float32 or float64.
            unnorm_key (`str`, *optional*): which of the model's statistics to use; may be left out when there is one
                set. `libero_object` finds `libero_object_no_noops`.
            preparation (`str` or `list[str]`, *optional*): how the processor prepared the inputs; compared with the
                model's configuration. Not needed for inputs made by hand.

        Returns:
            `np.ndarray`: float64 `(batch, chunk_size, action_dim)`.

        Raises:
            ValueError: without state or statistics, with an unknown `unnorm_key`, wrong shapes or NaN, or for inputs
                that a processor with other settings prepared; the message names the field.
        """
        config = self.config
        if isinstance(input_ids, Mapping):
            raise TypeError("predict_action takes the processor's outputs one by one: predict_action(**inputs).")
        check_preparation(config, preparation)
        key, stats = select_norm_stats(config.norm_stats, unnorm_key)
        # Found here and not in the forward pass, which may be compiled: an error from there names no field.
        input_ids, attention_mask, pixel_values = (
            None if values is None else torch.as_tensor(values) for values in (input_ids, attention_mask, pixel_values)
        )
        check_observation(config, input_ids, attention_mask, pixel_values)
        state = check_state(state, input_ids.shape[0], config.proprio_dim)
        if attention_mask is not None and not attention_mask.any(dim=-1).all():
            raise ValueError("attention_mask has a row without a single real token; every row needs an instruction.")

        # 1. Physical units to normalised space.
        proprio = normalize(state, stats["proprio"], config.norm_type, config.constant_dims)

        # 2. To the model's device and precision.
        def to_model(values, dtype=None):
            return None if values is None else torch.as_tensor(values).to(self.device, dtype)

        if not pixel_values.isfinite().all():
            raise ValueError("pixel_values holds values that are not finite.")
        if self._prompt_multiple is not None:
            input_ids, attention_mask = _pad_prompts(input_ids, attention_mask, self._prompt_multiple)
        inputs = {
            "input_ids": to_model(input_ids),
            "attention_mask": to_model(attention_mask),
            "pixel_values": to_model(pixel_values, self.dtype),
            "proprio": to_model(proprio, self.dtype),
        }

        # 3. Predict, without the noise that training adds.
        in_training = [module for module in self.modules() if module.training]
        for module in in_training:
            module.training = False
        try:
            normalized = self(**inputs, return_dict=True).actions
        finally:
            for module in in_training:  # and no others: towers may be kept in evaluation mode while the rest trains
                module.training = True

        # 4. Normalised space to physical units.
        normalized = normalized.double().cpu().numpy()
        if not np.isfinite(normalized).all():
            raise ValueError(
                f"the model predicted actions that are not finite in {self.dtype}. In float16 that is an overflow: use "
                "bfloat16 or float32; otherwise the weights are broken."
            )
        return unnormalize(normalized, stats["action"], config.norm_type, config.constant_dims)

    def compile_for_inference(self: Model, prompt_multiple: int = 64, **options: Any) -> Model:
        """Compile the forward pass for [`predict_action`], which goes on returning the same actions.

        It is meant for CUDA, where a prediction is mostly launches (not measured), and for quantised weights; on a CPU
        it gains 4 % otherwise. The whole pass becomes one graph of fixed shapes, on CUDA one CUDA graph.
        [`predict_action`] pads prompts to a multiple of `prompt_multiple` tokens, behind everything else, where they change no action; instructions of
        other lengths thus need no compiling. What is new is compiled at its first prediction, which takes minutes at
        the published size: the first observation, another batch size, a prompt beyond the multiple. Changed weights
        are seen; they are no constants of the graph.

        Args:
            prompt_multiple (`int`, *optional*, defaults to 64): of tokens; the prompts of LIBERO all fit 64.
            options: for `torch.compile`, in place of what is chosen here, e.g. `mode`, `backend`.

        Returns:
            `VLAAdapterForActionPrediction`: the model itself.

        Raises:
            ValueError: when `prompt_multiple` is not a positive int.
        """
        if isinstance(prompt_multiple, bool) or not isinstance(prompt_multiple, int) or prompt_multiple < 1:
            raise ValueError(f"prompt_multiple must be an int of at least 1, got {prompt_multiple!r}.")
        self._prompt_multiple = prompt_multiple
        chosen: dict[str, Any] = {"fullgraph": True, "dynamic": False}
        if self.device.type == "cuda":
            chosen["mode"] = "reduce-overhead"
        if "recompile_limit" in inspect.signature(torch.compile).parameters:  # not in older releases of torch
            chosen |= {"recompile_limit": MAX_COMPILED_SHAPES, "isolate_recompiles": True}
        self.compile(**{**chosen, **options})
        return self


def _pad_prompts(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None, multiple: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Padding up to a multiple of tokens, and a mask that is always there: one graph then serves every prompt."""
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
    padding = (0, -input_ids.shape[1] % multiple)
    return nn.functional.pad(input_ids, padding), nn.functional.pad(mask, padding)


__all__ = ["ActionPredictionMixin"]
