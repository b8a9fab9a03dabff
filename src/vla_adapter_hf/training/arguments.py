"""Arguments of `vla-adapter train`, in addition to those of transformers."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from vla_adapter_hf.modeling.normalization_vla_adapter import NORM_TYPES
from vla_adapter_hf.robots import get_robot
from vla_adapter_hf.training.presets import PRESETS


COLUMNS = ("state_column", "action_column", "chunk_column", "episode_column", "frame_column", "instruction_column")
READER_OPTIONS = (*COLUMNS, "instruction", "name", "split", "episodes", "revision", "video_backend")


@dataclass
class ModelArguments:
    """Where a training starts and what trains.

    Raises:
        ValueError: a preset, precision or kind of normalisation that is not known.
    """

    checkpoint: str = field(metadata={"help": "Where to start: folder or Hub id, published layout or our own."})
    preset: str = field(default="lora", metadata={"help": f"What trains, and the schedule: {', '.join(PRESETS)}."})
    lora_rank: int = field(default=64, metadata={"help": "Rank of the LoRA matrices."})
    start_robot: str | None = field(default=None, metadata={"help": "Robot preset of a published start checkpoint."})
    norm_type: str | None = field(
        default=None, metadata={"help": "bounds_q99, bounds or normal; by default the robot's, else the checkpoint's."}
    )
    dtype: str = field(
        default="float32",
        metadata={"help": "Precision of the weights: float32, bfloat16 or float16. With --bf16, compute is bfloat16."},
    )
    attn_implementation: str = field(
        default="sdpa", metadata={"help": "sdpa, eager, flash_attention_2, flex_attention."}
    )

    def __post_init__(self) -> None:
        _check_choice("preset", self.preset, PRESETS)
        _check_choice("dtype", self.dtype, ("float32", "bfloat16", "float16"))
        _check_choice("norm_type", self.norm_type, (None, *NORM_TYPES))
        if self.lora_rank < 1:
            raise ValueError(f"lora_rank={self.lora_rank}; expected a number of at least 1.")

    def layout(self) -> dict[str, str]:
        """Options of `open_checkpoint` for a start checkpoint in the published layout."""
        return {} if self.start_robot is None else {"robot": self.start_robot}


@dataclass
class DataArguments:
    """What a training reads.

    Raises:
        ValueError: a robot that is not known, or a value that is not one of those that exist.
    """

    dataset: list[str] = field(metadata={"help": "Folders or Hub ids of demonstrations, one or several."})
    weights: list[float] | None = field(
        default=None,
        metadata={"help": "One weight per dataset. Samples are drawn by weight times the number of transitions."},
    )
    format: str = field(default="auto", metadata={"help": "lerobot, rlds, dataset or auto."})
    robot: str | None = field(
        default=None, metadata={"help": "Robot preset whose gripper and state conventions apply."}
    )
    cameras: list[str] | None = field(
        default=None,
        metadata={"help": "Camera columns in the order in which the model sees them, third person first."},
    )
    chunk_size: int | None = field(default=None, metadata={"help": "Actions per chunk; by default the checkpoint's."})
    pad_chunks: bool = field(
        default=False, metadata={"help": "Also train on chunks that run past the end of an episode."}
    )
    on_bad_episode: str = field(
        default="error", metadata={"help": "error stops at an episode that cannot be used, skip leaves it out."}
    )
    state_column: str | None = field(default=None, metadata={"help": "Column of the state, if not named as usual."})
    action_column: str | None = field(default=None, metadata={"help": "Column of the action, if not named as usual."})
    chunk_column: str | None = field(
        default=None,
        metadata={
            "help": "Column of stored action chunks, by default action_chunk where there is one; none cuts chunks "
            "from consecutive rows."
        },
    )
    episode_column: str | None = field(
        default=None, metadata={"help": "Plain datasets: the column with the episode's number or name."}
    )
    frame_column: str | None = field(
        default=None, metadata={"help": "Plain datasets: the column that orders the rows of an episode."}
    )
    instruction_column: str | None = field(
        default=None, metadata={"help": "Plain datasets, RLDS: column of the instruction, if not named as usual."}
    )
    instruction: str | None = field(
        default=None, metadata={"help": "One instruction for all episodes, instead of the recorded ones."}
    )
    name: str | None = field(default=None, metadata={"help": "RLDS: which dataset, where a folder holds several."})
    split: str | None = field(
        default=None, metadata={"help": "Only this split that the dataset declares; RLDS: train."}
    )
    episodes: list[int] | None = field(default=None, metadata={"help": "Only these episodes; all by default."})
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a dataset on the Hub."})
    video_backend: str | None = field(
        default=None, metadata={"help": "LeRobot: what decodes MP4 frames, pyav (by default) or torchcodec."}
    )
    validation: float = field(
        default=0.0, metadata={"help": "Share of episodes (below 1) or their number to hold out for evaluation."}
    )
    augment: bool = field(default=True, metadata={"help": "Crop and colour augmentation, as published."})
    jpeg_round_trip: str = field(
        default="auto",
        metadata={"help": "Whether frames go through JPEG at inference: yes, no, or auto (yes if recorded as JPEG)."},
    )
    action_mask: list[str] | None = field(
        default=None,
        metadata={
            "help": "For each action dimension whether it is normalised: true or false; by default the robot's, else "
            "all are. A gripper with two values need not be."
        },
    )
    picture_episodes: int = field(default=3, metadata={"help": "Held-out episodes to draw at the end."})
    check_every: int | None = field(
        default=None,
        metadata={
            "help": "Every so many steps compare the error on held-out samples with that for other frames and for "
            "another instruction: whether the policy begins to look and to listen. Drawn into training.png. Needs "
            "--validation."
        },
    )
    check_samples: int = field(default=32, metadata={"help": "Held-out samples of --check_every, at least 20."})

    def __post_init__(self) -> None:
        # In YAML a bare yes or no is a boolean.
        self.jpeg_round_trip = {"True": "yes", "False": "no"}.get(self.jpeg_round_trip, self.jpeg_round_trip)
        _check_choice("jpeg_round_trip", self.jpeg_round_trip, ("auto", "yes", "no"))
        if self.robot is not None:
            get_robot(self.robot)
        self.mask_of_actions()
        least_values = {"chunk_size": 1, "validation": 0, "picture_episodes": 1, "check_every": 1, "check_samples": 20}
        for name, least in least_values.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}={value}; expected a number of at least {least}.")
        if self.check_every is not None and not self.validation:
            raise ValueError(
                f"check_every={self.check_every} needs held-out episodes, and validation={self.validation} holds none "
                "out. Give validation, such as 0.1, or leave check_every out."
            )

    def mask_of_actions(self) -> list[bool] | None:
        """`action_mask` as booleans.

        Raises:
            ValueError: an entry that is neither true nor false.
        """
        if self.action_mask is None:
            return None
        known = {"true": True, "false": False}
        # In YAML the entries are booleans already.
        entries = [str(entry).lower() for entry in self.action_mask]
        for entry in entries:
            _check_choice("action_mask", entry, known)
        return [known[entry] for entry in entries]

    def reader_options(self) -> dict[str, Any]:
        """The given arguments of the datasets' constructors. A reader refuses those that it does not know."""
        given = {name: getattr(self, name) for name in READER_OPTIONS if getattr(self, name) is not None}
        if given.get("chunk_column") == "none":
            given["chunk_column"] = None
        return given


def _check_choice(name: str, value: str | None, choices: Collection[str | None]) -> None:
    if value not in choices:
        known = ", ".join(choice for choice in choices if choice is not None)
        raise ValueError(f"{name} must be one of {known}, got {value!r}.")
