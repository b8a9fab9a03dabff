"""Figures of observations, predictions and training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from vla_adapter_hf.utils.extras import install_hint
from vla_adapter_hf.utils.files import atomic_path


if TYPE_CHECKING:
    from matplotlib.figure import Figure

END_EFFECTOR_NAMES = ("Δx", "Δy", "Δz", "Δroll", "Δpitch", "Δyaw", "gripper")


def action_names(action_dim: int, names: Sequence[str] | None = None) -> list[str]:
    """Names for the dimensions of an action: the known, those of an end effector if there are seven, or numbers."""
    if names is not None:
        return list(names)
    return list(END_EFFECTOR_NAMES) if action_dim == 7 else [f"action {index}" for index in range(action_dim)]


def new_figure(**options: Any) -> Figure:
    """An empty figure, made without pyplot: it needs no screen, and the user's backend stays as it is.

    Raises:
        ImportError: saying how to install matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"Pictures need matplotlib: {install_hint('plot')}.") from error
    return Figure(**options)


def plot_prediction(
    frames: list[np.ndarray],
    cameras: list[str],
    instruction: str,
    actions: np.ndarray,
    names: Sequence[str] | None = None,
) -> Figure:
    """One observation and the chunk that was predicted for it.

    Args:
        frames (`list[np.ndarray]`): one `(height, width, 3)` uint8 frame per camera.
        cameras (`list[str]`): their names.
        instruction (`str`): the instruction.
        actions (`np.ndarray`): `(chunk_size, action_dim)` in physical units.
        names (`Sequence[str]`, *optional*): of the action's values.
    """
    chunk_size, action_dim = actions.shape
    columns = 4
    rows = -(-action_dim // columns)
    figure = new_figure(figsize=(12, 4.4 + 2 * rows), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(3.4, 2 * rows))
    top.suptitle(f"“{instruction}”", fontsize=13)
    for axis, frame, name in zip(np.atleast_1d(top.subplots(1, len(frames))), frames, cameras, strict=True):
        axis.imshow(frame)
        axis.set_title(name)
        axis.set_axis_off()
    bottom.suptitle(f"Predicted chunk of {chunk_size} actions, physical units")
    axes = bottom.subplots(rows, columns).flatten()
    for axis, name, values in zip(axes, action_names(action_dim, names), actions.T, strict=False):
        axis.plot(range(chunk_size), values, marker="o", color="tab:blue")
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("step of the chunk")
        axis.grid(alpha=0.3)
    for axis in axes[action_dim:]:
        axis.set_visible(False)
    return figure


def plot_training(log_history: list[dict[str, float]]) -> Figure:
    """Loss of training and evaluation over the steps, as a Trainer logs them.

    If the training was checked (`check_every`), a second plot shows the errors on held-out samples as they are, with
    other frames and with another instruction, and that of predicting the mean.
    """
    is_checked = any("check_as_it_is" in entry for entry in log_history)
    figure = new_figure(figsize=(8, 8 if is_checked else 4.5), layout="constrained")
    axes = figure.subplots(2 if is_checked else 1, squeeze=False)[:, 0]
    _plot_logged(axes[0], log_history, {"loss": ("training", None), "eval_loss": ("held-out episodes", None)})
    if is_checked:
        _plot_logged(axes[1], log_history, CHECKED)
        axes[1].set_title("The policy looks, or listens, once that line is above the one as it is", fontsize=10)
    return figure


# What a training's check logs: the label and the line.
CHECKED: dict[str, tuple[str, dict[str, Any] | None]] = {
    "check_as_it_is": ("as it is", {"color": "black"}),
    "check_other_frames": ("other frames", {"color": "tab:orange"}),
    "check_other_instruction": ("other instruction", {"color": "tab:green"}),
    "check_mean_action": ("mean action", {"color": "tab:gray", "linestyle": "--"}),
}


def _plot_logged(
    axis: Any, log_history: list[dict[str, float]], lines: dict[str, tuple[str, dict[str, Any] | None]]
) -> None:
    """Draw entries of a log over the steps: by name their label and how the line looks."""
    for key, (label, style) in lines.items():
        points = [(entry["step"], entry[key]) for entry in log_history if key in entry]
        if points:
            axis.plot(*zip(*points, strict=True), marker="." if len(points) < 50 else "", label=label, **(style or {}))
    axis.set_xlabel("step")
    axis.set_ylabel("mean absolute error, normalised actions")
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    if axis.lines:
        axis.legend()


def plot_chunks(model: Any, processor: Any, datasets: list[Any], episodes: int = 3) -> Figure:
    """Predicted and recorded actions over whole episodes, one row each, chunk after chunk as a robot would run them.

    The horizontal axis counts control steps. If no sample of the dataset begins where a chunk ends, the next sample is
    drawn, and the lines are broken.

    Args:
        model ([`VLAAdapterForActionPrediction`]): with norm stats for the datasets.
        processor ([`VLAAdapterProcessor`]): of the model.
        datasets (`list[VLAAdapterDataset]`): episodes are taken from their beginning, dataset after dataset.
        episodes (`int`): how many to draw.
    """
    chosen = [(dataset, episode) for dataset in datasets for episode in dataset.episode_indices][:episodes]
    dims = model.config.action_dim
    names = action_names(dims, model.config.action_names)
    figure = new_figure(figsize=(2.1 * dims + 1, 2.6 * len(chosen)), layout="constrained")
    for row, (dataset, episode) in zip(
        np.atleast_1d(figure.subfigures(len(chosen), 1, squeeze=False)[:, 0]), chosen, strict=True
    ):
        replay = _replay(model, processor, dataset.select_episodes([episode], dataset.image_transform))
        row.suptitle(f"{dataset.unnorm_key}, episode {episode}: “{replay.text}”", fontsize=10)
        gaps = np.flatnonzero(np.diff(replay.steps) > 1) + 1
        steps = np.insert(replay.steps.astype(np.float64), gaps, np.nan)
        for dim, (axis, name) in enumerate(zip(row.subplots(1, dims), names, strict=True)):
            for actions, color, label in (
                (replay.recorded, "black", "recorded"),
                (replay.predicted, "tab:orange", "predicted"),
            ):
                axis.plot(steps, np.insert(actions[:, dim], gaps, np.nan), color=color, linewidth=1, label=label)
            axis.set_title(name, fontsize=9)
            axis.tick_params(labelsize=7)
            for boundary in replay.begins:
                axis.axvline(boundary, color="gray", linewidth=0.4, alpha=0.5)
        axis.legend(fontsize=6)
    return figure


class _Replay(NamedTuple):
    """One episode: control steps `(n,)`, recorded and predicted actions `(n, action_dim)`, where chunks begin."""

    steps: np.ndarray
    recorded: np.ndarray
    predicted: np.ndarray
    begins: list[int]
    text: str


def _replay(model: Any, processor: Any, episode: Any) -> _Replay:
    """What a dataset with a single episode holds and what the model predicts for it, without overlap."""
    steps, recorded, predicted, begins = [], [], [], []
    end = 0
    for index in range(len(episode)):
        begin = episode.control_step(index)
        if begin < end:
            continue  # within the chunk before
        sample = episode[index]
        inputs = recorded_inputs(processor, sample)
        actions = model.predict_action(**inputs, unnorm_key=sample["unnorm_key"])[0]
        real = ~sample["action_is_pad"]
        begins.append(begin)
        end = begin + int(real.sum())
        steps.append(np.arange(begin, end))
        recorded.append(sample["actions"][real])
        predicted.append(actions[real])
    joined = (np.concatenate(parts) for parts in (steps, recorded, predicted))
    return _Replay(*joined, begins, sample["text"])


def recorded_inputs(processor: Any, sample: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `predict_action` for a sample of a dataset whose `image_transform` has cropped the frames."""
    observation = {name: sample[name] for name in ("images", "text", "state")}
    inputs = processor(**observation, do_jpeg_round_trip=False, do_center_crop=False)
    # It says how the processor prepared the frames; recorded frames need less than a robot's.
    return {name: value for name, value in inputs.items() if name != "preparation"}


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Write a figure; folders that are missing are made."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110)
    return Path(path)
