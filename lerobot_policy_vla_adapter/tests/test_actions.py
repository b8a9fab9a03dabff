"""Predictions through LeRobot's processors: those of our own model and processor, for the same observation."""

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from lerobot.configs import PreTrainedConfig
from lerobot.policies.factory import make_pre_post_processors
from lerobot.policies.rtc.configuration_rtc import RTCConfig
from safetensors.torch import load_file

from lerobot_policy_vla_adapter import VLAAdapterPolicy, make_vla_adapter_pre_post_processors
from lerobot_policy_vla_adapter.modeling_vla_adapter import blend_chunks
from lerobot_policy_vla_adapter.processor_vla_adapter import MODEL_INPUT, _uint8_frames
from vla_adapter_hf import open_checkpoint
from vla_adapter_hf.checkpoints.lerobot.convert import from_lerobot, to_lerobot
from vla_adapter_hf.robots import get_robot


# The state reaches a policy of LeRobot in float32.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def converted(trained, tmp_path_factory):
    return to_lerobot(str(trained), tmp_path_factory.mktemp("converted") / "policy", robot="libero")


@pytest.fixture(scope="module")
def policy(converted):
    return VLAAdapterPolicy.from_pretrained(converted)


@pytest.fixture(scope="module")
def processors(policy, converted):
    overrides = {"device_processor": {"device": "cpu"}, "rename_observations_processor": {"rename_map": {}}}
    return make_pre_post_processors(policy.config, str(converted), preprocessor_overrides=overrides)


def uint8_frames(observation: dict, row: int) -> list[np.ndarray]:
    names = ("observation.images.image", "observation.images.wrist_image")
    return [np.rint(observation[name][row].numpy() * 255).astype(np.uint8).transpose(1, 2, 0) for name in names]


def own_inputs(folder, observation: dict) -> dict:
    rows = range(len(observation["task"]))
    images = [uint8_frames(observation, row) for row in rows]
    state = observation["observation.state"].numpy()
    return open_checkpoint(folder).load_processor()(images=images, text=observation["task"], state=state)


def own_actions(folder, observation: dict) -> np.ndarray:
    """Actions of our own model in the simulator's convention."""
    model = open_checkpoint(folder).load_model()
    return get_robot("libero").to_environment(model.predict_action(**own_inputs(folder, observation)))


def test_frames_come_back_as_the_uint8_frames_that_they_were():
    levels = torch.arange(256, dtype=torch.uint8).repeat(3).reshape(1, 3, 16, 16)
    frames = _uint8_frames(levels.float() / 255, "observation.images.top")
    np.testing.assert_array_equal(frames[0], levels[0].permute(1, 2, 0).numpy())


def test_prepared_inputs_are_bit_for_bit_those_of_our_processor(processors, converted, observation):
    batch = processors[0](dict(observation))
    for name, expected in own_inputs(converted, observation).items():
        found = batch[f"{MODEL_INPUT}{name}"]
        assert np.array_equal(found, expected), name


def test_a_chunk_is_that_of_our_own_model(policy, processors, converted, observation):
    preprocess, postprocess = processors
    chunk = policy.predict_action_chunk(preprocess(dict(observation)))
    assert chunk.shape == (2, 4, 7)
    np.testing.assert_allclose(postprocess(chunk).numpy(), own_actions(converted, observation), atol=TOLERANCE)


def test_actions_are_handed_out_one_by_one_until_the_chunk_is_used_up(policy, processors, converted, observation):
    preprocess, postprocess = processors
    policy.reset()
    batch = preprocess(dict(observation))
    actions = np.stack([postprocess(policy.select_action(batch)).numpy() for _ in range(4)], axis=1)
    np.testing.assert_allclose(actions, own_actions(converted, observation), atol=TOLERANCE)
    # The next call asks the model again, about what is seen then.
    other = {**observation, "observation.state": observation["observation.state"] * 0.5}
    first = postprocess(policy.select_action(preprocess(other))).numpy()
    np.testing.assert_allclose(first, own_actions(converted, other)[:, 0], atol=TOLERANCE)


def test_reset_forgets_the_chunk(policy, processors, converted, observation):
    preprocess, postprocess = processors
    policy.reset()
    policy.select_action(preprocess(dict(observation)))
    policy.reset()
    other = {**observation, "observation.state": observation["observation.state"] * 0.5}
    first = postprocess(policy.select_action(preprocess(other))).numpy()
    np.testing.assert_allclose(first, own_actions(converted, other)[:, 0], atol=TOLERANCE)


def test_only_the_first_actions_of_a_chunk_are_executed_on_request(converted, processors, observation):
    config = PreTrainedConfig.from_pretrained(converted, cli_overrides=["--n_action_steps=1"])
    policy = VLAAdapterPolicy.from_pretrained(converted, config=config)
    batch = processors[0](dict(observation))
    np.testing.assert_array_equal(policy.select_action(batch), policy.select_action(batch))


def test_single_actions_and_whole_chunks_are_postprocessed_alike(policy, processors, observation):
    preprocess, postprocess = processors
    chunk = policy.predict_action_chunk(preprocess(dict(observation)))
    whole = postprocess(chunk)
    for step in range(chunk.shape[1]):
        torch.testing.assert_close(postprocess(chunk[:, step]), whole[:, step], rtol=0, atol=0)
    assert set(whole[..., -1].unique().tolist()) <= {-1.0, 0.0, 1.0}


@pytest.mark.parametrize("kind", ["own", "published"])
def test_our_own_and_published_checkpoints_load_without_conversion(kind, trained, published, observation):
    folder = {"own": trained, "published": published}[kind]
    config = PreTrainedConfig.get_choice_class("vla_adapter")(
        device="cpu", robot="libero", pretrained_path=folder, unnorm_key=None if kind == "own" else "libero_object"
    )
    policy = VLAAdapterPolicy.from_pretrained(folder, config=config)
    preprocess, postprocess = make_vla_adapter_pre_post_processors(policy.config)
    chunk = postprocess(policy.predict_action_chunk(preprocess(dict(observation)))).numpy()
    model = open_checkpoint(folder).load_model(dtype="float32")
    expected = model.predict_action(**own_inputs(folder, observation), unnorm_key=config.unnorm_key)
    np.testing.assert_allclose(chunk, get_robot("libero").to_environment(expected), atol=TOLERANCE)


def test_what_lerobot_saves_is_what_the_conversion_writes(policy, processors, converted, tmp_path):
    policy.save_pretrained(tmp_path)
    for pipeline in processors:
        pipeline.save_pretrained(tmp_path)
    names = {path.name for path in converted.iterdir()}
    assert {path.name for path in tmp_path.iterdir()} == names | {"README.md"}
    for name in names:
        if name.startswith("policy_") and name.endswith(".json"):
            assert json.loads((tmp_path / name).read_text()) == json.loads((converted / name).read_text())
    for name in ("model.safetensors", "policy_preprocessor_step_2_vla_adapter_inputs.safetensors"):
        before, after = load_file(converted / name), load_file(tmp_path / name)
        assert before.keys() == after.keys()
        if name == "model.safetensors":
            assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_policy_that_lerobot_saved_turns_into_a_checkpoint_that_predicts_the_same(
    policy, processors, observation, tmp_path
):
    policy.save_pretrained(tmp_path / "lerobot")
    for pipeline in processors:
        pipeline.save_pretrained(tmp_path / "lerobot")
    own = from_lerobot(str(tmp_path / "lerobot"), tmp_path / "own")
    preprocess, postprocess = processors
    chunk = postprocess(policy.predict_action_chunk(preprocess(dict(observation)))).numpy()
    np.testing.assert_allclose(chunk, own_actions(own, observation), atol=TOLERANCE)


def test_a_gripper_without_a_convention_is_refused(trained):
    config = PreTrainedConfig.get_choice_class("vla_adapter")(device="cpu", pretrained_path=trained)
    with pytest.raises(ValueError, match="gripper that is learnt as 0...1"):
        VLAAdapterPolicy.from_pretrained(trained, config=config)


def test_a_missing_camera_is_named_with_the_remedy(processors, observation):
    observation["observation.images.image2"] = observation.pop("observation.images.wrist_image")
    with pytest.raises(ValueError, match="camera 'wrist_image' is missing among .*image2; --rename_map"):
        processors[0](observation)


def test_other_cameras_are_left_out(processors, converted, observation):
    more = {**observation, "observation.images.third": observation["observation.images.image"]}
    batch = processors[0](more)
    pixels = own_inputs(converted, observation)["pixel_values"]
    assert torch.equal(batch[f"{MODEL_INPUT}pixel_values"], pixels)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("task", ["", "x"], "needs an instruction under 'task'"),
        ("observation.state", torch.full((2, 8), torch.nan), "not finite"),
        ("observation.images.image", torch.full((2, 3, 8, 8), 255.0), "must be in 0...1"),
        ("observation.images.image", torch.zeros(2, 8, 8, 3), r"must have shape \(batch, 3, height, width\)"),
    ],
)
def test_observations_that_cannot_be_right_are_refused(processors, observation, name, value, message):
    with pytest.raises(ValueError, match=message):
        processors[0]({**observation, name: value})


def test_a_batch_of_another_preprocessor_is_refused(policy, observation):
    with pytest.raises(ValueError, match="must come from the policy's own preprocessor"):
        policy.predict_action_chunk(observation)


def test_rtc_continues_the_chunk_that_is_being_executed():
    new, old = torch.ones(1, 6, 2), torch.arange(1.0, 9.0).reshape(4, 2)
    padded = torch.cat((old, torch.zeros(6, 2)))  # LeRobot fills up to its execution horizon
    blended = blend_chunks(new, padded, share=0.7)[0]
    torch.testing.assert_close(blended[:4], 0.7 * new[0, :4] + 0.3 * old)
    torch.testing.assert_close(blended[4:], new[0, 4:])  # the old chunk says nothing


def test_rtc_without_a_chunk_before_is_the_plain_prediction(policy, processors, observation):
    batch = processors[0](dict(observation))
    plain = policy.predict_action_chunk(batch)
    assert policy.supports_rtc()
    assert torch.equal(policy.predict_action_chunk(batch, inference_delay=0, prev_chunk_left_over=None), plain)
    spent = torch.zeros(10, 7)
    assert torch.equal(policy.predict_action_chunk(batch, inference_delay=2, prev_chunk_left_over=spent), plain)


def test_rtc_takes_values_that_are_not_normalised_from_the_newer_chunk():
    new, old = torch.ones(1, 6, 2), torch.zeros(4, 2)
    old[:, 0] = 3.0
    blended = blend_chunks(new, old, share=0.7, blended=torch.tensor([True, False]))[0]
    assert blended[:, 1].tolist() == [1] * 6, "a gripper has two values, and is not averaged"
    torch.testing.assert_close(blended[:4, 0], torch.full((4,), 0.7 + 0.3 * 3))


def test_rtc_blends_the_arm_and_not_the_gripper_of_a_policy(policy, processors, observation):
    batch = processors[0]({name: value[:1] for name, value in observation.items()})
    plain = policy.predict_action_chunk(batch)[0]
    before = torch.full((4, 7), 0.5)
    chunk = policy.predict_action_chunk(batch, inference_delay=1, prev_chunk_left_over=before)[0]
    torch.testing.assert_close(chunk[:, :6], 0.7 * plain[:, :6] + 0.3 * 0.5)
    assert torch.equal(chunk[:, 6], plain[:, 6])


def test_rtc_that_is_switched_off_leaves_chunks_as_they_are(policy, processors, observation, monkeypatch):
    """LeRobot then puts a chunk behind the one before: nothing of it may be in both."""
    batch = processors[0]({name: value[:1] for name, value in observation.items()})
    plain = policy.predict_action_chunk(batch)
    before = torch.full((4, 7), 0.5)
    for enabled in (True, False):
        monkeypatch.setattr(policy.config, "rtc_config", RTCConfig(enabled=enabled), raising=False)
        chunk = policy.predict_action_chunk(batch, inference_delay=1, prev_chunk_left_over=before)
        assert torch.equal(chunk, plain) == (not enabled)


@pytest.fixture
def answer(policy, processors, observation):
    """`answer(left_over, slow)`: a chunk of rtc, whose answers take 4 control steps if they are slow."""
    batch = processors[0]({name: value[:1] for name, value in observation.items()})

    def run(left_over: torch.Tensor | None, slow: bool) -> torch.Tensor:
        hook = policy.network.register_forward_pre_hook(lambda *_: time.sleep(0.4 if slow else 0))
        try:
            return policy.predict_action_chunk(
                batch, inference_delay=4 if policy._slowest_seconds else 0, prev_chunk_left_over=left_over
            )
        finally:
            hook.remove()

    policy.reset()
    policy._last_seconds = policy._slowest_seconds = 0.0
    return run


DROPPED = torch.zeros(10, 7)  # LeRobot drops an answer whole that comes too late, and fills up


def test_rtc_ends_with_an_error_when_every_answer_takes_as_long_as_a_chunk(answer, caplog):
    """The robot would stand still."""
    answer(None, slow=True)
    answer(DROPPED, slow=True)
    answer(DROPPED, slow=True)
    assert caplog.text.count("an answer takes 4 control steps and a chunk has 4 actions") == 2
    with pytest.raises(ValueError, match="takes 4 .* has 4 .*inference.type=sync.*chunk_size of at least 8"):
        answer(DROPPED, slow=True)


def test_rtc_goes_on_after_a_slow_first_answer(answer, policy):
    """LeRobot goes on saying how long the slowest one took."""
    answer(None, slow=True)
    plain = answer(DROPPED, slow=False)
    for _ in range(4):  # the robot may use up a chunk before LeRobot asks for the next
        assert torch.equal(answer(DROPPED, slow=False), plain)
    before = torch.full((3, 7), 0.5)
    chunk = answer(before, slow=False)
    torch.testing.assert_close(chunk[0, :3, :6], 0.7 * plain[0, :3, :6] + 0.3 * 0.5)
    assert torch.equal(chunk[0, 3:], plain[0, 3:])


def test_two_threads_that_ask_at_once_are_refused(policy, processors, observation):
    """`lerobot-eval --env.max_parallel_tasks=2` plays two tasks with one policy."""
    batch = processors[0](dict(observation))
    policy.reset()
    policy.select_action(batch)
    with ThreadPoolExecutor(1) as other:
        with pytest.raises(ValueError, match="--env.max_parallel_tasks=1"):
            other.submit(policy.select_action, batch).result()
        other.submit(policy.reset).result()
        other.submit(policy.select_action, batch).result()


def test_a_rename_map_reaches_the_processors_of_a_checkpoint_of_our_own(trained, observation, monkeypatch):
    """LeRobot hands it only to processors that it reads from a file."""
    expected = own_actions(trained, observation)
    observation["observation.images.image2"] = observation.pop("observation.images.wrist_image")
    names = '{"observation.images.image2": "observation.images.wrist_image"}'
    monkeypatch.setattr(sys, "argv", ["lerobot-eval", f"--rename_map={names}"])
    config = PreTrainedConfig.get_choice_class("vla_adapter")(device="cpu", robot="libero", pretrained_path=trained)
    policy = VLAAdapterPolicy.from_pretrained(trained, config=config)
    preprocess, postprocess = make_vla_adapter_pre_post_processors(policy.config)
    chunk = postprocess(policy.predict_action_chunk(preprocess(observation))).numpy()
    np.testing.assert_allclose(chunk, expected, atol=TOLERANCE)
    monkeypatch.setattr(sys, "argv", ["lerobot-eval", "--rename_map=[image2]"])
    with pytest.raises(ValueError, match="must map names to names"):
        make_vla_adapter_pre_post_processors(policy.config)


def test_lerobot_computes_in_the_precision_of_the_weights(trained, tmp_path, observation):
    """The precision in which our own commands open them."""
    small = tmp_path / "bfloat16"
    checkpoint = open_checkpoint(trained)
    checkpoint.load_model("bfloat16").save_pretrained(small)
    checkpoint.load_processor().save_pretrained(small)
    policy = VLAAdapterPolicy.from_pretrained(to_lerobot(str(small), tmp_path / "policy", robot="libero"))
    assert policy.config.dtype == "bfloat16"
    preprocess, postprocess = make_vla_adapter_pre_post_processors(policy.config)
    chunk = postprocess(policy.predict_action_chunk(preprocess(dict(observation)))).numpy()
    np.testing.assert_allclose(chunk, own_actions(small, observation), atol=TOLERANCE)


@pytest.mark.parametrize(
    ("option", "kept"),
    [
        ("robot=aloha", "libero"),
        ("chunk_size=8", "4"),
        ("norm_type=normal", "bounds_q99"),
        ('cameras=["wrist_image", "image"]', r"\['image', 'wrist_image'\]"),
        ("jpeg_round_trip=no", "yes"),
        ("action_mask=[true, true, true, true, true, true, true]", "None"),
    ],
)
def test_options_of_training_are_refused_where_they_would_have_no_effect(option, kept, converted):
    config = PreTrainedConfig.from_pretrained(converted, cli_overrides=[f"--{option}"])
    name = option.split("=")[0]
    with pytest.raises(ValueError, match=f"policy.{name}=.* would have no effect: .* was trained with '?{kept}'?,"):
        VLAAdapterPolicy.from_pretrained(converted, config=config)


def test_a_checkpoint_of_lerobots_is_not_evaluated_without_its_options(converted):
    config = PreTrainedConfig.get_choice_class("vla_adapter")(device="cpu", pretrained_path=converted)
    with pytest.raises(ValueError, match="policy.robot='none' would have no effect.* Name it with --policy.path"):
        VLAAdapterPolicy.from_pretrained(converted, config=config)


def test_options_that_repeat_what_the_checkpoint_has_are_accepted(converted):
    words = ["--robot=libero", "--chunk_size=4", "--norm_type=bounds_q99", "--jpeg_round_trip=yes"]
    config = PreTrainedConfig.from_pretrained(converted, cli_overrides=words)
    VLAAdapterPolicy.from_pretrained(converted, config=config)
