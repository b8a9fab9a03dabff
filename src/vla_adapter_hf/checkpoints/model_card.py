"""The model card of a checkpoint: its README.md."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.resources import files
from math import prod
from pathlib import Path
from string import Template

from vla_adapter_hf.checkpoints.shapes import model_shapes
from vla_adapter_hf.modeling.configuration_vla_adapter import VLAAdapterConfig


# Published success rates in per cent (arXiv 2509.09372, and the README of the released code). LIBERO: of the original
# and the Pro policy, by suite. CALVIN ABC→D: of 1 to 5 subtasks in a row, and the average length.
LIBERO_RESULTS = {
    "": {"Spatial": 97.8, "Object": 99.2, "Goal": 97.2, "Long": 95.0},
    "-Pro": {"Spatial": 99.6, "Object": 99.6, "Goal": 98.2, "Long": 96.4},
}
CALVIN_PRO_RESULTS = (98.5, 95.0, 90.5, 85.3, 80.0, 4.50)
NOT_EVALUATED = "Not evaluated."
HUB_ID = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"


def published_results(source: str) -> str:
    """The published results of the checkpoint with this Hub id; for all others [`NOT_EVALUATED`].

    A folder has none, whatever its name: its weights may have been trained further.
    """
    if Path(source).exists():
        return NOT_EVALUATED
    theirs = "published by the authors of VLA-Adapter. This conversion has not been evaluated again."
    for policy, suites in LIBERO_RESULTS.items():
        for suite, rate in suites.items():
            if source == f"VLA-Adapter/LIBERO-{suite}{policy}":
                return f"LIBERO-{suite}, 500 episodes: {rate:.1f} % successful, as {theirs}"
    if source == "VLA-Adapter/CALVIN-ABC-Pro":
        *rates, length = CALVIN_PRO_RESULTS
        in_a_row = ", ".join(f"{rate:.1f}" for rate in rates)
        return f"CALVIN ABC→D, 1 to 5 subtasks in a row: {in_a_row} % successful, {length:.2f} on average, as {theirs}"
    return NOT_EVALUATED


def describe(config: VLAAdapterConfig) -> dict[str, str]:
    """What a configuration says about a model: short texts by name, in the order to show them."""
    crop = f"centre crop to {config.image_center_crop:g} of the area" if config.image_center_crop else "no crop"
    round_trip = "JPEG round trip, " if config.image_jpeg_round_trip else ""
    rate = "" if config.fps is None else f"; {config.fps:g} actions per second"
    return {
        "policy": f"{config.policy_variant}, {config.policy_num_layers} Bridge Attention blocks",
        "cameras, in order": ", ".join(config.cameras),
        "images": f"{config.image_size} × {config.image_size} pixels; {round_trip}{crop}",
        "chunk": f"{config.chunk_size} actions of {config.action_dim} values{_names(config.action_names)}{rate}",
        "state": f"{config.proprio_dim} values{_names(config.state_names)}",
        "normalisation": config.norm_type,
        "action queries": str(config.num_action_queries),
        "language model": f"Qwen2, {config.text_config.num_hidden_layers} layers of {config.text_config.hidden_size}",
        "vision": (
            f"DINOv2, {config.dinov2_config.num_hidden_layers} blocks of {config.dinov2_config.hidden_size}; SigLIP, "
            f"{config.siglip_config.num_hidden_layers} blocks of {config.siglip_config.hidden_size}"
        ),
        "rotary tables": f"{config.policy_rope_dtype}" if config.policy_variant == "pro" else "none",
    }


def fill_model_card(
    config: VLAAdapterConfig,
    title: str,
    summary: str,
    repo: str = "path/to/this/folder",
    results: str = NOT_EVALUATED,
    instruction: str = "pick up the cup",
    base_model: Sequence[str | Path] = (),
    datasets: Sequence[str | Path] = (),
) -> str:
    """The text of a checkpoint's README.md.

    Args:
        config ([`VLAAdapterConfig`]): of the model, with its norm stats.
        title, summary, results (`str`): the card's parts, in Markdown.
        repo (`str`): the name to load it by.
        instruction (`str`): an instruction of the kind that the model was trained on.
        base_model, datasets (`Sequence[str]`): what it was made from. The card's metadata names those that are Hub
            ids, and no folders.
    """
    metadata = {"base_model": _hub_ids(base_model), "datasets": _hub_ids(datasets)}
    stats = config.norm_stats or {}
    rows = [
        f"| `{key}` | {entry.get('num_transitions', '')} | {entry.get('num_trajectories', '')} |"
        for key, entry in stats.items()
    ]
    template = Template(files("vla_adapter_hf").joinpath("MODEL_CARD.md").read_text(encoding="utf-8"))
    return template.substitute(
        title=title,
        metadata="".join(f"{name}:\n" + "".join(f"- {i}\n" for i in ids) for name, ids in metadata.items() if ids),
        summary=summary,
        repo=repo,
        results=results,
        instruction=instruction,
        chunk_size=config.chunk_size,
        action_dim=config.action_dim,
        camera_variables=", ".join(_variable(name) for name in config.cameras),
        unnorm_argument="" if len(stats) < 2 else f', unnorm_key="{next(iter(stats))}"',
        facts="\n".join(f"| {name} | {text} |" for name, text in describe(config).items()),
        statistics="\n".join(rows) or "| none | | |",
    )


def _names(names: list[str] | None) -> str:
    return "" if names is None else f" ({', '.join(names)})"


def _hub_ids(sources: Sequence[str | Path]) -> list[str]:
    """Those of the sources that are repositories on the Hub."""
    return [str(source) for source in sources if re.fullmatch(HUB_ID, str(source)) and not Path(source).exists()]


def _variable(camera: str) -> str:
    return "".join(character if character.isalnum() else "_" for character in camera)


def parameter_summary(config: VLAAdapterConfig) -> dict[str, int]:
    """Numbers of parameters by part of the model, and of `"all"`."""
    totals: dict[str, int] = {}
    for name, shape in model_shapes(config).items():
        part = name.split(".")[0]
        totals[part] = totals.get(part, 0) + prod(shape)
    return {**totals, "all": sum(totals.values())}
