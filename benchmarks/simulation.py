"""How fast an evaluation is: episodes per minute and the shares of rendering, physics and policy.

python benchmarks/simulation.py --policy embedded --processes 2 --episodes 4
python benchmarks/simulation.py --policy embedded --processes 2 --episodes 4 --black-images
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from vla_adapter_hf.simulation.evaluate import evaluate
from vla_adapter_hf.simulation.placement import PLACEMENTS
from vla_adapter_hf.simulation.settings import EvaluationSettings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", default="noop", help="oracle, noop, embedded, or a checkpoint")
    parser.add_argument("--suite", default="libero_object")
    parser.add_argument("--placement", default="official", choices=PLACEMENTS)
    parser.add_argument("--tasks", type=int, nargs="+", default=[0])
    parser.add_argument("--episodes", type=int, default=2)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--black-images", action="store_true", help="nothing is rendered")
    parser.add_argument("--hard-reset", action="store_true", help="2 to 4 s instead of 0.2 s, the same episode")
    parser.add_argument("--output", type=Path, default=None, help="keep the results here (resumes what is there)")
    arguments = parser.parse_args()
    settings = EvaluationSettings(
        tasks=arguments.tasks,
        episodes=arguments.episodes,
        placement=arguments.placement,
        hard_reset=arguments.hard_reset,
        processes=arguments.processes,
        black_images=arguments.black_images,
    )
    with tempfile.TemporaryDirectory() as scratch:
        output = arguments.output or Path(scratch)
        evaluate(arguments.policy, arguments.suite, output, settings)
        print((output / "summary.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
