"""What `/metrics` reports, in Prometheus' text form."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest


SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
STAGES = ("decode", "prepare", "queue", "predict", "encode", "total")


class Metrics:
    """Counters of one server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("vla_adapter_requests", "Observations that arrived.", ["protocol"], registry=registry)
        self.errors = Counter(
            "vla_adapter_errors", "Requests answered with an error.", ["protocol", "kind"], registry=registry
        )
        self.seconds = Histogram(
            "vla_adapter_seconds", "Time of a request by stage.", ["stage"], buckets=SECONDS, registry=registry
        )
        self.batch_size = Histogram(
            "vla_adapter_batch_size",
            "Observations predicted at once.",
            buckets=(1, 2, 4, 8, 16, 32, 64),
            registry=registry,
        )
        self.clipped = Counter(
            "vla_adapter_clipped_values", "Action values limited to the training range.", registry=registry
        )
        self.waiting = Gauge("vla_adapter_queue_length", "Observations that wait.", registry=registry)
        self.connections = Gauge("vla_adapter_connections", "Open websockets.", ["protocol"], registry=registry)
        for stage in STAGES:
            self.seconds.labels(stage)

    def text(self) -> bytes:
        return generate_latest(self.registry)
