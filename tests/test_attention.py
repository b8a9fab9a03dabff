"""Where a policy looks: attention over the patches of the frames, and its pictures."""

import numpy as np
import pytest
import torch
from data_fixtures import DEMOS
from model_fixtures import tiny_config, tiny_inputs, tiny_model

from vla_adapter_hf import VLAAdapterDataset, VLAAdapterProcessor
from vla_adapter_hf.data import ImageResize
from vla_adapter_hf.utils.attention import overlay_attention, plot_attention, predict_with_attention


def arguments(config, batch_size: int = 1) -> dict:
    values = tiny_inputs(config, batch_size=batch_size)
    state = values.pop("proprio").double().numpy()
    return {**values, "state": state}


class TestAttention:
    @pytest.mark.parametrize("cameras", [["image"], ["image", "wrist_image"]])
    def test_actions_stay_the_same_and_attention_is_shared_out_among_all_patches(self, cameras):
        model = tiny_model(cameras=cameras)
        inputs = arguments(model.config, batch_size=2)
        actions, attention = predict_with_attention(model, inputs)
        np.testing.assert_allclose(actions, model.predict_action(**inputs), atol=1e-5)
        side = round((model.config.num_patch_tokens / len(cameras)) ** 0.5)
        assert attention.shape == (2, len(cameras), side, side) and (attention >= 0).all()
        np.testing.assert_allclose(attention.sum(axis=(1, 2, 3)), 1, rtol=1e-5)

    def test_the_model_computes_as_before_afterwards(self):
        model = tiny_model()
        model.set_attn_implementation({"": "sdpa", "text_config": "eager", "dinov2_config": "sdpa"})
        parts = {name: getattr(model.config, name) for name in model.config.sub_configs}
        before = {name: config._attn_implementation for name, config in parts.items()}
        predict_with_attention(model, arguments(model.config))
        assert {name: config._attn_implementation for name, config in parts.items()} == before
        assert model.config._attn_implementation == "sdpa"
        assert not model._forward_hooks and not model._forward_pre_hooks

    def test_a_padded_row_of_a_batch_looks_where_it_looks_alone(self):
        """Prompts of different lengths put the action queries at different positions."""
        model = tiny_model()
        inputs = arguments(model.config, batch_size=2)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        inputs["attention_mask"][1, :4] = 0
        _, together = predict_with_attention(model, inputs)
        for row, real in ((0, slice(None)), (1, slice(4, None))):
            alone = {name: values[row : row + 1] for name, values in inputs.items()}
            alone |= {name: alone[name][:, real] for name in ("input_ids", "attention_mask")}
            _, attention = predict_with_attention(model, alone)
            np.testing.assert_allclose(together[row], attention[0], atol=1e-6)

    def test_with_one_layer_it_is_the_queries_own_attention(self):
        """One layer and one block leave nothing to follow back: the action states' rows, weighted by the block."""
        text = {name: value for name, value in tiny_config().text_config.to_dict().items() if name != "layer_types"}
        config = tiny_config(policy_num_layers=1, text_config={**text, "num_hidden_layers": 1})
        model = tiny_model(config)
        inputs = arguments(model.config)
        _, attention = predict_with_attention(model, inputs)
        model.set_attn_implementation("eager")
        with torch.no_grad():
            proprio = torch.tensor(inputs.pop("state")).float()
            output = model(**inputs, proprio=proprio, output_attentions=True)
        patches, queries = config.num_patch_tokens, config.num_action_queries
        assert config.num_task_tokens == patches  # so the action states are those of all queries
        first = inputs["input_ids"].shape[1] + patches - 1
        block = output.policy_attentions[0][0].mean(dim=(0, 1))[config.chunk_size :][:queries]
        rows = output.attentions[0][0].mean(dim=0)[first : first + queries, 1 : 1 + patches].clone()
        expected = (block[:, None] * rows).sum(dim=0)
        np.testing.assert_allclose(attention.ravel(), expected / expected.sum(), rtol=1e-4)

    def test_a_compiled_model_is_refused(self):
        model = tiny_model().compile_for_inference()
        with pytest.raises(ValueError, match="a compiled model returns no attention"):
            predict_with_attention(model, arguments(model.config))


class TestPictures:
    frame = np.full((80, 120, 3), 100, np.uint8)

    def test_the_patch_with_attention_glows_and_the_rest_is_dark(self):
        pytest.importorskip("matplotlib")
        attention = np.zeros((4, 4), np.float32)
        attention[0, 3] = 1
        picture = overlay_attention(self.frame, attention)
        assert picture.shape == self.frame.shape and picture.dtype == np.uint8
        assert picture[5:15, 100:115].max() > 200 and picture[40:, :60].max() < 70

    def test_attention_lies_on_the_part_of_the_frame_that_the_model_sees(self):
        pytest.importorskip("matplotlib")
        attention = np.zeros((4, 4), np.float32)
        attention[0, 0] = 1
        picture = overlay_attention(self.frame, attention, crop_area=0.25)
        assert picture[:19].max() < 70 and picture[:, :29].max() < 70
        assert picture[20:30, 30:45].max() > 200

    def test_a_row_of_moments_is_drawn_for_every_episode_and_camera(self, processor, tmp_path, monkeypatch):
        pytest.importorskip("matplotlib")
        monkeypatch.setenv("VLA_ADAPTER_CACHE", str(tmp_path / "cache"))
        dataset = VLAAdapterDataset.from_lerobot(
            DEMOS / "lerobot_v30_image", ["image", "wrist_image"], image_transform=ImageResize(28)
        )
        cameras = dataset.camera_names
        model = tiny_model(
            cameras=cameras,
            norm_stats=dataset.norm_stats,
            action_dim=dataset.action_dim,
            proprio_dim=dataset.state_dim,
            chunk_size=dataset.chunk_size,
        )
        of_model = VLAAdapterProcessor.from_model_config(model.config, processor.tokenizer)
        axes = plot_attention(model, of_model, [dataset], episodes=1, moments=3).axes
        assert len(axes) == 3 * len(cameras)
        last = dataset.select_episodes([dataset.episode_indices[0]], dataset.image_transform)
        assert axes[2].get_title() == f"{cameras[0]}, step {last.control_step(len(last) - 1)}"
