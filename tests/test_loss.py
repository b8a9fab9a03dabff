"""The training loss, its gradients, and the noise that training adds."""

import pytest
import torch
from model_fixtures import tiny_inputs, tiny_model

from vla_adapter_hf.modeling.modeling_vla_adapter import l1_loss


@pytest.fixture(params=["pro", "original"])
def model(request):
    return tiny_model(policy_variant=request.param)


@pytest.fixture
def batch(model):
    """Inputs with true actions, of which the second row's last two steps are padding."""
    inputs = tiny_inputs(model.config)
    inputs["actions"] = torch.rand(2, 4, 7, generator=torch.Generator().manual_seed(1)) * 2 - 1
    inputs["action_is_pad"] = torch.tensor([[False] * 4, [False, False, True, True]])
    return inputs


class TestLoss:
    def test_is_the_mean_absolute_error_over_steps_and_dimensions(self, model, batch):
        del batch["action_is_pad"]
        output = model(**batch)
        torch.testing.assert_close(output.loss, (output.actions - batch["actions"]).abs().mean())

    def test_by_hand(self):
        predicted = torch.tensor([[[1.0, 2.0], [0.0, 0.0]], [[5.0, 5.0], [9.0, 9.0]]])
        actions = torch.tensor([[[0.0, 0.0], [0.0, 0.0]], [[5.0, 4.0], [0.0, 0.0]]])
        padded = torch.tensor([[False, False], [False, True]])
        assert l1_loss(predicted, actions).item() == (1 + 2 + 0 + 0 + 0 + 1 + 9 + 9) / 8
        assert l1_loss(predicted, actions, padded).item() == pytest.approx((1 + 2 + 0 + 0 + 0 + 1) / 6)

    def test_padded_steps_do_not_count(self, model, batch):
        output = model(**batch)
        errors = (output.actions - batch["actions"]).abs()
        torch.testing.assert_close(output.loss, (errors[0].sum() + errors[1, :2].sum()) / (6 * 7))
        batch["actions"][1, 2:] = 1000.0
        torch.testing.assert_close(model(**batch).loss, output.loss)

    def test_a_batch_of_padding_only_has_no_loss_and_no_gradient(self, model, batch):
        batch["action_is_pad"] = torch.ones(2, 4, dtype=torch.bool)
        loss = model(**batch).loss
        loss.backward()
        assert loss.item() == 0
        assert not any(parameter.grad.any() for parameter in model.policy.parameters() if parameter.grad is not None)

    def test_is_float32_in_a_bfloat16_model(self, model, batch):
        model.to(torch.bfloat16)
        batch["pixel_values"] = batch["pixel_values"].to(torch.bfloat16)
        assert model(**batch).loss.dtype == torch.float32

    def test_is_there_only_with_actions(self, model, batch):
        del batch["actions"]
        assert model(**batch).loss is None


class TestGradients:
    @pytest.mark.parametrize("cameras", [["image"], ["image", "wrist_image"]])
    def test_reach_every_trainable_parameter(self, model, batch, cameras):
        # A parameter without a gradient stops distributed training.
        model = tiny_model(policy_variant=model.config.policy_variant, cameras=cameras)
        batch["pixel_values"] = batch["pixel_values"][:, : 6 * len(cameras)]
        model.train()(**batch).loss.backward()
        trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        assert [name for name, parameter in trainable.items() if parameter.grad is None] == []
        untouched = {name for name, parameter in trainable.items() if not parameter.grad.any()}
        # A softmax does not mind one number added to all its scores: the key biases of the towers and the language
        # model get gradients of rounding size, or none. Rotary keys and keys of several sources do mind.
        assert {name for name in untouched if ".k_proj.bias" not in name and ".key.bias" not in name} == set()

    def test_only_the_mask_token_of_masked_pretraining_is_not_trained(self, model):
        frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
        assert frozen == ["dinov2.embeddings.mask_token"]

    def test_a_few_steps_lower_the_loss(self, model, batch):
        model.train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        losses = []
        for _ in range(20):
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[-1] < 0.5 * losses[0]

    def test_a_new_model_can_be_trained_too(self, batch):
        from vla_adapter_hf import VLAAdapterForActionPrediction

        torch.manual_seed(0)
        model = VLAAdapterForActionPrediction(tiny_model().config).train()
        model(**batch).loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


class TestNoise:
    """In training the policy starts from noise instead of zeros: one draw, shared by the batch."""

    def test_comes_from_torchs_generator(self, model, batch):
        model.train()

        def loss(seed):
            torch.manual_seed(seed)
            return model(**batch).loss.item()

        assert loss(0) == loss(0)
        assert loss(0) != loss(1)

    def test_is_shared_by_the_batch(self, model):
        model.train()
        one = tiny_inputs(model.config, batch_size=1)
        same = {name: value.expand(3, *value.shape[1:]) for name, value in one.items()}
        actions = model(**same).actions
        torch.testing.assert_close(actions, actions[:1].expand_as(actions), rtol=0, atol=1e-5)

    def test_differs_between_the_steps_of_a_chunk(self):
        model = tiny_model(policy_variant="original")  # which has no other way to tell them apart
        model.train()
        actions = model(**tiny_inputs(model.config)).actions
        assert actions.std(dim=1).min() > 1e-3

    def test_is_added_before_the_norm_which_makes_it_large(self, model, batch):
        # The norm divides by the noise's own deviation, so ten times the noise makes the same actions.
        def latent(std):
            model.config.policy_noise_std = std
            torch.manual_seed(0)
            return model.train()(**batch, output_hidden_states=True).policy_hidden_states[0]

        torch.testing.assert_close(latent(0.2), latent(2.0), rtol=1e-2, atol=1e-3)

    def test_is_absent_in_evaluation_and_at_a_deviation_of_zero(self, model, batch):
        expected = model.eval()(**batch).loss
        assert torch.equal(model(**batch).loss, expected)
        model.train()
        assert not torch.equal(model(**batch).loss, expected)
        model.config.policy_noise_std = 0.0
        torch.testing.assert_close(model(**batch).loss, expected)
