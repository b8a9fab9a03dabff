"""Finding the files of a checkpoint in the published layout, and looking into them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vla_adapter_hf.checkpoints.files import (
    Shapes,
    find_weights,
    pickle_shapes,
    read_json,
    read_shapes,
    safetensors_shapes,
)
from vla_adapter_hf.checkpoints.source import FolderFiles, HubFiles


MODEL_TYPE = "openvla"
STATISTICS = "dataset_statistics.json"


@dataclass(frozen=True)
class PublishedFiles:
    """What the files hold. Of the weights, only names and shapes have been read.

    Args:
        config (`dict`): `config.json`.
        norm_stats (`dict`, *optional*): `dataset_statistics.json`.
        weights (`list[str]`): the files of towers, language model, projector and action queries.
        action_head, proprio_projector (`str`): the two pickles.
        shapes, action_head_shapes, proprio_projector_shapes (`dict`): published names and shapes in those files.
    """

    source: str
    config: dict[str, Any]
    norm_stats: dict[str, Any] | None
    weights: list[str]
    action_head: str
    proprio_projector: str
    shapes: Shapes
    action_head_shapes: Shapes
    proprio_projector_shapes: Shapes

    def shape(self, part: Shapes, name: str) -> tuple[int, ...]:
        """The shape of a tensor that must be there."""
        return shape_of(part, name, self.source)


def find_published_files(
    files: FolderFiles | HubFiles, config: dict[str, Any], step: str | int | None = None
) -> PublishedFiles:
    """Find the files of a published checkpoint and read their headers.

    Args:
        files: where they are.
        config (`dict`): the content of `config.json`.
        step (`str` or `int`, *optional*): which of several saved steps to take (`"150000"`, `"latest"`).

    Raises:
        ValueError: when a file is missing or damaged, when it is another model, or when a step must be chosen.
    """
    source = files.source
    _check_is_vla_adapter(config, source)
    weights = _find_merged_weights(files)
    statistics = read_json(files.path(STATISTICS), source) if STATISTICS in files.names else None
    action_head = _find_pickle(files, "action_head", step)
    proprio_projector = _find_pickle(files, "proprio_projector", step)
    if action_head.partition("--")[2] != proprio_projector.partition("--")[2]:
        raise ValueError(
            f"{source} has {action_head} and {proprio_projector}, which are of different steps; they only work with "
            "the one that they were trained with."
        )
    return PublishedFiles(
        source=source,
        config=config,
        norm_stats=statistics or None,  # an empty file is as good as none
        weights=weights,
        action_head=action_head,
        proprio_projector=proprio_projector,
        shapes=read_shapes(files, weights, safetensors_shapes),
        action_head_shapes=read_shapes(files, [action_head], pickle_shapes),
        proprio_projector_shapes=read_shapes(files, [proprio_projector], pickle_shapes),
    )


def shape_of(shapes: Shapes, name: str, source: str) -> tuple[int, ...]:
    """The shape of a tensor that must be there.

    Raises:
        ValueError: when it is missing.
    """
    if name not in shapes:
        raise ValueError(f"{source} is not a complete VLA-Adapter checkpoint: tensor {name} is missing.")
    return shapes[name]


def config_entry(config: dict[str, Any], name: str | None, kind: type, source: str) -> Any:
    """An entry of `config.json`, or an empty one if it has none.

    Raises:
        ValueError: when the entry is of another kind.
    """
    value = config.get(name, kind())
    if not isinstance(value, kind):
        raise ValueError(f"config.json of {source}: {name} must be a {kind.__name__}, got {value!r}.")
    return value


def _check_is_vla_adapter(config: dict[str, Any], source: str) -> None:
    language_model = config_entry(config, "text_config", dict, source).get("model_type")
    if language_model != "qwen2":
        raise ValueError(
            f"{source} is an OpenVLA model with the language model "
            f"{language_model or config.get('llm_backbone_id')!r}, not a VLA-Adapter: its policy predicts tokens. "
            "Only Qwen2 checkpoints of VLA-Adapter can be read."
        )


def _find_merged_weights(files: FolderFiles | HubFiles) -> list[str]:
    try:
        return find_weights(files)
    except ValueError as error:
        if "lora_adapter" not in files.names:
            raise
        raise ValueError(
            f"{error} Its lora_adapter/ is not enough: the trained action queries are only in the merged model. Merge "
            "it with the original training code first."
        ) from error


def _find_pickle(files: FolderFiles | HubFiles, kind: str, step: str | int | None) -> str:
    names = [name for name in files.names if name.startswith(f"{kind}--") and name.endswith(".pt")]
    wanted = [f"{kind}--{step}_checkpoint.pt"] if step is not None else names
    found = [name for name in wanted if name in names]
    if len(found) == 1:
        return found[0]
    if not names:
        raise ValueError(f"{files.title} has no {kind}--checkpoint.pt (nor {kind}--<step>_checkpoint.pt).")
    if not found:
        raise ValueError(f"{files.title} has no {wanted[0]}; it has {', '.join(names)}.")
    raise ValueError(f"{files.source} has several of one kind: {', '.join(names)}. Choose one (step=..., --step).")
