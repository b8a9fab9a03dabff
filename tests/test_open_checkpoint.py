"""`open_checkpoint`: both layouts through one function, and errors about paths and folders that are something else.

What it fetches from the Hub is in `test_hub.py`, and what it makes of damaged files in `test_own_layout.py` and
`test_published_layout.py`.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from vla_adapter_cli import app
from vla_adapter_hf import VLAAdapterForActionPrediction, VLAAdapterProcessor, open_checkpoint
from vla_adapter_hf.checkpoints.info import checkpoint_info


@pytest.fixture(scope="module")
def own(tmp_path_factory, pro_model, processor) -> Path:
    """The small published checkpoint in our own layout."""
    folder = tmp_path_factory.mktemp("own") / "policy"
    pro_model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def foreign(tmp_path) -> Path:
    """A repository of another model, whose code would leave a file."""
    folder = tmp_path / "foreign"
    folder.mkdir()
    auto_map = {"AutoConfig": "configuration_foreign.ForeignConfig"}
    (folder / "config.json").write_text(json.dumps({"model_type": "foreign", "auto_map": auto_map}))
    (folder / "configuration_foreign.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')")
    return folder


class TestBothLayouts:
    @pytest.mark.parametrize("layout", ["published", "vla_adapter"])
    def test_they_give_the_same(self, request, own, pro_model, processor, observation, layout):
        source = own if layout == "vla_adapter" else request.getfixturevalue("published_pro")
        checkpoint = open_checkpoint(source)
        checkpoint.check()
        assert (checkpoint.layout, checkpoint.commit, checkpoint.source) == (layout, None, str(source))
        assert checkpoint.config.norm_stats == pro_model.config.norm_stats
        model, loaded_processor = checkpoint.load_model(), checkpoint.load_processor()
        assert (type(model), type(loaded_processor)) == (VLAAdapterForActionPrediction, VLAAdapterProcessor)
        assert not model.training and model.name_or_path == str(source)
        inputs = loaded_processor(**observation)
        assert torch.equal(inputs["pixel_values"], processor(**observation)["pixel_values"])
        np.testing.assert_allclose(model.predict_action(**inputs), pro_model.predict_action(**inputs), atol=3e-4)

    @pytest.mark.parametrize("layout", ["published", "vla_adapter"])
    def test_the_shapes_of_the_weights_are_those_of_the_model(self, request, own, pro_model, layout):
        source = own if layout == "vla_adapter" else request.getfixturevalue("published_pro")
        shapes = open_checkpoint(source).tensor_shapes()
        assert sum(np.prod(shape) for shape in shapes.values()) == pro_model.num_parameters()

    def test_fields_replace_what_the_checkpoint_says(self, own, published_pro):
        for source in (own, published_pro):
            checkpoint = open_checkpoint(source, cameras=["a", "b"], policy_noise_std=0.5)
            assert checkpoint.load_model().config.cameras == checkpoint.config.cameras == ["a", "b"]

    def test_a_model_of_another_precision(self, own):
        assert open_checkpoint(own).load_model(dtype="bfloat16").dtype == torch.bfloat16

    @pytest.mark.parametrize("name", ["bf16", "half", "cuda"])
    def test_an_unknown_precision_is_refused_before_weights_are_read(self, own, tmp_path, name):
        (tmp_path / "config.json").write_text((own / "config.json").read_text())
        with pytest.raises(ValueError, match=f"dtype must be one of float32, bfloat16.*got '{name}'"):
            open_checkpoint(tmp_path).load_model(dtype=name)

    def test_a_robot_goes_with_the_published_layout_only(self, own, published_pro):
        assert open_checkpoint(published_pro, robot="calvin").config.cameras == ["rgb_static", "rgb_gripper"]
        with pytest.raises(ValueError, match="robot='calvin' goes with checkpoints in the published layout"):
            open_checkpoint(own, robot="calvin")

    def test_a_default_robot_serves_the_published_layout_and_changes_no_other(self, own, published_pro):
        assert open_checkpoint(published_pro, default_robot="calvin").config.cameras == ["rgb_static", "rgb_gripper"]
        chosen = open_checkpoint(published_pro, robot="libero", default_robot="calvin")
        assert chosen.config.cameras == ["image", "wrist_image"]
        assert open_checkpoint(own, default_robot="calvin").config.cameras == open_checkpoint(own).config.cameras

    @pytest.mark.parametrize("option", ["camera", "speed"])
    def test_an_unknown_option_is_refused(self, own, option):
        with pytest.raises(TypeError, match=option):
            open_checkpoint(own, **{option: 1})


class TestPaths:
    """A path that is not there is not taken for a Hub id."""

    @pytest.mark.parametrize("source", ["polcy", "./polcy", "outputs/polcy/", "outputs/2026/polcy", "~/no/such/polcy"])
    def test_this_folder_does_not_exist(self, tmp_path, monkeypatch, source):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(FileNotFoundError, match=f"{source}: this folder does not exist"):
            open_checkpoint(source)

    @pytest.mark.parametrize("source", ["outputs/polcy", "outputs/Policy_2"])
    def test_folders_of_similar_names_are_suggested(self, tmp_path, monkeypatch, source):
        monkeypatch.chdir(tmp_path)
        for name in ("policy", "policy_1", "other"):
            (tmp_path / "outputs" / name).mkdir(parents=True)
        for given in (source, tmp_path / source):
            with pytest.raises(
                FileNotFoundError, match="this folder does not exist.*Did you mean .*policy"
            ) as refusal:
                open_checkpoint(given)
            assert "other" not in str(refusal.value)

    def test_a_file_of_the_checkpoint(self, own):
        with pytest.raises(ValueError, match="is a file; give the folder that it is in"):
            open_checkpoint(own / "model.safetensors")

    def test_a_folder_without_a_checkpoint(self, tmp_path):
        with pytest.raises(ValueError, match="has no config.json"):
            open_checkpoint(tmp_path)

    @pytest.mark.parametrize("subfolder", ["../own", "/tmp"])
    def test_a_subfolder_elsewhere(self, published_pro, subfolder):
        with pytest.raises(ValueError, match="subfolder must be a folder inside"):
            open_checkpoint(published_pro, subfolder=subfolder)

    @pytest.mark.parametrize(
        "command",
        [["info", "outputs/polcy"], ["convert", "outputs/polcy", "new"], ["eval", "--checkpoint", "outputs/polcy"]],
    )
    def test_the_commands_say_so_in_one_line(self, tmp_path, monkeypatch, command):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "outputs" / "policy").mkdir(parents=True)
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 1
        assert result.output.splitlines()[-1].startswith("error: checkpoint outputs/polcy: this folder does not exist")


class TestForeignRepositories:
    def test_their_code_is_neither_run_nor_asked_about(self, foreign, tmp_path):
        result = CliRunner().invoke(app, ["info", str(foreign)], input="y\n")
        assert result.exit_code == 1 and "has model_type 'foreign'; it is not a VLA-Adapter" in result.output
        assert "[y/N]" not in result.output and not (tmp_path / "executed").exists()
        with pytest.raises(ValueError, match="not a VLA-Adapter"):
            open_checkpoint(foreign)

    @pytest.mark.parametrize("config", [{}, {"model_type": None}, {"model_type": ["openvla"]}])
    def test_a_configuration_that_does_not_say_what_it_is(self, tmp_path, config):
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match="it is not a VLA-Adapter"):
            open_checkpoint(tmp_path)


class TestInfo:
    def test_of_both_layouts(self, own, published_pro):
        ours, published = checkpoint_info(own), checkpoint_info(published_pro)
        assert ours["layout"] == "vla-adapter-hf" and published["layout"].startswith("published")
        same = ours.keys() - {"checkpoint", "layout"}
        assert {name: ours[name] for name in same} == {name: published[name] for name in same}

    def test_weights_of_another_model_are_reported(self, own, tmp_path):
        config = json.loads((own / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**config, "policy_variant": "original"}))
        (tmp_path / "model.safetensors").write_bytes((own / "model.safetensors").read_bytes())
        with pytest.raises(ValueError, match="not a complete VLA-Adapter checkpoint: policy.blocks.*k_proj.* missing"):
            checkpoint_info(tmp_path)

    def test_missing_weights_are_reported(self, own, tmp_path):
        (tmp_path / "config.json").write_text((own / "config.json").read_text())
        with pytest.raises(ValueError, match="has no model.safetensors"):
            checkpoint_info(tmp_path)
