"""Episodes that were recorded in another way than the rest: another convention, unit, sign or time."""

from __future__ import annotations

import numpy as np

from vla_adapter_hf.doctor.findings import Finding
from vla_adapter_hf.doctor.fits import fit_actions, quiet_median
from vla_adapter_hf.doctor.recording import Recording
from vla_adapter_hf.doctor.semantics import GOOD, Semantics
from vla_adapter_hf.doctor.settings import CheckSettings


def check_consistency(recording: Recording, semantics: Semantics, settings: CheckSettings) -> list[Finding]:
    """Compare every episode with the explanation that holds for most."""
    strong = [dim for dim in semantics.dims if semantics.r2[dim] >= GOOD]
    if semantics.lag is None or len(strong) < 2 or len(recording.actions) < 4 or semantics.frame == "tool":
        return []
    kinds = {name: fit_actions(recording, name, settings.max_lag) for name in ("changes", "delta")}
    kind = "changes" if semantics.kind == "absolute" else "delta"
    other = "delta" if kind == "changes" else "changes"
    fits = kinds[kind]
    sources = semantics.state_dims[strong]
    curves = quiet_median(fits.r2[:, :, strong, sources].transpose(2, 0, 1))  # (episodes, lags)
    now = int(np.flatnonzero(fits.lags == semantics.lag)[0])
    numbers = np.array([recording.numbers[position] for position in fits.episodes])
    here, best = np.nan_to_num(curves[:, now]), np.nan_to_num(curves).max(1)
    elsewhere = np.nan_to_num(quiet_median(kinds[other].r2[:, :, strong, sources].transpose(2, 0, 1))).max(1)
    mixed = (elsewhere > best + 0.2) & (elsewhere > 0.6) & (here < GOOD)
    shifted = ~mixed & (best > here + 0.2) & (best > 0.6)
    ratio = fits.slope[:, now][:, strong, sources] / semantics.slopes[strong]
    ratio = quiet_median(ratio.T)
    known = np.isfinite(ratio) & (here > GOOD)
    scaled = known & ~mixed & ~shifted & ((np.abs(ratio) > 3) | (np.abs(ratio) < 1 / 3))
    flipped = known & ~mixed & ~shifted & ~scaled & (ratio < 0)
    swapped = ~mixed & ~shifted & _is_in_other_order(fits.r2[:, now], strong, sources)
    if swapped.mean() > 0.5:
        swapped[:] = False  # more than half are the usual order
    return [
        *_swapped(numbers[swapped], len(numbers)),
        *_mixed(numbers[mixed], elsewhere[mixed], best[mixed], len(numbers)),
        *_shifted(numbers[shifted], fits.lags[np.nan_to_num(curves[shifted]).argmax(1)], semantics.lag, len(numbers)),
        *_scaled(numbers[scaled], ratio[scaled], len(numbers)),
        *_flipped(numbers[flipped], ratio[flipped], len(numbers)),
        *_flipped_dims(
            recording,
            semantics,
            fits.slope[:, now][:, strong, sources],
            fits.r2[:, now][:, strong, sources],
            numbers,
            strong,
        ),
    ]


def _is_in_other_order(r2: np.ndarray, strong: list[int], sources: np.ndarray) -> np.ndarray:
    """Episodes in which two dimensions clearly follow each other's state instead of their own.

    Args:
        r2: (episodes, A, S) at the usual lag.
        strong: action dimensions that are explained well over all episodes.
        sources: their state dimensions.
    """
    among = np.nan_to_num(r2[:, strong][:, :, sources])  # (episodes, strong, strong)
    own = np.diagonal(among, axis1=1, axis2=2)
    follows = (among > 0.8) & (among > own[:, :, None] + 0.2)
    return (follows & follows.transpose(0, 2, 1)).any((1, 2))


def _swapped(numbers: np.ndarray, total: int) -> list[Finding]:
    if len(numbers) == 0:
        return []
    return [
        Finding(
            "the order of the dimensions differs between episodes",
            "high",
            {"episodes": len(numbers), "of": total},
            "Roll is yaw, or x is y, in some episodes: the policy averages two axes.",
            "Bring the dimensions of these episodes into the order of the others.",
            numbers.tolist(),
        )
    ]


def _mixed(numbers: np.ndarray, other: np.ndarray, own: np.ndarray, total: int) -> list[Finding]:
    if len(numbers) == 0:
        return []
    return [
        Finding(
            "two action conventions are mixed",
            "high",
            {"episodes": len(numbers), "of": total, "R² of the other convention": other.mean(), "R² here": own.mean()},
            "Absolute targets and deltas in one dataset: the policy learns their average, which is neither.",
            "Convert these episodes, or leave them out.",
            numbers.tolist(),
        )
    ]


def _shifted(numbers: np.ndarray, lags: np.ndarray, lag: int, total: int) -> list[Finding]:
    if len(numbers) == 0:
        return []
    return [
        Finding(
            "the lag between action and motion differs between episodes",
            "high",
            {"episodes": len(numbers), "of": total, "their lag": float(np.median(lags)), "lag of the others": lag},
            "The same observation comes with the actions of different moments, and the policy averages them.",
            "Shift the actions of these episodes, or leave them out.",
            numbers.tolist(),
        )
    ]


def _scaled(numbers: np.ndarray, ratio: np.ndarray, total: int) -> list[Finding]:
    if len(numbers) == 0:
        return []
    return [
        Finding(
            "units differ between episodes",
            "high",
            {"episodes": len(numbers), "of": total, "factor": float(np.median(np.abs(ratio)))},
            "The statistics cover both scales, so the actions of one of them become nearly zero.",
            "Convert these episodes to the units of the others.",
            numbers.tolist(),
        )
    ]


def _flipped(numbers: np.ndarray, ratio: np.ndarray, total: int) -> list[Finding]:
    if len(numbers) == 0:
        return []
    return [
        Finding(
            "the sign of the actions differs between episodes",
            "high",
            {"episodes": len(numbers), "of": total, "factor": float(np.median(ratio))},
            "Opposite actions for the same observation average to nothing.",
            "Turn the sign of these episodes.",
            numbers.tolist(),
        )
    ]


def _flipped_dims(
    recording: Recording,
    semantics: Semantics,
    slope: np.ndarray,
    r2: np.ndarray,
    numbers: np.ndarray,
    strong: list[int],
) -> list[Finding]:
    """Dimensions whose sign differs in some episodes, where most dimensions keep theirs."""
    # An angular velocity moves several Euler angles at once; its slope to one of them may change its sign by itself.
    is_angle = np.isin(semantics.state_dims[strong], (3, 4, 5)) & ("Euler" in (semantics.encoding or ""))
    clear = (semantics.r2[strong] > 0.7) & ~is_angle
    against = clear & (slope * semantics.slopes[strong] < 0) & (np.nan_to_num(r2) > 0.8)
    few = against & (against.sum(1) <= len(strong) / 2)[:, None]
    if not few.any():
        return []
    names = [recording.action_name(strong[place]) for place in np.flatnonzero(few.any(0))]
    return [
        Finding(
            "the sign of some dimensions differs between episodes",
            "high",
            {"dimensions": names, "episodes": int(few.any(1).sum()), "of": len(numbers)},
            "Opposite actions for the same observation average to nothing.",
            "Turn the sign of these dimensions in these episodes.",
            numbers[few.any(1)].tolist(),
        )
    ]
