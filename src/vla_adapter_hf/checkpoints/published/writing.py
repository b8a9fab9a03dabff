"""Writing a checkpoint in the published layout, for the original's tools and for what reads its files.

Tensors without an effect are not in our checkpoints, but the original's code does not load without them. They are
written as zeros.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerBase

from vla_adapter_hf.checkpoints.published.files import MODEL_TYPE, STATISTICS
from vla_adapter_hf.checkpoints.published.names import (
    DINOV2_NAMES,
    DINOV2_PREFIX,
    DINOV2_QKV,
    POLICY_NAMES,
    SIGLIP_NAMES,
    SIGLIP_PREFIX,
    SIGLIP_QKV,
    renamed,
)
from vla_adapter_hf.modeling.configuration_vla_adapter import PUBLISHED_DINOV2, PUBLISHED_SIGLIP, VLAAdapterConfig
from vla_adapter_hf.utils.files import write_json


WEIGHTS = "model.safetensors"
ACTION_HEAD, PROPRIO_PROJECTOR = "action_head--checkpoint.pt", "proprio_projector--checkpoint.pt"
# What distributed training leaves on the names in the two pickles. The original's code expects it.
PICKLE_PREFIX = "module."
PUBLISHED_TIMM_IDS = ("vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224")
TRANSFORMERS = "4.40.1"
# Means and standard deviations of the two towers' pixels, and the same as bfloat16 rounds them.
PIXELS = (
    {
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "rounded_mean": [0.484375, 0.455078125, 0.40625],
        "rounded_std": [0.228515625, 0.2236328125, 0.224609375],
    },
    {name: [0.5, 0.5, 0.5] for name in ("mean", "std", "rounded_mean", "rounded_std")},
)


class PublishedTensors(NamedTuple):
    """The tensors of the three files, by published names."""

    weights: dict[str, torch.Tensor]
    action_head: dict[str, torch.Tensor]
    proprio_projector: dict[str, torch.Tensor]


def published_tensors(state_dict: dict[str, torch.Tensor], variant: str) -> PublishedTensors:
    """The tensors of a model as the published files hold them.

    Args:
        state_dict (`dict`): under the names of our files.
        variant (`str`): `"pro"` or `"original"`, the policy's variant.
    """
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in state_dict.items():
        part, _, rest = name.partition(".")
        parts.setdefault(part, {})[rest] = tensor
    weights = _published_tower(parts.pop("dinov2"), DINOV2_PREFIX, DINOV2_NAMES, DINOV2_QKV)
    weights |= _published_tower(parts.pop("siglip"), SIGLIP_PREFIX, SIGLIP_NAMES, SIGLIP_QKV)
    weights |= _pooling_head(weights)
    names = {ours: published for published, ours in POLICY_NAMES.items()}
    action_head = {f"model.{renamed(name, names)}": tensor for name, tensor in parts.pop("policy").items()}
    if variant == "pro":
        action_head |= _film_layers(action_head)
    proprio_projector = parts.pop("proprio_projector")
    prefixes = {"vision_projector": "projector", "language_model": "language_model.model"}
    for part, tensors in parts.items():
        weights |= {f"{prefixes.get(part, part)}.{name}": tensor for name, tensor in tensors.items()}
    return PublishedTensors(weights, action_head, proprio_projector)


def _published_tower(
    part: dict[str, torch.Tensor], prefix: str, names: dict[str, str], qkv: str
) -> dict[str, torch.Tensor]:
    """A tower under timm's names, with a last block and a last norm of zeros, which have no effect."""
    names = {ours: published for published, ours in names.items()}
    part = {name: tensor for name, tensor in part.items() if not name.endswith("mask_token")}
    depth = 1 + max(int(number) for name in part for number in re.findall(r"\.layers?\.(\d+)\.", name))
    tower = {}
    for block in range(depth):
        for kind in ("weight", "bias"):
            rows = [part.pop(f"{qkv.format(block, one)}.{kind}") for one in "qkv"]
            tower[f"blocks.{block}.attn.qkv.{kind}"] = torch.cat(rows)
    for name, tensor in part.items():
        published = renamed(name, names)
        tower[published] = tensor[None] if tensor.ndim == 2 and published == "pos_embed" else tensor
    if "cls_token" in tower:
        # There the class token has no position: it is added to the token.
        position, tower["pos_embed"] = tower["pos_embed"][:, :1], tower["pos_embed"][:, 1:]
        tower["cls_token"] = tower["cls_token"] + position
    first = {name.removeprefix("blocks.0."): one for name, one in tower.items() if name.startswith("blocks.0.")}
    tower |= {f"blocks.{depth}.{name}": torch.zeros_like(tensor) for name, tensor in first.items()}
    tower |= {f"norm.{kind}": torch.zeros_like(tower[f"blocks.0.norm1.{kind}"]) for kind in ("weight", "bias")}
    return {f"{prefix}{name}": tensor for name, tensor in tower.items()}


def _pooling_head(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """SigLIP's attention pooling, of zeros."""
    inner, width = weights[f"{SIGLIP_PREFIX}blocks.0.mlp.fc1.weight"].shape
    like = weights[f"{SIGLIP_PREFIX}norm.weight"]
    sizes = {"q": (width, width), "kv": (2 * width, width), "proj": (width, width)}
    sizes |= {"mlp.fc1": (inner, width), "mlp.fc2": (width, inner)}
    shapes: dict[str, tuple[int, ...]] = {"latent": (1, 1, width), "norm.weight": (width,), "norm.bias": (width,)}
    for name, (rows, columns) in sizes.items():
        shapes |= {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}
    return {f"{SIGLIP_PREFIX}attn_pool.{name}": like.new_zeros(shape) for name, shape in shapes.items()}


def _film_layers(action_head: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The pro policy's FiLM layers, of zeros. The original's code never calls them."""
    layers = {}
    for name, tensor in action_head.items():
        if name.endswith(".ffn.1.weight"):
            width, block = tensor.shape[0], name.removesuffix("ffn.1.weight")
            layers[f"{block}film_gen.0.weight"] = tensor.new_zeros(2 * width, width)
            layers[f"{block}film_gen.0.bias"] = tensor.new_zeros(2 * width)
    return layers


def published_config(config: VLAAdapterConfig, pad_token_id: int) -> dict[str, Any]:
    """The content of `config.json`."""
    dtype = str(config.dtype or torch.float32).removeprefix("torch.")
    text = config.text_config.to_diff_dict() | {"model_type": "qwen2", "torch_dtype": dtype}
    # As transformers wrote them in the original's release.
    text["rope_theta"] = text.pop("rope_parameters")["rope_theta"]
    for name in ("layer_types", "dtype", "transformers_version", "_name_or_path", "pad_token_id"):
        text.pop(name, None)
    ids, arguments = _timm_models(config)
    return {
        "arch_specifier": "no-align+fused-gelu-mlp",
        "architectures": ["OpenVLAForActionPrediction"],
        "auto_map": {
            "AutoConfig": "configuration_prismatic.OpenVLAConfig",
            "AutoModelForVision2Seq": "modeling_prismatic.OpenVLAForActionPrediction",
        },
        "hf_llm_id": "",
        "image_resize_strategy": "resize-naive",
        "image_sizes": [config.image_size] * 2,
        "llm_backbone_id": "qwen25-0_5b-extra",
        "llm_max_length": 2048,
        "model_type": MODEL_TYPE,
        "n_action_bins": 256,
        "norm_stats": config.norm_stats,
        "output_projector_states": False,
        "pad_to_multiple_of": 64,
        "pad_token_id": pad_token_id,
        "text_config": text,
        "timm_model_ids": ids,
        **({"timm_model_args": arguments} if arguments else {}),
        "timm_override_act_layers": [None, None],
        "torch_dtype": dtype,
        "transformers_version": TRANSFORMERS,
        "use_fused_vision_backbone": True,
        "vision_backbone_id": "dinosiglip-vit-so-224px",
    }


def _timm_models(config: VLAAdapterConfig) -> tuple[list[str], dict[str, dict[str, int]]]:
    """The towers' ids. For other sizes than the published ones, also the sizes, which only this package reads."""
    ids, arguments = [], {}
    for tower, published, published_id, other_id in (
        (config.dinov2_config, PUBLISHED_DINOV2, PUBLISHED_TIMM_IDS[0], "vit_patch14_reg4_dinov2"),
        (config.siglip_config, PUBLISHED_SIGLIP, PUBLISHED_TIMM_IDS[1], "vit_patch14_siglip"),
    ):
        sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads")
        width, depth, heads = (getattr(tower, name) for name in sizes)
        if (width, depth, heads) == tuple(published[name] for name in sizes):
            ids.append(published_id)
        else:
            ids.append(other_id)
            arguments[other_id] = {"embed_dim": width, "depth": depth + 1, "num_heads": heads}
    return ids, arguments


def has_published_towers(config: VLAAdapterConfig) -> bool:
    """Whether the towers are those that the original's code can make."""
    return not _timm_models(config)[1]


def write_published(
    folder: Path, config: VLAAdapterConfig, tensors: PublishedTensors, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Write all files of a published folder but the original's code.

    Args:
        folder (`Path`): to create.
        config ([`VLAAdapterConfig`]): of a model that [`check_expressible`] accepts.
        tensors ([`PublishedTensors`]): its tensors.
        tokenizer (`PreTrainedTokenizerBase`): a Qwen2 tokenizer.
    """
    folder.mkdir()
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.weights.items()}
    save_file(contiguous, folder / WEIGHTS, metadata={"format": "pt"})
    for name, part in ((ACTION_HEAD, tensors.action_head), (PROPRIO_PROJECTOR, tensors.proprio_projector)):
        # A copy, because torch.save would write the whole storage of which a tensor is a part.
        torch.save(
            OrderedDict((f"{PICKLE_PREFIX}{key}", tensor.clone()) for key, tensor in part.items()), folder / name
        )
    stored = published_config(config, tokenizer.pad_token_id)
    write_json(folder / "config.json", stored)
    write_json(folder / STATISTICS, config.norm_stats)
    tokens = {name: stored["text_config"].get(name) for name in ("bos_token_id", "eos_token_id")}
    generation = {"_from_model_config": True, **tokens, "pad_token_id": tokenizer.pad_token_id}
    write_json(folder / "generation_config.json", {**generation, "transformers_version": TRANSFORMERS})
    _write_processor(folder, config.image_size)
    _write_tokenizer(folder, tokenizer)


def _write_processor(folder: Path, image_size: int) -> None:
    size, processor = [image_size] * 2, "processing_prismatic.PrismaticProcessor"
    resize = {"antialias": True, "interpolation": 3, "max_size": None, "size": size}
    image_processor = {
        "auto_map": {"AutoImageProcessor": "processing_prismatic.PrismaticImageProcessor", "AutoProcessor": processor},
        "image_processor_type": "PrismaticImageProcessor",
        "image_resize_strategy": "resize-naive",
        "input_sizes": [[3, *size]] * 2,
        "interpolations": ["bicubic"] * 2,
        "means": [pixels["mean"] for pixels in PIXELS],
        "processor_class": "PrismaticProcessor",
        "stds": [pixels["std"] for pixels in PIXELS],
        "tvf_crop_params": [{"output_size": size}] * 2,
        "tvf_do_letterbox": False,
        "tvf_letterbox_fill": None,
        "tvf_normalize_params": [
            {"inplace": False, "mean": pixels["rounded_mean"], "std": pixels["rounded_std"]} for pixels in PIXELS
        ],
        "tvf_resize_params": [resize] * 2,
        "use_fused_vision_backbone": True,
    }
    write_json(folder / "preprocessor_config.json", image_processor)
    write_json(
        folder / "processor_config.json",
        {"auto_map": {"AutoProcessor": processor}, "processor_class": "PrismaticProcessor"},
    )


def _write_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """The tokenizer as the original's release of transformers reads it.

    There is no `tokenizer.json`, which that release cannot read when a newer one wrote it.
    """
    tokenizer.backend_tokenizer.model.save(str(folder))  # vocab.json and merges.txt
    names = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    added = {
        index: {name: getattr(token, name) for name in names}
        for index, token in sorted(tokenizer.added_tokens_decoder.items())
    }
    write_json(folder / "added_tokens.json", {token["content"]: index for index, token in added.items()})
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    more = [
        token["content"] for token in added.values() if token["special"] and token["content"] not in special.values()
    ]
    write_json(folder / "special_tokens_map.json", {"additional_special_tokens": more, **special})
    fields = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {str(index): token for index, token in added.items()},
        "additional_special_tokens": more,
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "errors": "replace",
        "model_max_length": tokenizer.model_max_length,
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
        "processor_class": "PrismaticProcessor",
    }
    write_json(folder / "tokenizer_config.json", {**fields, **special})
