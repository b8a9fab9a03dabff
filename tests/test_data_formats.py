"""Every format gives the samples that its own reader gives: states, actions, instructions and frames exactly."""

import json
import shutil
import subprocess
import sys

import datasets
import numpy as np
import pytest
from data_fixtures import DEMOS, LEROBOT, RLDS, TASKS, copy_of, edit_info, golden, libero_gripper, pixels
from PIL import Image

from vla_adapter_hf.data.dataset import VLAAdapterDataset
from vla_adapter_hf.utils import frames


pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VLA_ADAPTER_CACHE", str(tmp_path / "cache"))


def assert_equals_golden(dataset, name):
    expected = golden(name)
    assert len(expected["query_index"]) >= 8
    for row, index in enumerate(expected["query_index"]):
        sample = dataset[index]
        assert np.array_equal(sample["state"], expected["observation.state"][row])
        assert np.array_equal(sample["actions"], libero_gripper(expected["action"][row]))
        assert np.array_equal(sample["action_is_pad"], expected["action_is_pad"][row])
        assert sample["text"] == expected["task"][row]
        assert sample["episode_index"] == expected["episode_index"][row]
        assert sample["frame_index"] == expected["frame_index"][row]
        assert [pixels(image) for image in sample["images"]] == [
            expected["image_sha256"][row],
            expected["wrist_image_sha256"][row],
        ]


@pytest.mark.parametrize("name", LEROBOT)
def test_lerobot_gives_lerobots_samples(name):
    dataset = VLAAdapterDataset.from_lerobot(DEMOS / name, robot="libero", pad_chunks=True)
    assert_equals_golden(dataset, name)


def test_lerobot_v20_is_v21_without_statistics_per_episode(tmp_path):
    folder = copy_of("lerobot_v21_video", tmp_path)
    (folder / "meta" / "episodes_stats.jsonl").unlink()
    edit_info(folder, codebase_version="v2.0")
    dataset = VLAAdapterDataset.from_lerobot(folder, robot="libero", pad_chunks=True)
    assert_equals_golden(dataset, "lerobot_v21_video")


def test_lerobot_v2_with_frames_in_parquet(tmp_path):
    """v2.1 with images: one parquet per episode, cut from the v3.0 fixture, the second in a chunk of its own."""
    import pyarrow.parquet as pq

    folder = copy_of("lerobot_v30_image", tmp_path)
    table = pq.read_table(folder / "data" / "chunk-000" / "file-000.parquet")
    shutil.rmtree(folder / "data")
    shutil.rmtree(folder / "meta" / "episodes")
    (folder / "meta" / "tasks.parquet").unlink()
    lines = []
    for episode in range(2):
        path = folder / "data" / f"chunk-{episode:03d}" / f"episode_{episode:06d}.parquet"
        path.parent.mkdir(parents=True)
        pq.write_table(table.slice(20 * episode, 20), path)
        lines.append(json.dumps({"episode_index": episode, "tasks": [TASKS[0]], "length": 20}))
    (folder / "meta" / "episodes.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "meta" / "tasks.jsonl").write_text(json.dumps({"task_index": 0, "task": TASKS[0]}) + "\n")
    template = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
    edit_info(folder, codebase_version="v2.1", chunks_size=1, data_path=template)
    dataset = VLAAdapterDataset.from_lerobot(folder, robot="libero", pad_chunks=True)
    assert_equals_golden(dataset, "lerobot_v30_image")


def test_lerobot_v3_with_frames_and_data_in_several_files(tmp_path):
    """The second file's rows count on in `index`: places come from meta/episodes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = copy_of("lerobot_v30_image", tmp_path)
    data = folder / "data" / "chunk-000"
    table = pq.read_table(data / "file-000.parquet")
    pq.write_table(table.slice(0, 20), data / "file-000.parquet")
    pq.write_table(table.slice(20), data / "file-001.parquet")
    meta = folder / "meta" / "episodes" / "chunk-000" / "file-000.parquet"
    episodes = pq.read_table(meta)
    place = episodes.schema.get_field_index("data/file_index")
    pq.write_table(episodes.set_column(place, "data/file_index", pa.array([0, 1])), meta)
    dataset = VLAAdapterDataset.from_lerobot(folder, robot="libero", pad_chunks=True)
    assert_equals_golden(dataset, "lerobot_v30_image")


def test_lerobot_v3_video_that_begins_later_in_its_file(tmp_path):
    """Episode 1 alone, with the MP4 files it shares with the others."""
    folder = copy_of("lerobot_v30_video", tmp_path)
    dataset = VLAAdapterDataset.from_lerobot(folder, robot="libero", pad_chunks=True, episodes=[1])
    expected = golden("lerobot_v30_video")
    of_episode = np.flatnonzero(expected["episode_index"] == 1)
    assert len(dataset) == 58 and len(of_episode) >= 2
    for row in of_episode:
        sample = dataset[expected["frame_index"][row]]
        assert pixels(sample["images"][1]) == expected["wrist_image_sha256"][row]


def test_cameras_come_in_the_order_they_are_asked_for():
    dataset = VLAAdapterDataset.from_lerobot(DEMOS / "lerobot_v30_image", cameras=["wrist_image", "image"])
    expected = golden("lerobot_v30_image")
    first = dataset[0]["images"]
    assert pixels(first[0]) == expected["wrist_image_sha256"][0]
    assert pixels(first[1]) == expected["image_sha256"][0]
    one = VLAAdapterDataset.from_lerobot(DEMOS / "lerobot_v30_image", cameras=["observation.images.wrist_image"])
    assert [pixels(image) for image in one[0]["images"]] == [expected["wrist_image_sha256"][0]]


@pytest.fixture(params=[True, False], ids=["simplejpeg", "pillow"])
def jpeg_reader(request, monkeypatch):
    if not request.param:
        monkeypatch.setattr(frames, "simplejpeg", None)
    elif frames.simplejpeg is None:
        pytest.skip("needs simplejpeg: pip install vla-adapter-hf[fast-jpeg]")
    return "tensorflow" if request.param else "pillow"


def test_rlds_gives_the_samples_that_tensorflow_gives(jpeg_reader):
    dataset = VLAAdapterDataset.from_rlds(RLDS, robot="libero")
    expected = golden("rlds")
    assert dataset.unnorm_key == "libero_object_no_noops"
    first = 0
    for episode in (0, 1):
        actions = libero_gripper(expected[f"ep{episode}_action"])
        windows = len(actions) - 7
        for frame in range(windows):
            sample = dataset.get(first + frame, load_images=False)
            assert (sample["episode_index"], sample["frame_index"]) == (episode, frame)
            assert np.array_equal(sample["state"], expected[f"ep{episode}_state"][frame])
            assert np.array_equal(sample["actions"], actions[frame : frame + 8])
            assert not sample["action_is_pad"].any()
            assert sample["text"] == expected[f"ep{episode}_language_instruction"]
        for row, frame in enumerate(expected[f"ep{episode}_frame_index"]):
            images = dataset.source.read_images(episode, int(frame))
            for image, camera in zip(images, ("image", "wrist_image"), strict=True):
                assert pixels(image) == expected[f"ep{episode}_{camera}_{jpeg_reader}_sha256"][row]
        first += windows
    assert len(dataset) == first


def test_pillows_jpeg_differs_from_tensorflows_as_documented(monkeypatch):
    monkeypatch.setattr(frames, "simplejpeg", None)
    image = VLAAdapterDataset.from_rlds(RLDS, robot="libero")[0]["images"][0]
    difference = np.abs(image.astype(int) - golden("rlds")["ep0_image_tensorflow_first"].astype(int))
    assert 0 < difference.max() <= 16
    assert 1.0 < difference.mean() < 1.6


def test_rlds_is_found_from_the_folders_above_and_without_its_json_files(tmp_path):
    folder = copy_of("rlds", tmp_path)
    version = folder / "libero_object_no_noops" / "1.0.0"
    for name in ("features.json", "dataset_info.json"):
        (version / name).unlink()
    # The prefix of the shards is not always the folder's name.
    shard = next(version.glob("*.tfrecord*"))
    shard.rename(version / "liber_o10-train.tfrecord-00000-of-00001")
    expected = VLAAdapterDataset.from_rlds(RLDS, robot="libero")
    for path in (folder, folder / "libero_object_no_noops", version):
        dataset = VLAAdapterDataset.from_rlds(path, robot="libero")
        assert dataset.unnorm_key == "libero_object_no_noops"
        assert np.array_equal(dataset[3]["actions"], expected[3]["actions"])
        assert np.array_equal(dataset[3]["images"][1], expected[3]["images"][1])


def plain_rows(**renamed):
    rows = datasets.Dataset.from_parquet(
        str(DEMOS / "lerobot_v30_image" / "data" / "chunk-000" / "file-000.parquet"), keep_in_memory=True
    )
    return rows.add_column("task", [TASKS[0]] * len(rows)).rename_columns(renamed)


def test_a_plain_dataset_gives_the_same_samples(tmp_path):
    dataset = VLAAdapterDataset.from_dataset(plain_rows(), robot="libero", pad_chunks=True)
    assert_equals_golden(dataset, "lerobot_v30_image")


@pytest.mark.parametrize("suffix, expected", [("jpg", True), ("png", False)])
def test_frames_in_files_of_their_own_are_known_as_jpeg_or_not(tmp_path, suffix, expected):
    """So a folder of images comes out of `datasets`: paths, and no bytes."""
    file = tmp_path / f"frame.{suffix}"
    Image.new("RGB", (8, 8)).save(file)
    steps = [{"front": str(file), "state": [0.0], "action": [0.0], "episode": 0}] * 3
    rows = datasets.Dataset.from_list(steps).cast_column("front", datasets.Image())
    dataset = VLAAdapterDataset.from_dataset(rows, instruction="push", chunk_size=2)
    assert dataset[0]["images"][0].shape == (8, 8, 3)
    assert dataset.source.frames_are_jpeg() == expected


def test_a_plain_dataset_may_have_its_rows_in_any_order_and_other_names():
    rows = plain_rows(**{"observation.state": "joints", "action": "command", "episode_index": "run", "task": "goal"})
    rows = rows.shuffle(seed=1)
    dataset = VLAAdapterDataset.from_dataset(
        rows,
        robot="libero",
        pad_chunks=True,
        state_column="joints",
        action_column="command",
        episode_column="run",
        instruction_column="goal",
        episodes=[0],
    )
    expected = golden("lerobot_v30_image")
    for row in np.flatnonzero(expected["episode_index"] == 0):
        sample = dataset[expected["frame_index"][row]]
        assert np.array_equal(sample["state"], expected["observation.state"][row])
        assert np.array_equal(sample["actions"], libero_gripper(expected["action"][row]))
        assert pixels(sample["images"][0]) == expected["image_sha256"][row]


def test_a_plain_dataset_with_named_episodes_and_frames_as_arrays():
    rng = np.random.default_rng(0)
    front = rng.integers(0, 256, (6, 4, 5, 3), dtype=np.uint8)
    rows = datasets.Dataset.from_dict(
        {
            "front": list(front),
            "state": rng.random((6, 2)).tolist(),
            "action": rng.random((6, 3)).tolist(),
            "episode": ["b", "b", "b", "a", "a", "a"],
        },
        features=datasets.Features(
            front=datasets.Array3D((4, 5, 3), "uint8"),
            state=datasets.Sequence(datasets.Value("float64")),
            action=datasets.Sequence(datasets.Value("float32")),
            episode=datasets.Value("string"),
        ),
    )
    dataset = VLAAdapterDataset.from_dataset(rows, instruction="push", chunk_size=2)
    assert len(dataset) == 4
    assert [(dataset[i]["episode_index"], dataset[i]["frame_index"]) for i in range(4)] == [
        (0, 0),
        (0, 1),
        (1, 0),
        (1, 1),
    ]
    assert np.array_equal(dataset[2]["images"][0], front[3])
    assert dataset[2]["text"] == "push"
    assert dataset[2]["state"].dtype == np.float32


def test_a_hub_dataset_is_read_from_the_hub_cache(tmp_path):
    """The way a repository id takes, offline: from the layout that huggingface_hub leaves behind."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "datasets--me--pick-and-place"
    shutil.copytree(DEMOS / "lerobot_v21_video", repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    program = (
        "from vla_adapter_hf.data.dataset import VLAAdapterDataset\n"
        "dataset = VLAAdapterDataset.from_lerobot('me/pick-and-place', robot='libero')\n"
        "print(len(dataset), dataset.unnorm_key, dataset[0]['images'][0].shape)\n"
    )
    environment = {"HF_HOME": str(tmp_path), "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.stdout.split("\n")[0] == "198 pick-and-place (128, 128, 3)", done.stderr


def test_what_is_neither_folder_nor_repository_is_refused(tmp_path):
    with pytest.raises(ValueError, match="neither a folder that exists nor a Hub repository id"):
        VLAAdapterDataset.from_lerobot(tmp_path / "nothing", robot="libero")
    with pytest.raises(ValueError, match="neither a folder"):
        VLAAdapterDataset.from_lerobot("one/two/three", robot="libero")
