"""Norm stats by the published rules: equal to the golden ones, exact, cached by content, within bounded memory."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_fixtures import DEMOS, RLDS, copy_of, golden, libero_gripper

from vla_adapter_hf.data import (
    BadEpisodeError,
    VLAAdapterDataset,
    compute_norm_stats,
    dataset_statistics,
    describe_norm_stats,
)
from vla_adapter_hf.data.loading import open_source
from vla_adapter_hf.modeling.normalization_vla_adapter import check_norm_stats


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VLA_ADAPTER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


EXACT = ("min", "max", "q01", "q99")


def assert_equals_golden(stats):
    expected = json.loads((DEMOS / "golden_dataset_statistics.json").read_text())["libero_object_no_noops"]
    for part in ("action", "proprio"):
        assert set(stats[part]) == set(expected[part])
        for name in EXACT:
            assert stats[part][name] == expected[part][name], name
        # The golden mean and std were added up in float32, in the order of the steps.
        for name in ("mean", "std"):
            assert stats[part][name] == pytest.approx(expected[part][name], abs=1e-6)
    assert stats["action"]["mask"] == expected["action"]["mask"] == [True] * 6 + [False]
    assert (stats["num_transitions"], stats["num_trajectories"]) == (226, 4)


@pytest.mark.parametrize("name", ["lerobot_v30_video", "lerobot_v21_video"])
def test_statistics_are_the_published_ones(name):
    stats = dataset_statistics(DEMOS / name, robot="libero")
    assert list(stats) == [name]
    assert_equals_golden(stats[name])
    check_norm_stats(stats, "bounds_q99", action_dim=7, proprio_dim=8)


def test_a_part_of_a_dataset_has_the_statistics_of_the_whole():
    dataset = VLAAdapterDataset.from_lerobot(DEMOS / "lerobot_v21_video", robot="libero", episodes=[2])
    assert_equals_golden(dataset.norm_stats["lerobot_v21_video"])
    train, validation = VLAAdapterDataset.from_lerobot(
        DEMOS / "lerobot_v21_video", robot="libero", unnorm_key="own"
    ).split_by_episode(1)
    assert train.norm_stats == validation.norm_stats
    assert list(train.norm_stats) == ["own"]


def test_quantiles_stored_in_a_v30_dataset_are_not_taken():
    """Its stats.json averages the episodes' quantiles: here that is off by more than 0.1 somewhere."""
    stored = json.loads((DEMOS / "lerobot_v30_video" / "meta" / "stats.json").read_text())["observation.state"]["q01"]
    stats = dataset_statistics(DEMOS / "lerobot_v30_video")["lerobot_v30_video"]["proprio"]
    assert np.abs(np.array(stored) - stats["q01"]).max() > 0.1


def test_statistics_of_rlds_cover_its_two_episodes():
    stats = dataset_statistics(RLDS, robot="libero")["libero_object_no_noops"]
    expected = golden("rlds")
    actions = np.concatenate([libero_gripper(expected[f"ep{episode}_action"]) for episode in (0, 1)])
    for name, value in (("q01", 0.01), ("q99", 0.99)):
        assert stats["action"][name] == np.quantile(actions.astype(np.float64), value, axis=0).tolist()
    assert stats["num_transitions"] == len(actions) == 111


def test_statistics_are_of_the_population_and_quantiles_linear():
    states = np.array([[1.0], [2.0], [4.0], [9.0]], np.float32)
    from vla_adapter_hf.data.statistics import column_statistics

    stats = column_statistics(states)
    assert stats["mean"] == [4.0]
    assert stats["std"][0] == pytest.approx(np.sqrt(9.5))
    assert stats["q01"][0] == pytest.approx(1.03)
    assert stats["q99"][0] == pytest.approx(8.85)


def test_without_a_robot_nothing_is_converted_and_everything_is_normalised():
    stats = dataset_statistics(DEMOS / "lerobot_v21_video")["lerobot_v21_video"]["action"]
    assert stats["min"][6] == -1.0
    assert stats["mask"] == [True] * 7


def test_masks_are_checked():
    dataset = VLAAdapterDataset.from_lerobot(DEMOS / "lerobot_v21_video", robot="libero")
    stats = compute_norm_stats(dataset, action_mask=[False] * 7)
    assert stats["lerobot_v21_video"]["action"]["mask"] == [False] * 7
    with pytest.raises(ValueError, match="action_mask has 6 entries, the actions have 7 dimensions"):
        compute_norm_stats(dataset, action_mask=[True] * 6)
    with pytest.raises(TypeError, match="expected booleans"):
        compute_norm_stats(dataset, action_mask=[1] * 7)
    with pytest.raises(ValueError, match="action_mask has 8 entries"):
        VLAAdapterDataset.from_lerobot(DEMOS / "lerobot_v21_video", robot="libero", action_mask=[True] * 8)


def test_the_cache_is_found_again_and_follows_the_content(tmp_path, cache):
    folder = copy_of("lerobot_v21_video", tmp_path)
    first = dataset_statistics(folder, robot="libero")
    stored = list((cache / "norm_stats").iterdir())
    assert len(stored) == 1

    # Found again, by a copy elsewhere too: a marked entry comes back.
    entry = json.loads(stored[0].read_text())
    stored[0].write_text(json.dumps({**entry, "num_transitions": -5}))
    shutil.copytree(folder, tmp_path / "moved")
    assert dataset_statistics(tmp_path / "moved", robot="libero")["moved"]["num_transitions"] == -5
    assert dataset_statistics(folder, robot="libero", use_cache=False) == first

    # Another convention is another entry, and so is another number in a file.
    assert dataset_statistics(folder)["lerobot_v21_video"]["num_transitions"] == 226
    path = folder / "data" / "chunk-000" / "episode_000002.parquet"
    table = pq.read_table(path)
    actions = np.stack(table.column("action").to_numpy())
    actions[17, 2] = 5.0
    column = pa.FixedSizeListArray.from_arrays(pa.array(actions.reshape(-1)), 7)
    pq.write_table(table.set_column(table.schema.get_field_index("action"), "action", column), path)
    changed = dataset_statistics(folder, robot="libero")["lerobot_v21_video"]
    assert changed["num_transitions"] == 226
    assert changed["action"]["max"][2] == 5.0

    # An entry that cannot be read is made again.
    for entry_path in (cache / "norm_stats").iterdir():
        entry_path.write_text("{")
    assert dataset_statistics(folder, robot="libero")["lerobot_v21_video"] == changed


def test_other_columns_of_the_same_content_have_their_own_place_in_the_cache():
    """Once the statistics of swapped columns were those of the columns read first."""
    folder = DEMOS / "lerobot_v30_image"
    columns = {"state_column": "action", "action_column": "observation.state"}
    (usual,), (swapped,) = (dataset_statistics(folder, **more).values() for more in ({}, columns))
    assert len(usual["action"]["mean"]) == len(swapped["proprio"]["mean"]) == 7
    assert usual["action"]["max"] == swapped["proprio"]["max"] and usual["proprio"]["max"] == swapped["action"]["max"]


def test_the_index_of_rlds_is_cached_and_made_again_when_broken(cache):
    expected = VLAAdapterDataset.from_rlds(RLDS, robot="libero")[5]
    index = next((cache / "rlds_index").iterdir())
    content = index.read_bytes()
    shard = next(RLDS.glob("*.tfrecord*"))
    source = VLAAdapterDataset.from_rlds(RLDS, robot="libero").source
    assert source.table.states.shape == (111, 8)
    index.write_bytes(content[:1000])
    again = VLAAdapterDataset.from_rlds(RLDS, robot="libero")[5]
    assert np.array_equal(again["images"][0], expected["images"][0])
    assert np.array_equal(again["actions"], expected["actions"])
    assert shard.stat().st_size == 1750921
    assert index.read_bytes() == content


def test_bad_episodes_stop_it_or_are_left_out_and_nothing_of_that_is_cached(tmp_path, cache):
    folder = copy_of("lerobot_v21_video", tmp_path)
    (folder / "data" / "chunk-000" / "episode_000001.parquet").unlink()
    with pytest.raises(BadEpisodeError, match="episode 1: data/chunk-000/episode_000001.parquet does not exist"):
        dataset_statistics(folder, robot="libero")
    stats = dataset_statistics(folder, robot="libero", on_bad_episode="skip")["lerobot_v21_video"]
    assert (stats["num_transitions"], stats["num_trajectories"]) == (226 - 58, 3)
    assert not (cache / "norm_stats").exists()


def test_episodes_without_instruction_or_video_still_count(tmp_path):
    folder = copy_of("lerobot_v21_video", tmp_path)
    (folder / "meta" / "tasks.jsonl").write_text('{"task_index": 0, "task": "pick up the alphabet soup"}\n')
    (folder / "videos" / "chunk-000" / "observation.images.image" / "episode_000000.mp4").unlink()
    dataset = VLAAdapterDataset.from_lerobot(folder, robot="libero", on_bad_episode="skip")
    assert dataset.episode_indices == [1]
    assert dataset.num_skipped_episodes == 3
    assert_equals_golden(dataset.norm_stats["lerobot_v21_video"])


def test_output_is_written_and_described(tmp_path):
    path = tmp_path / "deep" / "norm_stats.json"
    stats = dataset_statistics(DEMOS / "lerobot_v21_video", robot="libero", unnorm_key="mine", output=path)
    assert json.loads(path.read_text()) == stats
    assert [entry.name for entry in path.parent.iterdir()] == ["norm_stats.json"]
    text = describe_norm_stats(stats)
    assert "mine: 226 transitions in 4 trajectories" in text
    assert len(text.splitlines()) == 2 + 7 + 8
    assert [line for line in text.splitlines() if line.startswith("action[6]")][0].endswith("not normalised")


def test_no_camera_needs_to_be_chosen_for_statistics():
    assert open_source(DEMOS / "lerobot_v30_video").table.actions.shape == (226, 7)


@pytest.mark.parametrize("option", [{"episodes": [0]}, {"chunk_size": 8}])
def test_options_that_would_not_change_the_statistics_are_refused(option):
    with pytest.raises(TypeError, match=f"{next(iter(option))} would change nothing.*those of all its episodes"):
        dataset_statistics(DEMOS / "lerobot_v30_video", **option)


MEASURE = """
import json, re, sys
import vla_adapter_hf.data

def memory(name):
    with open("/proc/self/status") as file:
        return int(re.search(name + r":\\s+(\\d+) kB", file.read())[1]) / 1024

before = memory("VmRSS")
stats = vla_adapter_hf.data.dataset_statistics(sys.argv[1], progress=True)
print(json.dumps({"grown": memory("VmHWM") - before, "stats": stats}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the process's peak memory from /proc")
def test_a_million_steps_stay_within_300_mb_and_are_exact(tmp_path, cache):
    steps, episodes = 1_000_000, 5000
    folder = tmp_path / "million"
    (folder / "meta" / "episodes" / "chunk-000").mkdir(parents=True)
    (folder / "data" / "chunk-000").mkdir(parents=True)
    rng = np.random.default_rng(0)
    states = rng.standard_normal((steps, 8), dtype=np.float32)
    actions = rng.random((steps, 7), dtype=np.float32) + np.float32(1000)  # a mean that float32 sums would lose
    length = steps // episodes
    table = pa.table(
        {
            "observation.state": pa.FixedSizeListArray.from_arrays(pa.array(states.reshape(-1)), 8),
            "action": pa.FixedSizeListArray.from_arrays(pa.array(actions.reshape(-1)), 7),
            "episode_index": np.repeat(np.arange(episodes), length),
            "frame_index": np.tile(np.arange(length), episodes),
            "task_index": np.zeros(steps, np.int64),
        }
    )
    pq.write_table(table, folder / "data" / "chunk-000" / "file-000.parquet")
    zeros = np.zeros(episodes, np.int64)
    described = {
        "episode_index": np.arange(episodes),
        "length": np.full(episodes, length),
        "tasks": [["go"]] * episodes,
    }
    places = {"data/chunk_index": zeros, "data/file_index": zeros}
    pq.write_table(pa.table({**described, **places}), folder / "meta" / "episodes" / "chunk-000" / "file-000.parquet")
    pq.write_table(pa.table({"task_index": [0], "task": ["go"]}), folder / "meta" / "tasks.parquet")
    info = json.loads((DEMOS / "lerobot_v30_image" / "meta" / "info.json").read_text())
    (folder / "meta" / "info.json").write_text(json.dumps({**info, "splits": {}}))

    done = subprocess.run([sys.executable, "-c", MEASURE, folder], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["grown"] < 300, f"{result['grown']:.0f} MB"
    print(f"{result['grown']:.0f} MB above the process's size after imports")
    assert "Statistics of million" in done.stderr  # the progress bar
    stats = result["stats"]["million"]
    assert stats["num_transitions"] == steps and stats["num_trajectories"] == episodes
    for part, values in (("proprio", states), ("action", actions)):
        for name, quantile in (("q01", 0.01), ("q99", 0.99)):
            expected = [
                np.quantile(values[:, column].astype(np.float64), quantile) for column in range(values.shape[1])
            ]
            assert stats[part][name] == expected
        assert stats[part]["min"] == values.min(axis=0).tolist()
        assert stats[part]["mean"] == pytest.approx(values.mean(axis=0, dtype=np.float64), rel=1e-7)
        assert stats[part]["std"] == pytest.approx(values.std(axis=0, dtype=np.float64), rel=1e-6)
