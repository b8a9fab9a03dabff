"""Single frames of many scenes, with where each object is in them: to learn to see and to read from.

An episode shows one scene from a hundred nearly equal sides. Who has to learn what milk looks like, and where it is,
needs many scenes and one look at each. Nothing has to move for that, so a scene costs its two renderings and little else.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import as_completed
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vla_adapter_hf.recording.demonstrate import check_settings, resized
from vla_adapter_hf.recording.lerobot_writer import encode_image
from vla_adapter_hf.simulation.libero.suite import BASKET, CAMERAS, LiberoEnvironment, LiberoSuite
from vla_adapter_hf.simulation.placement import STREAMS
from vla_adapter_hf.simulation.workers import process_pool
from vla_adapter_hf.utils.files import atomic_path


SCENES_PER_FILE = 30
POSES_PER_FILE = 30
HAND_BOX = np.array([[-0.25, -0.28, 0.06], [0.15, 0.32, 0.36]])  # where the hand may be over the floor, metres
ARM_SPEED = 10.0  # actions per metre that is still to go, before clipping
FIRST_EPISODE = 1_000_000  # beyond any recorded episode, so that no scene is one of theirs


@dataclass(frozen=True)
class _Job:
    output: str
    task: int
    block: int
    seed: int
    states: tuple[int, ...]
    image_size: int

    @property
    def path(self) -> Path:
        return Path(self.output) / f"{self.block:04d}-{self.task:02d}.parquet"


def record_scenes(
    output: str | Path,
    scenes: int,
    *,
    seed: int = 0,
    states: tuple[int, ...] = tuple(range(40)),
    image_size: int = 112,
    workers: int = 1,
    minutes: float | None = None,
    report: Callable[[str], None] = print,
) -> int:
    """Render scenes of libero_object, each with its objects and the hand in places of their own.

    Objects stand as in the placement `both`. Scenes are drawn from the stream `demonstration`, which no evaluation uses. Every
    file of `output` holds up to `SCENES_PER_FILE` scenes of one task: `image` and `wrist_image` (PNG), `objects` (names), and
    `places` `(objects, 2 cameras, 2)`, the middle of each object as fractions of the image's width and height, not a
    number where it is behind the camera. Files that are there already are kept, so the same call goes on after a kill.

    Args:
        output: folder of the files.
        scenes: per task; rounded up to whole files.
        seed: of everything that is drawn.
        states: official initial states to start from.
        image_size: height and width of the stored frames. Rendered are 256, as in evaluation, then Lanczos.
        workers: processes, each with an environment of about 2 GB.
        minutes: begin no new file after this time.
        report: called with a line of progress after every file.

    Returns:
        How many scenes there are at most; where no pose of the arm is free, there is one less.

    Raises:
        ValueError: for numbers out of range, and for a folder that was begun with other settings.
        ImportError: LIBERO is not installed.
    """
    if scenes < 1 or workers < 1 or image_size < 1:
        raise ValueError(
            f"scenes, workers and image_size must be at least 1, got {scenes}, {workers} and {image_size}"
        )
    output = Path(output)
    settings = {"seed": seed, "states": states, "image_size": image_size}
    check_settings(output, output / "settings.json", settings)
    tasks = range(len(LiberoSuite("libero_object").tasks))
    blocks = range(-(-scenes // SCENES_PER_FILE))
    jobs = [_Job(str(output), task, block, seed, states, image_size) for block in blocks for task in tasks]
    began = time.perf_counter()
    # Building an environment takes as long as half a file: a process makes some files of one task with each.
    waiting = {task: [job for job in reversed(jobs) if job.task == task and not job.path.exists()] for task in tasks}
    done = len(jobs) - sum(map(len, waiting.values()))
    with process_pool(workers) as pool:
        running = {}
        while True:
            late = minutes is not None and time.perf_counter() - began > 60 * minutes
            while len(running) < workers and not late and any(waiting.values()):
                task = max(waiting, key=lambda task: len(waiting[task]))
                batch = [waiting[task].pop() for _ in range(min(4, len(waiting[task])))]
                running[pool.submit(_record_files, batch)] = len(batch)
            if not running:
                break
            finished = next(as_completed(running))
            finished.result()
            done += running.pop(finished)
            report(f"{done * SCENES_PER_FILE} scenes after {(time.perf_counter() - began) / 60:.1f} min")
    return done * SCENES_PER_FILE


def _record_files(jobs: list[_Job]) -> None:
    """Runs in a process of its own; the jobs are of one task."""
    suite = LiberoSuite(
        "libero_object", placement="both", seed=jobs[0].seed, stream="demonstration", states=jobs[0].states
    )
    environment = suite.make(jobs[0].task)
    try:
        for job in jobs:
            rows = _scenes(environment, job)
            with atomic_path(job.path) as temporary:
                pq.write_table(pa.Table.from_pylist(rows), temporary)
    finally:
        environment.close()


def _scenes(environment: LiberoEnvironment, job: _Job) -> list[dict]:
    generator = np.random.default_rng([STREAMS["demonstration"], job.seed, job.task, job.block, 3])
    environment.render = False
    environment.reset(0)
    poses = _arm_poses(environment, generator)
    names = environment.movable_objects
    rows = []
    for scene in range(SCENES_PER_FILE):
        environment.place_objects(FIRST_EPISODE + job.block * SCENES_PER_FILE + scene)
        order = generator.permutation(len(poses))
        for pose in order:
            environment.pose_arm(poses[pose])
            if not any(environment.meets_hand(name) for name in (*names, BASKET)):
                break
        else:
            continue  # an arm in an object is no scene
        places = np.stack(
            [
                environment.project(
                    np.stack([np.mean(environment.object_box(name), axis=0) for name in names]), camera
                )
                for camera in CAMERAS
            ],
            axis=1,
        )
        environment.render = True
        seen = environment.look().images
        environment.render = False
        frames = [encode_image(resized(frame, job.image_size), "png") for frame in seen]
        rows.append(
            {
                "image": frames[0],
                "wrist_image": frames[1],
                "objects": names,
                "places": places.round(5).tolist(),
            }
        )
    return rows


def _arm_poses(environment: LiberoEnvironment, generator: np.random.Generator) -> list[np.ndarray]:
    """Joint angles met on a way through random points, fingers open or closed."""
    poses = []
    while len(poses) < POSES_PER_FILE:
        point = generator.uniform(*HAND_BOX)
        fingers = generator.choice([-1.0, -1.0, 1.0])
        for step in range(24):
            move = np.clip(ARM_SPEED * (point - environment.gripper_position), -1.0, 1.0)
            environment.step(np.array([*move, 0.0, 0.0, 0.0, fingers]), observe=False)
            if step % 6 == 5:
                poses.append(environment.arm_pose)
    return poses
