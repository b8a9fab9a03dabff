"""A checkpoint in torch and exported to OpenVINO: time of a prediction, errors, loading and memory, as a table.

    python benchmarks/engines.py FOLDER --checkpoint CHECKPOINT --calibrate DATASET [--cameras NAME NAME]
    python benchmarks/engines.py FOLDER [--size shallow]
    python benchmarks/engines.py FOLDER --also "original=python original.py"

FOLDER keeps the exports, so that a run that was interrupted goes on there. Without --checkpoint it also keeps random
weights of the published size (2.6 GiB). Eight bits need --calibrate, demonstrations in the checkpoint's sizes.
Checkpoints are exported as by `vla-adapter export`, with the layers kept that err most. Of random weights every layer
is rounded, because only trained ones show which to keep, and prompts are longer, because they come with a small
tokenizer.

All programs are loaded first and then predict once each in turn, while no and while some other processes compute. The
peak is the memory of a process with one prediction, above that after imports. --also adds a program, such as the
original, which must answer as docs/speed.md says. It starts with OMP_WAIT_POLICY and GOMP_SPINCOUNT as they are set
for this script; the line below the table says how the threads of the other rows wait.
"""

import argparse
import json
import shlex
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vla_adapter_hf.bench.busy import busy_processes
from vla_adapter_hf.bench.random_weights import write_random
from vla_adapter_hf.bench.turns import OtherProgram
from vla_adapter_hf.checkpoints.exported import RECORD
from vla_adapter_hf.utils.files import atomic_path, record_settings


COMMAND = [sys.executable, "-m", "vla_adapter_hf.cli"]
TORCH = "torch bfloat16"
INT8 = "OpenVINO int8"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--checkpoint", help="by default random weights of --size")
    parser.add_argument("--size", default="full", help="full, shallow or small")
    parser.add_argument("--calibrate", help="demonstrations for eight bits; without them there is no such row")
    parser.add_argument("--cameras", nargs="+", help="the columns of the cameras in --calibrate")
    parser.add_argument("--samples", default="64", help="observations for eight bits")
    parser.add_argument("--error-ratio", help="for eight bits, see vla-adapter export --help; by default 2, or inf")
    parser.add_argument("--prompt-tokens", help="by default 64, for random weights 128")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--busy", default="0,2", help="numbers of other processes that compute")
    parser.add_argument("--threads", default=str(torch.get_num_threads()))
    parser.add_argument("--also", action="append", default=[], help="NAME=COMMAND of another program, see turns.py")
    arguments = parser.parse_args()
    given = arguments.checkpoint is not None
    arguments.error_ratio = arguments.error_ratio or ("2" if given else "inf")
    arguments.prompt_tokens = arguments.prompt_tokens or ("64" if given else "128")
    check_folder(arguments)
    checkpoint = arguments.checkpoint or str(random_weights(arguments.folder, arguments.size))
    programs = {TORCH: [checkpoint, "--dtype", "bfloat16"], **exports(checkpoint, arguments)}
    programs = {name: [*words, "--threads", arguments.threads] for name, words in programs.items()}
    loading = {name: measure_loading(words, arguments.folder) for name, words in programs.items()}
    commands = {name: shlex.join([*COMMAND, "bench", *words, "--turns"]) for name, words in programs.items()}
    commands |= dict(entry.split("=", 1) for entry in arguments.also)
    numbers = [int(number) for number in arguments.busy.split(",")]
    seconds = take_turns(commands, arguments.runs, numbers)
    errors = {name: measured_errors(arguments.folder, name) for name in commands}
    heads = [f"ms with {busy} busy | times as fast" for busy in numbers]
    heads += ["mean error", "largest", "load, s", "peak, GiB"]
    print(f"| | {' | '.join(heads)} |")
    print("|---|" + "---:|" * (2 * len(numbers) + 4))
    for name in commands:
        cells = []
        for busy in numbers:
            ratio = np.median(np.divide(seconds[busy][TORCH], seconds[busy][name]))
            cells += [f"{1e3 * np.median(seconds[busy][name]):.0f}", f"{ratio:.2f}"]
        cells += [f"{errors[name][key]:.4f}" if key in errors[name] else "" for key in ("mean", "largest")]
        load = loading.get(name, {})
        cells += [f"{load[key]:.2f}" if key in load else "" for key in ("seconds", "peak")]
        print(f"| {name} | {' | '.join(cells)} |")
    print_notes(arguments, errors, loading[TORCH]["waiting"])


def check_folder(arguments: argparse.Namespace) -> None:
    """Refuse a folder with exports of something else."""
    names = ("checkpoint", "size", "calibrate", "cameras", "samples", "error_ratio", "prompt_tokens")
    arguments.folder.mkdir(parents=True, exist_ok=True)
    differences = record_settings(
        arguments.folder / "settings.json", {name: getattr(arguments, name) for name in names}
    )
    if differences:
        lines = [f"{name} {before!r} instead of {now!r}" for name, (before, now) in differences.items()]
        raise SystemExit(f"{arguments.folder} holds exports with {', '.join(lines)}; give another folder.")


def measured_errors(folder: Path, name: str) -> dict[str, float]:
    """Errors of normalised actions against torch in float32, from the exports' records; empty if not measured."""
    precision = name.removeprefix("OpenVINO ")
    record = folder / f"openvino-{'int8' if name == TORCH else precision}" / RECORD
    if not record.is_file():
        return {}
    stored = json.loads(record.read_text(encoding="utf-8"))
    errors = stored["bfloat16_errors" if name == TORCH else "errors"]
    return {**errors, "observations": stored["checked_on"], "kept": len(stored["kept"])}


def print_notes(arguments: argparse.Namespace, errors: dict[str, dict[str, float]], waiting: str) -> None:
    print(f"\n{arguments.threads} threads, prompts of {arguments.prompt_tokens} tokens; errors of normalised actions.")
    print(f"PyTorch and OpenVINO: {waiting} waiting of OpenMP's threads. Programs of --also: with their own waiting.")
    for name, measured in errors.items():
        if measured:
            kept = f", {measured['kept']} blocks kept in higher precision" if name == INT8 else ""
            print(f"{name}: errors on {measured['observations']} observation(s){kept}.")
    if arguments.calibrate is None:
        print("No eight bits: they need --calibrate.")
    if not arguments.also:
        print("The original is not in this table: it needs its code and checkpoint (--also 'original=COMMAND').")


def random_weights(folder: Path, size: str) -> Path:
    drawn = folder / f"random-{size}"
    if not drawn.exists():
        with atomic_path(drawn) as temporary:
            write_random(str(temporary), size, torch.bfloat16)
    return drawn


def exports(checkpoint: str, arguments: argparse.Namespace) -> dict[str, list[str]]:
    """Words of `vla-adapter bench` for each export. Those that are not in the folder are made."""
    found = {}
    for precision in ("bf16", "int8") if arguments.calibrate else ("bf16",):
        folder = arguments.folder / f"openvino-{precision}"
        if not (folder / RECORD).exists():
            words = [*COMMAND, "export", checkpoint, str(folder), "--to", "openvino", "--precision", precision]
            words += ["--prompt-tokens", arguments.prompt_tokens]
            if precision == "int8":
                words += ["--calibrate", arguments.calibrate, "--samples", arguments.samples]
                words += ["--error-ratio", arguments.error_ratio]
                words += ["--cameras", *arguments.cameras] if arguments.cameras else []
            subprocess.run(words, check=True)
        found[f"OpenVINO {precision}"] = [str(folder)]
    return found


def measure_loading(words: list[str], folder: Path) -> dict[str, Any]:
    """Seconds to load, GiB at the peak up to the first prediction, and how threads wait, in a process of its own."""
    output = folder / "loading.json"
    subprocess.run(
        [*COMMAND, "bench", *words, "--runs", "1", "--warmup", "0", "--output", str(output)],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    report = json.loads(output.read_text(encoding="utf-8"))
    output.unlink()
    peak = report["memory"]["peak"] / 2**30
    return {"seconds": report["load"]["seconds"], "peak": peak, "waiting": report["waiting"]}


def take_turns(commands: dict[str, str], runs: int, numbers: list[int]) -> dict[int, dict[str, list[float]]]:
    """Seconds of each program's predictions, by the number of busy processes and by name."""
    seconds: dict[int, dict[str, list[float]]] = {busy: {name: [] for name in commands} for busy in numbers}
    with ExitStack() as stack:
        programs = {name: stack.enter_context(OtherProgram(command)) for name, command in commands.items()}
        for program in programs.values():
            program.predict()
        for busy in numbers:
            with busy_processes(busy):
                for _ in range(runs):
                    for name, program in programs.items():
                        seconds[busy][name].append(program.predict())
    return seconds


if __name__ == "__main__":
    main()
