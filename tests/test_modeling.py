"""What the model sees shows in its actions, and wrong inputs do not pass for right ones."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_fixtures import UNNORM_KEY, norm_stats, tiny_config, tiny_inputs, tiny_model


# Two float32 results of the same computation in another batch or order; actions of tiny models are about 1.
SAME = 1e-5
# What an input must change at least. Far above rounding and far below what tiny models do.
DIFFERENT = 1e-3


@pytest.fixture(scope="module", params=["pro", "original"])
def model(request):
    return tiny_model(policy_variant=request.param)


@pytest.fixture
def inputs(model):
    return tiny_inputs(model.config)


@pytest.fixture(scope="module", params=["pro", "original"])
def published(request, pro_model, original_model):
    return {"pro": pro_model, "original": original_model}[request.param]


@pytest.fixture(scope="module")
def pro_tiny_model():
    return tiny_model()


def physical(inputs: dict, **changes) -> dict:
    """Inputs of `predict_action` from those of `forward`."""
    inputs = {**inputs, "state": inputs["proprio"].double().numpy(), **changes}
    del inputs["proprio"]
    return inputs


def actions_of(model, inputs: dict) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).actions


class TestInputsMatter:
    def test_every_camera_matters(self, cameras=("front", "left", "right")):
        for count in (1, 2, 3):
            model = tiny_model(cameras=cameras[:count])
            inputs = tiny_inputs(model.config)
            actions = actions_of(model, inputs)
            for camera in range(count):
                changed = inputs["pixel_values"].clone()
                changed[:, 6 * camera : 6 * camera + 6] += 0.5
                difference = (actions_of(model, {**inputs, "pixel_values": changed}) - actions).abs().amax(dim=(1, 2))
                assert (difference > DIFFERENT).all(), f"blind to camera {camera} of {count}"

    def test_each_of_the_two_towers_matters(self, model, inputs):
        actions = actions_of(model, inputs)
        for channels in (slice(0, 3), slice(3, 6)):
            changed = inputs["pixel_values"].clone()
            changed[:, channels] += 0.5
            assert (actions_of(model, {**inputs, "pixel_values": changed}) - actions).abs().max() > DIFFERENT

    def test_cameras_are_not_interchangeable(self, model, inputs):
        swapped = inputs["pixel_values"].roll(6, dims=1)
        assert (
            actions_of(model, {**inputs, "pixel_values": swapped}) - actions_of(model, inputs)
        ).abs().max() > DIFFERENT

    def test_every_dimension_of_the_proprio_matters(self, model, inputs):
        actions = actions_of(model, inputs)
        for dimension in range(model.config.proprio_dim):
            changed = inputs["proprio"].clone()
            changed[:, dimension] += 0.5
            assert (actions_of(model, {**inputs, "proprio": changed}) - actions).abs().max() > DIFFERENT

    def test_every_word_of_the_instruction_matters(self, model, inputs):
        actions = actions_of(model, inputs)
        for position in range(inputs["input_ids"].shape[1]):
            changed = inputs["input_ids"].clone()
            changed[:, position] = (changed[:, position] + 1) % 1024
            assert (actions_of(model, {**inputs, "input_ids": changed}) - actions).abs().max() > SAME * 10, position

    def test_the_published_checkpoint_sees_hears_and_feels(self, pro_model, processor, observation):
        def predict(**changes):
            return pro_model.predict_action(**processor(**{**observation, **changes}))

        actions, (front, wrist) = predict(), observation["images"]
        for name, other in {
            "front camera": predict(images=[255 - front, wrist]),
            "wrist camera": predict(images=[front, 255 - wrist]),
            "instruction": predict(text="open the drawer"),
            "state": predict(state=observation["state"] + 0.05),
        }.items():
            assert np.abs(other - actions).max() > DIFFERENT, f"blind to the {name}"

    def test_the_pro_policy_plans_different_steps(self):
        model = tiny_model()
        actions = actions_of(model, tiny_inputs(model.config))
        assert actions.std(dim=1).min() > DIFFERENT

    def test_the_original_policy_repeats_one_action(self):
        # It has no positions and starts from zeros; this is what the published code computes at inference.
        model = tiny_model(policy_variant="original")
        actions = actions_of(model, tiny_inputs(model.config))
        torch.testing.assert_close(actions, actions[:, :1].expand_as(actions), rtol=0, atol=SAME)

    def test_task_states_are_part_of_the_softmax_even_when_the_gate_is_closed(self, model, inputs):
        # A new policy's gate is zero: task states have score 0, and not weight 0.
        closed = tiny_model(policy_variant=model.config.policy_variant)
        for block in closed.policy.blocks:
            torch.nn.init.zeros_(block.attention.gating_factor)
        seen = []
        hook = closed.policy.blocks[0].register_forward_pre_hook(lambda _, arguments: seen.append(arguments))
        closed(**inputs)
        hook.remove()
        latent, adapter, task, rotary = seen[0]
        with_task, _ = closed.policy.blocks[0].attention(latent, adapter, task, rotary)
        without_task, _ = closed.policy.blocks[0].attention(latent, adapter, task[:, :0], rotary)
        assert (with_task - without_task).abs().max() > DIFFERENT


class TestBatches:
    @pytest.mark.parametrize("side", ["left", "right"])
    def test_rows_of_unequal_prompts_get_the_actions_they_get_alone(self, published, processor, observation, side):
        texts = ["open the drawer", observation["text"], "pick up the cream cheese"]
        alone = [published.predict_action(**processor(**{**observation, "text": text})) for text in texts]
        state = np.stack([observation["state"]] * 3)
        inputs = processor(images=[observation["images"]] * 3, text=texts, state=state, padding_side=side)
        assert not inputs["attention_mask"].all(), "nothing was padded"
        # Random weights amplify rounding, which differs between batch sizes; see test_goldens.
        np.testing.assert_allclose(published.predict_action(**inputs), np.concatenate(alone), rtol=0, atol=3e-4)

    @settings(max_examples=20, deadline=None)
    @given(
        lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4),
        sides=st.lists(st.sampled_from(["left", "right"]), min_size=4, max_size=4),
        pad=st.integers(0, 1023),
        extra=st.integers(0, 3),
    )
    def test_padding_of_any_length_side_and_token_changes_nothing(self, pro_tiny_model, lengths, sides, pad, extra):
        model, inputs = pro_tiny_model, tiny_inputs(pro_tiny_model.config, batch_size=len(lengths))
        width = max(lengths) + extra
        input_ids = torch.full((len(lengths), width), pad)
        attention_mask = torch.zeros_like(input_ids)
        for row, (length, side) in enumerate(zip(lengths, sides, strict=False)):
            columns = slice(0, length) if side == "right" else slice(width - length, width)
            input_ids[row, columns] = inputs["input_ids"][row, :length]
            attention_mask[row, columns] = 1
        together = actions_of(model, {**inputs, "input_ids": input_ids, "attention_mask": attention_mask})
        for row, length in enumerate(lengths):
            alone = {name: value[row : row + 1] for name, value in inputs.items()}
            alone |= {"input_ids": alone["input_ids"][:, :length], "attention_mask": None}
            torch.testing.assert_close(together[row : row + 1], actions_of(model, alone), rtol=0, atol=SAME)

    def test_the_order_of_a_batch_does_not_matter(self, model):
        inputs = tiny_inputs(model.config, batch_size=4)
        order = torch.tensor([2, 0, 3, 1])
        shuffled = {name: value[order] for name, value in inputs.items()}
        torch.testing.assert_close(actions_of(model, shuffled), actions_of(model, inputs)[order], rtol=0, atol=SAME)

    def test_a_boolean_mask_is_as_good_as_ones_and_zeros(self, model, inputs):
        mask = torch.tensor([[0, 0] + [1] * 7, [1] * 9])
        numbers, booleans = ({**inputs, "attention_mask": m} for m in (mask, mask.bool()))
        assert torch.equal(actions_of(model, numbers), actions_of(model, booleans))


class TestForwardRefuses:
    """`forward` works in normalised space; every message names the field."""

    def test_a_raw_state(self, model, inputs):
        with pytest.raises(TypeError, match="state.*predict_action"):
            model(**inputs, state=inputs["proprio"])

    @pytest.mark.parametrize("field", ["pixel_values", "proprio"])
    def test_a_missing_input(self, model, inputs, field):
        with pytest.raises(ValueError, match=f"{field} is missing"):
            model(**{**inputs, field: None})

    @pytest.mark.parametrize(
        ("field", "shape"),
        [
            ("input_ids", (9,)),
            ("attention_mask", (2, 8)),
            ("pixel_values", (2, 6, 28, 28)),
            ("pixel_values", (2, 2, 6, 28, 28)),
            ("pixel_values", (2, 12, 28, 14)),
            ("pixel_values", (3, 12, 28, 28)),
            ("proprio", (2, 7)),
            ("proprio", (8,)),
            ("actions", (2, 4, 6)),
            ("actions", (2, 5, 7)),
            ("action_is_pad", (2, 5)),
        ],
    )
    def test_a_wrong_shape(self, model, inputs, field, shape):
        wrong = torch.zeros(shape, dtype=torch.long if field in ("input_ids", "attention_mask") else torch.float32)
        with pytest.raises(ValueError, match=field):
            model(**{**inputs, field: wrong})


def test_actions_that_are_not_finite_are_refused(model):
    """Broken weights, or an overflow in float16, must not reach a robot."""
    inputs = physical(tiny_inputs(model.config))
    with torch.no_grad():
        kept = model.policy.fc_out.bias.clone()
        model.policy.fc_out.bias[1] = float("nan")
        try:
            with pytest.raises(ValueError, match=r"actions that are not finite in torch.float32"):
                model.predict_action(**inputs)
        finally:
            model.policy.fc_out.bias.copy_(kept)


class TestPredictAction:
    @pytest.mark.parametrize("batch_size", [1, 3])
    def test_the_result_is_always_batch_chunk_action(self, model, batch_size):
        actions = model.predict_action(**physical(tiny_inputs(model.config, batch_size)))
        assert isinstance(actions, np.ndarray) and actions.dtype == np.float64
        assert actions.shape == (batch_size, 4, 7)

    def test_it_normalises_the_state_and_unnormalises_the_actions(self, model, inputs):
        stats = norm_stats()[UNNORM_KEY]
        low, high = (np.array(stats["proprio"][name]) for name in ("q01", "q99"))
        state = (inputs["proprio"].double().numpy() + 1) / 2 * (high - low) + low
        normalized = actions_of(model, inputs).double().numpy()
        low, high = (np.array(stats["action"][name]) for name in ("q01", "q99"))
        expected = (normalized + 1) / 2 * (high - low) + low
        expected[..., 6] = normalized[..., 6]  # the gripper is masked
        np.testing.assert_allclose(model.predict_action(**physical(inputs, state=state)), expected, rtol=0, atol=1e-5)

    def test_a_single_state_may_come_without_a_batch_axis(self, model):
        inputs = physical(tiny_inputs(model.config, batch_size=1))
        flat = model.predict_action(**{**inputs, "state": inputs["state"][0].tolist()})
        np.testing.assert_array_equal(flat, model.predict_action(**inputs))

    def test_numpy_inputs_are_as_good_as_tensors(self, model, inputs):
        inputs = physical(inputs)
        arrays = {name: np.asarray(value) for name, value in inputs.items()}
        np.testing.assert_array_equal(model.predict_action(**arrays), model.predict_action(**inputs))

    def test_inputs_are_moved_to_the_models_precision(self, inputs):
        model = tiny_model().to(torch.bfloat16)
        assert np.isfinite(model.predict_action(**physical(tiny_inputs(model.config)))).all()

    def test_the_state_is_not_rounded_with_the_other_inputs(self, processor, pro_model, observation):
        # 1 / 3 in bfloat16 is 0.334; the difference, through narrow statistics, would be seen.
        inputs = processor(**{**observation, "state": np.full(8, 1 / 3)}).to(torch.bfloat16)
        assert inputs["pixel_values"].dtype == torch.bfloat16
        assert inputs["state"].dtype == np.float64 and inputs["state"][0, 0] == 1 / 3

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_a_state_that_has_already_lost_digits_is_refused(self, model, inputs, dtype):
        with pytest.raises(ValueError, match="state is torch.*lost digits"):
            model.predict_action(**physical(inputs, state=inputs["proprio"].to(dtype)))

    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    def test_a_state_that_is_not_finite_is_refused(self, model, inputs, bad):
        state = inputs["proprio"].double().numpy()
        state[1, 3] = bad
        with pytest.raises(ValueError, match="state holds values that are not finite"):
            model.predict_action(**physical(inputs, state=state))

    @pytest.mark.parametrize("shape", [(2, 7), (8,), (1, 8), (2, 1), (2, 8, 1)])
    def test_a_state_of_the_wrong_shape_is_refused(self, model, inputs, shape):
        with pytest.raises(ValueError, match=r"state must have shape \(2, 8\)"):
            model.predict_action(**physical(inputs, state=np.zeros(shape)))

    def test_a_missing_state_is_refused(self, model, inputs):
        with pytest.raises(ValueError, match="state is missing"):
            model.predict_action(**physical(inputs, state=None))

    def test_a_row_of_padding_only_is_refused(self, model, inputs):
        mask = torch.tensor([[1] * 9, [0] * 9])
        with pytest.raises(ValueError, match="attention_mask"):
            model.predict_action(**physical(inputs, attention_mask=mask))

    @pytest.mark.parametrize("pixel_value", [np.nan, np.inf])
    def test_images_that_are_not_finite_are_refused(self, model, inputs, pixel_value):
        pixel_values = inputs["pixel_values"].clone()
        pixel_values[0, 0, 0, 0] = pixel_value
        with pytest.raises(ValueError, match="pixel_values"):
            model.predict_action(**physical(inputs, pixel_values=pixel_values))

    def test_the_short_key_finds_the_statistics(self, model, inputs):
        named = model.predict_action(**physical(inputs), unnorm_key="libero_object")
        np.testing.assert_array_equal(named, model.predict_action(**physical(inputs)))

    def test_the_key_decides_between_several_statistics(self, inputs):
        other = norm_stats(key="other")
        other["other"]["action"]["q99"] = [9.0] * 7
        model = tiny_model(norm_stats={**norm_stats(), **other})
        with pytest.raises(ValueError, match="unnorm_key"):
            model.predict_action(**physical(inputs))
        first, second = (model.predict_action(**physical(inputs), unnorm_key=key) for key in (UNNORM_KEY, "other"))
        assert np.abs(first - second)[..., :6].min() > DIFFERENT
        np.testing.assert_array_equal(first[..., 6], second[..., 6])

    def test_an_unknown_key_is_refused(self, model, inputs):
        with pytest.raises(ValueError, match="unnorm_key='calvin'.*libero_object_no_noops"):
            model.predict_action(**physical(inputs), unnorm_key="calvin")

    def test_a_model_without_statistics_says_so(self, inputs):
        with pytest.raises(ValueError, match="no norm_stats"):
            tiny_model(norm_stats=None).predict_action(**physical(inputs))

    def test_a_model_in_training_mode_adds_no_noise_and_stays_in_training_mode(self, inputs):
        model = tiny_model()
        expected = model.predict_action(**physical(inputs))
        model.train()
        np.testing.assert_array_equal(model.predict_action(**physical(inputs)), expected)
        assert model.training and model.policy.training

    def test_parts_that_were_in_evaluation_mode_stay_there(self, inputs):
        # As in training with frozen towers.
        model = tiny_model().train()
        model.dinov2.eval()
        model.predict_action(**physical(inputs))
        assert model.policy.training and not model.dinov2.training

    def test_the_mode_is_restored_after_an_error(self, inputs):
        model = tiny_model().train()
        model.vision_projector.eval()
        model.policy.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model.predict_action(**physical(inputs))
        assert model.training and model.policy.training and not model.vision_projector.training

    def test_it_leaves_no_gradients(self, model, inputs):
        model.predict_action(**physical(inputs))
        assert all(parameter.grad is None for parameter in model.parameters())


class TestOutput:
    def test_shapes(self, model, inputs):
        output = model(**inputs, output_hidden_states=True)
        sequence = 9 + 2 * 4 + 6  # prompt, patches of two cameras, queries
        assert output.loss is None and output.actions.shape == (2, 4, 7)
        assert [tuple(states.shape) for states in output.hidden_states] == [(2, sequence, 32)] * 3
        assert [tuple(states.shape) for states in output.policy_hidden_states] == [(2, 4, 32)] * 3

    def test_attentions_are_weights(self, model, inputs):
        model = tiny_model(policy_variant=model.config.policy_variant)
        model.set_attn_implementation("eager")
        output = model(**inputs, output_attentions=True)
        sources = 4 + (6 + 1) + 8  # the latent, action states and the proprio token, task states
        assert [tuple(attention.shape) for attention in output.policy_attentions] == [(2, 4, 4, sources)] * 2
        assert [tuple(attention.shape) for attention in output.attentions] == [(2, 4, 23, 23)] * 2
        torch.testing.assert_close(output.policy_attentions[0].sum(-1), torch.ones(2, 4, 4))

    def test_without_asking_there_are_only_actions(self, model, inputs):
        assert list(model(**inputs).keys()) == ["actions"]

    def test_as_a_tuple(self, model, inputs):
        (actions,) = model(**inputs, return_dict=False)
        torch.testing.assert_close(actions, actions_of(model, inputs))

    def test_predict_action_does_not_mind_a_model_that_returns_tuples(self, inputs):
        model = tiny_model()
        expected = model.predict_action(**physical(inputs))
        model.config.return_dict = False
        np.testing.assert_array_equal(model.predict_action(**physical(inputs)), expected)


def test_the_split_point_moves_states_between_the_two_sources():
    # At 512 with one camera the action part is empty and everything counts as task states.
    inputs = tiny_inputs(tiny_config(cameras=["image"]))
    seen = {}
    for split in (None, 2, 512):
        model = tiny_model(cameras=["image"], policy_task_tokens=split)
        blocks = model.policy.blocks
        blocks[0].register_forward_pre_hook(
            lambda _, arguments, split=split: seen.update({split: (arguments[2].shape[1], arguments[1].shape[1])})
        )
        model(**inputs)
    assert seen == {None: (4, 6 + 1), 2: (2, 8 + 1), 512: (10, 0 + 1)}


@pytest.mark.parametrize("name", ["action", "labels", "propio"])
def test_an_argument_that_forward_does_not_know_is_refused(name):
    model = tiny_model()
    with pytest.raises(TypeError, match=f"forward has no argument {name}"):
        model(**tiny_inputs(model.config), **{name: torch.zeros(2, 4, 7)})


def test_forgetting_the_two_stars_is_answered_with_the_right_call(pro_model, processor, observation):
    with pytest.raises(TypeError, match=r"predict_action\(\*\*inputs\)"):
        pro_model.predict_action(processor(**observation))


def test_a_list_of_keys_is_refused(pro_model, processor, observation):
    with pytest.raises(TypeError, match="unnorm_key must be one key"):
        pro_model.predict_action(**processor(**observation), unnorm_key=["libero_object_no_noops"])


def test_the_processors_state_given_as_proprio_is_refused(pro_model, processor, observation):
    inputs = processor(**observation)
    state = inputs.pop("state")
    with pytest.raises(TypeError, match="proprio must be a torch tensor, got ndarray"):
        pro_model(**inputs, proprio=state)
