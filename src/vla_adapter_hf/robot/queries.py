"""Asking a policy in a thread of its own, while the arm moves on."""

from __future__ import annotations

import atexit
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any


logger = logging.getLogger(__name__)

# How long the end of a run and the end of the program wait for a policy that is still computing.
RUN_SECONDS, EXIT_SECONDS = 2.0, 10.0

_unfinished: list[threading.Thread] = []


class Query:
    """One question to a policy. It is asked at once.

    The thread may be left behind: a policy that never answers must not keep the program from ending. But Python aborts
    a program that ends while such a thread is inside torch or OpenVINO, so both ends wait a little.

    Args:
        predict: asks the policy.

    Attributes:
        asked_at: when it was asked, by `time.monotonic()`.
    """

    def __init__(self, predict: Callable[[], Any]) -> None:
        self.asked_at = time.monotonic()
        self._answer: Future = Future()
        self._predict = predict
        self._thread = threading.Thread(target=self._ask, name="policy", daemon=True)
        self._thread.start()

    def _ask(self) -> None:
        try:
            self._answer.set_result(self._predict())
        except BaseException as error:
            self._answer.set_exception(error)

    @property
    def is_answered(self) -> bool:
        """Whether there is an answer or an error."""
        return self._answer.done()

    def result(self) -> Any:
        """The answer, or the policy's error."""
        return self._answer.result()

    def finish(self) -> None:
        """Wait `RUN_SECONDS` for the policy. One that needs longer is waited for when the program ends."""
        self._thread.join(RUN_SECONDS)
        if self._thread.is_alive():
            _unfinished.append(self._thread)


@atexit.register
def _wait_for_unfinished() -> None:
    end = time.monotonic() + EXIT_SECONDS
    if any(thread.is_alive() for thread in _unfinished):
        logger.warning("A policy is still computing; the program waits up to %g s for it", EXIT_SECONDS)
    for thread in _unfinished:
        thread.join(max(0.0, end - time.monotonic()))
