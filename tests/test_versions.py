"""Files written under one release of transformers load under another, see `cross_version.py`."""

import importlib.metadata
import os
import re
import sys
from pathlib import Path

import pytest
from cross_version import OLDEST, TOLERANCE, compare

from vla_adapter_hf.modeling.checkpoint_names_vla_adapter import FORMER_NAMES, installed_renames, name_in_file


OTHER_PYTHON = "VLA_ADAPTER_OTHER_PYTHON"


@pytest.mark.slow
@pytest.mark.skipif(
    OTHER_PYTHON not in os.environ, reason=f"{OTHER_PYTHON} names no interpreter with another transformers"
)
def test_two_releases_of_transformers_load_each_others_files_and_predict_the_same(tmp_path):
    assert compare(sys.executable, os.environ[OTHER_PYTHON], tmp_path) <= TOLERANCE


def test_the_oldest_release_that_is_tested_is_the_oldest_that_is_allowed():
    requirements = importlib.metadata.requires("vla-adapter-hf")
    (transformers,) = [line for line in requirements if re.match(r"transformers\b", line)]
    oldest = re.search(r">=([\d.]+)", transformers)[1]
    assert OLDEST.removesuffix(".0") == oldest.removesuffix(".0")
    assert transformers_release() >= tuple(map(int, OLDEST.split(".")))


def transformers_release() -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", importlib.metadata.version("transformers"))[:3]))


class TestNamesInFiles:
    @pytest.mark.parametrize(
        ("installed", "stored"),
        [
            # transformers 5.4 and 5.23
            ("siglip.vision_model.embeddings.patch_embedding.weight", "siglip.embeddings.patch_embedding.weight"),
            ("siglip.embeddings.patch_embedding.weight", "siglip.embeddings.patch_embedding.weight"),
            ("dinov2.encoder.layer.7.attention.attention.key.bias", "dinov2.encoder.layer.7.attention.k_proj.bias"),
            ("dinov2.encoder.layer.7.attention.output.dense.bias", "dinov2.encoder.layer.7.attention.o_proj.bias"),
            ("dinov2.encoder.layer.7.attention.k_proj.bias", "dinov2.encoder.layer.7.attention.k_proj.bias"),
            ("language_model.layers.0.mlp.up_proj.weight", "language_model.layers.0.mlp.up_proj.weight"),
            ("policy.blocks.0.attention.q_proj.weight", "policy.blocks.0.attention.q_proj.weight"),
        ],
    )
    def test_are_the_same_whatever_is_installed(self, installed, stored):
        assert name_in_file(installed) == stored
        assert name_in_file(stored) == stored

    def test_every_parameter_of_the_installed_release_is_found_again(self, pro_model):
        # A pattern for each name that differs, and for no other.
        renames = installed_renames(pro_model.config)
        for name in pro_model.state_dict():
            stored = name_in_file(name)
            found = [new for pattern, new in renames.items() if re.search(pattern, stored)]
            assert found == ([name] if stored != name else [])

    def test_no_two_parameters_share_a_name_in_the_file(self, pro_model):
        names = list(pro_model.state_dict())
        assert len({name_in_file(name) for name in names}) == len(names)

    def test_only_the_towers_are_renamed(self, pro_model):
        towers = {name for name, _ in pro_model.named_children()} & FORMER_NAMES.keys()
        assert towers == FORMER_NAMES.keys() == {"dinov2", "siglip"}


def test_the_script_stands_alone():
    # Anyone can run it without installing the tests' requirements: it imports the standard library, and numpy when
    # used.
    source = (Path(__file__).parent / "cross_version.py").read_text()
    imported = set(re.findall(r"^(?:import|from) (\w+)", source.split('PREDICT = """')[0], flags=re.MULTILINE))
    assert imported <= set(sys.stdlib_module_names)
