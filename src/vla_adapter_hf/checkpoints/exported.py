"""Checkpoints that were exported for another engine: loading and predicting with OpenVINO or ONNX Runtime."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vla_adapter_hf.checkpoints.checkpoint import Checkpoint
from vla_adapter_hf.checkpoints.files import Shapes, read_json
from vla_adapter_hf.checkpoints.shapes import model_shapes
from vla_adapter_hf.checkpoints.source import FolderFiles, HubFiles
from vla_adapter_hf.modeling.configuration_vla_adapter import VLAAdapterConfig
from vla_adapter_hf.modeling.inference_vla_adapter import ActionPredictionMixin
from vla_adapter_hf.modeling.modeling_vla_adapter import VLAAdapterOutput
from vla_adapter_hf.processing.processing_vla_adapter import VLAAdapterProcessor
from vla_adapter_hf.utils.extras import install_hint


MODEL_TYPE = "vla_adapter_exported"
# What the export was made with: engine, precision, prompt length, batch.
RECORD = "export.json"
ENGINES = {"openvino": ("openvino_model.xml", "openvino_model.bin"), "onnx": ("model.onnx", "model.onnx.data")}
# Arguments of the graph, in order. They are those of `forward`.
GRAPH_INPUTS = ("input_ids", "attention_mask", "pixel_values", "proprio")


class ExportedModel(ActionPredictionMixin):
    """An exported checkpoint with the model's `predict_action`.

    It computes on the CPU and takes float32 whatever the precision inside; actions come out as from the model. Longer
    prompts than the export's are refused.

    Args:
        config ([`VLAAdapterConfig`]): with the norm stats.
        record (`dict`): what was exported, the content of `export.json`.
        engine (`Callable`): from the graph's arrays to normalised actions.
        paths (`list[Path]`): the graph's files.
    """

    device = torch.device("cpu")
    dtype = torch.float32
    training = False

    def __init__(
        self, config: VLAAdapterConfig, record: dict[str, Any], engine: Any, paths: Sequence[Path] = ()
    ) -> None:
        self.config, self.record, self.engine, self.paths = config, record, engine, paths
        self._prompt_multiple = record["prompt_tokens"]

    def __call__(self, return_dict: bool = True, **inputs: torch.Tensor) -> VLAAdapterOutput:
        """The chunk in normalised space, for the padded inputs that `predict_action` prepares."""
        length, batch = inputs["input_ids"].shape[1], inputs["input_ids"].shape[0]
        if length != self.record["prompt_tokens"]:
            raise ValueError(
                f"the prompt has more than {self.record['prompt_tokens']} tokens, for which the checkpoint was "
                "exported. Shorten the instruction, or export again with a larger --prompt-tokens."
            )
        arrays = [inputs[name].numpy() for name in GRAPH_INPUTS]
        # A graph of batch 1 predicts row after row.
        rows = [slice(None)] if self.record["dynamic_batch"] else [slice(row, row + 1) for row in range(batch)]
        parts = [self.engine([array[row] for array in arrays]) for row in rows]
        return VLAAdapterOutput(actions=torch.from_numpy(np.concatenate(parts)))

    def eval(self) -> ExportedModel:
        """Nothing to do: an exported model is always in evaluation mode."""
        return self

    def num_parameters(self) -> int:
        """Those of the model that was exported."""
        return sum(prod(shape) for shape in model_shapes(self.config).values())

    def modules(self) -> Iterator[torch.nn.Module]:
        """None: there are no torch modules."""
        return iter(())

    def compile_for_inference(self, *args: Any, **kwargs: Any) -> ExportedModel:
        """Refused.

        Raises:
            ValueError: always.
        """
        raise ValueError("an exported checkpoint is compiled already; leave --compile out.")


class ExportedCheckpoint(Checkpoint):
    """A folder that `vla-adapter export` wrote."""

    layout = MODEL_TYPE

    @classmethod
    def open(cls, files: FolderFiles | HubFiles, stored: dict[str, Any], fields: dict[str, Any]) -> ExportedCheckpoint:
        """Read the configuration from the content of `config.json`.

        Raises:
            ValueError: for fields that would change the graph.
        """
        return cls(files, exported_config(stored, files.source, fields))

    def load_processor(self, **options: Any) -> VLAAdapterProcessor:
        source, hub = self.files.address
        return VLAAdapterProcessor.from_pretrained(source, **hub, **options, trust_remote_code=False)

    def load_model(self, dtype: Any = None, device: Any = None, **options: Any) -> ExportedModel:
        """The model.

        Args:
            dtype: anything: an exported checkpoint computes in the precision of its export. Evaluation and servers ask
                for float32 on a CPU by themselves.
            device: `None` or the CPU.

        Raises:
            ValueError: for another device, other options, or damaged files.
            ImportError: without the engine's package.
        """
        if device is not None and torch.device(device).type != "cpu":
            raise ValueError(f"{self.source} is an export for the CPU, got device={str(device)!r}.")
        given = sorted(name for name, value in options.items() if value is not None)
        if given:
            raise ValueError(f"an exported checkpoint takes no {', '.join(given)}.")
        record = self.record()
        paths = [self.files.path(name) for name in ENGINES[record["engine"]]]
        engine = load_engine(record["engine"], paths[0], record["precision"])
        return ExportedModel(self.config, record, engine, paths)

    def record(self) -> dict[str, Any]:
        """What the export was made with.

        Raises:
            ValueError: when the file is missing, damaged, or of an engine that is not known.
        """
        record = read_json(self.files.path(RECORD), self.source)
        if record.get("engine") not in ENGINES:
            raise ValueError(
                f"{RECORD} of {self.source} names the engine {record.get('engine')!r}, expected "
                f"{' or '.join(ENGINES)}."
            )
        return record

    def _load(self, model_class: type, **options: Any) -> Any:
        raise ValueError(
            f"{self.source} is an exported checkpoint, which torch cannot load: "
            "load it with AutoModel or open_checkpoint(...).load_model()."
        )

    def tensor_shapes(self) -> Shapes:
        return {}

    def check(self) -> None:
        for name in ENGINES[self.record()["engine"]]:
            self.files.path(name)


def refuse_exported(checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint that has no weights for torch.

    Raises:
        ValueError: when it is an exported one.
    """
    if isinstance(checkpoint, ExportedCheckpoint):
        raise ValueError(
            f"{checkpoint.source} is an exported checkpoint, which torch cannot load; name the checkpoint that it was "
            "exported from."
        )


def exported_config(stored: dict[str, Any], source: str | None, fields: dict[str, Any]) -> VLAAdapterConfig:
    """The configuration in an export's `config.json`, with the norm stats replaced if others are given.

    Raises:
        ValueError: for fields that would change the graph.
    """
    changed = set(fields) - {"norm_stats", "dtype"}
    if fields.get("attn_implementation") is None:  # the default of programs for any model
        changed -= {"attn_implementation"}
    if changed:
        raise ValueError(f"{source} is an exported checkpoint; {', '.join(sorted(changed))} cannot be changed in it.")
    stored = {**stored, "model_type": VLAAdapterConfig.model_type}
    return VLAAdapterConfig.from_dict(stored, name_or_path=source, **fields)


def load_engine(engine: str, path: Path, precision: str) -> Any:
    """A function from the graph's arrays to normalised actions `(batch, chunk_size, action_dim)` float32.

    It computes with as many threads as torch does now.

    Args:
        engine (`str`): `"openvino"` or `"onnx"`.
        path (`Path`): the graph's file.
        precision (`str`): `"fp32"`, `"bf16"` or `"int8"`.

    Raises:
        ImportError: without the engine's package.
        ValueError: when the file is damaged.
    """
    return _openvino(path, precision) if engine == "openvino" else _onnx(path)


def import_openvino() -> Any:
    """OpenVINO, without the usage statistics that it sends over the network when it is imported.

    Raises:
        ImportError: saying how to install it.
    """
    was = os.environ.get("CI")
    os.environ["CI"] = "true"  # the switch that its telemetry looks at
    try:
        import openvino
    except ImportError as error:
        raise ImportError(f"This needs OpenVINO: {install_hint('openvino')}.") from error
    finally:
        if was is None:
            del os.environ["CI"]
        else:
            os.environ["CI"] = was
    return openvino


_one_at_a_time = threading.Lock()


@cache
def _make_openvino_core() -> Any:
    return import_openvino().Core()


def _openvino_core() -> Any:
    """The one core of this process, which lives as long as the process.

    A core gives the thread that first compiles with it a stack for signals, and takes it away when it is freed. Where
    two cores are not freed in reverse order, or one is freed in another thread, a thread keeps a stack that is gone:
    the next signal, such as Ctrl-C, then ends the process at once. OpenVINO 2026.4 does so.
    """
    with _one_at_a_time:
        return _make_openvino_core()


def _openvino(path: Path, precision: str) -> Any:
    # OpenVINO would compute in bfloat16 by itself where the processor can.
    options = {"INFERENCE_PRECISION_HINT": "f32" if precision == "fp32" else "bf16", "PERFORMANCE_HINT": "LATENCY"}
    options["INFERENCE_NUM_THREADS"] = torch.get_num_threads()
    try:
        compiled = _openvino_core().compile_model(str(path), "CPU", options)
    except RuntimeError as error:
        raise ValueError(f"{path.name} is damaged or of another release of OpenVINO: {_first_line(error)}") from error
    turn = threading.Lock()

    def predict(arrays: Sequence[np.ndarray]) -> np.ndarray:
        with turn:  # all threads share one request, and could get each other's actions
            return np.array(compiled(list(arrays))[0], np.float32)

    return predict


def _onnx(path: Path) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise ImportError(f"This checkpoint needs ONNX Runtime: {install_hint('onnx')}.") from error
    options = onnxruntime.SessionOptions()
    # Spinning threads take the processor from the robot's other programs.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the runtime's own exceptions have no common class but this one
        raise ValueError(f"{path.name} is damaged or of another release of ONNX: {_first_line(error)}") from error
    return lambda arrays: session.run(None, dict(zip(GRAPH_INPUTS, arrays, strict=True)))[0]


def _first_line(error: Exception) -> str:
    lines: Sequence[str] = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
