"""Which body a step runs: the one that rounds the inputs of its layers, or another that rounds fewer of them.

A target may have bodies beside `body` that read the same weights (fluxrt.manifest.Target.bodies). One that has not the body a
step is to run, since it rounds no inputs at all, runs `body`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from collections.abc import Collection

BODY = "body"
"""The graph of all blocks. The names of others begin with it and a hyphen."""


class StepPrecision(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """By body the steps that run it, counted from 0 in a generation of `steps` steps; all others run `body`.

    A generation of another number of steps runs at each of them what is run at that part of the way: step i of n does as step
    floor((i + 1/2) * steps / n) of `steps`.
    """

    steps: int
    bodies: dict[str, tuple[int, ...]]

    def __post_init__(self) -> None:
        for body, numbers in self.bodies.items():
            if not body.startswith(f"{BODY}-") or not all(0 <= number < self.steps for number in numbers):
                raise ValueError(f"{body!r} cannot be the body of steps {list(numbers)} of {self.steps}")

    def body(self, number: int, steps: int) -> str:
        """What step `number` (from 0) of a generation of `steps` steps is to run."""
        compiled = (2 * number + 1) * self.steps // (2 * steps)
        return next((body for body, numbers in self.bodies.items() if compiled in numbers), BODY)


def bodies_of(precision: StepPrecision | None, steps: int, there: Collection[str]) -> list[str]:
    """The body of each of `steps` steps, for a target that has those that are `there`."""
    wanted = [BODY if precision is None else precision.body(number, steps) for number in range(steps)]
    return [body if body in there else BODY for body in wanted]
