"""Windows, splits, columns and bad episodes of `VLAAdapterDataset`."""

import errno
import json
import os
import shutil
from contextlib import contextmanager, nullcontext

import datasets
import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_fixtures import DEMOS, RLDS, TASKS, copy_of, edit_info
from huggingface_hub.errors import LocalEntryNotFoundError
from tfrecord_writer import encode_example, write_records

from vla_adapter_hf.data import BadEpisodeError, VLAAdapterDataset, VLAAdapterStreamingDataset, load_demonstrations
from vla_adapter_hf.data.chunks import WindowIndex, action_chunk
from vla_adapter_hf.data.columns import Columns
from vla_adapter_hf.data.episodes import BadEpisode
from vla_adapter_hf.data.lerobot.reader import LeRobotReader
from vla_adapter_hf.data.opening import detect_format, random_access


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VLA_ADAPTER_CACHE", str(tmp_path / "cache"))


def rows(lengths=(5, 3), state_dim=2, action_dim=3, **columns):
    """A plain dataset whose numbers tell where they are from: action = 100 episode + step."""
    episode = np.repeat(np.arange(len(lengths)), lengths)
    step = np.concatenate([np.arange(length) for length in lengths])
    number = (100 * episode + step)[:, None].astype(np.float32)
    content = {
        "front": [np.full((2, 2, 3), e, np.uint8) for e in episode],
        "state": np.repeat(number + 0.5, state_dim, 1).tolist(),
        "action": np.repeat(number, action_dim, 1).tolist(),
        "episode_index": episode.tolist(),
        "task": [f"task {e}" for e in episode],
        **columns,
    }
    features = datasets.Features(
        {name: datasets.Dataset.from_dict({name: values}).features[name] for name, values in content.items()}
        | {"front": datasets.Array3D((2, 2, 3), "uint8")}
    )
    return datasets.Dataset.from_dict(content, features=features)


def test_only_chunks_that_fit_are_samples_by_default():
    dataset = VLAAdapterDataset.from_dataset(rows(), chunk_size=3)
    assert len(dataset) == (5 - 3 + 1) + (3 - 3 + 1)
    where = [(sample["episode_index"], sample["frame_index"]) for sample in dataset]
    assert where == [(0, 0), (0, 1), (0, 2), (1, 0)]
    assert dataset[2]["actions"][:, 0].tolist() == [2, 3, 4]
    assert dataset[3]["actions"][:, 0].tolist() == [100, 101, 102]
    assert dataset[3]["state"].tolist() == [100.5, 100.5]
    assert not any(sample["action_is_pad"].any() for sample in dataset)


def test_padded_chunks_repeat_the_last_action_and_say_so():
    dataset = VLAAdapterDataset.from_dataset(rows(), chunk_size=3, pad_chunks=True)
    assert len(dataset) == 8
    assert dataset[4]["actions"][:, 1].tolist() == [4, 4, 4]
    assert dataset[4]["action_is_pad"].tolist() == [False, True, True]
    assert dataset[6]["actions"][:, 1].tolist() == [101, 102, 102]
    assert dataset[6]["action_is_pad"].tolist() == [False, False, True]


def test_a_sample_has_the_documented_fields_and_types():
    sample = VLAAdapterDataset.from_dataset(rows(), chunk_size=2, unnorm_key="mine")[0]
    assert set(sample) == {
        "images", "images_are_prepared", "text", "state", "actions", "action_is_pad", "unnorm_key", "episode_index",
            "frame_index"
    }  # fmt: skip
    assert isinstance(sample["images"], list) and sample["images"][0].dtype == np.uint8
    assert (sample["state"].dtype, sample["state"].shape) == (np.float32, (2,))
    assert (sample["actions"].dtype, sample["actions"].shape) == (np.float32, (2, 3))
    assert (sample["action_is_pad"].dtype, sample["action_is_pad"].shape) == (bool, (2,))
    assert (sample["text"], sample["unnorm_key"]) == ("task 0", "mine")


def test_writing_into_a_sample_does_not_reach_the_dataset():
    dataset = VLAAdapterDataset.from_dataset(rows(), chunk_size=2)
    sample = dataset[0]
    sample["actions"][:] = 7
    sample["state"][:] = 7
    assert dataset[0]["actions"][0, 0] == 0 and dataset[0]["state"][0] == 0.5


def test_indices_beyond_the_end_are_refused_and_negative_ones_count_from_it():
    dataset = VLAAdapterDataset.from_dataset(rows(), chunk_size=3)
    assert dataset[-1]["episode_index"] == 1
    for index in (4, -5):
        with pytest.raises(IndexError, match=f"sample {index} of 4"):
            dataset[index]


def test_every_window_is_located_once():
    lengths = np.array([4, 0, 1, 7, 2])
    for pad, expected in ((False, [(0, 0), (0, 1), (3, 0), (3, 1), (3, 2), (3, 3), (3, 4)]), (True, None)):
        windows = WindowIndex(lengths, 3, pad)
        found = [windows.locate(index) for index in range(len(windows))]
        assert found == (expected or [(e, t) for e, length in enumerate(lengths) for t in range(length)])
    actions, is_pad = action_chunk(np.arange(4.0)[:, None], 3, 2)
    assert actions[:, 0].tolist() == [3, 3] and is_pad.tolist() == [False, True]


def test_the_chunk_length_is_the_robots_unless_given():
    assert VLAAdapterDataset.from_lerobot(DEMOS / "lerobot_v21_video", robot="libero")[0]["actions"].shape == (8, 7)
    assert VLAAdapterDataset.from_dataset(rows(lengths=(12,)))[0]["actions"].shape == (8, 3)
    with pytest.raises(ValueError, match="chunk_size=0"):
        VLAAdapterDataset.from_dataset(rows(), chunk_size=0)


# Splits


def test_train_and_validation_share_no_episode_and_leave_none_out():
    dataset = VLAAdapterDataset.from_dataset(rows(lengths=(4,) * 10), chunk_size=2)
    train, validation = dataset.split_by_episode(0.3, seed=1)
    assert len(validation.episode_indices) == 3
    assert sorted(train.episode_indices + validation.episode_indices) == list(range(10))
    assert {sample["episode_index"] for sample in validation} == set(validation.episode_indices)
    assert len(train) == 21 and len(validation) == 9
    again = dataset.split_by_episode(3, seed=1)[1]
    assert again.episode_indices == validation.episode_indices
    assert dataset.split_by_episode(3, seed=2)[1].episode_indices != validation.episode_indices
    assert dataset.split_by_episode([7, 2])[1].episode_indices == [2, 7]


@pytest.mark.parametrize("validation", [0, 2, 1.0, 0.1])
def test_a_split_with_an_empty_part_is_refused(validation):
    dataset = VLAAdapterDataset.from_dataset(rows(), chunk_size=2)
    with pytest.raises(ValueError, match="both parts need at least one"):
        dataset.split_by_episode(validation)


def test_episodes_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match="episode 9 does not exist; there are 4, numbered 0 to 3"):
        VLAAdapterDataset.from_lerobot(DEMOS / "lerobot_v21_video", robot="libero", episodes=[1, 9])
    dataset = VLAAdapterDataset.from_dataset(rows(), chunk_size=2)
    with pytest.raises(ValueError, match="episode 5 is not among 2 episodes"):
        dataset.select_episodes([5])


def test_a_datasets_own_splits_are_used(tmp_path):
    folder = copy_of("lerobot_v21_video", tmp_path)
    edit_info(folder, splits={"train": "0:3", "val": "3:4"})
    assert VLAAdapterDataset.from_lerobot(folder, robot="libero", split="val").episode_indices == [3]
    with pytest.raises(ValueError, match="split='test' does not exist; splits in meta/info.json: train, val"):
        VLAAdapterDataset.from_lerobot(folder, robot="libero", split="test")
    with pytest.raises(ValueError, match="split='val' does not exist; splits that do: train"):
        VLAAdapterDataset.from_rlds(RLDS, robot="libero", split="val")


# Columns


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"cameras": ["front"]},
            "camera 'front' does not exist; cameras that exist: observation.images.image, observ",
        ),
        ({"cameras": None}, "there are 2 cameras .*their order matters"),
        ({"cameras": []}, "cameras is empty"),
        ({"cameras": ["image", "observation.images.image"]}, "names the same camera twice"),
        (
            {"cameras": ["image"], "state_column": "joints"},
            "state_column='joints' is not a column; columns that exist",
        ),
        (
            {"cameras": ["image"], "action_column": "command"},
            "action_column='command' is not a column.*action, timestamp",
        ),
    ],
)
def test_missing_and_ambiguous_columns_are_named_with_those_that_exist(arguments, message):
    with pytest.raises(ValueError, match=message):
        VLAAdapterDataset.from_lerobot(DEMOS / "lerobot_v21_video", **arguments)


def test_cameras_as_one_string_are_refused():
    with pytest.raises(TypeError, match=r"cameras='image' is a string; expected a list.*\['image'\]"):
        VLAAdapterDataset.from_lerobot(DEMOS / "lerobot_v21_video", cameras="image")


def test_two_state_columns_are_ambiguous_until_one_is_given():
    values = rows().add_column("proprio", [[0.25]] * 8)
    with pytest.raises(ValueError, match="the state could be any of state, proprio; give state_column=<full"):
        VLAAdapterDataset.from_dataset(values, chunk_size=2)
    dataset = VLAAdapterDataset.from_dataset(values, chunk_size=2, state_column="proprio")
    assert dataset[0]["state"].tolist() == [0.25]


def test_a_plain_dataset_needs_episodes_and_instructions():
    with pytest.raises(ValueError, match="no column for the episode was found.*Give episode_column="):
        VLAAdapterDataset.from_dataset(rows().remove_columns("episode_index"), chunk_size=2)
    with pytest.raises(ValueError, match="no column for the instruction was found"):
        VLAAdapterDataset.from_dataset(rows().remove_columns("task"), chunk_size=2)
    with pytest.raises(TypeError, match="choose one of train"):
        VLAAdapterDataset.from_dataset(datasets.DatasetDict(train=rows()), chunk_size=2)


def test_wrong_sizes_for_the_robot_are_refused():
    with pytest.raises(ValueError, match="dataset dataset: state has 2 values, robot 'libero' expects 8"):
        VLAAdapterDataset.from_dataset(rows(), cameras=["front"], robot="libero")


def test_unknown_versions_are_refused(tmp_path):
    folder = copy_of("lerobot_v21_video", tmp_path)
    edit_info(folder, codebase_version="v1.6")
    with pytest.raises(ValueError, match="codebase_version is 'v1.6'; this package reads v2.0, v2.1 and v3.0"):
        VLAAdapterDataset.from_lerobot(folder, robot="libero")
    (folder / "meta" / "info.json").unlink()
    with pytest.raises(ValueError, match="a LeRobot dataset has a meta/info.json"):
        VLAAdapterDataset.from_lerobot(folder, robot="libero")


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("lerobot_v21_video", "meta/episodes.jsonl"),
        ("lerobot_v21_video", "meta/tasks.jsonl"),
        ("lerobot_v30_image", "meta/tasks.parquet"),
        ("lerobot_v30_image", "meta/episodes/chunk-000/file-000.parquet"),
    ],
)
def test_incomplete_metadata_is_refused(name, path, tmp_path):
    folder = copy_of(name, tmp_path)
    (folder / path).unlink()
    with pytest.raises(ValueError, match="the dataset is incomplete, fetch it again"):
        VLAAdapterDataset.from_lerobot(folder, robot="libero")


# Bad episodes


def break_nan(folder):
    change_column(folder, 1, "action", lambda values: values.__setitem__((12, 3), np.nan))
    return "episode 1, frame 12: action\\[3\\] is nan"


def break_short(folder):
    path = folder / "data" / "chunk-000" / "episode_000001.parquet"
    pq.write_table(pq.read_table(path).slice(0, 5), path)
    change_length(folder, 1, 5)
    return "episode 1, frame 4: the episode ends after 5 steps, a chunk needs 8"


def break_empty(folder):
    path = folder / "data" / "chunk-000" / "episode_000001.parquet"
    pq.write_table(pq.read_table(path).slice(0, 0), path)
    change_length(folder, 1, 0)
    return "episode 1: is empty"


def break_length(folder):
    change_length(folder, 1, 60)
    return "episode 1: should have 60 frames by the metadata, the data has 58"


def break_frames(folder):
    path = folder / "data" / "chunk-000" / "episode_000001.parquet"
    table = pq.read_table(path)
    pq.write_table(pa.concat_tables([table.slice(0, 10), table.slice(11)]), path)
    change_length(folder, 1, 57)
    return "episode 1, frame 10: frame_index is 11, expected 10"


def break_size(folder):
    path = folder / "data" / "chunk-000" / "episode_000001.parquet"
    table = pq.read_table(path)
    values = [list(row) for row in table.column("action").to_pylist()]
    values[20] = values[20][:6]
    place = table.schema.get_field_index("action")
    pq.write_table(table.set_column(place, "action", pa.array(values, pa.list_(pa.float32()))), path)
    return "episode 1, frame 20: action has 6 values, expected 7"


def break_data_file(folder):
    (folder / "data" / "chunk-000" / "episode_000001.parquet").unlink()
    return "episode 1: data/chunk-000/episode_000001.parquet does not exist"


def break_video(folder):
    (folder / "videos" / "chunk-000" / "observation.images.wrist_image" / "episode_000001.mp4").unlink()
    return "episode 1, frame 0: video videos/chunk-000/observation.images.wrist_image/episode_000001.mp4 is missing"


def break_task(folder):
    change_column(folder, 1, "task_index", lambda values: values.__setitem__(slice(30, None), 9))
    return "episode 1, frame 30: task_index 9 has no text in meta/tasks"


def change_column(folder, episode, column, change):
    path = folder / "data" / "chunk-000" / f"episode_{episode:06d}.parquet"
    table = pq.read_table(path)
    values = np.array(table.column(column).to_pylist(), np.float32 if column == "action" else np.int64)
    change(values)
    stored = pa.array(values.reshape(-1))
    if values.ndim == 2:
        stored = pa.FixedSizeListArray.from_arrays(stored, values.shape[1])
    pq.write_table(table.set_column(table.schema.get_field_index(column), column, stored), path)


def change_length(folder, episode, length):
    path = folder / "meta" / "episodes.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[episode]["length"] = length
    path.write_text("\n".join(map(json.dumps, lines)))


BREAKS = [
    break_nan,
    break_short,
    break_empty,
    break_length,
    break_frames,
    break_size,
    break_data_file,
    break_video,
    break_task,
]


@pytest.mark.parametrize("damage", BREAKS, ids=lambda damage: damage.__name__.removeprefix("break_"))
def test_bad_episodes_are_named_or_skipped_and_counted(damage, tmp_path, caplog):
    folder = copy_of("lerobot_v21_video", tmp_path)
    message = damage(folder)
    with pytest.raises(BadEpisodeError, match=message):
        VLAAdapterDataset.from_lerobot(folder, robot="libero")
    with caplog.at_level("WARNING"):
        dataset = VLAAdapterDataset.from_lerobot(folder, robot="libero", on_bad_episode="skip")
    assert dataset.episode_indices == [0, 2, 3]
    assert dataset.num_skipped_episodes == 1
    assert "skipped 1 bad episodes" in caplog.text
    # What follows the bad episode is still read from its own place.
    whole = VLAAdapterDataset.from_lerobot(DEMOS / "lerobot_v21_video", robot="libero", episodes=[2])
    sample = next(dataset[i] for i in range(len(dataset)) if dataset.get(i, load_images=False)["episode_index"] == 2)
    assert np.array_equal(sample["actions"], whole[0]["actions"])
    assert np.array_equal(sample["images"][1], whole[0]["images"][1])


def test_bad_episodes_that_are_not_chosen_stand_in_nobodys_way(tmp_path, caplog):
    folder = copy_of("lerobot_v21_video", tmp_path)
    break_nan(folder)
    dataset = VLAAdapterDataset.from_lerobot(folder, robot="libero", episodes=[0, 2])
    assert dataset.num_skipped_episodes == 0
    with caplog.at_level("WARNING"):
        stats = dataset.norm_stats["lerobot_v21_video"]
    assert (stats["num_transitions"], stats["num_trajectories"]) == (226 - 58, 3)
    assert "statistics leave out 1 episodes, the first: episode 1, frame 12" in caplog.text


def test_bad_episodes_in_parquet_files_with_images_leave_the_others_in_place(tmp_path):
    folder = copy_of("lerobot_v30_image", tmp_path)
    path = folder / "data" / "chunk-000" / "file-000.parquet"
    table = pq.read_table(path)
    actions = np.stack(table.column("action").to_numpy())
    actions[3, 0] = np.inf
    column = pa.FixedSizeListArray.from_arrays(pa.array(actions.reshape(-1)), 7)
    pq.write_table(table.set_column(table.schema.get_field_index("action"), "action", column), path)
    dataset = VLAAdapterDataset.from_lerobot(folder, robot="libero", on_bad_episode="skip")
    assert str(dataset.bad_episodes[0]) == "episode 0, frame 3: action[0] is inf"
    whole = VLAAdapterDataset.from_lerobot(DEMOS / "lerobot_v30_image", robot="libero", episodes=[1])
    assert len(dataset) == len(whole) == 13
    assert np.array_equal(dataset[4]["images"][0], whole[4]["images"][0])


def test_a_frame_that_is_missing_or_broken_is_named_when_it_is_read(tmp_path):
    folder = copy_of("lerobot_v30_image", tmp_path)
    path = folder / "data" / "chunk-000" / "file-000.parquet"
    table = pq.read_table(path)
    name = "observation.images.image"
    cells = table.column(name).to_pylist()
    cells[22] = {"bytes": None, "path": None}
    cells[23] = {"bytes": cells[23]["bytes"][:2000], "path": None}
    place = table.schema.get_field_index(name)
    pq.write_table(table.set_column(place, name, pa.array(cells, table.schema.field(name).type)), path)
    dataset = VLAAdapterDataset.from_lerobot(folder, robot="libero", pad_chunks=True)
    with pytest.raises(BadEpisodeError, match="episode 1, frame 2: camera 'observation.images.image' has no image"):
        dataset[22]
    with pytest.raises(BadEpisodeError, match="episode 1, frame 3: .*cannot be decoded"):
        dataset[23]
    assert dataset[24]["images"][0].shape == (128, 128, 3)


def damage_parquet(path, column):
    """Overwrite the header of the first page of a column in the second row group."""
    pq.write_table(pq.read_table(path), path, row_group_size=22, use_dictionary=False)
    metadata = pq.read_metadata(path)
    start = next(
        chunk.data_page_offset
        for chunk in (metadata.row_group(1).column(index) for index in range(metadata.num_columns))
        if chunk.path_in_schema.startswith(column)
    )
    content = bytearray(path.read_bytes())
    content[start : start + 16] = bytes([255] * 16)
    path.write_bytes(bytes(content))


def test_a_parquet_file_with_damaged_frames_is_refused_with_the_first_of_them(tmp_path):
    folder = copy_of("lerobot_v30_image", tmp_path)
    path = folder / "data" / "chunk-000" / "file-000.parquet"
    damage_parquet(path, "observation.images.wrist_image")
    with pytest.raises(BadEpisodeError, match="episode 1, frame 2: file-000.parquet is damaged: .*record that file"):
        VLAAdapterDataset.from_lerobot(folder, robot="libero")
    path.write_bytes((DEMOS / "lerobot_v30_image" / "data" / "chunk-000" / "file-000.parquet").read_bytes())
    VLAAdapterDataset.from_lerobot(folder, robot="libero")


@pytest.mark.parametrize("column", ["action", None], ids=["a page", "the end"])
def test_a_parquet_file_with_damaged_numbers_makes_its_episodes_bad_ones(tmp_path, column):
    folder = copy_of("lerobot_v21_video", tmp_path)
    path = folder / "data" / "chunk-000" / "episode_000001.parquet"
    if column is None:
        path.write_bytes(path.read_bytes()[:-100])
    else:
        damage_parquet(path, column)
    message = "episode 1: data/chunk-000/episode_000001.parquet cannot be read: "
    for reader in (VLAAdapterDataset, VLAAdapterStreamingDataset):
        with pytest.raises(BadEpisodeError, match=message):
            list(reader.from_lerobot(folder, robot="libero"))
        others = reader.from_lerobot(folder, robot="libero", on_bad_episode="skip")
        assert {sample["episode_index"] for sample in others} == {0, 2, 3}
        assert others.num_skipped_episodes == 1
        assert next(iter(others.norm_stats.values()))["num_trajectories"] == 3


@contextmanager
def no_more_open_files():
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_no_episode_is_given_up_when_the_system_opens_no_more_files():
    folder = DEMOS / "lerobot_v30_image"
    reader = LeRobotReader(folder, Columns(cameras=("image", "wrist_image")))
    source = random_access(reader)
    whole = len(list(reader.episodes(0)))  # and everything that is imported late is there
    for read in (lambda: list(reader.episodes(0)), source.content_digest, lambda: source.table):
        with no_more_open_files(), pytest.raises(OSError) as raised:
            read()
        assert raised.value.errno == errno.EMFILE
    assert whole == len(list(reader.episodes(0))) == len(source.table)


def test_a_hub_that_does_not_answer_makes_no_episode_a_bad_one(monkeypatch):
    """The Hub's client has nothing to reach: it raises its own error, one without a number."""
    folder = DEMOS / "lerobot_v30_video"
    dataset = VLAAdapterStreamingDataset.from_lerobot(folder, robot="libero", on_bad_episode="skip")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    reader = dataset.reader
    reader.is_local, reader.repo_id = False, "somebody/something"
    with pytest.raises(OSError, match="offline|Hub"):
        list(dataset)
    assert dataset.num_skipped_episodes == 0
    # The numbers come, the videos do not.
    monkeypatch.setattr(reader, "_open", lambda path: nullcontext(pq.ParquetFile(folder / path)))
    with pytest.raises(LocalEntryNotFoundError):
        list(dataset)


def test_what_a_worker_finds_bad_is_named_by_the_same_error():
    """A DataLoader rebuilds an error of a worker from its text alone."""
    error = BadEpisodeError("dataset d", BadEpisode(3, 7, "has no image"), "Repair it")
    assert str(BadEpisodeError(str(error))) == str(error) == "dataset d: episode 3, frame 7: has no image. Repair it"


def test_a_video_that_is_damaged_or_too_short_is_named_with_its_frame(tmp_path):
    folder = copy_of("lerobot_v21_video", tmp_path)
    videos = folder / "videos" / "chunk-000" / "observation.images.image"
    # Episode 2 has five frames fewer than episode 0.
    (videos / "episode_000000.mp4").write_bytes((videos / "episode_000002.mp4").read_bytes())
    (videos / "episode_000001.mp4").write_bytes(b"no video")
    dataset = VLAAdapterDataset.from_lerobot(folder, robot="libero", pad_chunks=True)
    assert dataset[52]["images"][0].shape == (128, 128, 3)
    with pytest.raises(BadEpisodeError, match="episode 0, frame 53: video .* has no frame 53"):
        dataset[53]
    with pytest.raises(BadEpisodeError, match="episode 1, frame 2: video .*episode_000001.mp4 cannot be opened"):
        dataset[60]
    assert np.array_equal(dataset[0]["images"][0].shape, (128, 128, 3))


def rlds_episode(steps=10, **changed):
    frame = b"\xff\xd8\xff\xe0 not decoded here"
    return encode_example(
        {
            "steps/observation/image": [frame] * steps,
            "steps/observation/state": np.zeros(steps * 8, np.float32),
            "steps/action": np.zeros(steps * 7, np.float32),
            "steps/language_instruction": [b"go"] * steps,
            **changed,
        }
    )


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"steps/action": np.zeros(69, np.float32)}, "steps/action has 69 values, expected 6 for each of 10 steps"),
        ({"steps/action": np.zeros(60, np.float32)}, "action has 6 values, those of the first episode 7"),
        (
            {"steps/observation/image": [b"x"] * 9},
            "episode 1, frame 10: .*state has 80 values, expected 8 for each of 9",
        ),
        ({"steps/language_instruction": [b""] * 10}, "episode 1, frame 0: has no instruction"),
        ({"steps/observation/state": np.full(80, np.nan, np.float32)}, r"episode 1, frame 0: state\[0\] is nan"),
    ],
)
def test_bad_episodes_of_rlds_are_named_or_skipped(changed, message, tmp_path):
    path = tmp_path / "set-train.tfrecord-00000-of-00001"
    write_records(path, [rlds_episode(), rlds_episode(**changed), rlds_episode()])
    with pytest.raises(BadEpisodeError, match=message):
        VLAAdapterDataset.from_rlds(tmp_path)
    dataset = VLAAdapterDataset.from_rlds(tmp_path, on_bad_episode="skip")
    assert dataset.episode_indices == [0, 2]
    assert len(dataset) == 6


def test_a_damaged_record_of_rlds_is_a_bad_episode(tmp_path):
    folder = copy_of("rlds", tmp_path)
    shard = next(folder.glob("*/*/*.tfrecord*"))
    data = bytearray(shard.read_bytes())
    data[500_000] ^= 4
    shard.write_bytes(data)
    with pytest.raises(BadEpisodeError, match="episode 0: .*does not match its checksum"):
        VLAAdapterDataset.from_rlds(folder, robot="libero")
    dataset = VLAAdapterDataset.from_rlds(folder, robot="libero", on_bad_episode="skip")
    assert dataset.episode_indices == [1]
    whole = VLAAdapterDataset.from_rlds(RLDS, robot="libero", episodes=[1])
    assert np.array_equal(dataset[9]["images"][0], whole[9]["images"][0])
    # Repaired under the same checksum, it is read again.
    data[500_000] ^= 4
    shard.write_bytes(data)
    assert VLAAdapterDataset.from_rlds(folder, robot="libero").episode_indices == [0, 1]


def test_missing_shards_and_missing_records_are_refused(tmp_path):
    folder = copy_of("rlds", tmp_path)
    shard = next(folder.glob("*/*/*.tfrecord*"))
    shard.rename(shard.with_name("libero_object_no_noops-train.tfrecord-00001-of-00002"))
    with pytest.raises(ValueError, match="split 'train' lacks 1 of 2 shards, the first is number 0"):
        VLAAdapterDataset.from_rlds(folder, robot="libero")
    with pytest.raises(ValueError, match="holds no RLDS dataset"):
        VLAAdapterDataset.from_rlds(tmp_path / "rlds" / ".." / "..", robot="libero")
    write_records(shard, [rlds_episode()])
    shard.with_name("libero_object_no_noops-train.tfrecord-00001-of-00002").unlink()
    with pytest.raises(ValueError, match="has 1 episodes, dataset_info.json says 2"):
        VLAAdapterDataset.from_rlds(folder, cameras=["image"], robot="libero")


def test_several_rlds_datasets_in_a_folder_need_a_name(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name / "1.0.0").mkdir(parents=True)
        write_records(tmp_path / name / "1.0.0" / f"{name}-train.tfrecord-00000-of-00001", [rlds_episode()])
    with pytest.raises(ValueError, match="several RLDS datasets: one, two; choose one with name="):
        VLAAdapterDataset.from_rlds(tmp_path)
    assert VLAAdapterDataset.from_rlds(tmp_path, name="two").unnorm_key == "two"


def test_bridge_episodes_lose_their_last_step_and_keep_their_frames(tmp_path):
    """The deltas are relabelled from states, and frame t stays frame t."""
    rng = np.random.default_rng(0)
    from PIL import Image

    frames = []
    for number in range(9):
        Image.fromarray(np.full((8, 8, 3), 10 * number, np.uint8)).save(tmp_path / "frame.png")
        frames.append((tmp_path / "frame.png").read_bytes())
    states = rng.random((9, 7)).astype(np.float32)
    record = rlds_episode(
        9,
        **{
            "steps/observation/image": frames,
            "steps/observation/state": states.reshape(-1),
            "steps/action": np.ones(63, np.float32),
        },
    )
    write_records(tmp_path / "bridge_orig-train.tfrecord-00000-of-00001", [record])
    dataset = VLAAdapterDataset.from_rlds(tmp_path, cameras=["image"], robot="bridge")
    assert len(dataset) == 8 - 5 + 1
    assert np.array_equal(dataset[3]["actions"][:, :6], np.diff(states[3:9, :6], axis=0))
    assert [int(dataset[i]["images"][0][0, 0, 0]) for i in range(4)] == [0, 10, 20, 30]


def test_when_nothing_is_left_the_reason_is_given():
    with pytest.raises(
        ValueError, match="there are no samples; 2 episodes, 2 of them skipped, the first because episode 0"
    ):
        VLAAdapterDataset.from_dataset(rows(), chunk_size=6, on_bad_episode="skip")
    with pytest.raises(ValueError, match='on_bad_episode=\'ignore\' is not known; use "error" or "skip"'):
        VLAAdapterDataset.from_dataset(rows(), chunk_size=2, on_bad_episode="ignore")


# By path alone


def test_formats_are_recognised(tmp_path):
    saved = tmp_path / "saved"
    rows().save_to_disk(saved)
    assert detect_format(DEMOS / "lerobot_v30_image") == "lerobot"
    assert detect_format(DEMOS / "rlds") == detect_format(RLDS) == "rlds"
    assert detect_format(saved) == "dataset"
    assert detect_format("me/pick-and-place") == "lerobot"
    with pytest.raises(ValueError, match="is not recognised: no meta/info.json"):
        detect_format(tmp_path)
    assert load_demonstrations(saved, chunk_size=2)[0]["unnorm_key"] == "saved"
    assert load_demonstrations(DEMOS / "rlds", robot="libero")[0]["text"] == TASKS[1]
    assert next(iter(load_demonstrations(DEMOS / "rlds", streaming=True, robot="libero")))["text"] == TASKS[1]
    with pytest.raises(ValueError, match="format='hdf5' is not known"):
        load_demonstrations(saved, format="hdf5")


def test_a_robots_description_shows_what_it_is():
    text = repr(VLAAdapterDataset.from_dataset(rows(), chunk_size=3, unnorm_key="mine"))
    assert "4 samples of 2 episodes" in text and "chunk_size=3" in text and "'mine'" in text


# Unpacked frames


def first_frame(folder) -> np.ndarray:
    dataset = VLAAdapterDataset.from_lerobot(folder, ["image"], 4)
    return dataset[0]["images"][0]


def with_another_first_frame(folder) -> None:
    """Write the file of a copy again, without another time of change."""
    path = folder / "data" / "chunk-000" / "file-000.parquet"
    before = path.stat()
    table = pq.read_table(path)
    name = "observation.images.image"
    cells = table.column(name).to_pylist()
    cells[0] = cells[20]
    column = table.schema.get_field_index(name)
    pq.write_table(table.set_column(column, name, pa.array(cells, table.schema.field(name).type)), path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_frames_of_a_dataset_that_was_replaced_are_not_those_of_the_one_before(tmp_path):
    """`rsync -t` and `cp -p` keep the time of change. Old frames would be paired with new actions."""
    folder = copy_of("lerobot_v30_image", tmp_path)
    before = first_frame(folder)
    with_another_first_frame(folder)
    assert not np.array_equal(first_frame(folder), before)


def test_a_folder_name_is_not_taken_for_a_pattern(tmp_path):
    folder = copy_of("lerobot_v30_image", tmp_path).rename(tmp_path / "run[1]")
    shutil.copytree(folder, tmp_path / "run1")
    with_another_first_frame(tmp_path / "run1")
    assert not np.array_equal(first_frame(folder), first_frame(tmp_path / "run1"))
