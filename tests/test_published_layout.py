"""Checkpoints as they were published or as users trained them: what loads, what is refused, and that no code is run.

`published_copy` is a small checkpoint in the published layout that a test may change.
"""

import json
import os
import pickle
import shutil
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from model_fixtures import norm_stats
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoProcessor

from vla_adapter_hf import (
    VLAAdapterConfig,
    VLAAdapterForActionPrediction,
    VLAAdapterProcessor,
)
from vla_adapter_hf.checkpoints.auto import PrismaticProcessor
from vla_adapter_hf.checkpoints.files import as_state_dict, read_pickle


WEIGHTS, STATISTICS = "model.safetensors", "dataset_statistics.json"
ACTION_HEAD, PROPRIO_PROJECTOR = "action_head--checkpoint.pt", "proprio_projector--checkpoint.pt"


def assert_same_model(source: Path, expected: torch.nn.Module, **kwargs) -> torch.nn.Module:
    model = AutoModel.from_pretrained(source, **kwargs)
    weights = expected.state_dict()
    assert model.state_dict().keys() == weights.keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    return model


def assert_refused(source: Path, message: str, **kwargs) -> None:
    """Refused by the model, and no less clearly by the configuration where that can know."""
    with pytest.raises(ValueError, match=message) as refusal:
        AutoModel.from_pretrained(source, **kwargs)
    assert refusal.type is ValueError, f"an accident rather than a refusal: {refusal.value!r}"


def change_tensors(path: Path, change) -> None:
    """Apply `change` to the state dict in a safetensors file or a pickle."""
    tensors = load_file(path) if path.suffix == ".safetensors" else torch.load(path)
    changed = change(tensors)
    tensors = tensors if changed is None else changed
    if path.suffix == ".safetensors":
        save_file(tensors, path, metadata={"format": "pt"})
    else:
        torch.save(tensors, path)


def change_json(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


class TestLoading:
    def test_auto_classes_find_ours(self, published_pro, published_original):
        for source, variant in ((published_pro, "pro"), (published_original, "original")):
            config = AutoConfig.from_pretrained(source)
            assert type(config) is VLAAdapterConfig and config.policy_variant == variant
            assert type(AutoModel.from_pretrained(source)) is VLAAdapterForActionPrediction
            assert type(AutoProcessor.from_pretrained(source)) is VLAAdapterProcessor

    def test_our_own_classes_read_it_too(self, published_pro, pro_model):
        config, expected = VLAAdapterConfig.from_pretrained(published_pro), AutoConfig.from_pretrained(published_pro)
        assert config.to_diff_dict() == expected.to_diff_dict()
        model = VLAAdapterForActionPrediction.from_pretrained(published_pro)
        assert torch.equal(model.policy.fc_out.weight, pro_model.policy.fc_out.weight)

    def test_a_folder_may_be_a_string(self, published_pro, pro_model):
        assert_same_model(str(published_pro), pro_model)

    def test_sizes_come_from_the_tensors(self, pro_model):
        config = pro_model.config
        assert (config.dinov2_config.hidden_size, config.dinov2_config.num_hidden_layers) == (32, 3)
        assert (config.siglip_config.hidden_size, config.siglip_config.num_hidden_layers) == (48, 3)
        assert (config.text_config.hidden_size, config.text_config.num_hidden_layers) == (32, 24)
        assert (config.text_config.vocab_size, config.num_action_queries) == (1024, 64)
        assert (config.action_dim, config.proprio_dim, config.policy_num_layers) == (7, 8, 24)

    def test_it_keeps_the_originals_rules(self, pro_model):
        config = pro_model.config
        assert (config.policy_task_tokens, config.policy_rope_dtype) == (512, "bfloat16")
        assert (config.constant_dims, config.image_center_crop, config.image_jpeg_round_trip) == (
            "published",
            0.9,
            True,
        )

    def test_the_statistics_are_those_of_the_file_beside_the_weights(self, published_copy, pro_model):
        change_json(published_copy / "config.json", lambda config: config.update(norm_stats={"other": {}}))
        assert AutoConfig.from_pretrained(published_copy).norm_stats == pro_model.config.norm_stats

    def test_the_language_models_pad_token_is_not_believed(self, published_copy):
        # The published files say 32000, which is a leftover of another language model.
        change_json(published_copy / "config.json", lambda config: config.update(pad_token_id=32000))
        change_json(published_copy / "config.json", lambda config: config["text_config"].update(pad_token_id=32000))
        assert AutoConfig.from_pretrained(published_copy).text_config.pad_token_id != 32000

    def test_the_precision_of_the_files_can_be_kept_or_chosen(self, published_copy, pro_model):
        to_bfloat16 = lambda tensors: {name: tensor.bfloat16() for name, tensor in tensors.items()}  # noqa: E731
        for name in (WEIGHTS, ACTION_HEAD, PROPRIO_PROJECTOR):
            change_tensors(published_copy / name, to_bfloat16)
        change_json(published_copy / "config.json", lambda config: config.update(torch_dtype="bfloat16"))
        kept = AutoModel.from_pretrained(published_copy, dtype="auto")
        assert {parameter.dtype for parameter in kept.parameters()} == {torch.bfloat16}
        chosen = AutoModel.from_pretrained(published_copy, dtype=torch.float32)
        assert {parameter.dtype for parameter in chosen.parameters()} == {torch.float32}
        assert torch.equal(chosen.policy.fc_out.weight, pro_model.policy.fc_out.weight.bfloat16().float())

    def test_what_has_no_effect_is_not_loaded(self, published_copy, pro_model):
        def spoil(tensors):
            for name, tensor in tensors.items():
                ending = name.split("featurizer.")[-1]
                if ending.startswith(("blocks.3.", "norm.", "attn_pool.")) or "film_gen" in name:
                    tensor.fill_(float("nan"))

        change_tensors(published_copy / WEIGHTS, spoil)
        change_tensors(published_copy / ACTION_HEAD, spoil)
        assert_same_model(published_copy, pro_model)

    @pytest.mark.parametrize("missing", ["vision_backbone.fused_featurizer.attn_pool.", "film_gen"])
    def test_what_has_no_effect_may_be_missing(self, published_copy, pro_model, missing):
        for name in (WEIGHTS, ACTION_HEAD):
            change_tensors(
                published_copy / name, lambda tensors: {key: t for key, t in tensors.items() if missing not in key}
            )
        assert_same_model(published_copy, pro_model)

    def test_a_saved_language_model_head_is_left_out(self, published_copy, pro_model):
        def add_head(tensors):
            tensors["language_model.lm_head.weight"] = tensors["language_model.model.embed_tokens.weight"].clone()

        change_tensors(published_copy / WEIGHTS, add_head)
        assert_same_model(published_copy, pro_model)

    def test_pickles_without_the_prefix_of_distributed_training(self, published_copy, pro_model):
        for name in (ACTION_HEAD, PROPRIO_PROJECTOR):
            change_tensors(
                published_copy / name,
                lambda tensors: OrderedDict((key.removeprefix("module."), t) for key, t in tensors.items()),
            )
        assert_same_model(published_copy, pro_model)

    def test_pickles_in_torchs_older_format(self, published_copy, pro_model):
        for name in (ACTION_HEAD, PROPRIO_PROJECTOR):
            tensors = torch.load(published_copy / name)
            torch.save(tensors, published_copy / name, _use_new_zipfile_serialization=False)
        assert_same_model(published_copy, pro_model)

    def test_sharded_weights(self, published_copy, pro_model):
        tensors = list(load_file(published_copy / WEIGHTS).items())
        index = {}
        for number, shard in enumerate((tensors[:100], tensors[100:]), start=1):
            name = f"model-{number:05d}-of-00002.safetensors"
            save_file(dict(shard), published_copy / name)
            index.update(dict.fromkeys(dict(shard), name))
        (published_copy / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
        (published_copy / WEIGHTS).unlink()
        assert_same_model(published_copy, pro_model)
        (published_copy / name).unlink()
        assert_refused(published_copy, f"has no {name}")

    def test_loading_information_is_given_on_request(self, published_pro):
        model, information = AutoModel.from_pretrained(published_pro, output_loading_info=True)
        assert isinstance(model, VLAAdapterForActionPrediction)
        assert not information["missing_keys"] and not information["unexpected_keys"]

    def test_it_is_saved_as_a_normal_model(self, published_pro, pro_model, tmp_path):
        pro_model.save_pretrained(tmp_path)
        assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "vla_adapter"
        assert_same_model(tmp_path, pro_model)

    def test_the_model_knows_where_it_came_from(self, published_pro, pro_model):
        assert pro_model.name_or_path == pro_model.config.name_or_path == str(published_pro)


class TestNames:
    def rename(self, folder: Path, name: str, kinds=("action_head", "proprio_projector")) -> None:
        for kind in kinds:
            (folder / f"{kind}--checkpoint.pt").rename(folder / f"{kind}--{name}.pt")

    @pytest.mark.parametrize("name", ["150000_checkpoint", "latest_checkpoint"])
    def test_of_folders_that_users_trained(self, published_copy, pro_model, name):
        self.rename(published_copy, name)
        assert_same_model(published_copy, pro_model)
        assert_same_model(published_copy, pro_model, step=name.removesuffix("_checkpoint"))

    def test_several_of_one_kind_need_a_choice(self, published_copy, pro_model):
        for step in ("5000", "10000"):
            for name in (ACTION_HEAD, PROPRIO_PROJECTOR):
                copy = published_copy / name.replace("--", f"--{step}_")
                copy.write_bytes((published_copy / name).read_bytes())
        change_tensors(
            published_copy / "action_head--5000_checkpoint.pt",
            lambda tensors: tensors.update({"module.model.fc2.bias": torch.full((7,), 5.0)}),
        )
        assert_refused(published_copy, "several.*action_head--10000_checkpoint.pt.*action_head--5000_checkpoint.pt")
        assert_same_model(published_copy, pro_model, step="10000")
        chosen = AutoModel.from_pretrained(published_copy, step="5000")
        assert chosen.policy.fc_out.bias.unique().tolist() == [5.0]

    def test_a_step_can_be_given_with_a_configuration(self, published_copy, pro_model):
        self.rename(published_copy, "5000_checkpoint")
        assert_same_model(published_copy, pro_model, step="5000", config=pro_model.config)

    def test_the_configuration_and_the_processor_take_a_step_too(self, published_copy):
        self.rename(published_copy, "5000_checkpoint")
        assert type(AutoConfig.from_pretrained(published_copy, step="5000")) is VLAAdapterConfig
        assert type(AutoProcessor.from_pretrained(published_copy, step="5000")) is VLAAdapterProcessor

    def test_a_step_that_is_not_there(self, published_copy):
        self.rename(published_copy, "5000_checkpoint")
        assert_refused(published_copy, "has no action_head--7000_checkpoint.pt; it has action_head--5000", step="7000")

    def test_a_step_of_which_only_one_part_is_there(self, published_copy):
        self.rename(published_copy, "5000_checkpoint", kinds=["action_head"])
        assert_refused(published_copy, "has no proprio_projector--5000_checkpoint.pt", step="5000")

    def test_parts_of_different_steps_are_not_mixed(self, published_copy):
        (published_copy / ACTION_HEAD).rename(published_copy / "action_head--5000_checkpoint.pt")
        (published_copy / PROPRIO_PROJECTOR).rename(published_copy / "proprio_projector--7000_checkpoint.pt")
        message = "action_head--5000_checkpoint.pt and proprio_projector--7000_checkpoint.pt, which are of different"
        assert_refused(published_copy, message)

    def test_the_step_may_be_a_number(self, published_copy, pro_model):
        self.rename(published_copy, "5000_checkpoint")
        assert_same_model(published_copy, pro_model, step=5000)


class TestRobots:
    def test_libero_is_assumed_and_said(self, published_copy, caplog):
        config = AutoConfig.from_pretrained(published_copy)
        assert (config.chunk_size, config.cameras) == (8, ["image", "wrist_image"])
        assert "taken as a libero model: chunks of 8 actions, cameras image, wrist_image" in caplog.text

    def test_a_robot_can_be_named(self, published_pro):
        assert AutoConfig.from_pretrained(published_pro, robot="calvin").cameras == ["rgb_static", "rgb_gripper"]
        assert AutoModel.from_pretrained(published_pro, robot="calvin").config.cameras == ["rgb_static", "rgb_gripper"]
        processor = AutoProcessor.from_pretrained(published_pro, robot="calvin")
        assert processor.image_processor.cameras == ["rgb_static", "rgb_gripper"]

    @pytest.mark.parametrize(("robot", "message"), [("aloha", "action_dim=7.*14"), ("bridge", "proprio_dim=8.*7")])
    def test_a_robot_of_other_sizes_is_refused(self, published_pro, robot, message):
        assert_refused(published_pro, message, robot=robot)

    def test_a_misspelt_field_is_refused(self, published_pro):
        for loader in (AutoConfig, AutoModel):
            with pytest.raises(TypeError, match="no field 'camera'; did you mean 'cameras'"):
                loader.from_pretrained(published_pro, camera=["a", "b"])

    def test_a_robot_that_is_not_known_is_refused_with_those_that_are(self, published_pro):
        assert_refused(published_pro, "robot='panda'.*libero, calvin, aloha, bridge", robot="panda")

    def test_a_checkpoint_of_no_known_robot_says_what_it_needs(self, published_copy):
        self.shrink_actions(published_copy)
        assert_refused(published_copy, "action_dim=5.*chunk_size, cameras, norm_type and action_dim")

    def test_a_robot_of_ones_own(self, published_copy):
        self.shrink_actions(published_copy)
        model = AutoModel.from_pretrained(
            published_copy, action_dim=5, chunk_size=3, cameras=["a", "b"], norm_stats=norm_stats(action_dim=5)
        )
        assert (model.config.action_dim, model.config.chunk_size, model.config.cameras) == (5, 3, ["a", "b"])

    @staticmethod
    def shrink_actions(folder: Path) -> None:
        def shrink(tensors):
            for name in ("layer_norm1.weight", "layer_norm1.bias"):
                tensors[f"module.model.{name}"] = tensors[f"module.model.{name}"][: 5 * 32].clone()
            tensors["module.model.fc1.weight"] = tensors["module.model.fc1.weight"][:, : 5 * 32].clone()
            for name in ("fc2.weight", "fc2.bias"):
                tensors[f"module.model.{name}"] = tensors[f"module.model.{name}"][:5].clone()

        change_tensors(folder / ACTION_HEAD, shrink)


class TestProcessorOptions:
    """`AutoProcessor.from_pretrained(published, ...)` sets what is given where it belongs, or refuses it by name."""

    def test_of_each_part(self, published_pro):
        processor = AutoProcessor.from_pretrained(
            published_pro,
            prompt_style="in_out",
            do_center_crop=False,
            do_jpeg_round_trip=False,
            size={"height": 28, "width": 42},
            padding_side="left",
            cls_token="(CLS)",
        )
        image_processor, tokenizer = processor.image_processor, processor.tokenizer
        assert processor.prompt_style == "in_out"
        assert not image_processor.do_center_crop and not image_processor.do_jpeg_round_trip
        assert dict(image_processor.size) == {"height": 28, "width": 42}
        assert (tokenizer.padding_side, tokenizer.cls_token) == ("left", "(CLS)")

    def test_of_the_configuration(self, published_pro):
        options = {"image_center_crop": None, "image_jpeg_round_trip": False, "cameras": ["a", "b"]}
        image_processor = AutoProcessor.from_pretrained(published_pro, **options).image_processor
        assert not image_processor.do_center_crop and not image_processor.do_jpeg_round_trip
        assert image_processor.cameras == ["a", "b"]
        assert AutoProcessor.from_pretrained(published_pro, image_center_crop=0.8).image_processor.crop_area == 0.8

    def test_the_images_own_option_has_the_last_word(self, published_pro):
        image_processor = AutoProcessor.from_pretrained(
            published_pro, image_center_crop=0.8, crop_area=0.7
        ).image_processor
        assert image_processor.crop_area == 0.7

    def test_without_any_all_is_as_published(self, published_pro):
        processor = AutoProcessor.from_pretrained(published_pro)
        image_processor = processor.image_processor
        assert (processor.prompt_style, processor.tokenizer.padding_side) == ("chat", "right")
        assert image_processor.do_center_crop and image_processor.do_jpeg_round_trip
        assert image_processor.crop_area == 0.9

    @pytest.mark.parametrize("name", ["do_centre_crop", "promt_style", "prompt"])
    def test_that_nothing_has_is_refused(self, published_pro, name):
        with pytest.raises(TypeError, match=f"cannot be loaded with {name}: neither the configuration nor"):
            AutoProcessor.from_pretrained(published_pro, **{name: None}, padding_side="left")


class TestStatistics:
    def test_missing_ones_are_refused_and_not_replaced_by_those_of_other_datasets(self, published_copy):
        (published_copy / STATISTICS).unlink()
        assert_refused(published_copy, "has no dataset_statistics.json.*norm_stats=")

    def test_they_can_be_given(self, published_copy):
        (published_copy / STATISTICS).unlink()
        model = AutoModel.from_pretrained(published_copy, norm_stats=norm_stats(key="mine"))
        assert list(model.config.norm_stats) == ["mine"]

    def test_of_another_size_are_refused(self, published_copy):
        change_json(published_copy / STATISTICS, lambda stats: stats["libero_object_no_noops"]["action"]["q01"].pop())
        assert_refused(published_copy, r"norm_stats\['libero_object_no_noops'\]\['action'\]\['q01'\].*action_dim=7")

    def test_empty_ones_are_as_good_as_missing(self, published_copy):
        (published_copy / STATISTICS).write_text("{}")
        assert_refused(published_copy, "has no dataset_statistics.json, or an empty one.*norm_stats=")

    @pytest.mark.parametrize("content", ["", "{", '["list"]', "\x00\x01"])
    def test_damaged_ones_are_refused(self, published_copy, content):
        (published_copy / STATISTICS).write_text(content)
        assert_refused(published_copy, "dataset_statistics.json")


class TestUntrainedQueries:
    """Folders merged by the original's separate script silently hold action queries that were never trained."""

    def test_are_warned_of(self, published_copy, caplog):
        def untrain(tensors):
            shape = tensors["action_queries.weight"].shape
            tensors["action_queries.weight"] = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02

        change_tensors(published_copy / WEIGHTS, untrain)
        AutoModel.from_pretrained(published_copy)
        assert "action queries look like they did before training" in caplog.text

    def test_trained_ones_pass_in_silence(self, published_copy, caplog):
        AutoModel.from_pretrained(published_copy)
        assert "before training" not in caplog.text


class TestRefusals:
    @pytest.mark.parametrize(
        ("name", "message"),
        [
            (WEIGHTS, "has no model.safetensors"),
            (ACTION_HEAD, "has no action_head--checkpoint.pt"),
            (PROPRIO_PROJECTOR, "has no proprio_projector--checkpoint.pt"),
        ],
    )
    def test_a_missing_file(self, published_copy, name, message):
        (published_copy / name).unlink()
        assert_refused(published_copy, message)

    def test_a_folder_with_an_adapter_only(self, published_copy):
        (published_copy / WEIGHTS).unlink()
        (published_copy / "lora_adapter").mkdir()
        (published_copy / "lora_adapter" / "adapter_model.safetensors").write_bytes(b"")
        assert_refused(published_copy, "lora_adapter.*not enough.*action queries.*Merge it")

    def test_an_adapter_beside_the_weights_does_not_matter(self, published_copy, pro_model):
        (published_copy / "lora_adapter").mkdir()
        (published_copy / "lora_adapter" / "adapter_config.json").write_text("{}")
        assert_same_model(published_copy, pro_model)

    def test_a_llama_openvla(self, published_copy):
        def to_llama(config):
            config.update(llm_backbone_id="llama2-7b-pure", text_config={"model_type": "llama"})

        change_json(published_copy / "config.json", to_llama)
        assert_refused(published_copy, "OpenVLA.*'llama'.*not a VLA-Adapter.*Only Qwen2")

    def test_a_llama_openvla_that_does_not_say_so_in_its_text_config(self, published_copy):
        def to_llama(config):
            config.update(llm_backbone_id="llama2-7b-pure")
            del config["text_config"]

        change_json(published_copy / "config.json", to_llama)
        assert_refused(published_copy, "OpenVLA.*llama2-7b-pure.*not a VLA-Adapter")

    def test_a_vision_tower_whose_heads_are_not_known(self, published_copy):
        change_json(published_copy / "config.json", lambda config: config.pop("timm_model_args"))
        assert_refused(published_copy, "vision tower 'vit_vlatiny.*attention heads.*Known: vit_large")

    @pytest.mark.parametrize("share", [0, 0.001, 0.5, 0.99])
    @pytest.mark.parametrize("name", [WEIGHTS, ACTION_HEAD, PROPRIO_PROJECTOR])
    def test_a_file_that_was_cut_short(self, published_copy, name, share):
        path = published_copy / name
        os.truncate(path, int(path.stat().st_size * share))
        assert_refused(published_copy, f"{name}.*(damaged|cut short)")

    @pytest.mark.parametrize("zipped", [True, False])
    def test_a_pickle_with_damaged_bytes_anywhere(self, published_copy, zipped):
        path = published_copy / PROPRIO_PROJECTOR
        torch.save(torch.load(path), path, _use_new_zipfile_serialization=zipped)
        intact, generator = path.read_bytes(), np.random.default_rng(0)
        refused = 0
        for _ in range(300):
            damaged = bytearray(intact[: generator.integers(len(intact) // 2, len(intact) + 1)])
            for place in generator.integers(0, 1500, size=generator.integers(0, 5)):
                damaged[place] = generator.integers(256)
            path.write_bytes(damaged)
            try:
                as_state_dict(read_pickle(path), path.name)
            except ValueError as error:
                refused += 1
                assert path.name in str(error)
        assert refused > 250  # the rest are numbers changed into other numbers

    @pytest.mark.parametrize("name", [WEIGHTS, ACTION_HEAD, PROPRIO_PROJECTOR])
    @pytest.mark.parametrize(
        "content", [b"\x00" * 4096, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"]
    )
    def test_a_file_that_is_something_else(self, published_copy, name, content):
        # The second is what a clone without large file storage leaves behind.
        (published_copy / name).write_bytes(content)
        assert_refused(published_copy, f"{name}.*(damaged|cut short|refused)")

    def test_a_config_that_is_damaged(self, published_copy):
        (published_copy / "config.json").write_text('{"model_type": "openvla", ')
        with pytest.raises((ValueError, OSError), match="config.json"):
            AutoModel.from_pretrained(published_copy)

    @pytest.mark.parametrize(
        ("name", "value"),
        [("text_config", []), ("text_config", None), ("timm_model_ids", None), ("timm_model_args", None)],
    )
    def test_an_entry_of_the_config_of_another_kind(self, published_copy, name, value):
        change_json(published_copy / "config.json", lambda config: config.update({name: value}))
        assert_refused(published_copy, f"{name} must be a (dict|list), got")

    @pytest.mark.parametrize(
        "weight_map", [None, [], {}, {"a": 1}, {"a": "../model.safetensors"}, {"a": "/x.safetensors"}]
    )
    def test_an_index_that_is_damaged_or_leads_elsewhere(self, published_copy, weight_map):
        shutil.move(published_copy / WEIGHTS, published_copy.parent / WEIGHTS)
        content = {} if weight_map is None else {"weight_map": weight_map}
        (published_copy / "model.safetensors.index.json").write_text(json.dumps(content))
        assert_refused(published_copy, "model.safetensors.index.json")

    @pytest.mark.parametrize("content", [[torch.zeros(2)], {"a": 1}, torch.zeros(2)])
    def test_a_pickle_that_is_no_state_dict(self, published_copy, content):
        torch.save(content, published_copy / ACTION_HEAD)
        assert_refused(published_copy, f"{ACTION_HEAD} must hold a state dict of tensors")


class TestWrongTensors:
    """Nothing is half loaded: a policy with one layer at random predicts actions that look like actions."""

    @pytest.mark.parametrize(
        ("file", "name", "ours"),
        [
            (
                WEIGHTS,
                "language_model.model.layers.3.mlp.up_proj.weight",
                "language_model.layers.3.mlp.up_proj.weight",
            ),
            (WEIGHTS, "vision_backbone.featurizer.blocks.1.attn.proj.bias", "dinov2.encoder.layer.1"),
            (WEIGHTS, "vision_backbone.featurizer.blocks.1.attn.qkv.weight", "dinov2.encoder.layer.1"),
            (WEIGHTS, "vision_backbone.fused_featurizer.blocks.2.mlp.fc2.weight", "siglip.encoder.layers.2.mlp.fc2"),
            (WEIGHTS, "vision_backbone.fused_featurizer.pos_embed", "pos_embed|siglip.embeddings"),
            (WEIGHTS, "vision_backbone.featurizer.cls_token", "cls_token"),
            (WEIGHTS, "vision_backbone.featurizer.reg_token", "reg_token|register_tokens"),
            (WEIGHTS, "language_model.model.embed_tokens.weight", "embed_tokens"),
            (WEIGHTS, "action_queries.weight", "action_queries"),
            (WEIGHTS, "projector.fc2.weight", "vision_projector.fc2.weight"),
            (ACTION_HEAD, "module.model.mlp_resnet_blocks.5.k_task.weight", "policy.blocks.5.attention.k_task.weight"),
            (ACTION_HEAD, "module.model.mlp_resnet_blocks.0.gating_factor", "policy.blocks.0.attention.gating_factor"),
            (ACTION_HEAD, "module.model.fc1.weight", "policy.fc_in.weight"),
            (ACTION_HEAD, "module.model.fc2.weight", "fc2.weight|fc_out.weight"),
            (PROPRIO_PROJECTOR, "module.fc2.weight", "proprio_projector.fc2.weight"),
            (PROPRIO_PROJECTOR, "module.fc1.weight", "fc1.weight"),
        ],
    )
    def test_a_missing_tensor_is_named(self, published_copy, file, name, ours):
        change_tensors(published_copy / file, lambda tensors: _without(tensors, name))
        for options in ({}, {"ignore_mismatched_sizes": True}):
            assert_refused(published_copy, f"not a complete VLA-Adapter checkpoint.*({ours})", **options)

    def test_a_wrong_shape_may_start_anew(self, published_copy, pro_model):
        change_tensors(
            published_copy / PROPRIO_PROJECTOR, lambda tensors: tensors.update({"module.fc2.bias": torch.zeros(33)})
        )
        model = AutoModel.from_pretrained(published_copy, ignore_mismatched_sizes=True)
        assert model.proprio_projector.fc2.bias.shape == (32,)
        assert torch.equal(model.policy.fc_out.weight, pro_model.policy.fc_out.weight)

    @pytest.mark.parametrize(
        ("file", "name", "shape", "message"),
        [
            (WEIGHTS, "language_model.model.layers.3.mlp.up_proj.weight", (81, 32), r"up_proj.*\(81, 32\), expected"),
            (WEIGHTS, "projector.fc1.weight", (320, 81), r"vision_projector.fc1.*\(320, 81\), expected \(320, 80\)"),
            (WEIGHTS, "vision_backbone.featurizer.blocks.1.ls1.scale_factor", (31,), r"layer_scale1.*\(31,\), exp"),
            (ACTION_HEAD, "module.model.mlp_resnet_blocks.5.q_proj.weight", (32, 33), r"blocks.5.*q_proj.*\(32, 33\)"),
            (PROPRIO_PROJECTOR, "module.fc2.bias", (33,), r"proprio_projector.fc2.bias.*\(33,\), expected \(32,\)"),
        ],
    )  # fmt: skip
    def test_a_wrong_shape_is_named(self, published_copy, file, name, shape, message):
        change_tensors(published_copy / file, lambda tensors: tensors.update({name: torch.zeros(shape)}))
        assert_refused(published_copy, message)

    def test_a_tensor_too_many_is_named(self, published_copy):
        change_tensors(
            published_copy / ACTION_HEAD, lambda tensors: tensors.update({"module.model.fc9.bias": torch.zeros(1)})
        )
        assert_refused(published_copy, "fc9.bias has no place in the model")

    def test_a_policy_of_another_depth_than_the_language_model(self, published_copy):
        change_tensors(
            published_copy / ACTION_HEAD,
            lambda tensors: OrderedDict((k, t) for k, t in tensors.items() if ".mlp_resnet_blocks.23." not in k),
        )
        assert_refused(published_copy, "policy_num_layers=23 must equal text_config.num_hidden_layers=24")

    def test_a_policy_of_another_width_than_the_language_model(self, published_copy):
        change_tensors(
            published_copy / ACTION_HEAD,
            lambda tensors: tensors.update({"module.model.fc2.weight": torch.zeros(7, 64)}),
        )
        assert_refused(published_copy, r"policy.fc_out.weight has shape \(7, 64\), expected \(7, 32\)")


def _without(tensors: dict, name: str) -> dict:
    assert name in tensors
    return OrderedDict((key, tensor) for key, tensor in tensors.items() if key != name)


class Payload:
    """Something whose unpickling writes a file, as malicious pickles run programs."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return Path.write_text, (self.marker, "executed")


class TestNothingIsExecuted:
    @pytest.fixture
    def marker(self, tmp_path) -> Path:
        return tmp_path / "executed"

    def test_the_payload_would_work(self, marker):
        pickle.loads(pickle.dumps(Payload(marker)))
        assert marker.exists()

    @pytest.mark.parametrize("name", [ACTION_HEAD, PROPRIO_PROJECTOR])
    @pytest.mark.parametrize("zipped", [True, False])
    def test_of_a_pickle_with_code_in_it(self, published_copy, marker, name, zipped):
        tensors = torch.load(published_copy / name)
        tensors["module.extra"] = Payload(marker)
        torch.save(tensors, published_copy / name, _use_new_zipfile_serialization=zipped)
        assert_refused(published_copy, f"{name} holds something other than tensors.*nothing was run")
        assert not marker.exists()

    def test_of_a_bare_pickle(self, published_copy, marker):
        (published_copy / ACTION_HEAD).write_bytes(pickle.dumps(Payload(marker)))
        assert_refused(published_copy, ACTION_HEAD)
        assert not marker.exists()

    def test_of_a_pickle_in_place_of_safetensors(self, published_copy, marker):
        torch.save({"weights": Payload(marker)}, published_copy / WEIGHTS)
        assert_refused(published_copy, f"{WEIGHTS} is damaged")
        (published_copy / WEIGHTS).rename(published_copy / "pytorch_model.bin")
        assert_refused(published_copy, f"has no {WEIGHTS}")
        assert not marker.exists()

    def test_of_the_repositorys_own_code(self, published_copy, marker, observation):
        code = f"from pathlib import Path\nPath({str(marker)!r}).write_text('executed')\nraise SystemExit\n"
        for name in ("configuration", "modeling", "processing"):
            (published_copy / f"{name}_prismatic.py").write_text(code)
        config = AutoConfig.from_pretrained(published_copy)
        processor = AutoProcessor.from_pretrained(published_copy)
        model = AutoModel.from_pretrained(published_copy)
        assert np.isfinite(model.predict_action(**processor(**observation))).all()
        assert type(config) is VLAAdapterConfig
        assert not marker.exists()


class TestConfigurations:
    """A configuration that is handed in, and what `AutoConfig` makes for `AutoModel`."""

    def test_one_that_was_changed_by_hand_is_taken_as_it_is(self, published_pro):
        config = AutoConfig.from_pretrained(published_pro)
        config.norm_stats = norm_stats(key="mine")
        assert list(AutoModel.from_pretrained(published_pro, config=config).config.norm_stats) == ["mine"]

    def test_fields_go_into_it(self, published_pro):
        config = AutoConfig.from_pretrained(published_pro)
        with pytest.raises(ValueError, match="chunk_size given together with a config"):
            AutoModel.from_pretrained(published_pro, config=config, chunk_size=4)

    def test_auto_model_gets_one_that_only_notes_what_was_asked_for(self, published_pro):
        config, unused = AutoConfig.from_pretrained(published_pro, speed=1, chunk_size=5, return_unused_kwargs=True)
        assert (config.overrides, unused) == ({"chunk_size": 5}, {"speed": 1})
        assert not hasattr(config, "action_dim")

    def test_a_saved_one_does_not_say_where_it_was_read(self, published_pro, tmp_path):
        config = AutoConfig.from_pretrained(published_pro, robot="calvin")
        config.save_pretrained(tmp_path)
        saved = json.loads((tmp_path / "config.json").read_text())
        assert not {"_commit_hash", "_name_or_path", "robot"} & set(saved)


class TestProcessorFiles:
    @pytest.mark.parametrize("name", ["vocab.json", "merges.txt"])
    def test_a_missing_tokenizer_file_is_named(self, published_copy, name):
        (published_copy / name).unlink()
        with pytest.raises(ValueError, match=f"has no {name}"):
            AutoProcessor.from_pretrained(published_copy)

    def test_the_image_processors_file_is_not_needed(self, published_copy):
        (published_copy / "preprocessor_config.json").unlink()
        assert type(AutoProcessor.from_pretrained(published_copy)) is VLAAdapterProcessor

    def test_without_any_file_that_says_which_processor_it_is_one_is_named(self, published_copy):
        for name in ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json"):
            (published_copy / name).unlink()
        with pytest.raises(OSError, match="has no processor_config.json .nor preprocessor_config.json"):
            AutoProcessor.from_pretrained(published_copy)


def test_a_subfolder_of_a_folder(published_copy, tmp_path, pro_model):
    outer = tmp_path / "outer"
    shutil.move(published_copy, outer / "inner")
    assert_same_model(outer, pro_model, subfolder="inner")
    assert VLAAdapterConfig.from_pretrained(outer, subfolder="inner").chunk_size == 8
    assert type(PrismaticProcessor.from_pretrained(outer, subfolder="inner")) is VLAAdapterProcessor
