"""`vla-adapter plot`: a checkpoint's predictions over recorded episodes."""

from __future__ import annotations

from pathlib import Path

from vla_adapter_hf.checkpoints.open import open_checkpoint
from vla_adapter_hf.data import ImageResize, load_demonstrations
from vla_adapter_hf.training.arguments import DataArguments
from vla_adapter_hf.training.demonstrations import check_camera_order
from vla_adapter_hf.utils.attention import plot_attention
from vla_adapter_hf.utils.plotting import new_figure, plot_chunks, save_figure


def plot_checkpoint(
    checkpoint: str, arguments: DataArguments, output: str | Path = "chunks.png", attention: bool = False
) -> Path:
    """Draw predicted and recorded actions, or where the policy looks, for the first episodes of datasets.

    Frames are prepared as in training, without JPEG round trip, and with the checkpoint's centre crop.

    Args:
        checkpoint: folder or Hub id.
        arguments: the datasets, how they are read, and `picture_episodes`. Cameras are the checkpoint's by default.
        output: the picture to write.
        attention: draw the policy's attention on the frames instead of actions.

    Returns:
        `Path`: `output`.

    Raises:
        ValueError: when the cameras or sizes of a dataset are not the checkpoint's.
        ImportError: without matplotlib.
    """
    new_figure()  # raises before anything is read
    opened = open_checkpoint(checkpoint)
    config = opened.config
    options = {
        "format": arguments.format,
        "cameras": arguments.cameras or list(config.cameras),
        "chunk_size": config.chunk_size,
        "robot": arguments.robot,
        "on_bad_episode": arguments.on_bad_episode,
        "image_transform": ImageResize.from_model_config(config),
        **arguments.reader_options(),
    }
    datasets = [load_demonstrations(path, **options) for path in arguments.dataset]
    keys = config.norm_stats or {}
    for path, dataset in zip(arguments.dataset, datasets, strict=True):
        check_camera_order(dataset.camera_names, config, checkpoint)
        for field, found in (("action_dim", dataset.action_dim), ("proprio_dim", dataset.state_dim)):
            if found != getattr(config, field):
                raise ValueError(
                    f"{path} has {field}={found}, {checkpoint} has {field}={getattr(config, field)}. Adapt the "
                    f"checkpoint to this robot first: vla-adapter train --checkpoint {checkpoint} --dataset {path} ..."
                )
        if dataset.unnorm_key not in keys and len(keys) == 1:
            dataset.unnorm_key = next(iter(keys))
    draw = plot_attention if attention else plot_chunks
    figure = draw(opened.load_model(), opened.load_processor(), datasets, arguments.picture_episodes)
    return save_figure(figure, output)
