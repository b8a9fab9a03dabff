"""The embedded policy drives a real LIBERO episode through the loop of a robot; the simulator stands in for the
arm."""

import pytest
from simulator import need_simulator

from vla_adapter_hf.checkpoints.embedded import embedded_folder
from vla_adapter_hf.robot import LocalPolicy, LoopSettings, StrategySettings, run


pytestmark = pytest.mark.simulator


@pytest.mark.parametrize("strategy", ["sync", "async"])
def test_the_loop_solves_an_episode(strategy):
    need_simulator()
    from vla_adapter_hf.simulation.libero.robot import LiberoRobot
    from vla_adapter_hf.simulation.libero.suite import LiberoSuite

    environment = LiberoSuite("libero_object").make(9)
    try:
        robot = LiberoRobot(environment, episode=40)
        with embedded_folder() as folder:
            policy = LocalPolicy(folder / "checkpoint", robot="libero")
        settings = LoopSettings(fps=20, strategy=StrategySettings(strategy), max_steps=400)
        report = run(policy, robot, environment.instruction, settings, on_step=lambda step: robot.is_solved)
    finally:
        environment.close()
    assert robot.is_solved and report.ended_by == "on_step", report.summary()
