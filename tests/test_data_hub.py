"""Datasets by Hub id, with huggingface_hub's real client against a small Hub on the loopback."""

import json
import os
import subprocess
import sys

import pytest
from data_fixtures import DEMOS
from hub_server import HubServer, Repository

from vla_adapter_hf.data import VLAAdapterDataset


# Runs in a process of its own, whose client knows only that Hub. Prints what the samples are, one line per dataset.
CLIENT = """
import json, sys, urllib.request, os
from vla_adapter_hf.data import VLAAdapterDataset, VLAAdapterStreamingDataset, dataset_statistics

def mark(name):
    urllib.request.urlopen(os.environ["HF_ENDPOINT"] + "/_mark/" + name)

def show(dataset):
    samples = [dataset[index] for index in range(len(dataset))] if hasattr(dataset, "source") else list(dataset)
    sums = [int(image.sum()) for sample in samples for image in sample["images"]]
    return {"sums": sums, "actions": [sample["actions"].tolist() for sample in samples], "stats": dataset.norm_stats}

results = {}
mark("images")
results["images"] = show(VLAAdapterStreamingDataset.from_lerobot("me/images", ["image"], 20))
mark("videos")
results["videos"] = show(VLAAdapterStreamingDataset.from_lerobot("me/videos", ["image"], 50, revision="v1"))
mark("statistics")
results["statistics"] = dataset_statistics("me/videos")
mark("random")
results["random"] = show(VLAAdapterDataset.from_lerobot("me/videos", ["image"], 50))
mark("missing")
try:
    VLAAdapterStreamingDataset.from_lerobot("me/nothing")
except Exception as error:
    results["missing"] = type(error).__name__
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    server = HubServer(tmp_path_factory.mktemp("uploads"))
    for name, folder in (("images", "lerobot_v30_image"), ("videos", "lerobot_v21_video")):
        repository = server.repositories[f"me/{name}"] = Repository()
        repository.add("main", DEMOS / folder)
        repository.add("v1", DEMOS / folder)
    home = tmp_path_factory.mktemp("home")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_HOME": str(home), "HF_ENDPOINT": server.url, "HF_HUB_DISABLE_XET": "1"}
    environment |= {"VLA_ADAPTER_CACHE": str(home / "ours")}
    done = subprocess.run([sys.executable, "-c", CLIENT], env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    yield server, json.loads(done.stdout.splitlines()[-1])
    server.shutdown()


def expected(folder, chunk_size, cache):
    dataset = VLAAdapterDataset.from_lerobot(DEMOS / folder, ["image"], chunk_size, cache_dir=cache)
    return (
        [int(image.sum()) for sample in dataset for image in sample["images"]],
        [sample["actions"].tolist() for sample in dataset],
        next(iter(dataset.norm_stats.values())),
    )


def received(server, section):
    return {request.path.partition("/resolve/")[2].partition("/")[2] for request in server.section(section)} - {""}


@pytest.mark.parametrize(
    ("section", "folder", "chunk_size"),
    [("images", "lerobot_v30_image", 20), ("videos", "lerobot_v21_video", 50), ("random", "lerobot_v21_video", 50)],
)
def test_samples_and_statistics_from_the_hub_are_those_of_the_files(hub, section, folder, chunk_size, tmp_path):
    sums, actions, stats = expected(folder, chunk_size, tmp_path)
    got = hub[1][section]
    assert (got["sums"], got["actions"]) == (sums, actions)
    assert got["stats"] == {section if section != "random" else "videos": stats}


def test_only_what_is_needed_is_fetched(hub):
    server, results = hub
    of_videos = received(server, "videos")
    assert any(path.startswith("videos/chunk-000/observation.images.image/") for path in of_videos)
    assert not any("wrist_image" in path for path in of_videos)
    assert not any(path.endswith(".mp4") for path in received(server, "statistics"))
    # Parquet files of a stream are read in ranges and do not go to the cache.
    statuses = {
        r.status for r in server.section("images") if r.path.endswith("file-000.parquet") and "data/" in r.path
    }
    assert 206 in statuses
    assert results["statistics"]["videos"]["num_transitions"] == 226


def test_a_repository_that_does_not_exist_is_named_by_the_hubs_own_error(hub):
    assert hub[1]["missing"] == "RepositoryNotFoundError"
