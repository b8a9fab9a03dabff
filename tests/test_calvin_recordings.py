"""CALVIN's recordings become a LeRobot dataset: what is stored, what is refused, what a kill leaves."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import calvin_scripted
import calvin_writer
import model_fixtures
import numpy as np
import pytest
from training_fixtures import run_training
from typer.testing import CliRunner

from vla_adapter_cli import app
from vla_adapter_hf import VLAAdapterDataset
from vla_adapter_hf.data.statistics import compute_norm_stats
from vla_adapter_hf.recording.calvin_recordings import CalvinRecordings, read_step
from vla_adapter_hf.recording.convert_calvin import ConversionSettings, convert_calvin
from vla_adapter_hf.robots import get_robot
from vla_adapter_hf.simulation.calvin.check import OPEN_SCENE
from vla_adapter_hf.simulation.calvin.install import is_importable
from vla_adapter_hf.simulation.calvin.simulation import CalvinSimulation
from vla_adapter_hf.simulation.policies import Request, make_policy


RECORDED = [(10, 27), (100, 110)]
SPANS = [
    (12, 20, "pull the handle to open the drawer", "open_drawer"),
    (100, 108, "push the button", "turn_on_led"),
    (15, 23, "open the drawer", "open_drawer"),  # overlaps with the first
]


def steps_of(seed: int = 0) -> dict[int, dict]:
    """Random steps, in CALVIN's types: numbers are float64 and do not fit into float32."""
    generator = np.random.default_rng(seed)
    return {
        step: {
            "rgb_static": generator.integers(0, 256, (200, 200, 3), dtype=np.uint8),
            "rgb_gripper": generator.integers(0, 256, (84, 84, 3), dtype=np.uint8),
            "robot_obs": np.append(generator.normal(size=14), generator.choice([-1.0, 1.0])),
            "rel_actions": np.append(generator.uniform(-1, 1, 6), generator.choice([-1.0, 1.0])),
        }
        for first, last in RECORDED
        for step in range(first, last + 1)
    }


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A folder of recordings, not to be changed, and what is in it."""
    folder, steps = tmp_path_factory.mktemp("calvin") / "training", steps_of()
    folder.mkdir()
    for step, values in steps.items():
        calvin_writer.write_step(folder, step, **values)
    calvin_writer.write_spans(folder, RECORDED, SPANS)
    return folder, steps


@pytest.fixture
def recordings(original, tmp_path) -> Path:
    """A copy that may be changed; unchanged steps are links."""
    folder = tmp_path / "training"
    folder.mkdir()
    for path in original[0].glob("episode_*.npz"):
        (folder / path.name).symlink_to(path)
    calvin_writer.write_spans(folder, RECORDED, SPANS)
    return folder


@pytest.fixture(scope="module")
def converted(original, tmp_path_factory):
    output = tmp_path_factory.mktemp("converted") / "calvin_abc_rlds"
    return output, convert_calvin(original[0], output, report=lambda line: None)


def quietly(source: Path, output: Path, **settings) -> dict:
    return convert_calvin(source, output, ConversionSettings(**settings), report=lambda line: None)


def test_every_span_is_an_episode_bit_for_bit(original, converted):
    _, steps = original
    output, summary = converted
    assert (summary["episodes"], summary["rows"], summary["converted_now"]) == (3, 9 + 9 + 9, 3)
    dataset = VLAAdapterDataset.from_lerobot(output, robot="calvin", chunk_size=1)
    assert dataset.fps == 30 and dataset.camera_names == ["rgb_static", "rgb_gripper"]
    index = 0
    for first, last, instruction, _ in SPANS:
        for step in range(first, last + 1):
            sample, values = dataset.get(index, load_images=True), steps[step]
            assert sample["text"] == instruction
            for image, camera in zip(sample["images"], ("rgb_static", "rgb_gripper"), strict=True):
                np.testing.assert_array_equal(np.asarray(image), values[camera])
            state = np.concatenate([values["robot_obs"][:7], values["robot_obs"][-1:]])
            np.testing.assert_array_equal(sample["state"], state.astype(np.float32))
            action = values["rel_actions"].astype(np.float32)
            action[6] = max(action[6], 0)  # learnt: 1 open, 0 closed
            np.testing.assert_array_equal(sample["actions"][0], action)
            index += 1
    assert index == len(dataset)


def test_actions_are_stored_as_recorded(original, converted):
    raw = VLAAdapterDataset.from_lerobot(converted[0], cameras=["rgb_static", "rgb_gripper"], chunk_size=1)
    recorded = np.array([original[1][step]["rel_actions"] for step in range(12, 21)], np.float32)
    read = np.stack([raw.get(row, load_images=False)["actions"][0] for row in range(9)])
    np.testing.assert_array_equal(read, recorded)
    assert set(read[:, 6]) == {-1.0, 1.0}


def test_statistics_are_those_of_what_a_model_learns(original, converted):
    steps, dataset = original[1], VLAAdapterDataset.from_lerobot(converted[0], robot="calvin")
    stats = compute_norm_stats(dataset)["calvin_abc_rlds"]  # the published name, so evaluation finds it
    order = [step for first, last, *_ in SPANS for step in range(first, last + 1)]
    actions = np.array([steps[step]["rel_actions"] for step in order], np.float32)
    np.testing.assert_allclose(stats["action"]["mean"][:6], actions[:, :6].mean(axis=0), rtol=1e-5)
    assert (stats["action"]["min"][6], stats["action"]["max"][6]) == (0, 1)
    assert stats["action"]["mask"] == [True] * 6 + [False]
    assert len(stats["proprio"]["mean"]) == 8 and stats["proprio"]["min"][7] == -1


def test_each_episode_says_where_it_is_from(converted):
    lines = (converted[0] / "meta" / "demonstrations.jsonl").read_text().splitlines()
    assert json.loads(lines[1]) == {
        "episode_index": 1,
        "key": "0000001",
        "subtask": "turn_on_led",
        "first_step": 100,
        "last_step": 108,
    }
    features = json.loads((converted[0] / "meta" / "info.json").read_text())["features"]
    assert features["observation.images.rgb_static"]["shape"] == [200, 200, 3]
    assert features["observation.images.rgb_gripper"]["shape"] == [84, 84, 3]


def test_a_finished_conversion_is_not_repeated_and_keeps_no_second_copy(original, converted):
    output, _ = converted
    before = (output / "meta" / "info.json").stat().st_mtime_ns
    assert quietly(original[0], output)["converted_now"] == 0
    assert (output / "meta" / "info.json").stat().st_mtime_ns == before
    assert [path.name for path in (output / ".recording").iterdir()] == ["settings.json"]


def test_several_processes_write_the_same(original, converted, tmp_path):
    quietly(original[0], tmp_path / "out", workers=2)
    [one], [two] = (list((folder / "data").rglob("*.parquet")) for folder in (converted[0], tmp_path / "out"))
    assert one.read_bytes() == two.read_bytes()


def test_jpeg_takes_less_space(original, converted, tmp_path):
    quietly(original[0], tmp_path / "out", image_format="jpeg")
    sizes = [
        sum(path.stat().st_size for path in (folder / "data").rglob("*"))
        for folder in (tmp_path / "out", converted[0])
    ]
    assert sizes[0] < 0.7 * sizes[1]


def test_a_killed_conversion_goes_on_where_it_stopped(recordings, converted, tmp_path):
    """The second span's steps are a pipe: the process waits there until it is killed, with one episode saved."""
    output, blocked = tmp_path / "out", recordings / "episode_0000103.npz"
    target = blocked.resolve()
    blocked.unlink()
    os.mkfifo(blocked)
    program = f"""
from vla_adapter_hf.recording.convert_calvin import convert_calvin
if __name__ == "__main__":
    convert_calvin({str(recordings)!r}, {str(output)!r})
"""
    script = tmp_path / "program.py"
    script.write_text(program)
    process = subprocess.Popen([sys.executable, str(script)], stderr=subprocess.DEVNULL)
    saved, deadline = output / ".recording" / "0000000.parquet", time.monotonic() + 120
    while not saved.exists() and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.1)
    assert saved.exists()
    process.send_signal(signal.SIGKILL)
    process.wait()
    blocked.unlink()
    blocked.symlink_to(target)
    assert not (output / "meta").exists()
    assert quietly(recordings, output)["converted_now"] == 2
    [ours], [whole] = (list((folder / "data").rglob("*.parquet")) for folder in (output, converted[0]))
    assert ours.read_bytes() == whole.read_bytes()


def test_other_annotations_or_formats_need_another_folder(recordings, tmp_path):
    quietly(recordings, tmp_path / "out")
    with pytest.raises(ValueError, match="was begun with image_format='png' and not 'jpeg'; name another folder"):
        quietly(recordings, tmp_path / "out", image_format="jpeg")
    calvin_writer.write_spans(recordings, RECORDED, SPANS[:2])
    with pytest.raises(ValueError, match="was begun with spans='3, crc32"):
        quietly(recordings, tmp_path / "out")


def test_a_published_calvin_checkpoint_fine_tunes_on_it(converted, tmp_path):
    """What is trained plays in CALVIN without further options: cameras and statistics are those of the suite."""
    start = model_fixtures.write_published_calvin(tmp_path / "start")
    cameras = ["--cameras", "rgb_static", "rgb_gripper"]
    words = ["--dataset", converted[0], "--robot", "calvin", "--start_robot", "calvin", *cameras, "--max_steps", 2]
    metrics = run_training(start, tmp_path / "trained", *words)
    assert np.isfinite(metrics["train_loss"])
    policy = make_policy(str(tmp_path / "trained"), "calvin", suite="calvin_abc_rlds")
    config = policy.model.config
    assert (config.cameras, config.chunk_size, config.fps) == (["rgb_static", "rgb_gripper"], 8, 30)
    assert policy.unnorm_key == "calvin_abc_rlds" and policy.camera_order == [0, 1]
    assert config.state_names[-1] == "gripper_command" and config.action_names[-1] == "gripper"
    before = json.loads((start / "dataset_statistics.json").read_text())["calvin_abc_rlds"]
    assert config.norm_stats["calvin_abc_rlds"]["action"]["q99"] != before["action"]["q99"]


# -- what is refused, before anything is written ----------------------------------------------------------------------


class RunsCode:
    """Pickled, this asks the reader to call a function."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_annotations_that_would_run_code_are_refused(recordings, tmp_path):
    calvin_writer.write_annotations(recordings, {"info": RunsCode(tmp_path / "ran")})
    with pytest.raises(
        ValueError, match=r"auto_lang_ann.npy cannot be read as a pickle: it asks for posix.mkdir.*could run code"
    ):
        quietly(recordings, tmp_path / "out")
    assert not (tmp_path / "ran").exists() and not (tmp_path / "out").exists()


def test_annotations_written_by_numpy_1_are_read(recordings):
    """It called its module `numpy.core` and wrote protocol 3."""
    path = recordings / "lang_annotations" / "auto_lang_ann.npy"
    pickled = pickle.dumps(np.load(path, allow_pickle=True), 3)
    assert b"numpy._core.multiarray" in pickled
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|O", "fortran_order": False, "shape": ()})
        file.write(pickled.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    assert [span.first for span in CalvinRecordings(recordings).spans] == [12, 100, 15]


def test_missing_files_are_named(recordings, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"Did you mean .*training\?"):
        quietly(tmp_path, tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="absent.* is no folder"):
        quietly(tmp_path / "absent", tmp_path / "out")
    (recordings / "episode_0000018.npz").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"episode_0000018.npz does not exist, nor do 0 others of the span 12...20"
    ):
        quietly(recordings, tmp_path / "out")
    (recordings / "lang_annotations" / "auto_lang_ann.npy").unlink()
    with pytest.raises(FileNotFoundError, match=r"auto_lang_ann.npy does not exist. Name a folder of CALVIN's"):
        quietly(recordings, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("span", "message"),
    [
        ((20, 35, "lift", "lift"), r"span 0 of .*\(lift, steps 20...35\) is not within one of the recordings"),
        ((0, 5, "lift", "lift"), "is not within one of the recordings"),
        ((15, 14, "lift", "lift"), "must end after its beginning"),
        ((12, 20, " ", "lift"), "has no instruction"),
    ],
)
def test_broken_spans_are_named(recordings, tmp_path, span, message):
    calvin_writer.write_spans(recordings, RECORDED, [span])
    with pytest.raises(ValueError, match=message):
        quietly(recordings, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"language": {"ann": [], "task": []}}, "must hold info.indx.*KeyError: 'info'"),
        ({"language": {"ann": ["a"], "task": []}, "info": {"indx": [(12, 20)]}}, "one of each for every span"),
        ({"language": {"ann": [], "task": []}, "info": {"indx": []}}, "has no annotated span"),
        ([1, 2], "must hold info.indx"),
    ],
)
def test_annotations_of_another_form_are_refused(recordings, tmp_path, content, message):
    calvin_writer.write_annotations(recordings, content)
    with pytest.raises(ValueError, match=message):
        quietly(recordings, tmp_path / "out")


def test_files_that_are_no_arrays_are_refused(recordings, tmp_path):
    path = recordings / "lang_annotations" / "auto_lang_ann.npy"
    for data, message in ((b"nothing", "is no .npy file"), (path.read_bytes()[:200], "pickle data was truncated")):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=message):
            quietly(recordings, tmp_path / "out")
    np.save(path, np.zeros(3))
    with pytest.raises(ValueError, match=r"must hold one Python object, got an array of float64 with shape \(3,\)"):
        quietly(recordings, tmp_path / "out")
    np.save(recordings / "ep_start_end_ids.npy", np.zeros((2, 3)))
    calvin_writer.write_annotations(
        recordings, {"language": {"ann": ["a"], "task": ["b"]}, "info": {"indx": [(1, 2)]}}
    )
    with pytest.raises(ValueError, match=r"ep_start_end_ids.npy must hold integers of shape \(recordings, 2\)"):
        quietly(recordings, tmp_path / "out")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"rgb_static": np.zeros((84, 84, 3), np.uint8)}, r"rgb_static.* must be uint8 of shape \(200, 200, 3\)"),
        ({"robot_obs": np.zeros(8)}, r"robot_obs must have shape \(15,\), got \(8,\)"),
        ({"rel_actions": np.ones(8)}, r"rel_actions must have shape \(7,\), got \(8,\)"),
        ({"rel_actions": np.zeros(7)}, r"must be -1 \(closed\) or \+1 \(open\), got 0"),
        ({"rel_actions": np.array([np.nan, 0, 0, 0, 0, 0, 1])}, "must be finite"),
        ({"rgb_gripper": np.array("a picture", dtype=object)}, "cannot be read.*allow_pickle"),
    ],
)
def test_steps_of_another_form_are_refused_by_file_and_field(original, tmp_path, changed, message):
    calvin_writer.write_step(tmp_path, 20, **{**original[1][20], **changed})
    with pytest.raises(ValueError, match=f"episode_0000020.npz.*{message}"):
        read_step(tmp_path, 20)


def test_a_damaged_step_stops_the_conversion_and_can_be_repaired(recordings, tmp_path):
    damaged = recordings / "episode_0000103.npz"
    data = damaged.read_bytes()
    damaged.unlink()
    damaged.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="episode_0000103.npz cannot be read"):
        quietly(recordings, tmp_path / "out")
    damaged.write_bytes(data)
    assert quietly(recordings, tmp_path / "out")["episodes"] == 3


def test_the_command_converts_and_says_how_to_train(recordings, tmp_path):
    words = ["convert-dataset", "calvin", str(recordings), str(tmp_path / "out")]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert "3 of 3 episodes" in result.stdout and "3 episodes, 27 rows; 3 converted now" in result.stdout
    result = CliRunner().invoke(app, ["convert-dataset", "libero", *words[2:]])
    assert result.exit_code == 1 and "format='libero' cannot be converted; calvin can" in result.stderr


# -- the real simulator -----------------------------------------------------------------------------------------------


@pytest.mark.calvin
def test_a_recording_of_the_real_simulator_is_exact_and_solves_again(tmp_path):
    """Scripted motions, recorded in CALVIN's format and converted: frames, states and actions are the simulator's."""
    if not all(is_importable(module) for module in ("pybullet", "calvin_env")):
        pytest.skip("CALVIN's simulator is not installed; vla-adapter calvin-check says what is missing")
    simulation = CalvinSimulation("cpu")
    texts = {"turn_on_led": "press the button", "open_drawer": "pull the handle"}
    scenes = [(subtask, OPEN_SCENE) for subtask in texts]
    assert calvin_scripted.record(simulation, tmp_path / "training", scenes, texts, tail=0) == [True, True]
    quietly(tmp_path / "training", tmp_path / "calvin_abc_rlds")
    dataset = VLAAdapterDataset.from_lerobot(tmp_path / "calvin_abc_rlds", robot="calvin", chunk_size=1)
    rows = [dataset.get(index, load_images=True) for index in range(len(dataset))]
    for subtask, text in texts.items():
        simulation.reset(OPEN_SCENE)
        simulation.begin_subtask(subtask)
        own = [row for row in rows if row["text"] == text]
        for number, row in enumerate(own):
            observed = simulation.observe()
            np.testing.assert_array_equal(row["state"], observed.state.astype(np.float32))
            for image, seen in zip(row["images"], observed.images, strict=True):
                np.testing.assert_array_equal(np.asarray(image), seen)
            solved = simulation.step(get_robot("calvin").to_environment(row["actions"])[0])
            assert solved == (number == len(own) - 1)
    simulation.close()
    start = model_fixtures.write_published_calvin(tmp_path / "start")
    words = ["--dataset", tmp_path / "calvin_abc_rlds", "--robot", "calvin", "--start_robot", "calvin"]
    run_training(start, tmp_path / "trained", *words, "--cameras", "rgb_static", "rgb_gripper", "--max_steps", 2)
    policy = make_policy(str(tmp_path / "trained"), "calvin", suite="calvin_abc_rlds")
    [chunk] = policy.predict([Request(observed, text, 0, 0, 0)])
    assert chunk.shape == (8, 7)
