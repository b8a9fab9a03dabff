"""Recording in several processes: jobs that are stopped together, in folders that belong to one recording."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

from vla_adapter_hf.simulation.cluster import task_pool
from vla_adapter_hf.utils.files import record_settings


Job = TypeVar("Job")
Outcome = TypeVar("Outcome")


@contextmanager
def process_pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """An executor whose processes end at once when the block ends with an error, or when this process is killed."""
    # A forked copy of a process that has rendered or computed on a GPU is broken.
    context = multiprocessing.get_context("spawn")
    # Only this process holds the sender. When it is closed, here or by the kernel, all workers read the pipe's end.
    receiver, sender = context.Pipe(duplex=False)
    with receiver, sender:
        pool = ProcessPoolExecutor(workers, context, initializer=_end_with, initargs=(receiver,))
        try:
            yield pool
        except BaseException:
            sender.close()
            raise
        finally:
            pool.shutdown(cancel_futures=True)


def _end_with(receiver: Connection) -> None:
    def watch() -> None:
        receiver.poll(None)
        os._exit(1)

    # Ctrl-C reaches the whole process group; the parent decides what happens.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=watch, daemon=True).start()


def run_jobs(
    work: Callable[[Job], Outcome],
    jobs: Sequence[Job],
    workers: int,
    minutes: float | None,
    finished: Callable[[Outcome, float], None],
    ray: str | None = None,
    report: Callable[[str], None] = print,
) -> None:
    """Runs `work(job)` for all jobs, in order, in `workers` processes, here or on a Ray cluster.

    Args:
        work: a function of a module, called in a process of its own.
        jobs: its arguments.
        workers: processes.
        minutes: begin no new job after this time.
        finished: receives each outcome and the minutes since the call.
        ray: address of the cluster.
        report: receives a line for each job that the cluster lost and runs again.

    Raises:
        Exception: whatever `work` raised. The other jobs are stopped at once.
        ChildProcessError: the cluster loses jobs again and again.
    """
    if not jobs:
        return
    began = time.perf_counter()
    workers = min(workers, len(jobs))
    with process_pool(workers) if ray is None else task_pool(ray, workers, report) as pool:
        waiting = list(reversed(jobs))
        running = {pool.submit(work, waiting.pop()) for _ in range(workers)}
        while running:
            future = next(as_completed(running))
            running.remove(future)
            elapsed = (time.perf_counter() - began) / 60
            finished(future.result(), elapsed)
            if waiting and (minutes is None or elapsed < minutes):
                running.add(pool.submit(work, waiting.pop()))


def in_turns(waiting: Mapping[int, Sequence[Any]], size: int) -> Iterator[tuple[int, tuple[Any, ...]]]:
    """Batches of one task's entries, going round the tasks, so that a recording stopped early has all of them.

    Args:
        waiting: the entries of each task.
        size: entries in a batch.

    Yields:
        The task and its next batch.
    """
    for first in range(0, max(map(len, waiting.values()), default=0), size):
        for task, entries in waiting.items():
            if entries[first : first + size]:
                yield task, tuple(entries[first : first + size])


def check_settings(path: Path, settings: Mapping[str, Any], found: str, advice: str) -> None:
    """Writes a recording's settings, or checks that they are those with which the folder was begun.

    Args:
        path: the JSON file of the settings.
        settings: JSON values.
        found, advice: the message around the settings that differ.

    Raises:
        ValueError: the file holds other settings.
    """
    differing = record_settings(path, settings)
    if differing:
        changes = ", ".join(f"{name}={before!r} and not {now!r}" for name, (before, now) in differing.items())
        raise ValueError(f"{found} {changes}; {advice}.")
