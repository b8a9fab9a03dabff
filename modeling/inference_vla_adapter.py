"""From what the processor returns to a chunk of actions in physical units."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn
from transformers.utils import logging

from .inputs_vla_adapter import check_observation, check_preparation, check_state, check_tokens
from .normalization_vla_adapter import find_out_of_range, normalize, select_norm_stats, unnormalize


logger = logging.get_logger(__name__)

OUT_OF_RANGE = ("warn", "error", "ignore")
# A compiled model keeps one graph per shape. torch's own limit of eight is soon reached by batches of several sizes.
MAX_COMPILED_SHAPES = 64

Model = TypeVar("Model", bound="ActionPredictionMixin")


class ActionPredictionMixin:
    """`predict_action` and `compile_for_inference` of the model."""

    _prompt_multiple: int | None = None  # of tokens, once compiled for inference
    _warned_out_of_range: frozenset[tuple[str, int]] = frozenset()  # unnorm key and dimension of the state

    @torch.no_grad()
    def predict_action(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        state: np.ndarray | torch.Tensor | list | None = None,
        unnorm_key: str | None = None,
        preparation: str | list[str] | None = None,
        out_of_range: str = "warn",
    ) -> np.ndarray:
        r"""
        Predict a chunk of actions in physical units from what the processor returns.

        Inputs are moved to the model's device and precision. The state is normalised in float64 before it is rounded.

        Args:
            input_ids, attention_mask, pixel_values: as in [`forward`].
            state (`np.ndarray`, `torch.Tensor` or `list`): `(batch, proprio_dim)`, or `(proprio_dim,)` for a batch of
                one: the robot's state in physical units, float32 or float64.
            unnorm_key (`str`, *optional*): which of the model's statistics to use. Not needed if there is one set.
                `libero_object` finds `libero_object_no_noops`.
            preparation (`str` or `list[str]`, *optional*): how the processor prepared the inputs; compared with the
                model's configuration. Not needed for inputs made by hand.
            out_of_range (`str`, *optional*, defaults to `"warn"`): what to do about a state far outside the range of
                the training data, as in millimetres where the model knows metres (see [`find_out_of_range`]): `"warn"`
                (once per dimension), `"error"` or `"ignore"`.

        Returns:
            `np.ndarray`: float64 `(batch, chunk_size, action_dim)`.

        Raises:
            ValueError: without state or statistics, with an unknown `unnorm_key`, for wrong shapes or NaN, for inputs
                that a processor with other settings prepared, and for a state that is far out of range with
                `out_of_range="error"`. The message names the field.
        """
        config = self.config
        if isinstance(input_ids, Mapping):
            raise TypeError("predict_action takes the processor's outputs one by one: predict_action(**inputs).")
        # Checked here and not in the forward pass: an error from a compiled pass names no field.
        check_preparation(config, preparation)
        key, stats = select_norm_stats(config.norm_stats, unnorm_key)
        input_ids, attention_mask, pixel_values = (
            None if values is None else torch.as_tensor(values) for values in (input_ids, attention_mask, pixel_values)
        )
        check_observation(config, input_ids, attention_mask, pixel_values)
        if not pixel_values.isfinite().all():
            raise ValueError("pixel_values holds values that are not finite.")
        if attention_mask is not None and not attention_mask.any(dim=-1).all():
            raise ValueError("attention_mask has a row without a single real token; every row needs an instruction.")
        check_tokens(config, input_ids)
        state = check_state(state, input_ids.shape[0], config.proprio_dim)
        self.check_state_range(state, key, out_of_range)

        # 1. Physical units to normalised space.
        proprio = normalize(state, stats["proprio"], config.norm_type, config.constant_dims)

        # 2. To the model's device and precision.
        if self._prompt_multiple is not None:
            input_ids, attention_mask = _pad_prompts(input_ids, attention_mask, self._prompt_multiple)
        # Weights that wait on the disk are on the meta device. accelerate, which loads them, also moves the inputs.
        device = input_ids.device if self.device.type == "meta" else self.device
        inputs = {
            "input_ids": input_ids.to(device),
            "attention_mask": None if attention_mask is None else attention_mask.to(device),
            "pixel_values": pixel_values.to(device, self.dtype),
            "proprio": torch.from_numpy(proprio).to(device, self.dtype),
        }

        # 3. Predict, without the noise that training adds.
        with _in_eval_mode(self):
            normalized = self(**inputs, return_dict=True).actions.double().cpu().numpy()
        if not np.isfinite(normalized).all():
            raise ValueError(
                f"the model predicted actions that are not finite in {self.dtype}. In float16 that is an overflow: "
                "use bfloat16 or float32. Otherwise the weights are broken."
            )

        # 4. Normalised space to physical units.
        return unnormalize(normalized, stats["action"], config.norm_type, config.constant_dims)

    def check_state_range(self, state: np.ndarray, unnorm_key: str | None = None, out_of_range: str = "error") -> None:
        """
        Report a state `(batch, proprio_dim)` far outside the range of the training data, as [`predict_action`] does.

        Raises:
            ValueError: the state is far out of range, with `out_of_range="error"`.
        """
        if out_of_range not in OUT_OF_RANGE:
            raise ValueError(f"out_of_range must be one of {', '.join(OUT_OF_RANGE)}, got {out_of_range!r}.")
        key, stats = select_norm_stats(self.config.norm_stats, unnorm_key)
        found = [] if out_of_range == "ignore" else find_out_of_range(state, stats["proprio"])
        if out_of_range == "warn":
            found = [entry for entry in found if (key, entry[0]) not in self._warned_out_of_range]
        if not found:
            return
        names = [f" ({name})" for name in self.config.state_names or []] or [""] * state.shape[1]
        values = "; ".join(
            f"dimension {index}{names[index]} is {value:.6g}, in training {low:.6g} to {high:.6g}"
            for index, value, low, high in found
        )
        message = (
            f"state is far outside the range of the training data ({key}): {values}. Check the units and the order of "
            "its dimensions; such a state makes the actions wrong."
        )
        if out_of_range == "error":
            raise ValueError(message)
        self._warned_out_of_range |= {(key, index) for index, *_ in found}
        logger.warning(message)

    def compile_for_inference(self: Model, prompt_multiple: int = 64, **options: Any) -> Model:
        """Compile the forward pass for [`predict_action`], which returns the same actions as before.

        It is meant for CUDA, where most of a prediction's time goes into launching kernels (not measured), and for
        quantised weights. On a CPU it saves 4 % otherwise. The forward pass becomes one graph of fixed shapes, on CUDA
        one CUDA graph.

        Prompts are padded to a multiple of `prompt_multiple` tokens, so that instructions of other lengths need no new
        graph. The padding comes after everything else and changes no action. A new shape is compiled at its first
        prediction, which takes minutes at the published size: the first observation, another batch size, a prompt
        beyond the multiple. Weights may be changed later: they are not constants of the graph.

        Args:
            prompt_multiple (`int`, *optional*, defaults to 64): of tokens. All prompts of LIBERO fit into 64.
            options: for `torch.compile`, instead of those chosen here, e.g. `mode`, `backend`.

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


@contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while. Towers may be in evaluation mode while the rest trains: they stay so."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _pad_prompts(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None, multiple: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts padded to a multiple of tokens, and a mask that is always there: one graph serves every prompt."""
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
    padding = (0, -input_ids.shape[1] % multiple)
    return nn.functional.pad(input_ids, padding), nn.functional.pad(mask, padding)


__all__ = ["ActionPredictionMixin"]
