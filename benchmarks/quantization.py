"""The accuracy, memory and time of weights in eight and four bits, part by part, as a markdown table.

    python benchmarks/quantization.py [CHECKPOINT] [--dataset FOLDER --samples 16] [--kinds int8,int4]
        [--dtype float32]

Errors are those of normalised actions, against the same checkpoint without quantisation in the same precision. By
default the small checkpoint that ships with the package predicts for one recorded LIBERO observation. A trained
checkpoint with demonstrations that it was not trained on says more.
"""

import argparse
import time
from importlib.resources import as_file, files
from typing import Any

import numpy as np
import torch
from transformers import AutoModel, AutoProcessor

from vla_adapter_hf import quantization_config
from vla_adapter_hf.bench.measures import weight_bytes
from vla_adapter_hf.checkpoints.quantization import KEPT
from vla_adapter_hf.data import ImageResize, load_demonstrations
from vla_adapter_hf.modeling.normalization_vla_adapter import normalize, select_norm_stats
from vla_adapter_hf.recording.played_episode import embedded_episode


PARTS = (
    "dinov2",
    "siglip",
    "vision_projector",
    "language_model",
    "proprio_projector",
    "policy.fc_in",
    "policy.blocks",
    "policy.fc_out",
)
# What is quantised, by the rows' names.
ROWS = {"everything": (), "the default": KEPT} | {
    f"{part} alone": tuple(other for other in PARTS if other != part) for part in PARTS
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?")
    parser.add_argument("--dataset", help="folder of demonstrations")
    parser.add_argument("--samples", type=int, default=16, help="of the demonstrations, evenly spread")
    parser.add_argument("--kinds", default="int8,int4")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    arguments = parser.parse_args()
    dtype = getattr(torch, arguments.dtype)
    with as_file(files("vla_adapter_hf").joinpath("embedded")) as embedded:
        source = arguments.checkpoint or str(embedded / "checkpoint")
        processor = AutoProcessor.from_pretrained(source)
        model = AutoModel.from_pretrained(source, dtype=dtype)
        if arguments.dataset is None:
            inputs = [recorded_observation(processor)]
        else:
            inputs = demonstrated(arguments.dataset, arguments.samples, model.config, processor)
        expected, seconds = predict(model, inputs)
        spread = expected.std(axis=(0, 1, 2)).mean()
        print(f"{len(inputs)} observations; the actions' standard deviation is {spread:.3f}\n")
        print("| quantised | largest error | mean error | weights, MiB | time, relative |")
        print("|---|---:|---:|---:|---:|")
        print(f"| nothing, {arguments.dtype} | 0 | 0 | {weight_bytes(model) / 2**20:.1f} | 1.00 |")
        if dtype == torch.float32:  # by how much an ordinary rounding moves the actions
            print(row("nothing, bfloat16", model.bfloat16(), inputs, expected, seconds), flush=True)
        for kind in arguments.kinds.split(","):
            for name, keep in ROWS.items():
                if kind == "int4" and name == "policy.fc_out alone":
                    continue  # it cannot be
                config = quantization_config(kind, keep=keep)
                quantized = AutoModel.from_pretrained(source, dtype=dtype, quantization_config=config)
                print(row(f"{kind}, {name}", quantized, inputs, expected, seconds), flush=True)


def row(name: str, model: Any, inputs: list[dict[str, Any]], expected: np.ndarray, seconds: float) -> str:
    actions, taken = predict(model, inputs)
    error = np.abs(actions - expected)
    megabytes = weight_bytes(model) / 2**20
    return f"| {name} | {error.max():.4f} | {error.mean():.4f} | {megabytes:.1f} | {taken / seconds:.2f} |"


def recorded_observation(processor: Any) -> dict[str, Any]:
    episode = embedded_episode()
    return {**processor(images=list(episode.frames[0]), text=episode.instruction, state=episode.states[0])}


def demonstrated(folder: str, count: int, config: Any, processor: Any) -> list[dict[str, Any]]:
    """Observations of a dataset, evenly spread over all its steps, as arguments of `predict_action`."""
    resize = ImageResize(config.image_size, config.image_center_crop)
    dataset = load_demonstrations(
        folder, cameras=list(config.cameras), chunk_size=config.chunk_size, image_transform=resize
    )
    inputs = []
    for index in np.linspace(0, len(dataset) - 1, count).astype(int):
        sample = dataset[int(index)]
        observation = {name: sample[name] for name in ("images", "text", "state")}
        inputs.append({**processor(**observation, do_jpeg_round_trip=False, do_center_crop=False)})
    return inputs


@torch.no_grad()
def predict(model: Any, inputs: list[dict[str, Any]]) -> tuple[np.ndarray, float]:
    """Normalised actions `(observations, 1, chunk_size, action_dim)`, and the fastest prediction's seconds."""
    config = model.config
    _, stats = select_norm_stats(config.norm_stats, next(iter(config.norm_stats)))
    actions, seconds = [], []
    for one in inputs + inputs[:1]:  # the first one twice: it warms up
        proprio = normalize(one["state"], stats["proprio"], config.norm_type, config.constant_dims)
        start = time.perf_counter()
        output = model(
            one["input_ids"],
            one["attention_mask"],
            one["pixel_values"].to(model.dtype),
            torch.from_numpy(proprio).to(model.dtype),
        )
        seconds.append(time.perf_counter() - start)
        actions.append(output.actions.double().numpy())
    return np.stack(actions[:-1]), min(seconds[1:])


if __name__ == "__main__":
    main()
