"""A checkpoint on this machine, as the loop asks it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from vla_adapter_hf.checkpoints.attention import choose_attention
from vla_adapter_hf.checkpoints.open import open_checkpoint
from vla_adapter_hf.modeling.normalization_vla_adapter import select_norm_stats
from vla_adapter_hf.robots import RobotPreset, check_learnt_gripper, get_robot, normalized_values, why_to_name_a_robot
from vla_adapter_hf.utils.devices import waits_passively


logger = logging.getLogger(__name__)


class LocalPolicy:
    """A VLA-Adapter checkpoint that answers one observation at a time.

    Args:
        checkpoint: folder or Hub id.
        unnorm_key: which of the checkpoint's statistics to use; may be left out when there is one set.
        robot: preset whose convention the actions are turned into (`RobotPreset.to_environment`). By default actions
            stay in the physical units in which they were learnt, which is right where the training data was taken as
            recorded. A gripper that was not normalised needs a preset, or `"none"` to leave it as it was learnt.
        device, dtype: where and in which precision the model computes.
        attn_implementation: transformers' attention, such as `"sdpa"`, or one by part: `{"dinov2_config": "eager"}`.
            By default the quicker one is measured for a model in bfloat16 on a CPU.

    Attributes:
        averaged: boolean `(A,)`, which of an action's values were normalised. The others, such as a gripper with two
            values, must not be averaged between chunks.
        delta_actions: for each action dimension whether it is a change and not a target, as the preset says; None
            without a preset.

    Raises:
        ValueError: unknown statistics or robot, a robot with actions of another size, or a gripper whose convention is
            not known.
    """

    def __init__(
        self,
        checkpoint: str | Path,
        unnorm_key: str | None = None,
        robot: str | RobotPreset | None = None,
        device: str = "cpu",
        dtype: str = "float32",
        attn_implementation: str | Mapping[str, str] | None = None,
    ) -> None:
        if device == "cpu" and not waits_passively():
            logger.warning(
                "Threads do not wait passively: predictions become very slow where other programs want the cores. "
                "Set OMP_WAIT_POLICY=passive and GOMP_SPINCOUNT=0 before the program starts."
            )
        self.robot = None if robot in (None, "none") else get_robot(robot)
        opened = open_checkpoint(checkpoint)
        self.processor = opened.load_processor()
        self.model = opened.load_model(dtype, device, attn_implementation=attn_implementation)
        if attn_implementation is None:
            choose_attention(self.model)
        config = self.model.config
        self.unnorm_key, stats = select_norm_stats(config.norm_stats, unnorm_key)
        reason = why_to_name_a_robot(stats["action"])
        if robot is None and reason is not None:
            raise ValueError(f"the statistics {self.unnorm_key!r} have {reason}")
        self.cameras, self.state_dim, self.action_dim = config.cameras, config.proprio_dim, config.action_dim
        self.averaged = normalized_values(stats["action"])
        self.delta_actions = None if self.robot is None else self.robot.delta_actions
        self.state_names, self.action_names, self.fps = config.state_names, config.action_names, config.fps
        if self.robot is not None and self.robot.action_dim != self.action_dim:
            raise ValueError(
                f"robot={self.robot.name!r} has actions of {self.robot.action_dim} values, the checkpoint "
                f"{self.action_dim}"
            )
        if self.robot is not None:
            check_learnt_gripper(self.robot, stats["action"])

    def predict(self, images: Mapping[str, np.ndarray], instruction: str, state: np.ndarray) -> np.ndarray:
        """The chunk (K, A) for one observation."""
        inputs = self.processor(images=dict(images), text=instruction, state=state)
        actions = self.model.predict_action(**inputs, unnorm_key=self.unnorm_key)[0]
        return actions if self.robot is None else self.robot.to_environment(actions)
