"""LIBERO itself: the recorded observation, episodes that do not depend on what ran before, the expert, the
recorder."""

import dataclasses
import json
import multiprocessing
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from simulator import need_simulator

from vla_adapter_hf.recording import scenes
from vla_adapter_hf.recording.demonstrate import demonstrate
from vla_adapter_hf.recording.episodes import (
    DrivingPolicy,
    plan_episode,
    record_driven_episode,
    record_episode,
    try_chunk,
)
from vla_adapter_hf.recording.scenes import record_scenes
from vla_adapter_hf.recording.settings import RecordingSettings, SceneSettings
from vla_adapter_hf.simulation.evaluate import evaluate
from vla_adapter_hf.simulation.libero.suite import NO_OP, LiberoSuite, object_instruction
from vla_adapter_hf.simulation.policies import ReplayPolicy
from vla_adapter_hf.simulation.results import read_results
from vla_adapter_hf.simulation.settings import EvaluationSettings


pytestmark = pytest.mark.simulator
FIXTURE = Path(__file__).parent / "fixtures" / "libero_spatial_observation.npz"
OBJECT = LiberoSuite("libero_object", image_size=64)
ORACLE = {"tasks": [3], "episodes": 3}  # solved by the scripted expert, nothing rendered


def silent(line: str) -> None:
    """No progress."""


def play(policy, suite, output, report=silent, **settings) -> dict:
    return evaluate(policy, suite, output, EvaluationSettings(**settings), report)


@pytest.fixture(scope="module", autouse=True)
def _simulator():
    need_simulator()


@pytest.fixture(scope="module")
def spatial():
    environment = LiberoSuite("libero_spatial", hard_reset=True).make(0)
    yield environment
    environment.close()


@pytest.fixture(scope="module")
def soup():
    environment = LiberoSuite("libero_object", placement="both").make(0)
    yield environment
    environment.close()


def test_the_recorded_observation_is_reproduced(spatial):
    """State to 5 decimals.

    The recording is 224 pixels large and went through JPEG: 2.3 levels of 255 remain on average.
    """
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
    soft = LiberoSuite("libero_spatial").make(0)
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


@pytest.mark.slow
@pytest.mark.parametrize(("suite", "task"), [("libero_object", 6), ("libero_goal", 0), ("libero_10", 3)])
def test_a_soft_reset_gives_the_episode_of_a_hard_one(suite, task):
    """The other suites have drawers, stoves and microwaves, whose joints and places a reset must bring back."""
    played = []
    for hard_reset in (True, False):
        environment = LiberoSuite(suite, hard_reset=hard_reset).make(task)
        try:
            for episode in (7, 1):
                environment.reset(episode)
                for action in np.random.default_rng(episode).uniform(-1, 1, (40, 7)):
                    environment.step(action, observe=False)
                environment.step(np.zeros(7))
            played.append((environment._env.sim.get_state().flatten(), environment.observe()))
        finally:
            environment.close()
    (hard, seen), (soft, also) = played
    np.testing.assert_array_equal(hard, soft)
    for image, other in zip(seen.images, also.images, strict=True):
        np.testing.assert_array_equal(image, other)


def test_another_target_changes_instruction_and_success(soup):
    other = soup.movable_objects[2]
    soup.reset(1, instruction=object_instruction(other))
    assert soup.target == other
    assert soup.instruction.startswith("pick up the ") and soup.instruction != soup.official_instruction
    assert soup.other_instructions == [object_instruction(name) for name in soup.movable_objects[1:]]
    soup.reset(1)
    assert soup.instruction == soup.official_instruction
    with pytest.raises(ValueError, match="instruction must be one that fits this scene"):
        soup.reset(1, instruction=object_instruction("teapot_1"))


def test_an_episode_may_be_longer_than_robosuites_own_limit_and_success_still_ends_it(soup):
    soup.reset(1)
    soup._env.timestep = 1000
    assert not any(soup.step(NO_OP, observe=False) for _ in range(2))
    joint = soup._env.objects_dict[soup.target].joints[-1]
    pose = soup._env.sim.data.get_joint_qpos(joint).copy()
    pose[:3] = soup.object_position(soup.basket) + [0.0, 0.0, 0.1]
    soup._env.sim.data.set_joint_qpos(joint, pose)
    assert any(soup.step(NO_OP, observe=False) for _ in range(20))


def test_black_images_keep_the_true_state_and_render_nothing(soup, monkeypatch):
    soup.reset(4)
    seen = soup.observe()
    rendered = []
    render = soup._env.sim.render
    monkeypatch.setattr(
        soup._env.sim, "render", lambda *args, **options: rendered.append(1) or render(*args, **options)
    )
    monkeypatch.setattr(soup, "render", False)
    soup.reset(4)
    blind = soup.observe()
    assert not rendered
    np.testing.assert_array_equal(blind.state, seen.state)
    assert [image.shape for image in blind.images] == [image.shape for image in seen.images]
    assert not any(image.any() for image in blind.images) and all(image.any() for image in seen.images)
    monkeypatch.setattr(soup, "render", True)
    soup.reset(4)
    np.testing.assert_array_equal(soup.observe().images[1], seen.images[1])
    assert len(rendered) == 2  # one per camera


@pytest.fixture(scope="module")
def oracle_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("oracle")
    play("oracle", OBJECT, folder, processes=0, save_actions=True, **ORACLE)
    return folder


@pytest.fixture(scope="module")
def replay_run(oracle_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("replay")
    replay = ReplayPolicy.from_folder(oracle_run / "actions", "libero")
    play(replay, OBJECT, folder, processes=0, **ORACLE)
    return folder


def test_oracle_solves_replay_repeats_it_and_noop_does_not(oracle_run, replay_run, tmp_path):
    noop = play("noop", OBJECT, tmp_path / "noop", tasks=[3], episodes=1, processes=0)
    oracle, replayed = (read_results(folder / "episodes.jsonl") for folder in (oracle_run, replay_run))
    assert [result.success for result in oracle] == [True] * 3
    assert [(r.steps, r.success) for r in oracle] == [(r.steps, r.success) for r in replayed]
    assert noop["success_rate"] == 0.0


class HaltingReplay(ReplayPolicy):
    """Stops for ever in the middle of the second episode."""

    def predict(self, requests):
        if requests[0].episode == 1 and requests[0].step >= 40:
            self.halted.touch()
            time.sleep(3600)
        return super().predict(requests)


def _replay_until_killed(actions: Path, output: Path, halted: Path) -> None:
    replay = HaltingReplay.from_folder(actions, "libero")
    replay.halted = halted
    play(replay, OBJECT, output, processes=1, **ORACLE)


def lines_without_seconds(folder: Path) -> list[dict]:
    """The lines of the results, with the number of queries instead of how long each took."""
    lines = [json.loads(line) for line in (folder / "episodes.jsonl").read_text().splitlines()]
    return [{**line, "latency": len(line["latency"])} for line in lines]


def test_killed_in_an_episode_and_resumed_gives_the_file_of_the_uninterrupted_run(oracle_run, replay_run, tmp_path):
    actions, output, halted = oracle_run / "actions", tmp_path / "run", tmp_path / "halted"
    spawn = multiprocessing.get_context("spawn")
    process = spawn.Process(target=_replay_until_killed, args=(actions, output, halted))
    process.start()
    deadline = time.monotonic() + 500
    while process.is_alive() and not halted.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert [line["episode"] for line in lines_without_seconds(output)] == [0]
    lines: list[str] = []
    replay = ReplayPolicy.from_folder(actions, "libero")
    play(replay, OBJECT, output, processes=1, report=lines.append, **ORACLE)
    assert len(lines) == 2
    assert lines_without_seconds(output) == lines_without_seconds(replay_run)


def test_parallel_processes_give_the_serial_results(tmp_path):
    suite = LiberoSuite("libero_object", placement="shuffle", image_size=64)
    for name, processes in (("serial", 0), ("parallel", 2)):
        play("oracle", suite, tmp_path / name, tasks=[1, 2], episodes=2, processes=processes)
    lines = [(tmp_path / name / "episodes.jsonl").read_text() for name in ("serial", "parallel")]
    assert lines[0] == lines[1]


def test_a_named_object_is_what_success_is_about(tmp_path):
    summary = play("oracle", OBJECT, tmp_path, tasks=[7], episodes=1, processes=0, instruction="other")
    result = read_results(tmp_path / "episodes.jsonl")[0]
    assert summary["successes"] == 1
    assert result.info["target"] != "milk_1"
    assert result.task_instruction == "pick up the milk and place it in the basket"
    assert result.info["target"].rsplit("_", 1)[0].replace("_", " ") in result.instruction


def test_demonstrations_hold_the_actions_that_were_executed(tmp_path):
    settings = RecordingSettings(
        render_every=10, image_size=32, disturbed=1.0, retargeted=0.5, states=(0, 1), official=0, jitter=2, tasks=[3]
    )
    summary = demonstrate(tmp_path, settings, silent)
    assert summary["episodes"] + summary["failed"] == 2
    assert demonstrate(tmp_path, settings, silent)["recorded_now"] == 0
    with pytest.raises(ValueError, match="was begun with seed=0 and not 1"):
        demonstrate(tmp_path, dataclasses.replace(settings, seed=1, jitter=3), silent)
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


def test_environments_of_one_process_do_not_draw_into_each_other(soup):
    soup.reset(1)
    alone = soup.observe().images
    other = OBJECT.make(3)
    try:
        for _ in range(2):
            other.reset(0)
            seen = other.observe().images
            soup.reset(1)
            np.testing.assert_array_equal(soup.observe().images, alone)
            other.reset(0)
            np.testing.assert_array_equal(other.observe().images, seen)
    finally:
        other.close()
    soup.reset(1)
    np.testing.assert_array_equal(soup.observe().images, alone)


def test_asking_for_other_objects_leaves_the_episode_as_it_is(soup):
    """The simulator goes back bit for bit, and each alternative begins towards its own object."""
    plain = RecordingSettings(render_every=20, image_size=16)
    plan = plan_episode("both", 0, 2, soup.movable_objects, plain)
    (alone,) = record_episode(soup, plan, plain)
    *others, itself = record_episode(soup, plan, dataclasses.replace(plain, alternatives=2))
    for name in ("chunks", "states", "actions"):
        np.testing.assert_array_equal(alone[name], itself[name])
    np.testing.assert_array_equal(alone["numbers"]["step"], itself["numbers"]["step"])
    assert alone["images"] == itself["images"]
    assert len(others) == 2
    assert len({episode["instruction"] for episode in (*others, itself)}) == 3
    for episode in others:
        target = np.array(episode["extra"]["positions"][episode["extra"]["target"]])
        # LIBERO's end effector and its world share the axes of the action.
        towards = target - episode["states"][0, :2]
        far = np.abs(towards) > 0.05
        assert far.any()
        np.testing.assert_array_equal(np.sign(episode["chunks"][0, 0, :2])[far], np.sign(towards)[far])
        first = list(itself["numbers"]["step"]).index(episode["numbers"]["step"][0])
        assert episode["images"]["image"][0] == itself["images"]["image"][first]


def test_a_policy_that_drives_gets_the_experts_chunks(soup):
    """Every row's chunk is the expert's, tried from where the row begins; what was played there is that or the
    policy's.
    """
    settings = RecordingSettings(image_size=16)
    driver = DrivingPolicy("embedded", "libero_object", share=0.4)
    plans = (
        plan_episode("both", 0, number, soup.movable_objects, settings, driver="by_embedded") for number in range(1, 9)
    )
    # Nothing is recorded where the object is not in the basket at last.
    recorded = next(filter(None, (record_driven_episode(soup, plan, settings, driver) for plan in plans)), None)
    assert recorded, "with six of ten chunks from the expert, no episode of eight was solved"
    (episode,) = recorded
    number, target = episode["extra"]["episode"], episode["extra"]["target"]
    assert episode["key"] == f"{number:05d}-00-by_embedded-both"
    assert episode["extra"]["driver"] == "by_embedded" and episode["extra"]["driver_share"] == 0.4
    np.testing.assert_array_equal(episode["numbers"]["step"], 8 * np.arange(len(episode["chunks"])))
    np.testing.assert_array_equal(episode["actions"], episode["chunks"][:, 0])

    def plays(actions, following) -> bool:
        for action in actions:
            soup.step(action)
        return bool(np.array_equal(soup.observe().state.astype(np.float32), following))

    soup.reset(number, instruction=object_instruction(target))
    own, closing = [], 0
    for row, chunk in enumerate(episode["chunks"]):
        observation = soup.observe()
        np.testing.assert_array_equal(observation.state.astype(np.float32), episode["states"][row])
        np.testing.assert_array_equal(try_chunk(soup, target, 8, closing), chunk)
        if row == len(episode["chunks"]) - 1:
            break
        predicted, here, following = driver.chunk(soup, observation), soup.save_state(), episode["states"][row + 1]
        own.append(plays(predicted, following))
        if not own[-1]:
            soup.restore_state(here)
            assert plays(chunk, following), f"row {row} was left by other actions than the expert's or the policy's"
        for action in predicted if own[-1] else chunk:
            closing = closing + 1 if action[-1] > 0 else 0
    assert 0 < sum(own) < len(own)


def test_driven_episodes_extend_a_recording(tmp_path):
    settings = RecordingSettings(render_every=10, image_size=16, states=(0, 1), official=0, jitter=1, tasks=[9])
    demonstrate(tmp_path, settings, silent)
    driven = dataclasses.replace(settings, driver="embedded", driver_share=0.05)
    summary = demonstrate(tmp_path, driven, silent)
    assert summary["recorded_now"] == 1 and summary["episodes"] == 2
    assert demonstrate(tmp_path, driven, silent)["recorded_now"] == 0
    with pytest.raises(ValueError, match="another driver 'by_embedded': share=0.05 and not 0.1"):
        demonstrate(tmp_path, dataclasses.replace(driven, driver_share=0.1), silent)
    lines = [json.loads(line) for line in (tmp_path / "meta/demonstrations.jsonl").read_text().splitlines()]
    assert [line.get("driver") for line in lines] == ["by_embedded", None]
    assert lines[0]["positions"] != lines[1]["positions"]


def test_a_thing_is_in_the_frames_where_it_is_projected_to(soup):
    """Taking an object away changes the pixels round its projection, and hardly any others."""
    soup.reset(0)
    name = soup.target
    before = soup.look()
    centre = np.mean(soup.object_box(name), axis=0)[None]
    joint = soup._env.objects_dict[name].joints[-1]
    first, _ = soup._env.sim.model.get_joint_qpos_addr(joint)
    soup._env.sim.data.qpos[first] += 5.0
    soup._env.sim.forward()
    after = soup.look()
    for index, camera in enumerate(("agentview", "robot0_eye_in_hand")):
        changed = np.abs(before.images[index].astype(int) - after.images[index]).max(-1) > 40
        place = soup.project(centre, camera)[0]
        rows, columns = np.nonzero(changed)
        assert len(rows) > 30, f"{camera} does not see {name}"
        size = changed.shape[0]
        assert abs(np.median(columns) / size - place[0]) < 0.06 and abs(np.median(rows) / size - place[1]) < 0.06


def test_scenes_hold_what_the_simulator_says_and_are_recorded_once(tmp_path, monkeypatch):
    monkeypatch.setattr(scenes, "SCENES_PER_FILE", 3)
    monkeypatch.setattr(scenes, "POSES_PER_FILE", 4)
    settings = SceneSettings(3, states=(0, 1), image_size=48)
    suite = LiberoSuite("libero_object", placement="both", stream="demonstration", states=settings.states)
    environment = suite.make(2)
    rows, again = scenes._scenes(environment, 0, settings), scenes._scenes(environment, 0, settings)
    # Nothing has moved since the last scene was taken.
    for index, camera in enumerate(scenes.CAMERAS):
        centres = np.stack([np.mean(environment.object_box(name), axis=0) for name in rows[-1]["objects"]])
        expected = environment.project(centres, camera)
        np.testing.assert_allclose(np.array(again[-1]["places"])[:, index], expected, atol=1e-4)
    environment.close()
    assert len(rows) == 3 and rows[0]["image"] != rows[1]["image"]
    assert [row["image"] for row in rows] == [row["image"] for row in again]
    for row in rows:
        assert len(row["objects"]) == len(row["places"]) > 4
        places = np.array(row["places"])
        assert ((places[:, 0] > 0) & (places[:, 0] < 1)).all()  # the third person's camera sees the whole floor


def test_scene_files_that_are_there_are_kept(tmp_path):
    for task in range(10):
        (tmp_path / f"0000-{task:02d}.parquet").write_bytes(b"")
    assert record_scenes(tmp_path, SceneSettings(1), silent) == 10 * scenes.SCENES_PER_FILE
    assert all(path.stat().st_size == 0 for path in tmp_path.glob("*.parquet"))
    with pytest.raises(ValueError, match="was begun with seed=0 and not 1"):
        record_scenes(tmp_path, SceneSettings(1, seed=1))
    with pytest.raises(ValueError, match="scenes must be at least 1, got 0"):
        SceneSettings(0)
