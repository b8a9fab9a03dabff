"""Reading checkpoints in the layout in which VLA-Adapter was published.

A folder there holds an OpenVLA-style `config.json` whose remote code runs on no current installation, a
`model.safetensors` with towers in timm's naming, two pickles with policy and proprio projector, and
`dataset_statistics.json`. Here it is read as data: none of its code is run, and pickles are opened with
`weights_only=True` only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers.utils import logging

from vla_adapter_hf.checkpoints.files import as_state_dict, open_safetensors, read_json, read_pickle
from vla_adapter_hf.checkpoints.published.names import (
    DINOV2_PREFIX,
    POLICY_NAMES,
    SIGLIP_PREFIX,
    WITHOUT_EFFECT,
    block_numbers,
    has_effect,
    renamed,
    translate_weight,
)
from vla_adapter_hf.modeling.checkpoint_names_vla_adapter import name_in_file
from vla_adapter_hf.modeling.configuration_vla_adapter import HUB_ARGUMENTS, VLAAdapterConfig, refuse_misspelt
from vla_adapter_hf.robots import RobotPreset, get_robot


logger = logging.get_logger(__name__)

MODEL_TYPE = "openvla"
POLICY_HEADS = 8
# The published code splits every layer's states here, whatever the number of cameras.
TASK_TOKENS = 512
# What does not show in the tensors: heads per tower of the published model ids.
TIMM_HEADS = {"vit_large_patch14_reg4_dinov2": 16, "vit_so400m_patch14_siglip_224": 16}


@dataclass
class PublishedCheckpoint:
    """A folder in the published layout whose files have been found and looked into, but not loaded."""

    source: str
    config: dict[str, Any]
    norm_stats: dict[str, Any] | None
    weight_files: list[Path]
    action_head_file: Path
    proprio_projector_file: Path
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Published names and shapes of everything in `model.safetensors`."""
    action_head: dict[str, torch.Tensor] = field(default_factory=dict)
    proprio_projector: dict[str, torch.Tensor] = field(default_factory=dict)
    """Both memory-mapped where the pickle's format allows."""

    @property
    def is_pro(self) -> bool:
        return any(".k_task." in name for name in self.action_head)


def open_published(source: str, step: str | None = None, **hub: Any) -> PublishedCheckpoint:
    """Find the files of a published checkpoint and check them, without loading weights.

    Args:
        source (`str`): a folder or a Hub id.
        step (`str`, *optional*): which of several saved steps to take (`"150000"`, `"latest"`).
        hub: `revision`, `token`, `cache_dir` and the like.

    Raises:
        ValueError: when a file is missing, damaged, or there is a choice to be made; the message says which.
    """
    folder = _local_folder(source, hub)
    config = read_json(folder / "config.json", source)
    _check_is_vla_adapter(config, source)
    weight_files = _find_weights(folder, source)
    statistics = folder / "dataset_statistics.json"
    checkpoint = PublishedCheckpoint(
        source=str(source),
        config=config,
        # An empty file tells as little as none.
        norm_stats=(read_json(statistics, source) or None) if statistics.is_file() else None,
        weight_files=weight_files,
        action_head_file=_find_pickle(folder, "action_head", step, source),
        proprio_projector_file=_find_pickle(folder, "proprio_projector", step, source),
    )
    _check_same_step(checkpoint.action_head_file, checkpoint.proprio_projector_file, source)
    for path in weight_files:
        with open_safetensors(path) as file:
            for name in file.keys():
                checkpoint.shapes[name] = tuple(file.get_slice(name).get_shape())
    checkpoint.action_head, checkpoint.proprio_projector = (
        as_state_dict(read_pickle(path), path.name)
        for path in (checkpoint.action_head_file, checkpoint.proprio_projector_file)
    )
    return checkpoint


def build_config(
    checkpoint: PublishedCheckpoint, robot: str | RobotPreset | None = None, **overrides: Any
) -> VLAAdapterConfig:
    """The configuration of a published checkpoint.

    Sizes are read off its tensors. Chunk length, cameras and the type of normalisation leave no trace there: they come
    from the robot preset, LIBERO by default, and are said in the log.

    Args:
        robot (`str` or [`RobotPreset`], *optional*): which preset to take.
        overrides: fields of [`VLAAdapterConfig`] that replace what was found.

    Raises:
        ValueError: when the tensors do not fit the preset or one another, or statistics are missing.
    """
    preset = robot if isinstance(robot, RobotPreset) else get_robot(robot or "libero")
    source = checkpoint.source
    action_dim = _shape(checkpoint.action_head, "model.fc2.weight", source)[0]
    proprio_dim = _shape(checkpoint.proprio_projector, "fc1.weight", source)[1]
    for name, found, expected in (
        ("action_dim", action_dim, preset.action_dim),
        ("proprio_dim", proprio_dim, preset.state_dim),
    ):
        if found != expected and name not in overrides:
            raise ValueError(
                f"{source} has {name}={found}, but a {preset.name} robot has {expected}. Its chunk length and cameras "
                "cannot be read off the weights: name its robot (robot=..., --robot), or, for a robot of your own, "
                f"give chunk_size, cameras, norm_type and {name}."
            )
    fields = {
        "dinov2_config": dinov2_fields(checkpoint.shapes, _tower_heads(checkpoint, 0), source),
        "siglip_config": siglip_fields(checkpoint.shapes, _tower_heads(checkpoint, 1), source),
        "text_config": _text_config(checkpoint),
        "cameras": list(preset.cameras),
        "num_action_queries": _shape(checkpoint.shapes, "action_queries.weight", source)[0],
        "chunk_size": preset.chunk_size,
        "action_dim": action_dim,
        "proprio_dim": proprio_dim,
        "policy_variant": "pro" if checkpoint.is_pro else "original",
        "policy_num_layers": 1 + max(block_numbers(checkpoint.action_head, "model.mlp_resnet_blocks."), default=-1),
        "policy_num_heads": POLICY_HEADS,
        "policy_rope_dtype": "bfloat16",
        "policy_task_tokens": TASK_TOKENS,
        "norm_type": preset.norm_type,
        "norm_stats": checkpoint.norm_stats,
        "constant_dims": "published",
        "image_jpeg_round_trip": True,
        "image_center_crop": 0.9,
        "dtype": checkpoint.config.get("torch_dtype"),
        **overrides,
    }
    if not fields["norm_stats"]:
        raise ValueError(
            f"{source} has no dataset_statistics.json, or an empty one. The statistics in its config.json are those of other datasets; "
            "give the ones that the model was trained with (norm_stats=...)."
        )
    config = VLAAdapterConfig(**fields)
    logger.warning_once(
        f"{source}: taken as a {preset.name} model: chunks of {config.chunk_size} actions, cameras "
        f"{', '.join(config.cameras)}, normalisation {config.norm_type}. The weights do not tell; if this is another "
        "robot, name it (robot=..., --robot)."
    )
    return config


def read_state_dict(checkpoint: PublishedCheckpoint) -> dict[str, torch.Tensor]:
    """All tensors that have an effect, under the names of our own files, in the precision of the files."""
    state_dict = dict(_translate(checkpoint))
    queries = state_dict["action_queries.weight"].float()
    if 0.0195 < queries.std() < 0.0205 and queries.mean().abs() < 0.002:
        logger.warning(
            f"{checkpoint.source}: the action queries look like they did before training (standard deviation "
            f"{queries.std():.4f}). Folders merged by the original's separate script have lost the trained ones."
        )
    return state_dict


def check_shapes(
    model: torch.nn.Module,
    state_dict: dict[str, torch.Tensor],
    source: str,
    kind: str = "a complete VLA-Adapter checkpoint",
    new_parts: tuple[str, ...] = (),
    other_shapes: bool = False,
) -> None:
    """Refuse a checkpoint that does not fill the model exactly.

    Args:
        model (`torch.nn.Module`): may be on the meta device.
        state_dict (`dict`): what there is, under the names of our files.
        source, kind (`str`): for the message, what was read and what it should have been.
        new_parts (`tuple[str]`): beginnings of the names of parts that start anew and need not be there.
        other_shapes (`bool`): let tensors have another shape than the model's; they start anew.

    Raises:
        ValueError: naming the first tensors that are missing, left over or of another shape.
    """
    expected = {
        name_in_file(name): tuple(tensor.shape)
        for name, tensor in model.state_dict().items()
        if not name.startswith(new_parts)
    }
    problems = [f"{name} is missing" for name in sorted(expected.keys() - state_dict.keys())]
    problems += [f"{name} has no place in the model" for name in sorted(state_dict.keys() - expected.keys())]
    problems += [
        f"{name} has shape {tuple(state_dict[name].shape)}, expected {shape}"
        for name, shape in expected.items()
        if name in state_dict and tuple(state_dict[name].shape) != shape and not other_shapes
    ]
    if problems:
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise ValueError(f"{source} is not {kind}: {'; '.join(problems[:4])}{more}.")


def _translate(checkpoint: PublishedCheckpoint) -> Iterator[tuple[str, torch.Tensor]]:
    for path in checkpoint.weight_files:
        with open_safetensors(path) as file:
            for name in file.keys():
                if has_effect(name, checkpoint.shapes):
                    yield from translate_weight(name, file.get_tensor(name))
    for name, tensor in checkpoint.action_head.items():
        if not WITHOUT_EFFECT.match(name):
            yield f"policy.{renamed(name.removeprefix('model.'), POLICY_NAMES)}", tensor
    for name, tensor in checkpoint.proprio_projector.items():
        yield f"proprio_projector.{name}", tensor


def dinov2_fields(shapes: dict[str, tuple[int, ...]], heads: int, source: str) -> dict[str, Any]:
    """The configuration of the first tower, from published names and shapes and what they do not tell, the heads."""
    fields = _tower_fields(shapes, DINOV2_PREFIX, heads, source)
    registers = _shape(shapes, f"{DINOV2_PREFIX}reg_token", source)[1]
    mlp_ratio = fields.pop("intermediate_size") // fields["hidden_size"]
    return {**fields, "num_register_tokens": registers, "mlp_ratio": mlp_ratio}


def siglip_fields(shapes: dict[str, tuple[int, ...]], heads: int, source: str) -> dict[str, Any]:
    """The same of the second tower."""
    return {**_tower_fields(shapes, SIGLIP_PREFIX, heads, source), "vision_use_head": False}


def _tower_fields(shapes: dict[str, tuple[int, ...]], prefix: str, heads: int, source: str) -> dict[str, Any]:
    width, _, patch_size, _ = _shape(shapes, f"{prefix}patch_embed.proj.weight", source)
    num_patches = _shape(shapes, f"{prefix}pos_embed", source)[1]
    return {
        "hidden_size": width,
        "num_hidden_layers": max(block_numbers(shapes, f"{prefix}blocks."), default=0),
        "num_attention_heads": heads,
        "intermediate_size": _shape(shapes, f"{prefix}blocks.0.mlp.fc1.weight", source)[0],
        "image_size": round(num_patches**0.5) * patch_size,
        "patch_size": patch_size,
        "layer_norm_eps": 1e-6,
        "hidden_act": "gelu",
    }


def _tower_heads(checkpoint: PublishedCheckpoint, tower: int) -> int:
    config, source = checkpoint.config, checkpoint.source
    model_ids = _entry(config, "timm_model_ids", list, source)
    model_id = str(model_ids[tower]) if tower < len(model_ids) else None
    arguments = _entry(_entry(config, "timm_model_args", dict, source), model_id, dict, source)
    heads = arguments.get("num_heads", TIMM_HEADS.get(str(model_id).split(".")[0]))
    if heads is not None and (not isinstance(heads, int) or heads < 1):
        raise ValueError(f"config.json of {source}: num_heads of {model_id} must be an int above 0, got {heads!r}.")
    if heads is None:
        raise ValueError(
            f"{checkpoint.source}: vision tower {model_id!r} is not known, and the number of its attention heads does "
            f"not show in the weights. Known: {', '.join(TIMM_HEADS)}."
        )
    return heads


def _entry(config: dict[str, Any], name: str | None, kind: type, source: str) -> Any:
    """What a config.json has under a name, or an empty one if it has none.

    Raises:
        ValueError: when it is of another kind.
    """
    value = config.get(name, kind())
    if not isinstance(value, kind):
        raise ValueError(f"config.json of {source}: {name} must be a {kind.__name__}, got {value!r}.")
    return value


def _text_config(checkpoint: PublishedCheckpoint) -> dict[str, Any]:
    # The published pad token id is that of another language model; pads are never looked up, so it is left out.
    dropped = {"model_type", "torch_dtype", "pad_token_id"}
    text_config = {key: value for key, value in checkpoint.config["text_config"].items() if key not in dropped}
    embeddings = _shape(checkpoint.shapes, "language_model.model.embed_tokens.weight", checkpoint.source)
    return {**text_config, "vocab_size": embeddings[0]}


def _shape(tensors: dict[str, Any], name: str, source: str) -> tuple[int, ...]:
    if name not in tensors:
        raise ValueError(f"{source} is not a complete VLA-Adapter checkpoint: tensor {name} is missing.")
    return tuple(getattr(tensors[name], "shape", tensors[name]))


def _local_folder(source: str, hub: dict[str, Any]) -> Path:
    hub = {name: value for name, value in hub.items() if value is not None and name != "proxies"}
    subfolder = hub.pop("subfolder", "")
    if Path(subfolder).is_absolute() or ".." in Path(subfolder).parts:
        raise ValueError(f"subfolder must be a folder inside {source}, got {subfolder!r}.")
    if Path(source).is_dir():
        return Path(source, subfolder)
    within = f"{subfolder.strip('/')}/" if subfolder else ""
    names = ["config.json", "dataset_statistics.json", "*.safetensors", "*.safetensors.index.json", "*--*.pt"]
    snapshot = snapshot_download(
        source,
        allow_patterns=[within + name for name in names],
        ignore_patterns=[f"{within}lora_adapter/*"],
        **hub,
    )
    return Path(snapshot, subfolder)


def _check_is_vla_adapter(config: dict[str, Any], source: str) -> None:
    if config.get("model_type") != MODEL_TYPE:
        raise ValueError(f"{source} has model_type {config.get('model_type')!r}; the published layout has 'openvla'.")
    language_model = _entry(config, "text_config", dict, source).get("model_type")
    if language_model != "qwen2":
        raise ValueError(
            f"{source} is an OpenVLA model with the language model {language_model or config.get('llm_backbone_id')!r}, "
            "not a VLA-Adapter: its policy predicts tokens. Only Qwen2 checkpoints of VLA-Adapter can be read."
        )


def _find_weights(folder: Path, source: str) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = read_json(index, source).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{index.name} of {source} must hold a weight_map of files, got {weight_map!r}.")
        for name in weight_map.values():
            if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
                raise ValueError(f"{index.name} of {source} names {name!r}, which is no .safetensors file beside it.")
        names = sorted(set(weight_map.values()))
    else:
        names = ["model.safetensors"]
    missing = [name for name in names if not (folder / name).is_file()]
    if not missing:
        return [folder / name for name in names]
    if (folder / "lora_adapter").is_dir():
        raise ValueError(
            f"{source} has a lora_adapter/ but no {missing[0]}. The adapter alone is not enough: the trained action "
            "queries are only in the merged model. Merge it with the original training code first."
        )
    raise ValueError(f"{source} has no {', '.join(missing)}.")


def _find_pickle(folder: Path, kind: str, step: str | None, source: str) -> Path:
    names = sorted(path.name for path in folder.glob(f"{kind}--*.pt"))
    wanted = [f"{kind}--{step}_checkpoint.pt"] if step is not None else names
    found = [name for name in wanted if name in names]
    if len(found) == 1:
        return folder / found[0]
    if not names:
        raise ValueError(f"{source} has no {kind}--checkpoint.pt (nor {kind}--<step>_checkpoint.pt).")
    if not found:
        raise ValueError(f"{source} has no {wanted[0]}; it has {', '.join(names)}.")
    raise ValueError(f"{source} has several of one kind: {', '.join(names)}. Say which (step=..., --step).")


def _check_same_step(action_head: Path, proprio_projector: Path, source: str) -> None:
    if action_head.name.partition("--")[2] != proprio_projector.name.partition("--")[2]:
        raise ValueError(
            f"{source} has {action_head.name} and {proprio_projector.name}, which are of different steps; they only "
            "work with the one that they were trained with."
        )


class PublishedLayout:
    """How [`VLAAdapterConfig`] and [`VLAAdapterForActionPrediction`] get at checkpoints in the published layout."""

    def read_config(
        self, source: str, hub: dict[str, Any] | None = None, **kwargs: Any
    ) -> tuple[VLAAdapterConfig, dict[str, Any]]:
        """The configuration, with fields given as keyword arguments in it, and the arguments that are no fields.

        Args:
            source (`str`): a folder or a Hub id.
            hub (`dict`, *optional*): `revision`, `token`, `cache_dir` and the like.
            kwargs: `robot`, `step`, fields of the configuration, and whatever else there is.
        """
        arguments = _take_config_arguments(kwargs)
        refuse_misspelt(kwargs)
        checkpoint = open_published(source, arguments.get("step"), **(hub or {}))
        return _config_of(checkpoint, arguments), kwargs

    def load_model(
        self, model_class: type, source: str, config: VLAAdapterConfig | None, **kwargs: Any
    ) -> torch.nn.Module:
        """The model with the checkpoint's weights; arguments as those of `from_pretrained`.

        The configuration is made from the same files as the weights, lest statistics and weights be of different
        revisions. One that was handed in is taken as it is, except when it was read from this source and not changed
        since: then it only tells what was asked for.
        """
        hub = {name: kwargs.pop(name) for name in HUB_ARGUMENTS & set(kwargs)}
        arguments = _take_config_arguments(kwargs)
        asked_before = None if config is None else _asked_for(config, source)
        checkpoint = open_published(source, {**(asked_before or {}), **arguments}.get("step"), **hub)
        if config is None or asked_before is not None:
            config = _config_of(checkpoint, {"name_or_path": str(source), **(asked_before or {}), **arguments})
        elif arguments.keys() - {"name_or_path", "step", "dtype", "attn_implementation"}:
            fields = ", ".join(sorted(arguments.keys() - {"name_or_path", "step", "dtype", "attn_implementation"}))
            raise ValueError(f"{fields} given together with a config; put them into the config.")
        elif "attn_implementation" in arguments:
            kwargs["attn_implementation"] = arguments["attn_implementation"]
        state_dict = read_state_dict(checkpoint)
        if kwargs.get("strict", True):
            with torch.device("meta"):
                empty = model_class(config)
            other_shapes = kwargs.get("ignore_mismatched_sizes", False)
            check_shapes(empty, state_dict, source, other_shapes=other_shapes)
        loaded = model_class.from_pretrained(None, config=config, state_dict=state_dict, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.config.name_or_path = model.name_or_path = str(source)
        return loaded


def _take_config_arguments(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Of keyword arguments, those of [`build_config`] and `step`, taken out. A `dtype` stays: the model needs it too."""
    fields = set(VLAAdapterConfig.__dataclass_fields__) - {"dtype"}
    names = fields | {"attn_implementation", "name_or_path", "robot", "step"}
    arguments = {name: kwargs.pop(name) for name in names & set(kwargs)}
    if kwargs.get("dtype", "auto") not in ("auto", None):
        arguments["dtype"] = kwargs["dtype"]
    kwargs.pop("_from_auto", None)
    return arguments


def _config_of(checkpoint: PublishedCheckpoint, arguments: dict[str, Any]) -> VLAAdapterConfig:
    """The configuration, which remembers what it was asked for with and how it was then; it is never saved."""
    config = build_config(checkpoint, **{name: value for name, value in arguments.items() if name != "step"})
    config._reading = {"source": checkpoint.source, "arguments": arguments, "read": config.to_diff_dict()}
    return config


def _asked_for(config: VLAAdapterConfig, source: str) -> dict[str, Any] | None:
    """The arguments with which a configuration was read from `source`; `None` if it was not, or changed since."""
    reading = getattr(config, "_reading", None)
    if reading is None or reading["source"] != str(source):
        return None
    is_unread = type(config) is UnreadConfig
    return reading["arguments"] if is_unread or reading["read"] == config.to_diff_dict() else None


class UnreadConfig(VLAAdapterConfig):
    """The configuration of published files before anybody has looked into it; the first look reads it.

    `AutoModel` has the configuration made without saying which revision, token or folder it means. These it hands to
    the model only, with the configuration. So it is left unread until [`PublishedLayout.load_model`] makes it from
    the same files as the weights. Whoever looks into it before gets that of the default revision.
    """

    def __init__(self, source: str, arguments: dict[str, Any]):
        object.__setattr__(self, "_reading", {"source": str(source), "arguments": arguments})

    def __getattribute__(self, name: str) -> Any:
        if name in ("_reading", "sub_configs") or name.startswith("__"):
            return object.__getattribute__(self, name)
        if name in ("auto_map", "architectures", "quantization_config"):
            raise AttributeError(name)  # AutoModel asks; published files have none that count
        _read_now(self)
        return getattr(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        _read_now(self)
        setattr(self, name, value)


# AutoModel.register wants all configurations of a model to have the name of its `config_class`.
UnreadConfig.__name__ = VLAAdapterConfig.__name__


def _read_now(config: UnreadConfig) -> None:
    """Make an unread configuration what it stands for."""
    reading = object.__getattribute__(config, "_reading")
    read = _config_of(open_published(reading["source"], reading["arguments"].get("step")), reading["arguments"])
    object.__setattr__(config, "__class__", VLAAdapterConfig)
    config.__dict__.update(read.__dict__)


class PublishedVLAAdapterConfig(VLAAdapterConfig):
    """What `AutoConfig` finds for published files. Reading one gives a plain [`VLAAdapterConfig`]."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As [`VLAAdapterConfig.from_dict`]; what asks for unused arguments, as `AutoModel` does, reads it later."""
        if not kwargs.get("return_unused_kwargs", False):
            return super().from_dict(config_dict, **kwargs)
        del kwargs["return_unused_kwargs"]
        arguments = _take_config_arguments(kwargs)
        refuse_misspelt(kwargs)
        return UnreadConfig(
            arguments["name_or_path"], {**arguments, "name_or_path": str(arguments["name_or_path"])}
        ), kwargs
