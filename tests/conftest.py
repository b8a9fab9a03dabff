"""Fixtures for all tests. What they are made of is in `model_fixtures.py`, which tests may also import.

No test uses the Hub, except those with the mark `hub`: HF_HUB_OFFLINE=0 pytest -m hub. One thread makes results
repeatable, is no slower for models this small, and leaves the other cores to the other workers.
"""

import environment  # noqa: F401 - before all others, which read what it sets


# isort: split
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import model_fixtures
import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoProcessor
from transformers.utils import logging

import vla_adapter_hf  # noqa: F401


# A shell starts programs in the background with Ctrl-C switched off, and tests of Ctrl-C would wait for ever.
signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)
logging.disable_progress_bar()


@pytest.fixture(scope="session")
def published_pro(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small checkpoint in the published layout with the Pro policy. Not to be written to: see `published_copy`."""
    return model_fixtures.write_published(tmp_path_factory.mktemp("published") / "pro", "pro")


@pytest.fixture(scope="session")
def published_original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with the original policy."""
    return model_fixtures.write_published(tmp_path_factory.mktemp("published") / "original", "original")


@pytest.fixture
def published_copy(published_pro: Path, tmp_path: Path) -> Path:
    """A copy of `published_pro` that a test may change."""
    return Path(shutil.copytree(published_pro, tmp_path / "published"))


@pytest.fixture(scope="session")
def observation() -> dict[str, Any]:
    """A recorded LIBERO observation, as arguments of the processor: `images`, `text`, `state`."""
    with np.load(model_fixtures.FIXTURES / "libero_spatial_observation.npz") as recorded:
        return {
            "images": [recorded["full_image"], recorded["wrist_image"]],
            "text": str(recorded["instruction"]),
            "state": recorded["state"],
        }


@pytest.fixture(scope="session")
def processor(published_pro: Path) -> Any:
    """The processor of both small published checkpoints. Not to be changed."""
    return AutoProcessor.from_pretrained(published_pro)


@pytest.fixture(scope="session")
def pro_model(published_pro: Path) -> Any:
    """The model of `published_pro`, float32, evaluation mode. Not to be changed."""
    return AutoModel.from_pretrained(published_pro)


@pytest.fixture(scope="session")
def original_model(published_original: Path) -> Any:
    """The model of `published_original`."""
    return AutoModel.from_pretrained(published_original)


@pytest.fixture(scope="session")
def tiny_config() -> Callable:
    """`tiny_config(**overrides)`: a configuration of 0.1 M parameters."""
    return model_fixtures.tiny_config


@pytest.fixture(scope="session")
def tiny_model() -> Callable:
    """`tiny_model(config=None, seed=0, **overrides)`: a model of that configuration with weights that matter."""
    return model_fixtures.tiny_model


@pytest.fixture(scope="session")
def tiny_inputs() -> Callable:
    """`tiny_inputs(config, batch_size=2, prompt_length=9, seed=0)`: random inputs of its `forward`."""
    return model_fixtures.tiny_inputs


@pytest.fixture(scope="session")
def embedded_policy() -> Any:
    """The embedded checkpoint as a server has it. Not to be changed."""
    from vla_adapter_hf.checkpoints.embedded import embedded_folder
    from vla_adapter_hf.serving.policy import ServedPolicy
    from vla_adapter_hf.serving.settings import ServeSettings

    with embedded_folder() as folder:
        return ServedPolicy.load(str(folder / "checkpoint"), ServeSettings())
