"""Pictures of a policy for the report: errors by condition and time, an episode, attention on good and bad samples."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from vla_adapter_hf.doctor.judgement import parts_of_episode
from vla_adapter_hf.doctor.measuring import HOLD, Measured, Sample, model_inputs
from vla_adapter_hf.doctor.pictures import pixels
from vla_adapter_hf.doctor.verdicts import ratio
from vla_adapter_hf.training.probing import AS_IS, MEAN, OTHER_FRAMES, OTHER_INSTRUCTION, OTHER_STATE
from vla_adapter_hf.utils.attention import overlay_attention, predict_with_attention
from vla_adapter_hf.utils.plotting import new_figure


if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN = 3  # samples on each side
SIDE = 160  # pixels of a frame with attention
COLORS = {AS_IS: "black", OTHER_FRAMES: "tab:orange", OTHER_INSTRUCTION: "tab:green", OTHER_STATE: "tab:purple",
          MEAN: "tab:gray", HOLD: "tab:olive"}  # fmt: skip


def policy_pictures(measured: Measured, model: Any, processor: Any, unnorm_key: str) -> dict[str, np.ndarray]:
    """Pictures by caption, uint8 (height, width, 3). Without matplotlib there are none.

    Attention is left out for exported models, which do not return it.
    """
    try:
        pictures = {
            "Error by condition, as a share of the mean action's, with 95 % intervals": pixels(
                plot_conditions(measured)
            ),
            "Error over the episode": pixels(plot_over_time(measured)),
            "Recorded (black) and predicted (orange) chunks of one episode, and where they drift apart": pixels(
                plot_episode(measured)
            ),
        }
    except ImportError:
        return {}
    if hasattr(model, "set_attn_implementation"):
        order = np.argsort(measured.errors[AS_IS].total)
        for name, places in (("smallest", order[:SHOWN]), ("largest", order[::-1][:SHOWN])):
            samples = [measured.probe.samples[place] for place in places]
            cameras = ", ".join(measured.cameras)
            caption = f"Where the policy looks (bright) in the samples with the {name} errors; rows: {cameras}"
            pictures[caption] = attention_sheet(model, processor, samples, unnorm_key)
    return pictures


def plot_conditions(measured: Measured) -> Figure:
    """A bar with its interval for each condition."""
    names = list(measured.errors)
    mean = measured.errors[MEAN].total
    shares = [ratio(measured.errors[name].total, mean, measured.probe.episodes) for name in names]
    values = np.array([share.value for share in shares])
    spread = np.abs(np.array([[share.low, share.high] for share in shares]).T - values)
    spread[~np.isfinite(spread)] = 0  # too few episodes for an interval
    figure = new_figure(figsize=(6.4, 0.34 * len(names) + 0.9), layout="constrained")
    axis = figure.subplots()
    colors = [COLORS.get(name, "tab:blue") for name in names]
    axis.barh(names, 100 * values, xerr=100 * spread, color=colors, ecolor="dimgray", capsize=2, alpha=0.85)
    axis.axvline(100, color="tab:gray", linewidth=1, linestyle="--")
    axis.invert_yaxis()
    axis.set_xlabel("error, % of that of the mean action")
    axis.grid(axis="x", alpha=0.3)
    return figure


def plot_over_time(measured: Measured) -> Figure:
    """The error in each fifth of the episodes."""
    usual = measured.errors[MEAN].total.mean()
    parts = [(place, part) for place, part in enumerate(parts_of_episode(measured)) if part.any()]
    figure = new_figure(figsize=(6.4, 3.2), layout="constrained")
    axis = figure.subplots()
    for name, color in COLORS.items():
        if name in measured.errors:
            errors = measured.errors[name].total
            values = [100 * errors[part].mean() / usual for _, part in parts]
            axis.plot([20 * place + 10 for place, _ in parts], values, marker="o", color=color, label=name)
    axis.set_xlabel("place in the episode, %")
    axis.set_ylabel("error, %")
    axis.set_xlim(0, 100)
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    figure.legend(fontsize=8, ncols=3, loc="outside upper center")
    return figure


def plot_episode(measured: Measured) -> Figure:
    """Recorded and predicted chunks of the episode with the most samples, a plot for each dimension.

    The horizontal axis counts actions from the beginning of each chunk, one chunk after the other.
    """
    probe = measured.probe
    places = np.flatnonzero(probe.episodes == np.bincount(probe.episodes).argmax())
    places = places[np.argsort(probe.times[places])]
    recorded, predicted = probe.actions[places], measured.predicted[places]
    chunk, dims = recorded.shape[1:]
    columns = min(4, dims)
    rows = -(-dims // columns)
    figure = new_figure(figsize=(3 * columns, 1.9 * rows), layout="constrained")
    axes = np.atleast_1d(figure.subplots(rows, columns)).flatten()
    for dim, axis in enumerate(axes):
        if dim >= dims:
            axis.set_visible(False)
            continue
        for place in range(len(places)):
            steps = place * (chunk + 1) + np.arange(chunk)
            axis.plot(steps, recorded[place, :, dim], color="black", linewidth=1)
            axis.plot(steps, predicted[place, :, dim], color="tab:orange", linewidth=1)
        if np.ptp(recorded[..., dim]) + np.ptp(predicted[..., dim]) < 1e-6:
            axis.set_ylim(recorded[0, 0, dim] - 1, recorded[0, 0, dim] + 1)  # rounding would fill the plot
        axis.set_title(measured.action_names[dim], fontsize=9)
        axis.set_xticks([])
        axis.grid(alpha=0.3)
    return figure


def attention_sheet(model: Any, processor: Any, samples: list[Sample], unnorm_key: str) -> np.ndarray:
    """A column of frames with attention for each sample, a row for each camera: uint8 (height, width, 3)."""
    columns = []
    for sample in samples:
        _, attention = predict_with_attention(model, model_inputs(processor, [sample]), unnorm_key)
        frames = [
            overlay_attention(np.asarray(frame), weights, float(attention.max()))
            for frame, weights in zip(sample["images"], attention[0], strict=True)
        ]
        columns.append(np.concatenate([_resized(frame) for frame in frames]))
    return np.concatenate(columns, axis=1)


def _resized(frame: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(frame).resize((SIDE, SIDE), Image.Resampling.BILINEAR))
