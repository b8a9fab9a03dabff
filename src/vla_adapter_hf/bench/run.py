"""`vla-adapter bench`: the time of a prediction, stage by stage, its memory, and the machine's limit."""

from __future__ import annotations

import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from vla_adapter_hf.bench.busy import busy_processes
from vla_adapter_hf.bench.measures import (
    STAGES,
    StageClock,
    count_flops,
    matmul_rate,
    memory_in_use,
    peak_memory,
    seconds_to_read,
    time_calls,
    weight_bytes,
)
from vla_adapter_hf.bench.report import comparison, percentiles, table
from vla_adapter_hf.bench.settings import BenchSettings
from vla_adapter_hf.bench.subject import Subject, checkpoint_source, load_subject, observations
from vla_adapter_hf.bench.turns import OtherProgram, answer_turns, split_command
from vla_adapter_hf.checkpoints.exported import ENGINES
from vla_adapter_hf.processing import jpeg_round_trip_vla_adapter as jpeg
from vla_adapter_hf.utils.devices import waits_passively
from vla_adapter_hf.utils.files import write_json


def bench(
    settings: BenchSettings | None = None,
    *,
    against: str | None = None,
    output: str | Path | None = None,
    report_progress: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Measure predictions on recorded frames that ship with the package.

    Args:
        settings ([`BenchSettings`], *optional*): what is measured; by default the checkpoint in the package.
        against (`str`, *optional*): command of another program that predicts one observation in turn, see `turns.py`.
            It comes last: if it fails, everything else has been reported.
        output (`str` or `Path`, *optional*): JSON file to write the report to.
        report_progress (`Callable`): receives the lines to print.

    Returns:
        `dict`: the report, times in seconds, sizes in bytes.

    Raises:
        ValueError: for another program that does not start, fails or gives no times.
    """
    settings = settings or BenchSettings()
    load_options = settings.load_options()
    if against is not None:
        split_command(against)
    with checkpoint_source(settings, report_progress) as source:
        subject, loading = _measure_loading(source, settings, load_options)
        with busy_processes(settings.busy):
            stages, rates = _measure_stages(subject, settings)
            predictions, more_rates = _measure_predictions(subject, settings, report_progress)
        rates += more_rates
        report = {
            "checkpoint": settings.name,
            **_describe(subject, settings),
            **loading,
            "stages": stages,
            "predictions": predictions,
            "matmul_flops_per_second": {"fastest": max(rates), "all": rates},
        }
        # At the end, because it takes as much memory as the files are large.
        weight_files = _weight_files(source)
        report["load"]["read_seconds"] = seconds_to_read(weight_files) if weight_files else None
        for line in table(report):
            report_progress(line)
        _write(report, output)
        if against is not None:
            report_progress(f"in turn with {against}")
            with busy_processes(settings.busy):
                report["against"] = _take_turns(subject, settings, against)
            report_progress(comparison(report["against"], report["waiting"]))
            _write(report, output)
    return report


def serve_turns(settings: BenchSettings, report_progress: Callable[[str], None] = print) -> None:
    """Be the other program of [`bench`]: predict once for every line of the standard input.

    Raises:
        ValueError: for more than one observation at once.
    """
    if settings.batch_sizes != (1,) or settings.busy:
        raise ValueError("--turns answers with the seconds of one observation: leave --batch and --busy out.")
    load_options = settings.load_options()
    with checkpoint_source(settings, report_progress) as source:
        subject, _ = load_subject(source, settings, load_options)
        if settings.compiled:
            subject.model.compile_for_inference()
        predict = subject.prediction()
        time_calls(predict, subject.device, settings.warmup, 0)
        answer_turns(lambda: time_calls(predict, subject.device, 0, 1)[0])


def _weight_files(source: str) -> list[Path]:
    kinds = ("*.safetensors", "*.pt", *(name for names in ENGINES.values() for name in names))
    return sorted(file for kind in kinds for file in Path(source).glob(kind))


def _measure_loading(
    source: str, settings: BenchSettings, load_options: dict[str, Any]
) -> tuple[Subject, dict[str, Any]]:
    """Loading, and memory up to the first prediction. Nothing else may have used memory before."""
    weight_files = _weight_files(source)
    for file in weight_files:  # loading and reading then both find them in the system's cache
        with file.open("rb") as stream:
            while stream.read(1 << 24):
                pass
    at_start = memory_in_use(settings.torch_device)
    subject, load_seconds = load_subject(source, settings, load_options)
    (first_seconds,) = time_calls(subject.prediction(), subject.device, 0, 1)
    peak = peak_memory(subject.device)
    return subject, {
        "load": {"seconds": load_seconds, "read_seconds": None, "first_prediction_seconds": first_seconds},
        "memory": {
            "weights": sum(file.stat().st_size for file in weight_files)
            if subject.exported
            else weight_bytes(subject.model),
            "peak": None if peak is None else peak - at_start,
        },
    }


def _describe(subject: Subject, settings: BenchSettings) -> dict[str, Any]:
    device, model, config = settings.torch_device, subject.model, subject.model.config
    precision = settings.quantize or str(model.dtype).removeprefix("torch.")
    if subject.exported:
        precision = f"{model.record['engine']} {model.record['precision']}"
    jpeg_decoder = "none"
    if config.image_jpeg_round_trip:
        jpeg_decoder = "NumPy" if jpeg.simplejpeg is None else "simplejpeg"
    return {
        "precision": precision,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "compiled": settings.compiled,
        "busy": settings.busy,
        "waiting": "passive" if waits_passively() else "active",
        "attention": {
            part: "the engine" if subject.exported else getattr(config, part)._attn_implementation
            for part in ("dinov2_config", "siglip_config", "text_config")
        },
        "jpeg_decoder": jpeg_decoder,
    }


def _measure_stages(subject: Subject, settings: BenchSettings) -> tuple[dict[str, Any], list[float]]:
    """Percentiles of the stages of a prediction of one observation; rates of a matrix product before and after."""
    model, device = subject.model, subject.device
    rates = [matmul_rate(subject.matmul_dtype, device)]
    images = observations(model.config, 1)["images"]
    prepare = time_calls(lambda: subject.processor.image_processor(images), device, settings.warmup, settings.runs)
    stages: dict[str, list[float]] = {"image preparation": prepare}
    inputs = subject.inputs()
    if subject.exported:  # no hooks see its stages
        return {"image preparation": percentiles(prepare)}, rates
    with StageClock(model) as clock:
        for run in range(-settings.warmup, settings.runs):
            seconds = clock.predict(inputs)
            for stage in STAGES if run >= 0 else ():
                stages.setdefault(stage, []).append(seconds[stage])
    rates.append(matmul_rate(subject.matmul_dtype, device))
    return {stage: percentiles(seconds) for stage, seconds in stages.items()}, rates


def _measure_predictions(
    subject: Subject, settings: BenchSettings, report_progress: Callable[[str], None]
) -> tuple[dict[str, Any], list[float]]:
    """Whole predictions for every batch size, and rates of a matrix product between them."""
    model, device = subject.model, subject.device
    if settings.compiled:
        report_progress("Compiling")
        model.compile_for_inference()
    predictions = {batch_size: subject.prediction(batch_size) for batch_size in settings.batch_sizes}
    seconds_of: dict[int, list[float]] = {batch_size: [] for batch_size in settings.batch_sizes}
    rates = []
    # The sizes take turns, because a machine that others use too is faster in some minutes than in others.
    for run in range(-max(settings.warmup, 1), settings.runs):
        for batch_size, predict in predictions.items():
            seconds = time_calls(predict, device, 0, 1)
            seconds_of[batch_size] += seconds if run >= 0 else []
        rates.append(matmul_rate(subject.matmul_dtype, device))
    report = {}
    for batch_size, seconds in seconds_of.items():
        prompt_tokens = subject.inputs(batch_size)["input_ids"].shape[1]
        report[str(batch_size)] = {
            **percentiles(seconds),
            "per_second": batch_size / np.median(seconds),
            "prompt_tokens": prompt_tokens,
            "flops": count_flops(model.config, batch_size, prompt_tokens),
        }
    return report, rates


def _take_turns(subject: Subject, settings: BenchSettings, command: str) -> dict[str, Any]:
    """Times of ours and of another program, one prediction each in turn."""
    predict = subject.prediction()
    with OtherProgram(command) as program:
        for _ in range(max(settings.warmup, 1)):
            predict()
            program.predict()
        ours, theirs = [], []
        for _ in range(settings.runs):
            ours += time_calls(predict, subject.device, 0, 1)
            theirs.append(program.predict())
    ratio = float(np.median(np.divide(theirs, ours)))
    return {"command": command, "ours": percentiles(ours), "theirs": percentiles(theirs), "ratio": ratio}


def _write(report: dict[str, Any], output: str | Path | None) -> None:
    if output is not None:
        write_json(output, report, indent=1)
