"""Two programs predict in turn. One asks with a line of text, the other answers with the seconds that it took.

The other program loads its model and warms up. For every line of its input it makes one prediction and prints one
line, `{"seconds": 1.25}`. All other output is ignored. `vla-adapter bench --turns` is such a program.

It is measured as it is: OpenMP's threads wait in it as the user or the program itself chooses, and not as this package
chooses for its own processes.
"""

from __future__ import annotations

import json
import math
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import TextIO

from vla_adapter_hf._passive_waiting import users_environment


def split_command(command: str) -> list[str]:
    """The words of a command.

    Raises:
        ValueError: if it is empty, a quotation does not end, or the program does not exist.
    """
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise ValueError(f"--against {command!r} cannot be read: {error}") from error
    if not words or shutil.which(words[0]) is None:
        raise ValueError(
            f"--against {command!r} cannot be started: there is no program {words[0] if words else ''!r}."
        )
    return words


class OtherProgram:
    """A program that predicts on request. Leaving the context ends it.

    Args:
        command (`str`): the command that starts it, without a shell.

    Raises:
        ValueError: if the program does not exist, or ends without an answer.
    """

    def __init__(self, command: str):
        self.command = command
        words = split_command(command)
        try:
            self.process = subprocess.Popen(
                words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, env=users_environment()
            )
        except OSError as error:
            raise ValueError(f"--against {command!r} cannot be started: {error}") from error

    def __enter__(self) -> OtherProgram:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(BrokenPipeError):  # it has ended by itself
            self.process.stdin.close()
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def predict(self) -> float:
        """Seconds of one prediction."""
        with suppress(BrokenPipeError):  # the loop below finds that it has ended
            self.process.stdin.write("predict\n")
            self.process.stdin.flush()
        for line in self.process.stdout:
            seconds = _seconds_in(line)
            if seconds is not None:
                return seconds
        raise ValueError(
            f"--against {self.command!r} ended with exit code {self.process.wait()} before it answered; for every "
            'line of input it must print one line such as {"seconds": 1.25}.'
        )


def _seconds_in(line: str) -> float | None:
    try:
        answer = json.loads(line)
    except json.JSONDecodeError:
        return None
    seconds = answer.get("seconds") if isinstance(answer, dict) else None
    is_time = isinstance(seconds, (int, float)) and not isinstance(seconds, bool)
    return float(seconds) if is_time and math.isfinite(seconds) and seconds > 0 else None


def answer_turns(predict: Callable[[], float], lines: TextIO | None = None, out: TextIO | None = None) -> None:
    """Make one prediction per line of input and print its seconds, until the input ends.

    Args:
        predict (`Callable`): returns the seconds of one prediction.
        lines, out (`TextIO`, *optional*): by default the standard input and output.
    """
    for _ in sys.stdin if lines is None else lines:
        print(json.dumps({"seconds": predict()}), file=sys.stdout if out is None else out, flush=True)
