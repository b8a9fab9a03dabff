"""Exported checkpoints: OpenVINO and ONNX Runtime predict what torch predicts."""

import json
import logging
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from data_fixtures import DEMOS
from model_fixtures import FIXTURES
from serving_fixtures import recorded_observation, request, server_thread
from transformers import AutoConfig, AutoModel, AutoProcessor

from vla_adapter_hf import VLAAdapterConfig, VLAAdapterForActionPrediction, VLAAdapterProcessor
from vla_adapter_hf.bench.run import bench
from vla_adapter_hf.bench.settings import BenchSettings
from vla_adapter_hf.checkpoints import exported as exported_module
from vla_adapter_hf.checkpoints.convert import convert
from vla_adapter_hf.checkpoints.embedded import embedded_folder
from vla_adapter_hf.checkpoints.exported import ENGINES, load_engine
from vla_adapter_hf.checkpoints.open import open_checkpoint
from vla_adapter_hf.checkpoints.saving import synthetic_observation
from vla_adapter_hf.data import load_demonstrations
from vla_adapter_hf.demo.run import demo
from vla_adapter_hf.doctor.check import check
from vla_adapter_hf.doctor.settings import PolicySettings
from vla_adapter_hf.export import export as export_module
from vla_adapter_hf.export.engines import CONSTANT_LAYERS, CONVERTERS, SHAPE_KINDS, ONNXConverter, OpenVINOConverter
from vla_adapter_hf.export.export import ExportSettings, export
from vla_adapter_hf.export.graph import example_inputs, trace
from vla_adapter_hf.export.sensitivity import action_errors, groups_to_keep, layer_groups, rounded_layers
from vla_adapter_hf.modeling.normalization_vla_adapter import normalize
from vla_adapter_hf.robot.policy import LocalPolicy
from vla_adapter_hf.serving.observations import Observation
from vla_adapter_hf.serving.policy import ServedPolicy
from vla_adapter_hf.serving.settings import ServeSettings
from vla_adapter_hf.simulation import environment
from vla_adapter_hf.simulation.policies import CheckpointPolicy, Request
from vla_adapter_hf.utils.attention import predict_with_attention


pytest.importorskip("openvino", reason="needs the extra [openvino]")
pytest.importorskip("onnxruntime", reason="needs the extra [onnx]")
pytest.importorskip("nncf", reason="needs the extra [openvino]")

RECORDED = str(DEMOS / "lerobot_v30_image")
CAMERAS = ("observation.images.image", "observation.images.wrist_image")
RACES = 1000  # predictions in two threads
EIGHT_BITS = {"precision": "int8", "calibrate": RECORDED, "cameras": CAMERAS, "samples": 6}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tiny_model, tiny_config) -> str:
    """A tiny checkpoint of LIBERO's sizes with statistics."""
    with embedded_folder() as folder:
        embedded = open_checkpoint(folder / "checkpoint")
        tokenizer = embedded.load_processor().tokenizer
    text = {"vocab_size": len(tokenizer)}
    config = tiny_config(norm_stats=embedded.config.norm_stats, action_dim=7, proprio_dim=8, chunk_size=8)
    config.text_config.vocab_size = text["vocab_size"]
    model = tiny_model(config)
    folder = tmp_path_factory.mktemp("export") / "tiny"
    model.save_pretrained(folder)
    VLAAdapterProcessor.from_model_config(model.config, tokenizer).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def two_sets(checkpoint, tmp_path_factory) -> str:
    """The checkpoint with the statistics `chosen_no_noops`, and before them others of twice the size."""
    folder = shutil.copytree(checkpoint, tmp_path_factory.mktemp("two_sets") / "policy")
    config = json.loads((folder / "config.json").read_text())
    (stored,) = config["norm_stats"].values()
    config["norm_stats"] = {"first": twice(stored), "chosen_no_noops": stored}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def twice(stats):
    """Statistics of values twice as large."""
    return {
        kind: {name: values if name == "mask" else [2.0 * value for value in values] for name, values in entry.items()}
        for kind, entry in stats.items()
        if isinstance(entry, dict)
    }


def actions_of(folder) -> np.ndarray:
    opened = open_checkpoint(folder)
    model, processor = opened.load_model(), opened.load_processor()
    return model.predict_action(**processor(**synthetic_observation(model.config)))


def exported(checkpoint: str, folder, **settings):
    settings = {"prompt_tokens": 128, **settings}  # the small vocabulary spells most words
    return export(checkpoint, folder, ExportSettings(**settings), report_progress=lambda line: None)


@pytest.fixture(scope="module")
def in_openvino(checkpoint, tmp_path_factory):
    """The checkpoint in OpenVINO's format, float32, one observation at a time."""
    return exported(checkpoint, tmp_path_factory.mktemp("openvino") / "exported")


@pytest.fixture(scope="module")
def in_onnx(checkpoint, tmp_path_factory):
    """The checkpoint in ONNX, float32, for batches of any size."""
    return exported(checkpoint, tmp_path_factory.mktemp("onnx") / "exported", to="onnx", dynamic_batch=True)


@pytest.mark.parametrize("engine", ["in_openvino", "in_onnx"])
def test_float32_exports_predict_what_torch_predicts(checkpoint, engine, request):
    folder = request.getfixturevalue(engine)
    assert np.abs(actions_of(folder) - actions_of(checkpoint)).max() < 1e-4
    assert json.loads((folder / "export.json").read_text())["errors"]["largest"] < 1e-4


@pytest.mark.parametrize("engine", ["in_openvino", "in_onnx"])
def test_an_export_is_checked_on_demonstrations_without_pictures_of_attention(engine, request, tmp_path, monkeypatch):
    monkeypatch.setenv("VLA_ADAPTER_CACHE", str(tmp_path))
    policy = PolicySettings(samples=20, episodes=[0, 1])
    report = check(FIXTURES / "held_out", robot="libero", checkpoint=request.getfixturevalue(engine), policy=policy)
    assert [verdict.question for verdict in report.verdicts][:2] == ["better than the mean action", "looks"]
    captions = " ".join(report.pictures)
    assert "Error by condition" in captions and "Where the policy looks" not in captions


@pytest.mark.parametrize("engine", ["in_openvino", "in_onnx"])
def test_no_path_of_this_machine_is_exported(checkpoint, engine, request):
    folder = request.getfixturevalue(engine)
    for path in folder.iterdir():
        assert b"site-packages" not in path.read_bytes() and checkpoint.encode() not in path.read_bytes()


@pytest.mark.parametrize("engine", ["in_openvino", "in_onnx"])
def test_batches_get_what_each_observation_gets_alone(engine, request):
    opened = open_checkpoint(request.getfixturevalue(engine))
    model, processor = opened.load_model(), opened.load_processor()
    one = synthetic_observation(model.config)
    other = {**one, "text": "do something else", "state": one["state"] + 0.01}
    both = processor(
        images=[one["images"], other["images"]],
        text=[one["text"], other["text"]],
        state=np.stack([one["state"], other["state"]]),
    )
    together = model.predict_action(**both)
    for row, observation in enumerate((one, other)):
        assert np.abs(together[row] - model.predict_action(**processor(**observation))[0]).max() < 1e-6


def test_bfloat16_is_near(checkpoint, tmp_path):
    folder = exported(checkpoint, tmp_path / "exported", precision="bf16")
    # Random weights make the most of a rounding. A trained policy errs as in torch's bfloat16 (docs/export.md).
    assert 0 < json.loads((folder / "export.json").read_text())["errors"]["mean"] < 0.5


@pytest.mark.parametrize("engine", ["openvino", pytest.param("onnx", marks=pytest.mark.slow)])
def test_eight_bits_stay_within_the_allowed_error(checkpoint, tmp_path, engine):
    folder = exported(checkpoint, tmp_path / "exported", **EIGHT_BITS, to=engine, error_ratio=6.0)
    # NNCF must not silence the process.
    assert all(handler.level < logging.ERROR for handler in logging.getLogger().handlers)
    record = json.loads((folder / "export.json").read_text())
    assert record["precision"] == "int8" and 0 < record["errors"]["mean"] <= 6 * record["bfloat16_errors"]["mean"]
    # Every third observation is left out of the calibration, and the errors are measured on those.
    assert (record["calibrated_on"], record["checked_on"]) == (4, 2)
    assert record["errors"]["largest"] == max(record["errors"]["largest_by_dimension"])
    assert len(record["kept"]) < len(layer_groups(open_checkpoint(checkpoint).load_model()))


@dataclass
class Int8Run:
    """What an int8 export was made from: inputs of the graph, and the record that it wrote."""

    calibration: list = field(default_factory=list)
    sensitivity: list = field(default_factory=list)
    check: list = field(default_factory=list)
    record: dict = field(default_factory=dict)


@pytest.fixture(scope="module")
def int8_run(two_sets, tmp_path_factory) -> Int8Run:
    """An export of a checkpoint in our own layout with two sets of statistics. NNCF, which is slow, rounds nothing."""
    run, exported_predictions = Int8Run(), export_module._exported_predictions

    def quantized(converter, calibration, kept_layers):
        run.calibration += calibration
        return converter.model

    def errors(model, samples, groups, report_progress):
        run.sensitivity += samples
        return dict.fromkeys(groups, 0.0)

    def predictions(folder, samples):
        run.check += samples
        return exported_predictions(folder, samples)

    settings = EIGHT_BITS | {"samples": 9, "robot": "libero", "unnorm_key": "chosen", "error_ratio": 1e3}
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(OpenVINOConverter, "quantized", quantized)
        monkeypatch.setattr(export_module, "action_errors", errors)
        monkeypatch.setattr(export_module, "_exported_predictions", predictions)
        folder = exported(two_sets, tmp_path_factory.mktemp("int8") / "exported", **settings)
    run.record = json.loads((folder / "export.json").read_text())
    return run


def test_an_int8_export_is_judged_on_observations_that_it_was_not_calibrated_with(int8_run):
    calibration, check = (
        {sample[2].tobytes() for sample in samples} for samples in (int8_run.calibration, int8_run.check)
    )
    assert (len(int8_run.calibration), len(check)) == (6, 3)
    assert not calibration & check


def test_the_blocks_sensitivity_is_measured_all_over_the_dataset(int8_run):
    pictures = [sample[2].tobytes() for sample in int8_run.calibration]
    measured = [pictures.index(sample["pixel_values"].numpy().tobytes()) for sample in int8_run.sensitivity]
    assert measured == [0, 1, 3, 5]


def test_states_are_normalised_with_the_statistics_that_are_chosen(int8_run, two_sets):
    config = open_checkpoint(two_sets).config
    state = load_demonstrations(RECORDED, cameras=CAMERAS, chunk_size=1)[0]["state"]
    proprio = {
        key: normalize(state, stats["proprio"], config.norm_type, config.constant_dims)
        for key, stats in config.norm_stats.items()
    }
    assert np.allclose(int8_run.calibration[0][3], proprio["chosen_no_noops"])
    assert not np.allclose(int8_run.calibration[0][3], proprio["first"])
    assert int8_run.record["unnorm_key"] == "chosen_no_noops" and len(int8_run.record["errors"]["mean_in_units"]) == 7


class TestRefusedBeforeWeightsAreRead:
    @pytest.fixture
    def without_weights(self, two_sets, tmp_path) -> str:
        """The configuration of the checkpoint with two sets of statistics, and nothing else."""
        (tmp_path / "policy").mkdir()
        shutil.copy(Path(two_sets, "config.json"), tmp_path / "policy")
        return str(tmp_path / "policy")

    def test_a_calibration_that_does_not_say_which_statistics_are_the_datasets(self, without_weights, tmp_path):
        with pytest.raises(ValueError, match="unnorm_key is needed.*: chosen_no_noops, first"):
            exported(without_weights, tmp_path / "exported", **EIGHT_BITS)

    def test_statistics_that_the_checkpoint_lacks(self, without_weights, tmp_path):
        with pytest.raises(ValueError, match="unnorm_key='third' is not in the model's norm_stats"):
            exported(without_weights, tmp_path / "exported", unnorm_key="third")

    def test_a_robot_that_neither_the_checkpoint_nor_a_dataset_needs(self, without_weights, tmp_path):
        with pytest.raises(ValueError, match="robot='calvin' goes with checkpoints in the published layout"):
            exported(without_weights, tmp_path / "exported", robot="calvin")

    @pytest.mark.parametrize("rewrite", [exported, convert])
    def test_an_export(self, in_openvino, tmp_path, rewrite):
        with pytest.raises(
            ValueError, match="is an exported checkpoint, which torch cannot load; name the checkpoint"
        ):
            rewrite(str(in_openvino), tmp_path / "again")


def test_only_layers_are_rounded(checkpoint):
    """Sums, norms and attention between them stay in higher precision."""
    model = open_checkpoint(checkpoint).load_model(dtype="float32")
    # OpenVINO leaves an addition of zeros out, and its product takes the addition's name.
    torch.nn.init.zeros_(model.policy.fc_out.bias)
    converter = OpenVINOConverter(trace(model, 16))
    inputs = [array.numpy() for array in example_inputs(model.config, 16, 1)]
    kept = ["vision_projector.fc1", "policy.fc_out"]
    nodes = converter.quantized([inputs], kept).get_ops()
    rounded = {
        port.get_node().get_type_name()
        for node in nodes
        if node.get_type_name() == "FakeQuantize"
        for port in node.output(0).get_target_inputs()
    }
    assert "MatMul" in rounded and rounded <= {"MatMul", "Convolution", *SHAPE_KINDS}
    products = {node.get_friendly_name(): node for node in nodes}
    exact = {layer for layer, name in converter.layer_nodes().items() if not takes_rounded_input(products[name])}
    assert exact == set(kept)


def takes_rounded_input(product) -> bool:
    """Whether the activations of an OpenVINO product are rounded, before nodes that only move values."""
    node = product.input_value(0).get_node()
    while node.get_type_name() in SHAPE_KINDS and node.get_input_size():
        node = node.input_value(0).get_node()
    return node.get_type_name() == "FakeQuantize"


def test_a_layer_that_the_converted_graph_lacks_is_not_taken_for_attention(checkpoint, monkeypatch):
    """It would silently stay in higher precision, or be rounded although it is to be kept."""
    model = open_checkpoint(checkpoint).load_model(dtype="float32")
    converter = OpenVINOConverter(trace(model, 16))
    monkeypatch.setitem(converter.layers, "policy.fc_out", "an operation of another name")
    with pytest.raises(RuntimeError, match="1 layers are not found in the graph that openvino made, policy.fc_out"):
        converter.quantized([[array.numpy() for array in example_inputs(model.config, 16, 1)]], [])


@pytest.mark.parametrize("engine", ["openvino", pytest.param("onnx", marks=pytest.mark.slow)])
def test_any_layer_can_be_kept(checkpoint, engine):
    """A layer is one product of the graph, or none where its input is constant."""
    model = open_checkpoint(checkpoint).load_model(dtype="float32")
    converter = CONVERTERS[engine](trace(model, 128))
    nodes = {layer: converter._node_name(layer) for layers in layer_groups(model).values() for layer in layers}
    found = [name for name in nodes.values() if name is not None]
    assert len(set(found)) == len(found)
    assert {layer for layer, name in nodes.items() if name is None} <= set(CONSTANT_LAYERS)


def test_bench_measures_an_export_with_its_memory_and_loading(in_openvino, tmp_path):
    lines = []
    settings = BenchSettings(checkpoint=str(in_openvino), runs=1, warmup=0)
    report = bench(settings, output=tmp_path / "bench.json", report_progress=lines.append)
    assert report["precision"] == "openvino fp32" and report["predictions"]["1"]["p50"] > 0
    assert report["load"]["seconds"] > 0 and report["load"]["read_seconds"] > 0
    assert report["memory"]["weights"] == sum((in_openvino / name).stat().st_size for name in ENGINES["openvino"])
    assert any("openvino fp32" in line for line in lines)
    with pytest.raises(ValueError, match="takes no attn_implementation"):
        bench(BenchSettings(checkpoint=str(in_openvino), attention="eager"), report_progress=lines.append)


class TestWhereACheckpointIsTaken:
    """Everything that takes a checkpoint takes an export of it, and gets the same actions."""

    @pytest.fixture(scope="class")
    def export_of_embedded(self, tmp_path_factory):
        with embedded_folder() as folder:
            return exported(str(folder / "checkpoint"), tmp_path_factory.mktemp("embedded") / "exported")

    @pytest.fixture(scope="class")
    def expected(self, embedded_policy):
        """The actions `(chunk_size, action_dim)` of the embedded policy in float32 for the recorded observation."""
        seen = recorded_observation()
        frames = [seen["image"], seen["wrist_image"]]
        inputs = embedded_policy.processor(images=frames, text=seen["prompt"], state=seen["state"])
        return embedded_policy.model.predict_action(**inputs)[0]

    def test_the_robot_loop(self, export_of_embedded, expected):
        seen = recorded_observation()
        policy = LocalPolicy(export_of_embedded, robot="none")
        images = {"image": seen["image"], "wrist_image": seen["wrist_image"]}
        actions = policy.predict(images, seen["prompt"], seen["state"])
        assert np.abs(actions - expected).max() < 1e-4

    def test_the_server(self, export_of_embedded, embedded_policy):
        seen = recorded_observation()
        observation = Observation((seen["image"], seen["wrist_image"]), seen["prompt"], seen["state"], arrived=0.0)
        served = ServedPolicy.load(str(export_of_embedded), ServeSettings())
        chunks = [policy.predict([policy.prepare(observation)] * 2) for policy in (served, embedded_policy)]
        for ours, exact in zip(*chunks, strict=True):
            assert np.abs(ours.robot_actions - exact.robot_actions).max() < 1e-4

    def test_the_servers_page_shows_predictions_without_attention(self, export_of_embedded):
        settings = ServeSettings()
        with server_thread(ServedPolicy.load(str(export_of_embedded), settings), settings) as server:
            form = json.loads(request(f"{server.url}/example").body)
            form["images"] = {name: picture.partition(",")[2] for name, picture in form["images"].items()}
            answers = [request(f"{server.url}/try", json.dumps(form)), request(f"{server.url}/latest")]
        for answer in answers:
            assert answer.status == 200
            shown = json.loads(answer.body)
            assert np.isfinite(shown["actions"]).all()
            assert [camera["attention"] for camera in shown["cameras"]] == [None, None]

    def test_evaluation(self, export_of_embedded, embedded_policy):
        policy, torch_policy = (
            CheckpointPolicy(folder, "libero", suite="libero_object", name="policy")
            for folder in (export_of_embedded, embedded_policy.model.config.name_or_path)
        )
        seen = recorded_observation()
        view = environment.Observation((seen["image"], seen["wrist_image"]), seen["state"])
        request = Request(view, seen["prompt"], 0, 0, 0)
        assert np.abs(policy.predict([request])[0] - torch_policy.predict([request])[0]).max() < 1e-4
        # A run is not resumed with other weights.
        described = policy.describe()
        assert described == policy.describe() and described["weights"] != torch_policy.describe()["weights"]

    def test_the_demo(self, export_of_embedded, tmp_path):
        found = demo(str(export_of_embedded), tmp_path / "demo.png", report_progress=lambda line: None)
        assert found["errors"]["asked"] < found["errors"]["other"] and found["picture"].stat().st_size > 0

    def test_attention_is_refused(self, export_of_embedded):
        opened = open_checkpoint(export_of_embedded)
        with pytest.raises(ValueError, match="returns no attention"):
            predict_with_attention(opened.load_model(), {})


def test_rounding_a_layer_changes_the_actions_and_leaves_no_trace(checkpoint, tiny_inputs):
    model = open_checkpoint(checkpoint).load_model(dtype="float32")
    inputs = tiny_inputs(model.config)
    before = model(**inputs).actions
    groups = layer_groups(model)
    errors = action_errors(model, [inputs], groups, lambda line: None)
    assert set(errors) == set(groups)
    assert all(error > 0 for group, error in errors.items() if group.startswith("policy"))
    with rounded_layers(model, ["policy.fc_out"]):
        assert not model(**inputs).actions.equal(before)
    assert model(**inputs).actions.equal(before)


def test_the_blocks_that_err_most_are_kept_first():
    errors = {"a": 3.0, "b": 0.4, "c": 0.3}
    assert groups_to_keep(errors, 0.6) == ["a"]
    assert groups_to_keep(errors, 0.35) == ["a", "b"]
    assert groups_to_keep(errors, 10.0) == []


def test_longer_prompts_than_the_exports_are_refused(in_openvino):
    opened = open_checkpoint(in_openvino)
    model, processor = opened.load_model(), opened.load_processor()
    observation = {**synthetic_observation(model.config), "text": "pick up " * 60}
    with pytest.raises(ValueError, match="more than 128 tokens"):
        model.predict_action(**processor(**observation))


def test_auto_model_opens_an_export(in_openvino):
    model, processor = AutoModel.from_pretrained(in_openvino), AutoProcessor.from_pretrained(in_openvino)
    actions = model.predict_action(**processor(**synthetic_observation(model.config)))
    assert np.array_equal(actions, actions_of(in_openvino))
    config = AutoConfig.from_pretrained(in_openvino)
    assert type(config) is VLAAdapterConfig and config.norm_stats == model.config.norm_stats
    assert VLAAdapterConfig.from_pretrained(in_openvino).norm_stats == config.norm_stats


def test_threads_that_share_an_export_get_their_own_actions(in_openvino):
    """As when a run ends while its policy computes, and the next run asks the same policy about another scene."""
    engine, config = open_checkpoint(in_openvino).load_model().engine, VLAAdapterConfig.from_pretrained(in_openvino)
    states = [np.full((1, config.proprio_dim), value, np.float32) for value in (-1.0, 1.0)]
    rest = [part.numpy() for part in example_inputs(config, 128, 1)[:-1]]
    expected = [engine([*rest, state]) for state in states]
    assert np.abs(expected[0] - expected[1]).max() > 1e-3
    with ThreadPoolExecutor(2) as threads:
        predictions = list(threads.map(lambda number: engine([*rest, states[number % 2]]), range(RACES)))
    assert all(np.array_equal(found, expected[number % 2]) for number, found in enumerate(predictions))


# Two exports that are freed in the order in which they were loaded; then the user presses Ctrl-C.
FREES_AND_IS_INTERRUPTED = """
import gc, os, signal, sys, time
from vla_adapter_hf.checkpoints.open import open_checkpoint
exports = [open_checkpoint(sys.argv[1]).load_model() for _ in range(2)]
while exports:
    del exports[0]
    gc.collect()
try:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)
except KeyboardInterrupt:
    print("came to rest")
"""


def test_ctrl_c_still_ends_a_program_safely_after_it_has_freed_exports(in_openvino):
    """An arm must come to rest. Two of OpenVINO's cores would take away the stack for signals: `_openvino_core`."""
    words = [sys.executable, "-c", FREES_AND_IS_INTERRUPTED, str(in_openvino)]
    run = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert (run.returncode, run.stdout) == (0, "came to rest\n"), run.stderr[-2_000:]


class TestFieldsThatReplaceAnExports:
    """Statistics are replaced as in a checkpoint of torch. Whatever would change the graph is refused, not ignored."""

    def test_actions_are_in_the_units_of_the_statistics_that_are_given(self, checkpoint, in_openvino):
        (stored,) = open_checkpoint(checkpoint).config.norm_stats.values()
        norm_stats = {"mine": {"action": twice(stored)["action"], "proprio": stored["proprio"]}}
        opened = open_checkpoint(checkpoint, norm_stats=norm_stats)
        inputs = opened.load_processor()(**synthetic_observation(opened.config))
        expected = opened.load_model().predict_action(**inputs)
        assert np.abs(expected - actions_of(checkpoint)).max() > 0.1
        for model in (
            AutoModel.from_pretrained(in_openvino, norm_stats=norm_stats, attn_implementation=None),
            open_checkpoint(in_openvino, norm_stats=norm_stats).load_model(),
        ):
            assert np.abs(model.predict_action(**inputs) - expected).max() < 1e-4
        assert AutoConfig.from_pretrained(in_openvino, norm_stats=norm_stats).norm_stats == norm_stats

    @pytest.mark.parametrize(
        "field",
        [
            {"norm_type": "bounds"},
            {"constant_dims": "zero"},
            {"cameras": ["left", "right"]},
            {"chunk_size": 4},
            {"attn_implementation": "eager"},
            {"robot": "libero"},
        ],
    )
    @pytest.mark.parametrize("load", [AutoModel.from_pretrained, AutoConfig.from_pretrained, open_checkpoint])
    def test_other_fields_are_refused(self, in_openvino, load, field):
        with pytest.raises(ValueError, match=f"is an exported checkpoint; {next(iter(field))} cannot be changed"):
            load(in_openvino, **field)

    @pytest.mark.parametrize("load", [AutoModel.from_pretrained, AutoConfig.from_pretrained, open_checkpoint])
    def test_a_misspelt_field_is_refused(self, in_openvino, load):
        with pytest.raises(TypeError, match="did you mean 'norm_stats'"):
            load(in_openvino, norm_stat={})

    def test_a_configuration_is_refused(self, in_openvino):
        config = AutoConfig.from_pretrained(in_openvino)
        for load in (AutoModel.from_pretrained, VLAAdapterForActionPrediction.from_pretrained):
            with pytest.raises(ValueError, match="Load it with AutoModel.from_pretrained, and without a config"):
                load(in_openvino, config=config)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"to": "tensorrt"}, "--to must be openvino or onnx"),
        ({"precision": "int4"}, "--precision must be one of"),
        ({"to": "onnx", "precision": "bf16"}, "no bfloat16"),
        ({"precision": "int8"}, "needs --calibrate"),
        ({"calibrate": "x"}, "--calibrate is for"),
        ({"prompt_tokens": 0}, "--prompt-tokens must be"),
        ({"precision": "int8", "calibrate": "x", "samples": 2}, "--samples of at least 3"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ExportSettings(**settings)


def test_a_damaged_graph_is_a_sentence_and_other_devices_are_refused(in_onnx, tmp_path):
    folder = shutil.copytree(in_onnx, tmp_path / "exported")
    opened = open_checkpoint(folder)
    with pytest.raises(ValueError, match="for the CPU"):
        opened.load_model(device="cuda")
    with pytest.raises(ValueError, match="compiled already"):
        opened.load_model().compile_for_inference()
    (folder / "model.onnx").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="model.onnx is damaged"):
        open_checkpoint(folder).load_model()


class TestAnExportThatPredictsOtherThanTorch:
    """It is not written. The engine here computes with torch and then errs, as a wrong conversion would."""

    @pytest.fixture
    def engine(self, checkpoint, monkeypatch):
        model = open_checkpoint(checkpoint).load_model(dtype="float32")
        engine = ErringEngine(lambda arrays: export_module._predictions(model, [arrays]))
        monkeypatch.setattr(exported_module, "load_engine", lambda *args: engine)
        monkeypatch.setattr(export_module, "trace", lambda *args: None)
        monkeypatch.setattr(export_module, "CONVERTERS", {"openvino": lambda program: engine})
        monkeypatch.setattr(
            export_module, "action_errors", lambda model, samples, groups, _: dict.fromkeys(groups, 0.01)
        )
        return engine

    def test_an_error_within_the_tolerance_passes(self, checkpoint, engine, tmp_path):
        engine.errors = [lambda actions: actions + 9e-5]
        folder = exported(checkpoint, tmp_path / "exported")
        assert json.loads((folder / "export.json").read_text())["errors"]["mean"] == pytest.approx(9e-5, rel=0.01)

    @pytest.mark.parametrize(
        ("precision", "error"), [("fp32", 1.1e-4), ("fp32", np.nan), ("bf16", np.nan), ("bf16", np.inf)]
    )
    def test_an_error_above_it_leaves_nothing(self, checkpoint, engine, tmp_path, precision, error):
        engine.errors = [lambda actions: actions + error]
        with pytest.raises(RuntimeError, match="verification failed: the exported graph's actions differ by"):
            exported(checkpoint, tmp_path / "exported", precision=precision)
        assert list(tmp_path.iterdir()) == []

    def test_nor_does_a_graph_of_any_batch_that_mixes_its_rows(self, checkpoint, engine, tmp_path):
        engine.errors = [lambda actions: actions[::-1]]
        with pytest.raises(RuntimeError, match="verification failed"):
            exported(checkpoint, tmp_path / "exported", dynamic_batch=True)
        assert list(tmp_path.iterdir()) == [] and engine.batches == [1, 2]

    def test_in_eight_bits_more_blocks_are_kept_until_the_error_is_allowed(self, checkpoint, engine, tmp_path):
        engine.errors = [lambda actions: actions + 1.0, lambda actions: actions]
        folder = exported(checkpoint, tmp_path / "exported", **EIGHT_BITS | {"samples": 3})
        first, second = engine.kept
        kept = json.loads((folder / "export.json").read_text())["kept"]
        groups = layer_groups(open_checkpoint(checkpoint).load_model())
        assert first < second == sum(len(groups[group]) for group in kept)

    @pytest.mark.parametrize("error", [1.0, np.nan])
    def test_after_three_rounds_nothing_is_left(self, checkpoint, engine, tmp_path, error):
        engine.errors = [lambda actions: actions + error]
        with pytest.raises(RuntimeError, match="in eight bits the mean error .* is allowed, 2 times that of bfloat16"):
            exported(checkpoint, tmp_path / "exported", **EIGHT_BITS | {"samples": 3})
        assert list(tmp_path.iterdir()) == [] and len(engine.kept) == 3


class ErringEngine:
    """An engine and its converter: what `predict` says, changed.

    Args:
        predict: from the graph's arrays to normalised actions.

    Attributes:
        errors: for every time that a graph is written, what becomes of the actions; the last one stays.
        kept: by round, how many layers were kept in higher precision.
        batches: the batch sizes that were asked for.
    """

    def __init__(self, predict) -> None:
        self.predict, self.model, self.written = predict, None, 0
        self.errors, self.kept, self.batches = [], [], []

    def quantized(self, calibration, kept_layers):
        self.kept.append(len(kept_layers))

    def save(self, model, folder, half_weights):
        self.written += 1
        for name in ENGINES["openvino"]:
            (folder / name).touch()

    def __call__(self, arrays):
        self.batches.append(len(arrays[0]))
        return self.errors[min(self.written, len(self.errors)) - 1](self.predict(arrays))


class TestFilesOfAnONNXGraph:
    @pytest.fixture(scope="class")
    def converter(self):
        class Graph(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.linear = torch.nn.Linear(32, 32)

            def forward(self, input_ids, attention_mask, pixel_values, proprio):
                return self.linear(proprio)

        with torch.no_grad():
            return ONNXConverter(torch.export.export(Graph(), (torch.zeros(1, 32),) * 4))

    def test_a_second_round_leaves_nothing_of_the_first(self, converter, tmp_path):
        for _ in range(2):
            converter.save(deepcopy(converter.model), tmp_path, half_weights=True)
            assert (tmp_path / "model.onnx.data").stat().st_size == 32 * 32 * 4
        inputs = [np.random.default_rng(0).standard_normal((1, 32)).astype(np.float32)] * 4
        assert load_engine("onnx", tmp_path / "model.onnx", "fp32")(inputs).any()

    def test_they_may_be_written_from_within_another_export(self, converter, tmp_path, monkeypatch):
        for name in ("one", "other"):
            (tmp_path / name).mkdir()
            monkeypatch.chdir(tmp_path / "one")
            converter.save(deepcopy(converter.model), tmp_path / name, half_weights=True)
        one, other = ((tmp_path / name / "model.onnx.data").read_bytes() for name in ("one", "other"))
        assert one == other


@pytest.mark.parametrize(("settings", "package"), [({}, "openvino"), ({"to": "onnx"}, "onnxscript")])
def test_a_missing_engine_is_named_before_anything_is_read(settings, package, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, package, None)
    extra = settings.get("to", "openvino")
    with pytest.raises(ImportError, match=rf"pip install 'vla-adapter-hf\[{extra}\]', or in a clone"):
        exported("no such checkpoint", tmp_path / "exported", **settings)
