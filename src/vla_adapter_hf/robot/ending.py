"""The safe end of a run: signals that would end the program at once, and a robot that is always disconnected."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType

from vla_adapter_hf.robot.interface import Robot


logger = logging.getLogger(__name__)

# What ends a program without an exception: `systemctl stop`, `docker stop`, a terminal that closes.
ENDING_SIGNALS = ("SIGTERM", "SIGHUP")


@contextmanager
def signals_as_exits() -> Iterator[Callable[[], None]]:
    """Within the block a signal that would end the program at once raises SystemExit, so that the arm comes to rest.

    Signals that the program handles or ignores stay as they are. Only the main thread can change that.

    Yields:
        A function. Once it is called, a signal waits for the end of the block.
    """
    received: list[int] = []
    waits = False

    def wait() -> None:
        nonlocal waits
        waits = True

    def end(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if not waits:
            wait()  # a second signal must not disturb the end
            raise SystemExit(128 + number)

    numbers = [getattr(signal, name) for name in ENDING_SIGNALS if hasattr(signal, name)]
    if threading.current_thread() is not threading.main_thread():
        numbers = []
    replaced = [number for number in numbers if signal.getsignal(number) == signal.SIG_DFL]
    for number in replaced:
        signal.signal(number, end)
    try:
        yield wait
    finally:
        for number in replaced:
            signal.signal(number, signal.SIG_DFL)
    if received:
        raise SystemExit(128 + received[0])


def connect(robot: Robot, ending: ExitStack) -> None:
    """Connect the robot, and disconnect it when `ending` ends: also what an error or Ctrl-C left half connected."""
    is_connected = False

    def disconnect() -> None:
        try:
            robot.disconnect()
        except Exception as error:
            if is_connected:
                raise
            logger.warning("connect() failed, and then disconnect() too; the robot may be open still: %s", error)

    ending.callback(disconnect)
    robot.connect()
    is_connected = True
