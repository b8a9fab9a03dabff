"""How new weights start: the policy from PyTorch's own initialisation, in whichever way the model comes to be."""

import pytest
import torch
from model_fixtures import tiny_config
from torch import nn

from vla_adapter_hf import VLAAdapterForActionPrediction


def constructed(config):
    return VLAAdapterForActionPrediction(config)


def loaded_without_weights(config):
    return VLAAdapterForActionPrediction.from_pretrained(None, config=config, state_dict={}, strict=False)


@pytest.fixture(params=[constructed, loaded_without_weights], ids=lambda make: make.__name__)
def new_model(request):
    torch.manual_seed(0)
    return request.param(tiny_config())


def test_linear_layers_of_the_policy_are_uniform_within_one_over_the_root_of_their_width(new_model):
    parts = [*new_model.policy.named_modules(), *new_model.proprio_projector.named_modules()]
    linears = [(name, module) for name, module in parts if isinstance(module, nn.Linear)]
    assert linears
    for name, linear in linears:
        bound = linear.in_features**-0.5
        for parameter in linear.parameters():
            assert parameter.abs().max() <= bound, name
        # The largest of n draws falls short of the bound by about one part in n.
        assert linear.weight.abs().max() > 0.8 * bound, name


def test_the_gates_start_closed(new_model):
    assert all(block.attention.gating_factor.item() == 0 for block in new_model.policy.blocks)


def test_action_queries_and_vision_projector_start_small(new_model):
    for weight in (new_model.action_queries.weight, new_model.vision_projector.fc2.weight):
        assert weight.std().item() == pytest.approx(new_model.config.initializer_range, rel=0.2)
