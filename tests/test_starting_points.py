"""Models to train from that are not VLA-Adapters: their pretrained parts compute what they computed before.

Small towers and language models are saved by transformers' own `save_pretrained`. The base vision-language model is
the small published checkpoint under the base's names, so its parts are those whose numbers `test_goldens.py` checks.
"""

import json
import os
import shutil
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from model_fixtures import norm_stats
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoProcessor,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from typer.testing import CliRunner

import vla_adapter_hf
from vla_adapter_cli import app
from vla_adapter_hf.checkpoints.backbones import fold_class_position
from vla_adapter_hf.init import pretrained
from vla_adapter_hf.init.pretrained import PretrainedParts
from vla_adapter_hf.modeling.checkpoint_names_vla_adapter import name_in_file


TOKENIZER = Path(vla_adapter_hf.__file__).parent / "embedded" / "tokenizer"
TOWER = {"num_hidden_layers": 3, "num_attention_heads": 4, "patch_size": 14}
NEW_PARTS = ("policy.", "proprio_projector.", "action_queries.")


def init_from_base(base=None, **arguments):
    """The function of that name, with where the parts are among the arguments."""
    names = {field.name for field in fields(PretrainedParts)} & set(arguments)
    parts = PretrainedParts(base, **{name: arguments.pop(name) for name in names})
    return pretrained.init_from_base(parts, **arguments)


def with_weights_that_matter(model, seed):
    """The model with weights none of which is zero or one, so that a mistake in any of them shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 2:
                noise *= 2 * parameter.shape[1] ** -0.5
            parameter.copy_(noise)
    return model.eval()


def write_dinov2(folder, **fields):
    config = Dinov2WithRegistersConfig(
        **{"hidden_size": 32, "mlp_ratio": 2, "image_size": 70, "num_register_tokens": 4, **TOWER, **fields}
    )
    with_weights_that_matter(Dinov2WithRegistersModel(config), 1).save_pretrained(folder)
    return str(folder)


def write_siglip(folder, whole=True, **fields):
    vision = {"hidden_size": 48, "intermediate_size": 64, "image_size": 28, **TOWER, **fields}
    if whole:
        text = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
        model = with_weights_that_matter(SiglipModel(SiglipConfig(vision_config=vision, text_config=text)), 2)
    else:
        model = with_weights_that_matter(SiglipVisionModel(SiglipVisionConfig(**vision)), 2)
    model.save_pretrained(folder)
    return str(folder)


def write_language_model(folder, tokenizer=True, **fields):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = Qwen2Config(
        **{**sizes, "intermediate_size": 64, "vocab_size": 1024, "tie_word_embeddings": True, **fields}
    )
    with_weights_that_matter(Qwen2ForCausalLM(config), 3).save_pretrained(folder)
    if tokenizer:
        copy_tokenizer(folder)
    return str(folder)


def copy_tokenizer(folder):
    Path(folder).mkdir(exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, folder)
    return str(folder)


@pytest.fixture(scope="module")
def repositories(tmp_path_factory):
    """DINOv2 for 70 pixels, a whole SigLIP for 28, and Qwen2 with a tied head, as arguments of `init_from_base`."""
    folder = tmp_path_factory.mktemp("repositories")
    return {
        "dinov2": write_dinov2(folder / "dinov2"),
        "siglip": write_siglip(folder / "siglip"),
        "language_model": write_language_model(folder / "qwen"),
    }


@pytest.fixture(scope="module")
def combined(repositories):
    return init_from_base(**repositories)[0]


def write_base(published, folder, name="latest-checkpoint.pt", without=()):
    """The vision-language part of a checkpoint in the published layout, in the layout of the base model."""
    prefixes = {
        "vision_backbone.featurizer.": ("vision_backbone", "dino_featurizer."),
        "vision_backbone.fused_featurizer.": ("vision_backbone", "siglip_featurizer."),
        "language_model.": ("llm_backbone", "llm."),
        "projector.fc1.": ("projector", "projector.0."),
        "projector.fc2.": ("projector", "projector.2."),
        "projector.fc3.": ("projector", "projector.4."),
    }
    parts = {"vision_backbone": {}, "llm_backbone": {}, "projector": {}}
    for former, tensor in load_file(published / "model.safetensors").items():
        for prefix, (part, base_prefix) in prefixes.items():
            if former.startswith(prefix):
                renamed = base_prefix + former.removeprefix(prefix).replace(".scale_factor", ".gamma")
                parts[part][renamed] = tensor
    for part in without:
        del parts[part]
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    torch.save({"model": parts}, folder / "checkpoints" / name)
    return str(folder)


@pytest.fixture(scope="module")
def base_arguments(published_pro, pro_model, tmp_path_factory):
    """The small base model, and what it also needs because it is small: heads, configuration and tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    language_model = folder / "language_model"
    copy_tokenizer(language_model)
    pro_model.config.text_config.save_pretrained(language_model)
    heads = {
        name: {"num_attention_heads": getattr(pro_model.config, name).num_attention_heads}
        for name in ("dinov2_config", "siglip_config")
    }
    return {"base": write_base(published_pro, folder / "base"), "language_model": str(language_model), **heads}


def images(size, seed=0):
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(seed))


def second_to_last(model, pixels):
    """Patch tokens after the second-to-last block, by transformers' own recording."""
    with torch.no_grad():
        return model(pixels, output_hidden_states=True).hidden_states[-2]


class TestCombinedRepositories:
    def test_dinov2_features_are_those_before_the_last_block_on_images_of_the_new_size(self, combined, repositories):
        pixels = images(28)
        original = second_to_last(Dinov2WithRegistersModel.from_pretrained(repositories["dinov2"]), pixels)
        with torch.no_grad():
            features = combined.dinov2(pixels).last_hidden_state
        # transformers resamples the table of positions for such images in every call; here it was done once.
        torch.testing.assert_close(features, original, rtol=0, atol=1e-5)
        assert features.std() > 0.5

    def test_siglip_features_are_those_before_the_last_block_with_exact_gelu(self, combined, repositories):
        pixels = images(28)
        exact = SiglipVisionModel.from_pretrained(repositories["siglip"], hidden_act="gelu")
        tanh = SiglipVisionModel.from_pretrained(repositories["siglip"])
        assert tanh.config.hidden_act == "gelu_pytorch_tanh"
        with torch.no_grad():
            features = combined.siglip(pixels).last_hidden_state
        torch.testing.assert_close(features, second_to_last(exact, pixels), rtol=0, atol=1e-5)
        assert (features - second_to_last(tanh, pixels)).abs().max() > 1e-4

    def test_hidden_states_of_the_language_model_are_its_own(self, combined, repositories):
        original = Qwen2ForCausalLM.from_pretrained(repositories["language_model"]).model
        tokens = torch.arange(20)[None] * 7
        with torch.no_grad():
            expected, found = (
                model(tokens, output_hidden_states=True).hidden_states for model in (original, combined.language_model)
            )
        assert len(found) == 3
        for one, other in zip(expected, found, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-5)

    def test_last_blocks_final_norms_pooling_head_and_lm_head_are_not_taken(self, combined):
        config = combined.config
        assert (config.dinov2_config.num_hidden_layers, config.siglip_config.num_hidden_layers) == (2, 2)
        names = {name_in_file(name) for name in combined.state_dict()}
        assert not [name for name in names if "layernorm." in name and name.startswith(("dinov2", "siglip"))]
        assert not [name for name in names if ".head." in name or "lm_head" in name]

    def test_a_siglip_of_vision_only_gives_the_same_features(self, repositories, combined, tmp_path):
        whole = SiglipModel.from_pretrained(repositories["siglip"]).vision_model.state_dict()
        vision = SiglipVisionModel(SiglipVisionConfig.from_pretrained(repositories["siglip"]))
        getattr(vision, "vision_model", vision).load_state_dict(whole)
        vision.save_pretrained(tmp_path / "vision")
        model, _ = init_from_base(**{**repositories, "siglip": str(tmp_path / "vision")})
        for one, other in zip(model.siglip.parameters(), combined.siglip.parameters(), strict=True):
            assert torch.equal(one, other)

    def test_a_tower_saved_under_newer_names_is_read(self, repositories, combined, tmp_path):
        # What a newer transformers writes of a vision-only SigLIP; an older one calls all of it `vision_model.*`.
        folder = tmp_path / "newer"
        write_siglip(folder, whole=False)
        tensors = load_file(folder / "model.safetensors")
        newer = {name.removeprefix("vision_model."): tensor for name, tensor in tensors.items()}
        save_file(newer, folder / "model.safetensors", metadata={"format": "pt"})
        model, _ = init_from_base(**{**repositories, "siglip": str(folder)})
        weight = model.state_dict()
        found = next(
            tensor
            for name, tensor in weight.items()
            if name.endswith("siglip.embeddings.patch_embedding.weight")
            or name.endswith("siglip.vision_model.embeddings.patch_embedding.weight")
        )
        assert torch.equal(found, newer["embeddings.patch_embedding.weight"])

    def test_an_untied_language_model_is_taken_without_its_head(self, repositories, tmp_path):
        folder = write_language_model(tmp_path / "untied", tie_word_embeddings=False)
        model, _ = init_from_base(**{**repositories, "language_model": folder})
        original = Qwen2ForCausalLM.from_pretrained(folder)
        assert torch.equal(model.get_input_embeddings().weight, original.get_input_embeddings().weight)
        assert not [name for name in model.state_dict() if "lm_head" in name]


class TestClassToken:
    def test_folding_its_position_changes_no_feature(self, repositories, tmp_path):
        # At the native size nothing is resampled, so the features must be equal to the last bit.
        siglip = write_siglip(tmp_path / "siglip", image_size=70)
        model, _ = init_from_base(**{**repositories, "siglip": siglip})
        original = Dinov2WithRegistersModel.from_pretrained(repositories["dinov2"])
        pixels = images(70)
        with torch.no_grad():
            features = model.dinov2(pixels).last_hidden_state
        assert torch.equal(features, second_to_last(original, pixels))

        before, after = original.embeddings, model.dinov2.embeddings
        assert before.position_embeddings[:, 0].abs().max() > 0.1
        assert after.position_embeddings[:, 0].abs().max() == 0
        assert torch.equal(after.position_embeddings[:, 1:], before.position_embeddings[:, 1:])
        assert torch.equal(after.cls_token, before.cls_token + before.position_embeddings[:, :1])

    def test_a_linear_table_resampled_from_37_to_16_stays_linear(self):
        # Away from the border, where the kernel is cut off, a plane stays one; its sampled weights are off by 2e-3.
        rows = torch.arange(37.0)
        plane = torch.stack((rows[:, None].expand(37, 37), rows[None, :].expand(37, 37)), dim=-1).flatten(0, 1)
        table = torch.cat((torch.full((1, 2), 5.0), plane))[None]
        class_token, resampled = fold_class_position(torch.ones(1, 1, 2), table, 16)
        assert torch.equal(class_token, torch.full((1, 1, 2), 6.0))
        assert resampled.shape == (1, 257, 2) and resampled[0, 0].tolist() == [0, 0]
        grid = resampled[0, 1:].unflatten(0, (16, 16))
        expected = (torch.arange(16.0) + 0.5) * 37 / 16 - 0.5
        torch.testing.assert_close(grid[3:-3, 5, 0], expected[3:-3], rtol=0, atol=1e-2)
        torch.testing.assert_close(grid[5, 3:-3, 1], expected[3:-3], rtol=0, atol=1e-2)


class TestNewParts:
    def test_they_are_drawn_from_the_seed_and_the_rest_is_not(self, repositories, combined):
        again, other = (init_from_base(**repositories, seed=seed)[0].state_dict() for seed in (0, 1))
        drawn = (*NEW_PARTS, "vision_projector.")
        for name, tensor in combined.state_dict().items():
            assert torch.equal(tensor, again[name]), name
            is_drawn = name.startswith(drawn) and len(tensor.unique()) > 1
            assert torch.equal(tensor, other[name]) != is_drawn, name

    def test_the_random_state_of_the_caller_is_left_alone(self, repositories):
        torch.manual_seed(5)
        expected = torch.rand(3)
        torch.manual_seed(5)
        init_from_base(**repositories)
        assert torch.equal(torch.rand(3), expected)

    def test_they_start_as_the_specification_says(self, combined):
        assert combined.action_queries.weight.std().item() == pytest.approx(0.02, rel=0.1)
        block = combined.policy.blocks[0]
        assert block.attention.gating_factor.item() == 0
        assert torch.equal(block.norm.weight, torch.ones(32))
        bound = block.fc.in_features**-0.5
        assert 0.8 * bound < block.fc.weight.abs().max() <= bound

    def test_their_rules_are_those_of_new_models(self, combined):
        config = combined.config
        assert (config.policy_rope_dtype, config.constant_dims, config.policy_task_tokens) == ("float32", "zero", None)
        assert config.norm_stats is None

    def test_sizes_come_from_the_robot_and_from_the_caller(self, repositories):
        model, processor = init_from_base(**repositories, robot="aloha", chunk_size=3, cameras=["top", "side"])
        config = model.config
        assert (config.action_dim, config.proprio_dim, config.chunk_size, config.norm_type) == (14, 14, 3, "bounds")
        assert config.cameras == ["top", "side"]
        assert model.policy.fc_out.out_features == 14
        assert processor.proprio_dim == 14

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_all_weights_have_the_precision_asked_for(self, repositories, dtype):
        model, _ = init_from_base(**repositories, dtype=dtype)
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}


class TestBase:
    def test_its_parts_are_those_that_the_published_layout_gives(self, base_arguments, pro_model):
        model, _ = init_from_base(**base_arguments)
        expected = pro_model.state_dict()
        for name, tensor in model.state_dict().items():
            if not name.startswith(NEW_PARTS):
                assert torch.equal(tensor, expected[name]), name
        assert not torch.equal(model.policy.fc_in.weight, pro_model.policy.fc_in.weight)

    def test_without_towers_they_come_from_repositories(self, published_pro, pro_model, base_arguments, tmp_path):
        config = pro_model.config
        towers = {
            "dinov2": write_dinov2(tmp_path / "dinov2", hidden_size=config.dinov2_config.hidden_size),
            "siglip": write_siglip(
                tmp_path / "siglip", hidden_size=config.siglip_config.hidden_size, image_size=config.image_size
            ),
        }
        arguments = {
            "base": write_base(published_pro, tmp_path / "base", without=["vision_backbone"]),
            "language_model": base_arguments["language_model"],
        }
        with pytest.raises(ValueError, match=r"dinov2=.*siglip=.*facebook/dinov2-with-registers-large"):
            init_from_base(**arguments)
        model, _ = init_from_base(**arguments, **towers)
        original = Dinov2WithRegistersModel.from_pretrained(towers["dinov2"])
        assert torch.equal(model.dinov2.embeddings.register_tokens, original.embeddings.register_tokens)
        assert torch.equal(model.vision_projector.fc2.weight, pro_model.vision_projector.fc2.weight)

    def test_without_a_language_model_it_comes_from_its_repository(self, published_pro, base_arguments, tmp_path):
        base = write_base(published_pro, tmp_path / "base", without=["llm_backbone"])
        config = Qwen2Config.from_pretrained(base_arguments["language_model"])
        folder = copy_tokenizer(tmp_path / "qwen")
        original = with_weights_that_matter(Qwen2ForCausalLM(config), 4)
        original.save_pretrained(folder)
        arguments = {**base_arguments, "base": base}
        model, _ = init_from_base(**{**arguments, "language_model": folder})
        assert torch.equal(model.language_model.norm.weight, original.model.norm.weight)

    def test_heads_of_towers_of_another_size_must_be_given(self, base_arguments):
        arguments = {name: value for name, value in base_arguments.items() if name != "siglip_config"}
        with pytest.raises(ValueError, match=r"siglip_config=\{'num_attention_heads': \.\.\.\}"):
            init_from_base(**arguments)

    def test_towers_next_to_a_base_that_has_them_are_refused(self, base_arguments, repositories):
        with pytest.raises(ValueError, match="holds its vision towers"):
            init_from_base(**base_arguments, siglip=repositories["siglip"])

    def test_the_latest_of_several_files_is_taken(self, published_pro, base_arguments, tmp_path):
        folder = write_base(published_pro, tmp_path)
        (tmp_path / "checkpoints" / "step-000100-epoch-00-loss=1.5000.pt").write_bytes(b"not read")
        init_from_base(**{**base_arguments, "base": folder})

    def test_several_steps_without_a_latest_want_a_choice(self, published_pro, base_arguments, tmp_path):
        folder = write_base(published_pro, tmp_path, "step-020792-epoch-01-loss=0.5134.pt")
        (tmp_path / "checkpoints" / "step-000100-epoch-00-loss=1.5000.pt").write_bytes(b"not read")
        arguments = {**base_arguments, "base": folder}
        with pytest.raises(ValueError, match="step-000100.*, step-020792.*Choose one"):
            init_from_base(**arguments)
        with pytest.raises(ValueError, match="no step 7; it has"):
            init_from_base(**arguments, step=7)
        with pytest.raises(ValueError, match="damaged"):
            init_from_base(**arguments, step=100)
        init_from_base(**arguments, step=20792)

    def test_a_single_step_needs_no_choice(self, published_pro, base_arguments, tmp_path):
        folder = write_base(published_pro, tmp_path, "step-020792-epoch-01-loss=0.5134.pt")
        init_from_base(**{**base_arguments, "base": folder})

    def test_a_file_that_runs_code_is_refused_and_not_run(self, base_arguments, tmp_path):
        class Code:
            def __reduce__(self):
                return os.mkdir, (str(tmp_path / "was_run"),)

        (tmp_path / "checkpoints").mkdir()
        torch.save({"model": Code()}, tmp_path / "checkpoints" / "latest-checkpoint.pt")
        with pytest.raises(ValueError, match=r"\.mkdir\), .*nothing was run\.$"):
            init_from_base(**{**base_arguments, "base": str(tmp_path)})
        assert not (tmp_path / "was_run").exists()


class TestRefusals:
    @pytest.mark.parametrize("part", ["base", "dinov2", "siglip", "language_model", "tokenizer"])
    def test_a_path_that_does_not_exist(self, repositories, tmp_path, part):
        (tmp_path / "qwen").mkdir()
        with pytest.raises(FileNotFoundError, match=f"{part} .*qwem: this folder does not exist.*Did you mean .*qwen"):
            init_from_base(**{**repositories, part: str(tmp_path / "qwem")})

    def test_nothing_given(self):
        with pytest.raises(ValueError, match=r"dinov2=.*siglip=.*language_model=.*missing"):
            init_from_base()

    def test_dinov2_without_registers(self, repositories, tmp_path):
        Dinov2Model(Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=4)).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="model_type 'dinov2'.*--dinov2.*with registers"):
            init_from_base(**{**repositories, "dinov2": str(tmp_path)})

    @pytest.mark.parametrize("part", ["siglip", "language_model"])
    def test_another_kind_of_model(self, repositories, part):
        with pytest.raises(ValueError, match=f"model_type 'dinov2_with_registers'; {part}"):
            init_from_base(**{"tokenizer": str(TOKENIZER), **repositories, part: repositories["dinov2"]})

    def test_towers_with_other_patches(self, repositories, tmp_path):
        siglip = write_siglip(tmp_path / "siglip", image_size=32, patch_size=16)
        with pytest.raises(ValueError, match="patches of 14 .* patches of 16"):
            init_from_base(**{**repositories, "siglip": siglip})

    def test_weights_that_do_not_fill_a_tower(self, repositories, tmp_path):
        folder = Path(shutil.copytree(repositories["dinov2"], tmp_path / "dinov2"))
        tensors = load_file(folder / "model.safetensors")
        del tensors["encoder.layer.1.norm1.weight"]
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=r"encoder\.layer\.1\.norm1\.weight missing"):
            init_from_base(**{**repositories, "dinov2": str(folder)})

    def test_a_damaged_file(self, repositories, tmp_path):
        folder = Path(shutil.copytree(repositories["dinov2"], tmp_path / "dinov2"))
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:1000])
        with pytest.raises(ValueError, match="cannot be read"):
            init_from_base(**{**repositories, "dinov2": str(folder)})

    @pytest.mark.parametrize("content", [b"", b"no pickle", b"PK\x03\x04 and then nothing"])
    def test_a_base_cut_short(self, base_arguments, tmp_path, content):
        (tmp_path / "checkpoints").mkdir()
        (tmp_path / "checkpoints" / "latest-checkpoint.pt").write_bytes(content)
        with pytest.raises(ValueError, match="latest-checkpoint.pt is damaged"):
            init_from_base(**{**base_arguments, "base": str(tmp_path)})

    def test_a_base_with_one_tower(self, base_arguments, tmp_path):
        (tmp_path / "checkpoints").mkdir()
        parts = {"vision_backbone": {"featurizer.pos_embed": torch.zeros(1, 4, 8)}, "projector": {}}
        torch.save({"model": parts}, tmp_path / "checkpoints" / "latest-checkpoint.pt")
        with pytest.raises(ValueError, match="one vision tower"):
            init_from_base(**{**base_arguments, "base": str(tmp_path)})

    @pytest.mark.parametrize("content", [{"model": {"weight": torch.zeros(2)}}, {"state": 1}, [1, 2]])
    def test_a_file_of_another_kind(self, base_arguments, tmp_path, content):
        (tmp_path / "checkpoints").mkdir()
        torch.save(content, tmp_path / "checkpoints" / "latest-checkpoint.pt")
        with pytest.raises(ValueError, match="not a vision-language model's"):
            init_from_base(**{**base_arguments, "base": str(tmp_path)})

    def test_a_vla_adapter_as_base(self, base_arguments, published_pro):
        with pytest.raises(ValueError, match="A VLA-Adapter checkpoint needs no init"):
            init_from_base(**{**base_arguments, "base": str(published_pro)})

    def test_a_base_without_a_place_for_the_tokenizer(self, base_arguments):
        with pytest.raises(ValueError, match=r"tokenizer=.*--tokenizer.*Qwen/Qwen2\.5-0\.5B"):
            init_from_base(base_arguments["base"])

    def test_a_repository_without_tokenizer_files(self, repositories, tmp_path):
        folder = write_language_model(tmp_path / "qwen", tokenizer=False)
        with pytest.raises(ValueError, match="tokenizer.json is missing"):
            init_from_base(**{**repositories, "language_model": folder})

    def test_a_tokenizer_with_more_tokens_than_the_language_model(self, repositories, tmp_path):
        folder = write_language_model(tmp_path / "qwen", vocab_size=700)
        with pytest.raises(ValueError, match="do not belong together"):
            init_from_base(**{**repositories, "language_model": folder})

    def test_a_name_that_is_no_field(self, repositories):
        with pytest.raises(TypeError, match="camera: neither"):
            init_from_base(**repositories, camera="front")

    def test_statistics_of_another_robot(self, repositories):
        with pytest.raises(ValueError, match="action_dim=7"):
            init_from_base(**repositories, norm_stats=norm_stats(action_dim=6))


class TestCommand:
    def run(self, *words):
        return CliRunner().invoke(app, ["init", *map(str, words)])

    def options(self, repositories):
        return [word for name, source in repositories.items() for word in (f"--{name.replace('_', '-')}", source)]

    def test_it_writes_a_checkpoint_that_loads_and_refuses_to_act(self, repositories, combined, observation, tmp_path):
        result = self.run(tmp_path / "new", *self.options(repositories))
        assert result.exit_code == 0, result.output
        assert [path.name for path in tmp_path.iterdir()] == ["new"]
        card = (tmp_path / "new" / "README.md").read_text()
        assert "untrained policy" in card and str(tmp_path) not in card

        model = AutoModel.from_pretrained(tmp_path / "new")
        for (name, expected), found in zip(combined.state_dict().items(), model.state_dict().values(), strict=True):
            assert torch.equal(expected, found), name
        processor = AutoProcessor.from_pretrained(tmp_path / "new")
        inputs = processor(**observation)
        with pytest.raises(ValueError, match="no norm_stats"):
            model.predict_action(**inputs)

    def test_with_statistics_and_sizes_the_new_policy_runs(self, repositories, observation, tmp_path):
        (tmp_path / "stats.json").write_text(json.dumps(norm_stats(key="mine")))
        words = ["--cameras", "front,wrist", "--chunk-size", 5, "--policy-variant", "original", "--dtype", "bfloat16"]
        stats = ["--norm-stats", tmp_path / "stats.json"]
        result = self.run(tmp_path / "new", *self.options(repositories), *words, *stats)
        assert result.exit_code == 0, result.output
        model = AutoModel.from_pretrained(tmp_path / "new")
        assert (model.dtype, model.config.cameras) == (torch.bfloat16, ["front", "wrist"])
        inputs = AutoProcessor.from_pretrained(tmp_path / "new")(**observation)
        assert model.predict_action(**inputs).shape == (1, 5, 7)

    def test_a_refusal_is_one_line_and_leaves_nothing(self, repositories, tmp_path):
        options = self.options({**repositories, "siglip": repositories["dinov2"]})
        result = self.run(tmp_path / "new", *options)
        assert result.exit_code == 1
        assert result.output.splitlines()[-1].startswith("error: ")
        assert not list(tmp_path.iterdir())

    def test_what_is_there_already_is_not_touched(self, repositories, tmp_path):
        (tmp_path / "kept").write_text("kept")
        result = self.run(tmp_path, *self.options(repositories))
        assert result.exit_code == 1 and "exists already" in result.output
        assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_a_published_folder_without_tokenizer_files_has_no_processor(published_copy):
    for name in ("tokenizer.json", "vocab.json", "merges.txt"):
        (published_copy / name).unlink(missing_ok=True)
    with pytest.raises(ValueError, match="has no merges.txt and no vocab.json"):
        AutoProcessor.from_pretrained(published_copy)
