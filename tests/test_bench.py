"""`vla-adapter bench` measures what it says: stages of a prediction, operations, memory, and another program."""

import io
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from devices import DEVICES
from model_fixtures import tiny_config, tiny_inputs, tiny_model
from transformers import AutoModel, AutoProcessor
from typer.testing import CliRunner

from vla_adapter_cli import app
from vla_adapter_hf import _passive_waiting
from vla_adapter_hf.bench import measures
from vla_adapter_hf.bench.busy import busy_processes
from vla_adapter_hf.bench.measures import (
    STAGES,
    StageClock,
    count_flops,
    matmul_rate,
    memory_in_use,
    peak_memory,
    weight_bytes,
)
from vla_adapter_hf.bench.random_weights import SIZES, random_checkpoint
from vla_adapter_hf.bench.run import bench, serve_turns
from vla_adapter_hf.bench.settings import BenchSettings
from vla_adapter_hf.bench.turns import OtherProgram, answer_turns
from vla_adapter_hf.cli.options import parse_attention
from vla_adapter_hf.modeling.configuration_vla_adapter import VLAAdapterConfig


CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def small_matrix_products():
    """The machine's rate is not what most of these tests are about, and full-size products take seconds."""
    before = measures.MATMUL_SIZE["cpu"]
    measures.MATMUL_SIZE["cpu"] = 512
    yield
    measures.MATMUL_SIZE["cpu"] = before


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, published_pro) -> str:
    folder = tmp_path_factory.mktemp("bench") / "checkpoint"
    tiny_model().save_pretrained(folder)
    processor = AutoProcessor.from_pretrained(published_pro)
    type(processor).from_model_config(tiny_config(), processor.tokenizer).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def inputs():
    values = tiny_inputs(tiny_config(), batch_size=1)
    state = values.pop("proprio").double().numpy()
    return {**values, "state": state}


def program(tmp_path: Path, text: str) -> str:
    """The command of a Python program with this text."""
    file = tmp_path / "program.py"
    file.write_text(text, encoding="utf-8")
    return shlex.join([sys.executable, str(file)])


ANSWERING = """
import json, sys
print("loading ...")
for line in sys.stdin:
    print("predicting")
    print(json.dumps({"seconds": 12.5}), flush=True)
"""


class TestReport:
    @pytest.fixture(scope="class")
    def report(self, checkpoint, tmp_path_factory):
        folder = tmp_path_factory.mktemp("report")
        lines = []
        report = bench(
            BenchSettings(checkpoint=checkpoint, batch_sizes=(1, 3), runs=3, warmup=1),
            against=program(folder, ANSWERING),
            output=folder / "new" / "bench.json",
            report_progress=lines.append,
        )
        return report, lines, folder / "new" / "bench.json"

    def test_every_stage_has_ordered_times(self, report):
        stages = report[0]["stages"]
        assert list(stages) == ["image preparation", *STAGES]
        assert all(0 < times["fastest"] <= times["p50"] <= times["p95"] for times in stages.values())

    def test_batches_have_their_own_operations_and_throughput(self, report):
        one, three = (report[0]["predictions"][size] for size in ("1", "3"))
        # The first latent and the rotary tables are the same for all rows.
        for kind in ("layers", "attention"):
            assert 2.5 * one["flops"][kind] < three["flops"][kind] <= 3 * one["flops"][kind]
        assert three["per_second"] == pytest.approx(3 / three["p50"])

    def test_ratios_are_those_of_the_other_program_to_ours(self, report):
        against = report[0]["against"]
        assert against["theirs"]["p50"] == 12.5
        assert against["ratio"] == pytest.approx(12.5 / against["ours"]["p50"])

    def test_loading_is_set_against_reading_the_files(self, report):
        load = report[0]["load"]
        assert load["seconds"] > 0 and load["read_seconds"] > 0 and load["first_prediction_seconds"] > 0

    def test_the_file_holds_the_report(self, report):
        assert json.loads(report[2].read_text(encoding="utf-8")) == report[0]
        assert [path.name for path in report[2].parent.iterdir()] == ["bench.json"]

    def test_the_table_names_every_stage_and_batch(self, report):
        text = "\n".join(report[1])
        for word in ("image preparation", *STAGES, "prediction of 1", "prediction of 3", "matrix product", "in turn"):
            assert word in text
        assert f"ms ({report[0]['waiting']} waiting), theirs 12500.0 ms (with its own waiting)" in text


class TestMeasures:
    def test_stages_add_up_and_leave_no_hooks(self, inputs):
        model = tiny_model()
        expected = model.predict_action(**inputs)
        with StageClock(model) as clock:
            start = time.perf_counter()
            stages = clock.predict(inputs)
            whole = time.perf_counter() - start
            again = clock.predict(inputs)
        assert set(stages) == set(STAGES) and min(*stages.values(), *again.values()) > 0
        assert 0.9 * whole - 1e-3 < sum(stages.values()) <= whole
        np.testing.assert_array_equal(model.predict_action(**inputs), expected)
        assert not any(
            module._forward_hooks or module._forward_pre_hooks for module in map(model.get_submodule, ("", "policy"))
        )

    def test_a_stage_that_takes_longer_is_the_one_that_grows(self, inputs):
        model = tiny_model()
        policy = model.policy.norm_out.forward
        model.policy.norm_out.forward = lambda states: [policy(states) for _ in range(3000)][-1]
        with StageClock(model) as clock:
            clock.predict(inputs)
            stages = clock.predict(inputs)
        assert max(stages, key=stages.get) == "policy"

    def test_operations_are_those_of_the_layers_and_of_attention(self, inputs):
        config = tiny_config()
        model = tiny_model(config)
        counted = []

        def count(module, arguments, output):
            inner = module.weight[0].numel()  # of every number that comes out, products and additions
            counted.append(2 * inner * output.numel())

        for module in model.modules():
            if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
                module.register_forward_hook(count)
        model.predict_action(**inputs)
        layers = sum(counted)
        length = 9 + config.num_patch_tokens + config.num_action_queries
        towers = 2 * 2 * (4 * 9 * 9 * 32 + 4 * 4 * 4 * 48)  # two cameras, two blocks; 9 and 4 tokens
        language = 2 * 4 * length * length * 32
        sources = config.chunk_size + config.num_action_queries + 1 + config.num_task_tokens
        policy = 2 * 4 * config.chunk_size * sources * 32
        flops = count_flops(config, 1, 9)
        assert flops["layers"] == layers
        assert flops["attention"] == pytest.approx(towers + language + policy, rel=0.01)

    def test_the_rate_is_that_of_a_product_timed_here(self):
        size = 1024
        left, right = torch.randn(2, size, size)
        left @ right
        begin = time.perf_counter()
        left @ right
        rate = 2 * size**3 / (time.perf_counter() - begin)
        # Other programs may slow either down; a factor of a thousand is a wrong unit.
        assert rate / 20 < matmul_rate(torch.float32, CPU, runs=3) < 20 * rate

    def test_memory_that_is_taken_shows(self):
        before = memory_in_use(CPU)
        if before is None:
            pytest.skip("this system does not tell a process's memory")
        taken = np.ones(1 << 24)  # 128 MiB
        assert memory_in_use(CPU) - before > 0.9 * taken.nbytes
        assert peak_memory(CPU) >= memory_in_use(CPU) - 2**20

    def test_bytes_of_the_weights(self):
        model = tiny_model()
        assert weight_bytes(model) == 4 * sum(weight.numel() for weight in model.parameters())
        assert weight_bytes(model.bfloat16()) == 2 * sum(weight.numel() for weight in model.parameters())


class TestOptions:
    """Each on the tiny checkpoint, with the real compiler and the real quantiser."""

    @pytest.fixture(autouse=True)
    def threads_as_before(self):
        threads = torch.get_num_threads()
        yield
        torch.set_num_threads(threads)
        torch.compiler.reset()

    def run(self, checkpoint: str, **options) -> tuple[dict, str]:
        lines = []
        settings = BenchSettings(checkpoint=checkpoint, runs=1, warmup=0, **options)
        report = bench(settings, report_progress=lines.append)
        return report, "\n".join(lines)

    def test_compiled(self, checkpoint):
        report, text = self.run(checkpoint, compiled=True)
        assert report["compiled"] and "float32, compiled" in text
        # The first compiled prediction takes seconds, and does not count.
        assert report["predictions"]["1"]["p50"] < 0.5

    def test_eight_bits(self, checkpoint):
        pytest.importorskip("torchao")
        report, text = self.run(checkpoint, quantize="int8", dtype=torch.bfloat16)
        assert report["precision"] == "int8" and "int8" in text
        assert report["memory"]["weights"] < 2 * sum(weight.numel() for weight in tiny_model().parameters())

    def test_precision_and_threads(self, checkpoint):
        report, text = self.run(checkpoint, dtype=torch.bfloat16, threads=1)
        assert (report["precision"], report["threads"]) == ("bfloat16", 1)
        assert "bfloat16" in text and "1 threads" in text

    def test_attention_by_part(self, checkpoint):
        report, text = self.run(checkpoint, attention=parse_attention("dinov2=eager,siglip=eager"))
        assert report["attention"] == {"dinov2_config": "eager", "siglip_config": "eager", "text_config": "sdpa"}
        assert "attention by eager, sdpa" in text
        assert self.run(checkpoint, attention="eager")[0]["attention"]["text_config"] == "eager"
        for wrong in ("policy=eager", "dinov2=", "dinov2=eager,"):
            with pytest.raises(ValueError, match="--attn must be"):
                parse_attention(wrong)

    def test_the_command_measures_memory_in_a_process_of_its_own(self, checkpoint, tmp_path):
        command = [sys.executable, "-m", "vla_adapter_hf.cli", "bench", checkpoint]
        command += ["--runs", "1", "--warmup", "0", "--batch", "1,2", "--output", str(tmp_path / "bench.json")]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        report = json.loads((tmp_path / "bench.json").read_text(encoding="utf-8"))
        assert list(report["predictions"]) == ["1", "2"] and "prediction of 2" in done.stdout
        memory = report["memory"]
        assert memory["weights"] == weight_bytes(tiny_model())
        if memory["peak"] is not None:
            assert memory["weights"] < memory["peak"] < 2**30

    def test_turns(self, checkpoint, monkeypatch, capsys):
        monkeypatch.setattr(sys, "stdin", io.StringIO("predict\npredict\n"))
        serve_turns(BenchSettings(checkpoint=checkpoint, warmup=1), report_progress=lambda line: None)
        answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert len(answers) == 2 and all(0 < answer["seconds"] < 60 for answer in answers)

    def test_a_program_that_fails_costs_nothing_that_was_measured(self, checkpoint, tmp_path):
        lines = []
        with pytest.raises(ValueError, match="exit code 3"):
            bench(
                BenchSettings(checkpoint=checkpoint, runs=1, warmup=0),
                against=program(tmp_path, "raise SystemExit(3)"),
                output=tmp_path / "bench.json",
                report_progress=lines.append,
            )
        report = json.loads((tmp_path / "bench.json").read_text(encoding="utf-8"))
        assert "against" not in report and report["predictions"]["1"]["p50"] > 0
        assert any("prediction of 1" in line for line in lines)

    def test_the_pickles_of_the_published_layout_are_read_too(self, published_pro):
        load = self.run(str(published_pro))[0]["load"]
        assert load["read_seconds"] > 0

    def test_four_bits_are_packed_on_the_device_that_they_are_for(self, monkeypatch):
        pytest.importorskip("torchao")
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        options = BenchSettings(quantize="int4", device="cuda:0").load_options()
        assert (options["device_map"], options["dtype"]) == ({"": "cuda:0"}, torch.bfloat16)
        assert "device_map" not in BenchSettings(quantize="int4").load_options()
        with pytest.raises(ValueError, match="bfloat16 only, got --dtype torch.float32"):
            BenchSettings(quantize="int4", device="cuda:0", dtype=torch.float32).load_options()


class TestBusy:
    def test_other_processes_compute_while_the_block_runs_and_are_gone_after(self):
        with busy_processes(2) as processes:
            assert len(processes) == 2 and all(process.poll() is None for process in processes)
            if Path("/proc/self/stat").exists():

                def seconds(process) -> float:
                    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
                    return int(fields[11]) / os.sysconf("SC_CLK_TCK")  # user time

                before, deadline = [seconds(process) for process in processes], time.monotonic() + 60
                while any(seconds(one) - start < 0.1 for one, start in zip(processes, before, strict=True)):
                    assert time.monotonic() < deadline, "they do not compute"
                    time.sleep(0.05)
        assert all(process.poll() is not None for process in processes)

    def test_they_end_with_the_process_that_started_them(self):
        program = "from vla_adapter_hf.bench.busy import busy_processes; import os\n"
        program += "with busy_processes(1) as processes: print(processes[0].pid, flush=True); os._exit(0)"
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        pid, deadline = int(done.stdout), time.monotonic() + 60
        while Path(f"/proc/{pid}").exists() and "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def test_the_report_says_how_many(self, checkpoint):
        lines = []
        report = bench(BenchSettings(checkpoint=checkpoint, busy=1, runs=1, warmup=0), report_progress=lines.append)
        assert report["busy"] == 1 and any("1 other process computing" in line for line in lines)


class TestTurns:
    def test_every_line_of_input_is_answered(self):
        out = io.StringIO()
        seconds = iter([0.5, 0.25])
        answer_turns(lambda: next(seconds), io.StringIO("predict\npredict\n"), out)
        assert [json.loads(line) for line in out.getvalue().splitlines()] == [{"seconds": 0.5}, {"seconds": 0.25}]

    def test_other_output_is_passed_over(self, tmp_path):
        with OtherProgram(program(tmp_path, ANSWERING)) as other:
            assert [other.predict(), other.predict()] == [12.5, 12.5]
        assert other.process.returncode == 0

    @pytest.mark.parametrize("answer", ['{"seconds": true}', '{"seconds": -1}', '{"seconds": NaN}', "[1]", "1.5"])
    def test_an_answer_without_seconds_is_none(self, tmp_path, answer):
        text = f"import sys\nfor line in sys.stdin:\n    print({answer!r}, flush=True)\n    raise SystemExit(3)\n"
        with OtherProgram(program(tmp_path, text)) as other, pytest.raises(ValueError, match="exit code 3"):
            other.predict()

    def test_it_waits_as_the_user_chose_and_not_as_this_package_chooses_for_itself(self, tmp_path, monkeypatch):
        monkeypatch.setattr(_passive_waiting, "ADDED", {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0"})
        monkeypatch.setenv("OMP_WAIT_POLICY", "passive")  # as the package has set it
        monkeypatch.setenv("GOMP_SPINCOUNT", "7")  # as the user has set it after that
        answer = "float(os.environ['GOMP_SPINCOUNT']) if 'OMP_WAIT_POLICY' not in os.environ else 1.0"
        text = (
            f"import json, os, sys\nfor _ in sys.stdin:\n    print(json.dumps({{'seconds': {answer}}}), flush=True)\n"
        )
        with OtherProgram(program(tmp_path, text)) as other:
            assert other.predict() == 7.0

    def test_a_program_that_is_not_there_is_named(self):
        with pytest.raises(ValueError, match="no-such-program"):
            OtherProgram("no-such-program --fast")


class TestRandomWeights:
    @pytest.mark.parametrize("device", DEVICES)
    def test_a_checkpoint_of_the_size_asked_for_is_there_and_then_gone(self, device):
        with random_checkpoint("small", torch.bfloat16, device) as folder:
            model = AutoModel.from_pretrained(folder)
            assert model.dtype == torch.bfloat16 and model.config.text_config.hidden_size == 128
            AutoProcessor.from_pretrained(folder)
        assert not folder.exists()
        assert folder.parent == Path(tempfile.gettempdir())

    def test_the_full_size_is_the_published_one(self):
        config = VLAAdapterConfig(**SIZES["full"])
        for tower, width, depth in (
            (config.dinov2_config, 1024, 23),  # without the last layer, whose output is not used
            (config.siglip_config, 1152, 26),
            (config.text_config, 896, 24),
        ):
            assert (tower.hidden_size, tower.num_hidden_layers) == (width, depth)
        assert (config.policy_num_layers, config.num_action_queries) == (24, 64)


@pytest.mark.parametrize(
    "message, arguments",
    [
        ("not both", {"checkpoint": "folder", "size": "full"}),
        ("--size must be one of full, shallow, small", {"size": "huge"}),
        ("--runs", {"runs": 0}),
        ("--warmup", {"warmup": -1}),
        ("--busy", {"busy": -1}),
        ("--threads must be at least 1, got 0", {"threads": 0}),
        ("--batch", {"batch_sizes": (1, 0)}),
        ("--device", {"device": "warp drive"}),
        ("--device must be cpu or cuda", {"device": "meta"}),
        ("--device cuda:99", {"device": "cuda:99"}),
    ],
)
def test_settings_that_make_no_sense_are_refused(message, arguments):
    with pytest.raises(ValueError, match=message):
        BenchSettings(**arguments)


@pytest.mark.parametrize(
    "message, settings, arguments",
    [
        ("kind must be one of int8, int4", {"quantize": "int3"}, {}),
        ("no program 'no-such-program'", {}, {"against": "no-such-program --fast"}),
        ("no program ''", {}, {"against": ""}),
        ("No closing quotation", {}, {"against": "python 'bench.py"}),
    ],
)
def test_what_cannot_run_is_refused_before_anything_is_loaded(message, settings, arguments, monkeypatch):
    monkeypatch.setattr(AutoModel, "from_pretrained", None)
    with pytest.raises(ValueError, match=message):
        bench(BenchSettings(**settings), **arguments, report_progress=lambda line: None)


@pytest.mark.parametrize(
    "options", [["--batch", "2"], ["--busy", "2"], ["--output", "bench.json"], ["--against", "true"]]
)
def test_turns_take_no_option_of_a_report(options):
    result = CliRunner().invoke(app, ["bench", "--turns", *options])
    assert result.exit_code == 1 and "--turns answers" in result.output
