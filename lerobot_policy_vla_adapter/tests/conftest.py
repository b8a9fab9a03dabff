"""Fixtures of the plugin's tests: small checkpoints, small datasets of LeRobot's own writer, its commands in this
process.

`make test-lerobot` runs them, in an environment that has LeRobot. They share `model_fixtures.py` with the tests of
vla-adapter-hf.
"""

import plugin_environment  # noqa: F401 - before all others, which read what it sets


# isort: split
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import model_fixtures
import numpy as np
import pytest
import simulated_robots  # noqa: F401 - registers them
import torch
from lerobot.datasets import LeRobotDataset
from lerobot.utils.import_utils import register_third_party_plugins
from transformers import AutoProcessor

from lerobot_policy_vla_adapter import VLAAdapterPolicy
from vla_adapter_hf import VLAAdapterProcessor


register_third_party_plugins()
torch.set_num_threads(1)

INSTRUCTION = "pick up the cup"
QUIET = (
    "--policy.device=cpu",
    "--wandb.enable=false",
    "--num_workers=0",
    "--log_freq=1",
    "--policy.push_to_hub=false",
)


@pytest.fixture(scope="session")
def published(tmp_path_factory) -> Path:
    """A small checkpoint in the published layout."""
    return model_fixtures.write_published(tmp_path_factory.mktemp("published") / "pro", "pro")


@pytest.fixture(scope="session")
def write_start(tmp_path_factory, published) -> Callable[..., Path]:
    """`write_start(**fields)`: a small checkpoint in our own layout, 28-pixel images, two layers everywhere."""
    tokenizer = AutoProcessor.from_pretrained(published).tokenizer

    def write(**fields: Any) -> Path:
        folder = tmp_path_factory.mktemp("start") / "start"
        model = model_fixtures.tiny_model(**{"policy_rope_dtype": "float32", **fields})
        model.save_pretrained(folder)
        VLAAdapterProcessor.from_model_config(model.config, tokenizer).save_pretrained(folder)
        return folder

    return write


@pytest.fixture(scope="session")
def start(write_start) -> Path:
    """Without statistics: to be trained."""
    return write_start(norm_stats=None)


@pytest.fixture(scope="session")
def trained(write_start) -> Path:
    """With statistics, and a gripper that is learnt as 0...1."""
    return write_start()


@pytest.fixture(scope="session")
def write_arm_policy(write_start) -> Callable[..., Path]:
    """`write_arm_policy(**fields)`: a checkpoint of our own for the arm of six joints, as `vla-adapter train` would
    leave it, with chunks of 12 actions."""

    def write(**fields: Any) -> Path:
        stats = model_fixtures.norm_stats(6, 6, key="waves")
        stats["waves"]["action"]["mask"] = [True] * 6
        for part in stats["waves"].values():
            for name in ("min", "max", "q01", "q99", "mean", "std"):
                part[name] = [60 * value for value in part[name]]
        sizes = {"action_dim": 6, "proprio_dim": 6, "chunk_size": 12}
        return write_start(cameras=["front", "wrist"], norm_stats=stats, **sizes, **fields)

    return write


@pytest.fixture(scope="session")
def dataset(tmp_path_factory) -> Path:
    """Three episodes of LIBERO's sizes by LeRobot's own writer, frames as PNG: 9, 8 and 7 steps."""
    root = tmp_path_factory.mktemp("datasets") / "cups"
    image = {"dtype": "image", "shape": (32, 32, 3), "names": ["height", "width", "channels"]}
    features = {
        "observation.images.image": image,
        "observation.images.wrist_image": image,
        "observation.state": {"dtype": "float32", "shape": (8,), "names": None},
        "action": {"dtype": "float32", "shape": (7,), "names": None},
    }
    writer = LeRobotDataset.create("me/cups", fps=10, features=features, root=root, use_videos=False)
    random = np.random.default_rng(0)
    for length in (9, 8, 7):
        for step in range(length):
            action = random.uniform(-1, 1, 7).astype(np.float32)
            action[6] = -1.0 if step < length // 2 else 1.0
            frames = random.integers(0, 256, (2, 4, 4, 3), dtype=np.uint8).repeat(8, axis=1).repeat(8, axis=2)
            state = random.uniform(-1, 1, 8).astype(np.float32)
            numbers = {"observation.state": state, "action": action, "task": INSTRUCTION}
            writer.add_frame(
                {"observation.images.image": frames[0], "observation.images.wrist_image": frames[1], **numbers}
            )
        writer.save_episode()
    writer.finalize()
    return root


@pytest.fixture
def command(monkeypatch) -> Callable[..., Any]:
    """`command(function, *words)`: a command of LeRobot, in this process, with the words of its command line."""

    def run(function: Callable, *words: Any) -> Any:
        monkeypatch.setattr(sys, "argv", ["lerobot", *map(str, words)])
        return function()

    return run


@pytest.fixture
def train(command, monkeypatch, tmp_path) -> Callable[..., list[float]]:
    """`train(*words)`: `lerobot-train`; the loss of every step."""
    from lerobot.scripts.lerobot_train import train as lerobot_train

    def run(*words: Any) -> list[float]:
        losses = []
        forward = VLAAdapterPolicy.forward

        def watched(self, *arguments: Any, **options: Any) -> Any:
            loss, more = forward(self, *arguments, **options)
            losses.append(float(loss.detach()))
            return loss, more

        with monkeypatch.context() as patch:
            patch.setattr(VLAAdapterPolicy, "forward", watched)
            command(lerobot_train, *words, *(word for word in QUIET if "--config_path" not in str(words)))
        return losses

    return run


@pytest.fixture
def observation() -> dict[str, Any]:
    """Two observations of LIBERO's sizes, as LeRobot gives them to a policy's preprocessor."""
    random = np.random.default_rng(1)
    frames = random.integers(0, 256, (2, 2, 3, 40, 48), dtype=np.uint8)
    return {
        "observation.images.image": torch.from_numpy(frames[0]).float() / 255,
        "observation.images.wrist_image": torch.from_numpy(frames[1]).float() / 255,
        "observation.state": torch.from_numpy(random.uniform(-0.5, 0.5, (2, 8)).astype(np.float32)),
        "task": [INSTRUCTION, "put the bowl on the plate"],
    }
