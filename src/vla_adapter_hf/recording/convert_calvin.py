"""CALVIN's own recordings as a LeRobot v3.0 dataset: every annotated span becomes an episode."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vla_adapter_hf.recording.calvin_recordings import CalvinRecordings, Span, read_step
from vla_adapter_hf.recording.jobs import check_settings, run_jobs
from vla_adapter_hf.recording.lerobot_writer import (
    PARTS,
    LeRobotLayout,
    assemble,
    save_episode,
    saved_episodes,
)
from vla_adapter_hf.simulation.calvin.simulation import SIZES
from vla_adapter_hf.simulation.settings import CALVIN_RATE
from vla_adapter_hf.utils.files import exclusive_folder, visible_files
from vla_adapter_hf.utils.frames import encode_image


LAYOUT = LeRobotLayout(
    cameras=tuple(SIZES),
    image_size=tuple(SIZES.values()),
    state_names=("x", "y", "z", "euler_x", "euler_y", "euler_z", "gripper_width", "gripper_command"),
    action_names=("x", "y", "z", "euler_x", "euler_y", "euler_z", "gripper"),
    fps=CALVIN_RATE,
)
_BATCH = 20  # spans that a process converts before it reports


@dataclass(frozen=True)
class ConversionSettings:
    """How a dataset is converted.

    Args:
        image_format: `png` keeps every pixel, `jpeg` (quality 95) takes a quarter of the space.
        workers: processes; 1 converts in this one.

    Raises:
        ValueError: another format, or no process.
    """

    image_format: str = "png"
    workers: int = 1

    def __post_init__(self) -> None:
        if self.image_format not in ("png", "jpeg"):
            raise ValueError(f"image_format must be 'png' or 'jpeg', got {self.image_format!r}")
        if self.workers < 1:
            raise ValueError(f"workers must be at least 1, got {self.workers}")


def convert_calvin(
    source: str | Path,
    output: str | Path,
    settings: ConversionSettings | None = None,
    report: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Converts CALVIN's recordings to a LeRobot v3.0 dataset, and goes on where an earlier call was killed.

    An episode is an annotated span, both of its ends included. Numbers are stored as float32, and with
    `robot="calvin"` a dataset turns them into what a model learns. `meta/demonstrations.jsonl` has subtask and steps
    of every span. The columns:

    - `observation.images.rgb_static` (200, 200, 3) and `observation.images.rgb_gripper` (84, 84, 3);
    - `observation.state` (8,): position, Euler angles, gripper width, gripper command;
    - `action` (7,): the relative action as recorded, gripper -1 closed, +1 open.

    One episode at a time is in memory, and the rows of one data file when the dataset is put together. Until it is
    complete, the episodes take their space twice.

    Args:
        source: folder with `episode_*.npz`, such as `task_ABC_D/training`.
        output: folder of the dataset.
        settings: everything else, see [`ConversionSettings`].
        report: receives lines of progress.

    Returns:
        Numbers: episodes, rows, converted_now, seconds.

    Raises:
        FileNotFoundError: a file of the recordings is missing.
        ValueError: recordings of another form, a damaged file, annotations that hold something else than arrays, texts
            and numbers, an output that was begun from other recordings or with other settings, or one that another
            process is writing to.
    """
    settings = settings or ConversionSettings()
    recordings, output, began = CalvinRecordings(source), Path(output), time.perf_counter()
    described = {"spans": _fingerprint(recordings.spans), "image_format": settings.image_format}
    converted = 0
    with exclusive_folder(output):
        found, advice = f"output={output} was begun with", "name another folder"
        check_settings(output / PARTS / "settings.json", described, found, advice)
        complete = (output / "meta" / "info.json").is_file()
        present = set(saved_episodes(output))
        spans = enumerate(recordings.spans)
        missing = [] if complete else [(_key(number), span) for number, span in spans if _key(number) not in present]

        def finished(saved: int, minutes: float) -> None:
            nonlocal converted
            converted += saved
            done = len(recordings.spans) - len(missing) + converted
            report(f"{done} of {len(recordings.spans)} episodes after {minutes:.1f} min")

        batches = [tuple(missing[first : first + _BATCH]) for first in range(0, len(missing), _BATCH)]
        jobs = [_Job(recordings.folder, output, batch, settings.image_format) for batch in batches]
        if settings.workers == 1:
            for job in jobs:
                finished(_convert_spans(job), (time.perf_counter() - began) / 60)
        else:
            run_jobs(_convert_spans, jobs, settings.workers, None, finished)
        if not complete:
            report("putting the dataset together")
            assemble(output)
        for path in visible_files(output / PARTS, "*.parquet"):
            path.unlink()
    return {
        "episodes": len(recordings.spans),
        "rows": sum(map(len, recordings.spans)),
        "converted_now": converted,
        "seconds": time.perf_counter() - began,
    }


@dataclass(frozen=True)
class _Job:
    folder: Path
    output: Path
    spans: tuple[tuple[str, Span], ...]
    image_format: str


def _convert_spans(job: _Job) -> int:
    for key, span in job.spans:
        images: dict[str, list[bytes]] = {camera: [] for camera in LAYOUT.cameras}
        states, actions = [], []
        for step in range(span.first, span.last + 1):
            observation, action = read_step(job.folder, step)
            for camera, image in zip(LAYOUT.cameras, observation.images, strict=True):
                images[camera].append(encode_image(image, job.image_format))
            states.append(observation.state.astype(np.float32))
            actions.append(action)
        extra = {"subtask": span.subtask, "first_step": span.first, "last_step": span.last}
        save_episode(
            job.output, key, LAYOUT, span.instruction, images, np.stack(states), np.stack(actions), extra=extra
        )
    return len(job.spans)


def _key(number: int) -> str:
    return f"{number:07d}"


def _fingerprint(spans: list[Span]) -> str:
    """Tells other annotations of the same form apart."""
    text = repr([(span.first, span.last, span.instruction, span.subtask) for span in spans])
    return f"{len(spans)}, crc32 {zlib.crc32(text.encode()):08x}"
