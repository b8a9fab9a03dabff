"""What a policy predicts at every recorded moment of an episode, and in two controls: another object, black frames."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from vla_adapter_hf.checkpoints.exported import ExportedModel
from vla_adapter_hf.recording.played_episode import PlayedEpisode
from vla_adapter_hf.robots import get_robot
from vla_adapter_hf.simulation.libero.suite import object_instruction
from vla_adapter_hf.utils.attention import predict_with_attention


OTHER_OBJECT = "orange_juice_1"  # of the episode that ships with the package
LOOK = 3  # the moment at which attention is drawn: both cameras see the object


@dataclass(frozen=True)
class Predictions:
    """Chunks (k, chunk_size, 7) that a policy predicts at the k moments of an episode, as the environment takes them.

    Attributes:
        asked: with the episode's instruction and frames.
        other: with the instruction that asks for another object.
        black: with the episode's instruction and black frames.
        attention: (2, rows, columns) over the patches of both cameras at the moment `LOOK`, as asked. `None` for an
            exported checkpoint, which returns no attention.
        other_attention: the same when another object is asked for.
        seconds: (k,) time of every prediction, images and prompt included.
    """

    asked: np.ndarray
    other: np.ndarray
    black: np.ndarray
    attention: np.ndarray | None
    other_attention: np.ndarray | None
    seconds: np.ndarray


def predict_episode(model: Any, processor: Any, episode: PlayedEpisode, unnorm_key: str | None = None) -> Predictions:
    """Predict at every recorded moment, one observation at a time as on a robot.

    Of longer chunks, the steps up to the next moment are kept.
    """
    between = int(episode.steps[1] - episode.steps[0])
    robot = get_robot("libero")
    instructions = {
        "asked": episode.instruction,
        "other": object_instruction(OTHER_OBJECT),
        "black": episode.instruction,
    }
    chunks: dict[str, list[np.ndarray]] = {name: [] for name in instructions}
    attention: dict[str, np.ndarray] = {}
    seconds = []
    for moment, (frames, state) in enumerate(zip(episode.frames, episode.states, strict=True)):
        for name, instruction in instructions.items():
            seen = np.zeros_like(frames) if name == "black" else frames
            begin = time.perf_counter()
            inputs = processor(images=list(seen), text=instruction, state=state)
            actions = model.predict_action(**inputs, unnorm_key=unnorm_key)
            if name == "asked":
                seconds.append(time.perf_counter() - begin)
            chunks[name].append(robot.to_environment(actions[0, :between]))
            if moment == LOOK and name != "black" and not isinstance(model, ExportedModel):
                attention[name] = predict_with_attention(model, inputs, unnorm_key)[1][0]
    return Predictions(
        **{name: np.stack(values) for name, values in chunks.items()},
        attention=attention.get("asked"),
        other_attention=attention.get("other"),
        seconds=np.array(seconds),
    )


def executed_chunks(episode: PlayedEpisode, chunk_size: int) -> np.ndarray:
    """What was executed where `Predictions` begin: (k, chunk_size, 7)."""
    return np.stack([episode.actions[step : step + chunk_size] for step in episode.steps])


def mean_errors(episode: PlayedEpisode, predictions: Predictions) -> dict[str, float]:
    """Mean absolute difference from what was executed, of `asked`, `other` and `black`, in commands of -1...1."""
    executed = executed_chunks(episode, predictions.asked.shape[1])
    return {name: float(np.abs(getattr(predictions, name) - executed).mean()) for name in ("asked", "other", "black")}


class ArmResponse:
    """How the arm follows its commands, to draw a predicted chunk as a path.

    A command of 1 asks the controller for 5 cm, and the arm follows with a delay. The movement of a step is taken as a
    linear function of the movement before it and of the command, fitted to the executed actions of one episode.
    """

    def __init__(self, episode: PlayedEpisode) -> None:
        moved = np.diff(episode.positions, axis=0)  # (n, 3)
        self._before = np.concatenate([np.zeros((1, 3)), moved])  # the movement before every step
        self._positions = episode.positions
        inputs = np.column_stack([self._before[:-1], episode.actions[:, :3], np.ones(len(moved))])
        self._weights = np.linalg.lstsq(inputs, moved, rcond=None)[0]  # (7, 3)

    def path(self, step: int, chunk: np.ndarray) -> np.ndarray:
        """Positions (chunk_size + 1, 3) of the gripper, metres, if `chunk` is executed from `step` on."""
        positions, moved = [self._positions[step]], self._before[step]
        for command in chunk[:, :3]:
            moved = np.concatenate([moved, command, [1.0]]) @ self._weights
            positions.append(positions[-1] + moved)
        return np.stack(positions)
