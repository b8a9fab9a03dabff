"""A scripted expert for libero_object that reads the simulator's state.

It moves above the object with the gripper open, moves down, closes the gripper, lifts the object, carries it over the
basket and opens the gripper. The next action depends on the present state and hardly on earlier actions. So the expert
recovers from disturbances, and a policy without memory can imitate it. In each state there is one grasp: where the
object's narrow side can be gripped from two yaws half a turn apart, the expert takes the nearer one, from a half-open
range in which each direction occurs once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from vla_adapter_hf.simulation.libero.suite import LiberoEnvironment


GRASPABLE_WIDTH = 0.068  # metres; the Panda gripper opens to 0.08
_POSITION_UNIT = 0.05  # metres that an action of 1 asks for (robosuite's OSC_POSE controller)
_ROTATION_UNIT = 0.5  # radians that an action of 1 asks for


@dataclass(frozen=True)
class ExpertSettings:
    """Distances in metres.

    Attributes:
        gain: factor from the remaining distance to the commanded one (the arm moves about a quarter of the command).
        slope: height of the fingers over the grasp point per metre of sideways distance while they approach it.
        reach: horizontal distance within which they go all the way down.
        aligned: distance to the grasp point at which the gripper closes.
        overhead: free height over the object's top while the fingers are not yet above the grasp point.
        depth: distance of the grip below the object's top; beyond 0.037 the palm would touch the object.
        floor: lowest height of the point between the fingertips; lower, they would touch the floor.
        patience: steps after which a gripper that touches the object on both sides counts as closed, even if it moves.
        rim: height of the basket's rim over the floor.
        clearance: free height under the object while it is carried over the rim.
        stretched: forward position (x) beyond which the arm draws back while it lifts.
        skim: free height under the object while the arm draws back.
        still: finger speed (m/s) below which a closing gripper has closed.
        release: horizontal distance to the basket's centre at which the gripper opens.
        yaw_tolerance: yaw error (radians) that is not corrected. No object of libero_object needs a turn; without this
            margin every demonstration would contain rotations of a few thousandths, which are noise to a policy.
    """

    gain: float = 2.0
    slope: float = 2.5
    reach: float = 0.007
    aligned: float = 0.008
    overhead: float = 0.03
    depth: float = 0.03
    floor: float = 0.014
    patience: int = 10
    rim: float = 0.137
    clearance: float = 0.03
    stretched: float = 0.06
    skim: float = 0.05
    still: float = 0.01
    release: float = 0.02
    yaw_tolerance: float = 0.15


class LiberoObjectExpert:
    """Chooses the next action for the environment's current target.

    Args:
        environment: a libero_object environment after `reset`.
        settings: distances and speeds.
        closing: number of steps for which the gripper has been commanded to close before this expert takes over.

    Raises:
        ValueError: the environment is not of libero_object.
    """

    def __init__(
        self, environment: LiberoEnvironment, settings: ExpertSettings | None = None, closing: int = 0
    ) -> None:
        if environment.suite.base != "libero_object":
            raise ValueError(f"the scripted expert only knows libero_object, got {environment.suite.name}")
        self.environment = environment
        self.settings = settings or ExpertSettings()
        self.is_approaching = False  # with an open gripper, at the action chosen last
        self._closing = closing  # steps so far
        self._released = False
        self._direction = self._nearest_closing_direction()

    def act(self) -> np.ndarray:
        """The next raw action (7,) float64: six deltas in -1...1 and the gripper, -1 open or +1 closed."""
        env = self.environment
        self.is_approaching = False
        fingers, target, basket = env.gripper_position, env.target, env.basket_region
        lower, upper = env.object_box(target)
        centre = (lower + upper) / 2
        grasped = env.is_grasped(target)
        over_basket = bool(np.all(np.abs(centre[:2] - basket.centre) < basket.half))
        # Contact flickers while an object is carried: it was released only if the gripper was commanded to open.
        self._released = over_basket and (self._released or lower[2] < self.settings.rim / 2)
        if self._released:
            return self._release(centre, basket)  # falling, or already in
        grasped = grasped or over_basket
        closed = env.gripper_speed < self.settings.still or self._closing > self.settings.patience
        if grasped and (closed or lower[2] > 0.01):
            return self._carry(fingers, lower, centre, basket)
        return self._approach(fingers, lower, upper, centre, grasped)

    def _approach(self, fingers, lower, upper, centre, grasped) -> np.ndarray:
        settings = self.settings
        grasp = np.array([*centre[:2], max(upper[2] - settings.depth, centre[2], settings.floor)])
        offset = grasp - fingers
        # Along the fingers' width (across their closing direction) twice the error does no harm.
        across = float(offset[:2] @ self._direction)
        along = float(offset[:2] @ np.array([-self._direction[1], self._direction[0]]))
        sideways = math.hypot(across, along / 2)
        distance = max(sideways, abs(offset[2]))
        # Closing pushes the object a little: go on closing unless the fingers are clearly next to it.
        if grasped or distance < settings.aligned * (2.5 if self._closing else 1.0):
            self._closing += 1
            return self._action(offset, closed=True)  # commands the position: without a command the arm drifts
        self._closing = 0
        self.is_approaching = True
        straddling = fingers[2] < upper[2] and sideways < 0.03
        if sideways > settings.reach * (2.5 if straddling else 1.0):
            # Down a cone, but not onto the object: over its top until the fingers are on both sides of it.
            over_top = upper[2] + settings.overhead
            height = max(over_top, grasp[2] + settings.slope * sideways)
            offset[2] = min(height, max(fingers[2], over_top)) - fingers[2]
        return self._action(offset, closed=False, yaw=self._yaw_error())

    def _carry(self, fingers, lower, centre, basket) -> np.ndarray:
        settings = self.settings
        height = settings.rim + settings.clearance
        offset = np.array([*(basket.centre - centre[:2]), height - lower[2]])
        sideways = float(np.hypot(*offset[:2]))
        if sideways < settings.release:
            return self._release(centre, basket)
        # Straight up over the neighbours first, then sideways as far as the height allows.
        risen = lower[2] / height
        offset[:2] *= np.clip((risen - 0.3) / 0.5, 0.0, 1.0)
        if fingers[0] > settings.stretched:
            # A stretched arm that lifts gets stuck at its elbow's limit, so it draws back first.
            offset[0] = min(offset[0], -0.05 * np.clip(risen / 0.15, 0.0, 1.0))
            offset[1] = 0.0  # not towards the basket, whose rim is higher
            offset[2] = np.clip(settings.skim - lower[2], -0.02, 0.02)
        return self._action(offset, closed=True)

    def _release(self, centre, basket) -> np.ndarray:
        self._released = True
        # Commands the basket's centre: without a command the arm drifts, together with an object that falls slowly.
        return self._action(np.array([*(basket.centre - centre[:2]), 0.0]), closed=False)

    def _action(self, offset: np.ndarray, closed: bool, yaw: float = 0.0) -> np.ndarray:
        action = np.zeros(7)
        action[:3] = np.clip(self.settings.gain * offset / _POSITION_UNIT, -1.0, 1.0)
        action[5] = np.clip(yaw / _ROTATION_UNIT, -1.0, 1.0)
        action[6] = 1.0 if closed else -1.0
        return action

    def _yaw_error(self) -> float:
        """Signed angle about the vertical from the fingers to the chosen direction, 0 within the tolerance."""
        fingers = self.environment.closing_direction[:2]
        cross = fingers[0] * self._direction[1] - fingers[1] * self._direction[0]
        angle = math.atan2(cross, float(fingers @ self._direction))
        # Fingers are symmetric: half a turn more is the same grasp.
        angle = (angle + math.pi / 2) % math.pi - math.pi / 2
        return angle if abs(angle) > self.settings.yaw_tolerance else 0.0

    def _nearest_closing_direction(self) -> np.ndarray:
        """Unit vector (2,) along which the fingers should close: the nearest one in which the object fits."""
        env = self.environment
        fingers = env.closing_direction[:2]
        present = math.atan2(fingers[1], fingers[0])
        # From nearest to farthest. -90 < yaw <= 90 contains every direction once: with both ends, two opposite turns
        # would lead to the same grasp, and a policy trained on both would predict their average.
        yaws = sorted(range(-75, 91, 15), key=lambda degrees: (abs(degrees), -degrees))
        widths = {}
        for degrees in yaws:
            angle = present + math.radians(degrees)
            direction = np.array([math.cos(angle), math.sin(angle)])
            widths[degrees] = env.object_width(env.target, np.array([*direction, 0.0])), direction
            if widths[degrees][0] <= GRASPABLE_WIDTH:
                return direction
        return min(widths.values(), key=lambda entry: entry[0])[1]
