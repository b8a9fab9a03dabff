"""The commands `eval` and `demonstrate`: what they take, and what they refuse before anything is built."""

import dataclasses

import pytest
from transformers import GPT2Config
from typer.testing import CliRunner

from vla_adapter_cli import app, load_command
from vla_adapter_hf.cli.options import parse_numbers
from vla_adapter_hf.recording.demonstrate import Driver
from vla_adapter_hf.recording.episodes import plan_episode
from vla_adapter_hf.recording.settings import RecordingSettings
from vla_adapter_hf.simulation.settings import EvaluationSettings


@pytest.mark.parametrize(
    ("text", "numbers"), [("3", [3]), ("40-49", list(range(40, 50))), ("0, 2,5-7", [0, 2, 5, 6, 7]), ("7-7", [7])]
)
def test_numbers_and_ranges(text, numbers):
    assert parse_numbers(text, "--tasks") == numbers


@pytest.mark.parametrize("text", ["", "a", "1-", "-1", "9-7", "1;2", "1,,2"])
def test_what_is_no_range_is_refused(text):
    with pytest.raises(ValueError, match="--episodes must hold numbers and ranges"):
        parse_numbers(text, "--episodes")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eval"], "give either --checkpoint or --policy"),
        (["eval", "--policy", "oracle", "--checkpoint", "x"], "give either --checkpoint or --policy"),
        (["eval", "--policy", "orakel"], "--policy must be embedded, oracle or noop"),
        (["eval", "--policy", "noop", "--episodes", "49-40"], "--episodes must hold numbers and ranges"),
        (["eval", "--policy", "noop", "--suite", "libero_cubes"], "suite must be one of"),
        (["eval", "--policy", "noop", "--suite", "libero_90", "--placement", "shuffle"], "only has 'official'"),
        (
            ["eval", "--policy", "oracle", "--suite", "libero_goal"],
            "--policy oracle solves --suite libero_object only",
        ),
        (["eval", "--policy", "noop", "--suite", "libero_90", "--instruction", "other"], "--instruction other is for"),
        (["eval", "--policy", "noop", "--placement", "jitter", "--seed", "-1"], "seed must be 0 or more, got -1"),
        (["eval", "--policy", "noop", "--execute", "0"], "execute must be at least 1"),
        (["eval", "--policy", "noop", "--delay", "soon"], "--delay must hold numbers and ranges"),
        (["eval", "--policy", "noop", "--delay", "0,4", "--strategy", "late"], "strategy must be one of sync,"),
        (["eval", "--policy", "noop", "--strategy", "sync,async", "--execute", "4"], "--execute 4 is for sync"),
        (["scores", "nowhere", "--output", "x"], "--output x is for evaluations with several delays"),
        (["eval", "--policy", "embedded", "--dtype", "float8"], "dtype must be one of float32"),
        (["eval", "--policy", "embedded", "--device", "gpu"], "device must be cpu, cuda or the like, got 'gpu'"),
        (["eval", "--policy", "embedded", "--device", "cuda:99"], "torch finds"),
        (["demonstrate", "--output", "x", "--seed", "-1"], "seed must be at least 0, got -1"),
        (["demonstrate", "--output", "x", "--image-size", "0"], "image_size must be at least 1"),
        (["demonstrate", "--output", "x", "--states", "40-60"], "states must name initial states 0...49"),
        (["demonstrate", "--output", "x", "--render-every", "3"], "render_every must divide 20"),
        (["demonstrate", "--output", "x", "--suite", "libero_goal"], "has no scripted expert"),
        (
            ["demonstrate", "--output", "x", "--driver", "y", "--driver-share", "0"],
            "driver_share is a share of chunks",
        ),
    ],
)
def test_commands_name_what_is_wrong(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    assert message in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("command", "settings"), [("eval", EvaluationSettings), ("demonstrate", RecordingSettings)])
def test_every_setting_is_an_option(command, settings):
    options = {word for option in load_command(command).params for word in option.opts}
    assert {"--" + field.name.replace("_", "-") for field in dataclasses.fields(settings)} <= options


def test_a_checkpoint_that_cannot_drive_is_refused(tmp_path):
    def describe(checkpoint: str, suite: str = "libero_object", chunk_size: int = 8) -> dict:
        return Driver(checkpoint, 0.7, None, suite, chunk_size, 1).load().describe()

    assert describe("embedded")["share"] == 0.7
    with pytest.raises(ValueError, match="predicts 8 actions, the recording's chunk_size is 4"):
        describe("embedded", chunk_size=4)
    with pytest.raises(ValueError, match="libero_spatial"):
        describe("embedded", "libero_spatial")
    with pytest.raises(ValueError, match="'oracle' is no checkpoint"):
        describe("oracle")
    GPT2Config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="it is not a VLA-Adapter"):
        describe(str(tmp_path))


def test_every_driver_has_episodes_of_its_own():
    settings, objects = RecordingSettings(retargeted=0.5), [f"object_{index}" for index in range(6)]

    def targets(driver: str) -> list[str | None]:
        return [plan_episode("both", 0, number, objects, settings, driver).target for number in range(60)]

    drawn = [targets(driver) for driver in ("", "by_whole", "by_corrected")]
    assert drawn == [targets(driver) for driver in ("", "by_whole", "by_corrected")]
    assert drawn[0] != drawn[1] != drawn[2] != drawn[0]
