"""The command line: how fast it answers, how options are written, and what an error looks like."""

import os
import subprocess
import sys
from importlib.resources import files

import data_fixtures
import pytest
import typer
from torch.utils.data import DataLoader
from typer.testing import CliRunner

from vla_adapter_cli import COMMANDS, app
from vla_adapter_hf.cli.command import in_option_words, readable_errors, spread_lists
from vla_adapter_hf.data import BadEpisode, BadEpisodeError, VLAAdapterDataset
from vla_adapter_hf.training.arguments import DataArguments


def run(*words, **options):
    return CliRunner().invoke(app, list(map(str, words)), prog_name="vla-adapter", **options)


# The overview


def test_help_and_version_take_less_than_a_second_of_processor_time():
    """They import neither torch nor transformers, which takes seconds."""
    for option, expected in (("--help", "Examples:"), ("--version", "vla-adapter-hf ")):
        program = f"from vla_adapter_cli import app; app(['{option}'])"
        before = os.times()
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        after = os.times()
        assert expected in done.stdout
        assert after.children_user + after.children_system - before.children_user - before.children_system < 1


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name):
    result = run(name, "--help")
    assert result.exit_code == 0
    assert result.stdout.lower().startswith(f"usage: vla-adapter {name} ")


def test_a_misspelt_command_is_one_line_with_the_right_one():
    result = run("statz")
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    assert "Did you mean 'stats'?" in result.stderr


# How options are written


@pytest.mark.parametrize(
    "words",
    [
        ["--cameras", "a", "b"],
        ["--cameras", "a", "--cameras", "b"],
        ["--cameras", "a,b"],
        ["--cameras=a", "--cameras=b"],
    ],
)
def test_cameras_are_given_in_the_same_ways_to_every_command(words, monkeypatch, tmp_path):
    """To stop each command where it has read its options: no such dataset, checkpoint or base."""
    from vla_adapter_hf.cli import checkpoints, data, train

    seen = {}

    def note(name):
        def record(*args, **kwargs):
            seen[name] = kwargs.get("cameras") or next(arg.cameras for arg in args if isinstance(arg, DataArguments))
            raise ValueError("enough")

        return record

    monkeypatch.setattr(checkpoints, "init_pretrained", note("init"))
    monkeypatch.setattr(data, "plot_checkpoint", note("plot"))
    run("init", tmp_path / "start", *words)
    run("plot", "checkpoint", "dataset", *words)
    required = ["--checkpoint", "c", "--dataset", "d", "--output_dir", str(tmp_path)]
    seen["train"] = train.parse_arguments([*required, *words])[1].cameras
    assert seen == dict.fromkeys(("init", "plot", "train"), ["a", "b"])


def test_only_lists_take_several_words():
    assert spread_lists(["x", "--cameras", "a", "b", "--robot", "r", "y"], {"--cameras"}) == [
        *("x", "--cameras", "a", "--cameras", "b", "--robot", "r", "y")
    ]
    assert spread_lists(["--cameras", "a", "--", "b"], {"--cameras"}) == ["--cameras", "a", "--", "b"]


def test_options_are_written_with_dashes_or_underscores():
    for words in (["--on-bad-episode", "never"], ["--on_bad_episode", "never"]):
        result = run("stats", data_fixtures.DEMOS / "lerobot_v30_image", *words)
        assert "never" in result.stderr and result.exit_code == 1


# Errors


def test_a_bad_value_is_one_line():
    result = run("plot", "c", "d", "--episodes", "many")
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1 and "Invalid value for '--episodes'" in result.stderr


def test_a_bad_value_for_train_is_one_line_and_not_the_list_of_all_arguments(tmp_path):
    result = run("train", "--checkpoint", "c", "--dataset", "d", "--output_dir", tmp_path, "--max_steps", "many")
    assert result.exit_code == 1
    assert result.stderr.strip().splitlines()[-1].startswith("error: argument --max_steps")
    assert result.stderr.count("\n") == 1


DEMOS = data_fixtures.DEMOS / "lerobot_v30_image"
EMBEDDED = files("vla_adapter_hf") / "embedded" / "checkpoint"


def test_chunks_longer_than_the_episodes_name_the_options_that_help(tmp_path):
    words = ["--checkpoint", EMBEDDED, "--dataset", DEMOS, "--robot", "libero", "--output_dir", tmp_path / "out"]
    result = run("train", *words, "--chunk_size", 100, "--preset", "frozen")
    assert result.exit_code == 1
    assert "give --chunk_size 20 or less, or --pad_chunks true" in result.stderr
    assert "--on_bad_episode skip" in result.stderr


def test_a_robot_of_another_size_names_the_command_that_adapts_a_checkpoint():
    result = run("plot", EMBEDDED, DEMOS, "--action_column", "observation.state")
    assert result.exit_code == 1
    assert "has action_dim=8" in result.stderr and "has action_dim=7" in result.stderr
    assert "vla-adapter train --checkpoint" in result.stderr


def test_cameras_of_a_picture_must_be_in_the_checkpoints_order():
    result = run("plot", EMBEDDED, DEMOS, "--robot", "libero", "--cameras", "wrist_image", "image")
    assert result.exit_code == 1
    assert "Give --cameras image wrist_image." in result.stderr


def test_statistics_take_the_column_options_of_training_and_show_names():
    usual = run("stats", DEMOS, "--robot", "libero").stdout
    assert "action axis_angle1" in usual and "proprio gripper_l" in usual
    swapped = run("stats", DEMOS, "--action_column", "observation.state", "--state-column", "action").stdout
    assert "action gripper_l" in swapped and "proprio axis_angle1" in swapped


def broken() -> None:
    """A command with a bug."""
    None + 1  # noqa: B018


def refused() -> None:
    """A command that gets what it cannot use."""
    VLAAdapterDataset.from_lerobot(data_fixtures.DEMOS / "lerobot_v30_image", ["image"], chunk_size=0)


def test_a_bug_keeps_its_traceback_and_what_a_user_can_fix_is_one_line(capsys):
    with pytest.raises(TypeError), readable_errors():
        broken()
    with pytest.raises(typer.Exit), readable_errors(["chunk_size"]):
        refused()
    assert capsys.readouterr().err == "error: --chunk_size 0; expected a positive number of actions\n"
    with pytest.raises(ValueError, match="chunk_size=0"), readable_errors(debug=True):
        refused()


def test_what_a_worker_found_damaged_is_one_line(capsys):
    dataset = VLAAdapterDataset.from_lerobot(DEMOS, ["image"], chunk_size=4, image_transform=failing)
    with pytest.raises(typer.Exit), readable_errors():
        next(iter(DataLoader(dataset, num_workers=1)))
    printed = capsys.readouterr().err  # libraries may warn on the same stream
    assert "Traceback" not in printed
    (line,) = [line for line in printed.splitlines() if line.startswith("error")]
    assert line.endswith("the frame is damaged.")


def failing(images, epoch, index):
    raise BadEpisodeError("the dataset", BadEpisode(0, index, "the frame is damaged"))


def test_debug_shows_the_traceback_of_what_a_user_can_fix():
    words = ["stats", "nowhere"]
    assert run(*words).exception.code == 1
    for result in (run("--debug", *words), run(*words, env={"VLA_ADAPTER_DEBUG": "1"})):
        assert isinstance(result.exception, ValueError)


@pytest.mark.parametrize(
    "message, expected",
    [
        ("give pad_chunks=True.", "give --pad_chunks true."),
        ('pass on_bad_episode="skip"', "pass --on_bad_episode skip"),
        ("Give cameras=[...], third", "Give --cameras ..., third"),
        ("cameras=['a', 'b'] names", "--cameras a b names"),
        ("give state_column=<full column name>", "give --state_column <full column name>"),
        ("chunk_size=None", "--chunk_size None"),
        ("my_cameras=3 and other=4", "my_cameras=3 and other=4"),
    ],
)
def test_messages_speak_of_options(message, expected):
    assert (
        in_option_words(message, ["pad_chunks", "on_bad_episode", "cameras", "state_column", "chunk_size"]) == expected
    )


@pytest.mark.parametrize(
    "imports, given, expected",
    [
        ("vla_adapter_hf", {}, "passive 0 True None None"),
        ("vla_adapter_hf", {"OMP_WAIT_POLICY": "active"}, "active None False active None"),
        ("vla_adapter_hf", {"OMP_WAIT_POLICY": "passive"}, "passive None True passive None"),
        ("vla_adapter_hf", {"GOMP_SPINCOUNT": "300000"}, "None 300000 False None 300000"),
        # OpenMP has read its settings, so the environment must not claim something else.
        ("torch, vla_adapter_hf", {}, "None None False None None"),
    ],
)
def test_threads_wait_passively_unless_torch_was_imported_before_or_the_user_says_otherwise(imports, given, expected):
    """Every command and `python -m vla_adapter_hf.cli` import the package before torch.

    Other programs that are measured get the variables as the user has set them.
    """
    variables = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    program = (
        f"import os, {imports}; from vla_adapter_hf.utils.devices import waits_passively; "
        "from vla_adapter_hf._passive_waiting import users_environment; "
        f"print(*map(os.environ.get, {variables}), waits_passively(), *map(users_environment().get, {variables}))"
    )
    environment = {name: value for name, value in os.environ.items() if name not in variables} | given
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == expected


def test_the_overview_of_commands_does_not_import_torch():
    program = "import sys, vla_adapter_cli; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]
