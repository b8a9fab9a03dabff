"""The evaluation harness on the point environment: batching, resuming, controls, films."""

import errno
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pytest
from filelock import Timeout
from PIL import Image, ImageSequence
from point_environment import PointEnvironment, PointSuite, SeeingPolicy

from vla_adapter_hf.checkpoints.embedded import embedded_folder
from vla_adapter_hf.recording.jobs import run_jobs
from vla_adapter_hf.simulation.environment import Environment, Suite
from vla_adapter_hf.simulation.evaluate import evaluate
from vla_adapter_hf.simulation.placement import PLACEMENTS
from vla_adapter_hf.simulation.policies import CheckpointPolicy, NoopPolicy, ReplayPolicy
from vla_adapter_hf.simulation.results import ResultsFile, read_results
from vla_adapter_hf.simulation.rollout import draw_rollout, write_rollout
from vla_adapter_hf.simulation.settings import EvaluationSettings
from vla_adapter_hf.utils.files import exclusive_folder


SUITE = PointSuite()


def silent(line: str) -> None:
    """No progress."""


def play(policy, suite, output, report=silent, **settings) -> dict:
    return evaluate(policy, suite, output, EvaluationSettings(**settings), report)


class HesitantPolicy:
    """Wants to open the gripper a little in one chunk, and to close it in the next."""

    name = "hesitant"
    needs_observation = False

    def __init__(self) -> None:
        self.queries = 0

    def predict(self, requests) -> list[np.ndarray]:
        gripper = 0.6 if self.queries % 2 == 0 else 0.0  # above 0.5 is open
        self.queries += 1
        return [np.tile([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, gripper], (8, 1)) for _ in requests]


class RandomPolicy:
    """Chunks of small random motions, which it remembers."""

    name = "random"
    needs_observation = False

    def __init__(self) -> None:
        self.random = np.random.default_rng(0)
        self.predicted = np.empty((0, 6), np.float32)

    def predict(self, requests) -> list[np.ndarray]:
        [_] = requests
        motions = self.random.uniform(-0.01, 0.01, (8, 6)).astype(np.float32)  # as actions are saved
        self.predicted = np.concatenate((self.predicted, motions))
        return [np.pad(motions, ((0, 0), (0, 1)))]


@dataclass(frozen=True)
class PointOracle:
    """Knows where the disc is; lives in the environment's process."""

    name: str = "oracle"

    def attach(self, environment: PointEnvironment):
        return lambda: np.append(np.clip((environment.goal - environment.position) / 0.05, -1, 1), np.zeros(5))


def outcomes(folder: Path) -> list[tuple]:
    """Everything of the results but the clock."""
    results = read_results(folder / "episodes.jsonl")
    return [(r.task, r.episode, r.steps, r.success, r.instruction, str(r.info), len(r.latency)) for r in results]


def test_the_point_environment_fits_the_protocols():
    assert isinstance(SUITE, Suite)
    assert isinstance(SUITE.make(0), Environment)


def test_a_policy_that_sees_solves_every_episode(tmp_path):
    summary = play(SeeingPolicy(), SUITE, tmp_path, episodes=5, processes=0)
    assert (summary["successes"], summary["episodes"]) == (15, 15)
    assert json.loads((tmp_path / "summary.json").read_text())["successes"] == 15
    assert "| **all** | 15/15 | 100.0" in (tmp_path / "summary.md").read_text()


def test_bounds_oracle_solves_all_and_noop_none(tmp_path):
    oracle = play(PointOracle(), SUITE, tmp_path / "oracle", episodes=5, processes=0)
    noop = play(NoopPolicy("libero"), SUITE, tmp_path / "noop", episodes=5, processes=0)
    assert (oracle["success_rate"], noop["success_rate"]) == (1.0, 0.0)
    assert all(result.steps == SUITE.step_limit for result in read_results(tmp_path / "noop" / "episodes.jsonl"))


def test_black_images_blind_the_policy(tmp_path):
    summary = play(SeeingPolicy(), SUITE, tmp_path, episodes=5, processes=0, black_images=True)
    assert summary["successes"] == 0
    assert all(result.black_images for result in read_results(tmp_path / "episodes.jsonl"))


def test_another_instruction_is_used_and_recorded_and_does_not_move_the_goal(tmp_path):
    summary = play(
        SeeingPolicy(), SUITE, tmp_path, tasks=[0], episodes=5, processes=0, instruction="move to the blue disc"
    )
    assert summary["successes"] < 5
    results = read_results(tmp_path / "episodes.jsonl")
    assert {result.instruction for result in results} == {"move to the blue disc"}
    assert {result.task_instruction for result in results} == {"move to the red disc"}


def test_the_policy_is_asked_once_per_executed_chunk(tmp_path):
    play(NoopPolicy("libero"), SUITE, tmp_path / "whole", tasks=[0], episodes=1, processes=0)
    play(NoopPolicy("libero"), SUITE, tmp_path / "part", tasks=[0], episodes=1, processes=0, execute=3)
    # 60 steps: 8 queries of 8 actions (the last is cut short), 20 of 3.
    assert len(read_results(tmp_path / "whole" / "episodes.jsonl")[0].latency) == 8
    assert len(read_results(tmp_path / "part" / "episodes.jsonl")[0].latency) == 20


def test_parallel_environments_give_the_serial_results_in_batches(tmp_path):
    play(SeeingPolicy(), SUITE, tmp_path / "serial", episodes=6, processes=0)
    policy = SeeingPolicy(pause=0.5)
    play(policy, SUITE, tmp_path / "parallel", episodes=6, processes=3)
    assert outcomes(tmp_path / "parallel") == outcomes(tmp_path / "serial")
    assert max(policy.batches) > 1


def test_a_checkpoint_acts_alike_in_parallel_up_to_rounding(tmp_path):
    """How many observations are in a batch shows in the last digits of their actions, and nowhere else."""
    for name, processes in (("serial", 0), ("parallel", 3)):
        with embedded_folder() as folder:
            policy = CheckpointPolicy(folder / "checkpoint", SUITE.robot, unnorm_key="libero_object")
        play(policy, SUITE, tmp_path / name, episodes=2, processes=processes, save_actions=True)
    assert outcomes(tmp_path / "parallel") == outcomes(tmp_path / "serial")
    for path in (tmp_path / "serial" / "actions").glob("*.npy"):
        other = np.load(tmp_path / "parallel" / "actions" / path.name)
        np.testing.assert_allclose(other, np.load(path), rtol=0, atol=1e-3)


def _run_until_killed(folder: str) -> None:
    def slow(line: str) -> None:
        time.sleep(0.2)

    play(SeeingPolicy(), SUITE, folder, episodes=20, processes=1, report=slow)


def test_killed_and_resumed_is_the_uninterrupted_run(tmp_path):
    play(SeeingPolicy(), SUITE, tmp_path / "whole", episodes=20, processes=1)
    process = multiprocessing.get_context("spawn").Process(target=_run_until_killed, args=(str(tmp_path / "killed"),))
    process.start()
    lines = tmp_path / "killed" / "episodes.jsonl"
    deadline = time.monotonic() + 400
    while process.is_alive() and time.monotonic() < deadline:
        if lines.exists() and lines.read_bytes().count(b"\n") >= 5:
            break
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    done = len(read_results(lines))
    assert 5 <= done < 60
    # A kill in the middle of a write leaves half a line.
    with open(lines, "ab") as stream:
        stream.write(b'{"suite": "poi')
    progress: list[str] = []
    summary = play(SeeingPolicy(), SUITE, tmp_path / "killed", episodes=20, processes=1, report=progress.append)
    assert len(progress) == 60 - done
    assert summary["episodes"] == 60
    assert outcomes(tmp_path / "killed") == outcomes(tmp_path / "whole")


def test_processes_of_a_killed_recording_end_too(tmp_path):
    """They hold its standard output, which is at its end when the last of them is gone."""
    script = tmp_path / "recording.py"
    script.write_text(
        "import time\n"
        "from vla_adapter_hf.recording.jobs import process_pool\n"
        "if __name__ == '__main__':\n"
        "    with process_pool(2) as pool:\n"
        "        for job in [pool.submit(print, 'begun', flush=True), *(pool.submit(time.sleep, 600) for _ in "
        "range(2))]:\n"
        "            job.result()\n",
        encoding="utf-8",
    )
    recording = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE)
    assert recording.stdout.readline() == b"begun\n"
    recording.kill()
    assert recording.communicate(timeout=60)[0] == b""


def test_more_episodes_extend_a_run(tmp_path):
    play(SeeingPolicy(), SUITE, tmp_path, episodes=2, processes=0)
    lines: list[str] = []
    summary = play(SeeingPolicy(), SUITE, tmp_path, episodes=4, processes=0, report=lines.append)
    assert (len(lines), summary["episodes"]) == (6, 12)


def test_a_task_or_an_episode_that_is_named_twice_is_played_once(tmp_path):
    summary = play(SeeingPolicy(), SUITE, tmp_path, tasks=[1, 1], episodes=[0, 2, 0], processes=0)
    assert [result.key for result in read_results(tmp_path / "episodes.jsonl")] == [(1, 0), (1, 2)]
    assert summary["episodes"] == 2


def test_a_call_that_plays_nothing_keeps_the_timing_and_says_that_it_films_nothing(tmp_path):
    first = play(SeeingPolicy(), SUITE, tmp_path, episodes=1, processes=0)
    text = (tmp_path / "summary.md").read_text(encoding="utf-8")
    lines: list[str] = []
    again = play(SeeingPolicy(), SUITE, tmp_path, episodes=1, processes=0, rollouts=1, report=lines.append)
    assert again == first and (tmp_path / "summary.md").read_text(encoding="utf-8") == text
    assert len(lines) == 1 and lines[0].startswith("3 episodes were played before")
    assert not (tmp_path / "rollouts").exists()


def test_two_runs_do_not_write_to_one_folder(tmp_path):
    with exclusive_folder(tmp_path), pytest.raises(ValueError, match="another process is writing to output="):
        play(SeeingPolicy(), SUITE, tmp_path, episodes=1, processes=0)
    assert play(SeeingPolicy(), SUITE, tmp_path, episodes=1, processes=0)["episodes"] == 3


def test_a_lock_of_somebody_else_is_not_taken_for_that_of_the_folder(tmp_path):
    with pytest.raises(Timeout), exclusive_folder(tmp_path):
        raise Timeout("a download's")
    with exclusive_folder(tmp_path):  # and the folder is free again
        pass


def test_settings_of_an_attempt_that_played_nothing_bind_nobody(tmp_path):
    with pytest.raises(ValueError, match="fewer than execute=9"):
        play(SeeingPolicy(), SUITE, tmp_path, episodes=1, processes=0, execute=9)
    play(SeeingPolicy(), SUITE, tmp_path, episodes=1, processes=0, execute=4)
    with pytest.raises(ValueError, match="execute=4 there, 5 here"):
        play(SeeingPolicy(), SUITE, tmp_path, episodes=1, processes=0, execute=5)


def test_what_departs_from_the_protocol_stands_over_the_table(tmp_path):
    play(SeeingPolicy(), SUITE, tmp_path, episodes=1, processes=0, execute=2, ensemble=0.1)
    text = (tmp_path / "summary.md").read_text(encoding="utf-8")
    assert "2 actions of each chunk executed, chunks averaged with ensemble=0.1; 3 episodes" in text


def test_replay_of_recorded_actions_ends_as_the_recording_did(tmp_path):
    play(SeeingPolicy(), SUITE, tmp_path / "seen", episodes=3, processes=0, save_actions=True)
    replay = ReplayPolicy.from_folder(tmp_path / "seen" / "actions", "libero")
    play(replay, SUITE, tmp_path / "replayed", episodes=3, processes=0)
    seen, replayed = (read_results(tmp_path / name / "episodes.jsonl") for name in ("seen", "replayed"))
    assert [(r.key, r.steps, r.success) for r in seen] == [(r.key, r.steps, r.success) for r in replayed]
    play(NoopPolicy("libero"), SUITE, tmp_path / "noop", episodes=3, processes=0, save_actions=True)
    other = ReplayPolicy.from_folder(tmp_path / "noop" / "actions", "libero")
    with pytest.raises(ValueError, match="holds another run: actions="):
        play(other, SUITE, tmp_path / "replayed", episodes=3, processes=0)


def test_a_leftover_of_a_killed_run_does_not_break_replay(tmp_path):
    """Older releases left such files; np.load cannot read them, and their names are no numbers."""
    play(SeeingPolicy(), SUITE, tmp_path, tasks=[0], episodes=1, processes=0, save_actions=True)
    (tmp_path / "actions" / ".00-0001.npy").write_bytes(b"half a file")
    replay = ReplayPolicy.from_folder(tmp_path / "actions", "libero")
    assert play(replay, SUITE, tmp_path / "replayed", tasks=[0], episodes=1, processes=0)["successes"] == 1


def children() -> set[psutil.Process]:
    """The processes that this one started, without multiprocessing's resource tracker."""
    every = psutil.Process().children(recursive=True)
    return {child for child in every if "resource_tracker" not in " ".join(child.cmdline())}


@dataclass(frozen=True)
class RefusedSuite(PointSuite):
    def describe(self):
        return {**super().describe(), "seed": "none"}


def test_a_suite_whose_description_is_refused_leaves_no_process_behind(tmp_path):
    before = children()
    with pytest.raises(ValueError, match="invalid literal"):
        play(SeeingPolicy(), RefusedSuite(), tmp_path, episodes=1, processes=1)
    assert children() <= before


@dataclass(frozen=True)
class HalfBrokenSuite(PointSuite):
    """Task 0 fails once the other task's environment is busy for ten minutes."""

    busy: str = ""

    def make(self, task: int):
        if task == 0:
            while not Path(self.busy).exists():
                time.sleep(0.05)
            raise KeyError("the meshes are gone")
        Path(self.busy).touch()
        time.sleep(600)


def test_an_error_of_one_environment_stops_the_others_at_once(tmp_path):
    before = children()
    suite = HalfBrokenSuite(busy=str(tmp_path / "busy"))
    with pytest.raises(RuntimeError, match="the meshes are gone"):
        play(SeeingPolicy(), suite, tmp_path / "run", tasks=[0, 1], episodes=1, processes=2)
    failed = time.monotonic()
    assert children() <= before
    assert time.monotonic() - failed < 1
    assert time.time() - (tmp_path / "busy").stat().st_mtime < 9  # closing politely waits 10 s


def _job(number: int) -> int:
    if number == 0:
        raise ValueError("job 0 fails")
    time.sleep(600)
    return number


def test_an_error_of_one_job_stops_the_others_at_once():
    before, began = children(), time.monotonic()
    with pytest.raises(ValueError, match="job 0 fails"):
        run_jobs(_job, [1, 0], workers=2, minutes=None, finished=lambda outcome, minutes: None)
    assert children() <= before
    assert time.monotonic() - began < 120


@dataclass(frozen=True)
class BuggySuite(PointSuite):
    def make(self, task: int):
        environment = super().make(task)
        environment.step = lambda action, observe=True: np.zeros(3) + np.zeros(2)
        return environment


def test_a_bug_in_an_environments_step_keeps_its_traceback(tmp_path):
    """NumPy raises a ValueError, which before the first step would be taken for the caller's."""
    with pytest.raises(RuntimeError, match="(?s)an environment failed:.*Traceback.*could not be broadcast"):
        play(NoopPolicy("libero"), BuggySuite(), tmp_path, episodes=1, processes=1)


def test_a_full_disk_is_one_sentence_and_keeps_the_finished_episodes(tmp_path):
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full on this system")
    play(SeeingPolicy(), SUITE, tmp_path, tasks=[0], episodes=1, processes=0)
    lines = tmp_path / "episodes.jsonl"
    written = lines.read_bytes()
    results = ResultsFile(tmp_path, json.loads((tmp_path / "settings.json").read_text()))
    lines.unlink()
    lines.symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"^the disk is full: .*episodes.jsonl was not written") as error:
        results.append(results.results[0])
    assert error.value.errno == errno.ENOSPC
    lines.unlink()
    lines.write_bytes(written)
    assert play(SeeingPolicy(), SUITE, tmp_path, tasks=[0], episodes=2, processes=0)["episodes"] == 2


@dataclass(frozen=True)
class BrokenSuite(PointSuite):
    ending: str = ""

    def make(self, task: int):
        if self.ending == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise {"installation": OSError, "bug": KeyError}[self.ending]("the meshes are gone")


@pytest.mark.parametrize(
    ("ending", "error", "message"),
    [
        ("installation", OSError, "^the meshes are gone$"),
        ("bug", RuntimeError, "(?s)Traceback.*in make.*KeyError: 'the meshes are gone'"),
        ("killed", ChildProcessError, "exit code -9.*use fewer processes"),
    ],
)
def test_a_failing_environment_stops_the_run_with_its_reason(tmp_path, ending, error, message):
    with pytest.raises(error, match=message):
        play(SeeingPolicy(), BrokenSuite(ending=ending), tmp_path, episodes=1, processes=1)


def test_films_show_where_a_chunk_begins(tmp_path):
    play(SeeingPolicy(), SUITE, tmp_path, tasks=[1], episodes=2, processes=0, rollouts=1)
    films = sorted(path.name for path in (tmp_path / "rollouts").iterdir())
    assert films == ["01-0000.gif", "01-0000.png"]
    frames = [frame.convert("RGB") for frame in ImageSequence.Iterator(Image.open(tmp_path / "rollouts" / films[0]))]
    result = read_results(tmp_path / "episodes.jsonl")[0]
    assert len(frames) == 1 + result.steps // 4
    marked = [np.abs(np.asarray(frame)[0].mean(axis=0) - (255, 140, 0)).max() < 30 for frame in frames]
    # Frames at 0, 4, 8, ... steps, queries at 0, 8, 16, ...: every second one begins a chunk.
    assert marked == [index % 2 == 0 for index in range(len(frames))]


def test_films_can_be_mp4(tmp_path):
    av = pytest.importorskip("av")
    frames = [(step, np.full((64, 128, 3), 10 * step, dtype=np.uint8)) for step in range(6)]
    path = write_rollout(tmp_path / "a.mp4", draw_rollout(frames, [0, 3], 6, True))
    with av.open(str(path)) as container:
        assert sum(1 for _ in container.decode(video=0)) == 6
    with pytest.raises(ValueError, match="must end in .gif or .mp4"):
        write_rollout(tmp_path / "a.avi", [np.zeros((4, 4, 3), np.uint8)])


@pytest.mark.parametrize("processes", [0, 1])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tasks": [7]}, "tasks must be among 0...2"),
        ({"episodes": 0}, "episodes must be a positive number"),
        ({"processes": -1}, "processes must be 0 or more"),
        ({"rollout_format": "webm"}, "rollout_format must be 'gif' or 'mp4'"),
        ({"rollouts": -1}, "rollouts must be 0 or more"),
        ({"execute": 0}, "execute must be at least 1"),
        ({"instruction": "other"}, "instruction='other' needs a scene with something else to ask for"),
    ],
)
def test_arguments_that_cannot_work_are_named(tmp_path, arguments, message, processes):
    given = {"episodes": 1, "processes": processes, **arguments}
    with pytest.raises(ValueError, match=message):
        play(SeeingPolicy(), SUITE, tmp_path, **given)


@pytest.mark.parametrize(("execute", "grippers"), [(4, [-1, 1, -1]), (2, [-1, 1, -1, 1, -1])])
def test_averaged_chunks_take_a_binary_gripper_from_the_newest_as_the_loop_on_a_robot_does(
    tmp_path, execute, grippers
):
    settings = {"execute": execute, "ensemble": 0.0, "step_limit": execute * len(grippers)}
    play(HesitantPolicy(), SUITE, tmp_path, tasks=[0], episodes=1, processes=0, save_actions=True, **settings)
    actions = np.load(tmp_path / "actions" / "00-0000.npy")
    assert actions[:, -1].tolist() == [gripper for gripper in grippers for _ in range(execute)]
    assert json.loads((tmp_path / "settings.json").read_text())["binary_gripper"] == "of the newest chunk"


def test_placements_are_the_documented_ones():
    assert PLACEMENTS == ("official", "jitter", "shuffle", "both")


class TestDelay:
    """The world goes on while the policy thinks."""

    def actions(self, folder: Path, **settings) -> np.ndarray:
        play(SeeingPolicy(), SUITE, folder, tasks=[0], episodes=1, processes=0, save_actions=True, **settings)
        return np.load(folder / "actions" / "00-0000.npy")

    def test_a_sync_robot_stands_still_during_the_delay_and_then_executes_the_same(self, tmp_path):
        prompt = self.actions(tmp_path / "prompt")
        delayed = self.actions(tmp_path / "delayed", delay=3)
        assert not delayed[:3, :2].any()
        assert np.array_equal(delayed[3 : 3 + min(8, len(prompt))], prompt[:8])

    def test_asynchronous_robots_stand_still_for_the_first_chunk_only(self, tmp_path):
        for strategy in ("async", "async-rolled"):
            actions = self.actions(tmp_path / strategy, delay=2, strategy=strategy, step_limit=60)
            assert not actions[:2, :2].any()
            assert actions[2:10, :2].any(axis=1).any()
        summary = (tmp_path / "async" / "summary.md").read_text()
        assert "delay of 2 steps, async, at most 60 steps" in summary

    @pytest.mark.parametrize("strategy", ["async", "async-rolled"])
    @pytest.mark.parametrize("delay", [2, 5, 12])
    def test_nothing_is_blended_because_a_chunk_is_used_up_when_the_next_one_comes(self, tmp_path, strategy, delay):
        policy = RandomPolicy()
        settings = {"delay": delay, "strategy": strategy, "step_limit": 80, "save_actions": True}
        play(policy, SUITE, tmp_path, tasks=[0], episodes=1, processes=0, **settings)
        executed = np.load(tmp_path / "actions" / "00-0000.npy")[:, :6]
        moves = executed[executed.any(axis=1)]
        assert len(policy.predicted) >= 40
        assert len(moves) >= 20
        assert all((policy.predicted == move).all(axis=1).any() for move in moves)

    def test_the_step_limit_counts_the_delay(self, tmp_path):
        play(NoopPolicy("libero"), SUITE, tmp_path, tasks=[0], episodes=1, processes=0, delay=5, step_limit=12)
        assert read_results(tmp_path / "episodes.jsonl")[0].steps == 12

    def test_other_delays_are_another_run(self, tmp_path):
        play(NoopPolicy("libero"), SUITE, tmp_path, tasks=[0], episodes=1, processes=0, delay=2)
        with pytest.raises(ValueError, match="time"):
            play(NoopPolicy("libero"), SUITE, tmp_path, tasks=[0], episodes=2, processes=0, delay=4)

    def test_a_robot_whose_actions_are_targets_has_no_way_to_stand_still(self, tmp_path):
        with pytest.raises(ValueError, match="delay=2 needs a robot whose actions are changes; the targets of"):
            play(SeeingPolicy(), PointSuite(robot="aloha"), tmp_path, episodes=1, processes=0, delay=2)

    def test_a_delay_below_0_is_refused(self):
        with pytest.raises(ValueError, match="delay must be 0 or more"):
            EvaluationSettings(delay=-1)
