"""The model as one graph of fixed operations, for other engines."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from vla_adapter_hf.checkpoints.exported import GRAPH_INPUTS
from vla_adapter_hf.modeling.configuration_vla_adapter import VLAAdapterConfig
from vla_adapter_hf.modeling.modeling_vla_adapter import VLAAdapterForActionPrediction


# What linear layers and convolutions become; the last one where the padding is a word, as in SigLIP.
LAYER_OPERATIONS = ("aten.linear.default", "aten.convolution.default", "aten.conv2d.default", "aten.conv2d.padding")


class ConstantTables(nn.Module):
    """The policy's rotary tables as plain numbers. The model keeps their bits, which no converter reads."""

    def __init__(self, tables: Sequence[torch.Tensor]) -> None:
        super().__init__()
        for name, table in zip(("cos", "sin"), tables, strict=True):
            self.register_buffer(name, table.float())

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.cos, self.sin


class ActionGraph(nn.Module):
    """From the prepared inputs to normalised actions, and nothing else."""

    def __init__(self, model: VLAAdapterForActionPrediction) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        pixel_values: torch.Tensor,
        proprio: torch.Tensor,
    ) -> torch.Tensor:
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            pixel_values=pixel_values,
            proprio=proprio,
            return_dict=True,
        )
        return outputs.actions


def trace(
    model: VLAAdapterForActionPrediction, prompt_tokens: int, dynamic_batch: bool = False
) -> torch.export.ExportedProgram:
    """Export a float32 model with `torch.export`.

    Args:
        model ([`VLAAdapterForActionPrediction`]): float32, on the CPU.
        prompt_tokens (`int`): length that prompts are padded to.
        dynamic_batch (`bool`): whether the batch size stays open; otherwise it is 1.
    """
    # A dimension of 1 would be taken for a constant.
    inputs = example_inputs(model.config, prompt_tokens, 2 if dynamic_batch else 1)
    shapes = None
    if dynamic_batch:
        batch = torch.export.Dim("batch", min=1, max=1024)
        shapes = tuple({0: batch} for _ in inputs)
    with constant_tables(model), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return torch.export.export(ActionGraph(model.eval()), inputs, dynamic_shapes=shapes)


@contextmanager
def constant_tables(model: VLAAdapterForActionPrediction) -> Iterator[None]:
    """Give the model its rotary tables as [`ConstantTables`] while the block runs. The weights are not copied."""
    rotary = model.policy.rotary
    try:
        if rotary is not None:
            model.policy.rotary = ConstantTables(rotary())
        yield
    finally:
        model.policy.rotary = rotary


def example_inputs(config: VLAAdapterConfig, prompt_tokens: int, batch_size: int) -> tuple[torch.Tensor, ...]:
    """Inputs of the right shapes and types, in the order of the graph's arguments."""
    channels = 6 * config.num_cameras
    inputs = {
        "input_ids": torch.zeros(batch_size, prompt_tokens, dtype=torch.long),
        "attention_mask": torch.ones(batch_size, prompt_tokens, dtype=torch.long),
        "pixel_values": torch.zeros(batch_size, channels, config.image_size, config.image_size),
        "proprio": torch.zeros(batch_size, config.proprio_dim),
    }
    return tuple(inputs[name] for name in GRAPH_INPUTS)


def layer_names(program: torch.export.ExportedProgram) -> dict[str, str]:
    """Names of the graph's linear layers and convolutions, by the names of the model's modules."""
    names = {}
    for node in program.graph.nodes:
        if node.op == "call_function" and str(node.target) in LAYER_OPERATIONS:
            path = list(node.meta["nn_module_stack"].values())[-1][0]
            names[path.removeprefix("model.")] = node.name
    return names
