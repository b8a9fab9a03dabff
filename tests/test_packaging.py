"""The sdist and the wheel: complete, accepted by an index, usable from an environment that has no clone.

`make package`.
"""

import ast
import importlib.metadata
import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path, PurePosixPath

import pytest
import yaml

import vla_adapter_hf


ROOT = Path(__file__).parent.parent
TYPED_PROGRAM = Path(__file__).parent / "typed_program.py"


@pytest.fixture(scope="module")
def distributions(tmp_path_factory) -> tuple[Path, Path]:
    """The sdist, and the wheel that is built from it."""
    pytest.importorskip("build")
    folder = tmp_path_factory.mktemp("dist")
    run([sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT])
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def environment(distributions, tmp_path_factory) -> Path:
    """The `bin` of a virtual environment with the wheel and everything that is installed here but this package."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    # A folder that is named in a .pth file adds its packages; .pth files in it, such as an editable install's, are not
    # read.
    shared = [path for path in sys.path if path.endswith("-packages")]
    (site / "shared.pth").write_text("\n".join(shared), encoding="utf-8")
    install = ["install", "--quiet", "--no-deps", "--no-index", "--disable-pip-version-check", distributions[1]]
    run([sys.executable, "-m", "pip", "--python", folder / "bin" / "python", *install])
    return folder / "bin"


def run(command: list, cwd: Path | None = None) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
    finished = subprocess.run(list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, f"{finished.stdout}\n{finished.stderr}"
    return finished.stdout


@pytest.mark.slow
def test_an_index_accepts_both(distributions):
    pytest.importorskip("twine")
    run([sys.executable, "-m", "twine", "check", "--strict", *distributions])


@pytest.mark.slow
def test_the_wheel_holds_every_module_and_data_file_of_the_clone(distributions):
    folders = {
        "": ROOT / "src",
        "vla_adapter_hf/modeling": ROOT / "modeling",
        "vla_adapter_hf/processing": ROOT / "processing",
    }
    expected = {
        str(PurePosixPath(prefix, path.relative_to(folder)))
        for prefix, folder in folders.items()
        for path in folder.rglob("*")
        if path.is_file() and not path.parts[-2].endswith(("__pycache__", ".egg-info"))
    }
    with zipfile.ZipFile(distributions[1]) as wheel:
        there = {name for name in wheel.namelist() if not name.split("/")[0].endswith(".dist-info")}
    assert there == expected


@pytest.mark.slow
def test_the_demo_runs_from_an_installed_wheel(environment, tmp_path):
    pytest.importorskip("matplotlib")
    where = run([environment / "python", "-c", "import vla_adapter_hf; print(vla_adapter_hf.__file__)"], tmp_path)
    assert Path(where.strip()).is_relative_to(environment.parent), "the clone was imported, not the wheel"
    said = run([environment / "vla-adapter", "demo", "--output", tmp_path / "demo.png"], tmp_path)
    assert "demo.png" in said
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_type_checker_understands_the_public_names_of_an_installed_wheel(environment, tmp_path):
    pytest.importorskip("mypy")
    options = ["--python-executable", environment / "python", "--cache-dir", tmp_path / "cache", "--strict"]
    run([sys.executable, "-m", "mypy", "--config-file", ROOT / "pyproject.toml", *options, TYPED_PROGRAM], tmp_path)


def test_the_typed_program_uses_every_public_name():
    attributes = {
        node.attr for node in ast.walk(ast.parse(TYPED_PROGRAM.read_text())) if isinstance(node, ast.Attribute)
    }
    assert set(vla_adapter_hf.__all__) <= attributes


def test_every_name_that_is_imported_on_first_use_is_public_and_there():
    assert set(vla_adapter_hf._ON_FIRST_USE) <= set(vla_adapter_hf.__all__)
    for name in vla_adapter_hf.__all__:
        assert getattr(vla_adapter_hf, name) is not None


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == vla_adapter_hf.__version__ == importlib.metadata.version("vla-adapter-hf")
    assert "2509.09372" in citation["preferred-citation"]["url"]
    assert {"family-names": "Wang", "given-names": "Yihao"} in citation["preferred-citation"]["authors"]


def test_the_changelog_has_an_entry_for_this_version():
    assert f"\n## {vla_adapter_hf.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_a_prediction_and_the_commands_that_predict_import_no_training_data_or_drawing_library():
    """These take seconds and hundreds of megabytes, and a robot's computer may not have them."""
    program = """
import sys
import numpy as np
import vla_adapter_hf
from transformers import AutoModel, AutoProcessor
from vla_adapter_hf.checkpoints.embedded import embedded_folder

with embedded_folder() as folder:
    processor = AutoProcessor.from_pretrained(folder / "checkpoint")
    model = AutoModel.from_pretrained(folder / "checkpoint")
frame = np.zeros((128, 128, 3), np.uint8)
actions = model.predict_action(**processor(images=[frame, frame], text="pick up the cup", state=np.zeros(8)))
assert actions.shape == (1, 8, 7)

import vla_adapter_hf.cli.bench, vla_adapter_hf.cli.checkpoints, vla_adapter_hf.cli.demo, vla_adapter_hf.cli.serve
import vla_adapter_hf.robot, vla_adapter_hf.serving.server

heavy = ("datasets", "pyarrow", "pandas", "transformers.trainer", "peft", "matplotlib", "openvino", "nncf")
print(*(name for name in heavy if name in sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""
