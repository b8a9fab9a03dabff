"""The processor takes what robots and recordings give, in any usual form, and refuses the rest by name."""

import json
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoProcessor

from vla_adapter_hf import VLAAdapterImageProcessor, VLAAdapterProcessor


SHAPE = (48, 64)


@pytest.fixture(scope="module")
def frames() -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.integers(0, 256, (*SHAPE, 3), dtype=np.uint8) for _ in range(4)]


@pytest.fixture(scope="module")
def image_processor() -> VLAAdapterImageProcessor:
    """For two cameras, small images."""
    return VLAAdapterImageProcessor(size={"height": 28, "width": 28})


@pytest.fixture(scope="module")
def expected(image_processor, frames) -> torch.Tensor:
    return prepared(image_processor, frames[:2])


def prepared(image_processor, images, **kwargs) -> torch.Tensor:
    return image_processor(images, return_tensors="pt", **kwargs)["pixel_values"]


def small(processor, **switches) -> VLAAdapterProcessor:
    """A processor with small images and the tokenizer of another."""
    cameras = switches.pop("cameras", ["image", "wrist_image"])
    image_processor = VLAAdapterImageProcessor(size={"height": 28, "width": 28}, cameras=cameras)
    return VLAAdapterProcessor(image_processor, processor.tokenizer, **switches)


FORMS = {
    "PIL": Image.fromarray,
    "NumPy uint8": lambda frame: frame,
    "NumPy float32": lambda frame: (frame / 255).astype(np.float32),
    "NumPy float64": lambda frame: frame / 255,
    "NumPy channels first": lambda frame: frame.transpose(2, 0, 1),
    "NumPy not contiguous": lambda frame: np.asfortranarray(frame),
    "torch uint8": torch.from_numpy,
    "torch channels first": lambda frame: torch.from_numpy(frame).permute(2, 0, 1),
    "torch float32": lambda frame: torch.from_numpy(frame).permute(2, 0, 1).float() / 255,
}


class TestFrames:
    @pytest.mark.parametrize("form", FORMS)
    def test_every_form_gives_the_same_pixels(self, image_processor, frames, expected, form):
        images = [FORMS[form](frame) for frame in frames[:2]]
        assert torch.equal(prepared(image_processor, images), expected)

    def test_forms_may_be_mixed(self, image_processor, frames, expected):
        images = [Image.fromarray(frames[0]), torch.from_numpy(frames[1]).permute(2, 0, 1)]
        assert torch.equal(prepared(image_processor, images), expected)

    def test_float16_frames_come_within_a_level(self, image_processor, frames, expected):
        # Half precision has 11 bits for the 256 levels: enough to find each again.
        images = [(frame / 255).astype(np.float16) for frame in frames[:2]]
        assert torch.equal(prepared(image_processor, images), expected)

    def test_frames_may_have_different_sizes(self, image_processor, frames):
        images = [frames[0], frames[1][:30, :20]]
        assert prepared(image_processor, images).shape == (1, 12, 28, 28)

    @pytest.mark.parametrize("mode", ["RGBA", "L", "P", "CMYK"])
    def test_other_modes_of_pil_are_converted_to_rgb(self, image_processor, frames, mode):
        images = [Image.fromarray(frame).convert(mode) for frame in frames[:2]]
        rgb = [image.convert("RGB") for image in images]
        assert torch.equal(prepared(image_processor, images), prepared(image_processor, rgb))

    def test_a_frame_is_not_written_to(self, image_processor, frames):
        before = frames[0].copy()
        prepared(image_processor, frames[:2])
        np.testing.assert_array_equal(frames[0], before)

    def test_a_frame_whose_channels_could_be_first_or_last_needs_to_be_told(self, image_processor):
        frame = np.random.default_rng(0).integers(0, 256, (3, 40, 3), dtype=np.uint8)
        with pytest.raises(ValueError, match="channels first or last; give input_data_format"):
            prepared(image_processor, [frame, frame])
        first = prepared(image_processor, [frame, frame], input_data_format="channels_first")
        last = prepared(image_processor, [frame, frame], input_data_format="channels_last")
        assert not torch.equal(first, last)

    def test_a_narrow_pil_image_is_never_ambiguous(self, image_processor):
        image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (3, 40, 3), dtype=np.uint8))
        array = prepared(image_processor, [np.asarray(image)] * 2, input_data_format="channels_last")
        assert torch.equal(prepared(image_processor, [image, image]), array)


REFUSED_FRAMES = {
    "int32": (TypeError, "uint8, or floating point.*int32", lambda frame: frame.astype(np.int32)),
    "int64 tensor": (TypeError, "uint8, or floating point.*int64", lambda frame: torch.from_numpy(frame).long()),
    "bfloat16": (TypeError, "a frame is bfloat16.*give uint8 or float32",
        lambda frame: torch.from_numpy(frame / 255).bfloat16()),
    "bool": (TypeError, "uint8, or floating point.*bool", lambda frame: frame > 127),
    "float in 0...255": (ValueError, r"0\.\.\.1, got values in .*255", lambda frame: frame.astype(np.float32)),
    "float in -1...1": (ValueError, r"0\.\.\.1, got values in -1", lambda frame: frame / 127.5 - 1),
    "float with NaN": (ValueError, r"0\.\.\.1.*nan", lambda frame: np.where(frame == frame[0, 0], np.nan,
        frame / 255)),
    "float with infinity": (ValueError, r"0\.\.\.1.*inf", lambda frame: np.where(frame == frame[0, 0], np.inf, 0.5)),
    "grey array": (ValueError, "three channels", lambda frame: frame[..., 0]),
    "four channels": (ValueError, "three channels", lambda frame: np.concatenate((frame, frame[..., :1]), axis=-1)),
    "six channels": (ValueError, "three channels", lambda frame: np.concatenate((frame, frame), axis=-1)),
    "no pixels": (ValueError, "frame|image", lambda frame: frame[:0]),
    "file name": (TypeError, "PIL image, a NumPy array or a torch tensor, got str", lambda frame: "front.png"),
    "number": (TypeError, "PIL image, a NumPy array or a torch tensor, got int", lambda frame: 7),
    "nothing": (TypeError, "PIL image, a NumPy array or a torch tensor, got NoneType", lambda frame: None),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED_FRAMES)
def test_a_frame_of_the_wrong_kind_is_refused(image_processor, frames, kind):
    error, message, make = REFUSED_FRAMES[kind]
    with pytest.raises(error, match=message):
        prepared(image_processor, [frames[0], make(frames[1])])


class TestSamples:
    def test_a_dict_by_camera_name_in_any_order(self, image_processor, frames, expected):
        images = {"wrist_image": frames[1], "image": frames[0]}
        assert torch.equal(prepared(image_processor, images), expected)

    def test_an_array_with_a_camera_axis(self, image_processor, frames, expected):
        assert torch.equal(prepared(image_processor, np.stack(frames[:2])), expected)
        assert torch.equal(prepared(image_processor, torch.from_numpy(np.stack(frames[:2]))), expected)

    @pytest.mark.parametrize("container", [list, tuple])
    def test_a_batch_is_a_list_of_samples(self, image_processor, frames, container):
        batch = prepared(image_processor, container([container(frames[:2]), container(frames[2:])]))
        assert torch.equal(
            batch, torch.cat([prepared(image_processor, frames[:2]), prepared(image_processor, frames[2:])])
        )

    def test_a_batch_of_dicts_and_lists(self, image_processor, frames, expected):
        batch = prepared(image_processor, [frames[:2], {"image": frames[0], "wrist_image": frames[1]}])
        assert torch.equal(batch, expected.expand(2, -1, -1, -1))

    def test_a_batch_as_one_array(self, image_processor, frames):
        batch = np.stack([np.stack(frames[:2]), np.stack(frames[2:])])
        assert torch.equal(prepared(image_processor, batch), prepared(image_processor, [frames[:2], frames[2:]]))

    def test_with_one_camera_a_frame_is_a_sample_and_a_list_is_a_batch(self, frames):
        one = VLAAdapterImageProcessor(size={"height": 28, "width": 28}, cameras=["image"])
        assert prepared(one, frames[0]).shape == (1, 6, 28, 28)
        assert prepared(one, frames[:3]).shape == (3, 6, 28, 28)
        assert prepared(one, [[frame] for frame in frames[:3]]).shape == (3, 6, 28, 28)
        assert prepared(one, {"image": frames[0]}).shape == (1, 6, 28, 28)

    def test_cameras_are_six_channels_each_in_order(self, image_processor, frames, expected):
        swapped = prepared(image_processor, [frames[1], frames[0]])
        assert torch.equal(swapped, expected.roll(6, dims=1))

    @pytest.mark.parametrize("count", [1, 3, 4])
    def test_a_wrong_number_of_frames_is_refused_with_the_cameras_names(self, image_processor, frames, count):
        message = f"sample 0 has {count} frames, but the model has 2 cameras .image, wrist_image"
        with pytest.raises(ValueError, match=message):
            prepared(image_processor, [frames[:count]])

    def test_a_batch_is_refused_for_one_bad_sample_which_is_named(self, image_processor, frames):
        with pytest.raises(ValueError, match="sample 1 has 1 frames"):
            prepared(image_processor, [frames[:2], frames[:1]])

    def test_a_lone_frame_is_refused_where_two_are_needed(self, image_processor, frames):
        with pytest.raises(ValueError, match="1 frames.*2 cameras"):
            prepared(image_processor, frames[0])

    @pytest.mark.parametrize("names", [("image",), ("image", "wrist"), ("image", "wrist_image", "third")])
    def test_wrong_camera_names_are_refused(self, image_processor, frames, names):
        with pytest.raises(ValueError, match=r"the model needs \['image', 'wrist_image'\]"):
            prepared(image_processor, dict(zip(names, frames, strict=False)))

    @pytest.mark.parametrize("prefix", ["observation.images.", "steps/observation/"])
    def test_full_column_names_that_end_in_the_cameras_names(self, image_processor, frames, expected, prefix):
        images = {f"{prefix}wrist_image": frames[1], f"{prefix}image": frames[0]}
        assert torch.equal(prepared(image_processor, images), expected)

    def test_a_full_column_name_next_to_a_short_one(self, image_processor, frames, expected):
        images = {"left.wrist_image": frames[1], "image": frames[0]}
        assert torch.equal(prepared(image_processor, images), expected)

    @pytest.mark.parametrize("prefix", ["", "observation.images."])
    def test_cameras_whose_last_parts_are_equal(self, frames, expected, prefix):
        two = VLAAdapterImageProcessor(size={"height": 28, "width": 28}, cameras=["left.rgb", "right.rgb"])
        images = {f"{prefix}right.rgb": frames[1], f"{prefix}left.rgb": frames[0]}
        assert torch.equal(prepared(two, images), expected)

    def test_a_camera_that_two_names_end_in_is_refused_with_both(self, image_processor, frames):
        names = ("image", "left.wrist_image", "right.wrist_image")
        with pytest.raises(ValueError, match="'wrist_image' could be any of left.wrist_image, right.wrist_image"):
            prepared(image_processor, dict(zip(names, frames, strict=False)))

    def test_a_name_that_only_ends_in_the_same_letters_is_refused(self, image_processor, frames):
        with pytest.raises(ValueError, match=r"the model needs \['image', 'wrist_image'\]"):
            prepared(image_processor, {"front_image": frames[0], "wrist_image": frames[1]})

    def test_no_images_are_refused(self, image_processor):
        with pytest.raises(ValueError, match="images is empty.*image, wrist_image"):
            prepared(image_processor, [])


@settings(max_examples=30, deadline=None)
@given(
    height=st.integers(4, 70),
    width=st.integers(4, 70),
    seed=st.integers(0, 1000),
    form=st.sampled_from(sorted(FORMS)),
)
def test_any_size_and_form_gives_finite_pixels_of_the_models_size(height, width, seed, form):
    image_processor = VLAAdapterImageProcessor(size={"height": 28, "width": 28}, cameras=["image"])
    frame = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    pixel_values = prepared(image_processor, FORMS[form](frame))
    assert pixel_values.shape == (1, 6, 28, 28) and pixel_values.dtype == torch.float32
    assert torch.equal(pixel_values, prepared(image_processor, frame))
    # SigLIP's channels are (x - 0.5) / 0.5, so they are in -1...1.
    assert pixel_values[:, 3:].abs().max() <= 1


class TestSwitches:
    def test_each_changes_the_pixels(self, image_processor, frames, expected):
        images = frames[:2]
        results = [expected]
        for switches in ({"do_jpeg_round_trip": False}, {"do_center_crop": False}, {"crop_area": 0.5}):
            results.append(prepared(image_processor, images, **switches))
        for index, result in enumerate(results):
            assert not any(torch.equal(result, other) for other in results[:index])

    def test_with_both_off_a_frame_of_the_right_size_is_only_normalised(self, image_processor):
        frame = np.random.default_rng(0).integers(0, 256, (28, 28, 3), dtype=np.uint8)
        pixel_values = prepared(image_processor, [frame] * 2, do_jpeg_round_trip=False, do_center_crop=False)
        siglip = torch.from_numpy(frame).permute(2, 0, 1) / 127.5 - 1
        torch.testing.assert_close(pixel_values[0, 3:6], siglip, rtol=0, atol=1e-6)

    @pytest.mark.parametrize("switch", ["do_resize", "do_rescale", "do_normalize"])
    def test_what_the_model_cannot_do_without_cannot_be_switched_off(self, image_processor, frames, switch):
        with pytest.raises(ValueError, match=f"{switch}=False is not possible"):
            prepared(image_processor, frames[:2], **{switch: False})

    @pytest.mark.parametrize("crop_area", [0.0, -0.1, 1.1, float("nan")])
    def test_a_crop_that_is_no_share_is_refused(self, image_processor, frames, crop_area):
        with pytest.raises(ValueError, match="crop_area"):
            prepared(image_processor, frames[:2], crop_area=crop_area)


class TestUnknownOptions:
    """A misspelled option is refused: passed over, it would let the model see something else than was meant."""

    @pytest.mark.parametrize("name", ["do_centre_crop", "crop", "robot"])
    def test_of_the_image_processor(self, image_processor, frames, name):
        with pytest.raises(TypeError, match=f"{name}: the image processor has no such option"):
            image_processor(frames[:2], **{name: False})

    @pytest.mark.parametrize("name", ["do_centre_crop", "paddding", "videos", "audio_kwargs"])
    def test_of_the_processor(self, processor, frames, name):
        with pytest.raises(TypeError, match=f"{name}: the processor has no such option"):
            small(processor)(images=frames[:2], text="open it", **{name: {}})

    @pytest.mark.parametrize("part", ["images_kwargs", "text_kwargs", "common_kwargs"])
    def test_of_a_part(self, processor, frames, part):
        with pytest.raises(TypeError, match=rf"{part}\['croparea'\]: the processor has no such option"):
            small(processor)(images=frames[:2], text="open it", **{part: {"croparea": 1}})

    def test_the_parts_own_options_may_be_given_in_either_way(self, processor, frames):
        observation = {"images": frames[:2], "text": "open it"}
        flat = small(processor)(**observation, do_center_crop=False)
        grouped = small(processor)(**observation, images_kwargs={"do_center_crop": False})
        assert torch.equal(flat["pixel_values"], grouped["pixel_values"])

    def test_the_cameras_are_the_models_and_no_option_of_a_call(self, processor, image_processor, frames):
        message = r"cameras belong to the model, here \['image', 'wrist_image'\].*a dict by camera name"
        with pytest.raises(TypeError, match=message):
            image_processor(frames[:2], cameras=["wrist_image", "image"])
        with pytest.raises(TypeError, match=message):
            small(processor)(images=frames[:2], text="open it", cameras=["wrist_image", "image"])


class TestSaving:
    def test_every_switch_survives_those_that_are_off_too(self, tmp_path, processor):
        saved = small(processor, cameras=["left", "right"], prompt_style="in_out", proprio_dim=14)
        saved.image_processor.do_jpeg_round_trip = False
        saved.image_processor.do_center_crop = False
        saved.image_processor.crop_area = 0.8
        saved.save_pretrained(tmp_path)
        loaded = AutoProcessor.from_pretrained(tmp_path)
        assert type(loaded) is VLAAdapterProcessor
        assert (loaded.prompt_style, loaded.proprio_dim) == ("in_out", 14)
        fields = ("do_jpeg_round_trip", "do_center_crop", "crop_area", "cameras", "tower_means", "tower_stds", "size")
        for field in fields:
            assert getattr(loaded.image_processor, field) == getattr(saved.image_processor, field), field

    def test_the_loaded_processor_gives_the_same_inputs(self, tmp_path, processor, observation):
        processor.save_pretrained(tmp_path)
        loaded, expected = AutoProcessor.from_pretrained(tmp_path)(**observation), processor(**observation)
        assert loaded.keys() == expected.keys()
        for name, value in expected.items():
            assert np.array_equal(loaded[name], value), name

    def test_switches_can_be_set_while_loading(self, tmp_path, processor):
        processor.save_pretrained(tmp_path)
        loaded = AutoProcessor.from_pretrained(tmp_path, do_center_crop=False, prompt_style="in_out")
        assert not loaded.image_processor.do_center_crop and loaded.prompt_style == "in_out"

    def test_the_files_are_json_that_people_can_read(self, tmp_path, processor):
        processor.save_pretrained(tmp_path)
        stored = json.loads((tmp_path / "processor_config.json").read_text())
        assert stored["prompt_style"] == "chat" and stored["image_processor"]["cameras"] == ["image", "wrist_image"]

    def test_the_models_configuration_sets_the_switches(self, pro_model, processor):
        config = type(pro_model.config)(
            cameras=["a", "b", "c"], image_center_crop=None, image_jpeg_round_trip=False, proprio_dim=14
        )
        made = VLAAdapterProcessor.from_model_config(config, processor.tokenizer)
        image_processor = made.image_processor
        assert image_processor.cameras == ["a", "b", "c"] and made.proprio_dim == 14
        assert not image_processor.do_center_crop and not image_processor.do_jpeg_round_trip
        config = type(pro_model.config)(image_center_crop=0.8)
        assert VLAAdapterProcessor.from_model_config(config, processor.tokenizer).image_processor.crop_area == 0.8


class TestText:
    def test_the_chat_prompt_is_the_default(self, processor):
        (prompt,) = processor.make_prompts("Open the Drawer")
        assert prompt.endswith(
            "What action should the robot take to open the drawer?<|im_end|>\n<|im_start|>assistant\n"
        )
        assert prompt.startswith("<|im_start|>system\nYou are Qwen, created by Alibaba Cloud.")

    def test_the_other_prompt_goes_by_name(self, processor):
        prompts = small(processor, prompt_style="in_out").make_prompts("Open the Drawer")
        assert prompts == ["In: What action should the robot take to open the drawer?\nOut:"]

    def test_an_unknown_prompt_style_is_refused(self, processor):
        with pytest.raises(ValueError, match="prompt_style must be one of chat, in_out, got 'free'"):
            small(processor, prompt_style="free")

    @pytest.mark.parametrize("text", ["", "   ", "\n", ["pick", ""]])
    def test_an_empty_instruction_is_refused(self, processor, frames, text):
        images = [frames[:2]] * (len(text) if isinstance(text, list) else 1)
        with pytest.raises(ValueError, match=r"text\[\d\] is empty; every observation needs an instruction"):
            small(processor)(images=images, text=text)

    def test_an_instruction_that_is_no_string_is_refused(self, processor, frames):
        with pytest.raises(TypeError, match=r"text\[0\] must be a string, got int"):
            small(processor)(images=[frames[:2]], text=[3])

    def test_braces_in_an_instruction_are_just_characters(self, processor):
        assert "{drawer}" in processor.make_prompts("open the {drawer}")[0]

    # In capitals too: the instruction goes in in lower case.
    @pytest.mark.parametrize("token", ["<|im_end|>", "<|IM_END|>", "<|endoftext|>"])
    def test_a_control_token_in_an_instruction_is_refused(self, processor, frames, token):
        message = re.escape(f"text[1] holds '{token.lower()}', which the tokenizer reads as a control token")
        with pytest.raises(ValueError, match=message):
            small(processor)(images=[frames[:2]] * 2, text=["open it", f"open it{token} now"])

    def test_what_only_looks_like_a_control_token_is_text(self, processor):
        assert "<|drawer|> < im_end >" in processor.make_prompts("open the <|drawer|> < im_end >")[0]

    @pytest.mark.parametrize("missing", ["images", "text"])
    def test_images_and_text_are_both_needed(self, processor, frames, missing):
        arguments = {"images": frames[:2], "text": "open the drawer", missing: None}
        with pytest.raises(ValueError, match=f"{missing} is missing"):
            small(processor)(**arguments)

    def test_as_many_instructions_as_observations(self, processor, frames):
        with pytest.raises(ValueError, match="2 observations and text 1 instructions"):
            small(processor)(images=[frames[:2], frames[2:]], text="open the drawer")

    @pytest.mark.parametrize(("side", "column"), [("left", 0), ("right", -1)])
    def test_a_batch_is_padded_on_the_side_that_was_asked_for(self, processor, frames, side, column):
        inputs = small(processor)(
            images=[frames[:2], frames[2:]],
            text=["open it", "open the upper drawer of the cabinet"],
            padding_side=side,
        )
        assert inputs["attention_mask"][:, column].tolist() == [0, 1]
        assert inputs["input_ids"].shape == inputs["attention_mask"].shape

    @settings(max_examples=30, deadline=None)
    @given(instruction=st.text(min_size=1).filter(str.strip))
    def test_any_instruction_is_tokens_of_the_vocabulary(self, text_processor, instruction):
        (prompt,) = text_processor.make_prompts(instruction)
        ids = text_processor.tokenizer(prompt)["input_ids"]
        assert ids and 0 <= min(ids) and max(ids) < 1022


@pytest.fixture(scope="module")
def text_processor(processor):
    return processor


class TestState:
    """A float64 array in the robot's units, which no conversion of the other inputs can round."""

    @pytest.fixture
    def call(self, processor, frames):
        def call(state, batch_size=1, **kwargs):
            return small(processor, **kwargs)(
                images=[frames[:2]] * batch_size, text=["open it"] * batch_size, state=state
            )

        return call

    @pytest.mark.parametrize(
        "state",
        [
            [1 / 3] * 8,
            np.full(8, 1 / 3),
            np.full((1, 8), 1 / 3),
            torch.full((8,), 1 / 3, dtype=torch.float64),
            torch.full((1, 8), 1 / 3, dtype=torch.float64, requires_grad=True),
            list(torch.full((8,), 1 / 3, dtype=torch.float64, requires_grad=True)),
        ],
    )
    def test_lists_arrays_and_tensors_are_kept_in_full(self, call, state):
        inputs = call(state)
        assert isinstance(inputs["state"], np.ndarray) and inputs["state"].dtype == np.float64
        np.testing.assert_array_equal(inputs["state"], np.full((1, 8), 1 / 3))

    def test_converting_the_inputs_leaves_the_state_alone(self, call):
        inputs = call([1 / 3] * 8).to(torch.bfloat16)
        assert inputs["pixel_values"].dtype == torch.bfloat16
        np.testing.assert_array_equal(inputs["state"], np.full((1, 8), 1 / 3))

    def test_moving_the_inputs_leaves_the_state_alone(self, call):
        inputs = call([1 / 3] * 8).to("meta")
        assert inputs["pixel_values"].device.type == "meta"
        np.testing.assert_array_equal(inputs["state"], np.full((1, 8), 1 / 3))

    def test_integers_are_numbers_too(self, call):
        assert call(list(range(8)))["state"].tolist() == [[float(number) for number in range(8)]]

    def test_it_may_be_left_out(self, processor, frames):
        assert "state" not in small(processor)(images=frames[:2], text="open it")

    @pytest.mark.parametrize("shape", [(7,), (9,), (2, 8), (1, 1, 8), ()])
    def test_a_wrong_size_is_refused_with_what_was_expected(self, call, shape):
        with pytest.raises(ValueError, match=r"state must have shape \(1, 8\)"):
            call(np.zeros(shape))

    def test_a_batch_needs_a_row_each(self, call):
        with pytest.raises(ValueError, match=r"state must have shape \(2, 8\)"):
            call(np.zeros(8), batch_size=2)
        assert call(np.zeros((2, 8)), batch_size=2)["state"].shape == (2, 8)

    def test_the_size_is_the_models(self, call):
        assert call(np.zeros(14), proprio_dim=14)["state"].shape == (1, 14)

    @pytest.mark.parametrize("bad", [np.nan, np.inf])
    def test_values_that_are_not_finite_are_refused(self, call, bad):
        with pytest.raises(ValueError, match="state holds values that are not finite"):
            call([bad] + [0.0] * 7)

    @pytest.mark.parametrize(
        "state",
        [
            np.zeros(8, np.float16),
            torch.zeros(8, dtype=torch.bfloat16),
            list(torch.zeros(8, dtype=torch.bfloat16)),
            [0.0] * 7 + [np.float16(0)],
            [torch.zeros(8, dtype=torch.float16)],
        ],
    )
    def test_a_state_that_has_already_lost_digits_is_refused(self, call, state):
        with pytest.raises(ValueError, match="state is b?float16, which has already lost digits; give float32"):
            call(state)

    @pytest.mark.parametrize(
        ("error", "state"), [(ValueError, ["left"] * 8), (ValueError, [[0.0], [0.0, 1.0]]), (TypeError, {"x": 0.0})]
    )
    def test_what_is_no_array_of_numbers_is_refused(self, call, error, state):
        with pytest.raises(error, match="state must be numbers"):
            call(state)


def test_a_whole_batch(processor, frames):
    inputs = small(processor)(
        images=[frames[:2], {"image": frames[2], "wrist_image": frames[3]}],
        text=["open the drawer", "close the upper drawer"],
        state=np.zeros((2, 8)),
    )
    assert list(inputs) == ["input_ids", "attention_mask", "pixel_values", "state", "preparation"]
    assert inputs["pixel_values"].shape == (2, 12, 28, 28)
    assert len(inputs["input_ids"]) == len(inputs["state"]) == 2


def test_numpy_in_place_of_torch(processor, frames):
    inputs = small(processor)(images=frames[:2], text="open it", return_tensors="np")
    assert all(isinstance(value, np.ndarray) for name, value in inputs.items() if name != "preparation")
