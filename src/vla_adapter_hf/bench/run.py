"""`vla-adapter bench`: how long a prediction takes, stage by stage, what it needs, and how near that is to the limit."""

from __future__ import annotations

import multiprocessing
import platform
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.resources import as_file, files
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from huggingface_hub import snapshot_download
from transformers import AutoConfig, AutoModel, AutoProcessor

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
from vla_adapter_hf.bench.turns import Rival, answer_turns, split_command
from vla_adapter_hf.checkpoints.backbones import load_tokenizer
from vla_adapter_hf.checkpoints.quantization import quantization_config
from vla_adapter_hf.checkpoints.saving import synthetic_observation
from vla_adapter_hf.init.untrained import init_from_config
from vla_adapter_hf.modeling.configuration_vla_adapter import (
    PUBLISHED_DINOV2,
    PUBLISHED_QWEN2,
    PUBLISHED_SIGLIP,
    VLAAdapterConfig,
)
from vla_adapter_hf.processing import jpeg_round_trip_vla_adapter as jpeg
from vla_adapter_hf.utils.devices import check_device
from vla_adapter_hf.utils.files import write_json


# Models with random weights, by what differs from the published size.
SMALL_TOWER = {"hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "patch_size": 14}
SIZES: dict[str, dict[str, Any]] = {
    "full": {},
    # The published layers, three of each kind: their speed, in an eighth of the time.
    "shallow": {
        "dinov2_config": {**PUBLISHED_DINOV2, "num_hidden_layers": 3},
        "siglip_config": {**PUBLISHED_SIGLIP, "num_hidden_layers": 3},
        "text_config": {**PUBLISHED_QWEN2, "num_hidden_layers": 3, "vocab_size": 1024},
        "policy_num_layers": 3,
    },
    "small": {
        "dinov2_config": SMALL_TOWER,
        "siglip_config": {**SMALL_TOWER, "intermediate_size": 256, "vision_use_head": False},
        "text_config": {
            "hidden_size": 128,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 256,
        },
        "policy_num_layers": 4,
    },
}
# Turns with another program are taken for one batch size only.
SINGLE = 1


def bench(
    checkpoint: str | None = None,
    *,
    size: str | None = None,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    threads: int | None = None,
    batch_sizes: Sequence[int] = (SINGLE,),
    runs: int = 10,
    warmup: int = 2,
    compiled: bool = False,
    quantize: str | None = None,
    attention: str | dict[str, str] | None = None,
    against: str | None = None,
    turns: bool = False,
    output: str | Path | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any] | None:
    """Measure predictions on the recorded frames that ship with the package.

    Args:
        checkpoint (`str`, *optional*): folder or Hub id; by default the small one that ships with the package.
        size (`str`, *optional*): instead of a checkpoint random weights, written to a temporary folder first: `"full"`,
            the published size, `"shallow"`, its layers but three of each kind, or `"small"`.
        dtype (`torch.dtype`, *optional*): precision; by default the checkpoint's, for random weights bfloat16.
        device (`str`): `"cpu"`, `"cuda"`, `"cuda:1"`, ...
        threads (`int`, *optional*): of the CPU; by default torch's choice.
        batch_sizes (`Sequence[int]`): how many observations are predicted at once.
        runs (`int`): predictions that count, for every figure.
        warmup (`int`): predictions before them that do not.
        compiled (`bool`): measure whole predictions after `compile_for_inference`. Stages, loading and memory are always
            without; operations are those of the prompt as it is and not as it is padded.
        quantize (`str`, *optional*): `"int8"` or `"int4"`, see [`quantization_config`].
        attention (`str` or `dict`, *optional*): transformers' `attn_implementation`, one for all or by `dinov2_config`,
            `siglip_config` and `text_config`.
        against (`str`, *optional*): command of another program that predicts one observation in turn, see
            `bench_turns.py`. It comes last, and if it fails all else has been reported.
        turns (`bool`): be that other program: answer lines of input instead of measuring.
        output (`str` or `Path`, *optional*): JSON file to write the report to.
        say (`Callable`): receives the lines to print.

    Returns:
        `dict`: the report, times in seconds, sizes in bytes; `None` after `turns`.

    Raises:
        ValueError: for contradicting arguments, a device that is not there, or another program that fails.
    """
    place = _check_arguments(checkpoint, size, device, threads, batch_sizes, runs, warmup)
    load_options = _load_options(dtype, place, quantize, attention)
    if against is not None:
        split_command(against)
    if turns and (against is not None or output is not None or tuple(batch_sizes) != (SINGLE,)):
        raise ValueError(
            "--turns answers with the seconds of one observation: leave --against, --output, --batch out."
        )
    if threads is not None:
        torch.set_num_threads(threads)
    with ExitStack() as stack:
        if size is not None:
            say(f"Writing random weights, {size} size")
            source = str(stack.enter_context(random_checkpoint(size, dtype or torch.bfloat16)))
        elif checkpoint is None:
            source = str(stack.enter_context(as_file(files("vla_adapter_hf").joinpath("embedded", "checkpoint"))))
        else:  # what is downloaded first does not count as loading
            source = checkpoint if Path(checkpoint).is_dir() else _download(checkpoint)
        if turns:
            model, processor, _ = _load(source, place, load_options)
            inputs = _prepare(model, processor, SINGLE)
            if compiled:
                model.compile_for_inference()
            time_calls(lambda: model.predict_action(**inputs), place, warmup, 0)
            answer_turns(lambda: time_calls(lambda: model.predict_action(**inputs), place, 0, 1)[0])
            return None
        name = checkpoint or (f"random weights, {size}" if size else "embedded")
        report, model, processor = _measure(
            source, place, load_options, quantize, batch_sizes, runs, warmup, compiled, say
        )
        report = {"checkpoint": name, **report}
        for line in table(report):
            say(line)
        _write(report, output)
        if against is not None:
            say(f"in turn with {against}")
            turns_taken = _take_turns(model, processor, against, warmup, runs)
            report["against"] = {"command": against, **turns_taken}
            say(
                f"ours {turns_taken['ours']['p50'] * 1e3:.1f} ms, theirs {turns_taken['theirs']['p50'] * 1e3:.1f} ms; "
                f"by pairs of turns {turns_taken['ratio']:.2f} x as fast"
            )
            _write(report, output)
    return report


def _download(checkpoint: str) -> str:
    try:
        return snapshot_download(checkpoint)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{checkpoint!r} is no folder here, and could not be fetched from the Hub: {error}"
        ) from error


def _write(report: dict[str, Any], output: str | Path | None) -> None:
    if output is None:
        return
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    write_json(output, report, indent=1)


@contextmanager
def random_checkpoint(size: str, dtype: torch.dtype) -> Iterator[Path]:
    """A temporary folder with a checkpoint of random weights of one of `SIZES`, for as long as the context lasts."""
    with tempfile.TemporaryDirectory(prefix="vla-adapter-bench-") as folder:
        # In a process of its own: what making the weights takes must not count as the prediction's memory.
        writer = multiprocessing.get_context("spawn").Process(target=_write_random, args=(folder, size, dtype))
        writer.start()
        writer.join()
        if writer.exitcode:
            raise RuntimeError(f"writing random weights ended with exit code {writer.exitcode}.")
        yield Path(folder)


def _write_random(folder: str, size: str, dtype: torch.dtype) -> None:
    with as_file(files("vla_adapter_hf").joinpath("embedded")) as embedded:
        tokenizer = load_tokenizer(str(embedded / "tokenizer"))
        norm_stats = AutoConfig.from_pretrained(embedded / "checkpoint").norm_stats
    config = VLAAdapterConfig(**SIZES[size], norm_stats=norm_stats, dtype=dtype)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model, processor = init_from_config(config, tokenizer)
    finally:
        torch.set_default_dtype(before)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def _check_arguments(
    checkpoint: str | None,
    size: str | None,
    device: str,
    threads: int | None,
    batch_sizes: Sequence[int],
    runs: int,
    warmup: int,
) -> torch.device:
    if checkpoint is not None and size is not None:
        raise ValueError(f"give either a checkpoint ({checkpoint}) or --size {size}, not both.")
    if size is not None and size not in SIZES:
        raise ValueError(f"--size must be one of {', '.join(SIZES)}, got {size!r}.")
    for name, value, least in (
        ("runs", runs, 1),
        ("warmup", warmup, 0),
        *(("threads", count, 1) for count in (threads,) if count is not None),
        *(("batch", size, 1) for size in batch_sizes),
    ):
        if value < least:
            raise ValueError(f"--{name} must be at least {least}, got {value}.")
    place = check_device(device, "--device")
    if place.type not in ("cpu", "cuda"):
        raise ValueError(f"--device must be cpu or cuda, got {device!r}.")
    return place


def _load_options(
    dtype: torch.dtype | None,
    device: torch.device,
    quantize: str | None,
    attention: str | dict[str, str] | None = None,
) -> dict[str, Any]:
    """What `from_pretrained` is told."""
    options: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
    if attention is not None:
        options["attn_implementation"] = attention
    if quantize is None:
        return options
    if device.type == "cuda":  # torchao packs weights where they are
        options["device_map"] = {"": str(device)}
        if quantize == "int4" and options.setdefault("dtype", torch.bfloat16) != torch.bfloat16:
            raise ValueError(f"--quantize int4 on CUDA computes in bfloat16 only, got --dtype {dtype}.")
    return options | {"quantization_config": quantization_config(quantize, device)}


def _load(source: str, device: torch.device, options: dict[str, Any]) -> tuple[Any, Any, float]:
    """Model, processor, and the seconds that the model took."""
    loaded: list[Any] = []

    def load() -> None:
        model = AutoModel.from_pretrained(source, **options)
        loaded.append(model if "device_map" in options else model.to(device))

    (seconds,) = time_calls(load, device, 0, 1)
    return loaded[0], AutoProcessor.from_pretrained(source), seconds


def _observations(config: VLAAdapterConfig, batch_size: int) -> dict[str, Any]:
    """Frames of a camera, as many as the model takes; state and instruction of the right sizes."""
    one = synthetic_observation(config)
    with as_file(files("vla_adapter_hf").joinpath("embedded", "observation.npz")) as path, np.load(path) as recorded:
        frames = list(islice(cycle((recorded["full_image"], recorded["wrist_image"])), config.num_cameras))
    return {
        "images": [frames] * batch_size,
        "text": [one["text"]] * batch_size,
        "state": np.stack([one["state"]] * batch_size),
    }


def _prepare(model: Any, processor: Any, batch_size: int) -> dict[str, Any]:
    """Arguments of `predict_action`."""
    key = next(iter(model.config.norm_stats or {}), None)
    return {**processor(**_observations(model.config, batch_size)), "unnorm_key": key}


def _measure(
    source, device, load_options, quantize, batch_sizes, runs, warmup, compiled, say
) -> tuple[dict[str, Any], Any, Any]:
    """The report, and the model and the processor that were measured."""
    # 1. Loading, and memory up to the first prediction, before anything else uses any.
    weight_files = sorted(file for kind in ("*.safetensors", "*.pt") for file in Path(source).glob(kind))
    for file in weight_files:  # so that loading and reading both find them in the system's cache
        with file.open("rb") as stream:
            while stream.read(1 << 24):
                pass
    at_start = memory_in_use(device)
    model, processor, load_seconds = _load(source, device, load_options)
    inputs = _prepare(model, processor, SINGLE)
    (first_seconds,) = time_calls(lambda: model.predict_action(**inputs), device, 0, 1)
    peak = peak_memory(device)
    weights = weight_bytes(model)
    config = model.config
    report: dict[str, Any] = {
        "precision": quantize or str(model.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "compiled": compiled,
        "attention": {
            part: getattr(config, part)._attn_implementation
            for part in ("dinov2_config", "siglip_config", "text_config")
        },
        "jpeg_decoder": _jpeg_decoder(config),
        "load": {"seconds": load_seconds, "read_seconds": None, "first_prediction_seconds": first_seconds},
        "memory": {"weights": weights, "peak": None if peak is None else peak - at_start},
    }
    rates = [matmul_rate(model.dtype, device)]

    # 2. Stages, one observation.
    images = _observations(config, SINGLE)["images"]
    stages: dict[str, list[float]] = {
        "image preparation": time_calls(lambda: processor.image_processor(images), device, warmup, runs)
    }
    with StageClock(model) as clock:
        for run in range(-warmup, runs):
            seconds = clock.predict(inputs)
            for stage in STAGES if run >= 0 else ():
                stages.setdefault(stage, []).append(seconds[stage])
    report["stages"] = {stage: _percentiles(seconds) for stage, seconds in stages.items()}
    rates.append(matmul_rate(model.dtype, device))

    # 3. Whole predictions, for every batch size.
    if compiled:
        say("Compiling")
        model.compile_for_inference()
    inputs_of = {batch_size: _prepare(model, processor, batch_size) for batch_size in batch_sizes}
    seconds_of: dict[int, list[float]] = {batch_size: [] for batch_size in batch_sizes}
    # In turn, as a machine that others use too is faster in some minutes than in others.
    for run in range(-max(warmup, 1), runs):
        for batch_size, inputs in inputs_of.items():
            seconds = time_calls(lambda inputs=inputs: model.predict_action(**inputs), device, 0, 1)
            seconds_of[batch_size] += seconds if run >= 0 else []
        rates.append(matmul_rate(model.dtype, device))
    report["predictions"] = {}
    for batch_size, seconds in seconds_of.items():
        prompt_tokens = inputs_of[batch_size]["input_ids"].shape[1]
        report["predictions"][str(batch_size)] = {
            **_percentiles(seconds),
            "per_second": batch_size / np.median(seconds),
            "prompt_tokens": prompt_tokens,
            "flops": count_flops(config, batch_size, prompt_tokens),
        }
    report["matmul_flops_per_second"] = {"fastest": max(rates), "all": rates}

    # 4. At the end, as it takes as much memory as the files are large.
    if weight_files:
        report["load"]["read_seconds"] = seconds_to_read(weight_files)
    return report, model, processor


def _jpeg_decoder(config: VLAAdapterConfig) -> str:
    if not config.image_jpeg_round_trip:
        return "none"
    return "NumPy" if jpeg.simplejpeg is None else "simplejpeg"


def _take_turns(model: Any, processor: Any, command: str, warmup: int, runs: int) -> dict[str, Any]:
    inputs = _prepare(model, processor, SINGLE)
    with Rival(command) as rival:
        for _ in range(max(warmup, 1)):
            time_calls(lambda: model.predict_action(**inputs), model.device, 0, 1)
            rival.predict()
        ours, theirs = [], []
        for _ in range(runs):
            ours += time_calls(lambda: model.predict_action(**inputs), model.device, 0, 1)
            theirs.append(rival.predict())
    ratios = np.divide(theirs, ours)
    return {"ours": _percentiles(ours), "theirs": _percentiles(theirs), "ratio": float(np.median(ratios))}


def _percentiles(seconds: list[float]) -> dict[str, float]:
    return {"fastest": min(seconds), "p50": float(np.median(seconds)), "p95": float(np.percentile(seconds, 95))}


def table(report: dict[str, Any]) -> list[str]:
    """A report as lines of text, times in milliseconds."""
    precision = f"{report['precision']}{', compiled' if report['compiled'] else ''}"
    rate = report["matmul_flops_per_second"]["fastest"]
    lines = [
        f"{report['checkpoint']}, {precision}, {report['device']}, {report['threads']} threads, "
        f"JPEG by {report['jpeg_decoder']}, attention by {', '.join(dict.fromkeys(report['attention'].values()))}",
        "",
        f"{'ms, stages not compiled' if report['compiled'] else 'ms':<24}{'fastest':>10}{'p50':>10}{'p95':>10}",
    ]
    lines += [_row(stage, times) for stage, times in report["stages"].items()]
    for batch_size, times in report["predictions"].items():
        layers, attention = times["flops"]["layers"], times["flops"]["attention"]
        share, of_layers = (flops / times["p50"] / rate for flops in (layers + attention, layers))
        lines.append(
            f"{_row(f'prediction of {batch_size}', times)}   {times['per_second']:.2f}/s, "
            f"{(layers + attention) / 1e9:.0f} GFLOP at {share:.0%} of the matrix product's rate, "
            f"{layers / 1e9:.0f} without attention at {of_layers:.0%}"
        )
    load, memory = report["load"], report["memory"]
    lines += ["", f"matrix product  {rate / 1e9:.0f} GFLOP/s"]
    loading = f"load            {load['seconds']:.2f} s"
    if load["read_seconds"]:
        loading += f", {load['seconds'] / load['read_seconds']:.2f} x reading the files once"
    lines.append(f"{loading}; first prediction {load['first_prediction_seconds']:.2f} s")
    if memory["peak"] is not None:
        lines.append(
            f"peak memory     {memory['peak'] / 2**30:.2f} GiB above the start, "
            f"{memory['peak'] / memory['weights']:.2f} x the weights ({memory['weights'] / 2**30:.2f} GiB)"
            f"{', before compiling' if report['compiled'] else ''}"
        )
    return lines


def _row(name: str, times: dict[str, float]) -> str:
    return f"{name:<24}" + "".join(f"{times[part] * 1e3:>10.2f}" for part in ("fastest", "p50", "p95"))
