"""Parameter names in our files, which do not depend on the installed release of transformers.

transformers renames modules of its towers: between 5.4 and 5.23 SigLIP lost a level, and the attention of DINOv2 got
other names. Files always have the names of the newest release. This module translates them to and from the names of
the installed release.
"""

import re

import torch
from transformers import AutoModel, PreTrainedConfig


# Per tower: a part of a parameter name in older releases, and in our files.
FORMER_NAMES = {
    "dinov2": {
        "attention.attention.query.": "attention.q_proj.",
        "attention.attention.key.": "attention.k_proj.",
        "attention.attention.value.": "attention.v_proj.",
        "attention.output.dense.": "attention.o_proj.",
    },
    "siglip": {"vision_model.": ""},
}


def name_in_file(name: str) -> str:
    """The name under which files store the parameter that the installed transformers calls `name`."""
    tower, _, rest = name.partition(".")
    for former, current in FORMER_NAMES.get(tower, {}).items():
        rest = rest.replace(former, current)
    return f"{tower}.{rest}" if rest else name


def installed_renames(config: PreTrainedConfig) -> dict[str, str]:
    """`key_mapping` for `from_pretrained`: patterns of names in files to names in the installed transformers.

    Every parameter has a pattern of its own, so that nothing else can match. The mapping is empty under a release that
    uses the names of our files.
    """
    renames = {}
    for tower in FORMER_NAMES:
        with torch.device("meta"):
            parameters = AutoModel.from_config(getattr(config, f"{tower}_config")).state_dict()
        for name in (f"{tower}.{name}" for name in parameters):
            if name_in_file(name) != name:
                renames[f"^{re.escape(name_in_file(name))}$"] = name
    return renames


__all__ = ["name_in_file", "installed_renames"]
