"""A state in other units than the training data's is reported: once, or as an error."""

import copy

import numpy as np
import pytest
from data_fixtures import DEMOS
from model_fixtures import norm_stats, tiny_config, tiny_inputs, tiny_model

from vla_adapter_hf.data import load_demonstrations
from vla_adapter_hf.modeling.normalization_vla_adapter import find_out_of_range


LOGGER = "vla_adapter_hf.modeling.inference_vla_adapter"


@pytest.fixture
def model():
    return tiny_model()


def inputs(batch_size: int = 1, **values) -> dict:
    arguments = tiny_inputs(tiny_config(), batch_size, 9, 0)
    del arguments["proprio"]
    return {**arguments, "state": np.full((batch_size, 8), 0.1), **values}


def with_millimetres(dimension: int = 2) -> np.ndarray:
    state = np.full((1, 8), 0.1)
    state[0, dimension] = 300.0
    return state


def warnings_of(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == LOGGER]


def test_a_factor_of_1000_is_a_warning_with_dimension_value_and_range(model, caplog):
    model.predict_action(**inputs(state=with_millimetres()))
    (message,) = warnings_of(caplog)
    low, high = (model.config.norm_stats["libero_object_no_noops"]["proprio"][name][2] for name in ("min", "max"))
    assert f"dimension 2 is 300, in training {low:.6g} to {high:.6g}" in message
    assert "libero_object_no_noops" in message and "units" in message


def test_it_is_reported_once_per_dimension(model, caplog):
    for state in (with_millimetres(2), 1.1 * with_millimetres(2), with_millimetres(5), with_millimetres(5)):
        model.predict_action(**inputs(state=state))
    assert ["dimension 2" in message for message in warnings_of(caplog)] == [True, False]
    assert "dimension 5" in warnings_of(caplog)[1]


def test_it_does_not_change_the_actions_and_can_be_ignored(model, caplog):
    warned = model.predict_action(**inputs(state=with_millimetres()))
    caplog.clear()
    ignored = model.predict_action(**inputs(state=with_millimetres()), out_of_range="ignore")
    assert np.array_equal(warned, ignored) and not warnings_of(caplog)
    copy.deepcopy(tiny_model()).predict_action(**inputs(state=with_millimetres()), out_of_range="ignore")
    assert not warnings_of(caplog)


def test_an_option_makes_it_an_error_every_time(model):
    for _ in range(2):
        with pytest.raises(ValueError, match="state is far outside.*dimension 2 is 300, in training"):
            model.predict_action(**inputs(state=with_millimetres()), out_of_range="error")


def test_the_names_of_the_dimensions_are_given(caplog):
    model = tiny_model(state_names=["x", "y", "z", "roll", "pitch", "yaw", "left", "right"])
    model.predict_action(**inputs(state=with_millimetres(2)))
    assert "dimension 2 (z) is 300" in warnings_of(caplog)[0]


def test_one_row_of_a_batch_is_enough(model):
    state = np.concatenate([np.full((2, 8), 0.1), with_millimetres(7)])
    with pytest.raises(ValueError, match="dimension 7 is 300"):
        model.predict_action(**inputs(batch_size=3, state=state), out_of_range="error")


def test_an_unknown_option_is_refused(model):
    with pytest.raises(ValueError, match="out_of_range must be one of warn, error, ignore, got 'raise'"):
        model.predict_action(**inputs(), out_of_range="raise")


@pytest.mark.parametrize("kept", [("min", "max"), ("q01", "q99"), ("mean", "std")])
def test_any_statistics_give_a_range(kept):
    stats = norm_stats()["libero_object_no_noops"]["proprio"]
    stats = {name: stats[name] for name in kept}
    assert [entry[0] for entry in find_out_of_range(with_millimetres(3), stats)] == [3]
    assert not find_out_of_range(np.full((1, 8), 0.1), stats)


def test_metres_in_place_of_millimetres_are_found_where_the_range_is_away_from_0():
    stats = {"min": [900.0], "max": [1400.0]}
    assert find_out_of_range(np.array([[1.2]]), stats) == [(0, 1.2, 900.0, 1400.0)]
    assert not find_out_of_range(np.array([[600.0], [1800.0]]), stats)


def test_metres_are_found_where_the_model_knows_only_large_millimetres():
    stats = {"min": [200.0], "max": [600.0]}
    assert [entry[0] for entry in find_out_of_range(np.array([[0.4]]), stats)] == [0]
    assert not find_out_of_range(np.array([[190.0]]), stats)
    assert not find_out_of_range(np.array([[0.0]]), {"min": [0.01], "max": [0.04]})  # fingers that close


def test_a_rotation_that_jumps_from_pi_to_minus_pi_is_ordinary():
    assert not find_out_of_range(np.array([[-np.pi]]), {"min": [3.0], "max": [np.pi]})


@pytest.mark.parametrize(("scale", "is_reported"), [(1, False), (1000, True)])
def test_held_out_states_are_reported_only_in_another_unit(tmp_path, scale, is_reported):
    dataset = load_demonstrations(DEMOS / "lerobot_v30_image", robot="libero", chunk_size=8, cache_dir=tmp_path)
    for episode in dataset.episode_indices:
        train = dataset.select_episodes([other for other in dataset.episode_indices if other != episode])
        held_out = dataset.select_episodes([episode])
        stats = next(iter(train.norm_stats.values()))["proprio"]
        states = np.stack([held_out[index]["state"] for index in range(0, len(held_out), 20)])
        assert bool(find_out_of_range(scale * states, stats)) is is_reported
