"""What the Trainer brings along, with our model in it: early stopping, compiling, loggers, the Hub; and resuming."""

import json
from concurrent.futures import Future
from pathlib import Path

import data_fixtures
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from huggingface_hub import CommitInfo, HfApi
from huggingface_hub.utils import filter_repo_objects
from torch._dynamo.utils import counters
from training_fixtures import CHUNK, DEMOS, QUIET, losses, run_training, write_start
from transformers import AutoModel, AutoProcessor, EarlyStoppingCallback, Trainer, TrainerState

from vla_adapter_hf import VLAAdapterDataCollator, VLAAdapterDataset, VLAAdapterTrainingArguments
from vla_adapter_hf.data import BadEpisodeError, ImageResize
from vla_adapter_hf.modeling.configuration_vla_adapter import VLAAdapterConfig
from vla_adapter_hf.training.checkpoints import CheckpointCallback, last_finished_checkpoint
from vla_adapter_hf.training.metrics import make_compute_metrics
from vla_adapter_hf.training.presets import apply_preset
from vla_adapter_hf.training.trainer import VLAAdapterTrainer


@pytest.fixture(scope="module")
def start(tmp_path_factory, processor) -> Path:
    return write_start(tmp_path_factory.mktemp("start"), processor)


@pytest.fixture(scope="module")
def dataset() -> VLAAdapterDataset:
    return VLAAdapterDataset.from_lerobot(
        DEMOS, ["image", "wrist_image"], CHUNK, robot="libero", image_transform=ImageResize(28, 0.9)
    )


@pytest.fixture
def make_trainer(start, dataset, tmp_path):
    """`make_trainer(trainer_class, preset, callbacks, **arguments)`: a Trainer on the recorded demonstrations."""

    def make(trainer_class=VLAAdapterTrainer, preset="frozen", callbacks=(), train=None, **arguments):
        torch.manual_seed(0)  # of LoRA's matrices
        model = AutoModel.from_pretrained(start, norm_stats=dataset.norm_stats)
        processor = AutoProcessor.from_pretrained(start)
        train_part, held_out = (train or dataset).split_by_episode([1], validation_transform=ImageResize(28, 0.9))
        settings = {**QUIET, "output_dir": str(tmp_path / "out"), "max_steps": 4, "save_strategy": "no", **arguments}
        if trainer_class is Trainer:
            callbacks = [*callbacks, CheckpointCallback(processor)]
        return trainer_class(
            model=apply_preset(model, preset, rank=4),
            args=VLAAdapterTrainingArguments(**settings),
            data_collator=VLAAdapterDataCollator(processor, model.config),
            train_dataset=train_part,
            eval_dataset=held_out,
            compute_metrics=make_compute_metrics(model.config),
            callbacks=list(callbacks),
        )

    return make


EVERY_STEP = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}


# Early stopping and the best model


def test_a_training_that_gets_no_better_is_stopped_by_transformers_own_callback(make_trainer):
    trainer = make_trainer(
        Trainer,
        callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
        max_steps=20,
        learning_rate=0.0,  # the first evaluation is the best
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        **EVERY_STEP,
    )
    trainer.train()
    assert trainer.state.global_step == 3
    assert trainer.state.best_global_step == 1


def test_the_command_line_stops_early_and_keeps_the_best_model(start, tmp_path):
    """A learning rate that only spoils: the first evaluation stays the best, and its model is what is left."""
    more = ("--preset", "frozen", "--augment", "false", "--validation", 1, "--learning_rate", 0.3, "--max_steps", 20)
    more += ("--eval_strategy", "steps", "--eval_steps", 1, "--save_steps", 1, "--load_best_model_at_end", "true")
    more += ("--early_stopping_patience", 2, "--metric_for_best_model", "l1_first", "--seed", 1)
    run_training(start, tmp_path / "out", *more)
    state = json.loads((last_finished_checkpoint(tmp_path / "out") / "trainer_state.json").read_text())
    history = [entry["eval_l1_first"] for entry in state["log_history"] if "eval_l1_first" in entry]
    best = int(np.argmin(history)) + 1
    assert state["global_step"] == best + 2 < 20
    assert f"{best} steps." in (tmp_path / "out" / "README.md").read_text()
    left, wanted = (
        AutoModel.from_pretrained(tmp_path / "out" / name).state_dict() for name in ("", f"checkpoint-{best}")
    )
    assert all(torch.equal(left[name], wanted[name]) for name in wanted)


def test_a_resumed_training_goes_on_counting_evaluations_without_a_better_model(make_trainer):
    settings = {"early_stopping_patience": 2, "learning_rate": 0.0, **EVERY_STEP}  # the first evaluation is the best
    make_trainer(**settings, max_steps=2).train()
    trainer = make_trainer(**settings, max_steps=5)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 3


@pytest.mark.parametrize(
    "metric, greater", [("l1_first", False), ("eval_l1_dim_2", False), ("gripper_accuracy", True)]
)
def test_of_errors_the_smallest_is_the_best_without_being_told(tmp_path, metric, greater):
    arguments = VLAAdapterTrainingArguments(**QUIET, output_dir=str(tmp_path), metric_for_best_model=metric)
    assert arguments.greater_is_better is greater


def test_patience_without_evaluations_is_refused(tmp_path):
    with pytest.raises(ValueError, match="early_stopping_patience=3 counts evaluations and there are none"):
        VLAAdapterTrainingArguments(**QUIET, output_dir=str(tmp_path), early_stopping_patience=3)
    with pytest.raises(ValueError, match="early_stopping_patience=0; expected"):
        VLAAdapterTrainingArguments(
            **QUIET, output_dir=str(tmp_path), early_stopping_patience=0, eval_strategy="epoch"
        )


# Compiling


@pytest.fixture
def fresh_compiler(monkeypatch):
    """`torch_compile=True` reaches accelerate through the environment, where it would stay for the next Trainer."""
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def trained_losses(trainer) -> list[float]:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize(
    "backend, preset",
    [
        ("aot_eager", "full"),
        ("aot_eager", "lora"),
        pytest.param("inductor", "full", marks=pytest.mark.slow),
        pytest.param("inductor", "lora", marks=pytest.mark.slow),
    ],
)
def test_a_compiled_training_has_the_losses_of_a_plain_one(make_trainer, tmp_path, fresh_compiler, backend, preset):
    """And checkpoints under the plain model's names. The policy's noise is drawn in other ways by other compilers."""
    common = {"preset": preset, "learning_rate": 1e-3}
    common |= {"save_strategy": "steps", "save_steps": 4, "eval_strategy": "steps", "eval_steps": 4}
    losses_of, metric_of, names_of = {}, {}, {}
    for name, more in (("plain", {}), ("compiled", {"torch_compile": True, "torch_compile_backend": backend})):
        assert not counters["frames"]["ok"]
        trainer = make_trainer(**common, **more, output_dir=str(tmp_path / name))
        for module in trainer.model.modules():  # PEFT trains a copy of the policy, with a configuration of its own
            if isinstance(getattr(module, "config", None), VLAAdapterConfig):
                module.config.policy_noise_std = 0.0
        losses_of[name] = trained_losses(trainer)
        metric_of[name] = trainer.evaluate()["eval_l1_first"]
        names_of[name] = set(AutoModel.from_pretrained(tmp_path / name / "checkpoint-4").state_dict())
    assert counters["frames"]["ok"]
    assert losses_of["compiled"] == pytest.approx(losses_of["plain"], abs=1e-4)
    assert metric_of["compiled"] == pytest.approx(metric_of["plain"], abs=1e-4)
    assert names_of["compiled"] == names_of["plain"]


# Loggers


def test_tensorboard_gets_the_loss_and_every_metric(start, tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    more = ("--preset", "frozen", "--validation", 1, "--eval_strategy", "steps", "--eval_steps", 2)
    metrics = run_training(start, tmp_path / "out", *more, "--report_to", "tensorboard")
    (events,) = {path.parent for path in tmp_path.rglob("events.out.tfevents.*")}
    log = event_accumulator.EventAccumulator(str(events)).Reload()
    state = json.loads((tmp_path / "out" / "checkpoint-4" / "trainer_state.json").read_text())
    logged = {
        step: loss for step, loss in ((entry["step"], entry.get("loss")) for entry in state["log_history"]) if loss
    }
    assert {scalar.step: pytest.approx(scalar.value) for scalar in log.Scalars("train/loss")} == logged
    names = [name for name in metrics if name.startswith("eval_")]
    assert {"eval_loss", "eval_l1_first", "eval_l1_rest", "eval_l1_dim_gripper", "eval_gripper_accuracy"} <= set(names)
    for name in names:
        scalars = log.Scalars(f"eval/{name.removeprefix('eval_')}")
        assert [scalar.step for scalar in scalars][:2] == [2, 4]
        assert scalars[-1].value == pytest.approx(metrics[name], rel=1e-4)


# The Hub


class Commits(list):
    """What each commit uploads, name in the repository -> content, and what the repository then holds."""

    def __init__(self):
        self.repository = {}


@pytest.fixture
def commits(monkeypatch):
    """Stands in for the Hub."""
    uploaded = Commits()

    def upload_folder(
        repo_id,
        folder_path,
        commit_message,
        path_in_repo=".",
        ignore_patterns=None,
        delete_patterns=(),
        run_as_future=False,
        **options,
    ):
        # At once, even if asked for a future: what a later step writes into the folder must not be in it yet.
        names = [path.relative_to(folder_path).as_posix() for path in Path(folder_path).rglob("*") if path.is_file()]
        kept = filter_repo_objects(names, ignore_patterns=ignore_patterns)
        files = {(Path(path_in_repo) / name).as_posix(): (Path(folder_path) / name).read_bytes() for name in kept}
        uploaded.append((repo_id, commit_message, files))
        for name in list(filter_repo_objects(uploaded.repository, allow_patterns=list(delete_patterns))):
            del uploaded.repository[name]
        uploaded.repository.update(files)
        commit = CommitInfo(f"https://huggingface.co/{repo_id}/commit/0", commit_message, "", oid="0")
        if not run_as_future:
            return commit
        future = Future()
        future.set_result(commit)
        return future

    def init_hf_repo(self, token=None, private=None):
        self.hub_model_id, self.push_in_progress = self.args.hub_model_id, None

    monkeypatch.setattr(HfApi, "upload_folder", lambda self, **arguments: upload_folder(**arguments))
    # Older releases of transformers took the function from there.
    monkeypatch.setattr("transformers.trainer.upload_folder", upload_folder, raising=False)
    monkeypatch.setattr(Trainer, "init_hf_repo", init_hf_repo)
    return uploaded


def predictions_of(files: dict[str, bytes], folder: Path, sample) -> np.ndarray:
    """What a model of uploaded files predicts, loaded from a folder of its own."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    processor = AutoProcessor.from_pretrained(folder)
    inputs = processor(images=sample["images"], text=sample["text"], state=sample["state"])
    return AutoModel.from_pretrained(folder).predict_action(**inputs)


@pytest.mark.parametrize("preset", ["lora", "frozen"])
def test_what_is_pushed_during_and_after_training_loads_and_predicts(start, tmp_path, dataset, commits, preset):
    output = tmp_path / "out"
    more = ("--preset", preset, "--push_to_hub", "true", "--hub_model_id", "me/policy")
    run_training(start, output, *more, "--hub_strategy", "all_checkpoints")
    messages = [message for _, message, _ in commits]
    assert messages == [
        *(f"Training in progress, step {step}{what}" for step in (2, 4) for what in ("", ", checkpoint")),
        "End of training",
    ]
    assert {repo for repo, _, _ in commits} == {"me/policy"}
    predictions = {}
    for number, (_, message, files) in enumerate(commits):
        step = message.partition("step ")[2].partition(",")[0]
        if message.endswith("checkpoint"):
            prefix = f"checkpoint-{step}/"
            assert all(name.startswith(prefix) for name in files)
            files = {name.removeprefix(prefix): content for name, content in files.items()}
            assert {"trainer_state.json", "optimizer.pt", "scheduler.pt"} <= set(files)
        else:
            assert not any("checkpoint-" in name for name in files)
        assert f"{step or 4} steps." in files["README.md"].decode()
        assert any(name.endswith(".py") for name in files)  # for machines without this package
        predictions[number] = predictions_of(files, tmp_path / str(number), dataset[3])
    for same in ((0, 1), (2, 3), (3, 4)):
        np.testing.assert_allclose(*(predictions[number] for number in same), atol=1e-5)
    assert np.abs(predictions[0] - predictions[2]).max() > 1e-4
    weights = [name for name in commits.repository if ".safetensors" in name and "/" not in name]
    assert weights == ["model.safetensors"]  # none left of what was pushed before
    assert {"training.png", "chunks.png", "metrics.json"} <= set(commits[-1][2])


def test_a_plain_trainer_pushes_complete_lora_models(make_trainer, tmp_path, dataset, commits):
    pushing = {"push_to_hub": True, "hub_model_id": "me/policy", "save_strategy": "steps", "save_steps": 4}
    make_trainer(Trainer, preset="lora", **pushing).train()
    ((_, message, files),) = commits
    assert message == "Training in progress, step 4"
    assert "4 steps." in files["README.md"].decode()
    pushed = predictions_of(files, tmp_path / "pushed", dataset[3])
    np.testing.assert_allclose(pushed, predictions_of({}, tmp_path / "out" / "checkpoint-4", dataset[3]), atol=1e-6)


def test_pushing_in_code_keeps_the_model_card(make_trainer, commits):
    trainer = make_trainer(hub_model_id="me/policy")
    trainer.train()
    trainer.push_to_hub()
    ((_, _, files),) = commits
    assert "4 steps." in files["README.md"].decode()
    assert {"model.safetensors", "config.json", "processor_config.json"} <= set(files)


# Resuming, and what a damaged dataset costs


def torn_checkpoint(output: Path, step: int) -> None:
    folder = output / f"checkpoint-{step}"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"cut short")


def test_resuming_in_code_takes_the_last_finished_checkpoint(make_trainer, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2, "preset": "full"}
    saving["lr_scheduler_type"] = "constant"  # the same whatever max_steps
    whole = trained_losses(make_trainer(**saving, max_steps=6, output_dir=str(tmp_path / "whole")))
    make_trainer(**saving, max_steps=4).train()
    torn_checkpoint(tmp_path / "out", 5)
    trainer = make_trainer(**saving, max_steps=6)
    trainer.train(resume_from_checkpoint=True)
    resumed = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert resumed == pytest.approx(whole, abs=1e-6) and len(resumed) == 6


@pytest.mark.parametrize("trainer_class", [Trainer, VLAAdapterTrainer])
def test_the_epoch_reaches_the_dataset_whatever_loader_a_resumed_training_reads_from(make_trainer, trainer_class):
    """After resuming in the middle of an epoch, accelerate does not hand it on."""
    trainer = make_trainer(trainer_class)
    handler = trainer.callback_handler
    handler.train_dataloader = trainer.accelerator.skip_first_batches(trainer.get_train_dataloader(), 1)
    handler.on_epoch_begin(trainer.args, TrainerState(epoch=3.0), trainer.control)
    assert trainer.train_dataset.epoch == 3


def test_resuming_in_code_without_a_finished_checkpoint_is_refused(make_trainer, tmp_path):
    (tmp_path / "out").mkdir()
    torn_checkpoint(tmp_path / "out", 5)
    with pytest.raises(
        ValueError, match=r"holds no finished checkpoint \(cut short: checkpoint-5: has no trainer_state.json\)"
    ):
        make_trainer().train(resume_from_checkpoint=True)


def damage_frame(folder: Path, row: int) -> None:
    """Flip bytes in the middle of a PNG."""
    path = folder / "data" / "chunk-000" / "file-000.parquet"
    table = pq.read_table(path)
    name = "observation.images.image"
    cells = table.column(name).to_pylist()
    data = bytearray(cells[row]["bytes"])
    data[len(data) // 2 : len(data) // 2 + 8] = bytes(8)
    cells[row]["bytes"] = bytes(data)
    place = table.schema.get_field_index(name)
    pq.write_table(table.set_column(place, name, pa.array(cells, table.schema.field(name).type)), path)


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VLA_ADAPTER_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_frame_found_damaged_in_the_middle_of_a_training_costs_no_checkpoint(start, tmp_path, own_cache, workers):
    """The error names episode and frame; with the frame repaired the run goes on as if nothing had been."""
    folder = data_fixtures.copy_of("lerobot_v30_image", tmp_path)
    more = ("--preset", "frozen", "--dataset", folder, "--max_steps", 8, "--save_steps", 1)
    more += ("--dataloader_num_workers", workers)
    run_training(start, tmp_path / "whole", *more)

    damage_frame(folder, 24)
    with pytest.raises((BadEpisodeError, RuntimeError), match="episode 1, frame 4: .*cannot be decoded"):
        run_training(start, tmp_path / "out", *more)
    last = last_finished_checkpoint(tmp_path / "out")
    assert last is not None and 1 <= int(last.name.split("-")[1]) < 8

    original = DEMOS / "data" / "chunk-000" / "file-000.parquet"
    (folder / "data" / "chunk-000" / "file-000.parquet").write_bytes(original.read_bytes())
    run_training(start, tmp_path / "out", *more, "--resume_from_checkpoint", "true")
    assert losses(tmp_path / "out") == pytest.approx(losses(tmp_path / "whole"), abs=1e-6)
