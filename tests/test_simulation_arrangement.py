"""Jittered and swapped scenes of the suites with fixtures, and what else can be asked for in them."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from simulator import need_simulator

from vla_adapter_hf.simulation.evaluate import evaluate
from vla_adapter_hf.simulation.libero.arrangement import AMPLITUDE, CLEARANCE, Scene, Surface, draw_arrangement
from vla_adapter_hf.simulation.libero.checks import check_scenes
from vla_adapter_hf.simulation.libero.suite import REACH, LiberoSuite
from vla_adapter_hf.simulation.libero.task_files import Thing, pairs_to_swap, read_things
from vla_adapter_hf.simulation.placement import Footprint, gap, placement_generator
from vla_adapter_hf.simulation.settings import EvaluationSettings


MILK = "pick up the milk and place it in the basket"
RESULTS = Path(__file__).parents[1] / "examples" / "libero_object" / "results" / "pro"


def footprint(x: float, y: float, half: float = 0.04) -> Footprint:
    return Footprint(np.array([x, y]), np.array([half, half]))


# A bowl between the plate and the ramekin, another next to the ramekin, one on the stove; nothing refers to the box.
FOOTPRINTS = {
    "plate_1": footprint(0.05, 0.2, 0.06),
    "ramekin_1": footprint(-0.2, 0.2),
    "bowl_1": footprint(-0.075, 0.2),
    "bowl_2": footprint(-0.18, 0.32),
    "bowl_3": footprint(-0.3, -0.2),
    "box_1": footprint(0.05, 0.0, 0.03),
}
SCENE = Scene(
    things=[
        Thing("plate_1", "plate", matters=True),
        Thing("ramekin_1", "ramekin"),
        Thing("bowl_1", "bowl", anchors=("plate_1", "ramekin_1"), has_twin=True, matters=True),
        Thing("bowl_2", "bowl", anchors=("ramekin_1",), has_twin=True),
        Thing("bowl_3", "bowl", surface="stove_1_cook_region", has_twin=True),
        Thing("box_1", "box"),
    ],
    footprints=FOOTPRINTS,
    fixtures={"stove_1": footprint(-0.3, -0.2, 0.1)},
    surfaces={"stove_1_cook_region": Surface(np.array([-0.3, -0.2]), np.eye(2), np.array([0.07, 0.07]))},
    reach=Footprint(np.array([-0.66, 0.0]), np.array([REACH, REACH])),
)


def draw(placement: str, episode: int, scene: Scene = SCENE):
    arrangement = draw_arrangement(placement, scene, placement_generator("evaluation", 0, 0, episode))
    centres = {name: old.centre + arrangement.shifts[name] for name, old in scene.footprints.items()}
    return arrangement, {name: Footprint(centre, FOOTPRINTS[name].half) for name, centre in centres.items()}


@pytest.mark.parametrize("placement", ["jitter", "shuffle", "both"])
def test_nothing_intersects_and_everything_is_within_reach(placement):
    for episode in range(20):
        placed = draw(placement, episode)[1]
        names = list(placed)
        for number, name in enumerate(names):
            for other in names[number + 1 :]:
                allowed = min(CLEARANCE, gap(FOOTPRINTS[name], FOOTPRINTS[other]))
                assert gap(placed[name], placed[other]) >= allowed - 1e-6
            distance = np.hypot(*(placed[name].centre - SCENE.reach.centre))
            assert distance <= max(REACH, np.hypot(*(FOOTPRINTS[name].centre - SCENE.reach.centre))) + 1e-6
            if name != "bowl_3":
                assert gap(placed[name], SCENE.fixtures["stove_1"]) >= CLEARANCE - 1e-6


def test_jitter_moves_every_object_by_up_to_its_amplitude_and_keeps_the_one_on_the_stove_there():
    shifts = [draw("jitter", episode)[0].shifts for episode in range(40)]
    for name in ("plate_1", "ramekin_1", "box_1"):
        moved = np.abs([shift[name] for shift in shifts])
        assert moved.max() <= AMPLITUDE and moved.max() > 0.02
    on_stove = np.abs([shift["bowl_3"] for shift in shifts])
    assert 0.01 < on_stove.max() <= 0.03 + 1e-6  # the region ends 7 cm from its centre, the bowl 4 cm


@pytest.mark.parametrize("placement", ["jitter", "shuffle", "both"])
def test_what_an_instruction_says_of_a_place_stays_true(placement):
    for episode in range(20):
        arrangement, placed = draw(placement, episode)
        shifts = arrangement.shifts
        # Next to the ramekin, at the same distance.
        before, after = (prints["bowl_2"].centre - prints["ramekin_1"].centre for prints in (FOOTPRINTS, placed))
        assert np.hypot(*after) == pytest.approx(np.hypot(*before))
        if placement == "jitter":
            np.testing.assert_allclose(after, before)
        np.testing.assert_allclose(shifts["bowl_1"], (shifts["plate_1"] + shifts["ramekin_1"]) / 2)


def test_shuffle_swaps_two_objects_one_of_which_matters():
    swapped = set()
    for episode in range(40):
        arrangement, placed = draw("shuffle", episode)
        one, other = arrangement.swapped
        np.testing.assert_allclose(placed[one].centre, FOOTPRINTS[other].centre)
        np.testing.assert_allclose(placed[other].centre, FOOTPRINTS[one].centre)
        swapped.add(arrangement.swapped)
    assert swapped == {("plate_1", "ramekin_1"), ("plate_1", "box_1")}


def test_twins_and_pinned_objects_are_not_swapped():
    pots = [Thing("pot_1", "pot", has_twin=True, matters=True), Thing("pot_2", "pot", has_twin=True, matters=True)]
    assert pairs_to_swap(pots) == []
    assert pairs_to_swap([*pots, Thing("pan_1", "pan"), Thing("plate_1", "plate", is_pinned=True)]) == []
    with pytest.raises(ValueError, match="no two things that may swap places"):
        draw("shuffle", 0, replace(SCENE, things=SCENE.things[2:5]))


def test_a_pinned_object_is_not_jittered():
    pinned = [replace(thing, is_pinned=thing.name == "box_1") for thing in SCENE.things]
    for episode in range(5):
        assert not draw("both", episode, replace(SCENE, things=pinned))[0].shifts["box_1"].any()


def test_a_table_without_room_is_an_error_and_not_an_endless_search():
    crowded = replace(SCENE, reach=Footprint(np.array([9.0, 9.0]), np.array([0.1, 0.1])))
    with pytest.raises(ValueError, match="no free 'shuffle' placement of 6 things found"):
        draw("shuffle", 0, crowded)


# -- with the simulator's task files ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def simulator():
    need_simulator()


def things_of(suite: str, task: int) -> dict[str, Thing]:
    return {thing.name: thing for thing in read_things(LiberoSuite(suite).task_file(task))}


@pytest.mark.simulator
def test_relations_come_from_the_names_of_regions(simulator):
    ramekin = "glazed_rim_porcelain_ramekin_1"
    between, next_to_ramekin, next_to_cookies, on_cookies, drawer = (
        things_of("libero_spatial", task)["akita_black_bowl_1"] for task in (0, 1, 6, 3, 4)
    )
    assert set(between.anchors) == {"plate_1", ramekin}
    assert next_to_ramekin.anchors == (ramekin,)
    assert next_to_cookies.anchors == on_cookies.anchors == ("cookies_1",)
    assert (drawer.anchors, drawer.surface) == ((), "wooden_cabinet_1_top_region")
    # The pudding's goal is a region of the table to the right of the plate, which must not move away from it.
    assert [thing.name for thing in things_of("libero_10", 6).values() if thing.is_pinned] == ["plate_1"]


@pytest.mark.simulator
def test_every_task_but_that_of_the_two_moka_pots_has_objects_to_swap(simulator):
    lacking = {
        (suite, task)
        for suite in ("libero_spatial", "libero_goal", "libero_10")
        for task in range(10)
        if not pairs_to_swap(list(things_of(suite, task).values()))
    }
    assert lacking == {("libero_10", 8)}


@pytest.mark.simulator
def test_another_instruction_is_one_whose_objects_stand_in_the_scene_as_it_says(simulator):
    spatial, goal, long = (LiberoSuite(name) for name in ("libero_spatial", "libero_goal", "libero_10"))
    # Every scene of libero_spatial has a second bowl, and one instruction of the suite says where it stands.
    for task in range(10):
        ((text, other_goal),) = spatial.other_goals(task).items()
        assert text in spatial.tasks and other_goal == [["on", "akita_black_bowl_2", "plate_1"]]
    assert list(spatial.other_goals(5)) == ["pick up the black bowl on the cookie box and place it on the plate"]
    assert all(len(goal.other_goals(task)) == 9 for task in range(10))
    assert goal.other_goals(0)["turn on the stove"] == [["turnon", "flat_stove_1"]]
    assert [task for task in range(10) if long.other_goals(task)] == [0, 1, 7]


@pytest.mark.simulator
@pytest.mark.parametrize(
    ("suite", "settings", "message"),
    [
        ("libero_10", {"placement": "shuffle"}, r"tasks 8 have none: choose tasks=0,1,2,3,4,5,6,7,9"),
        ("libero_10", {"instruction": "other"}, r"tasks 2, 3, 4, 5, 6, 8, 9 have none: choose tasks=0,1,7"),
        ("libero_10", {"instruction": "other", "tasks": [2]}, "none of the chosen tasks has one"),
        ("libero_10", {"instruction": "put both moka pots on the stove"}, r"tasks .*, 9 have none: choose tasks=8$"),
        ("libero_object", {"instruction": MILK}, r"tasks 3, 6, 8, 9 have none: choose tasks=0,1,2,4,5,7$"),
        ("libero_object", {"episodes": 51}, "of 51 in task 0 of libero_object only 50 are"),
        ("libero_object", {"episodes": 51, "instruction": "other"}, "of 51 in task 0 of libero_object only 50 are"),
        ("libero_10", {"episodes": [2, 52], "tasks": [2, 4]}, "of 2 in task 4 of libero_10 only 1 are"),
        (LiberoSuite("libero_object", states=(3,)), {"episodes": 50}, "Initial states repeat after 1,"),
        ("libero_90", {"placement": "jitter"}, "libero_90 only has 'official'"),
        ("libero_goal_swap", {"instruction": "other"}, "instruction='other' is for libero_spatial"),
    ],
)
def test_a_control_that_a_task_cannot_have_is_refused_before_anything_is_played(
    simulator, tmp_path, suite, settings, message
):
    with pytest.raises(ValueError, match=message):
        evaluate("noop", suite, tmp_path / "run", EvaluationSettings(**{"episodes": 1, "processes": 0, **settings}))
    assert not (tmp_path / "run").exists()


@pytest.mark.simulator
@pytest.mark.parametrize(
    "suite, tasks, episodes, instruction",
    [
        (LiberoSuite("libero_object"), [0], range(50, 100), None),
        (LiberoSuite("libero_object", placement="jitter"), [0], range(100), None),
        (LiberoSuite("libero_object", states=(3, 4)), [0], range(10), "other"),
        (LiberoSuite("libero_goal"), range(10), range(100), "turn on the stove"),
        (LiberoSuite("libero_object"), [1, 7], range(50), MILK),
        (LiberoSuite("libero_object"), range(10), range(50), "grasp something white"),
    ],
)
def test_what_differs_between_episodes_may_be_played(simulator, suite, tasks, episodes, instruction):
    check_scenes(suite, tasks, episodes, instruction)


@pytest.mark.simulator
def test_placements_of_libero_object_are_those_of_the_published_results(simulator):
    lines = [json.loads(line) for line in (RESULTS / "both" / "episodes.jsonl").read_text().splitlines()]
    others = [json.loads(line) for line in (RESULTS / "shuffle_other" / "episodes.jsonl").read_text().splitlines()]
    environment = LiberoSuite("libero_object", placement="both", seed=7, image_size=64).make(0)
    environment.render = False
    try:
        for line in lines[:2]:
            assert environment.reset(line["episode"]) == line["info"]
        environment.suite = replace(environment.suite, placement="shuffle")
        assert environment.reset(others[0]["episode"], instruction=others[0]["instruction"]) == others[0]["info"]
    finally:
        environment.close()


@pytest.fixture(scope="module")
def cookies(simulator):
    """libero_spatial, task 3: the bowl is on the cookie box, a second one on the cabinet."""
    environment = LiberoSuite("libero_spatial", image_size=64).make(3)
    environment.render = False
    yield environment
    environment.close()


@pytest.mark.simulator
@pytest.mark.parametrize("placement", ["jitter", "both"])
def test_a_drawn_scene_stands_still_where_it_was_put_and_keeps_its_relations(cookies, placement):
    cookies.suite = LiberoSuite("libero_spatial", image_size=64)
    cookies.reset(1)
    official = {name: cookies.footprint(name).centre for name in cookies._env.objects_dict}
    cookies.suite = replace(cookies.suite, placement=placement)
    info = cookies.reset(1)
    for name, position in info["positions"].items():
        np.testing.assert_allclose(cookies.footprint(name).centre, position, atol=0.01, err_msg=name)
    moved = {name for name, centre in official.items() if np.abs(centre - info["positions"][name]).max() > 0.002}
    assert len(moved) >= 4
    assert len(info["swapped"]) == (0 if placement == "jitter" else 2)
    bowl, box = (cookies.footprint(name).centre for name in ("akita_black_bowl_1", "cookies_1"))
    np.testing.assert_allclose(bowl - box, official["akita_black_bowl_1"] - official["cookies_1"], atol=0.005)
    assert cookies.holding([["on", "akita_black_bowl_2", "wooden_cabinet_1_top_side"]])
    assert not cookies.holding(cookies._goal)
    assert cookies.reset(1) == info  # whatever ran before


@pytest.mark.simulator
def test_success_of_another_instruction_is_what_it_asks_for(cookies):
    cookies.suite = LiberoSuite("libero_spatial", image_size=64)
    text = "pick up the black bowl on the wooden cabinet and place it on the plate"
    assert cookies.other_instructions == [text]
    for instruction, bowl in ((None, "akita_black_bowl_1"), (text, "akita_black_bowl_2")):
        for moved in ("akita_black_bowl_1", "akita_black_bowl_2"):
            cookies.reset(0, instruction=instruction)
            joint = cookies._env.objects_dict[moved].joints[-1]
            pose = cookies._env.sim.data.get_joint_qpos(joint).copy()
            pose[:3] = cookies.object_position("plate_1") + [0.0, 0.0, 0.03]
            cookies._env.sim.data.set_joint_qpos(joint, pose)
            assert any(cookies.step(np.zeros(7), observe=False) for _ in range(20)) == (moved == bowl)
    with pytest.raises(ValueError, match="instruction must be one that fits this scene"):
        cookies.reset(0, instruction="open the fridge")
