"""Time and memory that loading takes, for a checkpoint in this package's layout and in the published one, as a table.

    python benchmarks/loading.py [--size full] [--dtype bfloat16] [--load-dtype float32] [--runs 3]

The checkpoint in the published layout is written to a temporary folder first, with random weights, and converted. At
the published size this takes 6 GB of disk in bfloat16. Every measurement is a process of its own and ends with a
prediction. The predictions of both layouts must be the same.
"""

import argparse
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModel, AutoProcessor

from vla_adapter_hf.bench.measures import memory_in_use, peak_memory, seconds_to_read, weight_bytes
from vla_adapter_hf.bench.random_weights import SIZES, random_checkpoint
from vla_adapter_hf.checkpoints.open import open_checkpoint
from vla_adapter_hf.checkpoints.published import writing as published_writing
from vla_adapter_hf.checkpoints.saving import synthetic_observation


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="full", choices=[size for size in SIZES if size != "small"])
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--load-dtype", choices=("float32", "bfloat16"), help="by default that of the file")
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="vla-adapter-loading-") as temporary:
        own, published = Path(temporary, "own"), Path(temporary, "published")
        with random_checkpoint(arguments.size, getattr(torch, arguments.dtype)) as drawn:
            in_own_process(write_published, drawn, published)
            in_own_process(write_own, drawn, published, own)
        print("| layout | load, s | × reading its files once | peak when loaded, × weights | and after a prediction |")
        print("|---|---:|---:|---:|---:|")
        expected = None
        for layout, folder in {"own": own, "published": published}.items():
            measured = [in_own_process(measure, folder, own, arguments.load_dtype) for _ in range(arguments.runs)]
            figures, actions = zip(*measured, strict=True)
            expected = actions[0] if expected is None else expected
            if not all(np.array_equal(one, expected) for one in actions):
                raise RuntimeError(f"the {layout} layout predicts other actions")
            load, ratio, loaded, predicted = (statistics.median(column) for column in zip(*figures, strict=True))
            print(f"| {layout} | {load:.2f} | {ratio:.2f} | {loaded:.2f} | {predicted:.2f} |", flush=True)


def in_own_process(function: Callable[..., Any], *arguments: Any) -> Any:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def measure(folder: Path, own: Path, dtype: str | None) -> tuple[tuple[float, float, float, float], np.ndarray]:
    """Seconds to load, also relative to reading; peak memory by weights, loaded and predicted; actions."""
    weights = sorted([*folder.glob("*.safetensors"), *folder.glob("*.pt")])
    for file in weights:  # so that loading finds them in the system's cache, as reading will
        with file.open("rb") as stream:
            while stream.read(1 << 24):
                pass
    processor = AutoProcessor.from_pretrained(own)
    cpu = torch.device("cpu")
    before = memory_in_use(cpu)
    start = time.perf_counter()
    model = open_checkpoint(folder).load_model(dtype)
    load = time.perf_counter() - start
    loaded = peak_memory(cpu)
    observation = synthetic_observation(model.config)
    actions = model.predict_action(**processor(**observation), unnorm_key=next(iter(model.config.norm_stats)))
    predicted = peak_memory(cpu)
    size = weight_bytes(model)
    figures = load, load / seconds_to_read(weights), (loaded - before) / size, (predicted - before) / size
    return figures, np.asarray(actions)


def write_published(drawn: Path, folder: Path) -> None:
    """The weights of a checkpoint in our layout as the published layout stores them."""
    config, tokenizer = AutoConfig.from_pretrained(drawn), AutoProcessor.from_pretrained(drawn).tokenizer
    with safe_open(drawn / "model.safetensors", "pt") as stored:
        state_dict = {name: stored.get_tensor(name) for name in stored.keys()}
    published_writing.write_published(
        folder, config, published_writing.published_tensors(state_dict, config.policy_variant), tokenizer
    )


def write_own(drawn: Path, published: Path, own: Path) -> None:
    AutoModel.from_pretrained(published).save_pretrained(own)
    AutoProcessor.from_pretrained(drawn).save_pretrained(own)


if __name__ == "__main__":
    main()
