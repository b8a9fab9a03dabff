"""What trains: LoRA on the towers and the language model, everything frozen but the policy, or everything."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from vla_adapter_hf.modeling.modeling_vla_adapter import VLAAdapterForActionPrediction
from vla_adapter_hf.utils.extras import install_hint


# The name is also that of the folder in which PEFT keeps the adapter inside a checkpoint, as in the published layout.
ADAPTER_NAME = "lora_adapter"
# Trained in full by every preset.
POLICY_MODULES = ("action_queries", "policy", "proprio_projector")
# Where LoRA layers go: every linear layer of these, and the towers' patch embeddings, which are convolutions.
LORA_MODULES = ("dinov2", "siglip", "vision_projector", "language_model")
# How far merged weights may be from those that were stored, as a share of what the adapter adds. Another machine
# rounds otherwise, and a GPU may multiply in TF32.
MERGE_TOLERANCE = 0.05

# Training arguments of each preset. In effect the released code runs at a constant 2e-4 without clipping: its warm-up
# of 0.1 counts steps, and its decay is undone by the same lines. The paper describes another schedule.
_RELEASED = {
    "learning_rate": 2e-4,
    "lr_scheduler_type": "constant",
    "weight_decay": 0.01,
    "max_grad_norm": 0.0,
    "per_device_train_batch_size": 8,
}
_PAPER = {**_RELEASED, "learning_rate": 1e-4, "lr_scheduler_type": "cosine", "warmup_steps": 0.1}
PRESETS: dict[str, dict[str, Any]] = {
    "lora": _RELEASED,
    "lora-paper": _PAPER,
    "frozen": _RELEASED,
    "full": _RELEASED,
}


def check_preset(preset: str) -> None:
    """Raise what [`apply_preset`] would raise, without a model.

    Raises:
        ValueError: for an unknown preset.
        ImportError: when LoRA is asked for without PEFT.
    """
    if preset not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}.")
    if preset.startswith("lora") and find_spec("peft") is None:
        raise ImportError(f"preset={preset!r} needs PEFT: {install_hint('lora')}.")


def apply_preset(model: VLAAdapterForActionPrediction, preset: str = "lora", rank: int = 64) -> nn.Module:
    """Make a model ready to be trained.

    Args:
        model ([`VLAAdapterForActionPrediction`]): is changed in place.
        preset (`str`): `"lora"` or `"lora-paper"` (the same layers, another schedule), `"frozen"` (only action
            queries, policy and proprio projector train; paper, LIBERO-Long 86.4 %), `"full"`.
        rank (`int`): of the LoRA matrices; alpha is twice as much, as published.

    Returns:
        `nn.Module`: a `PeftModel` around the model for LoRA, the model itself otherwise.

    Raises:
        ValueError: for an unknown preset.
        ImportError: when LoRA is asked for without PEFT.
    """
    check_preset(preset)
    if preset == "full":
        model.requires_grad_(True)
        # It has no effect on the actions.
        model.dinov2.embeddings.mask_token.requires_grad_(False)
        return model
    if preset == "frozen":
        model.requires_grad_(False)
        for name in POLICY_MODULES:
            getattr(model, name).requires_grad_(True)
        return model
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        lora_dropout=0.0,
        init_lora_weights="gaussian",
        target_modules=lora_targets(model),
        modules_to_save=list(POLICY_MODULES),
    )
    peft_model = get_peft_model(model, config, adapter_name=ADAPTER_NAME)
    peft_model.register_load_state_dict_pre_hook(_refuse_merged_weights)
    return peft_model


def lora_targets(model: VLAAdapterForActionPrediction) -> list[str]:
    """Full names of the layers that the published recipe adapts (`data.md`: every linear layer of both towers, vision
    projector and language model, and both patch embeddings, which PEFT's `all-linear` would leave out)."""
    return [
        name
        for name, module in model.named_modules()
        if name.split(".")[0] in LORA_MODULES and isinstance(module, (nn.Linear, nn.Conv2d))
    ]


def merge_lora(model: nn.Module) -> VLAAdapterForActionPrediction:
    """Add the adapter to the weights, in place. A model without an adapter is returned as it is."""
    if not hasattr(model, "merge_and_unload"):
        return model
    merged = model.merge_and_unload()
    merged.requires_grad_(True)
    merged.dinov2.embeddings.mask_token.requires_grad_(False)
    return merged


@torch.no_grad()
def merged_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights that merging would give, under the plain model's names. The model does not change.

    Merging and unmerging in place would change the last digits of the frozen weights, and so the losses of a resumed
    run. Merged tensors are on the CPU. The training's device holds one of them at a time.
    """
    base, adapter = model.get_base_model(), model.active_adapter
    layers = {f"{name}.weight": layer for name, layer in _lora_layers(model)}
    merged = {}
    for name, tensor in base.state_dict().items():
        name = name.replace(f".modules_to_save.{adapter}.", ".").replace(".base_layer.", ".")
        if ".lora_" in name or ".original_module." in name:
            continue
        merged[name] = _merged_weight(tensor, layers[name], adapter).cpu() if name in layers else tensor
    return merged


@torch.no_grad()
def check_merged(model: nn.Module, merged: Mapping[str, torch.Tensor], adapter: str, base: str, remedy: str) -> None:
    """Compare frozen weights plus adapter with the merged weights that were stored with the adapter.

    Args:
        model (`PeftModel`): frozen weights and adapter.
        merged: the stored weights, under the plain model's names.
        adapter, base: where adapter and frozen weights are from, for the message.
        remedy: what to do if the former frozen weights are lost, for the message.

    Raises:
        ValueError: they differ: the frozen weights are not those that the adapter was trained on.
    """
    off = added = rounding = 0.0
    for name, layer in _lora_layers(model):
        weight = layer.get_base_layer().weight
        now = _merged_weight(weight, layer, model.active_adapter).float()
        off += float((now - merged[f"{name}.weight"].to(now)).square().sum())
        added += float((now - weight.float()).square().sum())
        rounding += float((max(1e-6, torch.finfo(weight.dtype).eps / 10) * weight.float()).square().sum())
    if off > MERGE_TOLERANCE**2 * added + rounding:
        raise ValueError(
            f"the adapter of {adapter} was not trained on the weights that are in {base} now: with them it does not "
            f"give the merged weights that are stored with it. Put the former weights back, or {remedy}."
        )


def _lora_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    from peft.tuners.lora import LoraLayer

    return ((name, layer) for name, layer in model.get_base_model().named_modules() if isinstance(layer, LoraLayer))


def _merged_weight(weight: torch.Tensor, layer: Any, adapter: str) -> torch.Tensor:
    return weight + layer.get_delta_weight(adapter).to(weight.dtype)


def _refuse_merged_weights(module: nn.Module, state_dict: dict[str, torch.Tensor], prefix: str, *args: Any) -> None:
    """Without this, a plain Trainer loads merged weights, matches no name and reports nothing."""
    if state_dict and not any(".lora_" in name for name in state_dict):
        raise ValueError(
            "These are merged weights; a model with a LoRA adapter cannot take them. Use VLAAdapterTrainer, which "
            f"loads the adapter in the checkpoint's {ADAPTER_NAME}/ folder, e.g. with load_best_model_at_end=True."
        )
