"""Finding CALVIN's simulator, which is on no index, and reading from it what an evaluation needs.

The published evaluation needs the 500 GB dataset for one file, the environment's configuration. It is put together
here from `calvin_env`'s own files, with the same result.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.util
import io
import json
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

from vla_adapter_hf.data.storage import cache_directory
from vla_adapter_hf.simulation.calvin.scores import PUBLISHED_SEQUENCES
from vla_adapter_hf.utils.files import write_json


CHECKOUT = (
    "git clone --recurse-submodules https://github.com/mees/calvin, and put calvin/calvin_env and "
    "calvin/calvin_models on PYTHONPATH"
)
RENDERERS = ("egl", "cpu")
PACKAGES = {
    "pybullet": "pybullet",
    "hydra": "hydra-core",
    "omegaconf": "omegaconf",
    "git": "gitpython",
    "scipy": "scipy",
    "cv2": "opencv-python-headless",
    "gym": "gym",
    "rich": "rich",
    "quaternion": "numpy-quaternion",
    "pytorch_lightning": "pytorch-lightning",
    "tqdm": "tqdm",
    "termcolor": "termcolor",
}
"""What CALVIN imports in an evaluation, by module, and the name to install it by."""

SIMULATOR_MODULES = ("calvin_env.envs.play_table_env", "calvin_env.envs.tasks")
SEQUENCE_MODULES = ("calvin_agent.evaluation.multistep_sequences", "calvin_agent.evaluation.utils")


def import_calvin(name: str) -> ModuleType:
    """Imports one of CALVIN's modules, quietly.

    Raises:
        ImportError: a package is missing; the message names it and how to get it.
    """
    if name.startswith("calvin_agent"):
        provide_hash()
    hook = sys.excepthook  # calvin_env replaces it for the whole process
    try:
        with quiet(), contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = (error.name or name).split(".")[0]
        raise ImportError(f"{missing} is missing, which CALVIN's simulator needs: {how_to_get(missing)}") from error
    except (ImportError, OSError) as error:
        raise ImportError(f"{name} is there but cannot be imported ({type(error).__name__}: {error})") from error
    finally:
        sys.excepthook = hook


def is_importable(module: str) -> bool:
    """Whether a top-level module is there, without importing it."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def how_to_get(module: str) -> str:
    """The command that brings a missing module."""
    return CHECKOUT if module in ("calvin_env", "calvin_agent") else f"pip install {PACKAGES.get(module, module)}"


def provide_hash() -> None:
    """Provides the module `pyhash` where it is missing: it cannot be installed for Python 3.11 or newer.

    CALVIN draws the blocks of an initial scene with a seed that is a hash of its description, so another hash gives
    other scenes.
    """
    if "pyhash" in sys.modules or is_importable("pyhash"):
        return
    module = ModuleType("pyhash", "The one function of pyhash that CALVIN uses.")
    module.fnv1_32 = lambda: fnv1_32  # type: ignore[attr-defined]
    sys.modules["pyhash"] = module


def fnv1_32(text: str) -> int:
    """The 32-bit FNV-1 hash as the package pyhash computes it: over UTF-16, from 0 instead of the usual offset."""
    value = 0
    for byte in text.encode("utf-16-le"):
        value = (value * 0x01000193 & 0xFFFFFFFF) ^ byte
    return value


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Shows nothing that CALVIN and its libraries in C print: an evaluation's output is for its results."""
    library = ctypes.CDLL(None)
    sys.stdout.flush()
    library.fflush(None)
    kept = os.dup(1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        library.fflush(None)
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def make_environment(renderer: str) -> Any:
    """Builds CALVIN's environment D with the two cameras of the published evaluation.

    Args:
        renderer: `egl` needs a driver; without one it may end the process. `cpu` always works and draws no shadows.

    Raises:
        ValueError: another renderer.
        ImportError: a package is missing, or CALVIN is not in a git checkout.
        OSError: EGL is not there.
    """
    check_renderer(renderer)
    play_table = import_calvin(SIMULATOR_MODULES[0])
    hydra, omegaconf = import_calvin("hydra"), import_calvin("omegaconf")
    configuration = environment_configuration(omegaconf.OmegaConf, configuration_folder())
    choices = {"show_gui": False, "use_vr": False, "use_scene_info": True, "use_egl": renderer == "egl"}
    try:
        with quiet():
            return hydra.utils.instantiate(configuration.env, **choices)
    except SystemExit as error:
        raise OSError("pybullet's EGL renderer cannot be loaded; renderer='cpu' needs no driver") from error
    except hydra.errors.InstantiationException as error:
        if "InvalidGitRepository" not in f"{error} {error.__cause__!r}":
            raise
        where = Path(play_table.__file__).parents[2]
        raise ImportError(
            f"calvin_env reads the commit of its git checkout, and {where} is none: {CHECKOUT}"
        ) from error


def check_renderer(renderer: str) -> None:
    """Refuses an unknown renderer.

    Raises:
        ValueError: naming the known ones.
    """
    if renderer not in RENDERERS:
        raise ValueError(f"renderer must be one of {', '.join(RENDERERS)}, got {renderer!r}")


def configuration_folder() -> Path:
    """`calvin_env`'s folder `conf`."""
    return Path(import_calvin("calvin_env").__file__).parents[1] / "conf"


def environment_configuration(omega_conf: Any, folder: Path) -> Any:
    """The configuration of environment D as in CALVIN's dataset, without the tactile camera."""

    def load(name: str) -> Any:
        return omega_conf.load(folder / f"{name}.yaml")

    robot = omega_conf.merge(load("robot/panda"), load("robot/panda_longer_finger"))
    del robot["defaults"]
    return omega_conf.create(
        {
            "data_path": "data",
            "use_vr": False,
            "cameras": {name: load(f"cameras/cameras/{name}") for name in ("static", "gripper")},
            "robot": robot,
            "scene": load("scene/calvin_scene_D"),
            "env": load("env/play_table_env"),
        }
    )


def make_oracle() -> Any:
    """CALVIN's judge of subtasks."""
    tasks = yaml.safe_load((configuration_folder() / "tasks" / "new_playtable_tasks.yaml").read_text(encoding="utf-8"))
    return import_calvin(SIMULATOR_MODULES[1]).Tasks(tasks["tasks"])


def read_instructions() -> dict[str, str]:
    """The instruction of every subtask in the published evaluation: the first annotation.

    Raises:
        ImportError: CALVIN is not there.
    """
    models = Path(import_calvin("calvin_agent").__file__).parents[1]
    path = models / "conf" / "annotations" / "new_playtable_validation.yaml"
    annotations = yaml.safe_load(path.read_text(encoding="utf-8"))
    return {subtask: str(texts[0]) for subtask, texts in annotations.items()}


def draw_sequences() -> list[dict[str, Any]]:
    """The 1,000 published sequences, in CALVIN's order: `robot` (15,), `scene` (24,) and five `subtasks` each.

    CALVIN's generator takes two minutes of processor time, so the sequences are kept in the cache directory. It draws
    other sequences if asked for fewer than 1,000, so a shorter evaluation plays the first ones of these.

    Raises:
        ImportError: CALVIN is not there.
    """
    path = cache_directory() / "calvin_sequences.json"
    if path.is_file():
        sequences = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(sequences, list) and len(sequences) == PUBLISHED_SEQUENCES:
            return sequences
    generator, scenes = map(import_calvin, SEQUENCE_MODULES)
    sequences = []
    for state, subtasks in generator.get_sequences(PUBLISHED_SEQUENCES):
        robot, scene = scenes.get_env_state_for_initial_condition(state)
        sequences.append({"robot": robot.tolist(), "scene": scene.tolist(), "subtasks": list(subtasks)})
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, sequences, indent=None)
    return sequences
