"""`vla-adapter bench --gpu`: one table of a GPU. On the CPU the same code measures a small model."""

import json
from contextlib import nullcontext

import pytest
import torch
from devices import DEVICES
from model_fixtures import tiny_config, tiny_model
from transformers import AutoProcessor
from typer.testing import CliRunner

from vla_adapter_cli import app
from vla_adapter_hf.bench import gpu, measures, subject
from vla_adapter_hf.bench.gpu import Budget, GpuBenchSettings, bench_gpu
from vla_adapter_hf.bench.gpu_report import limit_seconds, markdown
from vla_adapter_hf.bench.measures import STAGE_MODULES, STAGES, copy_rate, int8_rate
from vla_adapter_hf.cli import bench as bench_command


@pytest.fixture(scope="module")
def tiny_checkpoint(tmp_path_factory, published_pro):
    folder = tmp_path_factory.mktemp("bench") / "checkpoint"
    tiny_model().bfloat16().save_pretrained(folder)
    processor = AutoProcessor.from_pretrained(published_pro)
    type(processor).from_model_config(tiny_config(), processor.tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def tiny_and_quick(monkeypatch, tiny_checkpoint):
    """The machine's rates and the time of random weights are not what these tests are about."""
    monkeypatch.setattr(subject, "random_checkpoint", lambda *_: nullcontext(tiny_checkpoint))
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
    assert len(report["left_out"]) == 6 and "- int8, compiled, a batch of 2: lack of time" in markdown(report)
    assert report["work"]["weights"]["int8"] < report["work"]["weights"]["bfloat16"]


def test_what_fails_is_listed_and_all_that_was_measured_until_an_interruption_is_in_the_files(tmp_path, monkeypatch):
    """Compiled, one tower and one observation fail, and the run is interrupted at two observations."""
    output = tmp_path / "gpu.json"
    eager, before = gpu._time_predictions, {}

    def time_predictions(measured, batch_size, settings):
        if measured.model._prompt_multiple is None:
            return eager(measured, batch_size, settings)
        before[batch_size] = json.loads(output.read_text(encoding="utf-8"))
        if batch_size == 1:
            raise RuntimeError("self.size(0) needs to be\ngreater than 16")
        if batch_size == 2:
            raise KeyboardInterrupt
        return {"p50": 0.5, "first": 1.0}

    def time_compiled(call, *_):
        if type(call.module).__name__.startswith("Siglip"):
            raise RuntimeError("no kernel")
        return 0.25

    monkeypatch.setattr(gpu, "_time_predictions", time_predictions)
    monkeypatch.setattr(gpu, "_time_compiled", time_compiled)
    with pytest.raises(KeyboardInterrupt):
        bench_gpu(settings("cpu", batch_sizes=(1, 2, 4), precisions=("bfloat16",)), output, lambda line: None)
    assert list(before[1]["predictions"]["bfloat16, eager"]) == ["1", "2", "4"]
    report = json.loads(output.read_text(encoding="utf-8"))
    assert report["predictions"]["bfloat16, compiled"] == {"4": {"p50": 0.5, "first": 1.0}}
    # A stage of two modules has no time if one of them has none.
    assert report["stages"]["bfloat16, compiled"] == {"projector": 0.25, "language model": 0.25, "policy": 0.5}
    first, second = report["left_out"]
    assert (first["what"], second["what"]) == ("bfloat16, compiled, vision", "bfloat16, compiled, a batch of 1")
    assert first["reason"] == "RuntimeError: no kernel" and "Traceback" in first["traceback"]
    text = output.with_suffix(".md").read_text(encoding="utf-8")
    assert text == markdown(report) and "a batch of 1: RuntimeError: self.size(0) needs to be greater than 16" in text


def test_a_precision_that_cannot_be_loaded_does_not_keep_the_other_from_being_measured(monkeypatch):
    pytest.importorskip("torchao")

    def load(source, of_precision, options):
        if of_precision.quantize is None:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return subject.load_subject(source, of_precision, options)

    monkeypatch.setattr(gpu, "load_subject", load)
    report = bench_gpu(settings("cpu", batch_sizes=(1,), minutes=1e-9), None, lambda line: None)
    assert report["left_out"][0]["what"] == "bfloat16"
    assert list(report["predictions"]) == ["int8, eager", "int8, compiled"]
    text = markdown(report)
    assert "the card's limit, int8" in text and "the card's limit, bfloat16" not in text


def test_the_command_fails_after_the_report_if_something_failed(monkeypatch):
    failed = {"what": "int8, compiled", "reason": "RuntimeError: rows", "traceback": "Traceback"}
    slow = {"what": "a batch of 64", "reason": "lack of time", "traceback": None}
    for left_out, code in (([slow], 0), ([slow, failed], 1)):
        monkeypatch.setattr(bench_command, "bench_gpu", lambda *_, left_out=left_out, **__: {"left_out": left_out})
        result = CliRunner().invoke(app, ["bench", "--gpu", "--device", "cpu"])
        assert result.exit_code == code and ("these failed: int8, compiled\n" in result.output) == bool(code)


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
