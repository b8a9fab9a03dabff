"""transformers' own common tests against our model, configuration and processors.

Departures are in `departures.py`.
"""

import tempfile
import unittest
from contextlib import ExitStack
from functools import partial
from unittest.mock import patch

import numpy as np
import pytest
import torch
from common_suite import load
from departures import departing
from tokenizers.pre_tokenizers import ByteLevel
from transformers import Qwen2Tokenizer, set_seed

from vla_adapter_hf import (
    VLAAdapterConfig,
    VLAAdapterForActionPrediction,
    VLAAdapterImageProcessor,
    VLAAdapterProcessor,
)


common_configuration = load("test_configuration_common")
common_image_processing = load("test_image_processing_common")
common_modeling = load("test_modeling_common")
common_processing = load("test_processing_common")

# Every part of a real model, a few channels wide. Two cameras of four patches each, seven prompt tokens and four
# action queries make a sequence of 19.
IMAGE_SIZE, PROMPT_LENGTH, SEQUENCE_LENGTH = 28, 7, 19
TINY = {
    "dinov2_config": {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "mlp_ratio": 2,
        "image_size": IMAGE_SIZE,
        "patch_size": 14,
        "num_register_tokens": 2,
    },
    "siglip_config": {
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "image_size": IMAGE_SIZE,
        "patch_size": 14,
        "vision_use_head": False,
    },
    "text_config": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "vocab_size": 99,
        "max_position_embeddings": 64,
    },
    "num_action_queries": 4,
    "chunk_size": 3,
    "action_dim": 5,
    "proprio_dim": 6,
    "policy_num_layers": 2,
    "policy_num_heads": 2,
}


@pytest.fixture(autouse=True, scope="module")
def as_in_the_library():
    """Without the code that `save_pretrained` puts next to the weights, and its mark (`auto_map`) in saved files.

    The common tests compare what was saved with what is loaded, and do not know of either.
    """
    with ExitStack() as stack:
        for ours in (VLAAdapterConfig, VLAAdapterForActionPrediction, VLAAdapterImageProcessor, VLAAdapterProcessor):
            stack.enter_context(patch.object(ours, "_auto_class", None))
        yield


class ModelTester:
    """What the common tests ask for: a small configuration, a batch for it, and the sizes that they should find."""

    batch_size = 3
    is_training = True
    seq_length = SEQUENCE_LENGTH
    hidden_size = TINY["text_config"]["hidden_size"]
    num_attention_heads = TINY["text_config"]["num_attention_heads"]
    num_hidden_layers = TINY["text_config"]["num_hidden_layers"]
    num_hidden_states_types = 2  # the language model's and the policy's

    def get_config(self) -> VLAAdapterConfig:
        return VLAAdapterConfig(**TINY)

    def prepare_config_and_inputs_for_common(self) -> tuple[VLAAdapterConfig, dict[str, torch.Tensor]]:
        config, batch_size = self.get_config(), self.batch_size
        generator = torch.Generator().manual_seed(0)
        inputs = {
            "input_ids": torch.randint(
                config.text_config.vocab_size, (batch_size, PROMPT_LENGTH), generator=generator
            ),
            "attention_mask": torch.ones(batch_size, PROMPT_LENGTH, dtype=torch.long),
            "pixel_values": torch.randn(
                batch_size, 6 * config.num_cameras, IMAGE_SIZE, IMAGE_SIZE, generator=generator
            ),
            "proprio": torch.rand(batch_size, config.proprio_dim, generator=generator) * 2 - 1,
        }
        return config, inputs


@departing
class ModelTest(common_modeling.ModelTesterMixin, unittest.TestCase):
    all_model_classes = (VLAAdapterForActionPrediction,)
    additional_model_inputs = ["pixel_values", "proprio"]
    test_can_init_all_missing_weights_before_2023 = True
    _is_composite = True
    skip_test_image_features_output_shape = True  # it looks for one tower's width in `vision_config`

    def setUp(self):
        set_seed(0)
        self.model_tester = ModelTester()

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class)
        if return_labels:
            chunk = (len(inputs["input_ids"]), TINY["chunk_size"], TINY["action_dim"])
            inputs["actions"] = torch.linspace(-1, 1, torch.Size(chunk).numel()).reshape(chunk)
        return inputs

    def _image_features_get_expected_num_attentions(self, model_tester=None):
        return TINY["dinov2_config"]["num_hidden_layers"] + TINY["siglip_config"]["num_hidden_layers"]

    def _image_features_get_expected_num_hidden_states(self, model_tester=None):
        return self._image_features_get_expected_num_attentions() + 2  # of either tower one before the first block

    def test_can_init_all_missing_weights(self):
        as_library_code = patch.object(VLAAdapterForActionPrediction, "is_custom_code", lambda *_: False, create=True)
        with missing_weights_allowed(), as_library_code:
            super().test_can_init_all_missing_weights()

    def test_model_weights_reload_no_missing_tied_weights(self):
        with self.assertRaisesRegex(ValueError, "missing keys action_queries.weight, .* and [0-9]+ more"):
            super().test_model_weights_reload_no_missing_tied_weights()
        with missing_weights_allowed():
            super().test_model_weights_reload_no_missing_tied_weights()

    def test_reverse_loading_mapping(self):
        super().test_reverse_loading_mapping(check_keys_were_modified=False)

    def test_sdpa_can_dispatch_composite_models(self):
        model = VLAAdapterForActionPrediction(self.model_tester.get_config())
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            for given, expected in ((None, "sdpa"), ("sdpa", "sdpa"), ("eager", "eager")):
                model = VLAAdapterForActionPrediction.from_pretrained(folder, attn_implementation=given)
                for part in (model, model.dinov2, model.siglip, model.language_model, model.policy):
                    self.assertEqual(part.config._attn_implementation, expected)


def missing_weights_allowed():
    lenient = partial(VLAAdapterForActionPrediction.from_pretrained, strict=False)
    return patch.object(VLAAdapterForActionPrediction, "from_pretrained", lenient)


@departing
class ConfigTest(unittest.TestCase):
    maxDiff = None

    def setUp(self):
        self.model_tester = ModelTester()
        self.config_tester = common_configuration.ConfigTester(
            self, config_class=VLAAdapterConfig, has_text_modality=False, common_properties=[], chunk_size=3
        )

    def test_config(self):
        self.config_tester.run_common_tests()


class ImageProcessorTester(common_image_processing.ImageProcessingTester):
    """One camera, for which the common tests' flat lists of images are batches."""

    def __init__(self, parent, **kwargs):
        size = {"height": 20, "width": 20}
        super().__init__(parent, max_resolution=80, size=size, cameras=["image"], **kwargs)

    def _get_image_processing_classes(self):
        return {"pil": VLAAdapterImageProcessor}

    def expected_output_image_shape(self, images):
        return 6, self.size["height"], self.size["width"]  # three channels for each tower


@departing
class ImageProcessorTest(common_image_processing.ImageProcessingTestMixin, unittest.TestCase):
    image_processor_tester_class = ImageProcessorTester
    test_cast_dtype = True

    def setUp(self):
        np.random.seed(0)
        super().setUp()


@departing
class ProcessorTest(common_processing.ProcessorTesterMixin, unittest.TestCase):
    processor_class = VLAAdapterProcessor
    # A prompt is about 200 of the test tokenizer's tokens.
    images_text_kwargs_max_length = 317
    images_unstructured_max_length = 276

    def setUp(self):
        np.random.seed(0)
        # By these the common tests see that an argument arrives: pixels become negative.
        specs = common_processing.MODALITY_TEST_SPECS["images"]
        arguments = patch.dict(specs, init_time_kwargs={"tower_means": [[2.0] * 3] * 2})
        arguments.start()
        self.addCleanup(arguments.stop)

    @classmethod
    def _setup_image_processor(cls):
        return VLAAdapterImageProcessor(cameras=["image"], size={"height": 20, "width": 20})

    @classmethod
    def _setup_tokenizer(cls):
        special_tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
        alphabet = sorted(ByteLevel.alphabet())
        tokenizer = Qwen2Tokenizer(vocab={token: i for i, token in enumerate(alphabet)}, merges=[])
        tokenizer.add_special_tokens({"additional_special_tokens": special_tokens})
        return tokenizer

    @staticmethod
    def prepare_processor_dict():
        return {"prompt_style": "chat", "proprio_dim": 6}

    def test_model_input_names(self):
        processor = self.get_processor()
        observation = {"images": self.prepare_images_inputs(), "text": "lift the lid", "state": np.zeros(6)}
        self.assertEqual(list(processor(**observation)), processor.model_input_names)

    def test_save_load_pretrained_additional_features(self):
        processor = VLAAdapterProcessor.from_pretrained(self.tmpdirname, cls_token="(CLS)", do_center_crop=False)
        self.assertEqual(processor.tokenizer.cls_token, "(CLS)")
        self.assertFalse(processor.image_processor.do_center_crop)
