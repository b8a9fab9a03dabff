"""Reading and writing checkpoints: `from_pretrained`, `save_pretrained` and the names of parameters in files."""

import os
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedConfig

from .checkpoint_names_vla_adapter import installed_renames, name_in_file
from .configuration_vla_adapter import HUB_ARGUMENTS, VLAAdapterConfig, reader_of_layout


Model = TypeVar("Model", bound="CheckpointMixin")


class CheckpointMixin:
    """`from_pretrained` and `save_pretrained` of the model."""

    @classmethod
    def from_pretrained(
        cls: type[Model],
        pretrained_model_name_or_path: str | os.PathLike[str] | None,
        *args: Any,
        config: Any = None,
        output_loading_info: bool = False,
        ignore_mismatched_sizes: bool = False,
        strict: bool = True,
        **kwargs: Any,
    ) -> Model:
        """As in transformers, but a file whose tensors are not exactly the model's is an error and not a warning.

        A policy with some random layers predicts actions that look right.

        Args:
            ignore_mismatched_sizes (`bool`): give new random values to tensors whose shape differs from the file's, as
                for another robot's action size. All tensors must be in the file.
            strict (`bool`): `False` gives new random values to tensors that the file does not have, and ignores those
                that the model does not have.

        Raises:
            ValueError: when tensors are missing or unexpected. The message lists them.
        """
        hub = {name: kwargs[name] for name in HUB_ARGUMENTS & set(kwargs)}
        source = pretrained_model_name_or_path
        stored = {} if source is None else PreTrainedConfig.get_config_dict(source, **hub)[0]
        layout = stored.get("model_type", VLAAdapterConfig.model_type)
        if layout != VLAAdapterConfig.model_type:
            reader = reader_of_layout(layout, source)
            options = {"output_loading_info": output_loading_info, "strict": strict}
            options["ignore_mismatched_sizes"] = ignore_mismatched_sizes
            return reader.load_model(cls, source, config, **options, **kwargs)
        if not isinstance(config, PreTrainedConfig):
            fields = set(VLAAdapterConfig.__dataclass_fields__) - {"dtype"} | {"attn_implementation"}
            given = {name: kwargs.pop(name) for name in fields & set(kwargs)}
            config = cls.config_class.from_pretrained(source if config is None else config, **hub, **given)
        model, loading_info = super().from_pretrained(
            source,
            *args,
            config=config,
            output_loading_info=True,
            ignore_mismatched_sizes=ignore_mismatched_sizes,
            key_mapping={**installed_renames(config), **(kwargs.pop("key_mapping", None) or {})},
            **kwargs,
        )
        if strict:
            mismatched = {mismatch[0] for mismatch in loading_info["mismatched_keys"]}
            for kind in ("missing_keys", "unexpected_keys"):
                names = sorted(set(loading_info[kind]) - mismatched)
                if names:
                    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
                    raise ValueError(
                        f"{config.name_or_path or source}: {kind.replace('_', ' ')} {shown}. The file and the "
                        "configuration do not belong together: the file is incomplete, or the configuration describes "
                        "another model (policy_variant, numbers of layers). strict=False gives missing tensors random "
                        "values; ignore_mismatched_sizes=True does so for tensors of another shape only."
                    )
        return (model, loading_info) if output_loading_info else model

    def save_pretrained(self, save_directory, *args, state_dict=None, **kwargs) -> None:
        """As in transformers, with parameter names that do not depend on the release of transformers in use."""
        if not getattr(self, "_hf_peft_config_loaded", False):
            state_dict = self.state_dict() if state_dict is None else state_dict
            state_dict = {name_in_file(name): tensor for name, tensor in state_dict.items()}
            kwargs["save_original_format"] = False
        super().save_pretrained(save_directory, *args, state_dict=state_dict, **kwargs)


def rename_to_installed(module: nn.Module, state_dict: dict[str, torch.Tensor], prefix: str, *args) -> None:
    """A hook with which `load_state_dict` takes the names of our files. The Trainer resumes with it."""
    installed = {prefix + name_in_file(name): prefix + name for name in module.state_dict()}
    for name in [name for name in state_dict if name in installed and installed[name] != name]:
        state_dict[installed[name]] = state_dict.pop(name)


__all__ = ["CheckpointMixin", "rename_to_installed"]
