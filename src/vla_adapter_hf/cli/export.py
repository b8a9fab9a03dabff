"""`vla-adapter export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vla_adapter_hf.cli.command import split_names
from vla_adapter_hf.cli.settings import Text, takes_settings
from vla_adapter_hf.export.export import ExportSettings
from vla_adapter_hf.export.export import export as run


@takes_settings(
    ExportSettings, texts={"cameras": Text(lambda words: tuple(split_names(words)), None, list[str] | None)}
)
def export(
    source: Annotated[str, typer.Argument(help="Folder or Hub id of a checkpoint.")],
    destination: Annotated[Path, typer.Argument(help="Folder to create.")],
    *,
    settings: ExportSettings,
) -> None:
    """Write a checkpoint for OpenVINO or ONNX Runtime, checked against torch. Needs the extra [openvino] or [onnx]."""
    run(source, destination, settings, report_progress=typer.echo)
