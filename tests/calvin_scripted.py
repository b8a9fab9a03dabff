"""A scripted policy for CALVIN, and recordings of it in CALVIN's own format. Needs CALVIN's simulator.

    python tests/calvin_scripted.py play results/scripted --episodes 30 --processes 2 --rollouts 4
    python tests/calvin_scripted.py record recordings --subtasks open_drawer close_drawer --episodes 4

The policy reads the simulator's state: it looks at no frame. It moves the gripper along waypoints, pushes furniture,
grasps blocks and turns them. It shows that sequences are played and judged as they should be, and it gives
demonstrations. It is no baseline.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import calvin_writer
import numpy as np

from vla_adapter_hf.simulation.calvin.install import read_instructions
from vla_adapter_hf.simulation.calvin.simulation import CalvinSimulation
from vla_adapter_hf.simulation.calvin.suite import SequenceEnvironment, published_suite
from vla_adapter_hf.simulation.evaluate import evaluate
from vla_adapter_hf.simulation.settings import EvaluationSettings


CLOSED, OPEN = -1.0, 1.0
STEP = 0.02  # metres that the arm moves with an action of 1
SAFE = 0.60  # metres: above all furniture that is not behind
STEP_LIMIT = 360


class Waypoint(NamedTuple):
    """Where to go, with which gripper, how near is near enough, and when to go on all the same.

    Attributes:
        target: metres, or a function that gives them when the waypoint's turn has come.
        yaw: turn of the hand at every step, -1...1.
    """

    target: Any
    gripper: float = CLOSED
    tolerance: float = 0.015
    steps: int = 80
    yaw: float = 0.0


class Motion:
    """Plays one subtask after the other in a simulation."""

    def __init__(self, simulation: CalvinSimulation) -> None:
        self.simulation = simulation
        self.subtask = ""

    def begin(self, subtask: str) -> None:
        """Plans the subtask from where the gripper is."""
        self.subtask, self._left = subtask, 3
        self._plan_again()

    def act(self) -> np.ndarray:
        """The next action (7,)."""
        if self._number >= len(self._plan) and self._left:
            self._plan_again()
        if self._number >= len(self._plan):
            return np.array([0.0] * 6 + [OPEN])
        point = self._plan[self._number]
        if callable(point.target):
            point = self._plan[self._number] = point._replace(target=point.target())
        away = np.asarray(point.target) - self.gripper
        self._steps += 1
        if np.linalg.norm(away) < point.tolerance or self._steps > point.steps:
            self._number, self._steps = self._number + 1, 0
        # Rounded as a recording stores it, so that a replay is the same to the last bit.
        return np.array([*np.clip(away / STEP, -1, 1), 0.0, 0.0, point.yaw, point.gripper], dtype=np.float32)

    def _plan_again(self) -> None:
        self._left -= 1
        self._number = self._steps = 0
        make = PLANS.get(self.subtask)
        self._plan = [] if make is None else self._retreat() + make(self)

    def _retreat(self) -> list[Waypoint]:
        """Away from the furniture, then up. A hand that holds a block stays where it is."""
        x, y, z = self.gripper
        if self.subtask.startswith("place") or (z > 0.56 and y < -0.06):
            return []
        back = min(y - 0.03, -0.16) if z > 0.44 else y
        return [Waypoint((x, back, z), steps=30), Waypoint((x, back, SAFE), tolerance=0.03, steps=40)]

    @property
    def gripper(self) -> np.ndarray:
        """Its position (3,)."""
        return np.array(self.simulation.environment.robot.get_observation()[0][:3])

    def bounds(self, link: str) -> np.ndarray:
        """Lowest and highest corner (2, 3) of a part of the furniture."""
        table = self.simulation.environment.scene.fixed_objects[0]
        return np.array(self.simulation.environment.p.getAABB(table.uid, table.get_info()["links"][link]))

    def block(self, color: str) -> np.ndarray:
        """Lowest and highest corner (2, 3) of a block."""
        found = next(o for o in self.simulation.environment.scene.movable_objects if color in o.name)
        return np.array(self.simulation.environment.p.getAABB(found.uid, -1))


# -- plans: from the motion to its waypoints --------------------------------------------------------------------------


def press_button(motion: Motion) -> list[Waypoint]:
    x, y, _ = motion.bounds("button_link").mean(axis=0)
    return [Waypoint((x, y, z), tolerance=0.005) for z in (SAFE, 0.50, 0.43, 0.62)]


def move_slider(side: int) -> Callable[[Motion], list[Waypoint]]:
    def plan(motion: Motion) -> list[Waypoint]:
        x, z = motion.bounds("slide_link").mean(axis=0)[0], 0.53
        start = x - side * 0.10
        end = Waypoint((x + side * 0.34, -0.02, z), steps=120)
        return [Waypoint((start, -0.18, SAFE)), Waypoint((start, -0.18, z)), Waypoint((start, -0.02, z)), end]

    return plan


def open_drawer(motion: Motion) -> list[Waypoint]:
    low, high = motion.bounds("drawer_link")
    x, y, z = (low[0] + high[0]) / 2, low[1] + 0.025, 0.365
    return [
        Waypoint((x, low[1] - 0.08, SAFE), tolerance=0.02),
        Waypoint((x, y, 0.46)),
        Waypoint((x, y, z), tolerance=0.012),
        Waypoint((x, y - 0.28, z), steps=120),
    ]


def close_drawer(motion: Motion) -> list[Waypoint]:
    low, high = motion.bounds("drawer_link")
    x, y, z = (low[0] + high[0]) / 2, low[1] - 0.06, 0.37
    return [Waypoint((x, y, SAFE), tolerance=0.02), Waypoint((x, y, z)), Waypoint((x, y + 0.30, z), steps=120)]


def move_switch(up: bool) -> Callable[[Motion], list[Waypoint]]:
    def plan(motion: Motion) -> list[Waypoint]:
        low, high = motion.bounds("switch_link")
        x, before = (low[0] + high[0]) / 2, low[1] - 0.12
        y = (low[1] + high[1]) / 2 + 0.01 if up else low[1] + 0.03
        start, end = (low[2] - 0.035, high[2] + 0.12) if up else (high[2] + 0.06, low[2] - 0.10)
        return [
            Waypoint((x, before, max(start, 0.52)), tolerance=0.02, steps=120),
            Waypoint((x, before, start)),
            Waypoint((x, y, start)),
            Waypoint((x, y, end)),
        ]

    return plan


def push_block(color: str, side: int) -> Callable[[Motion], list[Waypoint]]:
    def plan(motion: Motion) -> list[Waypoint]:
        low, high = motion.block(color)
        x, y, _ = (low + high) / 2
        start, z = (low[0] if side > 0 else high[0]) - side * 0.05, 0.475
        return [Waypoint((start, y, SAFE)), Waypoint((start, y, z), tolerance=0.01), Waypoint((x + side * 0.16, y, z))]

    return plan


def grasp(motion: Motion, color: str) -> list[Waypoint]:
    """Above the block, down, and close."""

    def above(height: float) -> Callable[[], np.ndarray]:
        return lambda: np.append(motion.block(color).mean(axis=0)[:2], height)

    return [
        Waypoint(above(0.62), OPEN, 0.01),
        Waypoint(above(0.53), OPEN, 0.008, 60),
        Waypoint(lambda: above(motion.block(color)[0, 2] + 0.02)(), OPEN, 0.008, 60),
        Waypoint(lambda: motion.gripper, CLOSED, 0.0, 12),
    ]


def lift_block(color: str) -> Callable[[Motion], list[Waypoint]]:
    return lambda motion: [
        *grasp(motion, color),
        Waypoint(lambda: motion.gripper + (0, 0, 0.14), CLOSED, 0.02, 60),
    ]


def rotate_block(color: str, side: int) -> Callable[[Motion], list[Waypoint]]:
    return lambda motion: [
        *grasp(motion, color),
        Waypoint(lambda: motion.gripper, CLOSED, 0.0, 40, yaw=side),
        Waypoint(lambda: motion.gripper, OPEN, 0.0, 10),
        Waypoint(lambda: motion.gripper + (0, 0, 0.14), OPEN, 0.02, 40),
    ]


def place(in_drawer: bool) -> Callable[[Motion], list[Waypoint]]:
    def plan(motion: Motion) -> list[Waypoint]:
        x, y, _ = motion.gripper
        if in_drawer:
            low, high = motion.bounds("drawer_link")
            to_x, to_y = (low[0] + high[0]) / 2, low[1] + 0.07
        else:  # on the side that the door does not cover
            door = motion.bounds("slide_link").mean(axis=0)[0]
            to_x, to_y = (0.04 if door < -0.1 else -0.24), 0.09
        return [
            Waypoint((x, y, 0.64), tolerance=0.02, steps=60),
            Waypoint((to_x, min(to_y, -0.02), 0.64), steps=120),
            Waypoint((to_x, to_y, 0.64)),
            Waypoint((to_x, to_y, 0.50)),
            Waypoint((to_x, to_y, 0.50), OPEN, 0.0, 15),
            Waypoint((to_x, to_y, 0.64), OPEN, 0.02, 40),
        ]

    return plan


PLANS: dict[str, Callable[[Motion], list[Waypoint]]] = {
    "turn_on_led": press_button,
    "turn_off_led": press_button,
    "open_drawer": open_drawer,
    "close_drawer": close_drawer,
    "move_slider_left": move_slider(-1),
    "move_slider_right": move_slider(1),
    "turn_on_lightbulb": move_switch(True),
    "turn_off_lightbulb": move_switch(False),
    "place_in_slider": place(in_drawer=False),
    "place_in_drawer": place(in_drawer=True),
}
"""CALVIN's subtasks that are scripted. At the others the arm stands still."""

for color in ("red", "blue", "pink"):
    PLANS |= {f"lift_{color}_block_{place}": lift_block(color) for place in ("table", "slider", "drawer")}
    for name, side in (("left", -1), ("right", 1)):
        PLANS[f"push_{color}_block_{name}"] = push_block(color, side)
        PLANS[f"rotate_{color}_block_{name}"] = rotate_block(color, -side)


class ScriptedPolicy:
    """`Motion` as a policy that lives in the simulator's process."""

    name = "scripted"

    def attach(self, environment: SequenceEnvironment) -> Callable[[], np.ndarray]:
        motion = Motion(environment.simulation)

        def act() -> np.ndarray:
            if environment.subtask != motion.subtask:
                motion.begin(environment.subtask)
            return motion.act()

        return act


# -- recording --------------------------------------------------------------------------------------------------------


def record(
    simulation: CalvinSimulation,
    folder: Path,
    scenes: Sequence[tuple[str, dict[str, Any]]],
    instructions: dict[str, str],
    tail: int = 8,
) -> list[bool]:
    """Writes scripted motions in CALVIN's format, each with its subtask's instruction.

    Args:
        scenes: subtask and initial state of every recording.
        tail: steps that are recorded after success, in which the arm goes on.

    Returns:
        Whether each of them was solved. Those that were not are recorded too, without an instruction.
    """
    folder.mkdir(parents=True, exist_ok=True)
    recordings, spans, solved = [], [], []
    motion, step = Motion(simulation), 0
    for subtask, scene in scenes:
        simulation.reset(scene)
        simulation.begin_subtask(subtask)
        motion.begin(subtask)
        first, ends = step, None
        while step - first < STEP_LIMIT and step != ends:
            observation, action = simulation.observe(), motion.act()
            robot = simulation.environment.robot.get_observation()[0]
            calvin_writer.write_step(folder, step, *observation.images, np.asarray(robot), action)
            if simulation.step(action) and ends is None:
                ends = step + 1 + tail
            step += 1
        recordings.append((first, step - 1))
        solved.append(ends is not None)
        if solved[-1]:
            spans.append((first, step - 1, instructions[subtask], subtask))
        step += 100  # recordings do not follow each other
    calvin_writer.write_spans(folder, recordings, spans)
    return solved


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("play", "record"))
    parser.add_argument("output", type=Path)
    parser.add_argument("--episodes", type=int, default=30, help="sequences to play; recordings of every subtask")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--rollouts", type=int, default=0)
    parser.add_argument("--subtasks", nargs="+", default=["open_drawer", "turn_on_led", "move_slider_left"])
    given = parser.parse_args()
    if given.what == "play":
        settings = EvaluationSettings(
            renderer="cpu",
            episodes=given.episodes,
            processes=given.processes,
            rollouts=given.rollouts,
            step_limit=STEP_LIMIT,
        )
        evaluate(ScriptedPolicy(), "calvin_abc_d", given.output, settings)
        return
    scenes = []
    for subtask in given.subtasks:
        fitting = [s.initial_state for s in published_suite().sequences if s.subtasks[0] == subtask]
        scenes += [(subtask, scene) for scene in fitting[: given.episodes]]
    solved = record(CalvinSimulation("cpu"), given.output, scenes, read_instructions())
    print(f"{sum(solved)} of {len(solved)} recordings solved their subtask")


if __name__ == "__main__":
    main()
