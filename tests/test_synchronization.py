"""The forward pass never waits for the GPU: the CPU queues all of it, and CUDA graphs can record it.

The same check runs on the CPU (with values), on the meta device (where nobody can look at a value) and on CUDA (where
torch reports whatever waits). `synchronization.py` says what it finds.
"""

from typing import Any

import pytest
import torch
from devices import CUDA, move
from flash_kernel import use_flash_kernel
from model_fixtures import tiny_inputs, tiny_model
from synchronization import SynchronizationError, no_synchronization

from vla_adapter_hf import apply_preset


WITHOUT_VALUES = ["cpu", "meta", CUDA]


def training_batch(config: Any, batch_size: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    is_pad = torch.zeros(batch_size, config.chunk_size, dtype=torch.bool)
    is_pad[0, -1] = True
    shape = (batch_size, config.chunk_size, config.action_dim)
    return {
        **tiny_inputs(config, batch_size),
        "actions": torch.rand(shape, generator=generator) * 2 - 1,
        "action_is_pad": is_pad,
    }


class TestForward:
    @pytest.mark.parametrize("device", WITHOUT_VALUES)
    @pytest.mark.parametrize("attention", ["sdpa", "eager"])
    @pytest.mark.parametrize("variant", ["pro", "original"])
    @pytest.mark.parametrize("batch_size", [1, 3])
    def test_of_a_prediction(self, device, attention, variant, batch_size):
        model = tiny_model(policy_variant=variant).to(device)
        model.set_attn_implementation(attention)
        inputs = move(tiny_inputs(model.config, batch_size), device)
        with torch.no_grad():
            model(**inputs)  # on CUDA the first call loads kernels
            with no_synchronization(device):
                actions = model(**inputs).actions
        assert actions.shape == (batch_size, model.config.chunk_size, model.config.action_dim)

    @pytest.mark.parametrize("device", WITHOUT_VALUES)
    def test_without_a_mask(self, device):
        model = tiny_model().to(device)
        inputs = move(tiny_inputs(model.config), device)
        del inputs["attention_mask"]
        with torch.no_grad():
            model(**inputs)
            with no_synchronization(device):
                model(**inputs)

    @pytest.mark.parametrize("batch_size", [1, 3])
    def test_with_flash_attention(self, batch_size, monkeypatch):
        """transformers searches the positions for packed sequences in every layer unless it gets the lengths."""
        model = tiny_model()
        inputs = tiny_inputs(model.config, batch_size)
        expected = model(**inputs).actions
        use_flash_kernel(model, monkeypatch)
        with torch.no_grad(), no_synchronization("cpu"):
            actions = model(**inputs).actions
        torch.testing.assert_close(actions, expected, rtol=0, atol=1e-5)

    @pytest.mark.parametrize("device", WITHOUT_VALUES)
    @pytest.mark.parametrize("preset", ["lora", "frozen", "full"])
    def test_and_backward_of_a_training_step(self, device, preset):
        model = tiny_model().to(device)
        config = model.config
        trained = apply_preset(model, preset, rank=4).train()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        batch = move(training_batch(config), device)
        trained(**batch).loss.backward()
        with no_synchronization(device):
            trained(**batch).loss.backward()


def by_number(states: torch.Tensor) -> Any:
    return states.sum().item()


def by_condition(states: torch.Tensor) -> Any:
    return states * 2 if (states > 0).all() else states


def by_mask(states: torch.Tensor) -> Any:
    return states[states > 0]


def by_assigned_mask(states: torch.Tensor) -> Any:
    """With a tensor of the device. For a number CUDA fills the mask, which does not wait."""
    states[states > 0] = states[0]


def by_positions(states: torch.Tensor) -> Any:
    return states.nonzero()


def by_lengths(states: torch.Tensor) -> Any:
    return states.repeat_interleave(torch.arange(3, device=states.device))


def by_copied_constant(states: torch.Tensor) -> Any:
    return states * torch.tensor([1.0, 2.0, 3.0], device=states.device)


def by_copied_index(states: torch.Tensor) -> Any:
    return states[[0, 2]]


class TestCheck:
    @pytest.mark.parametrize("device", WITHOUT_VALUES)
    @pytest.mark.parametrize(
        "operation",
        [
            by_number,
            by_condition,
            by_mask,
            by_assigned_mask,
            by_positions,
            by_lengths,
            by_copied_constant,
            by_copied_index,
        ],
    )
    def test_finds_what_waits(self, device, operation):
        states = torch.ones(3, device=device)
        with pytest.raises((SynchronizationError, RuntimeError)), no_synchronization(device):
            operation(states)

    @pytest.mark.parametrize("device", ["meta", CUDA])
    @pytest.mark.parametrize("copy", [lambda states: states.cpu(), lambda states: states + torch.ones(3)])
    def test_finds_copies_between_devices(self, device, copy):
        states = torch.ones(3, device=device)
        with pytest.raises((SynchronizationError, RuntimeError)), no_synchronization(device):
            copy(states)

    @pytest.mark.parametrize("device", WITHOUT_VALUES)
    def test_lets_pass_what_does_not_wait(self, device):
        states = torch.ones(3, device=device)
        with no_synchronization(device):
            torch.where(states > 0, states, 0).clamp(min=1).masked_fill(states > 0, 2.0)
            states[1:].sum()
