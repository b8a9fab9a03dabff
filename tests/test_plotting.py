"""Pictures."""

import subprocess
import sys

import pytest

from vla_adapter_hf.plotting import plot_training, save_figure


pytest.importorskip("matplotlib")
HISTORY = [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.4}, {"step": 2, "eval_loss": 0.45}, {"step": 2, "epoch": 1}]


def test_the_loss_picture_has_a_line_for_training_and_one_for_held_out_episodes():
    (axis,) = plot_training(HISTORY).axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in axis.lines}
    assert lines == {"training": [[1, 0.5], [2, 0.4]], "held-out episodes": [[2, 0.45]]}


def test_a_figure_is_saved_into_a_folder_that_is_made_for_it(tmp_path):
    path = save_figure(plot_training(HISTORY), tmp_path / "new" / "loss.png")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_drawing_leaves_pyplot_and_its_backend_alone():
    """In a notebook, a backend without a screen would swallow all later pictures of the user's."""
    program = f"import sys; from vla_adapter_hf.plotting import plot_training; plot_training({HISTORY})"
    program += "; assert 'matplotlib.pyplot' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)
