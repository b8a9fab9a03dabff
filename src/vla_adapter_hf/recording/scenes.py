"""Single frames of many scenes, with the position of each object in them, to pretrain on.

An episode shows one scene from a hundred almost equal viewpoints. Learning to recognise the objects and where they are
needs many scenes, and one frame per camera of each is enough. Nothing moves in them, so only rendering takes time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vla_adapter_hf.recording.episodes import resized
from vla_adapter_hf.recording.jobs import check_settings, in_turns, run_jobs
from vla_adapter_hf.recording.settings import SceneSettings
from vla_adapter_hf.simulation.libero.suite import CAMERAS, LiberoEnvironment, LiberoSuite
from vla_adapter_hf.simulation.placement import STREAMS
from vla_adapter_hf.utils.files import atomic_path, exclusive_folder
from vla_adapter_hf.utils.frames import encode_image


SCENES_PER_FILE = 30
POSES_PER_FILE = 30
FILES_PER_JOB = 4  # building an environment takes as long as half a file
HAND_BOX = np.array([[-0.25, -0.28, 0.06], [0.15, 0.32, 0.36]])  # where the hand may be over the floor, metres
ARM_SPEED = 10.0  # actions per metre of remaining distance, before clipping
FIRST_EPISODE = 1_000_000  # beyond any recorded episode, so that no scene is one of theirs


@dataclass(frozen=True)
class _Job:
    """Files of one task, by their numbers."""

    output: Path
    task: int
    blocks: tuple[int, ...]
    settings: SceneSettings

    def path(self, block: int) -> Path:
        return self.output / f"{block:04d}-{self.task:02d}.parquet"


def record_scenes(output: str | Path, settings: SceneSettings, report: Callable[[str], None] = print) -> int:
    """Renders scenes of libero_object, in which objects and hand have positions of their own.

    Objects are placed as in the placement `both`, from the stream `demonstration`, which no evaluation uses. Every
    file of `output` holds up to `SCENES_PER_FILE` scenes of one task: `image` and `wrist_image` (PNG), `objects`
    (names), and `places` `(objects, 2 cameras, 2)`, the centre of each object as fractions of the image's width and
    height, NaN behind the camera. Files that exist are kept, so the same call goes on after a kill.

    Args:
        output: folder of the files.
        settings: everything else, see [`SceneSettings`].
        report: receives a line of progress after every few files.

    Returns:
        The number of scenes; a scene is left out where no pose of the arm is free, and still counted.

    Raises:
        ValueError: the folder was begun with other settings, or another process is writing to it.
        ImportError: LIBERO is not installed.
    """
    output = Path(output)
    tasks = range(len(LiberoSuite("libero_object").tasks))
    blocks = range(-(-settings.scenes // SCENES_PER_FILE))
    with exclusive_folder(output):
        found, advice = f"output={output} was begun with", "name another folder, or record with the same settings"
        check_settings(output / "settings.json", settings.describe(), found, advice)
        waiting = {
            task: [block for block in blocks if not _Job(output, task, (), settings).path(block).exists()]
            for task in tasks
        }
        files = len(tasks) * len(blocks) - sum(map(len, waiting.values()))

        def finished(written: int, minutes: float) -> None:
            nonlocal files
            files += written
            report(f"{files * SCENES_PER_FILE} scenes after {minutes:.1f} min")

        jobs = [_Job(output, task, part, settings) for task, part in in_turns(waiting, FILES_PER_JOB)]
        run_jobs(_record_files, jobs, settings.workers, settings.minutes, finished)
    return files * SCENES_PER_FILE


def _record_files(job: _Job) -> int:
    options = {"placement": "both", "stream": "demonstration"}
    suite = LiberoSuite("libero_object", seed=job.settings.seed, states=job.settings.states, **options)
    environment = suite.make(job.task)
    try:
        for block in job.blocks:
            rows = _scenes(environment, block, job.settings)
            with atomic_path(job.path(block)) as temporary:
                pq.write_table(pa.Table.from_pylist(rows), temporary)
    finally:
        environment.close()
    return len(job.blocks)


def _scenes(environment: LiberoEnvironment, block: int, settings: SceneSettings) -> list[dict]:
    generator = np.random.default_rng([STREAMS["demonstration"], settings.seed, environment.task, block, 3])
    environment.render = False
    environment.reset(0)
    poses = _arm_poses(environment, generator)
    names = environment.movable_objects
    rows = []
    for scene in range(SCENES_PER_FILE):
        environment.place_objects(FIRST_EPISODE + block * SCENES_PER_FILE + scene)
        order = generator.permutation(len(poses))
        for pose in order:
            environment.pose_arm(poses[pose])
            if not any(environment.meets_hand(name) for name in (*names, environment.basket)):
                break
        else:
            continue  # the arm would be inside an object
        centres = np.stack([np.mean(environment.object_box(name), axis=0) for name in names])
        places = np.stack([environment.project(centres, camera) for camera in CAMERAS], axis=1)
        environment.render = True
        seen = environment.look().images
        environment.render = False
        frames = [encode_image(resized(frame, settings.image_size), "png") for frame in seen]
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
    """Joint angles on a path through random points, with fingers open or closed."""
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
