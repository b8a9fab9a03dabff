"""Evaluations and recordings on a local Ray cluster of two nodes, one of which dies."""

import json
import os
import sys
import threading
import time
from pathlib import Path

import pytest
from point_environment import PointSuite, SeeingPolicy
from test_simulation_evaluate import PointOracle, outcomes, silent
from typer.testing import CliRunner

from vla_adapter_cli import app
from vla_adapter_hf.recording.jobs import run_jobs
from vla_adapter_hf.simulation.evaluate import evaluate
from vla_adapter_hf.simulation.settings import EvaluationSettings


TESTS = Path(__file__).parent
MEMORY = 80 * 1024 * 1024  # of a node's object store


def play(policy, suite, output, report=silent, **settings) -> dict:
    return evaluate(policy, suite, output, EvaluationSettings(**settings), report)


@pytest.mark.parametrize("command", ["eval", "demonstrate"])
def test_without_ray_the_extra_is_named_before_anything_is_written(tmp_path, monkeypatch, command):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.chdir(tmp_path)
    arguments = ["--policy", "noop"] if command == "eval" else []
    if command == "demonstrate":
        pytest.importorskip("libero", reason="demonstrate needs the LIBERO simulator")
    result = CliRunner().invoke(app, [command, *arguments, "--ray", "auto", "--output", "out"])
    assert result.exit_code == 1
    assert "vla-adapter-hf[ray]" in result.stderr or "LIBERO is not installed" in result.stderr
    assert not (tmp_path / "out").exists()


def test_replicas_need_a_cluster():
    with pytest.raises(ValueError, match="replicas=2 are copies of the policy on a Ray cluster; give ray=ADDRESS"):
        EvaluationSettings(replicas=2)


@pytest.fixture
def cluster(monkeypatch):
    """Two nodes with two CPUs each; the processes find the tests' modules."""
    ray = pytest.importorskip("ray", reason="needs Ray (pip install 'vla-adapter-hf[ray]')")
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 2, "object_store_memory": MEMORY, "include_dashboard": False}
    )
    cluster.second = cluster.add_node(num_cpus=2, object_store_memory=MEMORY)
    paths = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    ray.init(cluster.address, log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": paths}})
    yield cluster
    ray.shutdown()
    cluster.shutdown()


class SlowSuite(PointSuite):
    """Steps take a moment, and every process says that it plays."""

    def make(self, task: int):
        environment = super().make(task)
        step = environment.step

        def slow(action, observe=True):
            time.sleep(0.01)
            return step(action, observe)

        environment.step = slow
        return environment


@pytest.mark.ray
def test_a_node_that_dies_loses_only_its_running_episodes_and_all_lines_are_those_of_a_local_run(tmp_path, cluster):
    suite = SlowSuite()
    local = play(SeeingPolicy(), suite, tmp_path / "local", episodes=6, processes=0)
    lines: list[str] = []

    def report(line: str) -> None:
        lines.append(line)
        if len(lines) == 4:
            threading.Thread(target=cluster.remove_node, args=(cluster.second, False)).start()

    # Three environments and a copy of the policy fill both nodes.
    settings = {"episodes": 6, "processes": 3, "ray": "auto", "replicas": 1}
    spread = play(SeeingPolicy(), suite, tmp_path / "ray", report, **settings)
    lost = [line for line in lines if "its environment is lost; again" in line]
    print("\n".join(lines))
    assert 1 <= len(lost) <= 3
    assert len(lines) == 18 + len(lost)  # no other episode was played twice
    assert outcomes(tmp_path / "ray") == outcomes(tmp_path / "local")
    assert json.loads((tmp_path / "ray" / "settings.json").read_text()) == json.loads(
        (tmp_path / "local" / "settings.json").read_text()
    )
    for summary in (spread, local):
        summary.pop("timing"), summary.pop("latency_ms")
    assert spread == local
    assert play(SeeingPolicy(), suite, tmp_path / "ray", report, **settings)["episodes"] == 18
    assert len(lines) == 18 + len(lost)  # a second call has nothing to play


@pytest.mark.ray
def test_policies_that_live_in_the_environment_and_errors_of_environments_are_as_locally(tmp_path, cluster):
    play(PointOracle(), PointSuite(), tmp_path / "local", episodes=2, processes=0)
    play(PointOracle(), PointSuite(), tmp_path / "ray", episodes=2, processes=2, ray="auto")
    assert outcomes(tmp_path / "ray") == outcomes(tmp_path / "local")

    from test_simulation_evaluate import BuggySuite

    with pytest.raises(RuntimeError, match="an environment failed:(?s:.)*could not be broadcast"):
        play(SeeingPolicy(), BuggySuite(), tmp_path / "error", episodes=1, processes=1, ray="auto")


def _slow_square(path: str) -> int:
    with open(path, "a") as stream:
        stream.write("begun\n")
    time.sleep(2)
    return int(Path(path).name) ** 2


@pytest.mark.ray
def test_jobs_of_a_node_that_dies_run_elsewhere(tmp_path, cluster):
    outcomes: list[int] = []

    def finished(outcome: int, minutes: float) -> None:
        outcomes.append(outcome)
        if len(outcomes) == 1:
            cluster.remove_node(cluster.second, False)

    jobs = [str(tmp_path / str(number)) for number in range(8)]
    run_jobs(_slow_square, jobs, workers=4, minutes=None, finished=finished, ray="auto")
    assert sorted(outcomes) == [number**2 for number in range(8)]
    begun = [Path(job).read_text().count("begun") for job in jobs]
    assert max(begun) <= 2 and 8 < sum(begun) <= 11  # those that ran on the node
