"""`vla-adapter demo`: one prediction on a recorded observation, as a table and a picture."""

from __future__ import annotations

from collections.abc import Callable
from importlib.resources import as_file, files
from pathlib import Path

import numpy as np
from transformers import AutoModel, AutoProcessor

from vla_adapter_hf.modeling.normalization_vla_adapter import select_norm_stats
from vla_adapter_hf.plotting import action_names, plot_prediction, save_figure


EMBEDDED_NOTE = "The embedded checkpoint is untrained: these actions show the way through the code and mean nothing."


def demo(
    checkpoint: str | None = None,
    output: str | Path = "demo.png",
    unnorm_key: str | None = None,
    say: Callable[[str], None] = print,
) -> np.ndarray:
    """Predict on the recorded LIBERO observation that ships with the package.

    Args:
        checkpoint (`str`, *optional*): folder or Hub id; by default the small one that ships with the package.
        output (`str` or `Path`): the picture to write.
        unnorm_key (`str`, *optional*): which of the checkpoint's statistics to use.
        say (`Callable`): receives the lines to print.

    Returns:
        `np.ndarray`: `(chunk_size, action_dim)`, physical units.

    Raises:
        ValueError: when the checkpoint is for another robot than the observation's.
    """
    embedded = files("vla_adapter_hf").joinpath("embedded")
    with as_file(embedded) as folder:
        with np.load(folder / "observation.npz") as recorded:
            frames = [recorded["full_image"], recorded["wrist_image"]]
            instruction, state = str(recorded["instruction"]), recorded["state"]
        source = str(folder / "checkpoint") if checkpoint is None else checkpoint
        processor = AutoProcessor.from_pretrained(source)
        model = AutoModel.from_pretrained(source)
    config = model.config
    if config.num_cameras != len(frames) or config.proprio_dim != len(state):
        raise ValueError(
            f"{source} is for {config.num_cameras} cameras and a state of {config.proprio_dim}; the recorded LIBERO "
            f"observation has {len(frames)} and {len(state)}."
        )
    key, _ = select_norm_stats(config.norm_stats, unnorm_key)
    inputs = processor(images=frames, text=instruction, state=state)
    actions = model.predict_action(**inputs, unnorm_key=key)[0]

    note = EMBEDDED_NOTE if checkpoint is None else ""
    say(f"instruction: {instruction}")
    say(f"statistics:  {key}")
    for line in action_table(actions):
        say(line)
    if note:
        say(note)
    figure = plot_prediction(frames, config.cameras, instruction, actions, note)
    say(f"picture:     {save_figure(figure, output)}")
    return actions


def action_table(actions: np.ndarray) -> list[str]:
    """A chunk as lines of text, one per step."""
    names = action_names(actions.shape[1])
    lines = ["step" + "".join(f"{name:>10}" for name in names)]
    return lines + [
        f"{step:>4}" + "".join(f"{value:>10.4f}" for value in action) for step, action in enumerate(actions)
    ]
