"""Policies for evaluations: checkpoints, bounds and controls."""

from __future__ import annotations

import json
import logging
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from vla_adapter_hf.checkpoints.checkpoint import check_dtype
from vla_adapter_hf.checkpoints.checksum import weights_checksum
from vla_adapter_hf.checkpoints.embedded import embedded_folder
from vla_adapter_hf.checkpoints.open import open_checkpoint
from vla_adapter_hf.modeling.normalization_vla_adapter import select_norm_stats
from vla_adapter_hf.robots import RobotPreset, get_robot, is_zero_to_one, learnt_range
from vla_adapter_hf.simulation.environment import Environment, Observation
from vla_adapter_hf.utils.devices import check_device
from vla_adapter_hf.utils.files import visible_files


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Request:
    """One environment that waits for a chunk.

    Attributes:
        observation: None for policies that look at nothing.
        instruction: text for the policy.
        task, episode, step: where the environment is.
    """

    observation: Observation | None
    instruction: str
    task: int
    episode: int
    step: int


@runtime_checkable
class Policy(Protocol):
    """Predicts chunks for several environments at once, in the parent process."""

    name: str
    needs_observation: bool
    """False saves the rendering."""

    def predict(self, requests: Sequence[Request]) -> list[np.ndarray]:
        """One chunk (K, A) per request, un-normalised: in physical units, LIBERO's gripper from 0 closed to 1 open."""


@runtime_checkable
class ResidentPolicy(Protocol):
    """Lives in the environment's process because it reads the simulator's state; must be picklable."""

    name: str

    def attach(self, environment: Environment) -> Callable[[], np.ndarray]:
        """Called after each reset; returns a function that gives the next action in the environment's convention."""


def standing_still(robot: RobotPreset) -> np.ndarray:
    """The action (A,) that moves nothing and keeps the gripper open, for a robot with delta actions."""
    action = np.zeros(robot.action_dim)
    if not robot.action_mask[-1]:
        action[-1] = 1.0  # a binary gripper: 1 is open in physical units
    return action


def changes(robot: RobotPreset) -> np.ndarray:
    """Which values of an action are changes, boolean (A,); those that are normalised if the preset does not say."""
    return np.array(robot.action_mask if robot.delta_actions is None else robot.delta_actions, dtype=bool)


class NoopPolicy:
    """Stands still with the gripper open: the lower bound."""

    name = "noop"
    needs_observation = False

    def __init__(self, robot: str) -> None:
        preset = get_robot(robot)
        self._chunk = np.tile(standing_still(preset), (preset.chunk_size, 1))

    def predict(self, requests: Sequence[Request]) -> list[np.ndarray]:
        return [self._chunk.copy() for _ in requests]


class OraclePolicy:
    """The scripted expert for libero_object: the upper bound."""

    name = "oracle"

    def attach(self, environment: Environment) -> Callable[[], np.ndarray]:
        from vla_adapter_hf.simulation.libero.expert import LiberoObjectExpert

        return LiberoObjectExpert(environment).act


class ReplayPolicy:
    """Repeats recorded actions: tests an environment and its gripper convention without a model.

    Args:
        actions: raw actions (T, A) per (task, episode), in the recording's convention.
        robot: preset that knows the convention.

    Raises:
        ValueError: no recordings.
    """

    name = "replay"
    needs_observation = False

    def __init__(self, actions: Mapping[tuple[int, int], np.ndarray], robot: str) -> None:
        if not actions:
            raise ValueError("actions holds no recording to replay")
        self._preset: RobotPreset = get_robot(robot)
        self._actions = dict(actions)

    @classmethod
    def from_folder(cls, folder: str | Path, robot: str) -> ReplayPolicy:
        """Recordings that `evaluate(..., save_actions=True)` left in `<output>/actions`.

        Raises:
            ValueError: the folder holds none.
        """
        actions = {}
        for path in visible_files(folder, "*-*.npy"):
            task, episode = path.stem.split("-")
            actions[int(task), int(episode)] = np.load(path)
        if not actions:
            raise ValueError(f"folder={str(folder)!r} holds no recorded actions named <task>-<episode>.npy")
        return cls(actions, robot)

    def describe(self) -> dict[str, Any]:
        """Which recordings these are (JSON values)."""
        checksum = 0
        for key, actions in sorted(self._actions.items()):
            checksum = zlib.crc32(np.ascontiguousarray(actions).tobytes(), zlib.crc32(repr(key).encode(), checksum))
        return {"actions": f"crc32 {checksum:08x}"}

    def predict(self, requests: Sequence[Request]) -> list[np.ndarray]:
        return [self._chunk(request) for request in requests]

    def _chunk(self, request: Request) -> np.ndarray:
        recorded = self._actions.get((request.task, request.episode))
        if recorded is None:
            raise ValueError(f"no recorded actions for task {request.task}, episode {request.episode}")
        size = self._preset.chunk_size
        # After the end of the recording its last action is repeated.
        steps = np.minimum(np.arange(request.step, request.step + size), len(recorded) - 1)
        return self._preset.to_training(recorded[steps].astype(np.float64))


class CheckpointPolicy:
    """A VLA-Adapter checkpoint, which predicts for all waiting environments in one batch.

    Args:
        checkpoint: folder or Hub id, in transformers' layout or as published.
        robot: preset of the suite, which names the cameras of the environment's frames. A checkpoint in the published
            layout does not show its robot and is taken as one of this preset.
        unnorm_key: statistics to use; by default those of the suite's name.
        suite: name of the suite that is played; without one, a checkpoint's only statistics are taken.
        device: such as `cuda`; None is the CPU.
        dtype: such as `bfloat16`; None is the checkpoint's own on a GPU and float32 on the CPU.
        name: what results call the policy; the last part of `checkpoint` by default.

    Raises:
        ValueError: an unknown device or precision; or the checkpoint has no statistics of that name, was trained with
            another gripper convention, or needs other cameras than the environment has.
    """

    needs_observation = True

    def __init__(
        self,
        checkpoint: str | Path,
        robot: str,
        unnorm_key: str | None = None,
        suite: str | None = None,
        device: str | None = None,
        dtype: str | None = None,
        name: str | None = None,
    ) -> None:
        device = device or "cpu"
        dtype = check_dtype(dtype or ("float32" if device == "cpu" else "auto"))
        check_device(device)
        self.name = name or Path(checkpoint).name
        opened = open_checkpoint(checkpoint, default_robot=robot)
        # Checked before the weights are loaded: other statistics give actions of another size, without an error.
        self.unnorm_key, stats = select_norm_stats(opened.config.norm_stats, unnorm_key or suite)
        check_gripper(stats["action"], robot)
        self.camera_order = camera_order(opened.config.cameras, get_robot(robot).cameras)
        self.processor = opened.load_processor()
        # With the default attention: a resumed run, a shard and a replica must compute the same.
        self.model = opened.load_model(dtype=dtype, device=device)

    def describe(self) -> dict[str, Any]:
        """What decides its actions (JSON values), so that a retrained checkpoint does not resume another's run."""
        config = self.model.config.to_dict()
        rest = [
            {name: value for name, value in config.items() if name not in ("_name_or_path", "transformers_version")}
        ]
        rest += [self.processor.image_processor.to_dict(), self.processor.prompt_style]
        rest += [self.processor.tokenizer.get_vocab()]
        settings = zlib.crc32(json.dumps(rest, sort_keys=True, default=str).encode())
        return {
            "weights": weights_checksum(self.model),
            "configuration": f"crc32 {settings:08x}",
            "unnorm_key": self.unnorm_key,
        }

    def predict(self, requests: Sequence[Request]) -> list[np.ndarray]:
        images = [[request.observation.images[index] for index in self.camera_order] for request in requests]
        state = np.stack([request.observation.state for request in requests])
        inputs = self.processor(images=images, text=[request.instruction for request in requests], state=state)
        return list(self.model.predict_action(**inputs, unnorm_key=self.unnorm_key))


def check_gripper(stats: Mapping[str, Any], robot: str) -> None:
    """Refuses a model that was trained on the recorded gripper convention: it would open where it should close.

    Args:
        stats: statistics of the model's actions.
        robot: preset of the suite. The physical units of a binary gripper are 0...1 for every preset that has one.

    Raises:
        ValueError: the gripper has another range.
    """
    learnt = learnt_range(stats)
    if not get_robot(robot).action_mask[-1] and not is_zero_to_one(learnt):
        raise ValueError(
            f"the checkpoint's gripper is {learnt[0]:g}...{learnt[1]:g} in its statistics, and robot {robot!r} has "
            "0...1: it was trained on recorded actions without conversion. "
            f"Train with robot={robot!r} (vla-adapter train --robot {robot})."
        )


def camera_order(wanted: Sequence[str], present: Sequence[str]) -> list[int]:
    """For every camera of a model, the index of its frame among the environment's.

    Cameras are matched by name. A model that has other names for all of them takes the frames in the environment's
    order, with a warning.

    Raises:
        ValueError: only some names are known, or the numbers of cameras differ and no name is known.
    """
    if set(wanted) <= set(present):
        return [list(present).index(name) for name in wanted]
    if len(wanted) == len(present) and not set(wanted) & set(present):
        pairs = ", ".join(f"{present[index]} as {name}" for index, name in enumerate(wanted))
        logger.warning("No camera has the name that the checkpoint has for it; taken by their order: %s", pairs)
        return list(range(len(present)))
    raise ValueError(
        f"the checkpoint's cameras are {', '.join(wanted)}; the environment has {', '.join(present)}. Load the "
        "checkpoint with cameras=[...] of the same names and save it."
    )


def blackened(observation: Observation | None) -> Observation | None:
    """The same observation with black frames."""
    if observation is None:
        return None
    return Observation(tuple(np.zeros_like(image) for image in observation.images), observation.state)


def make_policy(name: str, robot: str, **options: Any) -> Policy | ResidentPolicy:
    """`oracle`, `noop`, `embedded`, or a checkpoint's folder or Hub id. For `replay` build a `ReplayPolicy`."""
    if name == "oracle":
        return OraclePolicy()
    if name == "noop":
        return NoopPolicy(robot)
    if name == "embedded":
        with embedded_folder() as folder:
            return CheckpointPolicy(folder / "checkpoint", robot, name=name, **options)
    return CheckpointPolicy(name, robot, **options)
