"""How the published checkpoints call their tensors, and what our files call them.

The vision towers have timm's names there, with query, key and value in one matrix. The base vision-language model is
renamed to the same names (see `base_vlm.py`).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator

import torch


DINOV2_PREFIX = "vision_backbone.featurizer."
SIGLIP_PREFIX = "vision_backbone.fused_featurizer."
# What our files call the tensors of the published ones. Braces stand for a block's number.
DINOV2_NAMES = {
    "cls_token": "embeddings.cls_token",
    "reg_token": "embeddings.register_tokens",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "blocks.{}.norm1": "encoder.layer.{}.norm1",
    "blocks.{}.attn.proj": "encoder.layer.{}.attention.o_proj",
    "blocks.{}.ls1.scale_factor": "encoder.layer.{}.layer_scale1.lambda1",
    "blocks.{}.norm2": "encoder.layer.{}.norm2",
    "blocks.{}.mlp.fc1": "encoder.layer.{}.mlp.fc1",
    "blocks.{}.mlp.fc2": "encoder.layer.{}.mlp.fc2",
    "blocks.{}.ls2.scale_factor": "encoder.layer.{}.layer_scale2.lambda1",
}
DINOV2_QKV = "encoder.layer.{}.attention.{}_proj"
SIGLIP_NAMES = {
    "pos_embed": "embeddings.position_embedding.weight",
    "patch_embed.proj": "embeddings.patch_embedding",
    "blocks.{}.norm1": "encoder.layers.{}.layer_norm1",
    "blocks.{}.attn.proj": "encoder.layers.{}.self_attn.out_proj",
    "blocks.{}.norm2": "encoder.layers.{}.layer_norm2",
    "blocks.{}.mlp.fc1": "encoder.layers.{}.mlp.fc1",
    "blocks.{}.mlp.fc2": "encoder.layers.{}.mlp.fc2",
}
SIGLIP_QKV = "encoder.layers.{}.self_attn.{}_proj"
POLICY_NAMES = {
    "layer_norm1": "norm_in",
    "fc1": "fc_in",
    "mlp_resnet_blocks.{}.ffn.0": "blocks.{}.norm",
    "mlp_resnet_blocks.{}.ffn.1": "blocks.{}.fc",
    "mlp_resnet_blocks.{}.gating_factor": "blocks.{}.attention.gating_factor",
    **{
        f"mlp_resnet_blocks.{{}}.{name}": f"blocks.{{}}.attention.{name}"
        for name in ("q_proj", "k_proj", "v_proj", "o_proj")
        + tuple(f"{part}_{source}" for part in "kv" for source in ("self", "adapter", "task"))
    },
    "layer_norm2": "norm_out",
    "fc2": "fc_out",
}
# Computed by nothing that reaches the actions: pooling head, final norms, tied head of the language model, FiLM layers
# that the published code never calls. The last block of each tower is left out by its number.
WITHOUT_EFFECT = re.compile(
    r"vision_backbone\.featurizer\.norm\.|vision_backbone\.fused_featurizer\.(norm|attn_pool)\.|"
    r"language_model\.lm_head\.|.*\.film_gen\."
)


def translate_weight(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """A tensor of the published `model.safetensors` under the name (or, for `qkv`, the names) of our files."""
    if name.startswith(DINOV2_PREFIX):
        rest = name.removeprefix(DINOV2_PREFIX)
        if rest == "cls_token":
            # timm has no mask token; only masked pretraining uses it.
            yield "dinov2.embeddings.mask_token", torch.zeros_like(tensor[0])
        if rest == "pos_embed":
            # The class token's position has been folded into the token itself, so its row is zero.
            tensor = torch.cat((torch.zeros_like(tensor[:, :1]), tensor), dim=1)
        yield from _translate_tower("dinov2", rest, tensor, DINOV2_NAMES, DINOV2_QKV)
    elif name.startswith(SIGLIP_PREFIX):
        rest = name.removeprefix(SIGLIP_PREFIX)
        tensor = tensor[0] if rest == "pos_embed" else tensor
        yield from _translate_tower("siglip", rest, tensor, SIGLIP_NAMES, SIGLIP_QKV)
    elif name.startswith("projector."):
        yield f"vision_{name}", tensor
    elif name.startswith("language_model.model."):
        yield f"language_model.{name.removeprefix('language_model.model.')}", tensor
    else:
        yield name, tensor


def _translate_tower(
    tower: str, name: str, tensor: torch.Tensor, names: dict[str, str], qkv: str
) -> Iterator[tuple[str, torch.Tensor]]:
    match = re.fullmatch(r"blocks\.(\d+)\.attn\.qkv\.(weight|bias)", name)
    if match is None:
        yield f"{tower}.{renamed(name, names)}", tensor
        return
    for part, rows in zip("qkv", tensor.chunk(3), strict=True):
        yield f"{tower}.{qkv.format(match[1], part)}.{match[2]}", rows


def renamed(name: str, names: dict[str, str]) -> str:
    """The name, or the part of it before its last dot, looked up in a table with braces for a block's number."""
    stem, _, parameter = name.rpartition(".")
    for candidate, ending in ((name, ""), (stem, f".{parameter}")):
        number = re.search(r"\.(\d+)\.", candidate)
        key = candidate.replace(f".{number[1]}.", ".{}.", 1) if number else candidate
        if key in names:
            return names[key].format(number[1] if number else "") + ending
    return name


def has_effect(name: str, names: Collection[str]) -> bool:
    """Whether a tensor reaches the actions.

    Args:
        name (`str`): its published name.
        names (`Collection[str]`): those of all tensors of the checkpoint, from which the last blocks are found.
    """
    if WITHOUT_EFFECT.match(name):
        return False
    for prefix in (f"{DINOV2_PREFIX}blocks.", f"{SIGLIP_PREFIX}blocks."):
        if name.startswith(prefix):
            # The features are read before a tower's last block.
            return int(name.removeprefix(prefix).split(".")[0]) != max(block_numbers(names, prefix))
    return True


def block_numbers(names: Iterable[str], prefix: str) -> set[int]:
    """The numbers that follow `prefix` in any of the names."""
    return {int(name.removeprefix(prefix).split(".")[0]) for name in names if name.startswith(prefix)}
