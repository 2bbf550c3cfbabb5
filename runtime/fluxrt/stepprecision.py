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


class Body(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The `steps` that run a body, and the `layers` whose inputs it does not round, although `body` does."""

    steps: tuple[int, ...]
    layers: tuple[str, ...]


class StepPrecision(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The bodies that some steps run, by name; steps are counted from 0 in a generation of `steps`, all others run `body`.

    A generation of another number of steps runs at each of them what is run at that part of the way: step i of n does as step
    floor((i + 1/2) * steps / n) of `steps`.
    """

    steps: int
    bodies: dict[str, Body]

    def __post_init__(self) -> None:
        for name, body in self.bodies.items():
            if not name.startswith(f"{BODY}-") or not all(0 <= number < self.steps for number in body.steps):
                raise ValueError(f"{name!r} cannot be the body of steps {list(body.steps)} of {self.steps}")

    def body(self, number: int, steps: int) -> str:
        """What step `number` (from 0) of a generation of `steps` steps is to run."""
        compiled = (2 * number + 1) * self.steps // (2 * steps)
        return next((name for name, body in self.bodies.items() if compiled in body.steps), BODY)


def bodies_of(precision: StepPrecision | None, steps: int, there: Collection[str]) -> list[str]:
    """The body of each of `steps` steps, for a target that has those that are `there`."""
    wanted = [BODY if precision is None else precision.body(number, steps) for number in range(steps)]
    return [body if body in there else BODY for body in wanted]


def step_words(precision: StepPrecision) -> list[str]:
    """A sentence for every body: which steps run it, counted from 1, and what it leaves alone."""
    return [
        f"steps {_spans(body.steps)} of {precision.steps} leave the inputs of {len(body.layers)} layers in 16 bits ({name})"
        for name, body in precision.bodies.items()
    ]


def _spans(numbers: tuple[int, ...]) -> str:
    spans: list[list[int]] = []
    for number in numbers:
        if spans and spans[-1][1] == number:
            spans[-1][1] = number + 1
        else:
            spans.append([number + 1, number + 1])
    return ", ".join(str(first) if first == last else f"{first} to {last}" for first, last in spans)
