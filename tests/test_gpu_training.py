"""Training on a GPU: every preset in bfloat16 with gradient checkpointing, resuming, and as many GPUs as there are.

The same code runs on the CPU, with two processes in the place of the GPUs.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from devices import CUDA, DEVICES, move
from model_fixtures import tiny_inputs, tiny_model
from training_fixtures import command, losses, run_training, write_start
from transformers import AutoModel

from vla_adapter_hf import apply_preset


TESTS = Path(__file__).parent
# Gradients of some layers are sums in the order in which threads arrive.
LOSS_TOLERANCE = {"cpu": 1e-6, "cuda": 2e-3}


@pytest.fixture(scope="module")
def start(tmp_path_factory, processor) -> Path:
    return write_start(tmp_path_factory.mktemp("start"), processor)


def on_device(device: str, *more) -> list:
    """Words of `vla-adapter train` that choose the device, bfloat16 and gradient checkpointing."""
    words = ["--use_cpu", str(device == "cpu").lower(), "--bf16", "true", "--gradient_checkpointing", "true"]
    return [*words, "--augment", "false", "--learning_rate", "1e-3", *more]


def batch_of(config, batch_size: int = 4) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = (batch_size, config.chunk_size, config.action_dim)
    return {**tiny_inputs(config, batch_size), "actions": torch.rand(shape, generator=generator) * 2 - 1}


def gradients(preset: str, device: str, checkpointing: bool) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss of a step in bfloat16, and the gradients of what trains."""
    torch.manual_seed(0)
    model = tiny_model(policy_noise_std=0.0)
    batch = move(batch_of(model.config), device)
    trained = apply_preset(model, preset, rank=4).to(device).train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with torch.autocast(device, torch.bfloat16):
        loss = trained(**batch).loss
    loss.backward()
    return loss.item(), {name: p.grad.float().cpu() for name, p in trained.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("preset", ["lora", "frozen", "full"])
def test_gradient_checkpointing_in_bfloat16_changes_no_gradient(preset, device):
    expected_loss, expected = gradients(preset, device, False)
    loss, found = gradients(preset, device, True)
    assert loss == pytest.approx(expected_loss, rel=1e-3)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        error = (gradient - expected[name]).norm()
        assert error <= 0.02 * expected[name].norm() + 1e-6, name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("preset", ["lora", "frozen", "full"])
def test_a_few_steps_in_bfloat16_lower_the_loss(preset, device):
    torch.manual_seed(0)
    model = tiny_model(policy_noise_std=0.0)
    batch = move(batch_of(model.config), device)
    trained = apply_preset(model, preset, rank=4).to(device).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = torch.optim.AdamW([p for p in trained.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(8):
        with torch.autocast(device, torch.bfloat16):
            loss = trained(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("preset", ["lora", "frozen"])
def test_a_resumed_run_in_bfloat16_has_the_losses_of_an_uninterrupted_one(start, tmp_path, preset, device):
    words = on_device(device, "--preset", preset, "--lr_scheduler_type", "constant")
    run_training(start, tmp_path / "whole", *words)
    run_training(start, tmp_path / "halves", *words, "--max_steps", 2)
    run_training(start, tmp_path / "halves", *words, "--resume_from_checkpoint", "true")
    assert losses(tmp_path / "halves") == pytest.approx(losses(tmp_path / "whole"), abs=LOSS_TOLERANCE[device])
    model = AutoModel.from_pretrained(tmp_path / "halves").to(device)
    assert all(weight.isfinite().all() for weight in model.parameters())


# Several processes


def processes(device: str) -> int:
    """As many as there are GPUs. On the CPU two."""
    return 2 if device == "cpu" else torch.cuda.device_count()


def launch(count: int, *words, **environment) -> str:
    """The output of `count` processes of a module or script; the test fails if one of them does."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
    run = subprocess.run(
        [*launcher, *map(str, words)],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return run.stdout


@pytest.mark.parametrize("device", DEVICES)
def test_lora_on_every_device_has_the_losses_of_one(start, tmp_path, device):
    """DDP: gradients of parts of a batch, averaged, are those of the whole batch."""
    count = processes(device)
    if count < 2:
        pytest.skip("it needs two GPUs")
    for name, number, batch in (("one", 1, 2 * count), ("all", count, 2)):
        more = ["--preset", "lora", "--per_device_train_batch_size", batch, "--max_steps", 3, "--save_steps", 3]
        words = command(start, tmp_path / name, *map(str, more), *on_device(device))
        # Otherwise one process would use all GPUs by itself.
        visible = {} if device == "cpu" or number > 1 else {"CUDA_VISIBLE_DEVICES": "0"}
        output = launch(number, "-m", "vla_adapter_hf.cli", "train", *words, **visible)
        assert output.count("Reading ") == output.count("Saving") == 1  # the other processes are quiet
    assert losses(tmp_path / "all") == pytest.approx(losses(tmp_path / "one"), abs=5e-3)


@pytest.mark.parametrize("device", DEVICES)
def test_a_model_sharded_over_every_device_trains_as_a_whole_one(tmp_path, device):
    """FSDP2 by torch itself, three steps."""
    output = launch(processes(device), TESTS / "sharded_training.py", device)
    result = json.loads(output.splitlines()[-1])
    assert result["losses"] == pytest.approx(result["expected"], abs=2e-3)
    assert result["losses"][-1] < result["losses"][0]


@pytest.mark.parametrize("device", [CUDA])
def test_the_trainer_shards_over_every_gpu_and_saves_a_whole_checkpoint(start, tmp_path, device):
    """On the CPU accelerate does not shard, and the command refuses to; see test_training.py."""
    more = ["--preset", "full", "--fsdp", "full_shard", "--max_steps", 2]
    words = command(start, tmp_path / "out", *map(str, more), *on_device(device)[:4], "--augment", "false")
    launch(processes(device), "-m", "vla_adapter_hf.cli", "train", *words)
    sharded = AutoModel.from_pretrained(tmp_path / "out")
    before = AutoModel.from_pretrained(start)
    changed = [name for name, weight in sharded.state_dict().items() if not weight.equal(before.state_dict()[name])]
    assert "policy.fc_out.weight" in changed and "language_model.layers.1.mlp.up_proj.weight" in changed
