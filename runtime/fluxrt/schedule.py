"""The noise schedule of FLUX.2: flow-match Euler sigmas, shifted by image size and number of steps."""

from __future__ import annotations

import math


def empirical_mu(image_tokens: int, steps: int) -> float:
    """The shift exponent for `image_tokens` and `steps`, as Black Forest Labs fitted it (FLUX.2, compute_empirical_mu).

    Above 4300 tokens it depends on the tokens alone; below, it lies on the line through the values for 10 and 200 steps.
    """
    at_200 = 0.00016927 * image_tokens + 0.45666666
    if image_tokens > 4300:
        return at_200
    at_10 = 8.73809524e-05 * image_tokens + 1.89833333
    slope = (at_200 - at_10) / 190.0
    return slope * steps + at_200 - 200.0 * slope


def flow_match_sigmas(image_tokens: int, steps: int) -> list[float]:
    """`steps + 1` sigmas from 1 down to 0: evenly spaced, then shifted exponentially by `empirical_mu`."""
    shift = math.exp(empirical_mu(image_tokens, steps))
    even = [1.0 + (1.0 / steps - 1.0) * i / (steps - 1) if steps > 1 else 1.0 for i in range(steps)]
    return [shift / (shift + (1.0 / t - 1.0)) for t in even] + [0.0]


SCHEDULES = {"flux2-flow-match": flow_match_sigmas}
