"""Which layers err most in eight bits: each is rounded alone, and the actions are compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from vla_adapter_hf.modeling.modeling_vla_adapter import VLAAdapterForActionPrediction


Inputs = dict[str, torch.Tensor]


def layer_groups(model: VLAAdapterForActionPrediction) -> dict[str, list[str]]:
    """Linear layers and convolutions by the block that they are part of, such as `language_model.layers.3`."""
    groups: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            parts = name.split(".")
            number = next((index for index, part in enumerate(parts) if part.isdigit()), None)
            group = name if number is None else ".".join(parts[: number + 1])
            groups.setdefault(group, []).append(name)
    return groups


@torch.no_grad()
def action_errors(
    model: VLAAdapterForActionPrediction,
    samples: Sequence[Inputs],
    groups: dict[str, list[str]],
    report_progress: Callable[[str], None] = print,
) -> dict[str, float]:
    """Mean absolute change of a normalised action when one group of layers computes with eight bits.

    Args:
        model ([`VLAAdapterForActionPrediction`]): float32.
        samples: arguments of `forward`.
        groups: names of layers, see [`layer_groups`].
        report_progress: receives a line now and then.

    Returns:
        `dict`: by group, the largest first.
    """
    exact = [model(**sample).actions for sample in samples]
    errors = {}
    for number, (group, names) in enumerate(groups.items(), start=1):
        with rounded_layers(model, names):
            changes = [
                (model(**sample).actions - actions).abs().mean()
                for sample, actions in zip(samples, exact, strict=True)
            ]
        errors[group] = float(torch.stack(changes).mean())
        if number % 20 == 0:
            report_progress(f"  {number} of {len(groups)} blocks")
    return dict(sorted(errors.items(), key=lambda entry: -entry[1]))


@contextmanager
def rounded_layers(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Let layers compute as an engine with eight bits does: weights with a scale per output, inputs with one range."""
    handles, weights = [], {}
    try:
        for name in names:
            layer = model.get_submodule(name)
            weights[layer] = layer.weight.data
            layer.weight.data = round_weights(layer.weight.data)
            handles.append(layer.register_forward_pre_hook(lambda _, args: (round_inputs(args[0]), *args[1:])))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for layer, weight in weights.items():
            layer.weight.data = weight


def round_weights(weight: torch.Tensor) -> torch.Tensor:
    """Weights at 255 levels, symmetric, a scale per output channel."""
    scale = weight.flatten(1).abs().amax(dim=1).clamp(min=1e-12) / 127
    scale = scale.view(-1, *[1] * (weight.ndim - 1))
    return (weight / scale).round().clamp(-127, 127) * scale


def round_inputs(values: torch.Tensor) -> torch.Tensor:
    """Values at 256 levels between their minimum and maximum, zero among them."""
    low, high = values.min().clamp(max=0), values.max().clamp(min=0)
    scale = ((high - low) / 255).clamp(min=1e-12)
    zero = (-low / scale).round()
    return ((values / scale + zero).round().clamp(0, 255) - zero) * scale


def groups_to_keep(errors: dict[str, float], target: float) -> list[str]:
    """The fewest groups to leave out so that the others together err no more than `target`.

    Errors of different layers are taken as independent: their squares add up.
    """
    kept = []
    for group in sorted(errors, key=lambda name: -errors[name]):
        left = sum(error**2 for name, error in errors.items() if name not in kept) ** 0.5
        if left <= target:
            break
        kept.append(group)
    return kept
