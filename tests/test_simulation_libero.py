"""LIBERO itself: the recorded observation, episodes that do not depend on what ran before, the expert, the recorder."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vla_adapter_hf.simulation.demonstrate import RecordingSettings, demonstrate
from vla_adapter_hf.simulation.evaluate import evaluate
from vla_adapter_hf.simulation.libero import LiberoSuite
from vla_adapter_hf.simulation.libero_install import is_libero_installed
from vla_adapter_hf.simulation.policies import ReplayPolicy
from vla_adapter_hf.simulation.results import read_results


pytestmark = [
    pytest.mark.simulator,
    pytest.mark.skipif(
        not is_libero_installed(), reason="LIBERO is not installed: pip install 'vla-adapter-hf[libero]'"
    ),
]
FIXTURE = Path(__file__).parent / "fixtures" / "libero_spatial_observation.npz"
SOFT = {"hard_reset": False}


def silent(line: str) -> None:
    """No progress."""


@pytest.fixture(scope="module")
def spatial():
    environment = LiberoSuite("libero_spatial").make(0)
    yield environment
    environment.close()


@pytest.fixture(scope="module")
def soup():
    environment = LiberoSuite("libero_object", placement="both", **SOFT).make(0)
    yield environment
    environment.close()


def test_the_recorded_observation_is_reproduced(spatial):
    """State to 5 decimals. The recording is 224 pixels large and went through JPEG: 2.3 levels of 255 remain on average."""
    spatial.reset(0)
    observation = spatial.observe()
    with np.load(FIXTURE) as recorded:
        np.testing.assert_allclose(observation.state, recorded["state"], atol=1e-5)
        assert spatial.instruction == str(recorded["instruction"])
        for image, name in zip(observation.images, ("full_image", "wrist_image"), strict=True):
            assert image.shape == (256, 256, 3)
            small = np.asarray(Image.fromarray(image).resize((224, 224), Image.Resampling.LANCZOS), dtype=float)
            assert np.abs(small - recorded[name]).mean() < 3.0


def test_frames_on_demand_are_the_frames_of_a_camera_that_always_runs(spatial):
    actions = np.random.default_rng(0).uniform(-1, 1, (16, 7))
    spatial.reset(3)
    always = []
    for action in actions:
        spatial.step(action)
        always.append(spatial.observe())
    spatial.reset(3)
    for step, action in enumerate(actions):
        wanted = step % 8 == 7
        spatial.step(action, observe=wanted)
        if wanted:
            observation = spatial.observe()
            np.testing.assert_array_equal(observation.state, always[step].state)
            for image, other in zip(observation.images, always[step].images, strict=True):
                np.testing.assert_array_equal(image, other)
        else:
            with pytest.raises(RuntimeError, match="no frame was rendered"):
                spatial.observe()


def test_an_episode_does_not_depend_on_the_one_before_nor_on_the_kind_of_reset(spatial):
    """libero_spatial has fixtures whose places a reset draws: they must be those of the published loop."""

    def play(environment):
        environment.reset(2)
        for action in np.random.default_rng(1).uniform(-1, 1, (10, 7)):
            environment.step(action)
        return environment.observe(), np.array(environment._env.sim.model.body_pos)

    spatial.reset(0)
    first, bodies = play(spatial)
    again, _ = play(spatial)
    soft = LiberoSuite("libero_spatial", **SOFT).make(0)
    try:
        soft.reset(4)
        softly, soft_bodies = play(soft)
        # The published loop: one seed, then a reset per episode.
        soft._wrapper.seed(0)
        for _ in range(3):
            soft._wrapper.reset()
        published = np.array(soft._env.sim.model.body_pos)
    finally:
        soft.close()
    for other in (again, softly):
        np.testing.assert_array_equal(first.state, other.state)
        np.testing.assert_array_equal(first.images[0], other.images[0])
    np.testing.assert_array_equal(bodies, soft_bodies)
    np.testing.assert_array_equal(bodies, published)


def test_placements_are_set_in_the_simulators_state_and_objects_stand_there(soup):
    info = soup.reset(5)
    assert info["places"][0] != 0
    for name, (x, y) in info["positions"].items():
        lower, upper = soup.object_box(name)
        centre = (lower + upper)[:2] / 2
        np.testing.assert_allclose(centre, [x, y], atol=0.006, err_msg=name)  # objects settle during the no-ops
        assert abs(lower[2]) < 0.005, name


def test_another_target_changes_instruction_and_success(soup):
    other = soup.movable_objects[2]
    soup.reset(1, target=other)
    assert soup.target == other
    assert soup.instruction.startswith("pick up the ") and soup.instruction != soup.official_instruction
    soup.reset(1)
    assert soup.instruction == soup.official_instruction
    with pytest.raises(ValueError, match="target must be one of"):
        soup.reset(1, target="teapot_1")


def test_oracle_solves_replay_repeats_it_and_noop_does_not(tmp_path):
    suite = LiberoSuite("libero_object", image_size=64)
    run = {"tasks": [3], "episodes": 3, "processes": 0, "report": silent}
    oracle = evaluate("oracle", suite, tmp_path / "oracle", save_actions=True, **run)
    replay = ReplayPolicy.from_folder(tmp_path / "oracle" / "actions", "libero")
    replayed = evaluate(replay, suite, tmp_path / "replay", **run)
    noop = evaluate("noop", suite, tmp_path / "noop", **{**run, "episodes": 1})
    assert (oracle["success_rate"], replayed["success_rate"], noop["success_rate"]) == (1.0, 1.0, 0.0)
    steps = [[r.steps for r in read_results(tmp_path / name / "episodes.jsonl")] for name in ("oracle", "replay")]
    assert steps[0] == steps[1]


def test_parallel_processes_give_the_serial_results(tmp_path):
    suite = LiberoSuite("libero_object", placement="shuffle", image_size=64, **SOFT)
    for name, processes in (("serial", 0), ("parallel", 2)):
        evaluate("oracle", suite, tmp_path / name, tasks=[1, 2], episodes=2, processes=processes, report=silent)
    lines = [(tmp_path / name / "episodes.jsonl").read_text() for name in ("serial", "parallel")]
    assert lines[0] == lines[1]


def test_a_named_object_is_what_success_is_about(tmp_path):
    suite = LiberoSuite("libero_object", image_size=64, **SOFT)
    summary = evaluate(
        "oracle", suite, tmp_path, tasks=[7], episodes=1, processes=0, instruction="other", report=silent
    )
    result = read_results(tmp_path / "episodes.jsonl")[0]
    assert summary["successes"] == 1
    assert result.info["target"] != "milk_1"
    assert result.task_instruction == "pick up the milk and place it in the basket"
    assert result.info["target"].rsplit("_", 1)[0].replace("_", " ") in result.instruction


def test_demonstrations_hold_the_actions_that_were_executed(tmp_path):
    settings = RecordingSettings(render_every=10, image_size=32, disturbed=1.0, retargeted=0.5, states=(0, 1))
    summary = demonstrate("libero_object", tmp_path, {"jitter": 2}, tasks=[3], settings=settings, report=silent)
    assert summary["episodes"] + summary["failed"] == 2
    again = demonstrate("libero_object", tmp_path, {"jitter": 2}, tasks=[3], settings=settings, report=silent)
    assert again["recorded_now"] == 0
    import pyarrow.parquet as pq

    rows = pq.read_table(sorted((tmp_path / "data").rglob("*.parquet"))[0]).to_pylist()
    episodes = [json.loads(line) for line in (tmp_path / "meta/demonstrations.jsonl").read_text().splitlines()]
    for row in rows:
        np.testing.assert_array_equal(row["action"], row["action_chunk"][0])
        episode = episodes[row["episode_index"]]
        window = range(row["step"], row["step"] + 8)
        assert not any(start <= step < stop for start, stop, _ in episode["pushes"] for step in window)
        assert row["step"] < episode["steps"]
    assert all(row["action"][6] in (-1.0, 1.0) for row in rows)
    assert dataclasses.asdict(settings) == summary["settings"]
