"""Prediction that is compiled once and then runs: the same actions, no graph breaks, no compiling anew, no waiting."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from model_fixtures import tiny_config, tiny_inputs, tiny_model


# As between the model and the original, see test_goldens.py.
ACTION_TOLERANCE = 3e-4


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def model():
    return tiny_model()


def observation(config, seed: int, batch_size: int = 1, prompt_length: int = 9) -> dict[str, Any]:
    """Arguments of `predict_action`."""
    inputs = tiny_inputs(config, batch_size, prompt_length, seed)
    del inputs["proprio"]
    return {**inputs, "state": np.random.default_rng(seed).uniform(-1, 1, (batch_size, config.proprio_dim))}


class TestCompiled:
    def test_twenty_observations_and_instructions_are_one_graph(self, model):
        compiled = copy.deepcopy(model).compile_for_inference(prompt_multiple=32, backend="eager")
        compiled.predict_action(**observation(model.config, 0))
        with torch.compiler.set_stance("fail_on_recompile"):
            for seed in range(1, 21):
                inputs = observation(model.config, seed, prompt_length=8 + seed)
                expected = model.predict_action(**inputs)
                np.testing.assert_allclose(compiled.predict_action(**inputs), expected, rtol=0, atol=ACTION_TOLERANCE)

    def test_a_mask_that_is_left_out_of_booleans_or_padded_left_is_the_same_graph(self, model):
        compiled = copy.deepcopy(model).compile_for_inference(prompt_multiple=16, backend="eager")
        inputs = observation(model.config, 0, batch_size=2)
        compiled.predict_action(**inputs)
        masks = [None, torch.ones(2, 9, dtype=torch.bool), torch.tensor([[0] * 3 + [1] * 6, [1] * 9])]
        with torch.compiler.set_stance("fail_on_recompile"):
            for mask in masks:
                given = {**inputs, "attention_mask": mask}
                expected = model.predict_action(**given)
                np.testing.assert_allclose(compiled.predict_action(**given), expected, rtol=0, atol=ACTION_TOLERANCE)

    def test_the_default_compiler_gives_the_same_actions(self, model):
        inputs = observation(model.config, 1)
        expected = model.predict_action(**inputs)
        compiled = model.compile_for_inference(prompt_multiple=16)
        np.testing.assert_allclose(compiled.predict_action(**inputs), expected, rtol=0, atol=ACTION_TOLERANCE)

    def test_batches_of_more_sizes_than_torch_allows_by_default(self, model):
        compiled = copy.deepcopy(model).compile_for_inference(prompt_multiple=16, backend="eager")
        for batch_size in range(1, 11):
            inputs = observation(model.config, batch_size, batch_size)
            expected = model.predict_action(**inputs)
            np.testing.assert_allclose(compiled.predict_action(**inputs), expected, rtol=0, atol=ACTION_TOLERANCE)

    def test_weights_that_change_afterwards_are_seen(self, model):
        inputs = observation(model.config, 0)
        model.compile_for_inference(backend="eager")
        before = model.predict_action(**inputs)
        with torch.no_grad():
            model.policy.norm_in.bias.add_(1)
        after = model.predict_action(**inputs)
        changed = tiny_model()
        changed.load_state_dict(model.state_dict())
        assert np.abs(after - before).max() > 0.01
        np.testing.assert_allclose(after, changed.predict_action(**inputs), rtol=0, atol=ACTION_TOLERANCE)

    def test_a_copy_does_not_compute_with_the_weights_of_what_it_was_copied_from(self, model):
        inputs = observation(model.config, 0)
        model.compile_for_inference(backend="eager")
        before = model.predict_action(**inputs)
        other = copy.deepcopy(model)
        with torch.no_grad():
            other.policy.fc_out.bias.add_(1)
        assert np.abs(other.predict_action(**inputs) - before)[..., :-1].min() > 0.1
        np.testing.assert_array_equal(model.predict_action(**inputs), before)

    def test_a_model_in_training_mode_predicts_without_noise_and_goes_on_training(self, model):
        inputs = observation(model.config, 0)
        expected = model.predict_action(**inputs)
        model.compile_for_inference(backend="eager").train()
        np.testing.assert_allclose(model.predict_action(**inputs), expected, rtol=0, atol=ACTION_TOLERANCE)
        assert all(module.training for module in model.modules())

    @pytest.mark.parametrize("multiple", [0, -1, 1.5, True, "64"])
    def test_a_multiple_that_is_none_is_refused(self, model, multiple):
        with pytest.raises(ValueError, match="prompt_multiple"):
            model.compile_for_inference(prompt_multiple=multiple)


@pytest.mark.parametrize("variant", ["pro", "original"])
def test_forward_never_waits_for_a_value_from_the_device(variant):
    # On the meta device there are no values: whoever asks for one gets an error.
    model = tiny_model(tiny_config(policy_variant=variant)).to("meta")
    inputs = {name: value.to("meta") for name, value in tiny_inputs(model.config).items()}
    assert model(**inputs).actions.shape == (2, model.config.chunk_size, model.config.action_dim)
