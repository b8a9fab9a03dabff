"""`vla-adapter to-lerobot` and `from-lerobot`: the same weights, statistics, processor and card in the other layout.

LeRobot is not needed here. With LeRobot itself: `make test-lerobot`.
"""

import json
import shutil
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from model_fixtures import UNNORM_KEY, norm_stats
from safetensors.torch import load_file, save_file

from vla_adapter_hf import VLAAdapterProcessor, open_checkpoint
from vla_adapter_hf.checkpoints import embedded
from vla_adapter_hf.checkpoints.convert import convert_to_published
from vla_adapter_hf.checkpoints.info import checkpoint_info
from vla_adapter_hf.checkpoints.lerobot.convert import from_lerobot, to_lerobot
from vla_adapter_hf.checkpoints.lerobot.layout import PROCESSOR_FILES, STATE_FILE
from vla_adapter_hf.checkpoints.model_card import fill_model_card
from vla_adapter_hf.robot.policy import LocalPolicy
from vla_adapter_hf.serving.policy import ActionRules
from vla_adapter_hf.serving.settings import ServeSettings


CARD = "README.md"


@pytest.fixture(scope="module")
def own(tmp_path_factory, processor, tiny_model) -> Path:
    """A small checkpoint in our own layout, with a card that somebody has edited."""
    folder = tmp_path_factory.mktemp("own") / "pick-and-place"
    model = tiny_model(action_names=[f"joint_{number}.pos" for number in range(7)])
    model.save_pretrained(folder)
    VLAAdapterProcessor.from_model_config(model.config, processor.tokenizer).save_pretrained(folder)
    card = fill_model_card(model.config, "pick-and-place", "A policy.", "me/pick-and-place")
    (folder / CARD).write_text(f"{card}\nTwo lines\nof my own.\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def converted(own, tmp_path_factory) -> Path:
    return to_lerobot(str(own), tmp_path_factory.mktemp("lerobot") / "policy", robot="libero")


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_weights_and_card_are_the_same_bytes(own, converted):
    for name in ("model.safetensors", CARD):
        assert (converted / name).read_bytes() == (own / name).read_bytes()


def test_lerobots_configuration_holds_the_policys_type_and_our_whole_configuration(own, converted):
    config = json.loads((converted / "config.json").read_text())
    assert config["type"] == "vla_adapter"
    assert config["robot"] == "libero"
    assert config["action_feature_names"] == config["model"]["action_names"]
    assert config["action_feature_names"][0] == "joint_0.pos"
    assert config["model"] == json.loads((own / "config.json").read_text())
    assert set(config["input_features"]) == {
        "observation.images.image",
        "observation.images.wrist_image",
        "observation.state",
    }
    assert config["output_features"]["action"]["shape"] == [7]


def test_the_processors_files_are_the_same_bytes(own, converted):
    packed = {name: tensor.numpy().tobytes() for name, tensor in load_file(converted / STATE_FILE).items()}
    assert packed == {name: content for name, content in files_of(own).items() if name in PROCESSOR_FILES}


def test_there_and_back_gives_every_file_again(own, converted, tmp_path):
    back = from_lerobot(str(converted), tmp_path / "back")
    assert files_of(back) == files_of(own)


def test_what_our_layout_does_not_hold_is_reported(converted, tmp_path):
    lines = []
    from_lerobot(str(converted), tmp_path / "back", lines.append)
    assert any("not in our layout: robot='libero'" in line for line in lines)


def test_the_precision_of_the_weights_comes_along_and_another_one_is_reported(own, converted, tmp_path):
    assert json.loads((converted / "config.json").read_text())["dtype"] == "float32"
    small = tmp_path / "small"
    open_checkpoint(own).load_model("bfloat16").save_pretrained(small)
    open_checkpoint(own).load_processor().save_pretrained(small)
    policy = to_lerobot(str(small), tmp_path / "policy", robot="libero")
    config = json.loads((policy / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    lines = []
    from_lerobot(str(policy), tmp_path / "same", lines.append)
    assert not any("dtype" in line for line in lines)
    # A policy of float32 weights whose option was bfloat16.
    (policy / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))
    from_lerobot(str(policy), tmp_path / "other", lines.append)
    assert any("not in our layout: dtype='float32'" in line for line in lines)


def test_to_published_sends_a_policy_of_lerobots_to_from_lerobot(converted, tmp_path):
    """The published layout has no place for its robot and the name of its statistics."""
    with pytest.raises(ValueError, match="vla-adapter from-lerobot"):
        convert_to_published(str(converted), tmp_path / "published", report_progress=lambda line: None)
    assert list(tmp_path.iterdir()) == []


def test_the_embedded_checkpoint_is_there_until_it_has_been_copied(own, tmp_path, monkeypatch):
    """From a zip file, importlib gives a temporary folder that is removed after the block."""

    @contextmanager
    def unpacked(_):
        shutil.copytree(own, tmp_path / "unpacked" / "checkpoint")
        yield tmp_path / "unpacked"
        shutil.rmtree(tmp_path / "unpacked")

    monkeypatch.setattr(embedded, "as_file", unpacked)
    policy = to_lerobot("embedded", tmp_path / "policy", robot="libero", report_progress=lambda line: None)
    assert files_of(policy)["model.safetensors"] == files_of(own)["model.safetensors"]


def test_a_checkpoint_in_shards_keeps_its_shards(own, tmp_path):
    sharded = Path(shutil.copytree(own, tmp_path / "sharded"))
    (sharded / "model.safetensors").unlink()
    open_checkpoint(own).load_model().save_pretrained(sharded, max_shard_size="200KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    back = from_lerobot(str(to_lerobot(str(sharded), tmp_path / "policy", robot="none")), tmp_path / "back")
    assert {name: content for name, content in files_of(back).items() if name.startswith("model")} == {
        name: content for name, content in files_of(sharded).items() if name.startswith("model")
    }


def test_it_opens_like_any_checkpoint_and_predicts_the_same(own, converted, observation):
    actions = []
    for folder in (own, converted):
        checkpoint = open_checkpoint(folder)
        actions.append(checkpoint.load_model().predict_action(**checkpoint.load_processor()(**observation)))
    np.testing.assert_array_equal(*actions)
    assert "LeRobot" in checkpoint_info(converted)["layout"]


def test_without_a_card_one_is_written(converted, tmp_path):
    policy = Path(shutil.copytree(converted, tmp_path / "policy"))
    (policy / CARD).unlink()
    assert "Trained with LeRobot" in (from_lerobot(str(policy), tmp_path / "back") / CARD).read_text()


def test_a_binary_gripper_needs_a_robot_before_anything_is_written(own, tmp_path):
    with pytest.raises(ValueError, match="gripper that is learnt as 0...1.*libero"):
        to_lerobot(str(own), tmp_path / "policy")
    with pytest.raises(ValueError, match="actions of 14 values"):
        to_lerobot(str(own), tmp_path / "policy", robot="aloha")
    assert not list(tmp_path.iterdir())


def test_a_preset_is_refused_for_a_gripper_that_was_learnt_as_minus_one_to_one(tmp_path, processor, tiny_model):
    stats = norm_stats()
    stats[UNNORM_KEY]["action"]["min"][-1], stats[UNNORM_KEY]["action"]["max"][-1] = -1.0, 1.0
    model = tiny_model(norm_stats=stats)
    model.save_pretrained(tmp_path / "own")
    VLAAdapterProcessor.from_model_config(model.config, processor.tokenizer).save_pretrained(tmp_path / "own")
    with pytest.raises(ValueError, match=r"-1\.\.\.1: it might open where it should close. Give robot as none"):
        to_lerobot(str(tmp_path / "own"), tmp_path / "policy", robot="libero")
    with pytest.raises(ValueError, match="it might open where it should close"):
        LocalPolicy(tmp_path / "own", robot="libero")
    with pytest.raises(ValueError, match="might open where it should close"):
        ActionRules.of(model.config, ServeSettings(robot="libero"))
    assert to_lerobot(str(tmp_path / "own"), tmp_path / "policy", robot="none").is_dir()


def test_a_published_checkpoint_is_sent_to_convert(published_pro, tmp_path):
    with pytest.raises(ValueError, match="vla-adapter convert"):
        to_lerobot(str(published_pro), tmp_path / "policy", robot="libero")


def test_our_own_layout_is_not_taken_for_lerobots(own, tmp_path):
    with pytest.raises(ValueError, match="from-lerobot takes what LeRobot wrote"):
        from_lerobot(str(own), tmp_path / "back")


def test_a_folder_that_exists_is_not_touched(own, converted, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    for convert, source in ((to_lerobot, own), (from_lerobot, converted)):
        with pytest.raises(ValueError, match="exists already"):
            convert(str(source), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_weights_of_another_model_are_refused(converted, tmp_path):
    policy = Path(shutil.copytree(converted, tmp_path / "policy"))
    config = json.loads((policy / "config.json").read_text())
    config["model"]["chunk_size"] = config["model"]["action_dim"] = 5
    config["model"]["norm_stats"] = config["model"]["action_names"] = None
    (policy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="policy"):
        from_lerobot(str(policy), tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_a_file_that_is_no_processors_is_not_written(converted, tmp_path):
    policy = Path(shutil.copytree(converted, tmp_path / "policy"))
    save_file({"../evil.py": torch.zeros(3, dtype=torch.uint8)}, policy / STATE_FILE)
    with pytest.raises(ValueError, match="no file of the processor"):
        open_checkpoint(policy).load_processor()


def test_a_tokenizer_with_code_of_its_own_is_refused_without_a_question(converted, tmp_path, monkeypatch):
    policy = Path(shutil.copytree(converted, tmp_path / "policy"))
    files = load_file(policy / STATE_FILE)
    stored = json.loads(files["tokenizer_config.json"].numpy().tobytes())
    foreign = {"tokenizer_class": "Foreign", "auto_map": {"AutoTokenizer": ["foreign.Foreign", None]}}
    text = json.dumps(stored | foreign).encode()
    save_file(
        files | {"tokenizer_config.json": torch.frombuffer(bytearray(text), dtype=torch.uint8)}, policy / STATE_FILE
    )
    asked = []
    monkeypatch.setattr("builtins.input", asked.append)
    with pytest.raises(ValueError, match="asks for code of its own, which is not run"):
        open_checkpoint(policy).load_processor()
    assert asked == []


def test_a_policy_without_its_processor_says_so(converted, tmp_path):
    policy = Path(shutil.copytree(converted, tmp_path / "policy"))
    (policy / STATE_FILE).unlink()
    with pytest.raises(ValueError, match=STATE_FILE):
        open_checkpoint(policy).load_processor()
