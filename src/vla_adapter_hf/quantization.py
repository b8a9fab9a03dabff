"""Weights in eight or four bits, through transformers' own `quantization_config` and torchao."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import TorchAoConfig
from transformers.utils import is_torchao_available


KINDS = ("int8", "int4")
# Small layers that all the model's knowledge of a frame, a state or an action passes through: 2.5 % of the weights of the
# published model. docs/speed.md has what rounding each part alone does to the actions.
KEPT = ("vision_projector", "proprio_projector", "policy.fc_in", "policy.fc_out")
# Weights that share a scale in four bits. Rows that it does not divide (SigLIP's of 4304) stay as they are.
GROUP_SIZE = 32


def quantization_config(kind: str = "int8", device: str = "cpu", keep: Sequence[str] | None = None) -> TorchAoConfig:
    """What to give to `from_pretrained(..., quantization_config=...)`.

    `"int8"` keeps weights in eight bits, a scale per output channel, and rounds what they are multiplied with to eight
    bits too, a scale per token; it is sooner than bfloat16 once `compile_for_inference` has put the roundings into one
    kernel, and before that about as fast. `"int4"` keeps weights in four bits and computes in the model's precision: it
    saves memory, not time.

    Args:
        kind (`str`): `"int8"` or `"int4"`.
        device (`str`): `"cpu"` or `"cuda"`; four bits are packed otherwise on each.
        keep (`Sequence[str]`, *optional*): names of modules to leave in the model's precision; `KEPT` by default. In
            four bits `policy.fc_out` is always among them.

    Raises:
        ValueError: for another kind or device.
        ImportError: without torchao.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}.")
    place = device.partition(":")[0]
    if place not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu or cuda, got {device!r}.")
    if not is_torchao_available():
        raise ImportError("quantised weights need torchao: pip install vla-adapter-hf[quantization]")
    from torchao.quantization import Int4WeightOnlyConfig, Int8DynamicActivationInt8WeightConfig

    if kind == "int8":
        quant_type = Int8DynamicActivationInt8WeightConfig()
    elif place == "cuda":
        quant_type = Int4WeightOnlyConfig(group_size=GROUP_SIZE, int4_packing_format="tile_packed_to_4d")
    else:
        from torchao.prototype.quantization.int4.inference_workflow import PrototypeInt4WeightOnlyConfig

        quant_type = PrototypeInt4WeightOnlyConfig(group_size=GROUP_SIZE, set_inductor_config=False)
    kept = list(KEPT if keep is None else keep)
    if kind == "int4":
        kept.append("policy.fc_out")  # kernels pack outputs by sixteens, and an action has fewer
    return TorchAoConfig(quant_type, modules_to_not_convert=kept)
