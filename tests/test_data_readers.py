"""What all readers share: damaged text and records, camera names, metadata that is checked, permissions, closing."""

import json
import os
import stat
import subprocess
import sys

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_fixtures import DEMOS, RLDS, copy_of, edit_info
from PIL import Image
from test_data_dataset import rlds_episode
from tfrecord_writer import write_records

from vla_adapter_hf.data import (
    BadEpisodeError,
    VLAAdapterDataset,
    VLAAdapterStreamingDataset,
    dataset_statistics,
    load_demonstrations,
)
from vla_adapter_hf.data.columns import camera_names


BOTH = pytest.mark.parametrize(
    "dataset_class", [VLAAdapterDataset, VLAAdapterStreamingDataset], ids=["index", "stream"]
)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VLA_ADAPTER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    return tmp_path / "cache"


# Damage that on_bad_episode="skip" passes over


def write_rlds(folder, *records):
    folder.mkdir()
    write_records(folder / "set-train.tfrecord-00000-of-00001", records)
    return folder


def message(number, data):
    """A field of a protocol buffer that holds bytes."""
    size, length = len(data), b""
    while size >= 0x80:
        length += bytes([size & 0x7F | 0x80])
        size >>= 7
    return bytes([number << 3 | 2]) + length + bytes([size]) + data


@BOTH
@pytest.mark.parametrize(
    "end",
    [b"\x0a", b"\x0a\x80\x80", b"\x0a" + b"\x80" * 12, b"\x0a\x05abc"],
    ids=["no length", "within a length", "endless length", "within the bytes"],
)
def test_a_record_that_is_cut_off_in_a_list_is_a_bad_episode(dataset_class, end, tmp_path):
    """Everything around the list, lengths and checksum, is right: such a record comes from a faulty writer."""
    frames = message(1, b"a frame") * 10 + end
    entry = message(1, b"steps/observation/image") + message(2, message(1, frames))
    broken = rlds_episode() + message(1, message(1, entry))  # the later entry counts
    folder = write_rlds(tmp_path / "set", rlds_episode(), broken, rlds_episode())
    with pytest.raises(BadEpisodeError, match="episode 1: .*(is cut off|longer than the message around it)"):
        drain(dataset_class.from_rlds(folder))
    skipping = dataset_class.from_rlds(folder, on_bad_episode="skip")
    assert numbers_of_episodes(skipping) == {0, 2}
    assert skipping.num_skipped_episodes == 1


def drain(dataset):
    """Every sample without its frames, which are no images in these records."""
    if isinstance(dataset, VLAAdapterDataset):
        return [dataset.get(index, load_images=False) for index in range(len(dataset))]
    return [sample for sample, _ in dataset._windows(0, 1)]


def numbers_of_episodes(dataset):
    return {sample["episode_index"] for sample in drain(dataset)}


@BOTH
def test_an_instruction_that_is_no_utf8_makes_an_rlds_episode_a_bad_one(dataset_class, tmp_path):
    broken = rlds_episode(**{"steps/language_instruction": [b"go"] * 3 + [b"\xff go"] * 7})
    folder = write_rlds(tmp_path / "set", rlds_episode(), broken)
    message = "episode 1, frame 3: the instruction in steps/language_instruction is not UTF-8 text"
    with pytest.raises(BadEpisodeError, match=message):
        drain(dataset_class.from_rlds(folder))
    for _ in range(2):  # the second time from the stored index
        skipping = dataset_class.from_rlds(folder, on_bad_episode="skip")
        assert numbers_of_episodes(skipping) == {0}
        assert skipping.num_skipped_episodes == 1
        assert skipping.norm_stats["set"]["num_trajectories"] == 2  # its numbers are good
    assert numbers_of_episodes(dataset_class.from_rlds(folder, instruction="go")) == {0, 1}


def not_utf8(texts):
    """Arrow strings whose bytes are not checked, as in a file that another program wrote."""
    return pa.array(texts, pa.binary()).view(pa.string())


@BOTH
def test_an_instruction_that_is_no_utf8_makes_a_rows_episode_a_bad_one(dataset_class, tmp_path):
    source = pq.read_table(DEMOS / "lerobot_v30_image" / "data" / "chunk-000" / "file-000.parquet")
    path = tmp_path / "rows.parquet"
    pq.write_table(source.append_column("task", not_utf8([b"go"] * 25 + [b"\xff"] * 15)), path)
    streaming = dataset_class is VLAAdapterStreamingDataset
    rows = datasets.load_dataset("parquet", data_files=str(path), split="train", streaming=streaming)
    with pytest.raises(BadEpisodeError, match="episode 1, frame 5: has no instruction"):
        list(dataset_class.from_dataset(rows, robot="libero"))
    skipping = dataset_class.from_dataset(rows, robot="libero", on_bad_episode="skip")
    assert {sample["episode_index"] for sample in skipping} == {0}


@BOTH
def test_a_task_that_is_no_utf8_makes_its_episodes_bad_ones(dataset_class, tmp_path):
    folder = copy_of("lerobot_v30_video", tmp_path)
    path = folder / "meta" / "tasks.parquet"
    table = pq.read_table(path)
    name = next(name for name in table.column_names if name != "task_index")
    texts = [text.encode() for text in table.column(name).to_pylist()]
    texts[table.column("task_index").to_pylist().index(1)] = b"\xe9t\xe9"
    pq.write_table(table.set_column(table.schema.get_field_index(name), name, not_utf8(texts)), path)
    with pytest.raises(BadEpisodeError, match="task_index 1 has no text in meta/tasks"):
        list(dataset_class.from_lerobot(folder, robot="libero"))
    whole = dataset_class.from_lerobot(DEMOS / "lerobot_v30_video", robot="libero")
    expected = {sample["episode_index"] for sample in whole if sample["text"] != whole.reader.metadata.tasks[1]}
    skipping = dataset_class.from_lerobot(folder, robot="libero", on_bad_episode="skip")
    assert {sample["episode_index"] for sample in skipping} == expected


def test_frame_numbers_that_leave_one_out_are_found_in_a_stream_too(tmp_path):
    from test_data_dataset import break_frames

    folder = copy_of("lerobot_v21_video", tmp_path)
    message = break_frames(folder)
    with pytest.raises(BadEpisodeError, match=message):
        list(VLAAdapterStreamingDataset.from_lerobot(folder, robot="libero"))


def test_a_stream_of_another_robots_data_is_refused_even_when_bad_episodes_are_skipped():
    stream = VLAAdapterStreamingDataset.from_rlds(RLDS, ["image"], robot="aloha", on_bad_episode="skip")
    with pytest.raises(ValueError, match="state has 8 values, robot 'aloha' expects 14"):
        list(stream)


# Camera names


def test_camera_names_are_as_short_as_they_can_be_and_unique():
    assert camera_names(["observation.images.top", "observation.images.wrist"]) == ["top", "wrist"]
    assert camera_names(["left.rgb", "right.rgb"]) == ["left.rgb", "right.rgb"]
    assert camera_names(["steps/observation/left/rgb", "steps/observation/right/rgb"]) == ["left.rgb", "right.rgb"]
    assert camera_names(["rgb", "left.rgb", "top.depth"]) == ["rgb", "left.rgb", "depth"]
    assert camera_names(["a.x.rgb", "b.x.rgb", "b.y.rgb"]) == ["a.x.rgb", "b.x.rgb", "y.rgb"]


@BOTH
def test_cameras_that_end_alike_are_found_by_their_short_names(dataset_class, tmp_path):
    folder = copy_of("lerobot_v30_image", tmp_path)
    renamed = {"observation.images.image": "images.left.rgb", "observation.images.wrist_image": "images.right.rgb"}
    path = folder / "data" / "chunk-000" / "file-000.parquet"
    table = pq.read_table(path)
    pq.write_table(table.rename_columns([renamed.get(name, name) for name in table.column_names]), path)
    features = json.loads((folder / "meta" / "info.json").read_text())["features"]
    edit_info(folder, features={renamed.get(name, name): feature for name, feature in features.items()})
    with pytest.raises(ValueError, match="camera 'rgb' could be any of images.left.rgb, images.right.rgb"):
        dataset_class.from_lerobot(folder, ["rgb"])
    dataset = dataset_class.from_lerobot(folder, ["right.rgb", "left.rgb"])
    assert dataset.cameras == ("images.right.rgb", "images.left.rgb")
    assert dataset.camera_names == ["right.rgb", "left.rgb"]
    expected = VLAAdapterDataset.from_lerobot(DEMOS / "lerobot_v30_image", ["wrist_image", "image"])[0]["images"]
    assert all(np.array_equal(a, b) for a, b in zip(next(iter(dataset))["images"], expected, strict=True))


# Metadata of LeRobot datasets


@BOTH
@pytest.mark.parametrize("field", ["data_path", "video_path"])
@pytest.mark.parametrize(
    "template", ["/etc/{episode_index}", "../{episode_index}.parquet", "videos/../../x", "C:\\x", "a\\..\\..\\x"]
)
def test_paths_that_leave_the_datasets_folder_are_refused(dataset_class, field, template, tmp_path):
    folder = copy_of("lerobot_v21_video", tmp_path)
    edit_info(folder, **{field: template})
    with pytest.raises(ValueError, match=f"{field} in meta/info.json gives .*outside of the dataset's folder"):
        dataset_class.from_lerobot(folder, robot="libero")


def test_a_camera_whose_name_leads_out_of_the_folder_is_refused(tmp_path):
    folder = copy_of("lerobot_v21_video", tmp_path)
    features = json.loads((folder / "meta" / "info.json").read_text())["features"]
    edit_info(folder, features={**features, "../../../secret": {"dtype": "video", "shape": [2, 2, 3]}})
    with pytest.raises(ValueError, match="video_path .*outside of the dataset's folder"):
        VLAAdapterDataset.from_lerobot(folder, robot="libero")


def without(info, *keys):
    return {name: value for name, value in info.items() if name not in keys}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda info: without(info, "video_path"),
            "camera 'observation.images.image' is video: there is no video_path",
        ),
        (lambda info: without(info, "fps", "features"), "meta/info.json: there is no fps, features; it has codebase"),
        (lambda info: {**info, "fps": "ten"}, "meta/info.json: fps is 'ten'"),
        (lambda info: {**info, "video_path": None}, "video_path is None"),
        (
            lambda info: {**info, "data_path": "data/{chunk}"},
            "data_path in meta/info.json is 'data/{chunk}', which can",
        ),
        (
            lambda info: {**info, "features": {**info["features"], "x": None}},
            "feature 'x' .*found None, expected a map",
        ),
        (lambda info: [], "found \\[\\], expected a mapping"),
    ],
)
def test_metadata_that_lacks_something_is_refused_in_a_sentence(change, message, tmp_path):
    folder = copy_of("lerobot_v21_video", tmp_path)
    path = folder / "meta" / "info.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(ValueError, match=message):
        VLAAdapterDataset.from_lerobot(folder, robot="libero")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("info.json", b'{"fps": 1', "info.json is no JSON"),
        ("info.json", b'{"\xff": 1}', "info.json is no JSON"),
        (
            "tasks.jsonl",
            b'{"task_index": 0, "task": "a"}\n{"task_index": 1}\n',
            "tasks.jsonl, line 2: there is no task",
        ),
        ("tasks.jsonl", b'{"task_index": 0, "task": "\xff"}', "tasks.jsonl, line 1 is no JSON"),
        ("episodes.jsonl", b'{"episode_index": 0}', "episodes.jsonl, line 1: there is no length"),
        ("episodes.jsonl", b'{"episode_index": "0", "length": 1}', "line 1: episode_index is '0'"),
    ],
)
def test_metadata_files_that_are_damaged_are_named_with_their_line(name, content, message, tmp_path):
    folder = copy_of("lerobot_v21_video", tmp_path)
    (folder / "meta" / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        VLAAdapterDataset.from_lerobot(folder, robot="libero")


def test_parquet_metadata_that_lacks_a_column_or_is_damaged_is_refused(tmp_path):
    folder = copy_of("lerobot_v30_video", tmp_path)
    path = folder / "meta" / "episodes" / "chunk-000" / "file-000.parquet"
    table = pq.read_table(path)
    pq.write_table(table.drop_columns(["data/file_index"]), path)
    with pytest.raises(ValueError, match="file-000.parquet: there is no column data/file_index; columns that exist: "):
        VLAAdapterDataset.from_lerobot(folder, robot="libero")
    pq.write_table(table.drop_columns(["videos/observation.images.image/from_timestamp"]), path)
    with pytest.raises(BadEpisodeError, match="episode 0: has no video of camera 'observation.images.image'"):
        VLAAdapterDataset.from_lerobot(folder, robot="libero")
    pq.write_table(table, path)
    content = bytearray(path.read_bytes())
    footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    content[footer : footer + 8] = b"\xff" * 8  # Arrow's error is an OSError
    for damaged in (b"no parquet", content):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="file-000.parquet cannot be read: .*Fetch the dataset again"):
            VLAAdapterDataset.from_lerobot(folder, robot="libero")


def test_a_parquet_file_whose_description_of_columns_is_damaged_is_refused_in_a_sentence(tmp_path):
    folder = copy_of("lerobot_v30_image", tmp_path)
    path = folder / "data" / "chunk-000" / "file-000.parquet"
    table = pq.read_table(path)
    pq.write_table(table.replace_schema_metadata({"huggingface": '{"info": {'}), path)
    with pytest.raises(ValueError, match="cannot read the description of the columns in .*file-000.parquet"):
        VLAAdapterDataset.from_lerobot(folder, robot="libero")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("dataset_info.json", b"{", "dataset_info.json is no JSON: .*Fetch the dataset again"),
        ("dataset_info.json", b"[]", "dataset_info.json holds list, expected a mapping"),
        ("dataset_info.json", b'{"splits": [{"shardLengths": ["2"]}]}', "splits in dataset_info.json cannot be read"),
        ("features.json", b'{"featuresDict": []}', "features.json cannot be read"),
    ],
)
def test_metadata_of_rlds_that_is_damaged_is_named(name, content, message, tmp_path):
    folder = copy_of("rlds", tmp_path)
    next(folder.rglob(name)).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        VLAAdapterDataset.from_rlds(folder, robot="libero")


# An arm without a preset


def so101(folder, episodes=2, steps=12):
    """A recording as LeRobot makes one of an SO-101: six joints, 30 frames a second, cameras of different sizes."""
    joints = [f"{name}.pos" for name in ("shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll")]
    joints.append("gripper.pos")
    shapes = {"observation.images.front": (48, 64, 3), "observation.images.wrist": (24, 32, 3)}
    rng = np.random.default_rng(0)
    rows = episodes * steps
    numbers = rng.uniform(-100, 100, (rows, 6)).astype(np.float32)
    columns = {
        "observation.state": pa.FixedSizeListArray.from_arrays(pa.array(numbers.reshape(-1)), 6),
        "action": pa.FixedSizeListArray.from_arrays(pa.array((numbers + 1).reshape(-1)), 6),
        "timestamp": pa.array(np.tile(np.arange(steps) / 30, episodes).astype(np.float32)),
        "frame_index": pa.array(np.tile(np.arange(steps), episodes)),
        "episode_index": pa.array(np.repeat(np.arange(episodes), steps)),
        "index": pa.array(np.arange(rows)),
        "task_index": pa.array(np.zeros(rows, np.int64)),
    }
    for name, shape in shapes.items():
        cells = []
        for row in range(rows):
            Image.fromarray(np.full(shape, row, np.uint8)).save(folder.parent / "frame.png")
            cells.append({"bytes": (folder.parent / "frame.png").read_bytes(), "path": None})
        columns[name] = pa.array(cells, pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    (folder / "data" / "chunk-000").mkdir(parents=True)
    (folder / "meta" / "episodes" / "chunk-000").mkdir(parents=True)
    pq.write_table(pa.table(columns), folder / "data" / "chunk-000" / "file-000.parquet")
    zeros = [0] * episodes
    described = {
        "episode_index": list(range(episodes)),
        "length": [steps] * episodes,
        "tasks": [["Put the cube into the box"]] * episodes,
        "data/chunk_index": zeros,
        "data/file_index": zeros,
    }
    pq.write_table(pa.table(described), folder / "meta" / "episodes" / "chunk-000" / "file-000.parquet")
    tasks = pa.table({"task_index": [0], "task": ["Put the cube into the box"]})
    pq.write_table(tasks, folder / "meta" / "tasks.parquet")
    info = {
        "codebase_version": "v3.0",
        "robot_type": "so101_follower",
        "fps": 30,
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": None,
        "features": {
            "action": {"dtype": "float32", "shape": [6], "names": joints},
            "observation.state": {"dtype": "float32", "shape": [6], "names": {"motors": joints}},
            **{name: {"dtype": "image", "shape": shape} for name, shape in shapes.items()},
            "timestamp": {"dtype": "float32", "shape": [1], "names": None},
            **{
                name: {"dtype": "int64", "shape": [1], "names": None}
                for name in ("frame_index", "episode_index", "index", "task_index")
            },
        },
    }
    (folder / "meta" / "info.json").write_text(json.dumps(info))
    return joints, numbers


@BOTH
def test_a_six_joint_arm_needs_no_preset(dataset_class, tmp_path):
    joints, numbers = so101(tmp_path / "so101")
    dataset = dataset_class.from_lerobot(tmp_path / "so101", ["front", "wrist"], chunk_size=5)
    samples = list(dataset)
    assert len(samples) == 2 * (12 - 5 + 1)
    assert np.array_equal(samples[9]["state"], numbers[13]) and np.array_equal(
        samples[9]["actions"], numbers[13:18] + 1
    )
    assert [image.shape for image in samples[9]["images"]] == [(48, 64, 3), (24, 32, 3)]
    assert [int(image[0, 0, 0]) for image in samples[9]["images"]] == [13, 13]
    assert dataset.camera_names == ["front", "wrist"]
    assert dataset.fps == 30
    assert dataset.state_names == dataset.action_names == tuple(joints)
    stats = dataset.norm_stats["so101"]
    assert stats["action"]["mask"] == [True] * 6
    assert stats["proprio"]["max"] == numbers.max(axis=0).tolist()
    masked = dataset_class.from_lerobot(
        tmp_path / "so101", ["front", "wrist"], chunk_size=5, action_mask=[True] * 5 + [False]
    )
    assert masked.norm_stats["so101"]["action"]["mask"] == [True] * 5 + [False]


def test_datasets_without_names_and_rate_have_none():
    dataset = VLAAdapterDataset.from_rlds(RLDS, robot="libero")
    assert (dataset.fps, dataset.state_names, dataset.action_names) == (None, None, None)


# Arguments


@BOTH
def test_arguments_that_do_not_exist_are_refused_with_those_that_do(dataset_class):
    with pytest.raises(TypeError, match="which has no stat_column; it has action_column, action_mask, .*state_column"):
        dataset_class.from_lerobot(DEMOS / "lerobot_v21_video", robot="libero", stat_column="x")
    with pytest.raises(TypeError, match="has format 'rlds', which has no chunk_column"):
        load_demonstrations(RLDS, streaming=dataset_class is VLAAdapterStreamingDataset, chunk_column="x")


# Files and processes


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
@pytest.mark.parametrize("umask", [0o022, 0o002])
def test_written_files_have_the_permissions_that_the_user_chose(umask, tmp_path, cache):
    old = os.umask(umask)
    try:
        dataset_statistics(DEMOS / "lerobot_v21_video", robot="libero", output=tmp_path / "stats.json")
        dataset_statistics(RLDS, robot="libero")
    finally:
        os.umask(old)
    written = [tmp_path / "stats.json", *(path for path in cache.rglob("*") if path.is_file())]
    assert {path.parent.name for path in written} == {tmp_path.name, "norm_stats", "rlds_index"}
    assert {stat.S_IMODE(path.stat().st_mode) for path in written} == {0o666 & ~umask}


UNFINISHED = """
import sys
import datasets
from vla_adapter_hf.data import VLAAdapterStreamingDataset as Stream

images, videos, rlds = sys.argv[1:]
path = images + "/data/chunk-000/file-000.parquet"
rows = datasets.load_dataset("parquet", data_files=path, split="train", streaming=True)
streams = [
    Stream.from_lerobot(images, robot="libero"),
    Stream.from_lerobot(videos, robot="libero"),
    Stream.from_rlds(rlds, robot="libero"),
    Stream.from_dataset(rows, robot="libero", instruction="go"),
]
iterators = [iter(stream) for stream in streams]
print(*(next(samples)["frame_index"] for samples in iterators))
"""


def test_iterators_that_are_left_unfinished_are_silent_at_exit():
    paths = [DEMOS / "lerobot_v30_image", DEMOS / "lerobot_v21_video", RLDS]
    command = [sys.executable, "-c", UNFINISHED, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, "0 0 0 0\n"), done.stderr
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
