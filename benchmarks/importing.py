"""Processor time of imports, each in a process of its own and in turn, as a table.

    python benchmarks/importing.py [--runs 5]

Ratios are to `import torch, transformers`, which does not import a single class of transformers.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time

import numpy as np


AUTO = "from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoProcessor"
PROGRAMS = {
    "import torch": "import torch",
    "import torch, transformers": "import torch, transformers",
    "from transformers import AutoModel": "from transformers import AutoModel",
    "the four Auto classes that we register with": AUTO,
    "import vla_adapter_hf": "import vla_adapter_hf",
    "after those four, import vla_adapter_hf": f"{AUTO}; import vla_adapter_hf",
}
REFERENCE = "import torch, transformers"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5, help="runs of each program, of which the median counts")
    arguments = parser.parse_args()
    for program in PROGRAMS.values():  # so that all files are in the system's cache
        measure(program)
    turns = [{name: measure(program) for name, program in PROGRAMS.items()} for _ in range(arguments.runs)]
    print("| | processor time, s | relative | elapsed, s | modules |")
    print("|---|---:|---:|---:|---:|")
    for name in PROGRAMS:
        columns = zip(*(turn[name] for turn in turns), strict=True)
        processor, elapsed, modules = map(statistics.median, columns)
        ratio = np.median([turn[name][0] / turn[REFERENCE][0] for turn in turns])
        print(f"| `{name}` | {processor:.2f} | {ratio:.2f} | {elapsed:.2f} | {modules:.0f} |")


def measure(program: str) -> tuple[float, float, int]:
    """Processor time and elapsed time of a new process in seconds, and how many modules it has imported."""
    command = [sys.executable, "-c", f"{program}; import sys; print(len(sys.modules))"]
    before, start = os.times(), time.perf_counter()
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    after, elapsed = os.times(), time.perf_counter() - start
    processor = after.children_user - before.children_user + after.children_system - before.children_system
    return processor, elapsed, int(done.stdout.split()[-1])


if __name__ == "__main__":
    main()
