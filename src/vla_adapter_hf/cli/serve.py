"""`vla-adapter serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vla_adapter_hf.cli.command import split_names
from vla_adapter_hf.serving.settings import ServeSettings
from vla_adapter_hf.utils.extras import install_hint


def serve(
    checkpoint: Annotated[str | None, typer.Argument(help="Folder or Hub id; by default the embedded one.")] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")
    ] = ServeSettings.host,
    port: Annotated[int, typer.Option(help="Port; 0 takes a free one.")] = ServeSettings.port,
    without_key: Annotated[
        bool, typer.Option("--without-key", help="Let other machines in without VLA_ADAPTER_API_KEY.")
    ] = ServeSettings.without_key,
    tls_certificate: Annotated[
        Path | None, typer.Option(help="PEM file: serve https and wss.")
    ] = ServeSettings.tls_certificate,
    tls_key: Annotated[Path | None, typer.Option(help="PEM file of its key.")] = ServeSettings.tls_key,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = ServeSettings.device,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; by default float32 on a CPU.")
    ] = ServeSettings.dtype,
    threads: Annotated[
        int | None, typer.Option(help="CPU threads, by default torch's choice.")
    ] = ServeSettings.threads,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Predict after compile_for_inference.")
    ] = ServeSettings.compiled,
    quantize: Annotated[
        str | None, typer.Option(help="Weights in int8 or int4 (extra: quantization).")
    ] = ServeSettings.quantize,
    unnorm_key: Annotated[
        str | None, typer.Option(help="Which of the checkpoint's statistics to use.")
    ] = ServeSettings.unnorm_key,
    robot: Annotated[
        str | None,
        typer.Option(
            help="Answer in this robot's gripper convention, or none for physical units; by default by the "
            "statistics' name."
        ),
    ] = ServeSettings.robot,
    camera: Annotated[
        list[str] | None, typer.Option(help="A client's name for a camera: --camera front=image hand=wrist_image.")
    ] = None,
    resize: Annotated[
        str, typer.Option(help="Frames that are not square: stretch, or pad with black.")
    ] = ServeSettings.resize,
    max_batch: Annotated[int, typer.Option(help="Observations predicted at once.")] = ServeSettings.max_batch,
    max_wait_ms: Annotated[
        float, typer.Option(help="How long a batch waits for observations that are being prepared.")
    ] = ServeSettings.max_wait_ms,
    max_queue: Annotated[int, typer.Option(help="Observations that may wait.")] = ServeSettings.max_queue,
    out_of_range: Annotated[
        str, typer.Option(help="A state far outside the training data: warn (in the log), error or ignore.")
    ] = ServeSettings.out_of_range,
    clip: Annotated[bool, typer.Option("--clip", help="Limit actions to the training range.")] = ServeSettings.clip,
    max_age: Annotated[
        float | None, typer.Option(help="Refuse observations that are older, in seconds.")
    ] = ServeSettings.max_age,
    max_frame_mb: Annotated[float, typer.Option(help="Limit of a decoded frame.")] = ServeSettings.max_frame_mb,
    max_message_mb: Annotated[float, typer.Option(help="Limit of a message.")] = ServeSettings.max_message_mb,
    max_connections: Annotated[int, typer.Option(help="Websockets at once.")] = ServeSettings.max_connections,
    max_seconds: Annotated[float, typer.Option(help="Limit of an answer.")] = ServeSettings.max_seconds,
    ping_seconds: Annotated[
        float, typer.Option(help="Close websockets that do not answer a ping for so long.")
    ] = ServeSettings.ping_seconds,
) -> None:
    """Answer robots and simulators over the network, in the protocols of openpi, vLLM-Omni, OpenVLA-OFT and vla-eval.

    An API key is read from the environment variable VLA_ADAPTER_API_KEY. The page at the server's address shows the
    last prediction.
    """
    try:
        from vla_adapter_hf.serving.server import serve as run_server
    except ModuleNotFoundError as error:
        raise ImportError(f"vla-adapter serve needs {error.name}: {install_hint('serve')}") from error

    settings = ServeSettings(
        host=host,
        port=port,
        without_key=without_key,
        tls_certificate=tls_certificate,
        tls_key=tls_key,
        device=device,
        dtype=dtype,
        threads=threads,
        compiled=compiled,
        quantize=quantize,
        unnorm_key=unnorm_key,
        robot=robot,
        cameras=parse_cameras(split_names(camera) or []),
        resize=resize,
        max_batch=max_batch,
        max_wait_ms=max_wait_ms,
        max_queue=max_queue,
        out_of_range=out_of_range,
        clip=clip,
        max_age=max_age,
        max_frame_mb=max_frame_mb,
        max_message_mb=max_message_mb,
        max_connections=max_connections,
        max_seconds=max_seconds,
        ping_seconds=ping_seconds,
    )
    run_server(checkpoint, settings, report_progress=lambda line: print(line, flush=True))


def parse_cameras(words: list[str]) -> dict[str, str]:
    """`["front=image"]` is `{"front": "image"}`.

    Raises:
        ValueError: a word without `=`, or a name that comes twice.
    """
    pairs = [word.partition("=") for word in words]
    if not all(name and equals and camera for name, equals, camera in pairs):
        raise ValueError(
            f"--camera must be the client's name, = and the checkpoint's, such as front=image, got {words}."
        )
    if len({name for name, _, _ in pairs}) != len(pairs):
        raise ValueError(f"--camera names a camera twice: {words}.")
    return {name: camera for name, _, camera in pairs}
