"""Records demonstrations of the scripted expert as a LeRobot v3.0 dataset.

Rendering takes ten times as long as physics. A chunk policy needs a frame at the step where a chunk begins and the
actions of the steps after it. So only every `render_every`-th step becomes a row, and each row holds the next actions
at full rate in the extra column `action_chunk`. The column `action` holds the row's own action, as LeRobot expects.

A policy may drive instead of the expert. The expert then records at every chunk what it would do, and the policy's
mistakes become examples of how to recover from them (DAgger, Ross et al. 2011).
"""

from __future__ import annotations

import functools
import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vla_adapter_hf.recording.episodes import (
    DrivingPolicy,
    episode_key,
    plan_episode,
    record_driven_episode,
    record_episode,
    suite_options,
)
from vla_adapter_hf.recording.jobs import check_settings, in_turns, run_jobs
from vla_adapter_hf.recording.lerobot_writer import PARTS, assemble, save_episode, saved_episodes
from vla_adapter_hf.recording.settings import RecordingSettings
from vla_adapter_hf.simulation.cluster import import_ray
from vla_adapter_hf.simulation.libero.suite import LiberoSuite
from vla_adapter_hf.simulation.settings import choose_tasks
from vla_adapter_hf.utils.files import exclusive_folder, visible_files, write_bytes


def demonstrate(
    output: str | Path, settings: RecordingSettings | None = None, report: Callable[[str], None] = print
) -> dict[str, Any]:
    """Records demonstrations of the scripted expert into a LeRobot v3.0 dataset, and resumes a recording.

    Saved episodes are skipped: the same call after a kill finishes the recording, and a call with more episodes
    extends it. No evaluation draws the same placements.

    Args:
        output: the dataset's folder.
        settings: everything else, see [`RecordingSettings`].
        report: receives a line of progress after every batch.

    Returns:
        Numbers: episodes, rows, recorded_now, failed (the target was not in the basket at the end), seconds; and the
            settings.

    Raises:
        ValueError: an unknown task, a driver for another robot or of other chunks, an output that was begun with other
            settings or another driver of this name, or one that another process is writing to.
        ImportError: LIBERO is not installed.
    """
    settings = settings or RecordingSettings()
    if settings.ray is not None:
        import_ray()
    tasks = choose_tasks(settings.tasks, len(LiberoSuite(settings.suite).tasks))
    driver = None if settings.driver is None else Driver.from_settings(settings)
    described = {} if driver is None else driver.load().describe()
    # Processes on other machines have other working directories.
    output, began = Path(output).resolve(), time.perf_counter()
    recorded = 0
    with exclusive_folder(output):
        found, advice = f"output={output} was begun with", "name another folder, or record with the same settings"
        check_settings(output / PARTS / "settings.json", settings.describe(), found, advice)
        if driver is not None:
            found = f"output={output} holds episodes of another driver {driver.name!r}:"
            advice = "rename the driver's folder, or drive with the same share and statistics"
            check_settings(output / PARTS / f"{driver.name}.json", described, found, advice)

        def finished(outcome: dict[str, Any], minutes: float) -> None:
            nonlocal recorded
            recorded += outcome["saved"]
            report(
                f"task {outcome['task']}: {outcome['saved']} recorded, {outcome['failed']} failed in "
                f"{outcome['seconds']:.0f} s; {recorded} episodes after {minutes:.1f} min"
            )

        jobs = _plan_jobs(output, tasks, settings, driver)
        run_jobs(_record_job, jobs, settings.workers, settings.minutes, finished, settings.ray, report)
        info = assemble(output)
        failed = len(failed_episodes(output))
    return {
        "episodes": info["total_episodes"],
        "rows": info["total_frames"],
        "recorded_now": recorded,
        "failed": failed,
        "seconds": time.perf_counter() - began,
        "settings": asdict(settings),
    }


@dataclass(frozen=True)
class Driver:
    """The checkpoint that drives, for the processes that record; see `DrivingPolicy`."""

    checkpoint: str
    share: float
    unnorm_key: str | None
    suite: str
    chunk_size: int
    threads: int

    @classmethod
    def from_settings(cls, settings: RecordingSettings) -> Driver:
        """The driver that the settings name."""
        return cls(
            checkpoint=str(settings.driver),
            share=settings.driver_share,
            unnorm_key=settings.driver_unnorm_key,
            suite=settings.suite,
            chunk_size=settings.chunk_size,
            threads=max(1, (os.cpu_count() or 1) // settings.workers),
        )

    @property
    def name(self) -> str:
        """Its name in the keys of episodes, whose parts are divided by hyphens."""
        return f"by_{Path(self.checkpoint).name.replace('-', '_')}"

    def load(self) -> DrivingPolicy:
        """The policy.

        Raises:
            ValueError: it is no VLA-Adapter, or its robot, statistics, cameras or chunks are not those of the
                recording.
        """
        policy = DrivingPolicy(self.checkpoint, self.suite, self.share, self.unnorm_key)
        if policy.chunk_size != self.chunk_size:
            raise ValueError(
                f"driver={self.checkpoint!r} predicts {policy.chunk_size} actions, the recording's chunk_size is "
                f"{self.chunk_size}; set chunk_size={policy.chunk_size}."
            )
        return policy


@functools.lru_cache(maxsize=1)
def _driving_policy(driver: Driver) -> DrivingPolicy:
    """Loaded once per process, for all its batches."""
    import torch

    torch.set_num_threads(driver.threads)
    return driver.load()


@dataclass(frozen=True)
class _Job:
    """Some episodes of one task: building an environment takes as long as recording several."""

    output: Path
    task: int
    episodes: tuple[tuple[str, int], ...]
    settings: RecordingSettings
    driver: Driver | None


def _plan_jobs(output: Path, tasks: list[int], settings: RecordingSettings, driver: Driver | None) -> list[_Job]:
    name = "" if driver is None else driver.name
    present = {*saved_episodes(output), *failed_episodes(output)}
    waiting = {}
    for task in tasks:
        entries = [
            ((episode + 0.5) / count, placement, episode)  # interleaves placements in proportion to their numbers
            for placement, count in settings.episodes.items()
            for episode in range(count)
            if episode_key(placement, task, episode, name) not in present
        ]
        waiting[task] = [(placement, episode) for _, placement, episode in sorted(entries)]
    return [_Job(output, task, part, settings, driver) for task, part in in_turns(waiting, settings.batch)]


def _record_job(job: _Job) -> dict[str, Any]:
    began = time.perf_counter()
    if not (job.output / PARTS / "settings.json").is_file():
        raise ValueError(
            f"output={str(job.output)!r} is not seen from {platform.node()}: with ray it must be on a storage "
            "that all machines share"
        )
    settings, driver = job.settings, "" if job.driver is None else job.driver.name
    policy = None if job.driver is None else _driving_policy(job.driver)
    options = suite_options(settings, driver)
    environment = LiberoSuite(settings.suite, **options).make(job.task)
    saved = failed = 0
    try:
        for placement, episode in job.episodes:
            environment.suite = LiberoSuite(settings.suite, placement=placement, **options)
            plan = plan_episode(placement, job.task, episode, environment.movable_objects, settings, driver)
            if policy is None:
                recorded = record_episode(environment, plan, settings)
            else:
                recorded = record_driven_episode(environment, plan, settings, policy)
            # The episode itself is saved last: if it is there, its alternatives are too.
            for part in recorded:
                save_episode(job.output, **part)
            if recorded:
                saved += 1
            else:
                failed += 1
                # A resumed recording does not try the episode again.
                write_bytes(job.output / PARTS / f"{plan.key}.failed", b"")
    finally:
        environment.close()
    return {"task": job.task, "saved": saved, "failed": failed, "seconds": time.perf_counter() - began}


def failed_episodes(output: Path) -> list[str]:
    """Keys of the episodes that ended without the target in the basket, sorted."""
    return [path.stem for path in visible_files(Path(output) / PARTS, "*.failed")]
