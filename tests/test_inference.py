"""Compiled prediction: the same actions, one compilation, no graph breaks. On a GPU: `test_gpu_inference.py`."""

import copy
import inspect
from typing import Any

import numpy as np
import pytest
import torch
from model_fixtures import tiny_inputs, tiny_model


# As between the model and the original, see test_goldens.py.
ACTION_TOLERANCE = 3e-4


@pytest.fixture(scope="module", autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def compiled():
    """The same model, compiled, and traced for one observation.

    The tracer is the real one, the kernels are eager's.
    """
    model = tiny_model().compile_for_inference(prompt_multiple=32, backend="eager")
    model.predict_action(**observation(model.config, 0))
    return model


def observation(config, seed: int, batch_size: int = 1, prompt_length: int = 9) -> dict[str, Any]:
    """Arguments of `predict_action`."""
    inputs = tiny_inputs(config, batch_size, prompt_length, seed)
    del inputs["proprio"]
    return {**inputs, "state": np.random.default_rng(seed).uniform(-1, 1, (batch_size, config.proprio_dim))}


def assert_same(actions: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(actions, expected, rtol=0, atol=ACTION_TOLERANCE)


class TestOneGraph:
    """Recompilation is an error in these tests. Graph breaks are an error in all."""

    @pytest.fixture(autouse=True)
    def no_compiling(self, compiled):
        with torch.compiler.set_stance("fail_on_recompile"):
            yield

    def test_serves_twenty_observations_and_instructions(self, model, compiled):
        for seed in range(1, 21):
            inputs = observation(model.config, seed, prompt_length=8 + seed)
            assert_same(compiled.predict_action(**inputs), model.predict_action(**inputs))

    def test_a_prompt_beyond_the_multiple_is_another_shape(self, model, compiled):
        with pytest.raises(RuntimeError, match="recompil"):
            compiled.predict_action(**observation(model.config, 0, prompt_length=33))

    @pytest.mark.parametrize(
        "mask",
        [
            None,
            torch.ones(1, 9, dtype=torch.bool),
            torch.tensor([[0] * 3 + [1] * 6]),
            torch.tensor([[1] * 6 + [0] * 3]),
        ],
        ids=["none", "booleans", "padded left", "padded right"],
    )
    def test_serves_masks_of_all_kinds(self, model, compiled, mask):
        inputs = {**observation(model.config, 3), "attention_mask": mask}
        assert_same(compiled.predict_action(**inputs), model.predict_action(**inputs))

    def test_sees_weights_that_change_afterwards(self, model, compiled):
        inputs = observation(model.config, 0)
        changed = copy.deepcopy(model)
        before = compiled.predict_action(**inputs)
        with torch.no_grad():
            changed.policy.norm_in.bias.add_(1)  # what the constant first latent is made from
            compiled.policy.norm_in.bias.add_(1)
            after = compiled.predict_action(**inputs)
            compiled.policy.norm_in.bias.sub_(1)
        assert np.abs(after - before).max() > 0.01
        assert_same(after, changed.predict_action(**inputs))

    def test_is_not_that_of_a_copy(self, compiled):
        inputs = observation(compiled.config, 0)
        before = compiled.predict_action(**inputs)
        other = copy.deepcopy(compiled)
        with torch.no_grad():
            other.policy.fc_out.bias.add_(1)
        assert np.abs(other.predict_action(**inputs) - before)[..., :-1].min() > 0.1
        np.testing.assert_array_equal(compiled.predict_action(**inputs), before)

    def test_serves_a_model_in_training_mode_which_goes_on_training(self, model, compiled):
        inputs = observation(model.config, 0)
        compiled.train()
        actions = compiled.predict_action(**inputs)
        assert all(module.training for module in compiled.modules())
        compiled.eval()
        assert_same(actions, model.predict_action(**inputs))


@pytest.mark.skipif(
    "recompile_limit" not in inspect.signature(torch.compile).parameters, reason="this torch has one limit for all"
)
def test_batches_of_more_sizes_than_torch_allows_by_default(model, compiled):
    with torch._dynamo.config.patch(recompile_limit=1):
        for batch_size in (2, 3):
            inputs = observation(model.config, batch_size, batch_size)
            assert_same(compiled.predict_action(**inputs), model.predict_action(**inputs))


def test_the_default_compiler_gives_the_same_actions(model):
    inputs = observation(model.config, 1)
    compiled = copy.deepcopy(model).compile_for_inference(prompt_multiple=16)
    assert_same(compiled.predict_action(**inputs), model.predict_action(**inputs))


@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("input_ids", torch.zeros(9, dtype=torch.long)),
        ("attention_mask", torch.ones(1, 8)),
        ("attention_mask", torch.zeros(1, 9)),
        ("pixel_values", None),
        ("pixel_values", torch.zeros(1, 6, 28, 28)),
        ("pixel_values", torch.zeros(2, 12, 28, 28)),
        ("pixel_values", torch.full((1, 12, 28, 28), torch.nan)),
        ("state", None),
        ("state", np.zeros((1, 7))),
    ],
)
def test_a_wrong_input_is_named_compiled_or_not(model, compiled, is_compiled, field, value):
    inputs = {**observation(model.config, 0), field: value}
    with pytest.raises(ValueError, match=f"^{field} "):
        (compiled if is_compiled else model).predict_action(**inputs)


@pytest.mark.parametrize("multiple", [0, -1, 1.5, True, "64"])
def test_a_multiple_that_is_none_is_refused(model, multiple):
    with pytest.raises(ValueError, match="prompt_multiple"):
        model.compile_for_inference(prompt_multiple=multiple)
