"""`vla-adapter bench --serve` measures what it says."""

import json
from dataclasses import replace

import numpy as np
import pytest
from serving_fixtures import server_thread
from typer.testing import CliRunner

from vla_adapter_cli import app
from vla_adapter_hf.serving import bench
from vla_adapter_hf.serving.bench import ServeBenchSettings, bench_server
from vla_adapter_hf.serving.example import example_observation
from vla_adapter_hf.serving.settings import ServeSettings


def test_added_latency_and_load_are_measured_request_by_request(embedded_policy):
    example = example_observation(embedded_policy.config)
    with server_thread(embedded_policy, ServeSettings()) as running:
        server = replace(running.services.settings, port=running.port)
        with bench._client(server) as client:
            latency = bench._added_latency(client, example, requests=5)
        load = bench._load(server, example, clients=3, seconds=0.5)
        assert running.services.engine.latest[0] >= 5 + bench.WARM_UP + 3 + load["answers"]
    assert 0 < latency["added"]["p50"] < latency["round_trip"]["p50"]
    assert load["clients"] == 3 and load["answers"] >= 3 and 1 <= load["batch_size"] <= 3
    assert load["per_second"] == pytest.approx(load["answers"] / 0.5, rel=0.5)


def test_a_client_that_fails_under_load_is_an_error_and_not_a_figure(embedded_policy):
    example = example_observation(embedded_policy.config)
    wrong = replace(example, state=np.zeros(3))
    with server_thread(embedded_policy, ServeSettings()) as running:
        server = replace(running.services.settings, port=running.port)
        with pytest.raises(RuntimeError, match="8 numbers"):
            bench._load(server, wrong, clients=2, seconds=0.2)


@pytest.mark.parametrize(
    "options", [{"requests": 0}, {"clients": ()}, {"clients": (0,)}, {"seconds": 0}, {"memory_minutes": -1}]
)
def test_numbers_that_make_no_sense_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        ServeBenchSettings(**options)


def test_the_command_refuses_options_that_a_server_does_not_have():
    result = CliRunner().invoke(app, ["bench", "--serve", "--size", "small"])
    assert result.exit_code == 1 and "leave out --size" in result.output


@pytest.mark.slow
def test_the_command_reports_latency_load_memory_and_reconnection(tmp_path):
    report = tmp_path / "serve.json"
    settings = ServeBenchSettings(requests=5, clients=(1, 2), seconds=1, memory_minutes=0.1)
    lines = []
    bench_server(settings, report, lines.append)
    assert [line.split(":")[0].strip() for line in lines] == [
        "one client", "1 clients", "2 clients", "memory", "killed and started again",
    ]  # fmt: skip
    written = json.loads(report.read_text())
    assert written["reconnect"]["attempts"] > 1 and len(written["memory"]["resident"]) >= 4
