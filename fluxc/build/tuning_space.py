"""What `fluxc tune` chooses from: options of every group of layers under each setting of steps, and what a choice comes to."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from fluxc.calibrate.choice import Axis, Choice, Groups, Limits, Option, Setting, taken
from fluxc.calibrate.costs_stage import Costs
from fluxc.calibrate.tuning_stage import Wanted, sources_of
from fluxc.formats.bf16 import BF16
from fluxc.formats.registry import FORMATS
from fluxc.predict.gpus import Gpu
from fluxc.predict.scaling import Prediction, Subject, predict, recipe_model
from fluxc.quantize.plan import LayerPlan, to_quantize
from fluxc.quantize.source import Source
from fluxc.recipe.load import LoadedRecipe
from fluxc.recipe.structs import StepCache
from fluxc.stepcache.policy import best_schedules
from fluxc.stepcache.skips_stage import SkipCosts

SHARES = (0, 1 / 24, 1 / 12, 1 / 8, 1 / 6, 1 / 4, 1 / 3, 1 / 2, 2 / 3, 5 / 6)
"""Parts of an image's steps that are tried for leaving inputs as they are."""
SKIPPED = (0, 1 / 24, 1 / 12, 1 / 8, 1 / 6, 5 / 24, 1 / 4, 1 / 3, 5 / 12, 1 / 2, 7 / 12, 2 / 3)
"""The same for skipping."""


@dataclass(frozen=True)
class Wish:
    """Limits of a step's predicted `seconds` and of the predicted bytes of the fullest GPU's `memory`, one or both; or one of
    the relative `error`, under which there is to be the `least` of time or memory."""

    seconds: float | None = None
    memory: float | None = None
    error: float | None = None
    least: Literal["time", "memory"] = "time"

    @property
    def axis(self) -> Axis:
        """What is weighed against error."""
        if self.seconds is not None:
            return "seconds"
        return "weights" if self.memory is not None or self.least == "memory" else "seconds"


@dataclass(frozen=True)
class Point:
    """A choice: the formats of layers, at `exact_steps` (from 0) the layers that leave their inputs as they are, and the steps
    that are skipped; predicted seconds of a step (the average over all of an image's, skipped ones too), bytes of the
    transformer's weights and of the fullest GPU, and the velocity's relative error, as costs add up to and, where it was
    measured, of the whole."""

    choice: dict[str, str]
    seconds: float
    weights: int
    memory: float
    predicted_error: float
    error: float | None = None
    exact_layers: tuple[str, ...] = ()
    exact_steps: tuple[int, ...] = ()
    skipped: tuple[int, ...] = ()

    @property
    def wanted(self) -> Wanted:
        """What is to be measured of it."""
        return Wanted(self.choice, self.exact_layers, self.exact_steps, self.skipped)

    @property
    def formats(self) -> dict[str, int]:
        """How many layers each quantized format has."""
        names = list(self.choice.values())
        return {format: names.count(format) for format in FORMATS if format in names}


@dataclass(frozen=True)
class StepChoices:
    """What may be chosen of steps: with `exact` how many leave inputs as they are, and with `skips`, the costs of skipped ones,
    how many are skipped, in schedules that keep to `cache`."""

    exact: bool
    skips: SkipCosts | None
    cache: StepCache


@dataclass(frozen=True)
class _Steps:
    """The steps of an image of which some are skipped: of each the one whose residual it takes (itself where it is computed),
    what skipping adds to the squared error, and the computed ones in the order in which inputs are left as they are."""

    sources: list[int]
    cost: float
    ranked: list[int]

    @property
    def skipped(self) -> tuple[int, ...]:
        return tuple(step for step, source in enumerate(self.sources) if step != source)

    def mean(self, cost: np.ndarray) -> float:
        """Of a cost by step, over all steps, each of which has that of the step whose residual it takes."""
        return float(cost[self.sources].mean())


class Model:
    """Predicts what choices of a recipe take on so many GPUs of one kind; `costs` are those of its groups of layers.

    `space` are the options of each group under each setting; last comes what skipping itself saves and costs.
    """

    def __init__(
        self, loaded: LoadedRecipe, source: Source, on: tuple[Gpu, int], costs: list[Costs], steps: StepChoices
    ) -> None:
        self._gpu, self._gpus = on
        self._entries = {entry.layer.name: entry for entry in to_quantize(source.plans["transformer"])}
        subject = recipe_model(loaded, source)
        every = [self._in(entry, BF16) if entry.layer.name in self._entries else entry for entry in subject.plan]
        weights = sum(entry.bytes_after for entry in every) - sum(entry.bytes_after for entry in subject.plan)
        self._subject = replace(subject, plan=every, weights=subject.weights + weights, batches=(1,), bodies={})
        self._base = self._predicted({})
        self._costs, self._steps = costs, subject.steps
        self._schedules = self._scheduled(steps)
        alone = [self._formats(group) for group in costs]
        self.space: dict[Setting, Groups] = {}
        for skipped, schedule in self._schedules.items():
            computed = self._steps - skipped
            for exact in sorted({round(share * computed) for share in SHARES}) if steps.exact else [0]:
                self.space[skipped, exact] = [
                    *(
                        self._options(group, of_group, schedule, exact)
                        for group, of_group in zip(costs, alone, strict=True)
                    ),
                    [Option("", schedule.cost, -skipped / self._steps * self._base[1].time.seconds, 0.0)],
                ]

    def _scheduled(self, steps: StepChoices) -> dict[int, _Steps]:
        """By how many steps are skipped the best schedule."""
        found, cache = {0: self._of_schedule((), None)}, steps.cache
        if steps.skips is not None:
            # The trace is a mean of images already.
            best = best_schedules(steps.skips.latents[None], cache.first, cache.last, cache.max_consecutive_skips)
            counts = {round(share * self._steps) for share in SKIPPED}
            found |= {count: self._of_schedule(best[count][0], steps.skips) for count in counts & set(best) - {0}}
        return dict(sorted(found.items()))

    def _of_schedule(self, skipped: tuple[int, ...], skips: SkipCosts | None) -> _Steps:
        sources = sources_of(skipped, self._steps)
        cost = sum(float(skips.velocity[step, step - sources[step] - 1]) for step in skipped) if skips else 0.0
        gains = self._gains()
        of_computed = {step: sum(gains[step] for source in sources if source == step) for step in set(sources)}
        return _Steps(sources, cost / self._steps, sorted(of_computed, key=lambda step: (-of_computed[step], step)))

    def _gains(self) -> np.ndarray:
        """What unrounded inputs gain at every step, over all groups."""
        gains = np.zeros(self._steps)
        for group in self._costs:
            for format, cost in group.by_format.items():
                twin = FORMATS[format].weights_alone
                if twin in group.by_format:
                    gains += cost - group.by_format[twin]
        return gains

    @staticmethod
    def _in(entry: LayerPlan, format: str) -> LayerPlan:
        return replace(entry, format=format)

    def _predicted(self, choice: dict[str, str]) -> tuple[Subject, Prediction]:
        plan = [self._in(entry, choice.get(entry.layer.name, entry.format)) for entry in self._subject.plan]
        weights = self._subject.weights + sum(entry.bytes_after for entry in plan)
        weights -= sum(entry.bytes_after for entry in self._subject.plan)
        subject = replace(self._subject, plan=plan, weights=weights)
        return subject, predict(subject, self._gpu, (self._gpus,)).predictions[0]

    def _formats(self, group: Costs) -> dict[str, tuple[float, float]]:
        """What each format the group was measured in adds to the seconds of a step and to the bytes of weights."""
        subject, base = self._base
        found = {}
        for format in group.by_format:
            changed, prediction = self._predicted(dict.fromkeys(group.layers, format))
            found[format] = prediction.time.seconds - base.time.seconds, float(changed.weights - subject.weights)
        return found

    def _options(
        self, group: Costs, formats: dict[str, tuple[float, float]], schedule: _Steps, exact: int
    ) -> list[Option]:
        """A group in bf16, in each format it was measured in, and in those whose inputs may be left as they are at `exact` of
        the computed steps."""
        found, every = [Option(BF16, 0.0, 0.0, 0.0)], self._steps
        computed, at = len(schedule.ranked), schedule.ranked[:exact]
        for format, (seconds, weights) in formats.items():
            cost, twin = group.by_format[format], FORMATS[format].weights_alone
            found.append(Option(format, schedule.mean(cost), computed / every * seconds, weights))
            if at and twin in formats:
                mixed = cost.copy()
                mixed[at] = group.by_format[twin][at]
                taken = ((computed - exact) * seconds + exact * formats[twin][0]) / every
                found.append(Option(format, schedule.mean(mixed), taken, weights, is_exact=True))
        return found

    def point(self, choice: Choice) -> Point:
        """What a choice comes to."""
        (skipped, count), picks = choice
        schedule = self._schedules[skipped]
        options = taken(self.space[choice[0]], picks)
        formats: dict[str, str] = {}
        exact: list[str] = []
        for group, option in zip(self._costs, options[:-1], strict=True):
            formats |= {layer: option.format for layer in group.layers if option.format != BF16}
            exact += group.layers if option.is_exact else ()
        subject, prediction = self._predicted(formats)
        computed, memory = len(schedule.ranked), prediction.first.total
        seconds = computed * prediction.time.seconds
        if exact:
            alone = {layer: FORMATS[formats[layer]].weights_alone for layer in exact}
            other = self._predicted(formats | alone)[1]
            seconds += count * (other.time.seconds - prediction.time.seconds)
            memory = max(memory, other.first.total)
        return Point(
            formats,
            seconds / self._steps,
            subject.weights,
            memory,
            math.sqrt(sum(option.cost for option in options)),
            exact_layers=tuple(exact),
            exact_steps=tuple(sorted(schedule.ranked[:count])) if exact else (),
            skipped=schedule.skipped,
        )

    @property
    def plain(self) -> Point:
        """Every layer in bf16."""
        subject, prediction = self._base
        return Point({}, prediction.time.seconds, subject.weights, prediction.first.total, 0.0, 0.0)

    def limits(self, wish: Wish) -> Limits:
        """`wish` as what groups may add to everything in bf16."""
        prediction = self._base[1]
        return Limits(
            None if wish.error is None else wish.error**2,
            None if wish.seconds is None else wish.seconds - prediction.time.seconds,
            None if wish.memory is None else wish.memory - prediction.first.total,
        )
