"""From chunks to a moving arm: `run` a policy on a robot with LeRobot's methods."""

from vla_adapter_hf.robot.action_queue import ActionChunkQueue
from vla_adapter_hf.robot.interface import Robot, RobotInterface
from vla_adapter_hf.robot.loop import LoopReport, LoopSettings, Recorder, Step, run
from vla_adapter_hf.robot.policy import LocalPolicy
from vla_adapter_hf.robot.state_model import StateModel
from vla_adapter_hf.robot.strategies import STRATEGIES, ChunkStrategy, StrategySettings


__all__ = [
    "STRATEGIES",
    "ActionChunkQueue",
    "ChunkStrategy",
    "LocalPolicy",
    "LoopReport",
    "LoopSettings",
    "Recorder",
    "Robot",
    "RobotInterface",
    "StateModel",
    "Step",
    "StrategySettings",
    "run",
]
