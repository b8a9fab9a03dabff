"""`vla-adapter check --checkpoint`: whether a policy looks, listens and leans on the state, and what it expects."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
from data_fixtures import DEMOS
from model_fixtures import FIXTURES, learner_config
from probe_fixtures import INSTRUCTIONS, train_policy, write_dataset, write_start
from typer.testing import CliRunner

from vla_adapter_cli import app
from vla_adapter_hf.checkpoints.embedded import embedded_folder
from vla_adapter_hf.data import ImageResize, load_demonstrations
from vla_adapter_hf.doctor.check import check
from vla_adapter_hf.doctor.expectations import check_gripper_convention, check_statistics, choose_key
from vla_adapter_hf.doctor.findings import Report
from vla_adapter_hf.doctor.judgement import judge
from vla_adapter_hf.doctor.measuring import Hold, measure_policy
from vla_adapter_hf.doctor.policy import _choose_episodes, check_policy
from vla_adapter_hf.doctor.settings import PolicySettings
from vla_adapter_hf.doctor.verdicts import Estimate, answer, carrying_cameras, ratio
from vla_adapter_hf.training.arguments import DataArguments
from vla_adapter_hf.training.demonstrations import load_data
from vla_adapter_hf.training.looking import mean_action_error
from vla_adapter_hf.training.probing import MEAN, OTHER_FRAMES, Probe, choose_samples
from vla_adapter_hf.training.resuming import keep_arguments


HELD_OUT = FIXTURES / "held_out"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VLA_ADAPTER_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Frames, instruction and state decide one action each."""
    return write_dataset(tmp_path_factory.mktemp("probe") / "data", episodes=12)


def probe_of(folder, samples=48):
    data = load_demonstrations(folder, cameras=["front", "wrist"], chunk_size=1, image_transform=ImageResize(28))
    return choose_samples([data], samples)


def side(image):
    """Which half of the top is brighter: -1, 0 or 1."""
    gap = image[:14, 14:].mean() - image[:14, :14].mean()
    return float(np.sign(gap) if abs(gap) > 50 else 0)


def perfect(samples):
    """What `write_dataset` records, read off the inputs."""
    return np.array(
        [
            [[0.8 * side(sample["images"][0]), 0.8 if "up" in sample["text"] else -0.8, sample["state"][0]]]
            for sample in samples
        ]
    )


def without(dimension):
    """A policy that predicts 0 in one dimension: without the input that decides it."""

    def predict(samples):
        actions = perfect(samples)
        actions[..., dimension] = 0.0
        return actions

    return predict


def mean_of(probe):
    return Hold(probe.actions[:, 0].mean(0), {})


def answers(predict, folder, **options):
    probe = probe_of(folder, **options)
    report = Report("test")
    measured = measure_policy(probe, predict, ["front", "wrist"], mean_of(probe), np.ones(3))
    measured.action_names = ["by_frames", "by_instruction", "by_state"]
    judge(report, measured)
    return {verdict.question: verdict.answer for verdict in report.verdicts}, report


@pytest.fixture(scope="module")
def policy(dataset, processor, tmp_path_factory):
    """The output of a training that held four of twelve episodes out and has not learnt anything yet."""
    folder = tmp_path_factory.mktemp("policy")
    words = ("--validation", 4, "--seed", 3)
    return train_policy(write_start(folder / "start", processor), dataset, folder / "out", 1, *words)


# Verdicts from predictions


def test_a_policy_that_uses_every_input_is_said_to(dataset):
    found, report = answers(perfect, dataset)
    assert found == {
        "better than the mean action": "yes",
        "looks": "yes",
        "which camera carries": "front",
        "listens": "yes",
        "leans on the state": "no",
    }
    assert [finding.name for finding in report.findings] == ["a camera is not used"]


def test_a_policy_without_frames_is_said_not_to_look_and_to_lean_on_the_state(dataset):
    found, report = answers(without(0), dataset)
    assert (found["looks"], found["listens"], found["leans on the state"]) == ("no", "yes", "yes")
    assert found["which camera carries"] == "none"
    assert report.named("the policy does not look").severity == "high"


def test_a_policy_without_words_is_said_not_to_listen(dataset):
    found, report = answers(without(1), dataset)
    assert (found["looks"], found["listens"]) == ("yes", "no")
    assert report.named("the policy does not listen").severity == "high"


def test_a_policy_that_looks_a_little_is_said_to(dataset):
    found, _ = answers(lambda samples: 0.08 * perfect(samples) + 0.92 * without(0)(samples), dataset)
    assert found["looks"] == "a little"


def test_with_one_instruction_nothing_is_said_about_listening(tmp_path):
    folder = write_dataset(tmp_path / "data", episodes=6, instructions=INSTRUCTIONS[:1])
    found, report = answers(perfect, folder)
    assert found["listens"] == "cannot be decided"
    assert not report.named("the policy does not listen")
    assert "other instruction" not in {row["condition"] for row in next(iter(report.tables.values()))}


def test_the_mean_action_is_said_to_be_no_policy(dataset):
    mean = probe_of(dataset).actions.mean(0)
    found, report = answers(lambda samples: np.broadcast_to(mean, (len(samples), *mean.shape)), dataset)
    assert (found["better than the mean action"], found["looks"], found["listens"]) == ("no", "no", "no")
    assert report.named("the policy is hardly better than the mean action").severity == "high"


@pytest.mark.parametrize(
    ("turn", "name"),
    [
        (lambda images: [image[:, ::-1] for image in images], "frames look mirrored to the policy"),
        (lambda images: images[::-1], "cameras are in another order than the policy's"),
    ],
)
def test_frames_that_fit_the_policy_better_after_a_change_are_named(dataset, turn, name):
    def trained_on_others(samples):
        return perfect([sample | {"images": turn(sample["images"])} for sample in samples])

    _, report = answers(trained_on_others, dataset)
    assert report.named(name).severity == "high"
    _, report = answers(perfect, dataset)
    assert not report.named(name)


def test_errors_are_in_the_robots_units_by_dimension_and_for_first_and_other_actions(dataset):
    probe = probe_of(dataset)
    measured = measure_policy(
        probe, lambda samples: probe.actions + np.array([0.1, -0.2, 0.0]), ["front", "wrist"], mean_of(probe),
        np.ones(3),
    )  # fmt: skip
    own = measured.errors["as it is"]
    np.testing.assert_allclose(own.first.mean(0), [0.1, 0.2, 0.0], atol=1e-9)
    np.testing.assert_allclose(own.signed.mean(0), [0.1, -0.2, 0.0], atol=1e-9)


def test_samples_are_swapped_with_those_of_other_episodes_at_the_same_time_and_with_the_same_instruction(dataset):
    probe = probe_of(dataset)
    assert (probe.episodes[probe.partners] != probe.episodes).all()
    assert [probe.samples[partner]["text"] for partner in probe.partners] == [one["text"] for one in probe.samples]
    np.testing.assert_allclose(probe.times[probe.partners], probe.times)
    assert all(text != sample["text"] for text, sample in zip(probe.instructions, probe.samples, strict=True))
    swapped = probe.with_other_frames()
    assert all(
        one["images"] is probe.samples[partner]["images"] and one["state"] is sample["state"]
        for one, partner, sample in zip(swapped, probe.partners, probe.samples, strict=True)
    )


def test_a_policy_that_reads_only_the_time_off_the_frames_is_said_not_to_look(dataset):
    """Its frames tell how far the episode is, and nothing else."""
    probe = probe_of(dataset)
    when = {id(sample["images"]): time for sample, time in zip(probe.samples, probe.times, strict=True)}
    samples = [
        sample | {"actions": np.full((1, 3), time)} for sample, time in zip(probe.samples, probe.times, strict=True)
    ]
    probe = replace(probe, samples=samples)

    def by_the_clock(samples):
        return np.array([[[when.get(id(sample["images"]), 0.0)] * 3] for sample in samples])

    measured = measure_policy(probe, by_the_clock, ["front", "wrist"], mean_of(probe), np.ones(3))
    assert measured.errors[OTHER_FRAMES].total.mean() < 1e-6
    assert measured.errors[MEAN].total.mean() > 0.2


def test_the_error_of_the_mean_action_counts_every_real_action_once_as_the_loss_does():
    """One chunk is all recorded, and one runs past the end of its episode after its first action."""
    stats = {"min": [-1.0], "max": [1.0], "q01": [-1.0], "q99": [1.0], "mean": [0.0], "mask": [True]}
    config = learner_config(
        action_dim=1, proprio_dim=1, norm_stats={"data": {"action": stats, "proprio": stats}}, norm_type="bounds_q99"
    )
    chunks = np.full((4, 1), 0.2), np.full((4, 1), 0.7)
    is_pad = np.zeros(4, bool), np.array([False, True, True, True])
    samples = [
        {"text": "go", "unnorm_key": "data", "actions": chunk, "action_is_pad": pad}
        for chunk, pad in zip(chunks, is_pad, strict=True)
    ]
    probe = Probe(samples, np.arange(2), np.zeros(2), np.array([1, 0]), [None, None])
    assert mean_action_error(probe, config) == pytest.approx((4 * 0.2 + 0.7) / 5, abs=1e-3)


@pytest.mark.parametrize("episodes", [1, 2, 4])
def test_with_fewer_than_five_episodes_nothing_is_decided_and_their_number_is_named(episodes, tmp_path):
    folder = write_dataset(tmp_path / "data", episodes=episodes)
    for predict in (perfect, without(0)):
        found, report = answers(predict, folder)
        assert set(found.values()) == {"cannot be decided"}
        assert report.findings == []
    assert f"{episodes} episode" in report.verdicts[0].reason and "5 are needed" in report.verdicts[0].reason


def test_the_verdicts_name_the_number_of_episodes(dataset):
    _, report = answers(perfect, dataset)
    assert all(verdict.reason.endswith("; 12 episodes") for verdict in report.verdicts)


def test_fewer_samples_than_five_episodes_need_are_refused():
    with pytest.raises(ValueError, match="samples=19 is too small; give 20 or more"):
        PolicySettings(samples=19)


@pytest.mark.parametrize(
    ("gained", "said"),
    [
        (Estimate(0.5, 0.4, 0.6), "yes"),
        (Estimate(0.1, 0.05, 0.15), "a little"),
        (Estimate(0.01, -0.03, 0.05), "no"),
        (Estimate(0.15, -0.1, 0.4), "cannot be decided"),
    ],
)
def test_the_rule_from_numbers_to_words(gained, said):
    assert answer(gained) == said


def test_a_camera_with_less_than_half_of_the_gain_does_not_carry():
    gains = {"a": Estimate(0.2, 0.1, 0.3), "b": Estimate(0.5, 0.4, 0.6), "c": Estimate(0.4, 0.3, 0.5)}
    assert carrying_cameras(gains) == ["b", "c"]


def test_the_interval_comes_from_whole_episodes():
    """Ten equal samples of an episode say no more than one: the interval stays as wide."""
    rng = np.random.default_rng(0)
    above = rng.uniform(0, 1, 12)
    few = ratio(above, np.ones(12), np.arange(12))
    many = ratio(above.repeat(10), np.ones(120), np.arange(12).repeat(10))
    assert many.high - many.low == pytest.approx(few.high - few.low, rel=0.1)


# Absolute targets: the state and a small motion


@pytest.fixture(scope="module")
def joints():
    """Samples of four joints; the frames show where they go next, or their states say it (`by_state`)."""

    def make(by_state=False):
        rng, samples = np.random.default_rng(0), []
        for place in range(96):
            state = rng.uniform(-1, 1, 4)
            way = ways_of(state) if by_state else rng.choice([-1.0, 1.0], 4)
            actions = state + 0.04 * np.arange(1, 9)[:, None] * way + rng.normal(0, 0.01, (8, 4))
            images = [np.concatenate([way, [place]])[None, None]]
            samples.append({"images": images, "text": "go", "state": state, "actions": actions,
                            "action_is_pad": np.zeros(8, bool)})  # fmt: skip
        episodes = np.repeat(np.arange(12), 8)
        partners = np.roll(np.arange(96), 8)
        return Probe(samples, episodes, np.tile(np.linspace(0, 1, 8), 12), partners, [None] * 96)

    return make


def ways_of(state):
    return np.sign(np.sin(20 * state))


def answers_of_joints(probe, policy):
    states = np.stack([sample["state"] for sample in probe.samples])
    hold = Hold.fit(probe.actions[:, 0], states, {dim: dim for dim in range(4)})
    steps = np.arange(1, 9)[:, None]

    def predict(samples):
        return np.stack([policy(sample["state"], sample["images"][0][0, 0], steps) for sample in samples])

    measured = measure_policy(probe, predict, ["front"], hold, np.ones(4))
    measured.action_names = list("abcd")
    report = Report("test")
    judge(report, measured)
    return {verdict.question: verdict.answer for verdict in report.verdicts}, report


def test_an_absolute_policy_that_stands_still_is_said_to_be_no_policy(joints):
    found, report = answers_of_joints(joints(), lambda state, image, steps: np.tile(state, (8, 1)))
    assert found["better than holding the state"] == "no"
    assert report.named("the policy is hardly better than holding the state").severity == "high"
    rows = {row["condition"] for row in next(iter(report.tables.values()))}
    assert {"mean action", "hold the state"} <= rows


def test_an_absolute_policy_that_takes_its_motion_from_the_frames_does_not_lean_on_the_state(joints):
    found, report = answers_of_joints(joints(), lambda state, image, steps: state + 0.04 * steps * image[:4])
    assert (found["better than holding the state"], found["looks"], found["leans on the state"]) == (
        "yes",
        "yes",
        "no",
    )
    assert report.findings == []


def test_an_absolute_policy_that_reads_its_targets_off_the_frames_does_not_lean_on_the_state(joints):
    probe = joints()
    found, _ = answers_of_joints(probe, lambda state, image, steps: probe.actions[int(image[4])])
    assert found["leans on the state"] == "no"


def test_an_absolute_policy_that_takes_its_motion_from_the_state_leans_on_it(joints):
    found, _ = answers_of_joints(
        joints(by_state=True), lambda state, image, steps: state + 0.04 * steps * ways_of(state)
    )
    assert (found["looks"], found["leans on the state"]) == ("no", "yes")


def test_holding_the_state_knows_other_units():
    states = np.random.default_rng(0).uniform(-1, 1, (100, 2))
    hold = Hold.fit(np.column_stack([np.ones(100), np.degrees(states[:, 0]) + 5]), states, {1: 0})
    np.testing.assert_allclose(hold.actions([{"state": np.array([0.5, 9])}]), [[[1, np.degrees(0.5) + 5]]])


# What a checkpoint expects


def statistics(low, high):
    low, high = np.asarray(low, float), np.asarray(high, float)
    part = {"q01": low, "q99": high, "min": low, "max": high}
    return {"action": part, "proprio": part}


def data_findings(values, norm_stats, key="mine"):
    low, high = np.quantile(values, [0.01, 0.99], axis=0)
    names = [f"joint {dim}" for dim in range(values.shape[1])]
    found = check_statistics(
        norm_stats, key, statistics(low, high), {"action": values, "proprio": values},
        {"action": names, "proprio": names},
    )  # fmt: skip
    return {finding.name: finding for finding in found}


def test_statistics_are_compared_with_the_data():
    values = np.random.default_rng(0).uniform(-1, 1, (500, 3))
    mine = statistics([-1] * 3, [1] * 3)
    assert data_findings(values, {"mine": mine}) == {}
    assert "states are in other units than the policy's" in data_findings(values * 1000, {"mine": mine})
    degrees = data_findings(np.degrees(values), {"mine": mine})["actions are in other units than the policy's"]
    assert degrees.evidence["guess"] == "degrees and radians"
    shifted = data_findings(values + [0, 0, 1.5], {"mine": mine})
    assert list(shifted["states lie outside the range that the policy knows"].evidence["share outside"]) == ["joint 2"]


@pytest.mark.parametrize(
    ("learnt", "here", "is_found"),
    [
        ((0, 1), (0, 1), False),
        ((0, 1), (-1, 1), True),
        ((-1, 1), (-1, 1), False),
        ((-1, 1), (0, 1), True),
        ((-1, 1), (1, 1), False),
    ],
)
def test_a_gripper_is_compared_with_the_range_that_the_policy_learnt(learnt, here, is_found):
    stats = {"min": [learnt[0]], "max": [learnt[1]], "mask": [False]}
    found = check_gripper_convention(stats, np.resize(np.array(here, float), (40, 1)))
    assert [finding.severity for finding in found] == ["high"] * is_found


def test_a_wrong_unnorm_key_is_named_and_the_best_one_is_chosen():
    values = np.random.default_rng(0).uniform(-1, 1, (500, 3))
    norm_stats = {"mine": statistics([-1] * 3, [1] * 3), "other": statistics([0, 3, -9], [0.5, 4, -5])}
    found = data_findings(values, norm_stats, key="other")["other statistics of the checkpoint fit better"]
    assert found.severity == "high" and found.evidence["fits better"] == "mine"
    assert choose_key(norm_stats, None, norm_stats["mine"], "not there") == "mine"
    assert choose_key(norm_stats, "other", norm_stats["mine"], "mine") == "other"


def test_data_that_does_not_fit_the_policy_is_a_finding(dataset):
    with embedded_folder() as folder:
        report = check(dataset, checkpoint=folder / "checkpoint", policy=PolicySettings(samples=20))
    assert report.named("the data does not fit the policy").severity == "high"
    assert report.verdicts == []


def test_a_robot_is_also_that_of_a_checkpoint_in_the_published_layout(published_pro):
    """Its cameras are then those of the preset, which the dataset does not have."""
    report = Report("test")
    check_policy(report, published_pro, DEMOS / "lerobot_v30_image", PolicySettings(), robot="calvin")
    assert "rgb_static" in report.named("the data does not fit the policy").evidence["problem"]


def test_on_the_data_of_its_training_a_policy_is_asked_about_the_episodes_that_were_held_out(policy, dataset):
    training = load_demonstrations(dataset, cameras=["front", "wrist"], chunk_size=2)
    held_out = training.split_by_episode(4, 3)[1].episode_indices
    data, whose, findings = _choose_episodes(training, PolicySettings(), policy, "data")
    assert (data.episode_indices, whose, findings) == (held_out, "those that its training held out", [])
    asked = _choose_episodes(training, PolicySettings(episodes=[1]), policy, "data")
    assert asked[0].episode_indices == [1]
    other = _choose_episodes(training, PolicySettings(), policy, None)
    assert other[0].episode_indices == list(range(12)) and not other[2]
    (policy / "_arguments.json").unlink()
    _, _, (seen,) = _choose_episodes(training, PolicySettings(), policy, "data")
    assert seen.name == "the policy was trained on these episodes"


@pytest.mark.parametrize(
    "options", [{"pad_chunks": True}, {"on_bad_episode": "skip"}, {"split": "train"}], ids=lambda option: [*option][0]
)
def test_the_held_out_episodes_are_those_of_the_training_however_it_read_the_data(options, tmp_path):
    """Episode 3 is too short for a chunk unless chunks are padded, and one split has fewer episodes than the data."""
    folder = write_dataset(tmp_path / "data", episodes=12, short=3)
    info = json.loads((folder / "meta" / "info.json").read_text())
    (folder / "meta" / "info.json").write_text(json.dumps(info | {"splits": {"train": "0:9", "test": "9:12"}}))
    if "split" in options:
        options = options | {"on_bad_episode": "skip"}
    arguments = DataArguments([str(folder)], cameras=["front", "wrist"], chunk_size=2, validation=4, **options)
    demonstrations = load_data(arguments, learner_config(), seed=3)
    keep_arguments({}, demonstrations.held_out, None, tmp_path)
    data = load_demonstrations(folder, cameras=["front", "wrist"], chunk_size=2, on_bad_episode="skip")
    chosen, whose, _ = _choose_episodes(data, PolicySettings(), tmp_path, "data")
    assert whose == "those that its training held out"
    assert not set(chosen.episode_indices) & set(demonstrations.train.episode_indices)
    assert set(chosen.episode_indices) == set(demonstrations.validation.episode_indices) - {3}


# Real policies


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recorded", "looks", "listens"),
    [({}, "yes", "yes"), ({"blind": True}, "no", "yes"), ({"instructions": INSTRUCTIONS[:1]}, "yes", "no")],
    ids=["everything", "frames of other steps", "one instruction"],
)
def test_a_trained_policy_is_said_to_use_what_it_could_learn_from(recorded, looks, listens, processor, tmp_path):
    """Blind: trained on frames that say nothing. Deaf: trained with one instruction. Asked on episodes with both."""
    start = write_start(tmp_path / "start", processor)
    demonstrations = write_dataset(tmp_path / "train", **recorded)
    checked = ("--validation", 4, "--check_every", 25)
    policy = train_policy(start, demonstrations, tmp_path / "policy", 150, *checked)
    held_out = write_dataset(tmp_path / "held_out", seed=1, episodes=12)
    report = check(held_out, checkpoint=policy)
    found = {verdict.question: verdict.answer for verdict in report.verdicts}
    assert (found["looks"], found["listens"]) == (looks, listens)
    assert report.facts["policy"]["of episodes"] == "all in the dataset"
    assert (report.named("the policy does not look") is not None) == (looks == "no")
    assert (report.named("the policy does not listen") is not None) == (listens == "no")


def test_the_embedded_policy_is_said_to_look_and_listen(tmp_path):
    output = tmp_path / "check"
    words = ["check", HELD_OUT, "--checkpoint", "embedded", "--robot", "libero", "--samples", 40, "--output", output]
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    assert "looks: yes" in result.output and "listens: yes" in result.output
    report = json.loads((output / "report.json").read_text())
    found = {verdict["question"]: verdict["answer"] for verdict in report["verdicts"]}
    assert found["better than the mean action"] == "yes" and found["leans on the state"] == "no"
    assert not [finding for finding in report["findings"] if finding["severity"] == "high"]
    page = (output / "report.html").read_text()
    assert "Where the policy looks" in page
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
