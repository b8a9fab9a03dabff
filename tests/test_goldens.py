"""The model computes what the original's own code computes, stage by stage, so that a failure says where.

`fixtures/goldens.npz` was made by that code, with the weights of `fixtures/published_checkpoints.npz` and the
observation of `fixtures/libero_spatial_observation.npz`:
* `prompt`, `input_ids`, `proprio` (normalised);
* for the inputs and stages before the policy, per `two_cameras`, `one_camera` and `bfloat16` (two cameras, everything
  in bfloat16): `pixel_sha256` of the float32 `pixel_values` and `pixel_sample` (every 16th pixel), `featurizer`
  (DINOv2) and `fused_featurizer` (SigLIP) (cameras, every 32nd patch, width), `projector` (every 32nd patch),
  `inputs_embeds` at the positions `inputs_embeds_rows`, `hidden_states` (25, rows, width) at `hidden_rows` of the task
  states followed by the 64 action states, `proprio_token`;
* for the policy, per run of `RUNS`: `blocks` (25, steps 0, 3 and 7 of the chunk, width), `actions_normalized`,
`actions`;
* `rope/cos_4`, `sin_4`, `cos_112`, `sin_112`: bfloat16 rotary tables for two head sizes, as the upper 16 bits.

Tolerances: random weights amplify rounding. The same code with one thread and with two differs by 1.1e-5 in the
actions; 3e-4 is 30 times that, 3e-5 is four times what is seen before the policy, where hidden states reach 16. On a
GPU, TF32 is switched off for float32.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from devices import DEVICES, exact_float32
from model_fixtures import FIXTURES, UNNORM_KEY
from transformers import AutoModel, AutoProcessor, Qwen2Tokenizer

from vla_adapter_hf.modeling.bridge_attention_vla_adapter import rotary_tables


STAGE_TOLERANCE = 3e-5
ACTION_TOLERANCE = 3e-4
# The policy's blocks hold values up to 5, and their differences shrink on the way to the actions.
BLOCK_TOLERANCE = 1e-3
STEPS = [0, 3, 7]

# Golden of the policy: checkpoint, golden of the stages before it, what differs from the checkpoint's configuration.
RUNS = {
    "pro": ("pro", "two_cameras", {}),
    "pro_float32_tables": ("pro", "two_cameras", {"policy_rope_dtype": "float32"}),
    "pro_one_camera": ("pro", "one_camera", {"policy_rope_dtype": "float32", "cameras": ["image"]}),
    "original": ("original", "two_cameras", {}),
}


@pytest.fixture(scope="module")
def goldens() -> dict[str, np.ndarray]:
    with np.load(FIXTURES / "goldens.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="module", params=DEVICES)
def device(request) -> str:
    return request.param


@dataclass
class Run:
    """A model, its inputs for the recorded observation, and the goldens of both."""

    policy: str
    stages: str
    model: Any
    inputs: Any
    goldens: dict[str, np.ndarray]
    output: Any = None

    def __post_init__(self) -> None:
        inputs = {name: self.inputs[name].to(self.model.device) for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            self.output = self.model(
                **inputs, pixel_values=self.pixel_values, proprio=self.proprio, output_hidden_states=True
            )

    @property
    def proprio(self) -> torch.Tensor:
        return torch.tensor(self.goldens["proprio"], dtype=torch.float32)[None].to(self.model.device, self.model.dtype)

    @property
    def pixel_values(self) -> torch.Tensor:
        return self.inputs["pixel_values"].to(self.model.device, self.model.dtype)

    @property
    def frames(self) -> torch.Tensor:
        return self.pixel_values.unflatten(1, (-1, 6))[0]

    def stage(self, name: str) -> np.ndarray:
        return self.goldens[f"{self.stages}/{name}"]

    def hidden_states(self) -> torch.Tensor:
        """At the golden's rows: of a row the task states come first, `t0` and all patches but the last, then 64 action
        states, which begin one before the first query."""
        patches, prompt = self.model.config.num_patch_tokens, self.inputs["input_ids"].shape[1]
        rows = self.stage("hidden_rows")
        positions = np.where(rows < patches, rows, rows + prompt - 1)
        return torch.stack(self.output.hidden_states)[:, 0, positions]


def make_run(policy, source, overrides, stages, observation, goldens, device, dtype=None) -> Run:
    processor = AutoProcessor.from_pretrained(source, **{k: v for k, v in overrides.items() if k == "cameras"})
    model = AutoModel.from_pretrained(source, dtype=dtype, **overrides).to(device)
    images = observation["images"][: model.config.num_cameras]
    return Run(policy, stages, model, processor(**{**observation, "images": images}), goldens)


@pytest.fixture(scope="module", params=RUNS)
def run(request, published_pro, published_original, observation, goldens, device) -> Iterator[Run]:
    checkpoint, stages, overrides = RUNS[request.param]
    source = {"pro": published_pro, "original": published_original}[checkpoint]
    with exact_float32():
        yield make_run(request.param, source, overrides, stages, observation, goldens, device)


@pytest.fixture(scope="module", params=["pro_bfloat16", "original_bfloat16"])
def bfloat16_run(request, published_pro, published_original, observation, goldens, device) -> Run:
    source = {"pro": published_pro, "original": published_original}[request.param.removesuffix("_bfloat16")]
    return make_run(request.param, source, {}, "bfloat16", observation, goldens, device, torch.bfloat16)


def assert_close(actual: torch.Tensor | np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    actual = actual.detach().float().cpu().numpy() if isinstance(actual, torch.Tensor) else actual
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance)


def relative_error(actual: torch.Tensor, expected: np.ndarray) -> float:
    return np.linalg.norm(actual.detach().float().cpu().numpy() - expected) / np.linalg.norm(expected)


class TestFloat32:
    def test_the_tokens_are_the_goldens(self, run):
        assert run.inputs["input_ids"].tolist() == run.goldens["input_ids"].tolist()
        assert run.inputs["attention_mask"].all()

    def test_the_pixel_values_are_the_goldens_bit_for_bit(self, run):
        pixel_values = run.inputs["pixel_values"][0].numpy()
        np.testing.assert_array_equal(pixel_values[:, ::16, ::16], run.stage("pixel_sample"))
        assert hashlib.sha256(pixel_values.tobytes()).hexdigest() == str(run.stage("pixel_sha256"))

    def test_dinov2_features(self, run):
        features = run.model.dinov2(run.frames[:, :3]).last_hidden_state[:, 5:]  # class token, four registers
        assert_close(features[:, ::32], run.stage("featurizer"), STAGE_TOLERANCE)

    def test_siglip_features(self, run):
        features = run.model.siglip(run.frames[:, 3:]).last_hidden_state
        assert_close(features[:, ::32], run.stage("fused_featurizer"), STAGE_TOLERANCE)

    def test_projected_patches_of_all_cameras(self, run):
        patches = run.model.get_image_features(run.pixel_values).pooler_output
        assert_close(patches[0, ::32], run.stage("projector"), STAGE_TOLERANCE)

    def test_the_language_model_reads_prompt_patches_and_queries_in_this_order(self, run):
        patches = run.model.get_image_features(run.pixel_values).pooler_output
        prompt = [run.inputs[name].to(run.model.device) for name in ("input_ids", "attention_mask")]
        embeddings, _ = run.model.embed_inputs(*prompt, patches)
        # The last row of the golden is the original's useless token behind the queries.
        rows = [row for row in run.stage("inputs_embeds_rows") if row < embeddings.shape[1]]
        assert_close(embeddings[0, rows], run.stage("inputs_embeds")[: len(rows)], STAGE_TOLERANCE)

    @pytest.mark.parametrize("layer", [0, 1, 6, 12, 18, 23, 24])
    def test_hidden_states(self, run, layer):
        assert_close(run.hidden_states()[layer], run.stage("hidden_states")[layer], STAGE_TOLERANCE)

    def test_the_proprio_token(self, run):
        assert_close(run.model.proprio_projector(run.proprio)[0, 0], run.stage("proprio_token"), STAGE_TOLERANCE)

    @pytest.mark.parametrize("block", [0, 1, 6, 12, 18, 24])
    def test_policy_blocks(self, run, block):
        latent = run.output.policy_hidden_states[block][0, STEPS]
        assert_close(latent, run.goldens[f"{run.policy}/blocks"][block], BLOCK_TOLERANCE)

    def test_normalised_actions(self, run):
        assert_close(run.output.actions[0], run.goldens[f"{run.policy}/actions_normalized"], ACTION_TOLERANCE)

    def test_physical_actions(self, run):
        actions = run.model.predict_action(**run.inputs, unnorm_key=UNNORM_KEY)
        assert_close(actions[0], run.goldens[f"{run.policy}/actions"], ACTION_TOLERANCE)


class TestBfloat16:
    """Against the original as it runs, wholly in bfloat16: loosely, since every rounding is amplified by random
    weights.
    """

    def test_features_and_patches(self, bfloat16_run):
        run = bfloat16_run
        features = run.model.dinov2(run.frames[:, :3]).last_hidden_state[:, 5:]
        assert relative_error(features[:, ::32], run.stage("featurizer")) < 0.02
        features = run.model.siglip(run.frames[:, 3:]).last_hidden_state
        assert relative_error(features[:, ::32], run.stage("fused_featurizer")) < 0.02
        patches = run.model.get_image_features(run.pixel_values).pooler_output
        assert relative_error(patches[0, ::32], run.stage("projector")) < 0.02

    def test_hidden_states(self, bfloat16_run):
        hidden_states, golden = bfloat16_run.hidden_states(), bfloat16_run.stage("hidden_states")
        assert max(relative_error(hidden_states[layer], golden[layer]) for layer in range(25)) < 0.05

    def test_policy_blocks_and_actions(self, bfloat16_run):
        run = bfloat16_run
        blocks = torch.stack(run.output.policy_hidden_states)[:, 0, STEPS]
        assert relative_error(blocks, run.goldens[f"{run.policy}/blocks"]) < 0.3
        assert relative_error(run.output.actions[0], run.goldens[f"{run.policy}/actions_normalized"]) < 0.3


@pytest.mark.parametrize("head_dim", [4, 112])  # of the small checkpoints and of the published ones
def test_rotary_tables_are_rounded_where_the_original_rounds_them(goldens, head_dim):
    tables = rotary_tables(512, head_dim, 10000.0, torch.bfloat16)
    for name, table in zip(("cos", "sin"), tables, strict=True):
        golden = (goldens[f"rope/{name}_{head_dim}"].astype(np.uint32) << 16).view(np.float32)
        np.testing.assert_array_equal(table.float().numpy(), golden)


@pytest.fixture(scope="module")
def tokenizer_goldens() -> dict[str, list]:
    return json.loads((FIXTURES / "tokenizer_golden.json").read_text(encoding="utf-8"))


def test_the_small_tokenizer_gives_the_golden_ids(processor, tokenizer_goldens):
    assert processor.tokenizer(tokenizer_goldens["prompts"])["input_ids"] == tokenizer_goldens["trimmed"]


def test_the_real_tokenizer_gives_the_golden_ids(tokenizer_goldens):
    folder = Path(__file__).parents[2] / "shared" / "data" / "qwen2_5_tokenizer"
    if not folder.is_dir():
        pytest.skip("the tokenizer of Qwen2.5 (4.4 MB) is not part of this package")
    tokenizer = Qwen2Tokenizer.from_pretrained(folder)
    assert tokenizer(tokenizer_goldens["prompts"])["input_ids"] == tokenizer_goldens["full"]


def test_instructions_become_the_golden_prompts(processor, tokenizer_goldens):
    chat, in_out = tokenizer_goldens["prompts"][::2], tokenizer_goldens["prompts"][1::2]
    pairs = [
        (instruction, *prompts)
        for *prompts, instruction in zip(chat, in_out, map(instruction_of, in_out), strict=True)
        if instruction  # the goldens have an empty one, which the processor refuses
    ]
    assert len(pairs) == 16
    other = type(processor)(processor.image_processor, processor.tokenizer, prompt_style="in_out")
    for instruction, chat_prompt, in_out_prompt in pairs:
        assert processor.make_prompts(instruction.upper()) == [chat_prompt]
        assert other.make_prompts(instruction.title()) == [in_out_prompt]


def instruction_of(prompt: str) -> str:
    return prompt.removeprefix("In: What action should the robot take to ").removesuffix("?\nOut:")
