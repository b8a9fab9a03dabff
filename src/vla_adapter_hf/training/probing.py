"""Recorded samples with one input swapped: they show whether a policy looks, listens, or leans on the state."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vla_adapter_hf.data import VLAAdapterDataset


AS_IS = "as it is"
OTHER_FRAMES = "other frames"
OTHER_INSTRUCTION = "other instruction"
OTHER_STATE = "other state"
MEAN = "mean action"

Sample = dict[str, Any]
Predict = Callable[[list[Sample]], np.ndarray]
ChangeFrames = Callable[[list[np.ndarray]], list[np.ndarray]]


@dataclass(frozen=True)
class Probe:
    """Samples of recorded episodes, and what may be put in place of their inputs.

    Args:
        samples: N samples of datasets whose `image_transform` has prepared the frames.
        episodes: int (N,), which episode each sample is of.
        times: float (N,), where in its episode each sample begins, 0 to 1.
        partners: int (N,), for each a sample of another episode, with the same instruction if there is one, at the
            nearest relative time; of the same episode where there is no other.
        instructions: another instruction of these samples for each; None where there is only one.
    """

    samples: list[Sample]
    episodes: np.ndarray
    times: np.ndarray
    partners: np.ndarray
    instructions: list[str | None]

    def with_other_frames(self) -> list[Sample]:
        """The samples with the frames of their partners."""
        return [sample | {"images": self._partner(place)["images"]} for place, sample in enumerate(self.samples)]

    def with_other_state(self) -> list[Sample]:
        """The samples with the states of their partners."""
        return [sample | {"state": self._partner(place)["state"]} for place, sample in enumerate(self.samples)]

    def with_other_instruction(self) -> list[Sample] | None:
        """The samples with another instruction each; None if there is only one."""
        if None in self.instructions:
            return None
        return [sample | {"text": text} for sample, text in zip(self.samples, self.instructions, strict=True)]

    def with_frames(self, change: ChangeFrames) -> list[Sample]:
        """The samples with changed frames."""
        return [sample | {"images": change(sample["images"])} for sample in self.samples]

    def without_camera(self, camera: int) -> list[Sample]:
        """The samples with black frames in one camera."""
        return self.with_frames(
            lambda images: [np.zeros_like(image) if place == camera else image for place, image in enumerate(images)]
        )

    @property
    def actions(self) -> np.ndarray:
        """Recorded chunks, float64 (N, K, A), the robot's units."""
        return np.stack([sample["actions"] for sample in self.samples]).astype(np.float64)

    @property
    def is_real(self) -> np.ndarray:
        """Steps before the end of an episode, bool (N, K)."""
        return ~np.stack([sample["action_is_pad"] for sample in self.samples])

    def _partner(self, place: int) -> Sample:
        return self.samples[int(self.partners[place])]


def plain_text(text: str) -> str:
    """An instruction without what should not matter: case, punctuation, spaces."""
    return " ".join(re.sub(r"[^\w\s]", " ", text.lower()).split())


def choose_samples(datasets: Sequence[VLAAdapterDataset], count: int, seed: int = 0) -> Probe:
    """At least four samples of each episode that is taken, evenly spread over its time; the episodes evenly too.

    Args:
        datasets: whose frames are prepared and not augmented.
        count: number of samples, or all if there are fewer.
        seed: decides the partners and the other instructions.
    """
    listed = [(dataset, number) for dataset in datasets for number in dataset.episode_indices]
    listed = [listed[place] for place in _evenly(len(listed), max(1, count // 4))]
    samples, episodes, times = [], [], []
    for owner, (dataset, number) in enumerate(listed):
        episode = dataset.select_episodes([number], dataset.image_transform)
        chosen = _evenly(len(episode), -(-count // len(listed)))
        samples += [episode[place] for place in chosen]
        times += [place / max(1, len(episode) - 1) for place in chosen]
        episodes += [owner] * len(chosen)
    owners, draw = np.array(episodes), np.random.default_rng(seed)
    texts = {plain_text(sample["text"]): sample["text"] for sample in samples}
    asked, when = np.array([plain_text(sample["text"]) for sample in samples]), np.array(times)
    return Probe(
        samples,
        owners,
        when,
        np.array([_choose_partner(place, owners, when, asked, draw) for place in range(len(samples))]),
        [_choose_text(sample["text"], texts, draw) for sample in samples],
    )


def _evenly(size: int, count: int) -> list[int]:
    """At most `count` of the numbers below `size`, evenly spread."""
    return np.unique(np.linspace(0, size - 1, min(size, count)).round().astype(int)).tolist()


def _choose_partner(
    place: int, episodes: np.ndarray, times: np.ndarray, texts: np.ndarray, draw: np.random.Generator
) -> int:
    """The sample of another episode at the nearest time: neither the clock nor the words tell the two apart."""
    others = np.flatnonzero(episodes != episodes[place])
    if not len(others):
        others = np.delete(np.arange(len(episodes)), place) if len(episodes) > 1 else np.array([place])
        return int(draw.choice(others))
    same = others[texts[others] == texts[place]]
    others = same if len(same) else others
    others = others[episodes[others] == draw.choice(np.unique(episodes[others]))]
    return int(others[np.abs(times[others] - times[place]).argmin()])


def _choose_text(own: str, texts: dict[str, str], draw: np.random.Generator) -> str | None:
    others = [text for plain, text in sorted(texts.items()) if plain != plain_text(own)]
    return others[int(draw.integers(len(others)))] if others else None
