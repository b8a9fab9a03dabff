"""Whether CALVIN's simulator works on this machine, and if not, what to do."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from vla_adapter_hf.simulation.calvin.install import (
    PACKAGES,
    RENDERERS,
    SEQUENCE_MODULES,
    SIMULATOR_MODULES,
    check_renderer,
    how_to_get,
    import_calvin,
    is_importable,
)
from vla_adapter_hf.simulation.calvin.simulation import CalvinSimulation


SLIDER_TRAVEL = 0.2  # metres; move_slider_left is solved after 0.15
OPEN_SCENE = {
    "robot": [0.026, -0.231, 0.571, 3.09, -0.029, 1.5, 0.08]
    + [-1.21779124, 1.03987629, 2.11978254, -2.34205014, -0.87015899, 1.64119093, 0.55344928, 1.0],
    "scene": [0.0] * 6
    + [0.05, -0.12, 0.46, 0.0, 0.0, 1.57, 0.23, -0.12, 0.46, 0.0, 0.0, 1.57]
    + [0.07, 0.092, 0.461, 0.0, 0.0, 1.57],
}
"""The arm at its start, everything closed and off, two blocks on the table and one on the shelf."""


def check_calvin(report: Callable[[str], None] = print, renderers: Sequence[str] = RENDERERS) -> bool:
    """Looks for all that an evaluation of CALVIN needs, then tries the simulator.

    Args:
        report: receives one line for each thing that was looked at.
        renderers: which to try; one that works is enough.

    Returns:
        Whether CALVIN can be evaluated here.

    Raises:
        ValueError: an unknown renderer.
    """
    for renderer in renderers:
        check_renderer(renderer)
    missing = [module for module in (*PACKAGES, "calvin_env", "calvin_agent") if not is_importable(module)]
    for module in missing:
        report(f"missing  {module}: {how_to_get(module)}")
    if missing:
        return False
    for name in (*SIMULATOR_MODULES, *SEQUENCE_MODULES):
        try:
            import_calvin(name)
        except ImportError as error:
            report(f"missing  {error}")
            return False
    report("found    calvin_env, calvin_agent and all that they import")
    works = [_try_renderer(renderer, report) for renderer in renderers]
    return any(works)


def _try_renderer(renderer: str, report: Callable[[str], None]) -> bool:
    """Tries a renderer in a process of its own, because a missing driver ends the process."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_report_trial, args=(theirs, renderer), daemon=True)
    process.start()
    theirs.close()
    try:
        works, lines = ours.recv()
    except EOFError:
        works, lines = False, ["the process ended: there is no EGL driver here, or it does not work"]
    process.join()
    for line in lines:
        report(f"{'works' if works else 'fails':8} {renderer}: {line}")
    if renderer == "egl" and not works:
        report("         without EGL, --renderer cpu plays; its scores are not comparable with the published ones")
    return works


def _report_trial(connection: Any, renderer: str) -> None:
    try:
        connection.send((True, try_simulation(CalvinSimulation(renderer))))
    except Exception as error:
        connection.send((False, [f"{type(error).__name__}: {error}"]))


def try_simulation(simulation: CalvinSimulation) -> list[str]:
    """Tries a reset, a rendering, a step, and a subtask that is solved by moving the slider by force.

    Returns:
        What worked, one line each.

    Raises:
        RuntimeError: black frames, or success that is not seen or is seen too early.
    """
    simulation.reset(OPEN_SCENE)
    observation = simulation.observe()
    sizes = ", ".join("×".join(map(str, image.shape)) for image in observation.images)
    if min(float(image.std()) for image in observation.images) < 1.0:
        raise RuntimeError("the frames show one colour only: the renderer does not draw")
    simulation.begin_subtask("move_slider_left")
    still = np.array([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0])
    if simulation.step(still):
        raise RuntimeError("standing still counts as success")
    slider = next(door for door in simulation.environment.scene.doors if door.name == "base__slide")
    slider.reset(SLIDER_TRAVEL)
    if not simulation.step(still):
        raise RuntimeError("the slider was moved, and no success was seen")
    simulation.close()
    return ["reset", f"rendering of frames {sizes}", "success of move_slider_left, forced"]
