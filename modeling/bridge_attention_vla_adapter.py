"""The policy: Bridge Attention blocks that turn a language model's states into a chunk of actions (paper, §3.3)."""

from collections.abc import Callable

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_vla_adapter import VLAAdapterConfig


# PyTorch's default, and not the 1e-6 of the towers and the language model.
LAYER_NORM_EPS = 1e-5


def rotary_tables(
    length: int, head_dim: int, theta: float, table_dtype: torch.dtype, device: torch.device | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines for positions `0 ... length - 1`, each `(length, head_dim)`, in `table_dtype`.

    The published weights were trained inside a bfloat16 module, and it shows in their meaning: frequencies, positions
    and **the product of the two** were rounded to bfloat16 before cosine and sine were taken. Of 512 positions 385
    are distinct, and leaving out one rounding is wrong by as much as 0.9. The layout is `cat(freqs, freqs)`, which
    does not match the adjacent pairs that [`rotate_adjacent`] turns; that, too, is what the weights were trained with.
    """
    exponents = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim
    frequencies = (1.0 / theta**exponents).to(table_dtype)
    positions = torch.arange(length, device=device, dtype=torch.float32).to(table_dtype)
    angles = positions[:, None] * frequencies[None, :]
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


class RotaryTables(nn.Module):
    """The tables of [`rotary_tables`] for the longest of a policy's sources, kept as the bits of their numbers.

    Kept as numbers they would be spoilt by casting the model to another precision. Made anew in every pass they would
    be spoilt by `torch.compile`, which leaves out the roundings between the steps: at 512 positions by as much as 1.2.
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
        # Not int16, which neither gloo nor NCCL can send: at its start, DDP sends buffers to all processes.
        return torch.stack(tables).view(torch.int32)

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = self.bits.view(self.dtype)
        return cos, sin


def rotate_adjacent(states: torch.Tensor) -> torch.Tensor:
    """Channels `(x[2j], x[2j + 1])` become `(-x[2j + 1], x[2j])`."""
    even, odd = states[..., 0::2], states[..., 1::2]
    return torch.stack((-odd, even), dim=-1).flatten(-2)


def apply_rotary(states: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Turn `(batch, heads, length, head_dim)` by its positions, which every source counts from 0."""
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
    """A linear layer that starts from PyTorch's own initialisation, as the whole policy does in the original.

    A class of its own for `_init_weights` to know it by: in models outside the library, transformers passes over
    modules that have no parameters except their children's.
    """


class BridgeAttention(nn.Module):
    """One softmax over three sources: the latent itself, the adapter tokens and the task states.

    The adapter tokens are the action states with the proprio token behind them. The scores of the task states are
    multiplied by `tanh(gating_factor)`; that is done to their keys, so any attention kernel serves.
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
    """`x <- relu(fc(norm(attention(x, ...) + x)))`: the block ends in a ReLU and has no other residual."""

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
    """From the states of every language model layer, and the proprio token, to a chunk of normalised actions.

    At inference the latent starts from exactly zero: in the original variant, which knows no positions, all actions
    of a chunk are then the same. That is what the published code computes.
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
            adapter_tokens = torch.cat((action, proprio_token), dim=1)
            latent, attention = block(latent, adapter_tokens, task, rotary, **kwargs)
            latents += (latent,)
            attentions += (attention,)
        return self.fc_out(self.norm_out(latent)), latents, attentions

    def _first_latent(self, like: torch.Tensor) -> torch.Tensor:
        """`(1, chunk, hidden)`: it depends on nothing that differs within a batch."""
        shape = (1, self.config.chunk_size, self.latent_size)
        latent = torch.zeros(shape, dtype=like.dtype, device=like.device)
        if self.training and self.config.policy_noise_std > 0:
            # One draw for the whole batch, as in the original. The norm blows it up to about unit variance.
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
