"""`vla-adapter convert`: a published checkpoint as a normal transformers model in our own layout, and back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from huggingface_hub import HfApi

from vla_adapter_hf.checkpoints.exported import refuse_exported
from vla_adapter_hf.checkpoints.model_card import fill_model_card, published_results
from vla_adapter_hf.checkpoints.open import open_checkpoint
from vla_adapter_hf.checkpoints.own import OwnCheckpoint
from vla_adapter_hf.checkpoints.published.expressible import check_expressible
from vla_adapter_hf.checkpoints.published.writing import (
    PublishedTensors,
    has_published_towers,
    published_tensors,
    write_published,
)
from vla_adapter_hf.checkpoints.saving import check_destination, compare_actions, write_checkpoint
from vla_adapter_hf.modeling.checkpoint_names_vla_adapter import name_in_file
from vla_adapter_hf.utils.files import atomic_path


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
    refuse_exported(checkpoint)
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
    _upload(destination, push_to_hub, report_progress)
    return destination


def convert_to_published(
    source: str,
    destination: str | Path,
    robot: str | None = None,
    dtype: torch.dtype | None = None,
    push_to_hub: str | None = None,
    report_progress: Callable[[str], None] = print,
) -> Path:
    """Write a checkpoint of our own layout in the published one, and check it by reading it back.

    The result has the files of a published checkpoint except the original's code, which the original's tools put there
    themselves. Tensors without an effect are zeros.

    Args:
        source (`str`): folder or Hub id of a checkpoint in our layout.
        destination (`str` or `Path`): folder to make. It appears complete or not at all.
        robot (`str`, *optional*): the preset that readers of the folder are given, LIBERO by default.
        dtype, push_to_hub, report_progress: as in [`convert`].

    Raises:
        ValueError: for a source or a destination as in [`convert`], or a model that the published layout cannot
            describe. Nothing is written.
        RuntimeError: when the written checkpoint is not what was read.
    """
    destination = check_destination(destination)
    report_progress(f"Looking into {source}")
    checkpoint = open_checkpoint(source)
    if checkpoint.layout == "lerobot":
        raise ValueError(
            f"{source} has LeRobot's layout: rewrite it first with `vla-adapter from-lerobot {source} DESTINATION`."
        )
    if not isinstance(checkpoint, OwnCheckpoint) or getattr(checkpoint.config, "quantization_config", None):
        raise ValueError(f"{source} is no checkpoint in this package's own layout with unquantized weights.")
    checkpoint.check()
    config, processor = checkpoint.config, checkpoint.load_processor()
    pad_token_id = processor.tokenizer.pad_token_id
    empty = {name: torch.empty(shape, device="meta") for name, shape in checkpoint.tensor_shapes().items()}
    lost = check_expressible(config, published_tensors(empty, config.policy_variant), pad_token_id, robot)
    if lost:
        report_progress(f"  not in the published layout: {', '.join(lost)}")
    if not has_published_towers(config):
        report_progress("  the towers have other sizes than the published ones: only this package reads the result")
    report_progress("Reading the weights")
    model = checkpoint.load_model(dtype or "auto")
    with atomic_path(destination) as temporary:
        report_progress("Writing")
        write_published(temporary, model.config, _published_tensors_of(model), processor.tokenizer)
        report_progress("Verifying")
        difference = _verify_published(temporary, model, processor, robot)
        report_progress(f"  read back: the same weights and statistics, normalised actions within {difference:.1e}")
    report_progress(f"Done: {destination}")
    _upload(destination, push_to_hub, report_progress)
    return destination


def _published_tensors_of(model: torch.nn.Module) -> PublishedTensors:
    tensors = {name_in_file(name): tensor for name, tensor in model.state_dict().items()}
    return published_tensors(tensors, model.config.policy_variant)


def _verify_published(folder: Path, model: torch.nn.Module, processor: object, robot: str | None) -> float:
    """Read a written folder back and compare tensors and statistics to the bit.

    Returns:
        `float`: the largest difference of a normalised action.

    Raises:
        RuntimeError: when they are not the same.
    """
    checkpoint = open_checkpoint(folder, robot=robot)
    written = checkpoint.load_model(model.dtype)
    for expected, found in zip(_published_tensors_of(model), _published_tensors_of(written), strict=True):
        for name, tensor in expected.items():
            if not torch.equal(tensor, found[name]):
                raise RuntimeError(f"verification failed: {name} is not what was saved.")
    if written.config.norm_stats != model.config.norm_stats:
        raise RuntimeError("verification failed: the statistics are not those that were saved.")
    return compare_actions(model, processor, written, checkpoint.load_processor())


def _upload(folder: Path, push_to_hub: str | None, report_progress: Callable[[str], None]) -> None:
    if push_to_hub is not None:
        api = HfApi()
        api.create_repo(push_to_hub, exist_ok=True)
        api.upload_folder(repo_id=push_to_hub, folder_path=folder, commit_message="Upload VLA-Adapter checkpoint")
        report_progress(f"Uploaded to {push_to_hub}")
