"""95 % intervals of what an evaluation measures."""

from __future__ import annotations

import math
from collections.abc import Sequence


def wilson_interval(successes: int, trials: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Wilson's score interval of a success rate, 95 % by default: two numbers in 0...1.

    Unlike the normal approximation it stays inside 0...1 and is not empty at 0 or 100 %.

    Raises:
        ValueError: no trials, or successes outside 0...trials.
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(f"successes must be in 0...trials with at least one trial, got {successes} of {trials}")
    rate, z2 = successes / trials, z * z
    centre = (rate + z2 / (2 * trials)) / (1 + z2 / trials)
    half = z * math.sqrt(rate * (1 - rate) / trials + z2 / (4 * trials * trials)) / (1 + z2 / trials)
    # At the ends the bounds are 0 and 1 exactly; the formula leaves a rounding error there.
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == trials else centre + half
    return low, high


def mean_interval(values: Sequence[float], z: float = 1.959963984540054) -> tuple[float, float]:
    """The interval of a mean, 95 % by default, by the normal approximation.

    Raises:
        ValueError: fewer than two values, whose spread is not known.
    """
    count = len(values)
    if count < 2:
        raise ValueError(f"an interval of a mean needs two values or more, got {count}")
    mean = sum(values) / count
    half = z * math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1) / count)
    return mean - half, mean + half
