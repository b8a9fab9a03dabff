"""The processor of checkpoints in the published layout."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig

from vla_adapter_hf.modeling.modeling_vla_adapter import HUB_ARGUMENTS
from vla_adapter_hf.pretrained_parts import load_tokenizer
from vla_adapter_hf.processing.processing_vla_adapter import VLAAdapterProcessor


class PrismaticProcessor(VLAAdapterProcessor):
    """Stands in for the class that published files name, which `AutoProcessor` looks up by this name first.

    It only ever makes [`VLAAdapterProcessor`]s. Published folders hold no `tokenizer.json`, on which `AutoTokenizer`
    fails under newer releases of transformers; the Qwen2 tokenizer reads their `vocab.json` and `merges.txt`.
    """

    @classmethod
    def from_pretrained(cls, source: str, **kwargs: Any) -> VLAAdapterProcessor:
        hub = {name: kwargs[name] for name in HUB_ARGUMENTS & set(kwargs)}
        layout = {name: kwargs[name] for name in ("robot", "step", "cameras", "proprio_dim") if name in kwargs}
        config = AutoConfig.from_pretrained(source, **hub, **layout)
        return VLAAdapterProcessor.from_model_config(config, load_tokenizer(source, **hub))
