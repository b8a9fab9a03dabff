"""A small environment that needs no simulator: a point moves over a table to a coloured disc.

It is deterministic and its frames show the goal, so it serves to try out and to test an evaluation.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vla_adapter_hf.simulation.environment import Observation


COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 80, 220)}
_SPEED = 0.05


@dataclass(frozen=True)
class PointSuite:
    """One task per colour. Actions and states have LIBERO's sizes: the point takes the first two deltas.

    Args:
        image_size: height and width of the frames.
        seed: seed of the positions.
        step_limit: steps per episode.
    """

    image_size: int = 64
    seed: int = 0
    step_limit: int = 60
    name: str = "point"
    robot: str = "libero"

    @property
    def tasks(self) -> Sequence[str]:
        return [f"move to the {colour} disc" for colour in COLOURS]

    def make(self, task: int) -> PointEnvironment:
        if not 0 <= task < len(COLOURS):
            raise ValueError(f"task must be in 0...{len(COLOURS) - 1}, got {task}")
        return PointEnvironment(self, task)

    def describe(self) -> dict[str, Any]:
        sizes = {"image_size": self.image_size, "step_limit": self.step_limit}
        return {"suite": self.name, "placement": "official", "seed": self.seed, **sizes}


class PointEnvironment:
    """A table of 1 x 1 m. Solved within 4 cm of the disc of the task's colour."""

    def __init__(self, suite: PointSuite, task: int) -> None:
        self.suite, self.task = suite, task
        self.step_limit = suite.step_limit
        self.instruction = suite.tasks[task]
        self._position = np.full(2, 0.5)
        self._discs = np.zeros((len(COLOURS), 2))
        self._observed = False

    def reset(self, episode: int) -> dict[str, Any]:
        generator = np.random.default_rng([self.suite.seed, self.task, episode])
        while True:
            self._discs = generator.uniform(0.1, 0.9, size=(len(COLOURS), 2))
            apart = np.linalg.norm(self._discs - 0.5, axis=1).min()
            if apart > 0.15:
                break
        self._position = np.full(2, 0.5)
        self._observed = True
        return {"discs": self._discs.round(4).tolist()}

    def observe(self) -> Observation:
        if not self._observed:
            raise RuntimeError("no frame was drawn: reset the environment, or call step with observe=True")
        state = np.zeros(8)
        state[:2] = self._position
        return Observation((self._draw(self.suite.image_size), self._draw(self.suite.image_size, 0.5)), state)

    def step(self, action: np.ndarray, observe: bool = True) -> bool:
        action = np.asarray(action, dtype=np.float64)
        if action.shape != (7,):
            raise ValueError(f"action must have shape (7,), got {action.shape}")
        self._position = np.clip(self._position + _SPEED * np.clip(action[:2], -1, 1), 0, 1)
        self._observed = observe
        return bool(np.linalg.norm(self._position - self._discs[self.task]) < 0.04)

    def close(self) -> None:
        """Nothing to free."""

    @property
    def goal(self) -> np.ndarray:
        """(2,) position of the task's disc."""
        return self._discs[self.task]

    @property
    def position(self) -> np.ndarray:
        """(2,) position of the point."""
        return self._position

    def _draw(self, size: int, window: float = 1.0) -> np.ndarray:
        """The table from above, or a window of it around the point."""
        grid = (np.arange(size) + 0.5) / size
        corner = np.zeros(2) if window == 1.0 else self._position - window / 2
        x, y = np.meshgrid(corner[0] + window * grid, corner[1] + window * grid)
        image = np.full((size, size, 3), 235, dtype=np.uint8)
        for centre, colour in zip(self._discs, COLOURS.values(), strict=True):
            image[np.hypot(x - centre[0], y - centre[1]) < 0.05] = colour
        image[np.hypot(x - self._position[0], y - self._position[1]) < 0.03] = 20
        return image


class SeeingPolicy:
    """Finds the disc of the instruction's colour in the frame and moves there: it needs its eyes and its ears."""

    name = "seeing"
    needs_observation = True

    def __init__(self, pause: float = 0.0) -> None:
        self.batches: list[int] = []
        self.pause = pause

    def predict(self, requests):
        self.batches.append(len(requests))
        # While a policy thinks, the other environments get ready: the next query holds them all.
        time.sleep(self.pause if len(self.batches) < 10 else 0)
        return [self._chunk(request) for request in requests]

    def _chunk(self, request):
        image = request.observation.images[0].astype(int)
        colour = next(value for name, value in COLOURS.items() if name in request.instruction)
        rows, columns = np.nonzero(np.abs(image - np.array(colour)).sum(axis=2) == 0)
        chunk = np.zeros((8, 7))
        chunk[:, 6] = 1.0
        if len(rows):
            goal = (np.array([columns.mean(), rows.mean()]) + 0.5) / image.shape[0]
            position = request.observation.state[:2].copy()
            for step in range(8):
                chunk[step, :2] = np.clip((goal - position) / 0.05, -1, 1)
                position += 0.05 * chunk[step, :2]
        return chunk
