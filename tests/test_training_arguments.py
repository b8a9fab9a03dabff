"""What a YAML file of `vla-adapter train` may say and what it means; several processes; how datasets are read."""

import shutil
from types import SimpleNamespace

import data_fixtures
import datasets
import model_fixtures
import numpy as np
import pytest
import torch

from vla_adapter_hf.cli.train import check_processes, parse_arguments
from vla_adapter_hf.training.arguments import DataArguments
from vla_adapter_hf.training.demonstrations import load_data


@pytest.fixture
def parse(tmp_path):
    """`parse(text)`: the arguments of a file that holds the required ones and `text`."""

    def parse(text: str):
        file = tmp_path / "run.yaml"
        file.write_text(f"checkpoint: c\ndataset: d\noutput_dir: {tmp_path}\n{text}\n")
        return parse_arguments([str(file)])

    return parse


@pytest.mark.parametrize("text, meaning", [("yes", "yes"), ("no", "no"), ("auto", "auto"), ('"no"', "no")])
def test_a_bare_yes_or_no_for_the_jpeg_round_trip_is_yes_or_no(parse, text, meaning):
    _, data, _ = parse(f"jpeg_round_trip: {text}")
    assert data.jpeg_round_trip == meaning


def test_a_check_of_the_training_needs_held_out_episodes_and_samples_of_five(parse):
    with pytest.raises(ValueError, match="check_every=500 needs held-out episodes"):
        parse("check_every: 500")
    with pytest.raises(ValueError, match="check_samples=19; expected a number of at least 20"):
        parse("check_every: 500\nvalidation: 0.1\ncheck_samples: 19")
    assert parse("check_every: 500\nvalidation: 0.1")[1].check_every == 500


def test_an_action_mask_is_a_list_of_true_and_false(parse):
    _, data, _ = parse("action_mask: [true, false]")
    assert data.mask_of_actions() == [True, False]
    assert DataArguments(["data"], action_mask=["True", "false"]).mask_of_actions() == [True, False]
    with pytest.raises(ValueError, match="action_mask must be one of true, false, got '1'"):
        DataArguments(["data"], action_mask=["1"])


def test_a_name_without_a_value_leaves_the_default(parse):
    _, data, training = parse("robot:\ncameras:\nlearning_rate:")
    assert (data.robot, data.cameras, training.learning_rate) == (None, None, 2e-4)


def test_a_mapping_reaches_the_training_arguments_as_one(parse):
    _, _, training = parse("lr_scheduler_type: cosine_with_min_lr\nlr_scheduler_kwargs: {min_lr_rate: 0.1}")
    assert training.lr_scheduler_kwargs == {"min_lr_rate": 0.1}


def test_a_file_that_is_no_yaml_is_refused_with_its_name(parse):
    with pytest.raises(ValueError, match="run.yaml is no YAML: "):
        parse("cameras: [front, wrist")


def test_a_single_dataset_or_camera_needs_no_list(parse):
    _, data, _ = parse("cameras: front")
    assert (data.dataset, data.cameras) == (["d"], ["front"])


def test_processes_that_do_not_find_one_another_are_refused(monkeypatch):
    """Both would train the whole model and write the same folder."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes were started .* groups of 1. .* --use_cpu true"):
        check_processes(SimpleNamespace(world_size=1))


def test_without_an_accelerator_training_uses_the_cpu_whatever_precision_is_asked_for(parse):
    """As README's own command: transformers refuses bf16 on a machine without a GPU unless use_cpu is true."""
    if torch.accelerator.is_available():
        pytest.skip("this machine has an accelerator")
    _, _, training = parse("bf16: true\nuse_cpu: false")
    assert (training.use_cpu, training.bf16) == (True, True)


# How a dataset is read


@pytest.fixture
def read(tmp_path, monkeypatch):
    """`read(dataset, *words)`: the training samples that `vla-adapter train` would take from a dataset."""
    monkeypatch.setenv("VLA_ADAPTER_CACHE", str(tmp_path / "cache"))

    def read(dataset, *words):
        required = ["--checkpoint", "c", "--output_dir", str(tmp_path / "out"), "--dataset", str(dataset)]
        _, data, _ = parse_arguments([*required, "--augment", "false", *map(str, words)])
        return load_data(data, model_fixtures.tiny_config(), seed=0).train

    return read


LEROBOT = data_fixtures.DEMOS / "lerobot_v30_image"


def unusual_rows(folder):
    """Two episodes with names that nobody would find, their rows in disorder, and a stored chunk."""
    rows = [(episode, tick) for tick in (2, 0, 1) for episode in ("a", "b")]
    number = {row: 10 * "ab".index(row[0]) + row[1] for row in rows}
    columns = {
        "eye": [np.full((4, 4, 3), number[row], np.uint8) for row in rows],
        "q": [[float(number[row])] * 8 for row in rows],
        "u": [[float(number[row])] * 7 for row in rows],
        "plan": [[[100.0 + number[row] + k] * 7 for k in range(5)] for row in rows],
        "run": [row[0] for row in rows],
        "tick": [row[1] for row in rows],
        "say": [f"task {row[0]}" for row in rows],
    }
    features = datasets.Features(
        {
            "eye": datasets.Array3D((4, 4, 3), "uint8"),
            "q": datasets.List(datasets.Value("float32")),
            "u": datasets.List(datasets.Value("float32")),
            "plan": datasets.List(datasets.List(datasets.Value("float32"))),
            "run": datasets.Value("string"),
            "tick": datasets.Value("int64"),
            "say": datasets.Value("string"),
        }
    )
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(folder)
    return folder


COLUMNS = ("--state_column", "q", "--action_column", "u", "--episode_column", "run", "--frame_column", "tick")


def test_every_column_of_a_plain_dataset_can_be_named(read, tmp_path):
    folder = unusual_rows(tmp_path / "rows")
    words = (*COLUMNS, "--instruction_column", "say", "--chunk_column", "plan", "--cameras", "eye")
    samples = list(read(folder, *words))
    assert [(sample["text"], sample["state"][0]) for sample in samples] == [
        *(("task a", tick) for tick in (0, 1, 2)),
        *(("task b", 10 + tick) for tick in (0, 1, 2)),
    ]
    assert samples[4]["actions"][:, 0].tolist() == [111.0, 112.0, 113.0, 114.0]


def test_stored_chunks_can_be_left_aside_and_one_instruction_given_for_all(read, tmp_path):
    folder = unusual_rows(tmp_path / "rows")
    (folder / "kept").mkdir()
    rows = datasets.load_from_disk(folder).rename_column("plan", "action_chunk")
    rows.save_to_disk(folder / "kept")
    words = (*COLUMNS, "--cameras", "eye", "--instruction", "tidy up", "--chunk_size", 2)
    stored, cut = (read(folder / "kept", *words, *more) for more in ((), ("--chunk_column", "none")))
    assert (len(stored), len(cut)) == (6, 4)
    assert (stored[0]["actions"][:, 0].tolist(), cut[0]["actions"][:, 0].tolist()) == ([100.0, 101.0], [0.0, 1.0])
    assert {sample["text"] for sample in cut} == {"tidy up"}


def test_the_dataset_in_an_rlds_folder_and_its_split_can_be_named(read, tmp_path):
    folder = tmp_path / "several"
    for name in ("one", "other"):
        shutil.copytree(data_fixtures.RLDS, folder / name / "1.0.0")
    words = ("--robot", "libero", "--name", "other")
    assert len(read(folder, *words)) == len(read(data_fixtures.RLDS, "--robot", "libero"))
    with pytest.raises(ValueError, match="split='test' does not exist"):
        read(folder, *words, "--split", "test")


def test_episodes_can_be_chosen(read):
    assert read(LEROBOT, "--robot", "libero", "--episodes", 1).episode_indices == [1]


def test_the_revision_of_a_hub_dataset_is_passed_on(read, tmp_path, monkeypatch):
    """Into an empty cache that knows of no such repository: the message is the Hub client's."""
    asked = []

    def snapshot_download(repo_id, **options):
        asked.append((repo_id, options["revision"]))
        raise FileNotFoundError("no network")

    monkeypatch.setattr("vla_adapter_hf.data.storage.snapshot_download", snapshot_download)
    with pytest.raises(FileNotFoundError):
        read("me/pick", "--revision", "v2")
    assert asked == [("me/pick", "v2")]


def test_an_argument_of_another_format_is_refused_with_those_that_there_are(read):
    with pytest.raises(TypeError, match="has format 'lerobot', which has no episode_column; it has action_column, "):
        read(LEROBOT, "--robot", "libero", "--episode_column", "run")


def test_an_argument_that_is_nearly_one_is_not_taken_for_it():
    words = ["--checkpoint", "c", "--dataset", "d", "--output_dir", "o", "--use_cpu", "true", "--camera", "image"]
    with pytest.raises(ValueError, match="unknown arguments: --camera image"):
        parse_arguments(words)


def test_datasets_of_one_name_are_told_apart_by_the_folders_around_them(tmp_path):
    folders = [data_fixtures.copy_of("lerobot_v30_image", tmp_path / owner) for owner in ("me", "you")]
    data = DataArguments(dataset=[str(folder) for folder in folders], cameras=["image"], chunk_size=4)
    demonstrations = load_data(data, model_fixtures.tiny_config(), seed=0)
    keys = ["me_lerobot_v30_image", "you_lerobot_v30_image"]
    assert list(demonstrations.norm_stats) == keys
    assert [dataset.unnorm_key for dataset in demonstrations.train.datasets] == keys
