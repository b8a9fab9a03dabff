"""The quicker attention for a model in bfloat16 on a CPU, measured once.

Over the few hundred tokens of a vision tower, plain attention is often quicker in bfloat16 than torch's kernel.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention, softmax
from transformers.utils import logging


logger = logging.get_logger(__name__)

TOWERS = ("dinov2_config", "siglip_config")
ROUNDS = 5
# Plain attention must be quicker by this much, so that chance does not decide.
CLEARLY = 0.95


def choose_attention(model: Any) -> dict[str, str]:
    """Let the vision towers of a model use plain attention where that is quicker on this machine.

    Nothing is changed unless the model computes with bfloat16 on a CPU and with `"sdpa"`, the default. Do not call it
    where the user has chosen `"sdpa"`. Actions stay within the error of bfloat16.

    Args:
        model: a [`VLAAdapterForActionPrediction`]; exported checkpoints are left as they are.

    Returns:
        `dict`: the implementation by part, for those that were changed.
    """
    if not isinstance(model, torch.nn.Module) or model.dtype != torch.bfloat16 or model.device.type != "cpu":
        return {}
    config, chosen = model.config, {}
    if getattr(config, "quantization_config", None) is not None:
        return {}
    for part in TOWERS:
        tower = getattr(config, part)
        tokens = (tower.image_size // tower.patch_size) ** 2 + 1 + getattr(tower, "num_register_tokens", -1)
        heads = tower.num_attention_heads
        shape = (config.num_cameras, heads, tokens, tower.hidden_size // heads)
        if tower._attn_implementation == "sdpa" and plain_is_quicker(shape, torch.get_num_threads()):
            chosen[part] = "eager"
    if chosen:
        model.set_attn_implementation(chosen)
        parts = " and ".join(part.removesuffix("_config") for part in chosen)
        logger.warning_once(
            f"Attention of {parts}: eager, measured to be quicker here in bfloat16 than torch's kernel. To choose it "
            "yourself, give attn_implementation (--attn), such as sdpa."
        )
    return chosen


@cache
def plain_is_quicker(shape: tuple[int, int, int, int], threads: int) -> bool:
    """Whether plain attention takes clearly less time than torch's kernel, measured in turns.

    Args:
        shape (`tuple`): batch, heads, tokens and the width of a head.
        threads (`int`): of torch; measured once for each number of them.
    """
    query, key, value = (torch.randn(shape, dtype=torch.bfloat16) for _ in range(3))

    def plain() -> torch.Tensor:
        weights = query @ key.transpose(2, 3) * shape[-1] ** -0.5
        return softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype) @ value

    def kernel() -> torch.Tensor:
        return scaled_dot_product_attention(query, key, value)

    seconds: dict[Callable[[], torch.Tensor], list[float]] = {plain: [], kernel: []}
    with torch.no_grad():
        for attend in (plain, kernel) * (ROUNDS + 1):
            start = time.perf_counter()
            attend()
            seconds[attend].append(time.perf_counter() - start)
    # The first round warms up.
    return min(seconds[plain][1:]) < CLEARLY * min(seconds[kernel][1:])
