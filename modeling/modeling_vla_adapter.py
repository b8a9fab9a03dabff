"""VLA-Adapter as a transformers model (arXiv 2509.09372): frames, an instruction and a state to a chunk of actions."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, PreTrainedModel
from transformers import initialization as init
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput, can_return_tuple

from .bridge_attention_vla_adapter import (
    BridgeAttention,
    BridgeAttentionPolicy,
    PolicyLinear,
    ProprioProjector,
    RotaryTables,
)

# Older releases of transformers copy only the files that this one imports itself, so it names them all.
from .checkpoint_names_vla_adapter import name_in_file  # noqa: F401
from .configuration_vla_adapter import VLAAdapterConfig
from .inference_vla_adapter import ActionPredictionMixin
from .inputs_vla_adapter import IGNORED, check_images, check_normalized, check_observation, check_preparation
from .loading_vla_adapter import CheckpointMixin, rename_to_installed
from .normalization_vla_adapter import normalize  # noqa: F401


try:
    from transformers.utils.output_capturing import maybe_install_capturing_hooks
except ImportError:  # it is not public and may disappear

    def maybe_install_capturing_hooks(model: PreTrainedModel) -> None: ...


@dataclass
class VLAAdapterOutput(ModelOutput):
    r"""
    What [`VLAAdapterForActionPrediction.forward`] returns.

    Args:
        loss (`torch.Tensor` of shape `()`, *optional*, returned when `actions` are given):
            Mean absolute error against the given actions, in normalised space, float32.
        actions (`torch.Tensor` of shape `(batch, chunk_size, action_dim)`):
            Predicted actions in normalised space.
        hidden_states (`tuple[torch.Tensor]`, *optional*, with `output_hidden_states=True`):
            Hidden states of the language model: the input embeddings, then one per layer, the last after the final
            norm, each `(batch, prompt + patches + action queries, hidden)`. Padding comes last in every row.
        attentions (`tuple[torch.Tensor]`, *optional*, with `output_attentions=True` and eager attention):
            Attention weights of the language model, one per layer, `(batch, heads, sequence, sequence)`.
        policy_hidden_states (`tuple[torch.Tensor]`, *optional*, with `output_hidden_states=True`):
            The policy's latent before the first block and after each, `(batch, chunk_size, hidden)`.
        policy_attentions (`tuple[torch.Tensor]`, *optional*, with `output_attentions=True` and eager attention):
            Attention weights of the policy, one per block, `(batch, heads, chunk_size, sources)`. The sources are the
            latent, the action states, the proprio token and the task states, in this order.
    """

    loss: torch.Tensor | None = None
    actions: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    policy_hidden_states: tuple[torch.Tensor, ...] | None = None
    policy_attentions: tuple[torch.Tensor, ...] | None = None


def mask_maker(create: Callable[..., Any]) -> Callable[..., Any]:
    """`create` with all arguments that it requires set to `None`, except `config` and `inputs_embeds`.

    Releases of transformers differ in what they require here; nothing else is passed.
    """
    parameters = inspect.signature(create).parameters.values()
    required = [parameter.name for parameter in parameters if parameter.default is parameter.empty]
    return partial(create, **dict.fromkeys(name for name in required if name not in ("config", "inputs_embeds")))


# By the type of a layer of the language model.
MASK_MAKERS = {
    "full_attention": mask_maker(create_causal_mask),
    "sliding_attention": mask_maker(create_sliding_window_causal_mask),
}


class VisionProjector(nn.Module):
    """Projects the patch features of both towers, concatenated, to the width of the language model."""

    def __init__(self, config: VLAAdapterConfig):
        super().__init__()
        features = config.dinov2_config.hidden_size + config.siglip_config.hidden_size
        width = config.text_config.hidden_size
        self.fc1 = nn.Linear(features, 4 * features)
        self.fc2 = nn.Linear(4 * features, width)
        self.fc3 = nn.Linear(width, width)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        hidden = nn.functional.gelu(self.fc1(features))
        return self.fc3(nn.functional.gelu(self.fc2(hidden)))


class VLAAdapterPreTrainedModel(CheckpointMixin, PreTrainedModel):
    config_class = VLAAdapterConfig
    config: VLAAdapterConfig
    base_model_prefix = ""  # no part of the model is a model with a head of its own
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["BridgeAttentionBlock"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, PolicyLinear):
            bound = module.in_features**-0.5
            init.uniform_(module.weight, -bound, bound)
            init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, BridgeAttention):
            init.zeros_(module.gating_factor)
        elif isinstance(module, RotaryTables):
            # Computed on the CPU, because another device may round differently.
            init.copy_(module.bits, module.make_bits("cpu"))
        else:
            super()._init_weights(module)


class VLAAdapterForActionPrediction(ActionPredictionMixin, VLAAdapterPreTrainedModel):
    """Two vision towers, a language model that reads prompt, patches and action queries, and a policy.

    [`forward`] works in normalised space and is for training. [`predict_action`] works in physical units.
    """

    # The loss is a mean over a batch; the Trainer must not divide it by a number of tokens.
    accepts_loss_kwargs = False

    def __init__(self, config: VLAAdapterConfig):
        super().__init__(config)
        config.validate_architecture()
        self.dinov2 = AutoModel.from_config(config.dinov2_config)
        self.siglip = AutoModel.from_config(config.siglip_config)
        # The features are the states before the final norm. Without the norm, they are `last_hidden_state`.
        self.dinov2.layernorm = nn.Identity()
        getattr(self.siglip, "vision_model", self.siglip).post_layernorm = nn.Identity()
        # It is used in masked pretraining only. Distributed training fails on a parameter that gets no gradient.
        self.dinov2.embeddings.mask_token.requires_grad_(False)
        self.vision_projector = VisionProjector(config)
        self.language_model = AutoModel.from_config(config.text_config)
        # Otherwise the first forward pass installs them, which torch.compile cannot trace.
        maybe_install_capturing_hooks(self.language_model)
        self.action_queries = nn.Embedding(config.num_action_queries, config.text_config.hidden_size)
        self.proprio_projector = ProprioProjector(config)
        self.policy = BridgeAttentionPolicy(config)
        self.register_load_state_dict_pre_hook(rename_to_installed)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    @can_return_tuple
    def get_image_features(self, pixel_values: torch.Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """Patch features of all cameras, from both towers and projected for the language model.

        Args:
            pixel_values (`torch.Tensor`): `(batch, 6 * cameras, height, width)`. Per camera three channels that are
                normalised for DINOv2, then three for SigLIP.
            kwargs: for the towers, e.g. `output_hidden_states`, `output_attentions`.

        Returns:
            `BaseModelOutputWithPooling`: `last_hidden_state` `(batch, cameras * patches, both widths)`, cameras in
            order. `pooler_output` `(batch, cameras * patches, hidden)`: the same, projected to the language model's
            width. On request `hidden_states` and `attentions` of `batch * cameras` frames, DINOv2's and then SigLIP's.

        Raises:
            ValueError: when `pixel_values` has another shape.
        """
        config = self.config
        check_images(config, pixel_values)
        frames = pixel_values.unflatten(1, (config.num_cameras, 6)).flatten(0, 1)  # (batch * cameras, 6, h, w)
        dinov2 = self.dinov2(frames[:, :3], return_dict=True, **kwargs)
        siglip = self.siglip(frames[:, 3:], return_dict=True, **kwargs)
        prefix_tokens = 1 + config.dinov2_config.num_register_tokens
        features = dinov2.last_hidden_state[:, prefix_tokens:].to(siglip.last_hidden_state.device)
        features = torch.cat((features, siglip.last_hidden_state), dim=-1)
        features = features.unflatten(0, (-1, config.num_cameras)).flatten(1, 2)  # (batch, cameras * patches, widths)
        return BaseModelOutputWithPooling(
            last_hidden_state=features,
            pooler_output=self.vision_projector(features),
            hidden_states=dinov2.hidden_states and dinov2.hidden_states + siglip.hidden_states,
            attentions=dinov2.attentions and dinov2.attentions + siglip.attentions,
        )

    def embed_inputs(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, patches: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The language model's input: `[t0] [patches] [t1 ...] [action queries]`, then the padding.

        `t0` is the first real token of a row, whether the row was padded left or right. Because padding comes last,
        causal attention never reaches it and positions count real tokens only. So neither a mask nor position ids are
        needed, and every row of a batch gets the actions that it gets alone.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: embeddings `(batch, prompt + patches + queries, hidden)`, and the
            position of each row's first action query `(batch,)`.
        """
        batch_size = input_ids.shape[0]
        num_patches, num_queries = patches.shape[1], self.config.num_action_queries
        tokens = self.get_input_embeddings()(input_ids)
        # A device map may place the parts on several devices, and leave weights on the disk until their module runs.
        device = tokens.device
        queries = self.action_queries(torch.arange(num_queries, device=device)).to(device)
        queries = queries.to(tokens.dtype).expand(batch_size, -1, -1)
        sources = torch.cat((tokens, patches.to(device).to(tokens.dtype), queries), dim=1)

        # Every source has a position of its own. A scatter needs no stable sort, which export to ONNX does not know.
        real = torch.ones_like(input_ids) if attention_mask is None else (attention_mask != 0).long()
        real = real.to(device)
        num_real = real.sum(dim=1, keepdim=True)
        rank, padding_rank = real.cumsum(dim=1) - 1, (1 - real).cumsum(dim=1) - 1  # within a row
        token_positions = torch.where(rank > 0, rank + num_patches, 0)
        padding_positions = num_patches + num_real + num_queries + padding_rank
        token_positions = torch.where(real.bool(), token_positions, padding_positions)
        patch_positions = (1 + torch.arange(num_patches, device=device)).expand(batch_size, -1)
        query_positions = num_patches + num_real + torch.arange(num_queries, device=device)
        positions = torch.cat((token_positions, patch_positions, query_positions), dim=1)
        embeddings = torch.zeros_like(sources).scatter(1, positions[..., None].expand_as(sources), sources)
        return embeddings, num_patches + num_real[:, 0]

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        proprio: torch.Tensor | None = None,
        actions: torch.Tensor | None = None,
        action_is_pad: torch.Tensor | None = None,
        output_hidden_states: bool | int | list[int] | None = None,
        output_attentions: bool | None = None,
        preparation: str | list[str] | None = None,
        **kwargs: Any,
    ) -> VLAAdapterOutput:
        r"""
        Predict a chunk of actions in normalised space, and the loss when the true ones are given.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch, prompt)`):
                The prompt.
            attention_mask (`torch.Tensor` of shape `(batch, prompt)`, *optional*):
                1 for real tokens, 0 for padding, on either side.
            pixel_values (`torch.Tensor` of shape `(batch, 6 * cameras, height, width)`):
                Prepared images, see [`get_image_features`].
            proprio (`torch.Tensor` of shape `(batch, proprio_dim)`):
                The **normalised** state. A raw `state` is for [`predict_action`] only.
            actions (`torch.Tensor` of shape `(batch, chunk_size, action_dim)`, *optional*):
                True actions in normalised space.
            action_is_pad (`torch.BoolTensor` of shape `(batch, chunk_size)`, *optional*):
                Steps past the end of an episode. They do not count in the loss.
            output_hidden_states (`bool`, `int` or `list[int]`, *optional*):
                Whether to return hidden states, or the indices of those to return. The others are `None`.
            preparation (`str` or `list[str]`, *optional*):
                How the processor prepared the inputs; compared with the model's configuration.
            kwargs: what transformers, its Trainer and the collator pass to every model (`IGNORED`). It has no effect.

        Raises:
            TypeError: for any other argument, such as one that is misspelt, and for values that are not tensors.
            ValueError: for a tensor of the wrong shape, or inputs that a processor with other settings prepared.
        """
        if kwargs.pop("state", None) is not None:
            raise TypeError(
                "forward works in normalised space and takes `proprio`, the normalised state; a raw `state` belongs "
                "to predict_action, which normalises it."
            )
        unknown = sorted(name for name in kwargs if name not in IGNORED)
        if unknown:
            raise TypeError(f"forward has no argument {', '.join(unknown)}; the true actions are called `actions`.")
        config = self.config
        check_observation(config, input_ids, attention_mask, pixel_values)
        check_preparation(config, preparation)
        check_normalized(config, input_ids.shape[0], proprio, actions, action_is_pad)
        output_hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        output_attentions = config.output_attentions if output_attentions is None else output_attentions

        # 1. Look: patches of all cameras.
        patches = self.get_image_features(pixel_values, return_dict=True).pooler_output

        # 2. Read: one causal pass over prompt, patches and action queries.
        embeddings, first_query = self.embed_inputs(input_ids, attention_mask, patches)
        states = self.language_model(
            inputs_embeds=embeddings,
            attention_mask=self._causal_masks(embeddings),
            use_cache=False,
            output_hidden_states=True,
            output_attentions=output_attentions,
            return_dict=True,
            **self._sequence_lengths(embeddings),
        )

        # 3. Act: block i of the policy reads layer i. The input embeddings are not used.
        task_states, action_states = self._policy_inputs(states.hidden_states[1:], patches.shape[1], first_query)
        proprio_token = self.proprio_projector(proprio.to(embeddings.dtype))
        predicted, latents, policy_attentions = self.policy(task_states, action_states, proprio_token)

        loss = None
        if actions is not None:
            loss = l1_loss(predicted.to(actions.device), actions, action_is_pad)
        return VLAAdapterOutput(
            loss=loss,
            actions=predicted,
            hidden_states=_select(states.hidden_states, output_hidden_states),
            attentions=states.attentions if output_attentions else None,
            policy_hidden_states=_select(latents, output_hidden_states),
            policy_attentions=policy_attentions if output_attentions else None,
        )

    def _causal_masks(self, embeddings: torch.Tensor) -> dict[str, Any]:
        """The mask of each type of layer in the language model. It is mostly `None`: attention is causal anyway.

        Without these the language model would search the positions for packed sequences. That waits for the device in
        every pass, and under `torch.compile` it leaves a mask that faster kernels refuse.
        """
        config = self.language_model.config
        layer_types = set(config.layer_types)
        return {
            layer_type: MASK_MAKERS[layer_type](config=config, inputs_embeds=embeddings) for layer_type in layer_types
        }

    def _sequence_lengths(self, embeddings: torch.Tensor) -> dict[str, Any]:
        """Where the sequences of a batch begin and end, for flash kernels; nothing for others.

        Without these the language model would search the positions for packed sequences in every layer. That waits
        for the device and cannot be compiled.
        """
        if "flash" not in (self.language_model.config._attn_implementation or ""):
            return {}
        batch_size, length = embeddings.shape[:2]
        ends = torch.arange(batch_size + 1, dtype=torch.int32, device=embeddings.device) * length
        return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": length, "max_length_k": length}

    def _policy_inputs(
        self, hidden_states: tuple[torch.Tensor, ...], num_patches: int, first_query: torch.Tensor
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """The task states and the action states of every layer.

        They are shifted left by one, as in next-token prediction. Task states are those of `t0` and of all patches
        except the last. Action states start one position before the first query and end before the last query.
        """
        config = self.config
        positions = first_query[:, None] - 1 + torch.arange(config.num_action_queries, device=first_query.device)
        task_states, action_states = [], []
        for states in hidden_states:
            task = states[:, :num_patches]
            action = states.gather(1, positions.to(states.device)[..., None].expand(-1, -1, states.shape[-1]))
            if config.num_task_tokens != num_patches:
                both = torch.cat((task, action), dim=1)
                task, action = both[:, : config.num_task_tokens], both[:, config.num_task_tokens :]
            task_states.append(task)
            action_states.append(action)
        return task_states, action_states


def l1_loss(predicted: torch.Tensor, actions: torch.Tensor, action_is_pad: torch.Tensor | None = None) -> torch.Tensor:
    """Mean absolute error over all real steps and dimensions, float32."""
    errors = (predicted.float() - actions.float()).abs()
    if action_is_pad is None:
        return errors.mean()
    real = (~action_is_pad.bool())[..., None].expand_as(errors)
    # An all-padded batch has no error; the minimum keeps it from being 0 / 0.
    return (errors * real).sum() / real.sum().clamp(min=1)


def _select(states: tuple[torch.Tensor, ...], wanted: bool | int | list[int] | None) -> tuple | None:
    if wanted is None or isinstance(wanted, bool):
        return states if wanted else None
    kept = {range(len(states))[index] for index in ([wanted] if isinstance(wanted, int) else wanted)}
    return tuple(state if index in kept else None for index, state in enumerate(states))


__all__ = ["VLAAdapterForActionPrediction", "VLAAdapterPreTrainedModel", "VLAAdapterOutput"]
