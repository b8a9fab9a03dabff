"""Environments, policies and recordings on a Ray cluster, in the place of this machine's processes.

A machine that dies takes only running episodes with it. They begin again elsewhere.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from typing import Any, TypeVar

import numpy as np

from vla_adapter_hf.simulation.environment import Suite
from vla_adapter_hf.simulation.policies import Policy, Request
from vla_adapter_hf.simulation.workers import Begin, EpisodeRunner, Execute, Failure, Report, answer_or_fail, check
from vla_adapter_hf.utils.extras import install_hint


Job = TypeVar("Job")
Outcome = TypeVar("Outcome")

LOSSES = 5
"""How many processes in a row may be lost before any of them finishes something; twice their number, if that is more.
"""


def import_ray() -> Any:
    """The package.

    Raises:
        ImportError: Ray is not installed. The message says how to install it.
    """
    try:
        import ray
    except ImportError as error:
        raise ImportError(f"spreading over a cluster needs Ray: {install_hint('ray')}") from error
    return ray


@contextmanager
def connected(address: str) -> Iterator[Any]:
    """Ray, connected to a cluster. A connection that exists is used, and stays.

    Args:
        address: `auto` on a machine of the cluster, `HOST:6379`, `ray://HOST:10001` from outside, or `local` for a
            cluster of this machine alone.

    Raises:
        ImportError: Ray is not installed.
        ConnectionError: there is no cluster.
    """
    ray = import_ray()
    if ray.is_initialized():
        yield ray
        return
    ray.init(address, log_to_driver=False, include_dashboard=False if address == "local" else None)
    try:
        yield ray
    finally:
        ray.shutdown()


class _Losses:
    """Counts the processes of one kind that a cluster loses.

    Args:
        ray: from `connected`.
        what: what they are, for the message.
        count: how many there are at once: a machine may take all of them with it.
    """

    def __init__(self, ray: Any, what: str, count: int) -> None:
        known = ray.exceptions
        self.errors = (
            known.RayActorError,
            known.WorkerCrashedError,
            known.NodeDiedError,
            known.ObjectLostError,
            known.OutOfMemoryError,  # Ray ends a process where a machine runs out of memory; it is none of the others
        )
        self._what, self._limit, self._in_a_row = what, max(LOSSES, 2 * count), 0

    def add(self, error: Exception) -> None:
        """One is lost.

        Raises:
            ChildProcessError: too many in a row.
        """
        self._in_a_row += 1
        if self._in_a_row > self._limit:
            raise ChildProcessError(
                f"{self._what} end unexpectedly on every machine ({error}). What is finished is kept; the same call "
                "does the rest."
            ) from error

    def clear(self) -> None:
        """One has finished something."""
        self._in_a_row = 0


class _RemoteEnvironment:
    """In a process of the cluster: environments of a suite, one after the other."""

    def __init__(self, suite: Suite) -> None:
        self._runner = EpisodeRunner(suite)

    def answer(self, message: Begin | Execute) -> Report | Failure:
        return answer_or_fail(self._runner, message)


class RayPool:
    """Environments in parallel on a cluster: what [`WorkerPool`] is on this machine.

    Args:
        ray: from `connected`.
        suite: their suite; its package must be installed on every machine.
        count: how many, with a CPU each.

    Raises:
        RuntimeError: from `receive`, as with `WorkerPool`.
        ChildProcessError: from `receive`, if environments die again and again.
    """

    local_processes = 0

    def __init__(self, ray: Any, suite: Suite, count: int) -> None:
        self._ray, self._suite = ray, suite
        # An environment has a state, so a restarted one is of no use to the call that it did not finish.
        self._remote = ray.remote(num_cpus=1, max_restarts=0, max_task_retries=0)(_RemoteEnvironment)
        self._actors = {worker: self._remote.remote(suite) for worker in range(count)}
        self._answers: dict[Any, int] = {}
        self._losses = _Losses(ray, "environments", count)

    def __enter__(self) -> RayPool:
        return self

    def __exit__(self, *unused: Any) -> None:
        for actor in self._actors.values():
            self._ray.kill(actor)

    def __len__(self) -> int:
        return len(self._actors)

    def send(self, worker: int, message: Begin | Execute) -> None:
        """Gives an environment something to do."""
        self._answers[self._actors[worker].answer.remote(message)] = worker

    def receive(self, waiting: Sequence[int]) -> list[tuple[int, Report | None]]:
        """Waits for a report and returns all that have come. None: the environment is lost, and a new one is there."""
        ray, sent = self._ray, list(self._answers)
        ready, rest = ray.wait(sent, num_returns=1)
        ready += ray.wait(rest, num_returns=len(rest), timeout=0)[0] if rest else []
        reports = []
        for answer in ready:
            worker = self._answers.pop(answer)
            try:
                report = check(ray.get(answer))
                if report.finished:
                    self._losses.clear()
            except self._losses.errors as error:
                self._losses.add(error)
                report = None
                self._actors[worker] = self._remote.remote(self._suite)
            reports.append((worker, report))
        return sorted(reports, key=lambda pair: pair[0])

    def release(self, worker: int) -> None:
        """There is nothing left for this environment: its CPU is free for others."""
        self._ray.kill(self._actors[worker])


class _Replica:
    """In a process of the cluster: one copy of a policy."""

    def __init__(self, load: Callable[[], Policy]) -> None:
        self._load = load

    def load(self) -> dict[str, Any]:
        """Loads the policy and returns what decides its actions."""
        self._policy = self._load()
        return _describe(self._policy)

    def predict(self, requests: Sequence[Request]) -> list[np.ndarray]:
        return list(self._policy.predict(requests))


class ReplicatedPolicy:
    """A policy in several copies on a cluster, between which a batch is divided.

    A lost copy is replaced. Requests that it did not answer are answered here, and so are all requests while there is
    no copy: a new copy may wait for a CPU that an environment holds.

    Args:
        ray: from `connected`.
        policy: the policy, as it is loaded here.
        load: loads it on another machine.
        count: how many copies.
        gpus: GPUs of each copy.

    Raises:
        ChildProcessError: from `predict`, if copies are lost again and again.
    """

    def __init__(self, ray: Any, policy: Policy, load: Callable[[], Policy], count: int, gpus: float) -> None:
        self._ray, self._policy, self._load = ray, policy, load
        self.name, self.needs_observation = policy.name, policy.needs_observation
        self._remote = ray.remote(num_cpus=1, num_gpus=gpus, max_restarts=0, max_task_retries=0)(_Replica)
        self._losses = _Losses(ray, "copies of the policy", count)
        self._ready: list[Any] = []
        self._coming = dict(self._new_copy() for _ in range(count))
        ray.wait(list(self._coming), num_returns=1)

    def predict(self, requests: Sequence[Request]) -> list[np.ndarray]:
        self._welcome()
        if not self._ready:
            return list(self._policy.predict(requests))
        parts = [part.tolist() for part in np.array_split(np.arange(len(requests)), len(self._ready))]
        asked = [
            (copy, part, copy.predict.remote([requests[index] for index in part]))
            for copy, part in zip(self._ready, parts, strict=True)
            if part
        ]
        chunks: list[np.ndarray] = []
        for copy, part, answer in asked:
            try:
                chunks += self._ray.get(answer)
                self._losses.clear()
            except self._losses.errors as error:
                self._losses.add(error)
                self._ready.remove(copy)
                self._coming |= [self._new_copy()]
                chunks += self._policy.predict([requests[index] for index in part])
        return chunks

    def close(self) -> None:
        for copy in (*self._ready, *self._coming.values()):
            self._ray.kill(copy)

    def _new_copy(self) -> tuple[Any, Any]:
        """An answer that is there when the copy is, and the copy."""
        copy = self._remote.remote(self._load)
        return copy.load.remote(), copy

    def _welcome(self) -> None:
        """Takes in the copies that have come.

        Raises:
            ValueError: one has other weights or statistics than the policy here.
        """
        here = _describe(self._policy)
        waiting = list(self._coming)
        for answer in self._ray.wait(waiting, num_returns=len(waiting), timeout=0)[0] if waiting else ():
            copy = self._coming.pop(answer)
            try:
                there = self._ray.get(answer)
            except self._losses.errors as error:
                self._losses.add(error)
                self._coming |= [self._new_copy()]
                continue
            if there != here:
                raise ValueError(f"the policy on another machine is another one: {there} there, {here} here")
            self._ready.append(copy)


def _describe(policy: Policy) -> dict[str, Any]:
    return policy.describe() if hasattr(policy, "describe") else {}


class _TaskPool:
    """Runs functions on the cluster, as an executor of `concurrent.futures` does in processes.

    A job of a process or machine that dies runs again elsewhere. A future raises `ChildProcessError` if they die again
    and again.
    """

    def __init__(self, ray: Any, workers: int, report: Callable[[str], None]) -> None:
        self._ray, self._report = ray, report
        self._losses = _Losses(ray, "jobs", workers)
        self._threads = ThreadPoolExecutor(workers)  # each waits for one job
        self._lock = threading.Lock()
        self._running: set[Any] = set()
        self._closed = False

    def submit(self, work: Callable[[Job], Outcome], job: Job) -> Future:
        return self._threads.submit(self._run, work, job)

    def close(self) -> None:
        """Ends what is running at once."""
        with self._lock:
            self._closed = True
            for answer in self._running:
                self._ray.cancel(answer, force=True)
        self._threads.shutdown(cancel_futures=True)

    def _run(self, work: Callable[[Job], Outcome], job: Job) -> Outcome:
        task = self._ray.remote(num_cpus=1, max_retries=0)(work)
        while True:
            with self._lock:
                if self._closed:
                    raise CancelledError
                answer = task.remote(job)
                self._running.add(answer)
            try:
                outcome = self._ray.get(answer)
            except self._losses.errors as error:
                with self._lock:
                    if self._closed:
                        raise
                    self._losses.add(error)
                self._report(f"a job is lost ({type(error).__name__}); again: {job}")
            else:
                with self._lock:
                    self._losses.clear()
                return outcome
            finally:
                with self._lock:
                    self._running.discard(answer)


@contextmanager
def task_pool(address: str, workers: int, report: Callable[[str], None]) -> Iterator[_TaskPool]:
    """An executor whose jobs run on a cluster, with a CPU each.

    Args:
        address: as for `connected`.
        workers: jobs at a time.
        report: receives a line for each job that is lost and runs again.
    """
    with connected(address) as ray, closing(_TaskPool(ray, workers, report)) as pool:
        yield pool
