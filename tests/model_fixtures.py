"""Models, checkpoints and inputs that tests share. The fixtures made of them are in `conftest.py`.

`fixtures/published_checkpoints.npz` holds two small checkpoints in the published layout, `pro` and `original`, with
which the numbers in `fixtures/goldens.npz` were computed by the original's own code. Their weights are random and the
towers, the language model, the tokenizer and the statistics are common to both. It has
* `file/<name>`: the text files of a folder;
* `listing`: names and shapes of all tensors per file, and whether they are `kept`, `drawn` or `rows`;
* `model`, `action_head_pro`, `action_head_original`, `proprio_projector`: the bytes of the `kept` tensors' float32
  values, one row per byte of the four (that compresses better), and of the token embeddings (`rows`) those rows whose
  numbers are in `rows`, which are the golden prompt's.
What has no effect on the goldens (`drawn`: each tower's last block, final norms, pooling head, the FiLM layers; the
other tokens) is not stored but drawn, so that a folder has all the tensors that a published one has.
"""

import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from vla_adapter_hf import VLAAdapterConfig, VLAAdapterForActionPrediction


FIXTURES = Path(__file__).parent / "fixtures"
UNNORM_KEY = "libero_object_no_noops"


def write_published(folder: Path, variant: str) -> Path:
    """Write the small checkpoint `"pro"` or `"original"` in the published layout."""
    folder.mkdir(parents=True, exist_ok=True)
    with np.load(FIXTURES / "published_checkpoints.npz") as arrays:
        for name in arrays.files:
            if name.startswith("file/"):
                (folder / name.removeprefix("file/")).write_text(str(arrays[name]), encoding="utf-8")
        tensors = {
            part: _tensors(arrays[part], listing, arrays["rows"])
            for part, listing in json.loads(str(arrays["listing"])).items()
            if part in ("model", "proprio_projector", f"action_head_{variant}")
        }
    save_file(tensors["model"], folder / "model.safetensors", metadata={"format": "pt"})
    for kind, part in (("action_head", f"action_head_{variant}"), ("proprio_projector", "proprio_projector")):
        state_dict = OrderedDict((f"module.{name}", tensor) for name, tensor in tensors[part].items())
        torch.save(state_dict, folder / f"{kind}--checkpoint.pt")
    return folder


def write_published_calvin(folder: Path) -> Path:
    """Write the small Pro checkpoint as CALVIN-ABC-Pro is published: its statistics have CALVIN's name and gripper."""
    write_published(folder, "pro")
    stats = norm_stats(key="calvin_abc_rlds")["calvin_abc_rlds"]
    for part, low, high in (("action", 0.0, 1.0), ("proprio", -1.0, 1.0)):
        for name, value in {"min": low, "q01": low, "max": high, "q99": high}.items():
            stats[part][name][-1] = value
    content = {"calvin_abc_rlds": {**stats, "num_transitions": 1_000_000, "num_trajectories": 17_870}}
    (folder / "dataset_statistics.json").write_text(json.dumps(content))
    return folder


def _tensors(stored: np.ndarray, listing: list, rows: np.ndarray) -> dict[str, torch.Tensor]:
    values = np.ascontiguousarray(stored.T).view("<f4")[:, 0]
    generator = np.random.default_rng(0)
    tensors, start = {}, 0
    for name, shape, kind in listing:
        if kind == "kept":
            stop = start + int(np.prod(shape))
            array = values[start:stop].reshape(shape)
        else:
            array = generator.normal(0, 0.1, shape).astype(np.float32)
            stop = start
        if kind == "rows":
            stop = start + len(rows) * shape[1]
            array[rows] = values[start:stop].reshape(len(rows), -1)
        tensors[name], start = torch.from_numpy(array.copy()), stop
    assert start == len(values)
    return tensors


def norm_stats(action_dim: int = 7, proprio_dim: int = 8, key: str = UNNORM_KEY) -> dict[str, Any]:
    """One set of statistics in which every dimension moves and the last action dimension is a gripper."""

    def part(dims: int) -> dict[str, list]:
        low = np.linspace(-1.0, -0.2, dims)
        high = np.linspace(0.3, 1.5, dims)
        values = {"min": low - 0.1, "max": high + 0.1, "q01": low, "q99": high}
        values |= {"mean": (low + high) / 2, "std": (high - low) / 4}
        return {name: value.tolist() for name, value in values.items()}

    return {
        key: {
            "action": {**part(action_dim), "mask": [True] * (action_dim - 1) + [False]},
            "proprio": part(proprio_dim),
        }
    }


def tiny_config(**overrides: Any) -> VLAAdapterConfig:
    """A model of 0.1 M parameters: two cameras of four patches, two layers everywhere, six action queries.

    Its vocabulary is that of the small published checkpoints, so their processor serves.
    """
    towers = {"num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 28, "patch_size": 14}
    fields = {
        "dinov2_config": {
            "hidden_size": 32,
            "mlp_ratio": 2,
            "num_register_tokens": 4,
            "layer_norm_eps": 1e-6,
            **towers,
        },
        "siglip_config": {"hidden_size": 48, "intermediate_size": 64, "vision_use_head": False, **towers},
        "text_config": {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 64,
            "vocab_size": 1024,
            "tie_word_embeddings": True,
        },
        "num_action_queries": 6,
        "chunk_size": 4,
        "policy_num_layers": 2,
        "policy_num_heads": 4,
        "norm_stats": norm_stats(),
        **overrides,
    }
    fields["siglip_config"] = {"hidden_act": "gelu", **fields["siglip_config"]}
    return VLAAdapterConfig(**fields)


def learner_config(**overrides: Any) -> VLAAdapterConfig:
    """A model of 2 M parameters that can learn a few episodes by heart in minutes: 128 wide, no noise in training."""
    towers = {"num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 28, "patch_size": 14}
    fields = {
        "dinov2_config": {"hidden_size": 128, "mlp_ratio": 2, "num_register_tokens": 4, **towers},
        "siglip_config": {"hidden_size": 128, "intermediate_size": 256, "vision_use_head": False, **towers},
        "text_config": {
            "hidden_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 256,
            "vocab_size": 1024,
        },
        "num_action_queries": 8,
        "policy_rope_dtype": "float32",
        "policy_noise_std": 0.0,
        "image_center_crop": None,
    }
    return tiny_config(**{**fields, **overrides})


def tiny_model(
    config: VLAAdapterConfig | None = None, seed: int = 0, **overrides: Any
) -> VLAAdapterForActionPrediction:
    """A tiny model in evaluation mode whose weights are large enough for every input to show in the actions."""
    model = VLAAdapterForActionPrediction(tiny_config(**overrides) if config is None else config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("gating_factor"):
                parameter.fill_(0.7)
            elif "norm" in name and name.endswith("weight") or "layer_scale" in name:
                parameter.copy_(1 + 0.1 * noise)
            elif parameter.ndim > 1:
                parameter.copy_(noise * parameter[0].numel() ** -0.5)
            else:
                parameter.copy_(0.1 * noise)
    return model.eval()


def tiny_inputs(
    config: VLAAdapterConfig, batch_size: int = 2, prompt_length: int = 9, seed: int = 0
) -> dict[str, Any]:
    """Random inputs of `forward`, without actions."""
    generator = torch.Generator().manual_seed(seed)
    size = (batch_size, 6 * config.num_cameras, config.image_size, config.image_size)
    return {
        "input_ids": torch.randint(0, config.text_config.vocab_size, (batch_size, prompt_length), generator=generator),
        "attention_mask": torch.ones(batch_size, prompt_length, dtype=torch.long),
        "pixel_values": torch.randn(size, generator=generator),
        "proprio": torch.rand(batch_size, config.proprio_dim, generator=generator) * 2 - 1,
    }
