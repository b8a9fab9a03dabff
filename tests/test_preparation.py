"""Model and processor must agree on how inputs are prepared; a difference is an error, not another action."""

import numpy as np
import pytest
import torch
from model_fixtures import norm_stats, tiny_config, tiny_model
from torch.utils.data import default_collate
from transformers import AutoModel, AutoProcessor

from vla_adapter_hf import VLAAdapterDataCollator, VLAAdapterForActionPrediction, VLAAdapterProcessor
from vla_adapter_hf.checkpoints.embedded import embedded_folder
from vla_adapter_hf.checkpoints.open import open_checkpoint
from vla_adapter_hf.modeling.configuration_vla_adapter import PROMPT_STYLES
from vla_adapter_hf.modeling.inputs_vla_adapter import check_preparation
from vla_adapter_hf.processing.processing_vla_adapter import PROMPTS


# What a processor of another folder may have, and what the error says about it.
DIFFERENCES = {
    "camera order": ({"cameras": ["wrist_image", "image"]},
        r"cameras .inputs: \['wrist_image', 'image'\], model: \['im"),
    "camera names": ({"cameras": ["top", "wrist"]}, r"cameras .inputs: \['top', 'wrist'\]"),
    "no crop": ({"do_center_crop": False}, "image_center_crop .inputs: None, model: 0.9"),
    "another crop": ({"crop_area": 0.8}, "image_center_crop .inputs: 0.8, model: 0.9"),
    "no JPEG": ({"do_jpeg_round_trip": False}, "image_jpeg_round_trip .inputs: False, model: True"),
    "another prompt": ({"prompt_style": "in_out"}, "prompt_style .inputs: 'in_out', model: 'chat'"),
}  # fmt: skip


@pytest.fixture(scope="module")
def model() -> VLAAdapterForActionPrediction:
    return tiny_model()


@pytest.fixture
def of_model(model, processor) -> VLAAdapterProcessor:
    return VLAAdapterProcessor.from_model_config(model.config, processor.tokenizer)


@pytest.fixture
def observation() -> dict:
    frames = list(np.random.default_rng(0).integers(0, 256, (2, 48, 64, 3), dtype=np.uint8))
    return {"images": frames, "text": "open the drawer", "state": np.zeros(8)}


def other(model, processor, options) -> VLAAdapterProcessor:
    return VLAAdapterProcessor.from_model_config(model.config, processor.tokenizer, **options)


@pytest.mark.parametrize("difference", DIFFERENCES)
def test_inputs_prepared_in_another_way_are_refused_with_both_values(model, processor, observation, difference):
    options, message = DIFFERENCES[difference]
    inputs = other(model, processor, options)(**observation)
    with pytest.raises(ValueError, match=message):
        model.predict_action(**inputs)


@pytest.mark.parametrize("difference", DIFFERENCES)
def test_forward_refuses_them_too(model, processor, observation, difference):
    options, message = DIFFERENCES[difference]
    inputs = other(model, processor, options)(**observation)
    del inputs["state"]
    with pytest.raises(ValueError, match=message):
        model(**inputs, proprio=torch.zeros(1, 8))


@pytest.mark.parametrize("difference", DIFFERENCES)
def test_the_collator_refuses_such_a_processor_before_training(model, processor, difference):
    options, message = DIFFERENCES[difference]
    with pytest.raises(ValueError, match=message):
        VLAAdapterDataCollator(other(model, processor, options), model.config)


@pytest.mark.parametrize(
    ("option", "message"),
    [({"do_center_crop": False}, "image_center_crop"), ({"do_jpeg_round_trip": False}, "image_jpeg_round_trip")],
)
def test_an_option_of_one_call_counts_too(model, of_model, observation, option, message):
    with pytest.raises(ValueError, match=message):
        model.predict_action(**of_model(**observation, **option))


def test_all_that_differs_is_named_with_what_to_do(model, processor, observation):
    inputs = other(model, processor, {"do_center_crop": False, "prompt_style": "in_out"})(**observation)
    with pytest.raises(
        ValueError, match=r"image_center_crop.*prompt_style.*from_model_config.*leave `preparation` out"
    ):
        model.predict_action(**inputs)


def test_the_processors_own_inputs_survive_to_and_collation(model, of_model, observation):
    expected = model.predict_action(**of_model(**observation))
    assert np.array_equal(model.predict_action(**of_model(**observation).to("cpu")), expected)
    assert np.isfinite(model.predict_action(**of_model(**observation).to(torch.bfloat16))).all()
    inputs = {name: value[0] for name, value in of_model(**observation).items() if name != "preparation"}
    samples = [{**inputs, "preparation": of_model.describe_preparation()} for _ in range(2)]
    np.testing.assert_allclose(model.predict_action(**default_collate(samples))[1], expected[0], atol=1e-5)


def test_one_sample_of_a_batch_that_was_prepared_in_another_way_is_enough(model, processor, of_model, observation):
    inputs = of_model(
        **{**observation, "images": [observation["images"]] * 2, "text": ["open it"] * 2, "state": np.zeros((2, 8))}
    )
    inputs["preparation"] = [inputs["preparation"], other(model, processor, {"crop_area": 0.5}).describe_preparation()]
    with pytest.raises(ValueError, match="image_center_crop .inputs: 0.5"):
        model.predict_action(**inputs)


@pytest.mark.parametrize("token", [-1, 1024])
def test_a_token_of_another_vocabulary_is_refused(model, of_model, observation, token):
    inputs = of_model(**observation)
    inputs["input_ids"][0, 1] = token
    with pytest.raises(ValueError, match=f"input_ids holds token {token}, but the model has tokens 0 to 1023"):
        model.predict_action(**inputs)


def test_inputs_made_by_hand_are_taken(model, processor, of_model, observation):
    inputs = of_model(**observation)
    by_hand = {name: inputs[name] for name in ("input_ids", "attention_mask", "pixel_values", "state")}
    assert np.array_equal(model.predict_action(**by_hand), model.predict_action(**inputs))


@pytest.mark.parametrize("preparation", ["yes", "[1]", '{"colour": 1}'])
def test_what_no_processor_returned_is_refused(model, of_model, observation, preparation):
    inputs = of_model(**observation)
    inputs["preparation"] = preparation
    with pytest.raises(ValueError, match="preparation must be what the processor returned, got"):
        model.predict_action(**inputs)


def test_of_an_older_checkpoint_the_prompt_is_not_known_and_not_compared(processor, observation):
    model = tiny_model(prompt_style=None)
    inputs = other(model, processor, {"prompt_style": "in_out"})(**observation)
    assert np.isfinite(model.predict_action(**inputs)).all()


def test_the_processor_of_a_configuration_has_its_prompt(processor):
    config = tiny_config(prompt_style="in_out")
    assert VLAAdapterProcessor.from_model_config(config, processor.tokenizer).prompt_style == "in_out"
    assert (
        VLAAdapterProcessor.from_model_config(tiny_config(prompt_style=None), processor.tokenizer).prompt_style
        == "chat"
    )


def test_model_and_processor_know_the_same_prompts():
    assert set(PROMPT_STYLES) == set(PROMPTS)


def test_model_and_processor_of_two_folders(tmp_path, processor, observation):
    for name, options in {"one": {}, "two": {"cameras": ["wrist_image", "image"], "norm_stats": norm_stats()}}.items():
        saved = tiny_model(**options)
        saved.save_pretrained(tmp_path / name)
        VLAAdapterProcessor.from_model_config(saved.config, processor.tokenizer).save_pretrained(tmp_path / name)
    model = AutoModel.from_pretrained(tmp_path / "one")
    assert np.isfinite(model.predict_action(**AutoProcessor.from_pretrained(tmp_path / "one")(**observation))).all()
    with pytest.raises(ValueError, match="cameras"):
        model.predict_action(**AutoProcessor.from_pretrained(tmp_path / "two")(**observation))


def test_the_tokenizer_of_another_model_is_refused(model, processor, observation):
    """Its tokens are all in the vocabulary, so nothing else would find it."""
    with embedded_folder() as folder:
        other_tokenizer = open_checkpoint(folder / "checkpoint").load_processor().tokenizer
    config = tiny_config(tokenizer_fingerprint=processor.tokenizer_fingerprint, norm_stats=norm_stats())
    own, others = (
        VLAAdapterProcessor.from_model_config(config, tokenizer)
        for tokenizer in (processor.tokenizer, other_tokenizer)
    )
    check_preparation(config, own.describe_preparation())
    assert max(others(**observation)["input_ids"][0]) < config.text_config.vocab_size
    with pytest.raises(ValueError, match="tokenizer_fingerprint .inputs: '\\w+', model: '\\w+'"):
        check_preparation(config, others.describe_preparation())
    config.tokenizer_fingerprint = None  # an older checkpoint
    check_preparation(config, others.describe_preparation())
