"""All checks of a dataset, and the files of their report."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from vla_adapter_hf.doctor.conflicts import check_conflicts
from vla_adapter_hf.doctor.consistency import check_consistency
from vla_adapter_hf.doctor.copies import check_copies, check_duplicates
from vla_adapter_hf.doctor.endings import check_endings, describe_endings, find_endings
from vla_adapter_hf.doctor.episodes import check_episodes, check_listening
from vla_adapter_hf.doctor.findings import Finding, Report
from vla_adapter_hf.doctor.frames import blockiness_by_camera, check_frames
from vla_adapter_hf.doctor.gripper import (
    Gripper,
    check_gripper,
    check_preset_gripper,
    describe_gripper,
    find_grippers,
)
from vla_adapter_hf.doctor.idle import IdleSteps, check_idle, find_idle, without_idle
from vla_adapter_hf.doctor.opening import open_recording
from vla_adapter_hf.doctor.orientations import check_orientations
from vla_adapter_hf.doctor.page import write_page
from vla_adapter_hf.doctor.pictures import report_pictures
from vla_adapter_hf.doctor.policy import check_policy
from vla_adapter_hf.doctor.ranges import check_ranges, clipping_cost
from vla_adapter_hf.doctor.recording import FrameSample, Recording, sample_frames
from vla_adapter_hf.doctor.semantics import Semantics, absolute_targets, check_semantics, find_semantics
from vla_adapter_hf.doctor.settings import CheckSettings, PolicySettings
from vla_adapter_hf.doctor.shapes import check_shapes, describe_shapes, empty_borders
from vla_adapter_hf.doctor.suggest import suggest, train_command
from vla_adapter_hf.doctor.timing import check_dropped_steps, check_frame_lag, check_timestamps
from vla_adapter_hf.robots import get_robot
from vla_adapter_hf.utils.files import write_json


def check(
    dataset: str | os.PathLike,
    output: str | os.PathLike | None = None,
    settings: CheckSettings | None = None,
    format: str = "auto",
    robot: str | None = None,
    against: str | os.PathLike | None = None,
    checkpoint: str | os.PathLike | None = None,
    policy: PolicySettings | None = None,
    report_progress: Callable[[str], None] = lambda line: None,
    **options: Any,
) -> Report:
    """Check a dataset and write `report.json` and `report.html`.

    Args:
        dataset: folder or Hub id of demonstrations.
        output: folder for the report; None writes nothing.
        settings: how much is read, and where findings begin.
        format, robot: as of `load_demonstrations`. Without a robot, actions are judged as they were recorded.
        against: folder or Hub id of another dataset, such as the one for validation, that should not have the same
            episodes. It is read with the same options, except for `name`, `revision` and `cameras`.
        checkpoint: folder or Hub id of a policy that is asked about the demonstrations; None asks none.
        policy: how it is asked.
        report_progress: called with a line of text before each part.
        options: `cameras`, column names, `name` and `revision` as of `from_lerobot`, `from_rlds` or `from_dataset`.

    Raises:
        ValueError: what the reader refuses, a dataset without a readable episode, a checkpoint that cannot be opened,
            and a dataset to compare with that has no readable episode, or states or actions of another size.
        TypeError: an option that the format of the other dataset does not have.
    """
    settings = settings or CheckSettings()
    report_progress("Reading states and actions")
    recording = open_recording(dataset, format, robot, **options)
    copies = [] if against is None else _compare(recording, against, format, robot, options)
    columns = {key: value for key, value in options.items() if key.endswith("_column") and isinstance(value, str)}
    report = check_recording(recording, settings, robot, report_progress)
    report.add(copies)
    report.command = train_command(os.fspath(dataset), report.suggestion, columns)
    if checkpoint is not None:
        reading = {"format": format, "robot": robot, **options}
        check_policy(report, checkpoint, dataset, policy or PolicySettings(), report_progress, **reading)
    if output is not None:
        folder = Path(output)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "report.json", report.to_dict())
        write_page(folder / "report.html", report)
    return report


def _compare(
    recording: Recording, against: str | os.PathLike, format: str, robot: str | None, options: dict[str, Any]
) -> list[Finding]:
    """Findings about episodes that another dataset has too. Its frames are not read."""
    reading = {key: value for key, value in options.items() if key not in ("name", "revision", "cameras")}
    return check_copies(recording, open_recording(against, format, robot, with_frames=False, **reading))


def check_recording(
    recording: Recording,
    settings: CheckSettings | None = None,
    robot: str | None = None,
    report_progress: Callable[[str], None] = lambda line: None,
) -> Report:
    """Run all checks on a recording.

    Raises:
        ValueError: no episode can be read, or no preset is called `robot`.
    """
    settings = settings or CheckSettings()
    robot = None if robot is None else get_robot(robot).name
    report = Report(recording.name)
    if not any(len(actions) for actions in recording.actions):
        problem = f": {recording.problems[0]}" if recording.problems else ""
        raise ValueError(f"{recording.name}: no episode can be read{problem}")
    recording = _without_empty(recording)
    chunk_size = settings.chunk_for(settings.fps or recording.fps)
    report_progress("Reading a sample of frames")
    sample = sample_frames(recording, settings)
    report_progress("Comparing actions, states and frames")
    grippers = find_grippers(recording)
    described = [describe_gripper(recording, dim) for dim in grippers]
    semantics = find_semantics(recording, settings, grippers)
    report.add([*check_episodes(recording, chunk_size), *check_duplicates(recording)])
    report.add(check_listening(recording, sample))
    report.add(check_ranges(recording, grippers))
    report.add(check_orientations(recording))
    consistent = []
    for gripper in described:
        found = check_gripper(recording, gripper)
        report.add([*found, *check_preset_gripper(recording, gripper, robot)])
        consistent += [] if any(finding.severity == "high" for finding in found) else [gripper]
    endings = find_endings(recording, consistent) if recording.consecutive else []
    report.add(check_endings(recording, endings))
    report.add(check_timestamps(recording, settings))
    borders = empty_borders(recording, sample)
    report.add([*check_frames(recording, sample), *check_shapes(sample, borders)])
    idle = find_idle(recording, semantics, grippers, settings.fps or recording.fps)
    effect = without_idle(recording, semantics, idle, grippers, settings) if recording.consecutive else {}
    if recording.consecutive:
        report.targets = absolute_targets(semantics)
        report.add(check_semantics(recording, semantics, settings))
        report.add(check_dropped_steps(recording, semantics))
        report.add(_without_consequences(report, check_consistency(recording, semantics, settings)))
        report.add(check_idle(idle.share, effect))
        report.add(check_frame_lag(recording, sample, settings))
        report.add(check_conflicts(recording, sample, semantics, chunk_size))
    report.facts = _facts(recording, semantics, described, sample, idle)
    report.facts["without idle steps"] = effect
    report.facts["starts and ends"] = describe_endings(endings)
    wide_bounds = report.named("q01 and q99 cut off motion") is not None
    blocky = report.named("frames were JPEG before they were stored") is not None
    gripper = described[0] if len(described) == 1 else None
    report.suggestion = suggest(recording, gripper, settings, robot, wide_bounds, blocky)
    report.pictures = report_pictures(recording, sample, semantics)
    return report


# A finding, and another that follows from it.
_CONSEQUENCES = {
    "units of the state differ between episodes": "units differ between episodes",
    "steps were dropped": "the lag between action and motion differs between episodes",
}


def _without_consequences(report: Report, findings: list[Finding]) -> list[Finding]:
    """The findings that do not follow from what the report has already."""
    explained = {effect for cause, effect in _CONSEQUENCES.items() if report.named(cause)}
    return [finding for finding in findings if finding.name not in explained]


def _without_empty(recording: Recording) -> Recording:
    """The recording without episodes that have no steps; their frames are read at their old positions."""
    kept = [position for position, actions in enumerate(recording.actions) if len(actions)]
    if len(kept) == len(recording.actions):
        return recording
    read = recording.read_images
    return Recording(
        **{
            **vars(recording),
            **{
                name: [getattr(recording, name)[place] for place in kept]
                for name in ("states", "actions", "texts", "numbers")
            },
            "splits": None if recording.splits is None else [recording.splits[place] for place in kept],
            "timestamps": None if recording.timestamps is None else [recording.timestamps[place] for place in kept],
            "read_images": None if read is None else lambda position, step: read(kept[position], step),
        }
    )


def _facts(
    recording: Recording, semantics: Semantics, grippers: list[Gripper], sample: FrameSample, idle: IdleSteps
) -> dict[str, dict[str, Any]]:
    lengths = np.array([len(actions) for actions in recording.actions])
    actions = recording.all_actions
    facts: dict[str, dict[str, Any]] = {
        "recording": {
            "episodes": len(lengths),
            "steps": int(lengths.sum()),
            "steps per episode": f"{lengths.min()} to {lengths.max()}, median {np.median(lengths):.0f}",
            "steps per second": recording.fps,
            "instructions": len({text for texts in recording.texts for text in texts}),
            "share of idle steps": idle.share,
            "rows are consecutive steps": recording.consecutive,
        },
        "actions": {
            "kind": semantics.kind,
            "R² of each explanation": semantics.alternatives,
            "steps from action to motion": semantics.lag,
            "frame": semantics.frame,
            "orientation in the state": semantics.encoding or "cannot be decided",
        },
    }
    if not recording.consecutive:
        facts["actions"] = {"kind": "not looked at: rows are not consecutive control steps"}
    for gripper in grippers:
        facts[f"gripper ({recording.action_name(gripper.dim)})"] = {
            "kind": "two values" if gripper.binary else "continuous",
            "from, to": [gripper.low, gripper.high],
            "command that closes": "cannot be decided" if gripper.closed is None else gripper.closed,
            "aperture": None if gripper.aperture is None else recording.state_name(gripper.aperture),
        }
    lost = clipping_cost(actions)
    facts["action dimensions"] = {
        recording.action_name(dim): {
            "explained by": "nothing"
            if semantics.state_dims[dim] < 0
            else recording.state_name(semantics.state_dims[dim]),
            "R²": semantics.r2[dim],
            "per state": semantics.slopes[dim],
            "q01, q99": np.quantile(actions[:, dim], [0.01, 0.99]),
            "min, max": [actions[:, dim].min(), actions[:, dim].max()],
            "share lost by clipping": lost[dim],
        }
        for dim in range(actions.shape[1])
    }
    facts["cameras"] = describe_shapes(sample)
    facts["frames"] = {
        "stored as JPEG": recording.frames_are_jpeg,
        "edges at every eighth pixel": blockiness_by_camera(recording, sample),
    }
    return facts
