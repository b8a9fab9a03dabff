"""`vla-adapter demo`: a policy's predictions over a recorded episode, or an episode in the simulator."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vla_adapter_hf.checkpoints.embedded import embedded_folder
from vla_adapter_hf.checkpoints.model_card import NOT_EVALUATED
from vla_adapter_hf.checkpoints.open import open_checkpoint
from vla_adapter_hf.demo.picture import draw
from vla_adapter_hf.demo.predictions import ArmResponse, mean_errors, predict_episode
from vla_adapter_hf.modeling.normalization_vla_adapter import select_norm_stats
from vla_adapter_hf.recording.played_episode import embedded_episode
from vla_adapter_hf.utils.files import write_bytes
from vla_adapter_hf.utils.plotting import new_figure, save_figure


ONE_THREAD = 50e6  # parameters; smaller models lose more time to several threads than they gain
UNTRAINED_NOTE = "The embedded checkpoint's card reports no results: it is untrained, and its actions mean nothing."


def demo(
    checkpoint: str | None = None,
    output: str | Path = "demo.png",
    unnorm_key: str | None = None,
    report_progress: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Predict on the recorded episode that ships with the package, and draw the predictions next to what was executed.

    The episode is of libero_object. The scripted expert played it from an initial state that the embedded policy was
    not trained on. There are two controls: the instruction asks for another object, or all frames are black.

    Args:
        checkpoint (`str`, *optional*): folder or Hub id; by default the small one that ships with the package.
        output (`str` or `Path`): the picture to write.
        unnorm_key (`str`, *optional*): which of the checkpoint's statistics to use.
        report_progress (`Callable`): receives the lines to print.

    Returns:
        `dict`: `errors`, the mean absolute differences from the executed commands (-1...1), as asked and in either
        control (`asked`, `other`, `black`); `millimetres` between the predicted and the executed position at the end
        of a chunk; `seconds` of a prediction, the median; `picture`, the path.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the checkpoint is for another robot than the episode's.
    """
    new_figure()  # a missing matplotlib is found before any work
    episode = embedded_episode()
    with embedded_folder() as folder:
        opened = open_checkpoint(folder / "checkpoint" if checkpoint is None else checkpoint)
        processor, model = opened.load_processor(), opened.load_model(dtype=torch.float32)
    config = model.config
    expected = {"num_cameras": episode.frames.shape[1], "proprio_dim": episode.states.shape[1], "action_dim": 7}
    for field, value in expected.items():
        if getattr(config, field) != value:
            raise ValueError(
                f"the demo's episode is of LIBERO's robot with {field}={value}; "
                f"{checkpoint} has {getattr(config, field)}."
            )
    key, _ = select_norm_stats(config.norm_stats, unnorm_key)
    source = episode.source
    report_progress(f"policy:      {checkpoint or 'embedded'}, {model.num_parameters() / 1e6:.1f} million parameters")
    report_progress(
        f"episode:     {source['suite']}, task {source['task']}, initial state {source['initial_state']}, "
        f"simulator seed {source['simulator_seed']}; played by {source['played_by']}"
    )
    report_progress(f"instruction: {episode.instruction}")

    threads = torch.get_num_threads()
    if model.num_parameters() < ONE_THREAD:
        torch.set_num_threads(1)
    try:
        predictions = predict_episode(model, processor, episode, key)
    finally:
        torch.set_num_threads(threads)
    errors = mean_errors(episode, predictions)
    response = ArmResponse(episode)
    apart = [
        float(np.linalg.norm(response.path(step, chunk)[-1] - episode.positions[step + len(chunk)]))
        for step, chunk in zip(episode.steps, predictions.asked, strict=True)
    ]
    millimetres, seconds = 1000 * float(np.mean(apart)), float(np.median(predictions.seconds))
    moments = f"{len(episode.steps)} moments, {predictions.asked.shape[1]} steps ahead"
    report_progress(
        f"mean error:  {errors['asked']:.3f} over {moments}; commands run from -1 to 1, and 1 asks the arm for 5 cm"
    )
    report_progress(f"             {errors['other']:.3f} when another object is asked for, as it should be")
    report_progress(f"             {errors['black']:.3f} with black frames")
    report_progress(f"position:    {millimetres:.0f} mm from the executed one at the end of a chunk")
    report_progress(f"prediction:  {1000 * seconds:.0f} ms (median)")
    summary = (
        f"{model.num_parameters() / 1e6:.1f} million parameters, {moments}, in an episode that the policy was not "
        "trained on. "
        f"Mean error {errors['asked']:.3f} of commands from −1 to 1, {1000 * seconds:.0f} ms a prediction."
    )
    picture = save_figure(draw(episode, predictions, summary), output)
    report_progress(f"picture:     {picture}")
    return {"errors": errors, "millimetres": millimetres, "seconds": seconds, "picture": picture}


def play(
    checkpoint: str | None = None,
    output: str | Path = "demo.png",
    unnorm_key: str | None = None,
    *,
    suite: str = "libero_object",
    task: int = 9,
    episode: int = 40,
    placement: str = "official",
    report_progress: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Play one episode in the LIBERO simulator, and write its contact sheet and its film.

    Args:
        checkpoint, unnorm_key, report_progress: as for [`demo`].
        output (`str` or `Path`): the contact sheet to write (.png). The film gets the same name with .gif.
        suite, task, episode, placement: which episode, see [`evaluate`]. The embedded policy solves the default one.
            It was not trained on the initial states from 40 on.

    Returns:
        `dict`: the summary of [`evaluate`].

    Raises:
        ImportError: the simulator, or one of its system libraries, is missing.
        ValueError: the checkpoint is for another robot, or there is no such suite or task.
    """
    from vla_adapter_hf.simulation.evaluate import evaluate
    from vla_adapter_hf.simulation.results import read_results
    from vla_adapter_hf.simulation.settings import EvaluationSettings

    output = Path(output)
    if output.suffix != ".png":
        raise ValueError(f"output must end in .png, the film then ends in .gif; got {output.name!r}.")
    if checkpoint is None:  # one episode is not the policy's score
        for line in embedded_results().splitlines() or [UNTRAINED_NOTE]:
            report_progress(line)
    report_progress(
        f"playing:     {suite}, task {task}, episode {episode}, placement {placement}; "
        "building the scene takes a while"
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
    report_progress(f"instruction: {result.instruction}")
    success = "yes" if result.success else "no"
    report_progress(f"success:     {success}, after {result.steps} steps and {len(result.latency)} chunks")
    report_progress(f"query:       {1000 * float(np.median(result.latency)):.0f} ms (median)")
    report_progress(f"picture:     {output}")
    report_progress(f"film:        {film}")
    return summary


def embedded_results() -> str:
    """What the embedded checkpoint's model card says under "Results"; empty if it has not been evaluated."""
    with embedded_folder() as folder:
        return card_results((folder / "checkpoint" / "README.md").read_text(encoding="utf-8"))


def card_results(card: str) -> str:
    """The text under "Results" of a model card; empty if there is none or nothing was evaluated."""
    found = re.search(r"^## Results\n(.*?)(?=^## |\Z)", card, re.MULTILINE | re.DOTALL)
    text = found.group(1).strip() if found else ""
    return "" if text == NOT_EVALUATED else text
