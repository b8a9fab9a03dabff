"""Where a policy looks: how much of a prediction came from every patch of every camera's frame."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from vla_adapter_hf.utils.plotting import new_figure, recorded_inputs


if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOR_MAP = "inferno"


def predict_with_attention(
    model: Any, inputs: Mapping[str, Any], unnorm_key: str | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Predict actions, and follow the policy's attention back to the patches.

    Each block of the policy attends to action states: the positions of the action queries in one layer of the language
    model. Its attention (the mean of its heads and of the chunk's steps) is followed back through the layers below by
    attention rollout (Abnar & Zuidema 2020): the mean of a layer's heads, half of it replaced by the identity for the
    residual connection. The maps of all blocks are added. The policy's attention to the patches' own states is left
    out: it is spread evenly and does not show what a prediction depends on.

    The model computes with eager attention meanwhile, and afterwards as before.

    Args:
        model ([`VLAAdapterForActionPrediction`]): not compiled.
        inputs (`Mapping`): what the processor returns.
        unnorm_key (`str`, *optional*): as for `predict_action`.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: actions `(batch, chunk_size, action_dim)`, as from `predict_action`, and
        attention `(batch, cameras, rows, columns)`, float32, whose sum over an observation's patches is 1.

    Raises:
        ValueError: if the model is compiled or exported.
    """
    if not isinstance(model, torch.nn.Module):
        raise ValueError("an exported checkpoint returns no attention; use the checkpoint that it was exported from.")
    if getattr(model, "_compiled_call_impl", None) is not None:
        raise ValueError("a compiled model returns no attention; load it again, without compile_for_inference.")
    calls: list[tuple[dict[str, Any], Any]] = []
    hooks = [
        model.register_forward_pre_hook(
            lambda _, args, kwargs: (args, kwargs | {"output_attentions": True}), with_kwargs=True
        ),
        model.register_forward_hook(lambda _, args, kwargs, output: calls.append((kwargs, output)), with_kwargs=True),
    ]
    try:
        with eager_attention(model):
            actions = model.predict_action(**inputs, unnorm_key=unnorm_key)
    finally:
        for hook in hooks:
            hook.remove()
    ((arguments, output),) = calls
    mask = arguments.get("attention_mask")
    lengths = (
        (mask != 0).sum(dim=1) if mask is not None else torch.full((len(actions),), arguments["input_ids"].shape[1])
    )
    return actions, _attention_over_patches(model.config, output, lengths)


@contextmanager
def eager_attention(model: Any) -> Iterator[None]:
    """Compute with eager attention, the only kind that returns its weights, while the block runs."""
    parts = {"": model.config} | {name: getattr(model.config, name) for name in model.config.sub_configs}
    before = {name: config._attn_implementation for name, config in parts.items()}
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@torch.no_grad()
def _attention_over_patches(config: Any, output: Any, prompt_lengths: torch.Tensor) -> np.ndarray:
    """Attention `(batch, cameras, rows, columns)` of a forward pass, see [`predict_with_attention`]."""
    patches, queries = config.num_patch_tokens, config.num_action_queries
    # Action states are read one position before the queries, as in next-token prediction.
    positions = prompt_lengths[:, None].cpu() + patches - 1 + torch.arange(queries)  # (batch, queries)
    total = torch.zeros(len(positions), patches)
    rollout = None
    for layer, block in zip(output.attentions, output.policy_attentions, strict=True):
        attention = layer.float().cpu().mean(dim=1)  # (batch, sequence, sequence)
        attention = 0.5 * attention + 0.5 * torch.eye(attention.shape[-1])
        rollout = attention if rollout is None else attention @ rollout
        sources = block.float().cpu().mean(dim=(1, 2))[:, config.chunk_size :]  # action states, proprio, task states
        tasks = sources.shape[1] - config.num_task_tokens
        states = torch.cat((sources[:, tasks:], sources[:, : tasks - 1]), dim=1)  # (batch, patches + queries)
        rows = rollout.gather(1, positions[..., None].expand(-1, -1, rollout.shape[-1]))  # (batch, queries, sequence)
        total += torch.einsum("bq,bqp->bp", states[:, -queries:], rows[..., 1 : 1 + patches])
    total /= total.sum(dim=1, keepdim=True)
    side = round((patches // config.num_cameras) ** 0.5)
    return total.view(-1, config.num_cameras, side, side).numpy()


def overlay_attention(
    frame: np.ndarray, attention: np.ndarray, brightest: float | None = None, crop_area: float | None = None
) -> np.ndarray:
    """A frame, darkened, with attention glowing on it.

    Args:
        frame (`np.ndarray`): `(height, width, 3)` uint8.
        attention (`np.ndarray`): `(rows, columns)`.
        brightest (`float`, *optional*): the attention that glows brightest; by default the largest. Give the largest
            of all cameras to compare them.
        crop_area (`float`, *optional*): the share of the frame's area that the model sees, `config.image_center_crop`.

    Returns:
        `np.ndarray`: `(height, width, 3)` uint8.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib import colormaps

    height, width = frame.shape[:2]
    seen = 1.0 if crop_area is None else crop_area**0.5
    size = round(width * seen), round(height * seen)
    scale = brightest or float(attention.max()) or 1.0
    smooth = Image.fromarray((attention / scale).astype(np.float32)).resize(size, Image.Resampling.BICUBIC)
    glow = np.zeros((height, width), np.float32)
    top, left = (height - size[1]) // 2, (width - size[0]) // 2
    glow[top : top + size[1], left : left + size[0]] = np.clip(np.asarray(smooth), 0, 1)
    color = colormaps[COLOR_MAP](0.3 + 0.7 * glow)[..., :3] * 255
    weight = (0.85 * np.clip(1.6 * glow - 0.15, 0, 1))[..., None]
    return np.clip(0.65 * frame * (1 - weight) + color * weight, 0, 255).astype(np.uint8)


def plot_attention(model: Any, processor: Any, datasets: list[Any], episodes: int = 3, moments: int = 6) -> Figure:
    """Where a policy looks over recorded episodes, a row of moments for each episode and camera.

    The attention is that of [`predict_with_attention`]. Of one moment, all cameras share a scale.

    Args:
        model ([`VLAAdapterForActionPrediction`]): with norm stats for the datasets.
        processor ([`VLAAdapterProcessor`]): of the model.
        datasets (`list[VLAAdapterDataset]`): episodes are taken from the first on, dataset after dataset. Their frames
            are prepared already.
        episodes (`int`): how many to draw.
        moments (`int`): how many frames of each, evenly spread.

    Raises:
        ImportError: matplotlib is not installed.
    """
    chosen = [(dataset, episode) for dataset in datasets for episode in dataset.episode_indices][:episodes]
    cameras = model.config.cameras
    figure = new_figure(figsize=(2.2 * moments, (2.2 * len(cameras) + 0.5) * len(chosen)), layout="constrained")
    rows = figure.subfigures(len(chosen), 1, squeeze=False)[:, 0]
    for row, (dataset, number) in zip(rows, chosen, strict=True):
        episode = dataset.select_episodes([number], dataset.image_transform)
        axes = row.subplots(len(cameras), moments, squeeze=False)
        for column, index in zip(axes.T, np.linspace(0, len(episode) - 1, moments).round().astype(int), strict=True):
            sample = episode[int(index)]
            inputs = recorded_inputs(processor, sample)
            _, attention = predict_with_attention(model, inputs, sample["unnorm_key"])
            frames = zip(column, sample["images"], attention[0], cameras, strict=True)
            for axis, frame, weights, camera in frames:
                axis.imshow(overlay_attention(np.asarray(frame), weights, float(attention.max())))
                axis.set_title(f"{camera}, step {episode.control_step(int(index))}", fontsize=9)
                axis.set_axis_off()
        row.suptitle(f"{dataset.unnorm_key}, episode {number}: “{sample['text']}”", fontsize=10)
    return figure
