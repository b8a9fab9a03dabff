"""Verdicts, tables and findings from the errors of a policy."""

from __future__ import annotations

from typing import Any

import numpy as np

from vla_adapter_hf.doctor.findings import Finding, Report, Verdict
from vla_adapter_hf.doctor.frames import CHANGES
from vla_adapter_hf.doctor.measuring import CAMERAS_SWAPPED, HOLD, Measured
from vla_adapter_hf.doctor.verdicts import (
    CLEAR,
    LEAST_EPISODES,
    NOTHING,
    Errors,
    Estimate,
    answer,
    carrying_cameras,
    gain,
    ratio,
)
from vla_adapter_hf.training.probing import AS_IS, MEAN, OTHER_FRAMES, OTHER_INSTRUCTION, OTHER_STATE


PARTS_OF_EPISODE = 5
BETTER = {MEAN: "better than the mean action", HOLD: "better than holding the state"}
RULE = (
    "Yes, a little or no follow from the share of the error that the right input takes away, compared with a wrong "
    f"one: no if it may be as small as {NOTHING:.0%} and is surely below {CLEAR:.0%}, a little below {CLEAR:.0%}, yes "
    "from there on. In brackets its 95 % interval, from drawing whole episodes with replacement. With fewer than "
    f"{LEAST_EPISODES} episodes nothing is decided. A policy leans on the state if the right state takes "
    "away that much, and more than twice as much as the right frames. Where actions are absolute targets, holding the "
    "state is a prediction that needs no policy, and with another state only the motion from there is compared."
)


def judge(report: Report, measured: Measured) -> None:
    """Add verdicts, tables and findings about a policy to a report."""
    gains = {
        name: gain(measured.errors[AS_IS], errors, measured.probe.episodes)
        for name, errors in measured.errors.items()
        if name != AS_IS
    }
    report.facts["policy"] = measured.facts
    report.verdicts = _verdicts(measured, gains)
    report.rule = RULE
    report.tables |= {
        "Error under each condition, % of the mean action's error": _conditions(measured),
        "Error by dimension, in the robot's units": _dimensions(measured),
        "Error over the episode, % of the mean action's error": _over_time(measured),
    }
    answers = {verdict.question: verdict.answer for verdict in report.verdicts}
    report.add(_findings(measured, gains, answers))
    report.add(_turned(measured))
    report.add(_drift(measured))


def _verdicts(measured: Measured, gains: dict[str, Estimate]) -> list[Verdict]:
    """Looks, which camera, listens, leans on the state, better than the mean."""
    words = {
        "looks": (OTHER_FRAMES, "the right frames take away {} of the error"),
        "listens": (OTHER_INSTRUCTION, "the right instruction takes away {} of the error"),
        BETTER[measured.baseline]: (
            measured.baseline,
            f"the policy takes away {{}} of the error of '{measured.baseline}'",
        ),
    }
    found, episodes = {}, len(np.unique(measured.probe.episodes))
    is_enough = episodes >= LEAST_EPISODES
    count = f"{episodes} episode{'s' if episodes > 1 else ''}"
    if not is_enough:
        count += f", and {LEAST_EPISODES} are needed"
    for question, (condition, text) in words.items():
        if condition in gains:
            found[question] = Verdict(question, answer(gains[condition]), f"{text.format(gains[condition])}; {count}")
        else:
            reason = "the samples have one instruction only, so there is no other to ask for"
            found[question] = Verdict(question, "cannot be decided", reason)
    state, frames = gains[OTHER_STATE], gains[OTHER_FRAMES]
    leans = answer(state)
    if leans != "cannot be decided":
        leans = "yes" if leans == "yes" and state.value > 2 * frames.value else "no"
    question = "leans on the state"
    found[question] = Verdict(question, leans, f"the right state takes away {state} of the error; {count}")
    black = {camera: gains[f"black {camera}"] for camera in measured.cameras}
    carrying = carrying_cameras(black)
    detail = "; ".join(f"{name} takes away {gained} of the error with black frames" for name, gained in black.items())
    found["carries"] = Verdict(
        "which camera carries",
        (" and ".join(carrying) or "none") if is_enough else "cannot be decided",
        f"{detail}; {count}",
    )
    return [found[name] for name in (BETTER[measured.baseline], "looks", "carries", "listens",
                                     "leans on the state")]  # fmt: skip


def _conditions(measured: Measured) -> list[dict[str, Any]]:
    """A row for each condition: the error as a share of that of the mean action."""
    mean = measured.errors[MEAN]
    rows = []
    for name, errors in measured.errors.items():
        share = ratio(errors.total, mean.total, measured.probe.episodes)
        rows.append(
            {
                "condition": name,
                "chunk, %": round(100 * share.value, 1),
                "95 % interval": [round(100 * share.low, 1), round(100 * share.high, 1)]
                if np.isfinite(share.high)
                else "too few episodes",
                "first action": round(100 * _share(errors.first, mean.first, measured.scale), 1),
                "other actions": round(100 * _share(errors.rest, mean.rest, measured.scale), 1),
            }
        )
    return rows


def _share(errors: np.ndarray, mean: np.ndarray, scale: np.ndarray) -> float:
    live = scale > 0
    return float((errors[:, live] / scale[live]).mean() / max((mean[:, live] / scale[live]).mean(), 1e-12))


def _dimensions(measured: Measured) -> list[dict[str, Any]]:
    """A row for each action dimension, in the robot's units."""
    errors, own = measured.errors, measured.errors[AS_IS]
    shown = [name for name in (OTHER_FRAMES, OTHER_INSTRUCTION, OTHER_STATE, MEAN, HOLD) if name in errors]
    return [
        {
            "dimension": name,
            "first action": own.first[:, dim].mean(),
            "other actions": own.rest[:, dim].mean(),
            "chunk": own.dims[:, dim].mean(),
            "predicted minus recorded": own.signed[:, dim].mean(),
            **{condition: errors[condition].dims[:, dim].mean() for condition in shown},
        }
        for dim, name in enumerate(measured.action_names)
    ]


def parts_of_episode(measured: Measured) -> list[np.ndarray]:
    """Samples of each fifth of the episodes, bool (N,)."""
    place = np.minimum((measured.probe.times * PARTS_OF_EPISODE).astype(int), PARTS_OF_EPISODE - 1)
    return [place == part for part in range(PARTS_OF_EPISODE)]


def _over_time(measured: Measured) -> list[dict[str, Any]]:
    """A row for each fifth of the episodes: the error as a share of that of the mean action over all of them."""
    usual = measured.errors[MEAN].total.mean()
    shown = [name for name in (AS_IS, OTHER_FRAMES, OTHER_INSTRUCTION, MEAN, HOLD) if name in measured.errors]
    return [
        {
            "part of the episode": f"{20 * place} to {20 * place + 20} %",
            "samples": int(part.sum()),
            **{name: round(100 * measured.errors[name].total[part].mean() / usual, 1) for name in shown},
        }
        for place, part in enumerate(parts_of_episode(measured))
        if part.any()
    ]


def _findings(measured: Measured, gains: dict[str, Estimate], answers: dict[str, str]) -> list[Finding]:
    findings = []
    baseline = measured.baseline
    if answers[BETTER[baseline]] in ("no", "a little"):
        findings.append(
            Finding(
                f"the policy is hardly {BETTER[baseline]}",
                "high" if gains[baseline].value < NOTHING else "medium",
                {f"share of the error of '{baseline}' that it takes away": str(gains[baseline])},
                "It has not learnt these demonstrations, or the data is not what it was trained on.",
                "Compare statistics, cameras and conventions above; otherwise train longer.",
            )
        )
    if answers["looks"] in ("no", "a little"):
        blind = answers["looks"] == "no"
        findings.append(
            Finding(
                "the policy does not look" if blind else "the policy looks only a little",
                "high" if blind else "medium",
                {"share of the error that the right frames take away": str(gains[OTHER_FRAMES])},
                "Its actions follow from the state and the instruction. It goes where objects usually were.",
                "Train longer, vary the places of objects in the demonstrations, and start from pretrained towers.",
            )
        )
    if answers["listens"] in ("no", "a little"):
        deaf = answers["listens"] == "no"
        findings.append(
            Finding(
                "the policy does not listen" if deaf else "the policy listens only a little",
                "high" if deaf else "medium",
                {"share of the error that the right instruction takes away": str(gains[OTHER_INSTRUCTION])},
                "It does the same whatever it is asked.",
                "Demonstrate several tasks in one scene, so that only the instruction tells them apart.",
            )
        )
    if answers["leans on the state"] == "yes":
        findings.append(
            Finding(
                "the policy leans on the state instead of the frames",
                "medium",
                {"right state": str(gains[OTHER_STATE]), "right frames": str(gains[OTHER_FRAMES])},
                "It replays usual motions from where the arm is, and does not correct them by what it sees.",
                "Vary the places of objects and the start of the arm in the demonstrations.",
            )
        )
    unused = [camera for camera in measured.cameras if gains[f"black {camera}"].high < NOTHING]
    if unused and len(unused) < len(measured.cameras):
        findings.append(
            Finding(
                "a camera is not used",
                "low",
                {camera: str(gains[f"black {camera}"]) for camera in unused},
                "Its frames cost time and change nothing.",
                "Nothing, or leave the camera out in the next training.",
            )
        )
    return findings


def _turned(measured: Measured) -> list[Finding]:
    """Frames that fit the policy better after they were turned."""
    changes = {f"frames {name}": f"frames look {name} to the policy" for name in CHANGES}
    changes[CAMERAS_SWAPPED] = "cameras are in another order than the policy's"
    own = measured.errors[AS_IS].total
    shares = {
        name: ratio(measured.errors[name].total, own, measured.probe.episodes)
        for name in changes
        if name in measured.errors
    }
    best = min(shares, key=lambda name: shares[name].value)
    if shares[best].high > 1 - NOTHING or shares[best].value > 1 - CLEAR / 2:
        return []
    return [
        Finding(
            changes[best],
            "high",
            {"error after that change, as a share of the error as it is": str(shares[best]),
             "other changes": {name: str(share) for name, share in shares.items() if name != best}},
            "The policy was trained on frames that were prepared in another way, and is worse on these.",
            "Prepare the frames as in training: turn them, change the order of colours, or name cameras in its order.",
        )
    ]  # fmt: skip


def _drift(measured: Measured) -> list[Finding]:
    """Errors that grow along the episode."""
    parts = parts_of_episode(measured)
    own, mean = measured.errors[AS_IS], measured.errors[MEAN]
    if not (parts[0].any() and parts[-1].any()) or min(parts[0].sum(), parts[-1].sum()) < 8:
        return []
    begin, end = (_relative(own, mean, part) for part in (parts[0], parts[-1]))
    if end < 2 * begin or end < 0.5:
        return []
    return [
        Finding(
            "errors grow along the episode",
            "low",
            {"first fifth, % of the mean action's error": 100 * begin, "last fifth": 100 * end},
            "The end of the task is learnt less well than its beginning.",
            "Look at the picture of errors over the episode; demonstrate more of the end, also after mistakes.",
        )
    ]


def _relative(errors: Errors, mean: Errors, part: np.ndarray) -> float:
    return float(errors.total[part].mean() / max(mean.total[part].mean(), 1e-12))
