"""`vla-adapter convert`: what the model card says of a checkpoint, and that writing it is verified."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from model_fixtures import norm_stats, tiny_config, tiny_model
from safetensors.torch import load_file
from typer.testing import CliRunner

from vla_adapter_cli import app
from vla_adapter_hf import VLAAdapterConfig, VLAAdapterProcessor, open_checkpoint
from vla_adapter_hf.checkpoints.convert import convert, convert_to_published
from vla_adapter_hf.checkpoints.model_card import NOT_EVALUATED, fill_model_card, published_results
from vla_adapter_hf.checkpoints.published.names import has_effect
from vla_adapter_hf.checkpoints.published.writing import published_config
from vla_adapter_hf.checkpoints.saving import compare_actions, verify, write_checkpoint


# As in the authors' tables: the paper's for LIBERO, the released code's README for the Pro policy.
PUBLISHED = {
    "LIBERO-Spatial": "97.8",
    "LIBERO-Object": "99.2",
    "LIBERO-Goal": "97.2",
    "LIBERO-Long": "95.0",
    "LIBERO-Spatial-Pro": "99.6",
    "LIBERO-Object-Pro": "99.6",
    "LIBERO-Goal-Pro": "98.2",
    "LIBERO-Long-Pro": "96.4",
    "CALVIN-ABC-Pro": "98.5, 95.0, 90.5, 85.3, 80.0 % successful, 4.50",
}


class TestResults:
    @pytest.mark.parametrize("name", PUBLISHED)
    def test_a_published_checkpoint_has_its_own_number_and_no_other(self, name):
        results = published_results(f"VLA-Adapter/{name}")
        assert PUBLISHED[name] in results and "published by the authors" in results
        assert results.count("%") == 1

    @pytest.mark.parametrize(
        "source", ["LIBERO-Object-Pro", "me/LIBERO-Object-Pro", "./VLA-Adapter/LIBERO-Object-Pro", "VLA-Adapter/other"]
    )
    def test_any_other_has_none(self, source):
        assert published_results(source) == NOT_EVALUATED

    def test_a_folder_has_none_whatever_it_is_called(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        Path("VLA-Adapter/LIBERO-Object-Pro").mkdir(parents=True)
        assert published_results("VLA-Adapter/LIBERO-Object-Pro") == NOT_EVALUATED

    def test_the_card_of_ones_own_checkpoint_says_so(self, published_pro, tmp_path):
        folder = convert(str(published_pro), tmp_path / "converted", report_progress=lambda line: None)
        card = (folder / "README.md").read_text(encoding="utf-8")
        assert NOT_EVALUATED in card and "authors" not in card


class TestCard:
    """What a card says of a model with six joints, made from repositories on the Hub."""

    @pytest.fixture
    def card(self, tmp_path) -> str:
        config = tiny_config(cameras=["front", "top.rgb"], action_dim=6, proprio_dim=6, norm_stats=None)
        (tmp_path / "data").mkdir()
        datasets = ["someone/so101", str(tmp_path / "data"), "data/../there"]
        return fill_model_card(
            config, "so101", "Trained.", base_model=["VLA-Adapter/LIBERO-Object"], datasets=datasets
        )

    def test_its_metadata_names_what_it_was_made_from(self, card):
        metadata = yaml.safe_load(card.split("---")[1])
        assert metadata["base_model"] == ["VLA-Adapter/LIBERO-Object"] and metadata["datasets"] == ["someone/so101"]
        assert metadata["pipeline_tag"] == "robotics"

    def test_its_example_fits_the_model(self, card):
        assert "images=[front, top_rgb]" in card and "(1, 4, 6)" in card
        assert "basket" not in card

    def test_folders_are_not_named(self, published_pro, tmp_path):
        folder = convert(str(published_pro), tmp_path / "converted", report_progress=lambda line: None)
        metadata = yaml.safe_load((folder / "README.md").read_text(encoding="utf-8").split("---")[1])
        assert "base_model" not in metadata and "datasets" not in metadata


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_a_model_of_any_precision_can_be_verified(pro_model, processor, tmp_path, dtype):
    model = type(pro_model).from_pretrained(pro_model.config.name_or_path, dtype=dtype)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert verify(tmp_path, model, processor) < 0.02


@pytest.mark.parametrize("half_range", [100.0, 0.01])
def test_actions_that_were_read_back_are_compared_in_normalised_units(processor, half_range):
    stats = norm_stats()
    action = next(iter(stats.values()))["action"]
    for name, sign in (("min", -1), ("q01", -1), ("max", 1), ("q99", 1)):
        action[name] = [sign * half_range] * 7
    model, other = tiny_model(norm_stats=stats), tiny_model(norm_stats=stats)
    processor = VLAAdapterProcessor.from_model_config(model.config, processor.tokenizer)
    bias = other.policy.fc_out.bias.data
    bias[0] += 5e-5
    assert compare_actions(model, processor, other, processor) == pytest.approx(5e-5, rel=0.1)
    bias[0] += 1e-3
    with pytest.raises(RuntimeError, match="the normalised actions differ by 1.05e-03"):
        compare_actions(model, processor, other, processor)


def test_a_written_checkpoint_knows_its_tokenizer(processor, tmp_path):
    model = tiny_model()
    processor = VLAAdapterProcessor.from_model_config(model.config, processor.tokenizer)
    write_checkpoint(tmp_path / "written", model, processor, "", lambda line: None)
    config = open_checkpoint(tmp_path / "written").config
    assert config.tokenizer_fingerprint == processor.tokenizer_fingerprint


def published_folder(source, folder, **options):
    return convert_to_published(str(source), folder, report_progress=lambda line: None, **options)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    pickles = [torch.load(folder / f"{kind}--checkpoint.pt") for kind in ("action_head", "proprio_projector")]
    return load_file(folder / "model.safetensors") | pickles[0] | pickles[1]


@pytest.fixture(scope="module")
def own(published_pro, tmp_path_factory) -> Path:
    """A checkpoint in our layout, of which the published layout can say everything."""
    folder = tmp_path_factory.mktemp("own") / "own"
    return convert(str(published_pro), folder, report_progress=lambda line: None)


class TestToPublished:
    @pytest.mark.parametrize("variant", ["pro", "original"])
    def test_from_published_to_ours_and_back_is_exact(self, variant, request, tmp_path):
        published = request.getfixturevalue(f"published_{variant}")
        own = convert(str(published), tmp_path / "own", report_progress=lambda line: None)
        written = published_folder(own, tmp_path / "written")
        before, after = tensors_of(published), tensors_of(written)
        assert set(after) == set(before)
        for name, tensor in after.items():
            assert tensor.dtype == before[name].dtype and tensor.shape == before[name].shape, name
            if has_effect(name.removeprefix("module."), before):
                assert torch.equal(tensor, before[name]), name
            else:
                assert not tensor.any(), name
        statistics = [json.loads((folder / "dataset_statistics.json").read_text()) for folder in (published, written)]
        assert statistics[0] == statistics[1]
        # The original's code comes with the original's tools; everything else is there.
        assert {path.name for path in written.iterdir()} == {path.name for path in published.iterdir()}
        for name in ("preprocessor_config.json", "processor_config.json", "added_tokens.json", "vocab.json"):
            contents = [json.loads((folder / name).read_text()) for folder in (published, written)]
            assert contents[0] == contents[1], name

    def test_from_ours_to_published_and_back_is_exact(self, own, tmp_path):
        written = published_folder(own, tmp_path / "written")
        again = convert(str(written), tmp_path / "again", report_progress=lambda line: None)
        before, after = load_file(own / "model.safetensors"), load_file(again / "model.safetensors")
        assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
        configs = [open_checkpoint(folder).config.to_diff_dict() for folder in (own, again)]
        assert configs[0] == configs[1]
        prompts = [
            open_checkpoint(folder).load_processor().tokenizer("put the cup on the plate") for folder in (own, again)
        ]
        assert prompts[0] == prompts[1]

    def test_the_class_tokens_position_is_folded_into_the_token(self, own, tmp_path):
        model, processor = open_checkpoint(own).load_model(), open_checkpoint(own).load_processor()
        with torch.no_grad():  # as training leaves it
            model.dinov2.embeddings.position_embeddings[:, 0] = 0.5
        model.save_pretrained(tmp_path / "trained")
        processor.save_pretrained(tmp_path / "trained")
        written = open_checkpoint(published_folder(tmp_path / "trained", tmp_path / "written")).load_model()
        embeddings, ours = written.dinov2.embeddings, model.dinov2.embeddings
        assert (
            torch.equal(embeddings.cls_token, ours.cls_token + 0.5) and not embeddings.position_embeddings[:, 0].any()
        )

    @pytest.mark.parametrize(
        "fields, message",
        [
            ({"chunk_size": 4}, r"chunk_size=4 \(read as 8\)"),
            ({"cameras": ["image"]}, "1 cameras .*does not say how many"),
            ({"policy_rope_dtype": "float32"}, r"policy_rope_dtype='float32' \(read as 'bfloat16'\)"),
            ({"image_center_crop": None}, "image_center_crop"),
            ({"image_jpeg_round_trip": False}, "image_jpeg_round_trip"),
            ({"norm_type": "bounds"}, "norm_type='bounds'"),
            ({"prompt_style": "in_out"}, "prompt_style='in_out'"),
            ({"policy_num_heads": 4}, "policy_num_heads=4"),
            ({"siglip_config": {"layer_norm_eps": 1e-5}}, "siglip_config.layer_norm_eps=1e-05"),
            ({"norm_stats": None}, "no norm stats"),
        ],
    )
    def test_what_the_layout_cannot_say_is_refused_and_nothing_is_written(self, own, tmp_path, fields, message):
        config = open_checkpoint(own).config.to_dict()
        fields = {
            **fields,
            **(
                {"siglip_config": {**config["siglip_config"], **fields["siglip_config"]}}
                if "siglip_config" in fields
                else {}
            ),
        }
        shutil.copytree(own, tmp_path / "own")
        (tmp_path / "own" / "config.json").write_text(json.dumps({**config, **fields}))
        with pytest.raises(ValueError, match=message):
            published_folder(tmp_path / "own", tmp_path / "written")
        assert [path.name for path in tmp_path.iterdir()] == ["own"]

    def test_names_and_rate_are_lost_and_that_is_reported(self, own, tmp_path):
        checkpoint = open_checkpoint(own, fps=10, cameras=["front", "hand"])
        model = checkpoint.load_model()
        model.save_pretrained(tmp_path / "own")
        tokenizer = checkpoint.load_processor().tokenizer
        VLAAdapterProcessor.from_model_config(model.config, tokenizer).save_pretrained(tmp_path / "own")
        lines = []
        convert_to_published(str(tmp_path / "own"), tmp_path / "written", report_progress=lines.append)
        assert "  not in the published layout: fps, the cameras' names" in lines

    def test_only_our_own_layout_is_rewritten(self, published_pro, tmp_path):
        with pytest.raises(ValueError, match="no checkpoint in this package's own layout"):
            published_folder(published_pro, tmp_path / "written")

    def test_the_command(self, own, tmp_path):
        result = CliRunner().invoke(app, ["convert", str(own), str(tmp_path / "written"), "--to", "published"])
        assert result.exit_code == 0 and "only this package reads the result" in result.output
        assert open_checkpoint(tmp_path / "written").layout == "published"
        for words, message in (
            (["--to", "gguf"], "--to must be own or published"),
            (["--to", "published", "--step", "1"], "--step"),
        ):
            refused = CliRunner().invoke(app, ["convert", str(own), str(tmp_path / "other"), *words])
            assert refused.exit_code == 1 and message in refused.output

    def test_towers_of_the_published_size_have_the_published_ids(self):
        config = VLAAdapterConfig(norm_stats=norm_stats())
        stored = published_config(config, pad_token_id=0)
        assert stored["timm_model_ids"] == ["vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224"]
        assert "timm_model_args" not in stored and stored["text_config"]["rope_theta"] == 1e6
