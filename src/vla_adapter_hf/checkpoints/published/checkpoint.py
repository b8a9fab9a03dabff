"""Checkpoints in the layout in which VLA-Adapter was published.

A folder holds an OpenVLA-style `config.json` whose remote code runs on no current installation, a `model.safetensors`
with towers in timm's naming, two pickles with the policy and the proprio projector, and `dataset_statistics.json`. All
of it is read as data. None of its code is run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from vla_adapter_hf.checkpoints.backbones import load_tokenizer
from vla_adapter_hf.checkpoints.checkpoint import Checkpoint
from vla_adapter_hf.checkpoints.files import Shapes
from vla_adapter_hf.checkpoints.published.config import build_config
from vla_adapter_hf.checkpoints.published.files import PublishedFiles, find_published_files
from vla_adapter_hf.checkpoints.published.weights import read_state_dict, translated_shapes
from vla_adapter_hf.checkpoints.shapes import check_shapes
from vla_adapter_hf.checkpoints.source import FolderFiles, HubFiles
from vla_adapter_hf.modeling.configuration_vla_adapter import VLAAdapterConfig
from vla_adapter_hf.modeling.modeling_vla_adapter import VLAAdapterForActionPrediction
from vla_adapter_hf.processing.image_processing_vla_adapter import VLAAdapterImageProcessorKwargs
from vla_adapter_hf.processing.processing_vla_adapter import VLAAdapterProcessor


# Options that may be replaced while a processor is loaded, by the part that they belong to.
IMAGE_OPTIONS = set(VLAAdapterImageProcessorKwargs.__annotations__)
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


@dataclass
class PublishedCheckpoint(Checkpoint):
    """A checkpoint whose files were found and looked into. The weights are read by `load_model`."""

    found: PublishedFiles
    layout = "published"

    @classmethod
    def open(
        cls,
        files: FolderFiles | HubFiles,
        stored: dict[str, Any],
        fields: dict[str, Any],
        config: VLAAdapterConfig | None = None,
    ) -> PublishedCheckpoint:
        """Find the files that belong to the content of `config.json`.

        Args:
            files: where they are.
            stored (`dict`): the content of `config.json`.
            fields (`dict`): `step`, `robot`, and fields of the configuration that replace what was found.
            config ([`VLAAdapterConfig`], *optional*): to be used instead of what the files say.
        """
        fields = dict(fields)
        found = find_published_files(files, stored, fields.pop("step", None))
        if config is None:
            config = build_config(found, **fields)
            config._commit_hash = files.commit
        config.name_or_path = files.source
        return cls(files, config, found)

    def load_processor(self, **options: Any) -> VLAAdapterProcessor:
        known = IMAGE_OPTIONS | TOKENIZER_OPTIONS | {"prompt_style"}
        if unknown := sorted(set(options) - known):
            raise TypeError(
                f"{self.source} cannot be loaded with {', '.join(unknown)}: neither the configuration nor the "
                "processor, the image processor or the tokenizer has that option."
            )
        names = set(self.files.names)
        if "tokenizer.json" not in names and (missing := sorted({"vocab.json", "merges.txt"} - names)):
            raise ValueError(f"{self.source} has no {' and no '.join(missing)} (nor tokenizer.json): no tokenizer.")
        # Not by AutoTokenizer, which fails on folders without tokenizer.json under newer releases of transformers.
        source, hub = self.files.address
        tokenizer_options = {name: options.pop(name) for name in TOKENIZER_OPTIONS & set(options)}
        tokenizer = load_tokenizer(source, **hub, **tokenizer_options)
        return VLAAdapterProcessor.from_model_config(self.config, tokenizer, **options)

    def _load(self, model_class: type[VLAAdapterForActionPrediction], **options: Any) -> Any:
        if options.get("strict", True):
            self.check(options.get("ignore_mismatched_sizes", False))
        found = self.found
        paths = self.files.paths([*found.weights, found.action_head, found.proprio_projector])
        dtype = options.get("dtype")
        state_dict = read_state_dict(found, paths, dtype if isinstance(dtype, torch.dtype) else None)
        loaded = model_class.from_pretrained(None, config=self.config, state_dict=state_dict, **options)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.config.name_or_path = model.name_or_path = self.source
        return loaded

    def tensor_shapes(self) -> Shapes:
        return translated_shapes(self.found)

    def check(self, other_shapes: bool = False) -> None:
        check_shapes(self.config, self.tensor_shapes(), self.source, other_shapes=other_shapes)
