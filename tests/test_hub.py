"""Checkpoints by Hub id, with huggingface_hub's real client against a small Hub on the loopback.

The client, `hub_client.py`, runs in two processes: one with the server, and one offline with the cache of the first.
The tests here check the result of each step, and what the server was asked for.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hub_server import HubServer, Repository
from model_fixtures import FIXTURES, norm_stats, write_published
from safetensors.torch import load_file, save_file


TESTS = Path(__file__).parent
WEIGHTS = ("model.safetensors", "action_head--checkpoint.pt", "proprio_projector--checkpoint.pt")


def write_revision(folder: Path, number: float) -> Path:
    """A published checkpoint whose statistics and last bias tell its revision, with 28 MB that have no effect."""
    write_published(folder, "pro")
    (folder / "dataset_statistics.json").write_text(json.dumps(norm_stats(key=f"data_{number}")))
    tensors = load_file(folder / "model.safetensors")
    tensors["vision_backbone.fused_featurizer.attn_pool.latent"] = torch.zeros(5_000_000)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    action_head = torch.load(folder / "action_head--checkpoint.pt")
    action_head["module.model.fc2.bias"] = torch.full((7,), number)
    action_head["module.model.mlp_resnet_blocks.0.film_gen.0.weight"] = torch.zeros(2_000_000)
    torch.save(action_head, folder / "action_head--checkpoint.pt")
    return folder


def write_base(folder: Path) -> Path:
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    parts = {"model": {"vision_backbone": {}, "llm_backbone": {}, "projector": {"projector.0.bias": torch.ones(2)}}}
    for name in ("latest-checkpoint.pt", "step-000200-epoch-01-loss=0.1.pt"):
        torch.save(parts, folder / "checkpoints" / name)
    return folder


def run_client(mode: str, folder: Path, endpoint: str) -> dict:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_HOME": str(folder / "home"), "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    environment |= {"HF_HUB_DISABLE_XET": "1"}  # the small Hub has no such storage
    if mode == "offline":
        environment |= {"HF_HUB_OFFLINE": "1"}
    results = folder / f"{mode}.json"
    recorded = FIXTURES / "libero_spatial_observation.npz"
    command = [sys.executable, TESTS / "hub_client.py", mode, recorded, results]
    finished = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=400)
    assert finished.returncode == 0, finished.stderr
    return json.loads(results.read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("hub")


@pytest.fixture(scope="module")
def server(folder) -> HubServer:
    server = HubServer(folder / "uploads")
    policy = server.repositories["someone/policy"] = Repository(token="secret")
    policy.add("main", write_revision(folder / "main", 1.0))
    policy.add("abc", write_revision(folder / "abc", 2.0))
    nested = server.repositories["someone/nested"] = Repository()
    shutil.copytree(folder / "abc", folder / "nested" / "inner")
    nested.add("main", folder / "nested")
    server.repositories["someone/looked-at"] = Repository()
    server.repositories["someone/looked-at"].add("main", folder / "abc")
    foreign = server.repositories["someone/foreign"] = Repository()
    (folder / "foreign").mkdir()
    config = {"model_type": "foreign", "auto_map": {"AutoConfig": "configuration_foreign.ForeignConfig"}}
    (folder / "foreign" / "config.json").write_text(json.dumps(config))
    (folder / "foreign" / "configuration_foreign.py").write_text("raise SystemExit('executed')")
    foreign.add("main", folder / "foreign")
    server.repositories["someone/base"] = Repository()
    server.repositories["someone/base"].add("main", write_base(folder / "base"))
    return server


@pytest.fixture(scope="module")
def online(server, folder) -> dict:
    return run_client("online", folder, server.url)


@pytest.fixture(scope="module")
def offline(online, server, folder) -> dict:
    before = len(server.requests)
    results = run_client("offline", folder, server.url)
    assert len(server.requests) == before
    return results


def weights_fetched(server: HubServer, step: str) -> int:
    return sum(request.sent for request in server.section(step) if request.path.endswith(WEIGHTS))


class TestWhatIsFetched:
    """A published checkpoint is 3 GB; what needs only its structure reads headers by range requests."""

    @pytest.mark.parametrize("step", ["processor", "info"])
    def test_structure_alone_needs_no_weights(self, server, online, folder, step):
        assert "Error" not in str(online[step])
        total = sum((folder / "main" / name).stat().st_size for name in WEIGHTS)
        assert total > 30e6
        assert 0 < weights_fetched(server, step) < 1e6

    def test_a_model_fetches_each_file_once(self, server, online):
        whole = [request for request in server.section("default_revision") if request.sent > 1e6]
        assert sorted(request.path.split("/")[-1] for request in whole) == sorted(WEIGHTS[:2])

    def test_a_second_load_of_the_same_revision_fetches_nothing(self, server, online):
        # model.safetensors is the same in both revisions, and stored once.
        assert 8e6 < weights_fetched(server, "auto_model_of_a_revision") < 12e6
        assert weights_fetched(server, "model_class_of_a_revision") == 0

    def test_of_our_layout_too(self, server, online):
        assert online["info_of_our_layout"]["layout"] == "vla-adapter-hf"
        assert 0 < weights_fetched(server, "info_of_our_layout") < 2**18

    def test_no_code_is_fetched_from_a_published_or_foreign_repository(self, server, online):
        assert "model_type 'foreign'; it is not a VLA-Adapter" in online["foreign_repository"]
        fetched = [request.path for request in server.requests if request.path.endswith(".py")]
        assert [path for path in fetched if "/resolve/" in path] == []


class TestOneRevision:
    """Weights and statistics are of the same revision, and of the one that was asked for."""

    @pytest.mark.parametrize(
        ("step", "number"),
        [
            ("default_revision", 1.0),
            ("auto_model_of_a_revision", 2.0),
            ("model_class_of_a_revision", 2.0),
            ("config_of_the_same_revision", 2.0),
            ("subfolder", 2.0),
        ],
    )
    def test_of_the_model(self, online, step, number):
        assert online[step] == {"bias": [number], "stats": [f"data_{number}"]}

    def test_with_overrides(self, online):
        cameras = ["rgb_static", "rgb_gripper"]
        assert online["overrides"] == {"cameras": cameras, "noise": 0.5, "stats": ["data_2.0"]}

    def test_of_the_configuration(self, online):
        assert online["config_of_a_revision"] == ["data_2.0"]
        assert online["auto_config"] == ["data_1.0"]

    def test_a_configuration_of_another_revision_is_refused(self, server, online):
        branches = server.repositories["someone/policy"].branches
        message = online["config_of_another_revision"]
        assert message.startswith(f"ValueError: config was read from commit {branches['main']}")
        assert branches["abc"] in message

    def test_of_the_processor(self, server, online):
        assert online["processor_of_a_revision"] == ["image", "wrist_image"]
        commit = server.repositories["someone/policy"].branches["abc"]
        files = [r.path for r in server.section("processor_of_a_revision") if "/resolve/" in r.path]
        assert {path.split("/")[4] for path in files} <= {commit, "abc"}

    def test_info_names_the_commit(self, server, online):
        assert online["info"]["commit"] == server.repositories["someone/policy"].branches["abc"]


class TestRefusals:
    def test_a_private_repository_without_its_token(self, online):
        assert "neither such a folder nor such a repository on the Hub" in online["without_token"]
        assert "hf auth login" in online["without_token"]

    def test_an_unknown_repository(self, online):
        assert "neither such a folder nor such a repository on the Hub" in online["unknown_repository"]

    def test_an_unknown_revision(self, online):
        assert "someone/policy has no revision 'xyz' on the Hub" in online["unknown_revision"]

    def test_what_is_not_in_the_cache_offline(self, offline):
        assert "not in the cache, and the Hub cannot be reached" in offline["never_downloaded"]


class TestUpload:
    def test_what_was_converted_arrives(self, server, online, folder):
        uploaded = folder / "uploads" / "someone--converted"
        assert sorted(path.name for path in uploaded.iterdir()) == online["upload"]
        for path in uploaded.iterdir():
            assert path.read_bytes() == (folder / "converted" / path.name).read_bytes()

    def test_it_predicts_the_same(self, online):
        actions = np.array(online["prediction"])
        assert actions.shape == (1, 8, 7)
        np.testing.assert_allclose(online["prediction_of_our_layout"], actions, rtol=0, atol=3e-4)


class TestOffline:
    def test_prediction_from_the_cache(self, online, offline):
        for step in ("prediction", "prediction_of_our_layout"):
            np.testing.assert_allclose(offline[step], online[step], rtol=0, atol=3e-4)

    def test_weights_that_were_never_downloaded_are_missing_in_the_cache(self, online, offline):
        assert online["structure_of_the_other"] == ["data_2.0"]
        assert (
            "someone/looked-at (its copy in the cache) has no model.safetensors" in offline["only_headers_were_read"]
        )

    def test_a_revision_from_the_cache(self, offline):
        assert offline["revision"] == {"bias": [2.0], "stats": ["data_2.0"]}
        assert offline["local_files_only"] == ["data_2.0"]


class TestBase:
    def test_the_file_of_a_step_is_chosen_from_the_listing(self, server, online):
        assert online["base"] == ["latest-checkpoint.pt", "step-000200-epoch-01-loss=0.1.pt"]

    def test_offline_from_the_cache(self, offline):
        assert offline["base"] == "latest-checkpoint.pt"
