"""Observations of several robots, predicted in batches on one thread."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from vla_adapter_hf.serving.errors import (
    PredictionFailed,
    ServerBusy,
    ServerStopping,
    ServingError,
    TookTooLong,
)
from vla_adapter_hf.serving.metrics import Metrics
from vla_adapter_hf.serving.observations import Observation
from vla_adapter_hf.serving.policy import Chunk, PreparedObservation, ServedPolicy
from vla_adapter_hf.serving.settings import ServeSettings


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prediction:
    """A chunk, and how it came to be.

    Attributes:
        prepared: the observation as the model saw it.
        chunk: its actions.
        batch_size: how many observations were predicted together.
        seconds: by stage, `prepare`, `queue` and `predict`.
    """

    prepared: PreparedObservation
    chunk: Chunk
    batch_size: int
    seconds: dict[str, float]


@dataclass
class _Waiting:
    prepared: PreparedObservation
    future: asyncio.Future
    since: float = field(default_factory=time.perf_counter)


class Engine:
    """The queue in front of the model.

    While a batch is being predicted, others wait; the next batch takes all of them, up to `max_batch`. A batch that is
    not full waits up to `max_wait_ms`, and only while another observation is being prepared.

    Two threads: one prepares (a tokenizer serves one thread), one predicts.
    """

    def __init__(self, policy: ServedPolicy, metrics: Metrics, settings: ServeSettings) -> None:
        self.policy, self.metrics, self.settings = policy, metrics, settings
        self.latest: tuple[int, Prediction] | None = None
        self.is_stopping = False
        self.started_batches = 0
        self._answering = 0
        self._preparing = 0
        self._queue: asyncio.Queue[_Waiting] = asyncio.Queue()
        self._prepare_thread = ThreadPoolExecutor(1, "prepare")
        self._predict_thread = ThreadPoolExecutor(1, "predict")
        self._loop_task: asyncio.Task | None = None
        metrics.waiting.set_function(lambda: self.waiting)

    async def start(self) -> None:
        """Predict once to warm up, and begin to take observations."""
        await asyncio.get_running_loop().run_in_executor(self._predict_thread, self.policy.warm_up)
        self._loop_task = asyncio.create_task(self._predict_batches())

    async def stop(self) -> None:
        """Ends both threads. What waits is not predicted."""
        if self._loop_task is not None:
            self._loop_task.cancel()
        self._prepare_thread.shutdown(wait=False, cancel_futures=True)
        self._predict_thread.shutdown(wait=False, cancel_futures=True)

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Around a request, from its arrival until its answer is sent: the server does not end in between.

        Raises:
            ServerStopping: the server takes no new requests.
        """
        if self.is_stopping:
            raise ServerStopping("the server is stopping; connect again in a while.")
        self._answering += 1
        try:
            yield
        finally:
            self._answering -= 1

    async def drained(self) -> None:
        """Take no new requests, and wait until all others are answered."""
        self.is_stopping = True
        while self._answering:
            await asyncio.sleep(0.005)

    @property
    def waiting(self) -> int:
        """Observations that are being prepared or wait for the model."""
        return self._preparing + self._queue.qsize()

    async def predict(self, observation: Observation) -> Prediction:
        """The chunk for one observation.

        Raises:
            ServingError: the observation does not fit the model or is too old, the queue is full, the time is over, or
                the model failed.
        """
        if self.waiting >= self.settings.max_queue:
            raise ServerBusy(f"{self.waiting} observations wait already; try again later.")
        left = self.settings.max_seconds - (time.monotonic() - observation.arrived)
        try:
            prediction = await asyncio.wait_for(self._prepare_and_wait(observation), max(left, 0.0))
        except asyncio.TimeoutError as error:
            raise TookTooLong(f"no answer within {self.settings.max_seconds:g} s.") from error
        for stage, seconds in prediction.seconds.items():
            self.metrics.seconds.labels(stage).observe(seconds)
        self.metrics.clipped.inc(prediction.chunk.clipped)
        self.latest = (1 if self.latest is None else self.latest[0] + 1, prediction)
        return prediction

    async def in_predict_thread(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Run something else that needs the model, in turn with predictions."""
        return await asyncio.get_running_loop().run_in_executor(self._predict_thread, function, *arguments)

    async def _prepare_and_wait(self, observation: Observation) -> Prediction:
        loop = asyncio.get_running_loop()
        start = time.perf_counter()
        self._preparing += 1
        try:
            prepared = await loop.run_in_executor(self._prepare_thread, self.policy.prepare, observation)
        except ServingError:
            raise
        except Exception as error:
            logger.exception("preparing an observation failed")
            raise PredictionFailed("the observation could not be prepared; the server's log says why.") from error
        finally:
            self._preparing -= 1
        entry = _Waiting(prepared, loop.create_future())
        self._queue.put_nowait(entry)
        prediction = await entry.future
        prediction.seconds["prepare"] = entry.since - start
        return prediction

    async def _predict_batches(self) -> None:
        while True:
            batch = await self._next_batch()
            self.started_batches += 1
            started = time.perf_counter()
            chunks = await self._predict_each(batch)
            seconds = time.perf_counter() - started
            self.metrics.batch_size.observe(len(batch))
            for entry, chunk in zip(batch, chunks, strict=True):
                if entry.future.done():
                    continue
                if isinstance(chunk, ServingError):
                    entry.future.set_exception(chunk)
                    continue
                timing = {"queue": started - entry.since, "predict": seconds}
                entry.future.set_result(Prediction(entry.prepared, chunk, len(batch), timing))

    async def _next_batch(self) -> list[_Waiting]:
        """At least one observation that still wants an answer and is young enough."""
        batch: list[_Waiting] = []
        while not batch:
            self._admit(await self._queue.get(), batch)
        end = time.perf_counter() + self.settings.max_wait_ms / 1e3
        while len(batch) < self.settings.max_batch:
            if not self._queue.empty():
                self._admit(self._queue.get_nowait(), batch)
                continue
            if not self._preparing or time.perf_counter() >= end:
                break
            await asyncio.sleep(0.0005)
        return batch

    def _admit(self, entry: _Waiting, batch: list[_Waiting]) -> None:
        if entry.future.done():  # its client waited too long
            return
        try:
            entry.prepared.observation.check_age(self.settings.max_age)
        except ServingError as error:
            entry.future.set_exception(error)
        else:
            batch.append(entry)

    async def _predict_alone(self, entry: _Waiting) -> Chunk | ServingError:
        """As `_predict_each`, some time later: the entry may have become too old."""
        admitted: list[_Waiting] = []
        self._admit(entry, admitted)
        if not admitted:
            return TookTooLong("its turn came too late.")  # nobody reads it
        [result] = await self._predict_each([entry])
        return result

    async def _predict_each(self, batch: Sequence[_Waiting]) -> list[Chunk | ServingError]:
        """A chunk or an error for each.

        Where a batch fails, each is tried alone: one robot does not fail the others.
        """
        try:
            return await self.in_predict_thread(self.policy.predict, [entry.prepared for entry in batch])
        except Exception as error:
            if len(batch) > 1:
                return [await self._predict_alone(entry) for entry in batch]
            if isinstance(error, ValueError):
                return [PredictionFailed(f"no actions: {error}")]
            logger.exception("a prediction failed")
            return [PredictionFailed("the prediction failed; the server's log says why.")]
