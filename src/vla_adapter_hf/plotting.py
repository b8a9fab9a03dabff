"""Pictures of what a policy sees and says."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np


if TYPE_CHECKING:
    from matplotlib.figure import Figure

END_EFFECTOR_NAMES = ("Δx", "Δy", "Δz", "Δroll", "Δpitch", "Δyaw", "gripper")


def action_names(action_dim: int) -> list[str]:
    """Names for the dimensions of an action: those of an end effector where it has seven, numbers otherwise."""
    return list(END_EFFECTOR_NAMES) if action_dim == 7 else [f"action {index}" for index in range(action_dim)]


def load_matplotlib() -> Any:
    """`matplotlib.pyplot` without a screen.

    Raises:
        ImportError: saying how to install it.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("Pictures need matplotlib: pip install 'vla-adapter-hf[plot]'.") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as pyplot

    return pyplot


def plot_prediction(
    frames: list[np.ndarray], cameras: list[str], instruction: str, actions: np.ndarray, note: str = ""
) -> Figure:
    """One observation and the chunk that was predicted for it.

    Args:
        frames (`list[np.ndarray]`): one `(height, width, 3)` uint8 frame per camera.
        cameras (`list[str]`): their names.
        instruction (`str`): what the robot was told.
        actions (`np.ndarray`): `(chunk_size, action_dim)` in physical units.
        note (`str`): shown in red under the instruction.
    """
    pyplot = load_matplotlib()
    chunk_size, action_dim = actions.shape
    columns = 4
    rows = -(-action_dim // columns)
    figure = pyplot.figure(figsize=(12, 4.4 + 2 * rows), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(3.4, 2 * rows))
    top.suptitle(f"“{instruction}”", fontsize=13)
    if note:
        top.supxlabel(note, color="firebrick", fontsize=11)
    for axis, frame, name in zip(np.atleast_1d(top.subplots(1, len(frames))), frames, cameras, strict=True):
        axis.imshow(frame)
        axis.set_title(name)
        axis.set_axis_off()
    bottom.suptitle(f"Predicted chunk of {chunk_size} actions, physical units")
    axes = bottom.subplots(rows, columns).flatten()
    for axis, name, values in zip(axes, action_names(action_dim), actions.T, strict=False):
        axis.plot(range(chunk_size), values, marker="o", color="tab:blue")
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("step of the chunk")
        axis.grid(alpha=0.3)
    for axis in axes[action_dim:]:
        axis.set_visible(False)
    return figure


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Write a figure and let go of it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    load_matplotlib().close(figure)
    return path
