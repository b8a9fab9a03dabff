"""Recording without the simulator: jobs, settings, and folders that belong to one recording."""

import multiprocessing
import os

import pytest
from simulator import need_simulator

from vla_adapter_hf.recording import demonstrate as recorder
from vla_adapter_hf.recording.demonstrate import demonstrate, failed_episodes
from vla_adapter_hf.recording.jobs import check_settings, in_turns, run_jobs
from vla_adapter_hf.recording.lerobot_writer import PARTS, saved_episodes
from vla_adapter_hf.recording.scenes import record_scenes
from vla_adapter_hf.recording.settings import EpisodeSettings, RecordingSettings, SceneSettings
from vla_adapter_hf.utils.files import exclusive_folder


def silent(line: str) -> None:
    """No progress."""


def test_jobs_go_round_the_tasks_in_batches():
    waiting = {0: [1, 2, 3], 1: [4], 2: []}
    assert list(in_turns(waiting, 2)) == [(0, (1, 2)), (1, (4,)), (0, (3,))]
    assert not list(in_turns({}, 2))


def _square(number: int) -> int:
    return number**2


def test_jobs_run_in_processes_and_no_new_one_begins_after_the_given_minutes():
    outcomes: list[int] = []
    run_jobs(_square, [3, 4, 5], 1, None, lambda outcome, minutes: outcomes.append(outcome))
    assert outcomes == [9, 16, 25]
    outcomes.clear()
    run_jobs(_square, [3, 4, 5], 1, 0.0, lambda outcome, minutes: outcomes.append(outcome))
    assert outcomes == [9]


def test_a_folder_is_extended_with_equal_settings_only(tmp_path):
    path = tmp_path / "settings.json"
    for _ in range(2):
        check_settings(path, {"states": (0, 1), "seed": 0}, "it was begun with", "name another folder")
    with pytest.raises(
        ValueError, match=r"^it was begun with states=\[0, 1\] and not \[0, 2\]; name another folder\.$"
    ):
        check_settings(path, {"states": (0, 2), "seed": 0}, "it was begun with", "name another folder")


def test_how_many_episodes_and_on_how_many_processes_does_not_bind_a_recording():
    described = RecordingSettings(jitter=3, workers=4, tasks=[2], driver="embedded").describe()
    assert described == EpisodeSettings().describe()
    assert RecordingSettings(seed=1).describe() != described


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"suite": "libero_goal"}, "suite='libero_goal' has no scripted expert"),
        ({"jitter": -1}, "jitter must be at least 0, got -1"),
        ({"workers": 0}, "workers must be at least 1, got 0"),
        ({"driver_share": 1.5}, "driver_share is a share of chunks, over 0 and at most 1, got 1.5"),
        ({"states": (50,)}, r"states must name initial states 0...49, got \(50,\)"),
    ],
)
def test_settings_that_cannot_work_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        RecordingSettings(**arguments)


def _hold(folder: str, held: multiprocessing.Event, done: multiprocessing.Event) -> None:
    with exclusive_folder(folder):
        held.set()
        done.wait()


@pytest.mark.simulator
def test_a_folder_takes_one_recording_at_a_time(tmp_path):
    need_simulator()
    spawn = multiprocessing.get_context("spawn")
    held, done = spawn.Event(), spawn.Event()
    other = spawn.Process(target=_hold, args=(str(tmp_path), held, done))
    other.start()
    held.wait(timeout=120)
    try:
        for record in (
            lambda: demonstrate(tmp_path, RecordingSettings(), silent),
            lambda: record_scenes(tmp_path, SceneSettings(1), silent),
        ):
            with pytest.raises(ValueError, match="another process is writing to output="):
                record()
        assert os.listdir(tmp_path) == [".lock"]
    finally:
        done.set()
        other.join()


def test_leftovers_of_a_killed_recording_are_no_episodes(tmp_path):
    parts = tmp_path / PARTS
    parts.mkdir()
    for name in ("00000-00-official.parquet", ".00001-00-official.parquet"):
        (parts / name).write_bytes(b"")
    for name in ("00002-00-official.failed", ".00003-00-official.failed"):
        (parts / name).write_bytes(b"")
    assert saved_episodes(tmp_path) == ["00000-00-official"]
    assert failed_episodes(tmp_path) == ["00002-00-official"]


def test_every_driver_has_a_name_without_hyphens():
    driver = recorder.Driver.from_settings(RecordingSettings(driver="someone/a-policy"))
    assert driver.name == "by_a_policy"
