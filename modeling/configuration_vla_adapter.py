"""Configuration of VLA-Adapter: two vision towers, a language model and a Bridge Attention policy."""

import math
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from functools import wraps
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import Dinov2WithRegistersConfig, PreTrainedConfig, Qwen2Config, SiglipVisionConfig

from .normalization_vla_adapter import CONSTANT_DIM_RULES, NORM_TYPES, check_norm_stats


POLICY_VARIANTS = ("original", "pro")
ROPE_DTYPES = ("bfloat16", "float32")
PROMPT_STYLES = ("chat", "in_out")

# Readers of checkpoints in other layouts, by the `model_type` in their config.json: objects with `read_config(source,
# hub, **overrides)` and `load_model(model_class, source, config, **kwargs)`. The package registers the published
# layout. Without the package there is no reader, and such a checkpoint is refused.
OTHER_LAYOUTS: dict[str, Any] = {}

# The arguments of from_pretrained that say where files come from.
HUB_ARGUMENTS = {"cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token"}

# The sizes of the published checkpoints. The features are read before each tower's last block (DINOv2: after block 23
# of 24, SigLIP: after block 26 of 27), so the last block is neither built nor stored.
PUBLISHED_DINOV2 = {
    "hidden_size": 1024,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "mlp_ratio": 4,
    "image_size": 224,
    "patch_size": 14,
    "num_register_tokens": 4,
    "layer_norm_eps": 1e-6,
    "hidden_act": "gelu",
}
PUBLISHED_SIGLIP = {
    "hidden_size": 1152,
    "num_hidden_layers": 26,
    "num_attention_heads": 16,
    "intermediate_size": 4304,
    "image_size": 224,
    "patch_size": 14,
    "layer_norm_eps": 1e-6,
    "hidden_act": "gelu",
    "vision_use_head": False,
}
PUBLISHED_QWEN2 = {
    "hidden_size": 896,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "intermediate_size": 4864,
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    "tie_word_embeddings": True,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
}


def _with_plain_errors(config_class: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    """Errors of `@strict` are neither a TypeError nor a ValueError; raise the one that each of them wraps."""

    def unwrapped(check: Callable[..., None]) -> Callable[..., None]:
        @wraps(check)
        def checked(*args: Any) -> None:
            try:
                check(*args)
            except StrictDataclassError as error:
                raise (error.__cause__ or error) from None

        return checked

    config_class.__setattr__ = unwrapped(config_class.__setattr__)
    config_class.validate = unwrapped(config_class.validate)
    return config_class


@_with_plain_errors
@strict
class VLAAdapterConfig(PreTrainedConfig):
    r"""
    Everything that defines a VLA-Adapter model except its weights. The defaults are those of the published LIBERO Pro
    model (arXiv 2509.09372; `VLA-Adapter/LIBERO-Object-Pro` and its siblings).

    Args:
        dinov2_config (`dict` or `Dinov2WithRegistersConfig`, *optional*):
            The first vision tower. `num_hidden_layers` counts the blocks that are built: the published features
            are read before the last block of ViT-L/14, so 23 of its 24.
        siglip_config (`dict` or `SiglipVisionConfig`, *optional*):
            The second vision tower, likewise 26 of 27 blocks, without pooling head.
        text_config (`dict` or `Qwen2Config`, *optional*):
            The language model. Its hidden size is also the width of the policy.
        cameras (`list[str]`, *optional*, defaults to `["image", "wrist_image"]`):
            Names of the camera views in the order in which the model sees them.
        num_action_queries (`int`, *optional*, defaults to 64):
            Learned tokens appended to the prompt, through which the policy reads the language model.
        chunk_size (`int`, *optional*, defaults to 8):
            Actions predicted at once.
        action_dim (`int`, *optional*, defaults to 7):
            Size of one action.
        proprio_dim (`int`, *optional*, defaults to 8):
            Size of the robot's state, which becomes the proprio once it is normalised.
        policy_variant (`str`, *optional*, defaults to `"pro"`):
            `"pro"` (separate keys and values for each source, rotary positions) or `"original"` (one key and one
            value projection, no positions).
        policy_num_layers (`int`, *optional*, defaults to 24):
            Bridge Attention blocks. Block *i* reads hidden state *i* of the language model, so this must equal the
            language model's depth.
        policy_num_heads (`int`, *optional*, defaults to 8):
            Attention heads of a block.
        policy_rope_theta (`float`, *optional*, defaults to 10000.0):
            Base of the rotary frequencies of the pro policy.
        policy_rope_dtype (`str`, *optional*, defaults to `"bfloat16"`):
            Precision in which the rotary tables are computed: `"bfloat16"` for weights that the original code trained,
            in whatever precision the model runs; `"float32"` for policies that are trained from scratch.
        policy_task_tokens (`int`, *optional*):
            How many of a layer's states (patches first, then action queries) the policy treats as task states.
            Defaults to the patches of all cameras. The original code always takes 512, so a checkpoint that it trained
            with one camera or with three needs 512 here. If there are fewer states, all of them are task states.
        policy_noise_std (`float`, *optional*, defaults to 0.02):
            Standard deviation of the noise added to the zero action latent in training.
        norm_type (`str`, *optional*, defaults to `"bounds_q99"`):
            `"bounds_q99"` maps the 1st and the 99th percentile to -1 and 1, `"bounds"` the minimum and the maximum.
            `"normal"` maps the mean to 0 and the standard deviation to 1.
        norm_stats (`dict`, *optional*):
            `{unnorm_key: {"action": {...}, "proprio": {...}}}` with lists `min`, `max`, `mean`, `std`, `q01`,
            `q99`, and for actions a `mask` of the dimensions that are normalised (default: all of them).
        constant_dims (`str`, *optional*, defaults to `"zero"`):
            What a dimension whose minimum equals its maximum is normalised to: `"zero"` to 0, `"published"` to -1, as
            the original code does at inference (for converted checkpoints).
        action_names, state_names (`list[str]`, *optional*):
            What each dimension of an action and of the state is, such as joint names; for tables and pictures.
        fps (`float`, *optional*):
            Control steps per second that the actions of a chunk are apart, where the recordings say so.
        prompt_style (`str`, *optional*, defaults to `"chat"`):
            The prompt around the instruction: `"chat"` (all published checkpoints) or `"in_out"` (`In: ... Out:`).
            `None` if it is not known, as in files written before this field existed.
        tokenizer_fingerprint (`str`, *optional*):
            A hash of a prompt's tokens, by which the model recognises its own tokenizer. `None` if it is not known, as
            in files written before this field existed.
        image_jpeg_round_trip (`bool`, *optional*, defaults to `True`):
            Whether camera frames are encoded as JPEG and decoded before they are resized, as the frames were that the
            published models were trained on.
        image_center_crop (`float`, *optional*, defaults to 0.9):
            Share of a frame's area that the centre crop keeps at inference, for models trained with random crops.
            `None` for no crop.
        initializer_range (`float`, *optional*, defaults to 0.02):
            Standard deviation of the initial action queries and the initial weights of the vision projector.

    Raises:
        TypeError: for a value of the wrong type. The message names the field.
        ValueError: for a value out of range, or values that contradict each other. The message names the fields.
    """

    model_type = "vla_adapter"
    sub_configs: ClassVar[dict[str, type[PreTrainedConfig]]] = {
        "dinov2_config": Dinov2WithRegistersConfig,
        "siglip_config": SiglipVisionConfig,
        "text_config": Qwen2Config,
    }

    dinov2_config: dict | PreTrainedConfig | None = None
    siglip_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    cameras: list[str] | tuple[str, ...] = ("image", "wrist_image")
    num_action_queries: int = 64
    chunk_size: int = 8
    action_dim: int = 7
    proprio_dim: int = 8
    policy_variant: str = "pro"
    policy_num_layers: int = 24
    policy_num_heads: int = 8
    policy_rope_theta: float | int = 10000.0
    policy_rope_dtype: str = "bfloat16"
    policy_task_tokens: int | None = None
    policy_noise_std: float | int = 0.02
    norm_type: str = "bounds_q99"
    norm_stats: dict[str, Any] | None = None
    constant_dims: str = "zero"
    action_names: list[str] | tuple[str, ...] | None = None
    state_names: list[str] | tuple[str, ...] | None = None
    fps: float | int | None = None
    prompt_style: str | None = "chat"
    tokenizer_fingerprint: str | None = None
    image_jpeg_round_trip: bool = True
    image_center_crop: float | int | None = 0.9
    initializer_range: float | int = 0.02

    def __post_init__(self, **kwargs):
        published = (PUBLISHED_DINOV2, PUBLISHED_SIGLIP, PUBLISHED_QWEN2)
        for (name, config_class), defaults in zip(self.sub_configs.items(), published, strict=True):
            value = getattr(self, name)
            if value is None:
                value = defaults
            if isinstance(value, dict):
                try:
                    value = config_class(**{key: v for key, v in value.items() if key != "model_type"})
                except StrictDataclassError as error:
                    raise ValueError(f"{name}: {error.__cause__ or error}") from error
            elif not isinstance(value, config_class):
                raise TypeError(f"{name} must be a dict or a {config_class.__name__}, got {type(value).__name__}.")
            setattr(self, name, value)
        for name in ("cameras", "action_names", "state_names"):
            if isinstance(getattr(self, name), tuple):
                setattr(self, name, list(getattr(self, name)))
        if self.norm_stats == {}:
            self.norm_stats = None
        refuse_misspelt(kwargs)
        super().__post_init__(**kwargs)

    @property
    def num_cameras(self) -> int:
        return len(self.cameras)

    @property
    def image_size(self) -> int:
        """Height and width of the images that the towers see, in pixels."""
        return self.dinov2_config.image_size

    @property
    def num_patches(self) -> int:
        """Patches per camera; the two towers cut an image alike."""
        return (self.dinov2_config.image_size // self.dinov2_config.patch_size) ** 2

    @property
    def num_patch_tokens(self) -> int:
        """Patches of all cameras: the vision part of the language model's input."""
        return self.num_cameras * self.num_patches

    @property
    def num_task_tokens(self) -> int:
        """States per layer that the policy treats as task states (see `policy_task_tokens`)."""
        if self.policy_task_tokens is None:
            return self.num_patch_tokens
        return min(self.policy_task_tokens, self.num_patch_tokens + self.num_action_queries)

    def validate_architecture(self) -> None:
        """Check what types alone do not tell. Part of `@strict`'s validation; the model calls it too.

        Raises:
            TypeError, ValueError: naming the field, what it holds and what was expected.
        """
        sizes = (
            "num_action_queries",
            "chunk_size",
            "action_dim",
            "proprio_dim",
            "policy_num_layers",
            "policy_num_heads",
        )
        numbers = (
            "policy_task_tokens",
            "policy_rope_theta",
            "policy_noise_std",
            "image_center_crop",
            "initializer_range",
            "fps",
        )
        for name in (*sizes, *numbers):
            if isinstance(getattr(self, name), bool):  # older releases of `@strict` accept True as 1
                raise TypeError(f"{name}: expected int or float, got bool ({getattr(self, name)}).")
        for name in sizes:
            _check_at_least_1(name, getattr(self, name))
        self._check_cameras()
        self._check_names()
        self._check_towers()
        self._check_policy()
        _check_choice("norm_type", self.norm_type, NORM_TYPES)
        _check_choice("constant_dims", self.constant_dims, CONSTANT_DIM_RULES)
        if self.prompt_style is not None:
            _check_choice("prompt_style", self.prompt_style, PROMPT_STYLES)
        if not 0 <= self.initializer_range < math.inf:
            raise ValueError(f"initializer_range must be a number of at least 0, got {self.initializer_range!r}.")
        crop = self.image_center_crop
        if crop is not None and not 0 < crop <= 1:
            raise ValueError(f"image_center_crop must be a share of the area in (0, 1] or None, got {crop!r}.")
        if self.norm_stats is not None:
            check_norm_stats(self.norm_stats, self.norm_type, self.action_dim, self.proprio_dim, self.constant_dims)

    def _check_cameras(self) -> None:
        cameras = self.cameras
        if not cameras or len(set(cameras)) != len(cameras) or not all(cameras):
            raise ValueError(f"cameras must be at least one name, each once and not empty, got {list(cameras)}.")

    def _check_names(self) -> None:
        for field, size_field in (("action_names", "action_dim"), ("state_names", "proprio_dim")):
            names, size = getattr(self, field), getattr(self, size_field)
            if names is not None and len(names) != size:
                raise ValueError(
                    f"{field} has {len(names)} names and {size_field} is {size}; give one name per value, or "
                    f"{field}=None."
                )
        if self.fps is not None and not 0 < self.fps < math.inf:
            raise ValueError(f"fps must be a number above 0 or None, got {self.fps!r}.")

    def _check_towers(self) -> None:
        dinov2, siglip = self.dinov2_config, self.siglip_config
        for name, tower in (("dinov2_config", dinov2), ("siglip_config", siglip)):
            for field in ("image_size", "patch_size"):
                if not isinstance(getattr(tower, field), int):
                    raise TypeError(f"{name}.{field} must be one int (square), got {getattr(tower, field)!r}.")
            if tower.image_size % tower.patch_size:
                raise ValueError(
                    f"{name}.image_size={tower.image_size} must be a multiple of {name}.patch_size={tower.patch_size}."
                )
        sizes = (dinov2.image_size, dinov2.patch_size), (siglip.image_size, siglip.patch_size)
        if sizes[0] != sizes[1]:
            raise ValueError(
                "dinov2_config and siglip_config must cut the same image into the same patches, got (image_size, "
                f"patch_size) {sizes[0]} and {sizes[1]}."
            )
        for name in self.sub_configs:
            sub_config = getattr(self, name)
            if sub_config.hidden_size % sub_config.num_attention_heads:
                raise ValueError(
                    f"{name}.hidden_size={sub_config.hidden_size} must be a multiple of "
                    f"{name}.num_attention_heads={sub_config.num_attention_heads}."
                )

    def _check_policy(self) -> None:
        _check_choice("policy_variant", self.policy_variant, POLICY_VARIANTS)
        _check_choice("policy_rope_dtype", self.policy_rope_dtype, ROPE_DTYPES)
        width, heads, depth = self.text_config.hidden_size, self.policy_num_heads, self.text_config.num_hidden_layers
        if self.policy_num_layers != depth:
            raise ValueError(
                f"policy_num_layers={self.policy_num_layers} must equal text_config.num_hidden_layers={depth}: each "
                "block of the policy reads one layer of the language model."
            )
        if width % heads:
            raise ValueError(f"policy_num_heads={heads} must divide text_config.hidden_size={width}.")
        if self.policy_variant == "pro" and (width // heads) % 2:
            raise ValueError(
                f"policy_num_heads={heads} gives heads of the odd size {width // heads} (text_config.hidden_size="
                f"{width}). Rotary positions need an even size; choose another number of heads."
            )
        if self.policy_task_tokens is not None:
            _check_at_least_1("policy_task_tokens", self.policy_task_tokens)
        if not 0 <= self.policy_noise_std < math.inf:
            raise ValueError(f"policy_noise_std must be a number of at least 0, got {self.policy_noise_std!r}.")
        if not 0 < self.policy_rope_theta < math.inf:
            raise ValueError(f"policy_rope_theta must be a number above 0, got {self.policy_rope_theta!r}.")

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs) -> "VLAAdapterConfig":
        """As in transformers, but fields given as keyword arguments are checked together with the others.

        So `from_pretrained(repo, action_dim=14, norm_stats=...)` does not check the new size against the old
        statistics. Checkpoints in another layout are passed to their reader, with the revision and the other arguments
        of [`VLAAdapterConfig.from_pretrained`]. `AutoConfig` does not pass these on, so it reads the default revision.
        """
        source = kwargs.pop("_source", kwargs.get("name_or_path"))
        hub = kwargs.pop("_hub", {})
        layout = config_dict.get("model_type", VLAAdapterConfig.model_type)
        if layout != VLAAdapterConfig.model_type:
            if config_dict.get("_commit_hash") is not None:  # older releases of transformers set it
                hub = {"revision": config_dict["_commit_hash"], **hub}
            kwargs.setdefault("name_or_path", source)
            return_unused_kwargs = kwargs.pop("return_unused_kwargs", False)
            config, kwargs = reader_of_layout(layout, source).read_config(source, hub, **kwargs)
            return (config, kwargs) if return_unused_kwargs else config
        for name in ("robot", "step"):
            if kwargs.get(name) is not None:
                raise ValueError(
                    f"{name}={kwargs[name]!r} goes with checkpoints in the published layout; the configuration of "
                    f"{source} is complete."
                )
        refuse_misspelt(kwargs)
        config_dict = {"prompt_style": None, **config_dict}  # not recorded in older files
        fields = set(cls.__dataclass_fields__) - set(PreTrainedConfig.__dataclass_fields__)
        for name in fields & set(kwargs):
            value = kwargs.pop(name)
            if name in cls.sub_configs and isinstance(value, dict):
                value = {**config_dict.get(name, {}), **value}
            config_dict[name] = value
        return super().from_dict(config_dict, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, **kwargs) -> "VLAAdapterConfig":
        """As in transformers, for other layouts too. (`AutoConfig` of release 5.4 does not pass on the `token`.)"""
        hub = {name: kwargs[name] for name in HUB_ARGUMENTS & set(kwargs)}
        source = str(pretrained_model_name_or_path)
        config_dict, kwargs = cls.get_config_dict(source, **kwargs)
        return cls.from_dict(config_dict, _source=source, _hub=hub, **kwargs)

    def to_diff_dict(self) -> dict[str, Any]:
        """The whole configuration, not only what differs from the defaults.

        The defaults of the towers' and the language model's configurations change between releases of transformers,
        but a checkpoint must mean the same under all of them. Label maps and the source's name are left out.
        """
        whole = self.to_dict()
        for part in (whole, *(whole[name] for name in self.sub_configs)):
            for key in ("_name_or_path", "id2label", "label2id", "problem_type"):
                part.pop(key, None)
        return whole


def reader_of_layout(model_type: str, source: str | None) -> Any:
    """The registered reader of checkpoints with this `model_type`.

    Raises:
        ValueError: when there is none.
    """
    if model_type not in OTHER_LAYOUTS:
        hint = (
            " If it is a published VLA-Adapter, install vla-adapter-hf and import it."
            if model_type == "openvla"
            else ""
        )
        raise ValueError(f"{source} has model_type {model_type!r}, expected {VLAAdapterConfig.model_type!r}.{hint}")
    return OTHER_LAYOUTS[model_type]


def _check_at_least_1(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}.")


def refuse_misspelt(names: Iterable[str]) -> None:
    """Refuse names that are nearly those of our fields.

    Other names are accepted: every release of transformers writes other entries into config.json.

    Raises:
        TypeError: with the field that is probably meant.
    """
    inherited = set(PreTrainedConfig.__dataclass_fields__)
    fields = sorted(set(VLAAdapterConfig.__dataclass_fields__) - inherited)
    for name in names:
        if name in inherited or name in fields or name.startswith("_"):
            continue
        for meant in get_close_matches(name, fields, n=1, cutoff=0.85):
            raise TypeError(f"VLAAdapterConfig has no field {name!r}; did you mean {meant!r}?")


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}.")


__all__ = ["VLAAdapterConfig"]
