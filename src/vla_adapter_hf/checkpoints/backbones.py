"""Vision towers, language model and tokenizer from their own repositories, as parts of a new VLA-Adapter.

transformers' own classes load them, because the names of their parameters depend on the release of transformers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    Dinov2WithRegistersModel,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2Model,
    Qwen2Tokenizer,
    SiglipVisionModel,
)
from transformers.utils import logging

from vla_adapter_hf.modeling.checkpoint_names_vla_adapter import name_in_file
from vla_adapter_hf.processing.processing_vla_adapter import check_tokenizer


# The fields of a tower's configuration that decide what its weights compute.
DINOV2_FIELDS = (
    "hidden_size",
    "num_attention_heads",
    "mlp_ratio",
    "patch_size",
    "num_channels",
    "num_register_tokens",
    "layer_norm_eps",
    "hidden_act",
    "qkv_bias",
    "use_swiglu_ffn",
)
SIGLIP_FIELDS = (
    "hidden_size",
    "num_attention_heads",
    "intermediate_size",
    "image_size",
    "patch_size",
    "num_channels",
    "layer_norm_eps",
)
# The fields of the language model's configuration that describe only its file.
NOT_TAKEN = {"model_type", "architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path"}

Part = tuple[dict[str, Any], dict[str, torch.Tensor]]


def load_towers(dinov2: str, siglip: str) -> tuple[dict[str, dict[str, Any]], dict[str, torch.Tensor]]:
    """Both towers from repositories in transformers' layouts, without their last blocks and final norms.

    SigLIP's image size becomes the model's; DINOv2's table of positions is resampled to it.

    Args:
        dinov2 (`str`): folder or Hub id, such as `facebook/dinov2-with-registers-large`.
        siglip (`str`): folder or Hub id of a whole SigLIP or of its vision part, such as
            `google/siglip-so400m-patch14-224`.

    Returns:
        `tuple[dict, dict]`: `{"dinov2_config": ..., "siglip_config": ...}`, and float32 tensors by the names of our
        files.

    Raises:
        ValueError: for another kind of model, or weights that do not fill it.
        OSError: when there is no such repository.
    """
    # Check both before the first is loaded.
    _check_model_type(dinov2, ("dinov2_with_registers",), "DINOv2 with registers", "dinov2")
    _check_model_type(siglip, ("siglip", "siglip_vision_model"), "SigLIP", "siglip")
    siglip_fields, state_dict = _load_siglip(siglip)
    dinov2_fields, dinov2_state_dict = _load_dinov2(dinov2, siglip_fields["image_size"], siglip_fields["patch_size"])
    return {"dinov2_config": dinov2_fields, "siglip_config": siglip_fields}, {**dinov2_state_dict, **state_dict}


def load_language_model(source: str, dtype: torch.dtype) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """A Qwen2 language model without its head, as `text_config` and tensors by the names of our files.

    Raises:
        ValueError, OSError: as [`load_towers`].
    """
    fields = language_model_fields(source)
    model = _load(Qwen2Model, source, dtype, "language_model")
    return fields, {f"language_model.{name}": tensor for name, tensor in model.state_dict().items()}


def language_model_fields(source: str) -> dict[str, Any]:
    """The `text_config` of a Qwen2 repository, without loading its weights.

    Raises:
        ValueError: for another kind of model.
        OSError: when there is no such repository.
    """
    _check_model_type(source, ("qwen2",), "Qwen2 (Qwen2.5 included)", "language_model")
    config = Qwen2Config.from_pretrained(source).to_dict()
    return {name: value for name, value in config.items() if name not in NOT_TAKEN}


def load_tokenizer(source: str, **kwargs: Any) -> PreTrainedTokenizerBase:
    """The Qwen2 tokenizer of a repository, whether it has a `tokenizer.json` or a `vocab.json` and `merges.txt`.

    Args:
        source (`str`): folder or Hub id.
        kwargs: `revision`, `token`, `cache_dir` and the like, and options of the tokenizer.

    Raises:
        ValueError: when a file is missing or damaged, or it is another kind of tokenizer.
        OSError: when there is no such repository.
    """
    try:
        tokenizer = Qwen2Tokenizer.from_pretrained(source, **kwargs)
    except OSError:
        raise
    except Exception as error:  # tokenizers raises plain Exceptions for damaged files
        raise ValueError(f"The tokenizer of {source} is missing a file, or one is damaged: {error}.") from error
    check_tokenizer(tokenizer, source)
    return tokenizer


@contextmanager
def expected_warnings() -> Iterator[None]:
    """Hide transformers' warnings about weights that are left out, or new, on purpose. Errors are still raised."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def fold_class_position(
    class_token: torch.Tensor, positions: torch.Tensor, grid: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """DINOv2's class token with its position added, and the table of the patches' positions for another grid.

    The table is resized as in timm, with which the published models were trained: bicubic with antialiasing, in
    float32. transformers does the same when an image has another size than the table.

    Args:
        class_token (`torch.Tensor`): `(1, 1, hidden)`.
        positions (`torch.Tensor`): `(1, 1 + rows * rows, hidden)`, the class token's first.
        grid (`int`): patches per side of the result.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: `(1, 1, hidden)`, and `(1, 1 + grid * grid, hidden)` with a first row of
            zeros.
    """
    of_class, of_patches = positions[:, :1], positions[:, 1:]
    rows = round(of_patches.shape[1] ** 0.5)
    if rows != grid:
        table = of_patches.unflatten(1, (rows, rows)).permute(0, 3, 1, 2)  # (1, hidden, rows, rows)
        table = nn.functional.interpolate(
            table.float(), size=(grid, grid), mode="bicubic", align_corners=False, antialias=True
        )
        of_patches = table.flatten(2).transpose(1, 2).to(positions.dtype)
    return class_token + of_class, torch.cat((torch.zeros_like(of_class), of_patches), dim=1)


def _load_dinov2(source: str, image_size: int, patch_size: int) -> Part:
    model = _load(Dinov2WithRegistersModel, source, torch.float32, "dinov2")
    config = model.config
    if config.patch_size != patch_size:
        raise ValueError(
            f"{source} cuts images into patches of {config.patch_size} pixels and the SigLIP tower into patches of "
            f"{patch_size}; they must be equal."
        )
    depth = config.num_hidden_layers - 1
    state_dict = _tensors(model, "dinov2", ("layernorm.", f"encoder.layer.{depth}."))
    names = ("dinov2.embeddings.cls_token", "dinov2.embeddings.position_embeddings")
    folded = fold_class_position(*(state_dict[name] for name in names), image_size // patch_size)
    fields = {name: getattr(config, name) for name in DINOV2_FIELDS}
    return (
        {**fields, "num_hidden_layers": depth, "image_size": image_size},
        {**state_dict, **dict(zip(names, folded, strict=True))},
    )


def _load_siglip(source: str) -> Part:
    model = _load(SiglipVisionModel, source, torch.float32, "siglip")
    config = model.config
    depth = config.num_hidden_layers - 1
    state_dict = _tensors(model, "siglip", ("post_layernorm.", "head.", f"encoder.layers.{depth}."))
    fields = {name: getattr(config, name) for name in SIGLIP_FIELDS}
    # Trained with the exact GELU, as the published models use it, although the configuration on the Hub says tanh.
    return {**fields, "num_hidden_layers": depth, "hidden_act": "gelu", "vision_use_head": False}, state_dict


def _tensors(model: PreTrainedModel, tower: str, left_out: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """A tower's tensors under the names of our files, without those that have no effect."""
    named = {name_in_file(f"{tower}.{name}"): tensor for name, tensor in model.state_dict().items()}
    dropped = tuple(f"{tower}.{prefix}" for prefix in left_out)
    return {name: tensor for name, tensor in named.items() if not name.startswith(dropped)}


def _load(model_class: type[PreTrainedModel], source: str, dtype: torch.dtype, part: str) -> PreTrainedModel:
    with expected_warnings():
        config = model_class.config_class.from_pretrained(source)
        try:
            model, loading_info = model_class.from_pretrained(
                source,
                config=config,
                dtype=dtype,
                key_mapping=_names_of_newer_releases(model_class, config, part),
                output_loading_info=True,
            )
        except (RuntimeError, SafetensorError) as error:
            raise ValueError(
                f"The weights of {source} cannot be read ({str(error).strip().splitlines()[0]})."
            ) from error
    missing = sorted(loading_info["missing_keys"])
    if missing:
        shown = ", ".join(missing[:4]) + (f" and {len(missing) - 4} more" if len(missing) > 4 else "")
        raise ValueError(f"{source} does not fill a {model_class.__name__}: {shown} missing.")
    return model


def _names_of_newer_releases(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, part: str
) -> dict[str, str] | None:
    """`key_mapping` with which an older transformers also reads a tower that a newer one has saved."""
    with torch.device("meta"):
        names = model_class(config).state_dict()
    newer = {name: name_in_file(f"{part}.{name}").removeprefix(f"{part}.") for name in names}
    return {f"^{re.escape(new)}$": name for name, new in newer.items() if new != name} or None


def _check_model_type(source: str, expected: tuple[str, ...], kind: str, argument: str) -> None:
    found = PreTrainedConfig.get_config_dict(source)[0].get("model_type")
    if found not in expected:
        option = argument.replace("_", "-")
        raise ValueError(
            f"{source} has model_type {found!r}; {argument} (--{option}) must be a {kind} model "
            f"({' or '.join(map(repr, expected))})."
        )
