"""What AutoConfig, AutoModel and AutoProcessor find for checkpoints in the published layout and for exported ones.

`AutoModel` has the configuration read first, and does not say there which revision, token or cache it was given; these
it hands to the model class. So for `AutoModel` the configuration only notes what was asked for, and the model class
reads the configuration of the weights' own revision.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.utils import logging

from vla_adapter_hf.checkpoints.exported import ExportedCheckpoint, ExportedModel, exported_config
from vla_adapter_hf.checkpoints.files import read_json
from vla_adapter_hf.checkpoints.open import CONFIG_FIELDS, open_checkpoint
from vla_adapter_hf.checkpoints.published.checkpoint import PublishedCheckpoint
from vla_adapter_hf.checkpoints.published.files import MODEL_TYPE
from vla_adapter_hf.checkpoints.source import open_files
from vla_adapter_hf.modeling.configuration_vla_adapter import HUB_ARGUMENTS, VLAAdapterConfig, refuse_misspelt
from vla_adapter_hf.modeling.modeling_vla_adapter import VLAAdapterForActionPrediction
from vla_adapter_hf.processing.processing_vla_adapter import VLAAdapterProcessor


logger = logging.get_logger(__name__)

# Passed on by AutoProcessor, and a choice among implementations of which there is one here.
WITHOUT_MEANING = {"_from_auto", "code_revision", "trust_remote_code", "use_fast"}


class PublishedLayout:
    """How [`VLAAdapterConfig`] and [`VLAAdapterForActionPrediction`] read checkpoints in the published layout."""

    def read_config(self, source: str, hub: dict[str, Any], **kwargs: Any) -> tuple[VLAAdapterConfig, dict[str, Any]]:
        """The configuration, with fields given as keyword arguments in it, and the arguments that are no fields."""
        fields = _take_fields(kwargs)
        refuse_misspelt(kwargs)
        return open_checkpoint(source, **hub, **fields).config, kwargs

    def load_model(
        self, model_class: type, source: str, config: VLAAdapterConfig | None, **kwargs: Any
    ) -> torch.nn.Module:
        """The model with the checkpoint's weights; arguments as those of `from_pretrained`.

        Raises:
            ValueError: when `config` was read from another revision than the weights, or fields are given with it.
        """
        hub = {name: kwargs.pop(name) for name in HUB_ARGUMENTS & set(kwargs)}
        fields = _take_fields(kwargs)
        if config is None:
            checkpoint = open_checkpoint(source, **hub, **fields)
        else:
            fields.pop("dtype", None)
            if "attn_implementation" in fields:
                kwargs["attn_implementation"] = fields.pop("attn_implementation")
            if set(fields) - {"step"}:
                raise ValueError(
                    f"{', '.join(sorted(fields))} given together with a config; put them into the config."
                )
            files = open_files(source, **hub)
            read_from = getattr(config, "_commit_hash", None)
            if None not in (read_from, files.commit) and read_from != files.commit:
                raise ValueError(
                    f"config was read from commit {read_from} of {config.name_or_path}, but the weights are those of "
                    f"commit {files.commit}: their statistics may differ. Read the config with the same revision=..., "
                    "by VLAAdapterConfig.from_pretrained."
                )
            stored = read_json(files.path("config.json"), files.source)
            checkpoint = PublishedCheckpoint.open(files, stored, fields, config)
        return checkpoint._load(model_class, **kwargs)


class PublishedVLAAdapterConfig(PreTrainedConfig):
    """What `AutoConfig` finds for published files. Reading one gives a [`VLAAdapterConfig`].

    `AutoModel` gets an instance of this class instead, see the module's docstring.

    Args:
        overrides (`dict`, *optional*): the fields of [`VLAAdapterConfig`], `robot` and `step` that were asked for.
    """

    model_type = MODEL_TYPE
    overrides: dict[str, Any] | None = None

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As [`VLAAdapterConfig.from_dict`]; with `return_unused_kwargs`, which `AutoModel` sets, nothing is read."""
        if kwargs.pop("return_unused_kwargs", False):
            fields = _take_fields(kwargs)
            refuse_misspelt(kwargs)
            return cls(overrides=fields), kwargs
        source = kwargs.get("name_or_path")
        if source is not None and not Path(source).is_dir() and config_dict.get("_commit_hash") is None:
            logger.warning_once(
                f"{source}: AutoConfig does not pass on revision, token or cache_dir, so this is the configuration of "
                "the default revision. VLAAdapterConfig.from_pretrained takes all of them."
            )
        return VLAAdapterConfig.from_dict(config_dict, **kwargs)


class PublishedModel:
    """What `AutoModel` finds for published files. It only makes [`VLAAdapterForActionPrediction`]s."""

    config_class = PublishedVLAAdapterConfig

    @classmethod
    def from_pretrained(cls, source: str, *args: Any, config: PublishedVLAAdapterConfig, **kwargs: Any) -> Any:
        """As [`VLAAdapterForActionPrediction.from_pretrained`], with the overrides that `config` notes."""
        arguments = {**(config.overrides or {}), **kwargs}
        return PublishedLayout().load_model(VLAAdapterForActionPrediction, source, None, **arguments)


class ExportedLayout(PublishedLayout):
    """How [`VLAAdapterConfig`] reads exported checkpoints, and what [`VLAAdapterForActionPrediction`] says of them."""

    def load_model(
        self, model_class: type, source: str, config: VLAAdapterConfig | None, **kwargs: Any
    ) -> torch.nn.Module:
        """Refused.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"{source} is an exported checkpoint. Load it with AutoModel.from_pretrained, and without a config: its "
            "graph has its own. norm_stats={...} replaces its statistics."
        )


class ExportedVLAAdapterConfig(PreTrainedConfig):
    """What `AutoConfig` finds for exported checkpoints. Reading one gives a [`VLAAdapterConfig`].

    `AutoModel` gets an instance of this class instead, see the module's docstring.

    Args:
        overrides (`dict`, *optional*): the fields that were asked for, such as `norm_stats`.
    """

    model_type = ExportedCheckpoint.layout
    overrides: dict[str, Any] | None = None

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The configuration, with fields replaced; with `return_unused_kwargs`, which `AutoModel` sets, only these.

        Raises:
            ValueError: for fields that would change the graph.
            TypeError: for the misspelt name of a field.
        """
        only_noted, source = kwargs.pop("return_unused_kwargs", False), kwargs.get("name_or_path")
        fields = _take_fields(kwargs)
        refuse_misspelt(kwargs)
        return (cls(overrides=fields), kwargs) if only_noted else exported_config(config_dict, source, fields)


class ExportedModelLoader:
    """What `AutoModel` finds for exported checkpoints. It only makes [`ExportedModel`]s."""

    config_class = ExportedVLAAdapterConfig

    @classmethod
    def from_pretrained(
        cls, source: str, *args: Any, config: ExportedVLAAdapterConfig, **kwargs: Any
    ) -> ExportedModel:
        """The model of an exported checkpoint, with the overrides that `config` notes.

        See [`ExportedCheckpoint.load_model`] for the other arguments.

        Raises:
            ValueError: for fields that would change the graph, and for other arguments that an export cannot honour.
        """
        hub = {name: kwargs.pop(name) for name in HUB_ARGUMENTS & set(kwargs)}
        kwargs = {name: value for name, value in kwargs.items() if name not in (*WITHOUT_MEANING, "adapter_kwargs")}
        return open_checkpoint(source, **hub, **(config.overrides or {})).load_model(**kwargs)


class PrismaticProcessor(VLAAdapterProcessor):
    """Stands in for the class that published files name, which `AutoProcessor` looks up by this name first.

    It only makes [`VLAAdapterProcessor`]s.
    """

    @classmethod
    def from_pretrained(cls, source: str, **kwargs: Any) -> VLAAdapterProcessor:
        """As in transformers, with options of the configuration, the images, the tokenizer and the processor.

        Raises:
            TypeError: for an option of none of them.
        """
        options = {name: value for name, value in kwargs.items() if name not in WITHOUT_MEANING}
        # The fields are those that AutoConfig and AutoModel take: a robot of one's own needs the same ones for all.
        fields = set(VLAAdapterConfig.__dataclass_fields__) - set(PreTrainedConfig.__dataclass_fields__)
        taken = {name: options.pop(name) for name in (fields | HUB_ARGUMENTS | {"robot", "step"}) & set(options)}
        return open_checkpoint(source, **taken).load_processor(**options)


def _take_fields(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Of keyword arguments, `robot`, `step` and fields of the configuration, taken out.

    A `dtype` is copied: the model needs it too.
    """
    for name in ("_from_auto", "name_or_path"):
        kwargs.pop(name, None)
    names = (CONFIG_FIELDS | {"robot", "step"}) - {"dtype"}
    fields = {name: kwargs.pop(name) for name in names & set(kwargs)}
    if kwargs.get("dtype") not in ("auto", None):
        fields["dtype"] = kwargs["dtype"]
    return fields
