"""`vla-adapter check`: every fault is named, and correct recordings are left alone."""

import json
import os
import re
import shlex
import shutil
from dataclasses import replace

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_fixtures import DEMOS, RLDS, copy_of
from doctor_fixtures import (
    CORRECT,
    ENCODED,
    FAULTS,
    ORIENTATIONS,
    TWO_ARMS,
    edit_frames,
    gripper_of,
    letterboxed,
    make_detour,
    make_recording,
    released,
    smooth_path,
)
from training_fixtures import write_start
from typer.testing import CliRunner

from vla_adapter_cli import app
from vla_adapter_hf.checkpoints.lerobot.convert import to_lerobot
from vla_adapter_hf.cli.train import parse_arguments
from vla_adapter_hf.doctor import check as doctor
from vla_adapter_hf.doctor.check import check, check_recording
from vla_adapter_hf.doctor.copies import check_copies
from vla_adapter_hf.doctor.endings import expected_grips
from vla_adapter_hf.doctor.findings import Finding, Report
from vla_adapter_hf.doctor.frames import blockiness
from vla_adapter_hf.doctor.gripper import check_gripper, describe_gripper, find_grippers
from vla_adapter_hf.doctor.idle import find_idle, without_idle
from vla_adapter_hf.doctor.opening import open_recording
from vla_adapter_hf.doctor.page import as_page
from vla_adapter_hf.doctor.recording import FrameSample, Recording, Window, sample_frames
from vla_adapter_hf.doctor.rotations import ENCODINGS, from_axis_angle, to_axis_angle
from vla_adapter_hf.doctor.semantics import Semantics
from vla_adapter_hf.doctor.settings import CheckSettings, PolicySettings
from vla_adapter_hf.doctor.shapes import empty_borders
from vla_adapter_hf.doctor.suggest import suggest, train_command
from vla_adapter_hf.doctor.timing import check_frame_lag, frame_lag
from vla_adapter_hf.recording.lerobot_writer import LeRobotLayout, assemble, save_episode
from vla_adapter_hf.training.train import train
from vla_adapter_hf.utils.frames import encode_image


QUICK = CheckSettings(windows=8)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VLA_ADAPTER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


@pytest.fixture
def without_plots(monkeypatch):
    """Plots take most of the time of a small check, and are looked at elsewhere."""
    monkeypatch.setattr(doctor, "report_pictures", lambda *_: {})


def needs_frames(fault):
    return any(
        word in fault for word in ("camera", "frame", "upside", "mirrored", "flipped", "BGR", "picture", "scene")
    )


def with_fault(fault, kind, seed):
    """A recording with a fault; without frames where the fault is in the numbers, to be quicker."""
    recording = FAULTS[fault][0](make_recording(kind, seed), np.random.default_rng(1000 + seed))
    return recording if needs_frames(fault) else replace(recording, read_images=None)


def names(report, severity=None):
    return [finding.name for finding in report.findings if severity in (None, finding.severity)]


@pytest.mark.parametrize(
    ("fault", "kind"),
    [(fault, kinds[place % len(kinds)]) for place, (fault, (_, _, kinds)) in enumerate(FAULTS.items())],
)
def test_a_fault_is_named(fault, kind, without_plots):
    report = check_recording(with_fault(fault, kind, seed=1), QUICK)
    assert FAULTS[fault][1] in names(report)


@pytest.mark.parametrize("kind", CORRECT)
def test_a_correct_recording_has_no_finding_of_high_severity(kind, without_plots):
    report = check_recording(make_recording(kind, seed=1), QUICK)
    assert names(report, "high") == []
    assert not [name for name in names(report) if "gripper" in name or "in two ways" in name]
    # A drawn path may hurry until its end.
    assert sum(len(finding.episodes) for finding in report.findings if "in another way" in finding.name) <= 1


def test_large_euler_angles_are_no_sign_that_differs_between_episodes(without_plots):
    """In an episode of this recording one angular velocity goes against the angle that it usually follows."""
    recording = replace(make_recording("zyx", seed=3), read_images=None)
    assert names(check_recording(recording, QUICK), "high") == []


@pytest.mark.parametrize(
    ("kind", "meaning", "frame"),
    [
        ("delta", "delta", "base"),
        ("tool", "delta", "tool"),
        ("velocity", "velocity", "base"),
        ("joints", "absolute", None),
    ],
)
def test_the_meaning_of_actions_is_found(kind, meaning, frame):
    report = check_recording(replace(make_recording(kind, seed=2), read_images=None), QUICK)
    facts = report.facts
    assert facts["actions"]["kind"] == meaning
    assert (len(report.targets) > 0) == (meaning == "absolute")
    assert facts["actions"]["steps from action to motion"] == (1 if meaning == "absolute" else 0)
    if frame is not None:
        assert facts["actions"]["frame"] == frame
        assert facts["actions"]["orientation in the state"] == "axis-angle"


@pytest.mark.parametrize("kind", ENCODED)
def test_the_way_to_write_an_orientation_is_found(kind):
    facts = check_recording(replace(make_recording(kind, seed=2), read_images=None), QUICK).facts
    assert facts["actions"]["kind"] == "delta" and facts["actions"]["frame"] == "base"
    assert facts["actions"]["orientation in the state"] == ENCODED[kind][1]


@pytest.mark.parametrize("kind", [kind for kind in ORIENTATIONS if kind.startswith("target")])
def test_absolute_poses_are_found_however_they_are_written(kind):
    facts = check_recording(replace(make_recording(kind, seed=2), read_images=None), QUICK).facts
    assert (facts["actions"]["kind"], facts["actions"]["steps from action to motion"]) == ("absolute", 1)


def test_the_closed_end_of_the_gripper_is_read_off_the_aperture():
    recording = replace(make_recording("delta", seed=3), read_images=None)
    turned = [np.column_stack([part[:, :6], -part[:, 6]]) for part in recording.actions]
    for actions, closed in ((recording.actions, 1.0), (turned, -1.0)):
        report = check_recording(replace(recording, actions=actions), QUICK)
        assert report.facts["gripper (action 6)"]["command that closes"] == closed
        assert report.suggestion["action_mask"] == [True] * 6 + [False]


def test_an_episode_of_one_step_says_nothing_about_a_lag():
    states = [np.random.default_rng(place).normal(size=(1 if place == 2 else 60, 2)).cumsum(0) for place in range(5)]
    recording = Recording("short", states, states, [["move"]] * 5, list(range(5)), cameras=("front",))
    levels = [np.abs(np.diff(part[:, 0], prepend=0)).cumsum()[:, None, None, None, None] for part in states]
    windows = [Window(place, 0, np.tile(level, (2, 2, 3)), []) for place, level in enumerate(levels)]
    curve = frame_lag(recording, FrameSample(windows=windows), camera=0, max_lag=2)
    assert max(curve, key=curve.get) == 0


def test_idle_steps_in_which_a_gripper_moves_or_the_arm_has_a_command_are_not_left_out():
    """The arm moves two steps after its command, and pushes at the end; the gripper closes while it stands still."""
    actions = np.zeros((60, 2))
    actions[30:50, 0], actions[10:, 1] = 0.1, 1.0
    states = np.concatenate([[0.0], np.cumsum(np.roll(actions[:, 0], 2))[:-1]])[:, None]
    actions[55:57, 0] = 0.1
    recording = Recording("slow", [states], [actions], [["go"]], [0], fps=10.0)
    semantics = Semantics("delta", np.ones(2), np.array([0, -1]), np.ones(2), 2, {}, {}, dims=[0])
    steps = find_idle(recording, semantics, [1], 10.0)
    assert np.flatnonzero(steps.at_gripper[0]).tolist() == [11, 12, 13, 14, 15]
    assert np.flatnonzero(steps.commanded[0]).tolist() == [30, 31, 55, 56]
    left_out = [*range(10), *range(16, 30), 52, 53, 54, 57, 58]
    assert np.flatnonzero(steps.removable[0]).tolist() == left_out
    effect = without_idle(recording, semantics, steps, [1], CheckSettings(chunk_size=4))
    assert effect["can be left out"] == len(left_out) == 29
    assert effect["median steps of an episode"] == "60, then 31"
    assert effect["median action, of a large one"] == "0.00, then 1.00"
    covers = "4 steps of the recording, then 7.7 on average (0.40 s, then 0.77 s)"
    assert effect["a chunk of 4 covers"] == covers


def test_the_report_says_what_leaving_out_idle_steps_would_do(without_plots):
    recording = with_fault("waiting", "delta", seed=1)
    found = check_recording(recording, QUICK).named("many idle steps")
    steps = np.median([len(actions) for actions in recording.actions])
    assert found.evidence["can be left out"] >= 24 * 25
    assert found.evidence["median steps of an episode"] == f"{steps:.0f}, then {steps - 25:.0f}"


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("Put both moka pots on the stove.", 2),
        ("stack the 3 red cubes", 3),
        ("press the button three times", 3),
        ("knock twice", 2),
        ("put the two cubes into the two boxes", None),  # what counts is not clear
        ("put the cube between the two bowls", None),
        ("lift the pot with both hands", None),
        ("open drawer two", None),
        ("open drawer 2 and press the button", None),
        ("put cube 2 in the glass", None),
        ("move 5 cm towards the bowl", None),
        ("wait two seconds", None),
        ("push the red cube", None),
    ],
)
def test_what_an_instruction_counts_is_read_off_its_words(text, count):
    assert expected_grips(text) == count


@pytest.mark.parametrize(("episodes", "found"), [(4, False), (5, True)])
def test_with_fewer_than_five_episodes_of_an_instruction_nothing_is_said_of_their_ends(episodes, found):
    recording = replace(make_recording("delta", seed=1, episodes=episodes), texts=[["push"]] * episodes)
    recording = released(replace(recording, read_images=None), np.random.default_rng(0), {1, 2}, -8)
    assert (check_recording(recording, QUICK).named("one instruction ends in two ways") is not None) == found


def test_an_episode_that_ends_in_another_way_is_shown_over_one_that_ends_as_usual(without_plots):
    recording = released(make_recording("delta", seed=1, episodes=10), np.random.default_rng(0), {4}, -8)
    found = check_recording(recording, QUICK).named("episodes end in another way than the others")
    assert 4 in found.episodes
    assert found.picture.shape == (2 * 164, 2 * 160, 3)


def test_empty_borders_are_measured_in_pixels_and_a_part_in_which_something_moves_is_none(without_plots):
    recording = make_recording("delta", seed=1, episodes=8)

    def sides(change):
        changed = edit_frames(recording, change)
        return empty_borders(changed, sample_frames(changed, QUICK))

    assert sides(lambda frames, *_: frames) == {}
    bars = sides(letterboxed)
    assert bars == {"front": {"top": 4, "bottom": 4}, "wrist": {"top": 4, "bottom": 4}}
    blinking = sides(
        lambda frames, position, step: [
            np.pad(frame[4:], ((4, 0), (0, 0), (0, 0)), constant_values=255 * (step % 9 > 7)) for frame in frames
        ]
    )
    assert blinking == {}


@pytest.mark.parametrize("kind", ["delta", "joints", TWO_ARMS])
@pytest.mark.parametrize("blocky", [False, True])
def test_the_suggested_command_is_one_that_train_takes(kind, blocky):
    recording = make_recording(kind, seed=1, episodes=4)
    gripper = describe_gripper(recording, find_grippers(recording)[0])
    suggestion = suggest(recording, gripper, CheckSettings(), None, blocky, blocky)
    command = shlex.split(train_command("me/data", suggestion, {"state_column": "state"}))
    model, data, training = parse_arguments(command[2:])
    assert command[:2] == ["vla-adapter", "train"] and model.checkpoint == "CHECKPOINT"
    assert (data.dataset, data.state_column, data.chunk_size) == (["me/data"], "state", suggestion["chunk_size"])
    assert command[command.index("--augment") + 1] == "true"
    assert data.augment is True and data.jpeg_round_trip == ("yes" if blocky else "auto")
    assert data.cameras == list(recording.cameras)


@pytest.mark.parametrize("ways", [1, 2])
def test_two_ways_round_an_obstacle_are_found_and_one_way_is_not(ways, without_plots):
    found = check_recording(make_detour(0, ways), QUICK).named("two ways to do one thing")
    assert (found is not None) == (ways == 2)
    assert found is None or found.picture.ndim == 3


def test_frames_that_do_not_follow_the_arm_are_not_said_to_be_late():
    """With 14 state dimensions one of them resembles any frames somewhere, by chance."""
    for seed in range(5, 9):
        rng = np.random.default_rng(seed)
        states = [np.cumsum(rng.normal(size=(60, 14)) * np.exp(rng.normal(0, 1.5, (60, 14))), 0) for _ in range(4)]
        levels = [np.cumsum(np.exp(rng.normal(0, 1.5, 40)))[:, None, None, None, None] for _ in states]
        recording = Recording("unrelated", states, states, [["move"]] * 4, list(range(4)), cameras=("front",))
        windows = [Window(place, 10, np.tile(level, (2, 2, 3)), []) for place, level in enumerate(levels)]
        assert check_frame_lag(recording, FrameSample(windows=windows), QUICK) == []


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["none", *FAULTS])
def test_a_fault_is_named_in_most_tries(fault, without_plots):
    """The table in docs/check_data.md: `pytest -m slow tests/test_doctor.py -k most_tries -s`.

    The environment variable TRIES says how many there are of each fault, 20 by default; there are five times as many
    correct recordings.
    """
    cause, kinds = (None, CORRECT) if fault == "none" else FAULTS[fault][1:]
    count = int(os.environ.get("TRIES", "20")) * (5 if fault == "none" else 1)
    tries = [(kind, seed) for kind in kinds for seed in range(-(-count // len(kinds)))]
    missed = []
    for kind, seed in tries:
        recording = make_recording(kind, seed) if fault == "none" else with_fault(fault, kind, seed)
        report = check_recording(recording, QUICK)
        found = cause in names(report) if cause else names(report, "high") == []
        missed += [] if found else [f"{kind} {seed}: {names(report)}"]
    good = len(tries) - len(missed)
    print(f"\n| {fault} | {good} of {len(tries)} |")
    assert good >= (0.99 if fault == "none" else 0.95) * len(tries), missed


# Real recordings


@pytest.mark.parametrize(
    "folder", [RLDS, DEMOS / "lerobot_v21_video", DEMOS / "lerobot_v30_image"], ids=lambda path: path.name
)
def test_recorded_demonstrations_have_no_finding_of_high_severity(folder, tmp_path):
    report = check(folder, tmp_path / "check", QUICK)
    assert names(report, "high") == []
    assert report.suggestion["robot"] == "libero"
    assert report.suggestion["cameras"] == ["image", "wrist_image"]
    assert report.suggestion["chunk_size"] == 8
    assert "--augment true" in report.command
    assert json.loads((tmp_path / "check" / "report.json").read_text())["dataset"] == report.dataset


def test_the_command_prints_the_report_and_writes_a_page_that_needs_no_other_file(tmp_path):
    output, folder = tmp_path / "check", str(DEMOS / "lerobot_v21_video")
    result = CliRunner().invoke(app, ["check", folder, "--against", folder, "--output", str(output)])
    assert result.exit_code == 0, result.output
    assert "[high] the same episodes in the other dataset" in result.output
    assert "kind: delta" in result.output
    assert "vla-adapter train --checkpoint CHECKPOINT" in result.output
    page = (output / "report.html").read_text()
    assert "saturated action dimensions" in page
    assert page.count("data:image/png;base64,") >= 4
    assert not re.findall(r'(?:src|href)="(?!data:)', page)


def test_late_actions_in_a_lerobot_folder_are_found(tmp_path):
    """By four steps: this arm follows its command one step later, so that its actions come three steps late."""
    folder = copy_of("lerobot_v21_video", tmp_path)
    for path in (folder / "data").rglob("*.parquet"):
        table = pq.read_table(path)
        place = table.schema.get_field_index("action")
        rows = table.column(place).to_pylist()
        late = pa.array([rows[0]] * 4 + rows[:-4], table.schema.field(place).type)
        pq.write_table(table.set_column(place, table.schema.field(place), late), path)
    assert "actions are late" in names(check(folder))


def test_a_copy_of_an_episode_in_another_split_of_a_lerobot_folder_is_found(tmp_path):
    folder = copy_of("lerobot_v21_video", tmp_path)
    first, second = (next((folder / "data").rglob(f"*00000{number}.parquet")) for number in (0, 1))
    table, copied = pq.read_table(second), pq.read_table(first)
    for name in ("observation.state", "action"):
        place = table.schema.get_field_index(name)
        table = table.set_column(place, table.schema.field(place), copied.column(name))
    pq.write_table(table, second)
    assert "duplicate episodes" in names(check(folder))
    info = json.loads((folder / "meta" / "info.json").read_text())
    (folder / "meta" / "info.json").write_text(json.dumps(info | {"splits": {"train": "0:1", "validation": "1:4"}}))
    found = check(folder).named("the same episodes in several splits")
    assert (found.severity, found.episodes) == ("high", [1])


def test_copies_of_episodes_in_another_dataset_are_found_in_any_format_and_without_frames(tmp_path):
    """The same demonstrations in LeRobot's v3.0 and v2.1, one of them changed."""
    other = copy_of("lerobot_v21_video", tmp_path)
    path = next((other / "data").rglob("*000002.parquet"))
    table = pq.read_table(path)
    place = table.schema.get_field_index("action")
    column = table.column(place)
    pq.write_table(
        table.set_column(place, table.schema.field(place), column.take(list(range(len(column)))[::-1])), path
    )
    shutil.rmtree(other / "videos")
    recordings = [open_recording(folder, with_frames=False) for folder in (DEMOS / "lerobot_v30_video", other)]
    (found,) = check_copies(*recordings)
    assert (found.severity, found.episodes) == ("high", [0, 1, 3])
    assert found.evidence["their numbers there"] == [0, 1, 3]


def test_a_dataset_of_another_robot_has_no_copies_to_look_for():
    recording, other = make_recording("delta", episodes=2), make_recording("joints", episodes=2)
    with pytest.raises(ValueError, match="delta robot has 8 values in a state, joints robot has 7"):
        check_copies(recording, other)
    assert check_copies(recording, make_recording("delta", seed=1, episodes=2)) == []


def test_episodes_of_the_other_dataset_that_cannot_be_compared_are_named():
    recording, other = make_recording("delta", episodes=2), make_recording("delta", seed=1, episodes=2)
    unread = replace(
        other, states=[other.states[0], other.states[1][:0]], actions=[other.actions[0], other.actions[1][:0]]
    )
    (found,) = check_copies(recording, unread)
    assert found.name == "episodes of the other dataset cannot be read" and found.evidence["episodes"] == 1
    nothing = replace(other, states=[], actions=[], texts=[], numbers=[], problems=["episode 3: no rows"])
    with pytest.raises(ValueError, match="no episode of delta robot can be read: episode 3: no rows"):
        check_copies(recording, nothing)


def test_gaps_in_the_timestamps_of_a_lerobot_folder_are_found(tmp_path):
    folder = copy_of("lerobot_v21_video", tmp_path)
    path = next((folder / "data").rglob("*000002.parquet"))
    table = pq.read_table(path)
    seconds = table.column("timestamp").to_numpy().copy()
    seconds[20:] += 0.3
    place = table.schema.get_field_index("timestamp")
    pq.write_table(table.set_column(place, table.schema.field(place), pa.array(seconds, pa.float32())), path)
    found = check(folder).named("steps were dropped")
    assert found.episodes == [2]
    assert found.evidence["steps"] == 1


def test_a_preset_that_turns_the_gripper_the_wrong_way_is_found():
    """A recording that closes at -1, read as LIBERO's, which closes at +1."""
    recording = replace(make_recording("delta", seed=3), read_images=None)
    learnt = [np.column_stack([part[:, :6], (1 + part[:, 6]) / 2]) for part in recording.actions]
    report = check_recording(replace(recording, actions=learnt), QUICK, robot="libero")
    assert "the gripper is the wrong way round for robot libero" in names(report, "high")


def test_a_robot_may_be_written_in_capitals(without_plots):
    recording = replace(make_recording("delta", seed=3, episodes=4), read_images=None)
    reports = [check_recording(recording, QUICK, robot=robot) for robot in ("libero", "LIBERO")]
    assert reports[0].suggestion == reports[1].suggestion and names(reports[0]) == names(reports[1])


@pytest.mark.parametrize(("constant", "is_found"), [(0.0, False), (1.0, False), (0.02, True)])
def test_a_gripper_of_0_and_1_may_stay_at_one_end_for_an_episode(constant, is_found):
    recording = make_recording("delta", seed=3, episodes=6)
    actions = [np.column_stack([part[:, :6], (1 - part[:, 6]) / 2]) for part in recording.actions]
    actions[2][:, 6] = constant
    recording = replace(recording, actions=actions)
    found = check_gripper(recording, describe_gripper(recording, 6))
    assert ("the gripper's range differs between episodes" in [finding.name for finding in found]) == is_found


def test_the_suggested_command_runs_as_it_is_and_leaves_a_binary_gripper_unnormalised(tmp_path, processor):
    """A robot without a preset, whose gripper has two values."""
    rng = np.random.default_rng(0)
    layout = LeRobotLayout(("front",), 32, ("x", "y", "opening"), ("x", "y", "gripper"), fps=10)
    for episode in range(4):
        states = np.column_stack([smooth_path(rng, 40, rng.uniform(-1, 1, (3, 2)), np.zeros(2))[:40], np.zeros(40)])
        command, states[:, 2] = gripper_of(rng, 40)
        actions = np.column_stack([np.diff(states[:, :2], axis=0, append=states[-1:, :2]), command])
        frames = [encode_image(rng.integers(0, 255, (32, 32, 3)).astype(np.uint8)) for _ in states]
        numbers = states.astype(np.float32), actions.astype(np.float32)
        save_episode(tmp_path / "data", f"{episode}", layout, "push the cube", {"front": frames}, *numbers)
    assemble(tmp_path / "data")
    report = check(tmp_path / "data", settings=QUICK)
    assert "--action_mask true true false" in report.command
    words = shlex.split(report.command)[2:]
    start, output = write_start(tmp_path / "start", processor), tmp_path / "out"
    words[words.index("CHECKPOINT")], words[words.index("outputs/policy")] = str(start), str(output)
    words[words.index("--validation") + 1] = "1"
    words += ["--preset", "full", "--max_steps", "2", "--use_cpu", "true", "--report_to", "none"]
    train(*parse_arguments([*words, "--picture_episodes", "1"]), report_progress=lambda line: None)
    config = json.loads((output / "config.json").read_text())
    assert config["norm_stats"]["data"]["action"]["mask"] == [True, True, False]
    # The gripper was learnt as -1 and +1. That is neither a fault of this data nor a preset's convention.
    found = check(tmp_path / "data", settings=QUICK, checkpoint=output, policy=PolicySettings(samples=20))
    assert found.verdicts and not found.named("the gripper is written in another way than the policy's")
    with pytest.raises(
        ValueError, match=r"learnt as -1\.\.\.1, and presets convert 0\.\.\.1 only. Give robot as none"
    ):
        to_lerobot(str(output), tmp_path / "lerobot")
    to_lerobot(str(output), tmp_path / "lerobot", robot="none")


# Parts


@pytest.mark.parametrize("name", ENCODINGS)
def test_an_encoding_gives_rotation_matrices(name):
    width, convert = ENCODINGS[name]
    values = np.random.default_rng(0).normal(size=(50, width))
    matrices = convert(values)
    np.testing.assert_allclose(
        matrices @ np.swapaxes(matrices, 1, 2), np.broadcast_to(np.eye(3), (50, 3, 3)), atol=1e-12
    )
    np.testing.assert_allclose(np.linalg.det(matrices), 1.0)


def test_a_turn_survives_the_way_through_matrices():
    turns = np.random.default_rng(0).uniform(-1, 1, (50, 3))
    np.testing.assert_allclose(to_axis_angle(from_axis_angle(turns)), turns, atol=1e-9)


def test_jpeg_leaves_edges_at_every_eighth_pixel():
    from io import BytesIO

    from PIL import Image

    frame = np.load(DEMOS.parent / "libero_spatial_observation.npz")
    frame = next(frame[name] for name in frame.files if frame[name].ndim == 3)
    buffer = BytesIO()
    Image.fromarray(frame).save(buffer, "JPEG", quality=50)
    assert blockiness(np.asarray(Image.open(buffer))) > 1.35 > blockiness(frame[4:, 4:])


def test_text_from_a_dataset_is_escaped_on_the_page():
    evil = "<script>alert(1)</script>"
    finding = Finding(evil, "low", {evil: evil}, evil, evil)
    page = as_page(Report(evil, {evil: {evil: evil}}, [finding], {evil: evil}, evil))
    assert "<script" not in page


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="window_frames=2 is too small; give 8 or more"):
        CheckSettings(window_frames=2)
    with pytest.raises(ValueError, match="fps=0 must be above 0"):
        CheckSettings(fps=0)


def test_a_recording_without_a_readable_episode_is_refused():
    recording = replace(make_recording("delta", episodes=1), states=[np.zeros((0, 8))], actions=[np.zeros((0, 7))])
    with pytest.raises(ValueError, match="no episode can be read"):
        check_recording(recording)
