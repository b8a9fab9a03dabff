"""What LeRobot's frame size in LIBERO, 360 pixels instead of 256, changes in the actions of the embedded policy.

Episodes are played at 256 pixels. At each question the same moment is also rendered at 360 pixels.

python benchmarks/frame_size.py
"""

from __future__ import annotations

import argparse

import numpy as np

from vla_adapter_hf.checkpoints.embedded import embedded_folder
from vla_adapter_hf.robots import get_robot
from vla_adapter_hf.simulation.libero.suite import LiberoSuite
from vla_adapter_hf.simulation.policies import CheckpointPolicy, Request


SUITE = "libero_object"
MAX_STEPS = 280


def play(policy: CheckpointPolicy, task: int) -> tuple[bool, np.ndarray]:
    """Whether the first episode of a task was solved, and the chunks `(2, questions, chunk, values)` at both sizes."""
    ours, lerobots = LiberoSuite(SUITE).make(task), LiberoSuite(SUITE, image_size=360).make(task)
    ours.reset(0)
    lerobots.reset(0)
    chunks, solved, step = [], False, 0
    while not solved and step < MAX_STEPS:
        lerobots.restore_physics(ours.save_physics())
        seen = (ours.look(), lerobots.look())
        chunks.append(policy.predict([Request(frames, ours.instruction, task, 0, step) for frames in seen]))
        for action in get_robot("libero").to_environment(chunks[-1][0]):
            solved, step = ours.step(action, observe=False), step + 1
            if solved:
                break
    ours.close()
    lerobots.close()
    return bool(solved), np.swapaxes(chunks, 0, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, nargs="+", default=[0, 1, 2])
    tasks = parser.parse_args().tasks
    with embedded_folder() as folder:
        policy = CheckpointPolicy(folder / "checkpoint", "libero", suite=SUITE)
    print("| task | solved | mean difference | largest | mean action | gripper commands that differ |")
    print("|---|---|---|---|---|---|")
    for task in tasks:
        solved, (ours, lerobots) = play(policy, task)
        difference = np.abs(ours - lerobots)[..., :6]
        turned = (ours[..., 6] > 0.5) != (lerobots[..., 6] > 0.5)
        print(
            f"| {task} | {'yes' if solved else 'no'} | {difference.mean():.4f} | {difference.max():.3f} | "
            f"{np.abs(ours[..., :6]).mean():.3f} | {turned.sum()} of {turned.size} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
