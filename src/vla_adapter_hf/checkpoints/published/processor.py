"""The processor of checkpoints in the published layout."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from vla_adapter_hf.checkpoints.backbones import load_tokenizer
from vla_adapter_hf.checkpoints.published.layout import PublishedLayout
from vla_adapter_hf.modeling.configuration_vla_adapter import HUB_ARGUMENTS, VLAAdapterConfig
from vla_adapter_hf.processing.image_processing_vla_adapter import VLAAdapterImageProcessorKwargs
from vla_adapter_hf.processing.processing_vla_adapter import VLAAdapterProcessor


# What can be set while loading, by what it is set in. The fields of a configuration are those that `AutoConfig` and
# `AutoModel` take too: a robot of one's own needs the same ones for all three.
CONFIG_OPTIONS = {"robot", "step"} | (
    set(VLAAdapterConfig.__dataclass_fields__) - set(PreTrainedConfig.__dataclass_fields__)
)
IMAGE_OPTIONS = set(VLAAdapterImageProcessorKwargs.__annotations__) - CONFIG_OPTIONS
TOKENIZER_OPTIONS = set(PreTrainedTokenizerBase.SPECIAL_TOKENS_ATTRIBUTES) | {
    "add_prefix_space",
    "chat_template",
    "clean_up_tokenization_spaces",
    "extra_special_tokens",
    "model_max_length",
    "padding_side",
    "split_special_tokens",
    "truncation_side",
}
# `AutoProcessor`'s own, and a choice among implementations of which there is one here.
NO_OPTIONS = {"_from_auto", "code_revision", "trust_remote_code", "use_fast"}


class PrismaticProcessor(VLAAdapterProcessor):
    """Stands in for the class that published files name, which `AutoProcessor` looks up by this name first.

    It only ever makes [`VLAAdapterProcessor`]s. Published folders hold no `tokenizer.json`, on which `AutoTokenizer`
    fails under newer releases of transformers; the Qwen2 tokenizer reads their `vocab.json` and `merges.txt`.
    """

    @classmethod
    def from_pretrained(cls, source: str, **kwargs: Any) -> VLAAdapterProcessor:
        """As in transformers, with options of the configuration, the images, the tokenizer and the processor.

        Raises:
            TypeError: for an option of none of them.
        """
        known = HUB_ARGUMENTS | CONFIG_OPTIONS | IMAGE_OPTIONS | TOKENIZER_OPTIONS | NO_OPTIONS | {"prompt_style"}
        if unknown := sorted(set(kwargs) - known):
            raise TypeError(
                f"{source} cannot be loaded with {', '.join(unknown)}: neither the configuration nor the processor, "
                "the image processor or the tokenizer has that option."
            )

        def among(names: set[str]) -> dict[str, Any]:
            return {name: kwargs[name] for name in names & set(kwargs)}

        hub = among(HUB_ARGUMENTS)
        # Not by AutoConfig, which would forget which revision is meant.
        config, _ = PublishedLayout().read_config(str(source), hub, **among(CONFIG_OPTIONS))
        tokenizer = load_tokenizer(source, **hub, **among(TOKENIZER_OPTIONS))
        return VLAAdapterProcessor.from_model_config(
            config, tokenizer, **among({"prompt_style"}), **among(IMAGE_OPTIONS)
        )
