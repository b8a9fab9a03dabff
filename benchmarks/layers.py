"""Layers of the published sizes on one thread of the CPU, as markdown tables: precisions, packed weights, stacked
products.

    python benchmarks/layers.py [--runs 8]

Milliseconds of CPU time, the fastest run, as other work on the machine then counts least. torchao is needed
(`pip install 'vla-adapter-hf[quantization]'`).
"""

import argparse
import time
from collections.abc import Callable

import torch
from torch import nn
from torchao.quantization import quantize_

from vla_adapter_hf import quantization_config
from vla_adapter_hf.modeling.configuration_vla_adapter import PUBLISHED_DINOV2, PUBLISHED_QWEN2, PUBLISHED_SIGLIP


HIDDEN, INNER = PUBLISHED_QWEN2["hidden_size"], PUBLISHED_QWEN2["intermediate_size"]
# Tokens of an observation, and in and out of a layer.
LAYERS = {
    "DINOv2": (2 * 261, PUBLISHED_DINOV2["hidden_size"], 4 * PUBLISHED_DINOV2["hidden_size"]),
    "SigLIP": (2 * 256, PUBLISHED_SIGLIP["intermediate_size"], PUBLISHED_SIGLIP["hidden_size"]),
    "language model": (636, HIDDEN, INNER),
    "attention's": (636, HIDDEN, HIDDEN),
}
POLICY_LAYERS, TASK_STATES = PUBLISHED_QWEN2["num_hidden_layers"], 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=8)
    runs = parser.parse_args().runs
    torch.set_num_threads(1)
    with torch.no_grad():
        eight_and_four_bits(runs)
        packed(runs)
        stacked(runs)


def eight_and_four_bits(runs: int) -> None:
    print("| layer | bfloat16 | int8 | int8 compiled | bfloat16 / int8 compiled | int8 product alone | int4 |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for name, (tokens, inside, outside) in LAYERS.items():
        states = torch.randn(tokens, inside).bfloat16()
        whole = milliseconds(layer(inside, outside), states, runs)
        eager = milliseconds(layer(inside, outside, "int8"), states, runs)
        compiled = milliseconds(torch.compile(layer(inside, outside, "int8"), fullgraph=True), states, runs)
        left, right = (
            torch.randint(-128, 128, shape, dtype=torch.int8) for shape in ((tokens, inside), (outside, inside))
        )
        product = milliseconds(lambda rows, right=right: torch._int_mm(rows, right.t()), left, runs)
        # Groups of 32 do not divide every width.
        four = f"{milliseconds(layer(inside, outside, 'int4'), states, runs):.1f}" if inside % 32 == 0 else ""
        print(
            f"| {name}, {tokens} × {inside} → {outside} | {whole:.1f} | {eager:.1f} | {compiled:.1f} | "
            f"{whole / compiled:.2f} | "
            f"{product:.1f} | {four} |",
            flush=True,
        )


def packed(runs: int) -> None:
    """Whether the compiler's layout of constant weights is worth keeping them twice."""
    print("\n| two layers with GELU | precision | as they are | compiled | compiled, weights packed |")
    print("|---|---|---:|---:|---:|")
    for dtype in (torch.bfloat16, torch.float32):
        for name, (tokens, inside, outside) in list(LAYERS.items())[:3]:
            block = nn.Sequential(nn.Linear(inside, outside), nn.GELU(), nn.Linear(outside, inside)).to(dtype).eval()
            states = torch.randn(tokens, inside, dtype=dtype)
            times = [milliseconds(block, states, runs)]
            for freezing in (False, True):
                torch.compiler.reset()
                options = {"freezing": freezing}
                times.append(milliseconds(torch.compile(block, fullgraph=True, options=options), states, runs))
            cells = " | ".join(f"{value:.1f}" for value in times)
            print(f"| {name} | {str(dtype).removeprefix('torch.')} | {cells} |", flush=True)


def stacked(runs: int) -> None:
    """Keys and values of the policy's blocks from the states of their layers: layer by layer, or all at once."""
    print(f"\n| keys and values of {POLICY_LAYERS} policy blocks, {TASK_STATES} task states | ms |")
    print("|---|---:|")
    states = torch.randn(POLICY_LAYERS, TASK_STATES, HIDDEN).bfloat16()
    keys, values = torch.randn(2, POLICY_LAYERS, HIDDEN, HIDDEN).bfloat16()
    both = torch.cat((keys, values), dim=1).transpose(1, 2)

    def apart(states: torch.Tensor) -> list[torch.Tensor]:
        return [
            nn.functional.linear(one, weight)
            for one, pair in zip(states, zip(keys, values, strict=True), strict=True)
            for weight in pair
        ]

    for name, run in {"each a product": apart, "one stacked product": lambda states: states @ both}.items():
        print(f"| {name} | {milliseconds(run, states, runs):.1f} |", flush=True)


def layer(inside: int, outside: int, kind: str | None = None) -> nn.Module:
    module = nn.Sequential(nn.Linear(inside, outside)).bfloat16().eval()
    if kind is not None:
        quantize_(module, quantization_config(kind).quant_type)
    return module


def milliseconds(run: Callable[[torch.Tensor], object], states: torch.Tensor, runs: int) -> float:
    for _ in range(2):
        run(states)
    times = []
    for _ in range(runs):
        start = time.thread_time()
        run(states)
        times.append(time.thread_time() - start)
    return 1e3 * min(times)


if __name__ == "__main__":
    main()
