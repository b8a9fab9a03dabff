"""The quicker attention is chosen by itself in bfloat16 on a CPU, and nowhere else."""

import logging

import numpy as np
import pytest
import torch
from serving_fixtures import recorded_observation

from vla_adapter_hf import open_checkpoint
from vla_adapter_hf.bench.run import bench
from vla_adapter_hf.bench.settings import BenchSettings
from vla_adapter_hf.checkpoints import attention
from vla_adapter_hf.checkpoints.attention import choose_attention, plain_is_quicker
from vla_adapter_hf.checkpoints.embedded import embedded_folder
from vla_adapter_hf.robot.policy import LocalPolicy
from vla_adapter_hf.serving.policy import ServedPolicy
from vla_adapter_hf.serving.settings import ServeSettings
from vla_adapter_hf.simulation.policies import CheckpointPolicy


PARTS = ("dinov2_config", "siglip_config", "text_config")
CHOSEN = {"dinov2_config": "eager", "siglip_config": "eager"}


@pytest.fixture(scope="module")
def opened():
    with embedded_folder() as folder:
        yield open_checkpoint(folder / "checkpoint")


@pytest.fixture
def plain_wins(monkeypatch):
    """A machine on which plain attention is quicker."""
    asked = []
    monkeypatch.setattr(attention, "plain_is_quicker", lambda *arguments: asked.append(arguments) or True)
    return asked


def implementations(model) -> dict[str, str]:
    return {part: getattr(model.config, part)._attn_implementation for part in PARTS}


def test_the_towers_get_it_and_the_log_says_so(opened, plain_wins, caplog):
    """At the level that transformers shows by default, and once."""
    model = opened.load_model("bfloat16")
    attention.logger.warning_once.cache_clear()
    assert choose_attention(model) == CHOSEN
    assert choose_attention(opened.load_model("bfloat16")) == CHOSEN
    assert [record.levelno for record in caplog.records if "ttention of" in record.message] == [logging.WARNING]
    assert implementations(model) == {**CHOSEN, "text_config": "sdpa"}
    assert "Attention of dinov2 and siglip: eager" in caplog.text
    # Both cameras, 64 patches; DINOv2 has a class token and four registers more.
    assert [shape for shape, _ in plain_wins[:2]] == [(2, 2, 69, 64), (2, 2, 64, 64)]


@pytest.mark.parametrize(
    "dtype, options", [("float32", {}), ("bfloat16", {"attn_implementation": "eager"}), ("bfloat16", "exported")]
)
def test_nothing_else_is_changed(opened, plain_wins, dtype, options):
    model = object() if options == "exported" else opened.load_model(dtype, **options)
    before = None if options == "exported" else implementations(model)
    assert choose_attention(model) == {} and plain_wins == []
    assert options == "exported" or implementations(model) == before


def test_actions_stay_within_bfloat16s_error(opened, plain_wins):
    """The mean error stays of the order of bfloat16's, which is 0.0015 here."""
    seen = recorded_observation()
    frames = [seen["image"], seen["wrist_image"]]
    inputs = opened.load_processor()(images=frames, text=seen["prompt"], state=seen["state"])
    exact = opened.load_model("float32").predict_action(**inputs)
    model = opened.load_model("bfloat16")
    before = np.abs(model.predict_action(**inputs) - exact).mean()
    choose_attention(model)
    assert 0 < np.abs(model.predict_action(**inputs) - exact).mean() < 3 * before


def test_the_robot_loop_the_server_and_bench_choose(opened, plain_wins):
    policy = LocalPolicy(opened.source, robot="none", dtype="bfloat16")
    assert implementations(policy.model) == {**CHOSEN, "text_config": "sdpa"}
    served = ServedPolicy.load(opened.source, ServeSettings(dtype="bfloat16"))
    assert implementations(served.model) == {**CHOSEN, "text_config": "sdpa"}
    for given, expected in ((None, "eager"), ("sdpa", "sdpa")):
        settings = BenchSettings(dtype=torch.bfloat16, attention=given, runs=1, warmup=0)
        report = bench(settings, report_progress=lambda line: None)
        assert report["attention"]["siglip_config"] == expected


@pytest.mark.parametrize("given", ["sdpa", "eager", {"siglip_config": "eager"}])
def test_a_choice_of_the_user_stays(opened, plain_wins, given):
    policy = LocalPolicy(opened.source, robot="none", dtype="bfloat16", attn_implementation=given)
    served = ServedPolicy.load(opened.source, ServeSettings(dtype="bfloat16", attention=given))
    for model in (policy.model, served.model):
        expected = given if isinstance(given, dict) else dict.fromkeys(PARTS, given)
        assert implementations(model) == dict.fromkeys(PARTS, "sdpa") | expected
    assert plain_wins == []


def test_an_evaluation_keeps_the_default(opened, plain_wins):
    """A measurement that turns out otherwise must not change the actions of a resumed run, a shard or a replica."""
    policy = CheckpointPolicy(opened.source, "libero", suite="libero_object", dtype="bfloat16")
    assert implementations(policy.model) == dict.fromkeys(PARTS, "sdpa") and plain_wins == []


def test_it_is_measured_once(monkeypatch):
    plain_is_quicker.cache_clear()
    calls = []
    monkeypatch.setattr(
        attention, "softmax", lambda *args, **options: calls.append(1) or torch.softmax(*args, **options)
    )
    shape = (1, 2, 8, 4)
    assert plain_is_quicker(shape, 1) == plain_is_quicker(shape, 1)
    assert len(calls) == attention.ROUNDS + 1
