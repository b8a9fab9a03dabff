"""Converting a traced model for OpenVINO and ONNX Runtime, and rounding it to eight bits with NNCF."""

from __future__ import annotations

import ast
import logging
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vla_adapter_hf.checkpoints.exported import ENGINES, GRAPH_INPUTS, import_openvino
from vla_adapter_hf.export.graph import layer_names
from vla_adapter_hf.utils.extras import install_hint


Arrays = list[np.ndarray]

# The types of nodes that layers become, and of those that only move values, in both engines.
LAYER_KINDS = ("MatMul", "Gemm", "Conv", "Convolution")
SHAPE_KINDS = ("Constant", "Convert", "Parameter", "Reshape", "Result", "Squeeze", "Transpose", "Unsqueeze")
# Bytes of a tensor from which on ONNX stores it outside of the graph's file.
SMALLEST_OUTSIDE = 1024
# The policy's first layers have constant inputs, so a converter may compute them once and for all.
CONSTANT_LAYERS = ("policy.fc_in", *(f"policy.blocks.0.attention.{name}" for name in ("q_proj", "k_self", "v_self")))


class Converter(ABC):
    """A traced model in the form of one engine.

    Args:
        program: from [`trace`].

    Raises:
        ImportError: without the engine's packages.
    """

    engine: str

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

        Raises:
            RuntimeError: when a layer of the model is not found in the converted graph.
        """
        nncf = import_nncf()
        samples = nncf.Dataset(list(calibration), self._sample)
        nodes = self.layer_nodes()
        kept = [nodes[layer] for layer in kept_layers if layer in nodes]
        # Only layers are rounded. Rounding the sums and norms between them adds errors, and gains no time.
        kinds = sorted(self._kinds() - set(LAYER_KINDS) - set(SHAPE_KINDS))
        ignored = nncf.IgnoredScope(
            names=kept + self._attention_products(set(nodes.values())), types=kinds, validate=False
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return nncf.quantize(
                self.model,
                samples,
                model_type=nncf.ModelType.TRANSFORMER,
                subset_size=len(calibration),
                ignored_scope=ignored,
                advanced_parameters=_nncf_parameters(nncf),
            )

    def _sample(self, arrays: Arrays) -> Any:
        return arrays

    @abstractmethod
    def _kinds(self) -> set[str]:
        """The types of the graph's nodes."""

    def layer_nodes(self) -> dict[str, str]:
        """The products of the converted graph by the names of the model's layers, without those that are constant.

        Raises:
            RuntimeError: when a layer is not found: it could be neither rounded nor kept.
        """
        nodes = {layer: self._node_name(layer) for layer in self.layers}
        lost = [layer for layer, name in nodes.items() if name is None and layer not in CONSTANT_LAYERS]
        if lost:
            raise RuntimeError(
                f"{len(lost)} layers are not found in the graph that {self.engine} made, {lost[0]} among them: "
                "it names operations in another way than the releases in constraints.txt. Install those."
            )
        return {layer: name for layer, name in nodes.items() if name is not None}

    @abstractmethod
    def _attention_products(self, layers: set[str]) -> list[str]:
        """The names of nodes that multiply activations with each other: all products but those of the layers."""

    @abstractmethod
    def _node_name(self, layer: str) -> str | None:
        """What the engine's model calls the product of a layer; `None` where there is none."""

    @abstractmethod
    def save(self, model: Any, folder: Path, half_weights: bool) -> None:
        """Write a model (`self.model` or a quantized one) into a folder, with weights in float16 if wanted.

        Files of an earlier one are replaced. The model is not to be used afterwards.
        """


def _nncf_parameters(nncf: Any) -> Any:
    """Ranges that cut no value off, and no change of weights beyond their rounding.

    NNCF's corrections of weights and biases take the errors of its own samples for those of all observations, and made
    the actions of the policy that ships with the package worse.
    """
    return nncf.AdvancedQuantizationParameters(
        disable_bias_correction=True,
        smooth_quant_alphas=nncf.AdvancedSmoothQuantParameters(convolution=-1, matmul=-1),
        activations_range_estimator_params=nncf.quantization.range_estimator.RangeEstimatorParametersSet.MINMAX,
    )


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

    @cached_property
    def _products(self) -> dict[str, str]:
        """By the name of the traced operation, the product in the converted graph."""
        nodes = [node for node in self.model.get_ops() if node.get_type_name() in ("MatMul", "Convolution")]
        return {node.get_friendly_name().split("/")[0]: node.get_friendly_name() for node in nodes}

    def _node_name(self, layer: str) -> str | None:
        # OpenVINO decomposes the traced graph first, which renames convolutions.
        return self._products.get(self.layers[layer].replace("conv2d", "convolution"))

    def _attention_products(self, layers: set[str]) -> list[str]:
        nodes = [node.get_friendly_name() for node in self.model.get_ops() if node.get_type_name() == "MatMul"]
        return [name for name in nodes if name not in layers]

    def _kinds(self) -> set[str]:
        return {node.get_type_name() for node in self.model.get_ops()}

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

    @cached_property
    def _products(self) -> dict[str, str]:
        """By the name of the model's module, the product in the converted graph."""
        products = {}
        for node in self.model.graph.node:
            scopes = {entry.key: entry.value for entry in node.metadata_props}.get("pkg.torch.onnx.name_scopes")
            if node.op_type in ("MatMul", "Gemm", "Conv") and scopes:
                products[ast.literal_eval(scopes)[-2]] = node.name
        return products

    def _node_name(self, layer: str) -> str | None:
        return self._products.get(f"model.{layer}")

    def _attention_products(self, layers: set[str]) -> list[str]:
        return [node.name for node in self.model.graph.node if node.op_type == "MatMul" and node.name not in layers]

    def _kinds(self) -> set[str]:
        return {node.op_type for node in self.model.graph.node}

    def save(self, model: Any, folder: Path, half_weights: bool) -> None:
        import onnx
        from onnx.external_data_helper import set_external_data

        graph, weights = (folder / name for name in ENGINES[self.engine])
        for path in (graph, weights):
            path.unlink(missing_ok=True)  # onnx would append to the weights of an earlier round
        for node in model.graph.node:
            del node.metadata_props[:]  # where in the source an operation comes from: paths of this machine
        # One file holds 2 GB at most, so the weights have their own. onnx's option for this refuses to write where the
        # current folder has a file of that name.
        for tensor in model.graph.initializer:
            if len(tensor.raw_data) >= SMALLEST_OUTSIDE:
                set_external_data(tensor, weights.name)
        onnx.save_model(model, str(graph))


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
