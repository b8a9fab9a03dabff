"""Where objects stand, and LIBERO's axis-angle; no simulator needed."""

import numpy as np
import pytest

from vla_adapter_hf.simulation.libero.suite import LiberoSuite, object_instruction, quaternion_to_axis_angle
from vla_adapter_hf.simulation.placement import Footprint, draw_placement, gap, placement_generator


# The six places of libero_object's scenes, as in its task files, and boxes about as large as its objects.
PLACES = np.array([[-0.12, -0.24], [0.05, -0.10], [0.10, -0.20], [-0.15, 0.06], [0.15, 0.03], [-0.20, -0.08]])
HALVES = np.array([[0.032, 0.032], [0.018, 0.027], [0.040, 0.022], [0.027, 0.027], [0.032, 0.031], [0.038, 0.020]])
TOPS = np.array([0.076, 0.146, 0.018, 0.131, 0.076, 0.017])
BASKET = Footprint(np.array([0.01, 0.26]), np.array([0.08, 0.085]))


def draw(placement: str, episode: int = 0, **options):
    generator = placement_generator("evaluation", 0, 3, episode)
    return draw_placement(placement, PLACES, HALVES, TOPS, [BASKET], generator, **options)


def footprints(centres: np.ndarray) -> list[Footprint]:
    return [Footprint(centre, half) for centre, half in zip(centres, HALVES, strict=True)]


def test_official_placement_moves_nothing():
    centres, places = draw("official")
    np.testing.assert_array_equal(centres, PLACES)
    np.testing.assert_array_equal(places, np.arange(6))


@pytest.mark.parametrize("placement", ["jitter", "shuffle", "both"])
def test_no_two_objects_come_closer_than_the_clearance_and_none_to_the_basket(placement):
    for episode in range(50):
        placed = footprints(draw(placement, episode)[0])
        pairs = [gap(one, other) for i, one in enumerate(placed) for other in placed[i + 1 :]]
        assert min(pairs) >= 0.02 - 1e-12
        assert min(gap(one, BASKET) for one in placed) >= 0.02 - 1e-12


def test_jitter_stays_within_five_centimetres_and_uses_them():
    shifts = np.concatenate([draw("jitter", episode)[0] - PLACES for episode in range(200)])
    assert np.abs(shifts).max() <= 0.05
    assert np.quantile(np.abs(shifts), 0.9) > 0.03


def test_shuffle_permutes_the_places_and_always_moves_the_target():
    taken = []
    for episode in range(200):
        centres, places = draw("shuffle", episode)
        np.testing.assert_array_equal(centres, PLACES[places])
        assert sorted(places) == list(range(6))
        taken.append(places[0])
    assert set(taken) == {1, 2, 3, 4, 5}


def test_both_moves_objects_to_other_places_and_jitters_them():
    centres, places = draw("both")
    assert places[0] != 0
    shifts = centres - PLACES[places]
    assert 0 < np.abs(shifts).max() <= 0.05


def test_jittered_objects_stay_within_reach():
    disc = Footprint(np.array([-0.6, 0.0]), np.array([0.7, 0.7]))
    for episode in range(50):
        centres, places = draw("both", episode, reachable=disc)
        distances = np.hypot(*(centres - disc.centre).T)
        allowed = np.maximum(0.7, np.hypot(*(PLACES[places] - disc.centre).T))
        assert np.all(distances <= allowed + 1e-12)


def test_the_same_seed_draws_the_same_and_another_episode_or_stream_does_not():
    def numbers(*key):
        return placement_generator(*key).random(4)

    np.testing.assert_array_equal(numbers("evaluation", 0, 1, 2), numbers("evaluation", 0, 1, 2))
    for other in [
        ("demonstration", 0, 1, 2),
        ("evaluation", 1, 1, 2),
        ("evaluation", 0, 2, 1),
        ("evaluation", 0, 1, 3),
    ]:
        assert not np.array_equal(numbers("evaluation", 0, 1, 2), numbers(*other))


def test_a_crowded_table_is_an_error_and_not_an_endless_search():
    with pytest.raises(ValueError, match="no collision-free 'jitter' placement of 6 objects"):
        draw("jitter", clearance=0.5)


def test_gap_is_the_free_distance_between_rectangles():
    unit = np.array([0.5, 0.5])
    here = Footprint(np.zeros(2), unit)
    assert gap(here, Footprint(np.array([1.0, 0.0]), unit)) == 0.0
    assert gap(here, Footprint(np.array([4.0, 5.0]), unit)) == pytest.approx(5.0)


def test_axis_angle_keeps_the_sign_of_w_so_that_its_norm_passes_pi():
    angle = 3.3
    quaternion = np.array([np.sin(angle / 2), 0.0, 0.0, np.cos(angle / 2)])
    assert quaternion[3] < 0
    np.testing.assert_allclose(quaternion_to_axis_angle(quaternion), [angle, 0, 0], atol=1e-12)


@pytest.mark.parametrize("w", [1.0, -1.0, 1.0 + 1e-9])
def test_axis_angle_of_no_rotation_is_zero(w):
    np.testing.assert_array_equal(quaternion_to_axis_angle(np.array([0.0, 0.0, 0.0, w])), np.zeros(3))


def test_axis_angle_agrees_with_a_rotation_matrix_below_pi():
    axis, angle = np.array([1.0, 2.0, -2.0]) / 3.0, 1.1
    quaternion = np.append(axis * np.sin(angle / 2), np.cos(angle / 2))
    np.testing.assert_allclose(quaternion_to_axis_angle(quaternion), axis * angle, rtol=1e-12)


def test_axis_angle_wants_four_numbers():
    with pytest.raises(ValueError, match=r"shape \(4,\)"):
        quaternion_to_axis_angle(np.zeros(3))


def test_instruction_of_an_object_is_the_suites_wording():
    assert object_instruction("cream_cheese_1") == "pick up the cream cheese and place it in the basket"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "libero_kitchen"}, "suite must be one of libero_spatial"),
        ({"name": "libero_object", "placement": "random"}, "placement must be one of official"),
        ({"name": "libero_90", "placement": "jitter"}, "libero_90 only has 'official'"),
        ({"name": "libero_object", "states": (50,)}, "states must name initial states 0...49"),
    ],
)
def test_a_suite_that_cannot_be_is_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        LiberoSuite(**arguments)
