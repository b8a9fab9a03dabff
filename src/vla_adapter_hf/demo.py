"""`vla-adapter demo`: an episode in the simulator where it is installed, else one prediction on a recorded observation."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from vla_adapter_hf.checkpoints.model_card import NOT_EVALUATED
from vla_adapter_hf.checkpoints.open import open_checkpoint
from vla_adapter_hf.modeling.normalization_vla_adapter import select_norm_stats
from vla_adapter_hf.simulation.libero.install import import_libero
from vla_adapter_hf.simulation.policies import embedded_folder
from vla_adapter_hf.utils.files import write_bytes
from vla_adapter_hf.utils.plotting import action_names, plot_prediction, save_figure


RECORDED_SUITE = "libero_spatial"  # of the recorded observation
UNTRAINED_NOTE = "The embedded checkpoint's card reports no results: it is untrained, and its actions mean nothing."
OTHER_SUITE_NOTE = (
    "The observation is of {recorded}; the embedded policy learnt {key}: only in the simulator is it at home."
)


def demo(
    checkpoint: str | None = None,
    output: str | Path = "demo.png",
    unnorm_key: str | None = None,
    loop: bool | None = None,
    suite: str = "libero_object",
    task: int = 9,
    episode: int = 40,
    placement: str = "official",
    say: Callable[[str], None] = print,
) -> dict[str, Any] | np.ndarray:
    """Play an episode in the LIBERO simulator, or predict on the recorded observation that ships with the package.

    Args:
        checkpoint (`str`, *optional*): folder or Hub id; by default the small one that ships with the package.
        output (`str` or `Path`): the picture to write: the episode's contact sheet, with a film (GIF) beside it, or the
            prediction.
        unnorm_key (`str`, *optional*): which of the checkpoint's statistics to use.
        loop (`bool`, *optional*): True plays an episode, False predicts; by default an episode is played where the simulator
            can be imported.
        suite, task, episode, placement: which episode, see [`evaluate`]; by default one of those that the embedded policy
            solves, which are not all, as its card says. It was not trained on the initial states from 40 on.
        say (`Callable`): receives the lines to print.

    Returns:
        The episode's summary, or the predicted chunk `(chunk_size, action_dim)` in physical units.

    Raises:
        ImportError: an episode was asked for and the simulator, or one of its system libraries, is missing.
        ValueError: when the checkpoint is for another robot than the observation's, or for an unknown task or suite.
    """
    missing = None
    if loop is not False:
        try:
            import_libero()
        except ImportError as error:
            if loop:
                raise
            missing = error
    if loop is not False and missing is None:
        return play(checkpoint, output, unnorm_key, suite, task, episode, placement, say)
    actions = predict(checkpoint, output, unnorm_key, say)
    if missing is not None:
        say(f"no episode:  {missing}. In a clone, `make demo-loop` does it (2 GB).")
    return actions


def play(
    checkpoint: str | None,
    output: str | Path,
    unnorm_key: str | None,
    suite: str,
    task: int,
    episode: int,
    placement: str,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Play one episode; arguments and errors as for [`demo`]. Writes `output` and the film beside it."""
    from vla_adapter_hf.simulation.evaluate import evaluate
    from vla_adapter_hf.simulation.results import read_results
    from vla_adapter_hf.simulation.settings import EvaluationSettings

    output = Path(output)
    if output.suffix != ".png":
        raise ValueError(f"output must end in .png (the film beside it ends in .gif), got {output.name!r}.")
    for line in _card_lines(checkpoint):
        say(line)
    say(
        f"playing:     {suite}, task {task}, episode {episode}, placement {placement}; building the scene takes a while"
    )
    with tempfile.TemporaryDirectory() as scratch:
        settings = EvaluationSettings(
            tasks=[task],
            episodes=[episode],
            placement=placement,
            processes=0,
            rollouts=1,
            unnorm_key=unnorm_key,
        )
        summary = evaluate(checkpoint or "embedded", suite, scratch, settings, report=lambda line: None)
        (result,) = read_results(Path(scratch) / "episodes.jsonl")
        film = output.with_suffix(".gif")
        for written, wanted in ((".png", output), (".gif", film)):
            source = Path(scratch) / "rollouts" / f"{task:02d}-{episode:04d}{written}"
            write_bytes(wanted, source.read_bytes())
    say(f"instruction: {result.instruction}")
    say(
        f"success:     {'yes' if result.success else 'no'}, after {result.steps} steps and {len(result.latency)} chunks"
    )
    say(f"query:       {1000 * float(np.median(result.latency)):.0f} ms (median)")
    say(f"picture:     {output}")
    say(f"film:        {film}")
    return summary


def predict(
    checkpoint: str | None, output: str | Path, unnorm_key: str | None, say: Callable[[str], None]
) -> np.ndarray:
    """Predict on the recorded observation; arguments, errors and the array as for [`demo`]."""
    with embedded_folder() as folder:
        with np.load(folder / "observation.npz") as recorded:
            frames = [recorded["full_image"], recorded["wrist_image"]]
            instruction, state = str(recorded["instruction"]), recorded["state"]
        source = str(folder / "checkpoint") if checkpoint is None else checkpoint
        opened = open_checkpoint(source)
        processor, model = opened.load_processor(), opened.load_model()
    config = model.config
    if config.num_cameras != len(frames) or config.proprio_dim != len(state):
        raise ValueError(
            f"{source} is for {config.num_cameras} cameras and a state of {config.proprio_dim}; the recorded LIBERO "
            f"observation has {len(frames)} and {len(state)}."
        )
    key, _ = select_norm_stats(config.norm_stats, unnorm_key)
    inputs = processor(images=frames, text=instruction, state=state)
    actions = model.predict_action(**inputs, unnorm_key=key)[0]

    note = ""
    if checkpoint is None and not embedded_results():
        note = UNTRAINED_NOTE
    elif checkpoint is None and not key.startswith(RECORDED_SUITE):
        note = OTHER_SUITE_NOTE.format(recorded=RECORDED_SUITE, key=key)
    say(f"instruction: {instruction}")
    say(f"statistics:  {key}")
    for line in action_table(actions):
        say(line)
    if note:
        say(note)
    figure = plot_prediction(frames, config.cameras, instruction, actions, note)
    say(f"picture:     {save_figure(figure, output)}")
    return actions


def embedded_results() -> str:
    """What the embedded checkpoint's model card says under "Results"; empty if it has not been evaluated."""
    with embedded_folder() as folder:
        return card_results((folder / "checkpoint" / "README.md").read_text(encoding="utf-8"))


def card_results(card: str) -> str:
    """The text under "Results" of a model card; empty if there is none or nothing was evaluated."""
    found = re.search(r"^## Results\n(.*?)(?=^## |\Z)", card, re.MULTILINE | re.DOTALL)
    text = found.group(1).strip() if found else ""
    return "" if text == NOT_EVALUATED else text


def action_table(actions: np.ndarray) -> list[str]:
    """A chunk as lines of text, one per step."""
    names = action_names(actions.shape[1])
    lines = ["step" + "".join(f"{name:>10}" for name in names)]
    return lines + [
        f"{step:>4}" + "".join(f"{value:>10.4f}" for value in action) for step, action in enumerate(actions)
    ]


def _card_lines(checkpoint: str | None) -> list[str]:
    """What the embedded checkpoint's card reports, so that one episode is not taken for its score."""
    if checkpoint is not None:
        return []
    return embedded_results().splitlines() or [UNTRAINED_NOTE]
