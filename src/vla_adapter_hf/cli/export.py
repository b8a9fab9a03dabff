"""`vla-adapter export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vla_adapter_hf.cli.options import Cameras, Robot
from vla_adapter_hf.export.export import ExportSettings
from vla_adapter_hf.export.export import export as run


def export(
    source: Annotated[str, typer.Argument(help="Folder or Hub id of a checkpoint.")],
    destination: Annotated[Path, typer.Argument(help="Folder to create.")],
    to: Annotated[str, typer.Option(help="Engine: openvino or onnx.")] = ExportSettings.to,
    precision: Annotated[str, typer.Option(help="fp32, bf16 (OpenVINO) or int8.")] = ExportSettings.precision,
    calibrate: Annotated[
        str | None, typer.Option(help="For int8: demonstrations, a folder or Hub id.")
    ] = ExportSettings.calibrate,
    robot: Robot = ExportSettings.robot,
    cameras: Cameras = None,
    samples: Annotated[int, typer.Option(help="Observations to calibrate with.")] = ExportSettings.samples,
    prompt_tokens: Annotated[
        int, typer.Option(help="Length that prompts are padded to; longer ones are refused.")
    ] = ExportSettings.prompt_tokens,
    dynamic_batch: Annotated[
        bool, typer.Option(help="Batches of any size in one pass; slower for one observation.")
    ] = ExportSettings.dynamic_batch,
    error_ratio: Annotated[
        float, typer.Option(help="For int8: allowed mean error, in errors of bfloat16.")
    ] = ExportSettings.error_ratio,
    unnorm_key: Annotated[
        str | None, typer.Option(help="Statistics for the report in the action's units.")
    ] = ExportSettings.unnorm_key,
) -> None:
    """Write a checkpoint for OpenVINO or ONNX Runtime, checked against torch. Needs the extra [openvino] or [onnx]."""
    settings = ExportSettings(
        to=to,
        precision=precision,
        calibrate=calibrate,
        robot=robot,
        cameras=None if cameras is None else tuple(cameras),
        samples=samples,
        prompt_tokens=prompt_tokens,
        dynamic_batch=dynamic_batch,
        error_ratio=error_ratio,
        unnorm_key=unnorm_key,
    )
    run(source, destination, settings, report_progress=typer.echo)
