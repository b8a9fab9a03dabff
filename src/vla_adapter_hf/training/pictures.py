"""`vla-adapter plot`: a checkpoint's predictions over recorded episodes."""

from __future__ import annotations

from pathlib import Path

from vla_adapter_hf.checkpoints.open import open_checkpoint
from vla_adapter_hf.data import ImageResize, load_demonstrations
from vla_adapter_hf.utils.plotting import plot_chunks, save_figure


def plot_checkpoint(
    checkpoint: str,
    dataset: str,
    output: str | Path = "chunks.png",
    format: str = "auto",
    robot: str | None = None,
    cameras: list[str] | None = None,
    episodes: int = 3,
) -> Path:
    """Draw predicted beside recorded actions for the first episodes of a dataset.

    Frames are prepared as in training, without JPEG round trip, and with the checkpoint's centre crop.

    Raises:
        ValueError: when the dataset's cameras or sizes are not the checkpoint's.
    """
    opened = open_checkpoint(checkpoint)
    model = opened.load_model()
    config = model.config
    demonstrations = load_demonstrations(
        dataset,
        format,
        cameras=cameras or list(config.cameras),
        chunk_size=config.chunk_size,
        robot=robot,
        image_transform=ImageResize(config.image_size, config.image_center_crop),
    )
    for field, found in (("action_dim", demonstrations.action_dim), ("proprio_dim", demonstrations.state_dim)):
        if found != getattr(config, field):
            raise ValueError(f"{dataset} has {field}={found}, {checkpoint} has {getattr(config, field)}.")
    keys = config.norm_stats or {}
    if demonstrations.unnorm_key not in keys and len(keys) == 1:
        demonstrations.unnorm_key = next(iter(keys))
    figure = plot_chunks(model, opened.load_processor(), [demonstrations], episodes)
    return save_figure(figure, output)
