"""Resuming: from which checkpoint, only as the same run; and what must stop a training before any work."""

import json
import shutil
import sys
from contextlib import nullcontext
from pathlib import Path

import model_fixtures
import pytest
import torch
from training_fixtures import DEMOS, QUIET, command, losses, run_training, write_start
from transformers import AutoConfig, AutoModel, AutoProcessor
from typer.testing import CliRunner

from vla_adapter_cli import app
from vla_adapter_hf import (
    VLAAdapterDataCollator,
    VLAAdapterDataset,
    VLAAdapterTrainer,
    VLAAdapterTrainingArguments,
    open_checkpoint,
)
from vla_adapter_hf.cli.train import parse_arguments
from vla_adapter_hf.data import ImageResize
from vla_adapter_hf.training.checkpoints import find_damage, last_finished_checkpoint
from vla_adapter_hf.training.demonstrations import check_camera_order
from vla_adapter_hf.training.presets import apply_preset
from vla_adapter_hf.training.resuming import check_same_run, find_checkpoint, run_arguments


FROZEN = ("--preset", "frozen", "--augment", "false")
RESUME = ("--resume_from_checkpoint", "true")


@pytest.fixture(scope="module")
def start(tmp_path_factory, processor) -> Path:
    return write_start(tmp_path_factory.mktemp("start"), processor)


@pytest.fixture(scope="module")
def finished(start, tmp_path_factory) -> Path:
    """The output of a training with checkpoints after two steps and four. Not to be written to."""
    output = tmp_path_factory.mktemp("finished") / "out"
    run_training(start, output, *FROZEN, "--learning_rate", "1e-3")
    return output


@pytest.fixture
def copied(finished, tmp_path) -> Path:
    """A copy of it."""
    output = tmp_path / "out"
    return shutil.copytree(finished, output)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


# The same run


@pytest.mark.parametrize(
    "words, message",
    [
        (("--chunk_size", "2"), "chunk_size was not given and is now 2"),
        (("--cameras", "image"), "cameras was image wrist_image and is now image"),
        (("--preset", "full"), "preset was frozen and is now full"),
        (("--action_column", "action"), "action_column was not given and is now action"),
        (("--augment", "true"), "augment was False and is now True"),
        (("--seed", "1"), "seed was 42 and is now 1"),  # other episodes would be held out
    ],
)
def test_a_resumed_run_with_another_model_or_other_samples_is_refused(start, finished, words, message):
    with pytest.raises(ValueError, match=f"checkpoint-4 belongs to another run: .*{message}"):
        run_training(start, finished, *FROZEN, *RESUME, *words)


def test_a_checkpoint_with_other_statistics_is_refused_without_the_kept_arguments_too(start, copied):
    (copied / "_arguments.json").unlink()
    arguments = run_arguments(*parse_arguments(command(start, copied, *FROZEN, *RESUME))[:2], seed=42)
    config = AutoModel.from_pretrained(copied / "checkpoint-4").config
    fields = {"chunk_size": config.chunk_size, "norm_stats": config.norm_stats}
    check_same_run(copied / "checkpoint-4", arguments, fields)
    with pytest.raises(ValueError, match="chunk_size was 4 and is now 2"):
        check_same_run(copied / "checkpoint-4", arguments, {**fields, "chunk_size": 2})
    with pytest.raises(ValueError, match="norm_stats was"):
        check_same_run(copied / "checkpoint-4", arguments, {**fields, "norm_stats": {}})


def test_a_trained_checkpoint_knows_its_tokenizer(finished):
    config, processor = AutoConfig.from_pretrained(finished), AutoProcessor.from_pretrained(finished)
    assert config.tokenizer_fingerprint == processor.tokenizer_fingerprint


def test_schedule_and_pictures_may_change_when_a_run_is_resumed(start, copied):
    more = ("--max_steps", 5, "--picture_episodes", 2, "--learning_rate", "1e-4")
    run_training(start, copied, *FROZEN, *RESUME, *more)
    assert last_finished_checkpoint(copied).name == "checkpoint-5"


def test_cameras_in_another_order_than_the_checkpoints_are_refused(start, tmp_path):
    """The weights know cameras by their position; once they were silently renamed."""
    with pytest.raises(ValueError, match="sees the cameras image, wrist_image in this order"):
        run_training(start, tmp_path / "out", *FROZEN, "--cameras", "wrist_image", "image")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "cameras, refused",
    [
        (["front", "hand"], False),
        (["image", "hand"], False),
        (["wrist_image"], False),
        (["image", "other", "wrist_image"], False),
        (["wrist_image", "other"], True),
        (["wrist_image", "other", "image"], True),
    ],
)
def test_other_cameras_are_fine_and_the_same_ones_must_be_in_place(cameras, refused):
    with pytest.raises(ValueError, match="in this order") if refused else nullcontext():
        check_camera_order(cameras, model_fixtures.tiny_config(cameras=["image", "wrist_image"]), "the checkpoint")


# Damaged checkpoints


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "model.safetensors"])
def test_a_checkpoint_with_a_file_cut_short_is_passed_over(start, copied, name):
    cut_short(copied / "checkpoint-4" / name)
    assert find_damage(copied / "checkpoint-4") == f"{name} is cut short"
    _, _, arguments = parse_arguments(command(start, copied, *FROZEN, *RESUME))
    lines = []
    assert find_checkpoint(arguments, lines.append) == copied / "checkpoint-2"
    assert lines == [f"Passing over checkpoint-4: {name} is cut short", "Resuming from checkpoint-2"]


def test_a_training_goes_on_from_the_checkpoint_before_a_truncated_one_as_if_nothing_had_been(start, finished, copied):
    cut_short(copied / "checkpoint-4" / "optimizer.pt")
    run_training(start, copied, *FROZEN, *RESUME, "--learning_rate", "1e-3")
    assert losses(copied) == pytest.approx(losses(finished), abs=1e-6)


def test_a_damaged_checkpoint_that_is_named_is_refused(start, copied):
    cut_short(copied / "checkpoint-4" / "optimizer.pt")
    checkpoint = copied / "checkpoint-4"
    with pytest.raises(ValueError, match="checkpoint-4 cannot be resumed from: optimizer.pt is cut short"):
        run_training(start, copied, *FROZEN, "--resume_from_checkpoint", checkpoint)


def test_a_folder_with_damaged_checkpoints_only_is_not_overwritten_by_accident(start, copied):
    for step in (2, 4):
        cut_short(copied / f"checkpoint-{step}" / "optimizer.pt")
    with pytest.raises(ValueError, match="holds checkpoint-4. Go on with --resume_from_checkpoint true"):
        run_training(start, copied, *FROZEN)


# The trainer in plain Python


@pytest.fixture
def make_trainer(start, tmp_path):
    dataset = VLAAdapterDataset.from_lerobot(
        DEMOS, ["image", "wrist_image"], 4, robot="libero", image_transform=ImageResize(28, 0.9)
    )

    def make(preset="frozen", source=start, dtype="float32", **arguments) -> VLAAdapterTrainer:
        model = AutoModel.from_pretrained(source, norm_stats=dataset.norm_stats, dtype=dtype)
        settings = {"max_steps": 2, "save_steps": 2, **arguments}
        return VLAAdapterTrainer(
            apply_preset(model, preset, rank=4),
            VLAAdapterTrainingArguments(**QUIET, output_dir=str(tmp_path / "out"), **settings),
            VLAAdapterDataCollator(AutoProcessor.from_pretrained(start), model.config),
            dataset,
        )

    return make


@pytest.mark.parametrize("preset", ["lora", "frozen"])
def test_checkpoints_of_the_trainer_load_with_auto_classes_without_more(make_trainer, tmp_path, preset):
    trainer = make_trainer(preset)
    trainer.train()
    folder = tmp_path / "out" / "checkpoint-2"
    assert AutoModel.from_pretrained(folder).config.norm_stats
    assert AutoProcessor.from_pretrained(folder).image_processor.cameras == ["image", "wrist_image"]
    assert "Fine-tuned, 2 steps." in (folder / "README.md").read_text()


def test_an_adapter_is_resumed_on_the_frozen_weights_that_it_was_trained_on_and_no_others(make_trainer, tmp_path):
    """Such as the merged ones, once a run has been pushed to where it began: the adapter would be added twice."""

    def trainer(**arguments) -> VLAAdapterTrainer:
        return make_trainer("lora", dtype="bfloat16", bf16=True, learning_rate=1e-2, **arguments)

    folder = tmp_path / "out" / "checkpoint-1"
    trainer(max_steps=1, save_steps=1).train()
    trainer(max_steps=1, save_strategy="no").train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match=f"adapter of .*checkpoint-1 was not trained on the weights .* {folder} now"):
        trainer(max_steps=2, source=folder).train(resume_from_checkpoint=True)


def test_a_start_on_the_hub_is_opened_again_at_the_commit_that_the_run_began_with(start, copied, monkeypatch):
    kept = copied / "_arguments.json"
    kept.write_text(json.dumps(json.loads(kept.read_text()) | {"start_commit": "c0ffee"}))
    revisions = []

    def open_at(source, *, revision=None, **options):
        """A folder stands in for the repository."""
        revisions.append(revision)
        checkpoint = open_checkpoint(source, **options)
        checkpoint.files.commit = revision or "newer"
        return checkpoint

    monkeypatch.setattr("vla_adapter_hf.training.train.open_checkpoint", open_at)
    run_training(start, copied, *FROZEN, *RESUME, "--max_steps", 5)
    assert revisions == ["c0ffee", "c0ffee"]  # for its configuration, and for its weights
    assert json.loads(kept.read_text())["start_commit"] == "c0ffee"


def test_a_trainer_without_a_processor_is_refused(start, tmp_path):
    arguments = VLAAdapterTrainingArguments(**QUIET, output_dir=str(tmp_path))
    with pytest.raises(ValueError, match="need the model's processor"):
        VLAAdapterTrainer(AutoModel.from_pretrained(start), arguments)


def test_a_full_disk_is_a_sentence_and_not_an_error_of_torchs_file_writer(make_trainer, tmp_path):
    """Writing to /dev/full fails as on a full disk."""
    checkpoint = tmp_path / "out" / "checkpoint-2"
    checkpoint.mkdir(parents=True)
    (checkpoint / "optimizer.pt").symlink_to("/dev/full")
    with pytest.raises(OSError, match="checkpoint of step 2 could not be written, is the disk full"):
        make_trainer().train()


# Before any work


def test_a_missing_matplotlib_stops_a_training_before_any_work(start, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="Pictures need matplotlib: pip install .* in a clone"):
        run_training(tmp_path / "no checkpoint", tmp_path / "out", *FROZEN)
    assert not (tmp_path / "out").exists()


def test_a_missing_peft_stops_a_training_before_any_work(start, tmp_path, monkeypatch):
    monkeypatch.setattr("vla_adapter_hf.training.presets.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="preset='lora' needs PEFT: pip install .* in a clone"):
        run_training(tmp_path / "no checkpoint", tmp_path / "out", "--preset", "lora")


@pytest.mark.parametrize(
    "words, message",
    [
        (("--dtype", "bf16"), "dtype must be one of float32, bfloat16, float16, got 'bf16'"),
        (("--norm_type", "q99"), "norm_type must be one of bounds_q99, bounds, normal, got 'q99'"),
        (("--jpeg_round_trip", "maybe"), "jpeg_round_trip must be one of auto, yes, no, got 'maybe'"),
        (("--robot", "libreo"), "libreo"),
        (("--chunk_size", "0"), "chunk_size=0; expected a number of at least 1"),
    ],
)
def test_values_that_do_not_exist_are_refused_before_anything_is_read(tmp_path, words, message):
    required = ["--checkpoint", "c", "--dataset", "d", "--output_dir", str(tmp_path)]
    with pytest.raises(ValueError, match=message):
        parse_arguments([*required, *words])


def test_the_readmes_precision_trains_on_a_machine_without_an_accelerator(start, tmp_path):
    if torch.accelerator.is_available():
        pytest.skip("this machine has an accelerator")
    words = command(start, tmp_path / "out", *FROZEN, "--bf16", "true", "--max_steps", 1)
    position = words.index("--use_cpu")
    result = CliRunner().invoke(app, ["train", *words[:position], *words[position + 2 :]])
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("No accelerator found: training on the CPU.\n")
    assert "Done: " in result.stdout


# Looking and listening on the way


def checks(output: Path) -> dict[int, dict[str, float]]:
    """What `check_every` logged, by step."""
    history = json.loads((last_finished_checkpoint(output) / "trainer_state.json").read_text())["log_history"]
    return {
        entry["step"]: {name: value for name, value in entry.items() if name.startswith("check_")}
        for entry in history
        if "check_as_it_is" in entry
    }


def test_a_checked_training_logs_its_errors_keeps_them_when_it_resumes_and_learns_the_same(start, tmp_path):
    words = (*FROZEN, "--learning_rate", "1e-3", "--validation", "1")
    run_training(start, tmp_path / "unchecked", *words)
    words += ("--check_every", "2", "--check_samples", "20")
    run_training(start, tmp_path / "out", *words, "--max_steps", "2", "--lr_scheduler_type", "constant")
    first = checks(tmp_path / "out")
    assert list(first) == [0, 2]
    # One instruction in this episode: no error with another one.
    assert set(first[0]) == {"check_as_it_is", "check_other_frames", "check_mean_action"}
    assert first[2]["check_as_it_is"] < first[0]["check_as_it_is"]
    assert first[2]["check_mean_action"] == first[0]["check_mean_action"]
    run_training(start, tmp_path / "out", *words, *RESUME)
    resumed = checks(tmp_path / "out")
    assert list(resumed) == [0, 2, 4] and {step: resumed[step] for step in first} == first
    assert losses(tmp_path / "out") == losses(tmp_path / "unchecked")
