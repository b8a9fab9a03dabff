"""`vla-adapter bench --gpu`: one table of a GPU. On the CPU the same code measures a small model."""

import json

import pytest
import torch
from devices import DEVICES
from typer.testing import CliRunner

from vla_adapter_cli import app
from vla_adapter_hf.bench import measures
from vla_adapter_hf.bench.gpu import Budget, GpuBenchSettings, bench_gpu
from vla_adapter_hf.bench.gpu_report import limit_seconds, markdown
from vla_adapter_hf.bench.measures import STAGE_MODULES, STAGES, copy_rate, int8_rate


@pytest.fixture(autouse=True)
def small_limits(monkeypatch):
    """The machine's rates are not what these tests are about."""
    monkeypatch.setitem(measures.MATMUL_SIZE, "cpu", 128)
    monkeypatch.setitem(measures.COPY_BYTES, "cpu", 1 << 20)
    yield
    torch.compiler.reset()


def settings(device: str, **options) -> GpuBenchSettings:
    backend = "eager" if device == "cpu" else None
    return GpuBenchSettings(
        **{"device": device, "size": "small", "runs": 2, "warmup": 0, "backend": backend, **options}
    )


@pytest.mark.parametrize("device", DEVICES)
def test_eager_and_compiled_predictions_their_stages_and_the_limit_are_in_one_report(device, tmp_path):
    lines = []
    output = tmp_path / "new" / "gpu.json"
    report = bench_gpu(settings(device, batch_sizes=(1,), precisions=("bfloat16",)), output, lines.append)
    assert json.loads(output.read_text(encoding="utf-8")) == report
    text = output.with_suffix(".md").read_text(encoding="utf-8")
    assert text == lines[-1] == markdown(report)
    for name in ("bfloat16, eager", "bfloat16, compiled"):
        assert report["predictions"][name]["1"]["p50"] > 0 and name in text
    assert list(report["stages"]["bfloat16, eager"]) == list(STAGES)
    assert list(report["stages"]["bfloat16, compiled"]) == list(STAGE_MODULES)
    assert report["card"]["name"] in text and f"torch {torch.__version__}" in text
    assert not report["left_out"] and "Left out" not in text
    for known in ("36.5", "90.0", "19.8", "the card's limit, bfloat16", "not measured here."):
        assert known in text


def test_what_does_not_fit_into_the_time_is_left_out_and_listed(tmp_path):
    pytest.importorskip("torchao")
    report = bench_gpu(settings("cpu", batch_sizes=(1, 2), minutes=1e-9), None, lambda line: None)
    assert {name: list(times) for name, times in report["predictions"].items()} == {
        "bfloat16, eager": ["1", "2"],
        "int8, eager": ["1", "2"],
        "bfloat16, compiled": [],
        "int8, compiled": [],
    }
    assert len(report["left_out"]) == 6 and "Left out, for lack of time: bfloat16, compiled" in markdown(report)
    assert report["work"]["weights"]["int8"] < report["work"]["weights"]["bfloat16"]


def test_a_compilation_needs_as_long_as_the_slowest_before_it():
    budget = Budget(minutes=1.0)
    assert budget.allows()
    budget.compiled_in(30.0)
    assert budget.allows() and not budget.allows(2.0)
    budget.compiled_in(50.0)
    budget.compiled_in(1.0)
    assert not budget.allows()


def test_the_limit_is_that_of_reading_the_weights_or_of_the_operations():
    report = {
        "work": {"flops": 1e12, "weights": {"bfloat16": 2e9, "int8": 1e9}},
        "limits": {"bytes_per_second": 1e12, "operations_per_second": {"bfloat16": 1e15, "int8": 2e15}},
    }
    assert limit_seconds(report, "bfloat16", 1) == pytest.approx(2e-3)  # memory
    assert limit_seconds(report, "int8", 1) == pytest.approx(1e-3)
    assert limit_seconds(report, "bfloat16", 64) == pytest.approx(64e-3)  # arithmetic


@pytest.mark.parametrize(("milliseconds", "verdict"), [(9.5, "met, 9.50 ms"), (10.5, "missed, 10.50 ms")])
def test_the_goal_is_judged_at_the_published_size(milliseconds, verdict):
    report = {
        "card": {"name": "card", "versions": {"torch": "2"}},
        "size": "full",
        "limits": {"bytes_per_second": 1e12, "operations_per_second": {"bfloat16": 1e15}},
        "work": {"flops": 1e12, "weights": {"bfloat16": 2e9}, "prompt_tokens": 83},
        "predictions": {"bfloat16, compiled": {"1": {"p50": milliseconds / 1000}}},
        "stages": {},
        "left_out": [],
    }
    assert verdict in markdown(report)


def test_rates_are_positive_numbers():
    device = torch.device("cpu")
    assert copy_rate(device, runs=1) > 0 and int8_rate(device, runs=1) > 0


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ("leave out --compile", ["--compile"]),
        ("leave out --busy", ["--busy", "2"]),
        ("leave out --serve-seconds", ["--serve-seconds", "3"]),
        ("leave out CHECKPOINT", ["folder"]),
        ("--minutes must be more than 0", ["--device", "cpu", "--minutes", "0"]),
        ("--size must be one of", ["--device", "cpu", "--size", "huge"]),
        ("torch finds", ["--device", "cuda:99"]),
    ],
)
def test_options_that_make_no_sense_are_refused(message, words):
    result = CliRunner().invoke(app, ["bench", "--gpu", *words])
    assert result.exit_code == 1 and message in " ".join(result.output.split())


@pytest.mark.parametrize("words", [["--minutes", "3"], ["--backend", "eager"], ["--serve-clients", "2"]])
def test_options_of_other_measurements_are_refused(words):
    result = CliRunner().invoke(app, ["bench", *words])
    assert result.exit_code == 1 and f"leave out {words[0]}: it needs" in " ".join(result.output.split())
