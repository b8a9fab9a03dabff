"""`lerobot-train` on a dataset of LeRobot's own writer: presets, statistics, padded steps, resuming, conversion."""

import json
import shutil
from pathlib import Path

import model_fixtures
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from lerobot.configs import PreTrainedConfig
from lerobot.datasets import LeRobotDataset, LeRobotDatasetMetadata
from lerobot.policies.factory import make_policy
from safetensors.torch import load_file, save_file
from test_actions import TOLERANCE, own_actions

from lerobot_policy_vla_adapter import VLAAdapterPolicy, make_vla_adapter_pre_post_processors
from vla_adapter_hf import open_checkpoint
from vla_adapter_hf.checkpoints.lerobot.convert import from_lerobot, to_lerobot
from vla_adapter_hf.data import dataset_statistics
from vla_adapter_hf.training.presets import ADAPTER_NAME


def words(start, dataset, output, *more: str) -> list[str]:
    given = {
        "policy.type": "vla_adapter",
        "policy.pretrained_path": start,
        "policy.robot": "libero",
        "policy.lora_rank": 4,
        "dataset.repo_id": "me/cups",
        "dataset.root": dataset,
        "output_dir": output,
        "batch_size": 6,
        "save_freq": 2,
        "steps": 2,
    }
    for word in more:
        name, value = word.removeprefix("--").split("=", 1)
        given[name] = value
    return [f"--{name}={value}" for name, value in given.items()]


def checkpoint(output, step: int):
    return output / "checkpoints" / f"{step:06d}" / "pretrained_model"


def load(dataset, start, **fields) -> VLAAdapterPolicy:
    """A policy as `lerobot-train` makes it."""
    config = PreTrainedConfig.get_choice_class("vla_adapter")(
        device="cpu", robot="libero", pretrained_path=start, **{"preset": "full", **fields}
    )
    return make_policy(config, ds_meta=LeRobotDatasetMetadata("me/cups", root=dataset))


@pytest.mark.parametrize("preset", ["lora", "frozen", "full"])
def test_the_loss_falls_and_the_checkpoint_predicts_what_lerobot_predicts(
    preset, train, start, dataset, tmp_path, observation
):
    losses = train(
        *words(start, dataset, tmp_path / "run", f"--policy.preset={preset}", "--policy.augment=false"),
        "--policy.optimizer_lr=5e-3",
        "--steps=16",
        "--save_freq=16",
    )
    assert len(losses) == 16
    assert np.mean(losses[-4:]) < 0.9 * np.mean(losses[:4])

    written = checkpoint(tmp_path / "run", 16)
    assert (written / ADAPTER_NAME).is_dir() == (preset == "lora")
    own = from_lerobot(str(written), tmp_path / "own")
    policy = VLAAdapterPolicy.from_pretrained(written)
    preprocess, postprocess = make_vla_adapter_pre_post_processors(policy.config)
    chunk = postprocess(policy.predict_action_chunk(preprocess(dict(observation)))).numpy()
    np.testing.assert_allclose(chunk, own_actions(own, observation), atol=TOLERANCE)
    before, after = (open_checkpoint(folder).load_model().state_dict() for folder in (start, own))
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert ("dinov2" in changed) == (preset != "frozen")
    assert "policy" in changed


def test_statistics_are_ours_and_not_lerobots(dataset, start):
    policy = load(dataset, start)
    expected = dataset_statistics(dataset, robot="libero", unnorm_key="cups")
    assert policy.config.model["norm_stats"] == expected
    action = expected["cups"]["action"]
    assert action["mask"] == [True] * 6 + [False]
    assert (action["min"][6], action["max"][6]) == (0.0, 1.0)  # recorded as -1 and 1
    stored = LeRobotDatasetMetadata("me/cups", root=dataset).stats["action"]
    assert not np.allclose(stored["q99"][:6], action["q99"][:6], atol=1e-3), "LeRobot averages over episodes"


def batch_of(dataset, rows, chunk: int) -> dict:
    opened = LeRobotDataset("me/cups", root=dataset, delta_timestamps={"action": [step / 10 for step in range(chunk)]})
    return torch.utils.data.default_collate([opened[row] for row in rows])


def test_the_loss_is_that_of_our_own_training(dataset, start):
    """On the same samples, prepared by our dataset and collator."""
    from vla_adapter_hf import VLAAdapterDataset
    from vla_adapter_hf.training.collator import VLAAdapterDataCollator

    policy = load(dataset, start, augment=False)
    config = policy.config.model_config()
    preprocess, _ = make_vla_adapter_pre_post_processors(policy.config)
    rows = [0, 3, 7, 8]  # the chunks of 7 and 8 run past the episode's end
    with torch.no_grad():
        loss, _ = policy(preprocess(batch_of(dataset, rows, config.chunk_size)))

    ours = VLAAdapterDataset.from_lerobot(
        dataset, cameras=["image", "wrist_image"], robot="libero", chunk_size=config.chunk_size, pad_chunks=True
    )
    samples = [{**ours[row], "unnorm_key": "cups"} for row in rows]
    collate = VLAAdapterDataCollator(policy.config._loaded_processor, config)
    batch = {name: value for name, value in collate(samples).items() if name not in ("action_scale", "action_mask")}
    with torch.no_grad():
        expected = policy.network(**batch).loss
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-7)


def test_steps_past_an_episodes_end_do_not_count(dataset, start):
    policy = load(dataset, start, augment=False)
    preprocess, _ = make_vla_adapter_pre_post_processors(policy.config)
    batch = batch_of(dataset, [7], 4)
    assert batch["action_is_pad"].tolist() == [[False, False, True, True]]
    other = {**batch, "action": batch["action"].clone()}
    other["action"][:, 2:] = 0.123
    with torch.no_grad():
        losses = [policy(preprocess(one))[0] for one in (batch, other)]
        assert torch.equal(*losses)
        other["action_is_pad"] = torch.zeros(1, 4, dtype=torch.bool)
        assert not torch.equal(policy(preprocess(other))[0], losses[0])


def test_training_frames_are_augmented_and_frames_of_an_evaluation_are_not(dataset, start):
    policy = load(dataset, start)
    preprocess, _ = make_vla_adapter_pre_post_processors(policy.config)
    batch = batch_of(dataset, [0, 1], 4)

    def pixels() -> torch.Tensor:
        return preprocess(dict(batch))["observation.vla_adapter.pixel_values"]

    with torch.no_grad():
        plain = pixels()
        assert torch.equal(pixels(), plain)
    first = pixels()
    assert not torch.equal(first, plain)
    assert torch.equal(pixels(), first), "draws depend on the number of the batch alone"
    policy.config.trained_batches += 1
    assert not torch.equal(pixels(), first)


@pytest.mark.parametrize("preset", ["lora", "full"])
def test_a_resumed_training_ends_where_an_uninterrupted_one_does(preset, train, start, dataset, tmp_path):
    """To the bit, with augmentation and the model's noise."""
    whole = train(*words(start, dataset, tmp_path / "whole", f"--policy.preset={preset}", "--steps=4"))
    half = train(*words(start, dataset, tmp_path / "half", f"--policy.preset={preset}", "--steps=2"))
    config = checkpoint(tmp_path / "half", 2) / "train_config.json"
    rest = train(f"--config_path={config}", "--resume=true", "--steps=4")
    assert half + rest == whole
    weights = [load_file(checkpoint(tmp_path / name, 4) / "model.safetensors") for name in ("whole", "half")]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_training_goes_on_from_a_checkpoint_on_another_dataset_with_new_statistics(train, start, dataset, tmp_path):
    train(*words(start, dataset, tmp_path / "first", "--policy.preset=frozen"))
    again = [word for word in words(start, dataset, tmp_path / "second") if "--policy." not in word]
    again[again.index("--dataset.repo_id=me/cups")] = "--dataset.repo_id=me/mugs"
    train(*again, f"--policy.path={checkpoint(tmp_path / 'first', 2)}")
    stored = json.loads((checkpoint(tmp_path / "second", 2) / "config.json").read_text())
    assert list(stored["model"]["norm_stats"]) == ["mugs"]
    assert stored["base_checkpoint"] == str(checkpoint(tmp_path / "first", 2))
    assert stored["trained_batches"] == 2


def test_a_training_with_lora_does_not_go_on_with_other_frozen_weights(train, write_start, dataset, tmp_path):
    start = write_start(norm_stats=None)
    train(*words(start, dataset, tmp_path / "run", "--policy.optimizer_lr=1e-3"))
    config = checkpoint(tmp_path / "run", 2) / "train_config.json"
    weights = load_file(start / "model.safetensors")
    name = next(name for name in weights if name.endswith("mlp.fc1.weight"))
    weights[name] = weights[name] + 1e-3
    save_file(weights, start / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=f"not trained on the weights that are in {start} now.*vla-adapter from-lerobot"
    ):
        train(f"--config_path={config}", "--resume=true", "--steps=4")


def test_a_start_is_remembered_without_links(train, start, dataset, tmp_path):
    """LeRobot moves its link `last` to newer checkpoints."""
    link = tmp_path / "last"
    link.symlink_to(start)
    train(*words(link, dataset, tmp_path / "run", "--policy.preset=frozen", "--steps=1"))
    stored = json.loads((checkpoint(tmp_path / "run", 1) / "config.json").read_text())
    assert stored["base_checkpoint"] == str(start)


def test_episodes_that_are_not_chosen_may_be_broken(train, start, dataset, tmp_path):
    """A resumed training leaves them out too."""
    broken = Path(shutil.copytree(dataset, tmp_path / "broken"))
    path = next((broken / "data").rglob("*.parquet"))
    table = pq.read_table(path)
    actions = np.stack(table["action"].to_numpy())
    actions[table["episode_index"].to_numpy() == 1] = np.nan
    column = pa.FixedSizeListArray.from_arrays(pa.array(actions.reshape(-1), pa.float32()), 7)
    schema = table.schema
    position = schema.get_field_index("action")
    pq.write_table(table.set_column(position, schema.field(position), column.cast(schema.field(position).type)), path)

    given = words(start, broken, tmp_path / "run", "--policy.preset=frozen", "--dataset.episodes=[0, 2]")
    train(*given)
    stored = json.loads((checkpoint(tmp_path / "run", 2) / "config.json").read_text())
    expected = dataset_statistics(broken, robot="libero", unnorm_key="cups", on_bad_episode="skip")
    assert stored["model"]["norm_stats"] == expected
    train(f"--config_path={checkpoint(tmp_path / 'run', 2) / 'train_config.json'}", "--resume=true", "--steps=3")
    with pytest.raises(ValueError, match="episode"):
        train(*[word.replace("[0, 2]", "[0, 1]") for word in given], f"--output_dir={tmp_path / 'other'}")


def test_a_streamed_dataset_is_refused(train, start, dataset, tmp_path):
    with pytest.raises(ValueError, match="--dataset.streaming=true does not go with this policy"):
        train(*words(start, dataset, tmp_path / "run"), "--dataset.streaming=true")


def test_the_key_of_the_starts_statistics_goes_with_them(train, start, trained, dataset, tmp_path):
    begin = to_lerobot(str(trained), tmp_path / "begin", robot="libero", unnorm_key=model_fixtures.UNNORM_KEY)
    again = [word for word in words(start, dataset, tmp_path / "run", "--steps=1") if "--policy." not in word]
    train(*again, f"--policy.path={begin}", "--policy.preset=frozen")
    stored = json.loads((checkpoint(tmp_path / "run", 1) / "config.json").read_text())
    assert (list(stored["model"]["norm_stats"]), stored["unnorm_key"]) == (["cups"], None)


def test_a_changed_dataset_of_the_same_name_is_refused(train, start, dataset, tmp_path):
    train(*words(start, dataset, tmp_path / "first", "--policy.preset=frozen"))
    path = checkpoint(tmp_path / "first", 2)
    config = json.loads((path / "config.json").read_text())
    config["model"]["norm_stats"]["cups"]["action"]["q99"][0] += 0.1
    (path / "config.json").write_text(json.dumps(config))
    again = [word for word in words(start, dataset, tmp_path / "second") if "--policy." not in word]
    with pytest.raises(ValueError, match="other values of norm_stats.*vla-adapter from-lerobot"):
        train(*again, f"--policy.path={path}")


def test_cameras_in_another_order_are_refused(dataset, start):
    with pytest.raises(ValueError, match="in this order"):
        load(dataset, start, cameras=["wrist_image", "image"])


def test_lerobots_own_peft_is_refused(train, start, dataset, tmp_path):
    with pytest.raises(ValueError, match="--policy.preset=lora"):
        train(*words(start, dataset, tmp_path / "run"), "--peft.method_type=LORA")


def test_the_action_mask_is_stored_with_the_statistics(train, start, dataset, tmp_path):
    """As `vla-adapter check` suggests it for a gripper of two values."""
    mask = [True] * 6 + [False]
    given = [word for word in words(start, dataset, tmp_path / "run") if "policy.robot" not in word]
    mask_option = f"--policy.action_mask={json.dumps(mask)}"
    train(*given, "--policy.robot=none", "--policy.preset=frozen", mask_option, "--steps=1")
    stored = json.loads((checkpoint(tmp_path / "run", 1) / "config.json").read_text())
    action = stored["model"]["norm_stats"]["cups"]["action"]
    assert action["mask"] == mask
    assert (action["min"][6], action["max"][6]) == (-1.0, 1.0), "the gripper is learnt as it was recorded"


def test_a_rename_map_is_refused_in_training(train, start, dataset, tmp_path):
    rename = '--rename_map={"observation.images.image": "observation.images.top"}'
    with pytest.raises(ValueError, match="no effect in training; name the dataset's cameras with --policy.cameras"):
        train(*words(start, dataset, tmp_path / "run"), rename)
