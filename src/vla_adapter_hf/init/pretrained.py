"""`vla-adapter init`: a model with a new policy, to train from, out of pretrained vision and language.

Vision and language come from the base vision-language model of the published checkpoints (`base_model.py`), or from
repositories of DINOv2, SigLIP and Qwen2.5 (`pretrained_parts.py`). What is new starts as in the original: policy and
proprio projector from PyTorch's defaults, action queries from N(0, 0.02²).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from vla_adapter_hf.checkpoints.backbones import (
    expected_warnings,
    language_model_fields,
    load_language_model,
    load_tokenizer,
    load_towers,
)
from vla_adapter_hf.checkpoints.base_vlm import BaseModel, base_fields, base_state_dict, open_base
from vla_adapter_hf.checkpoints.files import read_json
from vla_adapter_hf.checkpoints.model_card import fill_model_card
from vla_adapter_hf.checkpoints.saving import check_destination, write_checkpoint
from vla_adapter_hf.checkpoints.shapes import check_shapes
from vla_adapter_hf.modeling.configuration_vla_adapter import VLAAdapterConfig
from vla_adapter_hf.modeling.modeling_vla_adapter import VLAAdapterForActionPrediction
from vla_adapter_hf.processing.processing_vla_adapter import VLAAdapterProcessor
from vla_adapter_hf.robots import RobotPreset, get_robot


# Of the base: what the published models were trained from.
USUAL_TOWERS = "facebook/dinov2-with-registers-large and google/siglip-so400m-patch14-224"
SOURCE_NAMES = {"base": "base model", "dinov2": "DINOv2", "siglip": "SigLIP", "language_model": "language model"}
NEW_PARTS = ("action_queries.", "proprio_projector.", "policy.")


def init_from_base(
    base: str | Path | None = None,
    *,
    dinov2: str | None = None,
    siglip: str | None = None,
    language_model: str | None = None,
    tokenizer: str | None = None,
    robot: str | RobotPreset | None = None,
    norm_stats: dict[str, Any] | str | Path | None = None,
    step: str | int | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **config_fields: Any,
) -> tuple[VLAAdapterForActionPrediction, VLAAdapterProcessor]:
    """A model with a new policy, and its processor.

    Sources are folders or Hub ids. What is not said otherwise: a Pro policy with float32 rotary tables, task states
    that are all the patches, and constant dimensions that are 0 inside the model.

    Args:
        base: the base vision-language model in its own layout, such as
            `Stanford-ILIAD/prism-qwen25-extra-dinosiglip-224px-0_5b`.
        dinov2, siglip: the towers, in transformers' layouts. Needed without a base, or with one that holds none.
        language_model: a Qwen2.5. Needed without a base. Beside one, its tokenizer and configuration are taken and not
            its weights.
        tokenizer: where the tokenizer is; by default with the language model.
        robot (`str` or [`RobotPreset`]): supplies sizes, cameras and normalisation; LIBERO by default.
        norm_stats (`dict`, or `str` or `Path` of a JSON file): statistics to put in. Without, `predict_action` refuses.
        step (`str` or `int`): which of several saved steps of the base to take.
        dtype (`torch.dtype`): precision of all weights.
        seed (`int`): what the new parts are drawn from; torch's own generator is left as it was.
        config_fields: any field of [`VLAAdapterConfig`]. Those in `dinov2_config`, `siglip_config` and `text_config`
            replace what was found, one by one.

    Returns:
        `tuple`: the model in evaluation mode on the CPU, and the processor.

    Raises:
        ValueError, TypeError: when something is missing, of another kind or does not fit together; the message says
            what to give.
        OSError: when there is no such folder or repository.
    """
    _check_names(config_fields)
    if isinstance(norm_stats, (str, Path)):
        norm_stats = read_json(Path(norm_stats), str(Path(norm_stats).parent))
    tokenizer_source = tokenizer or language_model
    # 1. What is asked for, before anything is loaded.
    opened = None if base is None else open_base(base, step)
    _check_sources(opened, dinov2, siglip, language_model, tokenizer_source)
    loaded_tokenizer = load_tokenizer(tokenizer_source)

    # 2. The parts: configurations and tensors.
    given = {name: config_fields.pop(name) for name in VLAAdapterConfig.sub_configs if name in config_fields}
    fields: dict[str, dict[str, Any]] = {}
    state_dict: dict[str, torch.Tensor] = {}
    if opened is not None:
        text_fields = None if language_model is None else language_model_fields(language_model)
        fields, state_dict = base_fields(opened, given, text_fields), base_state_dict(opened)
    if opened is None or not opened.has_vision:
        tower_fields, tensors = load_towers(dinov2, siglip)
        fields.update(tower_fields)
        state_dict.update(tensors)
    if opened is None or not opened.has_language_model:
        fields["text_config"], tensors = load_language_model(language_model, dtype)
        state_dict.update(tensors)
    fields = {name: {**found, **given.get(name, {})} for name, found in fields.items()}

    # 3. The model around them.
    config = _build_config(fields, robot, {"norm_stats": norm_stats, "dtype": dtype, **config_fields})
    sources = [str(source) for source in (base, dinov2, siglip, language_model) if source is not None]
    new_parts = NEW_PARTS if opened is not None else (*NEW_PARTS, "vision_projector.")
    check_shapes(config, state_dict, " + ".join(sources), "what this model starts from", new_parts)
    processor = VLAAdapterProcessor.from_model_config(config, loaded_tokenizer)
    _check_tokenizer(processor, config.text_config.vocab_size, tokenizer_source)
    with expected_warnings(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # Names and sizes were checked above; the argument lets the new parts be missing.
        model = VLAAdapterForActionPrediction.from_pretrained(
            None, config=config, state_dict=state_dict, dtype=dtype, strict=False
        )
    return model, processor


def init(
    destination: str | Path,
    base: str | Path | None = None,
    *,
    say: Callable[[str], None] = print,
    **options: Any,
) -> Path:
    """Write a model with a new policy in our own layout, with its processor and a model card.

    Args:
        destination (`str` or `Path`): folder to make. It appears complete or not at all.
        base, options: as in [`init_from_base`].
        say (`Callable`): receives a line of progress at a time.

    Returns:
        `Path`: the destination.

    Raises:
        ValueError, TypeError, OSError: as [`init_from_base`], and when the destination is there already; nothing is
            written.
    """
    destination = check_destination(destination)
    named = {"base": base, **options}
    sources = {name: _label(named[name]) for name in SOURCE_NAMES if named.get(name) is not None}
    for name, source in sources.items():
        say(f"{SOURCE_NAMES[name]}: {source}")
    say("Reading the weights")
    model, processor = init_from_base(base, **options)
    config = model.config
    say(f"  chunk: {config.chunk_size} actions of {config.action_dim} values, state: {config.proprio_dim} values")
    say(f"  cameras: {', '.join(config.cameras)}, normalisation: {config.norm_type}")
    say(f"  statistics: {', '.join(config.norm_stats or ['none, they come with training'])}")
    write_checkpoint(destination, model, processor, _model_card(config, sources, destination.name), say)
    say(f"Done: {destination}, an untrained policy to start from")
    return destination


def _check_names(config_fields: dict[str, Any]) -> None:
    unknown = sorted(set(config_fields) - set(VLAAdapterConfig.__dataclass_fields__))
    if unknown:
        raise TypeError(
            f"{', '.join(unknown)}: neither an argument of init_from_base nor a field of VLAAdapterConfig."
        )
    for name in VLAAdapterConfig.sub_configs:
        if not isinstance(config_fields.get(name, {}), dict):
            raise TypeError(f"{name} must be a dict of fields, got {type(config_fields[name]).__name__}.")


def _check_sources(
    base: BaseModel | None,
    dinov2: str | None,
    siglip: str | None,
    language_model: str | None,
    tokenizer: str | None,
) -> None:
    """Refuse when a part has no source, or two."""
    towers = {"dinov2": dinov2, "siglip": siglip}
    missing = [name for name, source in towers.items() if source is None]
    if base is not None and base.has_vision:
        if len(missing) < 2:
            raise ValueError(f"{base.source} holds its vision towers; leave {' and '.join(towers)} out.")
        missing = []
    if language_model is None and (base is None or not base.has_language_model):
        missing.append("language_model")
    if missing:
        options = ", ".join(f"{name}=... (--{name.replace('_', '-')})" for name in missing)
        if base is None:
            raise ValueError(f"{options} missing: name a base model, or DINOv2, SigLIP and Qwen2.5 repositories.")
        hint = f" The usual towers are {USUAL_TOWERS}." if set(missing) & set(towers) else ""
        raise ValueError(f"{base.source} ({base.file_name}) does not hold everything: give {options}.{hint}")
    if tokenizer is None:
        raise ValueError(
            f"{base.source} has no tokenizer: name where it is (tokenizer=..., --tokenizer), or the language model's "
            "repository (language_model=..., --language-model), such as Qwen/Qwen2.5-0.5B."
        )


def _build_config(
    parts: dict[str, dict[str, Any]], robot: str | RobotPreset | None, config_fields: dict[str, Any]
) -> VLAAdapterConfig:
    preset = get_robot(robot or "libero")
    fields = {
        "cameras": list(preset.cameras),
        "chunk_size": preset.chunk_size,
        "action_dim": preset.action_dim,
        "proprio_dim": preset.state_dim,
        "norm_type": preset.norm_type,
        "policy_num_layers": parts["text_config"]["num_hidden_layers"],
        # Nothing trained has to be matched: exact tables, and one rule for constant dimensions in both directions.
        "policy_rope_dtype": "float32",
        "constant_dims": "zero",
        **parts,
        **config_fields,
    }
    return VLAAdapterConfig(**fields)


def _check_tokenizer(processor: VLAAdapterProcessor, vocab_size: int, source: str) -> None:
    """Refuse a tokenizer that is not the language model's."""
    tokenizer = processor.tokenizer
    prompt = processor.make_prompts("pick up the cup")[0]
    ids = tokenizer(prompt)["input_ids"]
    if max(ids) >= vocab_size:
        raise ValueError(
            f"The tokenizer of {source} has a token {max(ids)}, but the language model knows {vocab_size}; they do not "
            "belong together."
        )


def _label(source: str | Path) -> str:
    """What to call a source to others: a folder without the way to it, a Hub id as it is."""
    return Path(source).name if Path(source).exists() else str(source)


def _model_card(config: VLAAdapterConfig, sources: dict[str, str], title: str) -> str:
    origin = ", ".join(f"{SOURCE_NAMES[name]} `{source}`" for name, source in sources.items())
    projector = "" if "base" in sources else ", vision projector"
    return fill_model_card(
        config,
        title=title,
        summary=(
            f"**An untrained policy, to start training from.** Pretrained are the vision towers and the language model "
            f"({origin}); the policy, proprio projector, action queries{projector} are new. Until it is trained, its "
            "actions mean nothing."
        ),
        repo=title,
        results="Not trained, not evaluated.",
    )
