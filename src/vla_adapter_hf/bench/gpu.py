"""`vla-adapter bench --gpu`: what a GPU does with the published size, next to what the card could do."""

from __future__ import annotations

import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from vla_adapter_hf.bench.gpu_report import markdown
from vla_adapter_hf.bench.measures import (
    STAGE_MODULES,
    STAGES,
    StageClock,
    copy_rate,
    count_flops,
    int8_rate,
    matmul_rate,
    synchronize,
    time_calls,
    weight_bytes,
)
from vla_adapter_hf.bench.random_weights import SIZES
from vla_adapter_hf.bench.report import percentiles
from vla_adapter_hf.bench.settings import BenchSettings
from vla_adapter_hf.bench.subject import Subject, checkpoint_source, load_subject
from vla_adapter_hf.utils.devices import check_device
from vla_adapter_hf.utils.files import write_json, write_text


PRECISIONS = ("bfloat16", "int8")
# A compiled shape may take this much longer than the slowest so far.
COMPILE_MARGIN = 1.25


@dataclass(frozen=True, kw_only=True)
class GpuBenchSettings:
    """What [`bench_gpu`] measures.

    Args:
        device (`str`): a CUDA device. With `"cpu"` the same code runs there, to test it.
        size (`str`): random weights: `"full"`, the published size, `"shallow"` or `"small"`.
        batch_sizes (`tuple[int, ...]`): how many observations are predicted at once.
        precisions (`tuple[str, ...]`): `"bfloat16"`, and `"int8"` if wanted.
        runs (`int`): predictions that count, for every figure.
        warmup (`int`): predictions before them that do not count.
        minutes (`float`): no shape is compiled that would not be done by then. What is left out is listed.
        backend (`str`, *optional*): of `torch.compile`, instead of its default.

    Raises:
        ValueError: for a device that is not there, a size that does not exist or a number out of range.
    """

    device: str = "cuda"
    size: str = "full"
    batch_sizes: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    precisions: tuple[str, ...] = PRECISIONS
    runs: int = 20
    warmup: int = 3
    minutes: float = 10.0
    backend: str | None = None

    def __post_init__(self) -> None:
        check_device(self.device, "--device")
        if self.size not in SIZES:
            raise ValueError(f"--size must be one of {', '.join(SIZES)}, got {self.size!r}.")
        if not self.minutes > 0:
            raise ValueError(f"--minutes must be more than 0, got {self.minutes}.")
        self.of_precision("bfloat16")  # checks the rest

    def of_precision(self, precision: str) -> BenchSettings:
        """The settings of one model of `PRECISIONS`."""
        return BenchSettings(
            size=self.size,
            device=self.device,
            dtype=torch.bfloat16,
            quantize=None if precision == "bfloat16" else precision,
            batch_sizes=self.batch_sizes,
            runs=self.runs,
            warmup=self.warmup,
        )

    @property
    def compile_options(self) -> dict[str, Any]:
        return {} if self.backend is None else {"backend": self.backend}


class Budget:
    """The time that is left, and whether another compilation fits into it."""

    def __init__(self, minutes: float):
        self.end = time.perf_counter() + 60 * minutes
        self.slowest = 0.0  # seconds of a compilation so far

    def allows(self, share: float = 1.0) -> bool:
        """Whether there is time for `share` of the slowest compilation so far."""
        return time.perf_counter() + COMPILE_MARGIN * share * self.slowest < self.end

    def compiled_in(self, seconds: float) -> None:
        self.slowest = max(self.slowest, seconds)


def bench_gpu(
    settings: GpuBenchSettings | None = None,
    output: str | Path | None = None,
    report_progress: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Measure eager and compiled predictions in bfloat16 and int8, their stages, and the limits of the card.

    Every time is taken after the device has finished. The card's limits are measured too, by a large copy and by large
    matrix products in the same run.

    Args:
        settings ([`GpuBenchSettings`], *optional*): what is measured.
        output (`str` or `Path`, *optional*): JSON file to write the report to; the table is written next to it, with
            the ending `.md`.
        report_progress (`Callable`): receives the lines to print.

    Returns:
        `dict`: the report, times in seconds, sizes in bytes.

    Raises:
        ImportError: without torchao, which int8 needs.
    """
    settings = settings or GpuBenchSettings()
    device, budget = check_device(settings.device), Budget(settings.minutes)
    options = {precision: settings.of_precision(precision).load_options() for precision in settings.precisions}
    started = time.perf_counter()
    report: dict[str, Any] = {
        "card": describe_card(device),
        "size": settings.size,
        "limits": measure_limits(device),
        "predictions": {},
        "stages": {},
        "left_out": [],
    }
    with checkpoint_source(settings.of_precision("bfloat16"), report_progress) as source:
        subjects = {}
        for precision in settings.precisions:
            report_progress(f"Measuring {precision}, eager")
            of_precision = settings.of_precision(precision)
            subjects[precision], _ = load_subject(source, of_precision, options[precision])
            name = f"{precision}, eager"
            report["predictions"][name] = {
                str(batch_size): _time_predictions(subjects[precision], batch_size, settings)
                for batch_size in settings.batch_sizes
            }
            report["stages"][name] = _time_stages(subjects[precision], settings)
        report["work"] = _count_work(subjects, settings)
        for precision, subject in subjects.items():
            _measure_compiled_stages(report, precision, subject, settings, budget, report_progress)
            subject.model.compile_for_inference(**settings.compile_options)
            _measure_compiled(report, precision, subject, settings.batch_sizes[:1], settings, budget, report_progress)
        for batch_size in sorted(settings.batch_sizes[1:], reverse=True):
            for precision, subject in subjects.items():
                _measure_compiled(report, precision, subject, (batch_size,), settings, budget, report_progress)
    report["seconds"] = time.perf_counter() - started
    text = markdown(report)
    report_progress(text)
    if output is not None:
        write_json(output, report, indent=1)
        write_text(Path(output).with_suffix(".md"), text)
    return report


def describe_card(device: torch.device) -> dict[str, Any]:
    """The device and what drives it."""
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    if device.type != "cuda":
        return {"name": platform.processor() or "cpu", "versions": versions}
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory": properties.total_memory,
        "versions": {**versions, "cuda": torch.version.cuda, "driver": _driver_version()},
    }


def _driver_version() -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    answer = subprocess.run(command, capture_output=True, text=True)
    return answer.stdout.splitlines()[0].strip() if answer.returncode == 0 and answer.stdout else None


def measure_limits(device: torch.device) -> dict[str, Any]:
    """Bytes per second of a large copy, operations per second of large matrix products in both precisions."""
    return {
        "bytes_per_second": copy_rate(device),
        "operations_per_second": {"bfloat16": matmul_rate(torch.bfloat16, device), "int8": int8_rate(device)},
    }


def _count_work(subjects: dict[str, Subject], settings: GpuBenchSettings) -> dict[str, Any]:
    """What a prediction cannot do without: its operations, and the bytes of the weights that it reads."""
    model = subjects["bfloat16"].model
    prompt_tokens = subjects["bfloat16"].inputs()["input_ids"].shape[1]
    return {
        "prompt_tokens": prompt_tokens,
        "flops": sum(count_flops(model.config, 1, prompt_tokens).values()),
        # Of the token embeddings only a prompt's rows are read.
        "weights": {
            precision: weight_bytes(subject.model) - weight_bytes(subject.model.get_input_embeddings())
            for precision, subject in subjects.items()
        },
    }


def _time_predictions(subject: Subject, batch_size: int, settings: GpuBenchSettings) -> dict[str, float]:
    predict, device = subject.prediction(batch_size), subject.device
    (first,) = time_calls(predict, device, 0, 1)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = time_calls(predict, device, settings.warmup, settings.runs)
    memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return {**percentiles(seconds), "first": first, "peak_memory": memory}


def _time_stages(subject: Subject, settings: GpuBenchSettings) -> dict[str, float]:
    """The median of every stage of a prediction of one observation."""
    inputs = subject.inputs()
    with StageClock(subject.model) as clock:
        times = [clock.predict(inputs) for _ in range(settings.warmup + settings.runs)][settings.warmup :]
    return {stage: float(np.median([seconds[stage] for seconds in times])) for stage in STAGES}


def _measure_compiled(
    report: dict[str, Any],
    precision: str,
    subject: Subject,
    batch_sizes: tuple[int, ...],
    settings: GpuBenchSettings,
    budget: Budget,
    report_progress: Callable[[str], None],
) -> None:
    times = report["predictions"].setdefault(f"{precision}, compiled", {})
    for batch_size in batch_sizes:
        if not budget.allows():
            report["left_out"].append(f"{precision}, compiled, a batch of {batch_size}")
            continue
        report_progress(f"Compiling {precision}, a batch of {batch_size}")
        times[str(batch_size)] = _time_predictions(subject, batch_size, settings)
        budget.compiled_in(times[str(batch_size)]["first"])


def _measure_compiled_stages(
    report: dict[str, Any],
    precision: str,
    subject: Subject,
    settings: GpuBenchSettings,
    budget: Budget,
    report_progress: Callable[[str], None],
) -> None:
    """The modules of every stage, each compiled by itself. In a whole compiled prediction stages have no borders."""
    name = f"{precision}, compiled"
    if not budget.allows(2.0):  # the whole prediction comes after this one, and matters more
        report["left_out"].append(f"{name}, stages")
        return
    report_progress(f"Compiling {precision}, stage by stage")
    options: dict[str, Any] = {"fullgraph": True, "dynamic": False, **settings.compile_options}
    if subject.device.type == "cuda" and settings.backend is None:
        options["mode"] = "reduce-overhead"
    report["stages"][name] = {}
    start = time.perf_counter()
    for stage, call in _stage_calls(subject):
        with torch.no_grad():
            compiled = torch.compile(call.module, **options)
            seconds = time_calls(
                lambda: compiled(*call.args, **call.kwargs),  # noqa: B023 - called before the loop goes on
                subject.device,
                settings.warmup + 1,
                settings.runs,
            )
        stages = report["stages"][name]
        stages[stage] = stages.get(stage, 0.0) + float(np.median(seconds))
    budget.compiled_in(time.perf_counter() - start)


@dataclass(frozen=True)
class _Call:
    module: torch.nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def _stage_calls(subject: Subject) -> Iterator[tuple[str, _Call]]:
    """What every module of a stage is called with in a prediction of one observation."""
    calls: list[tuple[str, _Call]] = []
    handles = []
    for stage, names in STAGE_MODULES.items():
        for name in names:

            def keep(module: torch.nn.Module, args: Any, kwargs: Any, stage: str = stage) -> None:
                calls.append((stage, _Call(module, args, kwargs)))

            handles.append(subject.model.get_submodule(name).register_forward_pre_hook(keep, with_kwargs=True))
    subject.prediction()()
    synchronize(subject.device)
    for handle in handles:
        handle.remove()
    yield from calls
