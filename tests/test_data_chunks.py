"""Datasets that store an action chunk with each row: every row is a sample, and its chunk is the stored one."""

import json

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_fixtures import DEMOS, edit_info, libero_gripper

from vla_adapter_hf.data import BadEpisodeError, VLAAdapterDataset, VLAAdapterStreamingDataset, load_demonstrations
from vla_adapter_hf.data.arrow import column_to_chunks
from vla_adapter_hf.data.loading import dataset_statistics
from vla_adapter_hf.data.reader import index_episodes
from vla_adapter_hf.data.statistics import column_statistics, table_statistics, with_key_and_mask
from vla_adapter_hf.recording.lerobot_writer import LeRobotLayout, assemble, save_episode
from vla_adapter_hf.utils.frames import encode_image


STRIDE = 4  # control steps from a row to the next
ROWS = (5, 2, 4)  # of each episode; the second has fewer rows than a chunk has actions
K, A = 8, 7
CAMERAS = ["image", "wrist_image"]
LAYOUT = LeRobotLayout(
    cameras=tuple(CAMERAS),
    image_size=4,
    state_names=tuple("abcdefgh"),
    action_names=tuple("abcdefg"),
    fps=20 // STRIDE,
    chunk_size=K,
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VLA_ADAPTER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


def write(folder):
    """A recording like the demonstration recorder's; returns the raw chunks (rows, K, A) of all episodes."""
    rng = np.random.default_rng(0)
    chunks = []
    for episode, rows in enumerate(ROWS):
        executed = rng.uniform(-1, 1, (STRIDE * rows + K, A)).astype(np.float32)
        steps = STRIDE * np.arange(rows)
        chunks.append(np.stack([executed[step : step + K] for step in steps]))
        frames = [encode_image(np.full((4, 4, 3), 10 * episode + row, np.uint8)) for row in range(rows)]
        save_episode(
            folder,
            f"{episode:05d}",
            LAYOUT,
            f"task {episode}",
            dict.fromkeys(LAYOUT.cameras, frames),
            states=rng.normal(size=(rows, 8)).astype(np.float32),
            actions=executed[steps],
            chunks=chunks[-1],
            numbers={"step": steps},
        )
    assemble(folder, rows_per_file=7)
    return np.concatenate(chunks)


@pytest.fixture
def recording(tmp_path):
    folder = tmp_path / "recording"
    return folder, write(folder)


def data_files(folder):
    return [str(path) for path in sorted((folder / "data").rglob("*.parquet"))]


def plain_rows(folder, streaming=False):
    return datasets.load_dataset("parquet", data_files=data_files(folder), split="train", streaming=streaming)


def change_chunks(folder, change):
    """Let `change` edit the chunks, as lists, of the first data file, which holds episodes 0 and 1."""
    path = data_files(folder)[0]
    table = pq.read_table(path)
    cells = table.column("action_chunk").to_pylist()
    change(cells)
    field = table.schema.field("action_chunk")
    pq.write_table(table.set_column(table.schema.names.index(field.name), field, pa.array(cells, field.type)), path)


def assert_same(stream, dataset):
    samples = list(stream)
    assert len(samples) == len(dataset) > 0
    for index, sample in enumerate(samples):
        expected = dataset[index]
        assert sample.keys() == expected.keys()
        for name in sample:
            assert np.array_equal(sample[name], expected[name]), (index, name)


# Samples


def test_every_row_is_a_sample_with_its_stored_chunk(recording):
    folder, chunks = recording
    dataset = VLAAdapterDataset.from_lerobot(folder, robot="libero")
    where = [(episode, row) for episode, rows in enumerate(ROWS) for row in range(rows)]
    assert [(sample["episode_index"], sample["frame_index"]) for sample in dataset] == where
    for sample, raw, (episode, row) in zip(dataset, chunks, where, strict=True):
        assert (sample["actions"].dtype, sample["actions"].shape) == (np.float32, (K, A))
        assert np.array_equal(sample["actions"], libero_gripper(raw))
        assert (sample["action_is_pad"].dtype, sample["action_is_pad"].tolist()) == (bool, [False] * K)
        assert sample["images"][0][0, 0, 0] == 10 * episode + row
        assert sample["text"] == f"task {episode}"


def test_the_chunks_are_not_the_actions_of_the_following_rows(recording):
    """What the readers would give without the stored chunks: other actions, fewer samples."""
    folder, chunks = recording
    stored = VLAAdapterDataset.from_lerobot(folder, CAMERAS, chunk_size=2)
    cut = VLAAdapterDataset.from_lerobot(folder, CAMERAS, chunk_size=2, chunk_column=None)
    assert (len(stored), len(cut)) == (sum(ROWS), sum(ROWS) - len(ROWS))
    assert np.array_equal(stored[0]["actions"], chunks[0, :2])
    assert np.array_equal(cut[0]["actions"], chunks[:2, 0])
    assert cut.source.table.chunks is None


@pytest.fixture(params=["lerobot", "plain"])
def both(request, recording):
    """Makes the map-style and the streaming dataset of one reader, with the same arguments."""
    folder, chunks = recording

    def make(**options):
        if request.param == "lerobot":
            arguments = {"path": folder, "unnorm_key": "x", **options}
            return (
                lambda: VLAAdapterDataset.from_lerobot(**arguments),
                lambda: VLAAdapterStreamingDataset.from_lerobot(**arguments),
            )
        options = {"instruction": "go", "unnorm_key": "x", **options}
        return (
            lambda: VLAAdapterDataset.from_dataset(plain_rows(folder), **options),
            lambda: VLAAdapterStreamingDataset.from_dataset(plain_rows(folder, streaming=True), **options),
        )

    return folder, chunks, make


@pytest.mark.parametrize("options", [{}, {"chunk_size": 3}, {"pad_chunks": True}, {"chunk_column": None}], ids=str)
def test_streams_give_the_samples_and_statistics_of_random_access(both, options):
    _, chunks, make = both
    options = {"chunk_size": 2, **options} if "chunk_column" in options else options
    whole, stream = (maker() for maker in make(robot="libero", **options))
    assert_same(stream, whole)
    assert stream.norm_stats == whole.norm_stats
    reader = stream.reader  # as a stream from the Hub computes them
    assert with_key_and_mask(table_statistics(index_episodes(reader), reader), reader, "x", None) == whole.norm_stats
    if "chunk_column" not in options:
        size = options.get("chunk_size", K)
        actions = np.stack([sample["actions"] for sample in stream])
        assert np.array_equal(actions, libero_gripper(chunks[:, :size]))


def test_chunks_of_a_plain_dataset_follow_its_rows_into_their_order(recording):
    folder, chunks = recording
    order = np.random.default_rng(1).permutation(sum(ROWS))
    shuffled = plain_rows(folder).select(order)
    dataset = VLAAdapterDataset.from_dataset(shuffled, cameras=CAMERAS, instruction="go", chunk_size=K)
    first = {0: 0, 1: ROWS[0], 2: ROWS[0] + ROWS[1]}
    for sample in dataset:
        assert np.array_equal(sample["actions"], chunks[first[sample["episode_index"]] + sample["frame_index"]])


def steps_of(dataset):
    return [int(dataset.control_step(index)) for index in range(len(dataset))]


@pytest.mark.parametrize(
    "cells",
    [
        pa.array([f"step {row}" for row in range(7)]),
        pa.array([[row] for row in range(7)], pa.list_(pa.int64())),
        pa.array([row + 0.5 for row in range(7)]),
        pa.array([0, 4, 8, None, 16, 0, 4], pa.int64()),
        pa.nulls(7),
    ],
    ids=["texts", "lists", "fractions", "one missing", "all missing"],
)
def test_a_column_that_is_called_step_but_holds_no_control_steps_is_not_used(recording, cells):
    folder, chunks = recording
    dataset = VLAAdapterDataset.from_lerobot(folder, cameras=CAMERAS)
    assert steps_of(dataset) == [STRIDE * sample["frame_index"] for sample in dataset]
    path = data_files(folder)[0]  # the other files keep theirs
    table = pq.read_table(path)
    pq.write_table(table.set_column(table.schema.get_field_index("step"), "step", cells), path)
    rows = datasets.load_dataset("parquet", data_files=path, split="train")
    for changed in (
        VLAAdapterDataset.from_lerobot(folder, cameras=CAMERAS),
        VLAAdapterDataset.from_dataset(rows, cameras=CAMERAS, instruction="go", chunk_size=K),
    ):
        assert steps_of(changed) == [sample["frame_index"] for sample in changed]
        assert np.array_equal([sample["actions"] for sample in changed], chunks[: len(changed)])


def test_a_smaller_chunk_is_the_beginning_of_the_stored_one(recording):
    folder, chunks = recording
    dataset = VLAAdapterDataset.from_lerobot(folder, robot="libero", chunk_size=3)
    assert len(dataset) == sum(ROWS)
    assert np.array_equal(dataset[6]["actions"], libero_gripper(chunks[6, :3]))
    assert dataset[6]["action_is_pad"].shape == (3,)


def test_without_a_robot_the_chunk_is_all_that_is_stored_as_it_is(tmp_path):
    layout = LeRobotLayout(("front",), 4, ("a",), ("a", "b"), fps=5, chunk_size=11)
    chunk = np.arange(22, dtype=np.float32).reshape(1, 11, 2)
    frame = {"front": [encode_image(np.zeros((4, 4, 3), np.uint8))]}
    save_episode(tmp_path, "0", layout, "go", frame, np.zeros((1, 1)), chunk[:, 0], chunk, {"step": np.zeros(1)})
    assemble(tmp_path)
    for dataset in (VLAAdapterDataset.from_lerobot(tmp_path), VLAAdapterStreamingDataset.from_lerobot(tmp_path)):
        assert dataset.chunk_size == 11
        assert np.array_equal(next(iter(dataset))["actions"], chunk[0])


def test_writing_into_a_sample_does_not_reach_the_dataset(recording):
    dataset = VLAAdapterDataset.from_lerobot(recording[0], robot="libero")
    before = dataset[0]["actions"].copy()
    dataset[0]["actions"][:] = 7
    assert np.array_equal(dataset[0]["actions"], before)


def test_parts_of_a_dataset_keep_the_chunks_of_their_rows(recording):
    folder, chunks = recording
    dataset = VLAAdapterDataset.from_lerobot(folder, CAMERAS)
    _, validation = dataset.split_by_episode([2])
    assert [sample["episode_index"] for sample in validation] == [2] * ROWS[2]
    assert np.array_equal(validation[1]["actions"], chunks[ROWS[0] + ROWS[1] + 1])
    chosen = load_demonstrations(folder, robot="libero", episodes=[1])
    assert np.array_equal(chosen[0]["actions"], libero_gripper(chunks[ROWS[0]]))


def test_a_column_of_another_name_is_used_when_named(recording):
    folder, chunks = recording
    rows = plain_rows(folder).rename_column("action_chunk", "future")
    arguments = {"cameras": CAMERAS, "instruction": "go", "chunk_size": 2}
    named = VLAAdapterDataset.from_dataset(rows, chunk_column="future", **arguments)
    assert np.array_equal(named[0]["actions"], chunks[0, :2])
    assert len(VLAAdapterDataset.from_dataset(rows, **arguments)) == sum(ROWS) - len(ROWS)
    with pytest.raises(ValueError, match="chunk_column='coming' is not a column; columns that exist: .*future"):
        VLAAdapterDataset.from_dataset(rows, chunk_column="coming", **arguments)
    with pytest.raises(ValueError, match="chunk_column='coming' is not a column"):
        VLAAdapterStreamingDataset.from_lerobot(folder, CAMERAS, chunk_column="coming")


def test_a_dataset_without_stored_chunks_has_none():
    dataset = VLAAdapterDataset.from_lerobot(DEMOS / "lerobot_v30_image", robot="libero")
    assert dataset.reader.chunk_shape is None and dataset.source.table.chunks is None


# Statistics


def test_statistics_cover_the_actions_of_all_chunks_and_count_rows(recording):
    folder, chunks = recording
    dataset = VLAAdapterDataset.from_lerobot(folder, robot="libero")
    stats = dataset.norm_stats["recording"]
    expected = column_statistics(libero_gripper(chunks).reshape(-1, A))
    assert {name: stats["action"][name] for name in expected} == expected
    assert stats["action"]["mask"] == [True] * 6 + [False]
    assert (stats["num_transitions"], stats["num_trajectories"]) == (sum(ROWS), len(ROWS))
    assert dataset.num_transitions == sum(ROWS)
    # Every target is within the bounds. The rows' own actions would leave some outside.
    low, high = np.array(stats["action"]["min"]), np.array(stats["action"]["max"])
    targets = np.concatenate([sample["actions"] for sample in dataset])
    assert (targets >= low).all() and (targets <= high).all()
    assert (targets > dataset.source.table.actions.max(axis=0)).any()


def test_statistics_do_not_depend_on_how_much_of_a_chunk_is_used(recording):
    folder, _ = recording
    stats = [
        VLAAdapterDataset.from_lerobot(folder, CAMERAS, size, cache_dir=folder / "c").norm_stats for size in (1, K)
    ]
    assert stats[0] == stats[1]


def test_statistics_of_the_command_line_are_the_datasets(recording):
    folder, _ = recording
    dataset = VLAAdapterDataset.from_lerobot(folder, robot="libero")
    assert dataset_statistics(folder, robot="libero") == dataset.norm_stats
    plain_rows(folder).save_to_disk(folder.parent / "saved")
    saved = dataset_statistics(folder.parent / "saved", robot="libero", unnorm_key="recording")
    assert saved == dataset.norm_stats


def test_cached_statistics_follow_the_chunks_and_the_choice_of_column(recording):
    folder, _ = recording
    first = dataset_statistics(folder, robot="libero")["recording"]
    cut = dataset_statistics(folder, robot="libero", chunk_column=None)["recording"]
    assert cut["action"]["max"] != first["action"]["max"]

    def raise_one(cells):
        cells[3][5][2] = 9.0

    change_chunks(folder, raise_one)
    assert dataset_statistics(folder, robot="libero")["recording"]["action"]["max"][2] == 9.0
    assert dataset_statistics(folder, robot="libero", chunk_column=None)["recording"] == cut


# Refusals


def test_a_chunk_longer_than_the_stored_ones_is_refused_with_both_sizes(both):
    _, _, make = both
    message = "chunk_size=9, but column 'action_chunk' holds 8 actions per row. Give chunk_size=8 or less, or record"
    for maker in make(robot="libero", chunk_size=9):
        with pytest.raises(ValueError, match=message):
            maker()


def test_a_robot_whose_chunks_are_longer_is_named(tmp_path):
    layout = LeRobotLayout(("primary",), 4, ("a",) * 14, ("a",) * 14, fps=5, chunk_size=10)
    frame = {"primary": [encode_image(np.zeros((4, 4, 3), np.uint8))]}
    chunk = np.zeros((1, 10, 14), np.float32)
    save_episode(tmp_path, "0", layout, "go", frame, chunk[:, 0], chunk[:, 0], chunk, {"step": np.zeros(1)})
    assemble(tmp_path)
    with pytest.raises(ValueError, match=r"chunk_size=25 \(robot 'aloha'\), but column 'action_chunk' holds 10"):
        VLAAdapterDataset.from_lerobot(tmp_path, cameras=["primary"], robot="aloha")
    assert len(VLAAdapterDataset.from_lerobot(tmp_path, cameras=["primary"], robot="aloha", chunk_size=10)) == 1


def test_robots_that_rebuild_actions_from_whole_episodes_are_refused(both):
    _, _, make = both
    for maker in make(robot="bridge", cameras=["image"]):
        with pytest.raises(
            ValueError, match="robot 'bridge' rebuilds actions from whole episodes .*chunk_column=None"
        ):
            maker()


def test_chunks_that_are_no_lists_of_actions_are_refused(recording):
    folder, _ = recording
    features = json.loads((folder / "meta" / "info.json").read_text())["features"]
    features["action_chunk"]["shape"] = [K * A]
    edit_info(folder, features=features)
    with pytest.raises(ValueError, match=r"column 'action_chunk' has shape \(56,\); expected \(actions, 7\)"):
        VLAAdapterDataset.from_lerobot(folder, robot="libero")
    with pytest.raises(ValueError, match=r"column 'step' has shape \(\); expected \(actions, 7\)"):
        VLAAdapterDataset.from_dataset(plain_rows(folder), CAMERAS, instruction="go", chunk_column="step")
    with pytest.raises(ValueError, match="'x' has type list<item: double>; expected a list of actions per row"):
        column_to_chunks(pa.array([[1.0]]), "x", (1, 1))


def break_nan(cells):
    cells[6][2][5] = float("nan")


def break_null(cells):
    cells[6] = None


def break_size(cells):
    cells[6] = cells[6][:3]


def break_width(cells):
    cells[6][4] = cells[6][4][:6]


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (break_nan, r"action_chunk\[2, 5\] is nan"),
        (break_null, "action_chunk has 0 actions, expected 8"),
        (break_size, "action_chunk has 3 actions, expected 8"),
        (break_width, "an action of action_chunk has 6 values, expected 7"),
    ],
    ids=["nan", "null", "size", "width"],
)
def test_a_bad_chunk_is_named_with_its_frame_or_its_episode_skipped(recording, damage, reason):
    folder, chunks = recording
    change_chunks(folder, damage)
    message = f"episode 1, frame 1: {reason}"
    arguments = {"path": folder, "robot": "libero"}
    with pytest.raises(BadEpisodeError, match=message):
        VLAAdapterDataset.from_lerobot(**arguments)
    with pytest.raises(BadEpisodeError, match=message):
        list(VLAAdapterStreamingDataset.from_lerobot(**arguments))
    skipping = VLAAdapterDataset.from_lerobot(**arguments, on_bad_episode="skip")
    stream = VLAAdapterStreamingDataset.from_lerobot(**arguments, on_bad_episode="skip")
    assert_same(stream, skipping)
    assert skipping.episode_indices == [0, 2] and stream.num_skipped_episodes == 1
    assert np.array_equal(skipping[ROWS[0]]["actions"], libero_gripper(chunks[ROWS[0] + ROWS[1]]))


@pytest.mark.parametrize("broken", [None, [[1.0, 2.0]], [[1.0, 2.0], [3.0]], [[1.0, 2.0], [3.0, None]]], ids=str)
def test_a_bad_chunk_of_a_plain_dataset_is_named_with_its_frame(broken):
    content = {
        "front": [np.zeros((2, 2, 3), np.uint8)] * 3,
        "state": [[0.0]] * 3,
        "action": [[1.0, 2.0]] * 3,
        "action_chunk": [[[1.0, 2.0], [3.0, 4.0]], [[1.0, 2.0], [3.0, 4.0]], broken],
        "episode_index": [0, 0, 0],
        "task": ["go"] * 3,
    }
    features = datasets.Features(
        {
            "front": datasets.Array3D((2, 2, 3), "uint8"),
            "state": datasets.List(datasets.Value("float32")),
            "action": datasets.List(datasets.Value("float32")),
            "action_chunk": datasets.List(datasets.List(datasets.Value("float32"))),
            "episode_index": datasets.Value("int64"),
            "task": datasets.Value("string"),
        }
    )
    rows = datasets.Dataset.from_dict(content, features=features)
    with pytest.raises(BadEpisodeError, match="episode 0, frame 2: .*action_chunk"):
        VLAAdapterDataset.from_dataset(rows)
    with pytest.raises(BadEpisodeError, match="episode 0, frame 2: .*action_chunk"):
        list(VLAAdapterStreamingDataset.from_dataset(rows.to_iterable_dataset()))


def test_chunks_are_read_alike_from_every_kind_of_list():
    chunks = np.arange(12, dtype=np.float32).reshape(3, 2, 2)
    values = pa.array(chunks.reshape(-1))
    fixed = pa.FixedSizeListArray.from_arrays(pa.FixedSizeListArray.from_arrays(values, 2), 2)
    kinds = [fixed, pa.array(chunks.tolist()), pa.array(chunks.tolist(), pa.large_list(pa.list_(pa.float64(), 2)))]
    for array in kinds:
        for column in (array, pa.chunked_array([array.slice(0, 1), array.slice(1)])):
            read, wrong = column_to_chunks(column, "x", (2, 2))
            assert read.dtype == np.float32 and np.array_equal(read, chunks) and not wrong
        read, _ = column_to_chunks(array.slice(1), "x", (2, 2))
        assert np.array_equal(read, chunks[1:])
