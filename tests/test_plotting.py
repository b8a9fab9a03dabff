"""Pictures."""

import subprocess
import sys

import model_fixtures
import numpy as np
import pytest

from vla_adapter_hf import VLAAdapterDataset, VLAAdapterProcessor
from vla_adapter_hf.data import ImageResize
from vla_adapter_hf.recording.lerobot_writer import LeRobotLayout, assemble, save_episode
from vla_adapter_hf.utils.frames import encode_image
from vla_adapter_hf.utils.plotting import plot_chunks, plot_training, save_figure


pytest.importorskip("matplotlib")
HISTORY = [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.4}, {"step": 2, "eval_loss": 0.45}, {"step": 2, "epoch": 1}]


def test_the_loss_picture_has_a_line_for_training_and_one_for_held_out_episodes():
    (axis,) = plot_training(HISTORY).axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in axis.lines}
    assert lines == {"training": [[1, 0.5], [2, 0.4]], "held-out episodes": [[2, 0.45]]}


def test_the_errors_of_a_checked_training_are_drawn_below_its_loss():
    names = ("as_it_is", "other_frames", "other_instruction", "mean_action")
    checked = [{"step": step, **{f"check_{name}": 0.1 * step for name in names}} for step in (0, 2)]
    loss, errors = plot_training([*HISTORY, *checked]).axes
    assert [line.get_label() for line in loss.lines] == ["training", "held-out episodes"]
    assert [line.get_label() for line in errors.lines] == [name.replace("_", " ") for name in names]
    assert all(line.get_xdata().tolist() == [0, 2] for line in errors.lines)


def test_a_figure_is_saved_into_a_folder_that_is_made_for_it(tmp_path):
    path = save_figure(plot_training(HISTORY), tmp_path / "new" / "loss.png")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_drawing_leaves_pyplot_and_its_backend_alone():
    """In a notebook, a backend without a screen would swallow all later pictures of the user's."""
    program = f"import sys; from vla_adapter_hf.utils.plotting import plot_training; plot_training({HISTORY})"
    program += "; assert 'matplotlib.pyplot' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_chunks_are_drawn_at_the_control_steps_at_which_they_were_recorded(tmp_path, processor, monkeypatch):
    """A recording with a row every fourth step, and a push in the middle after which no row was kept for a while."""
    monkeypatch.setenv("VLA_ADAPTER_CACHE", str(tmp_path / "cache"))
    layout = LeRobotLayout(("image",), 28, tuple("abcdefgh"), tuple("abcdefg"), fps=5, chunk_size=8)
    steps = np.array([0, 4, 8, 12, 40, 44, 48])
    executed = np.random.default_rng(0).uniform(-1, 1, (60, 7)).astype(np.float32)
    chunks = np.stack([executed[step : step + 8] for step in steps])
    frames = {"image": [encode_image(np.full((28, 28, 3), step, np.uint8)) for step in steps]}
    states = np.random.default_rng(1).normal(size=(len(steps), 8)).astype(np.float32)
    save_episode(tmp_path / "demos", "0", layout, "go", frames, states, executed[steps], chunks, {"step": steps})
    assemble(tmp_path / "demos")
    dataset = VLAAdapterDataset.from_lerobot(tmp_path / "demos", image_transform=ImageResize(28))
    model = model_fixtures.tiny_model(cameras=["image"], chunk_size=8, norm_stats=dataset.norm_stats)
    of_model = VLAAdapterProcessor.from_model_config(model.config, processor.tokenizer)

    for axis, dimension in zip(plot_chunks(model, of_model, [dataset]).axes, range(7), strict=True):
        lines = {line.get_label(): line.get_xydata() for line in axis.lines}
        drawn = [*range(16), None, *range(40, 56)]  # the chunks of steps 0, 8, 40 and 48, a break between
        for label in ("recorded", "predicted"):
            assert [None if np.isnan(x) else int(x) for x in lines[label][:, 0]] == drawn
        real = [step for step in drawn if step is not None]
        of_recorded = lines["recorded"][:, 1]
        np.testing.assert_array_equal(of_recorded[~np.isnan(of_recorded)], executed[real, dimension])
        boundaries = [line.get_xdata()[0] for line in axis.lines if line.get_label().startswith("_")]
        assert boundaries == [0, 8, 40, 48]
