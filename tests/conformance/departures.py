"""Where we depart from transformers' common tests, and why: the complete list.

Tests that skip themselves for what they find (no GPU, no flash-attention, no text generation, no video, ...) are not
listed; pytest's summary names them with reasons of their own.
"""

import re
import unittest


# Tests that do not run, by the test class, with the reason. A parameterised test is named without its parameters, or
# with its number where only some of its cases do not run.
SKIPPED: dict[str, dict[str, str]] = {
    "ModelTest": {},
    "ConfigTest": {},
    "ImageProcessorTest": {
        "test_call_numpy_4_channels": (
            "the normalisation has three means and deviations per tower, those of the published files; a fourth "
            "channel is refused"
        ),
        "test_convert_to_rgb_mixed_input_batch_0": (
            "arrays of one channel are refused: of a camera frame that is no RGB image (a depth map, a mask) the "
            "model would make something it was not trained on. PIL images tell what they are, and are converted"
        ),
        "test_convert_to_rgb_mixed_input_batch_2": "likewise arrays of four channels",
        "test_new_models_require_torchvision_backend": (
            "the published preparation is reproduced bit for bit, once, in NumPy; there is no second implementation"
        ),
    },
    "ProcessorTest": {
        "test_processor_text_has_no_visual": "an observation without its camera frames is refused",
    },
}

# Tests that run in another form than the common one: what differs, and why.
ADAPTED: dict[str, dict[str, str]] = {
    "ModelTest": {
        "test_can_init_all_missing_weights": (
            "loads with strict=False: without it from_pretrained refuses files that lack weights, "
            "because a policy with some random layers must not move a robot. And as if our class were the library's "
            "own: "
            "in others' classes transformers passes over modules whose parameters are all their children's, by which "
            "some of SigLIP's initialisations, when its weights are missing, are not those of the library"
        ),
        "test_model_weights_reload_no_missing_tied_weights": (
            "loads with strict=False likewise, after seeing it refused without"
        ),
        "test_reverse_loading_mapping": (
            "with check_keys_were_modified=False: our files carry the newest parameter names, not a tower's former "
            "ones"
        ),
        "test_sdpa_can_dispatch_composite_models": (
            "the common test knows a tower called vision_model or the like; ours looks at both towers, the language "
            "model and the policy"
        ),
    },
    "ConfigTest": {},
    "ImageProcessorTest": {},
    "ProcessorTest": {
        "test_model_input_names": "gives a state too, without which the processor returns none",
        "test_save_load_pretrained_additional_features": (
            "hands do_center_crop=False to the image processor, as do_normalize=False is refused"
        ),
    },
}

# What the test classes set for all of their tests.
SETTINGS: dict[str, dict[str, str]] = {
    "ModelTest": {
        "actions": "given where the common tests give labels, as our loss is taken against actions",
        "num_hidden_states_types": "two, the language model's hidden states and the policy's",
        "skip_test_image_features_output_shape": (
            "the common test looks for the width of one tower; ours are two, side by side (the rest of it runs)"
        ),
        "get_image_features": "hidden states and attentions are expected of both towers, one after the other",
    },
    "ConfigTest": {
        "has_text_modality": "vocab_size is the language model's, and not repeated in the configuration around it",
    },
    "ImageProcessorTest": {
        "cameras": "one, for which a flat list of images is a batch; with more it is the views of one observation",
    },
    "ProcessorTest": {
        "cameras": "one, likewise",
        "init_time_kwargs": (
            "tower_means instead of rescale_factor, which is refused: with either, negative pixels show that the "
            "argument arrived"
        ),
        "images_text_kwargs_max_length, images_unstructured_max_length": (
            "longer than the prompt around an instruction, which the common tests do not reckon with"
        ),
    },
    "all": {
        "_auto_class": (
            "none: save_pretrained puts no code next to the weights and no mark of it into the files, which the "
            "common "
            "tests, made for models of the library, do not expect where they compare them"
        ),
    },
}


def departing(test_class: type[unittest.TestCase]) -> type[unittest.TestCase]:
    """Class decorator: skips what `SKIPPED` lists, and sees to it that the class changes only what `ADAPTED` lists."""
    name = test_class.__name__
    tests = [test for test in dir(test_class) if test.startswith("test_") and callable(getattr(test_class, test))]
    for test in tests:
        for skipped, reason in SKIPPED[name].items():
            if re.fullmatch(rf"{skipped}(_\D.*|_\d+(_.*)?)?", test):
                setattr(test_class, test, unittest.skip(reason)(getattr(test_class, test)))
        is_common = any(hasattr(base, test) for base in test_class.__bases__)
        is_ours = getattr(test_class, test).__module__ == test_class.__module__
        if is_common and is_ours and test not in ADAPTED[name]:
            raise ValueError(f"{name} changes the common {test}; departures.py has to say why.")
    return test_class
