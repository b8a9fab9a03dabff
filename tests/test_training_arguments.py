"""What a YAML file of `vla-adapter train` may say and what it means; several processes."""

import pytest

from vla_adapter_hf.training.arguments import parse_arguments


@pytest.fixture
def parse(tmp_path):
    """`parse(text)`: the arguments of a file that holds the required ones and `text`."""

    def parse(text: str):
        file = tmp_path / "run.yaml"
        file.write_text(f"checkpoint: c\ndataset: d\noutput_dir: {tmp_path}\n{text}\n")
        return parse_arguments([str(file)])

    return parse


@pytest.mark.parametrize("text, meaning", [("yes", "yes"), ("no", "no"), ("auto", "auto"), ('"no"', "no")])
def test_a_bare_yes_or_no_for_the_jpeg_round_trip_is_yes_or_no(parse, text, meaning):
    _, data, _ = parse(f"jpeg_round_trip: {text}")
    assert data.jpeg_round_trip == meaning


def test_a_name_without_a_value_leaves_the_default(parse):
    _, data, training = parse("robot:\ncameras:\nlearning_rate:")
    assert (data.robot, data.cameras, training.learning_rate) == (None, None, 2e-4)


def test_a_mapping_reaches_the_training_arguments_as_one(parse):
    _, _, training = parse("lr_scheduler_type: cosine_with_min_lr\nlr_scheduler_kwargs: {min_lr_rate: 0.1}")
    assert training.lr_scheduler_kwargs == {"min_lr_rate": 0.1}


def test_a_single_dataset_or_camera_needs_no_list(parse):
    _, data, _ = parse("cameras: front")
    assert (data.dataset, data.cameras) == (["d"], ["front"])


def test_processes_that_do_not_find_one_another_are_refused(parse, monkeypatch):
    """As under torchrun without an accelerator and without --use_cpu: both would write the same folder."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes were started .* groups of 1. .* --use_cpu true"):
        parse("")
