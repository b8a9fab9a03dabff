"""The report of `vla-adapter bench` as text."""

from __future__ import annotations

from typing import Any

import numpy as np


def percentiles(seconds: list[float]) -> dict[str, float]:
    """The fastest, the median and the 95th percentile."""
    return {"fastest": min(seconds), "p50": float(np.median(seconds)), "p95": float(np.percentile(seconds, 95))}


def table(report: dict[str, Any]) -> list[str]:
    """A report as lines of text, times in milliseconds."""
    compiled = report["compiled"]
    rate = report["matmul_flops_per_second"]["fastest"]
    lines = [
        f"{report['checkpoint']}, {report['precision']}{', compiled' if compiled else ''}, {report['device']}, "
        f"{report['threads']} threads ({report['waiting']} waiting), {_others(report['busy'])}"
        f"JPEG by {report['jpeg_decoder']}, "
        f"attention by {', '.join(dict.fromkeys(report['attention'].values()))}",
        "",
        f"{'ms, stages not compiled' if compiled else 'ms':<24}{'fastest':>10}{'p50':>10}{'p95':>10}",
    ]
    lines += [_row(stage, times) for stage, times in report["stages"].items()]
    for batch_size, times in report["predictions"].items():
        layers, attention = times["flops"]["layers"], times["flops"]["attention"]
        share, of_layers = (flops / times["p50"] / rate for flops in (layers + attention, layers))
        lines.append(
            f"{_row(f'prediction of {batch_size}', times)}   {times['per_second']:.2f}/s, "
            f"{(layers + attention) / 1e9:.0f} GFLOP at {share:.0%} of the matrix product's rate, "
            f"{layers / 1e9:.0f} without attention at {of_layers:.0%}"
        )
    load, memory = report["load"], report["memory"]
    lines += ["", f"matrix product  {rate / 1e9:.0f} GFLOP/s"]
    loading = f"load            {load['seconds']:.2f} s"
    if load["read_seconds"]:
        loading += f", {load['seconds'] / load['read_seconds']:.2f} x reading the files once"
    lines.append(f"{loading}; first prediction {load['first_prediction_seconds']:.2f} s")
    if memory["peak"] is not None:
        lines.append(
            f"peak memory     {memory['peak'] / 2**30:.2f} GiB above the start, "
            f"{memory['peak'] / memory['weights']:.2f} x the weights ({memory['weights'] / 2**30:.2f} GiB)"
            f"{', before compiling' if compiled else ''}"
        )
    return lines


def _others(busy: int) -> str:
    return f"{busy} other {'process' if busy == 1 else 'processes'} computing, " if busy else ""


def comparison(against: dict[str, Any], waiting: str) -> str:
    """The line about another program. `waiting` is what our own threads do, `"passive"` or `"active"`."""
    ours, theirs = (against[side]["p50"] * 1e3 for side in ("ours", "theirs"))
    return (
        f"ours {ours:.1f} ms ({waiting} waiting), theirs {theirs:.1f} ms (with its own waiting); by pairs of turns "
        f"{against['ratio']:.2f} x as fast"
    )


def _row(name: str, times: dict[str, float]) -> str:
    return f"{name:<24}" + "".join(f"{times[part] * 1e3:>10.2f}" for part in ("fastest", "p50", "p95"))
