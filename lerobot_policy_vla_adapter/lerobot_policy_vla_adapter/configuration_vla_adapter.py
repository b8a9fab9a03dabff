"""The policy's configuration in LeRobot: options of `--policy.`, and the model's own configuration inside."""

from __future__ import annotations

import atexit
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from lerobot.configs import FeatureType, NormalizationMode, PolicyFeature, PreTrainedConfig
from lerobot.optim import AdamWConfig

from vla_adapter_hf.checkpoints.checkpoint import Checkpoint
from vla_adapter_hf.checkpoints.embedded import named_source
from vla_adapter_hf.checkpoints.lerobot.layout import POLICY_TYPE, check_robot, policy_config
from vla_adapter_hf.checkpoints.open import open_checkpoint
from vla_adapter_hf.checkpoints.published.checkpoint import PublishedCheckpoint
from vla_adapter_hf.modeling.configuration_vla_adapter import VLAAdapterConfig as ModelConfig
from vla_adapter_hf.robots import GripperConvention, RobotPreset, get_robot
from vla_adapter_hf.training.arguments import DataArguments, ModelArguments
from vla_adapter_hf.training.presets import PRESETS


PRESET_NAMES = ("lora", "frozen", "full")
# An opened checkpoint reads its files later, so the embedded folder stays until the process ends.
_FOLDERS = ExitStack()
atexit.register(_FOLDERS.close)


@PreTrainedConfig.register_subclass(POLICY_TYPE)
@dataclass
class VLAAdapterConfig(PreTrainedConfig):
    """VLA-Adapter in LeRobot. Training starts from `pretrained_path`, which is always needed: a checkpoint of our own
    layout, a published one, one that LeRobot wrote, or `embedded`, the small one that ships with vla-adapter-hf.

    Args:
        preset: what trains: `lora`, `frozen` (only the policy head) or `full`, as in `vla-adapter train`.
        lora_rank: rank of the LoRA matrices.
        optimizer_lr, optimizer_weight_decay, optimizer_grad_clip_norm: of AdamW; those of the preset by default. 0
            does not clip.
        robot: preset whose gripper and state conventions the dataset and the robot have: libero, calvin or aloha;
            `none` for values that are learnt as they are recorded.
        cameras: names of the dataset's cameras in the order in which the model sees them, third person first; by
            default the robot's, else the start checkpoint's.
        chunk_size: actions per chunk, by default the start checkpoint's.
        n_action_steps: actions of a chunk that `select_action` hands out before it asks the model again; by default
            the whole chunk.
        norm_type: bounds_q99, bounds or normal; by default the robot's, else the start checkpoint's.
        action_mask: for each of the action's values whether it is normalised; by default the robot's, else all are. A
            gripper with two values need not be. `vla-adapter check` suggests it.
        unnorm_key: which of the model's statistics to use, where it has several.
        start_robot: robot preset of a published start checkpoint.
        augment: crop and colour augmentation in training, as published.
        augmentation_seed: decides its draws and those of the noise that the model adds in training.
        jpeg_round_trip: whether frames go through JPEG at inference: yes, no, or auto (yes if recorded as JPEG).
        dtype: precision of the weights in evaluation and rollout. Training keeps float32 weights and computes in this
            precision.
        blend: for rtc, the share of the newer chunk in actions about which the chunk before it also says something.
        model: the model's own configuration; filled in when a checkpoint is loaded.
        base_checkpoint, base_revision: where training started. To resume LoRA, the frozen weights come from here.
        trained_batches: training batches so far; decides the random draws with the seed, so that a resumed training
            goes on with the next ones.
        action_feature_names: names of the action's values; LeRobot fills them in from the dataset.

    Raises:
        ValueError: for a value that is not one of those that exist.
    """

    normalization_mapping: dict[str, NormalizationMode] = field(
        # Our own statistics are used, inside of the model. LeRobot's are averages over episodes.
        default_factory=lambda: dict.fromkeys(("VISUAL", "STATE", "ACTION"), NormalizationMode.IDENTITY)
    )
    preset: str = "lora"
    lora_rank: int = ModelArguments.lora_rank
    optimizer_lr: float | None = None
    optimizer_weight_decay: float | None = None
    optimizer_grad_clip_norm: float | None = None
    robot: str | None = None
    cameras: list[str] | None = None
    chunk_size: int | None = None
    n_action_steps: int | None = None
    norm_type: str | None = None
    action_mask: list[bool] | None = None
    unnorm_key: str | None = None
    start_robot: str | None = None
    augment: bool = DataArguments.augment
    augmentation_seed: int = 0
    jpeg_round_trip: str = DataArguments.jpeg_round_trip
    dtype: str = "float32"
    blend: float = 0.7
    model: dict[str, Any] | None = None
    base_checkpoint: str | None = None
    base_revision: str | None = None
    trained_batches: int = 0
    action_feature_names: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.preset not in PRESET_NAMES:
            raise ValueError(f"policy.preset must be one of {', '.join(PRESET_NAMES)}, got {self.preset!r}.")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"policy.dtype must be float32 or bfloat16, got {self.dtype!r}.")
        if not 0 < self.blend <= 1:
            raise ValueError(f"policy.blend must be above 0 and at most 1, got {self.blend}.")
        if self.n_obs_steps != 1:
            raise ValueError(f"policy.n_obs_steps must be 1: the model sees one observation, got {self.n_obs_steps}.")
        self.robot_preset()  # refuses unknown names

    def robot_preset(self) -> RobotPreset | None:
        """The robot's conventions; None where values are learnt as they are recorded.

        Raises:
            ValueError: an unknown robot, or one whose actions are rebuilt from whole episodes.
        """
        if self.robot in (None, "none"):
            return None
        preset = get_robot(self.robot)
        if preset.relabel_deltas or preset.gripper is GripperConvention.BRIDGE:
            raise ValueError(
                f"policy.robot={self.robot!r} rebuilds actions from whole episodes, and LeRobot gives single chunks. "
                "Train with `vla-adapter train`, and convert the result with `vla-adapter to-lerobot --robot none`."
            )
        return preset

    def model_config(self) -> ModelConfig:
        """The model's own configuration: of the loaded model, else of the start checkpoint.

        Raises:
            ValueError: when there is neither.
        """
        if self.model is not None:
            return ModelConfig.from_dict(dict(self.model))
        if self.pretrained_path is None:
            raise ValueError(
                "VLA-Adapter is not trained from nothing: give --policy.pretrained_path, e.g. "
                "VLA-Adapter/LIBERO-Object-Pro. `vla-adapter init` writes a model with a new policy."
            )
        return self.open_start(str(self.pretrained_path), self.pretrained_revision).config

    def open_start(self, source: str, revision: str | None = None, **hub: Any) -> Checkpoint:
        """Open a checkpoint, or the `embedded` one; `start_robot` is for the published layout."""
        source = _FOLDERS.enter_context(named_source(source))
        start = open_checkpoint(source, revision=revision, **hub)
        if self.start_robot is None or not isinstance(start, PublishedCheckpoint):
            return start
        return open_checkpoint(source, revision=start.commit, robot=self.start_robot, **hub)

    def use_features_of_model(self) -> None:
        """Set LeRobot's features to the model's cameras, state and action."""
        described = policy_config({}, self.model_config(), self.robot, self.unnorm_key)
        self.input_features, self.output_features = (
            {
                name: PolicyFeature(type=FeatureType[entry["type"]], shape=tuple(entry["shape"]))
                for name, entry in described[kind].items()
            }
            for kind in ("input_features", "output_features")
        )

    def validate_features(self) -> None:
        """Compare LeRobot's features with the model's sizes.

        Raises:
            ValueError: no camera or state, sizes that differ from the model's, or a gripper without a convention.
        """
        config = self.model_config()
        if not self.image_features:
            raise ValueError("VLA-Adapter needs at least one camera among the input features.")
        preset = self.robot_preset()
        recorded = [] if preset is None or preset.raw_state is None else [preset.raw_state[0]]
        for name, feature, sizes in (
            ("action", self.action_feature, [config.action_dim]),
            ("observation.state", self.robot_state_feature, [config.proprio_dim, *recorded]),
        ):
            if feature is None or tuple(feature.shape) not in [(size,) for size in sizes]:
                found = "is missing" if feature is None else f"has shape {tuple(feature.shape)}"
                raise ValueError(f"{name} {found}; the model's has {sizes[0]} values.")
        if self.n_action_steps is not None and not 1 <= self.n_action_steps <= config.chunk_size:
            raise ValueError(
                f"policy.n_action_steps={self.n_action_steps}; a chunk of this model has {config.chunk_size} actions."
            )
        check_robot(config, self.robot, self.unnorm_key)

    def get_optimizer_preset(self) -> AdamWConfig:
        preset = PRESETS[self.preset]
        given = {
            "lr": (self.optimizer_lr, preset["learning_rate"]),
            "weight_decay": (self.optimizer_weight_decay, preset["weight_decay"]),
            "grad_clip_norm": (self.optimizer_grad_clip_norm, preset["max_grad_norm"]),
        }
        return AdamWConfig(**{name: default if value is None else value for name, (value, default) in given.items()})

    def get_scheduler_preset(self) -> None:
        """None: the published training has a constant learning rate."""
        return None

    @property
    def observation_delta_indices(self) -> None:
        return None

    @property
    def action_delta_indices(self) -> list[int]:
        return list(range(self.chunk_size or self.model_config().chunk_size))

    @property
    def reward_delta_indices(self) -> None:
        return None
