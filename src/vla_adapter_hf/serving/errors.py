"""What a client is answered when it gets no actions."""

from __future__ import annotations

from typing import Any


class ServingError(Exception):
    """A request that is answered with a message instead of actions.

    Attributes:
        kind: a short name for programs; also the label in the metrics.
        status: the HTTP status of the answer.
        may_retry: the same observation may succeed a moment later.
    """

    kind = "error"
    status = 500
    may_retry = False

    def as_dict(self) -> dict[str, Any]:
        """The error as a map, for the protocols that have one."""
        return {"type": "error", "kind": self.kind, "message": str(self), "may_retry": self.may_retry}


class InvalidRequest(ServingError):
    """The message cannot be read, or the observation does not fit the model."""

    kind = "invalid"
    status = 400


class TooLarge(ServingError):
    """A message or a frame is over its limit of bytes."""

    kind = "too_large"
    status = 413


class ObservationTooOld(ServingError):
    """The observation passed the age limit before its prediction began."""

    kind = "too_old"
    status = 422


class StateOutOfRange(ServingError):
    """The state is far outside the range of the training data, and the settings make that an error."""

    kind = "out_of_range"
    status = 422


class SessionTaken(ServingError):
    """Another connection controls the session."""

    kind = "session_taken"
    status = 409
    may_retry = True


class ServerBusy(ServingError):
    """The queue or the number of connections is at its limit."""

    kind = "busy"
    status = 503
    may_retry = True


class ServerStopping(ServingError):
    """The server received SIGTERM and takes no new requests."""

    kind = "stopping"
    status = 503
    may_retry = True


class TookTooLong(ServingError):
    """The answer was not there within the limit of seconds."""

    kind = "too_slow"
    status = 504
    may_retry = True


class PredictionFailed(ServingError):
    """The model did not give finite actions, or failed."""

    kind = "prediction_failed"
    status = 500
