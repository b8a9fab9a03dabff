"""Measurements of `vla-adapter bench`: time of the stages, memory, floating-point operations, matrix products."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from vla_adapter_hf.modeling.configuration_vla_adapter import VLAAdapterConfig
from vla_adapter_hf.modeling.modeling_vla_adapter import VLAAdapterForActionPrediction


# The modules that make up each stage of a prediction.
STAGE_MODULES = {
    "vision": ("dinov2", "siglip"),
    "projector": ("vision_projector",),
    "language model": ("language_model",),
    "policy": ("proprio_projector", "policy"),
}
BEFORE, BETWEEN, AFTER = "checks, normalising", "embedding, gathering", "un-normalising"
STAGES = (BEFORE, *STAGE_MODULES, BETWEEN, AFTER)
# Operators of linear layers and convolutions. Attention uses products of batches of matrices, or its own kernel.
LAYER_PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.convolution)
# Large enough for the full rate, small enough to take no time.
MATMUL_SIZE = {"cpu": 2048, "cuda": 8192}
# Larger than any cache.
COPY_BYTES = {"cpu": 1 << 28, "cuda": 1 << 30}


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class StageClock:
    """Seconds of every stage of a prediction, measured by hooks on the model's modules while the context lasts.

    On CUDA events mark the boundaries in the device's queue. Nothing waits for them, so the sum is that of a
    prediction without the clock.
    """

    def __init__(self, model: VLAAdapterForActionPrediction):
        self.model = model
        self.handles: list[Any] = []
        self.marks: dict[str, list[Any]] = defaultdict(list)  # per stage: begin, end, begin, end, ...

    def __enter__(self) -> StageClock:
        for stage, modules in [*STAGE_MODULES.items(), ("forward", ("",))]:
            for name in modules:
                module = self.model.get_submodule(name)
                self.handles.append(module.register_forward_pre_hook(lambda *_, stage=stage: self._mark(stage)))
                self.handles.append(module.register_forward_hook(lambda *_, stage=stage: self._mark(stage)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self.handles:
            handle.remove()

    def predict(self, inputs: dict[str, Any]) -> dict[str, float]:
        """Seconds by stage (`STAGES`) of one prediction."""
        self.marks.clear()
        synchronize(self.model.device)
        self._mark("prediction")
        self.model.predict_action(**inputs)
        self._mark("prediction")
        synchronize(self.model.device)
        (start, end), (forward_start, forward_end) = self.marks["prediction"], self.marks["forward"]
        parts = {}
        for stage in STAGE_MODULES:
            marks = self.marks[stage]
            parts[stage] = sum(map(seconds_between, marks[::2], marks[1::2]))
        return {
            BEFORE: seconds_between(start, forward_start),
            **parts,
            BETWEEN: seconds_between(forward_start, forward_end) - sum(parts.values()),
            AFTER: seconds_between(forward_end, end),
        }

    def _mark(self, stage: str) -> None:
        if self.model.device.type != "cuda":
            self.marks[stage].append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.model.device))
        self.marks[stage].append(event)


def seconds_between(start: float | torch.cuda.Event, end: float | torch.cuda.Event) -> float:
    """Seconds from one mark of a clock to another."""
    return start.elapsed_time(end) / 1000 if isinstance(start, torch.cuda.Event) else end - start


def time_calls(run: Callable[[], Any], device: torch.device, warmup: int, runs: int) -> list[float]:
    """Seconds of each of `runs` calls, after `warmup` calls that do not count."""
    for _ in range(warmup):
        run()
    seconds = []
    for _ in range(runs):
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return seconds


def matmul_rate(dtype: torch.dtype, device: torch.device, runs: int = 5) -> float:
    """Floating-point operations per second of a product of two square matrices, the fastest of `runs`."""
    size = MATMUL_SIZE.get(device.type, MATMUL_SIZE["cpu"])
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / min(time_calls(lambda: left @ right, device, 1, runs))


def int8_rate(device: torch.device, runs: int = 5) -> float:
    """Operations per second of a product of two square matrices of int8, the fastest of `runs`."""
    size = MATMUL_SIZE.get(device.type, MATMUL_SIZE["cpu"])
    left, right = (torch.randint(-128, 128, (size, size), device=device, dtype=torch.int8) for _ in range(2))
    return 2 * size**3 / min(time_calls(lambda: torch._int_mm(left, right.t()), device, 1, runs))


def copy_rate(device: torch.device, runs: int = 5) -> float:
    """Bytes per second that a large copy within the device's memory reads and writes, the fastest of `runs`."""
    source = torch.zeros(COPY_BYTES.get(device.type, COPY_BYTES["cpu"]), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / min(time_calls(lambda: target.copy_(source), device, 1, runs))


def count_flops(config: VLAAdapterConfig, batch_size: int, prompt_length: int) -> dict[str, int]:
    """Floating-point operations of the products in one forward pass. A multiplication and an addition count as two.

    They are counted on a model on the meta device.

    Returns:
        `dict`: `"layers"`, of linear layers and convolutions, and `"attention"`, between tokens. Causal attention
        counts in full, as is usual.
    """
    with torch.device("meta"), torch.no_grad():
        model = VLAAdapterForActionPrediction(config).eval()
        inputs = {
            "input_ids": torch.zeros(batch_size, prompt_length, dtype=torch.long),
            "pixel_values": torch.zeros(batch_size, 6 * config.num_cameras, config.image_size, config.image_size),
            "proprio": torch.zeros(batch_size, config.proprio_dim),
        }
        with FlopCounterMode(display=False) as counter:
            model(**inputs)
    counts = counter.get_flop_counts()["Global"]
    layers = sum(counts[kind] for kind in LAYER_PRODUCTS if kind in counts)
    return {"layers": layers, "attention": counter.get_total_flops() - layers}


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of all parameters as they are stored. Quantised parameters count as the sum of their parts."""
    return sum(part.numel() * part.element_size() for weight in model.parameters() for part in _parts(weight))


def _parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [part for name in names for part in _parts(getattr(tensor, name))]


def memory_in_use(device: torch.device) -> int | None:
    """Bytes that the process holds (on CUDA: bytes of tensors), or `None` if the system does not report them."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else _own_status("VmRSS")


def peak_memory(device: torch.device) -> int | None:
    """The largest value of [`memory_in_use`] since the process started."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _own_status("VmHWM")


def _own_status(field: str) -> int | None:
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    lines = dict(line.split(":", 1) for line in status.read_text(encoding="utf-8").splitlines() if ":" in line)
    return int(lines[field].split()[0]) * 1024


def seconds_to_read(files: list[Path]) -> float:
    """Seconds to read files into memory once. They may be in the system's cache."""
    start = time.perf_counter()
    contents = [file.read_bytes() for file in files]
    seconds = time.perf_counter() - start
    del contents
    return seconds
