"""`vla-adapter bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vla_adapter_hf.bench.gpu import GpuBenchSettings, bench_gpu
from vla_adapter_hf.bench.run import bench as run_bench
from vla_adapter_hf.bench.run import serve_turns
from vla_adapter_hf.bench.settings import BenchSettings
from vla_adapter_hf.cli.options import parse_attention, parse_dtype
from vla_adapter_hf.utils.extras import install_hint


def bench(
    checkpoint: Annotated[str | None, typer.Argument(help="Folder or Hub id; by default the embedded one.")] = None,
    size: Annotated[
        str | None, typer.Option(help="Random weights instead of a checkpoint: full, shallow or small.")
    ] = BenchSettings.size,
    dtype: Annotated[str | None, typer.Option(help="Precision: float32, bfloat16 or float16.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu (by default; with --gpu cuda), cuda, cuda:1, ...")] = None,
    threads: Annotated[
        int | None, typer.Option(help="CPU threads, by default as many as torch chooses.")
    ] = BenchSettings.threads,
    batch: Annotated[
        str | None, typer.Option(help="Observations at once: 1,2,4,8. By default 1, with --gpu 1 to 64.")
    ] = None,
    runs: Annotated[int, typer.Option(help="Predictions that are measured.")] = BenchSettings.runs,
    warmup: Annotated[int, typer.Option(help="Predictions before them that are not.")] = BenchSettings.warmup,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Predict after compile_for_inference.")
    ] = BenchSettings.compiled,
    quantize: Annotated[
        str | None, typer.Option(help="Weights in int8 or int4 (extra: quantization).")
    ] = BenchSettings.quantize,
    attn: Annotated[
        str | None, typer.Option(help="Attention: sdpa, eager, ..., or by part, as in dinov2=eager,siglip=eager.")
    ] = None,
    busy: Annotated[
        int, typer.Option(help="Other processes that compute while predictions are measured.")
    ] = BenchSettings.busy,
    against: Annotated[
        str | None, typer.Option(help="Command of a program that predicts in turn with this one.")
    ] = None,
    turns: Annotated[bool, typer.Option(help="Be that program: predict once for each line of input.")] = False,
    serve: Annotated[bool, typer.Option("--serve", help="Measure the policy server instead (extra: serve).")] = False,
    serve_clients: Annotated[
        str | None, typer.Option(help="With --serve: how many clients ask at once, by default 1,4,16.")
    ] = None,
    serve_seconds: Annotated[
        float | None, typer.Option(help="With --serve: seconds of load for each of them, by default 10.")
    ] = None,
    serve_minutes: Annotated[
        float | None, typer.Option(help="With --serve: minutes of load while memory is read, by default none.")
    ] = None,
    gpu: Annotated[
        bool, typer.Option("--gpu", help="One table of a GPU: eager, compiled, int8, batches (extra: quantization).")
    ] = False,
    minutes: Annotated[
        float | None,
        typer.Option(help="With --gpu: compile nothing that would not be done by then; 10 by default."),
    ] = None,
    backend: Annotated[str | None, typer.Option(help="With --gpu: torch.compile's backend.")] = None,
    output: Annotated[
        Path | None, typer.Option(help="JSON file to write the report to; with --gpu the table goes next to it.")
    ] = None,
) -> None:
    """Measure the time of each stage of a prediction, the share of the machine's speed, memory and loading."""
    load = {"clients": serve_clients, "seconds": serve_seconds, "memory_minutes": serve_minutes}
    if not serve:
        _refuse({f"--serve-{name.removeprefix('memory_')}": value for name, value in load.items()}, "it needs --serve")
    if not gpu:
        _refuse({"--minutes": minutes, "--backend": backend}, "it needs --gpu")
    if gpu:
        refused = {"CHECKPOINT": checkpoint, "--dtype": dtype, "--threads": threads, "--quantize": quantize}
        refused |= {"--attn": attn, "--against": against, "--turns": turns or None, "--compile": compiled or None}
        refused |= {"--serve": serve or None, "--busy": busy or None}
        _refuse(refused, "--gpu measures random weights in every way that it knows")
        given = {"device": device, "size": size, "batch_sizes": batch and parse_batch_sizes(batch), "backend": backend}
        _bench_gpu({**given, "runs": runs, "warmup": warmup, "minutes": minutes}, output)
        return
    device = device or BenchSettings.device
    if serve:
        refused = {"--size": size, "--attn": attn, "--against": against, "--turns": turns or None}
        refused |= {"--busy": busy or None, "--batch": batch}
        _refuse(refused, "--serve measures a server that is started as users start it")
        server = {"device": device, "dtype": dtype, "threads": threads, "compiled": compiled, "quantize": quantize}
        if serve_clients is not None:
            load["clients"] = parse_batch_sizes(serve_clients, "--serve-clients")
        load = {name: value for name, value in load.items() if value is not None}
        _bench_server(checkpoint, server, {**load, "requests": runs}, output)
        return
    settings = BenchSettings(
        checkpoint=checkpoint,
        size=size,
        dtype=parse_dtype(dtype),
        device=device,
        threads=threads,
        batch_sizes=BenchSettings.batch_sizes if batch is None else parse_batch_sizes(batch),
        runs=runs,
        warmup=warmup,
        compiled=compiled,
        quantize=quantize,
        attention=parse_attention(attn),
        busy=busy,
    )
    if not turns:
        run_bench(settings, against=against, output=output, report_progress=typer.echo)
    elif against is not None or output is not None:
        raise ValueError("--turns answers with seconds only: leave out --against and --output.")
    else:
        serve_turns(settings, report_progress=lambda line: typer.echo(line, err=True))


def _refuse(options: dict[str, Any], reason: str) -> None:
    for option, value in options.items():
        if value is not None:
            raise ValueError(f"leave out {option}: {reason}.")


def _bench_gpu(given: dict[str, Any], output: Path | None) -> None:
    settings = GpuBenchSettings(**{name: value for name, value in given.items() if value is not None})
    report = bench_gpu(settings, output, report_progress=typer.echo)
    failed = [entry["what"] for entry in report["left_out"] if entry["traceback"] is not None]
    if failed:
        typer.secho(f"error: the rest was measured, but these failed: {'; '.join(failed)}", fg="red", err=True)
        raise typer.Exit(1)


def _bench_server(checkpoint: str | None, server: dict[str, Any], load: dict[str, Any], output: Path | None) -> None:
    try:
        from vla_adapter_hf.serving.bench import ServeBenchSettings, bench_server
    except ModuleNotFoundError as error:
        raise ImportError(f"--serve needs {error.name}: {install_hint('serve')}") from error
    from vla_adapter_hf.serving.settings import ServeSettings

    settings = ServeBenchSettings(checkpoint=checkpoint, server=ServeSettings(**server), **load)
    bench_server(settings, output, report_progress=typer.echo)


def parse_batch_sizes(text: str, option: str = "--batch") -> tuple[int, ...]:
    """`"1,2,4"` is three sizes.

    Raises:
        ValueError: a text that is no list of numbers.
    """
    if not all(part.strip().isdigit() for part in text.split(",")):
        raise ValueError(f"{option} must be numbers such as 1,2,4,8, got {text!r}.")
    return tuple(int(part) for part in text.split(","))
