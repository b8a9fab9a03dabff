"""Reading the base vision-language model from which VLA-Adapter is trained.

`Stanford-ILIAD/prism-qwen25-extra-dinosiglip-224px-0_5b` has a file `checkpoints/latest-checkpoint.pt` or
`checkpoints/step-*-epoch-*-loss=*.pt`. It is a pickle of `{"model": {"vision_backbone": ..., "llm_backbone": ...,
"projector": ...}}`. Towers that were frozen in its training are not in it. Its tensors are renamed as in the published
layout, and then translated like those of a published checkpoint.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vla_adapter_hf.checkpoints.files import as_state_dict, read_pickle
from vla_adapter_hf.checkpoints.published.config import dinov2_fields, siglip_fields
from vla_adapter_hf.checkpoints.published.names import DINOV2_PREFIX, SIGLIP_PREFIX, has_effect, translate_weight
from vla_adapter_hf.checkpoints.source import open_files
from vla_adapter_hf.modeling.configuration_vla_adapter import PUBLISHED_DINOV2, PUBLISHED_QWEN2, PUBLISHED_SIGLIP


FOLDER = "checkpoints"
LATEST = "latest-checkpoint.pt"
# The name of the tower in a base with one vision tower.
ONE_TOWER = "vision_backbone:featurizer."
STEP_FILE = re.compile(r"step-(\d+)-epoch-\d+-loss=.+\.pt")
# Prefixes of the names in each part of the file, and those of the published layout.
PUBLISHED_PREFIXES = {
    "vision_backbone": {"dino_featurizer.": DINOV2_PREFIX, "siglip_featurizer.": SIGLIP_PREFIX},
    "llm_backbone": {"llm.": "language_model."},
    "projector": {f"projector.{2 * index}.": f"projector.fc{index + 1}." for index in range(3)},
}


@dataclass
class BaseModel:
    """One file of a base model.

    Args:
        source (`str`): the folder or Hub id.
        file_name (`str`): the file's name.
        tensors (`dict`): under the names of the published layout; memory-mapped where the file's format allows.
    """

    source: str
    file_name: str
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def has_vision(self) -> bool:
        return self._has(DINOV2_PREFIX)

    @property
    def has_language_model(self) -> bool:
        return self._has("language_model.")

    def _has(self, prefix: str) -> bool:
        return any(name.startswith(prefix) for name in self.tensors)


def open_base(source: str | Path, step: str | int | None = None) -> BaseModel:
    """Find the file of a base model and open it.

    Args:
        source (`str` or `Path`): a folder or a Hub id.
        step (`str` or `int`, *optional*): which of several saved steps to take (`20792`, `"latest"`). By default the
            latest, or the only one.

    Raises:
        ValueError: when there is no such file, a step must be chosen, or the file holds something else.
        FileNotFoundError: when there is no such folder or repository.
    """
    files = open_files(source, argument="base").subfolder(FOLDER)
    path = files.path(_choose(files.names, step, files.source))
    content = read_pickle(path)
    parts = content.get("model") if isinstance(content, dict) else None
    if not isinstance(parts, dict) or "projector" not in parts:
        found = sorted(map(str, parts if isinstance(parts, dict) else content)) if isinstance(content, dict) else []
        raise ValueError(
            f"{path.name} of {source} is not a vision-language model's: it must hold "
            "{'model': {'vision_backbone': ..., 'llm_backbone': ..., 'projector': ...}}, got "
            f"{', '.join(found[:6]) or type(content).__name__}."
        )
    base = BaseModel(str(source), path.name)
    for part, tensors in parts.items():
        for name, tensor in as_state_dict(tensors, f"{part} in {path.name}").items():
            base.tensors[_published_name(part, name)] = tensor
    if base.has_vision != base._has(SIGLIP_PREFIX) or any(name.startswith(ONE_TOWER) for name in base.tensors):
        raise ValueError(f"{source} has one vision tower; VLA-Adapter needs a base with two, DINOv2 and SigLIP.")
    return base


def base_fields(
    base: BaseModel, given: dict[str, dict[str, Any]], language_model: dict[str, Any] | None = None
) -> dict[str, dict[str, Any]]:
    """The configurations of the parts that the base holds, from its tensors and from the published model.

    Args:
        base ([`BaseModel`]): what was read.
        given (`dict`): `dinov2_config` and `siglip_config` with `num_attention_heads`, for other towers than the
            published ones.
        language_model (`dict`, *optional*): the `text_config`; that of Qwen2.5-0.5B by default.

    Returns:
        `dict`: `dinov2_config`, `siglip_config` and `text_config`, where the part is there.

    Raises:
        ValueError: when a part has another size than the published one, and its number of heads was not given.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in base.tensors.items()}
    fields: dict[str, dict[str, Any]] = {}
    if base.has_vision:
        for name, read, prefix, published in (
            ("dinov2_config", dinov2_fields, DINOV2_PREFIX, PUBLISHED_DINOV2),
            ("siglip_config", siglip_fields, SIGLIP_PREFIX, PUBLISHED_SIGLIP),
        ):
            width = shapes.get(f"{prefix}patch_embed.proj.weight", (0,))[0]
            known = {**(published if width == published["hidden_size"] else {}), **given.get(name, {})}
            if "num_attention_heads" not in known:
                raise ValueError(
                    f"{base.source}: this tower is {width} wide, the published one {published['hidden_size']}, and "
                    f"the number of its attention heads does not show in the weights; give "
                    f"{name}={{'num_attention_heads': ...}}."
                )
            fields[name] = read(shapes, known["num_attention_heads"], base.source)
    if base.has_language_model:
        vocab_size, width = shapes.get("language_model.model.embed_tokens.weight", (0, 0))
        if language_model is None and width != PUBLISHED_QWEN2["hidden_size"]:
            raise ValueError(
                f"{base.source}: its language model is {width} wide and not Qwen2.5-0.5B, which has "
                f"{PUBLISHED_QWEN2['hidden_size']}. Name its repository (language_model=..., --language-model), whose "
                "configuration says the rest."
            )
        fields["text_config"] = {**(language_model or PUBLISHED_QWEN2), "vocab_size": vocab_size}
    return fields


def base_state_dict(base: BaseModel) -> dict[str, torch.Tensor]:
    """All tensors that have an effect, under the names of our own files, in the precision of the file."""
    return {
        ours: translated
        for name, tensor in base.tensors.items()
        if has_effect(name, base.tensors)
        for ours, translated in translate_weight(name, tensor)
    }


def _published_name(part: str, name: str) -> str:
    for prefix, published in PUBLISHED_PREFIXES.get(part, {}).items():
        if name.startswith(prefix):
            name = published + name.removeprefix(prefix)
            return re.sub(r"\.gamma$", ".scale_factor", name) if part == "vision_backbone" else name
    return f"{part}:{name}"  # fits nothing, so check_shapes will name it


def _choose(names: Iterable[str], step: str | int | None, source: str) -> str:
    """The file to read, of those in `checkpoints/`: the one of `step`, else the latest, else the only one."""
    names = set(names)
    steps = sorted(name for name in names if STEP_FILE.fullmatch(name))
    latest = [LATEST] if LATEST in names else []
    if step is None or step == "latest":
        found = latest or ([] if step else steps)
    else:
        found = [name for name in steps if STEP_FILE.fullmatch(name)[1].lstrip("0") == str(step).lstrip("0")]
    if len(found) == 1:
        return found[0]
    listing = ", ".join(latest + steps)
    if not listing:
        raise ValueError(
            f"{source} has no {FOLDER}/{LATEST} (nor {FOLDER}/step-*-epoch-*-loss=*.pt): it is not a base "
            "vision-language model. A VLA-Adapter checkpoint needs no init, it can be trained as it is."
        )
    if not found:
        raise ValueError(f"{source} has no step {step}; it has {listing}.")
    raise ValueError(f"{source} has several steps: {', '.join(found)}. Choose one (step=..., --step).")
