"""`vla-adapter init --config`: a model of any size with random weights, to be trained from scratch.

A small model does not need the 150,000 tokens of Qwen2.5. Its vocabulary is made from its instructions. Other text is
written in bytes, which are always in the vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from vla_adapter_hf.checkpoints.backbones import load_tokenizer
from vla_adapter_hf.checkpoints.embedded import embedded_folder
from vla_adapter_hf.checkpoints.model_card import fill_model_card
from vla_adapter_hf.checkpoints.saving import check_destination, write_checkpoint
from vla_adapter_hf.checkpoints.source import check_source
from vla_adapter_hf.modeling.configuration_vla_adapter import VLAAdapterConfig
from vla_adapter_hf.modeling.modeling_vla_adapter import VLAAdapterForActionPrediction
from vla_adapter_hf.processing.processing_vla_adapter import PROMPTS, VLAAdapterProcessor


SMALL_HEAD = 0.02  # of PyTorch's initialisation
SHARPNESS = 3.0  # times transformers' initialisation


def cut_down_tokenizer(
    tokenizer: PreTrainedTokenizerBase, instructions: Iterable[str], vocab_size: int, prompt_style: str = "chat"
) -> PreTrainedTokenizerBase:
    """A byte-level tokenizer of the same kind, whose vocabulary is made from some instructions.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): a Qwen2 tokenizer; how it splits text and its control tokens are kept.
        instructions (`Iterable[str]`): what the vocabulary is made from, in the prompt of `prompt_style`.
        vocab_size (`int`): the most tokens there may be, the 256 bytes and the control tokens included.

    Returns:
        `PreTrainedTokenizerBase`: any text survives encoding and decoding; the instructions take the fewest tokens.

    Raises:
        ValueError: without instructions, for a size too small for the bytes and control tokens, or for an unknown
            prompt style.
    """
    if prompt_style not in PROMPTS:
        raise ValueError(f"prompt_style must be one of {', '.join(PROMPTS)}, got {prompt_style!r}.")
    instructions = [instruction.strip().lower() for instruction in instructions if instruction.strip()]
    if not instructions:
        raise ValueError("instructions is empty: the vocabulary is made from them.")
    least = 256 + len(tokenizer.get_added_vocab())
    if vocab_size <= least:
        raise ValueError(f"vocab_size={vocab_size} must be more than {least}, the bytes and the control tokens.")
    prompts = [PROMPTS[prompt_style].format(instruction=instruction) for instruction in instructions]
    # Tokens that were added to the vocabulary, but are not control tokens, are not counted by vocab_size.
    cut_down = tokenizer.train_new_from_iterator(prompts, vocab_size, show_progress=False)
    surplus = len(cut_down) - vocab_size
    if surplus > 0:
        cut_down = tokenizer.train_new_from_iterator(prompts, vocab_size - surplus, show_progress=False)
    return cut_down


def init_from_config(
    config: VLAAdapterConfig, tokenizer: PreTrainedTokenizerBase, seed: int = 0
) -> tuple[VLAAdapterForActionPrediction, VLAAdapterProcessor]:
    """A model with random weights, and its processor.

    Args:
        config ([`VLAAdapterConfig`]): the whole model.
        tokenizer (`PreTrainedTokenizerBase`): its tokens must be among the configuration's `text_config.vocab_size`.
        seed (`int`): seed of the weights. The state of torch's own generator is kept.

    Raises:
        ValueError: when the tokenizer has more tokens than the language model.
    """
    if len(tokenizer) > config.text_config.vocab_size:
        raise ValueError(
            f"text_config.vocab_size={config.text_config.vocab_size}, but the tokenizer has {len(tokenizer)} tokens; "
            "raise vocab_size or cut down the tokenizer."
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # In float32, also when the parts' own configurations name another precision.
        model = VLAAdapterForActionPrediction(config).float().eval()
        let_inputs_count(model)
        model.to(config.dtype or torch.float32)
    return model, VLAAdapterProcessor.from_model_config(config, tokenizer)


@torch.no_grad()
def let_inputs_count(model: VLAAdapterForActionPrediction, frames: int = 32) -> None:
    """Give all inputs of a new language model mean 0 and variance 1, and its actions values near 0, in place.

    With the usual initialisation, the patch features of untrained towers are almost constant, and 60 times as long as
    the embedding of a word. The language model's output then hardly depends on images or words, and training uses the
    state alone. Pretrained parts do not have this problem.

    - The projector's last layer is scaled by its outputs on random frames (data-dependent initialisation, Salimans and
      Kingma, arXiv 1602.07868).
    - The queries and keys of attention start larger, so that attention is not uniform.
    - The action head starts small. A large one would first train the features towards zero.

    Args:
        model ([`VLAAdapterForActionPrediction`]): with random weights.
        frames (`int`): random frames per camera. They come from torch's generator, as the embeddings do.
    """
    config = model.config
    model.get_input_embeddings().weight.normal_()
    model.action_queries.weight.normal_()
    blocks = torch.randn(frames, 6 * config.num_cameras, 8, 8)
    pixels = torch.nn.functional.interpolate(blocks, size=(config.image_size, config.image_size))
    patches = model.get_image_features(pixels).pooler_output.flatten(0, 1)
    std, mean = torch.std_mean(patches, dim=0)
    last = model.vision_projector.fc3
    last.weight.div_(std[:, None])
    last.bias.sub_(mean).div_(std)
    for layer in model.language_model.layers:
        layer.self_attn.q_proj.weight.mul_(SHARPNESS)
        layer.self_attn.k_proj.weight.mul_(SHARPNESS)
    for block in model.policy.blocks:
        for name, layer in block.attention.named_children():
            if name.startswith(("q_", "k_")):
                layer.weight.mul_(SHARPNESS)
    # The first latent is this bias, and without it every query of the first block is nearly the same.
    model.policy.fc_in.bias.normal_()
    model.policy.fc_out.weight.mul_(SMALL_HEAD)
    model.policy.fc_out.bias.zero_()


def init_untrained(
    destination: str | Path,
    config: str | Path,
    *,
    tokenizer: str | Path | None = None,
    instructions: str | Path | None = None,
    seed: int = 0,
    report_progress: Callable[[str], None] = print,
    **config_fields: Any,
) -> Path:
    """Write a model with random weights in our own layout, with its processor and a model card.

    Args:
        destination (`str` or `Path`): folder to make. It appears complete or not at all.
        config (`str` or `Path`): JSON file of fields of [`VLAAdapterConfig`].
        tokenizer (`str` or `Path`, *optional*): folder or Hub id of a Qwen2 tokenizer; by default the small one that
            is part of this package.
        instructions (`str` or `Path`, *optional*): text file with an instruction per line, from which the vocabulary
            is made. By default the tokenizer's own vocabulary is kept.
        seed: as in [`init_from_config`].
        report_progress (`Callable`): receives lines of progress.
        config_fields: fields that replace the file's.

    Raises:
        ValueError, TypeError, OSError: for a file that holds something else, and when the destination exists; nothing
            is written.
    """
    destination = check_destination(destination)
    if not Path(config).is_file():
        raise ValueError(f"config={config}: there is no such file.")
    try:
        fields = json.loads(Path(config).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{config} is not JSON: {error}") from error
    _check_fields(fields, str(config))
    model_config = VLAAdapterConfig(**{**fields, **config_fields})
    if tokenizer is None:
        with embedded_folder() as folder:
            loaded = load_tokenizer(str(folder / "tokenizer"))
    else:
        loaded = load_tokenizer(check_source(tokenizer, "tokenizer"))
    if instructions is not None:
        lines = Path(instructions).read_text(encoding="utf-8").splitlines()
        loaded = cut_down_tokenizer(loaded, lines, model_config.text_config.vocab_size, model_config.prompt_style)
    model, processor = init_from_config(model_config, loaded, seed)
    report_progress(f"{model.num_parameters() / 1e6:.2f} M parameters, {len(loaded)} tokens")
    card = fill_model_card(
        model_config,
        title=destination.name,
        summary="**An untrained model, to start training from.** All weights are random; its actions mean nothing.",
        repo=destination.name,
        results="Not trained, not evaluated.",
    )
    write_checkpoint(destination, model, processor, card, report_progress)
    report_progress(f"Done: {destination}, an untrained model")
    return destination


def _check_fields(fields: Any, source: str) -> None:
    """Refuse misspelt names. The configurations would ignore them and use the published sizes."""
    if not isinstance(fields, dict):
        raise ValueError(f"{source} must hold an object of fields of VLAAdapterConfig, got {type(fields).__name__}.")
    missing = [name for name in VLAAdapterConfig.sub_configs if not isinstance(fields.get(name), dict)]
    if missing:
        raise ValueError(
            f"{source} must say how large each part is: {', '.join(missing)} missing, an object of fields."
        )
    parts = {"": (fields, VLAAdapterConfig)}
    parts |= {f"{name}.": (fields[name], sub_config) for name, sub_config in VLAAdapterConfig.sub_configs.items()}
    # What else a saved config.json holds.
    other_entries = {"architectures", "auto_map", "transformers_version", "model_type", "dtype", "_name_or_path"}
    for prefix, (given, config_class) in parts.items():
        known = set(config_class().to_dict()) | other_entries | set(getattr(config_class, "sub_configs", {}))
        for name in given:
            # Other names pass: configurations keep extra entries of a checkpoint.
            near = [] if name in known else get_close_matches(name, known, n=1, cutoff=0.75)
            if near:
                raise ValueError(
                    f"{source}: {prefix}{name} is not a field of {config_class.__name__}; did you mean {near[0]}?"
                )
