"""`vla-adapter init`: a model with a new policy, to be trained, from pretrained vision and language.

Vision and language come from the base vision-language model of the published checkpoints (`base_vlm.py`), or from
repositories of DINOv2, SigLIP and Qwen2.5 (`backbones.py`). New parts start as in the original: policy and proprio
projector from PyTorch's defaults, action queries from N(0, 0.02²).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
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
from vla_adapter_hf.checkpoints.source import check_source
from vla_adapter_hf.modeling.configuration_vla_adapter import VLAAdapterConfig
from vla_adapter_hf.modeling.modeling_vla_adapter import VLAAdapterForActionPrediction
from vla_adapter_hf.processing.processing_vla_adapter import VLAAdapterProcessor
from vla_adapter_hf.robots import RobotPreset, get_robot


# The towers of the base from which the published models were trained.
USUAL_TOWERS = "facebook/dinov2-with-registers-large and google/siglip-so400m-patch14-224"
PART_NAMES = {"base": "base model", "dinov2": "DINOv2", "siglip": "SigLIP", "language_model": "language model"}
NEW_PARTS = ("action_queries.", "proprio_projector.", "policy.")


@dataclass(frozen=True)
class PretrainedParts:
    """Where the pretrained parts of a new model are: folders or Hub ids.

    Args:
        base (`str`): the base vision-language model in its own layout, such as
            `Stanford-ILIAD/prism-qwen25-extra-dinosiglip-224px-0_5b`.
        step (`str` or `int`): which of several saved steps of the base to take.
        dinov2, siglip (`str`): the towers, in transformers' layouts. Needed without a base, or with one that does not
            hold them.
        language_model (`str`): a Qwen2.5. Needed without a base. With a base that holds a language model, only the
            tokenizer and the configuration are taken from here.
        tokenizer (`str`): where the tokenizer is; by default with the language model.

    Raises:
        FileNotFoundError: for a path that does not exist.
    """

    base: str | Path | None = None
    step: str | int | None = None
    dinov2: str | None = None
    siglip: str | None = None
    language_model: str | None = None
    tokenizer: str | None = None

    def __post_init__(self) -> None:
        for name in (*PART_NAMES, "tokenizer"):
            if getattr(self, name) is not None:
                check_source(getattr(self, name), name)

    @property
    def tokenizer_source(self) -> str | None:
        return self.tokenizer or self.language_model

    def labels(self) -> dict[str, str]:
        """What to call each part in a model card: a folder's name, or a Hub id."""
        sources = {name: asdict(self)[name] for name in PART_NAMES}
        return {
            name: Path(source).name if Path(source).exists() else str(source)
            for name, source in sources.items()
            if source is not None
        }


def init_from_base(
    parts: PretrainedParts,
    *,
    robot: str | RobotPreset | None = None,
    norm_stats: dict[str, Any] | str | Path | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **config_fields: Any,
) -> tuple[VLAAdapterForActionPrediction, VLAAdapterProcessor]:
    """A model with a new policy, and its processor.

    By default it has a Pro policy with float32 rotary tables, the patches of all cameras as task states, and constant
    dimensions that are 0 inside the model.

    Args:
        parts ([`PretrainedParts`]): where everything else comes from.
        robot (`str` or [`RobotPreset`]): supplies sizes, cameras and normalisation; LIBERO by default.
        norm_stats (`dict`, or `str` or `Path` of a JSON file): statistics. A model without them does not predict.
        dtype (`torch.dtype`): precision of all weights.
        seed (`int`): seed of the new weights. The state of torch's own generator is kept.
        config_fields: any field of [`VLAAdapterConfig`]. Fields in `dinov2_config`, `siglip_config` and `text_config`
            replace what was found, one by one.

    Returns:
        `tuple`: the model in evaluation mode on the CPU, and the processor.

    Raises:
        ValueError, TypeError: when something is missing, of another kind or does not fit together; the message says
            what to give.
        OSError: when there is no such repository.
    """
    _check_names(config_fields)
    if isinstance(norm_stats, (str, Path)):
        norm_stats = read_json(Path(norm_stats), str(Path(norm_stats).parent))
    # 1. Refuse what is missing, before weights are read.
    base = None if parts.base is None else open_base(parts.base, parts.step)
    _check_parts(parts, base)
    tokenizer = load_tokenizer(parts.tokenizer_source)

    # 2. The parts: configurations and tensors.
    given = {name: config_fields.pop(name) for name in VLAAdapterConfig.sub_configs if name in config_fields}
    fields, state_dict = _load_parts(parts, base, given, dtype)

    # 3. The model around them.
    config = _build_config(fields, robot, {"norm_stats": norm_stats, "dtype": dtype, **config_fields})
    new_parts = NEW_PARTS if base is not None else (*NEW_PARTS, "vision_projector.")
    check_shapes(config, state_dict, " + ".join(parts.labels().values()), "what this model starts from", new_parts)
    processor = VLAAdapterProcessor.from_model_config(config, tokenizer)
    _check_vocabulary(processor, config.text_config.vocab_size, parts.tokenizer_source)
    with expected_warnings(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # Names and sizes were checked above; strict=False lets the new parts be missing.
        model = VLAAdapterForActionPrediction.from_pretrained(
            None, config=config, state_dict=state_dict, dtype=dtype, strict=False
        )
    return model, processor


def init(
    destination: str | Path,
    parts: PretrainedParts,
    *,
    report_progress: Callable[[str], None] = print,
    **options: Any,
) -> Path:
    """Write a model with a new policy in our own layout, with its processor and a model card.

    Args:
        destination (`str` or `Path`): folder to make. It appears complete or not at all.
        parts, options: as in [`init_from_base`].
        report_progress (`Callable`): receives lines of progress.

    Returns:
        `Path`: the destination.

    Raises:
        ValueError, TypeError, OSError: as [`init_from_base`], and when the destination exists; nothing is written.
    """
    destination = check_destination(destination)
    labels = parts.labels()
    for name, label in labels.items():
        report_progress(f"{PART_NAMES[name]}: {label}")
    report_progress("Reading the weights")
    model, processor = init_from_base(parts, **options)
    config = model.config
    report_progress(
        f"  chunk: {config.chunk_size} actions of {config.action_dim} values, state: {config.proprio_dim} values"
    )
    report_progress(f"  cameras: {', '.join(config.cameras)}, normalisation: {config.norm_type}")
    report_progress(f"  statistics: {', '.join(config.norm_stats or ['none, they come with training'])}")
    write_checkpoint(destination, model, processor, _model_card(config, labels, destination.name), report_progress)
    report_progress(f"Done: {destination}, an untrained policy to start from")
    return destination


def _load_parts(
    parts: PretrainedParts, base: BaseModel | None, given: dict[str, dict[str, Any]], dtype: torch.dtype
) -> tuple[dict[str, dict[str, Any]], dict[str, torch.Tensor]]:
    """The configurations of the parts with the fields that were given, and tensors under the names of our files."""
    fields: dict[str, dict[str, Any]] = {}
    state_dict: dict[str, torch.Tensor] = {}
    if base is not None:
        text_fields = None if parts.language_model is None else language_model_fields(parts.language_model)
        fields, state_dict = base_fields(base, given, text_fields), base_state_dict(base)
    if base is None or not base.has_vision:
        tower_fields, tensors = load_towers(parts.dinov2, parts.siglip)
        fields.update(tower_fields)
        state_dict.update(tensors)
    if base is None or not base.has_language_model:
        fields["text_config"], tensors = load_language_model(parts.language_model, dtype)
        state_dict.update(tensors)
    return {name: {**found, **given.get(name, {})} for name, found in fields.items()}, state_dict


def _check_names(config_fields: dict[str, Any]) -> None:
    unknown = sorted(set(config_fields) - set(VLAAdapterConfig.__dataclass_fields__))
    if unknown:
        raise TypeError(
            f"{', '.join(unknown)}: neither an argument of init_from_base nor a field of VLAAdapterConfig."
        )
    for name in VLAAdapterConfig.sub_configs:
        if not isinstance(config_fields.get(name, {}), dict):
            raise TypeError(f"{name} must be a dict of fields, got {type(config_fields[name]).__name__}.")


def _check_parts(parts: PretrainedParts, base: BaseModel | None) -> None:
    """Refuse when a part has no source, or two."""
    towers = [name for name in ("dinov2", "siglip") if getattr(parts, name) is None]
    missing = towers
    if base is not None and base.has_vision:
        if len(towers) < 2:
            raise ValueError(f"{base.source} holds its vision towers; leave dinov2 and siglip out.")
        missing = []
    if parts.language_model is None and (base is None or not base.has_language_model):
        missing = [*missing, "language_model"]
    if missing:
        options = ", ".join(f"{name}=... (--{name.replace('_', '-')})" for name in missing)
        if base is None:
            raise ValueError(f"{options} missing: name a base model, or DINOv2, SigLIP and Qwen2.5 repositories.")
        hint = f" The usual towers are {USUAL_TOWERS}." if set(missing) & set(towers) else ""
        raise ValueError(f"{base.source} ({base.file_name}) does not hold everything: give {options}.{hint}")
    if parts.tokenizer_source is None:
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
        # A new policy needs no compatibility: exact tables, and one rule for constant dimensions in both directions.
        "policy_rope_dtype": "float32",
        "constant_dims": "zero",
        **parts,
        **config_fields,
    }
    return VLAAdapterConfig(**fields)


def _check_vocabulary(processor: VLAAdapterProcessor, vocab_size: int, source: str) -> None:
    """Refuse a tokenizer whose tokens the language model does not have."""
    highest = max(processor.tokenizer(processor.make_prompts("pick up the cup")[0])["input_ids"])
    if highest >= vocab_size:
        raise ValueError(
            f"The tokenizer of {source} has a token {highest}, but the language model has {vocab_size}; they do not "
            "belong together."
        )


def _model_card(config: VLAAdapterConfig, labels: dict[str, str], title: str) -> str:
    origin = ", ".join(f"{PART_NAMES[name]} `{label}`" for name, label in labels.items())
    projector = "" if "base" in labels else " and the vision projector"
    return fill_model_card(
        config,
        title=title,
        summary=(
            "**An untrained policy, to start training from.** The vision towers and the language model are pretrained "
            f"({origin}). The policy, the proprio projector and the action queries{projector} are new. Until it is "
            "trained, its actions mean nothing."
        ),
        repo=title,
        base_model=list(labels.values()),
        results="Not trained, not evaluated.",
    )
