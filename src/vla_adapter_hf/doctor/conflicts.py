"""Two ways to do one thing: nearly equal observations with different actions."""

from __future__ import annotations

import numpy as np

from vla_adapter_hf.doctor.findings import Finding
from vla_adapter_hf.doctor.recording import FrameSample, Recording
from vla_adapter_hf.doctor.semantics import Semantics


LEAST_OBSERVATIONS = 10
LEAST_NEIGHBOURS = 3  # other episodes that pass close by
LEAST_SHARE = 0.25  # of them that must move differently
DIFFERENT = 0.3  # cosine between two motions below which they differ
MOST_STEPS = 1500
SHOWN_PAIRS = 3


def check_conflicts(recording: Recording, sample: FrameSample, semantics: Semantics, chunk_size: int) -> list[Finding]:
    """Compare the motion after nearly equal observations of different episodes with the same instruction.

    An observation is the state and the thumbnails of all cameras, reduced to their main directions. Two are nearly
    equal if they are as close as steps of one episode that are two apart.
    """
    if semantics.kind == "unknown" or len(sample.windows) < 4:
        return []
    gathered = _observations(recording, sample, chunk_size)
    if gathered is None:
        return []
    features, motions, owners, texts, frames, near = gathered
    square = (features**2).sum(1)
    distance = np.sqrt(np.maximum(square[:, None] + square - 2 * features @ features.T, 0))
    distance[(owners[:, None] == owners) | (texts[:, None] != texts)] = np.inf
    size = np.linalg.norm(motions, axis=1)
    still = size <= 0.3 * np.median(size)
    distance[still] = np.inf
    distance[:, still] = np.inf
    # Of every other episode only the nearest observation counts: an episode shows one way.
    groups = [np.flatnonzero(owners == episode) for episode in np.unique(owners)]
    nearest = np.stack([group[distance[:, group].argmin(1)] for group in groups], axis=1)  # (n, episodes)
    close = np.take_along_axis(distance, nearest, 1) < near
    cosine = (motions[:, None] * motions[nearest]).sum(-1) / np.maximum(size[:, None] * size[nearest], 1e-12)
    differs = close & (cosine < DIFFERENT)
    several = close.sum(1) >= LEAST_NEIGHBOURS
    split = several & (differs.sum(1) >= LEAST_SHARE * close.sum(1))
    if split.sum() < max(LEAST_OBSERVATIONS, 0.05 * several.sum()):
        return []
    pairs = _clearest_pairs(np.where(differs & split[:, None], cosine, np.inf), owners)
    rows = [
        np.concatenate([*frames[example], *frames[nearest[example, partner]]], axis=1) for example, partner in pairs
    ]
    picture = np.concatenate(rows).clip(0, 255).astype(np.uint8)
    numbers = [recording.numbers[position] for position in np.unique(owners[split])]
    return [
        Finding(
            "two ways to do one thing",
            "medium",
            {
                "observations with close ones in other episodes": int(several.sum()),
                "of those with different motion": int(split.sum()),
                "cosines of the pairs in the picture": [cosine[pair] for pair in pairs],
            },
            "A policy trained with an L1 loss takes a middle way that nobody showed.",
            "Show one way, or give the two ways two instructions.",
            numbers,
            picture.repeat(4, axis=0).repeat(4, axis=1),
        )
    ]


def _clearest_pairs(cosine: np.ndarray, owners: np.ndarray) -> list[tuple[int, int]]:
    """Up to `SHOWN_PAIRS` places in (n, episodes) with the smallest cosine, of different episodes."""
    pairs: list[tuple[int, int]] = []
    left = cosine.copy()
    while len(pairs) < SHOWN_PAIRS and np.isfinite(left).any():
        example, partner = np.unravel_index(left.argmin(), left.shape)
        pairs.append((int(example), int(partner)))
        left[owners == owners[example]] = np.inf
    return pairs


def _observations(recording: Recording, sample: FrameSample, chunk_size: int) -> tuple | None:
    """Features (n, F), motion of the next chunk (n, S), episode, instruction, thumbnails, and what counts as near."""
    spread = recording.all_states.std(0)
    live = spread > 1e-9
    states, pictures, motions, owners, texts = [], [], [], [], []
    ids: dict[str, int] = {}
    for window in sample.windows:
        values = recording.states[window.position][:, live] / spread[live]
        count = min(len(window.thumbnails), len(values) - window.start - chunk_size)
        if count < 2:
            continue
        steps = window.start + np.arange(count)
        states.append(values[steps])
        motions.append(values[steps + chunk_size] - values[steps])
        pictures.append(window.thumbnails[:count])
        owners.append(np.full(count, window.position))
        label = recording.texts[window.position][0] if recording.texts[window.position] else ""
        texts.append(np.full(count, ids.setdefault(label, len(ids))))
    if len(states) < 4:
        return None
    arrays = [np.concatenate(part) for part in (states, pictures, motions, owners, texts)]
    kept = np.linspace(0, len(arrays[0]) - 1, min(MOST_STEPS, len(arrays[0]))).round().astype(int)
    states, pictures, motions, owners, texts = (array[kept] for array in arrays)
    flat = pictures.reshape(len(pictures), -1) - pictures.reshape(len(pictures), -1).mean(0)
    components = _main_components(flat @ flat.T, 8)
    components = components / max(float(components.std(0).max()), 1e-9)
    features = np.concatenate([states, components * np.sqrt(states.shape[1])], axis=1)
    along = np.linalg.norm(np.diff(features, axis=0), axis=1)[owners[1:] == owners[:-1]]
    return features, motions, owners, texts, pictures, 2.0 * float(np.median(along))


def _main_components(products: np.ndarray, count: int) -> np.ndarray:
    """Places (n, count) along the main directions of pictures of which the inner products (n, n) are given.

    The directions are found by iteration from random ones, which is many times quicker than all of them.
    """
    start = np.random.default_rng(0).normal(size=(len(products), min(2 * count, len(products))))
    basis = np.linalg.qr(products @ start.astype(products.dtype))[0]
    for _ in range(8):
        basis = np.linalg.qr(products @ basis)[0]
    values, turn = np.linalg.eigh(basis.T @ products @ basis)
    return basis @ turn[:, -count:] * np.sqrt(np.maximum(values[-count:], 0))
