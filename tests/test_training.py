"""Fine-tuning: what trains, what a batch holds, what a checkpoint is, and that interruption changes nothing."""

import os
import signal
import subprocess
import sys
import time
import weakref
from copy import copy
from pathlib import Path

import data_fixtures
import model_fixtures
import numpy as np
import pytest
import torch
from torch import nn
from training_fixtures import CHUNK, DEMOS, QUIET, command, losses, run_training, write_start
from transformers import AutoConfig, AutoModel, AutoProcessor, Trainer

from vla_adapter_hf import (
    VLAAdapterDataCollator,
    VLAAdapterDataset,
    VLAAdapterForActionPrediction,
    VLAAdapterProcessor,
    VLAAdapterTrainingArguments,
)
from vla_adapter_hf.cli.train import parse_arguments
from vla_adapter_hf.data import ImageAugmentation, ImageResize
from vla_adapter_hf.modeling.normalization_vla_adapter import normalize
from vla_adapter_hf.training.checkpoints import CheckpointCallback, last_finished_checkpoint
from vla_adapter_hf.training.demonstrations import load_data
from vla_adapter_hf.training.metrics import make_compute_metrics
from vla_adapter_hf.training.presets import (
    ADAPTER_NAME,
    POLICY_MODULES,
    apply_preset,
    lora_targets,
    merge_lora,
    merged_state_dict,
)
from vla_adapter_hf.training.train import config_overrides
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
def model(start, dataset):
    return AutoModel.from_pretrained(start, norm_stats=dataset.norm_stats)


@pytest.fixture
def collator(start, dataset, model):
    return VLAAdapterDataCollator(AutoProcessor.from_pretrained(start), model.config)


# What trains


def test_lora_adapts_every_linear_layer_and_both_patch_embeddings_of_towers_projector_and_language_model(model):
    targets = set(lora_targets(model))
    for name, module in model.named_modules():
        adaptable = isinstance(module, (nn.Linear, nn.Conv2d))
        assert (name in targets) == (adaptable and name.split(".")[0] not in POLICY_MODULES), name
    assert sum(isinstance(model.get_submodule(name), nn.Conv2d) for name in targets) == 2


def test_lora_trains_adapters_and_the_whole_policy_and_nothing_else(model):
    peft_model = apply_preset(model, "lora", rank=4)
    trainable = {name for name, parameter in peft_model.named_parameters() if parameter.requires_grad}
    for name in trainable:
        assert ".lora_" in name or any(f".{part}.modules_to_save." in name for part in POLICY_MODULES), name
    for part in POLICY_MODULES:
        count = sum(f".{part}.modules_to_save." in name for name in trainable)
        assert count == len(list(getattr(peft_model.get_base_model(), part).original_module.parameters()))


def test_lora_of_the_published_recipe_has_rank_64_alpha_128_and_no_dropout(model):
    config = apply_preset(model, "lora").peft_config[ADAPTER_NAME]
    assert (config.r, config.lora_alpha, config.lora_dropout, config.init_lora_weights) == (64, 128, 0.0, "gaussian")


def test_frozen_trains_queries_policy_and_proprio_projector_only(model):
    apply_preset(model, "frozen")
    parts = {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert parts == set(POLICY_MODULES)


@pytest.mark.parametrize("preset", ["lora", "frozen", "full"])
def test_every_trainable_parameter_gets_a_gradient(model, collator, dataset, preset):
    trained = apply_preset(model, preset, rank=4).train()
    batch = collator([dataset[0], dataset[20]])
    for _ in range(2):  # LoRA's second matrix starts at zero, so the first has a gradient from the second step on only
        loss = trained(
            **{name: value for name, value in batch.items() if name not in ("action_scale", "action_mask")}
        ).loss
        loss.backward()
        torch.optim.SGD([p for p in trained.parameters() if p.requires_grad], lr=0.1).step()
    without = [
        name for name, p in trained.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())
    ]
    # Keys have no bias in a softmax: its gradient is zero but for rounding.
    assert [name for name in without if "k_" not in name and "key" not in name] == []


def test_an_unknown_preset_is_refused_with_the_known_ones(model):
    with pytest.raises(ValueError, match="preset must be one of lora, lora-paper, frozen, full, got 'all'"):
        apply_preset(model, "all")


# Merging


@pytest.fixture
def trained_lora(model, collator, dataset):
    """A LoRA model whose adapters do something."""
    peft_model = apply_preset(model, "lora", rank=4)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in peft_model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return peft_model.eval()


def predicted(model, batch) -> torch.Tensor:
    names = ("input_ids", "attention_mask", "pixel_values", "proprio")
    with torch.no_grad():
        return model(**{name: batch[name] for name in names}).actions


def test_a_merged_model_predicts_what_the_unmerged_one_predicts(trained_lora, collator, dataset):
    batch = collator([dataset[3]])
    before = predicted(trained_lora, batch)
    merged = merge_lora(trained_lora)
    assert (predicted(merged, batch) - before).abs().max() < 1e-5
    assert not any("lora" in name for name in merged.state_dict())


def test_the_merged_state_is_that_of_merging_and_leaves_the_adapter_alone(trained_lora):
    before = {name: tensor.clone() for name, tensor in trained_lora.state_dict().items()}
    # Copies: merging in place, below, would otherwise write into what is compared with it.
    state = {name: tensor.clone() for name, tensor in merged_state_dict(trained_lora).items()}
    for name, tensor in trained_lora.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    merged = merge_lora(trained_lora).state_dict()
    assert state.keys() == merged.keys()
    for name, tensor in merged.items():
        torch.testing.assert_close(state[name], tensor, rtol=0, atol=1e-6)


def test_the_merged_state_takes_no_more_of_the_trainings_device_than_one_weight(trained_lora, monkeypatch):
    """A checkpoint needs the host's memory: once all updates and all merged weights were on the GPU at a time."""
    from peft.tuners.lora import Conv2d, Linear

    updates, alive = [], []

    def watched(get_delta_weight):
        def watch(layer, adapter):
            alive.append(sum(update() is not None for update in updates))
            delta = get_delta_weight(layer, adapter)
            updates.append(weakref.ref(delta))
            return delta

        return watch

    for layer_class in (Linear, Conv2d):
        monkeypatch.setattr(layer_class, "get_delta_weight", watched(layer_class.get_delta_weight))
    merged_state_dict(trained_lora)
    assert len(alive) > 10 and max(alive) == 0


def test_trained_action_queries_survive_merging(trained_lora):
    queries = trained_lora.get_base_model().action_queries.modules_to_save[ADAPTER_NAME].weight.clone()
    assert torch.equal(merge_lora(trained_lora).action_queries.weight, queries)


# Batches


def test_a_batch_holds_normalised_actions_and_states(collator, dataset, model):
    sample = dataset[7]
    batch = collator([sample])
    stats = model.config.norm_stats[sample["unnorm_key"]]
    np.testing.assert_allclose(batch["proprio"][0], normalize(sample["state"], stats["proprio"]), atol=1e-6)
    np.testing.assert_allclose(batch["actions"][0], normalize(sample["actions"], stats["action"]), atol=1e-6)
    assert torch.equal(batch["actions"][0, :, -1], torch.from_numpy(sample["actions"][:, -1]))  # the gripper is masked


def test_frames_in_training_go_through_neither_jpeg_nor_centre_crop(start, collator, dataset):
    sample = dataset[7]
    processor = AutoProcessor.from_pretrained(start)
    plain = processor(sample["images"], sample["text"], do_jpeg_round_trip=False, do_center_crop=False)
    assert torch.equal(collator([sample])["pixel_values"], plain["pixel_values"])
    assert not torch.equal(plain["pixel_values"], processor(sample["images"], sample["text"])["pixel_values"])


def test_frames_without_a_transform_are_cropped_as_at_inference(start, collator):
    sample = VLAAdapterDataset.from_lerobot(DEMOS, ["image", "wrist_image"], CHUNK, robot="libero")[7]
    processor = AutoProcessor.from_pretrained(start)
    at_inference = processor(sample["images"], sample["text"], do_jpeg_round_trip=False)
    assert torch.equal(collator([sample])["pixel_values"], at_inference["pixel_values"])


def test_a_transform_for_another_image_size_is_refused(collator, dataset):
    sample = {**dataset[0], "images": [np.zeros((56, 56, 3), np.uint8)] * 2}
    with pytest.raises(ValueError, match=r"frames of \(56, 56\) pixels, the model sees \(28, 28\)"):
        collator([sample])


def test_frames_of_another_size_are_refused_for_a_model_without_crop_too(start, dataset):
    """The check was once skipped for such models: frames of 56 pixels were then squeezed to 28."""
    config = AutoConfig.from_pretrained(start, norm_stats=dataset.norm_stats, image_center_crop=None)
    tokenizer = AutoProcessor.from_pretrained(start).tokenizer
    collator = VLAAdapterDataCollator(VLAAdapterProcessor.from_model_config(config, tokenizer), config)
    first = {**dataset[0], "crop_area": None}
    sample = {**first, "images": [np.zeros((56, 56, 3), np.uint8)] * 2}
    with pytest.raises(ValueError, match=r"frames of \(56, 56\) pixels, the model sees \(28, 28\)"):
        collator([first, sample])


@pytest.mark.parametrize(
    ("crop", "transform"),
    [
        (None, ImageAugmentation(28)),
        (0.5, ImageAugmentation(28)),
        (0.9, ImageAugmentation(28, crop_area=1.0)),
        (0.9, ImageResize(28)),
        (None, ImageResize(28, 0.9)),
    ],
    ids=str,
)
def test_a_transform_that_crops_otherwise_than_inference_is_refused(start, dataset, crop, transform):
    """Training would show the model another part of the frames than inference."""
    config = AutoConfig.from_pretrained(start, norm_stats=dataset.norm_stats, image_center_crop=crop)
    tokenizer = AutoProcessor.from_pretrained(start).tokenizer
    collator = VLAAdapterDataCollator(VLAAdapterProcessor.from_model_config(config, tokenizer), config)
    transformed = copy(dataset)
    transformed.image_transform = transform
    with pytest.raises(ValueError, match=f"has crop_area={transform.crop_area}, .* image_center_crop={crop}"):
        collator([transformed[0]])
    transformed.image_transform = type(transform).from_model_config(config)
    assert collator([transformed[0]])["pixel_values"].shape == (1, 12, 28, 28)


def test_transforms_made_from_a_model_fit_it():
    for crop in (None, 0.9):
        config = model_fixtures.tiny_config(image_center_crop=crop)
        frames = [np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)]
        resize, augmentation = (kind.from_model_config(config) for kind in (ImageResize, ImageAugmentation))
        assert resize.crop_area == crop and augmentation.crop_area == (crop or 1.0)
        assert resize(frames)[0].shape == augmentation(frames)[0].shape == (28, 28, 3)


def test_samples_that_a_plain_trainer_has_stripped_are_refused_with_the_remedy(collator, dataset):
    with pytest.raises(ValueError, match="lack images, state, text.*remove_unused_columns=False"):
        collator([{"actions": dataset[0]["actions"]}])


def test_chunks_of_another_length_are_refused(collator, dataset):
    sample = {**dataset[0], "actions": dataset[0]["actions"][:2]}
    with pytest.raises(ValueError, match=r"shape \(2, 7\), the model predicts \(4, 7\)"):
        collator([sample])


def test_a_model_without_statistics_gets_no_batches(start):
    config = AutoModel.from_pretrained(start).config
    with pytest.raises(ValueError, match="no norm_stats"):
        VLAAdapterDataCollator(AutoProcessor.from_pretrained(start), config)


def test_metrics_are_in_physical_units_and_leave_out_padding(collator, dataset, model):
    batch = collator([dataset[0], dataset[5]])
    off = 0.1
    is_pad = batch["action_is_pad"].clone()
    is_pad[1, 2:] = True
    predictions = batch["actions"] + off
    predictions[1, 2:] += 100  # past the end of the episode
    predictions[0, 0, -1] = 1 - batch["actions"][0, 0, -1]  # one gripper action on the wrong side, of six
    predictions[:, :, -1] = torch.where(
        torch.arange(CHUNK)[None, :] + torch.tensor([[0], [9]]) == 0, predictions[:, :, -1], batch["actions"][:, :, -1]
    )
    evaluation = type("Evaluation", (), {})()
    evaluation.predictions = predictions.numpy()
    evaluation.label_ids = tuple(
        labels.numpy() for labels in (batch["actions"], is_pad, batch["action_scale"], batch["action_mask"])
    )
    metrics = make_compute_metrics(model.config)(evaluation)
    stats = next(iter(model.config.norm_stats.values()))["action"]
    ranges = [(high - low) / 2 for low, high in zip(stats["q01"], stats["q99"], strict=True)]
    assert metrics["l1_dim_2"] == pytest.approx(off * ranges[2], rel=1e-4)
    assert metrics["l1_first"] == pytest.approx(off * np.mean(ranges[:6]), rel=1e-4)
    assert metrics["gripper_accuracy"] == pytest.approx(5 / 6)


# Arguments


def test_the_lora_preset_is_the_released_codes_effective_recipe(tmp_path):
    _, _, arguments = parse_arguments(["--checkpoint", "c", "--dataset", "d", "--output_dir", str(tmp_path)])
    assert arguments.learning_rate == 2e-4 and arguments.lr_scheduler_type == "constant"
    assert arguments.weight_decay == 0.01 and arguments.max_grad_norm == 0
    assert (arguments.adam_beta1, arguments.adam_beta2) == (0.9, 0.999)


def test_the_papers_schedule_is_a_preset_of_its_own(tmp_path):
    words = ["--checkpoint", "c", "--dataset", "d", "--output_dir", str(tmp_path), "--preset", "lora-paper"]
    _, _, arguments = parse_arguments(words)
    assert arguments.learning_rate == 1e-4 and arguments.lr_scheduler_type == "cosine"
    assert arguments.get_warmup_steps(1000) == 100


def test_words_replace_the_yaml_file_and_the_file_replaces_the_preset(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("checkpoint: c\ndataset: [a, b]\noutput_dir: out\nlearning_rate: 1.0e-3\nweight_decay: 0.5\n")
    model, data, arguments = parse_arguments([str(file), "--weight_decay", "0.25"])
    assert (model.checkpoint, data.dataset) == ("c", ["a", "b"])
    assert (arguments.learning_rate, arguments.weight_decay) == (1e-3, 0.25)


def test_an_argument_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(ValueError, match="unknown arguments: --lerning_rate 1"):
        parse_arguments(["--checkpoint", "c", "--dataset", "d", "--output_dir", str(tmp_path), "--lerning_rate", "1"])


def test_the_published_split_of_the_states_is_dropped_with_another_number_of_cameras(tmp_path):
    """512 is what the weights of two cameras mean; with one camera no action state would be left behind it."""
    start = model_fixtures.tiny_config(policy_task_tokens=8)
    for cameras, expected in ((["image", "wrist_image"], 8), (["image"], None)):
        words = ["--checkpoint", "c", "--dataset", str(DEMOS), "--robot", "libero", "--output_dir", str(tmp_path)]
        model, data, _ = parse_arguments([*words, "--cameras", *cameras])
        overrides = config_overrides(model, data, start, load_data(data, start, seed=0))
        assert overrides["policy_task_tokens"] == expected
        assert overrides["cameras"] == cameras


# Runs


@pytest.mark.parametrize("preset", ["lora", "frozen", "full"])
def test_every_checkpoint_loads_with_auto_classes_and_predicts_what_the_trained_model_predicts(
    start, tmp_path, dataset, preset
):
    run_training(start, tmp_path / "out", "--preset", preset, "--augment", "false")
    sample = dataset[3]
    actions = []
    for folder in (tmp_path / "out" / "checkpoint-2", tmp_path / "out" / "checkpoint-4", tmp_path / "out"):
        model, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
        inputs = processor(images=sample["images"], text=sample["text"], state=sample["state"])
        actions.append(model.predict_action(**inputs))
        assert set(model.config.norm_stats) == set(dataset.norm_stats)
        assert model.config.action_names == ["x", "y", "z", "axis_angle1", "axis_angle2", "axis_angle3", "gripper"]
        assert model.config.state_names[-1] == "gripper_r" and model.config.fps == 10
        assert (folder / "README.md").read_text().startswith("---\nlibrary_name: transformers")
    assert actions[0].shape == (1, CHUNK, 7)
    np.testing.assert_allclose(actions[1], actions[2], atol=1e-5)
    assert np.abs(actions[0] - actions[1]).max() > 1e-4  # two steps make a difference
    assert {"metrics.json", "training.png", "chunks.png"} <= set(os.listdir(tmp_path / "out"))


@pytest.mark.parametrize("preset", ["lora", "full"])
def test_a_resumed_run_has_the_losses_of_an_uninterrupted_one(start, tmp_path, preset):
    more = ("--preset", preset, "--learning_rate", "1e-3")
    run_training(start, tmp_path / "whole", *more)
    run_training(start, tmp_path / "halves", *more, "--save_total_limit", 1)
    for name in ("checkpoint-4", "model.safetensors"):  # as if the run had been cut after step 2
        target = tmp_path / "halves" / name
        subprocess.run(["rm", "-rf", str(target)], check=True)
    run_training(start, tmp_path / "again", *more, "--max_steps", 2, "--lr_scheduler_type", "constant")
    (tmp_path / "again" / "checkpoint-2").rename(tmp_path / "halves" / "checkpoint-2")
    run_training(start, tmp_path / "halves", *more, "--resume_from_checkpoint", "true")
    assert losses(tmp_path / "halves") == pytest.approx(losses(tmp_path / "whole"), abs=1e-6)


def test_a_run_killed_in_the_middle_of_a_checkpoint_goes_on_from_the_last_finished_one(start, tmp_path):
    output = tmp_path / "out"
    words = command(start, output, "--preset", "full", "--max_steps", 400, "--save_steps", 3)
    process = subprocess.Popen(
        [sys.executable, "-m", "vla_adapter_hf.cli", "train", *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    deadline = time.monotonic() + 300
    while last_finished_checkpoint(output) is None and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    assert last_finished_checkpoint(output) is not None, process.stderr.read().decode()[-2000:]
    finished = last_finished_checkpoint(output)
    torn = output / "checkpoint-99"
    torn.mkdir()
    (torn / "model.safetensors").write_bytes(b"cut short")
    assert last_finished_checkpoint(output) == finished
    step = int(finished.name.split("-")[1])
    run_training(
        start,
        output,
        "--preset",
        "full",
        "--max_steps",
        step + 2,
        "--save_steps",
        1,
        "--resume_from_checkpoint",
        "true",
    )
    assert len(losses(output)) == step + 2


class FullDisk:
    """A processor that can be saved once; then the disk is full."""

    def __init__(self, processor):
        self.processor = processor
        self.saved = 0

    def save_pretrained(self, folder):
        self.saved += 1
        if self.saved > 1:
            raise OSError(28, "No space left on device")
        self.processor.save_pretrained(folder)


def test_a_full_disk_costs_no_finished_checkpoint(tmp_path, model, collator, dataset):
    card = CheckpointCallback(FullDisk(collator.processor), lambda step: {"title": "t", "summary": "s"})
    arguments = VLAAdapterTrainingArguments(
        **QUIET, output_dir=str(tmp_path), max_steps=4, save_steps=2, save_total_limit=1
    )
    trainer = VLAAdapterTrainer(model, arguments, collator, dataset, callbacks=[card])
    with pytest.raises(OSError, match="No space left"):
        trainer.train()
    assert last_finished_checkpoint(tmp_path) == tmp_path / "checkpoint-2"


def test_weight_decay_acts_on_everything_that_trains(tmp_path, model, collator, dataset):
    arguments = VLAAdapterTrainingArguments(**QUIET, output_dir=str(tmp_path), weight_decay=0.01)
    apply_preset(model, "frozen")
    optimizer = VLAAdapterTrainer(model, arguments, collator, dataset).create_optimizer()
    decayed = sum(len(group["params"]) for group in optimizer.param_groups if group["weight_decay"] == 0.01)
    assert decayed == sum(parameter.requires_grad for parameter in model.parameters())


def test_an_adapter_that_automodel_would_stumble_over_is_refused_before_training(tmp_path, model, collator, dataset):
    from peft import LoraConfig, get_peft_model

    peft_model = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    card = CheckpointCallback(collator.processor, lambda step: {"title": "t", "summary": "s"})
    arguments = VLAAdapterTrainingArguments(**QUIET, output_dir=str(tmp_path), max_steps=1)
    with pytest.raises(ValueError, match='named "default"'):
        Trainer(peft_model, arguments, collator, dataset, callbacks=[card]).train()


def test_a_folder_with_checkpoints_is_not_overwritten_by_accident(start, tmp_path):
    run_training(start, tmp_path / "out", "--preset", "frozen", "--max_steps", 2)
    with pytest.raises(ValueError, match="holds checkpoint-2. Go on with --resume_from_checkpoint true"):
        run_training(start, tmp_path / "out", "--preset", "frozen")


def test_the_best_checkpoint_is_loaded_at_the_end_with_lora_too(start, tmp_path, model, collator, dataset):
    train_part, held_out = dataset.split_by_episode(1, validation_transform=ImageResize(28, 0.9))
    arguments = VLAAdapterTrainingArguments(
        **QUIET,
        output_dir=str(tmp_path),
        max_steps=4,
        learning_rate=1e-3,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # so that the best is the first, and not the last, which is there anyway
        eval_strategy="steps",
        eval_steps=1,
        save_steps=1,
        load_best_model_at_end=True,
    )
    trainer = VLAAdapterTrainer(
        model=apply_preset(model, "lora", rank=4),
        args=arguments,
        train_dataset=train_part,
        eval_dataset=held_out,
        data_collator=collator,
        compute_metrics=make_compute_metrics(model.config),
    )
    trainer.train()
    history = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert max(history) > history[-1] + 1e-3
    assert trainer.evaluate()["eval_loss"] == pytest.approx(max(history), abs=1e-5)


def test_a_plain_trainer_does_not_pretend_to_load_the_best_lora_checkpoint(model, trained_lora):
    with pytest.raises(ValueError, match="merged weights.*VLAAdapterTrainer"):
        trained_lora.load_state_dict(merged_state_dict(trained_lora), strict=False)


def test_a_plain_trainer_trains_and_evaluates(tmp_path, model, collator, dataset):
    arguments = VLAAdapterTrainingArguments(
        **QUIET, output_dir=str(tmp_path), max_steps=3, save_strategy="no", gradient_accumulation_steps=2
    )
    trainer = Trainer(model, arguments, collator, dataset, dataset, compute_metrics=make_compute_metrics(model.config))
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics["eval_l1_normalized"] == pytest.approx(metrics["eval_loss"], rel=1e-3)
    assert 0 <= metrics["eval_gripper_accuracy"] <= 1


def test_another_robot_starts_from_the_same_checkpoint(start, dataset):
    stats = model_fixtures.norm_stats(action_dim=5, proprio_dim=3)
    model = AutoModel.from_pretrained(
        start, action_dim=5, proprio_dim=3, chunk_size=6, norm_stats=stats, ignore_mismatched_sizes=True
    )
    assert model.policy.fc_out.out_features == 5 and model.proprio_projector.fc1.in_features == 3


def test_every_buffer_can_be_sent_to_other_processes():
    """DDP does so at its start.

    Neither gloo nor NCCL knows int16, in which the bfloat16 rotary tables were once kept.
    """
    model = model_fixtures.tiny_model(policy_rope_dtype="bfloat16")
    kinds = {buffer.dtype for buffer in model.buffers()}
    assert kinds <= {torch.float32, torch.int32, torch.int64}


def test_lora_with_fsdp_is_refused(start, tmp_path):
    with pytest.raises(ValueError, match="preset=lora does not go with fsdp"):
        run_training(start, tmp_path / "lora", "--fsdp", "full_shard")


@pytest.mark.parametrize("processes, message", [(1, "would ignore it here"), (2, "no process has the whole model")])
def test_fsdp_is_refused_where_it_has_no_effect_and_where_the_result_could_not_be_written(
    start, tmp_path, processes, message
):
    words = command(start, tmp_path / "out", "--preset", "full", "--fsdp", "full_shard")
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    result = subprocess.run(
        [*launch, "-m", "vla_adapter_hf.cli", "train", *words],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode != 0
    assert message in result.stderr


@pytest.fixture(scope="module")
def four_episodes() -> VLAAdapterDataset:
    pytest.importorskip("av")
    return VLAAdapterDataset.from_lerobot(
        data_fixtures.DEMOS / "lerobot_v21_video",
        ["image", "wrist_image"],
        chunk_size=CHUNK,
        robot="libero",
        image_transform=ImageResize(28),
    )


def learner(processor, episodes, folder: Path) -> Path:
    """An untrained model that can learn by heart, as a checkpoint."""
    torch.manual_seed(0)
    config = model_fixtures.learner_config(norm_stats=episodes.norm_stats, chunk_size=CHUNK, prompt_style="in_out")
    VLAAdapterForActionPrediction(config).save_pretrained(folder)
    VLAAdapterProcessor.from_model_config(config, processor.tokenizer).save_pretrained(folder)
    return folder


def l1_normalized(folder: Path, samples, output: Path) -> float:
    """Mean absolute error of a checkpoint over samples, in normalised space."""
    model = AutoModel.from_pretrained(folder)
    arguments = VLAAdapterTrainingArguments(**QUIET, output_dir=str(output))
    collator = VLAAdapterDataCollator(AutoProcessor.from_pretrained(folder), model.config)
    trainer = Trainer(model, arguments, collator, None, samples, compute_metrics=make_compute_metrics(model.config))
    return trainer.evaluate()["eval_l1_normalized"]


def test_a_short_training_learns_something(processor, four_episodes, tmp_path):
    """120 steps bring the error from above 0.6 to below 0.35; 1,500 bring it below 0.02, see the next test."""
    assert len(four_episodes.episode_indices) == 4
    samples = [four_episodes[index] for index in range(0, len(four_episodes), 4)]
    start = learner(processor, four_episodes, tmp_path / "start")
    before = l1_normalized(start, samples, tmp_path)
    model = AutoModel.from_pretrained(start)
    arguments = VLAAdapterTrainingArguments(
        **{**QUIET, "per_device_train_batch_size": 16},
        output_dir=str(tmp_path),
        max_steps=120,
        learning_rate=2e-3,
        save_strategy="no",
    )
    collator = VLAAdapterDataCollator(AutoProcessor.from_pretrained(start), model.config)
    Trainer(model, arguments, collator, samples).train()
    model.save_pretrained(tmp_path / "end")
    AutoProcessor.from_pretrained(start).save_pretrained(tmp_path / "end")
    assert before > 0.6
    assert l1_normalized(tmp_path / "end", samples, tmp_path) < 0.35


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("way", ["python", "command"])
def test_four_episodes_are_learned_by_heart(processor, four_episodes, tmp_path, way):
    """Mean error below 0.02 in normalised space, over all 226 steps of the four episodes."""
    start = learner(processor, four_episodes, tmp_path / "start")
    options = {
        "per_device_train_batch_size": 16,
        "max_steps": 2000,
        "learning_rate": 2e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 20,
        "max_grad_norm": 1.0,
        "logging_steps": 100,
    }
    samples = [four_episodes[index] for index in range(len(four_episodes))]
    end = tmp_path / "end"
    if way == "python":
        model = AutoModel.from_pretrained(start)
        arguments = VLAAdapterTrainingArguments(**{**QUIET, **options}, output_dir=str(end), save_strategy="no")
        collator = VLAAdapterDataCollator(AutoProcessor.from_pretrained(start), model.config)
        Trainer(model, arguments, collator, samples).train()
        model.save_pretrained(end)
        AutoProcessor.from_pretrained(start).save_pretrained(end)
    else:
        more = [word for name, value in options.items() for word in (f"--{name}", value)]
        more += ["--preset", "full", "--augment", "false", "--save_strategy", "no"]
        run_training(start, end, *more, "--dataset", data_fixtures.DEMOS / "lerobot_v21_video")
    assert l1_normalized(end, samples, tmp_path) < 0.02
