"""The examples run from a clone as they are, and leave a model behind that loads and predicts."""

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


def test_the_notebook_runs_from_its_first_cell_to_its_last(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    pytest.importorskip("av")  # its demonstrations are MP4
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    monkeypatch.setenv("STEPS", "32")
    monkeypatch.setenv("OUTPUT", str(tmp_path / "out"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(EXAMPLES / "finetune.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=500, resources={"metadata": {"path": str(EXAMPLES)}}).execute()

    outputs = {cell.id: cell.outputs for cell in notebook.cells if cell.cell_type == "code"}
    for name in ("sample", "curve", "chunks", "predict"):
        assert any("image/png" in output.get("data", {}) for output in outputs[name]), f"no picture below {name}"
    final = predicted(tmp_path / "out")
    assert final.shape == (8, 7) and np.isfinite(final).all()


def test_the_notebook_is_kept_without_outputs():
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(EXAMPLES / "finetune.ipynb", as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert not cell.get("outputs") and cell.get("execution_count") is None, cell.id
