"""Prediction on a GPU: compiled, with every attention kernel, in large batches, at the published size.

`pytest -m gpu` runs what needs a GPU, here and in `test_goldens.py`, `test_synchronization.py`, `test_quantization.py`
and `test_gpu_training.py`. What a CPU can prove of it is run on the CPU by the same code.
"""

from typing import Any

import numpy as np
import pytest
import torch
from devices import CUDA, DEVICES, exact_float32, move, on_gpu
from model_fixtures import learner_config, norm_stats, tiny_inputs, tiny_model
from synchronization import no_synchronization
from torch._dynamo.utils import counters
from torch.nn.attention import SDPBackend, sdpa_kernel

from vla_adapter_hf import VLAAdapterConfig, VLAAdapterForActionPrediction


# Largest error of an action of the small model, which is in -1.4...1.4. The float32 one is that of test_goldens.py. In
# bfloat16 two kernels on one CPU differ by 0.03.
TOLERANCE = {torch.float32: 3e-4, torch.bfloat16: 0.1}
# On a CPU the tracer is the real one and the kernels are eager's: the compiler itself takes a minute.
COMPILER = {"cpu": {"backend": "eager"}, "cuda": {}}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    counters.clear()
    with exact_float32():
        yield
    torch.compiler.reset()


def observation(config: Any, seed: int = 0, batch_size: int = 1, prompt_length: int = 9) -> dict[str, Any]:
    """Arguments of `predict_action`."""
    inputs = tiny_inputs(config, batch_size, prompt_length, seed)
    del inputs["proprio"]
    return {**inputs, "state": np.random.default_rng(seed).uniform(-1, 1, (batch_size, config.proprio_dim))}


def small_model(
    device: str, dtype: torch.dtype = torch.float32, config: VLAAdapterConfig | None = None
) -> VLAAdapterForActionPrediction:
    """128 wide, so that every kernel takes its heads."""
    return tiny_model(config or learner_config()).to(device, dtype)


def assert_near(actions: np.ndarray, expected: np.ndarray, dtype: torch.dtype = torch.float32) -> None:
    np.testing.assert_allclose(actions, expected, rtol=0, atol=TOLERANCE[dtype])


class TestCompiled:
    @pytest.mark.parametrize(
        ("device", "dtype"),
        [("cpu", torch.float32), on_gpu("cuda", torch.float32), on_gpu("cuda", torch.bfloat16)],
    )
    def test_one_graph_gives_the_actions_of_eager_for_every_prompt(self, device, dtype):
        model = small_model(device, dtype)
        observations = [observation(model.config, seed, prompt_length=8 + seed) for seed in range(6)]
        expected = [model.predict_action(**inputs) for inputs in observations]
        model.compile_for_inference(prompt_multiple=16, **COMPILER[device])
        actions = [model.predict_action(**observations[0])]
        with torch.compiler.set_stance("fail_on_recompile"):  # and CUDA records in the second call, replays later
            actions += [model.predict_action(**inputs) for inputs in observations[1:]]
        for ours, eagers in zip(actions, expected, strict=True):
            assert_near(ours, eagers, dtype)
        assert not counters["graph_break"]
        assert counters["stats"]["unique_graphs"] == 1
        assert not counters["inductor"]["cudagraph_skips"]

    @pytest.mark.parametrize("device", [CUDA])
    def test_a_prediction_is_one_launch_of_a_cuda_graph_that_waits_for_nothing(self, device):
        model = small_model(device, torch.bfloat16).compile_for_inference(prompt_multiple=16)
        inputs = observation(model.config)
        for _ in range(3):
            model.predict_action(**inputs)
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        ) as profile:
            model.predict_action(**inputs)
        calls = {event.key: event.count for event in profile.key_averages()}
        assert calls.get("cudaGraphLaunch") == 1, sorted(calls)
        tensors = move(tiny_inputs(model.config, 1, 16), device, torch.bfloat16)
        with torch.no_grad(), no_synchronization(device):
            model(**tensors, return_dict=True)

    @pytest.mark.parametrize("device", [CUDA])
    def test_batches_of_several_sizes_in_turn_do_not_overwrite_each_other(self, device):
        model = small_model(device)
        observations = [observation(model.config, size, size) for size in (1, 8, 1, 8, 1, 8)]
        expected = [model.predict_action(**inputs) for inputs in observations]
        model.compile_for_inference(prompt_multiple=16, **COMPILER[device])
        actions = [model.predict_action(**inputs) for inputs in observations]
        for ours, eagers in zip(actions, expected, strict=True):
            assert_near(ours, eagers)


class TestAttention:
    @pytest.mark.parametrize("device", DEVICES)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_torchs_kernels_and_plain_attention_agree(self, device, dtype):
        config = learner_config()
        # CUDA's memory-efficient kernel takes no keys that several heads share. Other tests here have such heads.
        config.text_config.num_key_value_heads = config.text_config.num_attention_heads
        model = small_model(device, dtype, config)
        inputs = observation(model.config, batch_size=2)
        actions = {}
        for backend in (SDPBackend.MATH, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
            on_cpu = backend is SDPBackend.EFFICIENT_ATTENTION and device == "cpu"
            on_cuda = backend is SDPBackend.FLASH_ATTENTION and device == "cuda" and dtype == torch.float32
            if on_cpu or on_cuda:  # there is no such kernel
                continue
            with sdpa_kernel(backend):
                actions[backend.name] = model.predict_action(**inputs)
        model.set_attn_implementation("eager")
        expected = model.predict_action(**inputs)
        assert len(actions) > 1
        for name, ours in actions.items():
            np.testing.assert_allclose(ours, expected, rtol=0, atol=TOLERANCE[dtype], err_msg=name)

    @pytest.mark.parametrize("device", [CUDA])
    @pytest.mark.parametrize("batch_size", [1, 3])
    def test_flash_attns_kernels_agree_compile_and_wait_for_nothing(self, device, batch_size):
        pytest.importorskip("flash_attn")
        model = small_model(device, torch.bfloat16)
        inputs = observation(model.config, batch_size=batch_size)
        expected = model.predict_action(**inputs)
        model.set_attn_implementation("flash_attention_2")
        assert_near(model.predict_action(**inputs), expected, torch.bfloat16)
        tensors = move(tiny_inputs(model.config, batch_size), device, torch.bfloat16)
        with torch.no_grad(), no_synchronization(device):
            model(**tensors)
        model.compile_for_inference(prompt_multiple=16)
        assert_near(model.predict_action(**inputs), expected, torch.bfloat16)


class TestBatches:
    @pytest.mark.parametrize(("device", "is_compiled"), [("cpu", False), on_gpu("cuda", False), on_gpu("cuda", True)])
    def test_each_of_64_rows_gets_the_actions_it_gets_alone(self, device, is_compiled):
        model = small_model(device)
        inputs = observation(model.config, batch_size=64)
        inputs["attention_mask"][::2, :3] = 0
        alone = [
            model.predict_action(**{name: values[row : row + 1] for name, values in inputs.items()})
            for row in (0, 1, 31, 62, 63)
        ]
        if is_compiled:
            model.compile_for_inference(prompt_multiple=16, **COMPILER[device])
        together = model.predict_action(**inputs)
        assert together.shape == (64, model.config.chunk_size, model.config.action_dim)
        assert_near(together[[0, 1, 31, 62, 63]], np.concatenate(alone))


class TestPublishedSize:
    """Random weights of the published size: only there do the published widths of heads meet the GPU's kernels."""

    @pytest.fixture(scope="class", params=[CUDA])
    def model(self, request):
        config = VLAAdapterConfig(norm_stats=norm_stats())
        with torch.device(request.param):
            model = VLAAdapterForActionPrediction(config)
        return model.to(torch.bfloat16).eval()

    def test_compiled_is_eager(self, model):
        inputs = observation(model.config, prompt_length=50)
        expected = model.predict_action(**inputs)
        model.compile_for_inference()
        try:
            for _ in range(3):
                actions = model.predict_action(**inputs)
            error = np.linalg.norm(actions - expected) / np.linalg.norm(expected)
            assert error < 0.05 and not counters["inductor"]["cudagraph_skips"]
        finally:
            model._compiled_call_impl = model._prompt_multiple = None

    def test_bfloat16_is_near_float32(self, model):
        inputs = observation(model.config, prompt_length=50)
        rounded = model.predict_action(**inputs)
        exact = model.float().predict_action(**inputs)
        model.bfloat16()
        assert np.linalg.norm(rounded - exact) / np.linalg.norm(exact) < 0.05

    def test_flash_attention_takes_the_heads_of_every_part(self, model):
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # an error where the kernel refuses
            model.predict_action(**observation(model.config, prompt_length=50))

    def test_forward_waits_for_nothing(self, model):
        inputs = move(tiny_inputs(model.config, 1, 50), model.device, model.dtype)
        with torch.no_grad():
            model(**inputs)
            with no_synchronization(model.device):
                model(**inputs)

    def test_a_batch_of_64_fits(self, model):
        torch.cuda.reset_peak_memory_stats()
        actions = model.predict_action(**observation(model.config, batch_size=64, prompt_length=50))
        assert np.isfinite(actions).all()
        assert torch.cuda.max_memory_allocated() < 16 * 2**30
