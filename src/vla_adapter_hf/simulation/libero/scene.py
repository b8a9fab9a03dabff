"""The true state of a LIBERO scene, for scripted experts and recorders. A policy under test must not use it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from vla_adapter_hf.simulation.libero.arrangement import Surface
from vla_adapter_hf.simulation.libero.task_files import Predicates
from vla_adapter_hf.simulation.placement import HAND, PALM_OVER_TOP, Footprint


@dataclass(frozen=True)
class PhysicalState:
    """Physics, controller, gripper and clock at one moment of an episode."""

    physics: np.ndarray
    controller: dict[str, Any]
    gripper: np.ndarray
    clock: tuple[int, float, bool]


class LiberoScene:
    """Reads and sets positions in a robosuite environment.

    Args:
        env: LIBERO's environment, inside its wrapper.
        basket_region: libero_object and its perturbations: the region of the basket where objects count as placed.
    """

    def __init__(self, env: Any, basket_region: str) -> None:
        self._env = env
        self.basket_site, self.basket = basket_region, basket_region.removesuffix("_contain_region")
        self._geoms: dict[str, list[int]] = {}

    @property
    def gripper_position(self) -> np.ndarray:
        """(3,) the point between the fingertips, metres."""
        robot = self._env.robots[0]
        return self._env.sim.data.site_xpos[robot.eef_site_id].copy()

    @property
    def closing_direction(self) -> np.ndarray:
        """(3,) unit vector from one fingertip to the other."""
        pads = self._env.robots[0].gripper.important_geoms
        data, model = self._env.sim.data, self._env.sim.model
        ends = [data.geom_xpos[model.geom_name2id(pads[f"{side}_fingerpad"][0])] for side in ("left", "right")]
        return (ends[1] - ends[0]) / np.linalg.norm(ends[1] - ends[0])

    @property
    def gripper_speed(self) -> float:
        """Closing or opening speed of the fingers, metres per second."""
        robot = self._env.robots[0]
        return float(np.abs(self._env.sim.data.qvel[robot._ref_gripper_joint_vel_indexes]).max())

    @property
    def basket_region(self) -> Footprint:
        """The region of the basket that counts, on the floor plane."""
        data, model = self._env.sim.data, self._env.sim.model
        site = model.site_name2id(self.basket_site)
        half = np.abs(data.site_xmat[site].reshape(3, 3) @ model.site_size[site])
        return Footprint(data.site_xpos[site][:2].copy(), half[:2])

    def object_position(self, name: str) -> np.ndarray:
        """(3,) position of an object's body, metres."""
        return self._env.sim.data.body_xpos[self._env.obj_body_id[name]].copy()

    def object_box(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper corner, each (3,), of the axis-aligned box round an object's collision shapes, metres."""
        model, data = self._env.sim.model._model, self._env.sim.data._data
        lower, upper = np.full(3, np.inf), np.full(3, -np.inf)
        for geom in self._collision_geoms(name):
            rotation = data.geom_xmat[geom].reshape(3, 3)
            centre = data.geom_xpos[geom] + rotation @ model.geom_aabb[geom][:3]
            half = np.abs(rotation) @ model.geom_aabb[geom][3:]
            lower, upper = np.minimum(lower, centre - half), np.maximum(upper, centre + half)
        return lower, upper

    def object_pose(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Position (3,) of an object's body, metres, and its rotation matrix (3, 3)."""
        body = self._env.obj_body_id[name]
        data = self._env.sim.data
        return data.body_xpos[body].copy(), data.body_xmat[body].reshape(3, 3).copy()

    def footprint(self, name: str) -> Footprint:
        """The rectangle round an object's or a fixture's collision shapes, from above."""
        lower, upper = self.object_box(name)
        return Footprint((lower + upper)[:2] / 2, (upper - lower)[:2] / 2)

    def surface(self, region: str) -> Surface:
        """A region of a fixture, from above."""
        data, model = self._env.sim.data, self._env.sim.model
        site = model.site_name2id(region)
        rotation = data.site_xmat[site].reshape(3, 3)
        # The axis that points up may be any of the three.
        flat = np.argsort(np.abs(rotation[2]))[:2]
        return Surface(data.site_xpos[site][:2].copy(), rotation[:2, flat].copy(), model.site_size[site][flat].copy())

    @property
    def fixtures(self) -> list[str]:
        """Names of what stands fast, without the table."""
        return [name for name in self._env.fixtures_dict if name in self._env.obj_body_id]

    @property
    def robot_base(self) -> np.ndarray:
        """(2,) where the robot stands, from above, metres."""
        return np.array(self._env.robots[0].base_pos[:2])

    def is_at_rest(self, name: str) -> bool:
        """Whether an object stands. Some of libero_10's are thrown out of the scene at its beginning."""
        first, _ = self._env.sim.model.get_joint_qvel_addr(self._env.objects_dict[name].joints[-1])
        return bool(np.linalg.norm(self._env.sim.data.qvel[first : first + 3]) < 0.05)

    def shift_object(self, state: np.ndarray, name: str, shift: np.ndarray) -> None:
        """Moves an object by (2,) metres in a flattened simulator state."""
        first, _ = self._env.sim.model.get_joint_qpos_addr(self._env.objects_dict[name].joints[-1])
        state[1 + first : 3 + first] += shift  # the flattened state begins with the time

    def holding(self, predicates: Predicates) -> Predicates:
        """Those of the predicates that are true."""
        return [state for state in predicates if self._env._eval_predicate(state)]

    def object_width(self, name: str, direction: np.ndarray) -> float:
        """Extent of an object's collision shapes along a unit vector (3,), metres."""
        model, data = self._env.sim.model._model, self._env.sim.data._data
        ends = []
        for geom in self._collision_geoms(name):
            rotation = data.geom_xmat[geom].reshape(3, 3)
            middle = direction @ (data.geom_xpos[geom] + rotation @ model.geom_aabb[geom][:3])
            half = np.abs(direction @ rotation) @ model.geom_aabb[geom][3:]
            ends += [middle - half, middle + half]
        return float(max(ends) - min(ends))

    def meets_hand(self, name: str) -> bool:
        """Whether the hand is inside an object, or so close above it that it would touch it when it moves sideways."""
        lower, upper = self.object_box(name)
        fingers = self.gripper_position
        apart = np.maximum(np.maximum(lower[:2] - fingers[:2], fingers[:2] - upper[:2]), 0.0)
        return bool(np.hypot(*apart) < HAND[1] and fingers[2] < upper[2] + PALM_OVER_TOP)

    def is_grasped(self, name: str) -> bool:
        """Whether both fingers touch the object, with their pads or any other part."""
        fingers = self._env.robots[0].gripper.important_geoms
        sides = [fingers["left_finger"], fingers["right_finger"]]
        return bool(self._env._check_grasp(gripper=sides, object_geoms=self._env.objects_dict[name]))

    @property
    def arm_pose(self) -> np.ndarray:
        """Angles of the arm's joints (7,), radians, and of the fingers' (2,), metres."""
        return self._env.sim.data.qpos[self._arm_joints].copy()

    def pose_arm(self, pose: np.ndarray) -> None:
        """Sets arm and fingers to an `arm_pose`, at rest. Objects in the way are ignored."""
        self._env.sim.data.qpos[self._arm_joints] = pose
        self._env.sim.data.qvel[:] = 0.0
        self._env.sim.forward()

    def camera_matrix(self, camera: str) -> np.ndarray:
        """The projection (3, 4) of one of `CAMERAS` as it stands now: (x, y, z, 1) in metres to (u w, v w, w).

        u and v are fractions of a frame's width from the left and of its height from the top; w is the depth, metres.
        """
        model, data = self._env.sim.model._model, self._env.sim.data._data
        index = self._env.sim.model.camera_name2id(camera)
        rotation = data.cam_xmat[index].reshape(3, 3).T
        focal_length = 0.5 / math.tan(math.radians(model.cam_fovy[index]) / 2)
        # The camera looks along its negative z. Frames are mirrored, as in the training data.
        intrinsics = np.array([[-focal_length, 0.0, -0.5], [0.0, -focal_length, -0.5], [0.0, 0.0, -1.0]])
        return intrinsics @ np.column_stack([rotation, -rotation @ data.cam_xpos[index]])

    def project(self, points: np.ndarray, camera: str) -> np.ndarray:
        """Where points (N, 3) of the world are in the frames of one of `CAMERAS`.

        Returns:
            (N, 2): fractions of the frame's width from the left and of its height from the top. Points outside the
            frame have values below 0 or above 1, points behind the camera NaN.
        """
        seen = np.column_stack([points, np.ones(len(points))]) @ self.camera_matrix(camera).T
        return seen[:, :2] / np.where(seen[:, 2:] > 0, seen[:, 2:], np.nan)

    def save_physics(self) -> PhysicalState:
        """Everything in the simulator that decides how the episode goes on."""
        import mujoco

        robot = self._env.robots[0]
        model, data = self._env.sim.model._model, self._env.sim.data._data
        physics = np.empty(mujoco.mj_stateSize(model, mujoco.mjtState.mjSTATE_INTEGRATION))
        mujoco.mj_getState(model, data, physics, mujoco.mjtState.mjSTATE_INTEGRATION)
        return PhysicalState(
            physics=physics,
            controller={
                name: np.copy(value) if isinstance(value, np.ndarray) else value
                for name, value in vars(robot.controller).items()
                if isinstance(value, (np.ndarray, bool, int, float, type(None)))
            },
            gripper=np.copy(robot.gripper.current_action),
            clock=(self._env.timestep, self._env.cur_time, self._env.done),
        )

    def restore_physics(self, saved: PhysicalState) -> None:
        """Goes back to a state that was saved in this episode."""
        import mujoco

        robot, sim = self._env.robots[0], self._env.sim
        model, data = sim.model._model, sim.data._data
        mujoco.mj_setState(model, data, saved.physics, mujoco.mjtState.mjSTATE_INTEGRATION)
        sim.forward()
        # forward() derives everything else from positions and velocities, but overwrites the solver's initial guess.
        mujoco.mj_setState(model, data, saved.physics, mujoco.mjtState.mjSTATE_INTEGRATION)
        for name, value in saved.controller.items():
            setattr(robot.controller, name, np.copy(value) if isinstance(value, np.ndarray) else value)
        robot.gripper.current_action = np.copy(saved.gripper)
        self._env.timestep, self._env.cur_time, self._env.done = saved.clock

    @cached_property
    def _arm_joints(self) -> list[int]:
        robot = self._env.robots[0]
        return [*robot._ref_joint_pos_indexes, *robot._ref_gripper_joint_pos_indexes]

    def _collision_geoms(self, name: str) -> Sequence[int]:
        # Cached: a loop over all shapes takes as long as a physics step. A hard reset builds the same model again.
        if name in self._geoms:
            return self._geoms[name]
        model = self._env.sim.model._model
        root = self._env.obj_body_id[name]
        geoms = []
        for geom in range(model.ngeom):
            body = model.geom_bodyid[geom]
            while body not in (0, root):
                body = model.body_parentid[body]
            if body == root and (model.geom_contype[geom] or model.geom_conaffinity[geom]):
                geoms.append(geom)
        self._geoms[name] = geoms
        return geoms
