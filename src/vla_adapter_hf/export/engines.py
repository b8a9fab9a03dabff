"""Converting a traced model for OpenVINO and ONNX Runtime, and rounding it to eight bits with NNCF."""

from __future__ import annotations

import ast
import logging
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vla_adapter_hf.checkpoints.exported import ENGINES, GRAPH_INPUTS, import_openvino
from vla_adapter_hf.export.graph import layer_names
from vla_adapter_hf.utils.extras import install_hint


Arrays = list[np.ndarray]


class Converter(ABC):
    """A traced model in the form of one engine.

    Args:
        program: from [`trace`].

    Raises:
        ImportError: without the engine's packages.
    """

    def __init__(self, program: torch.export.ExportedProgram) -> None:
        self.layers = layer_names(program)
        self.model = self._convert(program)

    @abstractmethod
    def _convert(self, program: torch.export.ExportedProgram) -> Any:
        """The program as the engine's model."""

    def quantized(self, calibration: Sequence[Arrays], kept_layers: Sequence[str]) -> Any:
        """The model in eight bits.

        Args:
            calibration: inputs of the graph, from which the ranges of activations are taken.
            kept_layers: names of layers that stay in higher precision.
        """
        nncf = import_nncf()
        samples = nncf.Dataset(list(calibration), self._sample)
        ignored = nncf.IgnoredScope(names=[self._node_name(layer) for layer in kept_layers]) if kept_layers else None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return nncf.quantize(
                self.model,
                samples,
                model_type=nncf.ModelType.TRANSFORMER,
                subset_size=len(calibration),
                ignored_scope=ignored,
            )

    def _sample(self, arrays: Arrays) -> Any:
        return arrays

    @abstractmethod
    def _node_name(self, layer: str) -> str:
        """What the engine's model calls the product of a layer."""

    @abstractmethod
    def save(self, model: Any, folder: Path, half_weights: bool) -> None:
        """Write a model (`self.model` or a quantized one) into a folder, with weights in float16 if wanted."""


class OpenVINOConverter(Converter):
    """For OpenVINO."""

    engine = "openvino"

    def _convert(self, program: torch.export.ExportedProgram) -> Any:
        openvino = import_openvino()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = openvino.convert_model(program)
        for port, name in zip(model.inputs, GRAPH_INPUTS, strict=True):
            port.get_tensor().set_names({name})
        return model

    def _node_name(self, layer: str) -> str:
        name = self.layers[layer]
        nodes = [node.get_friendly_name() for node in self.model.get_ops()]
        return next(
            node for node in nodes if node.startswith(f"{name}/") and node.endswith(("/MatMul", "/Convolution"))
        )

    def save(self, model: Any, folder: Path, half_weights: bool) -> None:
        import_openvino().save_model(model, folder / ENGINES[self.engine][0], compress_to_fp16=half_weights)


class ONNXConverter(Converter):
    """For ONNX Runtime, whose CPU provider computes in float32 or in eight bits."""

    engine = "onnx"

    def _convert(self, program: torch.export.ExportedProgram) -> Any:
        import_onnx()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exported = torch.onnx.export(
                program, input_names=list(GRAPH_INPUTS), output_names=["actions"], dynamo=True, verbose=False
            )
        return exported.model_proto

    def _sample(self, arrays: Arrays) -> Any:
        return dict(zip(GRAPH_INPUTS, arrays, strict=True))

    def _node_name(self, layer: str) -> str:
        for node in self.model.graph.node:
            scopes = {entry.key: entry.value for entry in node.metadata_props}.get("pkg.torch.onnx.name_scopes")
            is_product = node.op_type in ("MatMul", "Gemm", "Conv")
            if is_product and scopes and ast.literal_eval(scopes)[-2] == f"model.{layer}":
                return node.name
        raise ValueError(f"the exported graph has no node for layer {layer!r}.")

    def save(self, model: Any, folder: Path, half_weights: bool) -> None:
        import onnx

        for node in model.graph.node:
            del node.metadata_props[:]  # where in the source an operation comes from: paths of this machine
        name, weights = ENGINES[self.engine]
        # One file holds 2 GB at most, so the weights have their own.
        onnx.save_model(model, str(folder / name), save_as_external_data=True, location=weights)


CONVERTERS: dict[str, type[OpenVINOConverter] | type[ONNXConverter]] = {
    "openvino": OpenVINOConverter,
    "onnx": ONNXConverter,
}


def import_onnx() -> None:
    """ONNX, and onnxscript, which torch.onnx needs.

    Raises:
        ImportError: saying how to install them.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(f"Exporting to ONNX needs {error.name}: {install_hint('onnx')}.") from error


def check_packages(engine: str, precision: str) -> None:
    """See that the engine's packages are there, before a model is loaded.

    Raises:
        ImportError: saying how to install them.
    """
    if engine == "openvino":
        import_openvino()
    else:
        import_onnx()
    if precision == "int8":
        import_nncf()


def import_nncf() -> Any:
    """NNCF, without the usage statistics that it sends over the network.

    Raises:
        ImportError: saying how to install it.
    """
    os.environ.setdefault("NNCF_CI", "1")  # the switch that its telemetry looks at
    import_openvino()
    try:
        import nncf
    except ImportError as error:
        raise ImportError(f"Eight bits need NNCF: {install_hint('openvino')}.") from error
    # Not nncf.set_log_level, which sets the level of all handlers of the process.
    logging.getLogger("nncf").setLevel(logging.ERROR)
    return nncf
