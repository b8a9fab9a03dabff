"""`vla-adapter export`: a checkpoint for OpenVINO or ONNX Runtime, checked against torch before it appears."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from vla_adapter_hf.checkpoints.exported import (
    ENGINES,
    GRAPH_INPUTS,
    MODEL_TYPE,
    RECORD,
    ExportedModel,
    refuse_exported,
)
from vla_adapter_hf.checkpoints.model_card import fill_model_card
from vla_adapter_hf.checkpoints.open import open_checkpoint
from vla_adapter_hf.checkpoints.saving import check_destination, synthetic_observation
from vla_adapter_hf.data import load_demonstrations
from vla_adapter_hf.export.engines import CONVERTERS, Arrays, Converter, check_packages
from vla_adapter_hf.export.graph import trace
from vla_adapter_hf.export.sensitivity import action_errors, groups_to_keep, layer_groups
from vla_adapter_hf.modeling.configuration_vla_adapter import VLAAdapterConfig
from vla_adapter_hf.modeling.normalization_vla_adapter import select_norm_stats
from vla_adapter_hf.robots import physical_scale
from vla_adapter_hf.utils.files import atomic_path, write_json, write_text


PRECISIONS = ("fp32", "bf16", "int8")
# Largest difference to torch of a float32 export, in normalised actions.
TOLERANCE = 1e-4
# How often more layers are kept before an int8 export is given up.
ROUNDS = 3
# Samples, spread over the dataset, that the blocks' sensitivity is measured with: each costs a prediction per block.
SENSITIVITY_SAMPLES = 4
# Every so many observations, one is left out of the calibration. On those an int8 export is judged.
HELD_OUT = 3


@dataclass(frozen=True)
class ExportSettings:
    """What is exported and how.

    Args:
        to: the engine, `"openvino"` or `"onnx"`.
        precision: `"fp32"`, `"bf16"` (OpenVINO only) or `"int8"`.
        calibrate: for int8, a dataset of demonstrations: folder or Hub id.
        robot: the robot preset, for the dataset and for checkpoints in the published layout. Those of our own layout
            say themselves what they are.
        cameras: for the dataset, the columns of the model's cameras; by default found by the model's names.
        samples: observations that are taken from the dataset. For int8 every third is left out of the calibration, and
            the errors are measured on those.
        prompt_tokens: length that prompts are padded to. Longer ones are refused at prediction.
        dynamic_batch: leave the batch size open. A graph of batch 1 is quicker and predicts batches row after row.
        error_ratio: for int8, how many times the error of bfloat16 the mean error of an action may be. Layers that err
            most stay in higher precision until it is met. `inf` rounds every layer, whatever the error.
        unnorm_key: the norm stats that normalise the dataset's states, and that the errors in the action's units are
            of. Needed for int8 if the checkpoint has several sets; otherwise the first one.

    Raises:
        ValueError: an unknown name, a number out of range, or settings that do not go together.
    """

    to: str = "openvino"
    precision: str = "fp32"
    calibrate: str | None = None
    robot: str | None = None
    cameras: tuple[str, ...] | None = None
    samples: int = 64
    prompt_tokens: int = 64
    dynamic_batch: bool = False
    error_ratio: float = 2.0
    unnorm_key: str | None = None

    def __post_init__(self) -> None:
        if self.to not in ENGINES:
            raise ValueError(f"--to must be {' or '.join(ENGINES)}, got {self.to!r}.")
        if self.precision not in PRECISIONS:
            raise ValueError(f"--precision must be one of {', '.join(PRECISIONS)}, got {self.precision!r}.")
        if self.to == "onnx" and self.precision == "bf16":
            raise ValueError(
                "--precision bf16: ONNX Runtime's CPU provider has no bfloat16 arithmetic; use fp32 or int8."
            )
        if (self.precision == "int8") != (self.calibrate is not None):
            raise ValueError(
                "--precision int8 needs --calibrate DATASET, demonstrations of the policy's robot and task."
                if self.precision == "int8"
                else f"--calibrate is for --precision int8, got {self.precision}."
            )
        for name in ("samples", "prompt_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}.")
        if self.precision == "int8" and self.samples < HELD_OUT:
            raise ValueError(f"--precision int8 needs --samples of at least {HELD_OUT}, got {self.samples}.")
        if not self.error_ratio > 1:
            raise ValueError(f"--error-ratio must be more than 1, got {self.error_ratio}.")


def export(
    source: str,
    destination: str | Path,
    settings: ExportSettings | None = None,
    report_progress: Callable[[str], None] = print,
) -> Path:
    """Write a checkpoint as a graph for another engine, with its processor, norm stats and a card.

    The result opens with `open_checkpoint(destination).load_model()` and has the model's `predict_action`.

    Args:
        source (`str`): folder or Hub id of a checkpoint.
        destination (`str` or `Path`): folder to create. It appears complete or not at all.
        settings ([`ExportSettings`]): engine, precision, calibration.
        report_progress (`Callable`): receives a line of progress at a time.

    Raises:
        ValueError: for a source that cannot be read or is exported, a destination that exists, statistics that are
            missing or not chosen, or data that does not fit.
        ImportError: without the engine's packages, before anything is read.
        RuntimeError: when the written graph does not predict what torch predicts; nothing is left then.
    """
    settings = settings or ExportSettings()
    check_packages(settings.to, settings.precision)
    destination = check_destination(destination)
    # Without a dataset, a robot that the checkpoint has no use for is a mistake.
    robot = "robot" if settings.calibrate is None else "default_robot"
    checkpoint = open_checkpoint(source, **{robot: settings.robot})
    refuse_exported(checkpoint)
    settings = replace(settings, unnorm_key=_statistics(checkpoint.config, settings))
    report_progress(f"Reading {source}")
    model = checkpoint.load_model(dtype="float32")
    processor = checkpoint.load_processor()
    samples = list(_samples(model, processor, settings))
    calibration, samples = _held_out(samples) if settings.precision == "int8" else ([], samples)
    exact = _predictions(model, samples)

    report_progress("Tracing and converting")
    converter = CONVERTERS[settings.to](trace(model, settings.prompt_tokens, settings.dynamic_batch))
    with atomic_path(destination) as temporary:
        temporary.mkdir()
        processor.save_pretrained(temporary)
        write_json(temporary / "config.json", {**model.config.to_diff_dict(), "model_type": MODEL_TYPE})
        if settings.precision == "int8":
            bfloat16 = _errors(_predictions(checkpoint.load_model(dtype="bfloat16"), samples) - exact)
            report_progress(f"bfloat16 in torch: {_in_words(bfloat16)}")
            judged = Judged(samples, exact, settings.error_ratio * bfloat16["mean"])
            record = _write_int8(converter, temporary, model, calibration, judged, settings, report_progress)
            record |= {"calibrated_on": len(calibration), "bfloat16_errors": bfloat16}
        else:
            converter.save(converter.model, temporary, half_weights=settings.precision == "bf16")
            record = _record(settings, [])
            write_json(temporary / RECORD, record)
        errors = _check(temporary, samples, exact, settings, model, report_progress)
        write_json(temporary / RECORD, {**record, "checked_on": len(samples), "errors": errors})
        card = fill_model_card(
            model.config,
            title=destination.name,
            summary=f"`{Path(source).name}` exported for {settings.to} in {settings.precision}.",
            repo=destination.name,
        )
        write_text(temporary / "README.md", card)
    report_progress(f"Done: {destination}")
    return destination


def _statistics(config: VLAAdapterConfig, settings: ExportSettings) -> str:
    """The key, as stored, of the norm stats that states are normalised with.

    Raises:
        ValueError: without statistics, for a key that is unknown, and without a key where a dataset's states belong to
            one of several sets.
    """
    key = settings.unnorm_key
    if key is None and settings.calibrate is None:
        key = next(iter(config.norm_stats or {}), None)
    return select_norm_stats(config.norm_stats, key)[0]


def _record(settings: ExportSettings, kept: Sequence[str]) -> dict[str, Any]:
    names = ("precision", "prompt_tokens", "dynamic_batch", "unnorm_key")
    return {"engine": settings.to, **{name: asdict(settings)[name] for name in names}, "kept": list(kept)}


def _samples(model: Any, processor: Any, settings: ExportSettings) -> Iterator[Arrays]:
    """Inputs of the graph for batch 1: from the dataset, or synthetic ones."""
    recorded: list[Arrays] = []

    def remember(arrays: Arrays) -> np.ndarray:
        recorded.append([np.array(array) for array in arrays])
        return np.zeros((1, model.config.chunk_size, model.config.action_dim), np.float32)

    # The path of an exported model's own predictions, with an engine that only looks.
    record = {"prompt_tokens": settings.prompt_tokens, "dynamic_batch": False}
    recorder = ExportedModel(model.config, record, remember)
    for observation in _observations(model.config, settings):
        recorder.predict_action(**processor(**observation), unnorm_key=settings.unnorm_key)
        yield recorded.pop()


def _observations(config: Any, settings: ExportSettings) -> Iterator[dict[str, Any]]:
    if settings.calibrate is None:
        observation = synthetic_observation(config, settings.unnorm_key)
        words = observation["text"].split()
        # A graph of any batch is checked on three that differ: one alone and two together.
        for number in range(3 if settings.dynamic_batch else 1):
            images = [np.roll(frame, 32 * number, axis=1) for frame in observation["images"]]
            yield {**observation, "images": images, "text": " ".join(words[number:])}
        return
    cameras = list(settings.cameras or config.cameras)
    options = {} if settings.robot is None else {"robot": settings.robot}
    dataset = load_demonstrations(settings.calibrate, cameras=cameras, chunk_size=1, chunk_column=None, **options)
    if dataset.state_dim != config.proprio_dim:
        raise ValueError(
            f"{settings.calibrate} has states of {dataset.state_dim} values, the checkpoint takes "
            f"{config.proprio_dim}."
        )
    for index in _spread(len(dataset), settings.samples):
        sample = dataset[index]
        yield {"images": sample["images"], "text": sample["text"], "state": sample["state"]}


def _spread(length: int, count: int) -> list[int]:
    """Up to `count` indices of a sequence, evenly spread from its first to its last entry."""
    return np.linspace(0, length - 1, min(count, length)).astype(int).tolist()


def _held_out(samples: Sequence[Arrays]) -> tuple[list[Arrays], list[Arrays]]:
    """Samples to calibrate with, and others to measure the errors on.

    Raises:
        ValueError: when there are too few.
    """
    if len(samples) < HELD_OUT:
        raise ValueError(f"the dataset of --calibrate has {len(samples)} observations, and {HELD_OUT} are needed.")
    held_out = list(samples[HELD_OUT - 1 :: HELD_OUT])
    return [sample for number, sample in enumerate(samples, start=1) if number % HELD_OUT], held_out


def _errors(difference: np.ndarray) -> dict[str, Any]:
    """Mean and largest error of a normalised action, over all and by dimension."""
    sizes = np.abs(difference)
    return {
        "mean": float(sizes.mean()),
        "largest": float(sizes.max()),
        "largest_by_dimension": sizes.max(axis=(0, 1)).tolist(),
    }


def _in_words(errors: dict[str, Any]) -> str:
    largest = errors["largest_by_dimension"]
    return (
        f"mean error {errors['mean']:.2e}, largest {errors['largest']:.2e} in dimension {int(np.argmax(largest))} "
        "(normalised)"
    )


class Judged(NamedTuple):
    """What an int8 export is judged on."""

    samples: Sequence[Arrays]
    """Observations that it is not calibrated with."""
    exact: np.ndarray
    """Torch's predictions in float32."""
    allowed: float
    """The mean error of a normalised action that eight bits may cause."""


def _write_int8(
    converter: Converter,
    folder: Path,
    model: Any,
    calibration: Sequence[Arrays],
    judged: Judged,
    settings: ExportSettings,
    report_progress: Callable[[str], None],
) -> dict[str, Any]:
    """Write the graph in eight bits, with as few layers in higher precision as the allowed mean error permits."""
    target = judged.allowed
    groups = layer_groups(model)
    errors: dict[str, float] = {}
    if target < math.inf:
        report_progress(f"Measuring the blocks' sensitivity; a mean error of {target:.2e} (normalised) is allowed")
        inputs = [_tensors(calibration[index]) for index in _spread(len(calibration), SENSITIVITY_SAMPLES)]
        errors = action_errors(model, inputs, groups, report_progress)
    aim = target
    for _ in range(ROUNDS):
        kept = groups_to_keep(errors, aim)
        layers = [layer for group in kept for layer in groups[group]]
        report_progress(f"Quantizing {len(groups) - len(kept)} of {len(groups)} blocks")
        converter.save(converter.quantized(calibration, layers), folder, half_weights=True)
        record = _record(settings, kept)
        write_json(folder / RECORD, record)
        errors_now = _errors(_exported_predictions(folder, judged.samples) - judged.exact)
        report_progress(f"  {_in_words(errors_now)}")
        error = errors_now["mean"]
        if error <= target:
            return record
        aim *= 0.7 * target / error
    raise RuntimeError(
        f"in eight bits the mean error of a normalised action is {error:.2e}, and {target:.2e} is allowed, "
        f"{settings.error_ratio:g} times that of bfloat16. Allow more (--error-ratio), or export in bf16."
    )


def _check(
    folder: Path,
    samples: Sequence[Arrays],
    exact: np.ndarray,
    settings: ExportSettings,
    model: Any,
    report_progress: Callable[[str], None],
) -> dict[str, Any]:
    """Compare what was written with torch float32.

    Returns:
        `dict`: mean and largest error, normalised, the largest by dimension, and the mean in the action's units.

    Raises:
        RuntimeError: a float32 export differs, or another one predicts what is no number.
    """
    difference = np.abs(_exported_predictions(folder, samples) - exact)
    errors = _errors(difference)
    report_progress(f"Read back, against torch on {len(samples)} observations: {_in_words(errors)}")
    if not difference.max() <= (TOLERANCE if settings.precision == "fp32" else np.finfo(np.float32).max):
        raise RuntimeError(f"verification failed: the exported graph's actions differ by {difference.max():.2e}.")
    scale = physical_scale(model.config.norm_stats[settings.unnorm_key]["action"], model.config.norm_type)
    errors["mean_in_units"] = (difference.mean(axis=(0, 1)) * scale).tolist()
    listed = ", ".join(f"{value:.2g}" for value in errors["mean_in_units"])
    report_progress(f"  on average in the action's units, by dimension: {listed}")
    return errors


def _tensors(sample: Arrays) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in zip(GRAPH_INPUTS, sample, strict=True)}


@torch.no_grad()
def _predictions(model: Any, samples: Sequence[Arrays]) -> np.ndarray:
    """Normalised actions of torch `(samples, chunk_size, action_dim)`."""
    chunks = []
    for sample in samples:
        inputs = _tensors(sample)
        for name in ("pixel_values", "proprio"):
            inputs[name] = inputs[name].to(model.dtype)
        chunks.append(model(**inputs).actions.float().numpy())
    return np.concatenate(chunks)


def _exported_predictions(folder: Path, samples: Sequence[Arrays]) -> np.ndarray:
    """Normalised actions of an export `(samples, chunk_size, action_dim)`.

    A graph of any batch predicts the first sample alone and the others in twos.
    """
    model = open_checkpoint(folder).load_model()
    size = 2 if model.record["dynamic_batch"] else 1
    batches = [samples[:1], *(samples[first : first + size] for first in range(1, len(samples), size))]
    joined = [[np.concatenate(arrays) for arrays in zip(*batch, strict=True)] for batch in batches]
    return np.concatenate([model.engine(arrays) for arrays in joined])
