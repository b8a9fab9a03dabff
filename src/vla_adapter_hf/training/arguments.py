"""Arguments of `vla-adapter train`, in addition to those of transformers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vla_adapter_hf.training.presets import PRESETS


@dataclass
class ModelArguments:
    checkpoint: str = field(metadata={"help": "Where to start: folder or Hub id, published layout or our own."})
    preset: str = field(default="lora", metadata={"help": f"What trains: {', '.join(PRESETS)}."})
    lora_rank: int = field(default=64, metadata={"help": "Rank of the LoRA matrices."})
    start_robot: str | None = field(default=None, metadata={"help": "Robot preset of a published start checkpoint."})
    norm_type: str | None = field(
        default=None, metadata={"help": "bounds_q99, bounds or normal; by default the robot's, else the checkpoint's."}
    )
    dtype: str = field(
        default="float32", metadata={"help": "Precision of the weights; with --bf16, compute is bfloat16."}
    )
    attn_implementation: str = field(
        default="sdpa", metadata={"help": "sdpa, eager, flash_attention_2, flex_attention."}
    )


@dataclass
class DataArguments:
    dataset: list[str] = field(metadata={"help": "Folders or Hub ids of demonstrations, one or several."})
    weights: list[float] | None = field(default=None, metadata={"help": "One per dataset, times its transitions."})
    format: str = field(default="auto", metadata={"help": "lerobot, rlds, dataset or auto."})
    robot: str | None = field(default=None, metadata={"help": "Preset whose gripper and state conventions apply."})
    cameras: list[str] | None = field(default=None, metadata={"help": "Camera columns, in the model's order."})
    chunk_size: int | None = field(default=None, metadata={"help": "Actions per chunk; by default the checkpoint's."})
    pad_chunks: bool = field(default=False, metadata={"help": "Also chunks that run past an episode's end."})
    on_bad_episode: str = field(default="error", metadata={"help": "error or skip."})
    state_column: str | None = field(default=None, metadata={"help": "Column of the state, if not named as usual."})
    action_column: str | None = field(default=None, metadata={"help": "Column of the action, if not named as usual."})
    chunk_column: str | None = field(
        default=None,
        metadata={
            "help": "Column of stored action chunks, by default action_chunk where there is one; none cuts chunks from "
            "consecutive rows."
        },
    )
    episode_column: str | None = field(default=None, metadata={"help": "Plain datasets: what tells episodes apart."})
    frame_column: str | None = field(default=None, metadata={"help": "Plain datasets: what orders an episode's rows."})
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
    validation: float = field(
        default=0.0, metadata={"help": "Share of episodes (below 1) or their number to hold out for evaluation."}
    )
    augment: bool = field(default=True, metadata={"help": "Crop and colour augmentation, as published."})
    jpeg_round_trip: str = field(
        default="auto",
        metadata={"help": "Whether frames go through JPEG at inference: yes, no, or auto (yes if recorded as JPEG)."},
    )
    picture_episodes: int = field(default=3, metadata={"help": "Held-out episodes to draw at the end."})

    def __post_init__(self) -> None:
        # In YAML a bare yes or no is a boolean.
        self.jpeg_round_trip = {"True": "yes", "False": "no"}.get(self.jpeg_round_trip, self.jpeg_round_trip)

    def reader_options(self) -> dict[str, Any]:
        """Those arguments of the datasets' constructors that were given; a reader refuses the ones it does not know."""
        names = (
            "state_column",
            "action_column",
            "chunk_column",
            "episode_column",
            "frame_column",
            "instruction_column",
        )
        names += ("instruction", "name", "split", "episodes", "revision")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if given.get("chunk_column") == "none":
            given["chunk_column"] = None
        return given
