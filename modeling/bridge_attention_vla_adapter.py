"""The policy: Bridge Attention blocks, from the states of a language model to a chunk of actions (paper, §3.3)."""

from collections.abc import Callable

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_vla_adapter import VLAAdapterConfig


# PyTorch's default. (Towers and language model use 1e-6.)
LAYER_NORM_EPS = 1e-5


def rotary_tables(
    length: int, head_dim: int, theta: float, table_dtype: torch.dtype, device: torch.device | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines for positions `0 ... length - 1`, each `(length, head_dim)`, in `table_dtype`.

    The published weights were trained inside a bfloat16 module and depend on its rounding: frequencies, positions and
    **the product of the two** are rounded to bfloat16 before cosine and sine are taken. Only 385 of 512 positions are
    distinct, and one rounding less changes the tables by up to 0.9. The layout `cat(freqs, freqs)` does not match the
    adjacent pairs that [`rotate_adjacent`] turns. The weights were trained with that, too.
    """
    exponents = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim
    frequencies = (1.0 / theta**exponents).to(table_dtype)
    positions = torch.arange(length, device=device, dtype=torch.float32).to(table_dtype)
    angles = positions[:, None] * frequencies[None, :]
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


class RotaryTables(nn.Module):
    """The tables of [`rotary_tables`] for the longest of the policy's sources, stored as bits.

    Stored as numbers they would change when the model is cast to another precision. Computed in every forward pass
    they would change under `torch.compile`, which skips the rounding between steps: by up to 1.2 at 512 positions.
    """

    def __init__(self, config: VLAAdapterConfig):
        super().__init__()
        self.config = config
        self.dtype = getattr(torch, config.policy_rope_dtype)
        self.register_buffer("bits", self.make_bits(), persistent=False)

    def make_bits(self, device: torch.device | str | None = None) -> torch.Tensor:
        config = self.config
        action_tokens = config.num_patch_tokens + config.num_action_queries - config.num_task_tokens
        tables = rotary_tables(
            max(config.chunk_size, config.num_task_tokens, action_tokens + 1),
            config.text_config.hidden_size // config.policy_num_heads,
            config.policy_rope_theta,
            self.dtype,
            device,
        )
        # int32, because DDP sends buffers to all processes at its start and neither gloo nor NCCL can send int16.
        return torch.stack(tables).view(torch.int32)

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = self.bits.view(self.dtype)
        return cos, sin


def rotate_adjacent(states: torch.Tensor) -> torch.Tensor:
    """Channels `(x[2j], x[2j + 1])` become `(-x[2j + 1], x[2j])`."""
    even, odd = states[..., 0::2], states[..., 1::2]
    return torch.stack((-odd, even), dim=-1).flatten(-2)


def apply_rotary(states: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Rotate `(batch, heads, length, head_dim)` by its positions. Every source counts its positions from 0."""
    length = states.shape[-2]
    cos, sin = (table[:length].to(states.dtype) for table in tables)
    return states * cos + rotate_adjacent(states) * sin


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    attention = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        attention = attention + attention_mask
    attention = nn.functional.softmax(attention, dim=-1, dtype=torch.float32).to(query.dtype)
    attention = nn.functional.dropout(attention, p=dropout, training=module.training)
    return torch.matmul(attention, value).transpose(1, 2).contiguous(), attention


class PolicyLinear(nn.Linear):
    """A linear layer with PyTorch's own initialisation, as in the original policy.

    It is a class of its own so that `_init_weights` can recognise it: in models outside the library, transformers does
    not call `_init_weights` for modules whose parameters all belong to their children.
    """


class BridgeAttention(nn.Module):
    """Attention with one softmax over three sources: the latent itself, the adapter tokens and the task states.

    The adapter tokens are the action states, then the proprio token. The scores of the task states are multiplied by
    `tanh(gating_factor)`. This is done by multiplying their keys, so that any attention kernel can be used.
    """

    def __init__(self, config: VLAAdapterConfig):
        super().__init__()
        self.config = config
        width = config.text_config.hidden_size
        self.head_dim = width // config.policy_num_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        self.is_pro = config.policy_variant == "pro"

        self.q_proj = PolicyLinear(width, width)
        if self.is_pro:
            self.k_self, self.v_self = PolicyLinear(width, width), PolicyLinear(width, width)
            self.k_adapter, self.v_adapter = PolicyLinear(width, width), PolicyLinear(width, width)
            self.k_task, self.v_task = PolicyLinear(width, width), PolicyLinear(width, width)
        else:
            self.k_proj, self.v_proj = PolicyLinear(width, width), PolicyLinear(width, width)
        self.o_proj = PolicyLinear(width, width)
        self.gating_factor = nn.Parameter(torch.zeros(1))

    def forward(
        self,
        latent: torch.Tensor,
        adapter_tokens: torch.Tensor,
        task_states: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor] | None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        gate = torch.tanh(self.gating_factor)
        query = self._split_heads(self.q_proj(latent))  # (batch, heads, chunk, head_dim)
        if self.is_pro:
            query = apply_rotary(query, rotary)
            keys = [
                apply_rotary(self._split_heads(projection(source)), rotary)
                for projection, source in (
                    (self.k_self, latent),
                    (self.k_adapter, adapter_tokens),
                    (self.k_task, task_states),
                )
            ]
            keys[2] = keys[2] * gate
            key = torch.cat(keys, dim=2)
            values = [self.v_self(latent), self.v_adapter(adapter_tokens), self.v_task(task_states)]
            value = self._split_heads(torch.cat(values, dim=1))
        else:
            sources = torch.cat((latent, adapter_tokens, task_states), dim=1)
            key, value = self.k_proj(sources), self._split_heads(self.v_proj(sources))
            ungated = latent.shape[1] + adapter_tokens.shape[1]
            key = self._split_heads(torch.cat((key[:, :ungated], key[:, ungated:] * gate), dim=1))

        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        mixed, attention = attention_interface(
            self, query, key, value, None, dropout=0.0, scaling=self.scaling, is_causal=False, **kwargs
        )
        mixed = mixed.flatten(2)  # (batch, chunk, hidden)
        return self.o_proj(mixed), attention

    def _split_heads(self, states: torch.Tensor) -> torch.Tensor:
        return states.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class BridgeAttentionBlock(GradientCheckpointingLayer):
    """`relu(fc(norm(attention(x, ...) + x)))`: the block ends in a ReLU and has no second residual connection."""

    def __init__(self, config: VLAAdapterConfig):
        super().__init__()
        width = config.text_config.hidden_size
        self.attention = BridgeAttention(config)
        self.norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.fc = PolicyLinear(width, width)

    def forward(
        self,
        latent: torch.Tensor,
        adapter_tokens: torch.Tensor,
        task_states: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor] | None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        mixed, attention = self.attention(latent, adapter_tokens, task_states, rotary, **kwargs)
        return nn.functional.relu(self.fc(self.norm(mixed + latent))), attention


class BridgeAttentionPolicy(nn.Module):
    """From the states of every language model layer and the proprio token to a chunk of normalised actions.

    At inference the latent starts from exactly zero, as in the published code. The original variant has no positions,
    so all its actions of a chunk are the same.
    """

    def __init__(self, config: VLAAdapterConfig):
        super().__init__()
        self.config = config
        width = config.text_config.hidden_size
        self.latent_size = config.action_dim * width
        self.norm_in = nn.LayerNorm(self.latent_size, eps=LAYER_NORM_EPS)
        self.fc_in = PolicyLinear(self.latent_size, width)
        self.rotary = RotaryTables(config) if config.policy_variant == "pro" else None
        self.blocks = nn.ModuleList([BridgeAttentionBlock(config) for _ in range(config.policy_num_layers)])
        self.norm_out = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.fc_out = PolicyLinear(width, config.action_dim)

    def forward(
        self,
        task_states: list[torch.Tensor],
        action_states: list[torch.Tensor],
        proprio_token: torch.Tensor,
        **kwargs,
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...], tuple[torch.Tensor | None, ...]]:
        """
        Args:
            task_states (`list[torch.Tensor]`): per block `(batch, task tokens, hidden)`.
            action_states (`list[torch.Tensor]`): per block `(batch, action tokens, hidden)`; may have no tokens.
            proprio_token (`torch.Tensor`): `(batch, 1, hidden)`.

        Returns:
            `tuple`: actions `(batch, chunk, action_dim)`; the latent before the first block and after each,
            `(batch, chunk, hidden)`; each block's attention `(batch, heads, chunk, sources)` or `None`.
        """
        batch_size = proprio_token.shape[0]
        latent = self._first_latent(proprio_token).expand(batch_size, -1, -1)
        rotary = None if self.rotary is None else self.rotary()
        latents, attentions = (latent,), ()
        for block, task, action in zip(self.blocks, task_states, action_states, strict=True):
            adapter_tokens = torch.cat((action.to(proprio_token.device), proprio_token), dim=1)
            latent, attention = block(latent, adapter_tokens, task, rotary, **kwargs)
            latents += (latent,)
            attentions += (attention,)
        return self.fc_out(self.norm_out(latent)), latents, attentions

    def _first_latent(self, like: torch.Tensor) -> torch.Tensor:
        """`(1, chunk, hidden)`, the same for all rows of a batch."""
        shape = (1, self.config.chunk_size, self.latent_size)
        latent = torch.zeros(shape, dtype=like.dtype, device=like.device)
        if self.training and self.config.policy_noise_std > 0:
            # One draw for the whole batch, as in the original. The norm scales it up to about unit variance.
            latent = torch.randn(shape, dtype=like.dtype, device=like.device) * self.config.policy_noise_std
        return nn.functional.relu(self.fc_in(self.norm_in(latent)))


class ProprioProjector(nn.Module):
    """The normalised state as one token: `(batch, proprio_dim)` to `(batch, 1, hidden)`."""

    def __init__(self, config: VLAAdapterConfig):
        super().__init__()
        width = config.text_config.hidden_size
        self.fc1 = PolicyLinear(config.proprio_dim, width)
        self.fc2 = PolicyLinear(width, width)

    def forward(self, proprio: torch.Tensor) -> torch.Tensor:
        return self.fc2(nn.functional.gelu(self.fc1(proprio)))[:, None, :]


__all__ = ["BridgeAttentionPolicy", "PolicyLinear", "ProprioProjector", "RotaryTables"]
