"""The examples run from a clone as they are, and leave a model behind that loads and predicts.

The notebooks run in `make commands`.
"""

import json
import os
import re
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import data_fixtures
import numpy as np
import pytest
from transformers import AutoModel, AutoProcessor

from vla_adapter_hf import VLAAdapterDataset


EXAMPLES = Path(__file__).parent.parent / "examples"


def predicted(folder: Path) -> np.ndarray:
    """The first chunk that the model in a folder predicts for a recorded observation."""
    sample = VLAAdapterDataset.from_lerobot(data_fixtures.DEMOS / "lerobot_v30_image", robot="libero")[0]
    model, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    return model.predict_action(**processor(sample["images"], sample["text"], sample["state"]))[0]


def test_the_script_fine_tunes_with_its_defaults(tmp_path):
    pytest.importorskip("peft")
    pytest.importorskip("matplotlib")
    output = tmp_path / "out"
    subprocess.run(
        [sys.executable, EXAMPLES / "finetune.py", "--robot", "libero", "--steps", "2", "--output", output],
        check=True,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
    )
    assert {"training.png", "chunks.png"} <= set(os.listdir(output))
    final = predicted(output)
    assert final.shape == (8, 7) and np.isfinite(final).all()
    np.testing.assert_allclose(predicted(output / "checkpoint-2"), final, atol=1e-5)


def test_the_script_fits_on_a_page():
    assert len((EXAMPLES / "finetune.py").read_text(encoding="utf-8").splitlines()) <= 60


def test_the_short_program_of_the_documentation_fits_any_checkpoint(tmp_path, monkeypatch):
    """From the embedded policy, which sees 112 pixels without a crop and has a prompt of its own."""
    pytest.importorskip("peft")
    page = (EXAMPLES.parent / "docs" / "first_steps.md").read_text(encoding="utf-8")
    (program,) = [
        block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "VLAAdapterTrainer" in block
    ]
    embedded = files("vla_adapter_hf") / "embedded" / "checkpoint"
    replaced = {
        '"VLA-Adapter/LIBERO-Object-Pro", ["front", "wrist"]': f'"{embedded}", ["image", "wrist_image"]',
        '"me/pick-and-place"': f'"{data_fixtures.DEMOS / "lerobot_v30_image"}"',
        "max_steps=20_000": 'max_steps=1, use_cpu=True, report_to="none"',
    }
    for text, other in replaced.items():
        assert text in program
        program = program.replace(text, other)
    monkeypatch.chdir(tmp_path)
    exec(compile(program, "first_steps.md", "exec"), {})
    final = predicted(tmp_path / "pick-and-place")
    assert final.shape == (8, 7) and np.isfinite(final).all()
    for folder in ("pick-and-place", "pick-and-place/checkpoint-1"):
        processor = AutoProcessor.from_pretrained(tmp_path / folder)
        assert (processor.prompt_style, processor.image_processor.do_center_crop) == ("in_out", False)


def run_notebook(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, **settings: str) -> dict[str, list]:
    """Execute a notebook with less work than it has by default; returns the outputs of its cells."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    for setting, value in {"OUTPUT": str(folder), "OMP_NUM_THREADS": "1", **settings}.items():
        monkeypatch.setenv(setting, value)
    monkeypatch.setenv("VLA_ADAPTER_CACHE", str(folder / "cache"))
    notebook = nbformat.read(EXAMPLES / name, as_version=4)
    nbclient.NotebookClient(notebook, timeout=500, resources={"metadata": {"path": str(EXAMPLES)}}).execute()
    return {cell.id: cell.outputs for cell in notebook.cells if cell.cell_type == "code"}


def has_picture(outputs: list) -> bool:
    return any({"image/png", "image/jpeg"} & set(output.get("data", {})) for output in outputs)


def printed(outputs: list) -> str:
    return "".join(output.get("text", "") for output in outputs)


@pytest.mark.slow
def test_the_notebook_of_fine_tuning_runs(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    pytest.importorskip("av")  # its demonstrations are MP4
    outputs = run_notebook("finetune.ipynb", tmp_path / "out", monkeypatch, STEPS="32")
    assert all(has_picture(outputs[name]) for name in ("sample", "curve", "chunks", "predict"))
    final = predicted(tmp_path / "out")
    assert final.shape == (8, 7) and np.isfinite(final).all()


@pytest.mark.slow
def test_the_notebook_of_a_prediction_runs(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    outputs = run_notebook("predict.ipynb", tmp_path / "out", monkeypatch)
    assert all(has_picture(outputs[name]) for name in ("picture", "demo-code"))
    assert "(2, 8, 7)" in printed(outputs["batch-code"])


@pytest.mark.slow
def test_the_notebook_of_a_robot_of_ones_own_runs(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    outputs = run_notebook("own_robot.ipynb", tmp_path / "out", monkeypatch, EPISODES="4", STEPS="2")
    assert all(has_picture(outputs[name]) for name in ("arm-code", "curve", "chunks", "loop"))
    assert "eval_l1_dim_shoulder_pan" in printed(outputs["metrics"])
    model = AutoModel.from_pretrained(tmp_path / "out" / "policy")
    assert (model.config.action_dim, model.config.proprio_dim, model.config.fps) == (6, 6, 30)
    assert model.config.cameras == ["front", "wrist"]


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.ipynb")), ids=lambda path: path.name)
def test_a_notebooks_outputs_hold_no_error_and_no_path_of_a_machine(path):
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            assert output["output_type"] != "error", cell.id
            text = json.dumps([output.get("text"), {**output.get("data", {}), "image/png": "", "image/jpeg": ""}])
            assert "site-packages" not in text and "/home/" not in text and "/tmp/" not in text, cell.id
