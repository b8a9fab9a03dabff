"""Physical units to normalised space and back, by the published formulas."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from model_fixtures import FIXTURES, norm_stats

from vla_adapter_hf.modeling.normalization_vla_adapter import normalize, select_norm_stats, unnormalize


NORM_TYPES = ("bounds_q99", "bounds", "normal")
# Three dimensions: one that moves, one that does not, and one that the mask leaves alone.
STATS = {
    "min": [-2.0, 0.5, 0.0],
    "max": [3.0, 0.5, 1.0],
    "mean": [0.5, 0.5, 0.4],
    "std": [0.25, 0.0, 0.5],
    "q01": [-1.0, 0.5, 0.0],
    "q99": [1.5, 0.5, 1.0],
    "mask": [True, True, False],
}


@st.composite
def stats_and_values(draw, inside_bounds: bool):
    """Statistics of up to nine dimensions, some of them constant or masked, and values of those dimensions."""
    dims = draw(st.integers(1, 9))
    numbers = st.floats(-100, 100)
    low = draw(arrays(np.float64, dims, elements=numbers))
    widths = draw(arrays(np.float64, dims, elements=st.one_of(st.just(0.0), st.floats(1e-3, 100))))
    margins = np.where(widths == 0, 0, draw(arrays(np.float64, dims, elements=st.floats(0, 10))))
    stats = {"q01": low, "q99": low + widths, "min": low - margins, "max": low + widths + margins}
    stats |= {"mean": low + widths / 2, "std": widths / 4}
    stats = {name: values.tolist() for name, values in stats.items()}
    stats["mask"] = draw(st.lists(st.booleans(), min_size=dims, max_size=dims))
    rows = draw(st.integers(0, 4))
    shares = draw(arrays(np.float64, (rows, dims), elements=st.floats(0, 1)))
    reach = 1 if inside_bounds else 3
    return stats, low + widths * (0.5 + (shares - 0.5) * reach)


class TestPublishedFormulas:
    """Literal numbers, worked out by hand from spec and statistics; the published 1e-8 is below their precision."""

    @pytest.mark.parametrize(
        ("norm_type", "state", "normalized"),
        [
            # 2 (x - low) / (high - low) - 1 with low -1 and high 1.5
            ("bounds_q99", 0.875, 0.5),
            # with low -2 and high 3
            ("bounds", 0.875, 0.15),
            # (x - 0.5) / 0.25
            ("normal", 0.875, 1.5),
        ],
    )
    def test_a_dimension_that_moves(self, norm_type, state, normalized):
        values = [state, 0.5, 0.7]
        assert normalize(values, STATS, norm_type)[0] == pytest.approx(normalized, abs=1e-7)
        assert unnormalize([normalized, 0.0, 0.7], STATS, norm_type)[0] == pytest.approx(state, abs=1e-7)

    def test_the_small_number_is_in_both_directions(self):
        # Low and high as close as the small number itself: without it the result would be 1.
        stats = {"q01": [0.0], "q99": [1e-8], "min": [0.0], "max": [1.0]}
        assert normalize([1e-8], stats)[0] == pytest.approx(0.0)
        assert unnormalize([1.0], stats)[0] == pytest.approx(2e-8)

    def test_a_constant_proprio_is_minus_one_by_the_published_rule(self):
        assert normalize([0.0, 0.5, 0.0], STATS, constant_dims="published")[1] == -1

    def test_a_constant_action_is_nearly_its_constant_by_the_published_rule(self):
        assert unnormalize([0.0, 0.9, 0.0], STATS, constant_dims="published")[1] == pytest.approx(0.5, abs=1e-7)

    def test_the_libero_state_of_the_goldens(self, pro_model, observation):
        stats = pro_model.config.norm_stats["libero_object_no_noops"]["proprio"]
        with np.load(FIXTURES / "goldens.npz") as goldens:
            np.testing.assert_allclose(
                normalize(observation["state"], stats, constant_dims="published"),
                goldens["proprio"],
                rtol=0,
                atol=1e-12,
            )


@pytest.mark.parametrize("norm_type", NORM_TYPES)
@given(drawn=stats_and_values(inside_bounds=True))
def test_unnormalising_undoes_normalising(norm_type, drawn):
    stats, values = drawn
    there = normalize(values, stats, norm_type)
    np.testing.assert_allclose(unnormalize(there, stats, norm_type), values, rtol=0, atol=1e-7)


@pytest.mark.parametrize("norm_type", NORM_TYPES)
@given(drawn=stats_and_values(inside_bounds=False))
def test_masked_dimensions_are_left_alone(norm_type, drawn):
    stats, values = drawn
    masked = ~np.array(stats["mask"])
    np.testing.assert_array_equal(normalize(values, stats, norm_type)[:, masked], values[:, masked])
    np.testing.assert_array_equal(unnormalize(values, stats, norm_type)[:, masked], values[:, masked])


@pytest.mark.parametrize("norm_type", NORM_TYPES)
@given(drawn=stats_and_values(inside_bounds=False))
def test_a_constant_dimension_is_zero_inside_and_its_constant_outside(norm_type, drawn):
    stats, values = drawn
    constant = (np.array(stats["min"]) == np.array(stats["max"])) & np.array(stats["mask"])
    assert not normalize(values, stats, norm_type)[:, constant].any()
    outside = unnormalize(values, stats, norm_type)[:, constant]
    np.testing.assert_array_equal(outside, np.broadcast_to(np.array(stats["min"])[constant], outside.shape))


@pytest.mark.parametrize("norm_type", ["bounds_q99", "bounds"])
@pytest.mark.parametrize("constant_dims", ["zero", "published"])
@given(drawn=stats_and_values(inside_bounds=False))
def test_bounds_clip_what_goes_in(norm_type, constant_dims, drawn):
    stats, values = drawn
    normalized = normalize(values, stats, norm_type, constant_dims)[:, np.array(stats["mask"])]
    assert (np.abs(normalized) <= 1).all()


@pytest.mark.parametrize("norm_type", NORM_TYPES)
@given(drawn=stats_and_values(inside_bounds=False))
def test_any_shape_is_normalised_along_its_last_axis(norm_type, drawn):
    stats, values = drawn
    stacked = normalize(np.stack([values, values]), stats, norm_type)
    np.testing.assert_array_equal(stacked[1], normalize(values, stats, norm_type))


def test_predictions_are_not_clipped():
    # Low -1 and high 1.5: a prediction of 3 is one and a half widths beyond the middle.
    assert unnormalize([3.0, 0.0, 0.0], STATS)[0] == pytest.approx(0.25 + 3 * 1.25)


def test_the_normal_type_does_not_clip():
    assert normalize([100.0, 0.5, 0.0], STATS, "normal")[0] == pytest.approx(398.0, rel=1e-6)


def test_without_a_mask_every_dimension_is_normalised():
    stats = {name: values for name, values in STATS.items() if name != "mask"}
    assert normalize([0.0, 0.5, 1.0], stats)[2] == pytest.approx(1.0)


def test_the_result_is_float64_whatever_came_in():
    assert normalize(np.zeros(3, np.float32), STATS).dtype == np.float64
    assert unnormalize(np.zeros(3, np.float16), STATS).dtype == np.float64


def test_what_came_in_is_not_written_to():
    values = np.array([9.0, 9.0, 9.0])
    normalize(values, STATS)
    unnormalize(values, STATS)
    assert values.tolist() == [9.0, 9.0, 9.0]


@pytest.mark.parametrize("convert", [normalize, unnormalize])
@pytest.mark.parametrize("shape", [(2,), (3, 1), (), (3, 4)])
def test_values_of_another_size_are_refused(convert, shape):
    with pytest.raises(ValueError, match="3 dimensions"):
        convert(np.zeros(shape), STATS)


class TestSelection:
    def test_the_only_set_needs_no_key(self):
        assert select_norm_stats(norm_stats(), None)[0] == "libero_object_no_noops"

    def test_the_short_name_finds_the_one_without_noops(self):
        assert select_norm_stats(norm_stats(), "libero_object")[0] == "libero_object_no_noops"

    def test_the_exact_name_wins_over_the_one_without_noops(self):
        stats = {**norm_stats(key="libero_object"), **norm_stats()}
        assert select_norm_stats(stats, "libero_object")[0] == "libero_object"

    def test_several_sets_need_a_key_and_the_message_lists_them(self):
        stats = {**norm_stats(), **norm_stats(key="calvin_abc_rlds")}
        with pytest.raises(ValueError, match="unnorm_key.*calvin_abc_rlds, libero_object_no_noops"):
            select_norm_stats(stats, None)

    def test_an_unknown_key_is_refused_and_the_message_lists_what_there_is(self):
        with pytest.raises(ValueError, match="unnorm_key='bridge'.*libero_object_no_noops"):
            select_norm_stats(norm_stats(), "bridge")

    @pytest.mark.parametrize("nothing", [None, {}])
    def test_without_statistics_it_says_what_to_do(self, nothing):
        with pytest.raises(ValueError, match=r"no norm_stats.*norm_stats=\{...\}"):
            select_norm_stats(nothing, None)
