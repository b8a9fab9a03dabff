"""What every protocol's endpoint uses: the engine, the reader, sessions, limits and metrics."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vla_adapter_hf.serving.batching import Engine, Prediction
from vla_adapter_hf.serving.errors import PredictionFailed, ServingError
from vla_adapter_hf.serving.metrics import Metrics
from vla_adapter_hf.serving.policy import ServedPolicy
from vla_adapter_hf.serving.sessions import Sessions
from vla_adapter_hf.serving.settings import ServeSettings


logger = logging.getLogger(__name__)


class Services:
    """The parts of one server.

    Args:
        policy: the model.
        settings: of the server.

    Raises:
        ValueError: a camera name of the settings leads nowhere.
    """

    def __init__(self, policy: ServedPolicy, settings: ServeSettings) -> None:
        self.policy, self.settings = policy, settings
        self.reader = policy.reader
        self.metrics = Metrics()
        self.engine = Engine(policy, self.metrics, settings)
        self.sessions = Sessions(settings.max_connections)

    async def predict(self, message: Any, arrived: float) -> Prediction:
        """The prediction for a decoded message.

        Raises:
            ServingError: see [`ObservationReader.read`] and [`Engine.predict`].
        """
        return await self.engine.predict(self.reader.read(message, arrived))

    @contextmanager
    def counting_errors(self, protocol: str) -> Iterator[None]:
        """Around making an answer, not around sending it: a client that went away is no error.

        An unexpected error is logged; the client gets a [`PredictionFailed`].

        Raises:
            ServingError: any error of the block.
        """
        try:
            yield
        except ServingError as error:
            self.metrics.errors.labels(protocol, error.kind).inc()
            raise
        except Exception as error:
            logger.exception("a request failed")
            self.metrics.errors.labels(protocol, PredictionFailed.kind).inc()
            raise PredictionFailed("the server failed to answer; its log says why.") from error

    @contextmanager
    def counting_observation(self, protocol: str, arrived: float) -> Iterator[None]:
        """Counts one observation, and its time since `arrived` (by `time.monotonic`)."""
        self.metrics.requests.labels(protocol).inc()
        try:
            yield
        finally:
            self.metrics.seconds.labels("total").observe(time.monotonic() - arrived)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Adds the block's time to a stage of the metrics."""
        start = time.perf_counter()
        yield
        self.metrics.seconds.labels(stage).observe(time.perf_counter() - start)

    @contextmanager
    def connected(self, protocol: str) -> Iterator[None]:
        """Counts an open websocket."""
        self.metrics.connections.labels(protocol).inc()
        try:
            yield
        finally:
            self.metrics.connections.labels(protocol).dec()
