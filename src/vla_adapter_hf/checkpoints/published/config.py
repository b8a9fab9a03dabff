"""The configuration of a checkpoint in the published layout: from tensor shapes, `config.json` and a robot preset."""

from __future__ import annotations

from typing import Any

from transformers.utils import logging

from vla_adapter_hf.checkpoints.files import Shapes
from vla_adapter_hf.checkpoints.published.files import PublishedFiles, config_entry, shape_of
from vla_adapter_hf.checkpoints.published.names import DINOV2_PREFIX, SIGLIP_PREFIX, block_numbers
from vla_adapter_hf.modeling.configuration_vla_adapter import VLAAdapterConfig
from vla_adapter_hf.robots import RobotPreset, get_robot


logger = logging.get_logger(__name__)

POLICY_HEADS = 8
# The published code splits every layer's states here, whatever the number of cameras.
TASK_TOKENS = 512
# Attention heads do not show in the tensors; these are those of the published model ids.
TIMM_HEADS = {"vit_large_patch14_reg4_dinov2": 16, "vit_so400m_patch14_siglip_224": 16}


def build_config(files: PublishedFiles, robot: str | RobotPreset | None = None, **overrides: Any) -> VLAAdapterConfig:
    """The configuration of a published checkpoint.

    Sizes come from its tensors. Chunk length, cameras and the type of normalisation leave no trace there. They come
    from the robot preset, LIBERO by default, and are logged.

    Args:
        files ([`PublishedFiles`]): what was found.
        robot (`str` or [`RobotPreset`], *optional*): which preset to take.
        overrides: fields of [`VLAAdapterConfig`] that replace what was found.

    Raises:
        ValueError: when the tensors do not fit the preset or one another, or statistics are missing.
    """
    preset, source = get_robot(robot or "libero"), files.source
    sizes = {
        "action_dim": files.shape(files.action_head_shapes, "model.fc2.weight")[0],
        "proprio_dim": files.shape(files.proprio_projector_shapes, "fc1.weight")[1],
    }
    for name, expected in (("action_dim", preset.action_dim), ("proprio_dim", preset.state_dim)):
        if sizes[name] != expected and name not in overrides:
            raise ValueError(
                f"{source} has {name}={sizes[name]}, but a {preset.name} robot has {expected}. Its chunk length and "
                "cameras cannot be read off the weights: name its robot (robot=..., --robot), or, for a robot of your "
                f"own, give chunk_size, cameras, norm_type and {name}."
            )
    blocks = block_numbers(files.action_head_shapes, "model.mlp_resnet_blocks.")
    is_pro = any(".k_task." in name for name in files.action_head_shapes)
    fields = {
        "dinov2_config": dinov2_fields(files.shapes, _tower_heads(files, 0), source),
        "siglip_config": siglip_fields(files.shapes, _tower_heads(files, 1), source),
        "text_config": _text_config(files),
        "cameras": list(preset.cameras),
        "num_action_queries": files.shape(files.shapes, "action_queries.weight")[0],
        "chunk_size": preset.chunk_size,
        **sizes,
        "policy_variant": "pro" if is_pro else "original",
        "policy_num_layers": 1 + max(blocks, default=-1),
        "policy_num_heads": POLICY_HEADS,
        "policy_rope_dtype": "bfloat16",
        "policy_task_tokens": TASK_TOKENS,
        "norm_type": preset.norm_type,
        "norm_stats": files.norm_stats,
        "constant_dims": "published",
        "image_jpeg_round_trip": True,
        "image_center_crop": 0.9,
        "dtype": files.config.get("torch_dtype"),
        **overrides,
    }
    if not fields["norm_stats"]:
        raise ValueError(
            f"{source} has no dataset_statistics.json, or an empty one. The statistics in its config.json are those "
            "of other datasets; give the ones that the model was trained with (norm_stats=...)."
        )
    config = VLAAdapterConfig(**fields)
    logger.warning_once(
        f"{source}: taken as a {preset.name} model: chunks of {config.chunk_size} actions, cameras "
        f"{', '.join(config.cameras)}, normalisation {config.norm_type}. The weights do not show this; if it is "
        "another robot, name it (robot=..., --robot)."
    )
    return config


def dinov2_fields(shapes: Shapes, heads: int, source: str) -> dict[str, Any]:
    """The configuration of the first tower, from published names and shapes and the number of attention heads."""
    fields = _tower_fields(shapes, DINOV2_PREFIX, heads, source)
    registers = shape_of(shapes, f"{DINOV2_PREFIX}reg_token", source)[1]
    mlp_ratio = fields.pop("intermediate_size") // fields["hidden_size"]
    return {**fields, "num_register_tokens": registers, "mlp_ratio": mlp_ratio}


def siglip_fields(shapes: Shapes, heads: int, source: str) -> dict[str, Any]:
    """The configuration of the second tower."""
    return {**_tower_fields(shapes, SIGLIP_PREFIX, heads, source), "vision_use_head": False}


def _tower_fields(shapes: Shapes, prefix: str, heads: int, source: str) -> dict[str, Any]:
    width, _, patch_size, _ = shape_of(shapes, f"{prefix}patch_embed.proj.weight", source)
    num_patches = shape_of(shapes, f"{prefix}pos_embed", source)[1]
    return {
        "hidden_size": width,
        "num_hidden_layers": max(block_numbers(shapes, f"{prefix}blocks."), default=0),
        "num_attention_heads": heads,
        "intermediate_size": shape_of(shapes, f"{prefix}blocks.0.mlp.fc1.weight", source)[0],
        "image_size": round(num_patches**0.5) * patch_size,
        "patch_size": patch_size,
        "layer_norm_eps": 1e-6,
        "hidden_act": "gelu",
    }


def _tower_heads(files: PublishedFiles, tower: int) -> int:
    config, source = files.config, files.source
    model_ids = config_entry(config, "timm_model_ids", list, source)
    model_id = str(model_ids[tower]) if tower < len(model_ids) else None
    arguments = config_entry(config_entry(config, "timm_model_args", dict, source), model_id, dict, source)
    heads = arguments.get("num_heads", TIMM_HEADS.get(str(model_id).split(".")[0]))
    if heads is None:
        raise ValueError(
            f"{source}: vision tower {model_id!r} is not known, and the number of its attention heads does not show "
            f"in the weights. Known: {', '.join(TIMM_HEADS)}."
        )
    if not isinstance(heads, int) or heads < 1:
        raise ValueError(f"config.json of {source}: num_heads of {model_id} must be an int above 0, got {heads!r}.")
    return heads


def _text_config(files: PublishedFiles) -> dict[str, Any]:
    # The published pad token id is that of another language model. Pads are never looked up, so it is left out.
    dropped = {"model_type", "torch_dtype", "pad_token_id"}
    text_config = {key: value for key, value in files.config["text_config"].items() if key not in dropped}
    return {**text_config, "vocab_size": files.shape(files.shapes, "language_model.model.embed_tokens.weight")[0]}
