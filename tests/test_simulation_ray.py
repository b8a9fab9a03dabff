"""Evaluations and recordings on Ray, whose machines and processes may die."""

import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from point_environment import PointSuite, SeeingPolicy
from test_simulation_evaluate import PointOracle, outcomes, silent
from typer.testing import CliRunner

from vla_adapter_cli import app
from vla_adapter_hf.recording.jobs import run_jobs
from vla_adapter_hf.simulation.cluster import LOSSES, RayPool, ReplicatedPolicy, _TaskPool
from vla_adapter_hf.simulation.evaluate import evaluate
from vla_adapter_hf.simulation.policies import Request
from vla_adapter_hf.simulation.settings import EvaluationSettings
from vla_adapter_hf.simulation.workers import Begin


TESTS = Path(__file__).parent
MEMORY = 80 * 1024 * 1024  # of a node's object store


def play(policy, suite, output, report=silent, **settings) -> dict:
    return evaluate(policy, suite, output, EvaluationSettings(**settings), report)


@pytest.mark.parametrize("command", ["eval", "demonstrate"])
def test_without_ray_the_extra_is_named_before_anything_is_loaded_or_written(tmp_path, monkeypatch, command):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setitem(sys.modules, "libero", None)
    monkeypatch.chdir(tmp_path)
    arguments = ["--policy", "noop"] if command == "eval" else []
    result = CliRunner().invoke(app, [command, *arguments, "--ray", "auto", "--output", "out"])
    assert result.exit_code == 1
    assert "vla-adapter-hf[ray]" in result.stderr
    assert not (tmp_path / "out").exists()


def test_replicas_need_a_cluster():
    with pytest.raises(ValueError, match="replicas=2 are copies of the policy on a Ray cluster; give ray=ADDRESS"):
        EvaluationSettings(replicas=2)


class InProcessRay:
    """Ray's calls, carried out here when the answer is fetched; each of `errors` is raised instead of an answer."""

    def __init__(self, errors) -> None:
        self.exceptions = pytest.importorskip("ray", reason="needs Ray (pip install 'vla-adapter-hf[ray]')").exceptions
        self.errors, self.cancelled = list(errors), []

    def remote(self, **options):
        assert options.get("max_retries", 0) == 0 and options.get("max_restarts", 0) == 0
        return lambda work: _Remote(work, is_class=isinstance(work, type))

    def wait(self, answers, num_returns, timeout=None):
        return answers[:num_returns], answers[num_returns:]

    def get(self, answer):
        if self.errors:
            raise self.errors.pop(0)
        return answer()

    def cancel(self, answer, force):
        self.cancelled.append(answer)

    def kill(self, actor) -> None:
        """Nothing runs."""


class _Remote:
    def __init__(self, work, is_class: bool = False) -> None:
        self._work, self._is_class = work, is_class

    def remote(self, *arguments):
        return _Actor(self._work(*arguments)) if self._is_class else partial(self._work, *arguments)


class _Actor:
    def __init__(self, instance) -> None:
        self._instance = instance

    def __getattr__(self, name: str) -> _Remote:
        return _Remote(getattr(self._instance, name))


def losses(count: int) -> list[Exception]:
    exceptions = pytest.importorskip("ray").exceptions
    kinds = [lambda: exceptions.OutOfMemoryError("node is running low on memory"), exceptions.RayActorError]
    return [kinds[number % 2]() for number in range(count)]


def begin(worker_pool):
    worker_pool.send(0, Begin(task=0, episode=0, instruction=None, observe=True))
    return worker_pool.receive([0])


def test_an_environment_that_ends_for_lack_of_memory_is_lost_and_a_new_one_is_there():
    pool = RayPool(InProcessRay(losses(1)), PointSuite(), count=1)
    assert begin(pool) == [(0, None)]
    [(worker, report)] = begin(pool)
    assert worker == 0 and report.instruction == "move to the red disc"


def test_environments_that_are_lost_again_and_again_end_the_evaluation():
    pool = RayPool(InProcessRay(losses(LOSSES + 1)), PointSuite(), count=1)
    for _ in range(LOSSES):
        assert begin(pool) == [(0, None)]
    with pytest.raises(ChildProcessError, match="environments end unexpectedly on every machine"):
        begin(pool)


def test_a_lost_copy_of_the_policy_is_replaced_until_too_many_are_lost():
    ray = InProcessRay([])
    policy = ReplicatedPolicy(ray, SeeingPolicy(), SeeingPolicy, count=1, gpus=0)
    environment = PointSuite().make(0)
    environment.reset(0)
    request = Request(environment.observe(), "move to the red disc", 0, 0, 0)
    expected = SeeingPolicy().predict([request])[0]
    ray.errors = losses(1)
    for _ in range(3):
        assert np.array_equal(policy.predict([request])[0], expected)
    assert not ray.errors
    ray.errors = losses(LOSSES + 1)
    with pytest.raises(ChildProcessError, match="copies of the policy end unexpectedly"):
        for _ in range(LOSSES + 1):
            assert np.array_equal(policy.predict([request])[0], expected)


def test_a_lost_job_runs_again_and_is_reported():
    lines: list[str] = []
    ray = InProcessRay(losses(1))
    pool = _TaskPool(ray, 1, lines.append)
    assert pool.submit(abs, -3).result(timeout=10) == 3
    assert lines == ["a job is lost (OutOfMemoryError); again: -3"]
    pool.close()


def test_jobs_that_are_lost_again_and_again_end_the_recording():
    pool = _TaskPool(InProcessRay(losses(100)), 1, silent)
    with pytest.raises(ChildProcessError, match="jobs end unexpectedly on every machine"):
        pool.submit(abs, -3).result(timeout=10)
    pool.close()


def test_an_error_of_a_job_is_raised_at_once():
    lines: list[str] = []
    pool = _TaskPool(InProcessRay([]), 1, lines.append)
    with pytest.raises(ValueError, match="invalid literal"):
        pool.submit(int, "x").result(timeout=10)
    pool.close()
    assert not lines


def test_jobs_that_run_are_cancelled_when_the_recording_stops():
    class Endless(InProcessRay):
        begun, stop = threading.Event(), threading.Event()

        def get(self, answer):
            self.begun.set()
            assert self.stop.wait(10)
            raise self.exceptions.WorkerCrashedError

        def cancel(self, answer, force):
            super().cancel(answer, force)
            self.stop.set()

    ray = Endless([])
    pool = _TaskPool(ray, 1, silent)
    job = pool.submit(abs, -3)
    assert ray.begun.wait(10)
    pool.close()
    assert len(ray.cancelled) == 1 and isinstance(job.exception(timeout=0), ray.exceptions.WorkerCrashedError)


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


def meet_on_two_nodes(second: str, folder: Path) -> None:
    """Never goes on at the node that will die. At the other one it goes on as soon as something works at the first."""
    import ray

    if ray.get_runtime_context().get_node_id() == second:
        (folder / "second").touch()
        time.sleep(300)
    while not (folder / "second").exists():
        time.sleep(0.05)


@contextmanager
def second_node_dies(cluster, folder: Path) -> Iterator[str]:
    """The node's id; it dies as soon as something works there."""

    def die() -> None:
        while not (folder / "second").exists():
            time.sleep(0.05)
        cluster.remove_node(cluster.second, False)

    thread = threading.Thread(target=die, daemon=True)
    thread.start()
    yield cluster.second.node_id
    thread.join(timeout=60)
    assert not thread.is_alive()


@dataclass(frozen=True)
class MeetingSuite(PointSuite):
    """Its environments work on both nodes until one dies."""

    second: str = ""
    folder: Path = Path()

    def make(self, task: int):
        environment = super().make(task)
        step = environment.step

        def meet(action, observe=True):
            meet_on_two_nodes(self.second, self.folder)
            return step(action, observe)

        environment.step = meet
        return environment


@pytest.mark.ray
def test_a_node_that_dies_loses_only_its_running_episodes_and_all_lines_are_those_of_a_local_run(tmp_path, cluster):
    local = play(SeeingPolicy(), PointSuite(), tmp_path / "local", episodes=6, processes=0)
    lines: list[str] = []
    # Three environments and a copy of the policy fill both nodes.
    settings = {"episodes": 6, "processes": 3, "ray": "auto", "replicas": 1}
    with second_node_dies(cluster, tmp_path) as second:
        suite = MeetingSuite(second=second, folder=tmp_path)
        spread = play(SeeingPolicy(), suite, tmp_path / "ray", lines.append, **settings)
    lost = [line for line in lines if "its environment is lost; again" in line]
    assert 1 <= len(lost) <= 3
    assert len(lines) == 18 + len(lost)  # no other episode was played twice
    assert outcomes(tmp_path / "ray") == outcomes(tmp_path / "local")
    assert json.loads((tmp_path / "ray" / "settings.json").read_text()) == json.loads(
        (tmp_path / "local" / "settings.json").read_text()
    )
    for summary in (spread, local):
        summary.pop("timing"), summary.pop("latency_ms")
    assert spread == local
    assert play(SeeingPolicy(), suite, tmp_path / "ray", lines.append, **settings)["episodes"] == 18
    assert len(lines) == 18 + len(lost)  # a second call has nothing to play


@pytest.mark.ray
def test_policies_that_live_in_the_environment_and_errors_of_environments_are_as_locally(tmp_path, cluster):
    play(PointOracle(), PointSuite(), tmp_path / "local", episodes=2, processes=0)
    play(PointOracle(), PointSuite(), tmp_path / "ray", episodes=2, processes=2, ray="auto")
    assert outcomes(tmp_path / "ray") == outcomes(tmp_path / "local")

    from test_simulation_evaluate import BuggySuite

    with pytest.raises(RuntimeError, match="an environment failed:(?s:.)*could not be broadcast"):
        play(SeeingPolicy(), BuggySuite(), tmp_path / "error", episodes=1, processes=1, ray="auto")


def _square(job: tuple[Path, str]) -> int:
    path, second = job
    with open(path, "a") as stream:
        stream.write("begun\n")
    meet_on_two_nodes(second, path.parent)
    return int(path.name) ** 2


@pytest.mark.ray
def test_jobs_of_a_node_that_dies_run_elsewhere(tmp_path, cluster):
    outcomes: list[int] = []
    lines: list[str] = []
    paths = [tmp_path / str(number) for number in range(8)]
    with second_node_dies(cluster, tmp_path) as second:
        jobs = [(path, second) for path in paths]
        run_jobs(_square, jobs, 4, None, lambda outcome, minutes: outcomes.append(outcome), "auto", lines.append)
    assert sorted(outcomes) == [number**2 for number in range(8)]
    begun = [path.read_text().count("begun") for path in paths]
    assert max(begun) == 2 and sum(begun) <= 10  # the node had room for two
    assert 1 <= len(lines) <= 2 and all("a job is lost" in line for line in lines)
