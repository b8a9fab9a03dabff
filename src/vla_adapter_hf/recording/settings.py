"""How demonstrations and scenes are recorded. Every default stands here, and nowhere else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from vla_adapter_hf.simulation.placement import PLACEMENTS
from vla_adapter_hf.simulation.settings import CONTROL_RATE


CAMERA_COLUMNS = ("image", "wrist_image")
TRAINING_STATES = tuple(range(40))  # of 50 official initial states; the evaluation holds out the others


def _check_at_least(minimum: int, settings: Any, *names: str) -> None:
    for name in names:
        if getattr(settings, name) < minimum:
            raise ValueError(f"{name} must be at least {minimum}, got {getattr(settings, name)}")


def _check_states(states: Sequence[int]) -> None:
    if not states or not all(0 <= state < 50 for state in states):
        raise ValueError(f"states must name initial states 0...49, got {states!r}")


@dataclass(frozen=True)
class EpisodeSettings:
    """What decides the content of a recorded episode: a recording can only be extended with equal values.

    Args:
        render_every: steps between two rendered frames, each of which becomes a row; must divide 20. The first row's
            step is drawn per episode, so that all phases occur. Where a policy drives, a row begins at every chunk
            instead.
        chunk_size: actions in `action_chunk`. Rows that are followed by fewer actions are not written.
        tail: steps that the expert goes on after success, so that the last steps before it begin whole chunks too.
        image_size: height and width of the stored frames, pixels. They are rendered with 256, as in evaluation, and
            resized by Lanczos.
        image_format: `png` (lossless) or `jpeg`.
        disturbed: share of episodes in which the arm is pushed one to three times. What the expert does after a push
            is recorded, the push itself is not.
        retargeted: share of episodes that ask for another object in the scene than the task does, so that the scene
            does not give the instruction away.
        alternatives: number of other objects of the scene for which every row also records what the expert would do,
            from where it is free to go anywhere: empty-handed and above all objects nearby. The simulator tries the
            chunk and goes back. The same frames with another instruction become a separate episode, at no extra
            rendering.
        seed: seed of everything that is drawn.
        states: official initial states to start from.
        suite: `libero_object`, the only suite with a scripted expert.

    Raises:
        ValueError: a number out of range, or a suite without a scripted expert.
    """

    render_every: int = 4
    chunk_size: int = 8
    tail: int = 8
    image_size: int = 112
    image_format: str = "png"
    disturbed: float = 0.0
    retargeted: float = 0.0
    alternatives: int = 0
    seed: int = 0
    states: tuple[int, ...] = TRAINING_STATES
    suite: str = "libero_object"

    def __post_init__(self) -> None:
        if self.suite != "libero_object":
            raise ValueError(
                f"suite={self.suite!r} has no scripted expert; demonstrations can be recorded for 'libero_object'"
            )
        if self.render_every < 1 or CONTROL_RATE % self.render_every:
            raise ValueError(
                f"render_every must divide {CONTROL_RATE} (LeRobot's fps is whole), got {self.render_every}"
            )
        _check_at_least(1, self, "chunk_size", "image_size")
        _check_at_least(0, self, "tail", "alternatives", "seed")
        _check_states(self.states)
        if self.image_format not in ("png", "jpeg"):
            raise ValueError(f"image_format must be 'png' or 'jpeg', got {self.image_format!r}")
        for name in ("disturbed", "retargeted"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a share of episodes, 0...1, got {getattr(self, name)}")

    def describe(self) -> dict[str, Any]:
        """The settings of this class as JSON values, without those that a subclass adds."""
        return {entry.name: asdict(self)[entry.name] for entry in fields(EpisodeSettings)}


@dataclass(frozen=True)
class RecordingSettings(EpisodeSettings):
    """Settings of [`~vla_adapter_hf.recording.demonstrate.demonstrate`]: [`EpisodeSettings`], and how many episodes.

    Args:
        official: episodes per task from the official states.
        jitter: episodes per task with every object moved by up to 5 cm.
        shuffle: episodes per task with the objects in each other's positions.
        both: episodes per task, shuffled and moved.
        tasks: task numbers, as in 3 or 0,2,5-7; by default all tasks.
        workers: processes, each with an environment of about 2 GB, and the driver.
        ray: address of a Ray cluster on which the `workers` run, such as `auto` or `HOST:6379`; needs the extra ray,
            and an output on a storage that all machines share. By default they run here.
        minutes: begin no new batch after this time; the dataset is assembled from the finished episodes.
        batch: episodes recorded before a process changes to another task.
        driver: folder or Hub id of a checkpoint that drives (or `embedded`), while the expert records at every chunk
            what it would do. Such episodes are added to the expert's own. Their keys have the last part of the
            checkpoint's name, and their placements differ. A row begins at every chunk, and there are neither pushes
            nor alternatives.
        driver_share: share of the chunks that the driver chooses; the expert chooses the others.
        driver_unnorm_key: the driver's statistics; by default those with the suite's name.

    Raises:
        ValueError: a number out of range.
    """

    official: int = 10
    jitter: int = 0
    shuffle: int = 0
    both: int = 0
    tasks: Sequence[int] | None = None
    workers: int = 1
    ray: str | None = None
    minutes: float | None = None
    batch: int = 12
    driver: str | None = None
    driver_share: float = 0.7
    driver_unnorm_key: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_at_least(0, self, *PLACEMENTS)
        _check_at_least(1, self, "workers", "batch")
        if not 0 < self.driver_share <= 1:
            raise ValueError(f"driver_share is a share of chunks, over 0 and at most 1, got {self.driver_share}")

    @property
    def episodes(self) -> dict[str, int]:
        """Episodes per task for each placement."""
        return {placement: getattr(self, placement) for placement in PLACEMENTS}


@dataclass(frozen=True)
class SceneSettings:
    """Settings of [`~vla_adapter_hf.recording.scenes.record_scenes`].

    Args:
        scenes: scenes per task, rounded up to whole files.
        seed: seed of everything that is drawn.
        states: official initial states to start from.
        image_size: height and width of the stored frames, pixels. They are rendered with 256, as in evaluation, and
            resized by Lanczos.
        workers: processes, each with an environment of about 2 GB.
        minutes: begin no new file after this time.

    Raises:
        ValueError: a number out of range.
    """

    scenes: int
    seed: int = 0
    states: tuple[int, ...] = TRAINING_STATES
    image_size: int = 112
    workers: int = 1
    minutes: float | None = None

    def __post_init__(self) -> None:
        _check_at_least(1, self, "scenes", "workers", "image_size")
        _check_at_least(0, self, "seed")
        _check_states(self.states)

    def describe(self) -> dict[str, Any]:
        """What decides a scene, as JSON values."""
        return {"seed": self.seed, "states": self.states, "image_size": self.image_size}
