"""The clients that others publish, each in an environment of its own, against a running server.

OPENPI_PYTHON=.../bin/python      pip install openpi-client typing_extensions
VLA_EVAL_PYTHON=.../bin/python    pip install vla-eval
"""

import json
import os
import subprocess
from contextlib import contextmanager
from pathlib import Path

import model_fixtures
import numpy as np
import pytest
from serving_fixtures import RECORDED, free_port, recorded_observation, server_thread
from simulator import need_simulator
from transformers import AutoProcessor

from vla_adapter_hf import VLAAdapterProcessor
from vla_adapter_hf.robots import get_robot
from vla_adapter_hf.serving.policy import ActionRules, ServedPolicy
from vla_adapter_hf.serving.settings import ServeSettings


CLIENTS = Path(__file__).parent / "serving_clients"
TOLERANCE = 1e-5


def python_of(variable):
    python = os.environ.get(variable)
    if not python:
        pytest.skip(f"{variable} names no Python with the official client; see the head of this file")
    return python


class Relay:
    """The process with the official openpi client."""

    def __init__(self, process, folder):
        self.process, self.folder, self.count = process, folder, 0
        self.numpy, self.metadata = self._line(), self._line()

    def infer(self, observation):
        """The actions, or the text of the error."""
        self.count += 1
        path = self.folder / f"{self.count}.npz"
        np.savez(path, **observation)
        self.process.stdin.write(f"{path}\n")
        self.process.stdin.flush()
        answer = self._line()
        if answer.startswith("error: "):
            return answer
        with np.load(answer) as arrays:
            return arrays["actions"]

    def _line(self):
        line = self.process.stdout.readline().strip()
        assert line, self.process.stderr.read()
        return line


@contextmanager
def openpi_client(port, folder, *options):
    command = [python_of("OPENPI_PYTHON"), str(CLIENTS / "openpi_relay.py"), str(port), *options]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(command, text=True, **pipes) as process:
        try:
            yield Relay(process, folder)
        finally:
            process.stdin.close()
            process.wait(20)


@pytest.mark.openpi
def test_openpis_client_gets_the_same_chunk_under_liberos_and_our_own_names(embedded_policy, tmp_path):
    recorded = recorded_observation()
    images, state, prompt = [recorded["image"], recorded["wrist_image"]], recorded["state"], recorded["prompt"]
    inputs = embedded_policy.processor(images=[images], text=[prompt], state=state[None])
    expected = get_robot("libero").to_environment(embedded_policy.model.predict_action(**inputs)[0])
    droid = {"joint_position": state[:7], "gripper_position": state[7:]}
    observations = {
        "libero": {f"observation/{name}": recorded[name] for name in ("image", "wrist_image", "state")},
        "own": {name: recorded[name] for name in ("image", "wrist_image", "state")},
        "own, nested": {"images.image": images[0], "images.wrist_image": images[1], "state": state},
        "droid": {"observation/exterior_image_1_left": images[0], "observation/wrist_image_left": images[1]}
        | {f"observation/{name}": part for name, part in droid.items()},
    }
    with server_thread(embedded_policy, ServeSettings()) as running, openpi_client(running.port, tmp_path) as client:
        assert client.numpy.startswith("numpy 1.") and "action_horizon" in client.metadata
        for observation in observations.values():
            actions = client.infer({**observation, "prompt": prompt})
            np.testing.assert_allclose(actions, expected, atol=TOLERANCE)
        error = client.infer({**observations["own"], "prompt": ""})
        assert error.startswith("error: ") and "text[0] is empty" in error
        np.testing.assert_allclose(client.infer({**observations["own"], "prompt": prompt}), expected, atol=TOLERANCE)


@pytest.mark.openpi
def test_openpis_client_gets_chunks_for_alohas_names_and_channels_first(published_pro, tmp_path):
    robot = get_robot("aloha")
    config = model_fixtures.tiny_config(
        cameras=list(robot.cameras),
        action_dim=14,
        proprio_dim=14,
        norm_stats=model_fixtures.norm_stats(14, 14, "aloha_fold"),
    )
    model = model_fixtures.tiny_model(config)
    tokenizer = AutoProcessor.from_pretrained(published_pro).tokenizer
    processor = VLAAdapterProcessor.from_model_config(config, tokenizer)
    settings = ServeSettings()
    policy = ServedPolicy(model, processor, settings, ActionRules.of(config, settings))
    names = ("cam_high", "cam_left_wrist", "cam_right_wrist", "cam_low")
    generator = np.random.default_rng(0)
    frames = {name: generator.integers(0, 256, (3, 48, 64), dtype=np.uint8) for name in names}
    state = np.linspace(-0.5, 0.5, 14)
    inputs = processor(
        images=[[frames[name].transpose(1, 2, 0) for name in names[:3]]], text=["fold"], state=state[None]
    )
    expected = model.predict_action(**inputs)[0]
    with server_thread(policy, settings) as running, openpi_client(running.port, tmp_path) as client:
        observation = {f"images.{name}": frame for name, frame in frames.items()}
        actions = client.infer({**observation, "state": state, "prompt": "fold"})
        assert actions.shape == (config.chunk_size, 14)
        np.testing.assert_allclose(actions, expected, atol=TOLERANCE)


@pytest.mark.openpi
@pytest.mark.simulator
@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--resize",)], ids=["as they are", "resized by the client"])
def test_openpis_client_in_another_process_solves_a_libero_episode(embedded_policy, tmp_path, options):
    need_simulator()
    from vla_adapter_hf.simulation.libero.suite import LiberoSuite

    environment = LiberoSuite("libero_object").make(9)
    with (
        server_thread(embedded_policy, ServeSettings()) as running,
        openpi_client(running.port, tmp_path, *options) as client,
    ):
        environment.reset(40)
        step, solved = 0, False
        while not solved and step < environment.step_limit:
            seen = environment.observe()
            chunk = client.infer(
                {
                    "observation/image": seen.images[0],
                    "observation/wrist_image": seen.images[1],
                    "observation/state": seen.state,
                    "prompt": environment.instruction,
                }
            )
            for action in chunk:  # sent to the simulator as they are
                solved = environment.step(action, observe=True)
                step += 1
                if solved:
                    break
    environment.close()
    assert solved, f"not solved in {step} steps"


@pytest.mark.vla_eval
def test_vla_evals_orchestrator_runs_a_benchmark_on_the_server(embedded_policy):
    recorded = recorded_observation()
    images = [recorded["image"], recorded["wrist_image"]]
    inputs = embedded_policy.processor(images=[images], text=[recorded["prompt"]], state=recorded["state"][None])
    expected = get_robot("libero").to_environment(embedded_policy.model.predict_action(**inputs)[0])
    with server_thread(embedded_policy, ServeSettings()) as running:
        command = [python_of("VLA_EVAL_PYTHON"), "vla_eval_run.py", f"ws://127.0.0.1:{running.port}/vla-eval"]
        run = subprocess.run([*command, str(RECORDED)], cwd=CLIENTS, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    episodes = json.loads(run.stdout.splitlines()[-1])["actions"]
    assert [len(episode) for episode in episodes] == [11, 11]
    for episode in episodes:  # a chunk of eight, then three of the next
        np.testing.assert_allclose(episode[:8], expected, atol=TOLERANCE)
        np.testing.assert_allclose(episode[8:], expected[:3], atol=TOLERANCE)


@pytest.mark.ray
@pytest.mark.slow
def test_ray_serve_runs_two_copies_behind_one_address(embedded_policy):
    recorded = recorded_observation()
    images = [recorded["image"], recorded["wrist_image"]]
    inputs = embedded_policy.processor(images=[images], text=[recorded["prompt"]], state=recorded["state"][None])
    expected = get_robot("libero").to_environment(embedded_policy.model.predict_action(**inputs)[0])
    command = [python_of("RAY_PYTHON"), "ray_run.py", str(free_port()), str(RECORDED)]
    paths = os.pathsep.join((str(CLIENTS.parents[1] / "examples"), os.environ.get("PYTHONPATH", "")))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    run = subprocess.run(command, cwd=CLIENTS, env=environment, capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stderr
    answer = json.loads(run.stdout.splitlines()[-1])
    assert sum(answer["copies"].values()) == 2
    for chunk in answer["chunks"]:
        np.testing.assert_allclose(chunk, expected, atol=TOLERANCE)
