"""The picture of `vla-adapter demo`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from vla_adapter_hf.demo.predictions import LOOK, OTHER_OBJECT, ArmResponse, Predictions, mean_errors
from vla_adapter_hf.recording.played_episode import PlayedEpisode
from vla_adapter_hf.simulation.settings import CONTROL_RATE
from vla_adapter_hf.utils.attention import overlay_attention
from vla_adapter_hf.utils.plotting import new_figure


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STRIP = 6  # frames
EXECUTED, PREDICTED, OTHER, BLACK = "white", "#ff8c1a", "#ffd84d", "#8fb8ff"
GRAY = "#555555"
# Parts of a frame that are drawn, all of one shape: left, right, top and bottom as fractions.
THIRD_PERSON = (0.0, 1.0, 0.0, 0.72)  # below is an empty floor
WRIST = (0.0, 1.0, 0.1, 0.82)
TABLE = (0.24, 0.94, 0.2, 0.704)


def draw(episode: PlayedEpisode, predictions: Predictions, summary: str) -> Figure:
    """The episode as a strip of frames, the predicted next to the executed path, and the controls.

    Args:
        episode: what was recorded.
        predictions: what a policy predicts there.
        summary: one line under the title.
    """
    figure = new_figure(figsize=(15, 11.9))
    figure.text(0.025, 0.972, f"“{episode.instruction}”", fontsize=22, weight="bold", va="center")
    figure.text(0.025, 0.946, summary, fontsize=12, color=GRAY, va="center")
    grid = {"left": 0.025, "right": 0.985, "wspace": 0.03}
    strip = figure.add_gridspec(1, STRIP, top=0.905, bottom=0.755, **grid).subplots()
    wide = grid | {"wspace": 0.16, "width_ratios": (1.3, 1)}
    main, plots = figure.add_gridspec(1, 2, top=0.715, bottom=0.255, **wide)
    below = figure.add_gridspec(1, STRIP, top=0.165, bottom=0.01, **grid).subplots()
    _draw_strip(strip, episode)
    _draw_paths(figure.add_subplot(main), episode, predictions)
    _draw_commands(plots.subgridspec(4, 1, hspace=0.22).subplots(), episode, predictions)
    figure.text(0.025, 0.213, "Controls", fontsize=14, weight="bold")
    _draw_controls(below, episode, predictions)
    return figure


def _draw_strip(axes: Any, episode: PlayedEpisode) -> None:
    for axis, moment in zip(axes, np.linspace(0, len(episode.steps) - 1, STRIP).round().astype(int), strict=True):
        _show(axis, episode.frames[moment, 0], f"{episode.steps[moment] / CONTROL_RATE:.1f} s")


def _draw_paths(axis: Axes, episode: PlayedEpisode, predictions: Predictions) -> None:
    _show(axis, episode.scene, "The gripper's path: predicted from every dot, eight steps ahead")
    executed = _pixels(episode, episode.positions)
    axis.plot(*executed.T, color="black", linewidth=6.5, alpha=0.5, solid_capstyle="round")
    axis.plot(*executed.T, color=EXECUTED, linewidth=4.5, label="executed by the expert", solid_capstyle="round")
    response = ArmResponse(episode)
    for moment, (step, chunk) in enumerate(zip(episode.steps, predictions.asked, strict=True)):
        path = _pixels(episode, response.path(step, chunk))
        axis.plot(*path.T, color=PREDICTED, linewidth=2.4, label="predicted" if moment == 0 else None)
        axis.plot(*path[0], "o", color=PREDICTED, markersize=8, markeredgecolor="black", markeredgewidth=0.8)
    axis.legend(loc="lower right", fontsize=11, facecolor="#333333", labelcolor="white", framealpha=0.85)


def _draw_commands(axes: list[Axes], episode: PlayedEpisode, predictions: Predictions) -> None:
    """The executed and the predicted command of x, y, z and the gripper over time."""
    chunk_size = predictions.asked.shape[1]
    seconds = np.arange(len(episode.actions)) / CONTROL_RATE
    names = ("Δx", "Δy", "Δz", "gripper")
    for axis, name, dimension in zip(axes, names, (0, 1, 2, 6), strict=True):
        axis.step(
            seconds, episode.actions[:, dimension], where="post", color="#222222", linewidth=1.4, label="executed"
        )
        for moment, (step, chunk) in enumerate(zip(episode.steps, predictions.asked, strict=True)):
            times = np.arange(step, step + chunk_size + 1) / CONTROL_RATE
            values = np.append(chunk[:, dimension], chunk[-1, dimension])
            label = "predicted" if moment == 0 else None
            axis.step(times, values, where="post", color=PREDICTED, linewidth=2.6, label=label)
            axis.axvline(times[0], color="gray", linewidth=0.5, alpha=0.4)
        axis.set_ylim(-1.25, 1.25)
        axis.set_xlim(0, (episode.steps[-1] + chunk_size) / CONTROL_RATE)
        axis.set_yticks((-1, 1), ("open", "closed") if name == "gripper" else ("−1", "1"))
        axis.text(0.995, 0.78, name, transform=axis.transAxes, fontsize=12, weight="bold", ha="right")
        axis.spines[["top", "right"]].set_visible(False)
        if axis is not axes[-1]:
            axis.tick_params(labelbottom=False)
    axes[0].set_title("Commands to the arm", fontsize=12, loc="left")
    axes[0].legend(loc="upper right", fontsize=10, ncols=2, frameon=False, bbox_to_anchor=(1.01, 1.33))
    axes[-1].set_xlabel("seconds", fontsize=11)


def _draw_controls(axes: Any, episode: PlayedEpisode, predictions: Predictions) -> None:
    target, other = (_spoken(name) for name in (episode.target, OTHER_OBJECT))
    errors = mean_errors(episode, predictions)
    title = f"asked for the {other}:\nit turns to it (error {errors['other']:.2f})"
    _show(axes[0], episode.scene, title, TABLE)
    _draw_fan(axes[0], episode, predictions.other, OTHER)
    title = f"black frames: it cannot tell\nwhere the {target} is (error {errors['black']:.2f})"
    _show(axes[1], np.zeros_like(episode.scene), title, TABLE)
    _draw_fan(axes[1], episode, predictions.black, BLACK)
    for first, attention, name in ((2, predictions.attention, target), (4, predictions.other_attention, other)):
        if attention is None:
            for axis in axes[first : first + 2]:
                axis.set_axis_off()
            continue
        for camera, title in enumerate((f"where it looks,\nasked for the {name}", "\nwrist camera")):
            overlay = overlay_attention(episode.frames[LOOK, camera], attention[camera], attention.max())
            _show(axes[first + camera], overlay, title, (THIRD_PERSON, WRIST)[camera])


def _draw_fan(axis: Axes, episode: PlayedEpisode, chunks: np.ndarray, color: str) -> None:
    """Arrows to where predicted chunks lead, from the recorded positions before the gripper closes."""
    executed = _pixels(episode, episode.positions)
    axis.plot(*executed.T, color=EXECUTED, linewidth=1.2, alpha=0.6)
    response = ArmResponse(episode)
    closes = int(np.argmax(episode.actions[:, 6] > 0))
    for step, chunk in zip(episode.steps, chunks, strict=True):
        if step > closes:
            break
        path = _pixels(episode, response.path(step, chunk))
        axis.plot(*path.T, color=color, linewidth=2.2)
        axis.annotate("", path[-1], path[-2], arrowprops={"arrowstyle": "-|>", "color": color, "mutation_scale": 16})
        axis.plot(*path[0], "o", color=color, markersize=5, markeredgecolor="black", markeredgewidth=0.6)


def _show(axis: Axes, frame: np.ndarray, title: str, part: tuple[float, float, float, float] = THIRD_PERSON) -> None:
    left, right, top, bottom = part
    axis.imshow(frame, interpolation="bicubic")
    axis.set_xlim(left * frame.shape[1], right * frame.shape[1])
    axis.set_ylim(bottom * frame.shape[0], top * frame.shape[0])
    axis.set_title(title, fontsize=11.5, loc="left")
    axis.set_axis_off()


def _pixels(episode: PlayedEpisode, points: np.ndarray) -> np.ndarray:
    """Points of the world in `episode.scene`."""
    return episode.project(points) * len(episode.scene)


def _spoken(name: str) -> str:
    """`orange_juice_1` is orange juice."""
    return name.rsplit("_", 1)[0].replace("_", " ")
