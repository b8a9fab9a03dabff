"""Time and memory that loading takes, for a checkpoint in this package's layout and in the published one, as a table.

    python benchmarks/loading.py [--size full] [--dtype bfloat16] [--runs 3]

The checkpoint in the published layout is written to a temporary folder first, with random weights, and converted. At
the published size this takes 6 GB of disk in bfloat16. Every measurement is a process of its own and ends with a
prediction. The predictions of both layouts must be the same.
"""

import argparse
import json
import multiprocessing
import re
import statistics
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel, AutoProcessor

from vla_adapter_hf.bench.measures import memory_in_use, peak_memory, seconds_to_read, weight_bytes
from vla_adapter_hf.bench.random_weights import SIZES, random_checkpoint
from vla_adapter_hf.checkpoints.published import names as published_names
from vla_adapter_hf.checkpoints.published.config import TIMM_HEADS
from vla_adapter_hf.checkpoints.saving import synthetic_observation


TOWERS = {
    "dinov2": (published_names.DINOV2_PREFIX, published_names.DINOV2_NAMES, published_names.DINOV2_QKV),
    "siglip": (published_names.SIGLIP_PREFIX, published_names.SIGLIP_NAMES, published_names.SIGLIP_QKV),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="full", choices=[size for size in SIZES if size != "small"])
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
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
            figures, actions = zip(*(in_own_process(measure, folder, own) for _ in range(arguments.runs)), strict=True)
            expected = actions[0] if expected is None else expected
            if not all(np.array_equal(one, expected) for one in actions):
                raise RuntimeError(f"the {layout} layout predicts other actions")
            load, ratio, loaded, predicted = (statistics.median(column) for column in zip(*figures, strict=True))
            print(f"| {layout} | {load:.2f} | {ratio:.2f} | {loaded:.2f} | {predicted:.2f} |", flush=True)


def in_own_process(function: Callable[..., Any], *arguments: Any) -> Any:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def measure(folder: Path, own: Path) -> tuple[tuple[float, float, float, float], np.ndarray]:
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
    model = AutoModel.from_pretrained(folder)
    load = time.perf_counter() - start
    loaded = peak_memory(cpu)
    observation = synthetic_observation(model.config)
    actions = model.predict_action(**processor(**observation), unnorm_key=next(iter(model.config.norm_stats)))
    predicted = peak_memory(cpu)
    size = weight_bytes(model)
    figures = load, load / seconds_to_read(weights), (loaded - before) / size, (predicted - before) / size
    return figures, np.asarray(actions)


def write_published(drawn: Path, folder: Path) -> None:
    """The weights of a checkpoint in our layout as the published layout stores them.

    Ours leaves out the last block of the vision towers, which is not used. Here it is a copy of the first.
    """
    folder.mkdir()
    config = AutoConfig.from_pretrained(drawn)
    tensors: dict[str, dict[str, torch.Tensor]] = {"model": {}, "action_head": {}, "proprio_projector": {}}
    with safe_open(drawn / "model.safetensors", "pt") as stored:
        state_dict = {name: stored.get_tensor(name) for name in stored.keys()}
    for tower in TOWERS:
        part = {name.removeprefix(f"{tower}."): state_dict.pop(name) for name in [*state_dict] if tower in name}
        tensors["model"] |= published_tower(tower, part)
    for name, tensor in state_dict.items():
        part, _, rest = name.partition(".")
        if part == "policy":
            names = {own_name: name for name, own_name in published_names.POLICY_NAMES.items()}
            tensors["action_head"][f"module.model.{published_names.renamed(rest, names)}"] = tensor
        elif part == "proprio_projector":
            tensors["proprio_projector"][f"module.{rest}"] = tensor
        else:
            prefixes = {"vision_projector": "projector", "language_model": "language_model.model"}
            tensors["model"][f"{prefixes.get(part, part)}.{rest}"] = tensor
    save_file(tensors.pop("model"), folder / "model.safetensors", metadata={"format": "pt"})
    for kind, part in tensors.items():
        torch.save(OrderedDict(part), folder / f"{kind}--checkpoint.pt")
    entries = {
        "model_type": "openvla",
        "llm_backbone_id": "qwen25-0_5b-extra",
        "timm_model_ids": list(TIMM_HEADS),
        "text_config": {**config.text_config.to_dict(), "model_type": "qwen2"},
        "torch_dtype": str(config.dtype).removeprefix("torch."),
    }
    (folder / "config.json").write_text(json.dumps(entries, default=str), encoding="utf-8")
    (folder / "dataset_statistics.json").write_text(json.dumps(config.norm_stats), encoding="utf-8")


def write_own(drawn: Path, published: Path, own: Path) -> None:
    AutoModel.from_pretrained(published).save_pretrained(own)
    AutoProcessor.from_pretrained(drawn).save_pretrained(own)


def published_tower(tower: str, part: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    prefix, names, qkv = TOWERS[tower]
    names = {own_name: name for name, own_name in names.items()}
    part = dict(part)
    part.pop("embeddings.mask_token", None)
    blocks = 1 + max(int(number) for name in part for number in re.findall(r"\.layers?\.(\d+)\.", name))
    result = {}
    for block in range(blocks):
        for kind in ("weight", "bias"):
            rows = [part.pop(f"{qkv.format(block, one)}.{kind}") for one in "qkv"]
            result[f"{prefix}blocks.{block}.attn.qkv.{kind}"] = torch.cat(rows)
    for name, tensor in part.items():
        published = published_names.renamed(name, names)
        if published == "pos_embed":
            tensor = tensor[:, 1:].contiguous() if tower == "dinov2" else tensor[None]
        result[f"{prefix}{published}"] = tensor
    first = f"{prefix}blocks.0."
    last = {name.replace(first, f"{prefix}blocks.{blocks}."): one for name, one in result.items() if first in name}
    return result | {name: tensor.clone() for name, tensor in last.items()}


if __name__ == "__main__":
    main()
