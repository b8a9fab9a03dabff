"""`vla-adapter convert`: what the model card says of a checkpoint, and that writing it is verified."""

from pathlib import Path

import pytest
import torch
import yaml
from model_fixtures import tiny_config, tiny_model

from vla_adapter_hf import VLAAdapterProcessor, open_checkpoint
from vla_adapter_hf.checkpoints.convert import convert
from vla_adapter_hf.checkpoints.model_card import NOT_EVALUATED, fill_model_card, published_results
from vla_adapter_hf.checkpoints.saving import verify, write_checkpoint


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


def test_a_written_checkpoint_knows_its_tokenizer(processor, tmp_path):
    model = tiny_model()
    processor = VLAAdapterProcessor.from_model_config(model.config, processor.tokenizer)
    write_checkpoint(tmp_path / "written", model, processor, "", lambda line: None)
    config = open_checkpoint(tmp_path / "written").config
    assert config.tokenizer_fingerprint == processor.tokenizer_fingerprint
