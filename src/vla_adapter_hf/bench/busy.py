"""Other processes that compute, as on a robot's computer, while a policy is measured."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager


# It ends by itself when the process that started it is gone.
PROGRAM = """
import os, sys
parent = os.getppid()
print("ready", flush=True)
while os.getppid() == parent:
    sum(range(200_000))
"""


@contextmanager
def busy_processes(count: int) -> Iterator[list[subprocess.Popen]]:
    """Keep `count` processes computing while the block runs, each on one core.

    Yields:
        `list[Popen]`: the processes.
    """
    processes = [
        subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, text=True) for _ in range(count)
    ]
    try:
        for process in processes:
            process.stdout.readline()  # wait until it computes
        yield processes
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()
            process.stdout.close()
