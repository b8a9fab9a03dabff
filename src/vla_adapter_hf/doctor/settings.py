"""Settings of a check."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class CheckSettings:
    """How much is read, and where a finding begins.

    Args:
        chunk_size: actions per chunk; None chooses 0.4 s, at least 4 and at most 25.
        fps: control steps per second; None takes the dataset's.
        windows: episodes of which a run of frames is read.
        window_frames: frames of such a run.
        first_frames: episodes of which the first frame is read.
        full: read the first frames of all episodes, and a run of frames of four times as many.
        max_lag: steps by which actions, frames and states may be apart.
        max_lead: steps that an arm may follow its command later without a finding of medium severity.

    Raises:
        ValueError: a number that is too small.
    """

    chunk_size: int | None = None
    fps: float | None = None
    windows: int = 16
    window_frames: int = 40
    first_frames: int = 200
    full: bool = False
    max_lag: int = 6
    max_lead: int = 2

    def __post_init__(self) -> None:
        least = {"windows": 1, "window_frames": 8, "first_frames": 1, "max_lag": 1, "max_lead": 0}
        for name, minimum in least.items():
            if getattr(self, name) < minimum:
                raise ValueError(f"{name}={getattr(self, name)} is too small; give {minimum} or more")
        if self.chunk_size is not None and self.chunk_size < 1:
            raise ValueError(f"chunk_size={self.chunk_size} must be 1 or more")
        if self.fps is not None and not self.fps > 0:
            raise ValueError(f"fps={self.fps} must be above 0")

    def chunk_for(self, fps: float | None) -> int:
        """The chunk length to suggest: the one given, or 0.4 s, as the published models play."""
        if self.chunk_size is not None:
            return self.chunk_size
        return 8 if fps is None else int(min(25, max(4, round(0.4 * fps))))


@dataclass(frozen=True)
class PolicySettings:
    """How a policy is asked.

    Args:
        unnorm_key: which of the checkpoint's statistics to use; None chooses those that fit the data best.
        samples: samples to predict, each under about ten conditions.
        episodes: episodes to take them from, best those that the policy was not trained on; None takes those that
            its training held out, if its folder says which, else all.
        batch_size: samples that are predicted at once.
        device, dtype: where and in which precision the model computes.
        seed: decides which frames, states and instructions are swapped.

    Raises:
        ValueError: a number that is too small.
    """

    unnorm_key: str | None = None
    samples: int = 96
    episodes: Sequence[int] | None = None
    batch_size: int = 8
    device: str = "cpu"
    dtype: str = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, minimum in {"samples": 20, "batch_size": 1}.items():
            if getattr(self, name) < minimum:
                raise ValueError(f"{name}={getattr(self, name)} is too small; give {minimum} or more")
