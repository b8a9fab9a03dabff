"""Time and peak memory of a training step, with random weights at the published size or a smaller one.

    python benchmarks/training.py [--size full|small] [--steps 2] [--batch 1] [--bf16]

Each line is measured in a process of its own, whose peak resident memory is reported. Times are for comparison within
one run: seconds mean little on a machine that other work shares.
"""

import argparse
import json
import resource
import subprocess
import sys
import time

import torch

from vla_adapter_hf import VLAAdapterConfig, VLAAdapterForActionPrediction, apply_preset
from vla_adapter_hf.bench.random_weights import SIZES


CASES = [(preset, checkpointing) for preset in ("frozen", "lora") for checkpointing in (False, True)]


def measure(preset: str, checkpointing: bool, size: str, steps: int, batch_size: int, bf16: bool) -> dict[str, float]:
    """Seconds per step (the shortest, the first left out) and peak memory in GiB."""
    torch.manual_seed(0)
    config = VLAAdapterConfig(**SIZES[size])
    model = apply_preset(VLAAdapterForActionPrediction(config), preset).train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=2e-4)
    batch = {
        "input_ids": torch.randint(0, config.text_config.vocab_size, (batch_size, 60)),
        "pixel_values": torch.randn(batch_size, 6 * config.num_cameras, config.image_size, config.image_size),
        "proprio": torch.rand(batch_size, config.proprio_dim) * 2 - 1,
        "actions": torch.rand(batch_size, config.chunk_size, config.action_dim) * 2 - 1,
    }
    seconds = []
    for _ in range(steps + 1):
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
    return {
        "seconds": min(seconds[1:]),
        "gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "trainable": sum(parameter.numel() for parameter in parameters) / 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("full", "small"), default="full")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16, weights in float32")
    parser.add_argument("--case", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    options = (arguments.size, arguments.steps, arguments.batch, arguments.bf16)
    if arguments.case is not None:
        print(json.dumps(measure(*CASES[arguments.case], *options)))
        return
    print(
        "| preset | gradient checkpointing | trainable, M | step, relative to the first line | step, s "
        "| peak memory, GiB |"
    )
    print("|---|---|---:|---:|---:|---:|")
    first = None
    for index, (preset, checkpointing) in enumerate(CASES):
        command = [sys.executable, __file__, *sys.argv[1:], "--case", str(index)]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        result = json.loads(output.splitlines()[-1])
        first = first or result["seconds"]
        print(
            f"| {preset} | {'yes' if checkpointing else 'no'} | {result['trainable']:.1f} "
            f"| {result['seconds'] / first:.2f} "
            f"| {result['seconds']:.1f} | {result['gib']:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
