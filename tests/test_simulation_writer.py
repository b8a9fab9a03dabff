"""LeRobot v3.0 as this package writes it, compared with files that LeRobot 0.4.4 wrote."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from vla_adapter_hf.recording.episodes import plan_episode, recording_layout
from vla_adapter_hf.recording.lerobot_writer import assemble, save_episode, saved_episodes
from vla_adapter_hf.recording.settings import RecordingSettings
from vla_adapter_hf.utils.frames import encode_image


SETTINGS = RecordingSettings(render_every=4, image_size=16, chunk_size=8)
LAYOUT = recording_layout(SETTINGS)


def record(output: Path, key: str, rows: int, instruction: str, seed: int = 0) -> dict:
    """Saves one synthetic episode and returns what went in."""
    generator = np.random.default_rng([seed, rows])
    frames = {name: generator.integers(0, 256, (rows, 16, 16, 3), dtype=np.uint8) for name in LAYOUT.cameras}
    given = {
        "states": generator.normal(size=(rows, 8)).astype(np.float32),
        "actions": generator.normal(size=(rows, 7)).astype(np.float32),
        "chunks": generator.normal(size=(rows, 8, 7)).astype(np.float32),
        "numbers": {"step": np.arange(rows) * 4},
    }
    encoded = {name: [encode_image(frame) for frame in part] for name, part in frames.items()}
    save_episode(output, key, LAYOUT, instruction, encoded, extra={"task": 0}, **given)
    return {**given, "frames": frames}


@pytest.fixture
def dataset(tmp_path):
    given = [
        record(tmp_path, "00000-00-official", 5, "pick up the milk"),
        record(tmp_path, "00001-00-jitter", 3, "pick up the butter"),
        record(tmp_path, "00002-00-both", 4, "pick up the milk"),
    ]
    assemble(tmp_path, rows_per_file=6)
    return tmp_path, given


def rows_of(folder: Path) -> list[dict]:
    files = sorted((folder / "data").rglob("*.parquet"))
    return [row for file in files for row in pq.read_table(file).to_pylist()]


def test_rows_hold_what_was_recorded_bit_for_bit(dataset):
    folder, given = dataset
    rows = rows_of(folder)
    states = np.concatenate([part["states"] for part in given])
    np.testing.assert_array_equal(np.array([row["observation.state"] for row in rows], dtype=np.float32), states)
    actions = np.concatenate([part["actions"] for part in given])
    np.testing.assert_array_equal(np.array([row["action"] for row in rows], dtype=np.float32), actions)
    chunks = np.concatenate([part["chunks"] for part in given])
    np.testing.assert_array_equal(np.array([row["action_chunk"] for row in rows], dtype=np.float32), chunks)
    for camera in LAYOUT.cameras:
        frames = np.concatenate([part["frames"][camera] for part in given])
        read = [np.asarray(Image.open(io.BytesIO(row[f"observation.images.{camera}"]["bytes"]))) for row in rows]
        np.testing.assert_array_equal(np.stack(read), frames)


def test_indices_are_lerobots(dataset):
    folder, _ = dataset
    rows = rows_of(folder)
    assert [row["index"] for row in rows] == list(range(12))
    assert [row["episode_index"] for row in rows] == [0] * 5 + [1] * 3 + [2] * 4
    assert [row["frame_index"] for row in rows] == [*range(5), *range(3), *range(4)]
    assert [row["task_index"] for row in rows] == [0] * 5 + [1] * 3 + [0] * 4
    assert [row["timestamp"] for row in rows[:5]] == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8])
    episodes = pq.read_table(folder / "meta/episodes/chunk-000/file-000.parquet").to_pylist()
    # Six rows fit a file: the first episode fills one, the other two the next... 3 + 4 rows do not fit together.
    assert [episode["data/file_index"] for episode in episodes] == [0, 1, 2]
    assert [(e["dataset_from_index"], e["dataset_to_index"]) for e in episodes] == [(0, 5), (5, 8), (8, 12)]
    assert [episode["tasks"] for episode in episodes] == [
        ["pick up the milk"],
        ["pick up the butter"],
        ["pick up the milk"],
    ]


def test_layout_is_that_of_files_written_by_lerobot(dataset):
    """Same keys and types as LeRobot's own writer; only `action_chunk` and `step` are ours."""
    folder, _ = dataset
    theirs = Path(__file__).parent / "fixtures" / "demos" / "lerobot_v30_image"
    if not theirs.is_dir():
        pytest.skip("the fixture demos/lerobot_v30_image is not in this checkout")
    ours_info, their_info = (json.loads((root / "meta/info.json").read_text()) for root in (folder, theirs))
    assert set(ours_info) == set(their_info)
    extra = {"action_chunk", "step"}
    assert set(ours_info["features"]) - extra == set(their_info["features"])
    for name, feature in their_info["features"].items():
        assert ours_info["features"][name]["dtype"] == feature["dtype"]
        assert len(ours_info["features"][name]["shape"]) == len(feature["shape"])
    ours, reference = (pq.read_schema(sorted((root / "data").rglob("*.parquet"))[0]) for root in (folder, theirs))
    assert {field.name: str(field.type) for field in ours if field.name not in extra} == {
        field.name: str(field.type) for field in reference
    }
    described = [json.loads(schema.metadata[b"huggingface"])["info"]["features"] for schema in (ours, reference)]
    assert {name: feature for name, feature in described[0].items() if name not in extra} == described[1]
    ours, reference = (pq.read_schema(root / "meta/episodes/chunk-000/file-000.parquet") for root in (folder, theirs))
    # Parquet writers call the items of a list `element` or `item`; that is the only freedom.
    kinds = [
        {field.name: str(field.type).replace("element:", "item:") for field in schema} for schema in (ours, reference)
    ]
    assert {name: kinds[0].get(name) for name in kinds[1]} == kinds[1]
    tasks = [pq.read_table(root / "meta/tasks.parquet").schema for root in (folder, theirs)]
    assert tasks[0].names == tasks[1].names
    stats = json.loads((folder / "meta/stats.json").read_text())
    assert {f"stats/{name}/{kind}" for name in stats for kind in stats[name]} <= set(ours.names)


def test_tasks_have_their_text_in_the_pandas_index(dataset):
    pandas = pytest.importorskip("pandas")
    tasks = pandas.read_parquet(dataset[0] / "meta/tasks.parquet")
    assert tasks.index.tolist() == ["pick up the milk", "pick up the butter"]
    assert tasks["task_index"].tolist() == [0, 1]


def test_statistics_are_exact_over_all_rows(dataset):
    folder, given = dataset
    stats = json.loads((folder / "meta/stats.json").read_text())
    actions = np.concatenate([part["actions"] for part in given]).astype(np.float64)
    np.testing.assert_allclose(stats["action"]["q99"], np.quantile(actions, 0.99, axis=0), rtol=1e-9)
    np.testing.assert_allclose(stats["action"]["std"], actions.std(axis=0), rtol=1e-9)
    pixels = np.concatenate([part["frames"]["image"] for part in given]).reshape(-1, 3) / 255.0
    image = stats["observation.images.image"]
    np.testing.assert_allclose(np.reshape(image["mean"], 3), pixels.mean(axis=0), rtol=1e-9)
    np.testing.assert_allclose(np.reshape(image["std"], 3), pixels.std(axis=0), rtol=1e-9)


def test_datasets_library_decodes_frames_and_chunks(dataset):
    datasets = pytest.importorskip("datasets")
    folder, given = dataset
    files = [str(path) for path in sorted((folder / "data").rglob("*.parquet"))]
    loaded = datasets.Dataset.from_parquet(files, cache_dir=str(folder / "cache"))
    row = loaded[6]
    np.testing.assert_array_equal(np.asarray(row["observation.images.image"]), given[1]["frames"]["image"][1])
    np.testing.assert_allclose(row["action_chunk"], given[1]["chunks"][1], rtol=1e-6)


def test_this_packages_reader_reads_it(dataset):
    from vla_adapter_hf.data.dataset import VLAAdapterDataset

    folder, given = dataset
    read = VLAAdapterDataset.from_lerobot(str(folder), chunk_size=1, robot="libero")
    sample = read[0]
    np.testing.assert_array_equal(np.asarray(sample["images"][0]), given[0]["frames"]["image"][0])
    np.testing.assert_allclose(sample["state"], given[0]["states"][0], rtol=1e-6)
    assert sample["text"] == "pick up the milk"


def test_saving_an_episode_again_replaces_it_and_a_torn_file_is_not_seen(tmp_path):
    record(tmp_path, "00000-00-official", 5, "pick up the milk")
    record(tmp_path, "00000-00-official", 2, "pick up the milk")
    (tmp_path / ".recording" / "00001-00-official.123.part").write_bytes(b"half a file")
    assert saved_episodes(tmp_path) == ["00000-00-official"]
    assert assemble(tmp_path)["total_frames"] == 2


def test_assembling_again_takes_in_later_episodes(tmp_path):
    record(tmp_path, "00001-00-official", 5, "pick up the milk")
    assert assemble(tmp_path)["total_episodes"] == 1
    record(tmp_path, "00000-00-official", 2, "pick up the butter")
    info = assemble(tmp_path)
    assert (info["total_episodes"], info["total_frames"], info["total_tasks"]) == (2, 7, 2)
    lines = (tmp_path / "meta/demonstrations.jsonl").read_text().splitlines()
    assert [json.loads(line)["key"] for line in lines] == ["00000-00-official", "00001-00-official"]


def test_shapes_that_do_not_fit_are_refused_by_name(tmp_path):
    frames = {name: [encode_image(np.zeros((16, 16, 3), np.uint8))] for name in LAYOUT.cameras}
    states, actions = np.zeros((1, 8)), np.zeros((1, 7))
    with pytest.raises(ValueError, match=r"chunks of episode 'x' must have shape \(1, 8, 7\)"):
        save_episode(tmp_path, "x", LAYOUT, "go", frames, states, actions, np.zeros((1, 4, 7)), {"step": np.zeros(1)})
    with pytest.raises(ValueError, match=r"images\['wrist_image'\] of episode 'x' must hold 1 frames, got 0"):
        save_episode(
            tmp_path,
            "x",
            LAYOUT,
            "go",
            {"image": frames["image"]},
            states,
            actions,
            np.zeros((1, 8, 7)),
            {"step": [0]},
        )
    with pytest.raises(ValueError, match=r"step of episode 'x' must have shape \(1,\)"):
        save_episode(tmp_path, "x", LAYOUT, "go", frames, states, actions, np.zeros((1, 8, 7)), {"step": np.zeros(2)})
    with pytest.raises(ValueError, match="holds no saved episode"):
        assemble(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"render_every": 3}, "render_every must divide 20"),
        ({"image_format": "bmp"}, "image_format must be 'png' or 'jpeg'"),
        ({"disturbed": 1.5}, "disturbed is a share of episodes"),
    ],
)
def test_settings_that_cannot_work_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        RecordingSettings(**arguments)


def test_plans_repeat_and_their_shares_are_those_asked_for():
    settings = RecordingSettings(disturbed=0.4, retargeted=0.3)
    objects = ["milk_1", "butter_1", "ketchup_1"]
    plans = [plan_episode("both", task, episode, objects, settings) for task in range(10) for episode in range(60)]
    assert plans == [
        plan_episode("both", task, episode, objects, settings) for task in range(10) for episode in range(60)
    ]
    pushed = np.mean([bool(plan.pushes) for plan in plans])
    retargeted = np.mean([plan.target is not None for plan in plans])
    # Three standard deviations of 600 draws.
    assert pushed == pytest.approx(0.4, abs=0.06)
    assert retargeted == pytest.approx(0.3, abs=0.06)
    assert {plan.target for plan in plans} == {None, "butter_1", "ketchup_1"}
    assert {plan.phase for plan in plans} == {0, 1, 2, 3}
