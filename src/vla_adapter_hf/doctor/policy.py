"""`vla-adapter check --checkpoint`: what a policy's predictions on recorded samples say about it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vla_adapter_hf.checkpoints.open import open_checkpoint
from vla_adapter_hf.data import ImageResize, VLAAdapterDataset, load_demonstrations
from vla_adapter_hf.doctor.expectations import (
    check_conventions,
    check_gripper_convention,
    check_statistics,
    choose_key,
)
from vla_adapter_hf.doctor.findings import Finding, Report
from vla_adapter_hf.doctor.judgement import judge
from vla_adapter_hf.doctor.measuring import Hold, make_predict, measure_policy
from vla_adapter_hf.doctor.policy_pictures import policy_pictures
from vla_adapter_hf.doctor.settings import PolicySettings
from vla_adapter_hf.modeling.normalization_vla_adapter import select_norm_stats
from vla_adapter_hf.training.demonstrations import check_camera_order
from vla_adapter_hf.training.probing import choose_samples
from vla_adapter_hf.training.resuming import ARGUMENTS, HELD_OUT
from vla_adapter_hf.utils.devices import check_device


def check_policy(
    report: Report,
    checkpoint: str | os.PathLike,
    dataset: str | os.PathLike,
    settings: PolicySettings,
    report_progress: Callable[[str], None] = lambda line: None,
    **reading: Any,
) -> None:
    """Add what a checkpoint predicts on a dataset to a report: verdicts, tables, findings and pictures.

    Data that the checkpoint cannot read, such as a state of another size, is a finding, and nothing is predicted.

    Args:
        report: of the dataset; is added to.
        checkpoint: folder or Hub id, also an exported one.
        dataset: folder or Hub id of demonstrations, best those that the policy was not trained on.
        settings: how many samples, which statistics.
        report_progress: called with a line of text before each part.
        reading: `format`, `robot`, `cameras` and the readers' options, as of `load_demonstrations`. The robot is also
            that of a checkpoint in the published layout.

    Raises:
        FileNotFoundError, ValueError: the checkpoint cannot be opened, or has no such `unnorm_key`.
    """
    check_device(settings.device)
    reading = {name: value for name, value in reading.items() if value is not None}
    opened = open_checkpoint(checkpoint, default_robot=reading.get("robot"))
    config = opened.config
    cameras = reading.pop("cameras", None) or list(config.cameras)
    try:
        data = load_demonstrations(
            dataset,
            cameras=cameras,
            chunk_size=config.chunk_size,
            on_bad_episode="skip",
            image_transform=ImageResize.from_model_config(config),
            **reading,
        )
        check_camera_order(data.camera_names, config, str(checkpoint))
        _check_sizes(data, config)
    except ValueError as error:
        report.add([_does_not_fit(error)])
        report.facts["policy"] = {"checkpoint": os.fspath(checkpoint), "predictions": "none: the data does not fit"}
        return
    statistics = data.norm_stats[data.unnorm_key]
    key, used = select_norm_stats(
        config.norm_stats, choose_key(config.norm_stats or {}, settings.unnorm_key, statistics, data.unnorm_key)
    )
    table = data.source.table
    report.add(_compare(config, data, key, statistics))
    data, whose, seen = _choose_episodes(data, settings, Path(checkpoint), key if _is_same(used, statistics) else None)
    report.add(seen)
    report_progress(f"Loading {checkpoint}")
    model, processor = opened.load_model(settings.dtype, settings.device), opened.load_processor()
    probe = choose_samples([data], settings.samples, settings.seed)
    predict = make_predict(model, processor, key, settings.batch_size)
    scale = _scale(statistics["action"])
    hold = Hold.fit(table.learnt_actions, table.states, report.targets)
    measured = measure_policy(probe, predict, list(data.camera_names), hold, scale, report_progress)
    measured.action_names = list(config.action_names or data.action_names or [])
    if len(measured.action_names) != config.action_dim:
        measured.action_names = [f"action {dim}" for dim in range(config.action_dim)]
    measured.facts = {
        "checkpoint": os.fspath(checkpoint),
        "statistics": key,
        "samples": len(probe.samples),
        "episodes": len(np.unique(probe.episodes)),
        "of episodes": whose,
    }
    judge(report, measured)
    report_progress("Drawing what the policy predicts")
    report.pictures = policy_pictures(measured, model, processor, key) | report.pictures


def _is_same(used: Mapping[str, Any], statistics: Mapping[str, Any]) -> bool:
    """Whether two sets of statistics are of the same dataset."""
    return all(
        np.allclose(used[part][name], statistics[part][name], rtol=1e-5, atol=1e-7)
        for part in ("action", "proprio")
        for name in ("min", "max", "mean")
        if name in used[part]
    )


def _choose_episodes(
    data: VLAAdapterDataset, settings: PolicySettings, checkpoint: Path, key: str | None
) -> tuple[VLAAdapterDataset, str, list[Finding]]:
    """The episodes to ask about, which ones they are, and a finding if the policy was trained on them.

    A training writes into its output folder which episodes it held out.

    Args:
        key: of the policy's statistics, if they are those of this dataset; else None.
    """
    if settings.episodes is not None:
        return data.select_episodes(settings.episodes, data.image_transform), "as asked for", []
    if key is None:
        return data, "all in the dataset", []
    kept = next((path for path in (checkpoint / ARGUMENTS, checkpoint.parent / ARGUMENTS) if path.is_file()), None)
    arguments = {} if kept is None else json.loads(kept.read_text(encoding="utf-8"))
    held_out = set(arguments.get(HELD_OUT, {}).get(key, ())) & set(data.episode_indices)
    if held_out:
        return data.select_episodes(held_out, data.image_transform), "those that its training held out", []
    seen = Finding(
        "the policy was trained on these episodes",
        "medium",
        {"statistics": "those of this dataset"},
        "It may know them by heart: the errors say nothing about new episodes.",
        "Check it on other demonstrations, or name with --episodes those that its training held out.",
    )
    return data, "all in the dataset, which its training saw", [seen]


def _does_not_fit(error: ValueError) -> Finding:
    return Finding(
        "the data does not fit the policy",
        "high",
        {"problem": str(error)},
        "The policy cannot be asked about this data, and would not run on this robot.",
        "Name the cameras in the policy's order, give the robot preset of the recording, or train a policy for it.",
    )


def _check_sizes(data: VLAAdapterDataset, config: Any) -> None:
    for name, found in (("action_dim", data.action_dim), ("proprio_dim", data.state_dim)):
        if found != getattr(config, name):
            raise ValueError(f"the data has {name}={found}, the policy {name}={getattr(config, name)}")


def _compare(config: Any, data: VLAAdapterDataset, key: str, statistics: dict[str, Any]) -> list[Finding]:
    """Findings about the checkpoint's statistics and conventions against the data."""
    table = data.source.table
    actions, states = table.learnt_actions.astype(np.float64), table.states.astype(np.float64)
    names = {
        "action": list(data.action_names or [f"action {dim}" for dim in range(actions.shape[1])]),
        "proprio": list(data.state_names or [f"state {dim}" for dim in range(states.shape[1])]),
    }
    for part, size in (("action", actions.shape[1]), ("proprio", states.shape[1])):
        if len(names[part]) != size:
            names[part] = [f"{'state' if part == 'proprio' else part} {dim}" for dim in range(size)]
    frames = data.select_episodes(data.episode_indices[:1])[0]["images"]
    sizes = {name: frame.shape[:2] for name, frame in zip(data.camera_names, frames, strict=True)}
    return [
        *check_statistics(config.norm_stats, key, statistics, {"action": actions, "proprio": states}, names),
        *check_gripper_convention(config.norm_stats[key]["action"], actions),
        *check_conventions(config, data, data.source.frames_are_jpeg(), sizes),
    ]


def _scale(stats: Mapping[str, Any]) -> np.ndarray:
    """(A,): half the range from q01 to q99, 1 for dimensions that are not normalised, 0 for constant ones."""
    low, high = np.asarray(stats["q01"]), np.asarray(stats["q99"])
    scale = np.where(np.asarray(stats["mask"], bool), (high - low) / 2, 1.0)
    span = np.asarray(stats["max"]) - np.asarray(stats["min"])
    return np.where(span > 1e-9, np.maximum(scale, 1e-3 * span), 0.0)
