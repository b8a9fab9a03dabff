"""Writing a checkpoint in our own layout. It is read back and compared before it appears."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from vla_adapter_hf.checkpoints.open import open_checkpoint
from vla_adapter_hf.modeling.configuration_vla_adapter import VLAAdapterConfig
from vla_adapter_hf.robots import physical_scale
from vla_adapter_hf.utils.files import atomic_path


# Largest difference between normalised actions before saving and after loading. The weights are equal. Their place in
# memory changes the order of additions, and so the last digits.
TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-2}


def check_destination(destination: str | Path) -> Path:
    """The folder to write. It must be missing or empty.

    Raises:
        ValueError: when it is neither.
    """
    destination = Path(destination)
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise ValueError(f"{destination} exists already; name a new folder or remove it first.")
    return destination


def write_checkpoint(
    destination: Path,
    model: torch.nn.Module,
    processor: object,
    card: str,
    report_progress: Callable[[str], None] = print,
) -> None:
    """Write model, processor and model card to a temporary folder, read them back, and rename the folder.

    Args:
        destination (`Path`): a folder that [`check_destination`] accepts.
        model, processor: what to save.
        card (`str`): the text of the README.md.
        report_progress (`Callable`): receives lines of progress.

    Raises:
        RuntimeError: when what was written differs from what was in memory. The folder is removed then.
    """
    with atomic_path(destination) as temporary:
        report_progress("Writing")
        model.config.tokenizer_fingerprint = processor.tokenizer_fingerprint
        model.save_pretrained(temporary)
        processor.save_pretrained(temporary)
        (temporary / "README.md").write_text(card, encoding="utf-8")
        report_progress("Verifying")
        difference = verify(temporary, model, processor)
        actions = f", normalised actions within {difference:.1e}" if model.config.norm_stats else ""
        report_progress(f"  read back: the same weights{actions}")


def verify(folder: Path, model: torch.nn.Module, processor: object) -> float:
    """Read a written checkpoint back and compare weights (to the bit) and actions with the model in memory.

    This package's classes read it. The code in the folder is the same in every checkpoint; the package's tests check
    that code.

    Returns:
        `float`: the largest difference of a normalised action.

    Raises:
        RuntimeError: when they are not the same.
    """
    checkpoint = open_checkpoint(folder)
    written = checkpoint.load_model(model.dtype)
    for (name, expected), (_, found) in zip(model.state_dict().items(), written.state_dict().items(), strict=True):
        if not torch.equal(expected.cpu(), found):
            raise RuntimeError(f"verification failed: {name} is not what was saved.")
    return compare_actions(model, processor, written, checkpoint.load_processor())


def compare_actions(
    model: torch.nn.Module, processor: object, written: torch.nn.Module, written_processor: object
) -> float:
    """The largest difference of a normalised action between the model in memory and the one that was read back.

    Raises:
        RuntimeError: when it is more than the order of additions explains.
    """
    observation = synthetic_observation(model.config)
    keys = list(model.config.norm_stats or {})
    if not keys:
        return 0.0
    actions = [
        one.predict_action(**of(**observation), unnorm_key=keys[0])
        for one, of in ((model, processor), (written, written_processor))
    ]
    scale = physical_scale(model.config.norm_stats[keys[0]]["action"], model.config.norm_type)
    difference = float((np.abs(actions[0] - actions[1]) / scale).max())
    if not difference <= TOLERANCE[model.dtype]:
        raise RuntimeError(f"verification failed: read back, the normalised actions differ by {difference:.2e}.")
    return difference


def synthetic_observation(config: VLAAdapterConfig, unnorm_key: str | None = None) -> dict[str, object]:
    """An observation of the right sizes for any model: smooth random frames and a state within the statistics.

    Args:
        config ([`VLAAdapterConfig`]): of the model.
        unnorm_key (`str`, *optional*): which statistics, as they are stored; by default the first.
    """
    generator = np.random.default_rng(0)
    coarse = generator.integers(0, 256, (config.num_cameras, 8, 8, 3), dtype=np.uint8)
    norm_stats = config.norm_stats or {}
    proprio = norm_stats[unnorm_key or next(iter(norm_stats))]["proprio"] if norm_stats else {}
    return {
        "images": [frame.repeat(32, axis=0).repeat(32, axis=1) for frame in coarse],
        "text": "pick up the object and place it in the basket",
        "state": np.asarray(proprio.get("mean", np.zeros(config.proprio_dim)), dtype=np.float64),
    }
