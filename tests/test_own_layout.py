"""Saved models load with the package and, as code that travels with the weights, without it."""

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from model_fixtures import tiny_config, tiny_inputs, tiny_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoProcessor

from vla_adapter_hf import (
    VLAAdapterConfig,
    VLAAdapterForActionPrediction,
    VLAAdapterImageProcessor,
    VLAAdapterProcessor,
    open_checkpoint,
)
from vla_adapter_hf.checkpoints.info import checkpoint_info
from vla_adapter_hf.checkpoints.published.writing import published_tensors, write_published
from vla_adapter_hf.modeling.checkpoint_names_vla_adapter import name_in_file


REPOSITORY = Path(__file__).parents[1]
TRAVELLING = sorted([*(REPOSITORY / "modeling").glob("*.py"), *(REPOSITORY / "processing").glob("*.py")])
# transformers brings numpy, huggingface_hub and safetensors; simplejpeg is used where it is installed.
ALLOWED_IMPORTS = {"torch", "transformers", "huggingface_hub", "numpy", "PIL"}
OPTIONAL_IMPORTS = {"simplejpeg"}
# The same weights elsewhere in memory, or in a process with other threads: random weights amplify the rounding, see
# test_goldens.
SAME = 3e-4


@pytest.fixture(scope="module")
def saved(tmp_path_factory, pro_model, processor) -> Path:
    """The small published Pro checkpoint in our own layout. Not to be changed."""
    folder = tmp_path_factory.mktemp("own") / "checkpoint"
    pro_model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def actions(pro_model, processor, observation) -> np.ndarray:
    return pro_model.predict_action(**processor(**observation))


@pytest.fixture
def saved_tiny(tmp_path) -> tuple[Path, VLAAdapterForActionPrediction]:
    """A tiny model in our own layout, that a test may change, and the model itself."""
    model = tiny_model()
    model.save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny", model


class TestFiles:
    def test_everything_is_there(self, saved):
        names = {path.name for path in saved.iterdir()}
        assert {"config.json", "model.safetensors", "processor_config.json", "tokenizer.json"} <= names
        assert {path.name for path in TRAVELLING if path.name != "__init__.py"} <= names

    def test_the_code_is_the_codes_copy(self, saved):
        for path in TRAVELLING:
            if path.name != "__init__.py":
                assert (saved / path.name).read_text() == path.read_text()

    def test_auto_classes_are_pointed_to_it(self, saved):
        config = json.loads((saved / "config.json").read_text())
        assert config["auto_map"] == {
            "AutoConfig": "configuration_vla_adapter.VLAAdapterConfig",
            "AutoModel": "modeling_vla_adapter.VLAAdapterForActionPrediction",
        }
        processor = json.loads((saved / "processor_config.json").read_text())
        assert processor["auto_map"]["AutoProcessor"] == "processing_vla_adapter.VLAAdapterProcessor"

    def test_where_it_was_made_is_not_in_it(self, saved, published_pro):
        for path in saved.glob("*.json"):
            assert str(published_pro) not in path.read_text(), path.name
            assert "/tmp" not in path.read_text(), path.name

    def test_only_tensors_with_an_effect_are_stored(self, saved):
        names = load_file(saved / "model.safetensors").keys()
        assert not [name for name in names if "film" in name or "lm_head" in name or "head." in name]
        assert not [name for name in names if name.startswith(("dinov2.encoder.layer.3.", "siglip.encoder.layers.3."))]

    def test_names_of_tensors_do_not_depend_on_the_release_of_transformers(self, saved):
        # Those of the newest; see checkpoint_names_vla_adapter.
        names = load_file(saved / "model.safetensors").keys()
        assert "siglip.encoder.layers.0.self_attn.q_proj.weight" in names
        assert "dinov2.encoder.layer.0.attention.q_proj.weight" in names
        assert not [name for name in names if "vision_model." in name or "attention.attention." in name]


class TestWithThePackage:
    def test_model_and_processor_load(self, saved, observation, actions):
        model, processor = AutoModel.from_pretrained(saved), AutoProcessor.from_pretrained(saved)
        assert (type(model), type(processor)) == (VLAAdapterForActionPrediction, VLAAdapterProcessor)
        np.testing.assert_allclose(model.predict_action(**processor(**observation)), actions, rtol=0, atol=SAME)

    @pytest.mark.parametrize("loader", [VLAAdapterImageProcessor, AutoImageProcessor])
    def test_the_image_processor_loads_alone(self, saved, processor, observation, loader):
        try:
            image_processor = loader.from_pretrained(saved)
        except ImportError:
            pytest.skip("in this release of transformers AutoImageProcessor needs torchvision")
        assert type(image_processor) is VLAAdapterImageProcessor
        pixel_values = image_processor(observation["images"], return_tensors="pt")["pixel_values"]
        assert torch.equal(pixel_values, processor(**observation)["pixel_values"])

    def test_the_code_in_the_folder_is_not_run(self, saved_tiny):
        folder, _ = saved_tiny
        for path in folder.glob("*.py"):
            path.write_text("raise SystemExit('the code of the folder was run')")
        config = AutoConfig.from_pretrained(folder)
        assert type(config) is VLAAdapterConfig
        assert type(AutoModel.from_pretrained(folder)) is VLAAdapterForActionPrediction

    def test_saving_and_loading_changes_no_weight(self, saved_tiny):
        folder, model = saved_tiny
        loaded = AutoModel.from_pretrained(folder)
        assert loaded.state_dict().keys() == model.state_dict().keys()
        assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in loaded.state_dict().items())

    def test_a_loaded_model_can_be_saved_again(self, tmp_path, saved_tiny):
        folder, _ = saved_tiny
        AutoModel.from_pretrained(folder).save_pretrained(tmp_path / "again")
        assert {path.name for path in folder.iterdir()} == {path.name for path in (tmp_path / "again").iterdir()}
        first, second = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "again"))
        assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)

    def test_large_models_are_saved_in_shards(self, tmp_path):
        model = tiny_model()
        model.save_pretrained(tmp_path, max_shard_size="100KB")
        assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 2
        loaded = AutoModel.from_pretrained(tmp_path)
        assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in loaded.state_dict().items())

    def test_a_state_dict_of_the_model_can_be_loaded(self):
        model, other = tiny_model(seed=0), tiny_model(seed=1)
        other.load_state_dict(model.state_dict())
        inputs = tiny_inputs(model.config)
        assert torch.equal(model(**inputs).actions, other(**inputs).actions)

    def test_a_state_dict_with_the_names_of_files_can_be_loaded(self, saved_tiny):
        # The Trainer resumes so.
        folder, model = saved_tiny
        other = tiny_model(seed=1)
        other.load_state_dict(load_file(folder / "model.safetensors"))
        inputs = tiny_inputs(model.config)
        assert torch.equal(model(**inputs).actions, other(**inputs).actions)


def run_without_the_package(script: str, tmp_path: Path, *arguments: object) -> str:
    """Run a script in a process in which the package cannot be imported and nothing has been loaded before."""
    blocked = "import sys; sys.modules['vla_adapter_hf'] = None\n"
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf_home"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    for name in ("HF_MODULES_CACHE", "HF_HUB_CACHE", "TRANSFORMERS_CACHE"):
        environment.pop(name, None)
    result = subprocess.run(
        [sys.executable, "-c", blocked + script, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


class TestWithoutThePackage:
    PREDICT = """
import numpy as np
from transformers import AutoModel, AutoProcessor
folder, recorded, result, again = sys.argv[1:]
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
model = AutoModel.from_pretrained(folder, trust_remote_code=True)
with np.load(recorded) as observation:
    images = [observation["full_image"], observation["wrist_image"]]
    inputs = processor(images=images, text=str(observation["instruction"]), state=observation["state"])
np.save(result, model.predict_action(**inputs))
model.save_pretrained(again)
processor.save_pretrained(again)
print(type(model).__module__)
"""

    def test_the_same_actions_and_a_folder_as_good_as_the_first(self, saved, tmp_path, observation, actions):
        recorded = Path(__file__).parent / "fixtures" / "libero_spatial_observation.npz"
        module = run_without_the_package(
            self.PREDICT, tmp_path, saved, recorded, tmp_path / "actions.npy", tmp_path / "again"
        )
        assert module.startswith("transformers_modules.")
        np.testing.assert_allclose(np.load(tmp_path / "actions.npy"), actions, rtol=0, atol=SAME)
        assert {path.name for path in (tmp_path / "again").iterdir()} == {path.name for path in saved.iterdir()}
        model, processor = (
            AutoModel.from_pretrained(tmp_path / "again"),
            AutoProcessor.from_pretrained(tmp_path / "again"),
        )
        np.testing.assert_allclose(model.predict_action(**processor(**observation)), actions, rtol=0, atol=SAME)

    def test_what_is_missing_is_named(self, saved, published_pro, tmp_path):
        script = """
from transformers import AutoConfig, AutoProcessor
config = AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True)
for load in (type(config).from_pretrained, AutoProcessor.from_pretrained):
    try:
        load(sys.argv[2] if load == type(config).from_pretrained else sys.argv[3], trust_remote_code=True)
    except ValueError as error:
        print(error)
"""
        broken = Path(shutil.copytree(saved, tmp_path / "broken"))
        (broken / "tokenizer.json").unlink()
        printed = run_without_the_package(script, tmp_path, saved, published_pro, broken)
        assert "tokenizer.json is missing or damaged" in printed
        assert "model_type 'openvla', expected 'vla_adapter'" in printed and "install vla-adapter-hf" in printed


@pytest.mark.parametrize("path", TRAVELLING, ids=lambda path: path.name)
def test_the_code_that_travels_imports_nothing_that_may_be_missing(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    guarded = {
        node
        for statement in ast.walk(tree)
        if isinstance(statement, ast.Try)
        for child in statement.body
        for node in ast.walk(child)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1 and node.module and "." not in node.module, "only files of the same folder travel"
            assert (path.parent / f"{node.module}.py").is_file()
            continue
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        for name in {name.partition(".")[0] for name in names}:
            allowed = ALLOWED_IMPORTS | (OPTIONAL_IMPORTS if node in guarded else set())
            assert name in allowed or name in sys.stdlib_module_names, f"{path.name} imports {name}"


def test_no_travelling_file_names_the_package():
    for path in TRAVELLING:
        assert "vla_adapter_hf" not in path.read_text(encoding="utf-8"), path.name


class TestDamagedFiles:
    """transformers would fill what is missing with random numbers and go on with a warning."""

    @pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
    def test_a_file_that_was_cut_short(self, saved_tiny, share):
        folder, _ = saved_tiny
        path = folder / "model.safetensors"
        os.truncate(path, int(path.stat().st_size * share))
        with pytest.raises(SafetensorError, match="header too small|not fully covered"):
            AutoModel.from_pretrained(folder)

    @pytest.mark.parametrize("ignore_mismatched_sizes", [False, True])
    @pytest.mark.parametrize(
        "name", ["policy.blocks.1.fc.weight", "siglip.encoder.layers.0.mlp.fc1.bias", "action_queries.weight"]
    )
    def test_a_missing_tensor(self, saved_tiny, name, ignore_mismatched_sizes):
        folder, _ = saved_tiny
        tensors = load_file(folder / "model.safetensors")
        del tensors[name]
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=f"missing keys .*{name.removeprefix('siglip.')}"):
            AutoModel.from_pretrained(folder, ignore_mismatched_sizes=ignore_mismatched_sizes)

    def test_a_missing_tensor_may_start_anew_if_that_is_asked_for(self, saved_tiny):
        folder, model = saved_tiny
        tensors = load_file(folder / "model.safetensors")
        del tensors["action_queries.weight"]
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        loaded = AutoModel.from_pretrained(folder, strict=False)
        assert not torch.equal(loaded.action_queries.weight, model.action_queries.weight)
        assert "strict" not in loaded.config.to_dict()

    @pytest.mark.parametrize("ignore_mismatched_sizes", [False, True])
    def test_a_tensor_too_many(self, saved_tiny, ignore_mismatched_sizes):
        folder, _ = saved_tiny
        tensors = {**load_file(folder / "model.safetensors"), "policy.blocks.2.fc.weight": torch.zeros(32, 32)}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match="unexpected keys policy.blocks.2.fc.weight"):
            AutoModel.from_pretrained(folder, ignore_mismatched_sizes=ignore_mismatched_sizes)

    def test_a_tensor_of_another_shape(self, saved_tiny):
        folder, _ = saved_tiny
        tensors = {**load_file(folder / "model.safetensors"), "policy.fc_out.bias": torch.zeros(8)}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises((ValueError, RuntimeError), match="mismatch"):
            AutoModel.from_pretrained(folder)

    def test_of_a_whole_file_and_older_shards_next_to_it_the_whole_one_is_read_as_in_transformers(self, saved_tiny):
        folder, model = saved_tiny
        bias = model.policy.fc_out.bias
        with torch.no_grad():
            bias += 1
        model.save_pretrained(folder.parent / "older", max_shard_size="100KB")
        for path in (folder.parent / "older").glob("model*.safetensors*"):
            shutil.copy(path, folder)
        for dtype in (torch.float32, torch.bfloat16):  # converted, the weights are read by other code
            loaded = open_checkpoint(folder).load_model(dtype)
            torch.testing.assert_close(loaded.policy.fc_out.bias, (bias - 1).to(dtype))

    def test_a_missing_shard(self, tmp_path):
        tiny_model().save_pretrained(tmp_path, max_shard_size="100KB")
        next(tmp_path.glob("model-00002-*")).unlink()
        with pytest.raises((ValueError, OSError), match="model-00002"):
            AutoModel.from_pretrained(tmp_path)

    def test_a_configuration_of_another_model(self, saved_tiny):
        folder, _ = saved_tiny
        config = json.loads((folder / "config.json").read_text())
        config["policy_variant"] = "original"
        (folder / "config.json").write_text(json.dumps(config))
        for options in ({}, {"ignore_mismatched_sizes": True}):
            with pytest.raises(ValueError, match="missing keys policy.*k_proj.*policy_variant"):
                AutoModel.from_pretrained(folder, **options)

    @pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
    def test_cut_short_the_commands_name_the_file(self, saved_tiny, share):
        folder, _ = saved_tiny
        path = folder / "model.safetensors"
        os.truncate(path, int(path.stat().st_size * share))
        for read in (checkpoint_info, lambda source: open_checkpoint(source).load_model()):
            with pytest.raises(ValueError, match="model.safetensors is damaged or cut short"):
                read(folder)

    def test_a_shard_cut_short_is_named(self, tmp_path):
        tiny_model().save_pretrained(tmp_path, max_shard_size="100KB")
        shard = next(tmp_path.glob("model-00002-*"))
        os.truncate(shard, shard.stat().st_size - 1)
        with pytest.raises(ValueError, match=f"{shard.name} is damaged or cut short"):
            open_checkpoint(tmp_path).load_model()

    @pytest.mark.parametrize("content", [None, "", '{"version": "1.0"', "{}"])
    def test_without_a_whole_tokenizer_there_is_no_processor(self, saved, tmp_path, content):
        folder = Path(shutil.copytree(saved, tmp_path / "copy"))
        (folder / "tokenizer.json").unlink()
        if content is not None:
            (folder / "tokenizer.json").write_text(content)
        for load in (AutoProcessor.from_pretrained, lambda source: open_checkpoint(source).load_processor()):
            with pytest.raises(ValueError, match="tokenizer.json"):
                load(folder)

    def test_a_tokenizer_with_code_of_its_own_is_refused_without_a_question(self, saved, tmp_path, monkeypatch):
        folder = Path(shutil.copytree(saved, tmp_path / "copy"))
        path = folder / "tokenizer_config.json"
        foreign = {"tokenizer_class": "Foreign", "auto_map": {"AutoTokenizer": ["foreign.Foreign", None]}}
        path.write_text(json.dumps(json.loads(path.read_text()) | foreign))
        (folder / "foreign.py").write_text("raise SystemExit('this code was run')")
        monkeypatch.setattr("builtins.input", lambda question: "yes")
        with pytest.raises(ValueError, match="asks for code of its own, which is not run"):
            open_checkpoint(folder).load_processor()
        with pytest.raises(TypeError, match="trust_remote_code"):
            open_checkpoint(folder).load_processor(trust_remote_code=True)

    def test_without_its_configuration_there_is_no_processor(self, saved, tmp_path):
        folder = Path(shutil.copytree(saved, tmp_path / "copy"))
        (folder / "processor_config.json").unlink()
        for load in (AutoProcessor.from_pretrained, lambda source: open_checkpoint(source).load_processor()):
            with pytest.raises(OSError, match="has no processor_config.json"):
                load(folder)

    def test_no_file_at_all(self, saved_tiny):
        folder, _ = saved_tiny
        (folder / "model.safetensors").unlink()
        with pytest.raises((ValueError, OSError), match="model.safetensors"):
            AutoModel.from_pretrained(folder)


PEAK = """
import sys
from pathlib import Path
from vla_adapter_hf import open_checkpoint

def kibibytes(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))

checkpoint = open_checkpoint(sys.argv[1])
checkpoint.load_model("bfloat16")  # what is imported and allocated once does not count
Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
before = kibibytes("VmRSS")
model = checkpoint.load_model("float32")
weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()) / 1024
print((kibibytes("VmHWM") - before) / weights)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the peak of memory from Linux")
@pytest.mark.parametrize("layout", ["own", "published"])
def test_loading_in_another_precision_takes_little_more_memory_than_the_weights(layout, tmp_path, published_pro):
    """The file, half as large as the weights, is never in memory as a whole: with it the peak is 1.5."""
    text = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 8}
    config = tiny_config(text_config={**text, "num_key_value_heads": 8, "vocab_size": 1024}, policy_num_layers=12)
    own = tmp_path / "own"
    tiny_model(config).to(torch.bfloat16).save_pretrained(own, max_shard_size="40MB")
    folder = own
    if layout == "published":
        folder = tmp_path / "published"
        state_dict = open_checkpoint(own).load_model().state_dict()
        tensors = published_tensors({name_in_file(name): one for name, one in state_dict.items()}, "pro")
        processor = open_checkpoint(published_pro).load_processor()
        write_published(folder, open_checkpoint(own).config, tensors, processor.tokenizer)
    done = subprocess.run([sys.executable, "-c", PEAK, str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 0.9 < float(done.stdout) < 1.25
