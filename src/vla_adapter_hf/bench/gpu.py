"""`vla-adapter bench --gpu`: what a GPU does with the published size, next to what the card could do."""

from __future__ import annotations

import platform
import shutil
import subprocess
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from vla_adapter_hf.bench.gpu_report import in_one_line, markdown
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
LACK_OF_TIME = "lack of time"


@dataclass(frozen=True, kw_only=True)
class GpuBenchSettings:
    """What [`bench_gpu`] measures.

    Args:
        device (`str`): a CUDA device. With `"cpu"` the same code runs there, to test it.
        size (`str`): random weights: `"full"`, the published size, `"shallow"` or `"small"`.
        batch_sizes (`tuple[int, ...]`): how many observations are predicted at once.
        precisions (`tuple[str, ...]`): `"bfloat16"`, and `"int8"` if wanted.
        runs (`int`): predictions that count, for every figure.
        warmup (`int`): predictions before them that do not count, after the one or two that compile and record.
        minutes (`float`): no shape is compiled that would not be done by then. What is left out is listed.
        backend (`str`, *optional*): of `torch.compile`, instead of its default.

    Raises:
        ValueError: for a device that is not there, a size that does not exist or a number out of range.
    """

    device: str = "cuda"
    size: str = "full"
    batch_sizes: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    precisions: tuple[str, ...] = PRECISIONS
    runs: int = BenchSettings.runs
    warmup: int = BenchSettings.warmup
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


class _Report:
    """The report while it grows. An error of a block is recorded in it, and the blocks after that go on.

    Args:
        content (`dict`): the report, as [`bench_gpu`] returns it.
        output (`Path`, *optional*): JSON file, written after every block; the table is written next to it.
        report_progress (`Callable`): receives the lines to print.
    """

    def __init__(self, content: dict[str, Any], output: Path | None, report_progress: Callable[[str], None]):
        self.content = content
        self.output = output
        self.report_progress = report_progress
        self.started = time.perf_counter()

    @contextmanager
    def block(self, what: str) -> Iterator[None]:
        """Measure one thing. The report is written at the end, also after an error."""
        try:
            yield
        except Exception as error:
            self.leave_out(what, f"{type(error).__name__}: {error}", traceback.format_exc())
            # What a failed compilation or recording leaves behind must not fail the next one.
            torch.compiler.reset()
        self.write()

    def leave_out(self, what: str, reason: str, trace: str | None = None) -> None:
        self.content["left_out"].append({"what": what, "reason": reason, "traceback": trace})
        self.report_progress(f"Left out: {what}: {in_one_line(reason)}")

    def write(self) -> None:
        self.content["seconds"] = time.perf_counter() - self.started
        if self.output is not None:
            write_json(self.output, self.content, indent=1)
            write_text(self.output.with_suffix(".md"), markdown(self.content))


def bench_gpu(
    settings: GpuBenchSettings | None = None,
    output: str | Path | None = None,
    report_progress: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Measure eager and compiled predictions in bfloat16 and int8, their stages, and the limits of the card.

    Every time is taken after the device has finished. The card's limits are measured too, by a large copy and by large
    matrix products in the same run. What fails is listed in `"left_out"` with its error, and the rest is measured.

    Args:
        settings ([`GpuBenchSettings`], *optional*): what is measured.
        output (`str` or `Path`, *optional*): JSON file to write the report to; the table is written next to it, with
            the ending `.md`. Both are written after every block, so that a run that is ended keeps what it has.
        report_progress (`Callable`): receives the lines to print.

    Returns:
        `dict`: the report, times in seconds, sizes in bytes.

    Raises:
        ImportError: without torchao, which int8 needs.
    """
    settings = settings or GpuBenchSettings()
    device, budget = check_device(settings.device), Budget(settings.minutes)
    options = {precision: settings.of_precision(precision).load_options() for precision in settings.precisions}
    content: dict[str, Any] = {
        "card": describe_card(device),
        "size": settings.size,
        "limits": {"operations_per_second": {}},
        "work": {"weights": {}},
        "predictions": {},
        "stages": {},
        "left_out": [],
    }
    report = _Report(content, None if output is None else Path(output), report_progress)
    _measure_limits(report, device)
    with checkpoint_source(settings.of_precision("bfloat16"), report_progress) as source:
        subjects: dict[str, Subject] = {}
        for precision in settings.precisions:
            report_progress(f"Measuring {precision}, eager")
            with report.block(precision):
                of_precision = settings.of_precision(precision)
                subjects[precision], _ = load_subject(source, of_precision, options[precision])
                _count_work(content["work"], precision, subjects[precision])
            if precision in subjects:
                _measure_eager(report, precision, subjects[precision], settings)
        for precision, subject in subjects.items():
            _measure_compiled_stages(report, precision, subject, settings, budget)
            subject.model.compile_for_inference(**settings.compile_options)
            _measure_compiled(report, precision, subject, settings.batch_sizes[0], settings, budget)
        for batch_size in sorted(settings.batch_sizes[1:], reverse=True):
            for precision, subject in subjects.items():
                _measure_compiled(report, precision, subject, batch_size, settings, budget)
    report.write()
    report_progress(markdown(content))
    return content


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


def _measure_limits(report: _Report, device: torch.device) -> None:
    """Bytes per second of a large copy, operations per second of large matrix products in both precisions."""
    limits = report.content["limits"]
    with report.block("the rate of a copy"):
        limits["bytes_per_second"] = copy_rate(device)
    with report.block("the rate of matrix products in bfloat16"):
        limits["operations_per_second"]["bfloat16"] = matmul_rate(torch.bfloat16, device)
    with report.block("the rate of matrix products in int8"):
        limits["operations_per_second"]["int8"] = int8_rate(device)


def _count_work(work: dict[str, Any], precision: str, subject: Subject) -> None:
    """What a prediction cannot do without: its operations, and the bytes of the weights that it reads."""
    model = subject.model
    # Of the token embeddings only a prompt's rows are read.
    work["weights"][precision] = weight_bytes(model) - weight_bytes(model.get_input_embeddings())
    if "flops" not in work:
        work["prompt_tokens"] = subject.inputs()["input_ids"].shape[1]
        work["flops"] = sum(count_flops(model.config, 1, work["prompt_tokens"]).values())


def _time_predictions(subject: Subject, batch_size: int, settings: GpuBenchSettings) -> dict[str, float]:
    predict, device = subject.prediction(batch_size), subject.device
    (first,) = time_calls(predict, device, 0, 1)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = time_calls(predict, device, settings.warmup + 1, settings.runs)
    memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return {**percentiles(seconds), "first": first, "peak_memory": memory}


def _measure_eager(report: _Report, precision: str, subject: Subject, settings: GpuBenchSettings) -> None:
    name = f"{precision}, eager"
    times = report.content["predictions"].setdefault(name, {})
    for batch_size in settings.batch_sizes:
        with report.block(f"{name}, a batch of {batch_size}"):
            times[str(batch_size)] = _time_predictions(subject, batch_size, settings)
    with report.block(f"{name}, stages"):
        report.content["stages"][name] = _time_stages(subject, settings)


def _time_stages(subject: Subject, settings: GpuBenchSettings) -> dict[str, float]:
    """The median of every stage of a prediction of one observation."""
    inputs = subject.inputs()
    with StageClock(subject.model) as clock:
        times = [clock.predict(inputs) for _ in range(settings.warmup + settings.runs)][settings.warmup :]
    return {stage: float(np.median([seconds[stage] for seconds in times])) for stage in STAGES}


def _measure_compiled(
    report: _Report, precision: str, subject: Subject, batch_size: int, settings: GpuBenchSettings, budget: Budget
) -> None:
    name = f"{precision}, compiled"
    what = f"{name}, a batch of {batch_size}"
    times = report.content["predictions"].setdefault(name, {})
    if not budget.allows():
        report.leave_out(what, LACK_OF_TIME)
        return
    report.report_progress(f"Compiling {precision}, a batch of {batch_size}")
    with report.block(what):
        times[str(batch_size)] = _time_predictions(subject, batch_size, settings)
        budget.compiled_in(times[str(batch_size)]["first"])


def _measure_compiled_stages(
    report: _Report, precision: str, subject: Subject, settings: GpuBenchSettings, budget: Budget
) -> None:
    """The modules of every stage, each compiled by itself. In a whole compiled prediction stages have no borders."""
    name = f"{precision}, compiled"
    if not budget.allows(2.0):  # the whole prediction comes after this one, and matters more
        report.leave_out(f"{name}, stages", LACK_OF_TIME)
        return
    report.report_progress(f"Compiling {precision}, stage by stage")
    options: dict[str, Any] = {"fullgraph": True, "dynamic": False, **settings.compile_options}
    if subject.device.type == "cuda" and settings.backend is None:
        options["mode"] = "reduce-overhead"
    stages = report.content["stages"].setdefault(name, {})
    start = time.perf_counter()
    with report.block(f"{name}, stages"):
        for stage, calls in _stage_calls(subject).items():
            with report.block(f"{name}, {stage}"):
                stages[stage] = sum(_time_compiled(call, subject.device, options, settings) for call in calls)
    budget.compiled_in(time.perf_counter() - start)


@dataclass(frozen=True)
class _Call:
    module: torch.nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def _time_compiled(call: _Call, device: torch.device, options: dict[str, Any], settings: GpuBenchSettings) -> float:
    """The median of a module's calls once it is compiled."""
    with torch.no_grad():
        compiled = torch.compile(call.module, **options)
        run = partial(compiled, *call.args, **call.kwargs)
        return float(np.median(time_calls(run, device, settings.warmup + 2, settings.runs)))


def _stage_calls(subject: Subject) -> dict[str, list[_Call]]:
    """What every module of a stage is called with in a prediction of one observation."""
    calls: dict[str, list[_Call]] = {stage: [] for stage in STAGE_MODULES}

    def keep(module: torch.nn.Module, args: Any, kwargs: Any, stage: str) -> None:
        calls[stage].append(_Call(module, args, kwargs))

    with ExitStack() as hooks:
        for stage, names in STAGE_MODULES.items():
            for name in names:
                module = subject.model.get_submodule(name)
                handle = module.register_forward_pre_hook(partial(keep, stage=stage), with_kwargs=True)
                hooks.callback(handle.remove)
        subject.prediction()()
        synchronize(subject.device)
    return calls
