"""Runs of the loop that moves an arm, as episodes of a LeRobot dataset."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import numpy as np

from vla_adapter_hf.recording.jobs import check_settings
from vla_adapter_hf.recording.lerobot_writer import (
    PARTS,
    LeRobotLayout,
    assemble,
    layout_record,
    save_episode,
    saved_episodes,
)
from vla_adapter_hf.robot.interface import RobotInterface
from vla_adapter_hf.robot.loop import LoopReport, Step
from vla_adapter_hf.utils.files import exclusive_folder
from vla_adapter_hf.utils.frames import encode_image


NUMBERS = ("query", "position")
BACKLOG_SECONDS = 5.0  # of frames that wait to be encoded, which is about 300 MB for two cameras of 640 x 480 pixels


class EpisodeRecorder:
    """Keeps every run as an episode of a LeRobot v3.0 dataset: frames, states, the actions that were sent, and where
    each action came from.

        with EpisodeRecorder("recordings/wave") as recorder:
            run(policy, robot, "wave", settings, record=recorder)

    A row is a control step: the observation before the action, and the action as the robot took it. Steps before the
    first action are left out. The column `query` is the number of the chunk that the action came from, and `position`
    is its index in that chunk; both are -1 where the watchdog acted. `meta/demonstrations.jsonl` says how each run
    ended.

    An episode is saved when its run ends, by Ctrl-C or an error too, and appears whole. The dataset is put together
    when the block ends. What a killed program has saved is taken in by the next recorder of the folder, which goes on
    behind it. Frames are compressed in threads and kept in memory until their run ends. A run whose frames come faster
    than they can be compressed ends with an error.

    Args:
        output: folder of the dataset. Its episodes must be of one robot.
        image_format: `jpeg` (quality 95), or `png` for every pixel, which takes more time and space.
        robot_type: LeRobot's name of the robot; by default the robot's own `robot_type` or `name`, or its class.

    Raises:
        ValueError: another format.
    """

    def __init__(self, output: str | Path, image_format: str = "jpeg", robot_type: str | None = None) -> None:
        if image_format not in ("jpeg", "png"):
            raise ValueError(f"image_format must be 'jpeg' or 'png', got {image_format!r}")
        self.output, self.image_format, self.robot_type = Path(output), image_format, robot_type
        self._open: ExitStack | None = None
        self._layout: LeRobotLayout | None = None

    def __enter__(self) -> EpisodeRecorder:
        with ExitStack() as opened:
            opened.enter_context(exclusive_folder(self.output))
            self._threads = opened.enter_context(ThreadPoolExecutor(2, "encode"))
            self._open = opened.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        opened, self._open = self._open, None
        with opened:
            if saved_episodes(self.output):
                assemble(self.output)

    def begin(self, interface: RobotInterface, instruction: str, fps: float) -> None:
        """Prepare an episode.

        Raises:
            RuntimeError: outside of a `with` block.
            ValueError: a rate that is no whole number, or a robot that differs from the dataset's.
        """
        if self._open is None:
            raise RuntimeError(
                "an EpisodeRecorder works in a with block: with EpisodeRecorder(folder) as recorder: ..."
            )
        if fps != int(fps):
            raise ValueError(f"LeRobot datasets have a whole number of frames per second, got fps={fps}")
        robot = interface.robot
        own = getattr(robot, "robot_type", None) or getattr(robot, "name", None) or type(robot).__name__
        self._layout = LeRobotLayout(
            cameras=tuple(interface.cameras),
            image_size=tuple(tuple(robot.observation_features[name][:2]) for name in interface.cameras.values()),
            state_names=tuple(interface.state_names),
            action_names=tuple(interface.action_names),
            fps=int(fps),
            robot_type=self.robot_type or str(own),
            numbers=NUMBERS,
        )
        found, advice = f"output={self.output} was begun with", "record into another folder"
        check_settings(self.output / PARTS / "settings.json", layout_record(self._layout), found, advice)
        self._instruction = instruction
        self._steps: list[Step] = []
        self._frames: dict[str, list[Future[bytes]]] = {camera: [] for camera in interface.cameras}
        self._waiting: deque[Future[bytes]] = deque()

    def add(self, step: Step) -> None:
        """Keep one control step.

        Raises:
            ValueError: a frame of another size than the robot says it has.
            RuntimeError: frames come faster than they can be encoded, and those of some seconds wait.
        """
        if step.action is None:
            return
        while self._waiting and self._waiting[0].done():
            self._waiting.popleft()
        if len(self._waiting) > BACKLOG_SECONDS * self._layout.fps * len(self._layout.cameras):
            raise RuntimeError(
                f"frames come faster than they can be encoded as {self.image_format}: {len(self._waiting)} wait. "
                "Record image_format='jpeg', which is quicker than png, smaller frames, or a lower rate"
            )
        for camera, size in zip(self._layout.cameras, self._layout.image_size, strict=True):
            frame = step.images[camera]
            if frame.shape[:2] != size:
                raise ValueError(f"camera {camera!r} gives frames of {frame.shape[:2]} pixels, the robot says {size}")
            encoded = self._threads.submit(encode_image, frame, self.image_format)
            self._frames[camera].append(encoded)
            self._waiting.append(encoded)
        self._steps.append(step)

    def end(self, report: LoopReport) -> None:
        """Save the episode, if there was an action.

        Raises:
            OSError: the disk is full; the episodes before this one are kept.
        """
        # A run that `add` ended has frames of a step that is not kept.
        steps, self._steps = self._steps, []
        if not steps:
            return
        save_episode(
            self.output,
            f"{1 + max(map(int, saved_episodes(self.output)), default=-1):06d}",
            self._layout,
            self._instruction,
            {camera: [frame.result() for frame in frames[: len(steps)]] for camera, frames in self._frames.items()},
            np.stack([step.state for step in steps]).astype(np.float32),
            np.stack([step.action for step in steps]).astype(np.float32),
            numbers={name: np.array([getattr(step, name) for step in steps]) for name in NUMBERS},
            extra={"ended_by": report.ended_by, "steps": report.steps, "held": report.held, "late": report.late},
        )
