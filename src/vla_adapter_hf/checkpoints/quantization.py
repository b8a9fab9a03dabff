"""Weights in eight or four bits, through transformers' own `quantization_config` and torchao."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache

import torch
from transformers import TorchAoConfig
from transformers.utils import is_torchao_available

from vla_adapter_hf.modeling.configuration_vla_adapter import POLICY_VARIANTS, VLAAdapterConfig
from vla_adapter_hf.modeling.modeling_vla_adapter import VLAAdapterForActionPrediction
from vla_adapter_hf.utils.extras import install_hint


KINDS = ("int8", "int4")
# Small layers through which everything about frames, state and actions passes: 2.5 % of the published model's weights.
# docs/speed.md has the effect of rounding each part alone.
KEPT = ("vision_projector", "proprio_projector", "policy.fc_in", "policy.fc_out")
# Layers with few rows per observation: one for the state, or one per action or action query. CUDA's product of int8
# matrices takes 17 rows or more, and outputs by eights. Other products are an error once they are compiled. Before
# that, torchao computes them in float32.
FEW_ROWS = (
    "proprio_projector",
    "policy.fc_in",
    "policy.fc_out",
    r"policy\.blocks\.\d+\.fc",
    r"policy\.blocks\.\d+\.attention\.(q_proj|k_self|v_self|k_adapter|v_adapter|o_proj)",
)
# Weights that share a scale in four bits. Rows whose length is no multiple of it (SigLIP's 4304) are not quantized.
GROUP_SIZE = 32
# In 0.17, saved int8 weights could not be loaded, and int4 weights could not be packed for a CPU.
TORCHAO = "0.18.0"


def quantization_config(
    kind: str = "int8", device: str | torch.device = "cpu", keep: Sequence[str] | None = None
) -> TorchAoConfig:
    """The `quantization_config` for `from_pretrained`.

    `"int8"` stores weights in eight bits with a scale per output channel, and rounds activations to eight bits with a
    scale per token. On a CPU it is 1.2 times as fast as bfloat16 after `compile_for_inference`, and slower without
    (docs/speed.md). `"int4"` stores weights in four bits and computes in the model's precision. It saves memory, not
    time.

    Args:
        kind (`str`): `"int8"` or `"int4"`.
        device (`str` or `torch.device`): CPU or CUDA, where int4 is packed in different ways. For CUDA,
            `from_pretrained` also needs `device_map="cuda"`, and for int4 `dtype="bfloat16"`.
        keep (`Sequence[str]`, *optional*): names of modules to leave in the model's precision, e.g.
            `["language_model", "policy.fc_out"]`; `KEPT` by default. Some always are, because kernels do not take
            them: with `"int4"` `policy.fc_out`, with `"int8"` on CUDA the layers of `FEW_ROWS`.

    Raises:
        ValueError: for another kind or device, or a name that no module of a VLA-Adapter has.
        TypeError: when `keep` is not a sequence of names.
        ImportError: without torchao, or with an older one than is needed.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}.")
    device_type = str(device).partition(":")[0]
    if device_type not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu or cuda, got {device!r}.")
    kept = list(KEPT if keep is None else _checked(keep))
    if not is_torchao_available(TORCHAO):
        raise ImportError(f"quantised weights need torchao {TORCHAO} or newer: {install_hint('quantization')}")
    from torchao.quantization import Int4WeightOnlyConfig, Int8DynamicActivationInt8WeightConfig

    if kind == "int8":
        quant_type = Int8DynamicActivationInt8WeightConfig()
        kept += FEW_ROWS if device_type == "cuda" else ()
    elif device_type == "cuda":
        quant_type = Int4WeightOnlyConfig(group_size=GROUP_SIZE, int4_packing_format="tile_packed_to_4d")
    else:
        from torchao.prototype.quantization.int4.inference_workflow import PrototypeInt4WeightOnlyConfig

        quant_type = PrototypeInt4WeightOnlyConfig(group_size=GROUP_SIZE, set_inductor_config=False)
    if kind == "int4":
        kept.append("policy.fc_out")  # kernels pack outputs by sixteens, and an action has fewer
    return TorchAoConfig(quant_type, modules_to_not_convert=kept)


def _checked(keep: Sequence[str]) -> Sequence[str]:
    if isinstance(keep, str) or not all(isinstance(name, str) for name in keep):
        raise TypeError(f"keep must be a sequence of modules' names, such as ['policy.fc_out'], got {keep!r}.")
    unknown = [name for name in keep if _numbered_alike(name) not in _module_names()]
    if unknown:
        raise ValueError(
            f"keep: no module of a VLA-Adapter is called {', '.join(unknown)}. Its parts are "
            f"{', '.join(sorted(name for name in _module_names() if '.' not in name))}."
        )
    return keep


@cache
def _module_names() -> frozenset[str]:
    """The modules of both variants. Layer numbers are replaced, so that the depth does not matter."""
    names = set()
    for variant in POLICY_VARIANTS:
        with torch.device("meta"):
            model = VLAAdapterForActionPrediction(VLAAdapterConfig(policy_variant=variant))
        names |= {_numbered_alike(name) for name, _ in model.named_modules() if name}
    return frozenset(names)


def _numbered_alike(name: str) -> str:
    return re.sub(r"\.\d+(?=\.|$)", ".0", name)
