"""Pictures for the report: the cameras, actions by motion, lags, start states."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from vla_adapter_hf.doctor.frames import SAME_PICTURE
from vla_adapter_hf.doctor.recording import FrameSample, Recording
from vla_adapter_hf.doctor.semantics import Semantics
from vla_adapter_hf.utils.attention import overlay_attention
from vla_adapter_hf.utils.plotting import new_figure


if TYPE_CHECKING:
    from matplotlib.figure import Figure

FRAME_HEIGHT = 160
SHOWN_WINDOWS = 5


def report_pictures(recording: Recording, sample: FrameSample, semantics: Semantics) -> dict[str, np.ndarray]:
    """Pictures by caption, uint8 (height, width, 3). Plots need matplotlib and are left out without it."""
    pictures = {}
    if sample.windows:
        pictures[f"First frames: a row for each camera ({', '.join(recording.cameras)})"] = camera_sheet(sample)
    try:
        if len(sample.first) > 1:
            caption = "Places of objects and arm at the start: bright where first frames differ between episodes"
            pictures[f"{caption} ({', '.join(recording.cameras)})"] = places_sheet(sample)
        pictures["Actions (black) and what explains them (orange), one episode"] = pixels(
            plot_explanation(recording, semantics)
        )
        if semantics.r2_by_lag:
            pictures["How well the motion explains the action, by lag"] = pixels(plot_lags(semantics))
        pictures["Where episodes start, and all states, of the two dimensions that vary most"] = pixels(
            plot_starts(recording)
        )
    except ImportError:
        pass
    return pictures


def camera_sheet(sample: FrameSample) -> np.ndarray:
    """First frames of some episodes, a row for each camera."""
    rows = []
    for camera in range(len(sample.windows[0].first)):
        frames = [_at_height(window.first[camera]) for window in sample.windows[:SHOWN_WINDOWS]]
        rows.append(np.concatenate(frames, axis=1))
    return _below_each_other(rows)


def places_sheet(sample: FrameSample) -> np.ndarray:
    """The mean first frame of each camera, with a glow where first frames differ between episodes."""
    first = np.stack(list(sample.first.values()))  # (episodes, cameras, height, width, 3)
    sheets = []
    for camera in range(first.shape[1]):
        change = first[:, camera].std(0).mean(-1)
        mean = Image.fromarray(first[:, camera].mean(0).astype(np.uint8))
        frame = np.asarray(mean.resize((FRAME_HEIGHT, FRAME_HEIGHT), Image.Resampling.BICUBIC))
        sheets.append(overlay_attention(frame, change, max(float(change.max()), SAME_PICTURE)))
    return np.concatenate(sheets, axis=1)


def one_over_the_other(recording: Recording, *places: tuple[int, int]) -> np.ndarray | None:
    """The frames of all cameras at some places (episode position, step), a row for each; None without frames.

    Args:
        places: a negative step counts from the end of the episode.
    """
    if recording.read_images is None:
        return None
    rows = []
    for position, step in places:
        try:
            frames = recording.read_images(int(position), step % len(recording.actions[position]))
        except ValueError:
            return None  # frames that cannot be read are a finding of their own
        rows.append(np.concatenate([_at_height(frame) for frame in frames], axis=1))
    return _below_each_other(rows)


def _below_each_other(rows: list[np.ndarray]) -> np.ndarray:
    """Pictures of any width as one, with four black lines below each."""
    width = max(row.shape[1] for row in rows)
    return np.concatenate([np.pad(row, ((0, 4), (0, width - row.shape[1]), (0, 0))) for row in rows])


def _at_height(frame: np.ndarray) -> np.ndarray:
    """A frame with `FRAME_HEIGHT` rows."""
    image = Image.fromarray(frame)
    width = max(1, round(image.width * FRAME_HEIGHT / image.height))
    return np.asarray(image.resize((width, FRAME_HEIGHT), Image.Resampling.BOX))


def pixels(figure: Figure) -> np.ndarray:
    """A figure as uint8 (height, width, 3)."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=80)
    return np.asarray(Image.open(buffer).convert("RGB"))


def plot_explanation(recording: Recording, semantics: Semantics) -> Figure:
    """Each action dimension over the longest episode, with the line that was fitted to the state or its motion."""
    position = int(np.argmax([len(actions) for actions in recording.actions]))
    states, actions = recording.states[position], recording.actions[position]
    source = states if semantics.kind == "absolute" else np.diff(states, axis=0)
    dims = actions.shape[1]
    columns = min(4, dims)
    figure = new_figure(figsize=(3 * columns, 1.9 * -(-dims // columns)), layout="constrained")
    axes = np.atleast_1d(figure.subplots(-(-dims // columns), columns)).flatten()
    lag = semantics.lag or 0
    for dim, axis in enumerate(axes):
        if dim >= dims:
            axis.set_visible(False)
            continue
        axis.plot(actions[:, dim], color="black", linewidth=1)
        place = semantics.state_dims[dim]
        if place >= 0 and semantics.r2[dim] > 0.1 and semantics.kind != "unknown":
            steps = np.arange(len(source)) - lag
            values = semantics.slopes[dim] * source[:, place]
            inside = (steps >= 0) & (steps < len(actions))
            values = values + actions[steps[inside], dim].mean() - values[inside].mean()
            axis.plot(steps[inside], values[inside], color="tab:orange", linewidth=1)
        axis.set_title(f"{recording.action_name(dim)}, R² {semantics.r2[dim]:.2f}", fontsize=9)
        axis.grid(alpha=0.3)
    return figure


def plot_lags(semantics: Semantics) -> Figure:
    """R² of the explanation by lag."""
    figure = new_figure(figsize=(5, 2.4), layout="constrained")
    axis = figure.subplots()
    axis.plot(list(semantics.r2_by_lag), list(semantics.r2_by_lag.values()), marker="o")
    axis.set_xlabel("steps from action to motion")
    axis.set_ylabel("R²")
    axis.set_ylim(0, 1.02)
    axis.grid(alpha=0.3)
    return figure


def plot_starts(recording: Recording) -> Figure:
    """All states and the start states, in the two dimensions with the largest spread."""
    states = recording.all_states
    first, second = np.argsort(-states.std(0))[:2] if states.shape[1] > 1 else (0, 0)
    starts = np.array([values[0] for values in recording.states])
    step = max(1, len(states) // 5000)
    figure = new_figure(figsize=(4.5, 3.4), layout="constrained")
    axis = figure.subplots()
    axis.plot(states[::step, first], states[::step, second], ".", color="darkgrey", markersize=3, label="all states")
    axis.plot(starts[:, first], starts[:, second], "x", color="tab:red", label="starts")
    axis.set_xlabel(recording.state_name(first))
    axis.set_ylabel(recording.state_name(second))
    axis.legend(fontsize=8)
    return figure
