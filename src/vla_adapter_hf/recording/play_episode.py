"""Record the episode that `vla-adapter demo` predicts on, with the scripted expert in the simulator.

    python -m vla_adapter_hf.recording.play_episode OUTPUT [--task 7 --state 44]

The same arguments write the same files.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from vla_adapter_hf.recording.played_episode import PlayedEpisode
from vla_adapter_hf.simulation.libero.expert import LiberoObjectExpert
from vla_adapter_hf.simulation.libero.suite import CAMERAS, LiberoSuite


SCENE_SIZE = 768  # pixels
CHUNK_SIZE = 8  # of the checkpoint that ships with the package
TAIL = 8  # steps after success, so that the last steps before it begin whole chunks


def play_episode(task: int, state: int, chunk_size: int = CHUNK_SIZE) -> PlayedEpisode:
    """Let the scripted expert play an episode of libero_object from an official initial state.

    Args:
        task: number of the task.
        state: number of the initial state; `demonstrate` records 0 to 39, evaluation uses 40 to 49.
        chunk_size: steps from one observation to the next.

    Raises:
        RuntimeError: the expert did not solve the task.
        ImportError: LIBERO is not installed.
    """
    environment = LiberoSuite("libero_object").make(task)
    try:
        environment.reset(state)
        expert = LiberoObjectExpert(environment)
        objects = {name: environment.object_position(name).round(5).tolist() for name in environment.movable_objects}
        camera_matrix = environment.camera_matrix(CAMERAS[0])
        observations, actions, positions = [environment.observe()], [], [environment.gripper_position]
        solved_at = None
        while solved_at is None or len(actions) <= solved_at + TAIL:
            if len(actions) == environment.step_limit:
                raise RuntimeError(f"the expert did not solve task {task} from initial state {state}.")
            actions.append(expert.act().round(4))
            sees = len(actions) % chunk_size == 0
            success = environment.step(actions[-1], observe=sees)
            positions.append(environment.gripper_position)
            if sees:
                observations.append(environment.observe())
            if success and solved_at is None:
                solved_at = len(actions) - 1
        instruction = environment.instruction
    finally:
        environment.close()
    steps = np.arange(0, min(solved_at, len(actions) - chunk_size) + 1, chunk_size)
    return PlayedEpisode(
        instruction=instruction,
        source={
            "suite": "libero_object",
            "task": task,
            "initial_state": state,
            "placement": "official",
            "simulator_seed": 0,
            "played_by": "the scripted expert",
            "solved_at_step": solved_at,
        },
        steps=steps,
        frames=np.stack([np.stack(observation.images) for observation in observations[: len(steps)]]),
        scene=_render_scene(task, state),
        states=np.stack([observation.state for observation in observations[: len(steps)]]),
        actions=np.stack(actions),
        positions=np.stack(positions).round(5),
        camera_matrix=camera_matrix,
        objects=objects,
    )


def _render_scene(task: int, state: int) -> np.ndarray:
    environment = LiberoSuite("libero_object", image_size=SCENE_SIZE).make(task)
    try:
        environment.reset(state)
        return environment.observe().images[0]
    finally:
        environment.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder to write, which must not exist or be empty")
    parser.add_argument("--task", type=int, default=7)
    parser.add_argument("--state", type=int, default=44)
    arguments = parser.parse_args()
    play_episode(arguments.task, arguments.state).save(arguments.output)


if __name__ == "__main__":
    main()
