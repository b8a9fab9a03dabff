"""`vla-adapter convert`: a published checkpoint as a normal transformers model in our own layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from huggingface_hub import HfApi

from vla_adapter_hf.checkpoints.model_card import fill_model_card, published_results
from vla_adapter_hf.checkpoints.open import open_checkpoint
from vla_adapter_hf.checkpoints.saving import check_destination, write_checkpoint


def convert(
    source: str,
    destination: str | Path,
    robot: str | None = None,
    step: str | None = None,
    dtype: torch.dtype | None = None,
    push_to_hub: str | None = None,
    report_progress: Callable[[str], None] = print,
) -> Path:
    """Write a checkpoint in our own layout, with its processor and a model card, and check it by reading it back.

    Args:
        source (`str`): folder or Hub id of a checkpoint in the published layout, or in ours.
        destination (`str` or `Path`): folder to make. It appears complete or not at all.
        robot (`str`, *optional*): the preset that supplies what the weights do not show.
        step (`str`, *optional*): which of several saved steps to take.
        dtype (`torch.dtype`, *optional*): precision of the weights; that of the source by default.
        push_to_hub (`str`, *optional*): Hub id to upload the result to.
        report_progress (`Callable`): receives lines of progress.

    Returns:
        `Path`: the destination.

    Raises:
        ValueError: for a source that cannot be read or a destination that exists; nothing is written.
        RuntimeError: when the written checkpoint does not predict what the source predicts.
    """
    destination = check_destination(destination)
    report_progress(f"Looking into {source}")
    checkpoint = open_checkpoint(source, robot=robot, step=step)
    checkpoint.check()
    config = checkpoint.config
    for name, text in {"chunk": f"{config.chunk_size} actions", "cameras": ", ".join(config.cameras)}.items():
        report_progress(f"  {name}: {text}")
    report_progress(f"  normalisation: {config.norm_type}, statistics: {', '.join(config.norm_stats or ['none'])}")
    processor = checkpoint.load_processor()
    report_progress("Reading the weights")
    model = checkpoint.load_model(dtype or "auto")

    card = fill_model_card(
        model.config,
        title=Path(source).name,
        summary=f"Converted from `{Path(source).name}`, without the weights that have no effect.",
        repo=push_to_hub or destination.name,
        base_model=[source],
        results=published_results(source),
    )
    write_checkpoint(destination, model, processor, card, report_progress)
    report_progress(f"Done: {destination}")
    if push_to_hub is not None:
        api = HfApi()
        api.create_repo(push_to_hub, exist_ok=True)
        api.upload_folder(repo_id=push_to_hub, folder_path=destination, commit_message="Upload VLA-Adapter checkpoint")
        report_progress(f"Uploaded to {push_to_hub}")
    return destination
