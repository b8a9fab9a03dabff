"""Milliseconds per camera frame for every stage of image preparation, on one thread, as a markdown table.

    python benchmarks/image_preparation.py [--height 256 --width 256 --size 224 --runs 100]

The fastest run tells what the code needs, the median what this machine, with all else that it does, gives it.
"""

import argparse
import os
import time
from collections.abc import Callable
from unittest import mock


os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"

import numpy as np

from vla_adapter_hf.processing import image_preparation_vla_adapter as preparation
from vla_adapter_hf.processing import jpeg_round_trip_vla_adapter as jpeg


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--height", type=int, default=256, help="height of the camera frame")
    parser.add_argument("--width", type=int, default=256, help="width of the camera frame")
    parser.add_argument("--size", type=int, default=224, help="side of the model's images")
    parser.add_argument("--runs", type=int, default=100)
    arguments = parser.parse_args()

    frame = synthetic_frame(arguments.height, arguments.width)
    size = (arguments.size, arguments.size)
    resized = preparation.resize_lanczos3(frame, size)
    means, stds = [[0.485, 0.456, 0.406], [0.5] * 3], [[0.229, 0.224, 0.225], [0.5] * 3]

    def row(stage: str, run: Callable[[], np.ndarray]) -> None:
        times = milliseconds(run, arguments.runs)
        print(f"| {stage} | {min(times):.2f} | {np.median(times):.2f} |")

    print(f"| {arguments.height}x{arguments.width} to {size[0]}x{size[1]} | fastest, ms | median, ms |")
    print("|---|---:|---:|")
    row("JPEG round trip, NumPy", lambda: jpeg.jpeg_round_trip_numpy(frame))
    if jpeg.simplejpeg is not None:
        row("JPEG round trip, simplejpeg", lambda: jpeg.jpeg_round_trip_simplejpeg(frame))
    row("Lanczos-3 resize", lambda: preparation.resize_lanczos3(frame, size))
    row("centre crop", lambda: preparation.center_crop(resized))
    with mock.patch.object(jpeg, "simplejpeg", None):
        row("**`prepare`, NumPy**", lambda: preparation.prepare(frame, size))
    if jpeg.simplejpeg is not None:
        row("**`prepare`, simplejpeg**", lambda: preparation.prepare(frame, size))
    row("`normalize`, two towers", lambda: preparation.normalize(resized, means, stds))


def synthetic_frame(height: int, width: int) -> np.ndarray:
    """Soft shapes with some noise, uint8 (height, width, 3): as hard to compress as a camera's frame."""
    rng = np.random.default_rng(0)
    down, across = np.linspace(0, 9, height)[:, None, None], np.linspace(0, 9, width)[:, None]
    frame = 128 + 90 * np.sin(down + np.arange(3)) * np.cos(across) + rng.normal(0, 4, (height, width, 3))
    return np.clip(frame, 0, 255).astype(np.uint8)


def milliseconds(run: Callable[[], np.ndarray], runs: int) -> list[float]:
    for _ in range(5):
        run()
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        run()
        times.append(1000 * (time.perf_counter() - start))
    return times


if __name__ == "__main__":
    main()
