"""A kernel in the place of flash-attn's, for machines without a GPU: the way through transformers' flash attention.

The kernels themselves are only on CUDA. What leads to them (which of them is called, with which lengths, without
looking at values) is the same code with this one.
"""

from typing import Any

import torch
from torch import nn
from transformers import modeling_flash_attention_utils as flash


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, softmax_scale: float) -> torch.Tensor:
    """`(batch, length, heads, head_dim)`, as flash-attn."""
    q, k, v = (states.transpose(1, 2) for states in (q, k, v))
    mixed = nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=causal, scale=softmax_scale, enable_gqa=k.shape[1] != q.shape[1]
    )
    return mixed.transpose(1, 2)


def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
) -> torch.Tensor:
    return attend(q, k, v, causal, softmax_scale)


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
) -> torch.Tensor:
    """Sequences of one length, one after the other."""
    assert len(cu_seqlens_q) - 1 == q.shape[0] / max_seqlen_q and cu_seqlens_q.dtype == torch.int32
    assert max_seqlen_q == max_seqlen_k and len(cu_seqlens_k) == len(cu_seqlens_q)
    q, k, v = (states.unflatten(0, (-1, max_seqlen_q)) for states in (q, k, v))
    return attend(q, k, v, causal, softmax_scale).flatten(0, 1)


def use_flash_kernel(model: Any, monkeypatch: Any) -> None:
    """Let `model` attend by transformers' `flash_attention_2` with the kernels above."""
    kernels = (flash_attn_func, flash_attn_varlen_func, None, None, None)
    monkeypatch.setattr(flash, "_lazy_imports", lambda *args, **kwargs: kernels)
    monkeypatch.setattr(flash, "_loaded_implementation", None)
    for config in (model.config, *(getattr(model.config, name) for name in model.config.sub_configs)):
        config._attn_implementation = "flash_attention_2"
