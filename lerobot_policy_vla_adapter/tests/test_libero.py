"""`lerobot-eval` in LeRobot's LIBERO: frames of 360 x 360 pixels, turned by 180 degrees, reach the policy."""

import json
from pathlib import Path

import numpy as np
import pytest
from lerobot.scripts.lerobot_eval import eval_main

from vla_adapter_hf.checkpoints.lerobot.convert import to_lerobot
from vla_adapter_hf.simulation.libero.install import import_libero, is_libero_installed


@pytest.mark.simulator
@pytest.mark.skipif(not is_libero_installed(), reason="needs lerobot[libero]")
def test_the_embedded_policy_moves_liberos_arm(command, tmp_path, monkeypatch):
    import_libero()  # writes LIBERO's configuration, for which it would ask at the terminal
    from libero.libero import get_assets_path

    if not Path(get_assets_path()).is_dir():
        pytest.skip("LIBERO's assets are not there; hf-libero fetches them from the Hub with HF_HUB_OFFLINE=0")
    from lerobot.envs.libero import LiberoEnv

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
    # The policy approaches: it moves, and keeps the gripper open.
    assert np.abs(actions[:, :3]).max() > 0.2
    assert (actions[:, 6] == -1).all()
