"""The configuration: the published model by default, a lossless file, and no nonsense."""

import json

import numpy as np
import pytest
import torch
from model_fixtures import norm_stats, tiny_config
from transformers import AutoConfig, AutoModel, Dinov2WithRegistersConfig, Qwen2Config, SiglipVisionConfig

from vla_adapter_hf import VLAAdapterConfig


SUB_CONFIGS = {
    "dinov2_config": Dinov2WithRegistersConfig,
    "siglip_config": SiglipVisionConfig,
    "text_config": Qwen2Config,
}


def parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.fixture(scope="module")
def default_model():
    with torch.device("meta"):
        return AutoModel.from_config(VLAAdapterConfig())


class TestDefaults:
    """Numbers from the published `VLA-Adapter/LIBERO-Object-Pro`, without what has no effect on the actions."""

    def test_sizes_of_the_libero_robot(self):
        config = VLAAdapterConfig()
        assert (config.chunk_size, config.action_dim, config.proprio_dim) == (8, 7, 8)
        assert config.cameras == ["image", "wrist_image"] and config.norm_type == "bounds_q99"
        assert (config.num_action_queries, config.num_patches, config.num_patch_tokens) == (64, 256, 512)
        assert (config.policy_variant, config.policy_rope_dtype) == ("pro", "bfloat16")

    def test_the_pro_policy_has_179_3_million_parameters(self, default_model):
        # The published file holds 217.86 million; 24 dead FiLM layers (896 -> 1792) are 38.57 million of them.
        assert parameters(default_model.policy) == pytest.approx(179.3e6, abs=0.05e6)
        assert parameters(default_model.policy) + 24 * (896 + 1) * 1792 == pytest.approx(217.86e6, abs=0.005e6)

    def test_the_original_policy_has_102_13_million_parameters(self):
        with torch.device("meta"):
            model = AutoModel.from_config(VLAAdapterConfig(policy_variant="original"))
        assert parameters(model.policy) == pytest.approx(102.13e6, abs=0.005e6)

    def test_towers_and_language_model_are_the_published_ones_without_their_last_blocks(self, default_model):
        # ViT-L/14 with four registers has 304 million parameters in 24 blocks, SigLIP so400m 412 million in 27.
        assert len(default_model.dinov2.encoder.layer) == 23
        assert default_model.config.dinov2_config.num_attention_heads == 16
        assert parameters(default_model.dinov2) == pytest.approx(304.4e6 * 23 / 24, rel=0.005)
        siglip_blocks = {
            name.split("layers.")[1].split(".")[0] for name in default_model.siglip.state_dict() if "layers." in name
        }
        assert len(siglip_blocks) == 26
        assert not any("head" in name for name in default_model.siglip.state_dict())
        assert parameters(default_model.language_model) == pytest.approx(494.03e6, abs=0.01e6)  # Qwen2.5-0.5B

    def test_there_is_no_language_model_head(self, default_model):
        assert default_model.get_output_embeddings() is None
        assert not any("lm_head" in name for name in default_model.state_dict())

    def test_the_projector_is_2176_to_8704_to_896(self, default_model):
        shapes = [tuple(getattr(default_model.vision_projector, name).weight.shape) for name in ("fc1", "fc2", "fc3")]
        assert shapes == [(8704, 2176), (896, 8704), (896, 896)]


class TestFile:
    def test_a_round_trip_keeps_every_field(self, tmp_path):
        config = tiny_config(
            policy_variant="original", policy_task_tokens=10, norm_type="normal", image_center_crop=None
        )
        config.save_pretrained(tmp_path)
        loaded = VLAAdapterConfig.from_pretrained(tmp_path)
        assert loaded.to_diff_dict() == {**config.to_diff_dict(), "auto_map": loaded.auto_map}
        assert loaded.image_center_crop is None and loaded.policy_task_tokens == 10

    def test_a_file_without_a_prompt_style_loads_and_does_not_guess_it(self, tmp_path):
        tiny_config(prompt_style="in_out").save_pretrained(tmp_path)
        assert VLAAdapterConfig.from_pretrained(tmp_path).prompt_style == "in_out"
        stored = json.loads((tmp_path / "config.json").read_text())
        del stored["prompt_style"]
        (tmp_path / "config.json").write_text(json.dumps(stored))
        assert VLAAdapterConfig.from_pretrained(tmp_path).prompt_style is None
        assert AutoConfig.from_pretrained(tmp_path, prompt_style="chat").prompt_style == "chat"

    def test_sub_configs_are_real_config_objects_after_a_round_trip(self, tmp_path):
        config = tiny_config()
        config.save_pretrained(tmp_path)
        loaded = AutoConfig.from_pretrained(tmp_path)
        assert type(loaded) is VLAAdapterConfig
        for name, config_class in SUB_CONFIGS.items():
            assert type(getattr(loaded, name)) is config_class
            assert getattr(loaded, name).hidden_size == getattr(config, name).hidden_size

    def test_the_file_holds_the_towers_defaults_too(self, tmp_path):
        VLAAdapterConfig().save_pretrained(tmp_path)
        stored = json.loads((tmp_path / "config.json").read_text())
        assert stored["model_type"] == "vla_adapter"
        assert stored["siglip_config"]["layer_norm_eps"] == 1e-6
        assert stored["dinov2_config"]["layerscale_value"] == 1.0  # a default of transformers

    def test_sub_configs_may_be_given_as_objects(self):
        given = tiny_config()
        config = VLAAdapterConfig(
            **{name: getattr(given, name) for name in SUB_CONFIGS}, policy_num_layers=2, policy_num_heads=4
        )
        assert config.text_config is given.text_config

    def test_overrides_replace_what_the_file_says(self, tmp_path):
        tiny_config().save_pretrained(tmp_path)
        assert VLAAdapterConfig.from_pretrained(tmp_path, chunk_size=25).chunk_size == 25
        assert AutoConfig.from_pretrained(tmp_path, cameras=["left", "right"]).cameras == ["left", "right"]

    def test_a_sub_config_override_keeps_the_other_fields(self, tmp_path):
        tiny_config().save_pretrained(tmp_path)
        config = VLAAdapterConfig.from_pretrained(tmp_path, text_config={"attention_dropout": 0.5})
        assert (config.text_config.attention_dropout, config.text_config.hidden_size) == (0.5, 32)

    def test_overrides_are_checked_together(self, tmp_path):
        tiny_config().save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="norm_stats.*action_dim=14"):
            VLAAdapterConfig.from_pretrained(tmp_path, action_dim=14)
        config = VLAAdapterConfig.from_pretrained(tmp_path, action_dim=14, norm_stats=norm_stats(action_dim=14))
        assert config.action_dim == 14

    def test_arguments_that_are_no_fields_are_handed_back(self, tmp_path):
        tiny_config().save_pretrained(tmp_path)
        config, unused = AutoConfig.from_pretrained(tmp_path, chunk_size=5, speed="high", return_unused_kwargs=True)
        assert config.chunk_size == 5 and unused == {"speed": "high"}


def test_the_policy_splits_behind_all_patches_unless_told_otherwise():
    assert tiny_config().num_task_tokens == 8
    assert tiny_config(cameras=["a", "b", "c"]).num_task_tokens == 12


def test_a_split_behind_the_action_queries_takes_all_there_is():
    # What the original's fixed split at 512 means for one camera: everything counts as task states.
    assert tiny_config(cameras=["image"], policy_task_tokens=512).num_task_tokens == 4 + 6


def stats_with(part: str, **statistics) -> dict:
    stats = norm_stats()
    stats["libero_object_no_noops"][part].update(statistics)
    return stats


def tower(name: str, **fields) -> dict:
    return {name: {**getattr(tiny_config(), name).to_dict(), **fields}}


REFUSED = {
    "depth that is not the language model's":
        (ValueError, "policy_num_layers=3.*num_hidden_layers=2", {"policy_num_layers": 3}),
    "heads that do not divide": (ValueError, "policy_num_heads=5.*hidden_size=32", {"policy_num_heads": 5}),
    "odd rotary size": (ValueError, "policy_num_heads=32.*odd", {"policy_num_heads": 32}),
    "unknown variant": (ValueError, "policy_variant.*original, pro.*'max'", {"policy_variant": "max"}),
    "unknown table precision": (ValueError, "policy_rope_dtype", {"policy_rope_dtype": "float16"}),
    "unknown normalisation": (ValueError, "norm_type.*bounds_q99", {"norm_type": "minmax"}),
    "unknown rule for constants": (ValueError, "constant_dims", {"constant_dims": "one"}),
    "no chunk": (ValueError, "chunk_size", {"chunk_size": 0}),
    "no queries": (ValueError, "num_action_queries", {"num_action_queries": 0}),
    "negative state size": (ValueError, "proprio_dim", {"proprio_dim": -8}),
    "fractional action size": (TypeError, "action_dim", {"action_dim": 7.0}),
    "no task tokens": (ValueError, "policy_task_tokens", {"policy_task_tokens": 0}),
    "negative noise": (ValueError, "policy_noise_std", {"policy_noise_std": -0.1}),
    "noise that is not a number": (ValueError, "policy_noise_std", {"policy_noise_std": float("nan")}),
    "noise in words": (TypeError, "policy_noise_std", {"policy_noise_std": "a"}),
    "no rotary base": (TypeError, "policy_rope_theta", {"policy_rope_theta": None}),
    "round trip in words": (TypeError, "image_jpeg_round_trip", {"image_jpeg_round_trip": "no"}),
    "a crop that is a switch": ((ValueError, TypeError), "image_center_crop", {"image_center_crop": True}),
    "a camera without a name": (ValueError, "cameras", {"cameras": ["image", ""]}),
    "negative initial spread": (ValueError, "initializer_range", {"initializer_range": -1.0}),
    "a fraction of task tokens": (TypeError, "policy_task_tokens", {"policy_task_tokens": 5.5}),
    "bounds upside down": (ValueError, r"\['proprio'\].*min must not exceed max",
        {"norm_stats": stats_with("proprio", min=[9.0] * 8)}),
    "a field that is misspelt": (TypeError, "no field 'camera'; did you mean 'cameras'", {"camera": ["image"]}),
    "another one": (TypeError, "no field 'chunksize'; did you mean 'chunk_size'", {"chunksize": 8}),
    "rotary base of zero": (ValueError, "policy_rope_theta", {"policy_rope_theta": 0.0}),
    "crop of nothing": (ValueError, "image_center_crop", {"image_center_crop": 0.0}),
    "crop beyond the image": (ValueError, "image_center_crop", {"image_center_crop": 1.5}),
    "a size that is a switch": (TypeError, "chunk_size.*expected int.*got bool", {"chunk_size": True}),
    "a number in quotes": (TypeError, "policy_noise_std", {"policy_noise_std": "0.02"}),
    "unknown prompt": (ValueError, "prompt_style must be one of chat, in_out, got 'free'", {"prompt_style": "free"}),
    "a prompt by number": (TypeError, "prompt_style", {"prompt_style": 1}),
    "no camera": (ValueError, "cameras", {"cameras": []}),
    "one camera twice": (ValueError, "cameras", {"cameras": ["image", "image"]}),
    "a camera without quotes": (TypeError, "cameras", {"cameras": "image"}),
    "cameras by number": (TypeError, "cameras", {"cameras": [0, 1]}),
    "a tower's field of the wrong type":
        (ValueError, "siglip_config.*hidden_size.*expected int", tower("siglip_config", hidden_size="48")),
    "a list of layers of another length": (ValueError, "text_config.*num_hidden_layers.*layer.types",
        tower("text_config", layer_types=["full_attention"])),
    "towers of two image sizes": (ValueError, "dinov2_config and siglip_config", tower("siglip_config",
        image_size=56)),
    "towers of two patch sizes": (ValueError, "dinov2_config and siglip_config", tower("siglip_config", patch_size=7)),
    "an image that is not whole patches": (ValueError, "dinov2_config.image_size=30", tower("dinov2_config",
        image_size=30)),
    "an image that is not square": (TypeError, "dinov2_config.image_size", tower("dinov2_config", image_size=[28,
        14])),
    "tower heads that do not divide": (ValueError, "siglip_config", tower("siglip_config", num_attention_heads=5)),
    "a tower of another kind": (TypeError, "dinov2_config.*SiglipVisionConfig",
        {"dinov2_config": SiglipVisionConfig()}),
    "statistics of another action size": (ValueError, r"norm_stats.*'action'.*action_dim=5", {"action_dim": 5}),
    "statistics of another state size": (ValueError, r"norm_stats.*'proprio'.*proprio_dim=9", {"proprio_dim": 9}),
    "one statistic too short": (ValueError, r"\['proprio'\]\['q99'\]", {"norm_stats": stats_with("proprio",
        q99=[1.0] * 7)}),
    "statistics upside down": (ValueError, r"\['action'\].*q01 must not exceed q99",
        {"norm_stats": stats_with("action", q01=[9.0] * 7)}),
    "statistics that are not finite": (ValueError, r"\['action'\]\['mean'\].*finite",
        {"norm_stats": stats_with("action", mean=[np.nan] * 7)}),
    "a mask of numbers": (TypeError, "mask", {"norm_stats": stats_with("action", mask=[1.0] * 7)}),
    "statistics without proprio": (ValueError, r"\['proprio'\] is missing",
        {"norm_stats": {"key": {"action": norm_stats()["libero_object_no_noops"]["action"]}}}),
    "statistics that are no dict": (TypeError, "norm_stats.*expected a dict, got list", {"norm_stats": [1, 2]}),
}  # fmt: skip


@pytest.mark.parametrize("nonsense", REFUSED)
def test_nonsense_is_refused_by_the_fields_name(nonsense):
    error, message, fields = REFUSED[nonsense]
    with pytest.raises(error, match=message):
        tiny_config(**fields)


def test_a_field_set_later_is_checked_for_its_type():
    config = tiny_config()
    with pytest.raises(TypeError, match="chunk_size.*expected int, got str"):
        config.chunk_size = "8"
    assert config.chunk_size == tiny_config().chunk_size


def test_a_configuration_that_was_made_invalid_is_not_saved(tmp_path):
    config = tiny_config()
    config.policy_num_layers = 3
    with pytest.raises(ValueError, match="policy_num_layers=3"):
        config.save_pretrained(tmp_path)


@pytest.mark.parametrize("missing", ["q01", "q99", "min", "max"])
def test_statistics_must_have_what_normalisation_reads(missing):
    # `min` and `max` tell which dimensions are constant.
    stats = norm_stats()
    del stats["libero_object_no_noops"]["action"][missing]
    with pytest.raises(ValueError, match=missing):
        tiny_config(norm_stats=stats)


def test_rotary_heads_may_be_odd_where_nothing_rotates():
    assert tiny_config(policy_variant="original", policy_num_heads=32).policy_num_heads == 32


def test_no_statistics_at_all_are_none():
    assert tiny_config(norm_stats={}).norm_stats is None


@pytest.mark.parametrize("options", [{"robot": "calvin"}, {"step": "5000"}])
def test_what_goes_with_published_checkpoints_only_is_refused(tmp_path, options):
    tiny_config().save_pretrained(tmp_path)
    for loader in (AutoConfig, AutoModel):
        with pytest.raises(ValueError, match=f"{next(iter(options))}=.*published layout"):
            loader.from_pretrained(tmp_path, **options)


def test_a_misspelt_override_is_refused(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    with pytest.raises(TypeError, match="no field 'camera'; did you mean 'cameras'"):
        AutoConfig.from_pretrained(tmp_path, camera=["a", "b"])


def test_a_file_of_another_model_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    with pytest.raises(ValueError, match="model_type 'qwen2', expected 'vla_adapter'"):
        VLAAdapterConfig.from_pretrained(tmp_path)


def test_names_of_dimensions_and_the_frame_rate_are_kept_and_checked(tmp_path):
    names = {"action_names": tuple("abcdefg"), "state_names": list("abcdefgh"), "fps": 30}
    tiny_config(**names).save_pretrained(tmp_path)
    read = VLAAdapterConfig.from_pretrained(tmp_path)
    assert (read.action_names, read.state_names, read.fps) == (list("abcdefg"), list("abcdefgh"), 30)
    with pytest.raises(ValueError, match="action_names has 7 names and action_dim is 6"):
        tiny_config(**names, action_dim=6, norm_stats=None)
    with pytest.raises(ValueError, match="fps must be a number above 0"):
        tiny_config(fps=0)
