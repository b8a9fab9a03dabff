"""`vla-adapter init --config`: models from nothing, and vocabularies cut down to their instructions."""

import json
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoProcessor
from typer.testing import CliRunner

from vla_adapter_cli import app
from vla_adapter_hf.checkpoints.backbones import load_tokenizer
from vla_adapter_hf.init.untrained import cut_down_tokenizer, init_from_config, init_untrained
from vla_adapter_hf.modeling.configuration_vla_adapter import VLAAdapterConfig
from vla_adapter_hf.processing.processing_vla_adapter import PROMPTS


TOKENIZER = str(files("vla_adapter_hf").joinpath("embedded", "tokenizer"))
INSTRUCTIONS = ["pick up the milk and place it in the basket", "pick up the ketchup and place it in the basket"]
FIELDS = {
    "dinov2_config": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28},
    "siglip_config": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28},
    "text_config": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 48,
        "vocab_size": 400,
        "max_position_embeddings": 256,
    },
    "policy_num_layers": 2,
    "policy_num_heads": 2,
    "num_action_queries": 4,
}
for tower in ("dinov2_config", "siglip_config"):
    FIELDS[tower]["patch_size"] = 14
FIELDS["siglip_config"] |= {"intermediate_size": 32, "vision_use_head": False}


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "policy.json"
    path.write_text(json.dumps(FIELDS), encoding="utf-8")
    return path


@pytest.mark.parametrize("style", sorted(PROMPTS))
def test_a_cut_down_vocabulary_has_its_words_and_every_byte(style):
    tokenizer = cut_down_tokenizer(load_tokenizer(TOKENIZER), INSTRUCTIONS, 400, style)
    assert len(tokenizer) <= 400
    for text in (*INSTRUCTIONS, "schließe die Tür", "把牛奶放进篮子", "zip\tzap\x00"):
        prompt = PROMPTS[style].format(instruction=text)
        assert tokenizer.decode(tokenizer(prompt)["input_ids"]) == prompt
    known = tokenizer.tokenize(" the milk and the ketchup")
    assert known == ["Ġthe", "Ġmilk", "Ġand", "Ġthe", "Ġketchup"]
    assert len(tokenizer.tokenize("Ω")) == 2, "a letter that no instruction has falls back to its bytes"


def test_control_tokens_stay_whole():
    tokenizer = cut_down_tokenizer(load_tokenizer(TOKENIZER), INSTRUCTIONS, 400)
    assert tokenizer.tokenize("<|im_start|>user")[0] == "<|im_start|>"
    assert tokenizer.pad_token == "<|endoftext|>"


def test_sizes_that_hold_no_words_and_empty_instructions_are_refused():
    tokenizer = load_tokenizer(TOKENIZER)
    with pytest.raises(ValueError, match="vocab_size=256"):
        cut_down_tokenizer(tokenizer, INSTRUCTIONS, 256)
    with pytest.raises(ValueError, match="instructions is empty"):
        cut_down_tokenizer(tokenizer, ["", " "], 400)


def test_a_model_from_nothing_loads_and_depends_on_the_seed(tmp_path, config_file):
    (tmp_path / "instructions.txt").write_text("\n".join(INSTRUCTIONS), encoding="utf-8")
    models = {}
    for name, seed in (("first", 0), ("again", 0), ("other", 1)):
        words = ["init", str(tmp_path / name), "--config", str(config_file)]  # the small tokenizer is the default
        words += ["--instructions", str(tmp_path / "instructions.txt"), "--prompt-style", "in_out"]
        result = CliRunner().invoke(app, [*words, "--policy-variant", "original", "--seed", str(seed)])
        assert result.exit_code == 0, result.output
        models[name] = AutoModel.from_pretrained(tmp_path / name)
    assert models["first"].config.policy_variant == "original"
    processor = AutoProcessor.from_pretrained(tmp_path / "first")
    assert processor.prompt_style == "in_out"
    assert len(processor.tokenizer) <= 400
    weights = {name: model.policy.fc_in.weight for name, model in models.items()}
    assert torch.equal(weights["first"], weights["again"])
    assert not torch.equal(weights["first"], weights["other"])


def test_a_model_from_nothing_gets_the_small_tokenizer_that_ships_if_none_is_given(tmp_path, config_file):
    (tmp_path / "instructions.txt").write_text("\n".join(INSTRUCTIONS), encoding="utf-8")
    words = ["--config", str(config_file), "--instructions", str(tmp_path / "instructions.txt")]
    result = CliRunner().invoke(app, ["init", str(tmp_path / "model"), *words])
    assert result.exit_code == 0, result.output
    processor = AutoProcessor.from_pretrained(tmp_path / "model")
    assert len(processor.tokenizer) <= 400
    assert processor.tokenizer.decode(processor.tokenizer("pick up the cup")["input_ids"]) == "pick up the cup"


def test_a_vocabulary_larger_than_the_model_knows_is_refused(tmp_path, config_file):
    with pytest.raises(ValueError, match=r"text_config.vocab_size=400, but the tokenizer has"):
        init_untrained(tmp_path / "model", config_file, tokenizer=big_tokenizer(tmp_path))
    assert not (tmp_path / "model").exists()


def big_tokenizer(folder) -> str:
    """One with more tokens than 400."""
    words = [f"{first}{second}" for first in "abcdefghij" for second in "klmnopqrstuvwxyz"]
    tokenizer = load_tokenizer(TOKENIZER)
    tokenizer.add_tokens(words)
    tokenizer.save_pretrained(folder / "big")
    return str(folder / "big")


def test_what_a_model_from_nothing_has_no_use_for_is_refused(tmp_path, config_file):
    base = ["init", str(tmp_path / "model"), "--config", str(config_file)]
    for words, expected in (
        ([*base, "--tokenizer", TOKENIZER, "--siglip", "somewhere"], "leave out --siglip"),
        ([*base, "--tokenizer", TOKENIZER, "--robot", "calvin"], "leave out --robot"),
        (["init", str(tmp_path / "model"), "--instructions", str(config_file)], "it needs --config"),
    ):
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 1
        assert expected in result.output
    assert not (tmp_path / "model").exists()


def test_words_pictures_and_queries_enter_a_new_language_model_alike():
    config = VLAAdapterConfig(**FIELDS)
    model, _ = init_from_config(config, cut_down_tokenizer(load_tokenizer(TOKENIZER), INSTRUCTIONS, 400))
    with torch.random.fork_rng():
        torch.manual_seed(3)
        patches = model.get_image_features(torch.randn(16, 12, 28, 28)).pooler_output.detach()
    words, queries = model.get_input_embeddings().weight, model.action_queries.weight
    for states in (patches.flatten(0, 1), words, queries):
        assert 0.3 < states.std() < 2.0
    # What does not depend on the picture is small compared with what does.
    assert patches.mean(dim=(0, 1)).abs().mean() < 0.5 * patches.std(dim=0).mean()


def test_unknown_prompts_and_broken_files_are_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="prompt_style must be one of chat, in_out, got 'inout'"):
        cut_down_tokenizer(load_tokenizer(TOKENIZER), INSTRUCTIONS, 400, "inout")
    (tmp_path / "broken.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match=r"broken.json is not JSON"):
        init_untrained(tmp_path / "model", tmp_path / "broken.json", tokenizer=TOKENIZER)


def test_weights_are_stored_in_the_precision_asked_for(tmp_path, config_file):
    words = ["init", str(tmp_path / "model"), "--config", str(config_file), "--tokenizer", big_tokenizer(tmp_path)]
    fields = {**FIELDS, "text_config": {**FIELDS["text_config"], "vocab_size": 2000}}
    config_file.write_text(json.dumps(fields), encoding="utf-8")
    result = CliRunner().invoke(app, [*words, "--dtype", "bfloat16"])
    assert result.exit_code == 0, result.output
    assert AutoModel.from_pretrained(tmp_path / "model").dtype == torch.bfloat16


@pytest.mark.parametrize(
    "change, expected",
    [
        ({"chunk_sise": 4}, r"chunk_sise is not a field of VLAAdapterConfig; did you mean chunk_size\?"),
        (
            {"text_config": {"hiden_size": 32}},
            r"text_config.hiden_size is not a field of Qwen2Config; did you mean hidden_size\?",
        ),
        ({"siglip_config": None}, "siglip_config missing"),
    ],
)
def test_a_misspelt_or_missing_size_does_not_become_the_published_one(tmp_path, config_file, change, expected):
    config_file.write_text(json.dumps({**FIELDS, **change}), encoding="utf-8")
    with pytest.raises(ValueError, match=expected):
        init_untrained(tmp_path / "model", config_file, tokenizer=TOKENIZER)
    assert not (tmp_path / "model").exists()


def test_a_saved_configuration_can_be_started_from(tmp_path):
    checkpoint = files("vla_adapter_hf").joinpath("embedded", "checkpoint")
    init_untrained(tmp_path / "model", Path(str(checkpoint)) / "config.json", tokenizer=str(checkpoint))
    model, original = (AutoModel.from_pretrained(folder) for folder in (tmp_path / "model", checkpoint))
    assert model.dtype == original.dtype == torch.bfloat16
    assert model.num_parameters() == original.num_parameters()
