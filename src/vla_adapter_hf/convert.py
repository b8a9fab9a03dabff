"""`vla-adapter convert`: a published checkpoint as a normal transformers model in our own layout."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import HfApi
from transformers import AutoConfig, AutoModel, AutoProcessor

from vla_adapter_hf.model_card import PUBLISHED_RESULTS, fill_model_card
from vla_adapter_hf.modeling.configuration_vla_adapter import VLAAdapterConfig


# Largest difference of a verified reload, in physical units. The weights are the same to the bit; where they lie in
# memory changes the order of additions, and with it the last digits.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-2}


def convert(
    source: str,
    destination: str | Path,
    robot: str | None = None,
    step: str | None = None,
    dtype: torch.dtype | None = None,
    push_to_hub: str | None = None,
    say: Callable[[str], None] = print,
) -> Path:
    """Write a checkpoint in our own layout, with its processor and a model card, and check it by reading it back.

    Args:
        source (`str`): folder or Hub id of a checkpoint in the published layout (or in ours, to write it anew).
        destination (`str` or `Path`): folder to make. It appears complete or not at all.
        robot (`str`, *optional*): the preset that supplies what the weights do not tell.
        step (`str`, *optional*): which of several saved steps to take.
        dtype (`torch.dtype`, *optional*): precision of the weights; that of the source by default.
        push_to_hub (`str`, *optional*): Hub id to upload the result to.
        say (`Callable`): receives a line of progress at a time.

    Returns:
        `Path`: the destination.

    Raises:
        ValueError: for a source that cannot be read or a destination that is there already; nothing is written.
        RuntimeError: when the written checkpoint does not predict what the source predicts.
    """
    destination = Path(destination)
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise ValueError(f"{destination} exists already; name a new folder or remove it first.")
    layout = {name: value for name, value in (("robot", robot), ("step", step)) if value is not None}

    say(f"Looking into {source}")
    config = AutoConfig.from_pretrained(source, **layout)
    for name, text in {"chunk": f"{config.chunk_size} actions", "cameras": ", ".join(config.cameras)}.items():
        say(f"  {name}: {text}")
    say(f"  normalisation: {config.norm_type}, statistics: {', '.join(config.norm_stats or ['none'])}")
    processor = AutoProcessor.from_pretrained(source, **layout)
    say("Reading the weights")
    model = AutoModel.from_pretrained(source, dtype=dtype or "auto", **layout)

    destination.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{destination.name}-", dir=destination.parent))
    try:
        say("Writing")
        model.save_pretrained(partial)
        processor.save_pretrained(partial)
        card = fill_model_card(
            model.config,
            title=Path(source).name,
            summary=f"Converted from `{Path(source).name}`, the same weights without those that have no effect.",
            repo=push_to_hub or destination.name,
            results=PUBLISHED_RESULTS,
        )
        (partial / "README.md").write_text(card, encoding="utf-8")
        say("Verifying")
        difference = verify(partial, model, processor)
        say(f"  read back: the same weights, actions within {difference:.1e}")
        partial.chmod(0o755)
        if destination.exists():
            destination.rmdir()
        partial.rename(destination)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    say(f"Done: {destination}")
    if push_to_hub is not None:
        api = HfApi()
        api.create_repo(push_to_hub, exist_ok=True)
        api.upload_folder(repo_id=push_to_hub, folder_path=destination, commit_message="Upload VLA-Adapter checkpoint")
        say(f"Uploaded to {push_to_hub}")
    return destination


def verify(folder: Path, model: torch.nn.Module, processor: object) -> float:
    """Read a written checkpoint back and compare weights (to the bit) and actions with the model in memory.

    Returns:
        `float`: the largest difference of an action, in physical units.

    Raises:
        RuntimeError: when they are not the same.
    """
    written = AutoModel.from_pretrained(folder, dtype=model.dtype)
    for (name, expected), (_, found) in zip(model.state_dict().items(), written.state_dict().items(), strict=True):
        if not torch.equal(expected.cpu(), found):
            raise RuntimeError(f"verification failed: {name} changed on its way to disk.")
    observation = synthetic_observation(model.config)
    keys = list(model.config.norm_stats or {})
    if not keys:
        return 0.0
    actions = [
        one.predict_action(**of(**observation), unnorm_key=keys[0])
        for one, of in ((model, processor), (written, AutoProcessor.from_pretrained(folder)))
    ]
    difference = float(np.abs(actions[0] - actions[1]).max())
    if not difference <= TOLERANCE[model.dtype]:
        raise RuntimeError(f"verification failed: read back, the actions differ by {difference:.2e}.")
    return difference


def synthetic_observation(config: VLAAdapterConfig) -> dict[str, object]:
    """An observation of the right sizes for any model: smooth random frames and a state within the statistics."""
    generator = np.random.default_rng(0)
    coarse = generator.integers(0, 256, (config.num_cameras, 8, 8, 3), dtype=np.uint8)
    proprio = next(iter(config.norm_stats.values()))["proprio"] if config.norm_stats else {}
    return {
        "images": [frame.repeat(32, axis=0).repeat(32, axis=1) for frame in coarse],
        "text": "pick up the object and place it in the basket",
        "state": np.asarray(proprio.get("mean", np.zeros(config.proprio_dim)), dtype=np.float64),
    }
